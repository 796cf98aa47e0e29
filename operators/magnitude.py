"""Magnitudes ``h(‖w‖, ‖x‖)``: how strongly a decoupled filter answers, whatever the angle.

Every magnitude is ``h = weighting(‖w‖) · gain(n) · n`` with ``n = ‖x‖``. A class states its *gain* ``h / n`` because
the convolution multiplies ``⟨x, ŵ⟩ = n cos θ`` by it: no cosine is formed only to be multiplied back. A new magnitude
is one class and one row of ``MAGNITUDES``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from operators.lookup import look_up
from operators.running_norm import RunningNorm


def unweighted(w_norm: Tensor) -> Tensor:
    """``1``: the filter's length does not matter."""
    return torch.ones_like(w_norm)


def linearly_weighted(w_norm: Tensor) -> Tensor:
    """``‖w‖``, as in the plain convolution."""
    return w_norm


def tanh_weighted(w_norm: Tensor) -> Tensor:
    """``tanh ‖w‖``: long filters answer alike."""
    return torch.tanh(w_norm)


WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": unweighted,
    "linear": linearly_weighted,
    "tanh": tanh_weighted,
}

RADIUS_MODES = ("fixed", "learned", "learned_per_channel")

# The authors' floor of r^2, in their relative form; a learned absolute radius stays as far from 0.
RADIUS_FLOOR = 1e-4


class Magnitude(nn.Module):
    """Base of all magnitudes: the constants, the radius ``ρ`` and the weighting.

    Args:
        alpha: ``α``, the scale of the answer.
        beta: ``β``, the second slope of ``seg`` and ``mix``.
        radius: ``ρ``, in units of the patch norm; with ``relative`` it is ``r``.
        radius_mode: ``"fixed"``, ``"learned"`` (one parameter ``radius``) or ``"learned_per_channel"`` (``channels`` of
            them).
        relative: take ``ρ = (r² + 1e-4) E[n]`` with ``E[n]`` from :class:`RunningNorm`.
        weighting: a key of ``WEIGHTINGS``: the factor that depends on ``‖w‖``.
        channels: output channels of the layer; needed by ``"learned_per_channel"`` only.
        dtype: of a learned radius; torch's default dtype if not given.

    Magnitudes without a radius ignore the radius arguments. A learned absolute radius acts through ``max(|ρ|, 1e-4)``.

    Raises:
        ValueError: an unknown ``weighting`` or ``radius_mode``.
    """

    bounded = False
    smooth = True
    uses_radius = False
    uses_beta = False

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 0.5,
        radius: float = 1.0,
        radius_mode: str = "fixed",
        relative: bool = False,
        weighting: str = "none",
        channels: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        look_up(dict.fromkeys(RADIUS_MODES), radius_mode, "radius_mode")
        self.alpha = alpha
        self.beta = beta
        self.weighting = look_up(WEIGHTINGS, weighting, "weighting")
        self.radius: float | nn.Parameter = radius
        self.running_norm: RunningNorm | None = None
        if self.uses_radius:
            if radius_mode != "fixed":
                shape = (channels, 1, 1) if radius_mode == "learned_per_channel" else ()
                self.radius = nn.Parameter(torch.full(shape, float(radius), dtype=dtype))
            if relative:
                self.running_norm = RunningNorm()

    def forward(self, x_norm: Tensor, w_norm: Tensor) -> Tensor:
        """Return ``h(‖w‖, ‖x‖)`` for norms of shapes that broadcast, e.g. (N, 1, H, W) and (K, 1, 1)."""
        return self.weighting(w_norm) * self.gain(x_norm, self.effective_radius(x_norm)) * x_norm

    @property
    def constant_gain(self) -> float | None:
        """``h(n) / n`` before the weighting where it is the same for every ``n``, else None."""
        return None

    def gain(self, n: Tensor, radius: Tensor | float) -> Tensor | float:
        """Return ``h(n) / n`` before the weighting, for the radius that :meth:`effective_radius` gave.

        It depends on learned parameters through ``radius`` alone, and is 0 only where its derivative is 0, too.
        """
        raise NotImplementedError

    def effective_radius(self, n: Tensor | None) -> Tensor | float:
        """Return the radius ``ρ`` for all the patches of a layer, whose norms are ``n``; a scalar or (channels, 1, 1).

        Only a relative radius needs the norms. In training it moves the running norm, if there is one.
        """
        if self.running_norm is not None:
            return (self.radius**2 + RADIUS_FLOOR) * self.running_norm(n)
        if isinstance(self.radius, Tensor):
            return self.radius.abs().clamp_min(RADIUS_FLOOR)
        return self.radius


class Sphere(Magnitude):
    """``h(n) = α`` (SphereConv in the paper)."""

    bounded = True

    def gain(self, n: Tensor, radius: Tensor | float) -> Tensor:
        return self.alpha / n


class Ball(Magnitude):
    """``h(n) = α min(n, ρ) / ρ`` (BallConv in the paper)."""

    bounded = True
    smooth = False
    uses_radius = True

    def gain(self, n: Tensor, radius: Tensor | float) -> Tensor:
        return self.alpha / _at_least(n, radius)


class Tanh(Magnitude):
    """``h(n) = α tanh(n / ρ)`` (TanhConv in the paper)."""

    bounded = True
    uses_radius = True

    def gain(self, n: Tensor, radius: Tensor | float) -> Tensor:
        # The quotient on the right is one number a patch, also where the radius is one a channel.
        return torch.tanh(n / radius) * (self.alpha / n)


class Linear(Magnitude):
    """``h(n) = α n`` (LinearConv in the paper)."""

    @property
    def constant_gain(self) -> float:
        return self.alpha

    def gain(self, n: Tensor, radius: Tensor | float) -> float:
        return self.alpha


class Seg(Magnitude):
    """``h(n) = α n`` for ``n ≤ ρ``, ``β n + (α - β) ρ`` beyond (SegConv in the paper)."""

    smooth = False
    uses_radius = True
    uses_beta = True

    def gain(self, n: Tensor, radius: Tensor | float) -> Tensor:
        return self.beta + (self.alpha - self.beta) * radius / _at_least(n, radius)


class Log(Magnitude):
    """``h(n) = α log(1 + n)`` (LogConv in the paper)."""

    def gain(self, n: Tensor, radius: Tensor | float) -> Tensor:
        return self.alpha * torch.log1p(n) / n


class Mix(Magnitude):
    """``h(n) = α n + β log(1 + n)`` (MixConv in the paper)."""

    uses_beta = True

    def gain(self, n: Tensor, radius: Tensor | float) -> Tensor:
        return self.alpha + self.beta * torch.log1p(n) / n


def _at_least(n: Tensor, radius: Tensor | float) -> Tensor:
    return torch.maximum(n, radius) if isinstance(radius, Tensor) else n.clamp_min(radius)


MAGNITUDES: dict[str, type[Magnitude]] = {
    "sphere": Sphere,
    "ball": Ball,
    "tanh": Tanh,
    "linear": Linear,
    "seg": Seg,
    "log": Log,
    "mix": Mix,
}
