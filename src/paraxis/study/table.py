"""A study on a terminal: a table a grid, a row a combination of levels, medians and how far repeats scatter."""

from collections.abc import Iterable
from math import isfinite
from statistics import median
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from paraxis.measure.statistics import interval
from paraxis.report.tables import clean
from paraxis.study.definition import Definition, Grid, words
from paraxis.study.trial import Factors, Scalar, Trial, identity

HEADS = {
    "step_seconds": "ms/step",
    "epoch_seconds": "s/epoch",
    "samples_per_second": "samples/s",
    "seconds_to_target": "s to target",
    "steps_to_target": "steps to target",
    "final_accuracy": "accuracy",
    "final_loss": "loss",
    "bytes": "MB/step sent",
    "memory": "MB/rank",
    "bubble": "bubble",
    "bubble_uniform": "uniform stages",
    "bubble_replayed": "replayed",
    "mean_accuracy": "weights averaged",
    "alone_accuracy": "each alone",
}
HIDDEN = {"epoch_projected", "steps_trained"}
PERCENT = {"final_accuracy", "mean_accuracy", "alone_accuracy", "bubble", "bubble_uniform", "bubble_replayed"}
SCORES = {"final_accuracy", "final_loss", "mean_accuracy", "alone_accuracy"}
SCALE = {"step_seconds": 1e3, "bytes": 1e-6, "memory": 1e-6}
Row = tuple[Factors, list[Trial]]


def print_study(document: dict[str, Any], console: Console) -> None:
    """All that is recorded, what was refused or failed and why, and what was not reached."""
    definition = Definition.model_validate(document["definition"])
    trials = [Trial.model_validate(trial) for trial in document["trials"]]
    console.print(f"{clean(definition.name)}: {clean(definition.about)}", markup=False)
    grids = definition.grids() if definition.procedure == "grid" else [as_grid(definition, trials)]
    for grid in grids:
        rows = rows_of(grid, trials)
        if any(t.status == "ok" for _, same in rows for t in same):
            table = table_of(grid, rows)
            console.print(f"\n{clean(grid.title)}" if grid.title else "", markup=False, style="italic")
            needed = Measurement.get(console, console.options.update(width=1000), table).minimum
            console.print(table, width=max(console.width, needed), crop=False)  # figures are never cut
    if any(t.oversubscribed and t.status == "ok" for t in trials):
        console.print("* oversubscribed: more workers than usable cores, so they take turns", style="dim")
    if any(t.measures.get("epoch_projected") for t in trials):
        console.print("~ projected: a step's time x the steps of an epoch", style="dim")
    lost: list[tuple[Factors, int, str, str]] = []
    lost += [(t.factors, t.repeat, t.status, f": {t.reason}") for t in trials if t.status != "ok"]
    lost += [(gone["factors"], gone["repeat"], "not reached", "") for gone in document["not_reached"]]
    told = differing([*(t.factors for t in trials), *(factors for factors, *_ in lost)])
    for factors, repeat, status, why in lost:
        what = words({key: factors[key] for key in told if key in factors}, repeat)
        console.print(f"{status}: {clean(what)}{clean(why)}", markup=False, style="dim")
    for law in document["laws"]:
        equal = differing([other["equal"] for other in document["laws"]])
        what = words({key: law["equal"][key] for key in equal if key in law["equal"]})
        console.print(f"{clean(what)}: {law['sentence']}" if what else law["sentence"], markup=False)
    analysis = document["analysis"] or {}
    for text in [*filter(None, [analysis.get("sentence")]), *analysis.get("notes", [])]:
        console.print(clean(text), markup=False)
    if document["not_reached"]:
        count = len(document["not_reached"])
        console.print(f"{count} trials did not fit the budget; the same command with more --budget goes on from here")


def rows_of(grid: Grid, trials: Iterable[Trial]) -> list[Row]:
    """Each of a grid's combinations with its recorded repeats, in the order of the levels."""
    found: dict[Any, list[Trial]] = {}
    for trial in trials:
        found.setdefault(identity(trial.factors, 0), []).append(trial)
    return [(cell, found[key]) for cell in grid.cells() if (key := identity(cell, 0)) in found]


def table_of(grid: Grid, rows: list[Row]) -> Table:
    """One grid's table."""
    varying = [name for name in grid.varying() if name != "plan"] or ["plan"]
    measured = dict.fromkeys(m for _, same in rows for t in same if t.status == "ok" for m in t.measures)
    shown = [m for m in measured if m not in HIDDEN]
    table = Table(box=None, pad_edge=False)
    lines: list[list[str]] = []
    for cell, same in rows:
        fine = [t for t in same if t.status == "ok"]
        if not fine:
            continue
        star = "*" if fine[0].oversubscribed else ""
        levels = [level(cell.get(name)) for name in varying]
        lines.append([levels[0] + star, *levels[1:], *(figure(fine, measure) for measure in shown)])
    for place, name in enumerate([*varying, *shown]):
        longest = max(
            len(word) for line in [[""] * len(varying + shown), *lines] for word in (line[place] or "-").split()
        )
        table.add_column(HEADS.get(name, name), justify="right" if place >= len(varying) else "left", min_width=longest)
    for line in lines:
        table.add_row(*line)
    return table


def samples_of(trials: list[Trial], measure: str) -> list[float]:
    """A measure's values over repeats; a single trial gives the samples of which its figure is the median."""
    values = [v for t in trials if (v := t.measures.get(measure)) is not None]
    return trials[0].series.get(measure, values) if len(trials) == 1 and values else values


def figure(trials: list[Trial], measure: str, dash: str = "-") -> str:
    """`12.3 [12.1-12.6]`: the median and its interval; how many of the repeats have it where not all do."""
    values = samples_of(trials, measure)
    if not values:
        return "-"
    middle, (low, high) = median(values), interval(values)
    mark = "~" if measure == "epoch_seconds" and any(t.measures.get("epoch_projected") for t in trials) else ""
    spread = f" [{number(low, measure)}{dash}{number(high, measure)}]" if len(values) > 1 and high > low else ""
    some = sum(t.measures.get(measure) is not None for t in trials)
    return f"{mark}{number(middle, measure)}{spread}" + (f" ({some} of {len(trials)})" if some < len(trials) else "")


def number(value: float, measure: str) -> str:
    """A measure's value in the unit of its head."""
    if measure in PERCENT:
        return f"{value:.1%}"
    if not isfinite(value):  # a loss that has diverged
        return str(value)
    value *= SCALE.get(measure, 1.0)
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def level(value: Scalar | None) -> str:
    """A factor's level in words."""
    return "" if value is None else clean(f"{value:g}" if isinstance(value, float) else str(value))


def differing(all_factors: list[Factors]) -> list[str]:
    """Names of the factors that are not the same everywhere."""
    names = dict.fromkeys(key for factors in all_factors for key in factors)
    return [name for name in names if len({repr(factors.get(name)) for factors in all_factors}) > 1]


def as_grid(definition: Definition, trials: list[Trial]) -> Grid:
    """The trials that a procedure has chosen, as levels of one factor."""
    cells = {identity(t.factors, 0): t.factors for t in trials}
    return Grid.model_construct(
        title=definition.title,
        factors={"trial": list(cells.values())},
        measure=definition.measure,
        exclude=[],
        fixed={},
    )
