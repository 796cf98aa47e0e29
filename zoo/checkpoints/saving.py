"""From a model to a checkpoint folder, written whole or not at all."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from operators.lookup import look_up
from zoo.checkpoints.catalogue import find_local
from zoo.checkpoints.config import RECORDED, SCHEMA, Metric, check_config, read_config
from zoo.checkpoints.verification import agree, fingerprint
from zoo.checkpoints.weights import PRECISIONS, listed, misfits, serialise
from zoo.files import put_in_place, refuse_file_above, write_whole
from zoo.hub.card import model_card
from zoo.hub.repository import CARD, CONFIG, FILES, WEIGHTS
from zoo.models.building import build_from, check_size
from zoo.models.image_model import ImageModel
from zoo.models.spec import ModelSpec


def save(
    model: ImageModel,
    folder: str | os.PathLike[str],
    *,
    metrics: Sequence[Metric] = (),
    training: Mapping[str, Any] | None = None,
    licence: str = "not stated",
    precision: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Write ``model`` as a checkpoint folder, all of it or nothing, and return the folder.

    Args:
        folder: its last part is the checkpoint's name, ``<data>_<architecture>_<operator>``.
        metrics: what was measured.
        training: how it was trained, as JSON-able values: command, seed, commit, hardware, ...
        licence: of the weights, as an SPDX identifier or in words.
        precision: how weights are stored: "float32", or "float16" in half the space, for a model that
            :func:`round_weights` has rounded: what was measured holds of the stored weights only.
        overwrite: replace a folder that exists.

    Raises:
        FileExistsError: the folder exists and ``overwrite`` is false, or has other files than a checkpoint's.
        ValueError: weights or logits that are not finite, weights that are not exact in ``precision``, a model that is
            no ``ImageModel``, or one whose network is no longer what its ``spec`` describes, as after ``fold``: it
            could not be loaded again.
    """
    described = {"metrics": metrics, "training": training, "licence": licence}
    return _write(model, folder, precision=precision, overwrite=overwrite, **described)


def save_built(model: ImageModel, folder: str | os.PathLike[str], **settings: Any) -> Path:
    """Write a model whose network was just built from its ``spec``, as :func:`save` does, without building another one.

    Args:
        settings: those of :func:`save`.

    Raises:
        FileExistsError, ValueError: as :func:`save`.
    """
    return _write(model, folder, rebuild=False, **settings)


def _write(
    model: ImageModel,
    folder: str | os.PathLike[str],
    *,
    metrics: Sequence[Metric] = (),
    training: Mapping[str, Any] | None = None,
    licence: str = "not stated",
    precision: str = "float32",
    overwrite: bool = False,
    rebuild: bool = True,
) -> Path:
    """Write a model as :func:`save` does; with ``rebuild``, after a proof that its spec describes it."""
    dtype = look_up(PRECISIONS, precision, "precision")
    folder = Path(folder)
    if not isinstance(model, ImageModel):
        raise ValueError(f"save takes a model that build or load made, got {type(model).__name__}")
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another name, or pass overwrite=True to replace it")
    refuse_other_files(folder)
    weights = serialise(model.network, dtype)
    logits = fingerprint(model)
    spec = model.describe()
    if not all(map(math.isfinite, itertools.chain(*logits))):
        raise ValueError(
            f"the logits on the fingerprint's images are not finite ({logits[0][:3]}, ...), though the weights are; a "
            "checkpoint is not written from them"
        )
    _check_size(spec)
    if rebuild:
        _check_spec(model, spec, logits)
    config = {
        "schema": SCHEMA,
        "name": folder.name,
        **spec.to_dict(),
        **_fields_of_timm(model, licence),
        "metrics": [dataclasses.asdict(metric) for metric in metrics],
        "training": dict(training or {}),
        "licence": licence,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": precision,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "fingerprint": logits,
    }
    text = _as_json(config, folder / CONFIG)
    card = model_card(json.loads(text))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        draft = Path(scratch) / "new"
        draft.mkdir()
        (draft / WEIGHTS).write_bytes(weights)
        (draft / CONFIG).write_text(text, encoding="utf-8")
        (draft / CARD).write_text(card, encoding="utf-8")
        put_in_place(draft, folder, old=Path(scratch) / "old")
    return folder


def record(where: str | os.PathLike[str], **facts: Any) -> None:
    """Write what is known of a checkpoint into its ``config.json`` and card, in place of what they said of it.

    Args:
        facts: by its name in ``RECORDED``, as JSON-able values: ``licence`` of the weights; ``metrics`` as the
            dictionaries of :class:`Metric`; ``measured_on``, the data module that gave them; ``robustness``, what
            ``python -m zoo robustness`` found; ``speed``, images a second and their ratio to the twin's.

    Raises:
        ValueError: no such checkpoint, another name, or a Hub repository, of which others than its owner have a copy.
        CheckpointError: a folder that is incomplete or damaged.
    """
    for name in facts:
        look_up(dict.fromkeys(RECORDED), name, "fact")
    folder = find_local(where)
    config = {**read_config(folder), **facts}
    if "license" in config.get("pretrained_cfg", {}):
        config["pretrained_cfg"]["license"] = config["licence"]
    text = _as_json(config, folder / CONFIG)
    write_whole(folder / CONFIG, text)
    write_whole(folder / CARD, model_card(json.loads(text)))


def round_weights(model: ImageModel) -> None:
    """Round every floating-point tensor of the network, in place, to what float16 can hold; the dtypes stay.

    Raises:
        ValueError: a finite value beyond the range of float16.
    """
    for name, tensor in model.network.state_dict().items():
        if tensor.is_floating_point():
            rounded = tensor.half().to(tensor.dtype)
            if (rounded.isinf() & tensor.isfinite()).any():
                raise ValueError(
                    f"{name} reaches {tensor.abs().max():.3g}, more than float16 holds; store it in float32"
                )
            tensor.copy_(rounded)


def _fields_of_timm(model: ImageModel, licence: str) -> dict[str, Any]:
    """Return what timm wants to know beside the fields of the spec."""
    spec = model.spec
    # A network of timm says here which layers follow the channels and the classes.
    made_for = getattr(model.network, "pretrained_cfg", None) or {}
    layers = {name: made_for[name] for name in ("first_conv", "classifier", "fixed_input_size") if name in made_for}
    return {
        "num_classes": len(spec.class_names),
        # transformers looks for the names here, timm below.
        "label_names": list(spec.class_names),
        "pretrained_cfg": {
            "input_size": [spec.in_chans, spec.input_size, spec.input_size],
            "mean": list(spec.mean),
            "std": list(spec.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": len(spec.class_names),
            "label_names": list(spec.class_names),
            "license": licence,
            **layers,
        },
    }


def _check_size(spec: ModelSpec) -> None:
    """Refuse a model that loading would refuse for its size."""
    try:
        check_size(spec, sys.maxsize)
    # Loading would fail likewise.
    except Exception as error:
        raise ValueError(f"{spec.architecture} could not be loaded again: its size cannot be told ({error})") from error


def _check_spec(model: ImageModel, spec: ModelSpec, logits: list[list[float]]) -> None:
    """Refuse a model whose weights, in a network built from ``spec``, would not give these logits."""
    # Building draws random weights, which must not change what the caller draws next.
    with torch.random.fork_rng(devices=[]):
        twin = build_from(spec)
    weights = model.network.state_dict()
    problems = misfits(weights, twin.network.state_dict())
    if not problems:
        twin.network.load_state_dict(weights)
        if agree(logits, fingerprint(twin)):
            return
        problems = ["other answers"]
    raise ValueError(
        f"the network is not what its spec describes, {spec.architecture} with {spec.operator_name} (was "
        "it converted, folded or cast since zoo.build made it?), so it could not be loaded again; save it as it was, "
        f"and fold or cast it after loading: {listed(problems)}"
    )


def _as_json(config: Mapping[str, Any], path: Path) -> str:
    """Return the text of a config.json, which reading takes back.

    Raises:
        ValueError: a value that is none of JSON's, or a field that reading would refuse.
    """
    text = json.dumps(config, indent=2, allow_nan=False, default=_plain) + "\n"
    check_config(json.loads(text), path)
    return text


def _plain(value: object) -> int | float | bool:
    """Return the plain number that one of numpy or torch stands for."""
    if not hasattr(value, "item") or getattr(value, "ndim", 0):
        raise ValueError(f"{value!r} of type {type(value).__name__} cannot be recorded, as it is none of JSON's values")
    return value.item()


def refuse_other_files(folder: Path) -> None:
    """Refuse to replace a folder that holds more than a checkpoint, such as that of a run.

    Raises:
        FileExistsError: it has other files, or is one.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another name")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if others := [name for name in names if name not in (*FILES, ".DS_Store")]:
        raise FileExistsError(
            f"{folder} holds more than a checkpoint ({', '.join(others[:5])}), which would be lost; name another folder"
        )


def check_absent(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is there already, or cannot be made.

    Raises:
        FileExistsError: the folder exists and ``overwrite`` is false, or has other files than a checkpoint's.
        ValueError: something above it is a file.
    """
    refuse_file_above(folder)
    refuse_other_files(folder)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another name or parent (--to), or replace it (--overwrite)")
