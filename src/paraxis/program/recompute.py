"""Recomputation: a segment keeps only what it was called with, and is computed again right before its backward.

Sublinear memory (Chen et al. 2016): n layers cut into about sqrt(n) segments keep sqrt(n) inputs and the inside of one.
"""

from dataclasses import replace
from itertools import pairwise
from math import sqrt

from paraxis.errors import PlanError
from paraxis.plan.plan import Plan
from paraxis.program.cut import Layout, synchronised
from paraxis.program.instructions import BACKWARD, COMPUTE, Instruction

Body = list[Instruction]


def check_recompute(plan: Plan, layout: Layout) -> None:
    """Raises PlanError where a second forward would not be the first one over again."""
    if not plan.recompute:
        return
    if layout.unkeyed:
        names = ", ".join(name or "the network" for name in layout.unkeyed)
        raise PlanError(f"recompute: {names} would draw other random numbers than the first time; leave it out")
    if synchronised(plan, layout):
        raise PlanError("recompute: batch norm over all ranks is measured once; leave it out, or a smaller bn_group")


def sublinear(segments: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """A stage's layers in about sqrt(n) equal segments, unless buckets have cut it already."""
    if len(segments) > 1:
        return segments
    ((first, last),) = segments
    count = round(sqrt(last - first))
    ends = [first + (last - first) * n // count for n in range(count + 1)]
    return tuple(pairwise(ends))


def keep_inputs(body: Body, stages: set[int]) -> Body:
    """The forwards of these stages become light; not one whose backward comes next, which gains nothing by it."""
    light = [
        i.op == "F" and i.stage in stages and not (after and after.op in BACKWARD and _cell(after) == _cell(i))
        for i, after in zip(body, [*body[1:], None], strict=True)
    ]
    return [replace(i, rule="light") if keeps else i for i, keeps in zip(body, light, strict=True)]


def compute_again(body: Body) -> Body:
    """A second forward stands right before the backward, and before it waits for its gradient, to use that time."""
    light = {_cell(i): replace(i, rule="again") for i in body if i.rule == "light"}
    out: Body = []
    for i in body:
        again = light.pop(_cell(i), None) if i.op in BACKWARD else None
        if again is not None:
            out.insert(_before_its_gradient(out, i), again)
        out.append(i)
    return out


def _before_its_gradient(body: Body, i: Instruction) -> int:
    """Where the backward that comes next begins to wait for its gradient, or the end, if it does not."""
    for n in range(len(body) - 1, -1, -1):
        if body[n].op in COMPUTE:
            break
        if body[n].op == "RecvGradWait" and (body[n].stage, body[n].microbatch) == (i.stage, i.microbatch):
            return n
    return len(body)


def _cell(i: Instruction) -> tuple[int, int, int]:
    return i.stage, i.segment, i.microbatch
