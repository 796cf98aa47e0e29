"""The loops of ``kernels.cpp``: compiled on first use, kept, and called with tensors.

They need Linux and, the first time, a C++ compiler (``CXX``, or ``c++``). Without one, or for tensors that
:func:`covers` leaves out, ``operators.passes`` uses torch's own operations. ``DECOUPLED_ZOO_KERNELS=off`` turns the
loops off.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).with_name("kernels.cpp")
SWITCH = "DECOUPLED_ZOO_KERNELS"
# As in kernels.cpp, and the most parts into which work is cut whose sums are added up afterwards.
BLOCK, UNITS = 1024, 64
MAGNITUDES = ("sphere", "ball", "tanh", "linear", "seg", "log", "mix")
ANGULARS = ("cosine", "linear", "square_cosine", "sigmoid", "power")
WEIGHTINGS = ("none", "linear", "tanh")
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}

_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
_AVX512 = ["-mavx512f", "-mavx512cd", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
_INSTRUCTIONS = {"AVX512": [*_AVX2, *_AVX512], "AVX2": _AVX2}
_OPTIONS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
_SECONDS_TO_COMPILE = 120
_OFF = ("off", "0", "false", "no")
# One thread compiles, and the others load what it kept.
_BUILDING = threading.Lock()


class Windows(NamedTuple):
    """The windows of a convolution: what of its geometry the norm of a patch depends on."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    margin: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def single_pixels(self) -> bool:
        """Whether each window is one pixel, and each pixel one window."""
        return self[:3] == ((1, 1), (1, 1), (0, 0))

    def count(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return how many rows and columns of windows an image of (height, width) has."""
        sides = zip(size, *self, strict=True)
        return tuple((side + 2 * margin - d * (k - 1) - 1) // step + 1 for side, k, step, margin, d in sides)


class Operator(NamedTuple):
    """An operator whose mathematics ``kernels.cpp`` has: places in its lists, and numbers."""

    magnitude: int
    angular: int
    alpha: float
    beta: float
    setting: float
    eps: float


class Filters(ctypes.Structure):
    """A multiplier of filters whose mathematics ``kernels.cpp`` has; the loops fill in count and size."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "size", "weighting")),
        *((name, ctypes.c_double) for name in ("constant", "eps")),
    ]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of ``dtype`` are computed with: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def covers(values: Tensor, *others: Tensor | None) -> bool:
    """Whether there are loops for these values, on a CPU and dense, and for what goes with them, on the CPU, too."""
    if values.dtype not in DTYPES or not values.numel() or _library() is None:
        return False
    # Whoever records operations does not see what is written past torch.
    if torch._C._len_torch_dispatch_stack():
        return False
    for tensor in (values, *others):
        # Subclasses may hold something else than numbers in memory.
        if tensor is not None and not (tensor.is_cpu and type(tensor) in (Tensor, nn.Parameter)):
            return False
    return values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last)


def squares(values: Tensor, groups: int) -> Tensor:
    """See :func:`operators.passes.squares`."""
    map = _empty(values, (groups, *values.shape[-2:]), wide(values.dtype))
    _call("squares", values.dtype, values, map, _shape(values, groups))
    return map


def window_sum(map: Tensor, windows: Windows, squared: bool) -> Tensor:
    """Return ``Σ map`` over each window, or ``Σ map²``."""
    answer = _empty(map, (map.shape[1], *windows.count(map.shape[-2:])), wide(map.dtype))
    _call("window_sum", map.dtype, map, answer, squared, _windows(map, answer, windows))
    return answer


def window_sum_backward(gradient: Tensor, values: Tensor, windows: Windows) -> Tensor:
    """Return the gradient of a map of the size and memory format of ``values``."""
    of_map = _empty(values, (gradient.shape[1], *values.shape[-2:]), gradient.dtype)
    gradient = _like(gradient, of_map)
    _call("window_sum_backward", gradient.dtype, gradient, of_map, _windows(of_map, gradient, windows))
    return of_map


def add_gradient_of_squares(gradient: Tensor, values: Tensor, of_squares: Tensor, groups: int) -> Tensor:
    """Return ``gradient + 2 · values · of_squares``, in the place of ``gradient`` if it has values' memory format."""
    gradient, of_squares = _like(gradient, values), _map_like(of_squares, values)
    _call("add_squares_backward", values.dtype, gradient, values, of_squares, _shape(values, groups))
    return gradient


def scale(values: Tensor, map: Tensor, groups: int, bias: Tensor | None, degree: int, answer: Tensor) -> Tensor:
    """See :func:`operators.passes.scale`; ``answer`` has the memory format of ``values``."""
    map, bias = _map_like(map, values), _constant(bias, values)
    _call("scale", values.dtype, values, map, bias, answer, degree, _shape(values, groups))
    return answer


def scale_backward(
    gradient: Tensor, answer: Tensor, map: Tensor, groups: int, bias: Tensor | None, degree: int
) -> tuple[Tensor, Tensor]:
    """See :func:`operators.passes.scale_backward`."""
    gradient, map, bias = _like(gradient, answer), _map_like(map, answer), _constant(bias, answer)
    of_values, products = torch.empty_like(answer), torch.empty_like(map)
    shape = _shape(answer, groups)
    _call("scale_backward", answer.dtype, gradient, answer, map, bias, of_values, products, degree, shape)
    return of_values, products


def gain(total: Tensor, radius: Tensor, operator: Operator, degree: int) -> Tensor:
    """Return ``h(n) / n^degree`` with ``n = sqrt(total + eps)``, for one radius."""
    answer = torch.empty_like(total)
    _call("gain", total.dtype, total, answer, radius, degree, _Operator(*operator), total.numel())
    return answer


def gain_backward(
    gradient: Tensor, total: Tensor, radius: Tensor, operator: Operator, degree: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of total and radius in :func:`gain`."""
    gradient, of_total = _like(gradient, total), torch.empty_like(total)
    of_radius = total.new_empty(-(-total.numel() // BLOCK))
    _call(
        "gain_backward",
        total.dtype,
        gradient,
        total,
        of_total,
        of_radius,
        radius,
        degree,
        _Operator(*operator),
        total.numel(),
    )
    return of_total, of_radius.sum()


def respond(
    dot: Tensor,
    total: Tensor,
    radius: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    operator: Operator,
    groups: int,
    answer: Tensor,
) -> Tensor:
    """Return ``factor · h(n) · g(dot / n) + bias`` with ``n = sqrt(total + eps)``, in ``answer``, which may be ``dot``.

    Args:
        radius: one, or one for each channel, as factor and bias are.
    """
    shape = _shape(dot, groups)
    radius, factor, bias = (_constant(item, dot) for item in (radius, factor, bias))
    constants = _Constants(*(_address(item) for item in (radius, factor, bias)), radius.numel())
    _call(
        "respond", dot.dtype, dot, _map_like(total, dot), answer, constants, _Operator(*operator), shape, _units(shape)
    )
    return answer


def respond_backward(
    gradient: Tensor,
    dot: Tensor,
    total: Tensor,
    radius: Tensor,
    factor: Tensor | None,
    operator: Operator,
    groups: int,
    need_constants: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of dot, total, radius and factor in :func:`respond`, the last two for each channel."""
    shape, units = _shape(dot, groups), _units(_shape(dot, groups))
    gradient, total = _like(gradient, dot), _map_like(total, dot)
    radius, factor = _constant(radius, dot), _constant(factor, dot)
    of_dot, of_total = torch.empty_like(dot), torch.zeros_like(total)
    of_constants = total.new_zeros(2, units, dot.shape[1]) if need_constants else None
    constants = _Constants(_address(radius), _address(factor), None, radius.numel())
    operands = gradient, dot, total, of_dot, of_total, of_constants
    _call("respond_backward", dot.dtype, *operands, constants, _Operator(*operator), shape, units)
    return of_dot, of_total, *((None, None) if of_constants is None else of_constants.sum(1))


def multiply_filters(weight: Tensor, filters: Filters, dtype: torch.dtype) -> Tensor:
    """Return ``weight`` times the factors of its filters, as ``dtype``."""
    filters.count, filters.size = len(weight), weight[0].numel()
    products = torch.empty_like(weight, dtype=dtype)
    _call("multiply_filters", dtype, weight, products, filters)
    return products


def multiply_filters_backward(gradient: Tensor, weight: Tensor, filters: Filters) -> Tensor:
    """Return the gradient of the weight in :func:`multiply_filters`."""
    filters.count, filters.size = len(weight), weight[0].numel()
    gradient, of_weight = _like(gradient, weight), torch.empty_like(weight)
    _call("multiply_filters_backward", gradient.dtype, gradient, weight, of_weight, filters)
    return of_weight


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("outer", "groups", "width", "inner")]


class _Operator(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("magnitude", "angular")),
        *((name, ctypes.c_double) for name in ("alpha", "beta", "setting", "eps")),
    ]


class _Constants(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("radius", "factor", "bias")), ("radii", ctypes.c_int64)]


class _Windows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("planes", "height", "width", "inner", "out_height", "out_width")),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "margin", "dilation")),
    ]


def _shape(values: Tensor, groups: int) -> _Shape:
    batch, channels, height, width = values.shape
    if _format(values) == torch.channels_last:
        return _Shape(batch * height * width, groups, channels // groups, 1)
    return _Shape(batch, groups, channels // groups, height * width)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _units(shape: _Shape) -> int:
    """Return into how many parts the work is cut; it depends on the shape alone, and so does the order of sums."""
    if shape.inner == 1:
        return min(shape.outer, UNITS)
    return shape.outer * min(-(-shape.inner // BLOCK), max(1, UNITS // max(1, shape.outer)))


def _windows(map: Tensor, answer: Tensor, windows: Windows) -> _Windows:
    batch, channels, *size = map.shape
    last = _format(map) == torch.channels_last
    planes, inner = (batch, channels) if last else (batch * channels, 1)
    return _Windows(planes, *size, inner, *answer.shape[-2:], *((ctypes.c_int64 * 2)(*pair) for pair in windows))


def _format(tensor: Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty((like.shape[0], *shape), dtype=dtype, memory_format=_format(like))


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    return tensor.to(values.dtype).contiguous(memory_format=_format(values))


def _map_like(map: Tensor, values: Tensor) -> Tensor:
    return map.to(wide(values.dtype)).contiguous(memory_format=_format(values))


def _constant(tensor: Tensor | None, values: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(wide(values.dtype)).contiguous()


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | ctypes.Structure | int | None) -> None:
    addresses = [item.data_ptr() if isinstance(item, Tensor) else item for item in arguments]
    _loop(name, dtype)(*addresses, torch.get_num_threads())


@functools.cache
def _loop(name: str, dtype: torch.dtype) -> Callable[..., None]:
    loop = getattr(_library(), f"{name}_{DTYPES[dtype]}")
    loop.argtypes, loop.restype = (*_ARGUMENTS[name], ctypes.c_int), None
    return loop


# The arguments of each loop before the number of threads.
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "squares": (*[_POINTER] * 2, _Shape),
    "scale": (*[_POINTER] * 4, ctypes.c_int, _Shape),
    "scale_backward": (*[_POINTER] * 6, ctypes.c_int, _Shape),
    "add_squares_backward": (*[_POINTER] * 3, _Shape),
    "window_sum": (*[_POINTER] * 2, ctypes.c_bool, _Windows),
    "window_sum_backward": (*[_POINTER] * 2, _Windows),
    "gain": (*[_POINTER] * 3, ctypes.c_int, _Operator, _LONG),
    "gain_backward": (*[_POINTER] * 5, ctypes.c_int, _Operator, _LONG),
    "respond": (*[_POINTER] * 3, _Constants, _Operator, _Shape, _LONG),
    "respond_backward": (*[_POINTER] * 6, _Constants, _Operator, _Shape, _LONG),
    "multiply_filters": (*[_POINTER] * 2, Filters),
    "multiply_filters_backward": (*[_POINTER] * 3, Filters),
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled loops, or None; a compiler that fails is told once."""
    if os.environ.get(SWITCH, "").lower() in _OFF or sys.platform != "linux":
        return None
    try:
        with _BUILDING:
            return _load()
    # Path.expanduser fails in its own way where there is no home.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").splitlines()
        reason = next((line for line in said if "error" in line), said[-1] if said else type(error).__name__)
        warnings.warn(
            "decoupled convolutions run without their compiled loops, which costs speed alone: "
            f"{os.environ.get('CXX') or 'c++'} failed ({reason.strip()}); {SWITCH}=off leaves them out without a word",
            stacklevel=2,
        )
        return None


def _load() -> ctypes.CDLL | None:
    """Return the loops that are kept, or compile them; None where there is no compiler, and none is asked for."""
    options = [*_OPTIONS, *_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])]
    described = "\n".join([platform.machine(), *options]).encode() + SOURCE.read_bytes()
    name = f"kernels-{hashlib.sha256(described).hexdigest()[:16]}.so"
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "decoupled-zoo", name)
    # It is not there yet, or another machine's system cannot load it.
    with contextlib.suppress(OSError):
        if _seal(kept) == kept.with_suffix(".sha256").read_text(encoding="ascii"):
            return ctypes.CDLL(str(kept))
    compiler = (os.environ.get("CXX") or "c++").split()
    if "CXX" not in os.environ and shutil.which(compiler[0]) is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch, name)
        command = [*compiler, *options, str(SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS_TO_COMPILE)
        library = ctypes.CDLL(str(built))
        # Where it cannot be kept, it is compiled again the next time.
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Whole or not at all, for other processes may do the same.
            with tempfile.TemporaryDirectory(dir=kept.parent) as beside:
                seal = Path(beside, "seal")
                seal.write_text(_seal(built), encoding="ascii")
                Path(shutil.copy(built, beside)).replace(kept)
                seal.replace(kept.with_suffix(".sha256"))
        return library


def _seal(file: Path) -> str:
    """Return what tells a whole file from a truncated one, which would end the process that loads it."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
