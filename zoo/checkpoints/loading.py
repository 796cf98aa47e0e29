"""Checkpoint folders: ``config.json``, ``model.safetensors`` and the model card, written whole and read strictly."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn

from operators.lookup import look_up, unknown_name
from zoo.checkpoints import hub
from zoo.checkpoints.card import model_card
from zoo.checkpoints.hub import CARD, CONFIG, WEIGHTS
from zoo.checkpoints.weights import PRECISIONS, listed, misfits, read_into, serialise
from zoo.errors import CheckpointError, DamagedError, HubError
from zoo.models.building import ImageModel, ModelSpec

SCHEMA = 1
# A network of so many bytes is built whatever its file holds, which may be damaged.
HARMLESS = 1 << 28
# Before a repository's name: it is no folder, though there may be one of that name.
HUB = "hf-hub:"
PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
# Names of checkpoints too large to embed, with the repository and the commit that have them.
PUBLISHED = PRETRAINED / "published.json"

# How the name of a file ends that is being written, before it is put in its place.
DRAFT = ".part"

# Fields of config.json that may come after the weights.
RECORDED = ("licence", "measured_on", "metrics", "robustness", "speed")

# Arguments of timm that fetch other weights; a checkpoint has its own.
FOREIGN_SOURCES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}

# Logits of the same weights differ by rounding between machines and releases of torch; relative to the largest logit.
FINGERPRINT_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Metric:
    """One measured number, e.g. accuracy 0.9917 on the 360 images of Digits' test split."""

    name: str
    value: float
    dataset: str
    split: str
    images: int


def list_checkpoints() -> list[str]:
    """Return the names of the embedded checkpoints."""
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{CONFIG}"))


def list_published() -> dict[str, dict[str, str]]:
    """Return, by name, the ``repository`` and ``commit`` of the checkpoints that are published but not embedded."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


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
    folder = find(where, **source)
    try:
        model = _read(folder)
    except DamagedError as error:
        if _repository(where, revision) is None or local_files_only or constants.HF_HUB_OFFLINE:
            raise
        try:
            folder = find(where, **source, renew=True)
        except HubError as again:
            raise CheckpointError(f"{error}. Fetching it again failed: {again}") from error
        model = _read(folder)
    if in_chans not in (None, model.spec.in_chans):
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        warnings.warn(f"{os.fspath(where)} now takes {in_chans} channels, not {model.spec.in_chans}", stacklevel=2)
        model = _with_channels(model, in_chans)
    if num_classes not in (None, len(model.class_names)):
        model.reset_classifier([str(label) for label in range(num_classes)])
        warnings.warn(f"{os.fspath(where)} has a fresh classifier for {num_classes} classes: train it", stacklevel=2)
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
    model = _build(read_config(folder), folder, _most_bytes(folder / WEIGHTS))
    if num_classes not in (None, len(model.class_names)):
        model.reset_classifier([str(label) for label in range(num_classes)])
    return model.to(device)


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
        FileExistsError: the folder exists and ``overwrite`` is false.
        ValueError: weights that are not finite or not exact in ``precision``, a model that is no ``ImageModel``, or one
            whose network is no longer what its ``spec`` describes, as after ``fold``: it could not be loaded again.
    """
    dtype = look_up(PRECISIONS, precision, "precision")
    folder = Path(folder)
    if not isinstance(model, ImageModel):
        raise ValueError(f"save takes a model that build or load made, got {type(model).__name__}")
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another name, or pass overwrite=True to replace it")
    weights = serialise(model.network, dtype)
    logits = fingerprint(model)
    spec = model.describe()
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        draft = Path(scratch) / "new"
        draft.mkdir()
        (draft / WEIGHTS).write_bytes(weights)
        (draft / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (draft / CARD).write_text(model_card(config), encoding="utf-8")
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
    write_whole(folder / CONFIG, json.dumps(config, indent=2, allow_nan=False) + "\n")
    write_whole(folder / CARD, model_card(config))


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


def verify(
    where: str | os.PathLike[str], batches: Iterable[tuple[Tensor, Tensor]] | None = None, split: str = "test"
) -> list[str]:
    """Recompute what a checkpoint claims and return what does not hold; an empty list is a pass.

    Checked are the schema, the hash and shape of every weight, the fingerprint, the model card, and with ``batches`` of
    (images in [0, 1], labels) the accuracy on that split.

    Raises:
        ValueError: no such checkpoint, or no recorded accuracy to compare with.
        CheckpointError: a folder that cannot be loaded at all.
    """
    folder = find(where)
    config = read_config(folder)
    model = load(folder)
    problems = []
    if not _agree(config["fingerprint"], fingerprint(model)):
        problems.append(f"{CONFIG}: the logits on the fingerprint's images are not those recorded")
    card = folder / CARD
    try:
        told = model_card(config)
    # Of a speed that has other fields, for one.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: no card can be made of it ({error!r})") from error
    if not card.is_file() or card.read_text(encoding="utf-8", errors="replace") != told:
        problems.append(f"{CARD}: not the card that {CONFIG} gives; python -m zoo cards {where} writes it")
    if batches is not None:
        problems += _verify_accuracy(model, config, batches, split)
    return problems


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Return the fraction of images whose largest logit is the label's in evaluation mode, and the images' number."""
    device, training = next(model.parameters()).device, model.training
    correct = total = 0
    model.eval()
    with torch.inference_mode():
        for images, labels in batches:
            correct += (model(images.to(device)).argmax(1).cpu() == labels.cpu()).sum().item()
            total += len(labels)
    model.train(training)
    if not total:
        raise ValueError("accuracy needs at least one image")
    return correct / total, total


def fingerprint(model: ImageModel) -> list[list[float]]:
    """Return the logits on two generated images, in evaluation mode on the CPU in float32.

    Pixel i of image m is ``½ + ½ sin(0.37 (m + 1) i)``, counted through channels, rows and columns.
    """
    spec = model.spec
    count = spec.in_chans * spec.input_size**2
    phases = torch.arange(count, dtype=torch.float64) * torch.tensor([[0.37], [0.74]], dtype=torch.float64)
    images = (0.5 + 0.5 * phases.sin()).float().view(2, spec.in_chans, spec.input_size, spec.input_size)
    with torch.inference_mode():
        logits = copy.deepcopy(model).cpu().float().eval()(images)
    return [[round(value, 6) for value in row] for row in logits.tolist()]


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
        revision, local_files_only, renew: of a Hub repository; see :func:`zoo.checkpoints.hub.fetch`.

    Raises:
        ValueError: none of these; the message lists the names and the nearest one.
        HubError: a Hub repository that cannot be had.
    """
    name = os.fspath(where)
    if repository := _repository(where, revision):
        return hub.fetch(repository[0], revision=repository[1], local_files_only=local_files_only, renew=renew)
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
    if _repository(where, None):
        raise ValueError(f"{where} is a Hub repository; zoo.save(zoo.load({where!r}), FOLDER) makes a folder of it")
    return find(where)


def _repository(where: str | os.PathLike[str], revision: str | None) -> tuple[str, str | None] | None:
    """Return the Hub repository that ``where`` stands for, and its revision; None if it is a folder."""
    name = os.fspath(where)
    if not isinstance(where, str) or name in list_checkpoints():
        return None
    if name.startswith(HUB):
        if not hub.is_repository(name.removeprefix(HUB)):
            raise ValueError(f"{name} names no Hub repository, which is called owner/name; its revision is given apart")
        return name.removeprefix(HUB), revision
    if published := list_published().get(name):
        return published["repository"], revision or published["commit"]
    # A path in a folder that exists is a misspelt path.
    is_path = Path(name).exists() or Path(name).parent.is_dir()
    return (name, revision) if hub.is_repository(name) and not is_path else None


def _read(folder: Path) -> ImageModel:
    config = read_config(folder)
    model = _build(config, folder, _most_bytes(folder / WEIGHTS))
    if config["precision"] not in PRECISIONS:
        legal = ", ".join(PRECISIONS)
        raise CheckpointError(f"{folder / CONFIG} has precision {config['precision']!r}; this version reads {legal}")
    read_into(model.network, folder / WEIGHTS, config["sha256"], PRECISIONS[config["precision"]])
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json``, checked for its schema and fields.

    Raises:
        CheckpointError: it is missing, not JSON, of another schema, or a field is missing or of the wrong type.
    """
    path = folder / CONFIG
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(hub.LARGEST_TEXT + 1)
        if len(text) > hub.LARGEST_TEXT:
            raise ValueError(f"more than {hub.LARGEST_TEXT:,} characters")
        config = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {folder} is no checkpoint folder; python -m zoo export or zoo.save writes one"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(config, dict) or config.get("schema") != SCHEMA:
        found = config.get("schema") if isinstance(config, dict) else None
        raise CheckpointError(f"{path} has schema {found!r}, this version reads {SCHEMA}; update decoupled-zoo")
    # Checkpoints of before there was another.
    config.setdefault("precision", "float32")
    for field, kind in _FIELDS.items():
        if not isinstance(config.get(field), kind):
            raise CheckpointError(f"{path}: {field!r} is missing or malformed; fetch the checkpoint again")
    layers = config.get("layer_settings", {})
    if not isinstance(layers, dict) or not all(isinstance(settings, dict) for settings in layers.values()):
        raise CheckpointError(f"{path}: 'layer_settings' is malformed; fetch the checkpoint again")
    for described in (config.get("measured_on", {}), config["training"].get("data", {})):
        if not isinstance(described, dict) or not isinstance(described.get("arguments", {}), dict):
            raise CheckpointError(f"{path}: what it was measured or trained on is malformed; fetch it again")
    columns = {field.name: field.type for field in dataclasses.fields(Metric)}
    for metric in config["metrics"]:
        if not isinstance(metric, dict) or metric.keys() != columns.keys():
            raise CheckpointError(f"{path}: a metric has other fields than {', '.join(sorted(columns))}")
        if not all(isinstance(metric[name], (int, float) if kind is float else kind) for name, kind in columns.items()):
            raise CheckpointError(f"{path}: a metric is malformed: {metric}")
    return config


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "architecture": str,
    "model_args": dict,
    "operator": (dict, str),
    "class_names": list,
    "in_chans": int,
    "input_size": int,
    "mean": list,
    "std": list,
    "metrics": list,
    "training": dict,
    "licence": str,
    "parameters": int,
    "precision": str,
    "sha256": str,
    "fingerprint": list,
}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to be written, which takes its place, or is removed if an error is raised."""
    # Of its own, for another process may write the same.
    draft = path.with_name(f"{path.name}.{os.getpid()}{DRAFT}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as draft:
        # The line ends of the text itself: those of CSV are the same everywhere.
        draft.write_text(text, encoding="utf-8", newline="")


def put_in_place(draft: Path, folder: Path, old: Path) -> None:
    """Rename ``draft`` to ``folder``; what stood there is moved to ``old``, and back if the renaming fails."""
    replaces = folder.exists()
    if replaces:
        folder.rename(old)
    try:
        draft.rename(folder)
    except BaseException:
        if replaces and not folder.exists():
            old.rename(folder)
        raise


def _fields_of_timm(model: ImageModel, licence: str) -> dict[str, Any]:
    """Return what timm wants to know beside the fields of the spec."""
    spec = model.spec
    # How a network of timm says which layers follow the channels and the classes.
    made_for = getattr(model.network, "pretrained_cfg", None) or {}
    layers = {name: made_for[name] for name in ("first_conv", "classifier", "fixed_input_size") if name in made_for}
    return {
        "num_classes": len(spec.class_names),
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


def _most_bytes(weights: Path) -> int:
    """Return how much memory a network may take whose weights are in that file, which may be in half precision."""
    return max(HARMLESS, 2 * weights.stat().st_size if weights.is_file() else 0)


def _build(config: dict[str, Any], folder: Path, largest: int) -> ImageModel:
    """Return the model that a config describes, if its weights take at most ``largest`` bytes."""
    if foreign := sorted(FOREIGN_SOURCES & config["model_args"].keys()):
        raise CheckpointError(f"{folder / CONFIG}: model_args name other weights ({', '.join(foreign)}); remove these")
    try:
        spec = ModelSpec.from_dict(config)
        spec.check_size(largest)
        return spec.build()
    # Architectures fail in as many ways as there are wrong arguments.
    except Exception as error:
        raise CheckpointError(f"{folder / CONFIG} describes no model that can be built: {error}") from error


def _check_spec(model: ImageModel, spec: ModelSpec, logits: list[list[float]]) -> None:
    """Refuse a model whose weights, in a network built from ``spec``, would not give these logits."""
    try:
        spec.check_size(sys.maxsize)
    # As loading would fail.
    except Exception as error:
        raise ValueError(f"{spec.architecture} could not be loaded again: its size cannot be told ({error})") from error
    # Building draws random weights, which must not change what the caller draws next.
    with torch.random.fork_rng(devices=[]):
        twin = spec.build()
    weights = model.network.state_dict()
    problems = misfits(weights, twin.network.state_dict())
    if not problems:
        twin.network.load_state_dict(weights)
        if _agree(logits, fingerprint(twin)):
            return
        problems = ["other answers"]
    raise ValueError(
        f"the network is not what its spec describes, {spec.architecture} with {spec.operator_name} (was "
        "it converted, folded or cast since zoo.build made it?), so it could not be loaded again; save it as it was, "
        f"and fold or cast it after loading: {listed(problems)}"
    )


def _agree(claimed: list[list[float]], measured: list[list[float]]) -> bool:
    """Say whether the logits of two fingerprints are the same but for rounding."""
    first, second = (torch.tensor(logits, dtype=torch.float64) for logits in (claimed, measured))
    return first.shape == second.shape and bool(
        ((first - second).abs() <= FINGERPRINT_TOLERANCE * second.abs().max()).all()
    )


def _with_channels(model: ImageModel, in_chans: int) -> ImageModel:
    """Return the model for ``in_chans`` channels, which answers to equal channels what it answered before."""
    spec = model.describe()
    # Both the filters and the normalised pixels are scaled, so that no norm changes with the number of channels.
    scale = math.sqrt(spec.in_chans / in_chans)
    mean = [sum(spec.mean) / spec.in_chans] * in_chans
    std = [sum(spec.std) / spec.in_chans / scale] * in_chans
    wider = dataclasses.replace(spec, in_chans=in_chans, mean=tuple(mean), std=tuple(std)).build()
    weights = model.network.state_dict()
    for name, wanted in wider.network.state_dict().items():
        if weights[name].shape != wanted.shape:
            weights[name] = weights[name].mean(1, keepdim=True).expand_as(wanted) * scale
    wider.network.load_state_dict(weights)
    return wider.eval()


def _verify_accuracy(
    model: ImageModel, config: dict[str, Any], batches: Iterable[tuple[Tensor, Tensor]], split: str
) -> list[str]:
    claims = [metric for metric in config["metrics"] if metric["name"] == "accuracy" and metric["split"] == split]
    if not claims:
        raise ValueError(f"{config['name']} records no accuracy on the split {split!r}")
    measured, images = accuracy(model, batches)
    # One image more or less may turn by rounding on another machine.
    if images != claims[0]["images"] or abs(measured - claims[0]["value"]) * images > 1.5:
        return [
            f"accuracy on {images} {split} images is {measured:.4f}, "
            f"{CONFIG} says {claims[0]['value']:.4f} on {claims[0]['images']}"
        ]
    return []
