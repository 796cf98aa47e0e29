"""Reading the Lightning checkpoints that a training has written."""

import functools
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from zoo.checkpoints.loading import CONFIG, list_checkpoints
from zoo.runs.last_checkpoint import LAST, PREVIOUS, damage_of

# Where a Lightning checkpoint keeps what is needed to export it; plain values only.
RECORD = "decoupled_zoo"


def read_lightning_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a Lightning checkpoint that ``Classifier`` wrote; plain values and tensors only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or was not written by ``Classifier``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no Lightning checkpoint {path}; {_meant_instead(Path(path))}")
    try:
        # torch.load does not look at checksums.
        if damage := damage_of(Path(path)):
            raise OSError(damage)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read as a Lightning checkpoint ({type(error).__name__}: {error}): it is damaged, or "
            "another kind of file; use another checkpoint of the run (best.ckpt), or begin it again in another folder"
        ) from error
    read_record(checkpoint, path)
    return checkpoint


def read_record(checkpoint: dict[str, Any], path: str | os.PathLike[str] = "the checkpoint") -> dict[str, Any]:
    """Return what ``Classifier`` wrote into a Lightning checkpoint beside the weights.

    Raises:
        ValueError: the checkpoint was not written by ``Classifier``.
    """
    if not isinstance(checkpoint, dict) or RECORD not in checkpoint:
        raise ValueError(f"{path} was not written by zoo.training.classifier.Classifier (python train.py fit)")
    return checkpoint[RECORD]


def record_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what ``Classifier`` wrote into a Lightning checkpoint beside the weights; not to be changed.

    A file that stays as it is is read but once.

    Raises:
        FileNotFoundError, ValueError: as from :func:`read_lightning_checkpoint`.
    """
    status = Path(path).stat() if Path(path).is_file() else None
    return _record_of(os.fspath(path), status and (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _record_of(path: str, stamp: tuple[int, int, int] | None) -> dict[str, Any]:
    return read_record(read_lightning_checkpoint(path))


def usable_checkpoint(path: str | os.PathLike[str]) -> str:
    """Return the path of a run's checkpoint; of a last.ckpt that is missing or damaged, that of the one before.

    Raises:
        FileNotFoundError: no such file, and none before it.
        ValueError: the file is damaged or was not written by ``Classifier``, and there is none before it.
    """
    path = Path(path)
    previous = path.with_name(PREVIOUS)
    try:
        record_of(path)
    except (FileNotFoundError, ValueError) as error:
        if path.name != LAST or not previous.is_file():
            raise
        try:
            record_of(previous)
        except (FileNotFoundError, ValueError):
            raise error from None
        rank_zero_warn(f"{error}; going on with the one before it, {previous}")
        return str(previous)
    return str(path)


def _meant_instead(path: Path) -> str:
    if str(path) in list_checkpoints() or (path / CONFIG).is_file():
        return f"it is a checkpoint of the zoo: fit and predict take it as --model.init_from {path}, not as --ckpt_path"
    if (path / LAST).is_file():
        return f"it is a folder: name the file in it, {path / LAST}"
    return "train.py fit writes best.ckpt and last.ckpt"
