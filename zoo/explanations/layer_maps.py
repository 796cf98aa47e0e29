"""Maps of a decoupled layer: how strong the patches are, and how well they match the filters that matter."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators import DecoupledConv2d, filter_norm
from operators.functional import norms_and_products
from operators.linear_map import Signal


@dataclasses.dataclass(frozen=True)
class LayerMaps:
    """What a decoupled layer saw in each image: maps (N, H, W) of the images' size, bilinearly enlarged.

    Attributes:
        norm: ``n``, the norm of the patches, the mean of all groups.
        magnitude: ``Σ_k |∂logit/∂y_k| h(‖w_k‖, n)`` over the filters: how strongly those that matter could answer.
        angular: ``Σ_k |∂logit/∂y_k| |g(c_k)|``: how well the patch matches those that matter.

    The gradient is that of the linear map that the network is for the image.
    """

    norm: Tensor
    magnitude: Tensor
    angular: Tensor


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The last input of a layer, and its answer."""

    input: Tensor
    output: Tensor


@contextlib.contextmanager
def recording_signals(layers: Mapping[str, DecoupledConv2d], one: Tensor) -> Iterator[dict[str, Recorded]]:
    """Record, by their names, the inputs and answers of layers as the signals of ``one`` go through them."""
    found: dict[str, Recorded] = {}

    def look(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if getattr(output, "one", None) is not one:
            # Another thread uses the network.
            return output
        answer = output.as_subclass(Tensor)
        found[name] = Recorded(inputs[0].detach(), answer)
        # What follows is computed of the recorded answer, so that it has a gradient.
        return Signal.of(answer, one)

    hooks = [layer.register_forward_hook(functools.partial(look, name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def layer_maps(layer: DecoupledConv2d, recorded: Recorded, gradient: Tensor, size: Sequence[int]) -> LayerMaps:
    """Return the maps of a layer.

    Args:
        gradient: of the logit with respect to the layer's answer, (N, K, H', W').
        size: height and width of the images, in pixels.
    """
    geometry = layer.stride, layer.effective_padding, layer.dilation, layer.groups
    settings = {"eps": layer.operator.eps, "padding_mode": layer.padding_mode}
    with torch.no_grad():
        weight = layer.effective_weight()
        n, product = norms_and_products(recorded.input, weight, *geometry, **settings)
        length = filter_norm(weight, eps=layer.operator.eps).view(-1, 1, 1)
        matters = gradient.abs()
        magnitude = (matters * layer.magnitude(n, length)).sum(1)
        angular = (matters * layer.angular(product / n).abs()).sum(1)
        maps = torch.stack([n.mean(1), magnitude, angular], dim=1)
        enlarged = F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
    return LayerMaps(*enlarged.unbind(1))
