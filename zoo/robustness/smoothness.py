"""How fast a network and its layers change with their input: empirical Lipschitz constants."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from operators.observation import convolution_inputs
from zoo.models.image_model import ImageModel

POWER_ITERATIONS = 10
PAIRS = 200


@dataclasses.dataclass(frozen=True)
class Smoothness:
    """How fast a function changes, in L2, at most as far as it was looked at: lower bounds of its Lipschitz constant.

    Attributes:
        gradient: largest spectral norm of the Jacobian at the inputs, by power iteration.
        pairs: largest ``‖f(x) − f(y)‖ / ‖x − y‖`` over random pairs of inputs.
        relative: the same norm times ``‖x‖ / ‖f(x)‖`` of that input: what is left when the scale of the output does
            not matter, as in front of a normalisation.
    """

    gradient: float
    pairs: float
    relative: float


def smoothness(function: Callable[[Tensor], Tensor], inputs: Tensor, seed: int = 0) -> Smoothness:
    """Measure a function that treats the inputs of a batch, (N, ...), one by one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        outputs = function(inputs)
        first, second = torch.randint(len(inputs), (2, PAIRS), generator=generator)
        first, second = first[first != second], second[first != second]
        # Equal images, as black corners of feature maps may be, say nothing.
        apart = _norm(inputs[first] - inputs[second])
        quotients = _norm(outputs[first] - outputs[second])[apart > 0] / apart[apart > 0]
    norms = spectral_norms(function, inputs, generator)
    # Where the output is zero, it has no scale.
    seen = _norm(outputs) > 0
    relative = (norms * _norm(inputs))[seen] / _norm(outputs)[seen]
    return Smoothness(norms.max().item(), quotients.max().item(), relative.max().item())


def spectral_norms(function: Callable[[Tensor], Tensor], inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return the largest singular value of the Jacobian at each input, (N,), by power iteration on ``JᵀJ``."""
    inputs = inputs.detach().requires_grad_()
    outputs = function(inputs)
    # The gradient of a sum weighted by u is Jᵀu; its own gradient in u along v is Jv.
    weights = torch.zeros_like(outputs, requires_grad=True)
    (pulled,) = torch.autograd.grad(outputs, inputs, weights, create_graph=True)
    direction = torch.randn(inputs.shape, generator=generator).to(inputs)
    lengths = _norm(direction)
    for _ in range(POWER_ITERATIONS):
        direction = direction / _expand(_norm(direction).clamp_min(1e-30), direction)
        (pushed,) = torch.autograd.grad(pulled, weights, direction, retain_graph=True)
        lengths = _norm(pushed)
        (direction,) = torch.autograd.grad(outputs, inputs, pushed, retain_graph=True)
    return lengths.detach()


def by_layer(model: ImageModel, images: Tensor) -> dict[str, Smoothness]:
    """Return the smoothness of the logits ("network") and of each convolution on the inputs that it gets."""
    model = model.eval()
    inputs = convolution_inputs(model.network, lambda: model(images))
    found = {"network": smoothness(model, images)}
    return found | {name: smoothness(module, input) for name, (module, input) in inputs.items()}


def _norm(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1)


def _expand(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
