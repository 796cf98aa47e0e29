"""The passes over whole tensors that a decoupled convolution makes beside its convolution, without their gradients.

Each is one line of mathematics. On CPUs a loop of ``kernels.cpp`` does it where there is one. Otherwise torch's
operations do, on a CPU in bands that stay in the cache, for a large temporary tensor costs more than the arithmetic,
and in at least float32, for operations that mix dtypes are slow there.

Shapes: values are (N, C, H, W), a map of one number for each patch and group is (N, groups, H, W), in at least float32
and in the memory format of the values.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from operators import kernels
from operators.kernels import Windows, wide
from operators.magnitude import WEIGHTINGS, linearly_weighted

# Elements of a band for each thread: few enough for the cache of a core, enough to be worth the calls.
BAND = 1 << 17


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """What a filter ``w`` is multiplied by: ``constant · weighting(‖w‖) / ‖w‖`` with ``‖w‖ = sqrt(Σ w² + eps)``."""

    weighting: Callable[[Tensor], Tensor]
    constant: float
    eps: float

    def __call__(self, squares: Tensor) -> Tensor:
        """Return the factors for filters of these ``Σ w²``."""
        norm = (squares + self.eps).sqrt()
        return self.weighting(norm) * self.constant / norm

    @property
    def is_one(self) -> bool:
        """Whether filters stay what they are."""
        return self.weighting is linearly_weighted and self.constant == 1

    @property
    def known(self) -> kernels.Filters | None:
        """This multiplier as the compiled loops know it; None for a weighting of one's own."""
        place = _WEIGHTINGS.get(self.weighting)
        return None if place is None else kernels.Filters(0, 0, place, self.constant, self.eps)


# Where the compiled loops have the registered weightings in their list.
_WEIGHTINGS = {
    function: kernels.WEIGHTINGS.index(name) for name, function in WEIGHTINGS.items() if name in kernels.WEIGHTINGS
}


def multiply_filters(weight: Tensor, multiplier: Multiplier, dtype: torch.dtype) -> Tensor:
    """Return the filters times their factors, as ``dtype``."""
    if filters := _for_loops(weight, multiplier, dtype):
        return kernels.multiply_filters(weight, filters, dtype)
    return (weight * multiplier(squares_of_filters(weight))).to(dtype)


def multiply_filters_backward(gradient: Tensor, weight: Tensor, multiplier: Multiplier) -> Tensor:
    """Return the gradient of the weight in :func:`multiply_filters`."""
    if filters := _for_loops(weight, multiplier, gradient.dtype):
        return kernels.multiply_filters_backward(gradient, weight, filters)
    gradient = gradient.to(weight.dtype)
    squares = squares_of_filters(weight).requires_grad_()
    with torch.enable_grad():
        factor = multiplier(squares)
    of_factor = (gradient * weight).sum((1, 2, 3), keepdim=True)
    (of_squares,) = torch.autograd.grad(factor, squares, of_factor)
    return (gradient * factor.detach()).addcmul_(weight, of_squares, value=2)


def squares_of_filters(weight: Tensor) -> Tensor:
    """Return ``Σ w²`` of each filter, (K, 1, 1, 1)."""
    return weight.square().sum((1, 2, 3), keepdim=True)


def _for_loops(weight: Tensor, multiplier: Multiplier, dtype: torch.dtype) -> kernels.Filters | None:
    """Return the multiplier as the loops know it, if they cover these filters and this dtype of the products."""
    if dtype not in kernels.DTYPES or weight.dtype != wide(dtype) or not kernels.covers(weight):
        return None
    return multiplier.known


def group(tensor: Tensor, groups: int, dim: int = 1) -> Tensor:
    """Return ``tensor`` with its channels, in dimension ``dim``, as (groups, channels / groups) if there are groups."""
    # Without groups a dimension more would hide from compilers that the channels are last in memory.
    return tensor if groups == 1 else tensor.unflatten(dim, (groups, -1))


def ungroup(tensor: Tensor, groups: int) -> Tensor:
    """Return (N, G, C / G, H, W) as (N, C, H, W)."""
    return tensor if groups == 1 else tensor.flatten(1, 2)


def per_channel(map: Tensor, groups: int) -> Tensor:
    """Return a map in a shape that is multiplied with grouped values."""
    return map if groups == 1 else map.unsqueeze(2)


def window_sum(map: Tensor, windows: Windows) -> Tensor:
    """Return ``Σ map`` over each window, by operations that can be differentiated, compiled and exported."""
    kernel_size, stride, margin, dilation = windows
    if windows.single_pixels:
        return map
    if map.shape[1] > 1 and map.device.type == "cpu" and not torch.compiler.is_compiling():
        # Eager pooling is slow on CPUs; elsewhere a convolution may compute in less than float32.
        ones = map.new_ones(map.shape[1], 1, *kernel_size)
        return F.conv2d(map, ones, None, stride, margin, dilation, map.shape[1])
    pooled = map.shape[1] > 1 or map.device.type != "cpu" or torch.compiler.is_exporting()
    if pooled and dilation == (1, 1) and all(2 * m <= k for m, k in zip(margin, kernel_size, strict=True)):
        return F.avg_pool2d(map, kernel_size, stride, margin) * (kernel_size[0] * kernel_size[1])
    if any(margin):
        map = F.pad(map, [margin[1], margin[1], margin[0], margin[0]])
    for dim in (-2, -1):
        map = _sum_of_shifted(map, dim, kernel_size[dim], stride[dim], dilation[dim])
    return map


def sum_of_squares(values: Tensor, groups: int, windows: Windows) -> Tensor:
    """Return the map ``Σ values²`` over the channels of each group and each window."""
    if kernels.covers(values):
        if values.shape[1] == groups and not windows.single_pixels:
            return kernels.window_sum(values, windows, squared=True)
        map = kernels.squares(values, groups)
        return map if windows.single_pixels else kernels.window_sum(map, windows, squared=False)
    channels = values.shape[1] // groups
    grouped, dtype = group(values, groups), wide(values.dtype)
    if channels > 1 and values.device.type == "cpu" and 1 in (values.stride(1), values.stride(2)):
        # Along adjacent elements one pass without a copy, the square root included; slow along others.
        map = torch.linalg.vector_norm(grouped, dim=-3, dtype=dtype).square_()
        map = map.unsqueeze(1) if groups == 1 else map
    else:
        map = squares(values, groups)
    return window_sum(map, windows)


def squares(values: Tensor, groups: int) -> Tensor:
    """Return the map ``Σ values²`` over the channels of each group, by operations that can be differentiated."""
    products = values.to(wide(values.dtype)).square()
    if values.shape[1] == groups:
        return products
    return products.sum(1, keepdim=True) if groups == 1 else group(products, groups).sum(2)


def add_gradient_of_squares(
    gradient: Tensor | None, values: Tensor, of_sum: Tensor, groups: int, windows: Windows
) -> Tensor:
    """Return ``gradient``, which may be overwritten, plus the gradient of :func:`sum_of_squares`: as ``values``.

    Args:
        of_sum: the gradient of the sum, a map of windows.
    """
    if gradient is None:
        gradient = torch.zeros_like(values)
    if kernels.covers(values, gradient, of_sum):
        of_squares = of_sum if windows.single_pixels else kernels.window_sum_backward(of_sum, values, windows)
        return kernels.add_gradient_of_squares(gradient, values, of_squares, groups)
    with torch.enable_grad():
        map = of_sum.new_empty(values.shape[0], groups, *values.shape[-2:]).requires_grad_()
        (of_squares,) = torch.autograd.grad(window_sum(map, windows), map, of_sum)
    target, factors, of_squares = group(gradient, groups), group(values, groups), per_channel(of_squares, groups)
    for band in bands(target, target.dim() - 2):
        part = _widened(target[band])
        part.addcmul_(_widened(factors[band]), of_squares[band], value=2)
        if part.dtype != target.dtype:
            target[band] = part
    return gradient


def scale(
    values: Tensor, map: Tensor, groups: int, bias: Tensor | None = None, degree: int = 1, into: Tensor | None = None
) -> Tensor:
    """Return ``values · |values|^(degree - 1) · map + bias``, as ``values``.

    Args:
        degree: 1 or 2.
        into: takes the answer; it may be ``values``.
    """
    answer = torch.empty_like(values) if into is None else into
    bias = None if bias is None else bias.to(map.dtype)
    if kernels.covers(values, map, bias, answer):
        return kernels.scale(values, map, groups, bias, degree, answer)
    grouped, target, map = group(values, groups), group(answer, groups), per_channel(map, groups)
    bias = None if bias is None else group(bias[:, None, None], groups, 0)
    for band in bands(target, target.dim() - 2):
        part = _widened(grouped[band])
        # In this order, for the square alone may be too large for half precision.
        product = part * map[band] if degree == 1 else (part.abs() * map[band]).mul_(part)
        target[band] = product if bias is None else product.add_(bias)
    return answer


def scale_backward(
    gradient: Tensor, answer: Tensor, map: Tensor, groups: int, bias: Tensor | None = None, degree: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the values in :func:`scale`, and that of the map times the map, given the answer."""
    bias = None if bias is None else bias.to(map.dtype)
    if kernels.covers(answer, gradient, map, bias):
        return kernels.scale_backward(gradient, answer, map, groups, bias, degree)
    of_values, products = torch.empty_like(answer), torch.empty_like(map)
    answers, target, gradients = (group(tensor, groups) for tensor in (answer, of_values, gradient))
    maps, products_by_group = per_channel(map, groups), per_channel(products, groups)
    bias = None if bias is None else group(bias[:, None, None], groups, 0)
    for band in bands(target, target.dim() - 2):
        part, slope, factor = _widened(answers[band]), _widened(gradients[band]), maps[band]
        part = part if bias is None else part - bias
        products_by_group[band] = (slope.to(map.dtype) * part).sum(-3, keepdim=True)
        if degree == 2:
            factor = 2 * (part * factor).abs_().sqrt_().copysign_(factor)
        target[band] = slope * factor
    return of_values, products


def bands(tensor: Tensor, rows: int) -> Iterator[tuple[slice, ...]]:
    """Yield indices that cut a tensor into bands: along its first dimension and, if need be, the dimension ``rows``."""
    band = BAND * torch.get_num_threads()
    if tensor.device.type != "cpu" or tensor.numel() <= band:
        yield (slice(None),)
        return
    size = tensor.numel() // tensor.shape[0]
    step = max(1, band // size)
    if size <= band:
        yield from ((slice(start, start + step),) for start in range(0, tensor.shape[0], step))
        return
    height = tensor.shape[rows]
    step = max(1, band * height // size)
    for image in range(tensor.shape[0]):
        for row in range(0, height, step):
            yield slice(image, image + 1), *[slice(None)] * (rows - 1), slice(row, row + step)


def _widened(values: Tensor) -> Tensor:
    """Return values in at least float32 on a CPU; elsewhere operations that mix dtypes are as fast."""
    return values.to(wide(values.dtype)) if values.device.type == "cpu" else values


def _sum_of_shifted(values: Tensor, dim: int, size: int, stride: int, dilation: int) -> Tensor:
    """Sum ``size`` values, ``dilation`` apart, at every ``stride``-th place along ``dim``."""
    count = (values.shape[dim] - (size - 1) * dilation - 1) // stride + 1
    length = (count - 1) * stride + 1
    every = (..., slice(None, None, stride), *[slice(None)] * (-dim - 1))
    total = values.narrow(dim, 0, length)[every]
    for place in range(1, size):
        total = total + values.narrow(dim, place * dilation, length)[every]
    return total
