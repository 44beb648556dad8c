"""The measuring loop, with ranks that only say how long a step took: when it ends, what it keeps and sets aside."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_study

from paraxis import rounds
from paraxis.errors import RankError
from paraxis.experiment import blank
from paraxis.measure.records import Study, Verified
from paraxis.measure.samples import Book, open_book, read
from paraxis.plan.plan import parse
from paraxis.rounds import Clock, Row, measure, resume

PROVED = Verified(against="serial", max_relative_difference=1e-7, tolerance=1e-5, passed=True)


@dataclass
class Fake:
    """A session whose steps take so many seconds each, give or take `noise`, on a clock that only they move."""

    speeds: dict[str, float]
    noise: float = 0.01
    now: float = 0.0
    fails: str = ""
    pools: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def ask(self, key: str, plan: Any, request: dict[str, Any]) -> list[Any]:
        if key == self.fails:
            raise RankError("rank 1 of 2 died")
        self.asked.append(key)
        seconds = request["steps"] * self.speeds[key] * float(self.rng.lognormal(0, self.noise))
        self.now += seconds * (1 + request["warm"] / request["steps"])
        return [{"seconds": seconds, "traces": [], "losses": [(1.0, 1.0)] * request["steps"]}]

    def tell(self, what: str, fraction: float) -> None:
        """Nobody listens."""

    def home_alive(self, plan: Any) -> bool:
        return True


@dataclass(frozen=True)
class FakeClock(Clock):
    fake: Any = None

    def spent(self) -> float:
        return float(self.fake.now)


def row(text: str, key: str) -> Row:
    plan = parse(text)
    made = Row(plan, key, blank(plan))
    made.result.verified = None if plan.engine == "plain" else PROVED
    return made


def three() -> list[Row]:
    return [row("engine=plain,threads=2", "today"), row("engine=torch", "serial"), row("dp=2,comm=mpi", "dp")]


def run(
    monkeypatch: pytest.MonkeyPatch,
    fake: Fake,
    rows: list[Row],
    budget: float = 60.0,
    book: Book | None = None,
    foreign: Any = lambda number: 0.0,
) -> Study:
    """Measure; `foreign` are the cores that others keep busy in a round."""
    count = iter(range(10**6))

    class Load:
        def __init__(self, pids: list[int]) -> None:
            self.number = next(count)

        def cores(self) -> float:
            return float(foreign(self.number))

    monkeypatch.setattr(rounds, "ForeignLoad", Load)
    study = sample_study.bare()
    measure(fake, rows, FakeClock(budget, fake=fake), study, book or Book())  # type: ignore[arg-type]
    return study


def test_a_clear_answer_ends_before_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, rows = Fake({"today": 2e-3, "serial": 3e-3, "dp": 1e-3}), three()
    study = run(monkeypatch, fake, rows)
    assert len(rows[0].measured) == rounds.LOOKS[0] and fake.now < 60
    assert any("the answer was clear after 10 rounds" in note for note in study.notes)
    assert len(rows[1].measured) < len(rows[2].measured), "what is far behind has a chunk in every third round"


def test_a_doubtful_one_takes_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, rows = Fake({"today": 1e-3, "serial": 1e-3, "dp": 1e-3}, noise=0.2), three()
    study = run(monkeypatch, fake, rows, budget=20.0)
    assert fake.now >= 20 and len(rows[0].measured) > rounds.LOOKS[0]
    assert not any("clear" in note for note in study.notes)


def test_equals_known_well_enough_end_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, rows = Fake({"today": 1e-3, "serial": 1e-3, "dp": 1e-3}, noise=0.002), three()
    study = run(monkeypatch, fake, rows, budget=600.0)
    assert fake.now < 100 and any("clear" in note for note in study.notes)


def test_every_sample_is_kept_and_a_later_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake, rows, book = Fake({"today": 1e-3, "serial": 1e-3, "dp": 1e-3}, noise=0.2), three(), open_book(tmp_path)
    run(monkeypatch, fake, rows, budget=3.0, book=book)
    kept = read(tmp_path / "samples.jsonl")
    assert len(kept) == len(fake.asked) == sum(len(r.measured) for r in rows)
    again, more = three(), Book(book.path, list(kept))
    resume(again, more)
    assert [r.measured for r in again] == [r.measured for r in rows]
    assert all(r.lacks for r in again), "each plan is traced anew, be it once"
    for r in again:
        r.measured = {}
    run(monkeypatch, Fake(fake.speeds, noise=0.2), again, budget=3.0, book=more)
    assert all(r.measured.items() <= s.measured.items() for r, s in zip(rows, again, strict=True))
    now = read(tmp_path / "samples.jsonl")
    assert now[: len(kept)] == kept and len(now) > len(kept)
    assert len({(s.plan, s.round) for s in now}) == len(now)


def test_disturbed_rounds_are_repeated_and_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, rows = Fake({"today": 1e-3, "serial": 1e-3, "dp": 1e-3}, noise=0.1), three()
    study = run(monkeypatch, fake, rows, budget=30.0, foreign=lambda number: 1.0 if number in (2, 5) else 0.0)
    record = rows[0].sorted.record()
    assert len(record.disturbed) == 2 and len(record.samples) == len(rows[0].measured) - 2
    assert any("2 of" in note and "set aside" in note for note in study.notes)
    assert study.machine.foreign_cores == 0


def test_a_machine_that_is_never_calm_is_measured_and_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, rows = Fake({"today": 1e-3, "serial": 1e-3, "dp": 1e-3}, noise=0.1), three()
    study = run(monkeypatch, fake, rows, budget=5.0, foreign=lambda number: 0.9)
    assert rows[0].times == rows[0].measured and study.machine.foreign_cores == 0.9
    assert any("0.9 cores busy" in note for note in study.notes)


def test_a_plan_that_fails_is_left_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, rows = Fake({"today": 2e-3, "serial": 1e-3, "dp": 1e-3}, fails="dp"), three()
    run(monkeypatch, fake, rows, budget=3.0)
    assert rows[2].result.status == "failed" and not rows[2].measured and len(rows[1].measured) >= 3


def test_three_rounds_are_measured_however_small_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = three()
    run(monkeypatch, Fake({"today": 5.0, "serial": 5.0, "dp": 5.0}), rows, budget=1.0)
    assert [len(r.measured) for r in rows] == [3, 3, 3]


def test_a_plan_that_joins_later_has_its_three_rounds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With today in each of them, to be compared with."""
    rows, book = three(), Book()
    run(monkeypatch, Fake({"today": 1.0, "serial": 1.0}), rows[:2], budget=9.0, book=book)
    late = row("pp=2,microbatches=4,comm=mpi", "pp")
    before = len(rows[1].measured)
    run(monkeypatch, Fake({"today": 1.0, "serial": 1.0, "pp": 1.0}), [*rows[:2], late], budget=0.5, book=book)
    assert len(late.measured) == 3 and late.measured.keys() <= rows[0].measured.keys()
    assert len(rows[1].measured) == before
