"""Swapping a network's convolutions for decoupled ones, and back.

A convolution is swapped by changing its class in place: the module, its parameters and buffers, its place under every
name, ``training``, ``requires_grad``, device, dtype and memory format stay what they were.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from operators.conv import DecoupledConv2d, OperatorConfig

Filter = Callable[[nn.Module, str], bool]

# Modules whose convolutions compute gates, not features, by class name: timm's and torchvision's.
GATES = frozenset(
    {
        "SqueezeExcite",
        "SqueezeExcitation",
        "SEModule",
        "EffectiveSEModule",
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
    }
)

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
        lines = [f"{self.operator.name}: {len(self.converted)} converted, {len(self.skipped)} skipped"]
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
) -> tuple[nn.Module, ConversionReport]:
    """Turn the convolutions of ``model`` into decoupled ones, in place, and return ``model`` and the report.

    The parameters stay the same objects under the same names, so an optimiser and a state dict of the plain network
    still fit; a learned radius and a running norm add keys of their own.

    Args:
        operator: a name such as ``"tanh_cosine"``, an :class:`OperatorConfig`, or a mapping of its fields.
        filter_fn: ``filter_fn(module, name)`` says whether a convolution is converted; one that is used under several
            names is converted if any of them is chosen. By default everything is, but gates (squeeze-excite and its
            kin) and a convolution that is the classifier.

    Raises:
        ValueError: nothing to convert, a network converted before, or an unknown operator.
        TypeError: a convolution that was chosen has hooks or a class whose ``forward`` we do not know (timm's are
            skipped, and the report says so), or ``model`` is wrapped (DDP, FSDP, ``torch.compile``, TorchScript).
            Nothing is changed then.
    """
    config = OperatorConfig.parse(operator)
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_decoupled takes a network, got {model!r}; timm.create_model(NAME) makes one")
    _refuse_wrappers(model)
    modules = _named_convolutions(model)
    _refuse_second_conversion(modules)
    plan = []
    for module, names in modules:
        reason = _reason_to_skip(model, module, names, filter_fn)
        if not reason:
            _refuse_unknown(module, names[0])
        plan.append((module, LayerReport(names[0], type(module).__name__, not reason, reason, tuple(names[1:]))))
    report = ConversionReport(config, tuple(layer for _, layer in plan))
    if not report.converted:
        raise ValueError(
            f"nothing to convert in {type(model).__name__}: "
            + (str(report) if report.layers else "it has no convolution")
            + "\nPass filter_fn=lambda module, name: ... to choose the convolutions yourself."
        )
    for module, layer in plan:
        if layer.converted:
            module.__class__ = DecoupledConv2d
            module.set_operator(config)
    return model, report


def revert(model: nn.Module) -> nn.Module:
    """Turn every decoupled convolution of ``model`` back into ``nn.Conv2d``, in place, and return ``model``.

    Filters and biases stay; what the magnitudes had learned is dropped.

    Raises:
        ValueError: ``model`` has no decoupled convolution.
    """
    layers = [module for module in model.modules() if isinstance(module, DecoupledConv2d)]
    if not layers:
        raise ValueError(f"nothing to revert: {type(model).__name__} has no DecoupledConv2d")
    for layer in layers:
        del layer.magnitude, layer.operator, layer.angular
        layer.__class__ = nn.Conv2d
    return model


def _named_convolutions(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Return every convolution once, with all its names, in the network's order."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _ConvNd):
            found.setdefault(id(module), (module, []))[1].append(name)
    return list(found.values())


def _reason_to_skip(root: nn.Module, module: nn.Module, names: list[str], filter_fn: Filter | None) -> str:
    """Return why ``module`` is left alone, or ``""``."""
    if not isinstance(module, nn.Conv2d):
        return "not a 2-d convolution"
    if filter_fn is not None:
        if not any(filter_fn(module, name) for name in names):
            return "left out by filter_fn"
    elif gate := _enclosing_gate(root, names[0]):
        return f"part of a gate ({gate}), not a feature"
    elif module is _classifier(root):
        return "the classifier, not a feature"
    if type(module).__module__.startswith("timm."):
        return f"timm's {type(module).__name__} is not supported yet"
    return ""


def _enclosing_gate(root: nn.Module, name: str) -> str | None:
    parts = name.split(".")
    for end in range(len(parts)):
        kind = type(root.get_submodule(".".join(parts[:end]))).__name__
        if kind in GATES:
            return kind
    return None


def _classifier(root: nn.Module) -> nn.Module | None:
    return root.get_classifier() if hasattr(root, "get_classifier") else None


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
    for module in model.modules():
        for kind, cure in wrappers.items():
            if isinstance(module, kind):
                raise TypeError(f"{kind.__name__} is not converted: {cure}")
        if type(module).__name__ in by_name:
            raise TypeError(f"{type(module).__name__} is not converted: {by_name[type(module).__name__]}")


def _refuse_second_conversion(modules: list[tuple[nn.Module, list[str]]]) -> None:
    for module, names in modules:
        if isinstance(module, DecoupledConv2d):
            raise ValueError(
                f"{names[0] or 'the model'} is {module.operator.name} already: revert(model) first, "
                "or give single layers another operator by layer.set_operator(...)"
            )


def _refuse_unknown(module: nn.Module, name: str) -> None:
    where = f"{name or 'the model'} ({type(module).__name__})"
    if type(module) is not nn.Conv2d:
        raise TypeError(
            f"{where} is a subclass of Conv2d whose forward is not known here, so converting it could change what it "
            "does; leave it out by filter_fn, or make it a plain nn.Conv2d first"
        )
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise TypeError(
            f"{where} has hooks, which were written for the plain convolution; remove them, convert, and register "
            "them again, or leave the layer out by filter_fn"
        )
