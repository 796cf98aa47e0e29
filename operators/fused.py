"""The passes over whole tensors that a decoupled convolution makes beside its convolution, each as cheap as it can be.

Every function here states one line of mathematics. Compilers, exporters and function transforms get that line. In
eager mode its gradient is written by hand, so that nothing is kept but inputs and outputs, and on a CPU the work goes
in bands that stay in the cache, for a large temporary tensor costs more than the arithmetic. A gradient that is to be
differentiated again is built of differentiable operations.

Shapes: ``values`` and ``dot`` are (N, G, C / G, H, W), a map of one number for each patch and group (N, G, 1, H, W).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function, FunctionCtx

Pair = tuple[int, int]
# Stride, padding, dilation and groups of a convolution.
Geometry = tuple[Pair, Pair, Pair, int]
Multiplier = Callable[[Tensor], Tensor]

# Elements of a band: few enough for the cache of one core, enough to keep several cores busy.
BAND = 1 << 17


def group(tensor: Tensor, groups: int, dim: int = 1) -> Tensor:
    """Return ``tensor`` with its channels, in dimension ``dim``, as (groups, channels / groups)."""
    return tensor.unflatten(dim, (groups, -1))


def sum_of_squares(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``values`` and the map ``Σ values²`` over the channels of each group, in at least float32.

    Whatever else needs ``values`` should take the first result: its gradient then arrives here first, and the squares'
    gradient is added to it in place.
    """
    return _SumOfSquares.apply(values) if _eager() else (values, _squares(values, (2,)))


def scale(values: Tensor, gain: Tensor) -> Tensor:
    """Return ``values · gain`` with a map ``gain``, in the dtype of ``values``."""
    return _Scale.apply(values, gain) if _eager() else _scaled(values, gain)


def convolve(
    input: Tensor,
    weight: Tensor,
    multiplier: Multiplier | None,
    gain: Tensor | None,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
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
        input, gain = scale(group(input, groups), gain).flatten(1, 2), None
    function = _Convolution.apply if _eager() else _convolution
    return function(input, weight, gain, bias, multiplier, (stride, padding, dilation, groups))


def respond(
    response: Callable[..., Tensor], dtype: torch.dtype, dot: Tensor, norm: Tensor, *constants: Tensor | None
) -> Tensor:
    """Return ``response(dot, norm, *constants)`` as ``dtype``, in the shape and memory format of ``dot``.

    Args:
        response: works on each pixel by itself.
        norm: a map.
        constants: tensors without batch, height and width, which ``response`` gets whole.
    """
    if _eager():
        return _Response.apply(response, dtype, dot, norm, *constants)
    return response(dot, norm, *constants).to(dtype)


class _SumOfSquares(Function):
    @staticmethod
    def forward(context: FunctionCtx, values: Tensor) -> tuple[Tensor, Tensor]:
        context.set_materialize_grads(False)
        context.save_for_backward(values)
        return values, _squares(values, (2,))

    @staticmethod
    def backward(context: Any, gradient: Tensor | None, of_squares: Tensor | None) -> Tensor | None:
        (values,) = context.saved_tensors
        if of_squares is None:
            return gradient
        if gradient is None:
            return (2 * of_squares * values).to(values.dtype)
        if torch.is_grad_enabled() or gradient.dtype != of_squares.dtype:
            return (gradient + 2 * of_squares * values).to(values.dtype)
        # The gradient came from the one consumer of the first result, so nobody else holds it.
        return gradient.addcmul_(values, of_squares, value=2)


class _Scale(Function):
    @staticmethod
    def forward(context: FunctionCtx, values: Tensor, gain: Tensor) -> Tensor:
        context.save_for_backward(values, gain)
        return _scaled(values, gain)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        values, gain = context.saved_tensors
        if torch.is_grad_enabled():
            return tuple(_gradients(_scaled, (values, gain), context.needs_input_grad, gradient, create_graph=True))
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
    ) -> Tensor:
        squares = None if multiplier is None else _squares(weight, (1, 2, 3))
        filters = weight if multiplier is None else weight * multiplier(squares)
        output = F.conv2d(input, filters.to(input.dtype), bias if gain is None else None, *geometry)
        if gain is not None:
            _affine(output, gain, bias, geometry[-1], out=output)
        kept = None
        if context.needs_input_grad[2]:
            # The output stands for the inner product, since most networks keep it anyway. An activation may overwrite
            # it, which shows in the version of an empty tensor that shares its counter.
            kept = output.data
            context.witness = output.detach()
            context.witness.data = output.new_empty(0)
            context.version = output._version
        context.multiplier, context.geometry = multiplier, geometry
        context.save_for_backward(input, weight, gain, bias, squares, kept)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, gain, bias, squares, output = context.saved_tensors
        multiplier, geometry = context.multiplier, context.geometry
        needed = context.needs_input_grad[:4]
        if torch.is_grad_enabled():
            definition = partial(_convolution, multiplier=multiplier, geometry=geometry)
            operands = input, weight, gain, bias
            return *_gradients(definition, operands, needed, gradient, create_graph=True), None, None
        need_input, need_weight, need_gain, need_bias = needed
        filters = weight
        if multiplier is not None:
            squares = squares.detach().requires_grad_()
            with torch.enable_grad():
                factor = multiplier(squares)
            # Made again rather than kept, for the filters of a whole network are as large as the network.
            filters = weight * factor.detach()
        filters = filters.to(input.dtype)
        groups = geometry[-1]
        of_bias = gradient.sum((0, 2, 3)) if need_bias else None
        of_gain = None
        if need_gain and context.witness._version == context.version:
            offset = None if bias is None else group(bias[:, None, None], groups, 0)
            of_gain = _inner_product(group(gradient, groups), group(output, groups), gain, offset)
            of_gain /= gain.where(gain != 0, 1)
        elif need_gain:
            dot = F.conv2d(input, filters, None, *geometry)
            of_gain = _inner_product(group(gradient, groups), group(dot, groups), gain)
        of_dot = gradient if gain is None else scale(group(gradient, groups), gain).flatten(1, 2)
        *sides, _ = geometry
        mask = need_input, need_weight, False
        of_input, of_filters, _ = torch.ops.aten.convolution_backward(
            of_dot, input, filters, None, *sides, False, (0, 0), groups, mask
        )
        of_weight = of_filters if of_filters is None else of_filters.to(weight.dtype)
        if need_weight and multiplier is not None:
            (of_squares,) = torch.autograd.grad(factor, squares, _inner_product(of_weight, weight, squares))
            of_weight = (of_weight * factor.detach()).addcmul_(weight, of_squares, value=2)
        return of_input, of_weight, of_gain, of_bias, None, None


class _Response(Function):
    @staticmethod
    def forward(
        context: Any,
        response: Callable[..., Tensor],
        dtype: torch.dtype,
        dot: Tensor,
        norm: Tensor,
        *constants: Tensor | None,
    ) -> Tensor:
        differentiable = any(context.needs_input_grad)
        if differentiable:
            context.response = response
            context.save_for_backward(dot, norm, *constants)
        output = dot if dtype == dot.dtype and not differentiable else torch.empty_like(dot, dtype=dtype)
        for band in _bands(dot):
            output[band] = response(dot[band], norm[band], *constants)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        operands, needed = context.saved_tensors, context.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_gradients(context.response, operands, needed, gradient, create_graph=True)
        dot, norm, *constants = operands
        totals = [torch.empty_like(dot), torch.empty_like(norm), *(_zeros_like(constant) for constant in constants)]
        for band in _bands(dot):
            parts = _gradients(context.response, (dot[band], norm[band], *constants), needed, gradient[band])
            for place, (total, part) in enumerate(zip(totals, parts, strict=True)):
                if part is not None and place < 2:
                    total[band] = part
                elif part is not None:
                    total += part
        return None, None, *(total if need else None for total, need in zip(totals, needed, strict=True))


def _gradients(
    response: Callable[..., Tensor],
    operands: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    gradient: Tensor,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Return the gradient of ``response`` with respect to each operand that needs one."""
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


def _convolution(
    input: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    multiplier: Multiplier | None,
    geometry: Geometry,
) -> Tensor:
    if multiplier is not None:
        weight = weight * multiplier(weight.square().sum((1, 2, 3), keepdim=True))
    dot = F.conv2d(input, weight.to(input.dtype), bias if gain is None else None, *geometry)
    return dot if gain is None else _affine(dot, gain, bias, geometry[-1]).to(dot.dtype)


def _squares(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    dtype = torch.promote_types(values.dtype, torch.float32)
    if _eager() and values.dtype == dtype and values.device.type == "cpu" and 1 in (values.stride(dim) for dim in dims):
        # Along adjacent elements one pass without a copy, the square root included; slow along others.
        return torch.linalg.vector_norm(values, dim=dims, keepdim=True).square_()
    return values.to(dtype).square().sum(dims, keepdim=True)


def _scaled(values: Tensor, gain: Tensor) -> Tensor:
    return (values * gain).to(values.dtype)


def _affine(dot: Tensor, gain: Tensor, bias: Tensor | None, groups: int, out: Tensor | None = None) -> Tensor:
    """Return ``dot · gain + bias``, of the dtype that the operands have in common or, in place, in ``out``."""
    out = out if out is None else group(out, groups)
    if bias is None:
        return torch.mul(group(dot, groups), gain, out=out).flatten(1, 2)
    return torch.addcmul(group(bias[:, None, None], groups, 0), group(dot, groups), gain, out=out).flatten(1, 2)


def _inner_product(left: Tensor, right: Tensor, like: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return ``Σ left · (right - offset)`` over the dimensions in which ``like`` has size 1, in its shape and dtype."""
    total = torch.empty_like(like)
    for band in _bands(left):
        second = right[band] if offset is None else right[band] - offset
        total[band] = (left[band].to(like.dtype) * second).sum_to_size(total[band].shape)
    return total


def _bands(tensor: Tensor) -> Iterator[tuple[slice, ...]]:
    """Yield indices that cut a tensor along its first and its last but one dimension into bands, all of it on a GPU."""
    count, rows = tensor.shape[0], tensor.shape[-2]
    if tensor.device.type != "cpu" or tensor.numel() <= BAND:
        yield (slice(None),)
        return
    size = tensor.numel() // count
    if size <= BAND or tensor.dim() != 5:
        step = max(1, BAND // size)
        yield from ((slice(start, start + step),) for start in range(0, count, step))
        return
    step = max(1, BAND * rows // size)
    for image in range(count):
        for row in range(0, rows, step):
            yield slice(image, image + 1), slice(None), slice(None), slice(row, row + step)


def _zeros_like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor)


def _eager() -> bool:
    """Whether operations run as they are called: no compiler, exporter, tracer or function transform is at work."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )
