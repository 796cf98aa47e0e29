"""Trained networks to start from, and their conversion: checkpoints of the zoo, folders, the Hub, timm."""

import dataclasses
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import timm.data
import timm.models
from timm.models import PretrainedCfg

from operators.lookup import unknown_name
from zoo.architectures import ARCHITECTURES
from zoo.checkpoints.catalogue import find
from zoo.checkpoints.config import read_config
from zoo.checkpoints.loading import load
from zoo.checkpoints.weights import listed, misfits
from zoo.models.building import build
from zoo.models.image_model import ImageModel

# This stands before the name of an architecture whose weights timm has.
TIMM = "timm:"


def start_from(
    where: str | os.PathLike[str],
    *,
    in_chans: int | None = None,
    input_size: int | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> ImageModel:
    """Return a trained network, in evaluation mode.

    Args:
        where: what :func:`zoo.load` takes, or ``"timm:NAME"``, e.g. ``"timm:resnet10t"`` or, to choose among several
            weights, ``"timm:resnet10t.c3_in1k"``: timm fetches these from the Hub, or finds them in the Hub's cache.
        in_chans, input_size: of the images, if they are not those it was trained on.
        weights: a file (.safetensors, .pth) with the weights of ``timm:NAME``, which are then not fetched; the number
            of classes and of channels follow from it. No code in it is run.

    Raises:
        ValueError: no such network, no weights for it, or weights that do not fit.
        FileNotFoundError: no file ``weights``.
    """
    name = os.fspath(where)
    if name.startswith(TIMM):
        model = _from_timm(name.removeprefix(TIMM), in_chans, input_size, weights)
    elif weights is not None:
        raise ValueError(f"weights are those of a network of timm (timm:NAME), but {name} has weights of its own")
    else:
        _refuse_bare_name_of_timm(name)
        model = load(where, in_chans=in_chans)
        if input_size is not None:
            model.set_input_size(input_size)
    return model.eval()


def shape_of(where: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the channels and the size of the images that a network was trained on, without its weights.

    Raises:
        ValueError: no such network.
    """
    name = os.fspath(where)
    if name.startswith(TIMM):
        made_for = _timm_config(name.removeprefix(TIMM))
        return made_for.input_size[0], made_for.input_size[-1]
    _refuse_bare_name_of_timm(name)
    config = read_config(find(where))
    return config["in_chans"], config["input_size"]


def licence_of(where: str | os.PathLike[str]) -> str:
    """Return the licence of a network's weights as it is recorded, or "not stated".

    Raises:
        ValueError: no such network.
    """
    name = os.fspath(where)
    if name.startswith(TIMM):
        return _timm_config(name.removeprefix(TIMM)).license or "not stated"
    return read_config(find(where))["licence"]


def _refuse_bare_name_of_timm(name: str) -> None:
    if timm.is_model(name) and name not in ARCHITECTURES and not Path(name).exists():
        raise ValueError(f"{name} is a network of timm: to start from the weights that timm has, write {TIMM}{name}")


def _timm_config(name: str) -> PretrainedCfg:
    """Return what timm knows of the weights of an architecture, or of the tag after its name."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture) or architecture in ARCHITECTURES:
        raise ValueError(unknown_name("network of timm", name, ["resnet10t", "resnet50"], unlisted=timm.list_models()))
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(unknown_name(f"tag of {architecture}", tag, tags))
    return timm.get_pretrained_cfg(name)


def _from_timm(
    name: str, in_chans: int | None, input_size: int | None, weights: str | os.PathLike[str] | None
) -> ImageModel:
    made_for = _timm_config(name)
    # The tag after the dot names the weights; the network is the same without it.
    architecture = name.partition(".")[0]
    if weights is not None:
        return _with_weights(architecture, made_for, in_chans, input_size, Path(weights))
    # Weights without a classifier are good to start from, too.
    names = _imagenet_names(made_for.num_classes or 1)
    try:
        model = build(
            name, class_names=names, in_chans=in_chans or made_for.input_size[0], input_size=input_size, pretrained=True
        )
    except (TypeError, ValueError):
        raise
    # timm, the Hub's client and the network each fail in their own ways.
    except Exception as error:
        raise ValueError(
            f"the weights of {TIMM}{name} cannot be had ({type(error).__name__}: {error}); without a network, fetch "
            f"them elsewhere and name the file: python -m zoo convert {TIMM}{architecture} NAME --weights FILE, which "
            "writes a folder to start from"
        ) from error
    model.spec = dataclasses.replace(model.spec, architecture=architecture)
    return model


def _with_weights(
    architecture: str, made_for: PretrainedCfg, in_chans: int | None, input_size: int | None, weights: Path
) -> ImageModel:
    if not weights.is_file():
        raise FileNotFoundError(f"no file {weights}; weights are a file that ends in .safetensors or .pth")
    try:
        tensors = timm.models.load_state_dict(str(weights), weights_only=True)
    # A damaged file fails in as many ways as there are formats.
    except Exception as error:
        raise ValueError(
            f"{weights} cannot be read as weights ({type(error).__name__}: {textwrap.shorten(str(error), 200)}); a "
            "whole network is not taken, for no code in a file is run: save network.state_dict() instead"
        ) from error
    classes = _rows(tensors, made_for.classifier, 0) or made_for.num_classes
    channels = _rows(tensors, made_for.first_conv, 1) or made_for.input_size[0]
    if in_chans not in (None, channels):
        raise ValueError(f"{weights} takes {channels} channels, not {in_chans}")
    settings = {"in_chans": channels, "input_size": input_size}
    if channels == 3:
        settings |= {"mean": made_for.mean, "std": made_for.std}
    model = build(architecture, class_names=_imagenet_names(classes), **settings)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    expected = model.network.state_dict()
    # Files of before torch counted BatchNorm's batches.
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    tensors = counters | tensors
    if problems := misfits(tensors, expected):
        raise ValueError(f"{weights} does not fit {architecture}: {listed(problems)}")
    model.network.load_state_dict(tensors)
    return model


def _rows(tensors: Mapping[str, Any], layers: str | tuple[str, ...] | None, dimension: int) -> int | None:
    """Return a dimension of the weight of a layer (the first, if there are several); None if it is not there."""
    name = layers if isinstance(layers, str) else (layers or [None])[0]
    weight = tensors.get(f"{name}.weight")
    return None if weight is None else weight.shape[dimension]


def _imagenet_names(count: int) -> list[str]:
    """Return ImageNet's names for ImageNet's number of classes, else ``"0"``, ``"1"``, ..."""
    # timm tells the subset by the number of a network's classes.
    subset = timm.data.infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return [str(label) for label in range(count)]
    info = timm.data.ImageNetInfo(subset)
    return [info.index_to_description(label) for label in range(count)]
