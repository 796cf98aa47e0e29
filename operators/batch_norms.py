"""BatchNorm's running statistics, moved along when the layers before it answer otherwise, and moved back."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from operators.kernels import wide

# The attribute of a norm that holds what its statistics were before they moved, and what they became.
_MOVED = "_statistics_before_and_after"
Statistics = tuple[Tensor, Tensor]
Movements = dict[_BatchNorm, tuple[Statistics, Statistics]]


@dataclasses.dataclass(frozen=True)
class Moments:
    """The mean of each channel of a BatchNorm's input, and ``1 / sqrt(variance + eps)``."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, norm: _BatchNorm, input: Tensor) -> "Moments":
        # Many times as fast as var_mean, for all that it normalises the input, too.
        wider = input.to(wide(input.dtype))
        _, mean, scale = torch.native_batch_norm(wider, None, None, None, None, True, 0.0, norm.eps)
        return cls(mean, scale)


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Return the norms of a network that have running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def move(norm: _BatchNorm, before: Moments, now: Moments) -> None:
    """Move the running mean by the difference of two moments, and the running variance by their ratio."""
    usual = _statistics(norm)
    norm.running_mean += now.mean - before.mean
    norm.running_var *= (before.scale / now.scale) ** 2
    setattr(norm, _MOVED, (usual, _statistics(norm)))


@torch.no_grad()
def move_back(model: nn.Module) -> None:
    """Give the norms of a network the statistics that they had before they moved, unless they were trained since."""
    for norm in norms_of(model):
        before, after = vars(norm).pop(_MOVED, (None, None))
        if after is not None and all(map(torch.equal, _statistics(norm), after)):
            norm.running_mean.copy_(before[0])
            norm.running_var.copy_(before[1])


def movements_of(model: nn.Module) -> Movements:
    """Return the movements that the norms of a network remember."""
    return {norm: vars(norm)[_MOVED] for norm in norms_of(model) if _MOVED in vars(norm)}


def set_movements(model: nn.Module, movements: Movements) -> None:
    """Let the norms of a network remember these movements, and no others."""
    for norm in norms_of(model):
        vars(norm).pop(_MOVED, None)
        if norm in movements:
            setattr(norm, _MOVED, movements[norm])


@contextlib.contextmanager
def remembered(model: nn.Module) -> Iterator[None]:
    """If what happens meanwhile fails, the norms remember the movements that they remembered before."""
    before = movements_of(model)
    try:
        yield
    except BaseException:
        set_movements(model, before)
        raise


def _statistics(norm: _BatchNorm) -> Statistics:
    return norm.running_mean.clone(), norm.running_var.clone()
