"""Saving a run so that nothing is lost: whole files, the last two checkpoints, and stops that save first."""

import atexit
import contextlib
import errno
import hashlib
import os
import shlex
import shutil
import signal
import threading
import warnings
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import lightning as L
import torch
from filelock import FileLock, Timeout
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from zoo.checkpoints.loading import DRAFT, replacing

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
LOCK = ".lock"
# Loaders that a killed run has left may hold its lock for some seconds.
LOCK_SECONDS = 20
# What network file systems without locks answer.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# How the comment of a checkpoint's archive begins, which ends with the SHA-256 of all before it, and their length.
SEAL = b"decoupled-zoo sha256 "
SEAL_LENGTH = len(SEAL) + hashlib.sha256().digest_size
# Bytes that are read at once.
CHUNK = 1 << 22
# Those that clusters and people send, and terminals that are closed; the last is not known to Windows.
SIGNALS = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGINT", "SIGHUP")]
# What a shell gives a program that a signal has stopped: 128 and the signal's number.
STOPPED = 128


class SafeCheckpointIO(TorchCheckpointIO):
    """Write each checkpoint beside its place, read it back, and then put it there: it is whole, or not there.

    Lightning's own way stages files in ``$TMPDIR``, which may be another file system; a kill then leaves half a file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint; what stood at ``path`` stays until the new one is on the disk and has been read back.

        Raises:
            OSError: the disk is full, or does not give back what was written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        named = str(path).removesuffix(DRAFT)
        with replacing(path) as draft:
            try:
                with draft.open("wb") as file:
                    torch.save(checkpoint, file)
                if not (damage := _broken_part(draft)):
                    _seal(draft)
            # The first is what torch makes of an error of the disk, when it closes what it could not write.
            except (RuntimeError, OSError) as error:
                free = shutil.disk_usage(path.parent).free / 2**20
                reason = error.__context__ or error
                raise OSError(f"{named} was not saved ({reason}); {free:,.0f} MiB are free there") from error
            if damage:
                raise OSError(f"{named} was not saved, for what was written could not be read back ({damage})")
        _sync(path.parent)


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
        self.received: int | None = None
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
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                self.lock = _locked(Path(folder))
            except Timeout as error:
                raise FileExistsError(
                    f"another run writes to {os.path.relpath(folder)}; wait for it to end, or choose another folder "
                    "(--checkpoint.dirpath)"
                ) from error
            except OSError as error:
                raise ValueError(
                    f"checkpoints cannot be written to {folder} ({error}); choose another folder"
                ) from error
            for litter in Path(folder).glob(f"*.ckpt*{DRAFT}"):
                litter.unlink()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # The command line looks for them before it has the lock, for which it may have waited.
        if trainer.ckpt_path is None and trainer.is_global_zero and (folder := self._folder(trainer)):
            if any((Path(folder) / name).exists() for name in (LAST, PREVIOUS)):
                raise FileExistsError(
                    f"{os.path.relpath(folder)} has the checkpoints of a run; go on with it (--ckpt_path; the command "
                    "that began it does so when it is given again), or choose another folder (--checkpoint.dirpath)"
                )
        self.received = signal.SIGTERM if trainer.received_sigterm else None
        self.saved_step, self.seen_step = None, trainer.global_step
        # Lightning puts back what was there before when the trainer is done.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # A program begun by nohup is to ignore that its terminal is closed.
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._receive)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.between_steps = trainer.global_step == self.seen_step
        # Gradients that are being accumulated would be in no checkpoint, so what stops a run waits for their step.
        if self._stop_after_the_step(trainer):
            return
        trainer.should_stop |= self.stops_later
        self.seen_step, self.stops_later = trainer.global_step, False
        told = self._is_told(trainer)
        # What follows at once, a validation or the end of the epoch, saves.
        if trainer.is_last_batch or _validates_now(trainer):
            return
        loop = trainer.fit_loop
        ends = (trainer.should_stop and loop._can_stop_early) or 0 < trainer.max_steps <= trainer.global_step
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if told or due or ends:
            self._save(trainer)
        if ends:
            # Lightning would validate now, although the time is up.
            loop.epoch_loop._skip_next_val = True
            warnings.filterwarnings("ignore", message=".*could not find the monitored key")
        if told:
            self._leave(trainer)

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
        # Of an epoch that was broken off, Lightning would not go on with the rest if it were saved now.
        if trainer.is_last_batch:
            self._save(trainer)
        else:
            self._tell(trainer)
        self._leave_if_told(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.unvalidated:
            # Lightning begins a validation that is due if its first batch seems to be under way (2.6).
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress["current"] = dict.fromkeys(progress["current"], 0)

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
            # Those that this process has started may wait for it, with NCCL for half an hour. Its error is told first.
            atexit.register(trainer.strategy.launcher.kill, signal.SIGKILL)

    def _stop_after_the_step(self, trainer: L.Trainer) -> bool:
        """Let what would stop the run wait, if gradients are being accumulated; return whether they are."""
        if self.between_steps:
            self.stops_later |= trainer.should_stop
            trainer.should_stop = False
        return self.between_steps

    def _unlock(self) -> None:
        if self.lock:
            # While it is held; Windows removes no file that is open.
            with contextlib.suppress(OSError):
                Path(self.lock.lock_file).unlink()
            self.lock.release()
            self.lock = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        # A print may be interrupted by this very signal, and must not be entered again; the terminal may be closed.
        with contextlib.suppress(OSError):
            os.write(2, b"\nsaving before stopping; once more to stop at once\n")
        for each in SIGNALS:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)

    def _tell(self, trainer: L.Trainer) -> None:
        """Say what is kept and how to go on."""
        folder = self._folder(trainer)
        last = Path(os.path.relpath(folder)) / LAST if folder else None
        if last and last.exists():
            command = shlex.join(["python", "train.py", "fit", "--ckpt_path", str(last)])
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
        if self._is_told(trainer):
            self._leave(trainer)

    def _is_told(self, trainer: L.Trainer) -> bool:
        """Return whether any process was told to stop; all must save together."""
        return trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:
            return
        last = Path(self._folder(trainer)) / LAST
        draft = last.with_name(LAST + DRAFT)
        # With the optimiser's state, which is the default, but Lightning tells each time if it is not said.
        trainer.save_checkpoint(draft, weights_only=False)
        if trainer.is_global_zero:
            # What a run has gone on without, for it is damaged, does not take the place of what it has gone on with.
            if last.exists() and not (self.saved_step is None and damage_of(last)):
                _keep(last, last.with_name(PREVIOUS))
            draft.replace(last)
            _sync(last.parent)
        self.saved_step = trainer.global_step

    def _leave(self, trainer: L.Trainer) -> None:
        """Exit as a program that a signal has stopped; the first process alone, which is killed if another one fails.

        Raises:
            SystemExit: always.
        """
        trainer.strategy.barrier("saved")
        raise SystemExit(STOPPED + (self.received or signal.SIGTERM) if trainer.is_global_zero else 0)

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


def _validates_now(trainer: L.Trainer) -> bool:
    """Return whether Lightning validates after this batch, even if it did not stop."""
    loop, stops = trainer.fit_loop, trainer.should_stop
    trainer.should_stop = False
    validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
    trainer.should_stop = stops
    return validates


def _locked(folder: Path) -> FileLock | None:
    """Return the lock of a run's folder, held; None where the file system has no locks.

    Raises:
        Timeout: another process holds it.
        OSError: the folder cannot be written to.
    """
    lock = FileLock(folder / LOCK, LOCK_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire()
    except NotImplementedError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return lock


def _seal(path: Path) -> None:
    """Put the SHA-256 of a file of ``torch.save``, a ZIP archive, into the archive's comment, and both on the disk."""
    with path.open("r+b") as file:
        # An archive without a comment ends with the comment's length.
        file.seek(-2, os.SEEK_END)
        file.write(SEAL_LENGTH.to_bytes(2, "little"))
        digest = _digest(file, file.seek(0, os.SEEK_END))
        file.write(SEAL + digest)
        file.flush()
        os.fsync(file.fileno())


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 of the first ``size`` bytes of a file, behind which it then stands."""
    digest = hashlib.sha256()
    file.seek(0)
    for start in range(0, size, CHUNK):
        digest.update(file.read(min(CHUNK, size - start)))
    return digest.digest()


def damage_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file; None if its SHA-256 is the one it was sealed with.

    Of a file of ``torch.save`` that has no seal, for Lightning alone wrote it, the parts' checksums are compared.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - SEAL_LENGTH
            file.seek(max(0, size))
            seal = file.read()
            if seal.startswith(SEAL):
                return None if seal == SEAL + _digest(file, size) else "its SHA-256 is another than when it was written"
        return _broken_part(path)
    except OSError as error:
        return str(error)


def _broken_part(path: Path) -> str | None:
    """Return what is wrong with a file of ``torch.save`` by the checksums of its parts."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    # zipfile raises whatever the broken bytes lead to.
    except Exception as error:
        return str(error)
    return f"its part {broken} is damaged" if broken else None


def _keep(file: Path, other: Path) -> None:
    """Give a file another name, too, so that at no time it has none; where there are no links, it is renamed."""
    link = other.with_name(other.name + DRAFT)
    link.unlink(missing_ok=True)
    try:
        os.link(file, link)
    except OSError:
        file.replace(link)
    link.replace(other)


def _sync(folder: Path) -> None:
    """Write to the disk which files a folder has; Windows does not let a folder be opened for that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
