"""`gpt` on the native engine: threads and ranks of processes compute what plain serial code computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_native import apart, in_float32, native, native_ranks, outcome_of, ran, team_of
from test_reference import EXACT, STEPS, WRONG, Outcome, difference, emulated, task, wanted

from paraxis.plan.plan import Plan, parse
from paraxis.proof import MARGIN
from paraxis.task.spec import TaskSpec

NETWORKS = {"tiny": "gpt:2-12-2-5", "wide": "gpt:3-24-3-37,dropout=0.2"}  # contexts that are no multiple of LANES
PLANS = [
    *map(native, ("serial", "microbatches=2", "dp=2", "dp=4", "dp=2,microbatches=2", "dp=2,gradients=owner")),
    *map(native, ("pp=2", "pp=4,microbatches=2", "pp=3,schedule=gpipe,microbatches=4", "pp=2,split=3+1")),
    *map(native, ("dp=2,pp=2,microbatches=2", "dp=2,pp=3", "dp=2,sync=average@2", "dp=2,pp=2,sync=average@2")),
    *map(native, ("tp=2", "tp=3", "dp=2,tp=2", "pp=2,tp=2,microbatches=2", "dp=2,pp=2,tp=2")),
]
FEW = [
    native(plan) for plan in ("serial", "dp=2", "dp=2,gradients=owner", "pp=3,microbatches=2", "dp=2,pp=2", "dp=2,tp=2")
]
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "clip": {"optimizer": "sgd", "lr": 0.5, "momentum": 0.8, "clip": 0.2, "weight_decay": 0.01},
}
CASES = [("tiny", "adamw", plan) for plan in PLANS] + [("wide", "clip", plan) for plan in FEW]
CASES += [("tiny", "clip", native(plan)) for plan in ("dp=4", "dp=2,pp=3", "pp=4,microbatches=2", "pp=2,tp=2")]


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    """Some 4000 bytes, of which one follows from those before."""
    path = folder / "squares.txt"
    path.write_text(" ".join(str(n * n) for n in range(700)))
    return f"text:{path}"


def spec_named(text: str, name: str, **more: Any) -> TaskSpec:
    return TaskSpec(**({"network": NETWORKS[name], "data": text, "batch": 8, "lr": 0.02, "validation": 0.2} | more))


@pytest.mark.parametrize("name, kind, plan", CASES, ids=lambda v: v if isinstance(v, str) else v.short())
def test_every_native_plan_computes_what_the_serial_run_computes(name: str, kind: str, plan: Plan, text: str) -> None:
    spec = spec_named(text, name, **KINDS[kind])
    found = ran(spec, plan)
    assert difference(spec, plan, found) < EXACT
    assert found.states[0].keys() == wanted(spec, plan)[0].states[0].keys()
    assert torch.equal(found.states[0]["wte.weight"], found.states[0]["lm_head.weight"])


@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_worth_comparing(name: str, text: str) -> None:
    right, change = emulated(spec_named(text, name), 1, 1, 1)
    assert change > 1e-3 and len(set(right.losses)) == STEPS and right.losses[-1] < 0.9 * right.losses[0]
    assert difference(spec_named(text, name), Plan(), ran(spec_named(text, name, seed=1), FEW[0])) > WRONG


@pytest.mark.parametrize("fault", ["all-data", "lost-update", "swapped-microbatch", "lost-backward", "untied"])
def test_a_spoiled_program_fails_the_comparison(fault: str, text: str) -> None:
    spec, plan = spec_named(text, "tiny"), native("dp=2,pp=2,microbatches=2")
    assert difference(spec, plan, ran(spec, plan, fault)) > WRONG


RANKS = [
    ("dp=4,microbatches=2", 1),
    ("pp=4", 1),
    ("dp=2,pp=3", 1),
    ("dp=2,sync=average@2", 1),
    ("pp=2,microbatches=2", 2),
]


@pytest.mark.parametrize("plan, threads", RANKS)
def test_ranks_of_processes_compute_the_same(plan: str, threads: int, text: str) -> None:
    spec, own = spec_named(text, "tiny", **KINDS["clip"]), parse(f"{plan},engine=native,comm=mpi,threads={threads}")
    assert difference(spec, own, outcome_of(native_ranks(spec, own))) < EXACT
    if own.pp > 1:
        assert difference(spec, own, outcome_of(native_ranks(spec, own, "untied"))) > WRONG


@pytest.mark.parametrize("plan", [native("pp=2,microbatches=2"), native("dp=2,pp=3")], ids=Plan.short)
def test_a_tied_weight_counts_once_in_the_norm(plan: Plan, text: str) -> None:
    """What the copies would make of the norm is seen: the gradient is clipped in every step."""
    settings = KINDS["clip"] | {"momentum": 0.0}
    spec = spec_named(text, "tiny", **settings)
    assert difference(spec, plan, ran(spec, plan)) < EXACT
    assert difference(spec_named(text, "tiny", **settings | {"clip": None}), plan, ran(spec, plan)) > WRONG


@pytest.mark.parametrize("plan", FEW, ids=Plan.short)
@pytest.mark.parametrize("name", NETWORKS)
def test_fast_kernels_stay_within_the_band_of_rounding(name: str, plan: Plan, text: str) -> None:
    spec = spec_named(text, name, **KINDS["clip"])
    change = emulated(spec, 1, 1, 1)[1]
    twin, fast = ran(spec, plan), ran(spec, plan, dtype=torch.float32)
    band = max(MARGIN * apart(in_float32(spec, 1), wanted(spec, plan)[0], change), 1e-6)
    assert 0 < apart(fast, twin, change) < band < 1e-3
    assert (
        apart(ran(spec_named(text, name, **KINDS["clip"] | {"lr": 0.45}), plan, dtype=torch.float32), twin, change)
        > band
    )


@pytest.mark.parametrize("plan", FEW, ids=Plan.short)
def test_scores_are_means_over_tokens_and_leave_no_trace(plan: Plan, text: str) -> None:
    spec = spec_named(text, "wide", **KINDS["clip"])
    team = team_of(spec, plan)
    team.steps(2)
    source: Any = team.task.validation
    assert source.size % spec.batch, "padding is left out"
    own = task(spec)
    own.net.load_state_dict(team.state())
    parts = zip(*(source.share(n, 0, spec.batch) for n in range(source.steps_per_epoch)), strict=True)
    inputs, targets = (torch.cat(part)[: source.size] for part in parts)
    with torch.no_grad():
        output = own.net.eval()(inputs)
    each = torch.nn.functional.cross_entropy(output.movedim(-1, 1), targets, reduction="none").mean(1)
    share = (output.argmax(-1) == targets).double().mean(1)
    assert team.evaluate(source) == pytest.approx([float(each.sum()), source.size, float(share.sum())], rel=1e-10)
    team.steps(STEPS - 2)
    assert difference(spec, plan, Outcome([a / b for a, b in team.losses], [team.state()])) < EXACT
