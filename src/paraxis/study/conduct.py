"""Conducting a study: which trial is next, what is recorded already, what no longer fits the budget."""

import json
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from paraxis import __version__
from paraxis.measure.machine import usable_cores
from paraxis.run.joined import JoinedPool
from paraxis.session import Tell, writable
from paraxis.study.bench import Outcome, open_bench
from paraxis.study.definition import PROCEDURES, Definition, words
from paraxis.study.ledger import Ledger, open_ledger, write_csv
from paraxis.study.scaling import laws
from paraxis.study.trial import Factors, OutOfTime, Runner, Trial, identity

Perform = Callable[[Factors, int, Collection[str]], Outcome]


@dataclass
class Course:
    """A study under way: the seconds it may take and has taken, how many trials there are, which no longer fitted."""

    definition: Definition
    ledger: Ledger
    budget: float
    tell: Tell
    planned: int  # 0 where nobody knows
    start: float = field(default_factory=time.monotonic)
    fresh: list[Trial] = field(default_factory=list)
    missed: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds to go."""
        return self.budget - (time.monotonic() - self.start)

    def time_left(self) -> str:
        """How long the rest will take, by the trials so far; never more than the budget."""
        to_go = self.planned - len(self.ledger.trials) - len(self.missed)
        if not self.fresh or not self.planned:
            return f" ({self.left():.0f} s of the budget left)" if self.budget < float("inf") else ""
        guess = min(to_go * sum(t.seconds for t in self.fresh) / len(self.fresh), self.left())
        return f" (about {max(0.0, guess):.0f} s left)"


def conduct_study(
    definition: Definition, folder: Path, budget: float, tell: Tell, joined: JoinedPool | None = None
) -> dict[str, Any]:
    """Run what is not recorded in `folder` yet and return the document that `--json` prints; raises TaskError."""
    with open_bench(joined, tell, definition.measure_seconds, definition.vary_seed) as bench:
        return conduct(definition, folder, budget, tell, bench.perform)


def conduct(definition: Definition, folder: Path, budget: float, tell: Tell, perform: Perform) -> dict[str, Any]:
    """The same with another way to perform a trial."""
    with open_ledger(writable(folder), definition) as ledger:
        planned = len(list(definition.schedule())) if definition.procedure == "grid" else 0
        course = Course(definition, ledger, budget, tell, planned)
        try:
            analysis = _procedure(course, perform)
        finally:
            with suppress(OSError):  # it repeats the records, and must not hide what ended the study
                write_csv(ledger.trials, folder / "trials.csv")
        return {
            "study": definition.name,
            "about": definition.about,
            "definition": definition.model_dump(mode="json"),
            "trials": [json.loads(trial.model_dump_json()) for trial in ledger.trials],
            "not_reached": list(course.missed.values()),
            "analysis": analysis,
            "laws": [
                {"equal": equal} | law.model_dump(mode="json") for equal, law in laws(ledger.trials, usable_cores())
            ],
            "finished": not course.missed,
            "elapsed_seconds": time.monotonic() - course.start,
            "version": __version__,
        }


def _procedure(course: Course, perform: Perform) -> Any:
    definition = course.definition
    if definition.procedure != "grid":
        runner: Runner = partial(run_one, course, perform, tuple(definition.measure), definition.fixed)
        return import_module(PROCEDURES[definition.procedure]).run(definition, runner)
    for planned in definition.schedule():
        try:
            measures = planned.grid.measure or definition.measure
            run_one(course, perform, measures, {}, planned.factors, planned.repeat, planned.words())
        except OutOfTime:
            continue  # a shorter one may still fit
    return None


def run_one(
    course: Course,
    perform: Perform,
    measures: Collection[str],
    fixed: Factors,
    given: Factors,
    repeat: int = 0,
    shown: str = "",
) -> Trial:
    """The recorded trial of these factors, or a fresh one, recorded before it is returned; raises OutOfTime."""
    factors = fixed | given
    known = course.ledger.known.get(identity(factors, repeat))
    if known is not None:
        return known
    if course.left() <= _estimate(course.ledger.trials, factors):
        course.missed[identity(factors, repeat)] = {"factors": factors, "repeat": repeat}
        raise OutOfTime("the budget was spent before its turn; raise --budget and start the same command again")
    number = f"trial {len(course.ledger.trials) + 1}" + (f" of {course.planned}" if course.planned else "")
    course.tell(f"{number}{course.time_left()}: {shown or words(given, repeat)}".replace(",", ";"), -1)
    begun, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="milliseconds")
    outcome = perform(factors, repeat, measures)
    trial = Trial(
        study=course.definition.name,
        factors=factors,
        repeat=repeat,
        status=outcome.status,
        reason=outcome.reason,
        **asdict(outcome.sampled),
        seconds=time.monotonic() - begun,
        started=started,
        machine=outcome.machine,
        version=__version__,
        plan=outcome.plan,
        oversubscribed=outcome.oversubscribed,
    )
    course.ledger.append(trial)
    course.fresh.append(trial)
    return trial


def _estimate(trials: list[Trial], factors: Factors) -> float:
    """Seconds that a trial will take: what its other repeats took, else nothing is known."""
    same = [t.seconds for t in trials if t.status == "ok" and identity(t.factors, 0) == identity(factors, 0)]
    return median(same) if same else 0.0
