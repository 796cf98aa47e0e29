"""Turning the filters of a converted network, layer by layer, so that they answer as an ordinary one's."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from operators.angular import cosine
from operators.conv import DecoupledConv2d
from operators.layer_by_layer import fit_scale, front_to_back
from operators.observation import PLAIN, layers_of

# Steps of Adam for each layer, images a step, and the learning rate as a share of a filter's typical value.
STEPS, BATCH, RATE = 60, 16, 0.1


@torch.no_grad()
def imitate(model: nn.Module, images: Tensor, step: Callable[[], object] = lambda: None) -> None:
    """Turn the filters of each decoupled convolution, in place, from the first layer to the last.

    For each filter the correlation grows, over the patches, of the layer's answers ``y`` with those ``y'`` that an
    ordinary convolution with the filters of before gives to the same inputs. The scale of ``y`` becomes that of ``y'``
    and a bias takes up the difference of their means; where there is none, BatchNorm's statistics move along. Filters
    that cannot be trained, or are standardised first, stay as they are.

    Args:
        images: as ``model`` takes them, all together; a hundred are enough.
        step: is called whenever a layer answers.
    """
    front_to_back(model, images, layers_of(model, "imitate"), _turn, step)


def _turn(layer: DecoupledConv2d, input: Tensor) -> None:
    if not layer.weight.requires_grad or type(layer).effective_weight is not DecoupledConv2d.effective_weight:
        return
    expected = layer.respond(input, PLAIN, cosine)
    before, filters = _correlation(_answers(layer, input), expected), layer.weight.clone()
    _climb(layer, input, expected)
    # What is no number is not better, either.
    better = _correlation(_answers(layer, input), expected) > before
    layer.weight[~better] = filters[~better]
    fit_scale(layer, _answers(layer, input), expected)


def _climb(layer: DecoupledConv2d, input: Tensor, expected: Tensor) -> None:
    """Change the filters by steps of Adam that make the correlations grow."""
    # The layer's own gradient is not touched.
    turned = copy.copy(layer)
    turned._parameters = {**layer._parameters, "weight": nn.Parameter(layer.weight.detach().clone())}
    rate = RATE * layer.weight.square().mean().sqrt().item()
    optimizer = torch.optim.Adam([turned.weight], lr=rate)
    order = torch.Generator().manual_seed(0)
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * (1 - number / STEPS)
        chosen = torch.randperm(len(input), generator=order)[:BATCH].to(input.device)
        with torch.enable_grad():
            loss = -_correlation(_answers(turned, input[chosen]), expected[chosen]).sum()
        (turned.weight.grad,) = torch.autograd.grad(loss, [turned.weight])
        optimizer.step()
    layer.weight.copy_(turned.weight)


def _answers(layer: DecoupledConv2d, input: Tensor) -> Tensor:
    return layer.respond(input, layer.magnitude, layer.angular)


def _correlation(answers: Tensor, expected: Tensor) -> Tensor:
    """Return the correlation of two maps (N, K, H', W') over all their places, (K,)."""
    left, right = (values.float() - values.float().mean((0, 2, 3), keepdim=True) for values in (answers, expected))
    energies = left.square().sum((0, 2, 3)) * right.square().sum((0, 2, 3))
    return (left * right).sum((0, 2, 3)) / energies.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
