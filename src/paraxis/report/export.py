"""A study for other tools: CSV for a spreadsheet, event files for TensorBoard."""

import csv
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

from paraxis.errors import MissingError
from paraxis.measure.records import Result, Study
from paraxis.report import tables

Format = Literal["csv", "tensorboard"]
FORMATS: tuple[str, ...] = get_args(Format)
HEADS = (
    *("plan", "label", "status", "reason", "dp", "pp", "tp", "schedule", "engine", "comm", "threads", "workers"),
    *(
        "exact",
        "oversubscribed",
        "step_seconds",
        "step_low",
        "step_high",
        "step_p5",
        "step_p25",
        "step_p75",
        "step_p95",
        "samples",
        "samples_per_second",
    ),
    *("vs_today", "vs_today_low", "vs_today_high", "speedup", "efficiency", "exposed_comm_fraction", "bubble_fraction"),
    *("bytes_communicated", "peak_memory_bytes", "computed_memory_bytes", "bound_by", "equals_to", "allowed", "proved"),
)


def export(study: Study, folder: Path, formats: Iterable[Format]) -> list[Path]:
    """Write the study in every format; returns what was written. MissingError where a format lacks its package."""
    written: list[Path] = []
    for name in formats:
        written += to_csv(study, folder) if name == "csv" else to_tensorboard(study, folder / "tensorboard")
    return written


def require(formats: Iterable[Format]) -> None:
    """Raises MissingError for a format that lacks its package: to be asked before minutes are spent on a study."""
    if "tensorboard" in formats and find_spec("tensorboard") is None:
        raise MissingError("--export tensorboard needs the package tensorboard: pip install 'paraxis[tensorboard]'")


def to_csv(study: Study, folder: Path) -> list[Path]:
    """A line a plan (`results.csv`), a measured step, a training step, and a look at held-out samples."""
    plans = tables.everything(study)
    samples = (
        (r.plan, r.label, kind, n, seconds)
        for r in plans
        if (time := r.step_seconds)
        for kind, kept in (("kept", time.samples), ("warmup", time.warmup), ("disturbed", time.disturbed))
        for n, seconds in enumerate(kept)
    )
    losses = ((r.plan, r.label, step, loss) for r in plans for step, loss in enumerate(r.losses))
    looks = (
        (r.plan, r.label, *look)
        for r in plans
        if (seen := r.learned)
        for look in zip(seen.steps, seen.samples, seen.seconds, seen.loss, seen.accuracy, strict=True)
    )
    return [
        _write(folder / "results.csv", HEADS, map(line, plans)),
        _write(folder / "samples.csv", ("plan", "label", "kind", "sample", "seconds"), samples),
        _write(folder / "losses.csv", ("plan", "label", "step", "loss"), losses),
        _write(folder / "accuracy.csv", ("plan", "label", "step", "samples", "seconds", "loss", "accuracy"), looks),
    ]


def line(result: Result) -> list[Any]:
    """One plan as HEADS names it; what is not known is empty."""
    time, ratio, proof = result.step_seconds, result.vs_today, result.verified
    r = result
    return [
        *(
            r.plan,
            r.label,
            r.status,
            r.reason,
            r.mesh.dp,
            r.mesh.pp,
            r.mesh.tp,
            r.schedule,
            r.engine,
            r.comm,
            r.threads,
        ),
        *(r.workers, r.exact, r.oversubscribed),
        *((time.median, time.low, time.high, time.p5, time.p25, time.p75, time.p95) if time else ("",) * 7),
        len(time.samples) if time else "",
        r.samples_per_second,
        *((ratio.median, ratio.low, ratio.high) if ratio else ("",) * 3),
        *(r.speedup, r.efficiency, r.exposed_comm_fraction, r.bubble_fraction, r.bytes_communicated),
        *(r.peak_memory_bytes, r.computed_memory.total if r.computed_memory else None, r.bound_by),
        *((proof.max_relative_difference, proof.tolerance, proof.passed) if proof else ("",) * 3),
    ]


def _write(path: Path, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Whole or not at all. A text that a spreadsheet would take for a formula gets an apostrophe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        writer.writerows([_harmless(value) for value in row] for row in rows)
    draft.replace(path)
    return path


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def to_tensorboard(study: Study, folder: Path) -> list[Path]:
    """A run a plan: `training loss` and `accuracy` by step, `seconds per step` by sample."""
    require(["tensorboard"])
    from torch.utils.tensorboard import SummaryWriter

    written = []
    for result in tables.everything(study):
        if not (result.losses or result.step_seconds):
            continue
        run = folder / _folder_name(result.label or result.plan)
        if run in written:
            run = folder / _folder_name(result.plan)
        # Nothing is appended to an export of before: the same curve would be drawn twice.
        for old in run.glob("events.out.tfevents.*"):
            old.unlink()
        with SummaryWriter(run) as writer:
            for step, loss in enumerate(result.losses):
                if isfinite(loss):
                    writer.add_scalar("training loss", loss, step)
            for step, score in (
                zip(result.learned.steps, result.learned.accuracy, strict=True) if result.learned else ()
            ):
                writer.add_scalar("accuracy", score, step)
            for sample, seconds in enumerate(result.step_seconds.samples if result.step_seconds else []):
                writer.add_scalar("seconds per step", seconds, sample)
        written.append(run)
    return written


def _folder_name(label: str) -> str:
    """A label as a folder: no separator, no control character, no dot in front."""
    kept = "".join(c if c.isalnum() or c in "=@.,+_-" else "_" for c in tables.clean(label))
    return kept.lstrip(".")[:120] or "plan"
