"""--memory-limit on real ranks: what does not fit is refused with the numbers, and what fits trains."""

from typing import Any

import pytest

WIDE = "mlp:784-1024-1024-10"
LIMIT = ("--memory-limit", "18M")


@pytest.mark.slow
def test_a_plan_that_fits_trains_and_one_that_does_not_is_told_which_would(desk: Any) -> None:
    """Undivided, this network needs 23 MB in every rank; either half of it, 14 at most."""
    done = desk.run("train", WIDE, "--plan", "dp=2,comm=gloo", "--steps", 2, *LIMIT)
    done.refused("dp=2,comm=gloo needs 23 MB a rank (parameters 7.5, gradients 7.5, optimizer 7.5, activations 0.5")
    done.refused("more than the limit of 18 MB; ", "would need 1")
    done = desk.run("train", WIDE, "--plan", "pp=2,microbatches=4,comm=gloo", "--steps", 2, *LIMIT, "--json")
    assert done.rc == 0, done.err
    memory = done.document["computed_memory"]
    parts = ("parameters", "gradients", "optimizer", "activations", "communication")
    assert memory["total"] == sum(memory[part] for part in parts) < 18e6 and len(done.document["losses"]) == 2


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_best_is_a_plan_that_fits_and_the_others_tell_their_numbers(desk: Any) -> None:
    done = desk.run("explore", WIDE, "--engine", "torch", "--workers", 2, "--budget", 120, *LIMIT, "--json", limit=300)
    assert done.rc == 0, done.err
    results = done.document["results"]
    for r in results:
        whole = r["mesh"]["pp"] * r["mesh"]["tp"] == 1 and "zero=3" not in r["plan"] and "zero=2" not in r["plan"]
        if whole and "zero=1" not in r["plan"]:
            assert r["status"] == "refused" and "more than the limit of 18 MB" in r["reason"], r["plan"]
            assert r["computed_memory"]["total"] > 18e6
        elif r["status"] == "ok":
            assert r["computed_memory"]["total"] <= 18e6
    best = done.document["recommendation"]["plan"]
    assert "pp=2" in best or "zero=" in best
    done = desk.run("train", WIDE, "--plan", "best", "--steps", 2, *LIMIT, "--json")
    assert done.rc == 0 and done.document["plan"] == best, done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan, limit, why",
    [
        ("tp=2,comm=gloo", "18M", ""),
        ("dp=2,engine=native", "18M", "needs 20 MB a rank (parameters 3.7, gradients 7.5, optimizer 7.5"),
        ("pp=2,microbatches=4,engine=native,comm=mpi", "30M", ""),
        ("dp=2,comm=gloo,precision=bf16", "24M", "optimizer 7.5, activations 2.5)"),  # of weights in 16 bits
        ("tp=2,comm=gloo,precision=fp16", "18M", ""),
        ("dp=2,sync=diloco@4,comm=gloo", "40M", "needs 45 MB a rank (parameters 7.5, gradients 7.5, optimizer 30"),
    ],
)
def test_every_engine_and_axis_is_computed(desk: Any, plan: str, limit: str, why: str) -> None:
    done = desk.run("train", WIDE, "--plan", plan, "--steps", 2, "--memory-limit", limit, "--json")
    if why:
        done.refused(why, f"more than the limit of {limit[:-1]} MB")
    else:
        assert done.rc == 0 and done.document["computed_memory"]["total"] < float(limit[:-1]) * 1e6, done.err
