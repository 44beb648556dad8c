"""The gradient noise scale: how large a batch may be before its gradient holds little that is new.

B_simple = tr(Sigma) / |G|^2 (McCandlish et al. 2018, appendix A.1): from squared gradient norms of two batch sizes
follow unbiased estimates of both terms at every step; they are averaged *separately*, for a mean of ratios is biased.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from paraxis.errors import TaskError
from paraxis.measure.critical import whole
from paraxis.measure.estimate import DRAWS, Estimate, between, estimate
from paraxis.measure.records import Record

WINDOWS = 3
BLOCKS = 20
FEWEST = 30  # steps


class NoiseWindow(Record):
    """The noise scale of some consecutive steps, [first, last)."""

    first: int
    last: int
    scale: Estimate


class NoiseScale(Record):
    """B_simple in samples over a whole run, and over its thirds: it grows while the network learns.

    `gradient` is the mean of |G|^2, `variance` that of tr(Sigma) of one sample; `small` and `large`: the batch sizes.
    """

    scale: Estimate
    windows: list[NoiseWindow]
    gradient: float
    variance: float
    small: int
    large: int
    steps: int
    sentence: str


def noise_terms(small: np.ndarray, large: np.ndarray, b: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(|G|^2, tr(Sigma)) of every step from squared norms of the gradients of `b` and of `batch` samples; unbiased."""
    squared = (batch * large - b * small) / (batch - b)
    variance = (small - large) / (1 / b - 1 / batch)
    return squared, variance


def noise_scale(small: Sequence[float], large: Sequence[float], b: int, batch: int, draws: int = DRAWS) -> NoiseScale:
    """From `small`, the mean squared norm of the microbatches' gradients (b samples), and `large`, the whole batch's.

    One entry a step, in order. Raises TaskError for batch sizes that are not apart and for too few steps.
    """
    if not 0 < b < batch:
        raise TaskError(f"the noise scale takes two batch sizes, the first smaller; not {b} and {batch}")
    if len(small) != len(large) or len(small) < FEWEST:
        raise TaskError(
            f"the noise scale takes {FEWEST} steps or more with both norms, not {len(small)} and {len(large)}"
        )
    squared, variance = noise_terms(np.asarray(small), np.asarray(large), b, batch)
    cuts = np.linspace(0, len(squared), WINDOWS + 1).astype(int)
    windows = [
        NoiseWindow(first=int(i), last=int(j), scale=_ratio(squared[i:j], variance[i:j], draws))
        for i, j in pairwise(cuts)
    ]
    scale = _ratio(squared, variance, draws)
    grows = f"it goes from {whole(windows[0].scale.value)} in the first third of the run to "
    grows += f"{whole(windows[-1].scale.value)} in the last"
    return NoiseScale(
        scale=scale,
        windows=windows,
        gradient=float(squared.mean()),
        variance=float(variance.mean()),
        small=b,
        large=batch,
        steps=len(squared),
        sentence=f"The gradient noise scale over the run is {between(scale, whole)} samples; {grows}.",
    )


def _ratio(squared: np.ndarray, variance: np.ndarray, draws: int) -> Estimate:
    """Ratio of the means, with an interval from resampling blocks of consecutive steps, which are not independent.

    Where the mean of |G|^2 is not above 0 the noise hides the gradient: the scale is then unbounded.
    """
    count = min(BLOCKS, len(squared))
    sums = np.array([(s.sum(), v.sum()) for s, v in _blocks(squared, variance, count)])
    rng = np.random.default_rng(len(squared))
    twins = sums[rng.integers(0, count, (draws, count))].sum(1)
    return estimate(float(_divide(sums.sum(0))), _divide(twins))


def _blocks(squared: np.ndarray, variance: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(np.array_split(squared, count), np.array_split(variance, count), strict=True))


def _divide(sums: np.ndarray) -> np.ndarray:
    above = sums[..., 0] > 0
    return np.where(above, np.maximum(sums[..., 1], 0.0) / np.where(above, sums[..., 0], 1.0), np.inf)
