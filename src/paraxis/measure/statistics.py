"""Medians with bootstrap intervals, and what can be told apart (Hoefler and Belli 2015, rules 5 to 8)."""

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

import numpy as np

from paraxis.measure.records import Ratio, Seconds

DRAWS = 4000


def interval(samples: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """A percentile-bootstrap interval of the median; the samples' range where there are too few to resample."""
    if len(samples) < 5:
        return min(samples), max(samples)
    values = np.asarray(samples)
    rng = np.random.default_rng(len(samples))
    medians = np.median(values[rng.integers(0, len(values), (DRAWS, len(values)))], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seconds(samples: Sequence[float]) -> Seconds:
    """The record of a measured time."""
    low, high = interval(samples)
    return Seconds(median=median(samples), low=low, high=high, samples=list(samples))


def paired(first: dict[int, float], other: dict[int, float], level: float = 0.95) -> Ratio | None:
    """How many times faster `first` is than `other`, from the rounds that both took part in (seconds by round)."""
    rounds = sorted(first.keys() & other.keys())
    if not rounds:
        return None
    ratios = [other[r] / first[r] for r in rounds]
    low, high = interval(ratios, level)
    return Ratio(median=median(ratios), low=low, high=high)


def told_apart(first: dict[int, float], other: dict[int, float], level: float = 0.95) -> bool:
    """Whether the interval of the paired ratio excludes 1, in enough rounds for that to mean something.

    n rounds that all agree happen by chance in 2^(1-n) of equal pairs. Where a strict level would need more rounds than
    that, six or more may do by their distance from 1: Student's t of the logarithms.
    """
    ratio = paired(first, other, level)
    if ratio is None or not (ratio.low > 1 or ratio.high < 1):
        return False
    rounds = first.keys() & other.keys()
    by_chance = 2.0 ** (1 - len(rounds))
    if by_chance > 1 - level and len(rounds) >= 6:
        by_chance = chance([math.log(other[r] / first[r]) for r in rounds])
    return by_chance <= 1 - level


def chance(values: Sequence[float]) -> float:
    """The two-sided probability by which Student's t sees a mean as far from 0; scatter below 5% is not believed."""
    freedom = len(values) - 1
    error = max(stdev(values), 0.05) / math.sqrt(len(values))
    # With x = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1).
    edge = math.atan(abs(fmean(values)) / error / math.sqrt(freedom))
    tail, whole = (np.linspace(start, math.pi / 2, 4001) for start in (edge, 0.0))
    return float(
        np.trapezoid(np.cos(tail) ** (freedom - 1), tail) / np.trapezoid(np.cos(whole) ** (freedom - 1), whole)
    )
