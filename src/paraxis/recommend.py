"""Which plan to use, said in one sentence, and why it is not faster still."""

import math
import shlex
from statistics import median
from typing import Any

from paraxis.measure.records import Recommendation, Result, Study
from paraxis.measure.statistics import corrected, told_apart

Times = dict[str, dict[int, float]]  # full plan text -> step seconds by round


def recommend(study: Study, times: Times) -> Recommendation | None:
    """The fastest exact plan that was proved; None before anything was measured."""
    rows = [r for r in study.results if r.status == "ok" and r.step_seconds and r.exact]
    rows = [r for r in rows if r.verified is not None and r.verified.passed]
    if not rows:
        return None
    best = min(rows, key=lambda r: r.step_seconds.median)  # type: ignore[union-attr]
    others = [r for r in [*rows, *([study.today] if study.today else [])] if r is not best]
    level = corrected(len(others))
    same = [r.label for r in others if not told_apart(times[best.plan], times[r.plan], level)]
    return Recommendation(
        plan=best.plan,
        label=best.label,
        sentence=_sentence(study, best, same),
        why=_why(study, best),
        command=command(study.task, best.plan, best.label),
        vs_today=best.vs_today,
        not_told_apart=same,
    )


def command(task: dict[str, Any], plan: str, label: str) -> str:
    """The shell command that trains with a plan."""
    from paraxis.plan.plan import parse

    words = ["paraxis", "train", shlex.quote(str(task["network"])), "--plan", shlex.quote(parse(plan).short())]
    if task.get("data"):
        words += ["--data", shlex.quote(task["data"])]
    words += ["--batch", str(task["batch"])]
    return " ".join(words + (["--bn-group", str(task["bn_group"])] if task.get("bn_group") else []))


def _sentence(study: Study, best: Result, same: list[str]) -> str:
    ms = best.step_seconds.median * 1e3 if best.step_seconds else 0.0
    words = f"Use {best.label}: {ms:.3g} ms a step"
    ratio, today = best.vs_today, study.today
    if ratio and today and today.step_seconds:
        factor = f"{ratio.median:.2f}x [{ratio.low:.2f}-{ratio.high:.2f}]"
        words += f", {factor} as fast as today's {today.step_seconds.median * 1e3:.3g} ms"
        if today.label in same:
            words += " (not told apart)"
    if best.verified and best.verified.max_relative_difference is not None:
        digits, power = f"{best.verified.max_relative_difference:.0e}".split("e")
        words += f", equal to serial to {digits}e{int(power)}"
    return words + "."


def _accuracy(study: Study, quick: Result, best: Result) -> str:
    """What an inexact plan learns beside the exact one from the same samples, or what to do where nobody knows."""
    if not (quick.learned and best.learned and study.held_out):
        why = f" ({study.accuracy_skipped})" if study.accuracy_skipped else ""
        return f"compare its accuracy first{why}"
    ours, theirs = quick.learned.accuracy[-1], best.learned.accuracy[-1]
    chance = chance_of(ours, study.held_out.samples)
    return (
        f"after {quick.learned.samples[-1]:,} samples and {quick.learned.seconds[-1]:.2g} s its {study.held_out.name} "
        f"accuracy is {ours:.1%}, that of {best.label} {theirs:.1%} after {best.learned.seconds[-1]:.2g} s "
        f"(of {study.held_out.samples:,} samples: ±{chance:.1%})"
    )


def chance_of(accuracy: float, samples: int) -> float:
    """Half the 95% interval of an accuracy from so many samples (Agresti and Coull 1998: 2 are added to each side)."""
    share = (accuracy * samples + 2) / (samples + 4)
    return 1.96 * math.sqrt(share * (1 - share) / (samples + 4))


def _why(study: Study, best: Result) -> str:
    """What keeps the best plan from being faster."""
    inexact = [r for r in study.results if not r.exact and r.step_seconds and r.status == "ok" and best.step_seconds]
    faster = [r for r in inexact if r.step_seconds.median < 0.97 * best.step_seconds.median]  # type: ignore[union-attr]
    hint = ""
    if faster:
        quick = min(faster, key=lambda r: r.step_seconds.median)  # type: ignore[union-attr]
        factor = best.step_seconds.median / quick.step_seconds.median  # type: ignore[union-attr]
        hint = f" {quick.label} is {factor:.2f}x faster a step, but another algorithm: {_accuracy(study, quick, best)}."
    if best.split is None or best.step_seconds is None:
        return hint.strip()
    total = best.step_seconds.median
    parts = best.split
    waits = {
        "exposed communication": parts.communication,
        "waiting for a slower replica": parts.straggler_wait,
        "the pipeline's bubble": parts.pipeline_wait,
        "the optimiser": parts.optimizer,
        "loading samples": parts.data,
    }
    name, seconds = max(waits.items(), key=lambda item: item[1])
    share = parts.compute / total
    what = {
        "per-call overhead": "mostly the framework's cost per call, so a larger batch would use the cores better",
        "memory bandwidth": "bound by the memory",
        "launches": "mostly asking the GPU for kernels, which it computes faster than that",
        "shared GPU": "with a GPU that ranks share",
    }
    kind = what.get(best.bound_by or "", f"bound by the {'GPU itself' if best.devices else 'cores themselves'}")
    text = f"It is not faster because {share:.0%} of its step is computing ({kind})"
    if seconds > 0.02 * total:
        text += f" and {seconds / total:.0%} is {name}"
    one = [r for r in study.results if r.workers == 1 and r.step_seconds]
    if one and best.workers > 1 and best.efficiency:
        serial = median(one[0].step_seconds.samples) * 1e3  # type: ignore[union-attr]
        text += f"; {best.workers} workers at {best.efficiency:.0%} efficiency against {serial:.3g} ms of one"
    change = (best.explanation or "").partition("To change it: ")[2]
    return text + "." + (f" What would change it: {change}" if change else "") + hint
