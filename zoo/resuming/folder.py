"""A run's folder: which run it belongs to, who writes to it, and which of its checkpoints can be gone on with."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_warn

from zoo.files import DRAFT, is_url, keep, relative, sync_folder, write_whole
from zoo.resuming.files import LAST, PREVIOUS, damage_of
from zoo.resuming.record import record_of

LOCK = ".lock"
# Loaders that a killed run has left may hold its lock for some seconds.
LOCK_SECONDS = 20
# Network file systems without locks answer so.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# The copy of the recipe, in the folder of a training that belongs to one.
RECIPE = "recipe.yaml"


def has_run(folder: Path) -> bool:
    """Return whether a folder has a last checkpoint, or the one before it."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def usable_checkpoint(path: str | os.PathLike[str]) -> str:
    """Return the path of a run's checkpoint; of a last.ckpt that is missing or damaged, that of the one before.

    Raises:
        FileNotFoundError: no such file, and none before it.
        ValueError: the file is damaged or was not written by ``Classifier``, and there is none before it.
    """
    if is_url(os.fspath(path)):
        raise FileNotFoundError(f"{path} is no file of this machine; download it first")
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


def left_by(settings: str, folder: Path) -> Path | None:
    """Return the last checkpoint in a folder if a command with settings of this hash has written it."""
    if not has_run(folder):
        return None
    return folder / LAST if record_of(usable_checkpoint(folder / LAST)).settings == settings else None


def refuse_folder_of_another_run(folder: Path, ckpt_path: str | None, best: str) -> None:
    """Refuse to begin a run in a folder that has checkpoints, unless it goes on with one of those.

    Args:
        ckpt_path: what the run goes on with, if it does.
        best: the name of the best checkpoint's file.

    Raises:
        FileExistsError: the folder is another run's.
    """
    if ckpt_path and Path(ckpt_path).resolve().parent == folder.resolve():
        return
    last = folder / LAST
    if has_run(folder):
        raise FileExistsError(
            f"{last} is of another command: {record_of(usable_checkpoint(last)).training['command']}; to go on with "
            f"its run, give --ckpt_path {last}; for a new one, choose another folder (--checkpoint.dirpath)"
        )
    if (folder / best).exists():
        raise FileExistsError(
            f"{folder / best} is another run's, and would be overwritten; move it, or choose another folder "
            "(--checkpoint.dirpath)"
        )


def claim(folder: Path, recipe: Path) -> None:
    """Make ``folder`` that of ``recipe``, and throw away what is there of a recipe with other settings.

    Raises:
        ValueError: the folder has other files than a training's.
    """
    mine, text = folder / RECIPE, recipe.read_text(encoding="utf-8")
    if mine.is_file():
        if yaml.safe_load(mine.read_text(encoding="utf-8")) == yaml.safe_load(text):
            return
        print(f"{recipe.stem}: {folder} held a training with other settings, which is thrown away")
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} has other files than a training's; name another folder, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(mine, text)


def take(folder: Path) -> FileLock | None:
    """Make a folder, if need be, lock it for this process, and remove what a killed run has left half written.

    Returns:
        The lock, held, for :func:`leave`; None where the file system has no locks.

    Raises:
        FileExistsError: another process writes to it.
        ValueError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
    except Timeout as error:
        raise FileExistsError(
            f"another run writes to {relative(folder)}; wait for it to end, or choose another folder "
            "(--checkpoint.dirpath)"
        ) from error
    except OSError as error:
        raise ValueError(f"checkpoints cannot be written to {folder} ({error}); choose another folder") from error
    for litter in folder.glob(f"*.ckpt*{DRAFT}"):
        litter.unlink()
    return lock


def leave(lock: FileLock) -> None:
    """Give the folder free that :func:`take` has locked."""
    # The file is removed while it is locked; Windows removes no file that is open.
    with contextlib.suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()


def put_last(draft: Path, keep_previous: bool) -> None:
    """Make a whole file the last checkpoint of its folder; what was the last one becomes the previous one.

    Args:
        keep_previous: whether the previous one stays if the last one is damaged.
    """
    last = draft.with_name(LAST)
    if last.exists() and not (keep_previous and damage_of(last)):
        keep(last, last.with_name(PREVIOUS))
    draft.replace(last)
    sync_folder(last.parent)


def _locked(folder: Path) -> FileLock | None:
    """Return the lock of a folder, held; None where the file system has no locks.

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
