"""The passes of ``operators.passes`` with their gradients, and the convolution between them.

Compilers, exporters and function transforms get the mathematics. In eager mode each gradient is written by hand, so
that nothing is kept but inputs and outputs. A gradient that is to be differentiated again is built of differentiable
operations.

Shapes: ``values``, ``input`` and ``dot`` are (N, C, H, W), a map of one number for each patch and group is
(N, groups, H, W).
"""

import contextlib
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function, FunctionCtx

from operators import kernels, passes
from operators.kernels import Operator, Windows, wide
from operators.passes import Multiplier, bands, group, per_channel, ungroup

# Stride, padding, dilation and groups of a convolution.
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
Radius = Tensor | float

# Asked once, for torch 2.11 cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu", "hpu", "xla") if torch.amp.is_autocast_available(device)
)


def eager() -> bool:
    """Whether operations run as they are called: no compiler, exporter, tracer or function transform is at work."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def no_autocast(device: str) -> contextlib.AbstractContextManager:
    """Return a context in which operations keep the dtypes of their operands."""
    device = device if device in AUTOCAST_DEVICES else "cpu"
    # Entering one costs as much as a small operation.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def materialise(map: Tensor) -> Tensor:
    """Return ``map``; a compiler then computes it, and its gradient, once for each patch and not for each channel."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    transformed = torch._C._are_functorch_transforms_active()
    return torch.ops.decoupled_zoo.materialise(map) if compiling and not transformed else map


def sum_of_squares(values: Tensor, groups: int, windows: Windows) -> tuple[Tensor, Tensor]:
    """Return ``values`` and the map ``Σ values²`` over each group and window, in at least float32.

    Whatever else needs ``values`` should take the first result: its gradient then arrives here first, and the squares'
    gradient is added to it in place.
    """
    if eager():
        return _apply(_SumOfSquares, values, groups, windows)
    return values, _sum_of_squares(values, groups, windows)


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
    degree: int = 1,
) -> Tensor:
    """Return ``d · |d|^(degree - 1) · gain + bias`` with ``d = conv2d(input, w · multiplier)``: (N, K, H', W').

    Args:
        multiplier: of the filters ``w``; None for 1.
        gain: a map; None for 1.
        degree: 1 or, with a gain, 2.
    """
    pointwise = weight.shape[-2:] == (1, 1) and stride == (1, 1) and padding == (0, 0)
    if gain is not None and degree == 1 and pointwise and input.shape[1] < weight.shape[0]:
        # A convolution of single pixels commutes with the scaling, and its input is the smaller of the two.
        input = _apply(_Scale, input, gain, groups) if eager() else _finished(input, gain, None, groups, 1)
        gain = None
    geometry = stride, padding, dilation, groups
    if multiplier is not None and multiplier.is_one:
        multiplier = None
    if eager():
        return _apply(_Convolution, input, weight, gain, bias, multiplier, geometry, degree)
    return _convolution(input, weight, gain, bias, multiplier, geometry, degree)


def gain(function: Callable[..., Tensor], operator: Operator | None, degree: int, total: Tensor, radius: Radius):
    """Return the map ``function(total, radius)``.

    Args:
        function: gives ``h(n) / n^degree`` for ``n = sqrt(total + eps)``.
        operator: what ``function`` computes; None if no loop knows it.
        radius: one for the layer.
    """
    if operator is None or not eager() or not kernels.covers(total):
        answer = function(total, radius)
        # Mathematics of one's own may give one number for all patches, or another dtype.
        return torch.as_tensor(answer, dtype=total.dtype, device=total.device).expand_as(total)
    radius = torch.as_tensor(radius, dtype=total.dtype, device=total.device)
    return _apply(_Gain, total, radius, function, operator, degree)


def respond(
    function: Callable[..., Tensor],
    operator: Operator | None,
    dot: Tensor,
    total: Tensor,
    radius: Radius,
    factor: Tensor | None,
    bias: Tensor | None,
    groups: int,
) -> Tensor:
    """Return ``function(dot, total, radius, factor, bias)``, as ``dot``.

    Args:
        function: gives ``factor · h(n) · g(dot / n) + bias`` for ``n = sqrt(total + eps)``, pixel by pixel, for grouped
            operands in at least float32.
        operator: what ``function`` computes; None if no loop knows it.
        total: a map.
        radius, factor, bias: (channels, 1, 1); the radius may also be one for the layer.
    """
    if operator is not None and eager() and kernels.covers(dot, total, factor, bias):
        radius = torch.as_tensor(radius, dtype=total.dtype, device=total.device)
        return _apply(_Response, dot, total, radius, factor, bias, function, operator, groups)
    if dot.shape[1] == groups:
        # A filter in each group: the map has the shape of the answer.
        groups = 1
    shaped = [
        constant if not by_channel(constant) else group(constant, groups, 0) for constant in (radius, factor, bias)
    ]
    dot, total = group(dot, groups), per_channel(total, groups)
    return ungroup(_respond_in_bands(function, dot, total, *shaped), groups)


def _respond_in_bands(
    function: Callable[..., Tensor], dot: Tensor, total: Tensor, radius: Radius, *constants: Tensor | None
) -> Tensor:
    """Return what :func:`respond` does, for operands that are grouped already."""
    fixed = None if isinstance(radius, Tensor) else radius

    def widened(dot: Tensor, total: Tensor, radius: Tensor | None, *constants: Tensor | None) -> Tensor:
        answer = function(dot.to(wide(dot.dtype)), total, fixed if radius is None else radius, *constants)
        return answer.to(dot.dtype)

    constants = (None if fixed is not None else radius, *constants)
    if not eager():
        return widened(dot, total if total.shape == dot.shape else materialise(total), *constants)
    if dot.stride(-3) != 1:
        return _apply(_BandedResponse, widened, dot.dim() - 2, dot, total, *constants)
    # What is computed of map and constants alone has its channels innermost only if they are the last dimensions.
    channels = tuple(range(1, dot.dim() - 2))
    last = tuple(range(-len(channels), 0))
    dot, total = dot.movedim(channels, last), total.movedim(channels, last)
    constants = tuple(
        tensor.movedim(tuple(range(len(last))), last) if by_channel(tensor) else tensor for tensor in constants
    )
    answer = _apply(_BandedResponse, widened, 1, dot, total, *constants)
    return answer.movedim(last, channels)


@torch.library.custom_op("decoupled_zoo::materialise", mutates_args=())
def _materialise(map: Tensor) -> Tensor:
    return map.clone()


@_materialise.register_fake
def _(map: Tensor) -> Tensor:
    return torch.empty_like(map)


_materialise.register_autograd(lambda context, gradient: materialise(gradient))


class _Unrecorded:
    """Stands in for the context of a function whose result will not be differentiated."""

    needs_input_grad = (False,) * 9

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def _apply(function: type[Function], *arguments: Any) -> Any:
    """Apply ``function``; in inference without what autograd's own call costs, a third of a small layer's time."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_Unrecorded(), *arguments)


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
    def forward(context: FunctionCtx, values: Tensor, groups: int, windows: Windows) -> tuple[Tensor, Tensor]:
        context.set_materialize_grads(False)
        context.groups, context.windows = groups, windows
        context.save_for_backward(values)
        return values, passes.sum_of_squares(values, groups, windows)

    @_backward
    def backward(context: Any, gradient: Tensor | None, of_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        (values,) = context.saved_tensors
        if of_sum is None:
            return gradient, None, None
        if _by_definition(of_sum if gradient is None else gradient):
            definition = partial(_sum_of_squares, groups=context.groups, windows=context.windows)
            (of_values,) = _gradients(definition, (values,), (True,), of_sum)
            return of_values if gradient is None else gradient + of_values, None, None
        # The gradient came from the one consumer of the first result, so nobody else holds it.
        return passes.add_gradient_of_squares(gradient, values, of_sum, context.groups, context.windows), None, None


class _Scale(Function):
    @staticmethod
    def forward(context: Any, values: Tensor, map: Tensor, groups: int) -> Tensor:
        context.groups = groups
        context.save_for_backward(values, map)
        return passes.scale(values, map, groups)

    @_backward
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, map = context.saved_tensors
        if _by_definition(gradient):
            definition = partial(_finished, bias=None, groups=context.groups, degree=1)
            return *_gradients(definition, (values, map), context.needs_input_grad[:2], gradient), None
        # The gradient of the map is the sum that scale_backward takes of the answer, taken of the values.
        return *passes.scale_backward(gradient, values, map, context.groups), None


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
        degree: int,
    ) -> Tensor:
        context.multiplier, context.geometry, context.degree = multiplier, geometry, degree
        output = _answer(context, input, weight, gain, bias)
        kept = context.witness = None
        need_input, need_weight, need_gain, *_ = context.needs_input_grad
        context.needs_output = need_gain or (degree > 1 and (need_input or need_weight))
        # A bias in half precision can hide the product.
        if context.needs_output and (bias is None or output.dtype.itemsize > 2):
            # The output stands for the inner product, since most networks keep it anyway. An activation may overwrite
            # it, which shows in the version of an empty tensor that shares its counter.
            kept = output.data
            context.witness = output.detach()
            context.witness.data = output.new_empty(0)
            context.version = output._version
        context.save_for_backward(input, weight, gain, bias, kept)
        return output

    @_backward
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, gain, bias, output = context.saved_tensors
        multiplier, geometry, degree = context.multiplier, context.geometry, context.degree
        needed = context.needs_input_grad[:4]
        if _by_definition(gradient):
            definition = partial(_convolution, multiplier=multiplier, geometry=geometry, degree=degree)
            return *_gradients(definition, (input, weight, gain, bias), needed, gradient), None, None, None
        need_input, need_weight, need_gain, need_bias = needed
        *sides, groups = geometry
        of_bias = gradient.sum((0, 2, 3), dtype=bias.dtype) if need_bias else None
        offset = bias
        if context.needs_output and (context.witness is None or context.witness._version != context.version):
            output, offset = _answer(context, input, weight, gain, None), None
        of_dot, of_gain = gradient, None
        if context.needs_output:
            of_dot, products = passes.scale_backward(gradient, output, gain, groups, offset, degree)
            of_gain = products / gain.where(gain != 0, 1) if need_gain else None
        elif gain is not None:
            of_dot = passes.scale(gradient, gain, groups)
        of_input = of_weight = None
        if need_input or need_weight:
            # Made again rather than kept, for the filters of a whole network are as large as the network.
            filters, mask = _filters(context, weight, input.dtype), (need_input, need_weight, False)
            of_input, of_weight, _ = torch.ops.aten.convolution_backward(
                of_dot, input, filters, None, *sides, False, (0, 0), groups, mask
            )
        if need_weight:
            if multiplier is None:
                of_weight = of_weight.to(weight.dtype)
            else:
                of_weight = passes.multiply_filters_backward(of_weight, weight, multiplier)
        return of_input, of_weight, of_gain, of_bias, None, None, None


def _filters(context: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the filters to convolve with."""
    multiplier = context.multiplier
    return weight.to(dtype) if multiplier is None else passes.multiply_filters(weight, multiplier, dtype)


def _answer(context: Any, input: Tensor, weight: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return the answer of a convolution."""
    filters, *sides, groups = _filters(context, weight, input.dtype), *context.geometry
    if gain is None:
        return F.conv2d(input, filters, None if bias is None else bias.to(input.dtype), *sides, groups)
    output = F.conv2d(input, filters, None, *sides, groups)
    return passes.scale(output, gain, groups, bias, context.degree, into=output)


class _Gain(Function):
    @staticmethod
    def forward(
        context: Any,
        total: Tensor,
        radius: Tensor,
        function: Callable[..., Tensor],
        operator: Operator,
        degree: int,
    ) -> Tensor:
        context.function, context.operator, context.degree = function, operator, degree
        context.save_for_backward(total, radius)
        return kernels.gain(total, radius, operator, degree)

    @_backward
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, radius = context.saved_tensors
        if _by_definition(gradient):
            needed = context.needs_input_grad[:2]
            return *_gradients(context.function, (total, radius), needed, gradient), None, None, None
        return *kernels.gain_backward(gradient, total, radius, context.operator, context.degree), None, None, None


class _Response(Function):
    @staticmethod
    def forward(
        context: Any,
        dot: Tensor,
        total: Tensor,
        radius: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        function: Callable[..., Tensor],
        operator: Operator,
        groups: int,
    ) -> Tensor:
        differentiable = any(context.needs_input_grad)
        if differentiable:
            context.function, context.operator, context.groups = function, operator, groups
            context.save_for_backward(dot, total, radius, factor, bias)
        answer = torch.empty_like(dot) if differentiable else dot
        return kernels.respond(dot, total, radius, factor, bias, operator, groups, answer)

    @_backward
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dot, total, radius, factor, bias = context.saved_tensors
        operator, groups, needed = context.operator, context.groups, context.needs_input_grad[:5]
        if _by_definition(gradient):

            def definition(*operands: Tensor | None) -> Tensor:
                return respond(context.function, None, *operands, groups)

            return *_gradients(definition, (dot, total, radius, factor, bias), needed, gradient), *[None] * 3
        of_dot, of_total, of_radius, of_factor = kernels.respond_backward(
            gradient, dot, total, radius, factor, operator, groups, need_constants=needed[2] or needed[3]
        )
        of_factor = of_factor.to(factor.dtype).view_as(factor) if needed[3] else None
        if needed[2]:
            of_radius = of_radius.view_as(radius) if radius.numel() > 1 else of_radius.sum().view_as(radius)
        else:
            of_radius = None
        of_bias = gradient.sum((0, 2, 3), dtype=bias.dtype).view_as(bias) if needed[4] else None
        return of_dot, of_total, of_radius, of_factor, of_bias, None, None, None


class _BandedResponse(Function):
    @staticmethod
    def forward(
        context: Any,
        function: Callable[..., Tensor],
        rows: int,
        dot: Tensor,
        total: Tensor,
        *constants: Tensor | None,
    ) -> Tensor:
        differentiable = any(context.needs_input_grad)
        if differentiable:
            context.function, context.rows = function, rows
            context.save_for_backward(dot, total, *constants)
        output = torch.empty_like(dot) if differentiable else dot
        for band in bands(dot, rows):
            output[band] = function(dot[band], total[band], *constants)
        return output

    @_backward
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        operands, needed = context.saved_tensors, context.needs_input_grad[2:]
        if _by_definition(gradient):
            return None, None, *_gradients(context.function, operands, needed, gradient)
        dot, total, *constants = operands
        totals = [torch.empty_like(dot), torch.empty_like(total)]
        totals += [None if constant is None else torch.zeros_like(constant) for constant in constants]
        for band in bands(dot, context.rows):
            parts = _gradients(context.function, (dot[band], total[band], *constants), needed, gradient[band])
            for place, (whole, part) in enumerate(zip(totals, parts, strict=True)):
                if part is not None and place < 2:
                    whole[band] = part
                elif part is not None:
                    whole += part
        return None, None, *(whole if need else None for whole, need in zip(totals, needed, strict=True))


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


def _sum_of_squares(values: Tensor, groups: int, windows: Windows) -> Tensor:
    map = passes.squares(values, groups)
    # A map for each channel is best computed together with what needs it.
    return passes.window_sum(map if values.shape[1] == groups else materialise(map), windows)


def _finished(dot: Tensor, gain: Tensor, bias: Tensor | None, groups: int, degree: int) -> Tensor:
    """Return ``dot · |dot|^(degree - 1) · gain + bias``."""
    values = group(dot, groups).to(gain.dtype)
    if degree == 2:
        values = values * values.abs()
    answer = ungroup(values * per_channel(materialise(gain), groups), groups)
    return (answer if bias is None else answer + bias[:, None, None]).to(dot.dtype)


def by_channel(constant: Radius | None) -> bool:
    return isinstance(constant, Tensor) and constant.dim() > 0


def _convolution(
    input: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    multiplier: Multiplier | None,
    geometry: Geometry,
    degree: int,
) -> Tensor:
    if multiplier is not None:
        weight = weight * multiplier(passes.squares_of_filters(weight))
    filters = weight.to(input.dtype)
    if gain is None:
        return F.conv2d(input, filters, None if bias is None else bias.to(input.dtype), *geometry)
    return _finished(F.conv2d(input, filters, None, *geometry), gain, bias, geometry[-1], degree)


def _by_definition(gradient: Tensor) -> bool:
    """Whether the backward pass is differentiated again, or takes many gradients at once (a vectorised jacobian)."""
    return torch.is_grad_enabled() or "Batched" in torch._C._dispatch_key_set(gradient)
