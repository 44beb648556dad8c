"""Laws of scaling from the trials of a study that varies `workers`.

Amdahl where the global batch stays, Gustafson where it grows with the workers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from paraxis.measure.laws import Law, amdahl, gustafson
from paraxis.study.trial import Factors, Trial


@dataclass
class Series:
    """Step times by round (the trial's repeat) by worker count, all else equal; `factors` is what is equal."""

    factors: Factors
    seconds: dict[int, dict[int, float]] = field(default_factory=dict)


def laws(trials: Iterable[Trial], usable_cores: int) -> list[tuple[Factors, Law]]:
    """(what is equal, the law) of every series with two worker counts or more; laws that are refused say why.

    Strong scaling holds the global batch, weak scaling the batch of a worker, which then stands as `batch_per_worker`.
    """
    timed = [t for t in trials if _workers(t) and 0 < (t.measures.get("step_seconds") or 0) < inf]
    strong = _grouped(timed, lambda t: {k: v for k, v in t.factors.items() if k != "workers"})
    weak = _grouped(timed, _per_worker)
    found = [(s.factors, amdahl(s.seconds, usable_cores)) for s in strong if len(s.seconds) > 1]
    return found + [(s.factors, gustafson(s.seconds, usable_cores)) for s in weak if len(s.seconds) > 1]


def _workers(trial: Trial) -> int:
    count = trial.factors.get("workers")
    return count if trial.status == "ok" and isinstance(count, int) and count > 0 else 0


def _per_worker(trial: Trial) -> Factors | None:
    batch, workers = trial.factors.get("batch"), _workers(trial)
    if not isinstance(batch, int) or batch % workers:
        return None
    rest = {k: v for k, v in trial.factors.items() if k not in ("workers", "batch")}
    return rest | {"batch_per_worker": batch // workers}


def _grouped(trials: Iterable[Trial], key: Any) -> list[Series]:
    """Series in the order of their first trial."""
    found: dict[str, Series] = {}
    for trial in trials:
        same = key(trial)
        if same is None:
            continue
        series = found.setdefault(repr(sorted(same.items())), Series(same))
        seconds = trial.measures["step_seconds"]
        assert seconds is not None
        series.seconds.setdefault(_workers(trial), {})[trial.repeat] = seconds
    return list(found.values())
