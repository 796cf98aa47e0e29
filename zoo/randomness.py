"""Random numbers that follow from what they are for, and not from what was drawn before, so that a run can go on.

A key is a 64-bit integer (int64) hashed from whole numbers such as seed, epoch and index. Draws follow from keys alone:
they are the same in any batch, process and worker, and on any device.
"""

import os
import random

import torch
from torch import Tensor

# The increment and the two multipliers of SplitMix64 (Steele et al., Fast Splittable Pseudorandom Number Generators,
# OOPSLA 2014), as signed numbers.
_INCREMENT, _FIRST, _SECOND = (
    value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def key_of(*parts: int | Tensor) -> Tensor:
    """Return the key of whole numbers, in this order; of tensors (int64), one key for each element."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = _scrambled(key ^ _scrambled(torch.as_tensor(part, dtype=torch.int64)))
    return key


def run_seed() -> int:
    """Return the seed that Lightning was given for this run (``--seed_everything``); -1 if it was given none."""
    return int(os.environ.get("PL_GLOBAL_SEED", -1))


def seed_of(*parts: int) -> int:
    """Return a seed of 63 bits for a generator that follows from whole numbers, in this order."""
    # Seeded with a text, Python's generator is the same in all its releases.
    return random.Random(repr(parts)).getrandbits(63)


def generator_of(*parts: int) -> torch.Generator:
    """Return a generator of the CPU that is seeded with what follows from whole numbers."""
    return torch.Generator().manual_seed(seed_of(*parts))


def uniform(keys: Tensor, count: int) -> Tensor:
    """Return ``count`` draws from [0, 1) for each of the keys (N,): float64 (N, count), multiples of 2⁻⁵³."""
    bits = _scrambled(keys.unsqueeze(1) ^ _scrambled(torch.arange(1, count + 1, device=keys.device)))
    return _shifted(bits, 11).double() * 2.0**-53


def _scrambled(values: Tensor) -> Tensor:
    """Return the outputs of SplitMix64 for these states; products wrap around."""
    values = values + _INCREMENT
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, places: int) -> Tensor:
    """Shift 64-bit integers to the right as if they had no sign."""
    return (values >> places) & ((1 << (64 - places)) - 1)
