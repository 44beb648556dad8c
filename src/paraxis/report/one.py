"""One plan of a study, explained on a terminal: what it costs, where that goes, what binds it and what to change."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paraxis.errors import ParaxisError, PlanError, TaskError
from paraxis.fitting import parts
from paraxis.measure.records import Event, Result, Study, read
from paraxis.plan.plan import Plan, parse
from paraxis.program.timeline import Box, mark, rows
from paraxis.report.tables import PARTS, clean, difference, interval, length, megabytes, milliseconds, ratio

KINDS = [(field, words) for field, words, *_ in PARTS if field != "remainder"] + [("remainder", "remainder")]
LEGEND = "digits: forward of that microbatch; a, b, ...: backward; = transfer, · waiting, u update, l samples"


def study_of(path: Path) -> Study:
    """The study in a file or a folder; raises TaskError if there is none."""
    try:
        return read(path)
    except FileNotFoundError:
        raise TaskError(f"{path} holds no study.json; paraxis explore --out {path} makes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise TaskError(f"{path} is no study.json of this version: {where}: {first['msg']}") from None


def find(study: Study, text: str) -> Result:
    """The plan that a text, a label, `best` or `today` names; raises PlanError with the nearest ones."""
    results = [*study.results, *([study.today] if study.today else [])]
    if text == "best":
        if study.recommendation is None:
            raise PlanError("this study recommends no plan: nothing in it was both measured and proved")
        text = study.recommendation.plan
    if text == "today" and study.today:
        return study.today
    named = [r for r in results if text in (r.plan, r.label)]
    if not named and ("=" in text or text == "serial"):
        wanted = _plan(text) if " " in text else parse(text)  # a label with a mistake, or a plan with one
        plans = [(r, known) for r in results if (known := _plan(r.plan)) is not None]
        named = [r for r, plan in plans if plan == wanted]
        named = named or [r for r, plan in plans if wanted == replace(plan, split=())]
    if not named:
        labels = [r.label for r in results]
        close = get_close_matches(text, labels, 3, cutoff=0.3) or labels[:3]
        raise PlanError(
            f"plan {text!r} is not in this study; it has {', '.join(map(repr, close)) or 'none'} and others"
        )
    return named[0]


def _plan(text: str) -> Plan | None:
    """The plan of a record, or None where another version wrote what this one cannot read."""
    try:
        return parse(text)
    except ParaxisError:
        return None


def document_of_plan(study: Study, text: str) -> dict[str, Any]:
    """Everything that a study knows of one plan."""
    result = find(study, text)
    measured, simulated = typical(result), length(result.simulated)
    dumped = result.model_dump(mode="json")
    return dumped | {
        "measured_seconds": measured or None,
        "simulated_seconds": simulated or None,
        "difference": measured / simulated - 1 if measured and simulated else None,
        "drawn": {str(width): drawn(result, width) for width in (60, 100)},
    }


def typical(result: Result) -> float:
    """Seconds of a step as the simulator has them: the median step, or that drawn where not all steps are alike.

    A drawn step of a pipeline is longer than that: its ranks are not at the same step at the same time.
    """
    alike = "@" not in result.plan  # of a sync with a period
    return result.step_seconds.median if result.step_seconds and alike else length(result.timeline)


def drawn(result: Result, width: int) -> dict[str, list[str]]:
    """The measured and the simulated step, to one scale."""
    longest = max(length(result.timeline), length(result.simulated))
    ranks = result.mesh.dp * result.mesh.pp * result.mesh.tp
    pairs = {"measured": result.timeline, "simulated": result.simulated}
    return {name: rows(_boxes(events), ranks, width, longest) for name, events in pairs.items() if events}


def _boxes(events: Sequence[Event]) -> list[Box]:
    zero = min(e.start for e in events)
    ordered = sorted(events, key=lambda e: e.kind == "compute")
    return [(e.rank, e.start - zero, e.end - zero, mark(e.kind, e.label, e.microbatch)) for e in ordered]


def print_plan(study: Study, result: Result, console: Console) -> None:
    """The plan for people."""
    say = lambda line, style="": console.print(Text(clean(line), style=style), soft_wrap=True)  # noqa: E731
    say(f"{result.label}   ({result.plan})", "bold")
    if result.step_seconds is None:
        say(f"{result.status}: {result.reason or 'not measured'}")
        return
    for line in _costs(study, result):
        say(line)
    if result.split is not None:
        say("")
        console.print(_split_table(result))
        for line in _instructions(result):
            say(line, "dim")
    if result.timeline:
        say("")
        for line in _pictures(result, console.width):
            say(line)
    if result.explanation:
        say("")
        say(result.explanation, "bold")


def _costs(study: Study, r: Result) -> list[str]:
    assert r.step_seconds is not None  # for the type checker
    time = r.step_seconds
    line = f"{milliseconds(time.median)} ms a step {interval(time)} (95%, {len(time.samples)} chunks)"
    line += f", {r.samples_per_second:,.0f} samples/s" if r.samples_per_second else ""
    lines = [line]
    lines += [r.stopped] if r.stopped else []
    today = study.today.step_seconds if study.today else None
    if r.vs_today and today and study.today is not r:
        lines.append(f"{ratio(r.vs_today, spread=True)} as fast as today's {milliseconds(today.median)} ms")
    if r.speedup and study.baseline:
        best = milliseconds(study.baseline.step_seconds.median)
        text = f"{r.speedup:.2f}x the best serial run ({best} ms)"
        lines.append(text + (f", efficiency {r.efficiency:.0%} of {r.workers} workers" if r.efficiency else ""))
    facts = [f"{megabytes(r.peak_memory_bytes)} MB in the rank that needs most"] if r.peak_memory_bytes else []
    facts += [f"computed for training alone: {parts(r.computed_memory)}"] if r.computed_memory else []
    facts += [f"{_size(r.bytes_communicated)} sent in a step"] if r.bytes_communicated is not None else []
    facts += [f"compiled in {r.compile_seconds:.1f} s"] if r.compile_seconds is not None else []
    facts += ["oversubscribed"] * r.oversubscribed
    lines += [", ".join(facts)] * bool(facts)
    if r.verified:
        far = difference(r.verified.max_relative_difference)
        lines.append(f"{'equal to' if r.verified.passed else 'NOT equal to'} {r.verified.against}: {far}")
    return lines


def _size(count: int) -> str:
    return f"{count / 1e6:,.3g} MB" if count >= 1e6 else f"{count / 1e3:,.3g} kB"


def _split_table(r: Result) -> Table:
    """Ranks downwards, kinds to the right: ms, and percent of the step."""
    assert r.split is not None and r.step_seconds is not None  # for the type checker
    step = r.step_seconds.median
    whole = [*((f"rank {n}", parts) for n, parts in enumerate(r.split_by_rank)), ("mean", r.split)]
    shown = [(f, w) for f, w in KINDS if f == "remainder" or any(getattr(p, f) >= 5e-4 * step for _, p in whole)]
    table = Table("ms (% of the step)", box=None, pad_edge=False)
    for name, _ in whole:
        table.add_column(name, justify="right")
    for field, words in shown:
        table.add_row(words, *(_cell(getattr(parts, field), step) for _, parts in whole))
    table.add_row("step", *(_cell(step, step) for _ in whole))
    return table


def _cell(seconds: float, step: float) -> str:
    return f"{milliseconds(seconds, step)} ({seconds / step:5.1%})"


def _instructions(r: Result) -> list[str]:
    """What each instruction takes at the median, the dearest first."""
    lines = []
    for rank in sorted({w.rank for w in r.work}):
        dear = sorted((w for w in r.work if w.rank == rank), key=lambda w: -w.count * w.seconds)[:5]
        parts = ", ".join(f"{w.count:g} {w.op} of {milliseconds(w.seconds)}" for w in dear)
        lines.append(f"rank {rank}: {parts} ms")
    if r.records_per_step and r.record_seconds:
        cost = r.records_per_step * r.record_seconds
        step = r.step_seconds.median if r.step_seconds else 0.0
        share = f", {cost / step:.3%} of the step" if step else ""
        lines.append(f"interpreter: {r.records_per_step} records of {r.record_seconds * 1e9:.0f} ns{share}")
    return lines


def _pictures(r: Result, width: int) -> list[str]:
    measured, simulated = typical(r), length(r.simulated)
    lines: list[str] = []
    for name, picture in drawn(r, 100 if width >= 110 else 60).items():
        lines += [f"{name}: {milliseconds(measured if name == 'measured' else simulated)} ms a step", *picture]
    if simulated:
        off = measured / simulated - 1
        more = "more" if off > 0 else "less"
        lines.append(f"measured {abs(off):.1%} {more} than the simulator makes of the median costs of its stages")
    return [*lines, LEGEND]
