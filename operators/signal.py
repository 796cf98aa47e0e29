"""Tensors that are linear in the images of a batch, by rules for the functions that they go through."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]

# What a function computes of signals: it is given the function, ``one`` and the arguments. linear_map has the rules.
RULES: dict[Function, Callable[..., Any]] = {}


class NotLinearError(TypeError):
    """A function of which nobody has said what linear map it is for one image."""


class MixedImagesError(ValueError):
    """Rows of which it cannot be told which image they are of; of a single image it can."""


class Signal(Tensor):
    """A tensor that is linear in the images and in ``one``, for this batch of images.

    Attributes:
        one: what every constant that is added is multiplied by, ones (N,), so that the gradient with respect to it is
            ``β(x)`` of each image.
    """

    one: Tensor

    @classmethod
    def of(cls, values: Tensor, one: Tensor) -> "Signal":
        """Return the tensor as a signal."""
        signal = values.as_subclass(cls)
        signal.one = one
        return signal

    @classmethod
    def __torch_function__(
        cls,
        function: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute a function by its rule.

        Raises:
            NotLinearError: there is none, and the result is of floating point; or a constant would become a signal.
        """
        one = next(signal.one for signal in signals_in(args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            rule, name = RULES.get(function), getattr(function, "__name__", str(function))
            if rule is None:
                result = function(*args, **(kwargs or {}))
                if any(tensor.is_floating_point() for tensor in _tensors(result)):
                    raise NotLinearError(name)
                # Sizes, devices and choices are held fixed.
                return result
            if name.endswith("_") and not name.endswith("__") and not isinstance(args[0], Signal):
                # Others know the tensor as a constant.
                raise NotLinearError(f"{name}, which changes a constant in place")
            return _as_signals(rule(function, one, *args, **(kwargs or {})), one)


class Fixed:
    """A result that is held fixed, and no signal."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _as_signals(result: Any, one: Tensor) -> Any:
    if isinstance(result, Fixed):
        return result.value
    if isinstance(result, tuple | list):
        parts = [_as_signals(part, one) for part in result]
        # What torch returns of several values has names.
        return type(result)(parts)
    if isinstance(result, Signal):
        # Changed in place.
        result.one = one
        return result
    return Signal.of(result, one) if isinstance(result, Tensor) and result.is_floating_point() else result


def signals_in(*values: Any) -> list[Signal]:
    """Return the signals among values, and in the sequences and mappings among them."""
    return [tensor for tensor in _tensors(*values) if isinstance(tensor, Signal)]


def _tensors(*values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(*value)
        elif isinstance(value, Mapping):
            found += _tensors(*value.values())
    return found


def held(value: Any) -> Any:
    """Return a value in which nothing depends on the image any more."""
    if isinstance(value, Signal):
        return value.detach()
    return type(value)(map(held, value)) if isinstance(value, tuple | list) else value
