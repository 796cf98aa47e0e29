"""Image files: how they are decoded, and what is wrong with those that cannot be."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from zoo.data.contents import Contents, left_out
from zoo.models.image_formats import image_endings
from zoo.models.transform import ImageTransform

# So many files of a split may be no readable images, unless another number is given.
MOST_UNREADABLE = 10

# Decoding fewer images than this is over before a progress bar is read.
WORTH_A_PROGRESS_BAR = 2000


def find_images(path: Path) -> list[Path]:
    """Return ``path`` itself if it is a file, else the sorted images in that folder and the folders in it.

    What is left out there is told by a warning.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without images.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no image file or folder {path}; check the path")
    found = Contents.of(path)
    if not found.images:
        others = f" ({left_out(found.others)})" if found.others else ""
        raise ValueError(f"no image in {path}{others}; images end in {', '.join(sorted(image_endings()))}")
    if found.others:
        warnings.warn(f"{path}: {left_out(found.others)}", stacklevel=2)
    return found.images


def decode_each(
    files: Sequence[Path], transform: ImageTransform, keep: Callable[[int, np.ndarray], None]
) -> dict[Path, str]:
    """Hand each file's place and pixels to ``keep``, several at a time; return why the other files cannot be read."""

    def decode_one(index: int) -> tuple[Path, str] | None:
        try:
            keep(index, transform.read(files[index]).numpy())
        except ValueError as error:
            return files[index], str(error.__cause__)
        return None

    quiet = len(files) < WORTH_A_PROGRESS_BAR or not sys.stdout.isatty()
    with ThreadPool() as pool:
        results = pool.imap(decode_one, range(len(files)), chunksize=32)
        results = track(results, "reading images", total=len(files), transient=True, disable=quiet)
        return dict(result for result in results if result is not None)


def read_files(files: Sequence[Path], transform: ImageTransform) -> tuple[Tensor, list[Path]]:
    """Return images, uint8 (N, in_chans, size, size), and the files that they are of.

    Up to ``MOST_UNREADABLE`` that cannot be read are left out with a warning that names them.

    Raises:
        ValueError: no file can be read, or more than ``MOST_UNREADABLE`` cannot.
    """
    images = empty_images(len(files), transform)
    broken = decode_each(files, transform, images.__setitem__)
    if len(broken) > min(MOST_UNREADABLE, len(files) - 1):
        raise ValueError(unreadable(broken, len(files), most=MOST_UNREADABLE))
    if broken:
        warnings.warn(unreadable(broken, len(files), " and are left out"), stacklevel=2)
    read = [place for place, file in enumerate(files) if file not in broken]
    return torch.from_numpy(images[read]), [files[place] for place in read]


def empty_images(count: int, transform: ImageTransform) -> np.ndarray:
    """Return room for images as ``transform`` makes them, uint8 (count, in_chans, input_size, input_size)."""
    # It is an array, since threads do not share torch's inference mode, and refuse to write to its tensors.
    return np.empty((count, transform.in_chans, transform.input_size, transform.input_size), dtype=np.uint8)


def unreadable(
    reasons: Mapping[Path, str], count: int, then: str = "; remove or replace them", most: int | None = None
) -> str:
    """Say how many of ``count`` images cannot be read and what ``then``; of ``most`` (all by default), say why."""
    lines = [f"{file}: {reason}" for file, reason in reasons.items()][:most]
    if len(lines) < len(reasons):
        lines.append(f"... and {len(reasons) - len(lines)} more")
    return "\n  ".join([f"{len(reasons)} of {count} images cannot be read{then}:", *lines])
