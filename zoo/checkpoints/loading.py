"""From a checkpoint folder to its model, read strictly."""

import contextlib
import dataclasses
import math
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from zoo.checkpoints.catalogue import find, repository_of
from zoo.checkpoints.config import read_config
from zoo.checkpoints.weights import PRECISIONS, read_into
from zoo.errors import CheckpointError, DamagedError, HubError
from zoo.hub.repository import CONFIG, WEIGHTS
from zoo.models.building import build_from, check_size
from zoo.models.image_model import ImageModel
from zoo.models.spec import ModelSpec

# Two threads that change torch's default dtype would leave it in neither's.
ONE_AT_A_TIME = threading.Lock()

# Arguments of timm that fetch other weights; a checkpoint has its own.
FOREIGN_SOURCES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}

# A network of so many bytes is built whatever its file holds, which may be damaged.
HARMLESS = 1 << 28


def load(
    where: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    device: torch.device | str | None = None,
) -> ImageModel:
    """Return the model of a checkpoint, in evaluation mode.

    The weights' sha256 is computed on every load. Files from the Hub that are damaged are fetched once more.

    Args:
        where: the name of an embedded or published checkpoint (see :func:`list_checkpoints`), the path of a checkpoint
            folder, or a Hub repository, which is fetched into the Hub's cache: ``"owner/name"``, or, where a folder has
            the same name, ``"hf-hub:owner/name"``.
        num_classes: another number gives the model a fresh, untrained classifier, and says so.
        in_chans: another number spreads the first convolution's filters over that many channels, and says so. Images
            with equal channels then get the answers they had: exactly so from one channel, and for ordinary
            convolutions from several; not where weights are standardised.
        revision: of a Hub repository: a commit, which is never asked for again once it is in the cache, a branch or a
            tag; by default the newest commit.
        local_files_only: take a Hub repository from the cache alone, as with ``HF_HUB_OFFLINE=1``.
        device: where the model is put; the CPU by default.

    Raises:
        ValueError: no such checkpoint, or less than one class or channel.
        TypeError: a number of classes or channels that is no whole number.
        CheckpointError: a folder whose files are missing, damaged or do not fit together.
        HubError: a Hub repository that cannot be had.
    """
    for name, number in {"num_classes": num_classes, "in_chans": in_chans}.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise TypeError(f"{name} is a whole number, got {number!r}")
    source = {"revision": revision, "local_files_only": local_files_only}
    with _usual_tensors():
        model = _whole(where, source)
        if in_chans not in (None, model.spec.in_chans):
            if in_chans < 1:
                raise ValueError(f"in_chans must be at least 1, got {in_chans}")
            warnings.warn(f"{os.fspath(where)} now takes {in_chans} channels, not {model.spec.in_chans}", stacklevel=2)
            model = _with_channels(model, in_chans)
        if num_classes not in (None, len(model.class_names)):
            model.reset_classifier([str(label) for label in range(num_classes)])
            told = f"{os.fspath(where)} has a fresh classifier for {num_classes} classes: train it"
            warnings.warn(told, stacklevel=2)
        return model.to(device)


def load_untrained(
    where: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
) -> ImageModel:
    """Return the model that a checkpoint describes, freshly initialised and in training mode.

    Raises:
        ValueError: no such checkpoint, or less than one class.
        CheckpointError: a ``config.json`` that describes no model.
        HubError: a Hub repository that cannot be had.
    """
    folder = find(where, revision=revision)
    with _usual_tensors():
        model = _build(read_config(folder), folder, most_bytes(folder / WEIGHTS))
        if num_classes not in (None, len(model.class_names)):
            model.reset_classifier([str(label) for label in range(num_classes)])
        return model.to(device)


def _whole(where: str | os.PathLike[str], source: dict[str, Any]) -> ImageModel:
    """Return the model of a checkpoint; files from the Hub that are damaged are fetched once more."""
    folder = find(where, **source)
    try:
        return _read(folder)
    except DamagedError as error:
        offline = source["local_files_only"] or constants.HF_HUB_OFFLINE
        if repository_of(where, source["revision"]) is None or offline:
            raise
        try:
            folder = find(where, **source, renew=True)
        except HubError as again:
            raise CheckpointError(f"{error}. Fetching it again failed: {again}") from error
        return _read(folder)


def _read(folder: Path) -> ImageModel:
    config = read_config(folder)
    if config["precision"] not in PRECISIONS:
        legal = ", ".join(PRECISIONS)
        raise CheckpointError(f"{folder / CONFIG} has precision {config['precision']!r}; this version reads {legal}")
    model = _build(config, folder, most_bytes(folder / WEIGHTS))
    read_into(model.network, folder / WEIGHTS, config["sha256"], PRECISIONS[config["precision"]])
    return model.eval()


@contextlib.contextmanager
def _usual_tensors() -> Iterator[None]:
    """While it lasts, new tensors are of float32, on the CPU and can be trained, whatever the caller has told torch."""
    with torch.device("cpu"), torch.inference_mode(False):
        # The default dtype is that of the whole process, and is left alone as a rule.
        if torch.get_default_dtype() == torch.float32:
            yield
            return
        with ONE_AT_A_TIME:
            usual = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            try:
                yield
            finally:
                torch.set_default_dtype(usual)


def most_bytes(weights: Path) -> int:
    """Return how much memory a network may take whose weights are in that file, which may be in half precision."""
    return max(HARMLESS, 2 * weights.stat().st_size if weights.is_file() else 0)


def _build(config: dict[str, Any], folder: Path, largest: int) -> ImageModel:
    """Return the model that a config describes, if its weights take at most ``largest`` bytes."""
    if foreign := sorted(FOREIGN_SOURCES & config["model_args"].keys()):
        raise CheckpointError(f"{folder / CONFIG}: model_args name other weights ({', '.join(foreign)}); remove these")
    try:
        spec = ModelSpec.from_dict(config)
        check_size(spec, largest)
        return build_from(spec)
    # Architectures fail in as many ways as there are wrong arguments.
    except Exception as error:
        raise CheckpointError(f"{folder / CONFIG} describes no model that can be built: {error}") from error


def _with_channels(model: ImageModel, in_chans: int) -> ImageModel:
    """Return the model for ``in_chans`` channels, which answers to equal channels what it answered before."""
    spec = model.describe()
    # Both the filters and the normalised pixels are scaled, so that no norm changes with the number of channels.
    scale = math.sqrt(spec.in_chans / in_chans)
    mean = [sum(spec.mean) / spec.in_chans] * in_chans
    std = [sum(spec.std) / spec.in_chans / scale] * in_chans
    wider = build_from(dataclasses.replace(spec, in_chans=in_chans, mean=tuple(mean), std=tuple(std)))
    weights = model.network.state_dict()
    for name, wanted in wider.network.state_dict().items():
        if weights[name].shape != wanted.shape:
            weights[name] = weights[name].mean(1, keepdim=True).expand_as(wanted) * scale
    wider.network.load_state_dict(weights)
    return wider.eval()
