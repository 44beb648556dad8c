"""The measuring loop, with ranks that only say how long a step took: when it ends, what it keeps and sets aside."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_study

from paraxis import experiment, rounds
from paraxis.errors import RankError
from paraxis.experiment import blank
from paraxis.measure.records import Study, Verified
from paraxis.measure.samples import Book, open_book, read
from paraxis.measure.statistics import apart
from paraxis.plan.plan import parse
from paraxis.rounds import Clock, Row, compared, measure, resume, together

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
        return [{"seconds": seconds, "window": None, "losses": [(1.0, 1.0)] * request["steps"]}]

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
    spare: float = 0.0,
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
    measure(fake, rows, FakeClock(budget, fake=fake), study, book or Book(), spare)  # type: ignore[arg-type]
    return study


def test_a_clear_answer_ends_before_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, rows = Fake({"today": 2e-3, "serial": 3e-3, "dp": 1e-3}), three()
    study = run(monkeypatch, fake, rows)
    assert len(rows[0].measured) == rounds.LOOKS[0] and fake.now < 60
    assert any("the answer was clear after 6 rounds" in note for note in study.notes)


def test_a_doubtful_one_takes_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, rows = Fake({"today": 1e-3, "serial": 1e-3, "dp": 1e-3}, noise=0.2), three()
    study = run(monkeypatch, fake, rows, budget=20.0)
    assert fake.now >= 20 and len(rows[0].measured) > rounds.LOOKS[0]
    assert not any("clear" in note for note in study.notes)


def test_equals_known_well_enough_end_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, rows = Fake({"today": 1e-3, "serial": 1e-3, "dp": 1e-3}, noise=0.002), three()
    study = run(monkeypatch, fake, rows, budget=600.0)
    assert fake.now < 100 and any("clear" in note for note in study.notes)


def field_of(speeds: dict[str, float]) -> list[Row]:
    """Today, and plans that differ in `dp` alone."""
    texts = [f"dp={n + 2},comm=mpi" if n else "serial" for n in range(len(speeds) - 1)]
    return [row("engine=plain,threads=2", "today"), *map(row, texts, list(speeds)[1:])]


def test_slower_plans_drop_out_and_leave_their_rounds_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"today": 3e-3, "serial": 2e-3, "a": 1e-3, "b": 1.02e-3} | {f"slow {n}": 4e-3 for n in range(12)}
    fake, rows = Fake(speeds, noise=0.1), field_of(speeds)
    run(monkeypatch, fake, rows, budget=30.0)
    had = {r.key: len(r.measured) for r in rows}
    slow = [r for r in rows if r.key.startswith("slow")]
    assert all(r.result.stopped and "told apart from dp=" in r.result.stopped for r in slow)
    assert all("times as fast [" in (r.result.stopped or "") and had[r.key] <= 10 for r in slow)
    assert min(had[key] for key in ("today", "serial", "a", "b")) > 2 * max(had[r.key] for r in slow)
    assert not any(r.result.stopped for r in rows[:4]), "the baseline is slower, but others are compared with it"
    best, others = compared(rows)
    assert best is not None and best.label in ("dp=3 mpi", "dp=4 mpi") and len(others) == len(rows) - 1
    told = apart({result.plan: pair for result, pair in others})
    assert {r.result.plan for r in (*slow, *rows[:2])} <= told


def test_without_dropping_out_the_near_ones_would_have_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the test above."""
    speeds = {"today": 3e-3, "serial": 2e-3, "a": 1e-3, "b": 1.02e-3} | {f"slow {n}": 4e-3 for n in range(12)}
    fake, rows = Fake(speeds, noise=0.1), field_of(speeds)
    monkeypatch.setattr(rounds, "settled", lambda rows: False)
    run(monkeypatch, fake, rows, budget=30.0)
    assert len({len(r.measured) for r in rows}) <= 2


def test_what_was_slower_than_a_plan_that_failed_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"today": 3e-3, "serial": 4e-3, "a": 1e-3, "b": 5e-3}
    fake, rows = Fake(speeds, noise=0.3), field_of(speeds)
    dropped: list[int] = []

    def tell(what: str, fraction: float) -> None:
        out = [r.key for r in rows if r.result.stopped]
        if out and not fake.fails:
            dropped.extend(len(r.measured) for r in rows if r.key in out)
            fake.fails = "a"

    monkeypatch.setattr(fake, "tell", tell)
    run(monkeypatch, fake, rows, budget=20.0)
    assert dropped and rows[2].result.status == "failed"
    assert max(len(r.measured) for r in (rows[1], rows[3])) > max(dropped)


def test_a_budget_for_few_rounds_gives_them_to_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds tell nothing apart, six may: where not all can have six, the fastest, today and serial have them."""
    speeds = {"today": 0.1, "serial": 0.1, "a": 0.05, "b": 0.06} | {f"slow {n}": 0.5 for n in range(6)}
    fake, rows = Fake(speeds), field_of(speeds)
    run(monkeypatch, fake, rows, budget=24.0)
    assert [len(r.measured) >= 6 for r in rows[:4]] == [True] * 4
    assert {len(r.measured) for r in rows[4:]} == {3}
    assert all("the budget had no more for slower plans" in (r.result.stopped or "") for r in rows[4:])
    best, others = compared(rows)
    told = apart({result.plan: pair for result, pair in others})
    assert best is rows[2].result and {r.result.plan for r in rows[:2]} <= told
    assert not told & {r.result.plan for r in rows[4:]}, "three rounds tell nothing"


def test_what_takes_little_of_a_short_budget_has_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Today alone would take all that is left: it has the spare time, and the near rival what remains."""
    speeds = {"today": 1.0, "serial": 0.02, "a": 0.01, "rival": 0.011, "slow": 0.5}
    fake, rows = Fake(speeds), field_of(speeds)
    run(monkeypatch, fake, rows, budget=12.0, spare=5.0)
    assert [len(r.measured) >= 6 for r in rows] == [True, True, True, True, False]
    assert "the budget had no more" in (rows[4].result.stopped or "")


def test_what_the_answer_needs_is_measured_in_the_time_that_is_spared_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rounds of the best, today and the baseline, for fewer tell nothing apart."""
    speeds = {"today": 0.3, "serial": 0.2, "a": 0.05, "b": 0.4}
    for spare, wanted in ((0.0, [3, 3, 3, 3]), (5.0, [6, 6, 6, 3])):
        fake, rows = Fake(speeds), field_of(speeds)
        run(monkeypatch, fake, rows, budget=5.0, spare=spare)
        assert [len(r.measured) for r in rows] == wanted and fake.now < 5 + max(spare, 1)


def test_who_dropped_out_is_compared_in_the_rounds_that_both_had() -> None:
    """The machine gets faster: what the winner had before counts as warm-up, but not beside plans that had no more."""
    fast, slow = row("dp=2,comm=mpi", "fast"), row("pp=2,comm=mpi", "slow")
    fast.measured = {n: (2e-3 if n < 8 else 1e-3) * (1 + n % 3 / 100) for n in range(30)}
    slow.measured = {n: 1.9e-2 * (1 + n % 2 / 100) for n in range(8)}
    assert not fast.times.keys() & slow.times.keys()
    mine, theirs = together(fast, slow)
    assert mine.keys() == theirs.keys() == set(range(8)) and apart({"slow": (mine, theirs)}) == {"slow"}


def test_a_plan_that_dropped_out_does_not_win_by_having_stopped_in_better_times() -> None:
    fast, slow = row("dp=2,comm=mpi", "fast"), row("pp=2,comm=mpi", "slow")
    fast.measured, slow.measured = {n: 1e-3 * 1.1**n for n in range(30)}, dict.fromkeys(range(6), 0.002)
    assert compared([fast, slow])[0] is slow.result
    slow.result.stopped = "measured in 6 rounds"
    assert compared([fast, slow])[0] is fast.result and compared([slow])[0] is slow.result
    assert compared([row("engine=plain", "today")]) == (None, [])


@pytest.mark.parametrize("cost, reached", [(0.01, 9), (0.5, 7), (50.0, 2)])
def test_no_more_plans_are_set_up_than_can_be_told_apart(
    monkeypatch: pytest.MonkeyPatch, cost: float, reached: int
) -> None:
    """Of 60 s each proof takes 4: ten in 60% of it, fewer where six rounds of all take long, and three in any case."""
    speeds = {"today": 1.0} | {str(n): 1.0 for n in range(16)}
    fake, rows = Fake(speeds), field_of(speeds)

    def prove(session: Any, own: Row) -> None:
        fake.now += 4.0
        own.cost = cost

    monkeypatch.setattr(experiment, "_prove_row", prove)
    for name in ("_time_once", "_memory"):
        monkeypatch.setattr(experiment, name, lambda session, own: None)
    experiment._set_up(fake, rows, FakeClock(60.0, fake=fake), lambda: None)  # type: ignore[arg-type]
    assert [r.live for r in rows] == [n <= reached for n in range(len(rows))]
    assert all("raise --budget" in (r.result.reason or "") for r in rows if not r.live)


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
