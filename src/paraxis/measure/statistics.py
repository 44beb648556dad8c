"""Medians with bootstrap intervals, and what can be told apart (Hoefler and Belli 2015, rules 5 to 8)."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, median, quantiles, stdev

import numpy as np

from paraxis.measure.records import Ratio, Seconds

DRAWS = 4000
# Of telling plans apart that are alike, over all comparisons of a study. Rounds are not quite independent: resampled in
# blocks, 3% become up to 5% (benchmarks/statistics_check.py).
RISK = 0.03
ENOUGH = 6  # calm rounds with which one does without the disturbed ones; rounds below which nothing is told apart
NARROW = 0.02  # relative width of the interval of a ratio that nothing is gained by narrowing
Pair = tuple[dict[int, float], dict[int, float]]  # step seconds by round, of the plan that is asked about and another


def interval(samples: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """A percentile-bootstrap interval of the median; the samples' range where there are too few to resample."""
    if len(samples) < 5:
        return min(samples), max(samples)
    values = np.asarray(samples)
    rng = np.random.default_rng(len(samples))
    medians = np.median(values[rng.integers(0, len(values), (DRAWS, len(values)))], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seconds(samples: Sequence[float], warmup: Sequence[float] = (), disturbed: Sequence[float] = ()) -> Seconds:
    """The record of a measured time; what was set aside is kept beside it."""
    low, high = interval(samples)
    p5, p25, p75, p95 = (float(v) for v in np.quantile(samples, [0.05, 0.25, 0.75, 0.95]))
    return Seconds(
        median=median(samples),
        low=low,
        high=high,
        p5=p5,
        p25=p25,
        p75=p75,
        p95=p95,
        samples=list(samples),
        warmup=list(warmup),
        disturbed=list(disturbed),
    )


@dataclass(frozen=True)
class Sorted:
    """Step seconds by round: those that count, and those set aside; whether those that count show no trend."""

    kept: dict[int, float]
    warmup: dict[int, float]
    disturbed: dict[int, float]
    stationary: bool = True

    def record(self) -> Seconds:
        """The record of the measured time."""
        return seconds(*(list(part.values()) for part in (self.kept, self.warmup, self.disturbed)))


def sort_rounds(measured: dict[int, float], disturbed: Collection[int]) -> Sorted:
    """Set disturbed rounds aside where enough calm ones are left to do without them, and then the warm-up."""
    rounds = sorted(measured)
    calm = [r for r in rounds if r not in disturbed]
    if len(calm) < ENOUGH:
        calm = rounds
    start = warm_up([measured[r] for r in calm])
    kept = {r: measured[r] for r in calm[start:]}
    rest = list(kept.values())
    return Sorted(
        kept=kept,
        warmup={r: measured[r] for r in calm[:start]},
        disturbed={r: measured[r] for r in rounds if r not in calm},
        stationary=not rest or _shift(rest) == 0,
    )


def warm_up(samples: Sequence[float]) -> int:
    """How many leading samples are warm-up: at most half, and none of fewer than six.

    As long as the first is far slower than those behind it (above Tukey's outer fence of them: the upper quartile and
    three times the distance of the quartiles, Tukey 1977) it goes, for a median hides one such sample but percentiles
    do not. So do those before a change point to faster ones, by the rank test of Pettitt (1979). Both are strict: what
    is cut off for being slow flatters what stays.
    """
    start = 0
    while len(samples) >= 6 and start < len(samples) // 2:
        rest = samples[start + 1 :]
        low, _, high = quantiles(rest, n=4, method="inclusive")
        step = 1 if samples[start] > high + 3 * (high - low) else _shift(samples[start:])
        if not step:
            break
        start += step
    return min(start, len(samples) // 2)


def _shift(samples: Sequence[float], risk: float = 0.01) -> int:
    """How many samples stand before the likeliest change to faster ones; 0 if ranks alike would show as clear a one.

    Pettitt (1979), A non-parametric approach to the change-point problem, Applied Statistics 28, one-sided: K is the
    largest sum over i <= t < j of sign(x[i] - x[j]); for n values alike it exceeds k in exp(-6 k^2 / (n^3 + n^2)).
    """
    values = np.asarray(samples)
    n = len(values)
    signs = np.sign(values[:, None] - values[None, :])
    sums = np.cumsum(signs.sum(axis=1))[:-1]  # pairs within the first part cancel
    if n < 2 or (k := float(sums.max())) <= 0:
        return 0
    return int(sums.argmax()) + 1 if math.exp(-6 * k * k / (n**3 + n**2)) <= risk else 0


def paired(first: dict[int, float], other: dict[int, float], level: float = 0.95) -> Ratio | None:
    """How many times faster `first` is than `other`, from the rounds that both took part in (seconds by round)."""
    rounds = sorted(first.keys() & other.keys())
    if not rounds:
        return None
    ratios = [other[r] / first[r] for r in rounds]
    low, high = interval(ratios, level)
    return Ratio(median=median(ratios), low=low, high=high)


def told_apart(first: dict[int, float], other: dict[int, float], level: float = 0.95) -> bool:
    """Whether the interval of the paired ratio, by signed ranks of its logarithms, excludes 1 at this level.

    A bootstrap of the median would do at 95%, but at the strict levels of many comparisons its tails are too light: it
    tells plans that are alike apart several times as often as it says. Where a strict level would need more rounds than
    there are (n that all agree happen by chance in 2^(1-n) of pairs alike), six or more may do by their distance from
    1: Student's t of the logarithms.
    """
    logs = [math.log(other[r] / first[r]) for r in sorted(first.keys() & other.keys())]
    by_chance = signed_ranks(logs)
    if by_chance > 1 - level and len(logs) >= 6 and 2.0 ** (1 - len(logs)) > 1 - level:
        by_chance = chance(logs)
    return by_chance <= 1 - level


def signed_ranks(values: Sequence[float]) -> float:
    """How often random signs make the rank sum of the positive values as lopsided, either way (Wilcoxon 1945), exactly.

    Values are independent and, if nothing is behind them, as likely positive as negative; zeros tell nothing.
    """
    sizes = np.asarray([v for v in values if v])
    if not len(sizes):
        return 1.0
    _, place, count = np.unique(np.abs(sizes), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # those of equal size share the mean of their ranks
    positive = float(ranks[sizes > 0].sum())
    smaller = min(positive, float(ranks.sum()) - positive)
    return min(1.0, 2 * float(_rank_sums(len(sizes))[: math.floor(smaller) + 1].sum()))


@cache
def _rank_sums(n: int) -> np.ndarray:
    """The probability of every sum of a random subset of the ranks 1 to n."""
    share = np.zeros(n * (n + 1) // 2 + 1)
    share[0] = 1.0
    for rank in range(1, n + 1):
        share[rank:] = (share[rank:] + share[:-rank]) / 2
        share[:rank] /= 2
    return share


def apart(pairs: Mapping[str, Pair], risk: float = RISK) -> set[str]:
    """Keys of the plans that are told apart from one that each is paired with, at so much risk over all of them.

    The correction steps down (Holm 1979): who is told apart at the level that so many comparisons ask for leaves fewer
    of them, and more of the risk, to those behind. So the many plans that are far behind cost the near ones nothing.
    """
    found: set[str] = set()
    while len(found) < len(pairs):
        level = corrected(len(pairs) - len(found), risk)
        more = {key for key, pair in pairs.items() if key not in found and told_apart(*pair, level)}
        if not more:
            break
        found |= more
    return found


def corrected(others: int, risk: float = RISK) -> float:
    """The level of each of so many comparisons with the winner (Bonferroni).

    That the winner was chosen for its time is paid for: of plans all alike, some one is found faster than a given plan
    with at most half of the risk, however many there are to choose from.
    """
    return 1 - risk / max(1, others)


def clear(pair: Pair, told: bool, width: float = math.inf) -> bool:
    """Whether more rounds would say little more: told apart, or so near that the ratio's interval is narrow.

    `width` is the relative width that the ratio's 95% interval must not exceed in either case.
    """
    if told and width == math.inf:
        return True
    ratio = paired(*pair)
    if ratio is None or len(pair[0].keys() & pair[1].keys()) < ENOUGH:
        return False
    return ratio.high / ratio.low - 1 <= (width if told else min(width, NARROW))


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
