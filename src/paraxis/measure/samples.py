"""Samples on disk as JSON lines, written as they come, so that a killed exploration has lost none and can go on.

A line is raw. Which samples are warm-up or disturbed follows from rules over all of them, and stands in study.json.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paraxis.errors import TaskError
from paraxis.measure import records
from paraxis.measure.records import Machine, Record, Study
from paraxis.plan.plan import Plan, parse

FILE = "samples.jsonl"


class Sample(Record):
    """One chunk of steps of one plan; all plans are measured once a round, in random order."""

    plan: str  # the full text
    round: int
    seconds: float  # a step, the mean of the chunk's
    steps: int
    foreign_cores: float  # cores that other programs kept busy meanwhile
    at: float  # when it ended, in seconds since 1970


def read(path: Path) -> list[Sample]:
    """The samples of a file, none if there is no file; raises TaskError for a line that is none.

    A last line without its end was being written when the writer was killed, and is left out.
    """
    text = path.read_text() if path.exists() else ""
    found = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            found.append(Sample.model_validate_json(line))
        except ValidationError:
            raise TaskError(f"{path}, line {number}, is not a sample; without --resume it is written anew") from None
    return found


def foreign_by_round(samples: Sequence[Sample]) -> dict[int, float]:
    """Cores that other programs kept busy in each round: the mean over its chunks, weighted by their time."""
    spent: dict[int, float] = {}
    busy: dict[int, float] = {}
    for s in samples:
        spent[s.round] = spent.get(s.round, 0.0) + s.seconds * s.steps
        busy[s.round] = busy.get(s.round, 0.0) + s.seconds * s.steps * s.foreign_cores
    return {number: busy[number] / spent[number] for number in sorted(spent) if spent[number] > 0}


@dataclass
class Book:
    """The samples of a study, on disk if there is a path; `before` is the study that is gone on with."""

    path: Path | None = None
    samples: list[Sample] = field(default_factory=list)
    before: Study | None = None

    def add(self, sample: Sample) -> None:
        """Keep one more sample; it is in the file when this returns."""
        self.samples.append(sample)
        if self.path:
            with self.path.open("a") as file:
                file.write(sample.model_dump_json() + "\n")

    def of(self, plan: Plan) -> dict[int, float]:
        """Step seconds of a plan by round."""
        text = plan.text()
        return {s.round: s.seconds for s in self.samples if s.plan == text}

    def cut(self, plan: Plan) -> Plan | None:
        """The plan with its stages as they were cut before, if it has been measured before."""
        for text in {s.plan for s in self.samples}:
            if replace(known := parse(text), split=()) == plan:
                return known
        return None

    def agrees(self, task: dict[str, Any], machine: Machine, plans: Collection[str]) -> None:
        """Raises TaskError, saying what differs, unless the study that is gone on with is of this task and machine."""
        if self.before is None:
            return
        for key, value in task.items():
            if (had := self.before.task.get(key)) != value:
                self._differs(f"{key}={had}", f"{key}={value}")
        for key in ("cpu", "usable_cores"):
            if (had := getattr(self.before.machine, key)) != getattr(machine, key):
                self._differs(f"{key}={had}", f"{key}={getattr(machine, key)}")
        for text in sorted({s.plan for s in self.samples} - set(plans)):
            self._differs(f"plan {text}", "not that one")

    def _differs(self, had: str, have: str) -> None:
        folder = self.path.parent if self.path else "the study"
        raise TaskError(
            f"--resume: {folder} holds {had}, this exploration has {have}; repeat its options, or leave --resume out"
        )


def open_book(folder: Path, resume: bool = False) -> Book:
    """The book of a study's folder: empty and anew, or what an earlier exploration has left in it.

    Raises TaskError if there is nothing to go on with.
    """
    path = folder / FILE
    if not resume:
        path.unlink(missing_ok=True)
        return Book(path)
    try:
        before = records.read(folder)
    except (OSError, ValueError):
        raise TaskError(f"--resume: {folder} holds no study to go on with; leave --resume out") from None
    samples = read(path)
    # Also drops half a line, to which the next one would be appended.
    path.write_text("".join(s.model_dump_json() + "\n" for s in samples))
    return Book(path, samples, before)
