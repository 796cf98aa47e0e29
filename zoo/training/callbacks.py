"""Callbacks: the authors' training tricks, and averaged weights."""

import functools
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from operators import decoupled_layers, filter_norm
from zoo.resuming.lightning_internals import OpenWeightAveraging


class WeightProjection(Callback):
    """Set every decoupled filter to unit norm after each ``every_n_steps`` optimiser steps (the authors' code).

    Args:
        every_n_steps: optimiser steps between two projections; the authors use 100.

    Raises:
        ValueError: ``every_n_steps`` below 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.last_step = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        # With gradient accumulation, several batches end at the same step.
        if step != self.last_step and step % self.every_n_steps == 0:
            # Frozen filters have no gradient, and stay.
            for layer in decoupled_layers(module).values():
                if layer.weight.grad is not None:
                    with torch.no_grad():
                        layer.weight /= filter_norm(layer.weight, eps=layer.operator.eps)
        self.last_step = step

    def state_dict(self) -> dict[str, int]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.last_step = state["last_step"]


class WeightedGradients(Callback):
    """Multiply each decoupled filter's gradient by its norm before the optimiser's step (the authors' code)."""

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        for layer in decoupled_layers(module).values():
            if layer.weight.grad is not None:
                layer.weight.grad *= filter_norm(layer.weight.detach(), eps=layer.operator.eps)


class MovingAverage(OpenWeightAveraging):
    """Validate, save and export the moving average of the weights, and of BatchNorm's statistics, over the steps.

    ``a ← d a + (1 - d) w`` after each step of the optimiser, with ``d = min(decay, (1 + t) / (10 + t))`` after ``t``
    steps, so that a short training is not held by its first weights. Training goes on with ``w``, which a Lightning
    checkpoint has, too.

    Args:
        decay: share that the average keeps in a step, in (0, 1).

    Source: Tarvainen and Valpola, Mean Teachers, 2017; the beginning as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=functools.partial(_average, decay))

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # Lightning asks callbacks first, but the network, of which the average is a copy, follows from the data.
        module.setup(stage)
        if stage == "fit":
            # The trainer has not moved the module to its device yet.
            self.make_average(trainer, module)

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, module, checkpoint)
        if self.average is not None:
            # The normalisation is in no state dict.
            self.average.module.model.normalise_as(module.model.spec)


def _average(decay: float, averages: Sequence[Tensor], currents: Sequence[Tensor], steps: Tensor) -> None:
    """Move averages, all of one dtype and device, towards current values after so many steps."""
    if averages[0].is_floating_point():
        done = int(steps)
        get_ema_multi_avg_fn(min(decay, (1 + done) / (10 + done)))(averages, currents, steps)
        return
    # Counts, such as BatchNorm's of batches, are no quantities to be averaged.
    for average, current in zip(averages, currents, strict=True):
        average.copy_(current)
