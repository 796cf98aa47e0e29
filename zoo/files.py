"""Files and folders that are written whole or not at all."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

# The end of the name of a file that is being written, before it is put in its place.
DRAFT = ".part"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to be written, which takes its place, or is removed if an error is raised."""
    # Each process has a draft of its own, since another may write the same file.
    draft = path.with_name(f"{path.name}.{os.getpid()}{DRAFT}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as draft:
        # The line ends of the text itself: those of CSV are the same everywhere.
        draft.write_text(text, encoding="utf-8", newline="")


def is_url(place: str) -> bool:
    """Return whether a place is on another machine, as ``https://...`` and ``s3://...`` are."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place) is not None


def relative(path: str | os.PathLike[str]) -> str:
    """Return a path as seen from the working folder; as it is where there is no way (Windows, on another drive)."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return os.fspath(path)


def refuse_file_above(path: Path) -> None:
    """Refuse a path that cannot be written, since something above it is a file.

    Raises:
        ValueError: it is.
    """
    for above in path.parents:
        if above.exists() and not above.is_dir():
            raise ValueError(f"{path} cannot be written, for {above} is a file and no folder; choose another path")


def put_in_place(draft: Path, folder: Path, old: Path) -> None:
    """Rename ``draft`` to ``folder``; what stood there is moved to ``old``, and back if the renaming fails."""
    replaces = folder.exists()
    if replaces:
        folder.rename(old)
    try:
        draft.rename(folder)
    except BaseException:
        if replaces and not folder.exists():
            old.rename(folder)
        raise


def keep(file: Path, other: Path) -> None:
    """Give a file another name, too, so that at no time it has none; where there are no links, it is renamed."""
    link = other.with_name(other.name + DRAFT)
    link.unlink(missing_ok=True)
    try:
        os.link(file, link)
    except OSError:
        file.replace(link)
    link.replace(other)


def sync_folder(folder: Path) -> None:
    """Write to the disk which files a folder has; Windows does not let a folder be opened for that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
