"""Ranks that share layers compute what the serial run does: pairs, gates, heads, classes, and what is left whole."""

import copy
from pathlib import Path
from typing import Any

import pytest
import test_reference
import torch
from test_reference import (
    EXACT,
    HEAD,
    STEPS,
    STREAM,
    TASKS,
    WRONG,
    evaluated,
    outcome,
    plainly_evaluated,
    settle,
    spec_of,
    started,
    task,
    wanted,
)
from torch import Tensor

from paraxis.errors import ParaxisError, PlanError, ProgramError
from paraxis.plan.plan import Plan, parse
from paraxis.program.faults import FAULTS
from paraxis.run import reference
from paraxis.run.interpreter import Rank
from paraxis.run.shards import whole
from paraxis.task.spec import TaskSpec

BLOCKS = (
    HEAD
    + """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(6, 12, bias=False)
        self.down, self.p = nn.Linear(12, 6), 0.3
    def forward(self, x):
        z = self.norm(x)
        z = F.dropout(F.silu(self.gate(z)) * self.up(z), self.p, self.training)
        return x + self.down(z)

def net():
    return nn.Sequential(Block(), nn.Linear(6, 6), Block(), nn.Linear(6, 64))
"""
)
ENCODER = (
    HEAD
    + """
class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)

def net():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 8), layer, Mean(), nn.Linear(8, 3))
"""
)
ROWS = {"batch": 16, "validation": 0.37, "lr": 0.2}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp:12-16-8-3", ROWS | {"data": STREAM.format("1x3x4,3"), "clip": 0.3, "momentum": 0.9}),
    "cnn": TASKS["cnn"],
    "classes": ("mlp:12-64", ROWS | {"data": STREAM.format("1x3x4,64")}),
    "blocks": (BLOCKS, ROWS | {"data": STREAM.format("6,64"), "clip": 0.5, "optimizer": "adamw", "lr": 0.01}),
    "encoder": (ENCODER, ROWS | {"data": STREAM.format("6,3")}),
    "gpt": ("gpt:2-8-2-8,dropout=0.2", {"batch": 8, "lr": 0.02, "optimizer": "adam", "clip": 1.0, "validation": 0.2}),
}
PLANS = ("tp=2", "dp=2,tp=2", "pp=2,tp=2,microbatches=4", "dp=2,pp=2,tp=2,microbatches=2")
MORE = {
    "mlp": ("tp=4", "dp=2,tp=2,sync=average@2", "pp=2,tp=2,schedule=gpipe,microbatches=2", "dp=2,tp=2,sync=diloco@2")
    + ("dp=2,tp=2,zero=2", "dp=2,tp=2,zero=3,microbatches=2", "dp=2,pp=2,tp=2,zero=3,microbatches=2"),
    "blocks": ("tp=3", "tp=4", "dp=2,tp=4,microbatches=2", "dp=2,tp=2,zero=3"),
    "encoder": ("dp=2,tp=2,zero=2", "dp=2,tp=2,zero=3,microbatches=2"),
    "classes": ("tp=4",),
    "gpt": (
        *("pp=2,interleave=2,tp=2,schedule=interleaved,microbatches=2", "pp=2,tp=2,schedule=zb-h1,microbatches=4"),
        *("dp=2,tp=2,zero=1", "dp=2,tp=2,sync=average@2", "dp=2,tp=2,zero=2,microbatches=2", "dp=2,tp=2,zero=3"),
        *(f"dp=2,pp=2,tp=2,zero={z},schedule=zb-h1,microbatches=2" for z in (2, 3)),
    ),
}
CASES = [(name, plan) for name in NETS for plan in (*PLANS, *MORE.get(name, ()))]


def spec_named(folder: Path, name: str) -> TaskSpec:
    source, settings = NETS[name]
    if name == "gpt":
        text = folder / "shared.txt"
        text.write_bytes(bytes(range(32, 128)) * 12)
        settings = settings | {"data": f"text:{text}"}
    return spec_of(folder, f"tensor {name}", source, settings)


def parts_differ(spec: TaskSpec, plan: Plan, ranks: list[Rank]) -> float:
    """The largest difference on any rank, each held to its own part of what the serial run has; of losses relative."""
    found, (right, change) = outcome(ranks), wanted(spec, plan)
    if len(found.losses) != len(right.losses):
        return float("inf")
    worst = [abs(a - b) / abs(b) for a, b in zip(found.losses, right.losses, strict=True)]
    for rank, state in zip(ranks, found.states, strict=True):
        for name, value in state.items():
            b, shard = right.states[0][name], rank.engine.shards.get(name)
            apart = float((value - (shard.of(b) if shard else b)).abs().max())
            worst.append(apart / max(float(b.abs().max()), change))
    return max(float("inf") if value != value else value for value in worst)


def ran(spec: TaskSpec, plan: Plan, fault: str = "") -> list[Rank]:
    ranks = started(spec, plan, fault)
    reference.run_steps(ranks, STEPS)
    settle(ranks)
    return ranks


def whole_state(ranks: list[Rank], plan: Plan, replica: int = 0) -> dict[str, Tensor]:
    """The state_dict of one replica, put together as it is for a file."""
    state: dict[str, Tensor] = {}
    states = outcome(ranks).states
    for stage in range(plan.pp):
        own = [plan.mesh.rank(replica, stage, n) for n in range(plan.tp)]
        for name, value in states[own[0]].items():
            parts = [states[rank][name].numpy() for rank in own]
            shard = ranks[own[0]].engine.shards.get(name)
            state[name] = torch.from_numpy(whole(parts, shard.dim, shard.blocks)) if shard else value
    return state


@pytest.mark.parametrize("name, text", CASES)
def test_ranks_that_share_layers_compute_the_serial_step(name: str, text: str, folder: Path) -> None:
    spec, plan = spec_named(folder, name), parse(text)
    ranks = ran(spec, plan)
    assert parts_differ(spec, plan, ranks) < EXACT
    assert any(rank.engine.shards for rank in ranks), "something is split"
    right = wanted(spec, plan)[0].states[0]
    for replica in range(plan.dp):
        state = whole_state(ranks, plan, replica)
        assert state.keys() == right.keys()
        for key, value in state.items():
            assert value.shape == right[key].shape and torch.allclose(value, right[key], atol=1e-9)


@pytest.mark.parametrize("name", ["mlp", "classes", "gpt"])
@pytest.mark.parametrize("text", ["tp=2", "dp=2,pp=2,tp=2,microbatches=2", "dp=2,tp=2,zero=3"])
def test_evaluation_meets_too_and_leaves_no_trace(name: str, text: str, folder: Path) -> None:
    spec, plan = spec_named(folder, name), parse(text)
    ranks = started(spec, plan)
    reference.run_steps(ranks, 2)
    scores = evaluated(ranks)
    assert len(scores) == plan.dp * plan.tp and evaluated(ranks) == scores
    if name == "gpt":
        alone = started(spec, Plan())
        reference.run_steps(alone, 2)
        right = evaluated(alone)[0]
    else:
        right = plainly_evaluated(spec, whole_state(ranks, plan))
    for score in scores:
        assert score == pytest.approx(right, rel=1e-9)
    reference.run_steps(ranks, STEPS - 2)
    assert parts_differ(spec, plan, ranks) < EXACT


def test_what_every_rank_has_whole_stays_alike_to_the_bit(folder: Path) -> None:
    for name in ("mlp", "gpt"):
        ranks = ran(spec_named(folder, name), parse("tp=2"))
        first, second = (rank.engine.state() for rank in ranks)
        left = [key for key in first if key not in ranks[0].engine.shards]
        assert left and all(torch.equal(first[key], second[key]) for key in left)
        assert all(not torch.equal(first[key], second[key]) for key in ranks[0].engine.shards)


def test_a_rank_holds_its_part_and_sends_what_the_instructions_say(folder: Path) -> None:
    serial, shared = (ran(spec_named(folder, "mlp"), parse(text)) for text in ("serial", "tp=4"))
    sizes = [rank.engine.flat.params.numel() for rank in shared]
    #           12x16, its bias, 16x8 are split; the second layer's bias and the third layer are whole
    assert sizes == [12 * 4 + 4 + 4 * 8 + 8 + 8 * 3 + 3] * 4 < [serial[0].engine.flat.params.numel()] * 4
    before = shared[0].context.sent[0]
    reference.run_steps(shared, 1)
    outputs, norm = 16 * 8 * 8, 8  # bytes: of 16 samples 8 columns, and the norm for clipping
    assert shared[0].context.sent[0] - before == 2 * 3 * outputs // 4 + 2 * 3 * norm // 4


# -- mistakes are seen -------------------------------------------------------------------------------------------

SEEN = [
    ("dropped-output", "mlp", "tp=2"),
    ("dropped-output", "gpt", "pp=2,tp=2,microbatches=2"),
    ("dropped-input-gradient", "cnn", "tp=2"),
    ("dropped-input-gradient", "gpt", "dp=2,tp=2"),
    ("wrong-part", "cnn", "tp=2"),
    ("wrong-part", "gpt", "tp=2"),
    ("wrong-part", "blocks", "tp=2"),
    ("summed-whole", "cnn", "tp=2"),
    ("summed-whole", "gpt", "tp=2"),
    ("counted-whole", "mlp", "tp=2"),
    ("lost-update", "mlp", "tp=2"),
    ("all-data", "mlp", "dp=2,tp=2"),
    ("wrong-mask", "cnn", "dp=2,tp=2"),
    ("dropped-reduction", "gpt", "dp=2,tp=2"),
    *((fault, "gpt", "dp=2,tp=2,zero=2") for fault in ("dropped-reduction", "summed-whole", "dropped-output")),
    *((fault, "mlp", "dp=2,tp=2,zero=3,microbatches=2") for fault in ("lost-shard", "stale-shard", "counted-whole")),
]


@pytest.mark.parametrize("fault, name, text", SEEN)
def test_every_fault_is_seen(fault: str, name: str, text: str, folder: Path) -> None:
    spec, plan = spec_named(folder, name), parse(text)
    try:
        ranks = ran(spec, plan, fault)
    except ParaxisError:
        return
    assert parts_differ(spec, plan, ranks) > WRONG


def test_all_faults_of_shared_layers_are_seen() -> None:
    own = {name for name, fault in FAULTS.items() if fault.needs(parse("tp=2")) and not fault.needs(parse("dp=2"))}
    assert own and own <= {fault for fault, _, _ in SEEN}


# -- networks that behave otherwise than when they were tried ----------------------------------------------------

SOMETIMES = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    def pair(self, x):
        return self.second(torch.relu(self.first(x)))
    def forward(self, x):
        trial = x.shape[0] < 16
        return {}

def net():
    return Net()
"""
OTHERWISE = {
    "a forward has met a layer that is split": "self.last(self.pair(x) if trial else self.pair(x) + self.pair(x))",
    "a forward has ended, unlike when": "self.last(self.pair(x) if trial else x.repeat(1, 2)[:, :8])",
    "computed again in the backward": "self.last(checkpoint(self.pair, x * self.last.bias.sum(), use_reentrant=False))",
}


@pytest.mark.parametrize("said", OTHERWISE)
def test_a_network_that_meets_others_elsewhere_is_told(said: str, folder: Path) -> None:
    source = HEAD + "from torch.utils.checkpoint import checkpoint\n" + SOMETIMES.format(OTHERWISE[said])
    settings = {"data": "synthetic:64,6,3,seed=2", "batch": 32}
    spec = spec_of(folder, f"elsewhere {len(OTHERWISE[said])}", source, settings)
    with pytest.raises(ProgramError, match=said):
        reference.run_steps(started(spec, parse("tp=2")), 2)


def test_an_optimiser_that_may_look_at_whole_tensors_is_refused(folder: Path) -> None:
    source = (
        HEAD
        + """
class Own(torch.optim.SGD):
    pass
def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
def optimizer(parameters):
    return {}(parameters, lr=0.1)
"""
    )
    settings = {"data": STREAM.format("6,3"), "batch": 16, "validation": 0.37}
    for kind in ("torch.optim.NAdam", "Own"):
        spec = spec_of(folder, f"optimiser {kind}", source.replace("{}", kind), settings)
        if kind == "Own":
            with pytest.raises(PlanError, match="tp=2: Own may look at whole tensors"):
                started(spec, parse("tp=2"))
        else:
            assert parts_differ(spec, parse("tp=2"), ran(spec, parse("tp=2"))) < EXACT


def test_the_task_that_is_shared_is_not_the_one_that_is_proved_against(folder: Path) -> None:
    spec = spec_named(folder, "mlp")
    own = task(spec)
    before = copy.deepcopy(own.net.state_dict())
    started(spec, parse("tp=2"))
    assert all(torch.equal(before[key], value) for key, value in task(spec).net.state_dict().items())
    assert test_reference.task(spec).splits == own.splits
