"""Medians with intervals that cover, and what can be told apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paraxis.measure.statistics import chance, interval, paired, seconds, told_apart

SAMPLES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30)


def coverage(level: float, size: int, trials: int = 200) -> float:
    """How often the interval of skewed samples, such as times are, holds the true median."""
    rng = np.random.default_rng(0)
    bounds = [interval(rng.lognormal(0.0, 0.5, size).tolist(), level) for _ in range(trials)]
    return sum(low <= 1.0 <= high for low, high in bounds) / trials


@pytest.mark.parametrize("size", [11, 25])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_a_bootstrap_interval_covers_the_median_as_often_as_it_says(size: int, level: float) -> None:
    assert level - 0.06 <= coverage(level, size) <= level + 0.08


def test_more_samples_and_less_certainty_make_an_interval_narrower() -> None:
    rng = np.random.default_rng(1)
    few, many = rng.normal(10, 1, 12).tolist(), rng.normal(10, 1, 1000).tolist()

    def width(samples: list[float], level: float = 0.95) -> float:
        low, high = interval(samples, level)
        return high - low

    assert width(many) < width(few) / 2
    assert width(few, 0.5) < width(few, 0.9) < width(few, 0.999)


@given(SAMPLES)
@settings(deadline=None, max_examples=40)
def test_an_interval_lies_within_the_samples_and_holds_their_median(samples: list[float]) -> None:
    low, high = interval(samples)
    assert min(samples) <= low <= high <= max(samples)
    record = seconds(samples)
    assert record.low <= record.median <= record.high
    assert record.median == float(np.median(samples)) and record.samples == samples
    assert interval(samples) == (low, high), "the same each time"


def test_few_samples_give_their_range_and_scatter_is_not_hidden() -> None:
    assert interval([3.0, 1.0, 2.0, 9.0]) == (1.0, 9.0)
    assert interval([2.0]) == (2.0, 2.0)
    low, high = interval([1.0] * 10 + [5.0] * 10)
    assert (low, high) == (1.0, 5.0)


def test_one_outlier_moves_the_interval_little() -> None:
    steady = [1.0 + n / 1000 for n in range(20)]
    assert interval([*steady, 50.0])[1] < 1.02


def test_pairs_are_of_the_same_round_and_above_1_is_faster() -> None:
    first = dict.fromkeys(range(8), 2.0)
    other = dict.fromkeys(range(3, 12), 3.0) | {20: 900.0}
    ratio = paired(first, other)
    assert ratio is not None and (ratio.median, ratio.low, ratio.high) == (1.5, 1.5, 1.5)
    back = paired(other, first)
    assert back is not None and back.median == pytest.approx(2 / 3)
    assert paired(first, {99: 1.0}) is None and paired({}, {}) is None


def test_pairing_sees_a_difference_that_drift_would_hide() -> None:
    drift = [1.0 + 0.3 * np.sin(n) for n in range(15)]
    fast = dict(enumerate(drift))
    slow = {n: value * (1.05 + 0.002 * (n % 3)) for n, value in enumerate(drift)}
    assert interval(list(fast.values()))[1] > interval(list(slow.values()))[0], "unpaired, they overlap"
    ratio = paired(fast, slow)
    assert told_apart(fast, slow) and ratio is not None and ratio.low > 1.04


def false_alarms(rounds: int, level: float, trials: int = 100) -> int:
    """How many of 100 pairs of equal plans are told apart."""
    rng, found = np.random.default_rng(2), 0
    for _ in range(trials):
        a, b = ({n: float(v) for n, v in enumerate(rng.lognormal(0, 0.2, rounds))} for _ in range(2))
        found += told_apart(a, b, level)
    return found


def test_equal_plans_are_rarely_told_apart() -> None:
    assert false_alarms(rounds=15, level=0.99) <= 5


@pytest.mark.parametrize("rounds", [3, 4, 5, 6, 7])
def test_few_rounds_do_not_tell_equal_plans_apart(rounds: int) -> None:
    assert false_alarms(rounds, level=0.95) <= 12


@pytest.mark.parametrize("level, enough", [(0.5, 2), (0.75, 3), (0.9, 5), (0.95, 6), (0.99, 6)])
def test_rounds_that_all_agree_tell_plans_apart_once_chance_is_rarer_than_the_level(level: float, enough: int) -> None:
    for rounds in range(1, 12):
        first, other = dict.fromkeys(range(rounds), 1.0), dict.fromkeys(range(rounds), 2.0)
        assert told_apart(first, other, level) is told_apart(other, first, level) is (rounds >= enough)


def test_only_rounds_of_both_count() -> None:
    first, other = dict.fromkeys(range(8), 1.0), dict.fromkeys(range(3, 20), 2.0)
    assert not told_apart(first, other) and told_apart(first, other | dict.fromkeys(range(3), 2.0))
    assert not told_apart(first, {}) and not told_apart({}, {})


@pytest.mark.parametrize(
    "low, high, apart",
    [(1.01, 1.2, True), (0.5, 0.99, True), (0.9, 1.1, False), (1.0, 1.2, False), (0.8, 1.0, False)],
)
def test_told_apart_is_an_interval_without_1(low: float, high: float, apart: bool) -> None:
    """Half of the rounds at either end: the interval reaches from one to the other."""
    first, other = dict.fromkeys(range(8), 1.0), {n: high if n % 2 else low for n in range(8)}
    ratio = paired(first, other)
    assert ratio is not None and (ratio.low, ratio.high) == (low, high)
    assert told_apart(first, other) is apart


def test_a_stricter_level_tells_less_apart() -> None:
    rng = np.random.default_rng(3)
    fast = {n: float(v) for n, v in enumerate(rng.lognormal(0.0, 0.25, 12))}
    slow = {n: float(v) for n, v in enumerate(rng.lognormal(0.25, 0.25, 12))}
    ratios = [paired(fast, slow, level) for level in (0.5, 0.9, 0.99999)]
    widths = [ratio.high - ratio.low for ratio in ratios if ratio is not None]
    assert len(widths) == 3 and widths == sorted(widths)


@pytest.mark.parametrize(
    ("t", "freedom", "known"), [(2.571, 5, 0.05), (4.032, 5, 0.01), (2.262, 9, 0.05), (0.0, 7, 1.0)]
)
def test_chance_is_that_of_the_tables(t: float, freedom: int, known: float) -> None:
    shape = np.linspace(-1, 1, freedom + 1)
    shape /= np.std(shape, ddof=1)
    assert chance(list(t / np.sqrt(freedom + 1) + shape)) == pytest.approx(known, rel=2e-3)


def test_far_apart_is_told_in_six_rounds_at_a_strict_level() -> None:
    rng = np.random.default_rng(4)
    fast, slow = ({n: float(v) for n, v in enumerate(m * rng.lognormal(0, 0.1, 6))} for m in (1.0, 5.0))
    near = {n: 1.1 * v for n, v in fast.items()} | {0: 0.99 * fast[0]}
    assert told_apart(fast, slow, 1 - 0.05 / 40) and not told_apart(fast, near, 1 - 0.05 / 40)
