"""How exactly products are computed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch

# Where torch keeps the precision in which float32 is multiplied, by the kind of device.
SETTINGS = {"cpu": ("mkldnn.matmul", "mkldnn.conv"), "cuda": ("cuda.matmul", "cudnn.conv")}
# What stands for less than float32.
ROUNDED = ("tf32", "bf16")

# The settings that are changed for now: what they were, and for how many.
_CHANGED: dict[str, tuple[str, int]] = {}
_LOCK = threading.Lock()


@contextmanager
def exact_arithmetic(device: torch.device | str) -> Iterator[None]:
    """While it lasts, products on such a device are computed in full float32, in whatever threads.

    torch's settings are those of the whole process. They are put back when the last one leaves.
    """
    names = SETTINGS.get(torch.device(device).type, ())
    with _LOCK:
        mine = [name for name in names if name in _CHANGED or _backend(name).fp32_precision in ROUNDED]
        for name in mine:
            before, users = _CHANGED.get(name, (_backend(name).fp32_precision, 0))
            _CHANGED[name] = before, users + 1
            _backend(name).fp32_precision = "ieee"
    try:
        yield
    finally:
        with _LOCK:
            for name in mine:
                before, users = _CHANGED.pop(name)
                if users > 1:
                    _CHANGED[name] = before, users - 1
                else:
                    _backend(name).fp32_precision = before


def _backend(name: str) -> Any:
    return attrgetter(name)(torch.backends)
