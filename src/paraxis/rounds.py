"""Measuring: a chunk of every plan a round, in random order, until the answer is clear or the budget is spent."""

import math
import os
import random
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from paraxis.errors import ParaxisError
from paraxis.measure.breakdown import Window, keep_middle, window
from paraxis.measure.machine import ForeignLoad
from paraxis.measure.records import Result, Study
from paraxis.measure.samples import Book, Sample, foreign_by_round
from paraxis.measure.statistics import Sorted, at_a_look, clear, corrected, sort_rounds
from paraxis.plan.plan import Plan
from paraxis.proof import mean_losses
from paraxis.session import Session, failure

TRACED = 1024  # of the last steps of every chunk, those whose instructions are accounted for
SHORTEST, LONGEST = 0.04, 0.4  # seconds of a chunk
PLANNED, FEWEST, MOST = 20, 3, 200  # rounds: as many as the budget is cut into, at least of a plan, at most
LOOKS = (10, 14, 20, 28, 40, 56, 80, 112, 160)  # rounds after which it may end because the answer is clear
TODAY_WIDTH = 0.1  # relative, of the interval of the ratio to today, before the answer is clear
DISTURBED = 0.3  # cores that other programs keep busy in a round that does not count as calm


@dataclass
class Row:
    """A plan on its way through the experiment; `measured` are step seconds by round."""

    plan: Plan
    key: str
    result: Result
    measured: dict[int, float] = field(default_factory=dict)
    disturbed: set[int] = field(default_factory=set)  # rounds in which other programs were busy
    windows: dict[int, Window] = field(default_factory=dict)  # of the rounds near the median
    steps: int = 1
    chunks: int = 0  # measured in this run; those of an earlier one have left no traces

    @property
    def live(self) -> bool:
        """Whether it is set up and can be measured."""
        return self.result.status == "ok"

    @property
    def lacks(self) -> bool:
        """Whether it is measured whatever the budget, with today beside it: it has few rounds, or none of this run."""
        return self.live and (len(self.measured) < FEWEST or not self.chunks)

    @property
    def sorted(self) -> Sorted:
        """What was measured: kept, warm-up, disturbed."""
        return sort_rounds(self.measured, self.disturbed)

    @property
    def times(self) -> dict[int, float]:
        """Step seconds by round, of the rounds that count."""
        return self.sorted.kept


@dataclass(frozen=True)
class Clock:
    """The budget, in seconds since the start."""

    budget: float
    start: float = field(default_factory=time.monotonic)

    def spent(self) -> float:
        """Seconds gone."""
        return time.monotonic() - self.start

    def left(self) -> float:
        """Seconds to go."""
        return self.budget - self.spent()


def chunk(session: Session, row: Row, warm: int, steps: int, trace: int) -> list[Any]:
    """Every process' answer to `steps` steps after `warm` uncounted ones, the last `trace` of them traced."""
    request = {"do": "measure", "warm": warm, "steps": steps, "trace": min(trace, steps)}
    answers = session.ask(row.key, row.plan, request)
    row.result.losses += mean_losses([a["losses"] for a in answers])
    return answers


def lost(session: Session, rows: list[Row], fallen: Row) -> None:
    """Ranks have died: what was set up on them must be set up again before it can be measured."""
    for row in rows:
        same = row.plan.comm == fallen.plan.comm and row.plan.processes == fallen.plan.processes
        if row is not fallen and row.live and row.steps > 1 and same:
            session.setup(row.key, row.plan)


def measure(session: Session, rows: list[Row], clock: Clock, study: Study, book: Book) -> None:
    """Rounds in random order until the answer is clear or the budget ends; every plan that lives has a chunk in each.

    Plans that are far behind, or already told apart from the best, take part in every third round only: what is left
    goes into telling apart the others. A round that other programs disturbed does not count where enough calm ones do.
    """
    resume([row for row in rows if row.live], book)
    number = 1 + max((s.round for s in book.samples), default=-1)
    resting: set[str] = set()
    while (lacking := [row.key for row in rows if row.lacks]) or clock.left() > 0:
        resting |= {row.key for row in rows if not row.lacks and _far_behind(row, rows)}
        live = [row for row in rows if row.live and (number % 3 == 0 or row.key not in resting)]
        if not live or number >= MOST:
            break
        _choose_chunks(live, clock, _calm(rows))
        load = ForeignLoad([pid for pool in session.pools.values() for pid in pool.pids])
        for row in random.Random(number).sample(live, len(live)):
            if clock.left() <= 0 and not (row.lacks or (lacking and row.plan.engine == "plain")):
                continue
            session.tell(f"measuring, round {number + 1}", min(1.0, clock.spent() / clock.budget))
            _one(session, row, rows, number, load, book)
        _disturbances(rows, book)
        number += 1
        if number in LOOKS:
            resting = settled(rows)
            if all(row.key in resting for row in rows if row.live):
                study.notes.append(f"the answer was clear after {number} rounds, {clock.left():.0f} s before the end")
                break
    _conclude(rows, study, book)


def _one(session: Session, row: Row, rows: list[Row], number: int, load: ForeignLoad, book: Book) -> None:
    """One chunk of one plan; a plan that fails has no more."""
    try:
        answers = chunk(session, row, warm=1 + row.steps // 10, steps=row.steps, trace=TRACED)
    except ParaxisError as error:
        row.result.status, row.result.reason = failure(error)
        if not session.home_alive(row.plan):
            lost(session, rows, row)
        return
    row.chunks += 1
    row.measured[number] = answers[0]["seconds"] / row.steps
    book.add(
        Sample(
            plan=row.plan.text(),
            round=number,
            seconds=row.measured[number],
            steps=row.steps,
            foreign_cores=round(load.cores(), 3),
            at=round(time.time(), 3),
        )
    )
    if (seen := window(answers)) is not None:
        row.windows = keep_middle(row.windows | {number: seen}, row.times | {number: row.measured[number]})


def _disturbances(rows: list[Row], book: Book) -> None:
    """Mark the rounds in which other programs kept too many cores busy."""
    found = {number for number, cores in foreign_by_round(book.samples).items() if cores > DISTURBED}
    for row in rows:
        row.disturbed = found


def _calm(rows: list[Row]) -> int:
    """Rounds that nothing disturbed."""
    return max((len(row.measured.keys() - row.disturbed) for row in rows), default=0)


def settled(rows: list[Row]) -> set[str]:
    """Keys of plans of which more rounds would say little more (see `clear`); today also needs a ratio known well."""
    have = {row.key: row.times for row in rows if row.live and row.measured}
    proved = [row for row in rows if row.key in have and row.result.verified and row.result.exact]
    if not proved:
        return set()
    best = min(proved, key=lambda row: median(have[row.key].values()))
    level = at_a_look(corrected(len(have) - 1), len(LOOKS))
    wide = {row.key: TODAY_WIDTH if row.plan.engine == "plain" else math.inf for row in rows}
    found = {key for key, times in have.items() if key != best.key and clear(have[best.key], times, level, wide[key])}
    return found | {best.key} if len(found) == len(have) - 1 else found


def resume(rows: list[Row], book: Book) -> None:
    """Give every plan what was measured of it before."""
    for row in rows:
        row.measured = book.of(row.plan)
    _disturbances(rows, book)


def _conclude(rows: list[Row], study: Study, book: Book) -> None:
    """What the machine did meanwhile, and what of it one must know to read the figures."""
    foreign = foreign_by_round(book.samples)
    study.machine.load_after = os.getloadavg()[0]
    if not foreign:
        return
    typical = median(foreign.values())
    study.machine.foreign_cores = round(typical, 2)
    loud = sum(cores > DISTURBED for cores in foreign.values())
    used = any(row.times.keys() & row.disturbed for row in rows)
    if loud and used:
        study.notes.append(
            f"other programs kept {typical:.1f} cores busy while measuring, and too few of {len(foreign)} rounds were "
            "calm to do without the others: intervals are wide for it"
        )
    elif loud:
        study.notes.append(f"{loud} of {len(foreign)} rounds were disturbed by other programs and are set aside")
    restless = [row.result.label for row in rows if row.measured and not row.sorted.stationary]
    if restless:
        study.notes.append(f"still getting faster when measuring ended: {', '.join(restless)}; raise --budget")


def _far_behind(row: Row, rows: list[Row]) -> bool:
    """Slower than twice the best exact plan by its own best step; today, with which that is compared, never is."""
    exact = [other for other in rows if other.live and other.measured and other.result.exact]
    best = min((min(other.measured.values()) for other in exact), default=math.inf)
    return row.plan.engine != "plain" and bool(row.measured) and min(row.measured.values()) > 2 * best


def _choose_chunks(live: list[Row], clock: Clock, calm: int) -> None:
    """Chunks such that the planned rounds fit into what is left."""
    to_go = max(2.0, PLANNED - calm)
    length = min(LONGEST, max(SHORTEST, clock.left() / to_go / len(live) * 0.8))
    for row in live:
        known = median(row.measured.values()) if row.measured else 0.1 / row.steps
        row.steps = max(1, min(5000, round(length / max(known, 1e-6))))
