"""Charts of a study as SVG text: no script, no fixed size, colours by the page's CSS variables.

Every function returns "" where there is nothing to draw. altair is slow to import: import this module late.
"""

import hashlib
import re
from html import escape
from typing import Any, Literal

import altair as alt
import vl_convert

from paraxis.measure.records import Result, Study
from paraxis.report import tables

# role -> colour where no style sheet sets the variable; chosen to be legible on white and on black
COLOURS = {
    "ink": "currentColor",
    "soft": "#7a858f",
    "line": "#8b959e55",
    "accent": "#1a7399",
    "bar": "#a9b3bc",
    "today": "#6b7680",
    "compute": "#1a7399",
    "forward": "#7fb8d1",
    "backward": "#1a7399",
    "optimizer": "#5f9a6a",
    "communication": "#d98634",
    "data": "#8f80b8",
    "overhead": "#a9b3bc",
    "remainder": "#d5dadd",
    "on-deep": "#ffffff",
    "on-pale": "#10222c",
    "band": "#8b959e22",
    "paper": "transparent",
}
DEEP = {"compute", "backward", "data"}  # colours that need white text
# Waiting is hatched, not coloured: it must be told from work without colours, too.
HATCHES = {"pipeline_wait": 45, "straggler_wait": -45}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
PADDING = {"left": 14, "right": 26, "top": 2, "bottom": 2}  # fonts differ in width from the one measured with
NARROW = 480  # pixels below which plans are written above their bars
Row = dict[str, Any]
Data = dict[str, list[Row]]  # rows by name, handed to Vega beside the chart: altair copies what is in it, and often


def colour(role: str) -> str:
    """A fill: the page's variable, or the neutral colour where the SVG stands alone."""
    return f"url(#{role})" if role in HATCHES else f"var(--{role}, {COLOURS[role]})"


def bars(study: Study, width: int = 760, most: int = tables.BARS) -> str:
    """Median step time of each plan with its 95% interval, fastest first; the winner in colour, today's marked."""
    ranked = tables.ranking(study)
    drawn = tables.shortlist(study, ranked, most)
    rows = []
    for index, result in enumerate(drawn):
        time = result.step_seconds
        if time is None:
            continue
        now = tables.is_today(study, result)
        versus = "" if now or not result.vs_today else f" · {tables.ratio(result.vs_today, sign='×')}"
        words = f"{tables.milliseconds(time.median)} ms{versus}"
        fill = tint(study, result)
        ends = {"low": time.low * 1e3, "high": time.high * 1e3}
        rows.append({**label(study, result, index), "ms": time.median * 1e3, **ends, "text": words, "fill": fill})
    if not rows:
        return ""
    data: Data = {}
    base = plan_base(data, rows, width)
    x = alt.X("ms:Q", title="ms per step, shorter is better", scale=alt.Scale(domainMin=0, nice=False), axis=ms_axis())
    beside: Row = {"align": "left", "dx": 7, "fontSize": 12}
    text: Row = {"x": "high:Q", "text": "text:N"}
    layers = [
        base.mark_bar(cornerRadiusEnd=2, height=14).encode(x=x, color=alt.Color("fill:N", scale=None)),
        base.mark_rule(strokeWidth=1.5, color=colour("ink")).encode(x="low:Q", x2="high:Q"),
        base.mark_tick(thickness=1.5, size=7, color=colour("ink")).encode(x="low:Q"),
        base.mark_tick(thickness=1.5, size=7, color=colour("ink")).encode(x="high:Q"),
        # The first of the two is a halo: the line of today runs behind the figures.
        base.mark_text(**beside, color=colour("paper"), stroke=colour("paper"), strokeWidth=5).encode(**text),
        base.mark_text(**beside, color=colour("ink")).encode(**text),
        *plan_labels(data, base, rows, width),
    ]
    if study.today and any(tables.is_today(study, r) for r in drawn):
        at = alt.Chart(named(data, "today", [{"ms": tables.median(study.today) * 1e3}]))
        layers.insert(0, at.mark_rule(strokeDash=[3, 3], color=colour("today")).encode(x="ms:Q"))
    return render(layer(layers), data, "Step time of each plan with its 95% interval")


def tint(study: Study, result: Result) -> str:
    """The colour of a plan's bar."""
    ours, now = result is tables.winner(study), tables.is_today(study, result)
    return colour("accent" if ours else "today" if now else "bar")


def memory(study: Study, width: int = 760) -> str:
    """Megabytes of the rank that needs most, a bar a plan; beside its number what is computed of them."""
    return amounts(study, width, "peak_memory_bytes", "of the rank that needs most")


def traffic(study: Study, width: int = 760) -> str:
    """Megabytes that all ranks send in a step, a bar a plan."""
    return amounts(study, width, "bytes_communicated", "sent in a step")


def amounts(study: Study, width: int, field: Literal["peak_memory_bytes", "bytes_communicated"], title: str) -> str:
    """A bar a plan of a number of bytes that is known and not 0, in the order of their speed."""
    sizes = {"peak_memory_bytes": lambda r: r.peak_memory_bytes, "bytes_communicated": lambda r: r.bytes_communicated}
    drawn = tables.shortlist(study, [r for r in tables.ranking(study) if sizes[field](r)])
    unit, size = ("MB", 1e6) if any(sizes[field](r) >= 1e6 for r in drawn) else ("kB", 1e3)
    rows = [
        {
            **label(study, r, index),
            "size": sizes[field](r) / size,
            "text": f"{float(f'{sizes[field](r) / size:.3g}'):,g} {unit}{computed(r) * (field == 'peak_memory_bytes')}",
            "fill": tint(study, r),
        }
        for index, r in enumerate(drawn)
    ]
    if not rows:
        return ""
    data: Data = {}
    base = plan_base(data, rows, width)
    x = alt.X("size:Q", title=f"{unit} {title}", scale=alt.Scale(domainMin=0, nice=False), axis=ms_axis())
    text = base.mark_text(align="left", dx=7, fontSize=12, color=colour("ink"))
    layers = [
        base.mark_bar(cornerRadiusEnd=2, height=14).encode(x=x, color=alt.Color("fill:N", scale=None)),
        text.encode(x="size:Q", text="text:N"),
        *plan_labels(data, base, rows, width),
    ]
    return render(layer(layers), data, f"{unit} {title}, a bar a plan")


def computed(result: Result) -> str:
    """What training alone keeps, where that is known."""
    kept = result.computed_memory
    return f", computed {tables.megabytes(kept.total)}" if kept else ""


def label(study: Study, result: Result, index: int) -> Row:
    """A row's key and what is written beside it."""
    strong = tables.is_today(study, result) or result is tables.winner(study)
    mark = " *" if result.oversubscribed else "" if result.exact else " (inexact)"
    return {"row": f"{index:03d}", "plan": tables.name(study, result) + mark, "strong": strong}


def named(data: Data, name: str, rows: list[Row]) -> alt.NamedData:
    """Put the rows beside the chart; what the chart holds is their name."""
    data[name] = rows
    return alt.NamedData(name)


def plan_base(data: Data, rows: list[Row], width: int) -> alt.Chart:
    """A chart with one line of height a plan; keys keep the order of the rows, whatever the plans are called."""
    narrow = width < NARROW
    plot = width - (130 if narrow else 360)
    y = alt.Y("row:N", axis=None, sort=None)
    height = alt.Step(40 if narrow else 26)
    return alt.Chart(named(data, "plans", rows)).encode(y=y).properties(width=plot, height=height)


def plan_labels(data: Data, base: alt.Chart, rows: list[Row], width: int) -> list[alt.Chart]:
    """The plans' names, left of the bars or above them; today and the winner in bold."""
    narrow = width < NARROW
    place: Row = {"align": "left", "dx": 0, "dy": -16} if narrow else {"align": "right", "dx": -9, "dy": 0}
    layers = []
    for strong in (False, True):
        some = [row for row in rows if row["strong"] == strong]
        weight: Literal["bold", "normal"] = "bold" if strong else "normal"
        text = base.mark_text(
            **place, fontSize=12, fontWeight=weight, limit=width - 130 if narrow else 200, color=colour("ink")
        )
        layers.append(text.encode(x=alt.value(0), text="plan:N").properties(data=named(data, f"labels {strong}", some)))
    return layers


def ms_axis(**more: Any) -> alt.Axis:
    """A quiet axis of milliseconds."""
    return alt.Axis(tickCount=5, grid=True, domain=False, ticks=False, **more)


def split(study: Study, width: int = 760) -> str:
    """Where the step of each plan goes: its parts in ms, stacked to the step time."""
    drawn = [r for r in tables.shortlist(study, tables.ranking(study)) if r.split]
    rows, pieces = [], []
    for index, result in enumerate(drawn):
        assert result.split is not None  # for the type checker
        names, start = label(study, result, index), 0.0
        parts = {field: max(0.0, getattr(result.split, field)) * 1e3 for field, *_ in tables.PARTS}
        for field, words, share in tables.shares(result.split):
            end = start + parts[field]
            ink = "" if field in HATCHES else "on-deep" if field in DEEP else "on-pale"
            piece = {"part": words, "start": start, "end": end, "middle": (start + end) / 2, "ink": ink}
            pieces.append({**names, **piece, "text": tables.percent(share)})
            start = end
        rows.append({**names, "ms": start, "text": f"{tables.milliseconds(start / 1e3)} ms"})
    if not rows or not (longest := max(row["ms"] for row in rows)):
        return ""
    data: Data = {}
    base = plan_base(data, rows, width)
    stack = base.properties(data=named(data, "pieces", pieces))
    used = {piece["part"] for piece in pieces if piece["end"] - piece["start"] > longest / 1000}
    legend = {words: colour(field) for field, words, *_ in tables.PARTS if words in used}
    x = alt.X("start:Q", title="ms per step", axis=ms_axis(), scale=alt.Scale(domain=[0, longest], nice=False))
    roomy = [p for p in pieces if (p["end"] - p["start"]) / longest * width > 62]
    layers = [
        stack.mark_bar(height=16, stroke=colour("line"), strokeWidth=0.5).encode(
            x=x, x2="end:Q", color=key(legend, width)
        ),
        base.mark_text(align="left", dx=7, fontSize=12, color=colour("ink")).encode(x="ms:Q", text="text:N"),
        *inscriptions(data, "texts", base, roomy, alt.X("middle:Q")),
        *plan_labels(data, base, rows, width),
    ]
    return render(layer(layers), data, "Where one step of each plan goes")


def inscriptions(data: Data, name: str, base: alt.Chart, rows: list[Row], x: alt.X) -> list[alt.Chart]:
    """What is written into bars: white or black after their colour, nothing into hatched ones."""
    layers = []
    for ink in ("on-deep", "on-pale"):
        some = [row for row in rows if row["text"] and row["ink"] == ink]
        text = base.properties(data=named(data, f"{name} {ink}", some)).mark_text(fontSize=11, color=colour(ink))
        layers += [text.encode(x=x, text="text:N")] if some else []
    return layers


def key(legend: dict[str, str], width: int) -> alt.Color:
    """Colours by part, with a legend above the chart."""
    domain, values = list(legend), list(legend.values())
    columns = 2 if width < NARROW else 4
    look = alt.Legend(orient="top", title=None, columns=columns, symbolType="square", symbolSize=130)
    return alt.Color("part:N", scale=alt.Scale(domain=domain, range=values), legend=look)


def layer(charts: list[alt.Chart]) -> Row:
    """The charts over each other, in the size that they have; alt.layer() does it, ten times slower."""
    specs = [chart.to_dict(validate=False) for chart in charts]
    size: Row = {key: spec[key] for spec in specs for key in ("width", "height", "title") if key in spec}
    return {**size, "layer": [{key: spec[key] for key in ("data", "mark", "encoding")} for spec in specs]}


def render(spec: Row, data: Data, title: str) -> str:
    """The chart as SVG for a page."""
    ink, soft = colour("ink"), colour("soft")
    text = {"labelFontSize": 12, "labelLimit": 240}
    config = {
        "background": "transparent",
        "aria": False,
        "font": FONT,
        "padding": PADDING,
        "view": {"stroke": None},
        "axis": {**text, "labelColor": soft, "titleColor": soft, "titleFontWeight": 400, "titleFontSize": 12}
        | {"gridColor": colour("line")},
        "legend": {**text, "labelColor": ink, "padding": 0, "offset": 12, "columnPadding": 34},
        "title": {"color": ink, "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 6},
    }
    version = "_".join(alt.SCHEMA_VERSION.split(".")[:2])
    whole = {"$schema": alt.SCHEMA_URL, "config": config, "datasets": data, **spec}
    return for_page(vl_convert.vegalite_to_svg(whole, vl_version=version), title)


def for_page(svg: str, title: str) -> str:
    """Free the size, name the picture, and make its ids its own: several pictures share a page."""
    prefix = "c" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    box = re.search(r'viewBox="([^"]*)"', svg)
    view = box.group(1) if box else "0 0 760 400"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="{prefix}" viewBox="{view}" '
        f'style="max-width:{float(view.split()[2]):.0f}px"><title id="{prefix}">{escape(title)}</title>'
    )
    body = re.sub(r"^.*?<svg[^>]*>", "", svg, count=1, flags=re.DOTALL)
    # Only inside tags: what is written in the picture stays as it is.
    body = re.sub(r"<[^>]*>", lambda tag: tidy(tag.group(), prefix), body)
    hatches = "".join(
        hatch(f"{prefix}-{role}", angle) for role, angle in HATCHES.items() if f"{prefix}-{role})" in body
    )
    return head + (f"<defs>{hatches}</defs>" if hatches else "") + body


def tidy(tag: str, prefix: str) -> str:
    """A tag without what only Vega reads."""
    tag = re.sub(r' (class|role|aria-[a-z]+|pointer-events)="[^"]*"', "", tag)
    tag = tag.replace(' opacity="1"', "").replace("url(#", f"url(#{prefix}-")
    return re.sub(r' id="', f' id="{prefix}-', tag)


def hatch(name: str, angle: int) -> str:
    """Oblique lines for waiting."""
    return (
        f'<pattern id="{name}" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate({angle})">'
        f'<rect width="5" height="5" fill="{colour("band")}"/>'
        f'<line y2="5" stroke="{colour("soft")}" stroke-width="1.6"/></pattern>'
    )
