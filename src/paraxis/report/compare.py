"""Several studies side by side: two machines, or two commits on one machine.

Their rounds were never interleaved, so no two samples belong together: ratios are of medians, each study resampled by
itself (unpaired bootstrap; Efron and Tibshirani 1993, section 8.3). Such a ratio also holds whatever else differed
between the two occasions, the weather of the machine included.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paraxis.errors import TaskError
from paraxis.measure.records import Ratio, Result, Seconds, Study
from paraxis.report import tables
from paraxis.report.markup import document, figure, small, table, text, time
from paraxis.report.one import study_of

DRAWS = 4000
FEWEST = 5  # samples below which a study's median has no interval worth the name
LEVEL = 0.95
UNPAIRED = (
    "Ratios are unpaired: the studies ran at different times, so what else the machines did counts, too. "
    "Above 1 is faster than the first study; ~ marks what is not told apart from it."
)


@dataclass(frozen=True)
class Entry:
    """A plan in one study; `ratio` is the first study's time over this one's, None where either has too few samples.

    `apart`: whether its interval, corrected for the number of comparisons, excludes 1.
    """

    seconds: Seconds | None
    ratio: Ratio | None = None
    apart: bool = False
    why: str = ""  # no figures: refused, failed, not reached, absent


@dataclass(frozen=True)
class Line:
    """One plan in all studies."""

    label: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Comparison:
    """Studies by name, the plans of all of them, and what stands in the way of a fair comparison."""

    names: tuple[str, ...]
    studies: tuple[Study, ...]
    lines: tuple[Line, ...]
    warnings: tuple[str, ...]


def show(paths: list[Path], out: Path | None, as_json: bool, console: Console) -> None:
    """Compare the studies in these folders on the terminal or as JSON, and as a page where `out` says."""
    comparison = compare(opened(paths))
    if as_json:
        print(json.dumps(document_of(comparison), indent=1))
    else:
        terminal(comparison, console)
    if out:
        written = write(comparison, out)
        if not as_json:
            console.print(Text(f"comparison: {written}"))


def opened(paths: list[Path]) -> list[tuple[str, Study]]:
    """Studies by the names of their folders, or by their paths where names are the same; raises TaskError."""
    folders = [path.parent if path.suffix == ".json" else path for path in paths]
    names = [folder.resolve().name for folder in folders]
    studies = [study_of(path) for path in paths]
    unique = names if len(set(names)) == len(names) else [str(path) for path in paths]
    return list(zip(unique, studies, strict=True))


def document_of(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON; seconds without their samples."""
    return {
        "studies": list(comparison.names),
        "plans": [
            {
                "label": line.label,
                "studies": [
                    {
                        "seconds": e.seconds and e.seconds.model_dump(include={"median", "low", "high"}),
                        "ratio": e.ratio and e.ratio.model_dump(),
                        "told_apart": e.apart,
                        "why": e.why,
                    }
                    for e in line.entries
                ],
            }
            for line in comparison.lines
        ],
        "warnings": [*comparison.warnings, UNPAIRED],
    }


def unpaired(first: Seconds, other: Seconds, level: float = LEVEL) -> Ratio | None:
    """How many times faster `other` is than `first`, with its interval; None below FEWEST samples on either side."""
    if min(len(first.samples), len(other.samples)) < FEWEST:
        return None
    rng = np.random.default_rng(len(first.samples) * 1000003 + len(other.samples))
    ratios = _medians(first, rng) / _medians(other, rng)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Ratio(median=first.median / other.median, low=float(low), high=float(high))


def _medians(time: Seconds, rng: np.random.Generator) -> np.ndarray:
    """Medians of DRAWS resamples."""
    values = np.asarray(time.samples)
    return np.asarray(np.median(values[rng.integers(0, len(values), (DRAWS, len(values)))], axis=1))


def compare(studies: list[tuple[str, Study]]) -> Comparison:
    """Every plan of every study, in the order of the first study's speed; raises TaskError below two studies."""
    if len(studies) < 2:
        raise TaskError("a comparison needs two studies or more: paraxis show DIR DIR")
    found = [{_key(study, r): r for r in tables.everything(study)} for _, study in studies]
    keys = list(dict.fromkeys(key for _, study in studies for key in _ordered(study)))
    both = sum(_measured(results.get(key)) for key in keys for results in found[1:] if _measured(found[0].get(key)))
    level = 1 - (1 - LEVEL) / max(1, both)
    lines = [Line(_label(key, found), tuple(_entries(key, found, level))) for key in keys]
    chosen = [study for _, study in studies]
    return Comparison(tuple(name for name, _ in studies), tuple(chosen), tuple(lines), tuple(warnings(studies)))


def _key(study: Study, result: Result) -> str:
    """What a plan is the same by: today is today, with however many threads a machine has."""
    return "today" if tables.is_today(study, result) else result.plan


def _ordered(study: Study) -> list[str]:
    return [_key(study, r) for r in [*tables.ranking(study), *tables.unmeasured(study)]]


def _measured(result: Result | None) -> bool:
    return result is not None and result.status == "ok" and result.step_seconds is not None


def _label(key: str, found: list[dict[str, Result]]) -> str:
    return key if key == "today" else next(tables.clean(r[key].label or key) for r in found if key in r)


def _entries(key: str, found: list[dict[str, Result]], level: float) -> list[Entry]:
    """One plan in each study."""
    base, entries = found[0].get(key), []
    for index, results in enumerate(found):
        result = results.get(key)
        if result is None or result.step_seconds is None:
            why = (
                {"not run": "not reached", "ok": "no figures"}.get(result.status, result.status) if result else "absent"
            )
            entries.append(Entry(None, why=why))
            continue
        time, ratio, strict = result.step_seconds, None, None
        if index and base and base.step_seconds:
            ratio, strict = unpaired(base.step_seconds, time), unpaired(base.step_seconds, time, level)
        entries.append(Entry(time, ratio, bool(strict and not strict.low <= 1 <= strict.high)))
    return entries


def warnings(studies: list[tuple[str, Study]]) -> list[str]:
    """What makes the studies differ beside what one wants to compare."""
    lines = []
    (first, base), *rest = studies
    for name, study in rest:
        differ = [k for k in sorted({*base.task, *study.task}) if base.task.get(k) != study.task.get(k)]
        if differ:
            shown = (f"{k} {base.task.get(k)} and {study.task.get(k)}" for k in differ[:4])
            more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
            lines.append(f"{first} and {name} are not the same task: {', '.join(shown)}{more}")
    for name, study in studies:
        if unfinished := tables.unfinished(study):
            lines.append(f"{name}: {unfinished}")
        if (study.machine.foreign_cores or 0) > 0.2:
            lines.append(f"{name}: {study.machine.foreign_cores:.1f} cores were busy with other programs")
    return [tables.clean(line) for line in lines]


def verdict(entry: Entry, spread: bool = True, sign: str = "x", dash: str = "-") -> str:
    """The ratio, with its interval if asked for; ~ where it does not tell the two apart."""
    if entry.ratio is None:
        return ""
    return tables.ratio(entry.ratio, spread, sign, dash) + ("" if entry.apart else " ~")


def terminal(comparison: Comparison, console: Console) -> None:
    """A line a plan: ms per step in each study, and its ratio to the first one."""
    spread = console.width >= 20 + 38 * len(comparison.names)
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    grid.add_column("plan", overflow="fold")
    for index, name in enumerate(comparison.names):
        grid.add_column(Text(f"{tables.clean(name)}\nms/step [95%]"), justify="right", no_wrap=True)
        if index:
            grid.add_column(Text("against\nthe first"), no_wrap=True)
    for line in comparison.lines:
        cells = []
        for index, entry in enumerate(line.entries):
            time = entry.seconds
            cells.append(Text(f"{tables.milliseconds(time.median)} {tables.interval(time)}" if time else entry.why))
            if index:
                cells.append(Text(verdict(entry, spread), style="bold" if entry.apart else "dim"))
        grid.add_row(Text(line.label), *cells)
    console.print(grid)
    console.print()
    for name, study in zip(comparison.names, comparison.studies, strict=True):
        chosen = study.recommendation.label if study.recommendation else "no plan"
        console.print(Text(tables.clean(f"{name}: use {chosen}. {tables.machine(study)}")))
    for words in (*comparison.warnings, UNPAIRED):
        console.print(Text(words, style="dim"))


def write(comparison: Comparison, path: Path) -> Path:
    """Write the comparison as one HTML file, whole or not at all; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(html(comparison), encoding="utf-8")
    draft.replace(path)
    return path


def picture(comparison: Comparison, width: int) -> str:
    """Step times of the plans that several studies have measured, a dot and an interval each study."""
    import altair as alt  # takes most of a second to import

    from paraxis.report.charts import NARROW, Data, colour, layer, ms_axis, named, render
    from paraxis.report.curves import LINES

    shared = [line for line in comparison.lines if sum(e.seconds is not None for e in line.entries) > 1]
    rows = [
        {"plan": line.label, "study": name, "ms": s.median * 1e3, "low": s.low * 1e3, "high": s.high * 1e3}
        for line in shared[: tables.BARS]
        for name, e in zip(comparison.names, line.entries, strict=True)
        if (s := e.seconds)
    ]
    if not rows:
        return ""
    data: Data = {}
    names, plot = list(comparison.names), width - (130 if width < NARROW else 260)
    chart = alt.Chart(named(data, "times", rows)).properties(width=plot, height=alt.Step(12))
    axis = alt.Axis(domain=False, ticks=False, labelPadding=8, labelLimit=100 if width < NARROW else 200)
    y = alt.Y("plan:N", sort=None, title=None, axis=axis, scale=alt.Scale(paddingInner=0.35))
    look = alt.Legend(orient="top", title=None, columns=2 if width < NARROW else 4, symbolType="circle")
    fills = [colour("accent"), *LINES][: len(names)]
    fill = alt.Color("study:N", scale=alt.Scale(domain=names, range=fills), legend=look)
    shift = alt.YOffset("study:N", sort=names)
    title = "ms per step, shorter is better"
    x = alt.X("ms:Q", title=title, scale=alt.Scale(domainMin=0, nice=False), axis=ms_axis())
    layers = [
        chart.mark_rule(strokeWidth=1.6).encode(
            x=alt.X("low:Q", title=title), x2="high:Q", y=y, yOffset=shift, color=fill
        ),
        chart.mark_point(filled=True, size=40, opacity=1).encode(x=x, y=y, yOffset=shift, color=fill),
    ]
    return render(layer(layers), data, "Step time of each plan in each study, with its 95% interval")


def html(comparison: Comparison) -> str:
    """The page: a picture, the table, sortable and filterable, and a line for every machine."""
    heads, right = ["Plan"], set()
    for index, name in enumerate(comparison.names):
        heads.append(f"{text(name)}: ms per step")
        right.add(heads[-1])
        if index:
            heads.append(f"{text(name)} against {text(comparison.names[0])}")
    rows = []
    for line in comparison.lines:
        cells: list[str | tuple[str, float | None]] = [text(line.label)]
        for index, entry in enumerate(line.entries):
            seconds = entry.seconds
            cells.append((time(seconds, unit=""), seconds.median) if seconds else (entry.why, None))
            if index:
                ratio = entry.ratio.median if entry.ratio else None
                cells.append((small(text(verdict(entry, sign="×", dash="–"))), ratio))
        rows.append(("", cells))
    machines = "".join(
        f"<dt>{text(name)}</dt><dd>{text(study.recommendation.sentence if study.recommendation else 'No plan.')} "
        f'<span class="machine">{text(tables.machine(study))}</span></dd>'
        for name, study in zip(comparison.names, comparison.studies, strict=True)
    )
    words = "".join(f"<li>{text(line)}</li>" for line in (*comparison.warnings, UNPAIRED))
    drawn = figure(picture(comparison, 880), picture(comparison, 390), "Median and 95% interval of each study.")
    *front, last = comparison.names
    title = f"{', '.join(front)} and {last}"
    body = (
        f'<header><p class="brand"><b>Paraxis</b> comparison</p><h1>{text(title)}</h1>'
        f'<dl class="setup">{machines}</dl></header>\n<main><section id="results"><h2>All plans</h2>'
        f"{drawn}{table('Plans of all studies', heads, rows, right, 'sortable')}<ul>{words}</ul></section></main>\n"
    )
    return document(f"{tables.clean(title)} - Paraxis", body, ("gantt.js", "page.js"))
