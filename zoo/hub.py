"""Checkpoints in repositories of the Hugging Face Hub: fetched into its cache, from one commit, in bounded time."""

import contextvars
import hashlib
import re
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import constants, errors

from zoo.errors import HubError

# The files of a checkpoint, in the order in which they are fetched; the last one is not needed to load it.
CONFIG, WEIGHTS, CARD = FILES = ("config.json", "model.safetensors", "README.md")

# The client itself can wait for minutes on a server that says nothing, and without end on one that says little.
SECONDS_TO_ANSWER, SECONDS_A_FILE, LEAST_BYTES_A_SECOND = 10, 20, 100_000

# Of requests that a busy server refuses, and how long we wait at most before each, in seconds.
RETRIES, LONGEST_WAIT = 2, 3
BUSY = (429, 500, 502, 503, 504)

Value = TypeVar("Value")


def is_repository(name: str) -> bool:
    """Return whether ``name`` has the form ``owner/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


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
        HubError: no such repository, revision or file, no permission, no answer in time, or no room for the files.
    """
    what = f"{repository} at {revision}" if revision else repository
    cached = _cached(repository, revision)
    offline = local_files_only or constants.is_offline_mode()
    if cached and not renew and (offline or cached.name == revision):
        return cached
    if offline:
        raise HubError(
            f"{what} is not in the Hub's cache, {constants.HF_HUB_CACHE}, and no request is made (local_files_only or "
            "HF_HUB_OFFLINE); load it once with a network"
        )
    try:
        info = _ask(what, SECONDS_TO_ANSWER, _describe, repository, revision)
    except HubError as error:
        # A refusal has a status of its own.
        if cached is None or renew or status_of(error.__cause__) not in (None, *BUSY):
            raise
        warnings.warn(f"{error}; the commit in the cache is taken, {cached.name}", stacklevel=3)
        return cached
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
    if missing := [file for file in (CONFIG, WEIGHTS) if file not in sizes]:
        raise HubError(f"{what} has no {' and no '.join(missing)}: it is no checkpoint of decoupled-zoo")
    folder = None
    for file in (file for file in FILES if file in sizes):
        # The first file by the revision, which the cache then knows; the others by the commit that it came from.
        settings = {"revision": folder.name if folder else revision, "force_download": renew}
        seconds = SECONDS_A_FILE + sizes[file] / LEAST_BYTES_A_SECOND
        try:
            path = _ask(f"{file} of {what}", seconds, huggingface_hub.hf_hub_download, repository, file, **settings)
        except HubError:
            # The model can be loaded without; verify says that it is missing.
            if file == CARD:
                break
            raise
        folder = Path(path).parent
    return folder


def is_damaged(file: Path) -> bool:
    """Say whether the content of a small file in the Hub's cache is not what the Hub said it would be.

    The cache calls a file by the Hub's ETag: the hash that git gives it, or the sha256 of one that git has elsewhere.
    """
    etag, data = file.resolve().name, file.read_bytes()
    hashes = {40: hashlib.sha1(b"blob %d\0" % len(data) + data), 64: hashlib.sha256(data)}
    named_by_hash = re.fullmatch("[0-9a-f]+", etag) and len(etag) in hashes
    return bool(named_by_hash) and hashes[len(etag)].hexdigest() != etag


class _OutOfTime(Exception):
    """The Hub did not answer in the time that it was given."""


def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the folder that has what loading needs, of a commit or of what a branch was when it was last asked for."""
    # Unlike a download of local files only, this never asks the Hub for anything else.
    paths = [huggingface_hub.try_to_load_from_cache(repository, file, revision=revision) for file in (CONFIG, WEIGHTS)]
    return Path(paths[0]).parent if all(isinstance(path, str) for path in paths) else None


def _describe(repository: str, revision: str | None) -> huggingface_hub.ModelInfo:
    """Return the commit of a revision and its files."""
    return huggingface_hub.HfApi().model_info(
        repository, revision=revision, files_metadata=True, timeout=SECONDS_TO_ANSWER
    )


def _ask(what: str, seconds: float, function: Callable[..., Value], *arguments: object, **settings: object) -> Value:
    """Call the Hub's client, again if the server is busy, and explain what goes wrong.

    The client cannot be stopped. It works in a thread of its own, which is left to itself if it takes too long.
    """
    deadline = time.monotonic() + seconds
    for attempt in range(RETRIES + 1):
        future: Future[Value] = Future()
        work = (contextvars.copy_context().run, _settle, future, function, arguments, settings)
        threading.Thread(target=work[0], args=work[1:], daemon=True).start()
        try:
            error = future.exception(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            error = _OutOfTime()
        if error is None:
            return future.result()
        if attempt == RETRIES or status_of(error) not in BUSY:
            break
        asked = error.response.headers.get("Retry-After", "1")
        time.sleep(min(float(asked) if asked.isdecimal() else 1.0, LONGEST_WAIT))
    raise HubError(_explanation(what, error, seconds)) from error


def _settle(
    future: Future[Value], function: Callable[..., Value], arguments: tuple[object, ...], settings: dict[str, object]
) -> None:
    try:
        future.set_result(function(*arguments, **settings))
    # Whatever it is, it is the caller's.
    except BaseException as error:
        future.set_exception(error)


def _explanation(what: str, error: BaseException, seconds: float) -> str:
    endpoint = constants.ENDPOINT
    if isinstance(error, _OutOfTime):
        return f"{what}: {endpoint} did not send it within {seconds:.0f} s; try again, or look after the network"
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


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error of the client tells; None if it was no answer of a server."""
    return getattr(getattr(error, "response", None), "status_code", None)
