"""The proof of a plan in mixed precision: held to the serial run in that precision, and to what rounding does there.

How far rounding alone takes two runs apart is measured: the serial run is made once more with its sums in another
order, that of the plan (its slices of the batch one after the other, the sums of its layers in as many parts as ranks
share them). Each tensor has a band of its own, relative to how far it has moved, and so have the losses: a tensor whose
true gradient is zero, which Adam moves by mere noise, widens no other's. Of each tensor the few elements that lie
furthest apart are left out, for where a gradient is nearly zero rounding decides its sign.
"""

import math
from dataclasses import dataclass
from typing import Any

from paraxis.errors import RankError
from paraxis.measure.records import Verified
from paraxis.plan.plan import Plan
from paraxis.session import Session

MARGIN = 4.0  # how far beyond the measured band a run may lie
UNIT = {"bf16": 2.0**-9, "fp16": 2.0**-12}  # what rounding one number does at most, relative
LEAST = 1 / 16  # of that: a loss, which is a mean over samples, has no narrower band


@dataclass(frozen=True)
class Bands:
    """How far two serial runs lie apart, in one precision with sums in two orders; relative to what has changed.

    `tensors`: of each one, `whole`: of all together, below which no tensor's is; `losses`: the furthest of all steps.
    """

    tensors: dict[str, float]
    whole: float
    losses: float

    def furthest(self, ranks: list[dict[str, float]], losses: float, tp: int) -> tuple[float, float, str]:
        """(how far, its limit, what) of what lies furthest out of its band: a tensor, or the losses.

        `tp` ranks in a row have parts of the same tensors, of which the band is that of the whole.
        """
        found = [(losses, MARGIN * self.losses, "the loss")]
        for first in range(0, len(ranks), tp):
            for name in ranks[first]:
                apart = math.sqrt(sum(own[name] ** 2 for own in ranks[first : first + tp]) / tp)
                limit = MARGIN * max(self.tensors[name], self.whole)
                found.append((apart, limit, f"parameter {name} on rank {first}"))
        return max(found, key=lambda own: math.inf if math.isnan(own[0]) else own[0] / own[1])


def measured(session: Session, plan: Plan, steps: int, oracle: dict[str, Any]) -> Bands:
    """The bands for a plan, whose serial run is `oracle`."""
    fixed = session.known().layout.statistics or session.spec.bn_group  # groups of samples belong to the mathematics
    slices = plan.microbatches * (plan.dp if plan.exact else 1)
    share = session.known().batch // (1 if plan.exact else plan.dp)
    groups = 0 if fixed else slices if slices > 1 else next((g for g in (4, 2, 3, 5) if share % g == 0), 1)
    parts = plan.tp if plan.tp > 1 else 2 if groups in (0, 1) else 1
    other = session.oracle(plan, steps, "float32", groups=groups, parts=parts)
    words = {"do": "bands", "a": other["file"], "b": oracle["file"], "moved": oracle["moved"]}
    found = session.pool("solo").ask(words)[0]
    apart = losses_apart(other["losses"], oracle["losses"])
    return Bands(found[0], found[1], max(apart, LEAST * UNIT[plan.precision]))


def losses_apart(mine: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two runs' losses; infinite if they are not as many."""
    if len(mine) != len(theirs):
        return math.inf
    found = [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(mine, theirs, strict=True)]
    return max((own if math.isfinite(own) else math.inf for own in found), default=math.inf)


def judged(
    session: Session,
    plan: Plan,
    steps: int,
    oracle: dict[str, Any],
    answers: list[Any],
    losses: list[float],
    against: str,
) -> Verified:
    """The verdict on what ranks have answered to `prove`; raises RankError where serial steps were all skipped."""
    taken = steps - oracle["skipped"]
    if taken <= 0:
        raise RankError(
            f"the serial run in {plan.precision} has skipped all of {steps} steps, whose scaled gradients overflowed: "
            "prove it over more steps, or take precision=bf16"
        )
    bands = measured(session, plan, steps, oracle)
    apart, limit, what = bands.furthest([a["apart"] for a in answers], losses_apart(losses, oracle["losses"]), plan.tp)
    where = None if apart <= limit else f"step {steps}: {what} differs by {apart:.2g}"
    skips = {a["skipped"] for a in answers}
    if skips != {oracle["skipped"]}:
        apart, where = math.inf, f"step {steps}: ranks have skipped {skips} steps, the serial run {oracle['skipped']}"
    return Verified(
        against=f"{against} in {plan.precision}",
        max_relative_difference=apart if math.isfinite(apart) else None,
        tolerance=limit,
        passed=where is None,
        where=where,
        note=_note(plan, taken, steps),
    )


def _note(plan: Plan, taken: int, steps: int) -> str:
    skipped = f"; {steps - taken} of {steps} steps skipped, by both" if taken < steps else ""
    return (
        f"proved in {plan.precision} with float32 weights, each tensor within {MARGIN:g} times what another order of "
        f"the serial run's sums makes of it{skipped}"
    )
