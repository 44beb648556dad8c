"""ZeRO through the reference interpreter: every stage computes what serial code computes, and keeps only shares."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_reference import (
    EXACT,
    HEAD,
    TASKS,
    WRONG,
    difference,
    evaluated,
    outcome,
    plainly_evaluated,
    spec_of,
    started,
    trained,
)

from paraxis.engine.sharding import Part
from paraxis.engine.torch_engine import TorchEngine
from paraxis.errors import PlanError
from paraxis.plan.plan import Plan, parse
from paraxis.program.check import check
from paraxis.program.lower import lower
from paraxis.run import reference
from paraxis.run.interpreter import Rank
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

SMALL = ",bucket_bytes=64"
PLANS = [
    *(parse(f"dp={dp},zero={z},microbatches={m}{SMALL}") for z in (1, 2, 3) for dp, m in ((2, 1), (2, 2), (4, 1))),
    *(parse(f"dp=2,pp=2,zero={z},microbatches=2{SMALL}") for z in (1, 2, 3)),
    parse("dp=4,zero=1,microbatches=2"),
    parse("dp=4,zero=3,microbatches=2"),
    parse("dp=2,pp=2,zero=3"),
    parse("dp=2,pp=2,interleave=2,zero=1,schedule=gpipe,microbatches=2"),
    parse(f"dp=2,pp=2,interleave=2,zero=3,schedule=gpipe,microbatches=2{SMALL}"),
    *(parse(f"dp=2,pp=2,zero={z},schedule=zb-h1,microbatches=4{SMALL}") for z in (2, 3)),
    parse("dp=2,pp=2,zero=3,schedule=zb-h2,microbatches=4,recompute=all"),
    parse(f"dp=2,pp=2,zero=2,schedule=interleaved,interleave=2,microbatches=4,recompute=0+2{SMALL}"),
]
TIED = (
    HEAD
    + """
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
        self[2].weight = self[0].weight
        self[4].weight = self[0].weight
def net():
    return Net()
"""
)
FROZEN = (
    HEAD
    + """
def net():
    made = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    made[2].weight.requires_grad_(False)
    return made
def optimizer(parameters):
    flat = [p for p in parameters if p.ndim == 1]
    rest = [p for p in parameters if p.ndim > 1 and p.requires_grad]
    return torch.optim.AdamW([{"params": rest}, {"params": flat, "lr": 0.03}], lr=0.01, weight_decay=0.1)
"""
)
OWN = """
def optimizer(parameters):
    return torch.optim.RMSprop(parameters, lr=0.01)
"""
FEW = {"batch": 16, "validation": 0.37, "data": "synthetic:100,6,3,seed=2", "lr": 0.2}


@pytest.mark.parametrize("plan", PLANS, ids=Plan.short)
@pytest.mark.parametrize("name", [name for name in TASKS if name != "tiny"])
def test_shares_compute_what_the_serial_run_computes(name: str, plan: Plan, folder: Path) -> None:
    spec = spec_of(folder, name, *TASKS[name])
    assert difference(spec, plan, trained(spec, plan)) < EXACT


AROUND = "dp=2,pp=2,split=1+1+1+3,interleave=2,schedule=gpipe,microbatches=2,bucket_bytes=8"


@pytest.mark.parametrize(
    "name, plan",
    [
        *((name, f"dp=2,zero={z},microbatches=2,bucket_bytes=8") for name in ("tied", "frozen") for z in (1, 2, 3)),
        *(("tied", f"{AROUND},zero={z}") for z in (2, 3)),
    ],
)
def test_shared_and_frozen_parameters_have_their_places(name: str, plan: str, folder: Path) -> None:
    """A parameter that three segments of a rank share lies in the first one's bucket, which all need and add to."""
    spec = spec_of(folder, name, {"tied": TIED, "frozen": FROZEN}[name], FEW)
    assert difference(spec, parse(plan), trained(spec, parse(plan))) < EXACT


@pytest.mark.parametrize("plan", [f"dp=2,zero={z}{SMALL}" for z in (1, 2, 3)] + ["dp=2,pp=2,zero=3,microbatches=2"])
@pytest.mark.parametrize("name", ["mlp", "batch norm"])
def test_evaluation_gathers_what_it_needs_and_leaves_no_trace(name: str, plan: str, folder: Path) -> None:
    spec = spec_of(folder, name, *TASKS[name])
    ranks = started(spec, parse(plan))
    reference.run_steps(ranks, 2)
    whole = {key: value for state in outcome(ranks).states for key, value in state.items()}
    for score in (evaluated(ranks), evaluated(ranks)):
        assert score[0] == pytest.approx(plainly_evaluated(spec, whole), rel=1e-10)
    reference.run_steps(ranks, 4)
    found = outcome(ranks)
    assert difference(spec, parse(plan), found) < EXACT


MUTANTS = [
    *((fault, f"dp=2,zero={z}{SMALL}") for z in (1, 2, 3) for fault in ("dropped-reduction", "stale-shard")),
    *((fault, f"dp=2,zero={z}{SMALL}") for z in (1, 3) for fault in ("random-start", "lost-update", "unzeroed")),
    *((fault, f"dp=2,zero={z},microbatches=2") for z in (1, 2) for fault in ("mean-of-sums", "early-update")),
    ("stale-bucket", f"dp=2,zero=1{SMALL}"),
    *(("lost-shard", f"dp=2,zero={z},microbatches=2") for z in (2, 3)),
    *(
        (fault, f"dp=2,pp=2,zero={z},schedule=zb-h1,microbatches=4")
        for z in (2, 3)
        for fault in ("late-weights", "lost-shard")
    ),
]


@pytest.mark.parametrize("fault, plan", MUTANTS)
def test_every_fault_fails_the_comparison(fault: str, plan: str, folder: Path) -> None:
    spec = spec_of(folder, "tiny", *TASKS["tiny"])
    assert difference(spec, parse(plan), trained(spec, parse(plan), fault)) > WRONG


def test_what_is_released_cannot_be_computed_with(folder: Path) -> None:
    """Should the checker ever let it pass."""
    ranks = started(spec_of(folder, "tiny", *TASKS["tiny"]), parse(f"dp=2,zero=3{SMALL}"))
    reference.run_steps(ranks, 1)
    stage = ranks[0].engine.at(0)
    stage.load(0, 0)
    with pytest.raises(RuntimeError, match=r"storage|not allocated"):
        stage.forward(0, 0, 0)


# -- memory and bytes ------------------------------------------------------------------------------------------

WIDE = TaskSpec(network="mlp:12-40-40-40-40-3", batch=16, data="synthetic:64,1x3x4,3", optimizer="adam", lr=0.01)


def watched(plan: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Rank], dict[str, int]]:
    """Two steps, and the most bytes that were whole for a while on rank 0, by kind."""
    most = {"params": 0, "grads": 0}
    ranks: list[Rank] = []
    resize = Part.resize

    def looked(part: Part, full: bool) -> None:
        resize(part, full)
        for kind in most if ranks else ():
            most[kind] = max(most[kind], ranks[0].engine.shares.transient(kind))

    with monkeypatch.context() as patch:
        patch.setattr(Part, "resize", looked)
        ranks += started(WIDE, parse(plan))
        reference.run_steps(ranks, 2)
    return ranks, most


def test_what_a_rank_keeps_at_rest_and_what_is_whole_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[int, dict[str, int]] = {}
    for zero in range(4):
        ranks, most = watched(f"dp=4,zero={zero},bucket_bytes=4K", monkeypatch)
        held[zero] = ranks[0].engine.bytes_by_kind()
        assert ranks[0].engine.bytes_held() == sum(held[zero].values())
        segments = ranks[0].program.segments[0]
        if zero:
            sizes = sorted(b.params.whole.nbytes for b in ranks[0].engine.shares.buckets.values())
            assert len(sizes) == len(segments) > 3
            assert most["grads"] <= (sum(sizes[-2:]) if zero > 1 else 0)
            assert most["params"] <= (sum(sizes[-2:]) if zero > 2 else 0)
            assert (most["params"] > 0, most["grads"] > 0) == (zero > 2, zero > 1)
    kinds = ("state", "grads", "params")
    for zero in range(4):
        for number, kind in enumerate(kinds):
            share = held[zero][kind] / held[0][kind]
            assert (0.25 <= share < 0.26) if number < zero else (1 <= share < 1.01), (zero, kind)
    assert sum(held[3].values()) < 0.3 * sum(held[0].values())


def test_bytes_of_a_step_are_those_of_its_collectives(folder: Path) -> None:
    sent = {}
    for zero in range(4):
        ranks = started(WIDE, parse(f"dp=4,zero={zero},bucket_bytes=4K"))
        reference.run_steps(ranks, 1)
        assert len({rank.context.sent[0] for rank in ranks}) == 1
        sent[zero] = ranks[0].context.sent[0]
    assert sent[1] == pytest.approx(sent[0], rel=0.01) and sent[2] == sent[1], "an all-reduce is both halves"
    first, *middle, last = (b.params.whole.nbytes for b in ranks[0].engine.shares.buckets.values())
    times = 2 * (first + sum(middle)) + last  # the last segment stays whole from its F to its B
    assert sent[3] == 3 * (times + first + sum(middle) + last) // 4


def test_gathered_weights_are_read_and_given_back(folder: Path) -> None:
    spec = spec_of(folder, "clip", *TASKS["clip"])
    sums = {}
    for plan in ("dp=2", "dp=2,zero=1", f"dp=2,zero=3{SMALL}"):
        ranks = started(spec, parse(plan))
        reference.run_steps(ranks, 2)
        if "state" in ranks[0].bodies:
            reference.run_body(ranks, "state")
        sums[plan] = {rank.engine.square_sum() for rank in ranks}
        if ranks[0].program.zero == 3:
            assert ranks[0].engine.shares.transient("params") == 0 and not ranks[0].engine.copies
    first, *others = sums.values()
    assert all(len(s) == 1 and max(s) == pytest.approx(max(first), rel=1e-12) for s in (first, *others))


def test_an_optimiser_of_ones_own_needs_whole_parameters(folder: Path) -> None:
    spec = spec_of(folder, "own", TASKS["tiny"][0] + OWN, FEW)
    own: Any = make_task(spec, dtype=torch.float64)
    program = lower(parse("dp=2,zero=1"), own.layout())
    check(program)
    with pytest.raises(PlanError, match="zero=1: RMSprop needs whole parameters; SGD, Adam and AdamW take shares"):
        TorchEngine(own, program, 0)
