"""The simulator in its simplest form: a list evaluation of (program, costs) to a Timeline.

It knows nothing of machines: seconds come from the caller. Ranks never wait in a start; a wait ends when its
counterpart has started and the transfer has passed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from paraxis.errors import Deadlock
from paraxis.program.instructions import COLLECTIVES, CROSSING, SENDS, Instruction, Program
from paraxis.program.timeline import Clock, Timeline, classify


@dataclass(frozen=True)
class Costs:
    """Seconds of computing instructions (F, B, Load, Update) and of transfers (once both sides have begun)."""

    compute: Callable[[Instruction], float]
    transfer: Callable[[Instruction], float] = lambda i: 0.0


def uniform(forward: float = 1.0, backward: float = 2.0) -> Costs:
    """Every F and B alike, I and W half a B, everything else free: the costs of textbook pictures."""
    costs = {"F": forward, "B": backward, "I": backward / 2, "W": backward / 2}
    return Costs(lambda i: costs.get(i.op, 0.0))


def simulate(program: Program, costs: Costs, body: str | None = None) -> Timeline:
    """The timeline of one step (the first body of the period by default); raises Deadlock if it cannot end."""
    name = body or program.period[0][0]
    ranks = program.body(name)
    clocks: list[list[Clock]] = [[] for _ in ranks]
    started: dict[tuple[object, ...], float] = {}
    for rank, instructions in enumerate(ranks):  # what an earlier step has begun is under way when this one begins
        started |= {_name(i, rank): 0.0 for i in instructions if i.waits and i.token >= CROSSING}
    now = [0.0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for rank, instructions in enumerate(ranks):
            done = clocks[rank]
            while len(done) < len(instructions):
                i = instructions[len(done)]
                end = _end(program, i, rank, now[rank], started, costs)
                if end is None:
                    break
                done.append((now[rank], end))
                now[rank] = end
                moved = True
    stuck = [r for r, instructions in enumerate(ranks) if len(clocks[r]) < len(instructions)]
    if stuck:
        nexts = ", ".join(f"rank {r}: {ranks[r][len(clocks[r])].text()}" for r in stuck)
        raise Deadlock(f"the program cannot end; next are {nexts}")
    return classify(program, name, clocks)


def _end(
    program: Program, i: Instruction, rank: int, now: float, started: dict[tuple[object, ...], float], costs: Costs
) -> float | None:
    """When an instruction begun now ends, or None while what it waits for has not begun."""
    if i.starts:
        started[_name(i, rank)] = now
        return now
    if not i.waits:
        return now + costs.compute(i)
    if i.base in SENDS:
        return now
    if i.base in COLLECTIVES:
        others = [started.get(_name(i, r)) for r in program.mesh.group(rank, i.axis)]
    else:
        others = [started.get((i.base.replace("Recv", "Send"), i.edge, i.microbatch, i.peer, rank))]
    known = [time for time in others if time is not None]
    return max(now, max(known) + costs.transfer(i)) if len(known) == len(others) else None


def _name(i: Instruction, rank: int) -> tuple[object, ...]:
    if i.base in COLLECTIVES:
        return *i.meeting, rank
    return i.base, i.edge, i.microbatch, rank, i.peer
