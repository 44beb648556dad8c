"""The show job: a plan's program as a grid, and its simulated timeline."""

from typing import Any

from paraxis.plan.plan import Plan, parse
from paraxis.program.check import check
from paraxis.program.grid import blocks, draw, explain, simplify, slot_width
from paraxis.program.instructions import COMPUTE, Instruction, Program
from paraxis.program.lower import Layout, lower
from paraxis.program.simulate import Costs, simulate, uniform
from paraxis.program.timeline import cells
from paraxis.session import Tell, open_session
from paraxis.task.spec import TaskSpec

LABELS = "digits: forward of that microbatch; letters a, b, ...: backward of 0, 1, ...; = transfer, · waiting, u update"


def document_of(text: str, spec: TaskSpec | None, tell: Tell) -> dict[str, Any]:
    """The program, what the checker found, and the simulated step; raises PlanError or TaskError."""
    plan = Plan() if text == "today" else parse(text)
    if spec is None:
        program, costs, source = (
            lower(plan, Layout((1,) * max(plan.pp, sum(plan.split)))),
            uniform(),
            "F=1, B=2, links free",
        )
    else:
        with open_session(spec, {}, {}, None, tell) as session:
            session.begin(("solo",))
            plan = session.settled(plan)
            program, facts = session.program(plan), session.known()
        costs = measured(
            program, facts.forward, facts.backward, facts.batch / facts.samples / plan.dp / plan.microbatches
        )
        source = f"measured layers of {facts.network}, links free"
    found = check(program)
    name = program.period[0][0]
    line = simulate(program, costs)
    return {
        "plan": plan.text(),
        "program": program.digest(),
        "explained": explain(program),
        "grid": draw(simplify(program.body(name))),
        "slot_width": slot_width(simplify(program.body(name))),
        "peak_live_microbatches": list(found.peak_live),
        "costs": source,
        "makespan": line.makespan,
        "bubble_fraction": line.bubble_fraction(),
        "timeline": [
            {"rank": s.rank, "label": s.instruction.label(), "kind": s.kind, "start": s.start, "end": s.end}
            for s in line.spans
        ],
        "drawn": {str(width): cells(line, width) for width in (60, 100)},
        "text": program.text(),
    }


def measured(program: Program, forward: tuple[float, ...], backward: tuple[float, ...], share: float) -> Costs:
    """Costs of segments from the measured seconds of their layers; `share` is a microbatch's part of what was timed."""

    def compute(i: Instruction) -> float:
        if i.op not in COMPUTE:
            return 0.0
        first, last = program.segments[i.stage][i.segment]
        seconds = sum((forward if i.op == "F" else backward)[first:last])
        return share * (seconds / 2 if i.op in "IW" else seconds)

    return Costs(compute)


def show_lines(document: dict[str, Any], width: int) -> list[str]:
    """The document for a terminal."""
    drawn = document["drawn"]["100" if width >= 110 else "60"]
    seconds = document["makespan"]
    shown = f"{seconds * 1e3:.3g} ms" if document["costs"].startswith("measured") else f"{seconds:g} units"
    return [
        f"{document['plan']}   program {document['program']}",
        document["explained"],
        "",
        *blocks(document["grid"], document["slot_width"], width),
        "",
        f"simulated ({document['costs']}): {shown} a step, bubble {document['bubble_fraction']:.1%}, "
        f"at most {max(document['peak_live_microbatches'])} live microbatches",
        *drawn,
        LABELS,
    ]
