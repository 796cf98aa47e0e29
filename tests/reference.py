"""The decoupled convolution as its definition says it, in float64 numpy: the truth that the tests compare with.

For every patch ``x`` and filter ``w`` it is ``weighting(‖w‖) · h(n) · g(θ) + bias``, with ``n = sqrt(Σ x² + eps)``,
``‖w‖ = sqrt(Σ w² + eps)``, ``c = ⟨w, x⟩ / (n ‖w‖)`` and ``θ = acos((1 - 1e-6) c)``. Nothing here is from ``operators``.
"""

import numpy as np

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def reference_conv(
    x,
    w,
    bias=None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    padding_mode="zeros",
    magnitude,
    angular,
    weighting="none",
    radius=1.0,
    alpha=1.0,
    beta=0.5,
    sigmoid_k=0.3,
    power=2.0,
    eps=1e-4,
):
    """Return (N, K, H', W'); ``x`` is (N, C, H, W), ``w`` (K, C / groups, kh, kw), ``radius`` a number or (K,)."""
    patches = reference_patches(x, w.shape[-2:], stride, padding, dilation, padding_mode)
    batch, height, width, channels, *_ = patches.shape
    radius = np.broadcast_to(np.asarray(radius, np.float64).reshape(-1), len(w))
    output = np.empty((batch, len(w), height, width))
    for k, filter in enumerate(np.asarray(w, np.float64)):
        first = k // (len(w) // groups) * (channels // groups)  # the first input channel of this filter's group
        patch = patches[:, :, :, first : first + channels // groups]
        n = np.sqrt((patch**2).sum((-3, -2, -1)) + eps)
        w_norm = np.sqrt((filter**2).sum() + eps)
        c = (patch * filter).sum((-3, -2, -1)) / (n * w_norm)
        h = reference_weighting(weighting, w_norm) * reference_magnitude(magnitude, n, radius[k], alpha, beta)
        output[:, k] = h * reference_angular(angular, c, sigmoid_k, power) + (0.0 if bias is None else bias[k])
    return output


def reference_magnitude(name, n, radius, alpha, beta):
    """Return ``h(n)`` before the weighting."""
    table = {
        "sphere": alpha * np.ones_like(n),
        "ball": alpha * np.minimum(n, radius) / radius,
        "tanh": alpha * np.tanh(n / radius),
        "linear": alpha * n,
        "seg": np.where(n <= radius, alpha * n, beta * n + (alpha - beta) * radius),
        "log": alpha * np.log(1 + n),
        "mix": alpha * n + beta * np.log(1 + n),
    }
    return pick(table, name, "magnitude")


def reference_angular(name, c, k, power):
    """Return ``g`` of the angle whose cosine is ``c``."""
    theta = np.arccos(c * (1 - 1e-6))
    edge, exponential = np.exp(-np.pi / (2 * k)), np.exp(theta / k - np.pi / (2 * k))
    table = {
        "cosine": c,
        "linear": 1 - 2 * theta / np.pi,
        "square_cosine": np.sign(c) * c**2,
        "sigmoid": (1 + edge) / (1 - edge) * (1 - exponential) / (1 + exponential),
        "power": np.sign(c) * np.abs(c) ** power,
    }
    return pick(table, name, "angular function")


def reference_weighting(name, w_norm):
    """Return the factor of ``h`` that depends on the filter's norm."""
    return pick({"none": 1.0, "linear": w_norm, "tanh": np.tanh(w_norm)}, name, "weighting")


def pick(table, name, what):
    if name not in table:
        raise NotImplementedError(f"tests/reference.py does not define the {what} {name!r} yet")
    return table[name]


def reference_norm(x, kernel_size, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros", eps=1e-4):
    """Return the norm ``n`` of every patch and group, (N, groups, H', W')."""
    patches = reference_patches(x, pair(kernel_size), stride, padding, dilation, padding_mode)
    grouped = patches.reshape(*patches.shape[:3], groups, -1)
    return np.sqrt((grouped**2).sum(-1) + eps).transpose(0, 3, 1, 2)


def reference_patches(x, kernel_size, stride, padding, dilation, padding_mode):
    """Return every padded patch of ``x`` (N, C, H, W) as (N, H', W', C, kh, kw)."""
    stride, dilation = pair(stride), pair(dilation)
    reach = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    if padding == "valid":
        padding = 0
    if padding == "same":  # an odd row or column goes to the bottom and to the right, as in torch
        margins = [(r // 2, r - r // 2) for r in reach]
    else:
        margins = [(p, p) for p in pair(padding)]
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), (0, 0), *margins], mode=PADDING_MODES[padding_mode])
    tops = range(0, padded.shape[2] - reach[0], stride[0])
    lefts = range(0, padded.shape[3] - reach[1], stride[1])
    rows = [np.stack([cut(padded, top, left, reach, dilation) for left in lefts], 1) for top in tops]
    return np.stack(rows, 1)


def cut(padded, top, left, reach, dilation):
    return padded[:, :, top : top + reach[0] + 1 : dilation[0], left : left + reach[1] + 1 : dilation[1]]


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)
