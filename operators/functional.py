"""The decoupled convolution as a function, and the patch norm it needs.

Notation: ``x`` is an input patch under the filter (its padding included), ``w`` a filter,
``n = ‖x‖ = sqrt(Σ x² + eps)``, ``‖w‖ = sqrt(Σ w² + eps)``, ``ŵ = w / ‖w‖``, ``c = cos θ = ⟨ŵ, x⟩ / n``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from operators.angular import cosine
from operators.magnitude import Magnitude

Pair = int | tuple[int, int]

# Asked once, for torch 2.11 cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu", "hpu", "xla") if torch.amp.is_autocast_available(device)
)


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
    angular: Callable[[Tensor], Tensor],
    eps: float = 1e-4,
    padding_mode: str = "zeros",
) -> Tensor:
    """Return ``h(‖w‖, ‖x‖) · g(θ) + bias`` for every patch ``x`` and filter ``w``.

    The positional arguments are those of :func:`torch.nn.functional.conv2d`.

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
    _check_input(input, weight, groups)
    input = pad(input, weight.shape[-2:], stride, padding, dilation, padding_mode)
    dot_dtype, result_dtype = _precisions(input, angular)
    norm_dtype = torch.promote_types(dot_dtype, torch.float32)
    with _no_autocast(input.device.type):
        n = patch_norm(input, weight.shape[-2:], stride, dilation=dilation, groups=groups, eps=eps)
        filters_per_group = weight.shape[0] // groups
        if groups > 1 and filters_per_group > 1:
            n = n.repeat_interleave(filters_per_group, dim=-3)
        weight = weight.to(norm_dtype)
        w_norm = filter_norm(weight, eps=eps)
        input = input.to(dot_dtype)
        if angular is cosine:
            filters = weight * (magnitude.weighting(w_norm) / w_norm)
            dot = F.conv2d(input, filters.to(dot_dtype), None, stride, 0, dilation, groups)
            response = dot * magnitude.gain(n)
        else:
            dot = F.conv2d(input, weight / w_norm, None, stride, 0, dilation, groups)
            # In this order the product has the memory format of the convolution.
            response = angular(dot / n) * magnitude(n, w_norm.squeeze(-1))
        if bias is not None:
            response = response + bias.to(response.dtype)[:, None, None]
        return response.to(result_dtype)


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
    kernel_size, stride_pair, dilation_pair = _pair(kernel_size), _pair(stride), _pair(dilation)
    input = pad(input, kernel_size, stride, padding, dilation, padding_mode)
    squares = input.to(torch.promote_types(input.dtype, torch.float32)).square()
    total = squares.unflatten(-3, (groups, -1)).sum(-3)
    for dim in (-2, -1):
        total = _window_sum(total, dim, kernel_size[dim], stride_pair[dim], dilation_pair[dim])
    return (total + eps).sqrt()


def filter_norm(weight: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Return ``‖w‖ = sqrt(Σ w² + eps)`` of every filter: (K, C, kh, kw) to (K, 1, 1, 1)."""
    return (weight.square().sum((1, 2, 3), keepdim=True) + eps).sqrt()


def pad(
    input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, padding_mode: str
) -> Tensor:
    """Return ``input`` padded as ``nn.Conv2d`` pads it, so that convolution and norm see the same values.

    Raises:
        ValueError: an unknown word for ``padding``, negative padding, ``padding="same"`` with a stride.
    """
    kernel_size, dilation = _pair(kernel_size), _pair(dilation)
    if padding == "same":
        if _pair(stride) != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride={stride}; give the padding as integers")
        totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        (top, bottom), (left, right) = [(total // 2, total - total // 2) for total in totals]
    elif padding == "valid":
        return input
    elif isinstance(padding, str):
        raise ValueError(f"unknown padding {padding!r}: choose 'same', 'valid', an integer or a pair of integers")
    else:
        top, left = bottom, right = _pair(padding)
    amounts = [left, right, top, bottom]
    if min(amounts) < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    if not any(amounts):
        return input
    return F.pad(input, amounts, mode="constant" if padding_mode == "zeros" else padding_mode)


def _window_sum(values: Tensor, dim: int, size: int, stride: int, dilation: int) -> Tensor:
    """Sum ``size`` values, ``dilation`` apart, at every ``stride``-th place along ``dim``."""
    extent = (size - 1) * dilation + 1
    if values.shape[dim] < extent:
        raise ValueError(f"the kernel spans {extent} pixels, but the padded input has {values.shape[dim]}; add padding")
    count = (values.shape[dim] - extent) // stride + 1
    length = (count - 1) * stride + 1
    every = (..., slice(None, None, stride), *[slice(None)] * (-dim - 1))
    total = values.narrow(dim, 0, length)[every]
    for place in range(1, size):
        total = total + values.narrow(dim, place * dilation, length)[every]
    return total


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


def _precisions(input: Tensor, angular: Callable[[Tensor], Tensor]) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the inner product and of the result."""
    device = input.device.type
    if input.dtype == torch.float64:
        return torch.float64, torch.float64
    autocast = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    requested = torch.get_autocast_dtype(device) if autocast else input.dtype
    dot = torch.bfloat16 if requested == torch.bfloat16 and angular is cosine else torch.float32
    return dot, torch.float32 if autocast and requested == torch.float16 else requested


def _no_autocast(device: str) -> torch.autocast:
    return torch.autocast(device if device in AUTOCAST_DEVICES else "cpu", enabled=False)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
