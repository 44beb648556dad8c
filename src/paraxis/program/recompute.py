"""Recomputation: a segment keeps only what it was called with, and is computed again right before its backward.

Sublinear memory (Chen et al. 2016): n layers cut into about sqrt(n) segments keep sqrt(n) inputs and the inside of one.
"""

from dataclasses import replace
from itertools import pairwise
from math import sqrt

from paraxis.errors import PlanError
from paraxis.plan.plan import Plan
from paraxis.program.cut import Layout
from paraxis.program.instructions import BACKWARD, Instruction

Body = list[Instruction]


def check_recompute(plan: Plan, layout: Layout, meets: bool) -> None:
    """Raises PlanError where a second forward would not be the first one over again; `meets`: ranks meet inside it."""
    if not plan.recompute:
        return
    if layout.unkeyed:
        names = ", ".join(name or "the network" for name in layout.unkeyed)
        raise PlanError(f"recompute: {names} would draw other random numbers than the first time; leave it out")
    if plan.tp > 1:
        raise PlanError(f"recompute: tp={plan.tp} reduces inside a forward, which runs once; leave one of both out")
    if meets:
        raise PlanError("recompute: batch norm over all ranks is measured once; leave it out, or a smaller bn_group")


def sublinear(segments: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """A stage's layers in about sqrt(n) equal segments, unless buckets have cut it already."""
    if len(segments) > 1:
        return segments
    ((first, last),) = segments
    count = round(sqrt(last - first))
    ends = [first + (last - first) * n // count for n in range(count + 1)]
    return tuple(pairwise(ends))


def recompute(body: Body, stages: set[int]) -> Body:
    """The forwards of these stages keep their input, and stand again right before the backward.

    Not those whose backward comes next, which gain nothing by it. Transfers are still to come: the second forward then
    runs before the wait for the gradient, and uses that time.
    """
    light = {
        _cell(i): replace(i, rule="light")
        for i, after in pairwise(body)
        if i.op == "F" and i.stage in stages and not (after.op in BACKWARD and _cell(after) == _cell(i))
    }
    out: Body = []
    for i in body:
        if i.op in BACKWARD and _cell(i) in light:
            out.append(replace(light[_cell(i)], rule="again"))
        out.append(light.get(_cell(i), i) if i.op == "F" else i)
    return out


def _cell(i: Instruction) -> tuple[int, int, int]:
    return i.stage, i.segment, i.microbatch
