"""The file of a study: a line of JSON for each finished trial, appended and forced to disk, so that none is lost.

The first line says which study it is. A line that a crash has torn off in the middle is cut away at opening.
"""

import csv
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from paraxis import __version__
from paraxis.errors import TaskError
from paraxis.study.definition import Definition
from paraxis.study.trial import Trial, identity

FILE = "trials.jsonl"


@dataclass
class Ledger:
    """An open file of trials, which this process alone may write."""

    file: IO[bytes]
    trials: list[Trial]
    known: dict[Any, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = {identity(t.factors, t.repeat): t for t in self.trials}

    def append(self, trial: Trial) -> None:
        """Record a trial for good; raises ValueError for one that is recorded already."""
        key = identity(trial.factors, trial.repeat)
        if key in self.known:
            raise ValueError(f"{trial.factors} #{trial.repeat} is recorded already")
        self._write(trial.model_dump_json())
        self.trials.append(trial)
        self.known[key] = trial

    def _write(self, line: str) -> None:
        try:
            rest = f"{line}\n".encode()
            while rest:  # one write, but for a disk that fills up in the middle of it
                rest = rest[self.file.write(rest) :]
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise TaskError(
                f"{self.file.name} cannot be written: {error.strerror}; what was finished is kept"
            ) from None


@contextmanager
def open_ledger(folder: Path, definition: Definition) -> Iterator[Ledger]:
    """The trials of a study in a folder, locked until the end; raises TaskError if they are another study's, or in use.

    The lock is the kernel's: it ends with this process, however that ends.
    """
    path = folder / FILE
    try:
        raw = path.open("a+b", buffering=0)
    except OSError as error:
        raise TaskError(f"{path} cannot be written: {error.strerror}; give another --out") from None
    with raw:
        try:
            fcntl.flock(raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TaskError(f"{path} is in use by another process; wait for it, or give another --out") from None
        raw.seek(0)
        lines, whole = whole_lines(raw.read())
        raw.truncate(whole)
        ledger = Ledger(raw, _trials(path, lines, definition))
        if not lines:
            head = {"study": definition.name, "digest": definition.digest(), "version": __version__}
            ledger._write(json.dumps(head | {"definition": definition.model_dump(mode="json")}))
        yield ledger


def whole_lines(content: bytes) -> tuple[list[bytes], int]:
    """(finished lines, their length in bytes): what follows the last line break was torn."""
    whole = content.rfind(b"\n") + 1
    return content[:whole].splitlines(), whole


def _trials(path: Path, lines: list[bytes], definition: Definition) -> list[Trial]:
    if not lines:
        return []
    head = _head(path, lines[0])
    if head.get("digest") != definition.digest():
        which = "another study" if head.get("study") != definition.name else "an earlier version of this study"
        raise TaskError(f"{path} holds the trials of {which} ({head.get('study')}); give another --out, or remove it")
    return _parse(path, lines)


def _head(path: Path, line: bytes) -> dict[str, Any]:
    try:
        head = json.loads(line)
    except ValueError:
        head = None
    if not isinstance(head, dict) or "digest" not in head:
        raise TaskError(f"{path} is no file of trials; give another --out")
    return head


def _parse(path: Path, lines: list[bytes]) -> list[Trial]:
    trials = []
    for number, line in enumerate(lines[1:], 2):
        try:
            trials.append(Trial.model_validate_json(line))
        except ValidationError as error:
            what = error.errors()[0]
            place = ".".join(map(str, what["loc"]))
            raise TaskError(f"{path} line {number} is no trial ({place}: {what['msg']}); remove the line") from None
    return trials


def read(folder: Path) -> tuple[Definition, list[Trial]]:
    """A study's definition and its trials so far, without taking the lock; raises TaskError if there is none."""
    path = folder / FILE
    try:
        lines, _ = whole_lines(path.read_bytes())
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from None
    head = _head(path, lines[0] if lines else b"")
    return Definition.model_validate(head["definition"]), _parse(path, lines)


def write_csv(trials: list[Trial], path: Path) -> None:
    """The trials as a table: a row each, a column for every factor and measure."""
    factors = list(dict.fromkeys(key for t in trials for key in t.factors))
    measures = list(dict.fromkeys(key for t in trials for key in t.measures))
    heads = [*factors, "repeat", "status", "reason", "oversubscribed", *measures, "seconds", "started"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        for t in trials:
            row = [t.factors.get(key) for key in factors]
            row += [t.repeat, t.status, t.reason, t.oversubscribed]
            writer.writerow([*row, *(t.measures.get(key) for key in measures), t.seconds, t.started])
