"""Speed-up over worker counts: the plans that are of a kind, and what the laws of scaling say of them."""

from collections.abc import Callable, Sequence

from paraxis.measure.estimate import Estimate
from paraxis.measure.laws import AtCount, Law, amdahl
from paraxis.measure.records import Result, Study
from paraxis.report import tables
from paraxis.report.markup import Cell, TableRow, small, table, text

APART = 10**6  # more than a study has rounds


def families(study: Study) -> dict[str, list[Result]]:
    """The fastest exact plan of every kind (axis, engine, transport) at every number of workers, from one worker on."""
    best: dict[tuple[str, int], Result] = {}
    single: dict[str, Result] = {}
    for result in tables.ranking(study):
        if not result.exact or result.speedup is None or result.efficiency is None:
            continue
        mesh = result.mesh
        axes = "+".join(axis for axis, size in (("dp", mesh.dp), ("pp", mesh.pp), ("tp", mesh.tp)) if size > 1)
        if result.workers == 1:
            single.setdefault(result.engine, result)
        else:
            name = " ".join(filter(None, [axes or "threads", result.engine, result.comm]))
            name = "today" if tables.is_today(study, result) else name
            best.setdefault((name, result.workers), result)
    found: dict[str, list[Result]] = {}
    for (name, _), result in sorted(best.items(), key=lambda item: item[0][1]):
        one = [single[result.engine]] if result.engine in single else []
        found.setdefault(name, one).append(result)
    return dict(sorted(found.items(), key=lambda item: -max(r.speedup or 0 for r in item[1][-1:])))


def laws(study: Study) -> str:
    """Amdahl's law and Karp and Flatt's fraction of every kind of plan over its worker counts, or why there is none."""
    found = []
    for name, plans in families(study).items():
        # A record keeps no rounds: each count is resampled by itself.
        samples = {
            r.workers: {r.workers * APART + i: s for i, s in enumerate(r.step_seconds.samples)}
            for r in plans
            if r.step_seconds
        }
        if 1 in samples:  # today has no worker of its own to be compared with
            found.append((name, amdahl(samples, study.machine.usable_cores)))
    said = told(found)
    return f"<h3>What the laws of scaling say</h3>{said}" if said else ""


def told(found: Sequence[tuple[str, Law]]) -> str:
    """Named laws as HTML: the speed-ups they are about, what they say, and once for all why others are refused."""
    if not found:
        return ""
    rows: list[TableRow] = []
    words = ""
    refused: dict[str, list[str]] = {}
    beyond: dict[str, set[int]] = {}  # counts above the usable cores
    for name, law in found:
        rows += [
            ("", [text(name), "strong" if law.law == "amdahl" else "weak", *_figures(point)])
            for point in law.counts
            if point.workers > 1
        ]
        if law.refusal and law.residual is None:
            why = f"{law.law.capitalize()}'s law is not fitted: {law.refusal}"
            refused.setdefault(why, []).append(name)
            beyond.setdefault(why, set()).update(law.left_out)
        else:
            words += f"<dt>{text(name)}</dt><dd>{text(law.sentence)}</dd>"
    heads = ("Kind", "scaling", "workers", "speed-up [95%]", "serial fraction [95%]")
    alone = len(refused) == 1 and not words
    said = ""
    for why, names in refused.items():
        whom = "" if alone else f"{', '.join(names)}: "
        some = f"; left out as more than that: {', '.join(map(str, sorted(beyond[why])))}" if beyond[why] else ""
        said += f"<p>{text(whom + why + some)}.</p>"
    figures = table("Speed-up over one worker", heads, rows, set(heads[2:])) if rows else ""
    under = "<p>The serial fraction is Karp and Flatt's, which needs no law.</p>" if rows else ""
    listed = f'<dl class="bound">{words}</dl>' if words else ""
    return f"{listed}{said}{figures}{under}"


def _figures(point: AtCount) -> list[Cell]:
    fraction = point.karp_flatt
    return [
        (f"{point.workers}", point.workers),
        (small(_spread(point.speedup, lambda value: f"{value:.2f}")), point.speedup.value),
        (small(_spread(fraction, lambda value: f"{value:.0%}")), fraction.value) if fraction else ("", None),
    ]


def _spread(e: Estimate, words: Callable[[float], str]) -> str:
    return f"{words(e.value)} [{words(e.low)} to {words(e.high)}]"
