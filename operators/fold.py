"""Folding a trained network for deployment: filters normalised once, BatchNorm inside the convolution before it."""

import copy
import dataclasses
import inspect
from collections import Counter

import torch
from torch import Tensor, fx, nn

from operators.angular import cosine
from operators.conv import DecoupledConv2d, decoupled_layers
from operators.functional import filter_factor, filter_multiplier, respond_to_patches

# Relative to the largest answer; far above float32's rounding in deep networks, far below a norm left out.
EXAMPLE_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class FoldedLayer:
    """What happened to one decoupled convolution.

    Attributes:
        name: its first name in the network (``""`` for a bare convolution).
        operator: its operator, as it is printed.
        norm: the name of the BatchNorm that is part of it now; empty if there is none.
        reason: why no BatchNorm is part of it; empty if one is.
    """

    name: str
    operator: str
    norm: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """One :class:`FoldedLayer` for every decoupled convolution, in the network's order."""

    layers: tuple[FoldedLayer, ...]

    def __str__(self) -> str:
        norms = sum(bool(layer.norm) for layer in self.layers)
        lines = [f"{len(self.layers)} convolutions folded, {norms} with the BatchNorm that follows"]
        width = max(len(layer.name) for layer in self.layers)
        for layer in self.layers:
            outcome = f"with {layer.norm}" if layer.norm else f"alone: {layer.reason}"
            lines.append(f"  {layer.name:<{width}}  {layer.operator}  {outcome}")
        return "\n".join(lines)


class FoldedConv2d(nn.Conv2d):
    """A decoupled convolution for inference: its ``weight`` holds the filters as they are convolved with.

    It answers ``factor · h(n) · g(θ) + bias``, where ``factor``, (K, 1, 1) or None for 1, and ``weight`` hold what
    depends on the filters and on a BatchNorm. It stays in evaluation mode. :func:`fold` makes it.
    """

    factor: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return respond_to_patches(
            input,
            self.weight,
            None,
            self.factor,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            magnitude=self.magnitude,
            angular=self.angular,
            eps=self.operator.eps,
            padding_mode=self.padding_mode,
        )

    def train(self, mode: bool = True) -> "FoldedConv2d":
        return super().train(False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, operator={self.operator}"


def fold(model: nn.Module, example: Tensor | None = None) -> tuple[nn.Module, FoldReport]:
    """Return a copy of ``model`` for inference, in evaluation mode and without gradients, and the report.

    Filters are normalised once. A BatchNorm whose only input is a decoupled convolution becomes part of it: its factor
    of each channel goes into the filter where the angular function is ``cosine`` and into the answer's factor
    elsewhere, its shift into the bias. A ``linear_cosine`` convolution becomes an ``nn.Conv2d`` (where its padding is
    one that ``nn.Conv2d`` has). The answers stay what they were, to rounding; ``model`` is not changed.

    Which BatchNorm follows is read from a trace by ``torch.fx``; where a network cannot be traced as a whole, its parts
    are, on the assumption that they are called as a whole. What cannot be folded stays as it is, and the report says
    why.

    Args:
        example: images on which the folded copy is compared with ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` is folded already or has no decoupled convolution; one has pre-hooks, which may make its
            filters anew; or the answers to ``example`` differ by more than 1e-3 of the largest.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold takes a network, got {model!r}")
    if any(isinstance(module, FoldedConv2d) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is folded already; fold the network that it was made of")
    original, model = model, copy.deepcopy(model).eval().requires_grad_(False)
    names: dict[DecoupledConv2d, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DecoupledConv2d):
            names.setdefault(module, []).append(name)
    if not names:
        raise ValueError(f"nothing to fold: {type(model).__name__} has no DecoupledConv2d; see convert_decoupled")
    for module, (name, *_) in names.items():
        if module._forward_pre_hooks:
            raise ValueError(f"{name or 'the model'} has pre-hooks, which may make its filters anew; remove them first")
    followers = _followers(model)
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    layers = []
    for module, (name, *aliases) in names.items():
        norm_name, reason = followers.get(name, ("", "what follows it cannot be traced"))
        if aliases:
            norm_name, reason = "", f"it is used in several places ({', '.join(aliases)}, too)"
        elif norm_name and places[model.get_submodule(norm_name)] > 1:
            norm_name, reason = "", f"{norm_name} is used in several places"
        layers.append(FoldedLayer(name, str(module.operator), norm_name, reason))
        norm = model.get_submodule(norm_name) if norm_name else None
        _fold_layer(module, norm)
        if norm is not None:
            model.set_submodule(norm_name, nn.Identity())
    if example is not None:
        _check(original, model, example)
    return model, FoldReport(tuple(layers))


@torch.no_grad()
def _check(original: nn.Module, folded: nn.Module, example: Tensor) -> None:
    expected, answer = copy.deepcopy(original).eval()(example), folded(example)
    difference = (answer - expected).abs().max() / expected.abs().max()
    if not difference <= EXAMPLE_TOLERANCE:
        raise ValueError(
            f"the folded network's answers differ by {difference:.1e} of the largest: a part of a network that cannot "
            "be traced as a whole is probably not called as a whole; fold the parts by themselves"
        )


@torch.no_grad()
def _fold_layer(layer: DecoupledConv2d, norm: nn.BatchNorm2d | None) -> None:
    magnitude, angular, eps = layer.magnitude, layer.angular, layer.operator.eps
    # The product is taken in float64, so that it is rounded once.
    weight = layer.effective_weight().double()
    factor = filter_factor(weight, magnitude, angular, eps)
    weight = weight * filter_multiplier(magnitude, angular, eps)(weight.square().sum((1, 2, 3), keepdim=True))
    bias = None if layer.bias is None else layer.bias.double()
    if norm is not None:
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.affine:
            scale = scale * norm.weight.double()
        bias = ((0 if bias is None else bias) - norm.running_mean.double()) * scale
        if norm.affine:
            bias = bias + norm.bias.double()
        if angular is cosine:
            weight = weight * scale[:, None, None, None]
        else:
            factor = scale[:, None, None] * (1 if factor is None else factor)
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(torch.empty_like(layer.weight).copy_(weight), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
    layer.padding = layer.effective_padding
    # timm's layers make their filters of these.
    for name in [name for name, _ in layer.named_parameters(recurse=False) if name not in ("weight", "bias")]:
        delattr(layer, name)
    if angular is cosine and magnitude.constant_gain is not None and layer.padding != "dynamic_same":
        del layer.magnitude, layer.operator, layer.angular
        layer.__class__ = nn.Conv2d
        return
    layer.__class__ = FoldedConv2d
    # The answer is computed in float32 at least, and so is its factor.
    layer.register_buffer("factor", None if factor is None else factor.to(torch.promote_types(dtype, torch.float32)))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, DecoupledConv2d | nn.BatchNorm2d) or super().is_leaf_module(module, name)


def _followers(model: nn.Module, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Return, by the name of each decoupled convolution that can be traced, its BatchNorm's name or why it has none."""
    if not decoupled_layers(model):
        return {}
    # Arguments at their defaults, as in a call with images alone.
    parameters = inspect.signature(model.forward).parameters
    defaults = {name: value.default for name, value in parameters.items() if value.default is not value.empty}
    try:
        graph = _Tracer().trace(model, concrete_args=defaults)
    # A forward pass of symbols fails in whatever way the network's own code does not expect them.
    except Exception:
        found = {}
        for name, child in model.named_children():
            found |= _followers(child, f"{prefix}{name}.")
        return found
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    found = {}
    for name, nodes in calls.items():
        if isinstance(model.get_submodule(name), DecoupledConv2d):
            norm, reason = _norm_after(model, nodes, calls)
            found[prefix + name] = (prefix + norm if norm else "", reason)
    return found


def _norm_after(model: nn.Module, nodes: list[fx.Node], calls: dict[str, list[fx.Node]]) -> tuple[str, str]:
    """Return the name of the BatchNorm that alone takes the answer of a convolution, or why none can be folded."""
    if len(nodes) > 1:
        return "", "it is used several times"
    users = list(nodes[0].users)
    if len(users) != 1 or users[0].op != "call_module":
        return "", "no BatchNorm alone follows it"
    name = users[0].target
    norm = model.get_submodule(name)
    if model.get_submodule(nodes[0].target)._forward_hooks:
        return "", "it has hooks, which see its answer"
    if not isinstance(norm, nn.BatchNorm2d):
        return "", "no BatchNorm alone follows it"
    if type(norm) is not nn.BatchNorm2d:
        return "", f"{name} is a {type(norm).__name__}, which does more than normalise"
    if len(calls[name]) > 1:
        return "", f"{name} is used several times"
    if norm.running_mean is None:
        return "", f"{name} has no running statistics"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "", f"{name} has hooks"
    return name, ""
