"""The page of the batch-size study, from its record: `python -m paraxis.report.batch_size_page STUDY.json FOLDER`."""

import json
import sys
from math import isfinite
from pathlib import Path
from typing import Any

from paraxis.measure.batch_sizes import BatchSizes
from paraxis.measure.critical import Point
from paraxis.measure.estimate import Estimate

NAME = "batch-size"


def page(found: BatchSizes, machine: dict[str, Any] | None = None) -> str:
    """The study as Markdown; its pictures lie beside it as NAME-steps.svg and NAME-rates.svg."""
    p = found.parameters
    where = f", on {machine['cpu']}" if machine and machine.get("cpu") else ""
    parts = [
        "# How large may a batch be?",
        "",
        f"{found.sentence}",
        "",
        f"![Steps to the target against batch size]({NAME}-steps.svg)",
        "",
        "Each point is the median of the small dots, one a seed. The line is steps = s (1 + B / batch): where it falls "
        "along the dotted line twice the workers halve the time, where it is flat they buy nothing. The blue band is "
        "the 95% interval of the B at which it bends, the orange one that of the gradient noise scale.",
        "",
        "## What was fixed beforehand",
        "",
        f"`{p['network']}` on `{p['data']}` with SGD, momentum {p['momentum']:g}, plan `{p['plan']}`{where}. "
        f"The target is {p['target']:.1%} of {_held_out(p['validation'])}. "
        f"Learning rates were chosen with seed {p['search_seed']} and judged with {', '.join(map(str, p['seeds']))}; "
        f"a trial ended after {p['max_steps']:,} steps or {p['max_samples']:,} samples.",
        "",
        "Every batch size has its own learning rate, from a grid of doublings that was widened while the best stood at "
        "its edge, and refined by half doublings around the best (Shallue et al. 2019).",
        "",
        "| batch | learning rate | steps to the target | samples | rates tried | widened by |",
        "|--:|--:|--:|--:|--:|--:|",
        *(_row(point) for point in found.points),
        "",
        f"![Learning rates tried, and the best]({NAME}-rates.svg)",
        "",
        *_figures(found),
        *(f"- {note}" for note in found.notes),
    ]
    if not found.finished:
        parts.append("- The study was not finished: what is here is what it had by then.")
    return "\n".join(parts).rstrip() + "\n"


def _held_out(validation: float) -> str:
    held = f"the {validation:.0%} of the training samples that are held out; the test set takes no part"
    return held if validation else "the test set, on which the learning rates are chosen, too"


def _row(p: Point) -> str:
    steps = ", ".join("not reached" if s is None else f"{s:,.0f}" for s in p.steps)
    median = f"{p.median:,.0f} ({steps})" if isfinite(p.median) else "not reached"
    samples = f"{p.median * p.batch:,.0f}" if isfinite(p.median) else ""
    return f"| {p.batch:,} | {p.lr:g} | {median} | {samples} | {len(p.searched)} | {p.widened} |"


def _figures(found: BatchSizes) -> list[str]:
    """The fit and the noise scale in figures."""
    c, rows = found.critical, []
    if c.b_crit and c.least_steps and c.least_samples and c.misfit is not None:
        rows += [
            _figure("critical batch size", c.b_crit),
            _figure("steps that no batch goes below", c.least_steps),
            _figure("samples that no batch goes below", c.least_samples),
            f"| misfit of the curve | {c.misfit:.1%} | |",
        ]
    if found.noise:
        n = found.noise
        rows.append(_figure(f"gradient noise scale at batch {n.large:,} ({n.large // n.small} parts)", n.scale))
        rows += [_figure(f"of its steps {w.first + 1:,} to {w.last:,}", w.scale) for w in n.windows]
    return ["## Figures", "", "| | | 95% |", "|---|--:|---|", *rows, ""] if rows else []


def _figure(name: str, e: Estimate) -> str:
    high = f"{e.high:,.0f}" if isfinite(e.high) else "no bound"
    return f"| {name} | {e.value:,.0f} | {e.low:,.0f} to {high} |"


def write_page(document: dict[str, Any], folder: Path) -> Path:
    """Write page and pictures from what `explore --study batch-size --json` prints; the page's path."""
    from paraxis.report.study_charts import alone, rates_by_batch, steps_by_batch

    found = BatchSizes.model_validate(document["analysis"])
    machines = [trial["machine"] for trial in document.get("trials", []) if trial.get("machine")]
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in (("steps", steps_by_batch(found)), ("rates", rates_by_batch(found))):
        (folder / f"{NAME}-{name}.svg").write_text(alone(svg))
    path = folder / f"{NAME}.md"
    path.write_text(page(found, machines[-1] if machines else None))
    return path


if __name__ == "__main__":
    source, target = sys.argv[1:]
    print(write_page(json.loads(Path(source).read_text()), Path(target)))
