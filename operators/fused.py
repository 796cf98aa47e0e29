"""The passes over whole tensors that a decoupled convolution makes beside its convolution, each as cheap as it can be.

Every function here states one line of mathematics. Compilers, exporters and function transforms get that line. In
eager mode its gradient is written by hand, so that nothing is kept but inputs and outputs, and on a CPU the work goes
in bands that stay in the cache, for a large temporary tensor costs more than the arithmetic. A gradient that is to be
differentiated again is built of differentiable operations.

Shapes: without groups, ``values`` and ``dot`` are (N, C, H, W), a map of one number for each patch (N, 1, H, W). With
groups they are (N, G, C / G, H, W) and (N, G, 1, H, W): see :func:`group`.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function, FunctionCtx

# Stride, padding, dilation and groups of a convolution.
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
Multiplier = Callable[[Tensor], Tensor]

# Asked once, for torch 2.11 cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu", "hpu", "xla") if torch.amp.is_autocast_available(device)
)

# Elements of a band for each thread: few enough for the cache of a core, enough to be worth the calls.
BAND = 1 << 17


def group(tensor: Tensor, groups: int, dim: int = 1) -> Tensor:
    """Return ``tensor`` with its channels, in dimension ``dim``, as (groups, channels / groups) if there are groups."""
    # Without groups a dimension more would hide from compilers that the channels are last in memory.
    return tensor if groups == 1 else tensor.unflatten(dim, (groups, -1))


def ungroup(tensor: Tensor, groups: int) -> Tensor:
    """Return (N, G, C / G, H, W) as (N, C, H, W)."""
    return tensor if groups == 1 else tensor.flatten(1, 2)


def no_autocast(device: str) -> torch.autocast:
    """Return a context in which operations keep the dtypes of their operands."""
    return torch.autocast(device if device in AUTOCAST_DEVICES else "cpu", enabled=False)


def materialise(map: Tensor) -> Tensor:
    """Return ``map``; a compiler then computes it, and its gradient, once for each patch and not for each channel."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    transformed = torch._C._are_functorch_transforms_active()
    return torch.ops.decoupled_zoo.materialise(map) if compiling and not transformed else map


def sum_of_squares(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``values`` and the map ``Σ values²`` over the channels of each group, in at least float32.

    Whatever else needs ``values`` should take the first result: its gradient then arrives here first, and the squares'
    gradient is added to it in place.
    """
    return _SumOfSquares.apply(values) if _eager() else (values, materialise(_squares(values, (-3,))))


def scale(values: Tensor, gain: Tensor) -> Tensor:
    """Return ``values · gain`` with a map ``gain``, in the dtype of ``values``."""
    return _Scale.apply(values, gain) if _eager() else _scaled(values, gain)


def convolve(
    input: Tensor,
    weight: Tensor,
    multiplier: Multiplier | None,
    gain: Tensor | None,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Return ``conv2d(input, w · multiplier(Σ w²)) · gain + bias``: (N, C, H, W) to (N, K, H', W').

    Args:
        multiplier: maps the squared norms of the filters ``w``, (K, 1, 1, 1), to their factors; None for 1.
        gain: a map; None for 1.
    """
    pointwise = weight.shape[-2:] == (1, 1) and stride == (1, 1) and padding == (0, 0)
    if gain is not None and pointwise and input.shape[1] < weight.shape[0]:
        # A convolution of single pixels commutes with the scaling, and its input is the smaller of the two.
        input, gain = ungroup(scale(group(input, groups), gain), groups), None
    geometry = stride, padding, dilation, groups
    if _eager():
        return _Convolution.apply(input, weight, gain, bias, multiplier, geometry, torch.is_grad_enabled())
    return _convolution(input, weight, gain, bias, multiplier, geometry)


def respond(
    response: Callable[..., Tensor], dtype: torch.dtype, dot: Tensor, norm: Tensor, *constants: Tensor | None
) -> Tensor:
    """Return ``response(dot, norm, *constants)`` as ``dtype``, in the shape and memory format of ``dot``.

    Args:
        response: works on each pixel by itself.
        norm: a map.
        constants: tensors without batch, height and width, which ``response`` gets whole.
    """
    if not _eager():
        return response(dot, materialise(norm), *constants).to(dtype)
    if dot.stride(-3) != 1:
        return _Response.apply(response, dtype, dot.dim() - 2, torch.is_grad_enabled(), dot, norm, *constants)
    # What is computed of map and constants alone has its channels innermost only if they are the last dimensions.
    channels = tuple(range(1, dot.dim() - 2))
    last = tuple(range(-len(channels), 0))
    dot, norm = dot.movedim(channels, last), norm.movedim(channels, last)
    constants = tuple(
        tensor.movedim(tuple(range(len(last))), last) if tensor is not None and tensor.dim() else tensor
        for tensor in constants
    )
    answer = _Response.apply(response, dtype, 1, torch.is_grad_enabled(), dot, norm, *constants)
    return answer.movedim(last, channels)


def respond_homogeneously(
    dot: Tensor, gain: Tensor, bias: Tensor | None, degree: int, ratio: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return ``dot · ratio(dot) · gain + bias`` with a map ``gain``; the derivative of ``c · ratio(c)`` is its degree
    times the ratio.
    """
    if _eager():
        return _HomogeneousResponse.apply(dot, gain, bias, degree, ratio, torch.is_grad_enabled())
    return _homogeneous_response(dot, gain, bias, degree, ratio)


@torch.library.custom_op("decoupled_zoo::materialise", mutates_args=())
def _materialise(map: Tensor) -> Tensor:
    return map.clone()


@_materialise.register_fake
def _(map: Tensor) -> Tensor:
    return torch.empty_like(map)


_materialise.register_autograd(lambda context, gradient: materialise(gradient))


def _backward(function: Callable[..., Any]) -> staticmethod:
    """Make a static method that runs outside autocast, as the forward pass did, wherever the loss is differentiated."""

    @wraps(function)
    def backward(context: Any, *gradients: Tensor | None) -> Any:
        (device,) = {gradient.device.type for gradient in gradients if gradient is not None} or {"cpu"}
        with no_autocast(device):
            return function(context, *gradients)

    return staticmethod(backward)


class _SumOfSquares(Function):
    @staticmethod
    def forward(context: FunctionCtx, values: Tensor) -> tuple[Tensor, Tensor]:
        context.set_materialize_grads(False)
        context.save_for_backward(values)
        return values, _squares(values, (-3,))

    @_backward
    def backward(context: Any, gradient: Tensor | None, of_squares: Tensor | None) -> Tensor | None:
        (values,) = context.saved_tensors
        if of_squares is None:
            return gradient
        if gradient is None:
            return (2 * of_squares * values).to(values.dtype)
        if _by_definition(gradient) or gradient.dtype != of_squares.dtype:
            return (gradient + 2 * of_squares * values).to(values.dtype)
        # The gradient came from the one consumer of the first result, so nobody else holds it.
        return gradient.addcmul_(values, of_squares, value=2)


class _Scale(Function):
    @staticmethod
    def forward(context: FunctionCtx, values: Tensor, gain: Tensor) -> Tensor:
        context.save_for_backward(values, gain)
        return _scaled(values, gain)

    @_backward
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        values, gain = context.saved_tensors
        if _by_definition(gradient):
            return tuple(_gradients(_scaled, (values, gain), context.needs_input_grad, gradient))
        need_values, need_gain = context.needs_input_grad
        of_values = _scaled(gradient, gain) if need_values else None
        return of_values, _inner_product(gradient, values, gain) if need_gain else None


class _Convolution(Function):
    @staticmethod
    def forward(
        context: Any,
        input: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        multiplier: Multiplier | None,
        geometry: Geometry,
        grad_enabled: bool,
    ) -> Tensor:
        squares = None if multiplier is None else _squares(weight, (1, 2, 3))
        factor = None if multiplier is None else multiplier(squares)
        filters, late_factor = _where_to_multiply(input, weight, factor, geometry)
        scalings = [scaling for scaling in (gain, late_factor) if scaling is not None]
        output = F.conv2d(input, filters.to(input.dtype), None if scalings else bias, *geometry)
        _scale_in_place(output, scalings, bias, geometry[-1])
        kept = context.witness = None
        _, need_weight, need_gain, *_ = context.needs_input_grad
        context.needs_products = grad_enabled and (need_gain or (need_weight and late_factor is not None))
        # A bias in half precision can hide the inner product.
        if context.needs_products and (bias is None or output.dtype.itemsize > 2):
            # The output stands for the inner product, since most networks keep it anyway. An activation may overwrite
            # it, which shows in the version of an empty tensor that shares its counter.
            kept = output.data
            context.witness = output.detach()
            context.witness.data = output.new_empty(0)
            context.version = output._version
        context.multiplier, context.geometry = multiplier, geometry
        context.save_for_backward(input, weight, gain, bias, squares, kept)
        return output

    @_backward
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, gain, bias, squares, output = context.saved_tensors
        multiplier, geometry = context.multiplier, context.geometry
        needed = context.needs_input_grad[:4]
        if _by_definition(gradient):
            definition = partial(_convolution, multiplier=multiplier, geometry=geometry)
            operands = input, weight, gain, bias
            return *_gradients(definition, operands, needed, gradient), None, None, None
        need_input, need_weight, need_gain, need_bias = needed
        factor = None
        if multiplier is not None:
            squares = squares.detach().requires_grad_()
            with torch.enable_grad():
                factor = multiplier(squares)
        # Made again rather than kept, for the filters of a whole network are as large as the network.
        fixed_factor = None if factor is None else factor.detach()
        filters, late_factor = _where_to_multiply(input, weight, fixed_factor, geometry)
        filters = filters.to(input.dtype)
        scalings = [scaling for scaling in (gain, late_factor) if scaling is not None]
        *sides, groups = geometry
        of_bias = gradient.sum((0, 2, 3)) if need_bias else None
        gradient = group(gradient, groups)
        of_gain = of_factor = None
        if context.needs_products:
            offset = None if bias is None else group(bias[:, None, None], groups, 0)
            if context.witness is None or context.witness._version != context.version:
                output, offset = F.conv2d(input, filters, None, *geometry), None
                _scale_in_place(output, scalings, None, groups)
            output = group(output, groups)
            if need_gain:
                of_gain = _inner_product(gradient, output, gain, offset) / gain.where(gain != 0, 1)
            if need_weight and late_factor is not None:
                # The answer is smaller than the filters here, so it is the cheaper place to find the factor's gradient.
                products = gradient.to(factor.dtype) * (output if offset is None else output - offset)
                of_factor = products.sum((0, -2, -1)).view_as(factor) / fixed_factor
        of_dot = gradient
        for scaling in scalings:
            of_dot = _scaled(of_dot, scaling) if of_dot is gradient else of_dot.mul_(scaling)
        of_input = of_filters = None
        if need_input or need_weight:
            mask = need_input, need_weight, False
            of_input, of_filters, _ = torch.ops.aten.convolution_backward(
                ungroup(of_dot, groups), input, filters, None, *sides, False, (0, 0), groups, mask
            )
        of_weight = of_filters if of_filters is None else of_filters.to(weight.dtype)
        if need_weight and multiplier is not None:
            if of_factor is None:
                of_factor = _inner_product(of_weight, weight, squares)
                of_weight = of_weight * fixed_factor
            (of_squares,) = torch.autograd.grad(factor, squares, of_factor)
            of_weight = of_weight.addcmul_(weight, of_squares, value=2)
        return of_input, of_weight, of_gain, of_bias, None, None, None


class _HomogeneousResponse(Function):
    @staticmethod
    def forward(
        context: Any,
        dot: Tensor,
        gain: Tensor,
        bias: Tensor | None,
        degree: int,
        ratio: Callable[[Tensor], Tensor],
        grad_enabled: bool,
    ) -> Tensor:
        differentiable = grad_enabled and any(context.needs_input_grad)
        if differentiable:
            context.degree, context.ratio = degree, ratio
            context.save_for_backward(dot, gain, bias)
        output = torch.empty_like(dot) if differentiable else dot
        for band in _bands(dot, dot.dim() - 2):
            values = ratio(dot[band])
            values *= dot[band]
            if bias is None:
                torch.mul(values, gain[band], out=output[band])
            else:
                torch.addcmul(bias, values, gain[band], out=output[band])
        return output

    @_backward
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        operands, needed = context.saved_tensors, context.needs_input_grad[:3]
        degree, ratio = context.degree, context.ratio
        if _by_definition(gradient):
            definition = partial(_homogeneous_response, degree=degree, ratio=ratio)
            return *_gradients(definition, operands, needed, gradient), None, None, None
        dot, gain, _ = operands
        of_dot, of_gain = torch.empty_like(dot), torch.empty_like(gain)
        for band in _bands(dot, dot.dim() - 2):
            values = ratio(dot[band])
            values *= gradient[band]
            torch.mul(values, degree * gain[band], out=of_dot[band])
            values *= dot[band]
            torch.sum(values, -3, keepdim=True, out=of_gain[band])
        of_bias = gradient.sum((0, -2, -1))[..., None, None] if needed[2] else None
        return of_dot, of_gain, of_bias, None, None, None


class _Response(Function):
    @staticmethod
    def forward(
        context: Any,
        response: Callable[..., Tensor],
        dtype: torch.dtype,
        rows: int,
        grad_enabled: bool,
        dot: Tensor,
        norm: Tensor,
        *constants: Tensor | None,
    ) -> Tensor:
        differentiable = grad_enabled and any(context.needs_input_grad)
        if differentiable:
            context.response, context.rows = response, rows
            context.save_for_backward(dot, norm, *constants)
        output = dot if dtype == dot.dtype and not differentiable else torch.empty_like(dot, dtype=dtype)
        for band in _bands(dot, rows):
            output[band] = response(dot[band], norm[band], *constants)
        return output

    @_backward
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        operands, needed = context.saved_tensors, context.needs_input_grad[4:]
        if _by_definition(gradient):
            return (
                None,
                None,
                None,
                None,
                *_gradients(context.response, operands, needed, gradient),
            )
        dot, norm, *constants = operands
        totals = [torch.empty_like(dot), torch.empty_like(norm)]
        totals += [None if constant is None else torch.zeros_like(constant) for constant in constants]
        for band in _bands(dot, context.rows):
            parts = _gradients(context.response, (dot[band], norm[band], *constants), needed, gradient[band])
            for place, (total, part) in enumerate(zip(totals, parts, strict=True)):
                if part is not None and place < 2:
                    total[band] = part
                elif part is not None:
                    total += part
        return None, None, None, None, *(total if need else None for total, need in zip(totals, needed, strict=True))


def _gradients(
    response: Callable[..., Tensor],
    operands: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    gradient: Tensor,
) -> list[Tensor | None]:
    """Return the gradient of ``response`` with respect to each operand that needs one."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, where the graph goes on: a gradient must not follow one operand's history to another operand.
        leaves = [
            operand if not need else operand.view_as(operand) if create_graph else operand.detach().requires_grad_()
            for operand, need in zip(operands, needed, strict=True)
        ]
        answer = response(*leaves)
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            answer, wanted, gradient.to(answer.dtype), create_graph=create_graph, materialize_grads=True
        )
    )
    return [next(found) if need else None for need in needed]


def _homogeneous_response(
    dot: Tensor, gain: Tensor, bias: Tensor | None, degree: int, ratio: Callable[[Tensor], Tensor]
) -> Tensor:
    answer = dot * ratio(dot) * materialise(gain)
    return answer if bias is None else answer + bias


def _where_to_multiply(
    input: Tensor, weight: Tensor, factor: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor | None]:
    """Return the filters to convolve with, and their factor if it is left to be multiplied with the answer.

    It goes to the smaller of filters and answer.
    """
    (down, right), *_, groups = geometry
    pixels = input.shape[0] * (input.shape[2] // down) * (input.shape[3] // right)
    if factor is None or weight[0].numel() <= pixels:
        return weight if factor is None else weight * factor, None
    return weight, group(factor.squeeze(-1), groups, 0)


def _scale_in_place(dot: Tensor, scalings: list[Tensor], bias: Tensor | None, groups: int) -> None:
    """Make ``dot`` the product of it and the scalings, plus the bias; without scalings leave it alone."""
    if not scalings:
        return
    grouped = group(dot, groups)
    *others, last = scalings
    for scaling in others:
        grouped.mul_(scaling)
    if bias is None:
        grouped.mul_(last)
    else:
        torch.addcmul(group(bias[:, None, None], groups, 0), grouped, last, out=grouped)


def _convolution(
    input: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    multiplier: Multiplier | None,
    geometry: Geometry,
) -> Tensor:
    factors = [] if gain is None else [materialise(gain)]
    if multiplier is not None:
        factor = multiplier(weight.square().sum((1, 2, 3), keepdim=True))
        factors.append(group(factor.squeeze(-1), geometry[-1], 0))
    dot = F.conv2d(input, weight.to(input.dtype), None if factors else bias, *geometry)
    if not factors:
        return dot
    # A compiler joins these products with whatever follows; filters multiplied beforehand it would keep.
    answer = ungroup(math.prod(factors, start=group(dot, geometry[-1])), geometry[-1])
    return (answer if bias is None else answer + bias[:, None, None]).to(dot.dtype)


def _squares(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    dtype = torch.promote_types(values.dtype, torch.float32)
    if not _eager() or values.device.type != "cpu":
        return values.to(dtype).square().sum(dims, keepdim=True)
    if all(values.shape[dim] == 1 for dim in dims):
        return values.to(dtype).square()
    if values.dtype == dtype and 1 in (values.stride(dim) for dim in dims):
        # Along adjacent elements one pass without a copy, the square root included; slow along others.
        total = torch.linalg.vector_norm(values, dim=dims, keepdim=True).square_()
    else:
        total = values.to(dtype).square().sum(dims, keepdim=True)
    if values.dim() == 5 and values.stride(1) < values.stride(-1):
        # The map of groups has the memory format of what it is going to be multiplied with.
        total = total.squeeze(2).contiguous(memory_format=torch.channels_last).unsqueeze(2)
    return total


def _scaled(values: Tensor, gain: Tensor) -> Tensor:
    return (values * gain).to(values.dtype)


def _inner_product(left: Tensor, right: Tensor, like: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return ``Σ left · (right - offset)`` over the dimensions in which ``like`` has size 1, in its shape and dtype."""
    total = torch.empty_like(like)
    for band in _bands(left, None if like.shape[-2] != left.shape[-2] else left.dim() - 2):
        second = right[band] if offset is None else right[band] - offset
        total[band] = (left[band].to(like.dtype) * second).sum_to_size(total[band].shape)
    return total


def _bands(tensor: Tensor, rows: int | None) -> Iterator[tuple[slice, ...]]:
    """Yield indices that cut a tensor into bands: along its first dimension and, if need be, the dimension ``rows``."""
    band = BAND * torch.get_num_threads()
    if tensor.device.type != "cpu" or tensor.numel() <= band:
        yield (slice(None),)
        return
    size = tensor.numel() // tensor.shape[0]
    step = max(1, band // size)
    if size <= band or rows is None:
        yield from ((slice(start, start + step),) for start in range(0, tensor.shape[0], step))
        return
    height = tensor.shape[rows]
    step = max(1, band * height // size)
    for image in range(tensor.shape[0]):
        for row in range(0, height, step):
            yield slice(image, image + 1), *[slice(None)] * (rows - 1), slice(row, row + step)


def _by_definition(gradient: Tensor) -> bool:
    """Whether the backward pass is differentiated again, or takes many gradients at once (a vectorised jacobian)."""
    return torch.is_grad_enabled() or "Batched" in torch._C._dispatch_key_set(gradient)


def _eager() -> bool:
    """Whether operations run as they are called: no compiler, exporter, tracer or function transform is at work."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
