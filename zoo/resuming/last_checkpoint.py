"""When a run is saved: at the end of each epoch, before it validates, and before it stops."""

import atexit
import shlex
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from filelock import FileLock
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from zoo.files import DRAFT, relative
from zoo.provenance import program
from zoo.resuming.files import LAST
from zoo.resuming.folder import has_run, leave, put_last, take
from zoo.resuming.lightning_internals import begin_validation_again, ends_now, skip_validation, validates_now
from zoo.resuming.stopping import StopSignals


class LastCheckpoint(Checkpoint):
    """Save the run as last.ckpt at the end of each epoch, before it validates and before it stops.

    The one before is kept as previous.ckpt. At SIGTERM, which clusters send before they take a machine away, at Ctrl-C
    (SIGINT), and when the terminal is closed (SIGHUP), the optimiser's step that is under way is finished and saved,
    and the process exits with status 143, 130 or 129; a validation that is under way is broken off, and begun again by
    the run that goes on. A second signal stops at once. The end of ``max_time`` or ``max_steps`` within an epoch is
    saved likewise.

    Args:
        every_n_steps: save after so many optimiser steps, too; by default at the end of epochs alone.

    Raises:
        ValueError: ``every_n_steps`` below 1; from training without a ``ModelCheckpoint``, or with one whose folder
            cannot be written to.
        FileExistsError: from training into a folder to which another run writes, or has written what is not gone on
            with.
    """

    # ModelCheckpoint(save_last=True) writes last.ckpt only when it writes the best one, too (Lightning 2.6).

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.signals = StopSignals()
        # The optimiser's steps at the last save of this process, and at the end of the last batch.
        self.saved_step: int | None = None
        self.seen_step = 0
        # Whether gradients are being accumulated, and a stop waits for their step.
        self.between_steps = self.stops_later = False
        # Whether what is being saved has yet to be validated.
        self.unvalidated = False
        self.lock: FileLock | None = None
        # Lightning warns of files in the folder, the lock among them; those of another run are refused here.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and (folder := self._folder(trainer)):
            self.lock = take(Path(folder))

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # The command line looks for them before it has the lock, for which it may have waited.
        if trainer.ckpt_path is None and trainer.is_global_zero and (folder := self._folder(trainer)):
            if has_run(Path(folder)):
                raise FileExistsError(
                    f"{relative(folder)} has the checkpoints of a run; go on with it (--ckpt_path; the command "
                    "that began it does so when it is given again), or choose another folder (--checkpoint.dirpath)"
                )
        self.signals.listen(trainer)
        self.saved_step, self.seen_step = None, trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.between_steps = trainer.global_step == self.seen_step
        # Gradients that are being accumulated would be in no checkpoint, so what stops a run waits for their step.
        if self._stop_after_the_step(trainer):
            return
        trainer.should_stop |= self.stops_later
        self.seen_step, self.stops_later = trainer.global_step, False
        told = self.signals.is_told(trainer)
        # A validation or the end of the epoch that follows at once saves.
        if trainer.is_last_batch or validates_now(trainer):
            return
        ends = ends_now(trainer)
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if told or due or ends:
            self._save(trainer)
        if ends:
            # Lightning would validate now, although the time is up.
            skip_validation(trainer)
            warnings.filterwarnings("ignore", message=".*could not find the monitored key")
        if told:
            self.signals.leave(trainer)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._may_leave(trainer):
            self.unvalidated = True
            self._save(trainer)
            self.unvalidated = False
            self._leave_if_told(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._stop_after_the_step(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self._may_leave(trainer):
            self._leave_if_told(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # If an epoch that was broken off were saved now, Lightning would not go on with its rest.
        if trainer.is_last_batch:
            self._save(trainer)
        else:
            self._tell(trainer)
        self._leave_if_told(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.unvalidated:
            begin_validation_again(checkpoint)

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        folder = self._folder(trainer) if trainer.state.fn == "fit" else None
        # Lightning would forget the best checkpoint of a run whose folder was moved or copied.
        for name, state in checkpoint["callbacks"].items() if folder else ():
            best = state.get("best_model_path") if name.startswith("ModelCheckpoint") else None
            if best and state["dirpath"] != folder and (here := Path(folder) / Path(best).name).is_file():
                state |= {"dirpath": folder, "best_model_path": str(here), "kth_best_model_path": str(here)}
                state["best_k_models"] = {str(here): state["best_model_score"]}

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._unlock()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._unlock()
        if trainer.state.fn == "fit" and isinstance(exception, KeyboardInterrupt | SystemExit):
            self._tell(trainer)
        elif trainer.strategy.launcher is not None:
            # Processes that this one has started may wait for it, with NCCL for half an hour. Its error is told first.
            atexit.register(trainer.strategy.launcher.kill, signal.SIGKILL)

    def _stop_after_the_step(self, trainer: L.Trainer) -> bool:
        """Let what would stop the run wait, if gradients are being accumulated; return whether they are."""
        if self.between_steps:
            self.stops_later |= trainer.should_stop
            trainer.should_stop = False
        return self.between_steps

    def _unlock(self) -> None:
        if self.lock:
            leave(self.lock)
            self.lock = None

    def _tell(self, trainer: L.Trainer) -> None:
        """Say what is kept and how to go on."""
        folder = self._folder(trainer)
        last = Path(relative(folder)) / LAST if folder else None
        if last and last.exists():
            command = shlex.join([*program("python train.py"), "fit", "--ckpt_path", str(last)])
            step = "what was saved before" if self.saved_step is None else f"step {self.saved_step}"
            rank_zero_info(
                f"{last} holds {step}; to go on, give the same command again if it names the folder "
                f"(--checkpoint.dirpath), or {command} (and the same --config and --trainer options, if there were any)"
            )
        else:
            rank_zero_info("nothing is kept, for nothing was saved yet")

    def _may_leave(self, trainer: L.Trainer) -> bool:
        """Return whether a validation is part of a training, which stands at a step of the optimiser."""
        return trainer.state.fn == "fit" and not trainer.sanity_checking and not self.between_steps

    def _leave_if_told(self, trainer: L.Trainer) -> None:
        if self.signals.is_told(trainer):
            self.signals.leave(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:
            return
        draft = Path(self._folder(trainer)) / (LAST + DRAFT)
        # The optimiser's state is saved by default, too, but Lightning then tells so each time.
        trainer.save_checkpoint(draft, weights_only=False)
        if trainer.is_global_zero:
            # A damaged checkpoint that a run could not go on with does not replace the one that it went on with.
            put_last(draft, keep_previous=self.saved_step is None)
        self.saved_step = trainer.global_step

    def _folder(self, trainer: L.Trainer) -> str | None:
        """Return where ``ModelCheckpoint`` writes; None as long as it does not know itself."""
        return best_checkpoint(trainer).dirpath


def best_checkpoint(trainer: L.Trainer) -> ModelCheckpoint:
    """Return the callback that keeps the best checkpoint; of several, the last, which is that of the command line.

    Raises:
        ValueError: there is none.
    """
    found = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    if not found:
        raise ValueError("LastCheckpoint needs a ModelCheckpoint among the callbacks, whose folder it writes to")
    return found[-1]


def best_settings(trainer: L.Trainer) -> dict[str, Any]:
    """Return by what a run tells its best checkpoint, and how many it keeps, as :class:`RunRecord` has it."""
    if not any(isinstance(callback, ModelCheckpoint) for callback in trainer.checkpoint_callbacks):
        return {}
    best = best_checkpoint(trainer)
    return {name: getattr(best, name) for name in ("monitor", "filename", "save_top_k")}
