"""Every private name of Lightning that the zoo uses (2.6), so that a new version breaks one file, and says which name.

``PRIVATE`` lists them as a trainer with a module has them; a test looks for each.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim.swa_utils import AveragedModel

PRIVATE = (
    "trainer.fit_loop._can_stop_early",
    "trainer.fit_loop._data_fetcher",
    "trainer.fit_loop.epoch_loop._should_check_val_fx",
    "trainer.fit_loop.epoch_loop._skip_next_val",
    "module._trainer",
    "strategy._save_distributed_checkpoint",
    "averaging._average_model",
    "averaging._kwargs",
    "averaging._use_buffers",
)


def trainer_of(module: L.LightningModule) -> L.Trainer | None:
    """Return the trainer of a module, or None, for which its public property raises an error."""
    return module._trainer


def validates_now(trainer: L.Trainer) -> bool:
    """Return whether Lightning validates after this batch, even if it did not stop."""
    loop, stops = trainer.fit_loop, trainer.should_stop
    trainer.should_stop = False
    validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
    trainer.should_stop = stops
    return validates


def ends_now(trainer: L.Trainer) -> bool:
    """Return whether training ends after this batch: it is told to stop and may, or has had all its steps."""
    stops = trainer.should_stop and trainer.fit_loop._can_stop_early
    return stops or 0 < trainer.max_steps <= trainer.global_step


def skip_validation(trainer: L.Trainer) -> None:
    """Let the validation be left out that Lightning would begin when training ends within an epoch."""
    trainer.fit_loop.epoch_loop._skip_next_val = True


def begin_validation_again(checkpoint: dict[str, Any]) -> None:
    """Let the run that goes on from a checkpoint begin with the validation that is due after its last step."""
    # Lightning does so if the first batch of a validation seems to be under way.
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    progress["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["current"] = dict.fromkeys(progress["current"], 0)


def loader_states(checkpoint: dict[str, Any]) -> list[dict[str, int]]:
    """Return the states of the training loaders that a checkpoint has."""
    return checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])


def saves_in_parts(strategy: ModelParallelStrategy) -> bool:
    """Return whether each process writes its own part of a checkpoint."""
    return strategy._save_distributed_checkpoint


class OpenWeightAveraging(WeightAveraging):
    """``WeightAveraging`` whose average can be made when the network is there, and be reached."""

    @property
    def average(self) -> AveragedModel | None:
        """The averaged copy of the module; None before there is one."""
        return self._average_model

    def make_average(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin the average with a copy of the module on the trainer's device."""
        settings = {"device": trainer.strategy.root_device, "use_buffers": self._use_buffers, **self._kwargs}
        self._average_model = AveragedModel(module, **settings)
