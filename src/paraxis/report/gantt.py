"""One step as a picture: ranks over time, measured above simulated on one scale; gantt.js draws the same to zoom in.

Written as SVG by hand: a page has dozens of these, and a chart library takes two tenths of a second for each.
"""

from html import escape
from math import ceil, floor, log10

from paraxis.measure.records import Event, Result
from paraxis.report import tables
from paraxis.report.charts import DEEP, FONT, HATCHES, colour, for_page

RANKS, EVENTS = 16, 1200  # the most that stays legible in one picture
MARGIN, ROW, HEAD, LETTER = 62, 26, 24, 7.0  # pixels: left of the bars, of a rank, above a panel, of a digit
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


def timeline(result: Result, width: int = 980) -> str:
    """Ranks over time, measured above simulated on one scale; waiting is hatched, microbatches are on the bars."""
    panels = [("measured", result.timeline), ("simulated", result.simulated)]
    panels = [(title, events) for title, events in panels if events]
    if not panels:
        return ""
    longest = max(event.end for _, events in panels for event in events) or 1.0
    scale = (width - MARGIN - 10) / longest
    used = {phase(event) for _, events in panels for event in events}
    parts, top = legend([role for role in PHASES if role in used], width)
    for title, events in panels:
        drawn, top = panel(title, events, scale, top)
        parts += drawn
    parts += axis(longest, scale, top)
    body = f'<g font-family="{FONT}" font-size="12">{"".join(parts)}</g>'
    names = " above ".join(title for title, _ in panels)
    return for_page(f'<svg viewBox="0 0 {width} {top + 40:.0f}">{body}</svg>', f"Timeline of {result.label}: {names}")


def phase(event: Event) -> str:
    """The colour of an event: its kind; computation is told apart by direction."""
    if event.kind == "compute":
        op = event.label.lstrip("0123456789")[:1]  # behind the stage, where ranks have several
        return "forward" if op == "F" else "backward" if op in ("B", "I", "W") else "compute"
    return event.kind if event.kind in PHASES else "overhead"


def legend(roles: list[str], width: int) -> tuple[list[str], float]:
    """Colours and words in as many lines as they need, and where the next thing may begin."""
    parts, x, y = [], float(MARGIN), 4.0
    for role in roles:
        room = 18 + len(PHASES[role]) * 6.6 + 18
        if x + room > width and x > MARGIN:
            x, y = MARGIN, y + 19
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="11" height="11" fill="{colour(role)}"/>')
        parts.append(text(x + 17, y + 10, PHASES[role]))
        x += room
    return parts, y + 22


def panel(title: str, events: list[Event], scale: float, top: float) -> tuple[list[str], float]:
    """A heading, a line a rank, a bar an instruction; and where the next panel begins."""
    ranks = sorted({event.rank for event in events})
    shown = ranks[: min(RANKS, max(1, EVENTS * len(ranks) // len(events)))]
    if len(shown) < len(ranks):
        title += f", ranks {shown[0]} to {shown[-1]} of {len(ranks):,}"
    parts = [text(MARGIN, top + 14, title, 'font-weight="600" font-size="13"')]
    top += HEAD
    end = max(event.end for event in events) * scale
    lines = {rank: top + n * ROW for n, rank in enumerate(shown)}
    for rank, y in lines.items():
        parts.append(text(MARGIN - 8, y + 16, f"rank {rank}", 'text-anchor="end"', "soft"))
        parts.append(f'<rect x="{MARGIN}" y="{y + 2:.0f}" width="{end:.2f}" height="22" fill="{colour("band")}"/>')
    for event in events:
        if event.rank in lines:
            parts += bar(event, scale, lines[event.rank])
    return parts, top + len(shown) * ROW + 6


def bar(event: Event, scale: float, y: float) -> list[str]:
    """One event, with the longest text that fits into it."""
    role, start, length = phase(event), MARGIN + event.start * scale, (event.end - event.start) * scale
    place = f'x="{start:.2f}" y="{y + 2:.0f}" width="{length:.2f}" height="22"'
    parts = [f'<rect {place} fill="{colour(role)}" stroke="{colour("paper")}" stroke-width=".8"/>']
    texts = [event.label, str(event.microbatch) if event.microbatch >= 0 else ""] if role not in HATCHES else []
    fits = next((t for t in texts if t and len(t) <= length / LETTER - 0.6), "")
    ink = "on-deep" if role in DEEP else "on-pale"
    return (
        [*parts, text(start + length / 2, y + 17, fits, 'text-anchor="middle" font-size="11"', ink)] if fits else parts
    )


def axis(longest: float, scale: float, top: float) -> list[str]:
    """Round milliseconds below the last panel."""
    rough = longest * 1e3 / max(2, floor(longest * scale / 90))
    power = 10.0 ** floor(log10(rough))
    step = power * next(n for n in (1, 2, 5, 10) if n * power >= rough * 0.999)
    marks = [n * step for n in range(ceil(longest * 1e3 / step + 1e-9))]
    middle = 'text-anchor="middle" font-size="11"'
    parts = [text(MARGIN + ms / 1e3 * scale, top + 12, f"{ms:g}", middle, "soft") for ms in marks]
    where = MARGIN + longest * scale / 2
    return [*parts, text(where, top + 30, "ms since the start of the step", middle, "soft")]


def text(x: float, y: float, words: str, style: str = "", ink: str = "ink") -> str:
    """Words at a place; control characters of a user's are made visible."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {style} fill="{colour(ink)}">{escape(tables.clean(words))}</text>'
