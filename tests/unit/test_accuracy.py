"""What plans learn: who is trained, for how long, the same points for all, and why nobody was."""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sample_study
import torch

from paraxis import accuracy
from paraxis.accuracy import LOOKS, Pupil, learn, looks, pupils, reserve
from paraxis.errors import RankError
from paraxis.experiment import blank
from paraxis.measure.records import HeldOut, Study, Verified
from paraxis.plan.plan import parse
from paraxis.recommend import chance_of, recommend
from paraxis.rounds import Clock, Row, compared
from paraxis.task.batches import ArraySource
from paraxis.task.data import Arrays
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

PROVED = Verified(against="serial", max_relative_difference=1e-7, tolerance=1e-5, passed=True)
PLANS = {  # seconds of a step
    "engine=plain,threads=2": 0.02,
    "engine=torch": 0.03,
    "dp=2,comm=mpi": 0.01,
    "dp=2,comm=gloo": 0.012,
    "dp=2,sync=average@8,comm=mpi": 0.009,
    "dp=2,sync=average@epoch,comm=mpi": 0.008,
    "dp=2,sync=hogwild,engine=native": 0.011,
}


@dataclass
class Fake:
    """A session that scores and trains on a clock of its own; accuracy grows with the steps that a plan has had."""

    has_test: bool = True
    score_seconds: float = 1e-5  # a sample
    fails: str = ""
    now: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)
    plans: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    spec: Any = field(default_factory=lambda: TaskSpec(data="synthetic:256,6,3"))

    def known(self) -> Any:
        return SimpleNamespace(has_test=self.has_test, batch=32, steps_per_epoch=100)

    def tell(self, what: str, fraction: float) -> None:
        """Nobody listens."""

    def home_alive(self, plan: Any) -> bool:
        return True

    def setup(self, key: str, plan: Any) -> None:
        if self.fails and plan.text() == parse(self.fails).text():
            raise RankError("rank 1 of 2 died")
        self.steps[key], self.plans[key] = 0, plan

    def ask(self, key: str, plan: Any, request: dict[str, Any]) -> list[Any]:
        if request["do"] == "drop":
            self.dropped.append(key)
            return [{}]
        assert request["do"] == "evaluate" and request["set"] == "test"
        scored = min(request["most"], 10_000)
        self.now += scored * self.score_seconds
        right = scored * self.steps[key] / (self.steps[key] + 10)
        return [{"loss": 2.0 * scored, "weight": scored, "hits": right, "samples": scored}]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have `learn` run on a fake session's clock; returns (session, study, rows) of a budget."""

    def run(fake: Fake, budget: float = 60.0, spent: float = 0.0) -> tuple[Study, list[Row]]:
        def train_steps(session: Any, plan: Any, count: int, done: int, total: int, key: str) -> list[float]:
            fake.steps[key] += count
            fake.now += count * PLANS[next(text for text in PLANS if parse(text) == plan)]
            return [1.0] * count

        monkeypatch.setattr(accuracy, "train_steps", train_steps)
        monkeypatch.setattr(time, "perf_counter", lambda: fake.now)
        monkeypatch.setattr(time, "monotonic", lambda: fake.now)
        rows, study = measured()
        fake.now = spent
        learn(fake, rows, study, Clock(budget - 6.0, 0.0), budget)  # type: ignore[arg-type]
        return study, rows

    return run


def measured() -> tuple[list[Row], Study]:
    rows = []
    for text, seconds in PLANS.items():
        row = Row(parse(text), text, blank(parse(text)), measured=dict.fromkeys(range(5), seconds))
        row.result.step_seconds, row.result.verified = row.sorted.record(), PROVED
        rows.append(row)
    task = {"network": "mlp", "batch": 32}
    study = sample_study.bare(task=task, today=rows[0].result, results=[row.result for row in rows[1:]])
    study.recommendation = recommend(study, *compared(rows))
    return rows, study


def test_the_winner_today_and_the_fastest_of_each_inexact_kind_are_trained() -> None:
    rows, study = measured()
    assert [pupil.row.key for pupil in pupils(rows, study)] == [
        "engine=plain,threads=2",
        "dp=2,comm=mpi",
        "dp=2,sync=average@epoch,comm=mpi",
        "dp=2,sync=hogwild,engine=native",
    ]
    rows[-2].result.status = "failed"  # average@epoch
    assert "dp=2,sync=average@8,comm=mpi" in [pupil.row.key for pupil in pupils(rows, study)]


def test_all_have_the_same_points_within_the_share_of_the_budget(train: Any) -> None:
    fake = Fake()
    study, rows = train(fake)
    seen = [row.result.learned for row in rows if row.result.learned]
    assert len(seen) == 4 and study.accuracy_skipped is None
    assert len({tuple(s.steps) for s in seen}) == 1 and len(seen[0].steps) == LOOKS
    assert seen[0].samples == [32 * n for n in seen[0].steps]
    assert all(s.accuracy == pytest.approx([n / (n + 10) for n in s.steps]) for s in seen)
    assert seen[0].seconds == pytest.approx([0.02 * n for n in seen[0].steps]), "looking does not count"
    assert 0.6 * 9.0 < fake.now <= 9.0  # 15% of 60 s
    assert study.held_out == HeldOut(name="test", samples=10_000)
    assert set(fake.dropped) == set(PLANS), "what was set up to be timed is given back"


def test_held_out_samples_are_thinned_where_looking_would_take_too_long(train: Any) -> None:
    study, _ = train(fake := Fake(score_seconds=2e-4))
    assert study.held_out and 500 <= study.held_out.samples < 1000 and fake.now <= 9.0 + 0.2


def test_a_slow_machine_ends_it_with_the_points_that_all_have(train: Any) -> None:
    fake = Fake()
    real = fake.ask

    def slower(key: str, plan: Any, request: dict[str, Any]) -> list[Any]:
        fake.now += 0.5 * (request["do"] == "evaluate" and fake.steps[key] > 0)
        return real(key, plan, request)

    fake.ask = slower  # type: ignore[method-assign]
    _, rows = train(fake)
    seen = [row.result.learned for row in rows if row.result.learned]
    assert len(seen) == 4 and len({tuple(s.steps) for s in seen}) == 1 and 1 <= len(seen[0].steps) < LOOKS
    assert all(len(s.steps) == len(s.accuracy) == len(s.seconds) == len(s.loss) == len(s.samples) for s in seen)


def test_a_plan_that_fails_is_left_out_and_said(train: Any) -> None:
    study, rows = train(Fake(fails="dp=2,sync=hogwild,engine=native"))
    assert sum(row.result.learned is not None for row in rows) == 3
    assert any("no accuracy of dp=2 hogwild" in note and "rank 1 of 2 died" in note for note in study.notes)


@pytest.mark.parametrize(
    ("fake", "budget", "spent", "why"),
    [
        (Fake(has_test=False), 60.0, 0.0, "--validation 0.1"),
        (Fake(has_test=False, spec=TaskSpec(network="mine.py")), 60.0, 0.0, "--data npz:FILE with a test set"),
        (Fake(), 10.0, 0.0, "--budget 20"),
        (Fake(), 60.0, 53.9, "have spent the budget; raise --budget"),
        (Fake(score_seconds=1e-3), 25.0, 16.0, "fewer than 20 tell nothing; raise --budget"),
    ],
)
def test_why_there_is_none_is_said(train: Any, fake: Fake, budget: float, spent: float, why: str) -> None:
    study, rows = train(fake, budget, spent)
    assert why in study.accuracy_skipped and study.held_out is None
    assert not any(row.result.learned for row in rows)


def test_a_network_too_slow_for_it_is_not_set_up_again(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, seconds in list(PLANS.items()):
        monkeypatch.setitem(PLANS, text, 50 * seconds)
    study, _ = train(fake := Fake())
    assert "fewer than 20 tell nothing" in study.accuracy_skipped and not fake.plans and fake.now == 0


def test_nothing_was_measured() -> None:
    study = sample_study.bare()
    learn(Fake(), [], study, Clock(54.0), 60.0)  # type: ignore[arg-type]
    assert "raise --budget" in study.accuracy_skipped  # type: ignore[operator]


def test_nothing_is_kept_for_it_where_nothing_can_be_scored() -> None:
    assert reserve(Fake(), 60.0) == pytest.approx(9.0)  # type: ignore[arg-type]
    assert reserve(Fake(), 15.0) == 0 and reserve(Fake(has_test=False), 60.0) == 0  # type: ignore[arg-type]


def test_looks_grow_as_squares_and_end_with_the_last_step() -> None:
    assert looks(36) == [1, 4, 9, 16, 25, 36] and looks(2) == [1, 2]
    assert Pupil(measured()[0][0], "key").learned.steps == []


def test_the_recommendation_says_the_inexact_plans_accuracy_or_to_compare_it(train: Any) -> None:
    study, rows = train(Fake())
    again = recommend(study, *compared(rows))
    assert again and "dp=2 average@epoch mpi is 1.25x faster a step, but another algorithm: after " in again.why
    assert "its test accuracy is 9" in again.why and "that of dp=2 mpi 9" in again.why and "±" in again.why
    study, rows = train(Fake(), 10.0)
    again = recommend(study, *compared(rows))
    assert again and "compare its accuracy first (15% of the budget" in again.why


def test_chance_shrinks_with_the_samples_and_is_not_nothing_at_the_ends() -> None:
    assert chance_of(0.9, 10_000) == pytest.approx(0.0059, abs=1e-4)
    assert chance_of(0.9, 100) == pytest.approx(0.06, abs=5e-3) and chance_of(1.0, 100) > 0.02


def test_a_thinned_source_is_spread_over_the_set_and_kept() -> None:
    arrays = Arrays(np.arange(40, dtype=np.uint8).reshape(10, 4), np.arange(10), 10)
    whole = ArraySource(arrays, 4, 0, torch.float32, shuffled=False)
    few = whole.thinned(4)
    assert few.size == 4 and few.steps_per_epoch == 1 and few.targets.tolist() == [0, 3, 6, 9]
    assert few.inputs[:, 0].tolist() == [0, 12, 24, 36] and few.inputs.is_contiguous() and few.targets.is_contiguous()
    assert whole.thinned(4) is few, "engines know its samples by their identity"
    assert whole.thinned(10) is whole and whole.thinned(9).targets.tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("plan", ["engine=plain,threads=1", "engine=torch", "engine=native"])
def test_every_engine_scores_the_thinned_set_as_it_scores_the_whole(plan: str) -> None:
    """One sample in three of 10,000, by hand and by the duty: the same loss and the same hits."""
    if "native" in plan:
        pytest.importorskip("paraxis._native")
    from paraxis.run.duties import Duties

    duties = Duties("solo")
    cpus: list[Any] = []
    setup = {"key": "p", "plan": parse(plan).text(), "dtype": "float32", "cpus": cpus}
    try:
        duties.take_task({"spec": {"network": "mlp"}}, b"", lambda _: None)
        duties.setup(setup, b"", lambda _: None)
        asked = [{"key": "p", "set": "test", "most": most} for most in (4000, 0, 4000)]
        few, whole, again = (duties.evaluate(request, b"", lambda _: None) for request in asked)
        task = make_task(duties.spec, {}, torch.float32, plain=True)
        with torch.no_grad():
            out, y = task.net(task.test.share(0, 0, 10_000)[0][::3]), task.test.targets[::3]  # type: ignore[union-attr]
    finally:
        torch.set_num_threads(duties.default_threads)
    assert few == again and few["samples"] == 3334 and whole["samples"] == 10_000
    assert few["hits"] == float((out.argmax(1) == y).sum()) != whole["hits"]
    assert few["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(out, y, reduction="sum")), rel=1e-5)
