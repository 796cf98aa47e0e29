"""Trained networks to start from, and their conversion: checkpoints of the zoo, folders, the Hub, timm."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from timm.models import PretrainedCfg

from operators.lookup import unknown_name
from zoo.architectures import ARCHITECTURES
from zoo.checkpoints.catalogue import find
from zoo.checkpoints.config import read_config, timm_config_in
from zoo.checkpoints.foreign_weights import COUNTER, read_weights, without_prefix
from zoo.checkpoints.loading import FOREIGN_SOURCES, load, most_bytes
from zoo.checkpoints.weights import listed, misfits
from zoo.hub.fetching import refused_token
from zoo.hub.repository import WEIGHTS
from zoo.models.building import build, check_size, current_name
from zoo.models.image_model import ImageModel
from zoo.models.spec import ModelSpec, composed

# This stands before the name of an architecture whose weights timm has.
TIMM = "timm:"

# The file of weights in a folder that timm, or transformers for it, has saved.
WEIGHTS_OF_TIMM = (WEIGHTS, "pytorch_model.bin")

# Arguments that follow from the weights; timm adds the first if it had the network from our folder.
GIVEN = {"architecture", "num_classes", "in_chans"} | FOREIGN_SOURCES


@dataclasses.dataclass(frozen=True)
class PlainNetwork:
    """A plain network of timm.

    Attributes:
        architecture: its name, without the tag of weights.
        tag: of the weights that timm has; empty for its choice.
        made_for: what timm knows of the weights.
        arguments: further arguments of the architecture.
    """

    architecture: str
    tag: str
    made_for: PretrainedCfg
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def start_from(
    where: str | os.PathLike[str],
    *,
    in_chans: int | None = None,
    input_size: int | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> ImageModel:
    """Return a trained network, in evaluation mode.

    Args:
        where: what :func:`zoo.load` takes; a folder or Hub repository of timm with a plain network; or ``"timm:NAME"``,
            e.g. ``"timm:resnet10t"`` or, to choose among several weights, ``"timm:resnet10t.c3_in1k"``: timm fetches
            these from the Hub, or finds them in the Hub's cache.
        in_chans, input_size: of the images, if they are not those it was trained on.
        weights: a file (.safetensors, .pth) with the weights of ``timm:NAME``, which are then not fetched; the number
            of classes and of channels follow from it. No code in it is run.

    Raises:
        ValueError: no such network, no weights for it, or weights that do not fit.
        FileNotFoundError: no file ``weights``.
    """
    name = os.fspath(where)
    plain = _plain(where)
    if weights is not None and not name.startswith(TIMM):
        raise ValueError(f"weights are those of a network of timm (timm:NAME), but {name} has weights of its own")
    if plain is None:
        model = load(where, in_chans=in_chans)
        if input_size is not None:
            model.set_input_size(input_size)
    elif not name.startswith(TIMM):
        model = _with_weights(plain, in_chans, input_size, _weights_in(find(where)))
    elif weights is not None:
        model = _with_weights(plain, in_chans, input_size, Path(weights))
    else:
        model = _fetched(plain, in_chans, input_size)
    return model.eval()


def shape_of(where: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the channels and the size of the images that a network was trained on, without its weights.

    Raises:
        ValueError: no such network.
    """
    if plain := _plain(where):
        return plain.made_for.input_size[0], plain.made_for.input_size[-1]
    config = read_config(find(where))
    return config["in_chans"], config["input_size"]


def licence_of(where: str | os.PathLike[str]) -> str:
    """Return the licence of a network's weights as it is recorded, or "not stated".

    Raises:
        ValueError: no such network.
    """
    if plain := _plain(where):
        return plain.made_for.license or "not stated"
    return read_config(find(where))["licence"]


def _plain(where: str | os.PathLike[str]) -> PlainNetwork | None:
    """Return the plain network of timm that ``where`` names or is the folder of; None if it is a checkpoint of the zoo.

    Raises:
        ValueError: a name or tag that timm does not know, or one without ``timm:`` before it.
    """
    name = os.fspath(where)
    if name.startswith(TIMM):
        return _known_to_timm(current_name(name.removeprefix(TIMM)))
    if timm.is_model(name) and name not in ARCHITECTURES and not Path(name).exists():
        raise ValueError(f"{name} is a network of timm: to start from the weights that timm has, write {TIMM}{name}")
    folder = find(where)
    config = timm_config_in(folder)
    if config is None:
        return None
    architecture = _architecture_in(current_name(config["architecture"]))
    # What stands beside pretrained_cfg is said of these very weights.
    told = {**(config.get("pretrained_cfg") or {}), **config}
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    made_for = PretrainedCfg(**{field: value for field, value in told.items() if field in known})
    arguments = {name: value for name, value in (config.get("model_args") or {}).items() if name not in GIVEN}
    return PlainNetwork(architecture, "", made_for, arguments)


def _known_to_timm(name: str) -> PlainNetwork:
    architecture, tag = _architecture_in(name), name.partition(".")[2]
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(unknown_name(f"tag of {architecture}", tag, tags))
    return PlainNetwork(architecture, tag, timm.get_pretrained_cfg(name))


def _architecture_in(name: str) -> str:
    """Return the architecture in a name of timm, which may be followed by a tag."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture) or architecture in ARCHITECTURES:
        raise ValueError(unknown_name("network of timm", name, ["resnet10t", "resnet50"], unlisted=timm.list_models()))
    return architecture


def _fetched(plain: PlainNetwork, in_chans: int | None, input_size: int | None) -> ImageModel:
    """Return a network with the weights that timm fetches."""
    made_for = plain.made_for
    name = f"{plain.architecture}.{plain.tag}" if plain.tag else plain.architecture
    settings = {"in_chans": in_chans or made_for.input_size[0], "input_size": input_size, "pretrained": True}
    try:
        # Weights without a classifier are good to start from, too.
        return build(name, class_names=_imagenet_names(made_for.num_classes or 1), **settings)
    except (TypeError, ValueError):
        raise
    # timm, the Hub's client and the network each fail in their own ways.
    except Exception as error:
        why = refused_token(error) or f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the weights of {TIMM}{name} cannot be had ({why}); without a network, fetch them elsewhere (they are in "
            f"the repository {made_for.hf_hub_id}) and name the file: python -m zoo convert {TIMM}{name} NAME "
            "--weights FILE, which writes a folder to start from"
        ) from error


def _weights_in(folder: Path) -> Path:
    """Return the file of weights in a folder that timm has written."""
    return next((folder / file for file in WEIGHTS_OF_TIMM if (folder / file).is_file()), folder / WEIGHTS)


def _with_weights(plain: PlainNetwork, in_chans: int | None, input_size: int | None, weights: Path) -> ImageModel:
    """Return a network with the weights in a file, whose classes and channels follow from them."""
    made_for = plain.made_for
    whole = ModelSpec(plain.architecture, None, ("",), 3, made_for.input_size[-1], (), (), plain.arguments)
    check_size(whole, most_bytes(weights))
    with torch.device("meta"):
        names = timm.create_model(plain.architecture, **plain.arguments).state_dict().keys()
    tensors, prefix = without_prefix(read_weights(weights), names)
    classes = _rows(tensors, made_for.classifier, 0) or made_for.num_classes
    if not classes:
        raise ValueError(
            f"{weights} is of a network without a classifier ({plain.architecture}, no classes); timm.create_model and "
            "convert_decoupled take it as it is"
        )
    channels = _rows(tensors, made_for.first_conv, 1) or made_for.input_size[0]
    if in_chans not in (None, channels):
        raise ValueError(f"{weights} takes {channels} channels, not {in_chans}")
    settings = {"in_chans": channels, "input_size": input_size or made_for.input_size[-1], **plain.arguments}
    if channels == len(made_for.mean):
        settings |= {"mean": made_for.mean, "std": made_for.std}
    labels = made_for.label_names
    class_names = labels if labels and len(labels) == classes else _imagenet_names(classes)
    model = build(plain.architecture, class_names=class_names, **settings)
    expected = model.network.state_dict()
    # Files of before torch counted BatchNorm's batches.
    tensors = {name: value for name, value in expected.items() if name.endswith(COUNTER)} | tensors
    if problems := misfits(tensors, expected):
        raise ValueError(f"{weights} does not fit {plain.architecture}: {listed(problems)}")
    if prefix:
        warnings.warn(f"{weights}: the prefix {prefix!r} of all names is taken off", stacklevel=2)
    model.network.load_state_dict(tensors)
    return model


def _rows(tensors: Mapping[str, Any], layers: str | tuple[str, ...] | None, dimension: int) -> int | None:
    """Return a dimension of the weight of a layer (the first, if there are several); None if it is not there."""
    name = layers if isinstance(layers, str) else (layers or [None])[0]
    weight = tensors.get(f"{name}.weight")
    return None if weight is None else weight.shape[dimension]


def wordnet_ids(class_names: Sequence[str]) -> list[str]:
    """Return the WordNet identifiers (``"n01440764"``) of ImageNet's classes; none if these are no such classes."""
    if list(class_names) != list(map(composed, _imagenet_names(len(class_names)))):
        return []
    subset = timm.data.infer_imagenet_subset({"num_classes": len(class_names)})
    return timm.data.ImageNetInfo(subset).label_names() if subset else []


def _imagenet_names(count: int) -> list[str]:
    """Return ImageNet's names for ImageNet's number of classes, else ``"0"``, ``"1"``, ..."""
    # timm tells the subset by the number of a network's classes.
    subset = timm.data.infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return [str(label) for label in range(count)]
    info = timm.data.ImageNetInfo(subset)
    return [info.index_to_description(label) for label in range(count)]
