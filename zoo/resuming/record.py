"""What a Lightning checkpoint tells of its run beside the weights, and reading it without running code from a file."""

import dataclasses
import functools
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.checkpoints.catalogue import list_checkpoints
from zoo.checkpoints.config import RUN_RECORD
from zoo.hub.repository import CONFIG
from zoo.models.spec import ModelSpec
from zoo.resuming.files import LAST, damage_in


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What is needed to go on with a run, and to export it.

    Args:
        spec: of the network.
        model: the settings of ``Classifier``.
        data: the ``name`` and the ``arguments`` of the data module.
        max_epochs: how many epochs the run was to have; -1 for no end.
        training: what a checkpoint folder records of it: epochs done, command, seed, commit, hardware, torch, and, if
            it was adversarial, how and with which alarms.
        source: the name and the licence of the weights that it started from, if it did not start afresh.
        settings: the hash of its settings, if the command line began it.
        best: by what the best checkpoint is told, and kept, as options of ``--checkpoint``.
    """

    spec: ModelSpec
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    max_epochs: int
    training: Mapping[str, Any]
    source: Mapping[str, str] | None = None
    settings: str | None = None
    best: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def epochs(self) -> int:
        return self.training["epochs"]

    @property
    def is_finished(self) -> bool:
        return 0 <= self.max_epochs <= self.epochs

    @property
    def seed(self) -> int:
        """The seed of the run; -1 if it had none."""
        # Earlier versions did not record one.
        return self.training.get("seed", -1)

    @property
    def started_from(self) -> str | None:
        """The name of the weights that the run started from."""
        return self.source["name"] if self.source else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["max_epochs"]
        return {**fields, "spec": self.spec.to_dict(), "trainer": {"max_epochs": self.max_epochs}}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RunRecord":
        """Return the record that :meth:`to_dict`, of this version or an earlier one, described.

        Raises:
            KeyError, TypeError, ValueError: it is no such description.
        """
        return cls(
            spec=ModelSpec.from_dict(fields["spec"]),
            model=fields["model"],
            data=fields["data"],
            max_epochs=fields["trainer"]["max_epochs"],
            training=fields["training"],
            # Earlier versions had none of these.
            source=fields.get("source"),
            settings=fields.get("settings"),
            best=fields.get("best") or {},
        )


def read_lightning_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a Lightning checkpoint that ``Classifier`` wrote; plain values and tensors only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or was not written by ``Classifier``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no Lightning checkpoint {path}; {_meant_instead(Path(path))}")
    if Path(path).suffix == ".safetensors":
        raise ValueError(
            f"{path} holds weights, and nothing of a run; to start from a checkpoint folder: --model.init_from "
            f"{Path(path).parent}"
        )
    try:
        with Path(path).open("rb") as file:
            # torch.load does not look at checksums.
            if damage := damage_in(file):
                raise OSError(damage)
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read as a Lightning checkpoint ({type(error).__name__}: {error}): it is damaged, or "
            "another kind of file; use another checkpoint of the run (best.ckpt), or begin it again in another folder"
        ) from error
    if not isinstance(checkpoint, dict) or RUN_RECORD not in checkpoint:
        raise ValueError(f"{path} was not written by zoo.training.classifier.Classifier (python train.py fit)")
    return checkpoint


def record_in(checkpoint: Mapping[str, Any], path: str | os.PathLike[str] = "the checkpoint") -> RunRecord:
    """Return the record of a Lightning checkpoint.

    Raises:
        ValueError: it has none that can be read.
    """
    try:
        return RunRecord.from_dict(checkpoint[RUN_RECORD])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} was not written by zoo.training.classifier.Classifier (python train.py fit), or by a version "
            f"that this one does not read ({error!r})"
        ) from error


def record_of(path: str | os.PathLike[str]) -> RunRecord:
    """Return the record of a Lightning checkpoint's file, which is read only once as long as it stays as it is.

    Raises:
        FileNotFoundError, ValueError: as from :func:`read_lightning_checkpoint` and :func:`record_in`.
    """
    status = Path(path).stat() if Path(path).is_file() else None
    return _record_of(os.fspath(path), status and (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _record_of(path: str, stamp: tuple[int, int, int] | None) -> RunRecord:
    return record_in(read_lightning_checkpoint(path), path)


def _meant_instead(path: Path) -> str:
    if str(path) in list_checkpoints() or (path / CONFIG).is_file():
        return f"it is a checkpoint of the zoo: fit and predict take it as --model.init_from {path}, not as --ckpt_path"
    if (path / LAST).is_file():
        return f"it is a folder: name the file in it, {path / LAST}"
    return "train.py fit writes best.ckpt and last.ckpt"
