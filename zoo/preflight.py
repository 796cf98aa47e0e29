"""Opening every image before a training, and but once: what cannot be read is found now, and not in mid-epoch."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from zoo.checkpoints import write_whole
from zoo.image_files import decode_each
from zoo.transforms import ImageTransform


def examine(files: Sequence[Path], transform: ImageTransform) -> dict[Path, str]:
    """Return why files cannot be decoded; of a file of the same size and time as before, what was found then.

    What is found is kept in ``decoupled_zoo`` in the user's folder of caches (``$XDG_CACHE_HOME``, else ``~/.cache``),
    for each common folder of the files.
    """
    if not files:
        return {}
    record = _record(os.path.commonpath([file.absolute().parent for file in files]), transform)
    known = _read(record)
    stamps = {str(file.absolute()): _stamp(file) for file in files}
    fresh = [file for file in files if known.get(str(file.absolute()), {}).get("stamp") != stamps[str(file.absolute())]]
    broken = decode_each(fresh, transform, lambda *_: None)
    for file in fresh:
        known[str(file.absolute())] = {"stamp": stamps[str(file.absolute())], "reason": broken.get(file)}
    if fresh:
        # Where nothing can be kept, the next run opens the files again.
        with contextlib.suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_whole(record, json.dumps({name: known[name] for name in known if os.path.exists(name)}))
    reasons = {file: known[str(file.absolute())]["reason"] for file in files}
    return {file: reason for file, reason in reasons.items() if reason}


def _record(folder: str, transform: ImageTransform) -> Path:
    """Return the file that keeps what was found of the images in a folder, if decoded for so many channels."""
    name = hashlib.sha256(f"{folder} {transform.in_chans}".encode()).hexdigest()[:16]
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "decoupled_zoo" / f"preflight_{name}.json"


def _read(record: Path) -> dict[str, dict]:
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]
