"""Charts of the batch-size study, in the look of `charts`: no script, no fixed size, colours by the page's variables.

altair is slow to import: import this module late.
"""

import re
from itertools import pairwise
from math import isfinite, log

import altair as alt

from paraxis.measure.batch_sizes import BatchSizes
from paraxis.measure.critical import Point, whole
from paraxis.measure.estimate import Estimate
from paraxis.report.charts import NARROW, Data, Row, colour, layer, ms_axis, named, render

CURVE = 60  # points of the fitted curve
REGIMES = ("perfect scaling", "diminishing returns", "maximal data parallelism")
LIGHT, DARK = "color:#1b2a33", "color:#e4ebef;--accent:#4fb0d6"  # of a picture that stands alone


def steps_by_batch(found: BatchSizes, width: int = 760) -> str:
    """Steps to the target against batch size, both logarithmic: every seed, the medians, the curve, its regimes."""
    points = [p for p in found.points if isfinite(p.median)]
    if len(points) < 2:
        return ""
    data: Data = {}
    across = domain([p.batch for p in points], 1.35)
    seeds = [s for p in points for s in p.steps if s is not None]
    fitted = found.critical.b_crit is not None
    ends = [found.critical.steps(edge) for edge in across] if fitted else []
    down = domain([*seeds, *ends], 1.25)
    x = alt.X("batch:Q", title="batch size", scale=_log(across), axis=_axis([p.batch for p in points]))
    y = alt.Y("steps:Q", title="steps to the target", scale=_log(down), axis=_axis(ticks(down)))
    size = {"width": width - 90, "height": 330 if width >= NARROW else 260}
    base = alt.Chart(named(data, "none", [{}])).properties(**size)
    layers = []
    if fitted:
        layers += _regimes(data, base, found, across, down, width)
        layers += _curve(data, base, found, across, x, y)
    dots: list[Row] = [{"batch": p.batch, "steps": s} for p in points for s in p.steps if s is not None]
    middles: list[Row] = [{"batch": p.batch, "steps": p.median} for p in points]
    each = base.properties(data=named(data, "seeds", dots)).mark_circle(size=22, color=colour("soft"), opacity=0.8)
    middle = base.properties(data=named(data, "medians", middles)).mark_circle(
        size=78, color=colour("accent"), opacity=1
    )
    layers += [each.encode(x=x, y=y), middle.encode(x=x, y=y)]
    return render(layer(layers), data, "Steps to the target against batch size, with the three regimes")


def _regimes(
    data: Data, base: alt.Chart, found: BatchSizes, across: list[float], down: list[float], width: int
) -> list[alt.Chart]:
    """Behind the points: where each regime is, B_crit with its interval, the noise scale's interval."""
    critical = found.critical
    assert critical.b_crit and critical.perfect and critical.flat
    cuts = [across[0], *(min(max(c, across[0]), across[1]) for c in (critical.perfect, critical.flat)), across[1]]
    x, y = alt.X("from:Q", scale=_log(across)), alt.Y("low:Q", scale=_log(down))
    rows = [
        {"from": a, "to": b, "low": down[0], "high": down[1], "name": name, "middle": (a * b) ** 0.5, "at": down[1]}
        for name, (a, b) in zip(REGIMES, pairwise(cuts), strict=True)
        if b > a * 1.001
    ]
    shaded = [row for row in rows if row["name"] == REGIMES[1]]
    band = base.properties(data=named(data, "bend", shaded)).mark_rect(color=colour("band"))
    layers = [band.encode(x=x, x2="to:Q", y=y, y2="high:Q")]
    texts = [row for row in rows if width >= NARROW and row["to"] / row["from"] > 4]
    label = base.properties(data=named(data, "names", texts)).mark_text(
        baseline="top", dy=5, fontSize=11, color=colour("soft")
    )
    layers.append(
        label.encode(x=alt.X("middle:Q", scale=_log(across)), y=alt.Y("at:Q", scale=_log(down)), text="name:N")
    )
    layers += _mark(data, base, "critical batch size", critical.b_crit, "accent", across, down, width, 0.12)
    if found.noise is not None:
        layers += _mark(
            data, base, "gradient noise scale", found.noise.scale, "communication", across, down, width, 0.02
        )
    return layers


def _mark(
    data: Data,
    base: alt.Chart,
    name: str,
    e: Estimate,
    role: str,
    across: list[float],
    down: list[float],
    width: int,
    height: float,
) -> list[alt.Chart]:
    """An interval as a band over the whole height, its value as a line with its name beside it."""
    low, high = (min(max(end, across[0]), across[1]) for end in (e.low, e.high))
    if not isfinite(e.value) or not low < high or not across[0] <= e.value <= across[1]:
        return []
    text = f"{name} {whole(e.value)}"
    room = (width - 90) * log(e.value / across[0]) / log(across[1] / across[0]) > 7 * len(text)
    # The curve falls from the top left: below it there is room on the left of a line, above it on the right.
    at = down[0] * (down[1] / down[0]) ** (height + 0.03 if room else 0.95 - height)
    row: Row = {"from": low, "to": high, "low": down[0], "high": down[1], "value": e.value, "at": at, "text": text}
    chart = base.properties(data=named(data, name, [row]))
    x, y = alt.X("from:Q", scale=_log(across)), alt.Y("low:Q", scale=_log(down))
    line = alt.X("value:Q", scale=_log(across))
    side: Row = {"align": "right", "dx": -6} if room else {"align": "left", "dx": 6}
    return [
        chart.mark_rect(color=colour(role), opacity=0.16).encode(x=x, x2="to:Q", y=y, y2="high:Q"),
        chart.mark_rule(color=colour(role), strokeWidth=1.6).encode(x=line, y=y, y2="high:Q"),
        chart.mark_text(**side, fontSize=11.5, fontWeight="bold", color=colour(role)).encode(
            x=line, y=alt.Y("at:Q", scale=_log(down)), text="text:N"
        ),
    ]


def _curve(data: Data, base: alt.Chart, found: BatchSizes, across: list[float], x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """The hyperbola, and its two asymptotes: half the steps for twice the batch, and the least steps there are."""
    critical = found.critical
    assert critical.b_crit and critical.least_steps
    places = [across[0] * (across[1] / across[0]) ** (i / CURVE) for i in range(CURVE + 1)]
    curve: list[Row] = [{"batch": b, "steps": critical.steps(b)} for b in places]
    least, crit = critical.least_steps.value, critical.b_crit.value
    perfect = [{"batch": b, "steps": least * crit / b} for b in (across[0], min(crit, across[1]))]
    flat = [{"batch": b, "steps": least} for b in (max(crit, across[0]), across[1])]
    layers = [
        base.properties(data=named(data, f"line {i}", rows))
        .mark_line(strokeDash=[3, 4], strokeWidth=1.2, color=colour("soft"))
        .encode(x=x, y=y)
        for i, rows in enumerate((perfect, flat))
    ]
    line = base.properties(data=named(data, "curve", curve)).mark_line(strokeWidth=2.2, color=colour("accent"))
    return [*layers, line.encode(x=x, y=y)]


def rates_by_batch(found: BatchSizes, width: int = 760) -> str:
    """Every learning rate tried at every batch size: the best, those that reached the target, those that did not."""
    rows = [row for p in found.points for row in _tried(p)]
    if len(found.points) < 2 or not rows:
        return ""
    data: Data = {}
    across, down = domain([r["batch"] for r in rows], 1.35), domain([r["lr"] for r in rows], 1.4)
    x = alt.X("batch:Q", title="batch size", scale=_log(across), axis=_axis([p.batch for p in found.points]))
    y = alt.Y("lr:Q", title="learning rate", scale=_log(down), axis=_axis(ticks(down), "~g"))
    size = {"width": width - 90, "height": 240 if width >= NARROW else 210}
    base = alt.Chart(named(data, "none", [{}])).properties(**size)
    looks: dict[str, Row] = {
        "not reached": {"shape": "cross", "size": 34, "color": colour("soft"), "opacity": 0.7},
        "reached": {"shape": "circle", "size": 42, "color": colour("bar")},
        "best": {"shape": "circle", "size": 80, "color": colour("accent"), "opacity": 1},
    }
    best = [row for row in rows if row["kind"] == "best"]
    path = base.properties(data=named(data, "path", best)).mark_line(strokeWidth=1.6, color=colour("accent"))
    layers = [path.encode(x=x, y=y)]
    for kind, look in looks.items():
        some = base.properties(data=named(data, kind, [row for row in rows if row["kind"] == kind]))
        layers.append(some.mark_point(filled=True, **look).encode(x=x, y=y))
    return render(layer(layers), data, "Learning rates tried at each batch size, and the best")


def _tried(p: Point) -> list[Row]:
    reached = isfinite(p.median)
    return [
        {
            "batch": p.batch,
            "lr": t.lr,
            "kind": "best" if reached and t.lr == p.lr else "not reached" if t.steps is None else "reached",
        }
        for t in p.searched
    ]


def alone(svg: str) -> str:
    """A chart as a file of its own: with a size, and ink that follows the reader's light or dark mode."""
    box = re.search(r'viewBox="[\d.-]+ [\d.-]+ ([\d.]+) ([\d.]+)"', svg)
    size = f'width="{float(box.group(1)):.0f}" height="{float(box.group(2)):.0f}" ' if box else ""
    style = f"<style>svg{{{LIGHT}}}@media(prefers-color-scheme:dark){{svg{{{DARK}}}}}</style>"
    head, end, body = svg.partition(">")
    return head.replace("<svg ", f"<svg {size}", 1) + end + style + body


def _log(domain: list[float]) -> alt.Scale:
    return alt.Scale(type="log", domain=domain, nice=False)


def _axis(values: list[float] | list[int], form: str = ",d") -> alt.Axis:
    return ms_axis(values=list(values), format=form, labelOverlap=True)


def domain(values: list[float] | list[int], margin: float) -> list[float]:
    """From the least to the most, a factor wider on both sides."""
    return [min(values) / margin, max(values) * margin]


def ticks(domain: list[float]) -> list[float]:
    """1, 2 and 5 times the powers of ten within the domain."""
    every = [float(f"{d}e{power}") for power in range(-8, 9) for d in (1, 2, 5)]
    return [v for v in every if domain[0] <= v <= domain[1]]
