"""What a process tells of the steps it has timed: the clocks around its instructions, and what lay between them."""

from typing import Any

from paraxis.run import null, openmp
from paraxis.run.interpreter import Rank
from paraxis.run.openmp import Team

MOST = 8192  # clocks that a rank tells of, so that telling stays short


def traceable(rank: Rank | Team | None, steps: int) -> int:
    """Of so many steps, how many to trace."""
    if rank is None:
        return 0
    longest = max(len(row) for _, ranks in rank.program.bodies for row in ranks) + 1
    return min(steps, max(1, MOST // longest))


def record_cost(rank: Rank | Team) -> float:
    """Nanoseconds that the interpreter of this rank adds to an instruction."""
    return openmp.record_cost() if isinstance(rank, Team) else null.record_cost(rank.program, rank.rank)


def window_of(
    rank: Rank | Team | None, traced: int, begun: int, ended: int, record: float = 0.0, shift: int = 0
) -> dict[str, Any] | None:
    """The last `traced` steps as `measure.breakdown.window` reads them.

    `begun`: nanoseconds at which the first of them began, or 0 where others were timed before it; `record`: see above;
    `shift`: nanoseconds to the clock of the first process.
    """
    if rank is None or not traced:
        return None
    steps = rank.clocks(traced)
    if not begun or len(steps) < traced:  # fewer are kept than were asked for
        begun = min(row[0] for row in steps[0][1])
    return {
        "steps": steps,
        "begun": begun,
        "ended": ended,
        "between": [piece for piece in rank.between() if piece[2] > begun],
        "record": record,
        "shift": shift,
    }
