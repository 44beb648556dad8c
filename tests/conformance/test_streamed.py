"""DiLoCo whose exchanges overlap with training: what makes it equal its emulation, and what would not."""

from pathlib import Path

import pytest
from test_reference import EXACT, STEPS, TASKS, WRONG, checked, difference, outcome, settle, spec_of, task, trained

from paraxis.engine.torch_engine import TorchEngine
from paraxis.plan.plan import Plan, parse
from paraxis.program.instructions import CROSSING, Program
from paraxis.run import null, reference
from paraxis.task.spec import TaskSpec

STREAMED = parse("dp=2,sync=diloco@4:fragments=2:overlap=1")


def changed(program: Program, of: str, rule: str) -> Program:
    """The program with another update rule in the place of one."""
    rows = tuple(
        (name, tuple(tuple(_ruled(i, of, rule) for i in row) for row in ranks)) for name, ranks in program.bodies
    )
    return Program(**{**vars(program), "bodies": rows})


def _ruled(i: object, of: str, rule: str) -> object:
    return type(i)(**{f: getattr(i, f) for f in i.__slots__} | {"rule": rule}) if getattr(i, "rule", "") == of else i


def apart(spec: TaskSpec, plan: Plan, program: Program) -> float:
    ranks = reference.start(program, lambda r: TorchEngine(task(spec), program, r))
    reference.run_steps(ranks, STEPS)
    settle(ranks)
    return difference(spec, plan, outcome(ranks))


@pytest.mark.parametrize("of, rule", [("mix", "mix"), ("mix", "copy"), ("outer", "zero"), ("nesterov", "zero")])
def test_half_of_what_was_learned_meanwhile_is_kept(of: str, rule: str, folder: Path) -> None:
    """Mutants: nothing of it is kept, or the outer step is left out."""
    spec = spec_of(folder, "tiny", *TASKS["tiny"])
    program = checked(STREAMED, task(spec).layout(), 3)
    found = apart(spec, STREAMED, changed(program, of, rule))
    assert found < EXACT if of == rule else found > WRONG


@pytest.mark.parametrize("text", ["diloco@4:fragments=2", "diloco@4:overlap=1", "diloco@4:overlap=2"])
def test_another_delay_is_another_algorithm(text: str, folder: Path) -> None:
    """Mutants: a fragment that is sent at another step, or all parameters at once."""
    spec = spec_of(folder, "tiny", *TASKS["tiny"])
    assert difference(spec, STREAMED, trained(spec, parse(f"dp=2,sync={text}"))) > WRONG
    assert difference(spec, parse(f"dp=2,sync={text}"), trained(spec, parse(f"dp=2,sync={text}"))) < EXACT


@pytest.mark.parametrize("before", range(9))
def test_traffic_is_asked_for_at_any_step(before: int, folder: Path) -> None:
    """Even while a sum is under way: it ends in its turn, and training goes on at its place in the period."""
    program = checked(
        parse("dp=2,sync=diloco@8:fragments=2:overlap=2"), task(spec_of(folder, "tiny", *TASKS["tiny"])).layout(), 3
    )
    rank = null.start(program, 0)
    rank.steps(before)
    assert all(token >= CROSSING for token in rank.context.open)
    rank.sent_in_a_step()
    assert not rank.context.open and set(rank.sent) >= {name for name, _ in program.period}
    rank.steps(16)
    rank.run_traced(8)
    assert len(rank.clocks(8)) == 8
