"""A figure with its interval, from resampling (Efron 1979: the percentile bootstrap)."""

from collections.abc import Callable, Sequence

import numpy as np

from paraxis.measure.records import Record

DRAWS = 2000


class Estimate(Record):
    """A value with its 95% interval; an end that the samples do not bound is infinite."""

    value: float
    low: float
    high: float


def estimate(value: float, draws: np.ndarray, level: float = 0.95) -> Estimate:
    """The value with the percentile interval of its resampled twins `draws` (one dimension, NaNs left out)."""
    known = np.sort(draws[~np.isnan(draws)])
    if not known.size:
        return Estimate(value=float(value), low=float("-inf"), high=float("inf"))
    tail = (1 - level) / 2 * (known.size - 1)
    # Whole ranks, rounded outwards: between a number and infinity there is nothing to interpolate.
    low, high = known[int(np.floor(tail))], known[int(np.ceil(known.size - 1 - tail))]
    return Estimate(value=float(value), low=float(low), high=float(high))


def resampled(samples: Sequence[float], rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """Medians of samples drawn with replacement: shape (draws,)."""
    values = np.asarray(samples, dtype=float)
    picked = values[rng.integers(0, len(values), (draws, len(values)))]
    return np.asarray(median_of(picked))


def median_of(values: np.ndarray) -> np.ndarray:
    """Medians over the last axis, where infinities are values like others (np.median makes NaN of two of them)."""
    ordered = np.sort(values, axis=-1)
    count = ordered.shape[-1]
    below, above = ordered[..., (count - 1) // 2], ordered[..., count // 2]
    return np.where(below == above, below, (below + above) / 2)


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slope of y (..., k) over x (k,)."""
    away = x - x.mean()
    return np.asarray((y * away).sum(-1) / (away**2).sum())


Words = Callable[[float], str]


def between(e: Estimate, words: Words) -> str:
    """`value (95%: low to high)` in the words given for a number."""
    return f"{words(e.value)} (95%: {words(e.low)} to {words(e.high)})"
