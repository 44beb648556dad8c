"""The reference interpreter: all ranks of a program in one process, in turn, deterministic. It is the specification."""

from collections.abc import Callable

from paraxis.comm.local import LocalComm, Post
from paraxis.errors import Deadlock
from paraxis.program.instructions import Program
from paraxis.run.interpreter import Rank


def start(program: Program, make_engine: Callable[[int], object]) -> list[Rank]:
    """An interpreter for every rank; `make_engine(rank)` gives each what computes its segments."""
    post = Post()
    everyone = range(program.mesh.size)
    return [Rank(program, r, make_engine(r), LocalComm(post, everyone, r), blocking=False) for r in everyone]


def run_body(ranks: list[Rank], name: str) -> None:
    """One body on all ranks: each goes on until it would wait for what has not begun."""
    places = [0] * len(ranks)
    lists = [rank.program.body(name)[rank.rank] for rank in ranks]
    moved = True
    while moved:
        moved = False
        for r, rank in enumerate(ranks):
            while places[r] < len(lists[r]):
                i = lists[r][places[r]]
                if i.waits and not all(request.ready() for request in rank.context.open[i.token]):
                    break
                rank.bodies[name][places[r]]()
                places[r] += 1
                moved = True
    stuck = [r for r, place in enumerate(places) if place < len(lists[r])]
    if stuck:
        raise Deadlock("; ".join(f"rank {r} waits in {lists[r][places[r]].text()}" for r in stuck))


def run_steps(ranks: list[Rank], count: int) -> None:
    """`count` optimiser steps on all ranks."""
    for name, times in ranks[0].program.prologue if not ranks[0].done else ():
        for _ in range(times):
            run_body(ranks, name)
    for _ in range(count):
        run_body(ranks, ranks[0].program.step_body(ranks[0].done))
        for rank in ranks:
            rank.done += 1
