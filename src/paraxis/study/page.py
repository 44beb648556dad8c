"""A study as one HTML file, in the look of the explore report: opens without a network, holds its own trials."""

import json
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from paraxis.measure.batch_sizes import BatchSizes
from paraxis.measure.laws import Law
from paraxis.report import speedup
from paraxis.report.markup import Cell, TableRow, document, figure, small, table, text
from paraxis.report.page import Section, command
from paraxis.report.sections import RAW_LIMIT
from paraxis.report.tables import clean, count
from paraxis.study.axes import axes_of, panels
from paraxis.study.definition import Definition, Grid, shipped, words
from paraxis.study.table import (
    HEADS,
    HIDDEN,
    SCALE,
    SCORES,
    Row,
    as_grid,
    differing,
    level,
    number,
    rows_of,
    samples_of,
)
from paraxis.study.table import figure as words_of
from paraxis.study.trial import Factors, Scalar, Trial

THEORY = ("bubble_uniform", "bubble_replayed")  # drawn beside the bubble
WIDE, SLIM = 880, 390
MARKS = (
    "Small dots are repeats, or the samples of a single one; the larger ones their medians with 95% intervals, or with "
    "the range of fewer than five."
)


def write(study: dict[str, Any], folder: Path) -> Path:
    """Write what `--json` prints as `report.html`, whole or not at all; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    draft = path.with_suffix(".html.part")
    draft.write_text(html(study), encoding="utf-8")
    draft.replace(path)
    return path


def html(study: dict[str, Any]) -> str:
    """The page of a study's document."""
    definition = Definition.model_validate(study["definition"])
    trials = [Trial.model_validate(trial) for trial in study["trials"]]
    parts = [
        *analysis(study),
        *results(definition, trials),
        ("laws", "Laws of scaling", laws(study, definition)),
        ("missing", "Without figures", missing(trials, study["not_reached"])),
        ("notes", "Notes", notes(study, trials)),
        ("asked", "What was asked", asked(definition)),
        ("raw", "Raw samples", raw(study)),
    ]
    parts = [part for part in parts if part[2]]
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{heading}</h2>{content}</section>\n'
        for key, heading, content in parts
    )
    took = sum(trial.seconds for trial in trials)
    foot = f"{count(len(trials), 'trial')} in {took:,.0f} s by paraxis {study['version']}."
    whole = (
        f"{opening(study, definition, trials, parts)}<main>\n{body}</main>\n<footer><p>{text(foot)}</p></footer>\n"
        f"{record(study)[0]}"
    )
    return document(f"{clean(definition.name)} - Paraxis study", whole, ("gantt.js", "page.js"))


def opening(study: dict[str, Any], definition: Definition, trials: list[Trial], parts: list[Section]) -> str:
    """What it asks, what it found in a sentence, how to run it, how many trials there are, on what machine."""
    lacks = len(study["not_reached"])
    links = " ".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in parts)
    found, where = (study["analysis"] or {}).get("sentence") or "", machine(trials)
    lines = [
        f'<p class="brand"><b>Paraxis</b> study {text(definition.name)}</p>',
        f'<p class="unfinished">{count(lacks, "trial")} did not fit the budget; the same command with more --budget '
        "goes on from here</p>"
        if lacks
        else "",
        f"<h1>{text(definition.about or definition.name)}</h1>",
        f'<p class="lede">{text(found)}</p>' if found else "",
        command(f"paraxis explore --study {definition.name}{'.toml' * (definition.name not in shipped())}", "Run it"),
        f'<p class="machine">{text(where)}</p>' if where else "",
        f'<nav aria-label="Sections">{links}</nav>',
    ]
    return "<header>\n" + "\n".join(line for line in lines if line) + "\n</header>\n"


def machine(trials: list[Trial]) -> str:
    """The machine that ran the trials and what else kept it busy, in one line; each, where there were several."""
    said: dict[str, list[float]] = {}
    for trial in trials:
        if m := trial.machine:
            hardware = f"{m['cpu']}, {count(m['usable_cores'], 'usable core')}, {m['memory_bytes'] / 2**30:,.0f} GiB"
            software = f"Python {m['python']} · PyTorch {m['torch']} · {m['system']}"
            said.setdefault(f"{hardware} · {software}", []).append(m.get("foreign_cores") or 0.0)
    lines = [
        f"{words} · {median(load):.1f} cores busy with other programs, at most {max(load):.1f}"
        + (f" · {count(len(load), 'trial')}" if len(said) > 1 else "")
        for words, load in said.items()
    ]
    return "; ".join(lines)


def analysis(study: dict[str, Any]) -> list[Section]:
    """The charts of a procedure that has some of its own."""
    if (study["analysis"] or {}).get("critical") is None:
        return []
    from paraxis.report.study_charts import rates_by_batch, steps_by_batch

    found = BatchSizes.model_validate(study["analysis"])
    steps = "Medians over seeds and each seed; the bend is the critical batch size, its 95% interval shaded."
    rates = "Every learning rate tried: grey dots reached the target, crosses did not, the line is the best."
    drawn = figure(steps_by_batch(found, WIDE), steps_by_batch(found, SLIM), steps)
    return [("found", "Found", drawn + figure(rates_by_batch(found, WIDE), rates_by_batch(found, SLIM), rates))]


def results(definition: Definition, trials: list[Trial]) -> list[Section]:
    """Charts and table of every grid that has figures; a procedure's trials stand in a table alone."""
    own = definition.procedure != "grid"
    found: list[Section] = []
    for grid in [as_grid(definition, trials)] if own else definition.grids():
        rows = [(cell, fine) for cell, same in rows_of(grid, trials) if (fine := [t for t in same if t.status == "ok"])]
        if rows:
            number = len(found) + 1
            drawn = "" if own else pictures(grid, rows)
            content = drawn + (f"<p>{MARKS}</p>" if drawn and not found else "") + figures(grid, rows)
            title = grid.title or "Results"
            found.append((f"grid-{number}", text(title[:1].upper() + title[1:]), content))
    return found


def pictures(grid: Grid, rows: list[Row]) -> str:
    """A chart for each measured quantity; of those that are the same everywhere a sentence."""
    from paraxis.study.pictures import against, bubbles  # altair takes most of a second to import

    axes = axes_of(grid, [cell for cell, _ in rows])
    drawn, same = "", []
    for measure in measures(rows):
        if measure in THEORY:
            continue
        values = [v for _, trials in rows for v in samples_of(trials, measure) if isfinite(v)]
        if values and min(values) == max(values):
            same.append(f"{HEADS.get(measure, measure)} is {number(values[0], measure)} in every trial.")
            continue
        for title, some, few in panels(axes, rows):
            draw = bubbles if measure == "bubble" and "bubble_uniform" in measures(few) else against
            wide, slim = (
                (draw(some, few, w) if draw is bubbles else against(some, few, measure, w)) for w in (WIDE, SLIM)
            )
            drawn += figure(wide, slim, " ".join(filter(None, [title and f"{title}.", told(grid, few, measure)])))
    return drawn + (f"<p>{text(' '.join(same))}</p>" if same else "")


def told(grid: Grid, rows: list[Row], measure: str) -> str:
    """What a chart shows: where its least and its most are; of a bubble, how far the replay is from it."""
    varying = [name for name in grid.varying() if name != "plan"]
    ranked = sorted(
        ((median(values), cell) for cell, same in rows if (values := samples_of(same, measure))), key=lambda p: p[0]
    )
    if not ranked:
        return ""
    ends = [
        f"{number(value, measure)} ({words({key: cell[key] for key in varying if key in cell}, 0)})"
        for value, cell in (ranked[0], ranked[-1])
    ]
    said = f"{HEADS.get(measure, measure)}: from {ends[0]} to {ends[1]}."
    if number(ranked[0][0], measure) == number(ranked[-1][0], measure):
        said = f"{HEADS.get(measure, measure)}: {number(ranked[0][0], measure)} throughout, to the digits shown."
    if measure in SCORES:
        said += " The axis does not begin at 0."
    if measure != "bubble":
        return said
    apart = [
        abs(median(a) - median(b))
        for _, same in rows
        if (a := samples_of(same, "bubble")) and (b := samples_of(same, "bubble_replayed"))
    ]
    return (
        f"{said} Replayed: the program simulated with the median times of its own instructions, at most "
        f"{max(apart):.1%} of the step from what was measured. In theory: (p-1)/(m+p-1) for p equal stages and m "
        "microbatches; stages that are not equal, and kernels that small microbatches slow, make it larger."
        if apart
        else said
    )


def measures(rows: list[Row]) -> list[str]:
    """What was measured in a grid, in the order of its first trial."""
    return list(dict.fromkeys(m for _, same in rows for t in same for m in t.measures if m not in HIDDEN))


def figures(grid: Grid, rows: list[Row]) -> str:
    """Every combination of levels with its medians and intervals, sortable by each."""
    varying = [name for name in grid.varying() if name != "plan"] or ["plan"]
    kept = measures(rows)
    heads = [*map(text, varying), *(text(HEADS.get(m, m)) for m in kept), "repeats"]
    lines: list[TableRow] = []
    for cell, same in rows:
        levels: list[Cell] = [factor(cell.get(name)) for name in varying]
        tag = ' <span class="tag">oversubscribed</span>' if same[0].oversubscribed else ""
        first = levels[0]
        levels[0] = first + tag if isinstance(first, str) else (first[0] + tag, first[1])
        values = [(small(text(words_of(same, m, "–"))), middle(same, m)) for m in kept]
        lines.append(("", [*levels, *values, (f"{len(same)}", len(same))]))
    under = ["Medians [95% intervals over repeats; of fewer than five their range]."]
    if any(same[0].oversubscribed for _, same in rows):
        under.append("Oversubscribed: more workers than usable cores, so they take turns.")
    if any(t.measures.get("epoch_projected") for _, same in rows for t in same):
        under.append("~ projected: a step's time x the steps of an epoch.")
    right = {*heads[len(varying) :]}
    name = text(grid.title or "Results")
    return f"{table(name, heads, lines, right, 'sortable trials')}<p>{' '.join(under)}</p>"


def factor(value: Scalar | None) -> Cell:
    """A level, sorted as a number where it is one."""
    shown = text(level(value)).replace(",", ",<wbr>")
    return (shown, float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else shown


def middle(trials: list[Trial], measure: str) -> float | None:
    """What a cell is sorted by."""
    values = [v for v in samples_of(trials, measure) if isfinite(v)]
    return median(values) * SCALE.get(measure, 1.0) if values else None


def laws(study: dict[str, Any], definition: Definition) -> str:
    """Amdahl's and Gustafson's law over worker counts, or why they are not fitted."""
    found = [
        (given["equal"], Law.model_validate({k: v for k, v in given.items() if k != "equal"}))
        for given in study["laws"]
    ]
    if not found:
        return ""
    from paraxis.study.pictures import speedups

    told = differing([equal for equal, _ in found])
    kept = [key for key in told if key not in ("batch", "batch_per_worker", "plan")] or told
    cells = [cell for grid in definition.grids() for cell in grid.cells()]
    # In the order of the charts above, so that colours stay the same.
    found.sort(key=lambda pair: next((i for i, c in enumerate(cells) if alike(pair[0], c, kept)), len(cells)))
    named = [(" ".join(level(equal[key]) for key in kept if key in equal) or "all", law) for equal, law in found]
    caption = (
        "Speed-up over one worker with its 95% interval; strong scaling keeps the batch, weak scaling the batch of a "
        "worker. Dashed: ideal. More workers than usable cores are left out."
    )
    return figure(speedups(named, WIDE), speedups(named, SLIM), caption) + speedup.told(named)


def alike(one: Factors, other: Factors, keys: list[str]) -> bool:
    """Whether two trials have the same levels of some factors."""
    return all(one.get(key) == other.get(key) for key in keys)


def missing(trials: list[Trial], not_reached: list[dict[str, Any]]) -> str:
    """Trials that were refused, failed or not reached, and why."""
    lost: list[tuple[Factors, int, str, str]] = []
    lost += [(t.factors, t.repeat, t.status, t.reason or "no reason recorded") for t in trials if t.status != "ok"]
    lost += [(gone["factors"], gone["repeat"], "not reached", "the budget was spent") for gone in not_reached]
    keys = differing([*(t.factors for t in trials), *(factors for factors, *_ in lost)])
    rows: list[TableRow] = [
        ("", [text(words({k: factors[k] for k in keys if k in factors}, repeat)), status, text(why)])
        for factors, repeat, status, why in lost
    ]
    return table("Trials without figures", ["Trial", "Status", "Reason"], rows, set()) if rows else ""


def notes(study: dict[str, Any], trials: list[Trial]) -> str:
    """What the study and its trials say of themselves, each once."""
    said = dict.fromkeys([*(study["analysis"] or {}).get("notes", []), *(note for t in trials for note in t.notes)])
    return f"<ul>{''.join(f'<li>{text(note)}</li>' for note in said)}</ul>" if said else ""


def asked(definition: Definition) -> str:
    """Factors and their levels, what is fixed, what is measured, how often, in which order."""
    if definition.procedure != "grid":
        return _listed({key: spelled(value) for key, value in definition.parameters.items()})
    whole = ""
    for grid in definition.grids():
        items = {key: spelled(levels) for key, levels in grid.factors.items()}
        items["fixed"] = words(grid.fixed, 0)
        items["left out"] = spelled(grid.exclude)
        items["measured"] = ", ".join(HEADS.get(m, m) for m in grid.measure or definition.measure)
        items["repeats"] = str(grid.repeats)
        whole += (f"<h3>{text(grid.title)}</h3>" if grid.title else "") + _listed(items)
    seeds = "draws other weights and batches" if definition.vary_seed else "has the same weights and batches"
    order = "in an order drawn anew each time" if definition.order == "random" else "in the order written"
    return f"{whole}<p>Every trial runs once before any a second time, {order}; a repeat {seeds}.</p>"


def _listed(items: dict[str, str]) -> str:
    lines = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in items.items() if value)
    return f'<dl class="setup">{lines}</dl>'


def spelled(value: Any) -> str:
    """Levels in words."""
    if isinstance(value, list):
        return ", ".join(map(spelled, value))
    return words(value, 0) if isinstance(value, dict) else level(value)


def raw(study: dict[str, Any]) -> str:
    """The way to the record."""
    left = record(study)[1]
    lacks = f" To keep this page small it lacks their {' and '.join(left)}; trials.jsonl has them." if left else ""
    return (
        "<p>Every trial with its samples, its machine and its versions is inside this file, in the element "
        f"<code>#study</code>.{lacks}</p>"
        '<p class="save"><a id="download" download="study.json" hidden>Save it as study.json</a> '
        '<a id="samples" download="samples.csv" hidden>Save every sample as CSV</a></p>'
    )


def record(study: dict[str, Any]) -> tuple[str, list[str]]:
    """The document as a data block of the page, and what had to be left out of it for its size."""
    left: list[str] = []
    data = json.dumps(study)
    for field in ("series", "machine"):
        if len(data) <= RAW_LIMIT:
            break
        left.append(field)
        slim = [{key: value for key, value in trial.items() if key not in left} for trial in study["trials"]]
        data = json.dumps(study | {"trials": slim})
    # No "<" at all: "</script" would end the block, "<!--<script" would hide its end.
    return f'<script type="application/json" id="study">{data.replace("<", chr(92) + "u003c")}</script>\n', left
