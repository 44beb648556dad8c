"""gpt, and weights that several stages share: every plan computes what the serial run does, and copies stay equal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_reference import EXACT, HEAD, WRONG, difference, evaluated, settle, spec_of, started, task, trained, wanted

from paraxis.plan.plan import Plan, parse
from paraxis.run import reference
from paraxis.task.spec import TaskSpec

PLANS = [
    *("serial", "dp=2", "dp=2,bucket_bytes=2K,microbatches=2", "pp=2,microbatches=4", "pp=3,microbatches=2"),
    *("pp=5,schedule=gpipe,microbatches=2", "dp=2,pp=2,microbatches=2,bucket_bytes=2K", "dp=2,pp=2,schedule=layerwise"),
    *("pp=2,interleave=2,schedule=gpipe,microbatches=2", "dp=2,pp=2,interleave=2,schedule=gpipe,bucket_bytes=2K"),
    *("dp=2,pp=2,sync=average@2", "dp=2,pp=2,engine=native,comm=openmp"),
    "dp=2,pp=2,zero=1,bucket_bytes=2K",
    *(f"dp=2,pp=2,zero={z},bucket_bytes=2K,microbatches=2" for z in (2, 3)),
    *("dp=2,pp=3,zero=3,schedule=zb-h1,microbatches=4", "dp=2,pp=2,zero=3,recompute=all,schedule=zb-h2,microbatches=4"),
    "dp=2,pp=2,zero=2,schedule=interleaved,microbatches=2",
    *("dp=2,pp=2,schedule=zb-h1,microbatches=2,bucket_bytes=2K", "pp=2,schedule=interleaved,microbatches=4"),
]
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "dropout": {"network": "gpt:3-8-2-4,dropout=0.2"},
    "clip": {"optimizer": "sgd", "lr": 0.5, "clip": 0.2, "weight_decay": 0.01},
}
CASES = [*(("adamw", plan) for plan in PLANS), *((kind, plan) for kind in ("dropout", "clip") for plan in PLANS[6::6])]
# A weight of the first, the third and the last of four layers, and one that is frozen in the first and the last.
SEVERAL = (
    HEAD
    + """
def net():
    a, b, c, d = (nn.Linear(6, 6) for _ in range(4))
    a.weight = c.weight = d.weight
    a.bias = d.bias.requires_grad_(False)
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c, nn.Tanh(), d)
def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=g), torch.randint(0, 6, (8,), generator=g)) for _ in range(3)]
"""
)


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    """Some 3000 bytes, of which one follows from those before."""
    path = folder / "counting.txt"
    path.write_text(" ".join(str(n) for n in range(800)))
    return f"text:{path}"


def tiny(text: str, **more: Any) -> TaskSpec:
    return TaskSpec(**({"network": "gpt:3-8-2-4", "data": text, "batch": 8, "lr": 0.02, "validation": 0.2} | more))


@pytest.mark.parametrize("kind, plan", CASES, ids=str)
def test_every_plan_computes_what_the_serial_run_computes(kind: str, plan: str, text: str) -> None:
    _holds(tiny(text, **KINDS[kind]), parse(plan))


def _holds(spec: TaskSpec, plan: Plan) -> None:
    found = trained(spec, plan)
    assert difference(spec, plan, found) < EXACT
    names = set(wanted(spec, plan)[0].states[0])
    parts = [{*state} for state in found.states]
    assert set.union(*parts) == names and "lm_head.weight" in names
    for state in found.states:
        if "wte.weight" in state:
            assert torch.equal(state["wte.weight"], state["lm_head.weight"])


@pytest.mark.parametrize("plan", [PLANS[n] for n in (3, 6, 10, 12, 13, 14, 15, 18)])
def test_copies_that_do_not_add_up_their_gradients_fail(plan: str, text: str) -> None:
    assert difference(tiny(text), parse(plan), trained(tiny(text), parse(plan), "untied")) > WRONG


@pytest.mark.parametrize("split", ["3+4", "1+1+5", "1+3+2+1"])
def test_a_weight_of_several_layers_and_frozen_ones(split: str, folder: Path) -> None:
    spec = spec_of(folder, "several", SEVERAL, {"clip": 0.3, "momentum": 0.9})
    for more in ("", ",dp=2,microbatches=2", ",dp=2,zero=2,microbatches=2", ",dp=2,zero=3,bucket_bytes=8"):
        plan = parse(f"pp={split.count('+') + 1},split={split}{more}")
        assert difference(spec, plan, trained(spec, plan)) < EXACT
        assert difference(spec, plan, trained(spec, plan, "untied")) > WRONG


def test_a_tied_weight_counts_once_in_the_norm(text: str) -> None:
    """With a mutant: were each copy counted, the gradient would be clipped to less."""
    spec, plan = tiny(text, **KINDS["clip"]), parse("pp=2,microbatches=2")
    ranks = started(spec, plan)
    for rank in ranks:
        engine = rank.engine
        engine.counted = [engine.gradients_flat]
    reference.run_steps(ranks, 6)
    state = ranks[0].engine.state()
    right = wanted(spec, plan)[0].states[0]
    assert float((state["wte.weight"] - right["wte.weight"]).abs().max()) > WRONG


def test_scores_are_means_over_tokens(text: str) -> None:
    spec, plan = tiny(text), parse("dp=2,pp=2,microbatches=2")
    ranks = started(spec, plan)
    reference.run_steps(ranks, 3)
    settle(ranks)
    own = task(spec)
    own.net.load_state_dict({key: value for rank in ranks for key, value in rank.engine.state().items()})
    source: Any = own.validation
    numbers = range(source.steps_per_epoch)
    inputs, targets = (
        torch.cat(parts)[: source.size] for parts in zip(*(source.share(n, 0, 8) for n in numbers), strict=True)
    )
    with torch.no_grad():
        output = own.net.eval()(inputs)
    each = torch.nn.functional.cross_entropy(output.movedim(-1, 1), targets, reduction="none").mean(1)
    share = (output.argmax(-1) == targets).double().mean(1)
    for score in evaluated(ranks):
        assert score == pytest.approx([float(each.sum()), source.size, float(share.sum())], rel=1e-9)
    assert source.size % 8, "padding is left out"
