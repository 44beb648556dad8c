"""The study on a terminal; also the order, words and number formats that the page and the charts share."""

import re
from math import isfinite
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paraxis.measure.records import Event, Ratio, Result, Seconds, Split, Study

# field of Split, words, sign in the bar, sign where only ASCII can be printed, style
PARTS: tuple[tuple[str, str, str, str, str], ...] = (
    ("compute", "compute", "█", "#", "cyan"),
    ("optimizer", "optimizer", "▓", "o", "green"),
    ("communication", "exposed communication", "▒", "=", "yellow"),
    ("pipeline_wait", "pipeline bubble", "░", ".", "dim"),
    ("straggler_wait", "waiting for a slower replica", "·", ",", "dim"),
    ("data", "data", "+", "+", "magenta"),
    ("overhead", "overhead", "-", "-", "dim"),
    ("remainder", "not covered by a clock", " ", " ", "dim"),
)
OVERSUBSCRIBED = (
    "* oversubscribed: more workers than usable cores, so they take turns; with a core each it may be faster"
)
INEXACT = "inexact: another algorithm than the serial step, held to a serial emulation of itself; compare its loss, too"
Row = tuple[str, ...]
HEADS: Row = ("plan", "ms/step [95%]", "vs today", "efficiency", "bound by", "MB/rank", "= serial")
SHORT_HEADS: Row = ("\nplan", "ms/step\n[95%]", "vs\ntoday", "effi-\nciency", "bound\nby", "MB/\nrank", "\n= serial")
NUMBERS = (1, 2, 3, 5)  # the columns of figures, which stand flush right
BARS = 16  # plans that stay legible in one chart
PLAN_ROOM, LEAST_ROOM = 27, 18  # characters a plan gets before other columns are shortened, and before they say less


def clean(text: str) -> str:
    """The text without the control characters by which a file name could steer a terminal or end a line."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "\ufffd", text.replace("\t", "    ").replace("\r\n", "\n"))


def is_today(study: Study, result: Result) -> bool:
    """Whether this is what the user has now, listed apart or among the results."""
    return study.today is not None and result.plan == study.today.plan


def everything(study: Study) -> list[Result]:
    """Today and all results, each plan once."""
    rest = [result for result in study.results if not is_today(study, result)]
    return ([study.today] if study.today else []) + rest


def ranking(study: Study) -> list[Result]:
    """The measured plans, today among them, fastest first."""
    measured = [r for r in everything(study) if r.status == "ok" and r.step_seconds and isfinite(median(r))]
    return sorted(measured, key=median)


def shortlist(study: Study, ranked: list[Result], most: int = BARS) -> list[Result]:
    """The fastest plans, never without today and the winner."""
    keep = [r for r in ranked if is_today(study, r) or r is winner(study)]
    fastest = [r for r in ranked if r not in keep][: most - len(keep)]
    return [r for r in ranked if r in keep or r in fastest]


def unmeasured(study: Study) -> list[Result]:
    """What has no step time, in the order of its status: failed, refused, not run, or ok without figures."""
    order = ["failed", "refused", "not run", "ok"]
    measured = {id(result) for result in ranking(study)}
    return sorted((r for r in everything(study) if id(r) not in measured), key=lambda r: order.index(r.status))


def winner(study: Study) -> Result | None:
    """The recommended plan, if it was measured."""
    chosen = study.recommendation
    return next((r for r in ranking(study) if chosen and r.plan == chosen.plan), None)


def median(result: Result) -> float:
    """Seconds per step of a measured plan."""
    return result.step_seconds.median if result.step_seconds else float("inf")


def name(study: Study, result: Result) -> str:
    """The plan as tables print it; today says what it is."""
    if not is_today(study, result):
        return clean(result.label or result.plan).replace("\n", " ")
    ranks = result.mesh.dp * result.mesh.pp * result.mesh.tp
    where = "+".join(dict.fromkeys(result.devices)) or count(result.threads, "thread")
    return f"today: {count(ranks, 'process', 'processes')}, {where}"


def count(number: int, word: str, plural: str | None = None) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number:,} {word if number == 1 else plural or word + 's'}"


def milliseconds(seconds: float, like: float | None = None) -> str:
    """Seconds in ms with three digits, or with as many decimals as `like` gets."""
    scale = abs(seconds if like is None else like) * 1e3
    return f"{seconds * 1e3:,.{0 if scale >= 100 else 1 if scale >= 10 else 2 if scale >= 1 else 3}f}"


def interval(time: Seconds, dash: str = "-") -> str:
    """`[12.5-13.2]` in ms."""
    return f"[{milliseconds(time.low, time.median)}{dash}{milliseconds(time.high, time.median)}]"


def ratio(value: Ratio | None, spread: bool = False, sign: str = "x", dash: str = "-") -> str:
    """`1.31x`, or with its interval `1.31x [1.24-1.38]`."""
    if value is None:
        return ""
    return f"{value.median:.2f}{sign}" + (f" [{value.low:.2f}{dash}{value.high:.2f}]" if spread else "")


def megabytes(size: int | None) -> str:
    """Bytes in MB; small sizes keep two digits."""
    if size is None:
        return ""
    return f"{size / 1e6:,.0f}" if size >= 10e6 or size == 0 else f"{size / 1e6:.2g}"


def percent(fraction: float | None) -> str:
    """`79%`; a small share keeps a digit."""
    if fraction is None or not isfinite(fraction):
        return ""
    return f"{fraction:.0%}" if fraction >= 0.01 or fraction <= 0 else "<1%"


def difference(value: float | None) -> str:
    """`3e-7`: a relative difference, to its order."""
    if value is None:
        return "?"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return "0" if value == 0 else f"{mantissa}e{int(exponent)}" if exponent else mantissa


def proof(study: Study, result: Result, wide: bool = True) -> str:
    """Whether the plan computes what the serial run computes, and how nearly."""
    if result.verified is None:
        return "is serial" if is_today(study, result) else "not proved"
    size = difference(result.verified.max_relative_difference)
    if not result.verified.passed:
        return f"NO {size}"
    if result.exact:
        return f"yes {size}"
    return f"inexact, = emulation {size}" if wide else f"inexact {size}"


def shares(split: Split) -> list[tuple[str, str, float]]:
    """(field, words, share of the step) of every part, in the order in which they are drawn."""
    seconds = {field: max(0.0, getattr(split, field)) for field, *_ in PARTS}
    total = sum(seconds.values())
    return [(field, words, seconds[field] / total if total else 0.0) for field, words, *_ in PARTS]


def unfinished(study: Study) -> str:
    """What a study that was cut short still lacks, or nothing."""
    if study.finished:
        return ""
    missing = sum(result.status == "not run" for result in everything(study))
    done = f"{count(len(ranking(study)), 'plan')} measured, {missing:,} not reached"
    return f"unfinished: stopped after {study.elapsed_seconds:,.0f} s with {done}; what follows may still change"


def omitted(study: Study) -> str:
    """`3 refused, 1 failed, 2 not reached`, or nothing."""
    statuses = [result.status for result in unmeasured(study)]
    words = {"refused": "refused", "failed": "failed", "not run": "not reached", "ok": "without figures"}
    return ", ".join(f"{statuses.count(s)} {word}" for s, word in words.items() if s in statuses)


def network(study: Study) -> str:
    """What the network is called."""
    named = (study.task.get(key) for key in ("network", "name", "recipe", "model"))
    return next((str(value) for value in named if value), "")


CAPTIONS = {
    "bars": "Median and 95% bootstrap interval of the time of one step. The dashed line is today.",
    "split": "Seconds of one step, averaged over its ranks. Communication counts where computation does not hide it; "
    "waiting is hatched.",
    "losses": "Mean training loss of each step from the same initial weights. Exact plans lie on top of each other and "
    "on today; a curve that leaves them belongs to an inexact plan.",
    "scaling": "Strong scaling: the same global batch over more workers (ranks × threads), the fastest exact plan of "
    "each kind. Speed-up is against the best serial run, efficiency against one worker with one thread; dashed: ideal.",
    "accuracy": "After the same samples, and after the same time: an inexact plan is worth its faster step where "
    "it reaches the exact one's accuracy in fewer seconds.",
    "memory": "Memory of the rank that needs most: the most that its process has held, and what of it training alone "
    "keeps at the peak of a step, computed from the program.",
    "traffic": "What all ranks together send in one step. Single ranks, and ranks that share memory, send nothing.",
}
CURVES = ("losses", "scaling", "accuracy")  # the charts that do not draw a bar a plan


def caption(study: Study, key: str, most: int = BARS) -> str:
    """What a chart shows, its marks, and how many plans it leaves out."""
    ranked = ranking(study)
    words = [CAPTIONS[key]]
    if key == "traffic":
        ranked = [r for r in ranked if r.bytes_communicated]
    if key not in CURVES:
        drawn = shortlist(study, ranked, most)
        words += [f"* {OVERSUBSCRIBED[2:]}."] if any(r.oversubscribed for r in drawn) else []
        slower = len(ranked) - len(drawn)
        words += [f"{count(slower, 'slower plan')} more in the table of all plans."] if slower else []
    return " ".join(words)


def machine(study: Study) -> str:
    """The machine and what else it was doing, in one line."""
    m = study.machine
    load = f"load {m.load_before:.2f} before" + (f", {m.load_after:.2f} after" if m.load_after is not None else "")
    if m.foreign_cores is not None:
        load += f", {m.foreign_cores:.1f} cores busy with other programs"
    software = [f"Python {m.python}", f"PyTorch {m.torch}", m.mpi or "no MPI", m.system]
    hardware = f"{m.cpu}, {count(m.usable_cores, 'usable core')}, {m.memory_bytes / 2**30:,.0f} GiB"
    return " · ".join([hardware, ", ".join(m.gpus) or "no GPU", load, *software])


def featured(study: Study) -> Result | None:
    """The plan whose timeline is shown first: the winner, or else the fastest that has one."""
    candidates = [winner(study), *ranking(study)]
    return next((r for r in candidates if r and (r.timeline or r.simulated)), None)


def length(events: list[Event]) -> float:
    """Seconds from the first start to the last end."""
    return max(event.end for event in events) - min(event.start for event in events) if events else 0.0


def terminal(study: Study, console: Console) -> None:
    """Print the table, where the winner's step goes, the recommendation and its command."""
    if study_lacks := unfinished(study):
        console.print(Text(study_lacks, style="bold yellow"))
    ranked = ranking(study)
    if ranked:
        console.print(results_table(study, ranked, console.width), soft_wrap=False)
    else:
        console.print(Text("no plan was measured", style="bold"))
    for line in footnotes(study, ranked):
        console.print(Text(line, style="dim"))
    best = winner(study)
    if best and best.split:
        console.print()
        step_bar(best.split, console)
    advice(study, console)


def footnotes(study: Study, ranked: list[Result]) -> list[str]:
    """What stands below the table: what it leaves out, and what its marks mean."""
    lines = [f"{omitted(study)}: all listed in the report"] if unmeasured(study) else []
    if not ranked:
        lines += [f"  {name(study, r)}: {first_line(r.reason)}" for r in unmeasured(study)[:5]]
    if any(result.oversubscribed for result in ranked):
        lines.append(OVERSUBSCRIBED)
    if any(not result.exact for result in ranked):
        lines.append(INEXACT)
    return lines


def first_line(reason: str | None) -> str:
    """The gist of a reason, which may be a whole drawing."""
    lines = clean(reason or "").strip().splitlines()
    return lines[0] if lines else "no reason given"


def row(study: Study, result: Result, level: int) -> Row:
    """One plan's cells: level 0 writes all out, 1 leaves out the interval of the ratio, 2 shortens words too, 3 says
    what binds it, but not how much of the step that is."""
    time, bound = result.step_seconds, clean(result.bound_by or "")
    return (
        name(study, result) + (" *" if result.oversubscribed else ""),
        f"{milliseconds(time.median)} {interval(time)}" if time else "",
        "1.00x" if is_today(study, result) else ratio(result.vs_today, spread=level == 0),
        percent(result.efficiency),
        bound if level < 3 else re.sub(r"^per-call | <?\d+%$", "", bound),
        megabytes(result.peak_memory_bytes),
        proof(study, result, wide=level < 2),
    )


def layout(study: Study, ranked: list[Result], width: int) -> tuple[Row, list[Row], int, int]:
    """(heads, rows, gap between columns, room for the plan) of the fullest form that leaves plans their room."""
    for level, heads, gap in (
        (0, HEADS, 2),
        (1, HEADS, 2),
        (2, SHORT_HEADS, 2),
        (2, SHORT_HEADS, 1),
        (3, SHORT_HEADS, 1),
    ):
        rows = [row(study, result, level) for result in ranked]
        columns = list(zip(heads, *rows, strict=True))
        widths = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]
        used = [i for i in range(1, len(heads)) if any(columns[i][1:])]
        room = width - sum(widths[i] + gap for i in used)
        if room >= min(widths[0], PLAN_ROOM if gap == 2 else LEAST_ROOM):
            break
    return heads, rows, gap, max(room, 10)


def results_table(study: Study, ranked: list[Result], width: int) -> Table:
    """The measured plans; columns without any figure are left out, long plans wrap at their commas."""
    heads, rows, gap, room = layout(study, ranked, width)
    kept = [i for i in range(len(heads)) if any(cells[i] for cells in rows)]
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for i in kept:
        justify: Literal["left", "right"] = "right" if i in NUMBERS else "left"
        table.add_column(Text(heads[i]), justify=justify, no_wrap=i in NUMBERS, overflow="fold")
    best = winner(study)
    for result, cells in zip(ranked, rows, strict=True):
        style = "bold" if result is best else "italic" if is_today(study, result) else ""
        cells = (fold(cells[0], room), *cells[1:])
        table.add_row(*(Text(cells[i], style=cell_style(i, cells[i])) for i in kept), style=style)
    return table


def cell_style(column: int, text: str) -> str:
    """Only a broken proof needs a colour."""
    return "bold red" if column == len(HEADS) - 1 and text.startswith("NO") else ""


def fold(text: str, width: int) -> str:
    """Break a plan after commas and blanks, as late as the width allows; what follows is indented."""
    lines = [""]
    for piece in re.split(r"(?<=[, ])", text):
        if lines[-1].strip() and cell_len((lines[-1] + piece).rstrip()) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def step_bar(split: Split, console: Console) -> None:
    """Where the step goes: one proportional bar and its legend, legible without colours."""
    plain = console.options.ascii_only
    signs = {field: (ascii if plain else sign, style) for field, _, sign, ascii, style in PARTS}
    parts = [(field, words, share) for field, words, share in shares(split) if share >= 0.005]
    head = "winner's step: "
    room = min(console.width - len(head), 60)
    bar = Text(head)
    for (field, _, _), length in zip(parts, apportion([share for *_, share in parts], room), strict=True):
        sign, style = signs[field]
        bar.append(sign * length, style=style)
    console.print(bar)
    legend = [Text.assemble(signs[field], f" {words} {percent(share)}") for field, words, share in parts]
    lines = [Text(" " * len(head))]
    for entry in legend:
        if lines[-1].plain.strip() and lines[-1].cell_len + entry.cell_len > console.width:
            lines.append(Text(" " * len(head)))
        lines[-1].append_text(entry).append("  ")
    for line in lines:
        line.rstrip()
        console.print(line)


def apportion(fractions: list[float], total: int) -> list[int]:
    """Whole numbers in the proportion of the fractions that add up to the total (largest remainders)."""
    if not sum(fractions):
        return [0 for _ in fractions]
    scale = total / sum(fractions)
    lengths = [int(fraction * scale) for fraction in fractions]
    rest = sorted(range(len(fractions)), key=lambda i: lengths[i] - fractions[i] * scale)
    for i in rest[: total - sum(lengths)]:
        lengths[i] += 1
    return lengths


def advice(study: Study, console: Console) -> None:
    """The recommendation, the command to copy, and the notes."""
    chosen = study.recommendation
    if chosen:
        console.print()
        console.print(Text(clean(chosen.sentence), style="bold"))
        if chosen.why and chosen.why not in chosen.sentence:
            console.print(Text(clean(chosen.why)))
        if chosen.not_told_apart:
            console.print(Text("Not told apart from: " + ", ".join(map(clean, chosen.not_told_apart))))
        if chosen.command:
            console.print()
            # Never wrapped: a line break inside would run half of the command.
            console.print(Text("  " + clean(chosen.command)), soft_wrap=True)
    if study.notes:
        console.print()
    for note in study.notes:
        console.print(Text("note: " + clean(note), style="dim"))
