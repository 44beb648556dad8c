"""The job of `paraxis show FILE`: a user's own schedule checked, simulated, drawn, proved and timed."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from rich.console import Console

from paraxis.errors import PlanError
from paraxis.measure.machine import usable_cores
from paraxis.measure.statistics import paired
from paraxis.plan.own import Asked, Shape, shape_of
from paraxis.plan.plan import Plan
from paraxis.program.check import check
from paraxis.program.cut import Layout
from paraxis.program.lower import lower
from paraxis.progress import progress
from paraxis.proof import prove
from paraxis.session import Session, Tell, open_session
from paraxis.showing import drawn, measured, show_lines
from paraxis.task.spec import TaskSpec

STEPS = 6  # of the proof
ROUNDS, SECONDS = 7, 0.15  # of the comparison: chunks of each schedule, and how long one is
COMM, WIDTH, SAMPLES = "gloo", 64, 8  # where nothing says otherwise: of the network, and samples of a microbatch


def plan_of(name: str, asked: Asked) -> Plan:
    """The plan that runs a schedule file; raises PlanError for a malformed one, before anything is started."""
    ranks = 3 if asked.ranks is None else asked.ranks
    known = shape_of(name) if name.endswith(".txt") else Shape(ranks, 2 * ranks, 1)
    given = asked.ranks, asked.microbatches, asked.interleave
    own = known.ranks, known.microbatches, known.stages
    shape = Shape(*(mine if said is None else said for said, mine in zip(given, own, strict=True)))
    if shape.ranks < 2:
        raise PlanError(f"schedule {name}: a pipeline has 2 ranks or more")
    plan = Plan(pp=shape.ranks, microbatches=shape.microbatches, interleave=shape.stages, schedule=name, comm=COMM)
    check(lower(plan, Layout((1,) * plan.stages)))
    return plan


def tried(
    name: str, network: str | None, asked: Asked, as_json: bool, spec_of: Callable[[str, dict[str, Any]], TaskSpec]
) -> int:
    """Print all that can be said of a schedule file; 1 if the proof fails. `spec_of`: the task of a network and data.

    Without a network it is a small one with a layer for every stage, and with samples for every microbatch.
    """
    plan = plan_of(name, asked)
    batch = plan.microbatches * SAMPLES
    small = "mlp:" + "-".join(map(str, (WIDTH, *[WIDTH] * (plan.stages - 1), 10)))
    data = {} if network else {"data": f"synthetic:{4 * batch},1x8x8,10", "batch": batch}
    with progress() as tell:
        document = try_schedule(plan, spec_of(network or small, data), tell)
    text = json.dumps(document, indent=1)
    print(text if as_json else "\n".join([*show_lines(document, Console().width), *lines(document)]))
    return 0 if document["verified"]["passed"] else 1


def try_schedule(plan: Plan, spec: TaskSpec, tell: Tell) -> dict[str, Any]:
    """What `showing.drawn` tells of the plan, its proof, and its measured step beside 1F1B's of the same shape."""
    with open_session(spec, {}, {COMM: plan.mesh.size}, None, tell) as session:
        missing = session.begin(("solo", COMM))
        if missing:
            raise PlanError(next(iter(missing.values())))
        plan = session.settled(plan)
        program, facts = session.program(plan), session.known()
        share = facts.batch / facts.samples / plan.microbatches
        costs = measured(program, facts.forward, facts.backward, share)
        document = drawn(plan, program, costs, f"measured layers of {facts.network}, links free")
        proof = prove(session, plan, STEPS, "float64").verified
        assert proof is not None, "only plans that cannot be met have no proof"
        cores = usable_cores()
        timed = compared(session, plan) if plan.mesh.size <= cores else None
        reason = "" if timed else f"{plan.mesh.size} ranks do not fit this machine's {cores} cores"
    return document | {"verified": proof.model_dump(), "steps": STEPS, "timed": timed, "not_timed": reason}


def compared(session: Session, plan: Plan) -> dict[str, Any]:
    """Step seconds of the plan and of 1F1B with as many ranks and microbatches, in chunks that take turns."""
    split = plan.split if plan.interleave == 1 else ()
    other = session.settled(replace(plan, schedule="1f1b", interleave=1, split=split))
    plans, seconds = {"own": plan, "1f1b": other}, {"own": dict[int, float](), "1f1b": dict[int, float]()}
    steps = 1
    for key, each in plans.items():
        session.setup(key, each)
        session.tell(f"measuring {each.label()}", -1)
        once = session.ask(key, each, {"do": "measure", "warm": 2, "steps": 2, "trace": 0})[0]["seconds"] / 2
        steps = max(steps, min(1000, round(SECONDS / once)))
    for number in range(ROUNDS):
        for key in random.Random(number).sample(list(plans), 2):
            request = {"do": "measure", "warm": 1 + steps // 10, "steps": steps, "trace": 0}
            seconds[key][number] = session.ask(key, plans[key], request)[0]["seconds"] / steps
    ratio = paired(seconds["own"], seconds["1f1b"])
    assert ratio is not None, "both took part in every round"
    return {key: median(times.values()) for key, times in seconds.items()} | {"ratio": ratio.model_dump()}


def lines(document: dict[str, Any]) -> list[str]:
    """What follows the drawing on a terminal."""
    proof, timed = document["verified"], document["timed"]
    apart = "infinitely" if proof["max_relative_difference"] is None else f"{proof['max_relative_difference']:.1e}"
    verdict = "equal" if proof["passed"] else f"NOT EQUAL: {proof['where']}"
    out = [
        "",
        "checked: every microbatch once, nothing before its data, nothing left over, no deadlock",
        f"proved over {document['steps']} steps: {verdict} ({apart} apart from the {proof['against']}, "
        f"at most {proof['tolerance']:.0e})",
    ]
    if timed is None:
        return [*out, f"not timed: {document['not_timed']}"]
    ratio = timed["ratio"]
    return [
        *out,
        f"measured: {timed['own'] * 1e3:.3g} ms a step, 1F1B {timed['1f1b'] * 1e3:.3g} ms: "
        f"{ratio['median']:.2f} times as fast [{ratio['low']:.2f}, {ratio['high']:.2f}]",
    ]
