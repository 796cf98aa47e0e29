"""The decoupled convolution as a function, and the norms it needs.

Notation: ``x`` is an input patch under the filter (its padding included), ``w`` a filter,
``n = ‖x‖ = sqrt(Σ x² + eps)``, ``‖w‖ = sqrt(Σ w² + eps)``, ``ŵ = w / ‖w‖``, ``c = cos θ = ⟨ŵ, x⟩ / n``.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from operators.angular import HOMOGENEOUS, cosine
from operators.fused import (
    AUTOCAST_DEVICES,
    Multiplier,
    convolve,
    group,
    no_autocast,
    respond,
    respond_homogeneously,
    sum_of_squares,
    ungroup,
)
from operators.magnitude import Magnitude, unweighted

Angular = Callable[[Tensor], Tensor]
Pair = int | tuple[int, int]


def decoupled_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    magnitude: Magnitude,
    angular: Angular,
    eps: float = 1e-4,
    padding_mode: str = "zeros",
) -> Tensor:
    """Return ``h(‖w‖, ‖x‖) · g(θ) + bias`` for every patch ``x`` and filter ``w``.

    The positional arguments are those of :func:`torch.nn.functional.conv2d`; ``padding`` may also be
    ``"dynamic_same"``, TensorFlow's SAME: what makes ``H' = ⌈H / stride⌉``, an odd row or column coming last.

    Args:
        magnitude: ``h``, see ``operators.magnitude``.
        angular: ``g`` as a function of ``cos θ``, see ``operators.angular``.
        eps: added to ``Σ x²`` and ``Σ w²`` inside both roots, in the square of the input's unit. A zero patch or a zero
            filter answers 0 (plus bias) with a finite gradient.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``; the padding belongs to the patch.

    Shape:
        ``input`` (N, C, H, W) or (C, H, W), ``weight`` (K, C / groups, kh, kw), ``bias`` (K,); returns (N, K, H', W')
        or (K, H', W') with the H', W' of the plain convolution. With groups, each group of channels has its own ``n``.

    Precision: norms, angles and the filters' normalisation are computed in float32 (float64 for float64 inputs). The
    convolution itself follows autocast or a bfloat16 input to bfloat16 if ``angular`` is ``cosine``; float16, whose
    range ends at 65,504, is computed in float32 throughout, and under float16 autocast the result stays float32.

    Raises:
        TypeError: an input that is not floating point.
        ValueError: channels that do not fit, negative padding, ``padding="same"`` with a stride, a kernel larger than
            the padded input.

    Source: ``f_d(w, x) = h(‖w‖, ‖x‖) · g(θ)``, Liu et al., Decoupled Networks, CVPR 2018, section 3.
    """
    return respond_to_patches(
        input,
        weight,
        filter_multiplier(magnitude, angular, eps),
        filter_factor(weight, magnitude, angular, eps),
        bias,
        stride,
        padding,
        dilation,
        groups,
        magnitude=magnitude,
        angular=angular,
        eps=eps,
        padding_mode=padding_mode,
    )


def filter_multiplier(magnitude: Magnitude, angular: Angular, eps: float) -> Multiplier:
    """Return the function of ``Σ w²`` by which a filter is multiplied before the convolution.

    It is ``1 / ‖w‖``, and with the angular function ``cosine`` times all else that is the same for every patch:
    ``weighting(‖w‖)``, and ``h(n) / n`` where that does not depend on ``n``.
    """

    def multiplier(squares: Tensor) -> Tensor:
        w_norm = (squares + eps).sqrt()
        if angular is not cosine:
            return w_norm.reciprocal()
        constant = magnitude.constant_gain
        return magnitude.weighting(w_norm) * (1 if constant is None else constant) / w_norm

    return multiplier


def filter_factor(weight: Tensor, magnitude: Magnitude, angular: Angular, eps: float) -> Tensor | None:
    """Return the factor ``weighting(‖w‖)`` of the answer, (K, 1, 1), if it is neither 1 nor in the multiplier."""
    if angular is cosine or magnitude.weighting is unweighted:
        return None
    return magnitude.weighting(filter_norm(_at_least_float32(weight), eps=eps)).squeeze(-1)


def respond_to_patches(
    input: Tensor,
    weight: Tensor,
    multiplier: Multiplier | None,
    factor: Tensor | None,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
    *,
    magnitude: Magnitude,
    angular: Angular,
    eps: float,
    padding_mode: str,
) -> Tensor:
    """Return the answer of :func:`decoupled_conv2d`, given :func:`filter_multiplier` and :func:`filter_factor`.

    Without a multiplier, the filters in ``weight`` are multiplied already.
    """
    _check_input(input, weight, groups)
    images = input if input.dim() == 4 else input[None]
    kernel_size, stride, dilation = tuple(weight.shape[-2:]), _pair(stride), _pair(dilation)
    dot_dtype, result_dtype = _precisions(input, angular)
    with no_autocast(input.device.type):
        images, margin = pad(images, kernel_size, stride, padding, dilation, padding_mode)
        if kernel_size == (1, 1) and stride != (1, 1) and margin == (0, 0):
            images, stride = subsample(images, stride), (1, 1)
        weight = _at_least_float32(weight)
        bias = None if bias is None else bias.to(dot_dtype)
        geometry = stride, margin, dilation, groups
        if angular is cosine and magnitude.constant_gain is not None:
            answer = convolve(images.to(dot_dtype), weight, multiplier, None, bias, *geometry)
        else:
            images, n = _patch_norm(images, kernel_size, *geometry, eps)
            images = images.to(dot_dtype)
            radius = magnitude.effective_radius(n)
            by_channel = factor is not None or (isinstance(radius, Tensor) and radius.dim() > 0)
            if angular is cosine and not by_channel:
                answer = convolve(images, weight, multiplier, magnitude.gain(n, radius), bias, *geometry)
            else:
                dot = group(convolve(images, weight, multiplier, None, None, *geometry), groups)
                bias = None if bias is None else group(bias[:, None, None], groups, 0)
                if angular in HOMOGENEOUS and not by_channel:
                    h = _homogeneous_gain(magnitude.gain(n, radius), n, angular)
                    answer = respond_homogeneously(dot, h, bias, *HOMOGENEOUS[angular])
                else:
                    answer = _respond_in_general(dot, n, radius, factor, bias, magnitude, angular, result_dtype)
                answer = ungroup(answer, groups)
        answer = answer.to(result_dtype)
    return answer if input.dim() == 4 else answer.squeeze(0)


def patch_norm(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    eps: float = 1e-4,
    padding_mode: str = "zeros",
) -> Tensor:
    """Return ``n = sqrt(Σ x² + eps)`` of every patch and group, in at least float32.

    Shape:
        ``input`` (N, C, H, W) or (C, H, W); returns (N, groups, H', W') or (groups, H', W').

    Raises:
        ValueError: negative padding, ``padding="same"`` with a stride, a kernel larger than the padded input.
    """
    kernel_size, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
    images = input if input.dim() == 4 else input[None]
    images, margin = pad(images, kernel_size, stride, padding, dilation, padding_mode)
    _, n = _patch_norm(images, kernel_size, stride, margin, dilation, groups, eps)
    n = n if groups == 1 else n.squeeze(2)
    return n if input.dim() == 4 else n.squeeze(0)


def filter_norm(weight: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Return ``‖w‖ = sqrt(Σ w² + eps)`` of every filter: (K, C, kh, kw) to (K, 1, 1, 1)."""
    return (weight.square().sum((1, 2, 3), keepdim=True) + eps).sqrt()


def pad(
    images: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: Pair | str,
    dilation: tuple[int, int],
    padding_mode: str,
) -> tuple[Tensor, tuple[int, int]]:
    """Return (N, C, H, W) padded as ``nn.Conv2d`` pads, and the rows and columns of zeros still to be added all round.

    Zeros that are the same on opposite sides are left to the convolution, which needs no copy for them.

    Raises:
        ValueError: an unknown word for ``padding``, negative padding, ``padding="same"`` with a stride, a kernel larger
            than the padded images.
    """
    reaches = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride={stride}; give the padding as integers")
        (top, bottom), (left, right) = [(reach // 2, reach - reach // 2) for reach in reaches]
    elif padding == "dynamic_same":
        sizes = zip(images.shape[-2:], stride, reaches, strict=True)
        totals = [max((-(-size // step) - 1) * step + reach + 1 - size, 0) for size, step, reach in sizes]
        (top, bottom), (left, right) = [(total // 2, total - total // 2) for total in totals]
    elif isinstance(padding, str) and padding != "valid":
        raise ValueError(
            f"unknown padding {padding!r}: choose 'same', 'dynamic_same', 'valid', an integer or a pair of integers"
        )
    else:
        top, left = bottom, right = (0, 0) if padding == "valid" else _pair(padding)
    if min(top, left) < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    for size, before, after, reach in zip(images.shape[-2:], (top, left), (bottom, right), reaches, strict=True):
        if size + before + after <= reach:
            raise ValueError(
                f"the kernel spans {reach + 1} pixels, but the padded input has {size + before + after}; add padding"
            )
    if padding_mode == "zeros" and (top, left) == (bottom, right):
        return images, (top, left)
    if not any((top, bottom, left, right)):
        return images, (0, 0)
    return F.pad(images, [left, right, top, bottom], "constant" if padding_mode == "zeros" else padding_mode), (0, 0)


def subsample(images: Tensor, stride: tuple[int, int]) -> Tensor:
    """Return the pixels that a 1×1 convolution of this stride sees, in the memory format of ``images``.

    The convolution itself then needs no stride: with one, and channels_last images of fewer than 16 channels, oneDNN's
    gradient of the filters is wrong, or overwrites what is not theirs (torch 2.14, CPUs).
    """
    rows, columns = stride
    return images[..., ::rows, ::columns].clone()


def _patch_norm(
    images: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    margin: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``images``, for whatever else needs them, and ``n``: (N, 1, H', W') or (N, groups, 1, H', W')."""
    grouped, total = sum_of_squares(group(images, groups))
    # Groups take the place of channels, so that their maps keep a memory format of channels last.
    total = total if groups == 1 else total.squeeze(2)
    if any(margin):
        total = F.pad(total, [margin[1], margin[1], margin[0], margin[0]])
    if dilation != (1, 1):
        for dim in (-2, -1):
            total = _window_sum(total, dim, kernel_size[dim], stride[dim], dilation[dim])
    elif kernel_size != (1, 1) or stride != (1, 1):
        # One pass over the map, where sums of shifted maps take several.
        total = F.avg_pool2d(total, kernel_size, stride) * math.prod(kernel_size)
    total = total if groups == 1 else total.unsqueeze(2)
    return ungroup(grouped, groups), (total + eps).sqrt()


def _window_sum(values: Tensor, dim: int, size: int, stride: int, dilation: int) -> Tensor:
    """Sum ``size`` values, ``dilation`` apart, at every ``stride``-th place along ``dim``."""
    count = (values.shape[dim] - (size - 1) * dilation - 1) // stride + 1
    length = (count - 1) * stride + 1
    every = (..., slice(None, None, stride), *[slice(None)] * (-dim - 1))
    total = values.narrow(dim, 0, length)[every]
    for place in range(1, size):
        total = total + values.narrow(dim, place * dilation, length)[every]
    return total


def _respond_in_general(
    dot: Tensor,
    n: Tensor,
    radius: Tensor | float,
    factor: Tensor | None,
    bias: Tensor | None,
    magnitude: Magnitude,
    angular: Angular,
    dtype: torch.dtype,
) -> Tensor:
    """Return the answer to ``dot = ⟨ŵ, x⟩``, which may be grouped, whatever the operator."""
    groups = 1 if dot.dim() == 4 else dot.shape[1]
    learned = isinstance(radius, Tensor)
    if learned and radius.dim() > 0:
        radius = group(radius, groups, 0)
    factor = None if factor is None else group(factor, groups, 0)

    def response(
        dot: Tensor, n: Tensor, learned_radius: Tensor | None, factor: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        gain = magnitude.gain(n, learned_radius if learned else radius)
        if angular in HOMOGENEOUS:
            values, h = angular(dot), _homogeneous_gain(gain, n, angular)
        else:
            values, h = angular(dot / n), gain * n
        # In this order the product has the memory format of the convolution.
        answer = values * (h if factor is None else factor * h)
        return answer if bias is None else answer + bias

    return respond(response, dtype, dot, n, radius if learned else None, factor, bias)


def _homogeneous_gain(gain: Tensor | float, n: Tensor, angular: Angular) -> Tensor | float:
    """Return ``h(n) / n^p`` for the degree ``p`` of the angular function and ``gain = h(n) / n``."""
    for _ in range(HOMOGENEOUS[angular].degree - 1):
        gain = gain / n
    return gain


def _check_input(input: Tensor, weight: Tensor, groups: int) -> None:
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}; convert images by image.float() / 255")
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be (N, C, H, W) or (C, H, W), got shape {tuple(input.shape)}")
    expected = weight.shape[1] * groups
    if input.shape[-3] != expected:
        raise ValueError(
            f"input has {input.shape[-3]} channels, but a weight of shape {tuple(weight.shape)} "
            f"with groups={groups} needs {expected}"
        )


def _precisions(input: Tensor, angular: Angular) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the inner product and of the result."""
    device = input.device.type
    if input.dtype == torch.float64:
        return torch.float64, torch.float64
    autocast = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    requested = torch.get_autocast_dtype(device) if autocast else input.dtype
    dot = torch.bfloat16 if requested == torch.bfloat16 and angular is cosine else torch.float32
    return dot, torch.float32 if autocast and requested == torch.float16 else requested


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
