"""The gradient of a decoupled answer, in the part that changes the patch's norm and the part that turns it."""

import torch
from torch import Tensor

from operators.conv import DecoupledConv2d
from operators.evaluation_mode import evaluating
from operators.functional import filter_norm


def gradient_parts(layer: DecoupledConv2d, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two parts of ``∇ₓ y = g h′(n) x̂ + (h / n) g′(c) (ŵ − c x̂)`` for every patch and filter.

    The first is along the patch ``x̂ = x / n`` and changes its norm, the second is across it and changes its angle. They
    add up to the gradient, and are orthogonal but for ``eps``: their product is ``g h′ (h / n) g′ c · eps / n²``.

    Args:
        layer: a decoupled convolution; its learned or running radius is that of evaluation.
        patches: (P, C / groups, kh, kw), each as large as a filter.

    Returns:
        Both (P, K, C / groups, kh, kw), in the unit of an answer over that of a pixel.

    Raises:
        ValueError: patches that are not as large as the filters.

    Source: the chain rule for ``h(n) g(c)``; Liu et al., Decoupled Networks, CVPR 2018, section 3.
    """
    weight = layer.effective_weight().detach()
    if patches.shape[1:] != weight.shape[1:]:
        raise ValueError(f"patches must be (P, {', '.join(map(str, weight.shape[1:]))}), got {tuple(patches.shape)}")
    eps, length = layer.operator.eps, filter_norm(weight, eps=layer.operator.eps)
    x, unit = patches.detach().flatten(1), (weight / length).flatten(1)
    n = (x.square().sum(1) + eps).sqrt()
    # By filter and patch, (K, P, 1), as a magnitude takes them.
    norms = n.expand(len(unit), -1).unsqueeze(2).clone().requires_grad_()
    cosines = (unit @ (x / n[:, None]).T).unsqueeze(2).requires_grad_()
    with evaluating(layer), torch.enable_grad():
        h = layer.magnitude(norms, length.view(-1, 1, 1))
        g = layer.angular(cosines)
        h_slope, g_slope = torch.autograd.grad([h.sum(), g.sum()], [norms, cosines])
    direction = (x / n[:, None])[:, None]
    h, g, h_slope, g_slope, c = (
        value.detach().squeeze(2).T.unsqueeze(2) for value in (h, g, h_slope, g_slope, cosines)
    )
    along = g * h_slope * direction
    across = h / n[:, None, None] * g_slope * (unit - c * direction)
    shape = len(x), *weight.shape
    return along.view(shape), across.view(shape)
