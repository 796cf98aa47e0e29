"""Treating the layers of a network one after another, and giving their answers another scale."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from operators.angular import cosine
from operators.batch_norms import Moments, move, move_back, norms_of
from operators.conv import DecoupledConv2d
from operators.kernels import wide
from operators.magnitude import linearly_weighted
from operators.observation import PLAIN, answering, before_each


def front_to_back(
    model: nn.Module,
    images: Tensor,
    layers: Iterable[DecoupledConv2d],
    treat: Callable[[DecoupledConv2d, Tensor], object],
    step: Callable[[], object],
) -> tuple[Any, Any]:
    """Treat the layers of a network one after another, so that each sees what the treated ones before it answer.

    BatchNorm's statistics first move back to where they were, then by as much as its inputs do.

    Args:
        treat: is called with each layer and its input, when it is first used.
        step: is called whenever a layer answers.

    Returns:
        The answers to the images of the network of ordinary convolutions, and of the treated one.
    """
    ordinary: dict[_BatchNorm, Moments] = {}
    treated: set[DecoupledConv2d] = set()

    def answer_as_ordinary(layer: DecoupledConv2d, input: Tensor) -> Tensor:
        step()
        return layer.respond(input, PLAIN, cosine, layer.bias)

    def answer(layer: DecoupledConv2d, input: Tensor) -> Tensor:
        step()
        if layer not in treated:
            treated.add(layer)
            treat(layer, input)
        return layer.respond(input, layer.magnitude, layer.angular, layer.bias)

    def observe(norm: _BatchNorm, input: Tensor) -> None:
        ordinary.setdefault(norm, Moments.of(norm, input))

    def move_along(norm: _BatchNorm, input: Tensor) -> None:
        # Once, also where a norm is used several times.
        if before := ordinary.pop(norm, None):
            move(norm, before, Moments.of(norm, input))

    move_back(model)
    layers, norms = list(layers), norms_of(model)
    with answering(layers, answer_as_ordinary), before_each(norms, observe):
        before = model(images)
    with answering(layers, answer), before_each(norms, move_along):
        return before, model(images)


def set_constants(layer: DecoupledConv2d, **settings: float) -> None:
    """Give a layer another radius, alpha or beta, also where it is learned."""
    layer.operator = dataclasses.replace(layer.operator, **settings)
    for name, value in settings.items():
        held = getattr(layer.magnitude, name)
        if isinstance(held, Tensor):
            held.fill_(value)
        else:
            setattr(layer.magnitude, name, value)


def rescale(layer: DecoupledConv2d, factor: float) -> None:
    """Multiply a layer's answers, which are proportional to alpha and beta."""
    for setting in ("alpha", "beta") if layer.magnitude.uses_beta else ("alpha",):
        set_constants(layer, **{setting: getattr(layer.operator, setting) * factor})


def fit_scale(layer: DecoupledConv2d, answers: Tensor, expected: Tensor) -> None:
    """Give a layer's answers, without bias, the scale and the mean of others.

    The scale is that of each filter where its length counts, else that of all; the mean takes a bias.
    """
    answers, expected = answers.to(wide(answers.dtype)), expected.to(wide(expected.dtype))
    means = [values.mean((0, 2, 3)) for values in (answers, expected)]
    centred = [values - mean[:, None, None] for values, mean in zip((answers, expected), means, strict=True)]
    products, energies = ((centred[0] * other).sum((0, 2, 3)) for other in (centred[1], centred[0]))
    by_filter = layer.magnitude.weighting is linearly_weighted
    if not by_filter:
        products, energies = products.sum(), energies.sum()
    # A filter that says nothing, or the contrary, keeps its scale.
    scale = torch.where((energies > 0) & (products > 0), products / energies, 1.0)
    if by_filter:
        layer.weight *= scale[:, None, None, None]
    else:
        rescale(layer, scale.item())
    if layer.bias is not None and layer.bias.requires_grad:
        layer.bias += means[1] - scale * means[0]
