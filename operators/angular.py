"""Angular functions ``g(θ)``, each a function of ``cos θ``: what a filter answers to.

All are odd in ``cos θ``, go from -1 at ``θ = π`` to 1 at ``θ = 0`` and are 0 at ``θ = π/2``. Arguments after ``cos``
are settings: they carry the names of the fields of ``OperatorConfig`` that hold them. A new angular function is one
function and one row of ``ANGULARS``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Scaling, unlike clamping, keeps the gradient at cos θ = ±1 both finite and alive; it costs 9e-4 of g at ±1 only.
ARC_SCALE = 1 - 1e-6

# Keeps |c|^(B - 1) differentiable twice at c = 0 for B < 2; far below the square of any cosine that matters.
POWER_FLOOR = 1e-18


def cosine(cos: Tensor) -> Tensor:
    """``g = cos θ`` (the paper's cosine activation)."""
    return cos


def linear(cos: Tensor) -> Tensor:
    """``g = 1 - 2θ/π = (2/π) asin(cos θ)`` (the paper's linear activation)."""
    return elevation(cos) * (2 / math.pi)


def square_cosine(cos: Tensor) -> Tensor:
    """``g = sign(cos θ) cos² θ`` (the paper's square cosine activation)."""
    return cos * cos.abs()


def sigmoid(cos: Tensor, sigmoid_k: float) -> Tensor:
    """``g = coth(π/4k) tanh((π/2 - θ) / 2k)``, with ``k = sigmoid_k > 0`` (the paper's sigmoid activation).

    This is ``(1 + e^(-π/2k)) / (1 - e^(-π/2k)) · (1 - e^(θ/k - π/2k)) / (1 + e^(θ/k - π/2k))`` written so that it is
    exactly odd and cannot overflow for small ``k``.
    """
    return torch.tanh(elevation(cos) / (2 * sigmoid_k)) / math.tanh(math.pi / (4 * sigmoid_k))


def power(cos: Tensor, power: float) -> Tensor:
    """``g = sign(cos θ) |cos θ|^B``, with ``B = power ≥ 1`` (the B-cos transform, Böhle et al., CVPR 2022)."""
    return cos * (cos.square() + POWER_FLOOR) ** ((power - 1) / 2)


def elevation(cos: Tensor) -> Tensor:
    """Return ``π/2 - θ = asin((1 - 1e-6) cos θ)``, with a finite gradient that is nowhere 0."""
    # Rounding in long sums can carry a cosine beyond ±1: its value is brought back, its gradient left alone.
    excess = (cos - cos.clamp(-1, 1)).detach()
    return torch.asin((cos - excess) * ARC_SCALE)


ANGULARS: dict[str, Callable[..., Tensor]] = {
    "cosine": cosine,
    "linear": linear,
    "square_cosine": square_cosine,
    "sigmoid": sigmoid,
    "power": power,
}


# Of angular functions with g(c) = c |c|^(p - 1), the degree p: 1 or 2. They need no cosine: g(⟨ŵ, x⟩) = n^p g(cos θ).
HOMOGENEOUS: dict[Callable[..., Tensor], int] = {cosine: 1, square_cosine: 2}
