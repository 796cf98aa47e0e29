"""``build``: an architecture, an operator and the images it is for, made into one model."""

import dataclasses
import inspect
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from operators import OperatorConfig, convert_decoupled, decoupled_layers
from operators.lookup import look_up, unknown_name
from operators.selection import plain_convolutions
from zoo.architectures import ARCHITECTURES
from zoo.models.image_model import ImageModel, check_input_size, default_input_size, names_of_classes, size_error
from zoo.models.spec import PLAIN, STAND_IN, ModelSpec, name_of_today
from zoo.models.transform import check_normalisation, usual_normalisation

# Parameters that a network may have which a checkpoint describes.
MOST_PARAMETERS = 5000


def build(
    architecture: str,
    operator: OperatorConfig | str | Mapping[str, Any] = PLAIN,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    input_size: int | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    depthwise: bool = False,
    keep: Sequence[str] = (),
    **architecture_args: Any,
) -> ImageModel:
    """Return a freshly initialised model in training mode.

    Args:
        architecture: one of ours (``cnn9``, ``resnet20``, ...) or any timm architecture.
        operator: ``"conv"`` for the plain network, or an operator: its name, which means the paper's unweighted form, a
            mapping of its fields, or an ``OperatorConfig``.
        num_classes: number of logits; by default as many as ``class_names``, else 10.
        in_chans: channels of the images.
        input_size: height and width of the images, in pixels; by default what the architecture is made for. An
            architecture of fixed size, such as a vision transformer, is built for this one.
        class_names: one for each class; ``"0"``, ``"1"``, ... by default.
        mean, std: of the pixels in [0, 1], one for each channel; by default those of the weights, if they are
            ``pretrained``, else ImageNet's for RGB, else 0.5 and 0.25.
        depthwise, keep: which convolutions stay plain, as :func:`operators.convert_decoupled` takes them.
        architecture_args: further arguments of the architecture, e.g. ``batch_norm=False``.

    Raises:
        ValueError: an unknown architecture or operator, numbers that do not fit together, or an ``input_size`` that
            the architecture cannot take.
        TypeError: an argument that the architecture does not have.
    """
    config = None if operator == PLAIN else OperatorConfig.parse(operator)
    for what, values in {"mean": mean, "std": std}.items():
        check_normalisation(what, values or ())
    architecture = current_name(architecture)
    names = names_of_classes(class_names, num_classes)
    network = _build_network(architecture, len(names), in_chans, input_size, architecture_args)
    usual_mean, usual_std = _normalisation_of(network, in_chans, architecture_args.get("pretrained"))
    spec = ModelSpec(
        # The tag after the dot names weights; the network is the same without it.
        architecture=architecture.partition(".")[0],
        operator=config,
        class_names=names,
        in_chans=in_chans,
        input_size=input_size or default_input_size(network),
        mean=tuple(mean or usual_mean),
        std=tuple(std or usual_std),
        # Where the first weights came from is no part of the network.
        model_args={name: value for name, value in architecture_args.items() if name != "pretrained"},
    )
    model = _assembled(network, spec, depthwise=depthwise, keep=keep)
    # The size that it is made for needs no proof, which would cost as much as an image.
    if model.spec.input_size != default_input_size(model.network):
        check_input_size(model)
    return model


def _normalisation_of(
    network: nn.Module, in_chans: int, pretrained: bool | None
) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and std that pretrained weights expect, or else the usual ones."""
    made_for = getattr(network, "pretrained_cfg", None)
    if not (pretrained and made_for):
        return usual_normalisation(in_chans)
    mean, std = made_for["mean"], made_for["std"]
    return (mean, std) if in_chans == 3 else ([sum(mean) / 3] * in_chans, [sum(std) / 3] * in_chans)


def build_from(spec: ModelSpec) -> ImageModel:
    """Return a freshly initialised model of a spec, in training mode.

    Raises:
        ValueError, TypeError: what :func:`build` refuses, or settings of a layer that is not decoupled. The size of
        the images was tried when the spec was made.
    """
    names = names_of_classes(spec.class_names, None)
    network = _build_network(spec.architecture, len(names), spec.in_chans, spec.input_size, spec.model_args)
    if spec.operator is None or spec.plain_layers is None:
        return _assembled(network, spec, depthwise=spec.operator is not None)
    return _assembled(network, spec, filter_fn=lambda *_: True, keep=spec.plain_layers)


def check_size(spec: ModelSpec, largest: int) -> None:
    """Refuse the spec of a network that is too large, without making its weights.

    Raises:
        ValueError: its parameters take more than ``largest`` bytes, or there are more than ``MOST_PARAMETERS``; or
            what :func:`build` refuses.
        TypeError: as :func:`build`.
    """
    total = number = 0
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total, number
        if parameter is not None and threading.get_ident() == thread:
            total, number = total + parameter.nbytes, number + 1
            if total > largest or number > MOST_PARAMETERS:
                raise ValueError(f"it takes more than {largest:,} bytes or {MOST_PARAMETERS} tensors")

    # They are counted while it is built, for one of a billion layers would never be.
    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            _build_network(spec.architecture, len(spec.class_names), spec.in_chans, spec.input_size, spec.model_args)
    finally:
        hook.remove()


def current_name(architecture: str) -> str:
    """Return the name of today of an architecture, with the tag of its weights, if timm has renamed it, and tell it.

    Raises:
        ValueError: timm has it no more.
    """
    renamed = timm.models.get_deprecated_models()
    if architecture in renamed and renamed[architecture] is None:
        raise ValueError(unknown_name("architecture (timm has it no more)", architecture, (), timm.list_models()))
    name = name_of_today(architecture)
    if name != architecture:
        warnings.warn(f"timm calls {architecture} {name} today, which is taken", stacklevel=1)
    return name


def list_architectures(own: bool = False) -> list[str]:
    """Return the names that :func:`build` takes: our own, and unless ``own`` all of timm's."""
    return sorted(ARCHITECTURES) if own else timm.list_models()


def _assembled(network: nn.Module, spec: ModelSpec, **selection: Any) -> ImageModel:
    """Return the model of a plain network, whose selected convolutions are given the operators of the spec."""
    per_channel = {what: _per_channel(what, getattr(spec, what), spec.in_chans) for what in ("mean", "std")}
    if spec.operator is not None:
        convert_decoupled(network, spec.operator, **selection)
        spec = dataclasses.replace(spec, plain_layers=plain_convolutions(network))
    elif any(selection.values()):
        raise ValueError(f"operator {PLAIN!r} leaves all convolutions plain; leave out {', '.join(selection)}")
    layers = decoupled_layers(network)
    for name, settings in spec.layer_settings.items():
        layer = look_up(layers, name, "decoupled layer")
        layer.set_operator({**spec.operator.to_dict(), **settings})
    return ImageModel(network, dataclasses.replace(spec, **per_channel))


def _build_network(
    architecture: str, num_classes: int, in_chans: int, input_size: int | None, architecture_args: Mapping[str, Any]
) -> nn.Module:
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
    if input_size is not None and input_size < 1:
        raise ValueError(f"input_size must be at least 1, got {input_size}")
    arguments = {"num_classes": num_classes, "in_chans": in_chans, **architecture_args}
    function = ARCHITECTURES.get(architecture)
    if function is None:
        if not timm.is_model(architecture) or architecture == STAND_IN:
            message = unknown_name("architecture", architecture, ARCHITECTURES, unlisted=timm.list_models())
            raise ValueError(f"{message} zoo.list_architectures() lists them all.")
        return _build_timm_network(architecture, input_size, arguments)
    legal = inspect.signature(function).parameters
    for argument in architecture_args:
        if argument not in legal:
            raise TypeError(unknown_name(f"argument of {architecture}", argument, legal))
    if input_size and "input_size" in legal:
        arguments["input_size"] = input_size
    return function(**arguments)


def _build_timm_network(architecture: str, input_size: int | None, arguments: dict[str, Any]) -> nn.Module:
    made_for = timm.get_pretrained_cfg(architecture)
    if input_size is None or not made_for.fixed_input_size:
        return timm.create_model(architecture, **arguments)
    try:
        return timm.create_model(architecture, **{"img_size": input_size, **arguments})
    # These are timm's ways to say that patches do not fit into the image, or that it has no weights.
    except (AssertionError, RuntimeError, ZeroDivisionError) as error:
        if "No pretrained weights" in str(error):
            raise
        raise size_error(architecture, made_for.input_size[-1], input_size, error) from error


def _per_channel(what: str, values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    if len(values) != in_chans:
        raise ValueError(f"{what} needs one number for each of the {in_chans} channels, got {list(values)}")
    if what == "std" and min(values) <= 0:
        raise ValueError(f"std must be more than 0, got {list(values)}")
    return tuple(float(value) for value in values)
