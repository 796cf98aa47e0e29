"""BatchNorm's running statistics, moved along when the layers before it answer otherwise, and moved back."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# The attribute of a norm that holds what its statistics were before they moved, and what they became.
_MOVED = "_statistics_before_and_after"


@dataclasses.dataclass(frozen=True)
class Moments:
    """The mean of each channel of a BatchNorm's input, and ``1 / sqrt(variance + eps)``."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, norm: _BatchNorm, input: Tensor) -> "Moments":
        # Many times as fast as var_mean, for all that it normalises the input, too.
        _, mean, scale = torch.native_batch_norm(input, None, None, None, None, True, 0.0, norm.eps)
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


@contextlib.contextmanager
def remembered(model: nn.Module) -> Iterator[None]:
    """If what happens meanwhile fails, the norms remember the movements that they remembered before."""
    before = {norm: vars(norm).get(_MOVED) for norm in norms_of(model)}
    try:
        yield
    except BaseException:
        for norm, movement in before.items():
            vars(norm).pop(_MOVED, None)
            if movement is not None:
                setattr(norm, _MOVED, movement)
        raise


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    return norm.running_mean.clone(), norm.running_var.clone()
