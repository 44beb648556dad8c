"""Proves that a parallel run computes what the serial run computes: losses and every parameter, on every rank."""

import math
from dataclasses import dataclass, field
from typing import Any

from paraxis.bands import judged
from paraxis.errors import ParaxisError, PlanError
from paraxis.measure.records import Verified
from paraxis.plan.plan import WARM, Plan, period
from paraxis.plan.precision import MIXED
from paraxis.program.faults import FAULTS
from paraxis.session import Session, failure

EXACT64 = 1e-10
MARGIN = 4.0  # how far beyond the measured reorder band a float32 run may lie


@dataclass(frozen=True)
class Proof:
    """The verdict on one plan, the digest of its program and the mean losses of its steps."""

    plan: Plan
    program: str | None
    verified: Verified | None
    losses: list[float] = field(default_factory=list)
    status: str = "ok"
    reason: str | None = None


def prove(
    session: Session,
    plan: Plan,
    steps: int,
    dtype: str,
    fault: str | None = None,
    key: str = "proof",
    keep: bool = False,
) -> Proof:
    """Run the first steps of a plan on its ranks and compare; with `keep` the plan stays set up under `key`.

    Raises PlanError for a plan that the task cannot meet, and for a seeded fault that does not show; RankError when a
    rank fails.
    """
    found = _proved(session, plan, steps, dtype, fault, key, keep)
    if fault and found.verified and found.verified.passed:
        what = f"the proof of {plan.short()} passes with it ({FAULTS[fault].what})"
        raise PlanError(f"fault={fault}: {what}, so it changes nothing here")
    return found


def _proved(session: Session, plan: Plan, steps: int, dtype: str, fault: str | None, key: str, keep: bool) -> Proof:
    program = session.program(plan)
    steps = max(steps, WARM + 3) if plan.graphs else steps  # of which some are replayed
    if plan.sync == "hogwild":
        verified, losses = _in_band(session, plan, steps, dtype, key)
        if not keep:
            session.ask(key, plan, {"do": "drop"})
        return Proof(plan, program.digest(), verified, losses)
    if plan.precision != "fp32":
        dtype = "float32"  # of its weights; autocast leaves float64 alone
    oracle = session.oracle(plan, steps, dtype)
    if plan.precision in MIXED:
        return _prove_mixed(session, plan, steps, fault, key, keep, oracle)
    limit = tolerance(session, plan, steps, dtype)
    difference, where, losses = _compare(session, plan, steps, dtype, fault, key, oracle)
    passed = difference <= limit
    place = None
    if not passed:
        place = _first_difference(session, plan, steps, dtype, fault, limit, (difference, where))
    notes = [own for own in (_note(session), *remarks(session, key, plan)) if own]
    if not keep:
        session.ask(key, plan, {"do": "drop"})
    verified = Verified(
        against=against(plan) + (f" in {plan.precision}" if plan.precision != "fp32" else ""),
        max_relative_difference=difference if math.isfinite(difference) else None,
        tolerance=limit,
        passed=passed,
        where=place,
        note="; ".join(notes) or None,
    )
    return Proof(plan, program.digest(), verified, losses)


def _prove_mixed(
    session: Session, plan: Plan, steps: int, fault: str | None, key: str, keep: bool, oracle: dict[str, Any]
) -> Proof:
    """Held to the serial run in the same precision, and to what rounding does there."""
    session.setup(key, plan, "float32", fault)
    words = ("file", "change", "moved")
    answers = session.ask(key, plan, {"do": "prove", "steps": steps} | {word: oracle[word] for word in words})
    told = remarks(session, key, plan)
    if not keep:
        session.ask(key, plan, {"do": "drop"})
    losses = mean_losses([a["losses"] for a in answers])
    verified = judged(session, plan, steps, oracle, answers, losses, against(plan))
    verified.note = "; ".join(filter(None, (verified.note, _note(session), *told)))
    return Proof(plan, session.program(plan).digest(), verified, losses)


def _in_band(session: Session, plan: Plan, steps: int, dtype: str, key: str) -> tuple[Verified, list[float]]:
    """Which update Hogwild loses is chance: its loss is held to what chance does to serial runs of several seeds."""
    seeds = range(session.spec.seed, session.spec.seed + 4)
    serial = [_late(session.oracle(plan, steps, dtype, seed=seed)["losses"]) for seed in seeds]
    session.setup(key, plan, dtype)
    losses = mean_losses([a["losses"] for a in session.ask(key, plan, {"do": "train", "steps": steps})])
    difference, limit = abs(_late(losses) / serial[0] - 1), MARGIN * (max(serial) - min(serial)) / serial[0]
    verified = Verified(
        against=f"loss band of {len(serial)} serial runs of {plan.dp} smaller steps",
        max_relative_difference=difference,
        tolerance=limit,
        passed=difference <= limit,
        where=None if difference <= limit else f"the mean loss of the last {(steps + 1) // 2} steps",
        note=_note(session),
    )
    return verified, losses


def _late(losses: list[float]) -> float:
    """Mean of the later half."""
    later = losses[len(losses) // 2 :]
    return sum(later) / len(later)


def prove_or_tell(session: Session, plan: Plan, steps: int, dtype: str, fault: str | None = None) -> Proof:
    """`prove`, with an error as a status instead of an exception."""
    try:
        return prove(session, plan, steps, dtype, fault)
    except ParaxisError as error:
        status, reason = failure(error)
        return Proof(plan, None, None, [], status, reason)


def against(plan: Plan) -> str:
    """What a plan is compared with."""
    return "serial run" if plan.exact else f"serial emulation of {plan.sync} over {plan.dp} replicas"


def steps_for(plan: Plan, steps: int, steps_per_epoch: int | None) -> int:
    """At least `steps`, and past the first agreement of replicas if that comes soon."""
    every = period(plan.sync, steps_per_epoch or 1)
    return max(steps, every + 2) if every <= 16 else steps


def tolerance(session: Session, plan: Plan, steps: int, dtype: str) -> float:
    """1e-10 in float64; in float32 a margin over what a mere change of the summation order does to the serial run."""
    if dtype == "float64":
        return EXACT64
    facts = session.known()
    plain = Plan() if plan.precision == "fp32" else Plan(precision=plan.precision, device=session.device(plan))
    # With statistics groups change the mathematics, another engine rounds within its sums, and what replicas tell each
    # other may be rounded once more, to one side or the other: there rounding is seen against float64.
    if facts.layout.statistics or session.spec.bn_group or plan.engine == "native" or plan.on_gpu() or not plan.exact:
        pair = session.oracle(plan, steps, "float32"), session.oracle(plan, steps, "float64")
    else:
        groups = next((g for g in (4, 2, 3, 5) if facts.batch % g == 0), 1)
        pair = session.oracle(plain, steps, dtype), session.oracle(plain, steps, dtype, groups=groups)
    words = {"do": "compare_files", "a": pair[0]["file"], "b": pair[1]["file"], "change": pair[0]["change"]}
    band: float = session.pool("solo").ask(words)[0]
    return max(MARGIN * band, 1e-6)


def _compare(
    session: Session, plan: Plan, steps: int, dtype: str, fault: str | None, key: str, oracle: dict[str, Any]
) -> tuple[float, str, list[float]]:
    session.setup(key, plan, dtype, fault)
    request = {"do": "prove", "steps": steps, "file": oracle["file"], "change": oracle["change"]}
    answers = session.ask(key, plan, request)
    losses = mean_losses([a["losses"] for a in answers])
    worst = max(answers, key=lambda a: math.inf if math.isnan(a["difference"]) else a["difference"])
    difference, where = worst["difference"], f"parameter {worst['where']} on rank {answers.index(worst)}"
    if len(losses) != len(oracle["losses"]):
        return math.inf, f"the number of losses ({len(losses)} for {len(oracle['losses'])} steps)", losses
    for number, (mine, theirs) in enumerate(zip(losses, oracle["losses"], strict=True)):
        apart = abs(mine - theirs) / max(abs(theirs), 1e-30)
        if not apart <= max(difference, 1e-12):
            difference, where = apart if math.isfinite(apart) else math.inf, f"the loss of step {number + 1}"
            break
    return difference, where, losses


def _first_difference(
    session: Session, plan: Plan, steps: int, dtype: str, fault: str | None, limit: float, found: tuple[float, str]
) -> str:
    """Repeat with fewer steps until the first one that differs is found; names its worst tensor."""
    for count in range(1, steps):
        oracle = session.oracle(plan, count, dtype)
        difference, where, _ = _compare(session, plan, count, dtype, fault, "search", oracle)
        session.ask("search", plan, {"do": "drop"})
        if not difference <= limit:
            return f"step {count}: {where} differs by {difference:.2g}"
    return f"step {steps}: {found[1]} differs by {found[0]:.2g}"


def mean_losses(parts: list[list[list[float]]]) -> list[float]:
    """Each step's mean loss from the (sum, weight) pairs of every rank that saw some of it."""
    rows = [part for part in parts if part]
    return [sum(p[0] for p in pairs) / max(sum(p[1] for p in pairs), 1e-30) for pairs in zip(*rows, strict=True)]


def remarks(session: Session, key: str, plan: Plan) -> list[str]:
    """What must be known of how a plan ran: ranks that say the same are named together."""
    if not plan.graphs:
        return []
    said: dict[str, list[int]] = {}
    for rank, own in enumerate(session.ask(key, plan, {"do": "remarks"})):
        for remark in own:
            said.setdefault(remark, []).append(rank)
    several = plan.mesh.size > 1
    return [f"{remark} (ranks {', '.join(map(str, at))})" if several else remark for remark, at in said.items()]


def _note(session: Session) -> str | None:
    facts = session.known()
    said = []
    if facts.switched_off:
        said.append(f"randomness that cannot be keyed was switched off: {', '.join(facts.switched_off)}")
    if facts.unkeyed:
        said.append(f"these modules draw random numbers that cannot be keyed: {', '.join(facts.unkeyed)}")
    if facts.random and not facts.switched_off:
        said.append("dropout on, masks keyed by the global sample")
    return "; ".join(said) or None
