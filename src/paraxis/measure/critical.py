"""Steps to a target against batch size: the hyperbola steps = s_min (1 + B_crit / B), and its three regimes.

The form is that of McCandlish et al. 2018 (An Empirical Model of Large-Batch Training, equation 2.11, written for
steps); the regimes are those of Shallue et al. 2019 (Measuring the Effects of Data Parallelism).
"""

from collections.abc import Sequence
from math import inf, isfinite

import numpy as np
from pydantic import Field

from paraxis.measure.estimate import DRAWS, Estimate, between, estimate, median_of
from paraxis.measure.records import Record

FEWEST = 4  # batch sizes, for two parameters and a residual
WASTE = 4.0  # B_crit / 4 and 4 B_crit bound the regimes: 25% more samples, or steps, than the fewest possible
GRID = 600  # values of B_crit tried before the best is refined


class Tried(Record):
    """One trial of a learning rate: steps to the target, null where it was not reached within `limit`."""

    lr: float
    steps: float | None
    limit: int


class Point(Record):
    """One batch size: the learning rate found best, and the steps that each seed took with it (null: not reached)."""

    batch: int
    lr: float
    steps: list[float | None]
    searched: list[Tried] = Field(default_factory=list)
    widened: int = 0  # learning rates added because the best stood at the edge
    at_edge: bool = False  # it still does: what the search was allowed is used up

    @property
    def median(self) -> float:
        """Median steps over the seeds; infinite where most have not reached the target."""
        return float(median_of(np.array([inf if s is None else s for s in self.steps]))) if self.steps else inf


class Critical(Record):
    """The fit: least steps, least samples and critical batch size; `refusal` says why there is none.

    `perfect` and `flat` are the batch sizes up to and from which scaling is perfect and maximal; the measured batch
    sizes of each regime are in `regimes`. `misfit` is the root mean square of log(median / curve).
    """

    b_crit: Estimate | None = None
    least_steps: Estimate | None = None
    least_samples: Estimate | None = None
    misfit: float | None = None
    perfect: float | None = None
    flat: float | None = None
    regimes: dict[str, list[int]] = Field(default_factory=dict)
    left_out: list[int] = Field(default_factory=list)
    refusal: str | None = None
    sentence: str

    def steps(self, batch: float) -> float:
        """The curve."""
        assert self.b_crit and self.least_steps
        return self.least_steps.value * (1 + self.b_crit.value / batch)


def fit_critical(points: Sequence[Point], draws: int = DRAWS) -> Critical:
    """Fit the medians in logarithms.

    A draw resamples the seeds of every batch size and the batch sizes themselves, so that what the curve cannot follow
    widens the interval, too.
    """
    used = [p for p in points if isfinite(p.median)]
    left_out = [p.batch for p in points if not isfinite(p.median)]
    if len({p.batch for p in used}) < FEWEST:
        few = f"{len(used)} batch sizes reached the target; a critical batch size takes {FEWEST} or more"
        return Critical(refusal=few, left_out=left_out, sentence=f"No critical batch size: {few}.")
    batches = np.array([p.batch for p in used], dtype=float)
    logs = np.log([p.median for p in used])
    crit, least, residual, inside = _hyperbola(batches, logs[None], np.ones((1, len(used))))
    if not inside[0]:
        side = "smaller" if crit[0] < batches.min() else "larger"
        why = f"all batch sizes are in one regime; the bend needs {side} ones"
        return Critical(refusal=why, left_out=left_out, sentence=f"No critical batch size: {why}.")
    twins = _twins(used, batches, draws)
    b_crit, least_steps = estimate(crit[0], twins[0]), estimate(least[0], twins[1])
    least_samples = estimate(crit[0] * least[0], twins[0] * twins[1])
    perfect, flat = crit[0] / WASTE, crit[0] * WASTE
    regimes = {
        "perfect scaling": [p.batch for p in used if p.batch <= perfect],
        "diminishing returns": [p.batch for p in used if perfect < p.batch < flat],
        "maximal data parallelism": [p.batch for p in used if p.batch >= flat],
    }
    found = Critical(
        b_crit=b_crit,
        least_steps=least_steps,
        least_samples=least_samples,
        misfit=float(residual[0]),
        perfect=perfect,
        flat=flat,
        regimes=regimes,
        left_out=left_out,
        sentence="",
    )
    return found.model_copy(update={"sentence": _sentence(found)})


def _hyperbola(
    batches: np.ndarray, logs: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(B_crit, s_min, rms residual, whether the best is within the grid), each (n,), of n rows of log steps (n, k).

    For a given B_crit the best log s_min is a mean, so one parameter is searched: on a grid, then by a parabola.
    """
    grid = np.linspace(np.log(batches.min() / 64), np.log(batches.max() * 64), GRID)
    shape = np.log1p(np.exp(grid)[:, None] / batches)  # (grid, k)
    total = weights.sum(1)
    # The weighted variance of logs - shape, expanded, so that no array of n x grid x k is made.
    mean = (weights @ shape.T * -1 + (weights * logs).sum(1)[:, None]) / total[:, None]
    square = (weights * logs**2).sum(1)[:, None] - 2 * (weights * logs) @ shape.T + weights @ (shape**2).T
    loss = np.maximum(square / total[:, None] - mean**2, 0.0)
    best = loss.argmin(1)
    inside = (best > 0) & (best < GRID - 1)
    middle = best.clip(1, GRID - 2)
    rows = np.arange(len(logs))
    left, here, right = (loss[rows, middle + d] for d in (-1, 0, 1))
    bend = left - 2 * here + right
    shift = np.where(bend > 0, (left - right) / (2 * np.where(bend > 0, bend, 1.0)), 0.0).clip(-1, 1)
    refined = np.where(inside, grid[middle] + shift * (grid[1] - grid[0]), grid[best])
    exact = logs - np.log1p(np.exp(refined)[:, None] / batches)
    least = (weights * exact).sum(1) / total
    rms = np.sqrt((weights * (exact - least[:, None]) ** 2).sum(1) / total)
    return np.exp(refined), np.exp(least), rms, inside


def _twins(used: list[Point], batches: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """B_crit and s_min of every draw; where a draw holds no bend its end of the grid stands for infinity or nothing."""
    rng = np.random.default_rng(len(used))
    columns = []
    for p in used:
        steps = np.array([inf if s is None else s for s in p.steps])
        columns.append(median_of(steps[rng.integers(0, len(steps), (draws, len(steps)))]))
    medians = np.stack(columns, 1)
    weights = rng.multinomial(len(used), np.full(len(used), 1 / len(used)), draws) * np.isfinite(medians)
    logs = np.log(np.where(np.isfinite(medians), medians, 1.0))
    enough = (weights > 0).sum(1) >= 3
    crit, least, _, inside = _hyperbola(batches, logs[enough], weights[enough].astype(float))
    beyond = ~inside & (crit > batches.max())
    return np.where(beyond, inf, np.where(inside, crit, 0.0)), np.where(beyond, 0.0, least)


def _sentence(c: Critical) -> str:
    assert c.b_crit and c.least_steps and c.misfit is not None and c.perfect and c.flat
    parts = [
        f"The critical batch size is {between(c.b_crit, whole)}: up to {whole(c.perfect)} samples twice the batch "
        f"takes half the steps, from {whole(c.flat)} on as many, and never fewer than {whole(c.least_steps.value)}."
    ]
    if c.misfit > 0.15:
        parts.append(f"The curve misses the medians by {c.misfit:.0%}: it is a summary, not a law, here.")
    empty = [name for name, batches in c.regimes.items() if not batches]
    if empty:
        parts.append(f"No batch size of the study lies in {' or '.join(empty)}: that part is extrapolated.")
    if c.left_out:
        parts.append(f"Not reached within the limit: batch {', '.join(map(str, c.left_out))}.")
    return " ".join(parts)


def whole(number: float) -> str:
    """A count as people read it: two significant digits above a hundred."""
    if not isfinite(number):
        return "no bound" if number > 0 else "0"
    return f"{float(f'{number:.2g}'):,.0f}" if number >= 100 else f"{number:.0f}"
