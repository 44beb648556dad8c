"""Medians with bootstrap intervals, and what can be told apart (Hoefler and Belli 2015, rules 5 to 8)."""

from collections.abc import Sequence
from statistics import median

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

    n rounds that all agree happen by chance in 2^(1-n) of equal pairs, so fewer never tell anything apart at a level.
    """
    ratio = paired(first, other, level)
    if ratio is None or 2.0 ** (1 - len(first.keys() & other.keys())) > 1 - level:
        return False
    return ratio.low > 1 or ratio.high < 1
