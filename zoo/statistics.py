"""Evenly spaced choices, and intervals of what was measured."""

from collections.abc import Sequence

import numpy
from scipy.stats import binomtest


def evenly_spaced(count: int, length: int) -> list[int]:
    """Return ``count`` places (all, if there are fewer) of ``length``: the middles of as many equal stretches."""
    count = min(count, length)
    return [(2 * place + 1) * length // (2 * count) for place in range(count)]


def interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of a share measured on ``count`` images."""
    low, high = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(low), float(high)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of ``first - second``, pair by pair, and its 95 % confidence interval (of the normal law)."""
    differences = numpy.subtract(first, second, dtype=float)
    mean = float(differences.mean())
    reach = 1.96 * float(differences.std(ddof=1)) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return mean, mean - reach, mean + reach
