"""Blocks of a network whose answers can be compared with those of the network that it was made of."""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from operators.conv import DecoupledConv2d, decoupled_layers
from operators.selection import classifier_layers


def alike(model: nn.Module, teacher: nn.Module) -> bool:
    """Return whether a teacher has the parameters of a network, by name and shape, and the very same classifier."""
    own = dict(model.named_parameters())
    for name, parameter in teacher.named_parameters():
        if name not in own or own[name].shape != parameter.shape:
            return False
    heads = zip(classifier_layers(model), classifier_layers(teacher), strict=True)
    return all(
        torch.equal(left, right)
        for layer, theirs in heads
        for left, right in zip(layer.parameters(recurse=False), theirs.parameters(recurse=False), strict=True)
    )


def comparable(model: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Return the names of the blocks of a network and a teacher like it whose answers can be compared."""
    names = _blocks(model)
    with torch.no_grad(), recording(model, names) as own, recording(teacher, names) as expected:
        teacher(images), model(images)
    return tuple(name for name in names if name in own and name in expected)


def _blocks(model: nn.Module) -> list[str]:
    """Return the names of the modules that hold decoupled convolutions and are no mere containers of others.

    A convolution beside its BatchNorm is told by that: its channels count alike then.
    """
    total = len(decoupled_layers(model))
    found: list[str] = []

    def look(module: nn.Module, name: str) -> None:
        layers = len(decoupled_layers(module))
        # What holds all of them is the network itself, or a wrapper of it.
        holds = layers == total or (layers and isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict))
        if holds and not isinstance(module, DecoupledConv2d):
            children = [(f"{name}.{part}".removeprefix("."), child) for part, child in module.named_children()]
            for (child_name, child), (next_name, follower) in itertools.pairwise([*children, ("", None)]):
                normalised = isinstance(child, DecoupledConv2d) and isinstance(follower, _BatchNorm)
                look(child, next_name if normalised else child_name)
        elif layers:
            found.append(name)

    look(model, "")
    return found


@contextlib.contextmanager
def recording(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record the answers of modules, by their names, as far as they are single tensors."""
    recorded: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, inputs: Any, answer: Any) -> None:
        if isinstance(answer, Tensor):
            recorded[name] = answer

    handles = [model.get_submodule(name).register_forward_hook(functools.partial(record, name)) for name in names]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
