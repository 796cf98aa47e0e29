"""Evenly spaced choices, and intervals of shares that were measured."""

from scipy.stats import binomtest


def evenly_spaced(count: int, length: int) -> list[int]:
    """Return ``count`` places (all, if there are fewer) of ``length``: the middles of as many equal stretches."""
    count = min(count, length)
    return [(2 * place + 1) * length // (2 * count) for place in range(count)]


def interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of a share measured on ``count`` images."""
    low, high = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(low), float(high)
