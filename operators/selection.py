"""Which convolutions of a network are converted, and why the others are not."""

import fnmatch
from collections.abc import Callable, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from operators.conv import DecoupledConv2d
from operators.lookup import unknown_name
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
KEPT = "kept plain by its name"
DEPTHWISE = "depthwise"


def named_convolutions(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Return every convolution once, with all its names, in the network's order."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _ConvNd) or type(module).__name__ in FOREIGN:
            found.setdefault(id(module), (module, []))[1].append(name)
    return list(found.values())


def plain_convolutions(model: nn.Module) -> tuple[str, ...]:
    """Return the names, all of each, of the convolutions that are not decoupled, in the network's order."""
    found = named_convolutions(model)
    return tuple(name for module, names in found if not isinstance(module, DecoupledConv2d) for name in names)


def is_depthwise(module: nn.Module) -> bool:
    """Return whether each filter of a convolution sees one channel of several."""
    return getattr(module, "groups", 1) == getattr(module, "in_channels", 1) > 1


def classifier_layers(root: nn.Module) -> list[nn.Module]:
    """Return the modules of a network's classifier, of which some networks have two; none if it has no such notion."""
    heads = root.get_classifier() if hasattr(root, "get_classifier") else ()
    heads = heads if isinstance(heads, tuple | list) else [heads]
    return [layer for head in heads if isinstance(head, nn.Module) for layer in head.modules()]


class Selection:
    """Says of each convolution why it is left alone.

    Args:
        root: the network.
        filter_fn, depthwise, keep: as :func:`operators.convert_decoupled` takes them.

    Raises:
        TypeError: a filter that cannot be called, or names that are none.
        ValueError: a name in ``keep`` that no convolution has.
    """

    def __init__(self, root: nn.Module, filter_fn: Filter | None, depthwise: bool, keep: Sequence[str]) -> None:
        if filter_fn is not None and not callable(filter_fn):
            raise TypeError(f"filter_fn is a function of a convolution and its name, got {filter_fn!r}")
        self.root, self.filter_fn, self.depthwise = root, filter_fn, depthwise
        self.classifier = classifier_layers(root)
        self.kept = _matching([name for _, names in named_convolutions(root) for name in names], keep)

    def reason_to_skip(self, module: nn.Module, names: Sequence[str]) -> str:
        """Return why a convolution of these names is left alone, or ``""``."""
        if self.kept.intersection(names):
            return KEPT
        if self.filter_fn is not None and not any(self.filter_fn(module, name) for name in names):
            return LEFT_OUT
        kind = type(module)
        if f"{kind.__module__}:{kind.__qualname__}" not in COUNTERPARTS:
            if isinstance(module, nn.Conv2d) or kind.__name__ in FOREIGN:
                return "its forward is not known here; make it a plain nn.Conv2d to convert it"
            return "not a 2-d convolution"
        return self._usual_reason(module, names[0]) if self.filter_fn is None else ""

    def _usual_reason(self, module: nn.Module, name: str) -> str:
        if gate := self._enclosing_gate(name):
            return f"part of a gate ({gate}), not a feature"
        if any(module is layer for layer in self.classifier):
            return "the classifier, not a feature"
        return DEPTHWISE if is_depthwise(module) and not self.depthwise else ""

    def _enclosing_gate(self, name: str) -> str | None:
        parts = name.split(".")
        for end, part in enumerate(parts):
            kind = type(self.root.get_submodule(".".join(parts[:end]))).__name__
            for gate in (kind, f"{kind}.{part}"):
                if gate in GATES:
                    return gate
        return None


def _matching(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Return the names that patterns match, or that lie in a module whose name one matches."""
    listed = [] if isinstance(patterns, str) else [*patterns]
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in listed):
        raise TypeError(f"keep is a list of names, got {patterns!r}")
    found: set[str] = set()
    for pattern in listed:
        wanted = [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in (pattern, f"{pattern}.*"))]
        if not wanted:
            raise ValueError(unknown_name("convolution to keep plain", pattern, names[:5], unlisted=names[5:]))
        found.update(wanted)
    return found
