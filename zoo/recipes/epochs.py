"""Epochs of an experiment: one line each, and none that would not end in time."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


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
        precision: in which it is trained, which a run that goes on keeps.
        earlier: in which earlier versions trained it, which did not say so.

    Attributes:
        epochs: for each epoch its number, the metrics (the training loss is that of the last batch) and the seconds.
        images_per_epoch: how many images an epoch has on this device, None before the first.
        data: the images, once the first epoch has begun.
    """

    def __init__(self, name: str, precision: str, earlier: str) -> None:
        self.name = name
        self.precision, self.earlier = precision, earlier
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
        return {"epochs": self.epochs, "images_per_epoch": self.images_per_epoch, "precision": self.precision}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.images_per_epoch = list(state["epochs"]), state["images_per_epoch"]
        self.precision = state.get("precision", self.earlier)
