"""Whole races replayed from recorded rounds: dropping out makes nobody wrong, and saves what it promises."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import race_check as check  # noqa: E402

PLANS = list(json.loads(check.DATA.read_text())["copies"].values())


def test_faster_is_rarely_said_of_plans_alike_that_race() -> None:
    """At most 5%: one of 24 races, or two by chance; that any of four is said to be slower is twice as often wrong."""
    found = check.races(PLANS, 8, 24, 0)
    assert found["faster"] <= 2 / 24 and found["slower"] <= 4 / 24


def test_what_is_far_behind_is_told_apart_and_leaves_its_rounds_to_today() -> None:
    found = check.races(PLANS, 8, 4, 12)
    assert found["behind"] >= 0.95 and found["faster"] == 0
    assert found["rounds_of_those_behind"] < 8 < 10 < found["rounds_of_today"]


def test_dropping_out_whenever_a_median_is_larger_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: of those alike some drop out then, and are called slower."""
    everybody = lambda pairs, risk=0.03: set(pairs)  # noqa: E731
    monkeypatch.setattr(check.racing, "apart", everybody)
    monkeypatch.setattr(check, "apart", everybody)
    assert check.races(PLANS, 8, 4, 0)["slower"] > 0.5
