"""The mean patch norm ``E[n]`` to which a relative radius refers."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

DECAY = 0.999


class RunningNorm(nn.Module):
    """``E[n]`` of one layer: the batch's mean in training, its moving average in evaluation.

    In training, the mean over the batch (and over all ranks of the default process group) is returned and the gradient
    flows through it; the average ``a`` takes one bias-corrected step ``a += (mean - a) (1 - d) / (1 - d^t)`` with decay
    ``d = 0.999`` and step count ``t``, which equals dividing an average that starts at 0 by ``1 - d^t``. In evaluation
    ``a`` is returned; before the first training step it is 1, so that the radius is absolute.

    Under activation checkpointing the step is taken once, in the first forward pass; a compiled layer inside an eager
    checkpoint cannot tell the two passes apart and takes it twice.

    Shape:
        ``norm``: any, not empty. Returns a scalar.

    Source: the authors' TensorFlow code (moving averages with ``zero_debias``).
    """

    average: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, norm: Tensor) -> Tensor:
        if not self.training:
            return self.average
        mean = _mean_over_ranks(norm.mean())
        if not _inside_backward():
            self._step(mean.detach())
        return mean

    def restart(self, mean: Tensor) -> None:
        """Forget what was averaged, and take ``mean`` as if it were the first step's."""
        self.average.copy_(mean)
        self.steps.fill_(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RunningNorm":
        super()._apply(fn, recurse)
        # A step changes the average by a thousandth of the difference, which half precision would round away.
        self.average = self.average.to(torch.promote_types(self.average.dtype, torch.float32))
        return self

    def _step(self, mean: Tensor) -> None:
        log_decay = math.log(DECAY)
        self.steps.add_(1)
        # expm1 keeps the first step's factor exactly 1; 1 - 0.999 ** t would leave a trace of the initial value.
        factor = math.expm1(log_decay) / torch.expm1(self.steps * log_decay)
        self.average.add_((mean - self.average) * factor)


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor; each rank's gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradient.contiguous())

    @staticmethod
    def jvp(context: Any, tangent: Tensor) -> Tensor:
        return _SumOverRanks.apply(tangent)


def _mean_over_ranks(mean: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mean
    return _SumOverRanks.apply(mean) / torch.distributed.get_world_size()


def _inside_backward() -> bool:
    """Whether activation checkpointing is recomputing this forward pass: the step was taken the first time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
