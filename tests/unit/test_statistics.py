"""Medians with intervals that cover, and what can be told apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paraxis.measure.statistics import (
    apart,
    chance,
    clear,
    corrected,
    interval,
    paired,
    seconds,
    signed_ranks,
    sort_rounds,
    told_apart,
    warm_up,
)

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


@pytest.mark.parametrize(
    ("values", "known"),  # of the tables of Wilcoxon's test: n = 6, 10 and 20 at their two-sided limits
    [
        ([1, 2, 3, 4, 5, 6], 2 / 64),
        ([-1, 2, 3, 4, 5, 6], 4 / 64),
        ([-8, *range(1, 8), 9, 10], 0.0488),
        ([-n if n in (20, 19, 13) else n for n in range(1, 21)], 0.0484),
        ([1, -1], 1.0),
        ([], 1.0),
        ([0, 0, 5], 1.0),
    ],
)
def test_signed_ranks_are_those_of_the_tables(values: list[float], known: float) -> None:
    assert signed_ranks(values) == pytest.approx(known, abs=6e-5)
    assert signed_ranks([-v for v in values]) == pytest.approx(signed_ranks(values))


def test_strict_levels_are_kept() -> None:
    """At 1 in 200, where a bootstrap of the median is wrong three times as often."""
    rng, found, eager = np.random.default_rng(7), 0, 0
    for trial in range(1500):
        a, b = ({n: float(v) for n, v in enumerate(rng.lognormal(0, 0.2, 10))} for _ in range(2))
        found += told_apart(a, b, 0.995)
        if trial < 500:
            low, high = interval([b[n] / a[n] for n in a], 0.995)
            eager += low > 1 or high < 1
    assert found <= 1500 * 0.005 + 7 and eager >= 500 * 0.005 + 3


@pytest.mark.parametrize("slow", [1, 2, 4])
def test_slow_starts_are_warm_up(slow: int) -> None:
    rng = np.random.default_rng(slow)
    steady = (1 + 0.02 * rng.standard_normal(16)).tolist()
    assert warm_up([2.0 - 0.2 * n for n in range(slow)] + steady) == slow


def test_what_is_steady_or_gets_slower_has_no_warm_up() -> None:
    rng = np.random.default_rng(5)
    cut = [warm_up((1 + 0.05 * rng.standard_normal(12)).tolist()) > 0 for _ in range(400)]
    assert sum(cut) <= 20
    assert warm_up([1.0 + n / 10 for n in range(12)]) == 0
    assert warm_up([9.0, 1.0, 1.0, 1.0, 1.0]) == 0, "too few to know"
    assert warm_up([]) == 0


@given(st.lists(st.floats(1e-6, 1e3), max_size=30))
@settings(deadline=None, max_examples=60)
def test_at_most_half_is_warm_up(samples: list[float]) -> None:
    assert 0 <= warm_up(samples) <= len(samples) // 2


def test_what_never_settles_is_said() -> None:
    falling = {n: 2.0 - 0.02 * n for n in range(40)}
    found = sort_rounds(falling, ())
    assert len(found.warmup) == 20 and not found.stationary
    assert sort_rounds(dict.fromkeys(range(24), 1.0), ()).stationary


def test_disturbed_rounds_are_set_aside_where_enough_calm_ones_are_left() -> None:
    measured = {n: 1.0 + n / 1000 for n in range(12)} | {3: 5.0, 7: 6.0}
    found = sort_rounds(measured, {3, 7, 99})
    assert found.disturbed == {3: 5.0, 7: 6.0} and not found.warmup and len(found.kept) == 10
    few = sort_rounds(measured, set(range(3, 12)))
    assert few.kept == measured and not few.disturbed, "three calm ones are not enough"
    record = found.record()
    assert record.disturbed == [5.0, 6.0] and 5.0 not in record.samples and record.p95 is not None
    assert record.p95 == pytest.approx(float(np.quantile(record.samples, 0.95)))


def test_levels_share_the_risk() -> None:
    assert 1 - corrected(20) == pytest.approx((1 - corrected(1)) / 20) and corrected(0) == corrected(1)
    assert 1 - corrected(4, risk=0.01) == pytest.approx(0.0025)


def spread(rounds: int, by: float, seed: int, scatter: float = 0.1) -> dict[int, float]:
    rng = np.random.default_rng(seed)
    return {n: float(v) for n, v in enumerate(by * rng.lognormal(0.0, scatter, rounds))}


def test_what_is_far_behind_costs_what_is_near_nothing() -> None:
    """Nine rounds that all agree are too few for 21 comparisons, but not for the last one."""
    best = dict.fromkeys(range(9), 1.0)
    near = (best, {n: 1.001 + 1e-3 * 2.0**n for n in range(9)})
    far = {str(n): (best, spread(9, 5.0, n)) for n in range(20)}
    assert not told_apart(*near, corrected(21)) and told_apart(*near, corrected(1))
    assert apart(far | {"near": near}) == {*far, "near"}
    alike = {str(n): (best, spread(9, 1.0, n)) for n in range(20)}
    assert "near" not in apart(alike | {"near": near}), "their comparisons are still to be paid for"
    assert apart({}) == set()


def test_stepping_down_keeps_the_risk_over_all() -> None:
    """Of ten alike some one is told apart in at most as many trials as the risk says, with ten far behind beside."""
    wrong = 0
    for trial in range(100):
        best = spread(12, 1.0, 1000 * trial)
        alike = {str(n): (best, spread(12, 1.0, 1000 * trial + n + 1)) for n in range(10)}
        far = {f"far {n}": (best, spread(12, 9.0, 1000 * trial + n + 100)) for n in range(10)}
        found = apart(alike | far, risk=0.1)
        wrong += bool(found & alike.keys())
        assert far.keys() <= found
    assert wrong <= 100 * 0.1 + 8


def test_clear_is_told_apart_or_hardly_different() -> None:
    rng = np.random.default_rng(8)
    fast, same, slow = (
        {n: float(v) for n, v in enumerate(by * (1 + noise * rng.standard_normal(20)))}
        for by, noise in ((1.0, 0.005), (1.0, 0.005), (1.3, 0.005))
    )
    vague = {n: float(v) for n, v in enumerate(1 + 0.2 * rng.standard_normal(20))}
    assert clear((fast, slow), True) and clear((fast, same), False) and not clear((fast, vague), False)
    assert clear((fast, slow), True, width=0.1) and not clear((fast, slow), True, width=1e-4)
    first = {n: fast[n] for n in range(5)}
    assert not clear((first, same), False), "five rounds are too few to stop"
