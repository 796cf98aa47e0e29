"""A network as the linear map that it is for one image: every factor of a signal is held fixed.

A decoupled convolution answers ``a ⟨ŵ, x⟩ + b`` with ``a = weighting(‖w‖) · h(n) · g(c) / (n c)``; a gate, a bent
activation or a normaliser multiplies its input in the same way. With each such factor held fixed, whatever a network
computes of an image ``x`` is ``W(x) · x + β(x)``, exactly. Of a product of two signals each is given half. A gate that
is added, and not multiplied by, counts as ``β``.

A :class:`Signal` is computed so: its gradient is ``W(x)``. A new function is one row of ``RULES``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from operators.angular import cosine
from operators.functional import Angular, Pair, decoupled_conv2d, filter_norm, norms_and_products
from operators.magnitude import Magnitude, unweighted
from operators.signal import RULES, Fixed, Function, MixedImagesError, NotLinearError, Signal, held, signals_in

# Below this cosine, g(c) / c is that of this cosine: all angular functions are odd.
LEAST_COSINE = 1e-6


def _spread(one: Tensor, like: Tensor) -> Tensor:
    """Return ``one`` of each image for a tensor whose first dimension counts images; of one image, for any tensor.

    Raises:
        MixedImagesError: of several images, another number of rows.
    """
    if len(one) == 1:
        return one.view([1] * like.dim())
    if not like.dim() or len(like) != len(one):
        raise MixedImagesError(f"a constant is added to a tensor of shape {tuple(like.shape)} for {len(one)} images")
    return one.view(-1, *[1] * (like.dim() - 1))


def _constant(value: Tensor | float, one: Tensor, like: Tensor) -> Tensor:
    """Return a value that is added: a constant is counted by ``one``."""
    return value if isinstance(value, Signal) else value * _spread(one, like)


def _plus(answer: Tensor, bias: Tensor | None, one: Tensor) -> Tensor:
    return answer if bias is None else answer + bias * _spread(one, answer)


def _by_channel(values: Tensor | None, dimensions: int) -> Tensor | None:
    return None if values is None else values.view(-1, *[1] * (dimensions - 2))


# The products that change their first factor, and what they compute.
IN_PLACE = {Tensor.mul_: torch.mul, Tensor.__imul__: torch.mul, Tensor.multiply_: torch.mul}


def _linear(function: Function, one: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A function that is linear in its signals, or piecewise so: what it chooses is held fixed."""
    return function(*args, **kwargs)


def _held_fixed(function: Function, one: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A gate or a norm: what others are multiplied or divided by."""
    return Fixed(function(*held(args), **{name: held(value) for name, value in kwargs.items()}))


def _bent(function: Function, one: Tensor, input: Signal, *args: Any, **kwargs: Any) -> Tensor:
    """An activation: ``f(0)``, and ``x`` times ``(f(x) - f(0)) / x``."""
    x = input.detach()
    kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
    at_zero = function(x.new_zeros(()), *args, **kwargs)
    y = function(x.clone(), *args, **kwargs)
    answer = input * torch.where(x == 0, 0, (y - at_zero) / x)
    return answer + at_zero * _spread(one, answer) if at_zero.any() else answer


def _power(function: Function, one: Tensor, input: Any, exponent: Any) -> Any:
    """A power, which is an activation from 1 on, and below it a root by which others are divided."""
    if isinstance(exponent, Tensor):
        raise NotLinearError("a power whose exponent is a tensor")
    return (_bent if exponent >= 1 else _held_fixed)(function, one, input, exponent)


def _sum(function: Function, one: Tensor, input: Any, other: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A sum, a difference, or the larger or the smaller of two."""
    like = max(signals_in(input, other), key=Tensor.dim)
    return function(_constant(input, one, like), _constant(other, one, like), *args, **kwargs)


def _extreme(function: Function, one: Tensor, input: Any, *args: Any, **kwargs: Any) -> Any:
    """The largest or smallest element along a dimension, or element by element the larger or smaller of two."""
    two = isinstance(kwargs.get("other", args[0] if args else None), Tensor)
    return (_sum if two else _linear)(function, one, input, *args, **kwargs)


def _product(function: Function, one: Tensor, input: Any, other: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A product: if both are signals, each is given half of it, which is its Shapley value."""
    if not (isinstance(input, Signal) and isinstance(other, Signal)):
        return function(input, other, *args, **kwargs)
    multiply = IN_PLACE.get(function, function)
    # Copies, since either may be changed in place before the gradient is asked for.
    first = multiply(input, other.detach().clone(), *args, **kwargs)
    product = (first + multiply(input.detach().clone(), other, *args, **kwargs)) / 2
    return input.copy_(product) if function in IN_PLACE else product


def _quotient(function: Function, one: Tensor, input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
    """A quotient, whose divisor is held fixed."""
    result = function(input, held(other), *args, **kwargs)
    return result if isinstance(input, Signal) else Fixed(result)


def _scaled_sum(function: Function, one: Tensor, input: Any, first: Any, second: Any, *, value: float = 1) -> Tensor:
    """``input + value · first · second``."""
    product = _product(torch.mul, one, first, second) * value
    if not signals_in(first, second):
        product = _constant(product, one, input)
    return _constant(input, one, product) + product


def _joined(function: Function, one: Tensor, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Tensors one after the other; constants among them are counted by ``one``."""
    return function([_constant(tensor, one, tensor) for tensor in tensors], *args, **kwargs)


def _padded(function: Function, one: Tensor, input: Signal, pad: Any, mode: str = "constant", value: Any = 0) -> Tensor:
    if value:
        raise NotLinearError(f"pad with {value}")
    return function(input, pad, mode)


def _assignment(function: Function, one: Tensor, *args: Any) -> None:
    raise NotLinearError("an assignment to a part of a tensor")


def _weighted_sum(
    function: Function,
    one: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """A plain convolution or a fully connected layer."""
    answer = function(input, weight, None, *args, **kwargs)
    return _plus(answer, bias if function is F.linear else _by_channel(bias, answer.dim()), one)


def _batch_norm(
    function: Function,
    one: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None:
        raise NotLinearError("batch_norm by the statistics of the batch, which mixes images")
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    scale, shift = (_by_channel(values, input.dim()) for values in (scale, shift))
    # One pass over the maps.
    return torch.addcmul(shift * _spread(one, input), input, scale)


def _normalised(
    one: Tensor,
    input: Tensor,
    groups: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
) -> Tensor:
    """The values of each group, (..., values), less their mean, by their standard deviation, which is held fixed."""
    fixed = groups.detach()
    variance = fixed.var(-1, correction=0, keepdim=True) if centred else fixed.square().mean(-1, keepdim=True)
    values = groups - groups.mean(-1, keepdim=True) if centred else groups
    answer = (values * (variance + eps).rsqrt()).reshape(input.shape)
    return _plus(answer if weight is None else answer * weight, bias, one)


def _layer_norm(
    function: Function,
    one: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _normalised(one, input, input.flatten(-len(normalized_shape)), weight, bias, eps)


def _rms_norm(
    function: Function,
    one: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _normalised(one, input, input.flatten(-len(normalized_shape)), weight, None, eps, centred=False)


def _group_norm(
    function: Function,
    one: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    weight, bias = (_by_channel(values, input.dim()) for values in (weight, bias))
    return _normalised(one, input, input.reshape(len(input), num_groups, -1), weight, bias, eps)


def _attention(
    function: Function, one: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Attention: how much a place looks at another is held fixed."""
    return function(held(query), held(key), value, *args, **kwargs)


def _decoupled(
    function: Function,
    one: Tensor,
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
    """A decoupled convolution: ``a ⟨ŵ, x⟩ + b`` with ``a`` held fixed."""
    n, product = norms_and_products(
        input, weight, stride, padding, dilation, groups, eps=eps, padding_mode=padding_mode
    )
    with torch.no_grad():
        factor = magnitude.gain(n, magnitude.effective_radius(n))
        if magnitude.weighting is not unweighted:
            factor = factor * magnitude.weighting(filter_norm(weight, eps=eps)).view(-1, 1, 1)
        if angular is not cosine:
            c = product / n
            c = torch.where(c.abs() < LEAST_COSINE, LEAST_COSINE, c)
            factor = factor * (angular(c) / c)
    return _plus(product * factor, _by_channel(bias, product.dim()), one)


def functions_of(name: str) -> list[Function]:
    """Return what a name stands for in ``Tensor``, ``torch``, ``torch.nn.functional`` and ``torch.linalg``."""
    found = [getattr(owner, name, None) for owner in (Tensor, torch, F, torch.linalg)]
    return [function for function in found if callable(function)]


# The names of the functions of each rule.
NAMES = {
    _linear: """
        __getitem__ __neg__ abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d
        adaptive_max_pool2d alpha_dropout amax amin avg_pool1d avg_pool2d broadcast_to
        channel_shuffle chunk clone contiguous cumsum double dropout dropout2d expand
        expand_as feature_alpha_dropout flatten flip float fold gather index_select interpolate
        leaky_relu leaky_relu_ max_pool1d max_pool2d max_pool2d_with_indices mean moveaxis
        movedim narrow native_channel_shuffle neg negative permute pixel_shuffle pixel_unshuffle
        positive prelu relu relu_ repeat repeat_interleave reshape reshape_as roll rot90 select sort
        split squeeze squeeze_ sum swapaxes swapdims t take_along_dim tile to topk transpose tril
        triu type_as unbind unflatten unfold unsqueeze unsqueeze_ upsample view view_as
    """,
    _held_fixed: "detach hardsigmoid norm rsqrt sigmoid sigmoid_ softmax sqrt std var vector_norm",
    _bent: """
        celu clamp clamp_max clamp_min clip elu gelu hardshrink hardswish hardtanh mish relu6 selu
        silu softshrink softsign square tanh tanhshrink
    """,
    _sum: "maximum minimum add add_ __add__ __iadd__ __radd__ sub sub_ __sub__ __isub__ __rsub__ rsub subtract",
    _extreme: "max min",
    _product: "mul mul_ multiply multiply_ __mul__ __imul__ __rmul__ matmul __matmul__ __rmatmul__ bmm mm",
    _quotient: "div div_ divide true_divide __truediv__ __itruediv__ __rtruediv__",
    _scaled_sum: "addcmul",
    _joined: "cat concat concatenate stack hstack vstack",
    _padded: "pad",
    _power: "pow __pow__",
    _weighted_sum: "conv1d conv2d conv3d conv_transpose2d linear",
    _batch_norm: "batch_norm",
    _layer_norm: "layer_norm",
    _rms_norm: "rms_norm",
    _group_norm: "group_norm",
    _attention: "scaled_dot_product_attention",
}

RULES |= {function: rule for rule, names in NAMES.items() for name in names.split() for function in functions_of(name)}
RULES |= {decoupled_conv2d: _decoupled, Tensor.__setitem__: _assignment}
RULES |= {Tensor.T.__get__: _linear, Tensor.mT.__get__: _linear}
