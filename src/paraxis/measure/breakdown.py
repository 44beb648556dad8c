"""From the clocks of timed steps to where a step's time goes.

Every part is measured: instructions by the clocks around them, what an interpreter adds to each by an interpreter that
does nothing else (`run.null`), what lies between steps by clocks of its own. Nothing is scaled to fit; what no clock
has covered stays visible as the remainder.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from paraxis.measure.records import Event, Split, Work
from paraxis.plan.plan import Plan
from paraxis.program.cut import Layout
from paraxis.program.grid import cell, several
from paraxis.program.instructions import COLLECTIVES, MEMORY, Instruction, Program
from paraxis.program.lower import lower
from paraxis.program.simulate import Costs, simulate, uniform
from paraxis.program.timeline import Resolved, Span, Timeline, classify, resolve

Trace = tuple[str, list[list[int]]]  # a body's name, and nanoseconds of every rank's instruction boundaries
Times = Mapping[int, float]  # step seconds by round
KEPT = 9  # windows that are kept of each plan


@dataclass(frozen=True)
class Window:
    """Successive steps as they were timed, in nanoseconds of one clock.

    `begun` and `ended` are each rank's, barriers included; `between` are (kind, start, end) of what each rank's process
    did outside of instructions; `record` is what the interpreter adds to an instruction, clock read included.
    """

    steps: tuple[Trace, ...]
    begun: tuple[int, ...]
    ended: tuple[int, ...]
    between: tuple[tuple[tuple[str, int, int], ...], ...]
    record: tuple[float, ...]


def window(answers: Sequence[Mapping[str, Any]]) -> Window | None:
    """One window from the answers of all processes of a plan; None if they traced nothing."""
    parts = [a["window"] for a in answers if a.get("window")]
    if len(parts) < len(answers) or not parts or not parts[0]["steps"]:
        return None
    parts = [_on_one_clock(p) for p in parts]
    steps = zip(*(p["steps"] for p in parts), strict=True)
    ranks = [len(p["steps"][0][1]) for p in parts]  # threads as ranks are one process
    spread = lambda values: tuple(v for v, n in zip(values, ranks, strict=True) for _ in range(n))  # noqa: E731
    return Window(
        steps=tuple((same[0][0], [row for _, rows in same for row in rows]) for same in steps),
        begun=spread(p["begun"] for p in parts),
        ended=spread(p["ended"] for p in parts),
        between=spread(tuple((k, a, b) for k, a, b in p["between"]) for p in parts),
        record=spread(p["record"] for p in parts),
    )


def _on_one_clock(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A process's window by the first one's clock, from which `shift` says how far its own is."""
    shift = part["shift"]
    if not shift:
        return part
    steps = [(name, [[t + shift for t in row] for row in rows]) for name, rows in part["steps"]]
    between = [(kind, a + shift, b + shift) for kind, a, b in part["between"]]
    return {**part, "steps": steps, "between": between, "begun": part["begun"] + shift, "ended": part["ended"] + shift}


def keep_middle(windows: dict[int, Window], times: Times, count: int = KEPT) -> dict[int, Window]:
    """The windows of the rounds in the middle, for a long measurement has more than one can hold."""
    middle = median(times.values()) if times else 0.0
    near = sorted((r for r in windows if r in times), key=lambda r: abs(times[r] - middle))[:count]
    return {r: windows[r] for r in sorted(near)}


def middle_rounds(windows: Mapping[int, Window], times: Times, wide: bool = False) -> list[int]:
    """The round with the median time, or the two whose mean it is: their parts add up to the median step, which a mean
    over more rounds would not. `wide`: with the third of all rounds around them, for medians of single instructions.
    Where their windows are not kept, the median having moved since, the nearest one that is."""
    order = sorted(times, key=lambda r: times[r])
    drop = max(0, (len(order) - 1) // 2 - wide * (len(order) // 6))
    wanted = order[drop : len(order) - drop]
    chosen = [r for r in wanted if r in windows]
    if len(chosen) == len(wanted) or (wide and chosen):
        return chosen
    middle = median(times.values()) if times else 0.0
    return sorted(windows, key=lambda r: abs(times.get(r, float("inf")) - middle))[:1]


def timelines(program: Program, steps: Iterable[Trace]) -> list[Timeline]:
    """One timeline a traced step."""
    known: dict[str, Resolved] = {}
    out = []
    for name, stamps in steps:
        clocks = [[(a / 1e9, b / 1e9) for a, b in itertools.pairwise(row)] for row in stamps]
        if name not in known:
            known[name] = resolve(program, name)
        out.append(classify(program, name, clocks, known[name]))
    return out


def account(program: Program, seen: Window, lines: Sequence[Timeline]) -> list[Split]:
    """Seconds of a step of each rank by kind, `remainder` being what no clock covers; `lines` are the window's own.

    What was timed is the window of the first rank, so that is what every rank has to account for.
    """
    steps, start, end = len(seen.steps), seen.begun[0] / 1e9, seen.ended[0] / 1e9
    sums: list[dict[str, float]] = [defaultdict(float) for _ in seen.begun]
    for line, (_, rows) in zip(lines, seen.steps, strict=True):
        zero = min(row[0] for row in rows) / 1e9
        for span, last in _with_last(line.spans):
            length = max(0.0, min(span.end + zero, end) - max(span.start + zero, start))
            cost = min(length, seen.record[span.rank] / 1e9) if last else 0.0
            sums[span.rank][span.kind] += length - cost
            sums[span.rank]["overhead"] += cost
    out = []
    for rank, parts in enumerate(sums):
        for kind, seconds in _gaps(program, seen, rank):
            parts[kind] += seconds
        each = {kind: parts.get(kind, 0.0) / steps for kind in Split.model_fields if kind != "remainder"}
        out.append(Split(**each, remainder=(end - start) / steps - sum(each.values())))
    return out


def _with_last(spans: Sequence[Span]) -> Iterable[tuple[Span, bool]]:
    """Every span, and whether it is its instruction's last."""
    for n, span in enumerate(spans):
        behind = spans[n + 1] if n + 1 < len(spans) else None
        same = behind is not None and behind.rank == span.rank and behind.instruction is span.instruction
        yield span, not (same and behind is not None and behind.start == span.end)


def _gaps(program: Program, seen: Window, rank: int) -> Iterable[tuple[str, float]]:
    """(kind, seconds) of what a rank did between steps, before the first and behind the last.

    Where a run ends a rank waits for the others; then comes what its process has timed there, or, with a process a
    rank, the barrier. Before its first instruction it may have left a barrier later than the first rank.
    """
    waits = "pipeline_wait" if program.mesh.pp > 1 else "straggler_wait"
    edges = [(rows[rank][0], rows[rank][-1], max(row[-1] for row in rows)) for _, rows in seen.steps]
    pieces, timed_until = seen.between[rank], seen.ended[0]
    yield waits, max(0, seen.begun[rank] - seen.begun[0]) / 1e9
    own = all_done = max(seen.begun[0], seen.begun[rank])
    for start, end, latest in [*edges, (timed_until, timed_until, 0)]:
        if start == timed_until or any(own <= stop < start for _, _, stop in pieces):
            barrier = start == timed_until and not pieces and program.mesh.size > 1
            joined = start if barrier else min(max(own, all_done), start)
            yield waits, max(0, joined - own) / 1e9
            own = joined
        for kind, a, b in pieces:
            yield kind, max(0, min(b, start) - max(a, own)) / 1e9
        own, all_done = end, latest


def mean(parts: Sequence[Split]) -> Split:
    """The mean of several splits."""
    return Split(**{kind: fmean(getattr(p, kind) for p in parts) for kind in Split.model_fields})


def against(parts: Split, step_seconds: float) -> Split:
    """The same with the remainder of a step that took `step_seconds`."""
    covered = sum(getattr(parts, kind) for kind in Split.model_fields if kind != "remainder")
    return parts.model_copy(update={"remainder": step_seconds - covered})


def work(program: Program, lines: Sequence[Timeline]) -> list[Work]:
    """What each rank does how often in a step, and what that takes: the median step's seconds by instruction."""
    seen: dict[tuple[int, str], list[float]] = defaultdict(list)
    for line in lines:
        for s in line.spans:
            if s.kind in ("compute", "optimizer", "data", "communication"):
                i = s.instruction
                seen[s.rank, i.rule if i.op == "Update" else i.op].append(s.end - s.start)
    return [
        Work(rank=rank, op=op, count=len(times) / max(1, len(lines)), seconds=median(times))
        for (rank, op), times in sorted(seen.items(), key=lambda item: (item[0][0], -sum(item[1])))
    ]


def events(line: Timeline) -> list[Event]:
    """A timeline as records."""
    ranks: list[list[Instruction]] = [[] for _ in range(line.ranks)]
    for s in line.spans:
        ranks[s.rank].append(s.instruction)
    staged = several(ranks)
    return [
        Event(
            rank=s.rank,
            label=cell(s.instruction, staged),
            kind=s.kind,
            microbatch=s.instruction.microbatch,
            stage=s.instruction.stage,
            start=s.start,
            end=s.end,
        )
        for s in line.spans
        if s.end > s.start
    ]


def replay(program: Program, lines: Sequence[Timeline], name: str) -> Timeline:
    """The program simulated with its own measured medians of each stage: what the schedule alone makes of them."""
    seen: dict[tuple[str, int, int, str], list[float]] = defaultdict(list)
    carried: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        for n, s in enumerate(line.spans):
            length = s.end - s.start
            if s.kind in ("compute", "optimizer", "data") or s.instruction.op in MEMORY:
                seen[_key(s.instruction)].append(length)
            elif s.kind == "communication" and s.instruction.waits:
                # Who comes late for a message finds it there; only who waited for its sender saw it travel.
                waited = n > 0 and line.spans[n - 1].instruction is s.instruction
                if waited or s.instruction.base in COLLECTIVES:
                    carried[s.instruction.base].append(length)
    cost = {key: median(values) for key, values in seen.items()}
    transfer = {base: median(values) for base, values in carried.items()}

    def compute(i: Instruction) -> float:
        return cost.get(_key(i), 0.0)

    return simulate(program, Costs(compute, lambda i: transfer.get(i.base, 0.0)), name)


def _key(i: Instruction) -> tuple[str, int, int, str]:
    return i.op, i.stage, i.segment, i.rule


def uniform_bubble(plan: Plan) -> float:
    """The bubble that a plan's schedule has where stages are alike, links free and a backward takes two forwards."""
    alone = Plan(pp=plan.pp, interleave=plan.interleave, microbatches=plan.microbatches, schedule=plan.schedule)
    return simulate(lower(alone, Layout((1,) * plan.stages)), uniform()).bubble_fraction()
