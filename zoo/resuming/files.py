"""The checkpoint files of a run: whole or not there, and sealed, so that damage is found."""

import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from zoo.files import DRAFT, replacing, sync_folder

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

# The comment of a checkpoint's archive begins so, and ends with the SHA-256 of all before it.
SEAL = b"decoupled-zoo sha256 "
SEAL_LENGTH = len(SEAL) + hashlib.sha256().digest_size

# Bytes that are read at once.
CHUNK = 1 << 22


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
        sync_folder(path.parent)


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
    """Return what is wrong with a checkpoint file, as :func:`damage_in` does."""
    try:
        with path.open("rb") as file:
            return damage_in(file)
    except OSError as error:
        return str(error)


def damage_in(file: BinaryIO) -> str | None:
    """Return what is wrong with a checkpoint; None if its SHA-256 is the one it was sealed with.

    A file of ``torch.save`` that has no seal, since Lightning alone wrote it, is judged by the checksums of its parts.
    """
    size = file.seek(0, os.SEEK_END) - SEAL_LENGTH
    file.seek(max(0, size))
    seal = file.read()
    if seal.startswith(SEAL):
        return None if seal == SEAL + _digest(file, size) else "its SHA-256 is another than when it was written"
    return _broken_part(file)


def _broken_part(file: Path | BinaryIO) -> str | None:
    """Return what is wrong with a file of ``torch.save`` by the checksums of its parts."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    # zipfile raises whatever the broken bytes lead to.
    except Exception as error:
        return str(error)
    return f"its part {broken} is damaged" if broken else None
