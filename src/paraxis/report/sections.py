"""The sections of the report, each as HTML: the table of plans, timelines, programs, proofs, refusals, the record."""

import json
from html import escape
from typing import Any

from paraxis.measure.records import Rate, Result, Seconds, Study
from paraxis.measure.roofline import in_words
from paraxis.recommend import chance_of
from paraxis.report import tables
from paraxis.report.markup import Cell, kind, plan, small, table, text, time

RAW_LIMIT = 1_600_000  # characters of raw record inside the page, so that it can be mailed
LINES = 64  # ranks of a drawn program that are shown
# fmt: off
HEADS = (
    "Plan", "ms per step [95%]", "vs today", "= serial", "bound by", "efficiency", "speed-up", "samples/s",
    "exposed comm.", "bubble", "MB sent", "MB/rank", "computed", "workers", "threads", "engine", "5-95% of steps",
    "samples",
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
        same = (r for r in tables.everything(study) if study.baseline and r.plan == study.baseline.plan)
        name = next((tables.name(study, r) for r in same), study.baseline.plan)
        serial = f"<code>{text(name)}</code>: {time(study.baseline.step_seconds)} per step"
        words.append(
            f"Speed-up is against the best serial run, {serial}. Efficiency is against one worker with one thread."
        )
    if any(r.computed_memory for r in ranked):
        words.append("MB/rank is what its process has held, computed what training alone keeps at the peak of a step.")
    words += [text(tables.OVERSUBSCRIBED[2:]).capitalize() + "."] if any(r.oversubscribed for r in ranked) else []
    words += [text(tables.INEXACT).capitalize() + "."] if any(not r.exact for r in ranked) else []
    return table("Measured plans", HEADS, rows, set(HEADS) - WORDS, "sortable") + f"<p>{' '.join(words)}</p>"


def figures(study: Study, result: Result) -> list[Cell]:
    """One row of the table of results, each figure with the number that it is sorted by."""
    versus, now = tables.ratio(result.vs_today, spread=True, sign="×", dash="–"), tables.is_today(study, result)
    proof, time_ = result.verified, result.step_seconds
    kept = result.computed_memory.total if result.computed_memory else None
    return [
        plan(study, result),
        (time(time_, unit=""), tables.median(result)),
        ("1.00×", 1.0) if now else (small(versus), result.vs_today.median if result.vs_today else None),
        (text(tables.proof(study, result)), proof.max_relative_difference if proof else None),
        text(result.bound_by or ""),
        (tables.percent(result.efficiency), result.efficiency),
        (f"{result.speedup:.2f}×" if result.speedup else "", result.speedup),
        (f"{result.samples_per_second:,.0f}" if result.samples_per_second else "", result.samples_per_second),
        (tables.percent(result.exposed_comm_fraction), result.exposed_comm_fraction),
        (tables.percent(result.bubble_fraction), result.bubble_fraction),
        (tables.megabytes(result.bytes_communicated), result.bytes_communicated),
        (tables.megabytes(result.peak_memory_bytes), result.peak_memory_bytes),
        (tables.megabytes(kept), kept),
        (f"{result.workers}", result.workers),
        (f"{result.threads}", result.threads),
        text(" ".join(filter(None, [result.engine, result.comm]))),
        (spread(time_), time_.p95) if time_ else ("", None),
        (f"{len(time_.samples)}", len(time_.samples)) if time_ else ("", None),
    ]


def spread(time: Seconds) -> str:
    """Between which times most single steps lie, in ms."""
    if time.p5 is None or time.p95 is None:
        return ""
    return f"{tables.milliseconds(time.p5, time.median)}–{tables.milliseconds(time.p95, time.median)}"


def learned(study: Study, picture: str) -> str:
    """What plans have learned from the same samples, in curves and figures, or why nobody knows."""
    rows = []
    for result in tables.ranking(study):
        if seen := result.learned:
            chance = chance_of(seen.accuracy[-1], study.held_out.samples) if study.held_out else None
            spread = f" <small>±{chance:.1%}</small>" if chance else ""
            figures: list[Cell] = [
                (f"{seen.accuracy[-1]:.1%}{spread}", seen.accuracy[-1]),
                (f"{seen.loss[-1]:.3f}", seen.loss[-1]),
                (f"{seen.samples[-1]:,}", seen.samples[-1]),
                (f"{seen.seconds[-1]:.2f}", seen.seconds[-1]),
            ]
            rows.append((kind(study, result), [plan(study, result), *figures]))
    if not rows or not study.held_out:
        why = study.accuracy_skipped
        return f"<p>Accuracy was not compared: {text(why)}.</p>" if why else ""
    heads = ("Plan", "accuracy", "loss", "samples seen", "seconds of training")
    words = (
        f"Trained from the task's start with one seed, and scored on {study.held_out.samples:,} "
        f"{study.held_out.name} samples; ± is what the choice of these samples does (95%), another seed may do more. "
        "Exact plans compute one step, so the winner stands for all of them; of inexact ones it is the fastest of each "
        "kind."
    )
    return f"{picture}{table('Accuracy', heads, rows, set(heads) - {'Plan'})}<p>{text(words)}</p>"


def explanations(study: Study) -> str:
    """What binds each plan and what to change, a plan each."""
    told = [(r, r.explanation) for r in tables.shortlist(study, tables.ranking(study)) if r.explanation]
    lines = "".join(f"<dt>{plan(study, r)}</dt><dd>{text(words)}</dd>" for r, words in told)
    return f'<h3>What binds it, and what to change</h3><dl class="bound">{lines}</dl>' if lines else ""


def timelines(study: Study, pictures: dict[str, str]) -> str:
    """The winner's step, measured above simulated; the others' stand with their programs."""
    result = tables.featured(study)
    return gantt(study, result, pictures) if result else ""


def gantt(study: Study, result: Result, pictures: dict[str, str]) -> str:
    """A timeline with the lengths of its two halves; a script makes an instrument of it."""
    svg = pictures.get(f"timeline {result.plan}")
    if not svg:
        return ""
    measured, simulated = tables.length(result.timeline), tables.length(result.simulated)
    words = f"{text(tables.name(study, result))}: one step on each rank; waiting is hatched."
    if measured and simulated:
        gap = f"{abs(simulated / measured - 1):.0%} {'shorter' if simulated < measured else 'longer'}"
        words += f" It took {tables.milliseconds(measured)} ms; simulated from its measured parts it takes "
        words += f"{tables.milliseconds(simulated)} ms, {gap}."
    region = '<div class="scroll still" role="region" tabindex="0" aria-label="Timeline">'
    box = f'{region}<div class="time">{svg}</div></div>'
    return f'<figure class="gantt" data-plan="{text(result.plan)}">{box}<figcaption>{words}</figcaption></figure>'


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
            f"{f'<p>{text(result.explanation)}</p>' if result.explanation else ''}{extra}{code}{svg}</details>\n"
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


def dropped(study: Study) -> str:
    """What was measured in fewer rounds than other plans, and why."""
    rows = [(kind(study, r), [plan(study, r), text(r.stopped or "")]) for r in tables.dropped(study)]
    return table("Plans with fewer rounds", ["Plan", "Reason"], rows, set()) if rows else ""


def notes(study: Study) -> str:
    """What the study says of itself."""
    return f"<ul>{''.join(f'<li>{text(note)}</li>' for note in study.notes)}</ul>" if study.notes else ""


def roofs(study: Study) -> str:
    """The layers against what the machine allows."""
    if not study.roofline:
        return ""
    heads = ("Layer", "direction", "ms", "GFLOP/s", "flops a byte", "allowed", "share", "bound by")
    rows = [
        (
            "",
            [
                text(roof.name),
                roof.direction,
                tables.milliseconds(roof.seconds),
                f"{roof.achieved / 1e9:,.1f}",
                f"{roof.intensity:,.1f}",
                f"{roof.attainable / 1e9:,.1f}",
                tables.percent(roof.share),
                roof.bound,
            ],
        )
        for roof in study.roofline
    ]
    caption = "Linear and convolution layers in PyTorch, one batch, under this machine's measured peaks"
    return table(caption, heads, rows, set(heads) - {"Layer", "direction", "bound by"}) + (
        f"<p>{text(in_words(study.roofline))} Allowed is the lesser of the largest matrix product's rate and flops a "
        "byte x memory bandwidth (Williams, Waterman and Patterson 2009).</p>"
    )


def setup(study: Study) -> str:
    """The task and the machine in full."""
    facts: dict[str, Any] = {**study.task, **study.machine.model_dump()}
    items = []
    facts |= {
        "caches": ", ".join(f"{level} {size // 1024:,} KiB" for level, size in study.machine.caches.items()),
        "frequency_hz": None,
        "frequency": f"{study.machine.frequency_hz / 1e9:.2f} GHz" if study.machine.frequency_hz else None,
        "memory_bytes_per_second": rate(study.machine.memory_bytes_per_second, "GB/s"),
        "flops_per_second": rate(study.machine.flops_per_second, "GFLOP/s"),
        "versions": ", ".join(f"{name} {number}" for name, number in study.machine.versions.items()),
    }
    for key, value in facts.items():
        if value in (None, [], "", {}):
            continue
        shown = (
            value if isinstance(value, str) else f"{value:,}" if type(value) is int else json.dumps(value, default=str)
        )
        items.append(f"<dt>{text(key.replace('_', ' '))}</dt><dd>{text(shown)}</dd>")
    return f'<dl class="setup">{"".join(items)}</dl>'


def rate(value: Rate | None, unit: str) -> str:
    """A measured rate in units of 1e9 a second, and how it was measured."""
    if value is None:
        return ""
    return f"{value.one_core / 1e9:,.1f} {unit} with one core, {value.all_cores / 1e9:,.1f} with all: {value.how}"


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
        f"<code>#study</code>.{lacks}</p>"
        '<p class="save"><a id="download" download="study.json" hidden>Save it as study.json</a> '
        '<a id="samples" download="samples.csv" hidden>Save every sample as CSV</a></p>'
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
