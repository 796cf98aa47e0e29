"""What folders hold: class folders, images, and files that are left out."""

import collections
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from zoo.models.image_formats import cure, has_image_ending
from zoo.models.spec import composed


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is in a folder and the folders in it, those that links lead to among them.

    Attributes:
        images: the files that are called like images, sorted, and links of such a name that lead nowhere.
        others: how many files there are of each ending that is no image's.
    """

    images: list[Path]
    others: collections.Counter[str]

    @classmethod
    def of(cls, folder: Path) -> "Contents":
        """Look through a folder, but for what is hidden (names that begin with a dot).

        Raises:
            ValueError: a link to a folder that it lies in, or one that leads nowhere and may have led to a folder.
            OSError: a folder that cannot be read.
        """
        images, others = [], collections.Counter()
        for entry in _files_in(folder, [folder.resolve()]):
            path = Path(entry.path)
            lost = entry.is_symlink() and _leads_nowhere(path)
            if has_image_ending(path) and (lost or entry.is_file()):
                images.append(path)
            elif lost:
                refuse_lost_link(path)
            else:
                others[path.suffix.lower()] += 1
        return cls(sorted(images), others)


def class_folders(folder: Path) -> dict[str, Path]:
    """Return the class folders in a split's folder by their names, which are in Unicode's composed form (NFC).

    Raises:
        ValueError: two folders whose names differ in their Unicode form alone, or a link that leads nowhere and may
            have been one.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not has_image_ending(path):
            refuse_lost_link(path)
        if path.is_dir():
            name = composed(path.name)
            if name in found:
                raise ValueError(
                    f"{folder} has two folders for the class {name}, {ascii(found[name].name)} and {ascii(path.name)}: "
                    "these write the same letters by other characters (Unicode's NFC and NFD); put their images into "
                    "one"
                )
            found[name] = path
    return dict(sorted(found.items()))


def refuse_lost_link(path: Path) -> None:
    """Refuse a link in a folder's place that leads nowhere, as to a disk that is not there.

    Raises:
        ValueError: it does.
    """
    if _leads_nowhere(path):
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there; mend the link, or remove it")


def left_out(others: Mapping[str, int]) -> str:
    """Say how many files of each ending are no images to us, and what to do about them."""
    by_cure: dict[str, list[str]] = {}
    for ending, number in sorted(others.items()):
        by_cure.setdefault(cure(ending), []).append(f"{number} in {ending}" if ending else f"{number} without any")
    told = [f"{', '.join(endings)} ({what})" for what, endings in by_cure.items()]
    return f"files left out for their endings: {'; '.join(told)}"


def first_ten(names: list[str]) -> str:
    """Return up to ten names in one line, and that there are more, if so."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _files_in(folder: Path, way: list[Path]) -> Iterator[os.DirEntry[str]]:
    """Yield the files in a folder and below it; ``way`` are the folders, links resolved, that lead to it."""
    with os.scandir(folder) as entries:
        entries = list(entries)
    for entry in entries:
        # Copying from a Mac leaves "._name.jpg" beside "name.jpg".
        if entry.name.startswith("."):
            continue
        # Unlike the entry's own method, this takes a link to itself.
        if not os.path.isdir(entry.path):
            yield entry
            continue
        path = Path(entry.path)
        resolved = path.resolve()
        if any(step.is_relative_to(resolved) for step in way):
            raise ValueError(
                f"{path} is a link to {resolved}, a folder that it lies in, so that what is in it has no end; remove "
                "the link"
            )
        yield from _files_in(path, [*way, resolved])


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()
