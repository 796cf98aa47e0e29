"""From a checkpoint folder to a repository of the Hugging Face Hub, in one commit."""

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants

from zoo.checkpoints.catalogue import find, list_checkpoints
from zoo.checkpoints.config import read_config
from zoo.checkpoints.verification import verify
from zoo.errors import CheckpointError, HubError
from zoo.files import relative
from zoo.hub.fetching import OutOfTime, in_time, refused_token, status_of
from zoo.hub.repository import COMMIT, FILES, is_repository, is_revision
from zoo.models.names import name_ending
from zoo.models.spec import PLAIN, ModelSpec, composed

# The client alone would wait for ever.
SECONDS_TO_PUBLISH, LEAST_BYTES_A_SECOND = 60, 100_000

# The end of the message where a commit's answer was lost.
UNKNOWN = "Either the whole commit was made, or what was published before is as it was"

# A reader needs to know this of a training, by the names of config.json.
OF_TRAINING = ("command", "commit", "hardware")


def missing(folder: Path) -> list[str]:
    """Return what a checkpoint lacks to be published; an empty list if it is fit to be.

    Everything that :func:`zoo.verify` recomputes has to hold: the hash of the weights, the shape of each tensor, the
    logits of the fingerprint, the card. Beside it, what people need to know has to be told.
    """
    here = relative(folder)
    try:
        problems = verify(here)
        config = read_config(folder)
    except CheckpointError as error:
        return [str(error)]
    if not config["metrics"]:
        problems.append(
            f"no accuracy with its data set, split and number of images; python -m zoo measure {here} --root IMAGES "
            "measures and records it"
        )
    if not all(0 <= metric["value"] <= 1 and metric["images"] > 0 for metric in config["metrics"]):
        problems.append("an accuracy that is no share of at least one image")
    if not config["licence"].strip() or "not stated" in config["licence"]:
        problems.append(
            f"the licence of the weights is not stated; python -m zoo measure {here} --licence ... records it"
        )
    told = config["training"]
    if unknown := [field for field in OF_TRAINING if not told.get(field)]:
        problems.append(
            f"the training's {', '.join(unknown)} is not recorded; zoo.save(..., training={{{unknown[0]!r}: ...}}) "
            "records it"
        )
    spec = ModelSpec.from_dict(config)
    expected = name_ending(spec.architecture, spec.operator_name)
    # macOS may write the folder's name by other characters.
    if composed(config["name"]) != composed(folder.name) or not folder.name.endswith(expected):
        twin = f"<data>{name_ending(spec.architecture, PLAIN)}"
        problems.append(
            f"the folder is called {folder.name} and its config.json says {config['name']}; both have to be the same, "
            f"<data>{expected}, so that its twin of ordinary convolutions, {twin}, can be told"
        )
    return problems


def publish(
    where: str | Path, repository: str, *, private: bool = False, revision: str | None = None, dry_run: bool = False
) -> str | None:
    """Put a checkpoint into a Hub repository, which is made if there is none, and return the commit.

    All files travel in one commit, which comes after the upload: whatever fails, the repository has what it had (one
    that is new stays, empty), or all of it if only the commit's answer was lost. What it has already makes no commit.

    Args:
        where: the checkpoint's name or folder.
        repository: ``"owner/name"``.
        private: make the repository private.
        revision: a branch, made from ``main`` if there is none; ``main`` by default.
        dry_run: only look whether the checkpoint is fit to be published, and return None.

    Raises:
        ValueError: what :func:`missing` finds, no such checkpoint, or no name of a repository.
        HubError: no permission; the Hub cannot be reached or refuses, as it does if another commit came meanwhile; or a
            repository that is public though ``private`` is asked for.
    """
    if not is_repository(repository):
        raise ValueError(f"a repository is called owner/name, in letters, digits, '.', '-' and '_'; got {repository!r}")
    if revision is not None and (not is_revision(revision) or re.fullmatch(COMMIT, revision)):
        raise ValueError(
            f"revision is the name of a branch, in letters, digits, '.', '-', '_' and '/'; got {revision!r}"
        )
    if not where or (not Path(where).is_dir() and where not in list_checkpoints()):
        raise ValueError(f"{where!r} is neither a folder nor one of {', '.join(list_checkpoints())}")
    folder = find(where).resolve()
    if problems := missing(folder):
        raise ValueError("\n  ".join([f"{folder} is not published, for:", *problems]))
    if dry_run:
        return None
    try:
        seconds = SECONDS_TO_PUBLISH + sum((folder / file).stat().st_size for file in FILES) / LEAST_BYTES_A_SECOND
        return in_time(seconds, _send, folder, repository, private, revision)
    except HubError:
        raise
    # The client, and what it is made of, have no error in common.
    except Exception as error:
        raise HubError(_explanation(repository, error)) from error


def _send(folder: Path, repository: str, private: bool, revision: str | None) -> str:
    api = HfApi()
    api.create_repo(repository, private=private or None, exist_ok=True)
    if private and not api.model_info(repository).private:
        raise HubError(f"{repository} is there, and public; make it private on its page, or leave out private")
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    files = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=folder / file) for file in FILES]
    # The commit comes on top of what is there now; files that are there already are left out.
    settings = {"revision": revision, "parent_commit": api.model_info(repository, revision=revision).sha}
    return api.create_commit(repository, files, commit_message=f"Publish {folder.name}", **settings).oid


def _explanation(repository: str, error: Exception) -> str:
    if isinstance(error, OutOfTime):
        return (
            f"the Hub at {constants.ENDPOINT} did not answer for {repository} in time. {UNKNOWN}; look after the "
            "network, and publish again to see"
        )
    # An error that a thread of the client met is the cause of the client's own error.
    if refused := refused_token(error) or (error.__cause__ and refused_token(error.__cause__)):
        return f"{repository} is not published: {refused}"
    if {status_of(error), status_of(error.__cause__)} & {401, 403}:
        return f"{repository} is misspelt or not yours to write: log in with a token that may (hf auth login)"
    after = "What was published before is as it was" if status_of(error) else f"{UNKNOWN}; publish again to see"
    return f"the Hub at {constants.ENDPOINT} did not take {repository} ({type(error).__name__}: {error}). {after}"
