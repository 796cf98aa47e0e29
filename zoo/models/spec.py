"""What a model is made of, as plain values from which it can be built again."""

import dataclasses
import unicodedata
from collections.abc import Mapping
from typing import Any

import timm

from operators import OperatorConfig
from operators.convert import STAND_IN
from zoo.architectures import ARCHITECTURES

PLAIN = "conv"

# Fields that a description may lack.
_OPTIONAL = ("layer_settings", "plain_layers")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a model again, as JSON-able values.

    Args:
        architecture: a name that :func:`list_architectures` lists.
        operator: the operator of its convolutions; None for the plain network.
        class_names: one for each logit, in Unicode's composed form.
        in_chans: channels of the images.
        input_size: height and width of the images, in pixels.
        mean, std: of the pixels in [0, 1], one for each channel.
        model_args: further arguments of the architecture.
        layer_settings: by the names of convolutions, the settings of their operator that are not those of ``operator``.
        plain_layers: of a decoupled network, the names of the convolutions that are not; None if earlier versions made
            it, which left plain nothing but gates and a convolution that is the classifier.
    """

    architecture: str
    operator: OperatorConfig | None
    class_names: tuple[str, ...]
    in_chans: int
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model_args: Mapping[str, Any]
    layer_settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    plain_layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(map(composed, self.class_names)))

    @property
    def operator_name(self) -> str:
        return self.operator.name if self.operator else PLAIN

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; the plain network's operator is ``"conv"``.

        The architecture of a decoupled network, and each of timm, is called ``"decoupled_zoo"``, and its own name is
        among ``model_args``: timm and transformers, which read the same fields, would build the plain network and
        believe whatever weights there are.
        """
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        if not self.layer_settings:
            del fields["layer_settings"]
        if self.plain_layers is None:
            del fields["plain_layers"]
        if self.operator is not None or self.architecture not in ARCHITECTURES:
            fields["architecture"] = STAND_IN
            fields["model_args"] = {"architecture": self.architecture, **self.model_args}
        return {**fields, "operator": self.operator.to_dict() if self.operator else PLAIN}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelSpec":
        """Return the spec that :meth:`to_dict` described; further fields are ignored."""
        values = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name not in _OPTIONAL}
        values["layer_settings"] = fields.get("layer_settings", {})
        plain = fields.get("plain_layers")
        values["plain_layers"] = None if plain is None else tuple(plain)
        if values["architecture"] == STAND_IN:
            values["model_args"] = dict(values["model_args"])
            values["architecture"] = values["model_args"].pop("architecture", STAND_IN)
        # Earlier versions recorded names that timm has changed, and the tag of the weights.
        values["architecture"] = name_of_today(values["architecture"]).partition(".")[0]
        values.update({name: tuple(values[name]) for name in ("class_names", "mean", "std")})
        operator = values["operator"]
        return cls(**{**values, "operator": None if operator == PLAIN else OperatorConfig.parse(operator)})


def name_of_today(architecture: str) -> str:
    """Return what timm calls an architecture now, with the tag of its weights, if it has renamed it."""
    return timm.models.get_deprecated_models().get(architecture) or architecture


def composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), since macOS and Linux write é by other characters."""
    return unicodedata.normalize("NFC", name)
