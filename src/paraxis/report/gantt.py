"""One step as a picture: ranks over time, measured above simulated. Imports altair: import it late."""

import altair as alt

from paraxis.measure.records import Event, Result
from paraxis.report import tables
from paraxis.report.charts import (
    DEEP,
    HATCHES,
    NARROW,
    Data,
    Row,
    colour,
    inscriptions,
    layer,
    ms_axis,
    named,
    render,
)

RANKS, EVENTS = 16, 1200  # the most that stays legible in one picture


def timeline(result: Result, width: int = 980) -> str:
    """Ranks over time, measured above simulated on one scale; waiting is hatched, microbatches are on the bars."""
    panels = [("measured", result.timeline), ("simulated", result.simulated)]
    panels = [(title, events) for title, events in panels if events]
    if not panels:
        return ""
    longest = max(event.end for _, events in panels for event in events) * 1e3
    used = {phase(event) for _, events in panels for event in events}
    legend = {words: colour(role) for role, words in PHASES.items() if role in used}
    scale = alt.Scale(domain=[0, longest or 1], nice=False)
    data: Data = {}
    charts = [
        gantt(data, title, events, scale, legend, width - 80, last=index == len(panels) - 1)
        for index, (title, events) in enumerate(panels)
    ]
    chart: Row = {"vconcat": charts, "spacing": 22, "resolve": {"scale": {"x": "shared", "color": "shared"}}}
    return render(
        chart, data, f"Timeline of {tables.clean(result.label)}: {' above '.join(title for title, _ in panels)}"
    )


PHASES = {
    "data": "data",
    "forward": "forward",
    "backward": "backward",
    "compute": "other compute",
    "communication": "communication",
    "optimizer": "optimizer",
    "pipeline_wait": "waiting for a stage",
    "straggler_wait": "waiting for a replica",
    "overhead": "other",
}


def phase(event: Event) -> str:
    """The colour of an event: its kind; computation is told apart by direction."""
    if event.kind == "compute":
        return "forward" if event.label.startswith("F") else "backward" if event.label[:1] in "BIW" else "compute"
    return event.kind if event.kind in PHASES else "overhead"


def gantt(
    data: Data, title: str, events: list[Event], scale: alt.Scale, legend: dict[str, str], width: int, last: bool
) -> Row:
    """One panel: a line a rank, a bar an instruction."""
    heading, ranks = title, sorted({event.rank for event in events})
    shown = ranks[: min(RANKS, max(1, EVENTS * len(ranks) // len(events)))]
    if len(ranks) > RANKS:
        heading += f", ranks {shown[0]} to {shown[-1]} of {len(ranks):,}"
    per_ms = width / scale.domain[1]
    rows = [bar(event, per_ms) for event in events if event.rank in shown]
    lines = [{"rank": f"rank {rank}", "start": 0, "end": max(e.end for e in events) * 1e3} for rank in shown]
    chart = alt.Chart(named(data, title, rows)).properties(width=width, height=alt.Step(30), title=heading)
    axis = ms_axis(title="ms since the start of the step" if last else None, labels=last)
    x = alt.X("start:Q", scale=scale, axis=axis)
    y = alt.Y("rank:N", title=None, sort=None, axis=alt.Axis(domain=False, ticks=False, labelPadding=8))
    columns = 2 if width < NARROW else 6
    look = alt.Legend(orient="top", title=None, columns=columns, symbolType="square", symbolSize=130)
    fill = alt.Color("part:N", scale=alt.Scale(domain=list(legend), range=list(legend.values())), legend=look)
    band = chart.properties(data=named(data, f"{title} ranks", lines)).mark_bar(height=22, color=colour("band"))
    marks = chart.mark_bar(height=22, stroke=colour("paper"), strokeWidth=0.8)
    layers = [band.encode(x=x, x2="end:Q", y=y), marks.encode(x=x, x2="end:Q", y=y, color=fill)]
    layers += inscriptions(data, f"{title} texts", chart.encode(y=y), rows, alt.X("middle:Q", scale=scale))
    return layer(layers)


def bar(event: Event, per_ms: float) -> Row:
    """One event, with the longest text that fits into its bar."""
    role, start, end = phase(event), event.start * 1e3, event.end * 1e3
    number = str(event.microbatch) if event.microbatch >= 0 else ""
    room = (end - start) * per_ms / 7 - 0.6  # characters of 11 px text
    texts = [tables.clean(event.label), number] if role not in HATCHES else []
    text = next((text for text in texts if text and len(text) <= room), "")
    ink = "on-deep" if role in DEEP else "on-pale"
    place = {"rank": f"rank {event.rank}", "start": start, "end": end, "middle": (start + end) / 2}
    return {**place, "part": PHASES[role], "text": text, "ink": ink}
