"""Opening every image before a training, and but once: what cannot be read is found now, and not in mid-epoch."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from zoo.data.image_files import decode_each
from zoo.files import write_whole
from zoo.models.transform import ImageTransform

# So many files, and then as many as are known, are opened before what was found is kept.
AT_ONCE = 20_000


def examine(files: Sequence[Path], transform: ImageTransform) -> dict[Path, str]:
    """Return why files cannot be decoded. One that could be is not opened again while its size and time are the same.

    Which these are is kept in ``decoupled_zoo`` in the user's folder of caches (``$XDG_CACHE_HOME``, else
    ``~/.cache``), for each common folder of the files. A file that cannot be read is tried each time: the reason may
    have passed.
    """
    if not files:
        return {}
    record = _record(_common_folder(files), transform)
    sound = _read(record)
    stamps = {file: _stamp(file) for file in files}
    fresh = [file for file in files if sound.get(str(file.absolute())) != stamps[file]]
    broken: dict[Path, str] = {}
    while fresh:
        count = max(AT_ONCE, len(sound))
        part, fresh = fresh[:count], fresh[count:]
        found = decode_each(part, transform, lambda *_: None)
        broken |= found
        sound |= {str(file.absolute()): stamps[file] for file in part if file not in found}
        # Where nothing can be kept, the next run opens the files again.
        with contextlib.suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_whole(record, json.dumps(sound))
    return broken


def _common_folder(files: Sequence[Path]) -> str:
    try:
        return os.path.commonpath([file.absolute().parent for file in files])
    # They are on several drives of Windows.
    except ValueError:
        return ""


def _record(folder: str, transform: ImageTransform) -> Path:
    """Return the file that keeps what was found of the images in a folder, if decoded for so many channels."""
    name = hashlib.sha256(f"{folder} {transform.in_chans}".encode()).hexdigest()[:16]
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "decoupled_zoo" / f"preflight_{name}.json"


def _read(record: Path) -> dict[str, list[int]]:
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _stamp(file: Path) -> list[int]:
    """Return a file's size and time; neither of one that cannot be reached."""
    try:
        status = file.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
