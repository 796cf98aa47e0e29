"""Fetching a checkpoint from the Hugging Face Hub into its cache, from one commit, in bounded time."""

import contextlib
import contextvars
import hashlib
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm

from zoo.errors import DamagedError, HubError
from zoo.files import write_whole
from zoo.hub.repository import CARD, COMMIT, CONFIG, LARGEST_TEXT, WEIGHTS, is_revision

# The client itself can wait for minutes on a server that says nothing, and without end on one that says little.
SECONDS_TO_ANSWER, SECONDS_A_PIECE = 10, 20

# The client, for the whole process, tells of a file in pieces of so many bytes: ten times as many, its default, take
# long on a slow line.
constants.DOWNLOAD_CHUNK_SIZE = 1 << 20

# Requests that a busy server refuses are repeated so often, after so many seconds at most.
RETRIES, LONGEST_WAIT = 2, 3

BUSY = (429, 500, 502, 503, 504)

Value = TypeVar("Value")


class OutOfTime(Exception):
    """The Hub did not answer in the time that it was given."""


def fetch(repository: str, *, revision: str | None = None, local_files_only: bool = False, renew: bool = False) -> Path:
    """Return the folder of a repository's checkpoint in the Hub's cache; what it does not have is downloaded.

    The commit is resolved once, and all files are of it. A commit (40 hexadecimal digits) that the cache has needs no
    request.

    Args:
        repository: ``"owner/name"``.
        revision: a commit, branch or tag; by default the newest commit of ``main``. Where the Hub cannot be reached,
            the commit that the cache has of it, with a warning.
        local_files_only: make no request. ``HF_HUB_OFFLINE=1`` means the same.
        renew: download every file again.

    Raises:
        ValueError: a ``revision`` that is no name.
        HubError: no such repository, revision or file, no permission, no answer in time, or no room for the files.
    """
    if revision is not None and (not isinstance(revision, str) or not is_revision(revision)):
        raise ValueError(f"revision is the name of a commit, branch or tag, got {revision!r}")
    what = f"{repository} at {revision}" if revision else repository
    cached = _cached(repository, revision)
    offline = local_files_only or constants.HF_HUB_OFFLINE
    if cached and not renew and (offline or cached.name == revision):
        folder = cached
    elif offline:
        raise HubError(
            f"{what} is not in the Hub's cache, {constants.HF_HUB_CACHE}, and no request is made (local_files_only or "
            "HF_HUB_OFFLINE); load it once with a network"
        )
    else:
        try:
            commit, sizes = _ask(what, SECONDS_TO_ANSWER, _describe, repository, revision)
            folder = _download(repository, what, commit, sizes, renew)
            _remember(folder, revision or constants.DEFAULT_REVISION)
        except HubError as error:
            # A refusal has a status of its own, and what the Hub has is no checkpoint if nothing caused the error.
            refused = error.__cause__ is None or status_of(error.__cause__) not in (None, *BUSY)
            if cached is None or renew or refused:
                raise
            warnings.warn(f"{error}; the commit in the cache is taken, {cached.name}", stacklevel=4)
            folder = cached
    if not is_damaged(folder / CONFIG):
        return folder
    if renew or offline:
        raise DamagedError(f"{folder / CONFIG} is not what the Hub sent: it is damaged; fetch it again")
    return fetch(repository, revision=folder.name, renew=True)


def is_damaged(file: Path) -> bool:
    """Say whether the content of a file in the Hub's cache is not what the Hub said it would be.

    A link in the cache leads to a file that is called by the Hub's ETag: the hash that git gives it, or the sha256 of
    one that git has elsewhere. Where there are no links, nothing is known.
    """
    etag = Path(os.readlink(file)).name if file.is_symlink() else ""
    if re.fullmatch(COMMIT, etag):
        data = file.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != etag
    return bool(re.fullmatch("[0-9a-f]{64}", etag)) and hashlib.sha256(file.read_bytes()).hexdigest() != etag


def _download(repository: str, what: str, commit: str, sizes: Mapping[str, int], renew: bool) -> Path:
    """Return the folder of a commit in the cache, with all files that it lacked."""
    if missing := [file for file in (CONFIG, WEIGHTS) if file not in sizes]:
        raise HubError(f"{what} has no {' and no '.join(missing)}: it is no checkpoint of decoupled-zoo")
    if sizes[CONFIG] > LARGEST_TEXT:
        raise HubError(f"{CONFIG} of {what} has {sizes[CONFIG]:,} bytes, as no checkpoint's has")
    for file in (CONFIG, WEIGHTS):
        folder = _download_in_time(file, what, repository, commit, sizes[file], renew)
    if 0 < sizes.get(CARD, 0) < LARGEST_TEXT:
        # A model can be loaded without its card; verify says that it is missing.
        with contextlib.suppress(HubError):
            _download_in_time(CARD, what, repository, commit, sizes[CARD], renew)
    return folder


def _download_in_time(file: str, what: str, repository: str, commit: str, size: int, renew: bool) -> Path:
    """Return the folder of a commit in the cache, with this file, unless for too long no piece of it comes."""
    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"), "blobs")
    received = 0.0

    class Bar(tqdm):
        """The client's progress bar, which it tells of every piece."""

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal received
            received += n or 0
            # Twice, as Xet tells both what it has received and what it has made of it; and in more than one attempt.
            if received > 2 * (RETRIES + 1) * size + constants.DOWNLOAD_CHUNK_SIZE:
                raise ValueError(f"the Hub sends more than the {size:,} bytes that it said")
            return super().update(n)

    def progress() -> object:
        """Return what has come so far, also if another process, which has the cache's lock, fetches it."""
        with contextlib.suppress(OSError):
            return received, sorted((part.name, part.stat().st_size) for part in blobs.glob("*.incomplete"))
        return received

    arguments = (repository, file, commit, renew, Bar)
    return _ask(f"{file} of {what}", SECONDS_A_PIECE, _download_file, *arguments, progress=progress)


def _download_file(repository: str, file: str, commit: str, renew: bool, bar: type[tqdm]) -> Path:
    if renew:
        # Where the cache has no links, the client leaves what it has.
        known = huggingface_hub.try_to_load_from_cache(repository, file, revision=commit)
        if isinstance(known, str) and not Path(known).is_symlink():
            Path(known).unlink()
    settings = {"revision": commit, "force_download": renew, "tqdm_class": bar}
    folder = Path(huggingface_hub.hf_hub_download(repository, file, **settings)).parent
    if folder.name != commit:
        raise ValueError(f"the Hub sent {file} of commit {folder.name} in place of {commit}")
    return folder


def _remember(folder: Path, revision: str) -> None:
    """Write into the cache, as the client does, which commit a branch was last seen at."""
    refs = folder.parents[1] / "refs"
    path = refs / revision
    if revision != folder.name and path.resolve().is_relative_to(refs.resolve()):
        # A cache that cannot be written can still be read.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, folder.name)


def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the folder that has what loading needs, of a commit or of what a branch was when it was last asked for."""
    # Unlike a download of local files only, this never asks the Hub for anything else.
    try:
        cached = huggingface_hub.try_to_load_from_cache
        paths = [cached(repository, file, revision=revision) for file in (CONFIG, WEIGHTS)]
    # The cache's memory of a branch is damaged, or may not be read.
    except (OSError, ValueError):
        return None
    return Path(paths[0]).parent if all(isinstance(path, str) for path in paths) else None


def _describe(repository: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """Return the commit of a revision and the sizes of its files."""
    info = huggingface_hub.HfApi().model_info(
        repository, revision=revision, files_metadata=True, timeout=SECONDS_TO_ANSWER
    )
    pinned = revision is not None and re.fullmatch(COMMIT, revision)
    if not re.fullmatch(COMMIT, info.sha or "") or (pinned and info.sha != revision):
        raise ValueError(f"the Hub calls the commit {info.sha!r}")
    return info.sha, {sibling.rfilename: int(sibling.size or 0) for sibling in info.siblings}


def _ask(
    what: str,
    seconds: float,
    function: Callable[..., Value],
    *arguments: object,
    progress: Callable[[], object] = lambda: None,
) -> Value:
    """Call the Hub's client, again if the server is busy, and explain what goes wrong."""
    for attempt in range(RETRIES + 1):
        try:
            return in_time(seconds, function, *arguments, progress=progress)
        # The client, and what it is made of, have no error in common.
        except Exception as caught:
            error = caught
        if attempt == RETRIES or status_of(error) not in BUSY:
            break
        asked = error.response.headers.get("Retry-After", "1")
        time.sleep(min(float(asked) if asked.isdecimal() else 1.0, LONGEST_WAIT))
    raise HubError(_explanation(what, error, seconds)) from error


def in_time(
    seconds: float,
    function: Callable[..., Value],
    *arguments: object,
    progress: Callable[[], object] = lambda: None,
) -> Value:
    """Return what a function returns in a thread of its own, or raise what it raises.

    Args:
        seconds: that it may take, and again as many as long as ``progress`` tells something else every time.

    Raises:
        OutOfTime: it takes longer. It cannot be stopped, and is left to itself.
    """
    future: Future[Value] = Future()
    work = (_settle, future, function, arguments)
    threading.Thread(target=contextvars.copy_context().run, args=work, daemon=True).start()
    while True:
        before = progress()
        try:
            return future.result(seconds)
        except TimeoutError:
            # It may have raised one of its own.
            if future.done():
                raise
            if progress() == before:
                raise OutOfTime from None


def _settle(future: Future[Value], function: Callable[..., Value], arguments: tuple[object, ...]) -> None:
    try:
        future.set_result(function(*arguments))
    # Whatever it is, it is the caller's.
    except BaseException as error:
        future.set_exception(error)


def _explanation(what: str, error: BaseException, seconds: float) -> str:
    endpoint = constants.ENDPOINT
    if isinstance(error, OutOfTime):
        return f"{what}: {endpoint} sent too little for {seconds:.0f} s; try again, or look after the network"
    if refused := refused_token(error):
        return f"{what}: {refused}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what}: the repository has no such revision; name a commit, branch or tag that it has"
    if isinstance(error, errors.RepositoryNotFoundError | errors.GatedRepoError) or status_of(error) in (401, 403):
        return (
            f"{what}: {endpoint} shows no such repository. Its name is misspelt; or it is private, and you are not "
            "logged in as one who may read it (hf auth login); or it is gated, and you have to ask for access on its "
            "page"
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, errors.HfHubHTTPError):
        return f"{what} cannot be written into the Hub's cache, {constants.HF_HUB_CACHE} ({error}); HF_HOME moves it"
    return f"{what} cannot be had from {endpoint} ({type(error).__name__}: {error})"


def refused_token(error: BaseException) -> str | None:
    """Say that the Hub refuses the user's token, if that is why it answered so; the client may call it a missing page.

    The client sends the token with every request, and the Hub then refuses what anyone may read without.
    """
    if status_of(error) != 401 or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN or not huggingface_hub.get_token():
        return None
    try:
        in_time(SECONDS_TO_ANSWER, huggingface_hub.HfApi().whoami)
        return None
    # The client, and what it is made of, have no error in common.
    except Exception as answer:
        if status_of(answer) != 401:
            return None
    named = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    where, away = (named, f"remove the variable {named}") if named else (constants.HF_TOKEN_PATH, "hf auth logout")
    return (
        f"{constants.ENDPOINT} refuses your token ({where}): it has expired, or is mistyped. Renew it (hf auth login, "
        f"or {constants.ENDPOINT}/settings/tokens), or go without one ({away}), as all may read public repositories"
    )


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error of the client tells; None if it was no answer of a server."""
    return getattr(getattr(error, "response", None), "status_code", None)
