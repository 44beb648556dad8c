"""From the clocks of traced steps to where a step's time goes, and what binds it."""

import itertools
from collections import defaultdict
from statistics import median

from paraxis.measure.facts import Facts
from paraxis.measure.records import Event, Split
from paraxis.plan.plan import Plan
from paraxis.program.instructions import Instruction, Program
from paraxis.program.simulate import Costs, simulate
from paraxis.program.timeline import Timeline, classify

Trace = tuple[str, list[list[int]]]  # a body's name, and nanoseconds of every rank's instruction boundaries


def timelines(program: Program, traces: list[Trace]) -> list[Timeline]:
    """One timeline a traced step."""
    out = []
    for name, stamps in traces:
        clocks = [[(a / 1e9, b / 1e9) for a, b in itertools.pairwise(row)] for row in stamps]
        out.append(classify(program, name, clocks))
    return out


def split(lines: list[Timeline], step_seconds: float) -> Split:
    """Seconds of a step by kind, averaged over ranks and steps; overhead is what no instruction covers."""
    parts = [line.seconds() for line in lines]
    mean = {kind: sum(p[kind] for p in parts) / len(parts) for kind in parts[0]}
    covered = sum(mean.values())
    factor = min(1.0, step_seconds / covered) if covered else 1.0  # traced steps may be slower than the timed median
    return Split(**{k: v * factor for k, v in mean.items()}, overhead=max(0.0, step_seconds - covered * factor))


def events(line: Timeline) -> list[Event]:
    """A timeline as records."""
    return [
        Event(
            rank=s.rank,
            label=s.instruction.label(),
            kind=s.kind,
            microbatch=s.instruction.microbatch,
            start=s.start,
            end=s.end,
        )
        for s in line.spans
        if s.end > s.start
    ]


def replay(program: Program, lines: list[Timeline], name: str) -> Timeline:
    """The program simulated with its own measured medians of each stage: what the schedule alone makes of them."""
    seen: dict[tuple[str, int, int, str], list[float]] = defaultdict(list)
    for line in lines:
        for s in line.spans:
            if s.kind in ("compute", "optimizer", "data"):
                seen[_key(s.instruction, program.mesh.coordinates(s.rank)[1])].append(s.end - s.start)
    cost = {key: median(values) for key, values in seen.items()}
    transfers = [
        s.end - s.start for line in lines for s in line.spans if s.kind == "communication" and s.instruction.waits
    ]
    typical = median(transfers) if transfers else 0.0

    def compute(i: Instruction) -> float:
        return cost.get(_key(i, i.stage), 0.0)

    return simulate(program, Costs(compute, lambda i: typical), name)


def _key(i: Instruction, stage: int) -> tuple[str, int, int, str]:
    return i.op, stage, i.segment, i.rule


def bound_by(plan: Plan, parts: Split, facts: Facts, oversubscribed: bool) -> str:
    """What takes most of the step, in two or three words."""
    total = sum(getattr(parts, name) for name in type(parts).model_fields) or 1.0
    shares = {
        "bubble": parts.pipeline_wait,
        "communication": parts.communication,
        "straggler": parts.straggler_wait,
        "optimizer": parts.optimizer,
        "data": parts.data,
    }
    name, seconds = max(shares.items(), key=lambda item: item[1])
    if oversubscribed:
        return "oversubscription"
    if seconds > 0.25 * total:
        return f"{name} {seconds / total:.0%}"
    calls = plan.microbatches * facts.dispatch / plan.pp if plan.engine == "torch" else 0.0
    return "op overhead" if calls > 0.5 * parts.compute else "compute"
