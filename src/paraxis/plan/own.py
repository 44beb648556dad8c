"""A user's own schedules: a Python function in a file, or a text in the notation that programs are drawn in.

`FILE.py` (or `FILE.py:NAME`) has a function `schedule(ranks, microbatches, rank, stages)` that gives a rank's cells as
(op, stage, microbatch). `FILE.txt` has a line a rank and a cell an operation, separated by spaces: `F0` is the forward
of microbatch 0, `B0` its backward, `I0` and `W0` a backward's halves; with several stages a rank the stage stands in
front, as in `2F0`. What stands behind # or in front of | (as `rank 0 |`) is for the reader.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from paraxis.errors import PlanError
from paraxis.plan.schedules import SCHEDULES, Order, Schedule

CELL = re.compile(r"(?P<stage>\d+)?(?P<op>[FBIW])(?P<microbatch>\d+)")
OPS = ("F", "B", "I", "W")


@dataclass(frozen=True)
class Shape:
    """What a text schedule is made for."""

    ranks: int
    microbatches: int
    stages: int  # of each rank


@dataclass(frozen=True)
class Asked:
    """What somebody who tries a schedule says of its shape; a text has its own.

    Parameters
    ----------
    ranks
        Of a schedule in FILE.py (default 3).
    microbatches
        Of a schedule in FILE.py (default: two for each rank).
    interleave
        Stages of each rank of a schedule in FILE.py (default 1).
    """

    ranks: int | None = None
    microbatches: int | None = None
    interleave: int | None = None


def is_own(name: str) -> bool:
    """Whether a schedule's name is that of a user's file."""
    return name.partition(":")[0].endswith((".py", ".txt"))


def find(name: str) -> Schedule:
    """The schedule of a name or of a file; raises PlanError for a file that holds none."""
    if name in SCHEDULES:
        return SCHEDULES[name]
    path, _, function = name.partition(":")
    try:
        changed = Path(path).stat().st_mtime_ns
    except OSError as error:
        raise PlanError(f"schedule file {path} cannot be read: {error.strerror}") from None
    if path.endswith(".txt"):
        return _text_schedule(path, changed)
    return _checked(_python(path, function or "schedule", changed), name)


def shape_of(path: str) -> Shape:
    """What the ranks, microbatches and stages of a text schedule are; raises PlanError naming the line at fault."""
    rows = _rows(path)
    stages = 1 + max(stage for row in rows for _, stage, _ in row)
    if stages % len(rows):
        raise PlanError(f"schedule {path}: {stages} stages do not lie evenly on its {len(rows)} lines, one a rank")
    return Shape(len(rows), 1 + max(microbatch for row in rows for *_, microbatch in row), stages // len(rows))


def _rows(path: str) -> list[Order]:
    """The cells of every line that has any."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise PlanError(f"schedule file {path} cannot be read: {why}") from None
    kept = [(n, text) for n, line in enumerate(lines, 1) if (text := line.partition("#")[0].rpartition("|")[2].split())]
    if not kept:
        raise PlanError(f"schedule {path} is empty; it takes a line a rank, such as F0 F1 B0 B1")
    return [[_cell(path, n, rank, word) for word in words] for rank, (n, words) in enumerate(kept)]


def _cell(path: str, line: int, rank: int, word: str) -> tuple[str, int, int]:
    found = CELL.fullmatch(word)
    if not found:
        raise PlanError(
            f"schedule {path}, line {line}: {word!r} is no cell; it takes F0, B0, I0, W0, or with a stage 2F0"
        )
    return found["op"], int(found["stage"] or rank), int(found["microbatch"])


@cache
def _text_schedule(path: str, changed: int) -> Schedule:
    rows, shape = _rows(path), shape_of(path)

    def schedule(ranks: int, microbatches: int, rank: int, stages: int) -> Order:
        if Shape(ranks, microbatches, stages) != shape:
            fit = f"pp={shape.ranks},microbatches={shape.microbatches}" + f",interleave={shape.stages}" * (
                shape.stages > 1
            )
            raise PlanError(f"schedule {path} is one of {fit}")
        return rows[rank]

    return _checked(schedule, path)


@cache
def _python(path: str, function: str, changed: int) -> Callable[..., Any]:
    spec = spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader, "a path that ends in .py has a loader"
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PlanError(f"schedule file {path} does not load: {type(error).__name__}: {_line(error)}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise PlanError(f"schedule file {path} has no function {function}(ranks, microbatches, rank, stages)")
    made: Callable[..., Any] = found
    return made


def _checked(schedule: Callable[..., Any], name: str) -> Schedule:
    """The same, whose every cell is one that can be lowered: an operation of a stage that lies on the rank."""

    def checked(ranks: int, microbatches: int, rank: int, stages: int) -> Order:
        try:
            made = [tuple(cell) for cell in schedule(ranks, microbatches, rank, stages)]
        except PlanError:
            raise
        except Exception as error:
            call = f"schedule({ranks}, {microbatches}, {rank}, {stages})"
            raise PlanError(f"{name}: {call} raised {type(error).__name__}: {_line(error)}") from None
        own = range(rank, ranks * stages, ranks)
        for cell in made:
            if len(cell) != 3 or cell[0] not in OPS or not all(isinstance(n, int) for n in cell[1:]):
                raise PlanError(f"{name}: {cell!r} of rank {rank} is no (op, stage, microbatch) with op F, B, I or W")
            if cell[1] not in own:
                lie = ", ".join(map(str, own))
                raise PlanError(f"{name}: {cell[1]}{cell[0]}{cell[2]} stands on rank {rank}, where stage {lie} lies")
            if not 0 <= cell[2] < microbatches:
                raise PlanError(f"{name}: {cell[0]}{cell[2]} of rank {rank}, but there are {microbatches} microbatches")
        if not any(op in ("B", "W") for op, _, _ in made):
            raise PlanError(f"{name}: rank {rank} of {ranks} has no backward")
        return [(op, stage, microbatch) for op, stage, microbatch in made]

    return checked


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
