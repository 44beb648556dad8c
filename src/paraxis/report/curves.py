"""Curves: loss over steps, accuracy over samples and seconds, speed-up over workers. Imports altair: import it late."""

from math import isfinite

import altair as alt

from paraxis.measure.records import Result, Study
from paraxis.report import tables
from paraxis.report.charts import NARROW, Data, Row, colour, layer, ms_axis, named, render
from paraxis.report.speedup import families

CURVES, POINTS = 8, 240  # the most that stays legible in one chart
LINES = ["#d98634", "#5f9a6a", "#a2559b", "#b3a12c", "#c2504a", "#4f62b5", "#3fa69b"]


def losses(study: Study, width: int = 760) -> str:
    """Training loss by step, plans over each other; today is the broad pale band that exact plans must cover."""
    every = [r for r in tables.everything(study) if any(map(isfinite, r.losses))]
    now = [r for r in every if tables.is_today(study, r)]
    ours = [r for r in every if r is tables.winner(study) and r not in now]
    # An inexact plan's curve is news, an exact one's is a check.
    rest = sorted((r for r in every if r not in now + ours), key=lambda r: (r.exact, tables.median(r)))
    drawn = [*now, *reversed(rest[: CURVES - len(now + ours)]), *ours]  # the last is drawn over the others
    if not drawn:
        return ""
    names = unique([tables.name(study, r) + ("" if r.exact else " (inexact)") for r in drawn])
    spare = iter(LINES)
    fills = {
        name: colour("bar") if r in now else colour("accent") if r in ours else next(spare)
        for name, r in zip(names, drawn, strict=True)
    }
    base = alt.Chart().properties(width=width - 70, height=260 if width >= NARROW else 220)
    x = alt.X(
        "step:Q", title="step", axis=alt.Axis(grid=False, tickCount=6, tickMinStep=1), scale=alt.Scale(nice=False)
    )
    y = alt.Y("loss:Q", title="training loss", axis=ms_axis(), scale=alt.Scale(zero=False))
    look = alt.Legend(
        orient="top",
        title=None,
        columns=1 if width < NARROW else 3,
        symbolType="stroke",
        symbolStrokeWidth=3,
        offset=24,
    )
    listed = [names[drawn.index(r)] for r in [*now, *ours, *rest] if r in drawn]
    scale = alt.Scale(domain=listed, range=[fills[name] for name in listed])
    data: Data = {}
    layers = []
    for index, (name, result) in enumerate(zip(names, drawn, strict=True)):
        chart = base.properties(data=named(data, f"curve {index}", curve(result.losses, name)))
        chart = chart.mark_line(strokeWidth=8 if result in now else 1.8, strokeCap="round")
        layers.append(chart.encode(x=x, y=y, color=alt.Color("plan:N", scale=scale, legend=look)))
    return render(layer(layers), data, "Training loss of each plan by step")


def accuracy(study: Study, width: int = 760) -> str:
    """Accuracy on held-out samples, once over the samples seen and once over the seconds of training."""
    drawn = learners(study)
    if not drawn:
        return ""
    names = unique([tables.name(study, r) + ("" if r.exact else " (inexact)") for r in drawn])
    rows = [
        {"plan": name, "samples": samples, "seconds": seconds, "accuracy": score}
        for name, r in zip(names, drawn, strict=True)
        if (seen := r.learned)
        for samples, seconds, score in zip(seen.samples, seen.seconds, seen.accuracy, strict=True)
    ]
    spare = iter(LINES)
    best = tables.winner(study)
    fills = [
        colour("today") if tables.is_today(study, r) else colour("accent") if r is best else next(spare) for r in drawn
    ]
    narrow = width < NARROW
    plot = width - 70 if narrow else (width - 170) // 2
    look = alt.Legend(orient="top", title=None, columns=1 if narrow else 3, symbolType="circle")
    fill = alt.Color("plan:N", scale=alt.Scale(domain=names, range=fills), legend=look)
    y = alt.Y("accuracy:Q", title="accuracy", axis=ms_axis(format="%"), scale=alt.Scale(zero=False))
    data: Data = {}
    chart = alt.Chart(named(data, "scores", rows)).properties(width=plot, height=220)
    panels = []
    for field, title in (("samples", "samples seen"), ("seconds", "seconds of training")):
        axis = alt.Axis(grid=False, tickCount=5, labelOverlap=True, format="~s" if field == "samples" else "~g")
        x = alt.X(f"{field}:Q", title=title, axis=axis, scale=alt.Scale(domainMin=0, nice=False))
        line, point = chart.mark_line(strokeWidth=1.8), chart.mark_point(filled=True, size=36, opacity=1)
        panels.append(layer([line.encode(x=x, y=y, color=fill), point.encode(x=x, y=y, color=fill)]))
    both: Row = {"vconcat" if narrow else "hconcat": panels, "spacing": 40}
    return render(both, data, "Accuracy on held-out samples over samples seen and over seconds of training")


def learners(study: Study) -> list[Result]:
    """The plans that were scored while they trained: the winner, today, and then the others by their step."""
    first = [r for r in (tables.winner(study), study.today) if r]
    rest = [r for r in tables.ranking(study) if not any(r is other for other in first)]
    return [r for r in [*first, *rest] if r.learned]


def curve(values: list[float], name: str) -> list[Row]:
    """At most POINTS of the finite losses, always with the last."""
    points = [{"step": i, "loss": loss, "plan": name} for i, loss in enumerate(values) if isfinite(loss)]
    stride = -(-len(points) // POINTS)
    return points[:-1][::stride] + points[-1:]


def unique(names: list[str]) -> list[str]:
    """The names, the second of the same made different."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def scaling(study: Study, width: int = 760) -> str:
    """Speed-up and efficiency over workers, a line a kind of plan, beside the ideal; nothing with one worker alone."""
    kinds = families(study)
    most = max((r.workers for found in kinds.values() for r in found), default=1)
    if most < 2:
        return ""
    names = list(kinds)[:CURVES]
    rows = [
        {"kind": name, "workers": r.workers, "speedup": r.speedup, "efficiency": r.efficiency}
        for name in names
        for r in kinds[name]
    ]
    workers = sorted({float(r.workers) for name in names for r in kinds[name]})
    ideal = [{"workers": n, "speedup": n, "efficiency": 1} for n in (1, most)]
    narrow = width < NARROW
    plot = width - 70 if narrow else (width - 170) // 2
    fills = [colour("accent"), *LINES]
    look = alt.Legend(orient="top", title=None, columns=2 if narrow else 4, symbolType="circle")
    fill = alt.Color("kind:N", scale=alt.Scale(domain=names, range=fills[: len(names)]), legend=look)
    data: Data = {}
    panels = []
    for field, title in (("speedup", "speed-up"), ("efficiency", "efficiency")):
        chart = alt.Chart(named(data, "plans", rows)).properties(width=plot, height=220)
        axis = alt.Axis(grid=False, tickMinStep=1, values=workers)
        scale = alt.Scale(type="log", base=2, domain=[0.92, most * 1.08], nice=False)
        x = alt.X("workers:Q", title="workers", axis=axis, scale=scale)
        form = {"format": "%"} if field == "efficiency" else {}
        y = alt.Y(f"{field}:Q", title=title, axis=ms_axis(**form), scale=alt.Scale(domainMin=0))
        dashed = chart.properties(data=named(data, "ideal", ideal)).mark_line(
            strokeDash=[4, 4], color=colour("soft"), strokeWidth=1.5
        )
        layers = [dashed.encode(x=x, y=y), chart.mark_line(strokeWidth=1.6).encode(x=x, y=y, color=fill)]
        layers.append(chart.mark_point(filled=True, size=55, opacity=1).encode(x=x, y=y, color=fill))
        panels.append(layer(layers))
    both: Row = {"vconcat" if narrow else "hconcat": panels, "spacing": 40}
    return render(both, data, "Speed-up and efficiency over workers")
