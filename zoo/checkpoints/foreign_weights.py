"""Weights that others have saved: from a file to the tensors of a network, by name, or one sentence why not."""

import itertools
import os
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import safetensors.torch
import timm.models
import torch
from torch import Tensor

from zoo.checkpoints.config import RUN_RECORD, is_decoupled, read_json
from zoo.errors import CheckpointError

# Where programs put the weights among what else they save, the better ones first.
KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net", "network", "weights", "params")

# BatchNorm's count of batches, which torch did not have at first.
COUNTER = "num_batches_tracked"


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file (.safetensors, .pth, .ckpt) by their names, floating-point ones in float32.

    No code in it is run. What torch's wrappers put before names (``module.``, ``_orig_mod.``) is taken off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds no weights, or those of a decoupled network, which no plain one has any use for.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; weights are a file that ends in .safetensors or .pth")
    _refuse_decoupled(file)
    try:
        is_safe = file.suffix == ".safetensors"
        saved = safetensors.torch.load_file(file) if is_safe else torch.load(file, "cpu", weights_only=True)
    # A damaged file fails in as many ways as there are formats.
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as weights ({type(error).__name__}: {textwrap.shorten(str(error), 200)}); a "
            "whole network is not taken, for no code in a file is run: save network.state_dict() instead"
        ) from error
    if isinstance(saved, Mapping) and RUN_RECORD in saved:
        raise ValueError(
            f"{file} is of a training of the zoo; python -m zoo export {file} NAME makes a checkpoint folder of it"
        )
    tensors = timm.models.clean_state_dict(_tensors_in(file, saved))
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def without_prefix(tensors: Mapping[str, Tensor], expected: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """Return tensors by the names that a network expects, if but a prefix that all have stands before these.

    Args:
        expected: the names in the network's state dict.

    Returns:
        The tensors, and the prefix that was taken off: none, if the names then were not the expected ones either.
    """
    wanted = {name for name in expected if not name.endswith(COUNTER)}
    for prefix in ("", *prefixes(tensors)):
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if {name for name in named if not name.endswith(COUNTER)} == wanted:
            return named, prefix
    return dict(tensors), ""


def prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes that all names have, each ending in a dot, the shortest first."""
    parts = os.path.commonprefix(list(names)).split(".")[:-1]
    return [f"{prefix}." for prefix in itertools.accumulate(parts, lambda prefix, part: f"{prefix}.{part}")]


def _tensors_in(file: Path, saved: object) -> dict[str, Tensor]:
    """Return the weights among what a program has saved."""
    if isinstance(saved, Mapping):
        for found in (*(saved[key] for key in KEYS if key in saved), saved, *saved.values()):
            if _are_tensors(found):
                return dict(found)
    has = ", ".join(map(str, list(saved)[:8])) if isinstance(saved, Mapping) else type(saved).__name__
    raise ValueError(f"{file} holds no weights by their names, but {has}; save network.state_dict()")


def _are_tensors(values: object) -> bool:
    return isinstance(values, Mapping) and bool(values) and all(isinstance(each, Tensor) for each in values.values())


def _refuse_decoupled(file: Path) -> None:
    """Refuse the weights of a decoupled network in a folder: they may fit a plain one, which answers otherwise."""
    try:
        config = read_json(file.parent)
    # There is none, or it is another's.
    except CheckpointError:
        return
    if is_decoupled(config):
        raise ValueError(
            f"{file} is of a decoupled network, and timm:NAME is a plain one; zoo.load({str(file.parent)!r}) loads it, "
            "or says what it is"
        )
