"""One HTML file that tells what a study found; it opens without a network and holds its own raw samples."""

from pathlib import Path

from paraxis.measure.records import Study
from paraxis.recommend import doubts
from paraxis.report import sections, speedup, tables, theatre
from paraxis.report.markup import document, figure, small, text, time

DRAWN_LIMIT = 500_000  # characters of timelines beside the winner's
HERO_BARS = 7  # plans on the first screen
Section = tuple[str, str, str]  # id, heading, content


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
    parts = [
        ("results", "All measured plans", sections.results(study) + pictures["bars"]),
        ("split", "Where each step goes", pictures["split"] + sections.explanations(study)),
        ("timeline", "Timeline of one step", sections.timelines(study, pictures)),
        ("scaling", "Speed-up and efficiency", pictures["scaling"] + speedup.laws(study)),
        ("loss", "Training loss", pictures["losses"]),
        ("accuracy", "Accuracy", sections.learned(study, pictures["accuracy"])),
        ("memory", "Memory", pictures["memory"]),
        ("traffic", "Bytes sent", pictures["traffic"]),
        ("proofs", "Proofs of equality", sections.proofs(study)),
        ("missing", "Not measured, or in fewer rounds", sections.missing(study) + sections.dropped(study)),
        ("programs", "Programs and their timelines", sections.programs(study, pictures)),
        ("theatre", "Bubble theatre", theatre.fragment()),
        ("notes", "Notes", sections.notes(study)),
        ("roofline", "Layers under the roofline", sections.roofs(study)),
        ("setup", "Network and machine", sections.setup(study)),
        ("raw", "Raw samples", sections.raw(study)),
    ]
    parts = [part for part in parts if part[2]]
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{content}</section>\n'
        for key, title, content in parts
    )
    whole = (
        f"{opening(study, pictures, parts)}<main>\n{body}</main>\n"
        f"<footer><p>{text(provenance(study))}</p></footer>\n{sections.record(study)[0]}"
    )
    return document(title(study), whole, ("gantt.js", "page.js", "theatre.js"))


def draw(study: Study) -> dict[str, str]:
    """All pictures, each as a figure; timelines by `timeline <plan>`."""
    from paraxis.report import charts, curves, gantt  # altair takes most of a second to import

    drawers = (charts.bars, charts.split, charts.memory, charts.traffic, curves.scaling, curves.losses, curves.accuracy)
    pairs = {f.__name__: (f(study, 880), f(study, 390)) for f in drawers}
    pictures = {key: figure(wide, narrow, tables.caption(study, key)) for key, (wide, narrow) in pairs.items()}
    best, drawn = tables.featured(study), 0
    for result in sorted(tables.everything(study), key=lambda r: (r is not best, tables.median(r))):
        if drawn < DRAWN_LIMIT and (svg := gantt.timeline(result)):
            pictures[f"timeline {result.plan}"] = svg
            drawn += len(svg)
    pictures["first bars"] = charts.bars(study, 430, HERO_BARS)
    pictures["first timeline"] = gantt.timeline(best.model_copy(update={"simulated": []}), 450) if best else ""
    return pictures


def title(study: Study) -> str:
    """Of the browser's tab."""
    chosen = study.recommendation
    return f"{chosen.label if chosen else 'Parallel plans'} for {tables.network(study) or 'a network'} - Paraxis"


def opening(study: Study, pictures: dict[str, str], parts: list[Section]) -> str:
    """The first screen: what to use, the command, the comparison, where its step goes, what it was measured on."""
    chosen = study.recommendation
    lacks = tables.unfinished(study)
    sentence = chosen.sentence if chosen else verdictless(study)
    links = " ".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in parts)
    lines = [
        f'<p class="brand"><b>Paraxis</b> {text(tables.network(study))}</p>',
        f'<p class="unfinished">{text(lacks)}</p>' if lacks else "",
        f"<h1>{text(sentence)}</h1>",
        command(chosen.command) if chosen and chosen.command else "",
        '<div class="first">',
        first_bars(study, pictures["first bars"]),
        first_step(study, pictures["first timeline"]),
        "</div>",
        f'<p class="machine">{text(tables.machine(study))}</p>',
        facts(study),
        f'<p class="lede">{text(chosen.why)}</p>' if chosen and chosen.why not in chosen.sentence else "",
        untold(study),
        f'<nav aria-label="Sections">{links}</nav>',
    ]
    return "<header>\n" + "\n".join(line for line in lines if line) + "\n</header>\n"


def first_bars(study: Study, svg: str) -> str:
    """The fastest plans beside today."""
    words = tables.caption(study, "bars", HERO_BARS)
    return f"<figure>{svg}<figcaption>{text(words)}</figcaption></figure>" if svg else ""


def first_step(study: Study, svg: str) -> str:
    """Where the featured plan's step goes, as a strip with its parts in words, and its measured timeline."""
    result = tables.featured(study) or tables.winner(study)
    if result is None or not (result.split or svg):
        return ""
    strip = ""
    if result.split:
        parts = [part for part in tables.shares(result.split) if part[2] >= 0.005]
        pieces = "".join(f'<i class="k-{field}" style="flex-grow:{share:.4f}"></i>' for field, _, share in parts)
        words = "".join(
            f'<li><i class="k-{field}"></i>{words} <b>{tables.percent(share)}</b></li>' for field, words, share in parts
        )
        strip = f'<div class="strip" aria-hidden="true">{pieces}</div><ul class="legend">{words}</ul>'
    name = text(tables.name(study, result))
    more = (
        f'<figcaption>One step of {name} on each rank; <a href="#timeline">look closer</a>.</figcaption>' if svg else ""
    )
    return (
        f'<figure class="step"><p class="head">A step of {name}</p>{strip}<div class="small">{svg}</div>{more}</figure>'
    )


def verdictless(study: Study) -> str:
    """The headline of a study without a recommendation."""
    measured = tables.count(len(tables.ranking(study)), "plan")
    return f"{measured} measured, none recommended." if tables.ranking(study) else "No plan was measured."


def untold(study: Study) -> str:
    """The plans that the measurement does not tell apart from the recommended one."""
    said = doubts(study.recommendation) if study.recommendation else []
    return "".join(f"<p>{text(line)}.</p>" for line in said)


def command(line: str, what: str = "Train with it") -> str:
    """A box to copy from."""
    return (
        f'<div class="command"><span>{what}</span>'
        f'<pre tabindex="0"><code>{text(line)}</code></pre>'
        '<button type="button" class="copy" hidden>copy</button></div>'
    )


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
