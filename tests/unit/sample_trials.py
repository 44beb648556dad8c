"""Trials built by hand, as documents of studies: a pipeline with its theory, levels that are words, refusals."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from paraxis.study.bench import Outcome
from paraxis.study.conduct import conduct
from paraxis.study.definition import make
from paraxis.study.sampling import Sampled
from paraxis.study.trial import Factors

HOSTILE = "</script><script>alert(5)</script><b>how</b>"
MACHINE: dict[str, Any] = {
    "cpu": "AMD EPYC <i>",
    "usable_cores": 2,
    "memory_bytes": 2**33,
    "python": "3.11",
    "torch": "2.9",
    "system": "Linux",
    "foreign_cores": 0.25,
}
PIPELINE: dict[str, Any] = {
    "name": "pipes",
    "about": f"Bubbles {HOSTILE}",
    "repeats": 3,
    "measure": ["bubble", "step_seconds"],
    "fixed": {"network": "mlp", "plan": "pp=2,schedule={schedule},microbatches={microbatches},engine={engine}"},
    "factors": {"engine": ["native", "torch"], "schedule": ["gpipe", "1f1b"], "microbatches": [2, 4, 8]},
}
AVERAGING: dict[str, Any] = {
    "name": "often",
    "about": "How often replicas agree",
    "repeats": 5,
    "measure": ["final_accuracy", "step_seconds", "bytes"],
    "fixed": {"network": "mlp", "epochs": 1, "plan": "dp={workers},sync={sync},comm=mpi"},
    "grid": [
        {"title": HOSTILE, "factors": {"workers": [2, 4], "sync": ["gradient", "average@2", "average@8"]}},
        {"title": "one level", "factors": {"workers": [2]}, "fixed": {"sync": "average@4"}, "repeats": 1},
    ],
}
SCALING: dict[str, Any] = {
    "name": "more",
    "about": "Strong scaling",
    "repeats": 5,
    "measure": ["step_seconds"],
    "fixed": {"network": "mlp", "batch": 64, "plan": "dp={workers},engine=native"},
    "factors": {"workers": [1, 2]},
}


def perform(factors: Factors, repeat: int, measures: Collection[str]) -> Outcome:
    """Figures that follow from the factors; four workers that average every eighth step are refused."""
    if factors.get("sync") == "average@8" and factors.get("workers") == 4:
        return Outcome("refused", "no <b>such</b> plan", oversubscribed=True, machine=MACHINE)
    m, workers = int(factors.get("microbatches", 1)), int(factors.get("workers", 1))
    every = int(str(factors.get("sync", "@1")).partition("@")[2] or 1)
    bubble = 1 / (m + 1)
    found = {
        "step_seconds": (0.02 / workers + 0.001 * m) * (1 + 0.01 * repeat),
        "bubble": bubble + 0.08 + 0.01 * repeat,
        "bubble_uniform": bubble,
        "bubble_replayed": bubble + 0.05,
        "final_accuracy": 0.95 - 0.01 * every + 0.001 * repeat,
        "bytes": 4e6,
    }
    kept = {key: value for key, value in found.items() if key.startswith(tuple(measures))}
    series = {"step_seconds": [found["step_seconds"] * (1 + 0.02 * i) for i in range(5)]}
    over = workers > 2
    return Outcome("ok", None, Sampled(kept, series), plan="dp=1", oversubscribed=over, machine=MACHINE)


def document(values: dict[str, Any], folder: Path, budget: float = 1e9) -> dict[str, Any]:
    """What `--json` prints of a finished study."""
    return conduct(make(values), folder, budget, lambda what, fraction: None, perform)
