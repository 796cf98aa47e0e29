"""The decoupled convolution as a function, and the norms it needs.

Notation: ``x`` is an input patch under the filter (its padding included), ``w`` a filter,
``n = ‖x‖ = sqrt(Σ x² + eps)``, ``‖w‖ = sqrt(Σ w² + eps)``, ``ŵ = w / ‖w‖``, ``c = cos θ = ⟨ŵ, x⟩ / n``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from operators import kernels
from operators.angular import ANGULARS, HOMOGENEOUS, cosine
from operators.fused import (
    AUTOCAST_DEVICES,
    by_channel,
    convolve,
    gain,
    no_autocast,
    respond,
    sum_of_squares,
)
from operators.kernels import Operator, Windows, wide
from operators.magnitude import MAGNITUDES, Magnitude, unweighted
from operators.passes import Multiplier

Angular = Callable[[Tensor], Tensor]

# Where the compiled loops have the registered classes and functions in their lists.
_MAGNITUDES = {kind: kernels.MAGNITUDES.index(name) for name, kind in MAGNITUDES.items() if name in kernels.MAGNITUDES}
_ANGULARS = {function: kernels.ANGULARS.index(name) for name, function in ANGULARS.items() if name in kernels.ANGULARS}

# Half precision that this processor's convolutions do not have, and compute ten times as slowly as float32.
SLOW_ON_CPUS = frozenset(
    dtype
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
    if not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
)
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

    Precision: the convolution and the result are in the input's precision, or autocast's; sums of squares, norms,
        angles and what is computed of them are in float32 (float64 for float64 inputs). Rounded to half precision are
        the filters, the inner product and the result, and of a 1×1 convolution to more channels the scaled input.
        ``⟨ŵ, x⟩`` is at most ``‖x‖``, so float16, which ends at 65,504, overflows where the plain convolution does.
        Half precision in which a CPU has no fast convolutions is convolved in float32.

    Raises:
        TypeError: an input that is not floating point.
        ValueError: channels, a bias or a radius that do not fit, negative padding, ``padding="same"`` with a stride, a
            kernel larger than the padded input.

    Source: ``f_d(w, x) = h(‖w‖, ‖x‖) · g(θ)``, Liu et al., Decoupled Networks, CVPR 2018, section 3.
    """
    geometry = stride, padding, dilation, groups
    settings = {"magnitude": magnitude, "angular": angular, "eps": eps, "padding_mode": padding_mode}
    if has_torch_function_unary(input):
        return handle_torch_function(decoupled_conv2d, (input,), input, weight, bias, *geometry, **settings)
    multiplier = filter_multiplier(magnitude, angular, eps)
    factor = filter_factor(weight, magnitude, angular, eps)
    return respond_to_patches(input, weight, multiplier, factor, bias, *geometry, **settings)


def filter_multiplier(magnitude: Magnitude, angular: Angular, eps: float) -> Multiplier:
    """Return what a filter is multiplied by before the convolution.

    It is ``1 / ‖w‖``, and with the angular function ``cosine`` times all else that is the same for every patch:
    ``weighting(‖w‖)``, and ``h(n) / n`` where that does not depend on ``n``.
    """
    if angular is not cosine:
        return Multiplier(unweighted, 1.0, eps)
    constant = magnitude.constant_gain
    return Multiplier(magnitude.weighting, 1.0 if constant is None else constant, eps)


def filter_factor(weight: Tensor, magnitude: Magnitude, angular: Angular, eps: float) -> Tensor | None:
    """Return the factor ``weighting(‖w‖)`` of the answer, (K, 1, 1), if it is neither 1 nor in the multiplier."""
    if angular is cosine or magnitude.weighting is unweighted:
        return None
    return magnitude.weighting(filter_norm(weight.to(wide(weight.dtype)), eps=eps)).squeeze(-1)


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
    _check_constants(len(weight), bias, magnitude.radius)
    images = input if input.dim() == 4 else input[None]
    kernel_size, stride, dilation = tuple(weight.shape[-2:]), _pair(stride), _pair(dilation)
    dot_dtype, result_dtype = _precisions(input)
    with no_autocast(input.device.type):
        images, margin = pad(images, kernel_size, stride, padding, dilation, padding_mode)
        if kernel_size == (1, 1) and stride != (1, 1) and margin == (0, 0):
            images, stride = subsample(images, stride), (1, 1)
        weight = weight.to(wide(weight.dtype))
        geometry = stride, margin, dilation, groups
        if angular is cosine and magnitude.constant_gain is not None:
            answer = convolve(images.to(dot_dtype), weight, multiplier, None, bias, *geometry)
        else:
            images, total = sum_of_squares(images, groups, Windows(kernel_size, stride, margin, dilation))
            operator = _known_operator(magnitude, angular, eps)
            # Only a relative radius looks at the norms.
            n = (total + eps).sqrt() if operator is None or magnitude.running_norm is not None else None
            radius = magnitude.effective_radius(n)
            degree = HOMOGENEOUS.get(angular)
            images = images.to(dot_dtype)
            # A map for each channel is best computed together with the answer.
            if degree and len(weight) > groups and factor is None and not by_channel(radius):
                h = gain(_gain_of(magnitude, degree, eps), operator, degree, total, radius)
                answer = convolve(images, weight, multiplier, h, bias, *geometry, degree)
            else:
                dot = convolve(images, weight, multiplier, None, None, *geometry)
                bias = None if bias is None else bias[:, None, None]
                answer = respond(
                    _response_of(magnitude, angular, eps), operator, dot, total, radius, factor, bias, groups
                )
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
        ValueError: groups that do not divide the channels, negative padding, ``padding="same"`` with a stride, a kernel
            larger than the padded input.
    """
    kernel_size, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
    images = input if input.dim() == 4 else input[None]
    if images.shape[1] % groups:
        raise ValueError(f"{images.shape[1]} channels do not make {groups} groups; choose a divisor of the channels")
    images, margin = pad(images, kernel_size, stride, padding, dilation, padding_mode)
    _, total = sum_of_squares(images, groups, Windows(kernel_size, stride, margin, dilation))
    n = (total + eps).sqrt()
    return n if input.dim() == 4 else n.squeeze(0)


def norms_and_products(
    input: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
    *,
    eps: float,
    padding_mode: str,
) -> tuple[Tensor, Tensor]:
    """Return ``n`` and ``⟨ŵ, x⟩`` of every patch, the latter for each filter, (N, K, H', W'); ``n`` is held fixed.

    Without groups ``n`` is (N, 1, H', W'), with them that of each filter's group, (N, K, H', W'). The arguments are
    those of :func:`decoupled_conv2d`, whose ``input`` is a batch here.
    """
    size, stride, dilation = tuple(weight.shape[-2:]), _pair(stride), _pair(dilation)
    geometry = stride, padding, dilation, groups
    with torch.no_grad():
        n = patch_norm(input.detach(), size, *geometry, eps=eps, padding_mode=padding_mode)
    padded, margin = pad(input, size, stride, padding, dilation, padding_mode)
    product = F.conv2d(padded, weight / filter_norm(weight, eps=eps), None, stride, margin, dilation, groups)
    return n if groups == 1 else n.repeat_interleave(len(weight) // groups, dim=1), product


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


def _gain_of(magnitude: Magnitude, degree: int, eps: float) -> Callable[..., Tensor]:
    """Return ``h(n) / n^degree`` as a function of ``Σ x²`` and the radius."""

    def function(total: Tensor, radius: Tensor | float) -> Tensor:
        n = (total + eps).sqrt()
        gain = magnitude.gain(n, radius)
        return gain if degree == 1 else gain / n

    return function


def _response_of(magnitude: Magnitude, angular: Angular, eps: float) -> Callable[..., Tensor]:
    """Return ``factor · h(n) · g(θ) + bias`` as a function of ``⟨ŵ, x⟩``, ``Σ x²``, radius, factor and bias."""

    def function(
        dot: Tensor, total: Tensor, radius: Tensor | float, factor: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        n = (total + eps).sqrt()
        gain = magnitude.gain(n, radius)
        degree = HOMOGENEOUS.get(angular)
        if degree:
            values, h = angular(dot), gain if degree == 1 else gain / n
        else:
            values, h = angular(dot / n), gain * n
        # In this order the product has the memory format of the convolution.
        answer = values * (h if factor is None else factor * h)
        return answer if bias is None else answer + bias

    return function


def _known_operator(magnitude: Magnitude, angular: Angular, eps: float) -> Operator | None:
    """Return the operator as the compiled loops know it; None for mathematics of one's own."""
    magnitude_place = _MAGNITUDES.get(type(magnitude))
    angular_place = _ANGULARS.get(getattr(angular, "func", angular))
    alpha, beta, settings = magnitude.alpha, magnitude.beta, getattr(angular, "keywords", {})
    setting = next(iter(settings.values()), 0.0)
    # What is learned there has its gradient from torch.
    learned = isinstance(alpha, Tensor) or isinstance(beta, Tensor) or isinstance(setting, Tensor)
    if magnitude_place is None or angular_place is None or learned:
        return None
    return Operator(magnitude_place, angular_place, alpha, beta, setting, eps)


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


def _check_constants(channels: int, bias: Tensor | None, radius: Tensor | float) -> None:
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be one number for each of {channels} filters, got shape {tuple(bias.shape)}")
    if isinstance(radius, Tensor) and radius.numel() not in (1, channels):
        raise ValueError(f"a radius is one, or one for each of {channels} filters, got shape {tuple(radius.shape)}")


def _precisions(input: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the inner product and of the result."""
    device = input.device.type
    if input.dtype == torch.float64:
        return torch.float64, torch.float64
    autocast = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    requested = torch.get_autocast_dtype(device) if autocast else input.dtype
    return torch.float32 if device == "cpu" and requested in SLOW_ON_CPUS else requested, requested


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
