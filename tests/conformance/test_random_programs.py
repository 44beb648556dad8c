"""Random programs through checker, simulator, null and reference interpreter: none hangs, what is malformed is told.

Meshes, schedules, stages of each rank, microbatches, buckets, stages of ZeRO, split layers, tied parameters and
recomputation at random, and random orders that no schedule has but that compute nothing before its data.
"""

import re
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paraxis.errors import Deadlock, ProgramError
from paraxis.plan.plan import Plan
from paraxis.plan.schedules import ONE_STAGE, SCHEDULES, STAGES, Order
from paraxis.program.check import check
from paraxis.program.cut import Layout
from paraxis.program.instructions import Program
from paraxis.program.lower import lower
from paraxis.program.shares import Split
from paraxis.program.simulate import simulate, uniform
from paraxis.run import null, reference

FEW, MANY = 25, 1000
RANDOM = "random.py"  # as a user's own schedule


def legal(draw: st.DrawFn, ranks: int, microbatches: int, stages: int) -> list[Order]:
    """Every rank's cells in an order in which all of them can be computed: what is drawn next has all it needs."""
    last = ranks * stages - 1
    halves = [[draw(st.booleans()) for _ in range(microbatches)] for _ in range(last + 1)]
    done: set[tuple[str, int, int]] = set()
    orders: list[Order] = [[] for _ in range(ranks)]
    todo = {("F", 0, i) for i in range(microbatches)}
    while todo:
        op, stage, i = cell = draw(st.sampled_from(sorted(todo)))
        todo.remove(cell)
        orders[stage % ranks].append(cell)
        done.add(("B" if op == "I" else op, stage, i))
        back = [(stage, i)] if op == "F" and stage == last else [(stage - 1, i)] * (op in "BI" and stage > 0)
        todo |= {("I" if halves[s][n] else "B", s, n) for s, n in back}
        todo |= {("W", stage, i)} if op == "I" else {("F", stage + 1, i)} if op == "F" and stage < last else set()
    return orders


NEEDS = ("weight_in_data", "statistics", "clip")
MORE = st.fixed_dictionaries(
    {"bucket_bytes": st.sampled_from([0, 1, 8, 24]), "recompute": st.sampled_from(["", "", "all", "0"])}
)


@st.composite
def splits(draw: st.DrawFn, layers: int) -> tuple[Split, ...]:
    """One to three pairs that ranks share, some within a layer, some over several, some with no gradient in front."""
    found = []
    for number in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, layers - 1))
        last = draw(st.integers(first, layers - 1))
        grads = [(first, 100 * first + 10 * number, "grad")] * draw(st.booleans())
        meets = (*grads, (last, 100 * last + 10 * number + 1, "act"))
        found.append(Split("columns", 4, (f"{number}",), meets, (first, last)))
    return tuple(found)


@st.composite
def tied(draw: st.DrawFn, layers: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """At most two parameters that some of the layers share."""
    names = ["w", "u"][: draw(st.integers(0, min(2, layers - 1)))]
    some = st.lists(st.integers(0, layers - 1), min_size=2, max_size=3, unique=True).map(sorted).map(tuple)
    return tuple((name, draw(some)) for name in names)


@st.composite
def programs(draw: st.DrawFn) -> tuple[Plan, Program]:
    """A plan, and the program that it lowers to."""
    pp, dp, m = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    name = draw(st.sampled_from([*SCHEDULES, RANDOM, RANDOM]))
    v = 1 if name in ONE_STAGE or pp == 1 else draw(st.integers(STAGES.get(name, 1), 3))
    sizes = tuple(draw(st.lists(st.integers(0, 5), min_size=pp * v, max_size=pp * v + 2)))
    tp, zero = draw(st.sampled_from([1, 1, 2])), draw(st.integers(0, 3))
    words: dict[str, Any] = {"zero": zero, "tp": tp} | ({} if tp > 1 else draw(MORE))
    plan = Plan(dp=dp, pp=pp, interleave=v, microbatches=m, schedule=name if pp > 1 else "", **words)
    needs: dict[str, Any] = dict(zip(NEEDS, draw(st.tuples(*[st.booleans()] * len(NEEDS))), strict=True))
    needs["splits"] = draw(splits(len(sizes))) if tp > 1 else ()
    needs["tied"] = draw(tied(len(sizes)))
    orders = legal(draw, pp, m, plan.interleave) if plan.schedule == RANDOM else []
    with patch.dict(SCHEDULES, {RANDOM: lambda ranks, microbatches, rank, stages: list(orders[rank])}):
        return plan, lower(plan, Layout(sizes, **needs))


class Telling(null.NullEngine):
    """Computes nothing, but what it sends says what it is, and what it is handed it holds to what it ought to be."""

    def __init__(self) -> None:
        super().__init__()
        self.leaving: dict[tuple[int, int], float] = {}

    def at(self, stage: int) -> Any:
        return Stage(self, stage)

    def buffer(self, *_: object) -> Tensor:
        return torch.zeros(2)  # a share for each of two replicas


@dataclass(frozen=True)
class Stage:
    """Of one stage: an activation is its number and the microbatch's, a gradient the same with a minus."""

    engine: Telling
    number: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def forward(self, segment: int, microbatch: int, part: int) -> None:
        self.engine.leaving[self.number, microbatch] = 1000.0 * self.number + microbatch

    evaluate = light = forward

    def backward(self, segment: int, microbatch: int) -> None:
        self.engine.leaving[self.number, microbatch] = -1000.0 * self.number - microbatch

    input_gradient = backward

    def leave(self, microbatch: int) -> list[Tensor]:
        return [torch.tensor([self.engine.leaving[self.number, microbatch]])]

    def incoming(self, gradient: bool) -> list[Tensor]:
        return [torch.zeros(1)]

    def arrive(self, gradient: bool, microbatch: int, tensors: list[Tensor]) -> None:
        wanted = -1000.0 * (self.number + 1) - microbatch if gradient else 1000.0 * (self.number - 1) + microbatch
        assert [float(t) for t in tensors] == [wanted]


def runs_everywhere(program: Program) -> None:
    """Checked, simulated, run by the null interpreter, and by the reference interpreter, which looks at messages."""
    peaks = check(program).peak_live
    assert all(1 <= peak <= program.microbatches * len(program.stages) for peak in peaks)
    line = simulate(program, uniform())
    assert line.makespan >= 3.0 * program.microbatches * len(program.stages) / program.mesh.pp
    cells = sum(i.op in ("B", "I") for row in program.body("step") for i in row)
    for rank in range(program.mesh.size):
        null.start(program, rank).steps(2)
    engines = [Telling() for _ in range(program.mesh.size)]
    ranks = reference.start(program, lambda rank: engines[rank])
    reference.run_steps(ranks, 2)
    reference.run_body(ranks, "evaluate")
    assert not any(rank.context.open for rank in ranks), "every message has arrived"
    assert cells and all(engine.calls for engine in engines)


@given(programs())
@settings(deadline=None, max_examples=FEW)
def test_random_programs_hang_nowhere(made: tuple[Plan, Program]) -> None:
    runs_everywhere(made[1])


@pytest.mark.slow
@given(programs())
@settings(deadline=None, max_examples=MANY)
def test_a_thousand_random_programs_hang_nowhere(made: tuple[Plan, Program]) -> None:
    runs_everywhere(made[1])


LATE = r" before |without an I\d|is never (computed|used|made|awaited)|computes slices|of \d+ (microbatches|buckets)"
LATE += r"|stands still in the middle of stage|must stand between segments"
LIVE = rf"{LATE}|writes parameters while|has no backward|no gradients have been added to"
# What may be said of a step that lacks an instruction: nothing else but this.
LOST = {
    "Load": r"before its samples are loaded",
    "F": LATE,
    "B": LIVE,
    "I": LIVE,
    "W": r"after \d+ of \d+ microbatches|comes without W\d|its W is missing|their last backward|no gradients have",
    "SendAct": r"has no counterpart|wait for each other",
    "SendGrad": r"has no counterpart|wait for each other",
    "RecvAct": r"before its activation has arrived",
    "RecvGrad": r"before its gradient has arrived",
    "AllReduce": r"has no counterpart|wait for each other|matched by|of \d+ buckets were reduced|the copies of",
}


def lacking(program: Program, draw: st.DataObject) -> tuple[str, Program]:
    """The program without one of the instructions of its step on one rank: a start goes with its wait."""
    rank = draw.draw(st.integers(0, program.mesh.size - 1))
    row = program.body("step")[rank]
    known = sorted({i.base for i in row} & set(LOST))
    op = draw.draw(st.sampled_from(known))
    one = draw.draw(st.sampled_from([i for i in row if i.base == op and not i.waits]))
    at = row.index(one)
    end = next((n for n, i in enumerate(row) if one.starts and n > at and i.waits and i.token == one.token), at)
    kept = tuple(i for n, i in enumerate(row) if n not in (at, end))
    rows = tuple(kept if r == rank else other for r, other in enumerate(program.body("step")))
    return op, replace(program, bodies=tuple((n, rows if n == "step" else b) for n, b in program.bodies))


def refused(program: Program, op: str) -> None:
    with pytest.raises((ProgramError, Deadlock)) as caught:
        check(program)
    reason, *picture = str(caught.value).splitlines()
    assert re.search(LOST[op], reason), f"without {op}: {reason}"
    assert picture or "computes slices" in reason
    assert not picture or sum(line.strip() == "^" for line in picture) == 1


@given(programs(), st.data())
@settings(deadline=None, max_examples=FEW)
def test_a_random_program_that_lacks_an_instruction_is_refused_with_the_reason(
    made: tuple[Plan, Program], data: st.DataObject
) -> None:
    op, program = lacking(made[1], data)
    refused(program, op)


@pytest.mark.slow
@given(programs(), st.data())
@settings(deadline=None, max_examples=MANY)
def test_a_thousand_random_programs_that_lack_an_instruction_are_refused(
    made: tuple[Plan, Program], data: st.DataObject
) -> None:
    op, program = lacking(made[1], data)
    refused(program, op)
