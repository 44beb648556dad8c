"""The record of a batch-size study: what was searched, what was found, and the noise scale beside it."""

from math import isfinite
from typing import Any

from paraxis.measure.critical import Critical, Point, whole
from paraxis.measure.estimate import between
from paraxis.measure.noise import NoiseScale
from paraxis.measure.records import Record


class BatchSizes(Record):
    """A study with its parameters, as they were fixed before the first trial."""

    parameters: dict[str, Any]
    points: list[Point]
    critical: Critical
    noise: NoiseScale | None = None
    finished: bool
    notes: list[str]
    sentence: str


def compared(critical: Critical, noise: NoiseScale | None) -> str:
    """The noise scale beside the critical batch size, in a sentence; "" where one of them is missing."""
    if noise is None or critical.b_crit is None:
        return ""
    crit, scale = critical.b_crit, noise.scale
    last = noise.windows[-1].scale
    if scale.low <= crit.high and crit.low <= scale.high:
        verdict = "and the two intervals overlap"
    elif isfinite(scale.value) and scale.value > 0:
        factor = max(crit.value / scale.value, scale.value / crit.value)
        side = "below" if scale.value < crit.value else "above"
        verdict = f"a factor of {factor:.1f} {side} the critical batch size"
    else:
        verdict = "which is no bound"
    grows = f"; in the last third of the run it is {whole(last.value)}" if isfinite(last.value) else ""
    return f"The gradient noise scale, measured beside it, is {between(scale, whole)}, {verdict}{grows}."
