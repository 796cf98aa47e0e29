"""``DecoupledConv2d`` and the description of its operator."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from operators.angular import ANGULARS
from operators.functional import decoupled_conv2d, patch_norm
from operators.lookup import look_up, unknown_name
from operators.magnitude import MAGNITUDES, RADIUS_MODES, WEIGHTINGS, Magnitude


@dataclasses.dataclass(frozen=True)
class OperatorConfig:
    """A decoupled operator ``h(‖w‖, ‖x‖) · g(θ)``, described by plain values.

    Args:
        magnitude: a key of ``MAGNITUDES``: ``h`` as a function of ``n = ‖x‖``.
        angular: a key of ``ANGULARS``: ``g``.
        weighting: a key of ``WEIGHTINGS``: ``h`` times 1 (``"none"``), ``‖w‖`` (``"linear"``) or ``tanh ‖w‖``.
        radius: ``ρ``, in units of the patch norm (``r``, if relative); the initial value, if learned.
        radius_mode: ``"fixed"``, ``"learned"`` or ``"learned_per_channel"``.
        radius_relative: ``ρ = (r² + 1e-4) E[n]``, the authors' form, instead of ``ρ = radius``.
        alpha: ``α > 0``, the scale of ``h``.
        beta: ``β ≥ 0``, the second slope of ``seg`` and ``mix``.
        sigmoid_k: ``k > 0`` of the angular function ``sigmoid``.
        power: ``B ≥ 1`` of the angular function ``power``.
        eps: added inside the square root of both norms.

    Settings that an operator does not use are kept and ignored.

    Raises:
        ValueError: an unknown name, or a number outside its range.
        TypeError: a field of the wrong type.
    """

    magnitude: str
    angular: str
    weighting: str = "none"
    radius: float = 1.0
    radius_mode: str = "fixed"
    radius_relative: bool = False
    alpha: float = 1.0
    beta: float = 0.5
    sigmoid_k: float = 0.3
    power: float = 2.0
    eps: float = 1e-4

    def __post_init__(self) -> None:
        look_up(MAGNITUDES, self.magnitude, "magnitude")
        look_up(ANGULARS, self.angular, "angular function")
        look_up(WEIGHTINGS, self.weighting, "weighting")
        look_up(dict.fromkeys(RADIUS_MODES), self.radius_mode, "radius_mode")
        if not isinstance(self.radius_relative, bool):
            raise TypeError(f"radius_relative must be true or false, got {self.radius_relative!r}")
        for field, lowest in _LOWEST.items():
            _check_number(field, getattr(self, field), *lowest)

    @classmethod
    def parse(cls, operator: "OperatorConfig | str | Mapping[str, Any]") -> "OperatorConfig":
        """Return a config from a config, a name such as ``"tanh_cosine"``, or a mapping of fields.

        A mapping gives ``magnitude`` and ``angular``, or both at once as ``name``.
        """
        if isinstance(operator, cls):
            return operator
        if isinstance(operator, str):
            return cls(*_split_name(operator))
        if isinstance(operator, Mapping):
            fields = dict(operator)
            if "name" in fields:
                named = dict(zip(("magnitude", "angular"), _split_name(fields.pop("name")), strict=True))
                for field in named.keys() & fields.keys():
                    raise ValueError(f"an operator has either 'name' or {field!r}, got both: {dict(operator)}")
                fields |= named
            legal = [field.name for field in dataclasses.fields(cls)]
            for field in fields:
                if field not in legal:
                    raise ValueError(unknown_name("operator setting", field, legal))
            for field in ("magnitude", "angular"):
                if field not in fields:
                    raise ValueError(f"an operator needs {field!r} (or 'name', e.g. 'tanh_cosine'), got {fields}")
            return cls(**fields)
        raise TypeError(
            f"operator must be a name such as 'tanh_cosine', a mapping or an OperatorConfig, got {operator!r}"
        )

    @property
    def name(self) -> str:
        """``"<magnitude>_<angular>"``."""
        return f"{self.magnitude}_{self.angular}"

    def __str__(self) -> str:
        """The name, and the settings that are not the default, to four digits: ``tanh_cosine(radius=2.0)``."""
        defaults = OperatorConfig(self.magnitude, self.angular).to_dict()
        changed = {field: value for field, value in self.to_dict().items() if value != defaults[field]}
        settings = [f"{field}={float(f'{v:.4g}') if isinstance(v, float) else v}" for field, v in changed.items()]
        return self.name + (f"({', '.join(settings)})" if settings else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able dictionary, which :meth:`parse` takes back."""
        return dataclasses.asdict(self)

    def build_magnitude(self, channels: int, dtype: torch.dtype | None = None) -> Magnitude:
        """Return the module ``h`` for a layer with this many output channels; ``dtype`` is that of a learned radius."""
        return MAGNITUDES[self.magnitude](
            alpha=self.alpha,
            beta=self.beta,
            radius=self.radius,
            radius_mode=self.radius_mode,
            relative=self.radius_relative,
            weighting=self.weighting,
            channels=channels,
            dtype=dtype,
        )

    def build_angular(self) -> Callable[[Tensor], Tensor]:
        """Return ``g`` as a function of ``cos θ`` alone."""
        function = ANGULARS[self.angular]
        settings = {name: getattr(self, name) for name in list(inspect.signature(function).parameters)[1:]}
        return functools.partial(function, **settings) if settings else function


class DecoupledConv2d(nn.Conv2d):
    """A convolution that answers ``h(‖w‖, ‖x‖) · g(θ) + bias`` to each patch (see :func:`decoupled_conv2d`).

    It takes the arguments of :class:`torch.nn.Conv2d` and has its state dict; what is learned in the magnitude (a
    ``radius``, a running norm) is added below ``magnitude.``.

    Args:
        operator: a name such as ``"tanh_cosine"``, an :class:`OperatorConfig`, or a mapping of its fields.

    Shape:
        as :class:`torch.nn.Conv2d`: (N, C, H, W) to (N, K, H', W').

    Raises:
        ValueError, TypeError: an operator that :meth:`OperatorConfig.parse` refuses, or arguments that ``nn.Conv2d``
            refuses.
    """

    operator: OperatorConfig
    magnitude: Magnitude
    angular: Callable[[Tensor], Tensor]

    # The plain counterpart, which revert gives back.
    plain = "torch.nn.modules.conv:Conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        operator: OperatorConfig | str | Mapping[str, Any] = "tanh_cosine",
    ) -> None:
        config = OperatorConfig.parse(operator)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.set_operator(config)

    def set_operator(self, operator: OperatorConfig | str | Mapping[str, Any]) -> None:
        """Give this layer another operator; its filters stay, what its old magnitude had learned goes."""
        self.operator = OperatorConfig.parse(operator)
        self.angular = self.operator.build_angular()
        magnitude = self.operator.build_magnitude(self.out_channels, self.weight.dtype)
        self.magnitude = magnitude.to(self.weight.device, self.weight.dtype).train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        return self.respond(input, self.magnitude, self.angular, self.bias)

    def respond(
        self, input: Tensor, magnitude: Magnitude, angular: Callable[[Tensor], Tensor], bias: Tensor | None = None
    ) -> Tensor:
        """Return what this layer would answer with another operator and bias."""
        geometry = self.stride, self.effective_padding, self.dilation, self.groups
        settings = {"eps": self.operator.eps, "padding_mode": self.padding_mode}
        filters = self.effective_weight()
        return decoupled_conv2d(input, filters, bias, *geometry, magnitude=magnitude, angular=angular, **settings)

    def patch_norm(self, input: Tensor) -> Tensor:
        """Return the norm ``n`` of every patch and group, (N, groups, H', W')."""
        geometry = self.stride, self.effective_padding, self.dilation, self.groups
        settings = {"eps": self.operator.eps, "padding_mode": self.padding_mode}
        return patch_norm(input, self.kernel_size, *geometry, **settings)

    def effective_weight(self) -> Tensor:
        """Return the filters as they are convolved with; ``weight`` itself, but for counterparts of timm's layers."""
        return self.weight

    @property
    def effective_padding(self) -> int | tuple[int, int] | str:
        """The padding as :func:`decoupled_conv2d` takes it; ``padding``, but for counterparts of timm's layers."""
        return self.padding

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, operator={self.operator}"


def decoupled_layers(network: nn.Module) -> dict[str, DecoupledConv2d]:
    """Return the decoupled convolutions of a network by their first names."""
    return {name: module for name, module in network.named_modules() if isinstance(module, DecoupledConv2d)}


# Field: (lowest legal value, whether that value itself is legal).
_LOWEST = {
    "radius": (0.0, False),
    "alpha": (0.0, False),
    "beta": (0.0, True),
    "sigmoid_k": (0.0, False),
    "power": (1.0, True),
    "eps": (0.0, False),
}


def _check_number(field: str, value: object, lowest: float, inclusive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field} must be a number, got {value!r}")
    if not math.isfinite(value) or value < lowest or (value == lowest and not inclusive):
        raise ValueError(f"{field} must be {'at least' if inclusive else 'more than'} {lowest:g}, got {value!r}")


def _split_name(name: object) -> tuple[str, str]:
    magnitude, _, angular = str(name).partition("_")
    if magnitude not in MAGNITUDES or angular not in ANGULARS:
        raise ValueError(unknown_name("operator", name, [f"{m}_{a}" for m in MAGNITUDES for a in ANGULARS]))
    return magnitude, angular
