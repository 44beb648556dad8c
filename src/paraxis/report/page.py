"""One HTML file that tells what a study found; it opens without a network and holds its own raw samples."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from paraxis.measure.records import Result, Seconds, Study
from paraxis.report import tables

RAW_LIMIT = 1_600_000  # characters of raw record inside the page, so that it can be mailed
DRAWN_LIMIT = 500_000  # characters of timelines beside the winner's
LINES = 64  # ranks of a drawn program that are shown
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SCRIPT = """
const record = document.getElementById("study").textContent;
const link = document.getElementById("download");
link.href = URL.createObjectURL(new Blob([record], {type: "application/json"}));
link.hidden = false;
for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = !navigator.clipboard;
  button.onclick = () => navigator.clipboard.writeText(button.previousElementSibling.textContent)
    .then(() => { button.textContent = "copied"; });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
"""
Section = tuple[str, str, str]  # id, heading, content
TableRow = tuple[str, Sequence[str]]  # class, cells as HTML


def write(study: Study, folder: Path) -> Path:
    """Write `report.html` whole or not at all; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    draft = path.with_suffix(".html.part")
    draft.write_text(html(study), encoding="utf-8")
    draft.replace(path)
    return path


def html(study: Study) -> str:
    """The page."""
    pictures = draw(study)
    sections = [
        ("split", "Where each step goes", pictures["split"]),
        ("timeline", "Timeline of one step", timelines(study, pictures)),
        ("results", "All measured plans", results(study)),
        ("loss", "Training loss", pictures["losses"]),
        ("programs", "Programs", programs(study, pictures)),
        ("proofs", "Proofs of equality", proofs(study)),
        ("missing", "Not measured", missing(study)),
        ("notes", "Notes", notes(study)),
        ("setup", "Network and machine", setup(study)),
        ("raw", "Raw samples", raw(study)),
    ]
    sections = [section for section in sections if section[2]]
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{content}</section>\n'
        for key, title, content in sections
    )
    css = (files("paraxis.report") / "page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title(study))}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"{opening(study, pictures['bars'], sections)}<main>\n{body}</main>\n"
        f"<footer><p>{text(provenance(study))}</p></footer>\n"
        f"{record(study)[0]}<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """A string of the user's as HTML."""
    return escape(tables.clean(str(value)))


def draw(study: Study) -> dict[str, str]:
    """All pictures, each as a figure; timelines by `timeline <plan>`."""
    from paraxis.report import charts  # altair takes most of a second to import

    pairs = {f.__name__: (f(study, 880), f(study, 390)) for f in (charts.bars, charts.split, charts.losses)}
    pictures = {key: figure(wide, narrow, tables.caption(study, key)) for key, (wide, narrow) in pairs.items()}
    best, drawn = tables.featured(study), 0
    for result in sorted(tables.everything(study), key=lambda r: (r is not best, tables.median(r))):
        if drawn < DRAWN_LIMIT and (svg := charts.timeline(result)):
            pictures[f"timeline {result.plan}"] = svg
            drawn += len(svg)
    return pictures


def figure(wide: str, narrow: str, caption: str) -> str:
    """A picture in two widths, of which the style sheet shows one."""
    if not wide:
        return ""
    return (
        f'<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def title(study: Study) -> str:
    """Of the browser's tab."""
    chosen = study.recommendation
    return f"{chosen.label if chosen else 'Parallel plans'} for {tables.network(study) or 'a network'} - Paraxis"


def opening(study: Study, bars: str, sections: list[Section]) -> str:
    """The first screen: what to use, the command, the comparison, what it was measured on."""
    chosen = study.recommendation
    lacks = tables.unfinished(study)
    sentence = chosen.sentence if chosen else verdictless(study)
    links = " ".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections)
    parts = [
        f'<p class="brand"><b>Paraxis</b> {text(tables.network(study))}</p>',
        f'<p class="unfinished">{text(lacks)}</p>' if lacks else "",
        f"<h1>{text(sentence)}</h1>",
        f'<p class="lede">{text(chosen.why)}</p>' if chosen and chosen.why not in chosen.sentence else "",
        facts(study),
        command(chosen.command) if chosen and chosen.command else "",
        bars,
        untold(study),
        f'<p class="machine">{text(tables.machine(study))}</p>',
        f'<nav aria-label="Sections">{links}</nav>',
    ]
    return "<header>\n" + "\n".join(part for part in parts if part) + "\n</header>\n"


def verdictless(study: Study) -> str:
    """The headline of a study without a recommendation."""
    measured = tables.count(len(tables.ranking(study)), "plan")
    return f"{measured} measured, none recommended." if tables.ranking(study) else "No plan was measured."


def untold(study: Study) -> str:
    """The plans that the measurement does not tell apart from the recommended one."""
    others = study.recommendation.not_told_apart if study.recommendation else []
    names = ", ".join(f"<code>{text(other)}</code>" for other in others)
    return f"<p>Not told apart from it by this measurement: {names}.</p>" if others else ""


def command(line: str) -> str:
    """A box to copy from."""
    return (
        '<div class="command"><span>Train with it</span>'
        f'<pre tabindex="0"><code>{text(line)}</code></pre>'
        '<button type="button" class="copy" hidden>copy</button></div>'
    )


def time(value: Seconds | None, unit: str = " ms") -> str:
    """Median and interval in ms."""
    if value is None:
        return ""
    return small(f"{tables.milliseconds(value.median)}{unit} {tables.interval(value, '–')}")


def facts(study: Study) -> str:
    """The winner's figures beside today's, so that no ratio stands alone."""
    best, now = tables.winner(study), study.today
    if best is None or study.recommendation is None:
        return ""
    rate = f"{best.samples_per_second:,.0f} samples/s" if best.samples_per_second else ""
    items = [("A step takes", time(best.step_seconds), rate)]
    if now and now.step_seconds and best is not now:
        items.append(("Today it takes", time(now.step_seconds), tables.name(study, now).removeprefix("today: ")))
        if ratio := study.recommendation.vs_today or best.vs_today:
            times = f"{tables.milliseconds(tables.median(now))} ms to {tables.milliseconds(tables.median(best))} ms"
            items.append(("Against today", small(tables.ratio(ratio, spread=True, sign="×", dash="–")), times))
    if proof := best.verified:
        model = "serial" if best.exact else "emulation"
        verdict = f"Equals {model} to" if proof.passed else f"Differs from {model} by"
        allowed = f"{tables.difference(proof.tolerance)} allowed"
        items.append((verdict, tables.difference(proof.max_relative_difference), allowed))
    cells = "".join(f"<div><dt>{text(dt)}</dt><dd>{dd}</dd><dd>{text(under)}</dd></div>" for dt, dd, under in items)
    return f'<dl class="facts">{cells}</dl>'


def provenance(study: Study) -> str:
    """Who measured, and for how long."""
    return f"Measured in {study.elapsed_seconds:,.0f} s by paraxis {study.version}. {tables.unfinished(study)}".strip()


def small(figure: str) -> str:
    """A figure with its interval set smaller."""
    return figure.replace(" [", " <small>[").replace("]", "]</small>")


def table(caption: str, heads: Sequence[str], rows: Sequence[TableRow], right: set[str]) -> str:
    """A table that scrolls in its own box; columns that nothing fills are left out, those in `right` are figures."""
    kept = [i for i, _ in enumerate(heads) if any(cells[i] for _, cells in rows)]
    look = [' class="n"' if head in right else "" for head in heads]
    head = "".join(f'<th scope="col"{look[i]}>{heads[i]}</th>' for i in kept)
    body = ""
    for style, cells in rows:
        data = "".join(f"<td{look[i]}>{cells[i]}</td>" for i in kept if i)
        body += (
            f'<tr{f" class={chr(34)}{style}{chr(34)}" if style else ""}><th scope="row">{cells[0]}</th>{data}</tr>\n'
        )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}"><table><caption>{text(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def kind(study: Study, result: Result) -> str:
    """The class of a plan's row."""
    return "winner" if result is tables.winner(study) else "today" if tables.is_today(study, result) else ""


def plan(study: Study, result: Result) -> str:
    """A plan's name and what one must know about it."""
    tags = ["recommended"] if result is tables.winner(study) else []
    tags += ["oversubscribed"] if result.oversubscribed else []
    tags += [] if result.exact else ["inexact"]
    return text(tables.name(study, result)).replace(",", ",<wbr>") + "".join(
        f' <span class="tag">{tag}</span>' for tag in tags
    )


# fmt: off
HEADS = (
    "Plan", "ms per step [95%]", "vs today", "= serial", "bound by", "efficiency", "speed-up", "samples/s",
    "exposed comm.", "bubble", "MB sent", "MB/rank", "workers", "threads", "engine", "samples",
)
# fmt: on
WORDS = {"Plan", "= serial", "bound by", "engine"}  # the columns that are not figures


def results(study: Study) -> str:
    """Every figure of every measured plan."""
    ranked = tables.ranking(study)
    if not ranked:
        return "<p>No plan has a measured step time.</p>"
    rows = [(kind(study, result), figures(study, result)) for result in ranked]
    words = ["Vs today above 1 is faster than today; the times it divides stand in the second column."]
    if study.baseline:
        serial = f"<code>{text(study.baseline.plan)}</code>: {time(study.baseline.step_seconds)} per step"
        words.append(
            f"Speed-up is against the best serial run, {serial}. Efficiency is against one worker with one thread."
        )
    words += [text(tables.OVERSUBSCRIBED[2:]).capitalize() + "."] if any(r.oversubscribed for r in ranked) else []
    words += [text(tables.INEXACT).capitalize() + "."] if any(not r.exact for r in ranked) else []
    return table("Measured plans, fastest first", HEADS, rows, set(HEADS) - WORDS) + f"<p>{' '.join(words)}</p>"


def figures(study: Study, result: Result) -> list[str]:
    """One row of the table of results."""
    versus = tables.ratio(result.vs_today, spread=True, sign="×", dash="–")
    return [
        plan(study, result),
        time(result.step_seconds, unit=""),
        "1.00×" if tables.is_today(study, result) else small(versus),
        text(tables.proof(study, result)),
        text(result.bound_by or ""),
        tables.percent(result.efficiency),
        f"{result.speedup:.2f}×" if result.speedup else "",
        f"{result.samples_per_second:,.0f}" if result.samples_per_second else "",
        tables.percent(result.exposed_comm_fraction),
        tables.percent(result.bubble_fraction),
        tables.megabytes(result.bytes_communicated),
        tables.megabytes(result.peak_memory_bytes),
        f"{result.workers}",
        f"{result.threads}",
        text(" ".join(filter(None, [result.engine, result.comm]))),
        f"{len(result.step_seconds.samples)}" if result.step_seconds else "",
    ]


def timelines(study: Study, pictures: dict[str, str]) -> str:
    """The winner's step, measured above simulated; the others' stand with their programs."""
    result = tables.featured(study)
    return gantt(study, result, pictures) if result else ""


def gantt(study: Study, result: Result, pictures: dict[str, str]) -> str:
    """A timeline with the lengths of its two halves."""
    svg = pictures.get(f"timeline {result.plan}")
    if not svg:
        return ""
    measured, simulated = tables.length(result.timeline), tables.length(result.simulated)
    words = f"{text(tables.name(study, result))}: one step on each rank; waiting is hatched."
    if measured and simulated:
        gap = f"{abs(simulated / measured - 1):.0%} {'shorter' if simulated < measured else 'longer'}"
        words += f" It took {tables.milliseconds(measured)} ms; simulated from its measured parts it takes "
        words += f"{tables.milliseconds(simulated)} ms, {gap}."
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="Timeline"><div class="time">{svg}</div></div>'
    return f"<figure>{box}<figcaption>{words}</figcaption></figure>"


def programs(study: Study, pictures: dict[str, str]) -> str:
    """What each plan is in full, what every rank does in it, and its timeline."""
    parts = []
    for result in [*tables.ranking(study), *tables.unmeasured(study)]:
        svg = "" if result is tables.featured(study) else gantt(study, result, pictures)
        if not (result.program_text or result.program or svg):
            continue
        lines = result.program_text[:LINES]
        more = len(result.program_text) - len(lines)
        lines = [*lines, f"... and {more:,} more ranks"] if more > 0 else lines
        code = f'<pre tabindex="0">{text(chr(10).join(lines))}</pre>' if lines else ""
        extra = f"<p>Program <code>{text(result.program)}</code></p>" if result.program else ""
        parts.append(
            f"<details><summary>{plan(study, result)}</summary><p><code>{text(result.plan)}</code></p>"
            f"{extra}{code}{svg}</details>\n"
        )
    return "".join(parts)


def proofs(study: Study) -> str:
    """How each plan was held to the serial run."""
    rows = []
    for result in [*tables.ranking(study), *tables.unmeasured(study)]:
        proof = result.verified
        if proof is None:
            continue
        remark = " ".join(text(part) for part in (proof.where, proof.note) if part)
        passed = "passed" if proof.passed else "<strong>failed</strong>"
        sizes = [tables.difference(proof.max_relative_difference), tables.difference(proof.tolerance)]
        rows.append((kind(study, result), [plan(study, result), text(proof.against), *sizes, passed, remark]))
    if not rows:
        return ""
    heads = ["Plan", "Against", "largest difference", "allowed", "Verdict", "Remark"]
    words = (
        "<p>Relative difference of the weights after the same steps from the same start: exact plans against the "
        "serial run, inexact ones against a serial emulation of the same algorithm.</p>"
    )
    return table("Proofs", heads, rows, {"largest difference", "allowed"}) + words


def missing(study: Study) -> str:
    """Everything that has no figures, and why."""
    rows = []
    for result in tables.unmeasured(study):
        reason = tables.clean(result.reason or "no reason recorded").strip("\n")
        shown = f"<pre>{escape(reason)}</pre>" if "\n" in reason else escape(reason)
        words = {"not run": "not reached", "ok": "no figures"}.get(result.status, result.status)
        rows.append((kind(study, result), [plan(study, result), words, shown]))
    return table("Plans without figures", ["Plan", "Status", "Reason"], rows, set()) if rows else ""


def notes(study: Study) -> str:
    """What the study says of itself."""
    return f"<ul>{''.join(f'<li>{text(note)}</li>' for note in study.notes)}</ul>" if study.notes else ""


def setup(study: Study) -> str:
    """The task and the machine in full."""
    facts: dict[str, Any] = {**study.task, **study.machine.model_dump()}
    items = []
    for key, value in facts.items():
        if value is None or value == [] or value == "":
            continue
        shown = (
            value if isinstance(value, str) else f"{value:,}" if type(value) is int else json.dumps(value, default=str)
        )
        items.append(f"<dt>{text(key.replace('_', ' '))}</dt><dd>{text(shown)}</dd>")
    return f'<dl class="setup">{"".join(items)}</dl>'


def raw(study: Study) -> str:
    """The way to the record."""
    left = record(study)[1]
    lacks = (
        f" To keep this page small it lacks, except for the winner: {', '.join(left)}; study.json has them."
        if left
        else ""
    )
    return (
        "<p>The whole record, with every sample of every plan, is inside this file, in the element "
        f'<code>#study</code>.{lacks} <a id="download" download="study.json" hidden>Save it as study.json</a></p>'
    )


def record(study: Study) -> tuple[str, list[str]]:
    """The study as a data block of the page, and what had to be left out of it for its size."""
    left: list[str] = []
    data = study.model_dump_json()
    for field in ("simulated", "timeline", "program_text", "losses"):
        if len(data) <= RAW_LIMIT:
            break
        left.append(field)
        best = tables.winner(study)
        empty: dict[str, Any] = {key: [] for key in left}
        slim = [r if best and r.plan == best.plan else r.model_copy(update=empty) for r in study.results]
        data = study.model_copy(update={"results": slim}).model_dump_json()
    # No "<" at all: "</script" would end the block, "<!--<script" would hide its end.
    return f'<script type="application/json" id="study">{data.replace("<", chr(92) + "u003c")}</script>\n', left
