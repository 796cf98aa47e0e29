"""Swapping a network's convolutions for decoupled ones, and back.

A convolution is swapped by changing its class in place: the module, its parameters and buffers, its place under every
name, ``training``, ``requires_grad``, device, dtype and memory format stay what they were.
"""

import dataclasses
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from operators.conv import DecoupledConv2d, OperatorConfig, decoupled_layers
from operators.timm_conv import COUNTERPARTS

Filter = Callable[[nn.Module, str], bool]

# Modules of timm and torchvision that compute gates, not features, by class name or class name and attribute.
GATES = frozenset(
    {
        "SqueezeExcite",
        "SqueezeExcitation",
        "SEModule",
        "EffectiveSEModule",
        "BlockESE",
        "CecaModule",
        "EcaModule",
        "ChannelAttn",
        "LightChannelAttn",
        "SpatialAttn",
        "LightSpatialAttn",
        "GatherExcite",
        "GlobalContext",
        "SplitAttn",
        "SelectiveKernelAttn",
        "CoordAttn",
        "SimpleCoordAttn",
        "EfficientLocalAttn",
        "StripAttn",
        "GhostModuleV2.short_conv",
    }
)

# Convolutions that are no subclass of torch's, so that the report names them, too.
FOREIGN = frozenset({"CondConv2d", "DeformConv2d"})

LEFT_OUT = "left out by filter_fn"

# What those who read a configuration as timm's are told to build, in place of a network that they would build plain.
STAND_IN = "decoupled_zoo"

CHOOSE = "Pass filter_fn=lambda module, name: ... to choose the convolutions yourself."

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What happened to one convolution.

    Attributes:
        name: its first name in the network (``""`` for a bare convolution).
        kind: the class it had.
        converted: whether it is decoupled now.
        reason: why not; empty if converted.
        aliases: its other names, if the module is used in several places.
    """

    name: str
    kind: str
    converted: bool
    reason: str = ""
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """One :class:`LayerReport` for every convolution of the network, in the network's order."""

    operator: OperatorConfig
    layers: tuple[LayerReport, ...]

    @property
    def converted(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.converted)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if not layer.converted)

    def __str__(self) -> str:
        lines = [f"{self.operator}: {len(self.converted)} converted, {len(self.skipped)} skipped"]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            also = f" (also {', '.join(layer.aliases)})" if layer.aliases else ""
            outcome = "converted" if layer.converted else f"skipped: {layer.reason}"
            lines.append(f"  {layer.name:<{width}}  {layer.kind}  {outcome}{also}")
        return "\n".join(lines)


def convert_decoupled(
    model: nn.Module,
    operator: OperatorConfig | str | Mapping[str, Any],
    *,
    filter_fn: Filter | None = None,
    strict: bool = False,
) -> tuple[nn.Module, ConversionReport]:
    """Turn the convolutions of ``model`` into decoupled ones, in place, and return ``model`` and the report.

    The parameters stay the same objects under the same names, so an optimiser and a state dict of the plain network
    still fit; a learned radius and a running norm add keys of their own. timm's convolutions keep what they do beside:
    weights are standardised first, and padding follows the size of the input.

    A bare name means weighting ``"linear"``, since the filters' norms are part of what a trained network has learned;
    it keeps most of that if it is then calibrated (:func:`operators.calibrate`). Given to a layer or to ``zoo.build``,
    the same name means the paper's unweighted operator.

    Args:
        operator: a name such as ``"tanh_cosine"``, weighted ``"linear"``; or an :class:`OperatorConfig` or a mapping of
            its fields, which mean what they say. The report has the config that was used.
        filter_fn: ``filter_fn(module, name)`` says whether a convolution, of any number of dimensions, is converted;
            one that is used under several names is converted if any of them is chosen. By default everything is, but
            gates (squeeze-excite and its kin) and a convolution that is the classifier.
        strict: refuse a network of which some convolution would stay plain, unless ``filter_fn`` left it out.

    Raises:
        ValueError: nothing to convert, a network converted before, an unknown operator, or, if ``strict``,
            convolutions that would stay plain.
        TypeError: a convolution that was chosen has hooks, or ``model`` is quantised or wrapped (DDP, FSDP,
            ``torch.compile``, TorchScript).

        Nothing is changed then. A convolution whose ``forward`` we do not know is no error: it stays what it is, and
        the report says so.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert_decoupled takes a network, then an operator, but got {type(model).__name__} as the network; "
            "timm.create_model(NAME) makes one, load_state_dict gives it weights"
        )
    config = OperatorConfig.parse({"name": operator, "weighting": "linear"} if isinstance(operator, str) else operator)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn is a function of a convolution and its name, got {filter_fn!r}")
    _refuse_wrappers(model)
    plan = _plan(model, filter_fn)
    report = ConversionReport(config, tuple(layer for _, layer in plan))
    if not report.converted:
        raise ValueError(
            f"nothing to convert in {type(model).__name__}: "
            + (f"{report}\n{CHOOSE}" if report.layers else "it has no convolution")
        )
    if strict:
        _refuse_plain(report)
    for module, layer in plan:
        if layer.converted:
            module.__class__ = COUNTERPARTS[_full_name(type(module))]
            module.set_operator(config)
    stand_in_for(model)
    return model, report


def revert(model: nn.Module) -> nn.Module:
    """Turn every decoupled convolution of ``model`` back into the plain one it was, in place, and return ``model``.

    Filters and biases stay; what the magnitudes had learned is dropped. BatchNorm's statistics stay where
    :func:`operators.calibrate` has moved them.

    Raises:
        ValueError: ``model`` has no decoupled convolution.
    """
    layers = decoupled_layers(model).values()
    if not layers:
        raise ValueError(f"nothing to revert: {type(model).__name__} has no DecoupledConv2d")
    for layer in layers:
        plain = pkgutil.resolve_name(layer.plain)
        del layer.magnitude, layer.operator, layer.angular
        layer.__class__ = plain
    _name_again(model)
    return model


def classifier_layers(root: nn.Module) -> list[nn.Module]:
    """Return the modules of a network's classifier, of which some networks have two; none if it has no such notion."""
    heads = root.get_classifier() if hasattr(root, "get_classifier") else ()
    heads = heads if isinstance(heads, tuple | list) else [heads]
    return [layer for head in heads if isinstance(head, nn.Module) for layer in head.modules()]


def stand_in_for(model: nn.Module) -> None:
    """Let timm's configurations of the networks in ``model`` name no architecture that could be built plain.

    timm saves the name beside the weights, and would load these into the plain network.
    """
    for module, attribute, made_for in _configurations(model):
        # A copy, since networks of one architecture may share it.
        named = {"plain_architecture": made_for["architecture"], **made_for, "architecture": STAND_IN}
        setattr(module, attribute, named)


def _name_again(model: nn.Module) -> None:
    """Let timm's configurations name the architectures that they named before."""
    for module, attribute, made_for in _configurations(model):
        if "plain_architecture" in made_for:
            named = {**made_for, "architecture": made_for["plain_architecture"]}
            del named["plain_architecture"]
            setattr(module, attribute, named)


def _configurations(model: nn.Module) -> list[tuple[nn.Module, str, dict[str, Any]]]:
    """Return timm's configurations of the networks in ``model``, and whose attributes they are."""
    places = [(module, name) for module in model.modules() for name in ("pretrained_cfg", "default_cfg")]
    found = [(module, name, getattr(module, name, None)) for module, name in places]
    return [place for place in found if isinstance(place[2], dict) and "architecture" in place[2]]


def _full_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _named_convolutions(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Return every convolution once, with all its names, in the network's order."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _ConvNd) or type(module).__name__ in FOREIGN:
            found.setdefault(id(module), (module, []))[1].append(name)
    return list(found.values())


def _reason_to_skip(root: nn.Module, module: nn.Module, names: list[str], filter_fn: Filter | None) -> str:
    """Return why ``module`` is left alone, or ``""``."""
    if filter_fn is not None and not any(filter_fn(module, name) for name in names):
        return LEFT_OUT
    if _full_name(type(module)) not in COUNTERPARTS:
        if isinstance(module, nn.Conv2d) or type(module).__name__ in FOREIGN:
            return "its forward is not known here; make it a plain nn.Conv2d to convert it"
        return "not a 2-d convolution"
    if filter_fn is None:
        if gate := _enclosing_gate(root, names[0]):
            return f"part of a gate ({gate}), not a feature"
        if any(module is layer for layer in classifier_layers(root)):
            return "the classifier, not a feature"
    return ""


def _plan(model: nn.Module, filter_fn: Filter | None) -> list[tuple[nn.Module, LayerReport]]:
    """Return every convolution with what becomes of it."""
    modules = _named_convolutions(model)
    _refuse_second_conversion(modules)
    plan = []
    for module, names in modules:
        reason = _reason_to_skip(model, module, names, filter_fn)
        if not reason:
            _refuse_hooks(module, names[0])
        plan.append((module, LayerReport(names[0], type(module).__name__, not reason, reason, tuple(names[1:]))))
    return plan


def _enclosing_gate(root: nn.Module, name: str) -> str | None:
    parts = name.split(".")
    for end, part in enumerate(parts):
        kind = type(root.get_submodule(".".join(parts[:end]))).__name__
        for gate in (kind, f"{kind}.{part}"):
            if gate in GATES:
                return gate
    return None


def _refuse_wrappers(model: nn.Module) -> None:
    wrappers: dict[type, str] = {
        nn.parallel.DistributedDataParallel: "convert model.module before wrapping it",
        nn.DataParallel: "convert model.module before wrapping it",
        torch.jit.ScriptModule: "convert the network before scripting it",
    }
    by_name = {
        "FullyShardedDataParallel": "convert the network before sharding it",
        "OptimizedModule": "convert the network before torch.compile",
    }
    for name, module in model.named_modules():
        for kind, cure in wrappers.items():
            if isinstance(module, kind):
                raise TypeError(f"{kind.__name__} is not converted: {cure}")
        if type(module).__name__ in by_name:
            raise TypeError(f"{type(module).__name__} is not converted: {by_name[type(module).__name__]}")
        if module._compiled_call_impl is not None:
            raise TypeError(f"{name or 'the model'} is compiled (.compile()): convert the network before that")
        if _is_quantised(module):
            raise TypeError(
                f"{name or 'the model'} ({type(module).__name__}) is quantised: convert the network of floats, and "
                "quantise it afterwards if you must"
            )


def _is_quantised(module: nn.Module) -> bool:
    # torchao keeps the class of the layer and changes that of its weight.
    kinds = [type(module), *(type(parameter.data) for parameter in module.parameters(recurse=False))]
    return any(kind.__module__.startswith(("torch.ao.nn", "torchao")) for kind in kinds)


def _refuse_second_conversion(modules: list[tuple[nn.Module, list[str]]]) -> None:
    for module, names in modules:
        if isinstance(module, DecoupledConv2d):
            raise ValueError(
                f"{names[0] or 'the model'} is {module.operator.name} already: revert(model) first, "
                "or give single layers another operator by layer.set_operator(...)"
            )


def _refuse_plain(report: ConversionReport) -> None:
    if plain := [layer for layer in report.skipped if layer.reason != LEFT_OUT]:
        raise ValueError(
            f"strict: {len(plain)} of {len(report.layers)} convolutions would stay plain; choose those to convert by "
            "filter_fn=lambda module, name: ..., or leave out strict:\n"
            + "\n".join(f"  {layer.name or 'the model'} ({layer.kind}): {layer.reason}" for layer in plain)
        )


def _refuse_hooks(module: nn.Module, name: str) -> None:
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise TypeError(
            f"{name or 'the model'} ({type(module).__name__}) has hooks, which were written for the plain convolution; "
            "remove them, convert, and register them again, or leave the layer out by filter_fn"
        )
