"""``model.safetensors``: written from a network, and read strictly, straight into one.

The format: eight bytes that tell the length of a JSON header, the header, which tells each tensor's dtype, shape and
place, and the tensors' bytes.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError, DamagedError

# Larger headers are refused before they are parsed: a small file can name gigabytes of tensors.
LARGEST_HEADER, MOST_TENSORS = 1 << 20, 5000

# The floating-point tensors of a network are stored in one of these, and loaded as the network has them.
PRECISIONS = {"float32": torch.float32, "float16": torch.float16}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def serialise(network: nn.Module, dtype: torch.dtype) -> bytes:
    """Return the content of a weights file; equal weights give equal bytes.

    Args:
        dtype: float16 halves what is exact in it.

    Raises:
        ValueError: weights that are not finite, or not exact in ``dtype``.
    """
    tensors = {}
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; a checkpoint is not written from them")
        # A copy of its own, since safetensors refuses tensors that share memory.
        stored = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if dtype == torch.float16 and tensor.is_floating_point():
            stored = stored.half()
            if not torch.equal(stored.to(tensor.dtype), tensor.detach().cpu()):
                raise ValueError(
                    f"{name} is not exact in float16; zoo.round_weights rounds a model, to be measured then"
                )
        tensors[name] = stored
    return safetensors.torch.save(tensors)


def read_into(network: nn.Module, path: Path, sha256: str, dtype: torch.dtype) -> None:
    """Fill a freshly built network with the weights of a file, without a second copy of them in memory.

    The file is read once, and its hash is that of the bytes that were read. After an error the network is of no use.

    Args:
        sha256: of the whole file.
        dtype: that of the file's floating-point tensors.

    Raises:
        CheckpointError: the file is missing, damaged, malformed, has other tensors than the network, or values that
            are not finite.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; fetch the checkpoint again")
    problem = None
    # It is not mapped into memory, since a mapped file that is cut short later kills the process.
    with path.open("rb") as file:
        reader = _Reader(file)
        try:
            _fill(network.state_dict(), reader, path, dtype)
        except CheckpointError as error:
            problem = error
        found = reader.sha256_of_all()
    # Damage explains every other problem.
    if found != sha256:
        raise DamagedError(
            f"{path} has sha256 {found}, config.json says {sha256}: it is damaged or changed; fetch the checkpoint "
            "again"
        ) from problem
    if problem is not None:
        raise problem


def misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Say which tensors are missing, unexpected, or of another shape or dtype."""
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name in (name for name in expected if name in tensors):
        tensor, wanted = tensors[name], expected[name]
        if tensor.shape != wanted.shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, not {tuple(wanted.shape)}")
        elif tensor.dtype != wanted.dtype:
            problems.append(f"{name} has dtype {tensor.dtype}, not {wanted.dtype}")
    return problems


def listed(problems: Sequence[str]) -> str:
    """Return the first eight in one line, and how many there are if there are more."""
    return "; ".join(problems[:8]) + (f"; ... ({len(problems)} in all)" if len(problems) > 8 else "")


class _Reader:
    """Reads a file from its beginning to its end, and hashes what it reads."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.left = file.seek(0, 2)
        file.seek(0)

    def read(self, count: int) -> bytes:
        data = self.file.read(count)
        self.hash.update(data)
        self.left -= len(data)
        return data

    def read_into(self, tensor: Tensor) -> bool:
        """Fill a contiguous tensor and return whether there was enough."""
        room = memoryview(tensor.flatten().view(torch.uint8).numpy())
        count = self.file.readinto(room)
        self.hash.update(room[:count])
        self.left -= count
        return count == len(room)

    def sha256_of_all(self) -> str:
        while self.read(1 << 20):
            pass
        return self.hash.hexdigest()


def _fill(state: Mapping[str, Tensor], reader: _Reader, path: Path, dtype: torch.dtype) -> None:
    stored = _read_header(reader, path)
    halved = dtype == torch.float16
    expected = {
        name: torch.empty_like(tensor, device="meta", dtype=dtype if halved and tensor.is_floating_point() else None)
        for name, tensor in state.items()
    }
    problems = misfits(stored, expected)
    if not problems:
        # They are read in the order in which they lie in the file.
        for name, tensor in stored.items():
            target = state[name]
            direct = tensor.dtype == target.dtype and target.is_contiguous()
            room = target if direct else torch.empty(tensor.shape, dtype=tensor.dtype)
            if not reader.read_into(room):
                raise _malformed(path, f"it ends within {name}")
            if not direct:
                target.copy_(room)
            # Unlike isfinite, the extremes need no memory of the tensor's size.
            if target.is_floating_point() and target.numel() and not all(map(math.isfinite, target.aminmax())):
                problems.append(f"{name} has values that are not finite")
    if problems:
        raise CheckpointError(f"{path} does not fit the architecture in config.json: {listed(problems)}")


def _read_header(reader: _Reader, path: Path) -> dict[str, Tensor]:
    """Return the file's tensors, without content, in the order of their places."""
    length = int.from_bytes(reader.read(8), "little")
    if length > min(LARGEST_HEADER, reader.left):
        raise _malformed(path, "its header does not fit")
    try:
        entries = json.loads(reader.read(length), object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"malformed header: {error}") from error
    if not isinstance(entries, dict):
        raise _malformed(path, "malformed header")
    entries.pop("__metadata__", None)
    if len(entries) > MOST_TENSORS:
        raise _malformed(path, f"it names {len(entries)} tensors")
    places = {name: _place(path, name, entry) for name, entry in entries.items()}
    tensors, end = {}, 0
    for name, (start, stop, shape, kind) in sorted(places.items(), key=lambda item: item[1][:2]):
        if start != end or stop - start != math.prod(shape) * kind.itemsize:
            raise _malformed(path, f"{name} lies where it cannot")
        tensors[name], end = torch.empty(shape, dtype=kind, device="meta"), stop
    if end != reader.left:
        raise _malformed(path, f"its tensors take {end} bytes, but it has {reader.left}")
    return tensors


def _place(path: Path, name: str, entry: Any) -> tuple[int, int, tuple[int, ...], torch.dtype]:
    """Return the first and last place, the shape and the dtype that a header tells of a tensor."""
    if isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}:
        shape, offsets = entry["shape"], entry["data_offsets"]
        numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        # A size that no file has would not fit into torch's numbers either, though a 0 may hide it.
        if numbers and all(type(value) is int and 0 <= value < 1 << 62 for value in [*shape, *offsets]):
            possible = math.prod(max(value, 1) for value in shape) < 1 << 62
            if possible and isinstance(entry["dtype"], str) and entry["dtype"] in DTYPES:
                return *offsets, tuple(shape), DTYPES[entry["dtype"]]
    raise _malformed(path, f"malformed header: {str(name)[:100]!r}")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"names {len(names)} tensors, {len(set(names))} of them different")
    return dict(pairs)


def _malformed(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a safetensors file ({why}); fetch the checkpoint again")
