"""The bubble theatre: a pipeline that one can slide, in the report and as a page of its own.

`python -m paraxis.report.theatre FILE` writes the page. What the script simulates is what `program/simulate.py` does; a
test holds every cell of the one to the other.
"""

import sys
from pathlib import Path

from paraxis.measure.records import Event, MeshRecord, Result
from paraxis.plan.plan import parse
from paraxis.program.cut import Layout
from paraxis.program.lower import lower
from paraxis.program.simulate import simulate, uniform
from paraxis.report import markup

START = "pp=4,microbatches=8,schedule=1f1b"  # what the sliders show at first
# name, words, least, most, step, first value, unit
SLIDERS = (
    ("p", "stages p", "1", "16", "1", "4", ""),
    ("m", "microbatches m", "1", "64", "1", "8", ""),
    ("backward", "a backward costs", "0.25", "4", "0.25", "2", " forwards"),
    ("factor", "one stage is heavier", "1", "4", "0.25", "1", "×"),
    ("heavy", "namely stage", "0", "3", "1", "0", ""),
    ("link", "a transfer takes", "0", "2", "0.125", "0", " forwards"),
)
NAMES = {
    "layerwise": "layer by layer",
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "interleaved",
    "zb-h1": "ZB-H1",
    "zb-h2": "ZB-H2",
}
FIGURES = (
    ("makespan", "A step takes"),
    ("bubble", "Bubble, simulated"),
    ("theory", "(p−1)/(m+p−1), for equal stages and free links"),
    ("peak", "Live activations, at most, microbatches"),
)
WORDS = (
    "<p>A pipeline of <var>p</var> stages fed with <var>m</var> microbatches, simulated. Hatched is the bubble: a rank "
    "that waits for another stage. Below it stands what each stage must keep for its backwards. 1F1B has GPipe's "
    "bubble, but keeps at most <var>p</var> microbatches instead of <var>m</var>; with two stages of half the size a "
    "rank it fills in half the time; the zero-bubble schedules put the gradient of the weights (W), which nobody waits "
    "for, where 1F1B idles. A heavier stage sets the pace of all; a slow link lengthens every hop of the fill and the "
    "drain.</p>"
)


def picture() -> str:
    """The first setting, drawn for readers without a script."""
    from paraxis.report.gantt import timeline  # charts import altair, which takes most of a second

    plan = parse(START)
    line = simulate(lower(plan, Layout((1,) * plan.pp)), uniform(1e-3, 2e-3))
    events = [
        Event(
            rank=s.rank,
            label=s.instruction.label(),
            kind=s.kind,
            microbatch=s.instruction.microbatch,
            start=s.start,
            end=s.end,
        )
        for s in line.spans
        if s.end > s.start
    ]
    mesh = MeshRecord(dp=1, pp=plan.pp, tp=1)
    shown = Result(
        plan=plan.text(),
        label=plan.label(),
        mesh=mesh,
        schedule=plan.schedule,
        engine="",
        threads=1,
        workers=plan.pp,
        status="ok",
        exact=True,
        simulated=events,
    )
    return timeline(shown)


def slider(name: str, words: str, least: str, most: str, step: str, value: str, unit: str) -> str:
    """One slider with its name and its value."""
    return (
        f'<label><span>{words}</span> <input type="range" name="{name}" min="{least}" max="{most}" step="{step}" '
        f'value="{value}" data-unit="{unit}"> <output></output></label>'
    )


def fragment(address: bool = False) -> str:
    """The theatre as a part of a page that has its script and its style; `address`: the page's address sets it."""
    schedules = "".join(
        f'<option value="{name}"{" selected" if name == "1f1b" else ""}>{words}</option>'
        for name, words in NAMES.items()
    )
    sliders = [slider(*fields) for fields in SLIDERS]
    choice = f'<label><span>schedule</span> <select name="schedule">{schedules}</select></label>'
    controls = "".join([*sliders[:2], choice, *sliders[2:]])
    mark = ' data-address="yes"' if address else ""
    shown = "".join(f'<div><dt>{words}</dt><dd data-figure="{name}"></dd></div>' for name, words in FIGURES)
    return (
        f'<div class="theatre"{mark}>{WORDS}'
        f'<form hidden autocomplete="off">{controls}<button type="reset">reset</button></form>'
        f'<dl class="facts" aria-live="polite">{shown}</dl><div class="screen"></div>'
        f'<h3>Live activations</h3><div class="memory"></div>'
        f'<div class="scroll still"><div class="time">{picture()}</div>'
        "<p>Four stages, eight microbatches, 1F1B; with JavaScript there are sliders.</p></div></div>"
    )


def html() -> str:
    """The page."""
    intro = "<h1>Bubble theatre</h1>"
    body = f'<header><p class="brand"><b>Paraxis</b></p>{intro}</header>\n<main>{fragment(address=True)}</main>\n'
    return markup.document("Bubble theatre - Paraxis", body, ("gantt.js", "theatre.js"))


def main() -> None:
    """Write the page to the path in the first argument."""
    Path(sys.argv[1]).write_text(html(), encoding="utf-8")


if __name__ == "__main__":
    main()
