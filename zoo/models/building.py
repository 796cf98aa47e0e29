"""``build``: an architecture, an operator and the images it is for, made into one model."""

import dataclasses
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from operators import OperatorConfig, convert_decoupled, decoupled_layers
from operators.lookup import look_up, unknown_name
from zoo import architectures
from zoo.models.transform import ImageTransform

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    name: getattr(architectures, name) for name in architectures.__all__
}

PLAIN = "conv"

# Of a network that a checkpoint may describe.
MOST_PARAMETERS = 5000

# What timm is told to build in place of an architecture of its own, which it would load without our checks, and plain
# (see zoo.checkpoints.timm_entry_points).
OF_TIMM = "decoupled_zoo"

# The mean and standard deviation of ImageNet's pixels in [0, 1], for RGB images of which nothing else is known.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_plain(name: str) -> bool:
    """Return whether a checkpoint of that name (<data>_<architecture>_<operator>) is a plain twin."""
    return name.endswith(f"_{PLAIN}")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a model again, as JSON-able values.

    Args:
        architecture: a name that :func:`list_architectures` lists.
        operator: the operator of its convolutions; None for the plain network.
        class_names: one for each logit.
        in_chans: channels of the images.
        input_size: height and width of the images, in pixels.
        mean, std: of the pixels in [0, 1], one for each channel.
        model_args: further arguments of the architecture.
        layer_settings: by the names of convolutions, the settings of their operator that are not those of ``operator``.
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

    @property
    def operator_name(self) -> str:
        return self.operator.name if self.operator else PLAIN

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; the plain network's operator is ``"conv"``.

        An architecture of timm is called ``"decoupled_zoo"``, and its own name is among ``model_args``: timm, which
        reads the same fields, would build the plain one and believe whatever weights there are.
        """
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        if not self.layer_settings:
            del fields["layer_settings"]
        if self.architecture not in ARCHITECTURES:
            fields["architecture"] = OF_TIMM
            fields["model_args"] = {"architecture": self.architecture, **self.model_args}
        return {**fields, "operator": self.operator.to_dict() if self.operator else PLAIN}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelSpec":
        """Return the spec that :meth:`to_dict` described; further fields are ignored."""
        values = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name != "layer_settings"}
        values["layer_settings"] = fields.get("layer_settings", {})
        if values["architecture"] == OF_TIMM:
            values["model_args"] = dict(values["model_args"])
            values["architecture"] = values["model_args"].pop("architecture", OF_TIMM)
        values.update({name: tuple(values[name]) for name in ("class_names", "mean", "std")})
        operator = values["operator"]
        return cls(**{**values, "operator": None if operator == PLAIN else OperatorConfig.parse(operator)})

    def build(self) -> "ImageModel":
        """Return a freshly initialised model of this spec, in training mode.

        Raises:
            ValueError, TypeError: what :func:`build` refuses, or settings of a layer that is not decoupled. The size of
            the images was tried when the spec was made.
        """
        model = _build(
            self.architecture,
            self.operator or PLAIN,
            class_names=self.class_names,
            in_chans=self.in_chans,
            input_size=self.input_size,
            mean=self.mean,
            std=self.std,
            architecture_args=self.model_args,
        )
        layers = decoupled_layers(model.network)
        for name, settings in self.layer_settings.items():
            layer = look_up(layers, name, "decoupled layer")
            layer.set_operator({**self.operator.to_dict(), **settings})
        model.spec = dataclasses.replace(model.spec, layer_settings=self.layer_settings)
        return model

    def check_size(self, largest: int) -> None:
        """Refuse a network that is too large, without making its weights.

        Raises:
            ValueError: its parameters take more than ``largest`` bytes, or there are more than ``MOST_PARAMETERS``; or
                what :func:`build` refuses.
            TypeError: as :func:`build`.
        """
        total = number = 0
        thread = threading.get_ident()

        def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            nonlocal total, number
            if parameter is not None and threading.get_ident() == thread:
                total, number = total + parameter.nbytes, number + 1
                if total > largest or number > MOST_PARAMETERS:
                    raise ValueError(f"it takes more than {largest:,} bytes or {MOST_PARAMETERS} tensors")

        # While it is built, for one of a billion layers would never be.
        hook = register_module_parameter_registration_hook(count)
        try:
            with torch.device("meta"):
                _build_network(
                    self.architecture, len(self.class_names), self.in_chans, self.input_size, dict(self.model_args)
                )
        finally:
            hook.remove()


class ImageModel(nn.Module):
    """A network that takes images in [0, 1] and normalises them itself.

    Attributes:
        network: the plain or decoupled network.
        spec: the :class:`ModelSpec` it was built from.
        transform: turns a PIL image into one image of the shape below.

    Shape:
        (N, in_chans, H, W), floats in [0, 1] of any precision, to logits (N, num_classes) in the model's own.

    Raises:
        TypeError: images that are no tensor of floats.
        ValueError: images of another shape, or plainly not in [0, 1]. Their range is looked at outside compiled graphs
            only, and of training on an accelerator in the first batch only.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1), persistent=False)
        self._range_is_checked = False

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        return self.network((images.to(self.mean.dtype) - self.mean) / self.std)

    def normalise_as(self, spec: ModelSpec) -> None:
        """Take over the mean and the standard deviation of another spec."""
        self.spec = dataclasses.replace(self.spec, mean=spec.mean, std=spec.std)
        for buffer, values in ((self.mean, spec.mean), (self.std, spec.std)):
            buffer.copy_(torch.tensor(values).view(-1, 1, 1))

    def set_input_size(self, input_size: int) -> None:
        """Take images of another size from now on.

        Raises:
            ValueError: the network cannot take images of that size.
        """
        if input_size != self.spec.input_size:
            usual = self.spec
            self.spec = dataclasses.replace(usual, input_size=input_size)
            try:
                check_input_size(self)
            except ValueError:
                self.spec = usual
                raise

    def describe(self) -> ModelSpec:
        """Return ``spec`` with the settings that single layers have of their own, as :func:`calibrate` gives them."""
        if self.spec.operator is None:
            return self.spec
        usual = self.spec.operator.to_dict()
        own = {
            name: {field: value for field, value in layer.operator.to_dict().items() if value != usual[field]}
            for name, layer in decoupled_layers(self.network).items()
        }
        return dataclasses.replace(self.spec, layer_settings={name: values for name, values in own.items() if values})

    @property
    def transform(self) -> ImageTransform:
        return ImageTransform(self.spec.in_chans, self.spec.input_size)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.spec.class_names

    def rename_classes(self, class_names: Sequence[str]) -> None:
        """Give the classes other names.

        Raises:
            ValueError: more or fewer names than classes.
        """
        names = _class_names(class_names, len(self.class_names))
        self.spec = dataclasses.replace(self.spec, class_names=names)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the last layer, or layers, of the network, as timm's networks do."""
        return self.network.get_classifier()

    def reset_classifier(self, class_names: Sequence[str]) -> None:
        """Give the network a fresh classifier for these classes.

        Raises:
            ValueError: no class.
        """
        names = _class_names(class_names, None)
        self.network.reset_classifier(len(names))
        self.spec = dataclasses.replace(self.spec, class_names=names)

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images must be a tensor of floats in [0, 1], got {type(images).__name__}; "
                "model.transform(image)[None] makes one of a PIL image, torch.from_numpy of an array"
            )
        if not images.is_floating_point():
            raise TypeError(f"images must be floats in [0, 1], got {images.dtype}; use image.float() / 255")
        if images.dim() != 4 or images.shape[1] != self.spec.in_chans:
            raise ValueError(
                f"images must have shape (N, {self.spec.in_chans}, H, W), got {tuple(images.shape)}; "
                "model.transform turns a PIL image into one of them"
            )
        if images.numel() and not self._is_unreadable(images):
            self._check_range(*(bound.item() for bound in images.detach().aminmax()))
            self._range_is_checked = True

    def _is_unreadable(self, images: Tensor) -> bool:
        """Say whether pixels cannot be looked at, as in a graph that is recorded, or not without a cost."""
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack():
            return True
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        # Reading a number waits for all that the accelerator has yet to do.
        return self._range_is_checked and self.training and images.device.type != "cpu"

    def _check_range(self, low: float, high: float) -> None:
        if math.isnan(low) or math.isnan(high):
            raise ValueError(
                "images must be in [0, 1], got NaN (not a number); find out where it arises, e.g. by "
                "images.isnan().nonzero()"
            )
        if low < -0.5 or high > 1.5:
            raise ValueError(
                f"images must be in [0, 1], got values from {low:.3g} to {high:.3g}; "
                "divide bytes by 255, and do not normalise: the model does"
            )


def build(
    architecture: str,
    operator: OperatorConfig | str | Mapping[str, Any] = PLAIN,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    input_size: int | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **architecture_args: Any,
) -> ImageModel:
    """Return a freshly initialised model in training mode.

    Args:
        architecture: one of ours (``cnn9``, ``resnet20``, ...) or any timm architecture.
        operator: ``"conv"`` for the plain network, or an operator as :func:`convert_decoupled` takes it.
        num_classes: number of logits; by default as many as ``class_names``, else 10.
        in_chans: channels of the images.
        input_size: height and width of the images, in pixels; by default what the architecture is made for. An
            architecture of fixed size, such as a vision transformer, is built for this one.
        class_names: one for each class; ``"0"``, ``"1"``, ... by default.
        mean, std: of the pixels in [0, 1], one for each channel; by default those of the weights, if they are
            ``pretrained``, else ImageNet's for RGB, else 0.5 and 0.25.
        architecture_args: further arguments of the architecture, e.g. ``batch_norm=False``.

    Raises:
        ValueError: an unknown architecture or operator, numbers that do not fit together, or an ``input_size`` that
            the architecture cannot take.
        TypeError: an argument that the architecture does not have.
    """
    model = _build(
        architecture,
        operator,
        num_classes=num_classes,
        in_chans=in_chans,
        input_size=input_size,
        class_names=class_names,
        mean=mean,
        std=std,
        architecture_args=architecture_args,
    )
    # The size that it is made for needs no proof, which would cost as much as an image.
    if model.spec.input_size != _default_input_size(model.network):
        check_input_size(model)
    return model


def _build(
    architecture: str,
    operator: OperatorConfig | str | Mapping[str, Any],
    *,
    in_chans: int,
    input_size: int | None,
    class_names: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    architecture_args: Mapping[str, Any],
    num_classes: int | None = None,
) -> ImageModel:
    config = None if operator == PLAIN else OperatorConfig.parse(operator)
    names = _class_names(class_names, num_classes)
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
    if input_size is not None and input_size < 1:
        raise ValueError(f"input_size must be at least 1, got {input_size}")
    network = _build_network(architecture, len(names), in_chans, input_size, dict(architecture_args))
    if config is not None:
        convert_decoupled(network, config)
    rgb = in_chans == 3
    default_mean, default_std = (IMAGENET_MEAN, IMAGENET_STD) if rgb else ([0.5] * in_chans, [0.25] * in_chans)
    # Pretrained weights expect the pixels that they were trained on.
    made_for = getattr(network, "pretrained_cfg", None) if architecture_args.get("pretrained") else None
    if made_for:
        default_mean, default_std = made_for["mean"], made_for["std"]
        if not rgb:
            default_mean, default_std = ([sum(values) / 3] * in_chans for values in (default_mean, default_std))
    spec = ModelSpec(
        architecture=architecture,
        operator=config,
        class_names=names,
        in_chans=in_chans,
        input_size=input_size or _default_input_size(network),
        mean=_per_channel("mean", mean or default_mean, in_chans),
        std=_per_channel("std", std or default_std, in_chans),
        # Where the first weights came from is no part of the network.
        model_args={name: value for name, value in architecture_args.items() if name != "pretrained"},
    )
    return ImageModel(network, spec)


def check_input_size(model: ImageModel) -> None:
    """Put one black image of ``model.spec.input_size`` through the network, in evaluation mode.

    Raises:
        ValueError: the network cannot take images of that size.
    """
    spec, training = model.spec, model.training
    image = model.mean.new_zeros(1, spec.in_chans, spec.input_size, spec.input_size)
    try:
        with torch.no_grad():
            model.eval()(image)
    # A network says in as many ways as it has layers that an image does not fit.
    except Exception as error:
        made_for = _default_input_size(model.network)
        raise _size_error(spec.architecture, made_for, spec.input_size, error) from error
    finally:
        model.train(training)


def list_architectures(own: bool = False) -> list[str]:
    """Return the names that :func:`build` takes: our own, and unless ``own`` all of timm's."""
    return sorted(ARCHITECTURES) if own else timm.list_models()


def _build_network(
    architecture: str, num_classes: int, in_chans: int, input_size: int | None, architecture_args: dict[str, Any]
) -> nn.Module:
    arguments = {"num_classes": num_classes, "in_chans": in_chans, **architecture_args}
    function = ARCHITECTURES.get(architecture)
    if function is None:
        if not timm.is_model(architecture):
            message = unknown_name("architecture", architecture, ARCHITECTURES, unlisted=timm.list_models())
            raise ValueError(f"{message} zoo.list_architectures() lists them all.")
        return _build_timm_network(architecture, input_size, arguments)
    legal = inspect.signature(function).parameters
    for argument in architecture_args:
        if argument not in legal:
            raise TypeError(unknown_name(f"argument of {architecture}", argument, legal))
    if input_size and "input_size" in legal:
        arguments["input_size"] = input_size
    return function(**arguments)


def _build_timm_network(architecture: str, input_size: int | None, arguments: dict[str, Any]) -> nn.Module:
    made_for = timm.get_pretrained_cfg(architecture)
    if input_size is None or not made_for.fixed_input_size:
        return timm.create_model(architecture, **arguments)
    try:
        return timm.create_model(architecture, **{"img_size": input_size, **arguments})
    # How timm says that patches or windows do not fit into the image; or that it has no weights.
    except (AssertionError, RuntimeError, ZeroDivisionError) as error:
        if "No pretrained weights" in str(error):
            raise
        raise _size_error(architecture, made_for.input_size[-1], input_size, error) from error


def _size_error(architecture: str, made_for: int, size: int, error: Exception) -> ValueError:
    reason = str(error) or type(error).__name__
    return ValueError(
        f"{architecture}, made for images of {made_for}×{made_for} pixels, cannot take {size}×{size} ({reason}); "
        "choose another size (input_size; on the command line --data.input_size, with --data ImageFolder) or another "
        "architecture (cnn6 and resnet20 take small images)"
    )


def _default_input_size(network: nn.Module) -> int:
    return network.input_size if hasattr(network, "input_size") else network.pretrained_cfg["input_size"][-1]


def _class_names(class_names: Sequence[str] | None, num_classes: int | None) -> tuple[str, ...]:
    if class_names is None:
        class_names = [str(label) for label in range(10 if num_classes is None else num_classes)]
    if num_classes is not None and num_classes != len(class_names):
        raise ValueError(f"num_classes={num_classes}, but there are {len(class_names)} class names")
    if not class_names:
        raise ValueError("a model needs at least one class (num_classes, class_names), got none")
    return tuple(class_names)


def _per_channel(what: str, values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    if len(values) != in_chans:
        raise ValueError(f"{what} needs one number for each of the {in_chans} channels, got {list(values)}")
    if what == "std" and min(values) <= 0:
        raise ValueError(f"std must be more than 0, got {list(values)}")
    return tuple(float(value) for value in values)
