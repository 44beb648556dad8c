"""The show job: a plan's program as a grid and its simulated timeline, or what a study has measured of one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from paraxis.errors import TaskError
from paraxis.fitting import parts, record
from paraxis.measure.breakdown import events
from paraxis.measure.facts import Facts
from paraxis.measure.records import Event, MemoryRecord, Study
from paraxis.plan.plan import Plan, parse
from paraxis.program.check import check
from paraxis.program.cut import Layout, told_of
from paraxis.program.grid import blocks, draw, explain, simplify, slot_width
from paraxis.program.instructions import COMPUTE, Instruction, Program
from paraxis.program.lower import lower
from paraxis.program.meetings import kind, reach
from paraxis.program.shares import MEETS, Split, Tokens, chosen
from paraxis.program.simulate import Costs, simulate, uniform
from paraxis.program.slices import grouped
from paraxis.program.timeline import cells
from paraxis.progress import err
from paraxis.session import Tell, open_session
from paraxis.task.spec import TaskSpec

Exports = Sequence[Literal["csv", "tensorboard"]] | None  # formats of --export
LABELS = "digits: forward of that microbatch; letters a, b, ...: backward of 0, 1, ...; = transfer, · waiting, u update"
APART = "small letters: its I, the input's gradient; capitals: its W, the weights'"


def document_of(text: str, spec: TaskSpec | None, tell: Tell) -> dict[str, Any]:
    """The program, what the checker found, and the simulated step; raises PlanError or TaskError."""
    plan, splits = Plan() if text == "today" else parse(text), ""
    memory: dict[str, Any] | None = None
    if spec is None:
        program, costs, source = lower(plan, _textbook(plan)), uniform(), "F=1, B=2, links free"
    else:
        with open_session(spec, {}, {}, None, tell) as session:
            session.begin(("solo",))
            plan = session.settled(plan)
            program, facts = session.program(plan), session.known()
            found = record(session.memory(plan))
            memory = found.model_dump() if found else None
            splits = "".join(told_of([plan], facts.layout))
        share = facts.batch / facts.samples / plan.dp / plan.microbatches
        costs = measured(program, *_shared(plan, facts), share)
        source = f"measured layers of {facts.network}, links free"
    return drawn(plan, program, costs, source) | {"splits": splits, "computed_memory": memory}


def drawn(plan: Plan, program: Program, costs: Costs, source: str) -> dict[str, Any]:
    """The same for a program with the costs that it is simulated with, and in words where those are from."""
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
        "splits": "",
        "computed_memory": None,
        "costs": source,
        "makespan": line.makespan,
        "bubble_fraction": line.bubble_fraction(),
        "replicas": program.mesh.dp * program.mesh.tp,
        "timeline": [e.model_dump() for e in events(line)],
        "drawn": {str(width): cells(line, width) for width in (60, 100)},
        "text": program.text(),
    }


def _textbook(plan: Plan) -> Layout:
    """A layer a stage, each of which ranks can share, and the tokens between them."""
    layers = max(plan.stages, sum(plan.split))
    meets = [((k, 2 * k, "grad"), (k, 2 * k + 1, "act"))[k == 0 :] for k in range(layers)]
    splits = tuple(Split("columns", plan.tp, (str(k),), meets[k], (k, k)) for k in range(layers))
    along = tuple((k, place, MEETS[word]) for own in meets for k, place, word in own)
    tokens = (Tokens((plan.tp,), plan.tp, meets=along),)
    return Layout((1,) * layers, splits=splits, tokens=tokens, shares=("m",) * layers)


def _shared(plan: Plan, facts: Facts) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of each layer's forward and backward on one of the ranks that share it."""
    spans = [split.span for split in chosen(plan.tp, facts.layout.splits)] if plan.tp > 1 and not grouped(plan) else []
    parts = [plan.tp if grouped(plan) or any(a <= k <= b for a, b in spans) else 1 for k in range(len(facts.layers))]
    forward, backward = (
        tuple(t / n for t, n in zip(seconds, parts, strict=True)) for seconds in (facts.forward, facts.backward)
    )
    return forward, backward


def measured(program: Program, forward: tuple[float, ...], backward: tuple[float, ...], share: float) -> Costs:
    """Costs of segments from the measured seconds of their layers; `share` is a microbatch's part of what was timed."""

    def compute(i: Instruction) -> float:
        if i.op not in COMPUTE:
            return 0.0
        segments = program.segments[i.stage]
        first, last = segments[i.segment][0], segments[reach(kind(i), program.borders(i.stage), i.segment)][1]
        seconds = sum((forward if i.op == "F" else backward)[first:last])
        return share * (seconds / 2 if i.op in "IW" else seconds)

    return Costs(compute)


def show_lines(document: dict[str, Any], width: int) -> list[str]:
    """The document for a terminal."""
    drawn = document["drawn"]["100" if width >= 110 else "60"]
    seconds = document["makespan"]
    shown = f"{seconds * 1e3:.3g} ms" if document["costs"].startswith("measured") else f"{seconds:g} units"
    memory = document["computed_memory"]
    return [
        f"{document['plan']}   program {document['program']}",
        document["explained"],
        *[document["splits"]] * bool(document["splits"]),
        "",
        *blocks(document["grid"], document["slot_width"], width),
        "",
        f"simulated ({document['costs']}): {shown} a step, bubble {document['bubble_fraction']:.1%}, "
        f"at most {max(document['peak_live_microbatches'])} live microbatches",
        *([f"memory, computed: {parts(MemoryRecord(**memory))}"] if memory else []),
        *drawn,
        LABELS,
        *[APART] * (" W0" in "".join(document["grid"])),
    ]


def is_study(text: str) -> bool:
    """Whether a word of the command line is a folder or file of a study, not a plan: it is there, or looks like one."""
    if text in ("serial", "today", "best"):
        return False
    return Path(text).exists() or "/" in text or text.endswith(".json")


def simulated_events(document: dict[str, Any]) -> list[Event]:
    """The timeline of `document_of` as records; its unit is the second, or one forward where nothing is measured."""
    return [Event(**e) for e in document["timeline"]]


def deliver(study: Study, out: Path, formats: Exports, as_json: bool) -> int:
    """The report, the exports and the terminal's table of a finished exploration; returns the exit code."""
    from paraxis.report.export import export
    from paraxis.report.page import write
    from paraxis.report.tables import terminal

    page = write(study, out)
    for path in export(study, out, formats or []):
        err.print(f"exported: {path}", markup=False)
    if as_json:
        print(study.model_dump_json(indent=1))
    else:
        terminal(study, Console(highlight=False))
        print(f"report: {page}")
    return 0 if study.recommendation else 1


def compared(first: str, second: str | None, more: Sequence[str], out: Path | None, as_json: bool) -> bool:
    """Print the comparison of studies, if these are two or more; raises TaskError where only that would make sense."""
    if second is None or not (is_study(first) and is_study(second)):
        if more or out:
            raise TaskError("several folders and --out are for comparing studies: paraxis show DIR DIR --out FILE.html")
        return False
    from paraxis.report.compare import show

    show([Path(first), Path(second), *map(Path, more)], out, as_json, Console(highlight=False))
    return True


def exported(what: str, formats: Exports) -> bool:
    """Write a study's figures for other tools, if any are asked for; raises TaskError for what is no study."""
    if not formats:
        return False
    from paraxis.report.export import export
    from paraxis.report.one import study_of

    path = Path(what)
    for written in export(study_of(path), path.parent if path.suffix == ".json" else path, formats):
        print(f"exported: {written}")
    return True


def explain_study(path: Path, plan: str | None, trace: Path | None, as_json: bool) -> None:
    """Print what a study has measured of one plan, or its table; raises TaskError or PlanError for what it has not."""
    from paraxis.report.one import document_of_plan, find, print_plan, study_of
    from paraxis.report.tables import terminal

    study, console = study_of(path), Console(highlight=False)
    if plan is None:
        if trace:
            raise TaskError("--trace needs a plan of the study: its label, or best")
        print(study.model_dump_json(indent=1)) if as_json else terminal(study, console)
        return
    result = find(study, plan)
    if trace:
        pair = {"measured": result.timeline, "simulated": result.simulated}
        write_trace(trace, {k: v for k, v in pair.items() if v}, result.mesh.dp * result.mesh.tp)
    if as_json:
        print(json.dumps(document_of_plan(study, plan), indent=1))
    else:
        print_plan(study, result, console)


def write_trace(path: Path, timelines: dict[str, list[Event]], replicas: int) -> None:
    """Write timelines as Chrome trace JSON; raises TaskError where there are none."""
    from paraxis.report.trace import trace, write

    if not timelines:
        raise TaskError("--trace: this plan was not measured, so there is no timeline")
    err.print(f"trace: {write(path, trace(timelines, replicas))}", markup=False)
