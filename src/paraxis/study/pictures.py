"""Charts of a study's trials, in the look of `report.charts`: no script, no fixed size, the page's colours.

altair is slow to import: import this module late.
"""

from collections.abc import Callable
from math import isfinite
from statistics import median
from typing import Any

import altair as alt

from paraxis.measure.laws import Law
from paraxis.measure.statistics import interval
from paraxis.report.charts import NARROW, Data, colour, layer, ms_axis, named, render
from paraxis.report.charts import Row as Line
from paraxis.report.curves import LINES
from paraxis.report.study_charts import domain, ticks
from paraxis.study.axes import Axes
from paraxis.study.table import HEADS, PERCENT, SCALE, SCORES, Row, level, samples_of
from paraxis.study.trial import Trial

ROOM = 12  # pixels between the labels of an axis and its title
SPREAD = 30  # a factor between the largest and the least from which on an axis is logarithmic
MEASURED, REPLAYED, UNIFORM = "measured", "replayed with its own median times", "equal stages, in theory"


def against(axes: Axes, rows: list[Row], measure: str, width: int = 760) -> str:
    """A measure over one factor: every repeat as a small dot, medians with their intervals, a colour a series."""
    points = points_of(axes, rows, measure)
    if len({point["x"] for point in points}) < 2:
        return ""
    data: Data = {}
    names = list(dict.fromkeys(point["series"] for point in points))
    x, y, low = _across(axes, points), _up("y", measure, points), _up("low", measure, points)
    size: Line = {"width": width - 90, "height": 280 if width >= NARROW else 230}
    base = alt.Chart(named(data, "points", points)).properties(**size)
    fill = _fill(names, width)
    shift: Line = {"xOffset": alt.XOffset("series:N", sort=names)} if not axes.numeric and len(names) > 1 else {}
    dots = base.properties(data=named(data, "dots", dots_of(axes, rows, measure)))
    layers = [dots.mark_circle(size=20, opacity=0.5).encode(x=x, y=y, color=fill, **shift)]
    if axes.numeric:
        layers.append(base.mark_line(strokeWidth=1.6).encode(x=x, y=y, color=fill))
    layers.append(base.mark_rule(strokeWidth=1.6).encode(x=x, y=low, y2="high:Q", color=fill, **shift))
    layers.append(base.mark_point(filled=True, size=58, opacity=1).encode(x=x, y=y, color=fill, **shift))
    return render(layer(layers), data, f"{HEADS.get(measure, measure)} against {axes.across}")


def points_of(axes: Axes, rows: list[Row], measure: str) -> list[Line]:
    """Median and interval of every combination of levels that has the measure, in the unit of the table."""
    points: list[Line] = []
    for cell, same in rows:
        values = _values(same, measure)
        if values and axes.across in cell:
            low, high = interval(values)
            place = cell[axes.across] if axes.numeric else level(cell[axes.across])
            ends = {"y": median(values), "low": low, "high": high}
            points.append({"x": place, "series": axes.name(cell), **ends})
    return points


def dots_of(axes: Axes, rows: list[Row], measure: str) -> list[Line]:
    """Every repeat by itself."""
    return [
        {"x": cell[axes.across] if axes.numeric else level(cell[axes.across]), "series": axes.name(cell), "y": value}
        for cell, same in rows
        if axes.across in cell
        for value in _values(same, measure)
    ]


def _values(trials: list[Trial], measure: str) -> list[float]:
    """Finite values in the unit of the table."""
    fine = [t for t in trials if t.status == "ok"]
    found = samples_of(fine, measure) if fine else []
    return [value * SCALE.get(measure, 1.0) for value in found if isfinite(value)]


def _across(axes: Axes, points: list[Line]) -> alt.X:
    levels = list(dict.fromkeys(point["x"] for point in points))
    look: Line = {"grid": False, "labelOverlap": axes.numeric}
    if not axes.numeric:
        look["labelAngle"] = -40 if sum(len(str(value)) for value in levels) > 30 else 0
        return alt.X("x:N", title=axes.across, sort=levels, axis=alt.Axis(**look), scale=alt.Scale(padding=0.3))
    axis = alt.Axis(values=levels, format="~g", **look)
    if min(levels) > 0 and max(levels) / min(levels) >= 4:
        scale = alt.Scale(type="log", base=2, domain=domain(levels, 1.08), nice=False)
    else:
        edge = 0.05 * (max(levels) - min(levels))
        scale = alt.Scale(domain=[min(levels) - edge, max(levels) + edge], nice=False)
    return alt.X("x:Q", title=axes.across, axis=axis, scale=scale)


def _up(field: str, measure: str, points: list[Line]) -> alt.Y:
    title = HEADS.get(measure, measure)
    least, most = min(point["low"] for point in points), max(point["high"] for point in points)
    form: Line = {"format": "~%"} if measure in PERCENT else {}
    if least > 0 and most / least > SPREAD:
        edges = domain([least, most], 1.25)
        axis = ms_axis(values=ticks(edges), labelOverlap=True, titlePadding=ROOM, format="~g")
        return alt.Y(f"{field}:Q", title=title, axis=axis, scale=alt.Scale(type="log", domain=edges, nice=False))
    return alt.Y(
        f"{field}:Q", title=title, axis=ms_axis(titlePadding=ROOM, **form), scale=alt.Scale(zero=measure not in SCORES)
    )


def _fill(names: list[str], width: int) -> Any:
    fills = [colour("accent"), *LINES][: len(names)]
    if len(names) == 1:
        return alt.value(fills[0])
    look = alt.Legend(
        orient="top", title=None, columns=1 if width < NARROW else 4, symbolType="circle", symbolOpacity=1
    )
    return alt.Color("series:N", scale=alt.Scale(domain=names, range=fills), legend=look)


def bubbles(axes: Axes, rows: list[Row], width: int = 760) -> str:
    """The bubble over one factor, a panel a series: measured, replayed from its own times, and of equal stages."""
    names = list(dict.fromkeys(axes.name(cell) for cell, _ in rows))
    kinds = {"bubble": MEASURED, "bubble_replayed": REPLAYED, "bubble_uniform": UNIFORM}
    lines = {measure: points_of(axes, rows, measure) for measure in kinds}
    if len({point["x"] for point in lines["bubble"]}) < 2:
        return ""
    narrow = width < NARROW
    plot = width - 90 if narrow or len(names) == 1 else (width - 190) // 2
    data: Data = {}
    x = _across(axes, lines["bubble"])
    top = max(point["high"] for points in lines.values() for point in points)
    y, low = (
        alt.Y(
            f"{field}:Q",
            title="bubble",
            axis=ms_axis(titlePadding=ROOM, format="~%"),
            scale=alt.Scale(domain=[0, top], nice=True),
        )
        for field in ("y", "low")
    )
    look = alt.Legend(orient="top", title=None, columns=1 if narrow else 3, symbolType="circle")
    fills = alt.Scale(domain=list(kinds.values()), range=[colour("accent"), colour("communication"), colour("soft")])
    fill = alt.Color("kind:N", scale=fills, legend=look)
    drawn = []
    for number, name in enumerate(names):
        base = alt.Chart().properties(width=plot, height=190, title=name)
        layers = []
        for measure, kind in reversed(kinds.items()):
            mine = [{**point, "kind": kind} for point in lines[measure] if point["series"] == name]
            chart = base.properties(data=named(data, f"{measure} {number}", mine))
            dash = [5, 4] if measure == "bubble_uniform" else [1, 0]
            layers.append(chart.mark_line(strokeWidth=1.6, strokeDash=dash).encode(x=x, y=y, color=fill))
            if measure != "bubble_uniform":
                layers.append(chart.mark_rule(strokeWidth=1.4).encode(x=x, y=low, y2="high:Q", color=fill))
                layers.append(chart.mark_point(filled=True, size=46, opacity=1).encode(x=x, y=y, color=fill))
        drawn.append(layer(layers))
    return render(_rows_of(drawn, 1 if narrow else 2), data, f"Bubble against {axes.across}: measured and in theory")


def speedups(laws: list[tuple[str, Law]], width: int = 760) -> str:
    """Speed-up over workers, a panel each for strong and weak scaling: measured, ideal, and the law where it fits."""
    panels = [(kind, [(name, law) for name, law in laws if law.law == kind]) for kind in ("amdahl", "gustafson")]
    panels = [(kind, found) for kind, found in panels if any(len(law.counts) > 1 for _, law in found)]
    if not panels:
        return ""
    names = list(dict.fromkeys(name for _, found in panels for name, _ in found))
    narrow = width < NARROW
    plot = width - 90 if narrow or len(panels) == 1 else (width - 190) // 2
    data: Data = {}
    fill, drawn = _fill(names, width), []
    for kind, found in panels:
        points: list[Line] = [
            {"x": p.workers, "y": p.speedup.value, "low": p.speedup.low, "high": p.speedup.high, "series": name}
            for name, law in found
            for p in law.counts
        ]
        x = _across(Axes("workers", True, ()), points)
        y, low = (
            alt.Y(f"{field}:Q", title="speed-up", axis=ms_axis(titlePadding=ROOM), scale=alt.Scale(domainMin=0))
            for field in ("y", "low")
        )
        title = "strong scaling" if kind == "amdahl" else "weak scaling"
        base = alt.Chart(named(data, f"{kind} points", points)).properties(width=plot, height=230, title=title)
        most = max(point["x"] for point in points)
        ideal = base.properties(data=named(data, f"{kind} ideal", [{"x": n, "y": n} for n in _places(most)]))
        fitted = base.properties(
            data=named(data, f"{kind} law", [c for n, law in found for c in _fitted(n, law, most)])
        )
        layers = [
            ideal.mark_line(strokeDash=[4, 4], strokeWidth=1.4, color=colour("soft")).encode(x=x, y=y),
            fitted.mark_line(strokeWidth=1.6).encode(x=x, y=y, color=fill),
            base.mark_rule(strokeWidth=1.6).encode(x=x, y=low, y2="high:Q", color=fill),
            base.mark_point(filled=True, size=58, opacity=1).encode(x=x, y=y, color=fill),
        ]
        drawn.append(layer(layers))
    return render(_rows_of(drawn, 1 if narrow else 2), data, "Speed-up over workers, the ideal dashed")


def _fitted(name: str, law: Law, most: int) -> list[Line]:
    """The law's own curve, where it was fitted."""
    if law.serial is None:
        return []
    s = law.serial.value
    curve: Callable[[float], float] = (
        (lambda n: 1 / (s + (1 - s) / n)) if law.law == "amdahl" else (lambda n: n - s * (n - 1))
    )
    return [{"x": n, "y": curve(n), "series": name} for n in _places(most)]


def _places(most: int) -> list[float]:
    """From one worker to the most, close enough together for a curve."""
    return [most ** (i / 40) for i in range(41)]


def _rows_of(drawn: list[Line], columns: int) -> Line:
    rows = [{"hconcat": drawn[i : i + columns], "spacing": 40} for i in range(0, len(drawn), columns)]
    return {"vconcat": rows, "spacing": 26} if len(rows) > 1 else rows[0]
