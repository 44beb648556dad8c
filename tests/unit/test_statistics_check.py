"""The statistics held to recorded rounds: what is alike is rarely told apart, and what is not is found."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import statistics_check as check  # noqa: E402

PLANS = list(json.loads(check.DATA.read_text())["copies"].values())


@pytest.mark.parametrize("rounds", [10, 20])
@pytest.mark.parametrize("others", [1, check.OTHERS])
def test_faster_is_rarely_said_of_plans_that_are_alike(rounds: int, others: int) -> None:
    """At most 5%; 400 draws may show 3 points more by chance."""
    assert check.rates(PLANS, rounds, 0.0, 400, others, looks=False) <= 0.08


def test_the_fastest_of_several_alike_is_not_said_to_be_faster() -> None:
    assert check.chosen(PLANS, 20, 300) <= 0.08


def test_looking_often_costs_no_more() -> None:
    assert check.rates(PLANS, 24, 0.0, 40, 1, looks=True) <= 0.05 + 0.1


def test_what_is_much_slower_is_found() -> None:
    found = [check.rates(PLANS, rounds, 1.0, 60, check.OTHERS, looks=False) for rounds in (6, 20)]
    assert found[0] < found[1] and found[1] >= 0.9


def test_a_bootstrap_that_is_too_eager_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a rule that trusts the sign of any median is caught by it."""
    monkeypatch.setattr(check, "told_apart", lambda first, other, level: True)
    assert check.rates(PLANS, 10, 0.0, 100, check.OTHERS, looks=False) > 0.9


def test_drawn_plans_are_alike_and_keep_neighbours_together() -> None:
    columns = np.arange(80).reshape(2, 40)  # the round and the copy can be told from a value
    first, second = check.draw(columns, 12, np.random.default_rng(0))
    for rounds in (range(n, n + check.BLOCK) for n in range(0, 12, check.BLOCK)):
        places = [int(first[r]) % 40 for r in rounds]
        assert places == [(places[0] + n) % 40 for n in range(check.BLOCK)]
        assert len({first[r] < 40 for r in rounds}) == 1
    assert all(abs(first[r] - second[r]) == 40 for r in range(12))
