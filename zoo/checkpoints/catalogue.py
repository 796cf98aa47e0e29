"""Which checkpoints there are, and where: embedded, in a folder, or on the Hugging Face Hub."""

import json
import os
from pathlib import Path

from operators.lookup import unknown_name
from zoo.hub.fetching import fetch
from zoo.hub.repository import CONFIG, is_repository

# Put before a repository's name, this says that it is no folder, though there may be one of that name.
HUB = "hf-hub:"
PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"

# Names of checkpoints too large to embed, with the repository and the commit that have them.
PUBLISHED = PRETRAINED / "published.json"


def list_checkpoints() -> list[str]:
    """Return the names of the embedded checkpoints."""
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{CONFIG}"))


def list_published() -> dict[str, dict[str, str]]:
    """Return, by name, the ``repository`` and ``commit`` of the checkpoints that are published but not embedded."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def find(
    where: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    renew: bool = False,
) -> Path:
    """Return the folder of a checkpoint's name, of a path, or of a Hub repository, fetched if need be.

    A string that is such a name stands for that checkpoint; ``"./NAME"`` and ``Path("NAME")`` are folders.

    Args:
        revision, local_files_only, renew: of a Hub repository; see :func:`zoo.hub.fetching.fetch`.

    Raises:
        ValueError: none of these; the message lists the names and the nearest one.
        HubError: a Hub repository that cannot be had.
    """
    name = os.fspath(where)
    if repository := repository_of(where, revision):
        return fetch(repository[0], revision=repository[1], local_files_only=local_files_only, renew=renew)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is that of a Hub repository (owner/name), and {name} is none")
    if isinstance(where, str) and name in list_checkpoints():
        return PRETRAINED / name
    if name and Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise ValueError(
            f"{name} is a file, but a checkpoint is a folder; python -m zoo export makes one of a Lightning checkpoint "
            "(best.ckpt, last.ckpt)"
        )
    if name and name != Path(name).name:
        raise ValueError(
            f"no checkpoint folder {name}; check the path (a Hub repository is called owner/name; its revision is an "
            "argument of its own)"
        )
    legal = [*list_checkpoints(), *list_published()]
    raise ValueError(f"{unknown_name('checkpoint', name, legal)} Or give the path of a folder.")


def find_local(where: str | os.PathLike[str]) -> Path:
    """Return the folder of a checkpoint's name or path, which may be changed, as one in the Hub's cache must not be.

    Raises:
        ValueError: no such checkpoint, or a Hub repository.
    """
    if repository_of(where, None):
        raise ValueError(f"{where} is a Hub repository; zoo.save(zoo.load({where!r}), FOLDER) makes a folder of it")
    return find(where)


def repository_of(where: str | os.PathLike[str], revision: str | None) -> tuple[str, str | None] | None:
    """Return the Hub repository that ``where`` stands for, and its revision; None if it is a folder."""
    name = os.fspath(where)
    if not isinstance(where, str) or name in list_checkpoints():
        return None
    if name.startswith(HUB):
        if not is_repository(name.removeprefix(HUB)):
            raise ValueError(f"{name} names no Hub repository, which is called owner/name; its revision is given apart")
        return name.removeprefix(HUB), revision
    if published := list_published().get(name):
        return published["repository"], revision or published["commit"]
    # A path in a folder that exists is a misspelt path.
    is_path = Path(name).exists() or Path(name).parent.is_dir()
    return (name, revision) if is_repository(name) and not is_path else None
