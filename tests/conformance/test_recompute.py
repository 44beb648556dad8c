"""Segments that are computed again before their backward: what serial code computes, and nothing kept meanwhile."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_odd_networks import FINE
from test_reference import EXACT, HEAD, TASKS, WRONG, difference, evaluated, outcome, spec_of, started, trained

from paraxis.engine.torch_stage import TorchStage
from paraxis.errors import PlanError
from paraxis.plan.plan import Plan, parse
from paraxis.run import reference

PLANS = [
    parse(text)
    for text in (
        "recompute=all",
        "dp=2,bucket_bytes=64,recompute=all",
        "dp=2,pp=2,microbatches=4,recompute=all",
        "pp=3,schedule=gpipe,microbatches=2,recompute=0+2",
        "dp=2,pp=2,interleave=2,schedule=gpipe,microbatches=2,recompute=1+2",
        "dp=2,microbatches=2,sync=average@2,recompute=all",
    )
]
ODD = ("tied within a stage", "shared dropout in one segment", "shared dropout over stages", "cumulative batch norm")
ODD += ("block that begins in place", "own stage that begins in place", "network that alters its inputs")
ODD += ("frozen first layer", "skips over stages", "functional dropout, samples second", "rmsprop")
NOISY = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
    def forward(self, x):
        return self.linear(x + torch.randn(x.shape))

def net():
    return Net()
"""


@pytest.mark.parametrize("plan", PLANS, ids=Plan.short)
@pytest.mark.parametrize("name", [name for name in TASKS if name != "tiny"])
def test_plans_that_recompute_equal_the_serial_run(name: str, plan: Plan, folder: Path) -> None:
    spec = spec_of(folder, name, *TASKS[name])
    assert difference(spec, plan, trained(spec, plan)) < EXACT


@pytest.mark.parametrize("name, text", [(name, text) for name in ODD for text in FINE[name][2]])
def test_odd_networks_bear_being_computed_again(name: str, text: str, folder: Path) -> None:
    source, settings, _ = FINE[name]
    spec = spec_of(folder, name, HEAD + source, settings)
    plan = replace(parse(text), recompute="all")
    assert difference(spec, plan, trained(spec, plan)) < EXACT


def test_a_mask_that_a_repeated_module_draws_again_is_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the second forward begins to count its masks anew."""
    source, settings, _ = FINE["shared dropout over segments"]
    spec = spec_of(folder, "shared dropout over segments", HEAD + source, settings)
    plan = parse("dp=2,bucket_bytes=16,recompute=all")
    assert difference(spec, plan, trained(spec, plan)) < EXACT
    whole = TorchStage.again

    def forgetful(self: TorchStage, segment: int, microbatch: int, part: int) -> None:
        self.kept[segment, microbatch].counts.clear()
        whole(self, segment, microbatch, part)

    monkeypatch.setattr(TorchStage, "again", forgetful)
    assert difference(spec, plan, trained(spec, plan)) > WRONG


def test_statistics_are_collected_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the second forward is counted like the first one."""
    spec, plan = spec_of(folder, "batch norm", *TASKS["batch norm"]), parse("microbatches=2,recompute=all")
    assert difference(spec, plan, trained(spec, plan)) < EXACT
    whole = TorchStage.again

    def counted(self: TorchStage, segment: int, microbatch: int, part: int) -> None:
        whole(self, segment, microbatch, part)
        self.statistics.collected += 1.0

    monkeypatch.setattr(TorchStage, "again", counted)
    assert difference(spec, plan, trained(spec, plan)) > WRONG


@pytest.mark.parametrize("name", ["cnn", "batch norm"])
def test_evaluation_leaves_no_trace(name: str, folder: Path) -> None:
    spec, plan = spec_of(folder, name, *TASKS[name]), parse("pp=2,microbatches=4,recompute=all")
    ranks = started(spec, plan)
    reference.run_steps(ranks, 2)
    assert evaluated(ranks) == evaluated(ranks)
    reference.run_steps(ranks, 4)
    assert difference(spec, plan, outcome(ranks)) < EXACT


def test_what_cannot_be_computed_twice_alike_is_refused(folder: Path) -> None:
    settings = {"data": "synthetic:64,6,3,seed=2", "batch": 16}
    with pytest.raises(PlanError, match=r"recompute: the network would draw other random numbers than the first time"):
        trained(spec_of(folder, "noisy", HEAD + NOISY, settings), parse("recompute=all"))
    spec = spec_of(folder, "batch norm", *TASKS["batch norm"]).model_copy(update={"bn_group": 16})
    with pytest.raises(PlanError, match="recompute: batch norm over all ranks is measured once"):
        trained(spec, parse("dp=2,recompute=all"))
