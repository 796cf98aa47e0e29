"""Swapping a network's convolutions for decoupled ones, and back.

A convolution is swapped by changing its class in place: the module, its parameters and buffers, its place under every
name, ``training``, ``requires_grad``, device, dtype and memory format stay what they were.
"""

import collections
import dataclasses
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from operators.batch_norms import move_back
from operators.conv import DecoupledConv2d, OperatorConfig, decoupled_layers
from operators.selection import KEPT, LEFT_OUT, Filter, Selection, named_convolutions
from operators.timm_conv import COUNTERPARTS

# What those who read a configuration as timm's are told to build, in place of a network that they would build plain.
STAND_IN = "decoupled_zoo"

CHOOSE = (
    "depthwise=True converts depthwise convolutions, too, and filter_fn=lambda module, name: ... chooses the "
    "convolutions yourself."
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

    def summary(self) -> str:
        """Return in one line how many convolutions were converted, and why the others were not."""
        reasons = collections.Counter(layer.reason for layer in self.skipped)
        plain = f", {len(self.skipped)} plain" if reasons else ""
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        return f"{self.operator}: {len(self.converted)} convolutions converted{plain}" + (f" ({why})" if why else "")

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
    depthwise: bool = False,
    keep: Sequence[str] = (),
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
        filter_fn: ``filter_fn(module, name)`` says whether a convolution, of any number of dimensions, is converted,
            unless ``keep`` names it; one that is used under several names is converted if any of them is chosen. By
            default all are, but depthwise convolutions, gates (squeeze-excite and its kin) and a convolution that is
            the classifier.
        depthwise: convert depthwise convolutions, too. A patch of theirs is a few numbers of one channel, whose norm
            is most of what they say, so that a trained network loses much.
        keep: names of convolutions, or of modules that hold some, that stay plain; ``*``, ``?`` and ``[...]`` stand
            for other characters, as in ``"blocks.0.*"``.
        strict: refuse a network of which some convolution would stay plain, unless ``filter_fn`` or ``keep`` left it
            out.

    Raises:
        ValueError: nothing to convert, a network converted before, an unknown operator, a name in ``keep`` that no
            convolution has, or, if ``strict``, convolutions that would stay plain.
        TypeError: a convolution that was chosen has hooks, or ``model`` is quantised or wrapped (DDP, FSDP,
            ``torch.compile``, TorchScript).

        Nothing is changed then. A convolution whose ``forward`` we do not know is no error: it stays what it is, and
        the report says so.
    """
    _refuse_what_is_no_network(model)
    config = OperatorConfig.parse({"name": operator, "weighting": "linear"} if isinstance(operator, str) else operator)
    plan = _plan(model, Selection(model, filter_fn, depthwise, keep))
    report = ConversionReport(config, tuple(layer for _, layer in plan))
    _refuse_nothing(model, report)
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

    Filters and biases stay; what the magnitudes had learned is dropped. BatchNorm's statistics move back to where they
    were before :func:`operators.calibrate`, unless the network was trained, distilled or saved since: then it is a
    plain network with the filters that it has now.

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
    move_back(model)
    _name_again(model)
    return model


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


def _plan(model: nn.Module, selection: Selection) -> list[tuple[nn.Module, LayerReport]]:
    """Return every convolution with what becomes of it."""
    modules = named_convolutions(model)
    _refuse_second_conversion(modules)
    plan = []
    for module, names in modules:
        reason = selection.reason_to_skip(module, names)
        if not reason:
            _refuse_hooks(module, names[0])
        plan.append((module, LayerReport(names[0], type(module).__name__, not reason, reason, tuple(names[1:]))))
    return plan


def _refuse_nothing(model: nn.Module, report: ConversionReport) -> None:
    if not report.converted:
        raise ValueError(
            f"nothing to convert in {type(model).__name__}: "
            + (f"{report}\n{CHOOSE}" if report.layers else "it has no convolution")
        )


def _refuse_what_is_no_network(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert_decoupled takes a network, then an operator, but got {type(model).__name__} as the network; "
            "timm.create_model(NAME) makes one, load_state_dict gives it weights"
        )
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
    if plain := [layer for layer in report.skipped if layer.reason not in (LEFT_OUT, KEPT)]:
        raise ValueError(
            f"strict: {len(plain)} of {len(report.layers)} convolutions would stay plain; choose those to convert by "
            "filter_fn=lambda module, name: ..., depthwise=True or keep=[...], or leave out strict:\n"
            + "\n".join(f"  {layer.name or 'the model'} ({layer.kind}): {layer.reason}" for layer in plain)
        )


def _refuse_hooks(module: nn.Module, name: str) -> None:
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise TypeError(
            f"{name or 'the model'} ({type(module).__name__}) has hooks, which were written for the plain convolution; "
            "remove them, convert, and register them again, or leave the layer out by filter_fn"
        )
