"""What a process tells of the steps it has timed: the clocks around its instructions, and what lay between them."""

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from paraxis.engine.devices import wait
from paraxis.run import null, openmp
from paraxis.run.interpreter import Rank
from paraxis.run.openmp import Team
from paraxis.run.running import Running

MOST = 8192  # clocks that a rank tells of, so that telling stays short
BEHIND = 32  # steps on a GPU that are traced


def timed(running: Running, steps: Callable[[int], None], count: int, trace: int) -> tuple[float, int, int, int]:
    """(seconds of `count` steps between two barriers, how many steps were traced, nanoseconds before and behind those).

    The last of them are traced. A mark in the stream of a GPU takes as long as a small kernel: there what is traced
    comes behind what is timed, and is as little as will do.
    """
    traced = traceable(running.rank, min(trace, count))
    if not running.plan.on_gpu():
        begun, ended = _between_barriers(running, steps, count - traced, traced)
        return (ended - begun) / 1e9, traced, begun if traced == count else 0, ended
    begun, ended = _between_barriers(running, steps, count, 0)
    traced = min(traced, BEHIND)
    first, last = _between_barriers(running, steps, 0, traced) if traced else (0, 0)
    return (ended - begun) / 1e9, traced, first, last


def _between_barriers(running: Running, steps: Callable[[int], None], plain: int, traced: int) -> tuple[int, int]:
    rank = running.rank
    barrier = rank.world.barrier if isinstance(rank, Rank) else lambda: None
    wait(running.device)
    barrier()
    begun = perf_counter_ns()
    steps(plain)
    if rank is not None and traced:
        rank.run_traced(traced)
    wait(running.device)
    barrier()
    return begun, perf_counter_ns()


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
