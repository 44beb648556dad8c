"""Laws of scaling: what exact data give back, what noisy data bound, and when nothing is said."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paraxis.measure.laws import amdahl, gustafson, karp_flatt
from paraxis.study.scaling import laws
from paraxis.study.trial import Factors, Trial

COUNTS = (1, 2, 4, 8)
Law = Callable[[int], float]  # workers -> seconds


def times(law: Law, noise: float = 0.0, seed: int = 0) -> dict[int, dict[int, float]]:
    """Seconds by round by count; half of the noise is the round's own."""
    rounds, rng = 25, np.random.default_rng(seed)
    shared = rng.standard_normal(rounds)
    return {
        n: {r: law(n) * float(np.exp(noise * (shared[r] + rng.standard_normal()) / 2**0.5)) for r in range(rounds)}
        for n in COUNTS
    }


def serial(s: float) -> Law:
    return lambda n: 0.02 * (s + (1 - s) / n)


@pytest.mark.parametrize("s", [0.0, 0.05, 0.3, 1.0])
def test_amdahl_gives_back_the_serial_part(s: float) -> None:
    law = amdahl(times(serial(s)), 8)
    assert law.refusal is None and law.serial and law.limit
    assert law.serial.value == pytest.approx(s, abs=1e-9)
    assert law.residual == pytest.approx(0, abs=1e-9)
    assert law.limit.value == pytest.approx(1 / s if s else np.inf)
    for point in law.counts[1:]:
        assert point.karp_flatt and point.karp_flatt.value == pytest.approx(s, abs=1e-9)
        assert point.speedup.value == pytest.approx(1 / (s + (1 - s) / point.workers))
    assert law.counts[0].karp_flatt is None and "Amdahl 1967" in law.source and "Karp" in law.source


def test_gustafson_gives_back_the_serial_part() -> None:
    law = gustafson(times(lambda n: 0.02 * n / (n - 0.1 * (n - 1))), 8)
    assert law.serial and law.serial.value == pytest.approx(0.1, abs=1e-9) and law.refusal is None
    assert law.counts[-1].speedup.value == pytest.approx(8 - 0.1 * 7)
    assert "10.0%" in law.sentence and "7.3 times the work" in law.sentence


def test_intervals_cover_and_rounds_are_resampled_as_wholes() -> None:
    hits = 0
    for seed in range(60):
        law = amdahl(times(serial(0.1), 0.03, seed), 8, draws=400)
        described = law.serial or amdahl(times(serial(0.1), 0.03, seed), 8, draws=400).counts[-1].karp_flatt
        assert described
        hits += described.low <= 0.1 <= described.high
    assert 53 <= hits <= 60
    rounds = {n: {r: serial(0.1)(n) * (1 + 0.5 * (r % 5)) for r in range(25)} for n in COUNTS}
    whole = amdahl(rounds, 8).serial
    assert whole and whole.high - whole.low < 1e-9, "what slows a whole round slows all counts alike"


def test_a_true_law_is_seldom_refused() -> None:
    refused = sum(amdahl(times(serial(0.1), 0.03, seed), 8, draws=300).refusal is not None for seed in range(60))
    assert refused <= 3


def test_communication_that_grows_is_told_from_a_serial_part() -> None:
    grows = amdahl(times(lambda n: 0.02 / n + 0.001 * (n - 1), 0.01), 8)
    assert grows.serial is None and grows.refusal and grows.trend == "rising"
    assert "Amdahl's law does not describe this" in grows.sentence and "communication" in grows.sentence
    constant = amdahl(times(serial(0.2), 0.01), 8)
    assert constant.trend == "constant" and "a serial part" in constant.sentence and constant.serial
    cached = amdahl(times(lambda n: 0.02 / n**1.2, 0.01), 8)
    assert cached.counts[-1].karp_flatt and cached.counts[-1].karp_flatt.high < 0 and "cache" in cached.sentence
    shared = amdahl(times(lambda n: 0.02 * (0.2 / n**0.5 + 0.8 / n), 0.01), 8)
    assert shared.trend == "falling" and "is shared by more" in shared.sentence


def test_too_few_counts_and_oversubscribed_ones() -> None:
    law = amdahl(times(serial(0.1)), 2)
    assert law.serial is None and law.left_out == [4, 8]
    assert "3 worker counts within the 2 usable cores; there are 1, 2" in (law.refusal or "")
    assert "Left out" in law.sentence and "4, 8" in law.sentence
    assert law.counts[1].karp_flatt and law.counts[1].karp_flatt.value == pytest.approx(0.1)
    assert "2 workers: speed-up 1.82" in law.sentence and "10.0%" in law.sentence
    four = amdahl(times(serial(0.1)), 4)
    assert four.serial and four.left_out == [8] and [c.workers for c in four.counts] == [1, 2, 4]
    assert four.serial.value == pytest.approx(0.1)
    headless = {n: t for n, t in times(serial(0.1)).items() if n > 1}
    assert "one worker to compare with" in (gustafson(headless, 8).refusal or "")
    assert amdahl({}, 8).refusal


def test_weak_scaling_that_breaks_down_is_refused() -> None:
    law = gustafson(times(lambda n: 0.02 if n < 8 else 0.08, 0.005), 8)
    assert law.serial is None and "does not describe" in law.sentence


def test_counts_of_different_rounds_are_resampled_each_by_itself() -> None:
    apart = {n: {r + 100 * n: t for r, t in rounds.items()} for n, rounds in times(serial(0.1), 0.02).items()}
    law = amdahl(apart, 8)
    assert law.counts[1].speedup.low < law.counts[1].speedup.value < law.counts[1].speedup.high


def test_karp_flatt_by_hand() -> None:
    assert karp_flatt(np.array([2.0]), np.array([4.0]))[0] == pytest.approx((1 / 2 - 1 / 4) / (3 / 4))


def timed(workers: int, batch: int, repeat: int, seconds: float, **more: Any) -> Trial:
    factors: Factors = {"network": "cnn", "plan": "dp={workers}", "workers": workers, "batch": batch}
    words: dict[str, Any] = {"study": "s", "status": "ok", "seconds": 1.0, "started": "x", "version": "0"}
    measures = {"step_seconds": seconds}
    return Trial(factors=factors | more.pop("factors", {}), repeat=repeat, measures=measures, **words | more)


def test_trials_of_a_study_are_sorted_into_strong_and_weak_scaling() -> None:
    strong = [timed(n, 128, r, serial(0.1)(n)) for n in COUNTS for r in range(6)]
    weak = [timed(n, 128 * n, r, 0.02 * n / (n - 0.2 * (n - 1))) for n in COUNTS[1:] for r in range(6)]
    other = [timed(n, 128, 0, 0.01, factors={"engine": "torch"}) for n in (1, 2)]
    lost = [timed(8, 128, 9, 99.0, status="failed", reason="it died")]
    found = laws([*strong, *weak, *other, *lost], 8)
    by_law = {(law.law, str(factors.get("engine", ""))): (factors, law) for factors, law in found}
    factors, law = by_law["amdahl", ""]
    assert factors["batch"] == 128 and law.serial and law.serial.value == pytest.approx(0.1)
    factors, law = by_law["gustafson", ""]
    assert factors["batch_per_worker"] == 128 and law.serial and law.serial.value == pytest.approx(0.2)
    assert "there are 1, 2" in (by_law["amdahl", "torch"][1].refusal or "")
    assert laws([timed(1, 128, 0, 0.1)], 8) == []
