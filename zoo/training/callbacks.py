"""Callbacks: the authors' training tricks, averaged weights, limited time, and the table of predictions."""

import csv
import functools
import io
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, WeightAveraging
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from operators import decoupled_layers, filter_norm
from zoo.checkpoints.loading import write_whole


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


class MovingAverage(WeightAveraging):
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
            # The module is not there yet.
            settings = {"device": trainer.strategy.root_device, "use_buffers": self._use_buffers, **self._kwargs}
            self._average_model = AveragedModel(module, **settings)

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, module, checkpoint)
        if self._average_model is not None:
            # The normalisation is in no state dict.
            self._average_model.module.model.normalise_as(module.model.spec)


def _average(decay: float, averages: Sequence[Tensor], currents: Sequence[Tensor], steps: Tensor) -> None:
    """Move averages, all of one dtype and device, towards current values after so many steps."""
    if averages[0].is_floating_point():
        done = int(steps)
        get_ema_multi_avg_fn(min(decay, (1 + done) / (10 + done)))(averages, currents, steps)
        return
    # Counts, such as BatchNorm's of batches, are no quantities to be averaged.
    for average, current in zip(averages, currents, strict=True):
        average.copy_(current)


class StopInTime(Callback):
    """Stop after the last epoch that leaves time for another one as long as it, and a quarter of it for measuring.

    Args:
        deadline: when to be done, on the clock of ``time.monotonic``.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        now = time.monotonic()
        if now + 1.25 * (now - self.started) > self.deadline:
            trainer.should_stop = True


class EpochLines(Callback):
    """Print one line an epoch and keep what it says, also beyond a stop and a resume.

    Args:
        name: what is trained, at the beginning of each line.

    Attributes:
        epochs: for each epoch its number, the metrics (the training loss is that of the last batch) and the seconds.
        images_per_epoch: how many images an epoch has on this device, None before the first.
        data: the images, once the first epoch has begun.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = 0.0
        self.epochs: list[dict[str, float]] = []
        self.images_per_epoch: int | None = None
        self.data: L.LightningDataModule | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = time.monotonic()
        self.data = trainer.datamodule
        batches, images = trainer.num_training_batches, len(self.data.split("train"))
        self.images_per_epoch = min(images, batches * self.data.batch_size)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        metrics = {name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()}
        seconds = round(time.monotonic() - self.started, 1)
        self.epochs.append({"epoch": trainer.current_epoch + 1, **metrics, "seconds": seconds})
        epoch = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(f"{self.name}: {epoch}, {numbers}, {seconds:.1f} s", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "images_per_epoch": self.images_per_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.images_per_epoch = list(state["epochs"]), state["images_per_epoch"]


class PredictionTable(BasePredictionWriter):
    """Show the predicted classes as a table, and write them all as CSV.

    Args:
        output: the CSV file (columns: image, then class and probability of the likeliest classes), whose name ends in
            .csv; none by default.
        top: how many of the likeliest classes are shown.
        rows: how many images the table on the screen shows; the file has all.

    Raises:
        ValueError: ``top`` or ``rows`` below 1, or an ``output`` that is no name of a CSV file.
    """

    def __init__(self, output: str | None = None, top: int = 3, rows: int = 20) -> None:
        super().__init__(write_interval="epoch")
        if min(top, rows) < 1:
            raise ValueError(f"top and rows must be at least 1, got {top} and {rows}")
        if output is not None and (Path(output).suffix.lower() != ".csv" or Path(output).is_dir()):
            raise ValueError(f"the predictions are written as CSV, so output ends in .csv, got {output}")
        self.output = output
        self.top = top
        self.rows = rows

    def write_on_epoch_end(
        self, trainer: L.Trainer, module: L.LightningModule, predictions: list[Tensor], batch_indices: Any
    ) -> None:
        probabilities, labels = torch.cat(predictions).cpu().sort(1, descending=True)
        names = module.model.class_names
        places = range(min(self.top, len(names)))
        files = [trainer.datamodule.predict_files[index] for batch in batch_indices[0] for index in batch]
        rows = [
            [(file, ""), *((names[order[place]], f"{values[place]:.4f}") for place in places)]
            for file, order, values in zip(files, labels, probabilities, strict=True)
        ]
        self._show(rows)
        if self.output:
            header = ["image", *(f"{what} {place + 1}" for place in places for what in ("class", "probability"))]
            self._write(Path(self.output), [header, *([file, *chain(*guesses)] for (file, _), *guesses in rows)])

    def _show(self, rows: list[list[tuple[str, str]]]) -> None:
        table = Table(caption=f"{min(self.rows, len(rows))} of {len(rows)} images")
        table.add_column("image", overflow="fold")
        for place in range(1, len(rows[0])):
            table.add_column(f"class {place}", no_wrap=True)
        for row in rows[: self.rows]:
            table.add_row(*(" ".join(cell) for cell in row))
        Console().print(table)

    def _write(self, path: Path, rows: list[list[str]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        write_whole(path, text.getvalue())
        print(f"written: {path}")
