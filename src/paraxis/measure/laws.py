"""Laws of scaling over worker counts: Amdahl, Gustafson, Karp-Flatt, fitted with intervals, or refused with the reason.

Times come as seconds by round by worker count, as rounds were measured: what slows a whole round slows all its counts,
so rounds are resampled as wholes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np

from paraxis.measure.estimate import DRAWS, Estimate, between, estimate, median_of, slope
from paraxis.measure.records import Record

Samples = Mapping[int, Mapping[int, float]]  # workers -> round -> seconds of a step
FEWEST = 3  # worker counts: two say nothing against a law of two parameters
FLOOR = 0.01  # relative; no clock and no machine is held to less
SOURCES = {
    "amdahl": "G. M. Amdahl 1967, Validity of the single processor approach",
    "gustafson": "J. L. Gustafson 1988, Reevaluating Amdahl's law",
    "karp-flatt": "A. H. Karp and H. P. Flatt 1990, Measuring parallel processor performance",
}
Trend = Literal["rising", "falling", "constant"]


class AtCount(Record):
    """One worker count: its speed-up over one worker, and Karp and Flatt's serial fraction (null for one worker)."""

    workers: int
    seconds: Estimate
    speedup: Estimate
    karp_flatt: Estimate | None = None


class Law(Record):
    """What a law says of some worker counts; `refusal` says why it says nothing.

    `serial` is the fraction s. `residual` is the root mean square of log(time / law) over the counts, `spread` that of
    the half-widths of their own 95% intervals. `trend` is of Karp and Flatt's fraction over the counts.
    """

    law: Literal["amdahl", "gustafson"]
    source: str
    counts: list[AtCount]
    left_out: list[int]  # more workers than usable cores
    serial: Estimate | None = None
    limit: Estimate | None = None  # the speed-up that Amdahl's law never exceeds, 1 / s
    residual: float | None = None
    spread: float | None = None
    trend: Trend | None = None
    refusal: str | None = None
    sentence: str


def amdahl(samples: Samples, usable_cores: int, draws: int = DRAWS) -> Law:
    """Strong scaling, the same work for every count: S = 1 / (s + (1 - s) / N), with Karp-Flatt beside it.

    Fitted as time = a + c / N (a serial, c shared work, neither negative) by least squares of relative errors.
    """
    rounds = _rounds(samples, usable_cores, draws)
    counts, times = rounds.counts, rounds.times
    if rounds.headless():
        return _refused("amdahl", rounds, [], rounds.headless())
    speedups, speedup_twins = times[0] / times, rounds.twins[:, :1] / rounds.twins
    fraction, fraction_twins = (karp_flatt(s[..., 1:], counts[1:]) for s in (speedups, speedup_twins))
    points = rounds.points(speedups, speedup_twins)
    for index, point in enumerate(points[1:]):
        point.karp_flatt = estimate(float(fraction[index]), fraction_twins[:, index])
    if rounds.too_few():
        return _refused("amdahl", rounds, points, rounds.too_few())
    serial, fitted = _amdahl(counts, times[None])
    twins, _ = _amdahl(counts, rounds.twins)
    tilt = estimate(float(slope(counts[1:], fraction)), slope(counts[1:], fraction_twins))
    trend: Trend = "rising" if tilt.low > 0 else "falling" if tilt.high < 0 else "constant"
    residual, spread = _misfit(times, fitted[0], rounds.twins)
    law = Law(
        law="amdahl",
        source=f"{SOURCES['amdahl']}; {SOURCES['karp-flatt']}",
        counts=points,
        left_out=rounds.left_out,
        residual=residual,
        spread=spread,
        trend=trend,
        sentence="",
    )
    if residual > max(spread, FLOOR):
        why = f"it misses the times by {residual:.1%}, their own spread is {spread:.1%}"
        said = f"Amdahl's law does not describe this: {why}. {_diagnosis(points, trend)}"
        return law.model_copy(update={"refusal": why, "sentence": said + rounds.aside()})
    law.serial = estimate(float(serial[0]), twins)
    with np.errstate(divide="ignore"):
        law.limit = estimate(float(1 / np.float64(serial[0])), 1 / twins)
    top = f"at most {_times(law.limit.value)} times" if isfinite(law.limit.value) else "no bound on the speed-up"
    said = f"Amdahl's law: a serial part of {between(law.serial, _percent)}, so {top} however many workers."
    return law.model_copy(update={"sentence": f"{said} {_diagnosis(points, trend)}{rounds.aside()}"})


def gustafson(samples: Samples, usable_cores: int, draws: int = DRAWS) -> Law:
    """Weak scaling, each worker with work of its own: S = N - s (N - 1), where S = N x (time of one / time of N).

    Fitted as efficiency = 1 - s (N - 1) / N by least squares.
    """
    rounds = _rounds(samples, usable_cores, draws)
    counts, times = rounds.counts, rounds.times
    if rounds.headless():
        return _refused("gustafson", rounds, [], rounds.headless())
    speedups, speedup_twins = counts * times[0] / times, counts * rounds.twins[:, :1] / rounds.twins
    points = rounds.points(speedups, speedup_twins)
    if rounds.too_few():
        return _refused("gustafson", rounds, points, rounds.too_few())
    share = (counts - 1) / counts

    def fit(s: np.ndarray) -> np.ndarray:
        return np.asarray(((1 - s / counts) * share).sum(-1) / (share**2).sum())

    serial = float(fit(speedups))
    residual, spread = _misfit(times, times[0] / (1 - serial * share), rounds.twins / rounds.twins[:, :1] * times[0])
    law = Law(
        law="gustafson",
        source=SOURCES["gustafson"],
        counts=points,
        left_out=rounds.left_out,
        residual=residual,
        spread=spread,
        sentence="",
    )
    if residual > max(spread, FLOOR):
        why = f"it misses the times by {residual:.1%}, their own spread is {spread:.1%}"
        said = f"Gustafson's law does not describe this: {why}; what workers lose is no fixed share of a step."
        return law.model_copy(update={"refusal": why, "sentence": said + rounds.aside()})
    law.serial = estimate(serial, fit(speedup_twins))
    said = f"Gustafson's law: {between(law.serial, _percent)} of a step does not grow with the workers; "
    most = rounds.counts[-1]
    said += f"{most:.0f} of them do {_times(float(speedups[-1]))} times the work of one in its time."
    return law.model_copy(update={"sentence": said + rounds.aside()})


def karp_flatt(speedup: np.ndarray, workers: np.ndarray) -> np.ndarray:
    """The experimentally determined serial fraction e = (1/S - 1/N) / (1 - 1/N), for N above 1."""
    return np.asarray((1 / speedup - 1 / workers) / (1 - 1 / workers))


@dataclass(frozen=True)
class _Rounds:
    """Worker counts that can be used, their median times, and the resampled twins of these (draws, counts)."""

    cores: int
    left_out: list[int]
    counts: np.ndarray
    times: np.ndarray
    twins: np.ndarray

    def too_few(self) -> str:
        """Why no law can be fitted, or ""."""
        if len(self.counts) >= FEWEST:
            return ""
        got = ", ".join(f"{n:.0f}" for n in self.counts) or "none"
        return f"a law takes {FEWEST} worker counts within the {self.cores} usable cores; there are {got}"

    def headless(self) -> str:
        """Why there is no speed-up to speak of, or ""."""
        if not len(self.counts):
            return self.too_few()
        fewest = self.counts[0]
        return "" if fewest == 1 else f"a law takes one worker to compare with; the fewest here are {fewest:.0f}"

    def aside(self) -> str:
        """A sentence about what was left out, or ""."""
        some = ", ".join(map(str, self.left_out))
        return f" Left out, being more workers than the {self.cores} usable cores: {some}." if some else ""

    def points(self, speedups: np.ndarray, twins: np.ndarray) -> list[AtCount]:
        """Every count with its time and speed-up."""
        return [
            AtCount(
                workers=int(n),
                seconds=estimate(float(self.times[i]), self.twins[:, i]),
                speedup=estimate(float(speedups[i]), twins[:, i]),
            )
            for i, n in enumerate(self.counts)
        ]


def _rounds(samples: Samples, usable_cores: int, draws: int) -> _Rounds:
    kept = sorted(n for n in samples if n <= usable_cores and samples[n])
    return _Rounds(
        cores=usable_cores,
        left_out=sorted(n for n in samples if n > usable_cores),
        counts=np.array(kept, dtype=float),
        times=np.array([float(np.median(list(samples[n].values()))) for n in kept]),
        twins=_twins([samples[n] for n in kept], draws) if kept else np.zeros((draws, 0)),
    )


def _twins(by_count: Sequence[Mapping[int, float]], draws: int) -> np.ndarray:
    """Medians of resampled rounds, the same rounds for every count; each by itself where they share too few."""
    rng = np.random.default_rng(len(by_count))
    shared = sorted(set.intersection(*(set(rounds) for rounds in by_count)))
    if len(shared) >= 5:
        picked = rng.integers(0, len(shared), (draws, len(shared)))
        columns = [np.array([rounds[r] for r in shared])[picked] for rounds in by_count]
    else:
        columns = [
            np.array(list(rounds.values()))[rng.integers(0, len(rounds), (draws, len(rounds)))] for rounds in by_count
        ]
    return np.stack([median_of(column) for column in columns], 1)


def _amdahl(counts: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(s, fitted times) of rows of times (n, k): weighted least squares in a and c, neither below 0."""
    one, share = 1 / times, 1 / counts / times  # of errors relative to the time
    aa, ac, cc = (one * one).sum(1), (one * share).sum(1), (share * share).sum(1)
    ya, yc = one.sum(1), share.sum(1)
    determinant = aa * cc - ac**2
    a, c = (ya * cc - yc * ac) / determinant, (yc * aa - ya * ac) / determinant
    a, c = np.where(c < 0, ya / aa, a), np.where(a < 0, yc / cc, c)
    a, c = np.maximum(a, 0.0), np.maximum(c, 0.0)
    return a / (a + c), a[:, None] + c[:, None] / counts


def _misfit(times: np.ndarray, fitted: np.ndarray, twins: np.ndarray) -> tuple[float, float]:
    """(rms of log(time / fitted), rms of the half-widths of the times' intervals), both relative."""
    low, high = np.quantile(twins, (0.025, 0.975), axis=0)
    residual = np.sqrt(np.mean(np.log(times / fitted) ** 2))
    return float(residual), float(np.sqrt(np.mean((np.log(high / low) / 2) ** 2)))


def _diagnosis(points: list[AtCount], trend: Trend) -> str:
    """Karp and Flatt's reading of their fraction over the counts."""
    values = ", ".join(f"{p.karp_flatt.value:.1%} at {p.workers}" for p in points if p.karp_flatt)
    readings = {
        "rising": "it rises with the workers, so what they lose is communication or contention that grows with them",
        "constant": "it does not change with the workers, so what they lose is a serial part",
        "falling": "it falls with the workers, so part of what one cannot share is shared by more",
    }
    reading = readings[trend]
    if all(p.karp_flatt.high < 0 for p in points if p.karp_flatt):
        reading = "it is below 0, so workers gain more than their number, as by more cache than one has"
    return f"Karp and Flatt's serial fraction is {values}: {reading}."


def _refused(law: Literal["amdahl", "gustafson"], rounds: _Rounds, points: list[AtCount], why: str) -> Law:
    """No law; speed-ups, and Karp and Flatt's fraction at a count, need none."""
    said = f"{law.capitalize()}'s law is not fitted: {why}.{rounds.aside()}"
    for p in points:
        if p.workers > 1:
            said += f" {p.workers} workers: speed-up {between(p.speedup, _ratio)}"
            said += f", Karp and Flatt's serial fraction {between(p.karp_flatt, _percent)}." if p.karp_flatt else "."
    return Law(law=law, source=SOURCES[law], counts=points, left_out=rounds.left_out, refusal=why, sentence=said)


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _percent(fraction: float) -> str:
    return f"{fraction:.1%}"


def _times(factor: float) -> str:
    return f"{factor:.1f}" if factor < 100 else f"{factor:,.0f}"
