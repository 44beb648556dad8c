"""Steps to a target accuracy, on resident ranks: train, look, train on, until it is reached or the limit is.

Looks stand on a geometric grid of steps, so that every batch size is resolved alike, whether it needs a hundred steps
or ten thousand; the crossing lies on the line between the last two.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from paraxis.errors import Diverged, TaskError
from paraxis.plan.plan import Plan
from paraxis.session import Session, check_batch
from paraxis.study.trial import Factors
from paraxis.task.spec import TaskSpec

Found = tuple[dict[str, float | None], dict[str, list[float]], str]  # measures, series, why a measure is null

GROWTH = 1.06  # of steps from look to look
KEY = "reach"


@dataclass(frozen=True)
class Reached:
    """`steps` to the target, interpolated, None where it was not reached; `seconds` of training up to there.

    `looks` are the steps after which `accuracies` (fractions of the held-out samples) were taken. `stopped` says why
    the target was not reached.
    """

    steps: float | None
    seconds: float
    looks: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    stopped: str = ""


def looks(limit: int, growth: float = GROWTH) -> Iterator[int]:
    """Steps after which to look: 1, 2, 3, ... and from 1 / (growth - 1) on `growth` apart; the last is `limit`."""
    step = 0
    while step < limit:
        step = min(limit, max(step + 1, math.ceil(step * growth)))
        yield step


def crossing(steps: list[int], accuracies: list[float], target: float) -> float | None:
    """Where the line through the looks first meets the target; None where it does not."""
    if steps and accuracies[0] >= target:
        return float(steps[0])
    for (before, low), (after, high) in pairwise(zip(steps, accuracies, strict=True)):
        if high >= target:
            return before + (after - before) * (target - low) / (high - low)
    return None


def reach(session: Session, spec: TaskSpec, plan: Plan, target: float, limit: int) -> Reached:
    """Train a task from its initial weights with a plan until `target` or for `limit` steps.

    Raises PlanError for a plan that the task cannot meet, TaskError where there is nothing to look at.
    """
    if not 0 < target < 1 or limit < 1:
        raise TaskError(f"target={target:g}, limit={limit}: it takes an accuracy between 0 and 1 and at least one step")
    check_batch(spec, plan)
    pool, ranks = session.home(plan), range(plan.processes)
    session.respec(spec)  # what the session knows of layers is of another batch: nothing here asks for it
    request: dict[str, Any] = {
        "do": "setup",
        "key": KEY,
        "plan": plan.text(),
        "dtype": "float32",
        "cpus": [],
        "fault": None,
    }
    pool.ask(request, ranks)
    which = "validation" if spec.validation else "test"
    seen: list[int] = []
    accuracies: list[float] = []
    seconds, stopped = 0.0, f"not reached within {limit:,} steps"
    for look in looks(limit):
        begun = time.perf_counter()
        try:
            pool.ask({"do": "train", "key": KEY, "steps": look - (seen[-1] if seen else 0)}, ranks)
        except Diverged as error:
            stopped = str(error)
            break
        seconds += time.perf_counter() - begun
        accuracies.append(_accuracy(pool.ask({"do": "evaluate", "key": KEY, "set": which}, ranks)))
        seen.append(look)
        if accuracies[-1] >= target:
            break
    steps = crossing(seen, accuracies, target)
    pool.ask({"do": "drop", "key": KEY}, ranks)
    return Reached(steps, seconds, seen, accuracies, "" if steps else stopped)


def by_rule(session: Session, spec: TaskSpec, plan: Plan, factors: Factors) -> Found:
    """A trial under the rule `reach` or `noise`; raises TaskError for another rule."""
    if factors["rule"] == "reach":
        return measure_reach(session, spec, plan, factors)
    if factors["rule"] == "noise":
        return measure_noise(session, spec, factors)
    raise TaskError(f"rule={factors['rule']}: it takes reach or noise")


def measure_reach(session: Session, spec: TaskSpec, plan: Plan, factors: Factors) -> Found:
    """A trial under the rule `reach`: `target` and `steps`, the limit, are factors."""
    found = reach(session, spec, plan, float(factors["target"]), int(factors["steps"]))
    measures = {"steps_to_target": found.steps, "seconds_to_target": found.seconds if found.steps else None}
    return measures, {"step": list(map(float, found.looks)), "accuracy": found.accuracies}, found.stopped


def measure_noise(session: Session, spec: TaskSpec, factors: Factors) -> Found:
    """A trial under the rule `noise`: squared gradient norms along a serial run of `steps` steps.

    They are those of `microbatches` equal parts of each batch, and of the whole; the series hold every step's.
    """
    pool = session.pool("solo")
    session.respec(spec)
    request: dict[str, Any] = {
        "do": "noise",
        "steps": int(factors["steps"]),
        "microbatches": int(factors["microbatches"]),
    }
    norms = pool.ask(request)[0]
    series = {"square_small": norms["small"], "square_large": norms["large"]}
    return {"microbatch": float(norms["size"])}, series, ""


def _accuracy(answers: list[dict[str, Any]]) -> float:
    """Of the ranks that saw outputs: those of the last stage."""
    best = max(answers, key=lambda answer: answer["weight"])
    return float(best["hits"] / best["samples"])
