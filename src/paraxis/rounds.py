"""Measuring: a chunk of every plan a round, in random order, until the answer is clear or the budget is spent.

It is a race (Maron and Moore 1994): at fixed looks, plans that are told apart from the best as slower drop out, and the
rounds that are left go to those that may still be it, to today and to the serial baseline. A look asks for a level that
pays for all looks, and a plan that has dropped out is compared in the rounds that it had.
"""

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
from paraxis.measure.statistics import ENOUGH, RISK, Pair, Sorted, apart, clear, paired, sort_rounds
from paraxis.plan.plan import Plan
from paraxis.proof import mean_losses
from paraxis.session import Session, failure

TRACED = 1024  # of the last steps of every chunk, those whose instructions are accounted for
SHORTEST, LONGEST = 0.04, 0.4  # seconds of a chunk
PLANNED, FEWEST, MOST = 20, 3, 200  # rounds: as many as the budget is cut into, at least of a plan, at most
LOOKS = (6, 8, 10, 14, 20, 28, 40, 56, 80, 112, 160)  # rounds after which plans drop out, or all are done
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
    cost: float = 0.0  # seconds that its last chunk has taken, all in all
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
    def races(self) -> bool:
        """Whether it is measured any further."""
        return self.live and (self.lacks or not self.result.stopped)

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


def together(first: Row, other: Row) -> Pair:
    """Step seconds of both, of the rounds that both had, sorted as if there were no others."""
    common = first.measured.keys() & other.measured.keys()
    mine, theirs = (sort_rounds({r: row.measured[r] for r in common}, row.disturbed).kept for row in (first, other))
    return mine, theirs


def measure(session: Session, rows: list[Row], clock: Clock, study: Study, book: Book, spare: float = 0.0) -> None:
    """Rounds in random order until the answer is clear or the budget ends; every plan that races has a chunk in each.

    A round that other programs disturbed does not count where enough calm ones do. `spare` are seconds beyond the
    budget, for the rounds without which the best plan cannot be told apart from what it is compared with.
    """
    resume([row for row in rows if row.live], book)
    number = 1 + max((s.round for s in book.samples), default=-1)
    while (due := _due(rows, clock.left(), spare)) or clock.left() > 0:
        live = [row for row in rows if row.races]
        if not live or number >= MOST:
            break
        _choose_chunks(live, clock, _calm(rows))
        load = ForeignLoad([pid for pool in session.pools.values() for pid in pool.pids])
        for row in random.Random(number).sample(live, len(live)):
            if clock.left() <= 0 and row.key not in due:
                continue
            session.tell(f"measuring, round {number + 1}", min(1.0, clock.spent() / clock.budget))
            before = clock.spent()
            _one(session, row, rows, number, load, book)
            row.cost = clock.spent() - before
        _disturbances(rows, book)
        number += 1
        if number in LOOKS and settled(rows):
            study.notes.append(f"the answer was clear after {number} rounds, {clock.left():.0f} s before the end")
            break
    _conclude(rows, study, book)


def _due(rows: list[Row], left: float, spare: float) -> set[str]:
    """Keys of plans that have their chunk in the next round even if the budget ends before their turn.

    Those with next to nothing, with today beside them; then, in the spare time, those that can be given the rounds
    that it takes to tell them apart.
    """
    due = {row.key for row in rows if row.lacks}
    if due:
        return due | {row.key for row in rows if row.live and row.plan.engine == "plain"}
    _afford(rows, left + spare)
    short = [row for row in rows if row.races and len(row.measured) < ENOUGH]
    return {row.key for row in short} if left + spare > 0 else set()


def _one(session: Session, row: Row, rows: list[Row], number: int, load: ForeignLoad, book: Book) -> None:
    """One chunk of one plan; a plan that fails has no more."""
    try:
        answers = chunk(session, row, warm=1 + row.steps // 10, steps=row.steps, trace=TRACED)
    except ParaxisError as error:
        row.result.status, row.result.reason = failure(error)
        for other in rows:
            other.result.stopped = None  # it may have been what they were slower than
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


def best_of(rows: list[Row]) -> Row | None:
    """The fastest exact plan that was proved, of those that have not dropped out."""
    proved = [row for row in rows if row.live and row.times and row.result.verified and row.result.exact]
    racing = [row for row in proved if not row.result.stopped]
    return min(racing or proved, key=lambda row: median(row.times.values()), default=None)


def compared(rows: list[Row]) -> tuple[Result | None, list[tuple[Result, Pair]]]:
    """The best plan, and the exact ones that it is compared with, today among them, in the rounds that both had."""
    best = best_of(rows)
    if best is None:
        return None, []
    others = [row for row in rows if row is not best and row.live and row.times and row.result.exact]
    return best.result, [(row.result, together(best, row)) for row in others]


def baseline_of(rows: list[Row]) -> Row | None:
    """The fastest serial plan, today among them."""
    serial = [row for row in rows if row.live and row.times and row.plan.mesh.size == 1]
    return min(serial, key=lambda row: median(row.times.values()), default=None)


def _staying(rows: list[Row]) -> list[Row]:
    """The best plan, today and the baseline, with which others are compared: they have their part in every round."""
    compared = best_of(rows), baseline_of(rows)
    return [row for row in rows if row.plan.engine == "plain" or any(row is own for own in compared)]


def settled(rows: list[Row]) -> bool:
    """A look: slower plans drop out or come back. Whether more rounds would say little more of those that race.

    Those it would say little of are told apart from the best or hardly different (see `clear`); today also needs a
    ratio known well.
    """
    best = best_of(rows)
    if best is None:
        return False
    others = {row.key: row for row in rows if row is not best and row.live and row.measured}
    pairs = {key: together(best, row) for key, row in others.items()}
    told, staying = apart(pairs, RISK / len(LOOKS)), {row.key for row in _staying(rows)}
    for key, row in others.items():
        if key in told and key not in staying and not _faster(*pairs[key]):
            row.result.stopped = row.result.stopped or _beaten(row, best, pairs[key])
        elif len(row.measured) >= ENOUGH:  # else see `_afford`
            row.result.stopped = None
    wide = {key: TODAY_WIDTH if row.plan.engine == "plain" else math.inf for key, row in others.items()}
    return all(clear(pair, key in told, wide[key]) for key, pair in pairs.items())


def _faster(first: dict[int, float], other: dict[int, float]) -> bool:
    """Whether the other took less time than the first in half of their rounds or more."""
    return median(other[r] / first[r] for r in first.keys() & other.keys()) <= 1


def _beaten(row: Row, best: Row, pair: Pair) -> str:
    """Why it has no further rounds."""
    ratio = paired(*pair)
    assert ratio is not None, "they had rounds in common"
    return (
        f"measured in {len(row.measured)} rounds: told apart from {best.result.label}, which is {ratio.median:.2f} "
        f"times as fast [{ratio.low:.2f}-{ratio.high:.2f}], so that others had the rest"
    )


def _afford(rows: list[Row], left: float) -> None:
    """Where so many seconds have not the rounds for all that it takes to tell plans apart, the slowest go without, for
    the fastest have to have them, and first of all those that others are compared with."""
    short = [row for row in rows if row.live and len(row.measured) < ENOUGH]
    staying = {row.key for row in _staying(rows)} if short else set()
    own = {row.key: row.cost * (ENOUGH - len(row.measured)) for row in short}
    left -= sum(seconds for key, seconds in own.items() if key in staying)
    for row in sorted(short, key=lambda row: median(row.measured.values())):
        row.result.stopped = None
        if row.key in staying:
            continue
        if own[row.key] <= left:
            left -= own[row.key]
        else:
            row.result.stopped = (
                f"measured in {len(row.measured)} rounds: the budget had no more for slower plans, and fewer than "
                f"{ENOUGH} tell nothing apart; raise --budget"
            )


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
    used = any(row.times.keys() & row.disturbed for row in rows if not row.result.stopped)
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


def _choose_chunks(live: list[Row], clock: Clock, calm: int) -> None:
    """Chunks such that the planned rounds fit into what is left."""
    to_go = max(2.0, PLANNED - calm)
    length = min(LONGEST, max(SHORTEST, clock.left() / to_go / len(live) * 0.8))
    for row in live:
        known = median(row.measured.values()) if row.measured else 0.1 / row.steps
        row.steps = max(1, min(5000, round(length / max(known, 1e-6))))
