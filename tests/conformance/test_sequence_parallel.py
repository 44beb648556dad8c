"""Ranks that also share the tokens between their splits compute what the serial run does, and send what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_reference import EXACT, HEAD, STEPS, STREAM, WRONG, evaluated, spec_of, started, wanted
from test_tensor_parallel import NETS, ROWS, parts_differ, ran, whole_state

from paraxis.errors import ParaxisError, PlanError
from paraxis.plan.plan import Plan, parse
from paraxis.program.faults import FAULTS
from paraxis.run import reference
from paraxis.task.spec import TaskSpec

STREAMS = (
    HEAD
    + """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(6, 12, bias=False)
        self.down, self.drop = nn.Linear(12, 6), nn.Dropout(0.3)
    def forward(self, x):
        z = self.norm(x)
        return x + self.drop(self.down(F.silu(self.gate(z)) * self.up(z)))

class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)

def net():
    first = nn.Unflatten(1, (4, 3)), nn.Linear(3, 6)
    return nn.Sequential(*first, Block(), nn.Linear(6, 6), nn.GELU(), Block(), Mean(), nn.Linear(6, 3))
"""
)
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": NETS["gpt"],  # words, heads and columns
    "thirds": ("gpt:1-12-3-9,dropout=0.2", NETS["gpt"][1]),  # 256 words are not split: every rank has the tied weight
    "stream": (STREAMS, ROWS | {"data": STREAM.format("12,3"), "clip": 0.5, "optimizer": "adamw", "lr": 0.01}),
}
CASES = [
    *(("gpt", text) for text in ("tp=2", "dp=2,tp=2", "pp=2,tp=2,microbatches=4", "dp=2,tp=2,zero=1")),
    ("gpt", "dp=2,pp=2,tp=2,microbatches=2,zero=2"),
    ("gpt", "pp=2,tp=2,schedule=zb-h1,microbatches=4"),
    ("gpt", "pp=2,interleave=2,tp=2,schedule=interleaved,microbatches=2"),
    *(("gpt", f"dp=2,tp=2,sync={rule}") for rule in ("average@2", "compressed")),
    *(("thirds", text) for text in ("tp=3", "dp=2,pp=2,tp=3,microbatches=2,zero=3")),
    *(("stream", text) for text in ("tp=2", "tp=4", "dp=2,tp=2", "pp=2,tp=2,split=6+2,microbatches=2")),
]


def spec_named(folder: Path, name: str) -> TaskSpec:
    source, settings = OWN[name]
    if name != "stream":
        text = folder / "tokens.txt"
        text.write_bytes(bytes(range(32, 128)) * 12)
        settings = settings | {"data": f"text:{text}"}
    return spec_of(folder, f"tokens {name}", source, settings)


def sequenced(text: str) -> Plan:
    return parse(f"{text},sequence=1")


@pytest.mark.parametrize("name, text", CASES)
def test_ranks_that_share_tokens_compute_the_serial_step(name: str, text: str, folder: Path) -> None:
    spec, plan = spec_named(folder, name), sequenced(text)
    ranks = ran(spec, plan)
    assert parts_differ(spec, plan, ranks) < EXACT
    assert all(any("gather" in words for words in rank.program.words) for rank in ranks)
    if plan.zero == 3:
        return  # no rank has its weights whole
    state, right = whole_state(ranks, plan), wanted(spec, plan)[0].states[0]
    assert state.keys() == right.keys()
    assert all(torch.allclose(value, right[key], atol=1e-9) for key, value in state.items())


def test_what_every_rank_has_whole_stays_alike_to_the_bit(folder: Path) -> None:
    for name, text in (("gpt", "tp=2"), ("thirds", "tp=3")):
        ranks = ran(spec_named(folder, name), sequenced(text))
        states = [rank.engine.state() for rank in ranks]
        left = [key for key in states[0] if key not in ranks[0].engine.shards]
        assert left and all(torch.equal(states[0][key], state[key]) for key in left for state in states)


@pytest.mark.parametrize("name, text", [("gpt", "tp=2"), ("gpt", "dp=2,pp=2,tp=2,microbatches=2"), ("thirds", "tp=3")])
def test_evaluation_gathers_too_and_leaves_no_trace(name: str, text: str, folder: Path) -> None:
    spec, plan = spec_named(folder, name), sequenced(text)
    ranks, alone = started(spec, plan), started(spec, Plan())
    for own in (ranks, alone):
        reference.run_steps(own, 2)
    right = evaluated(alone)[0]
    assert all(score == pytest.approx(right, rel=1e-9) for score in evaluated(ranks))
    reference.run_steps(ranks, STEPS - 2)
    assert parts_differ(spec, plan, ranks) < EXACT


def test_a_stage_sends_its_own_tokens_alone(folder: Path) -> None:
    """What crosses the edges is a rank's part; inside, gathering and scattering cost what the two sums did."""
    spec, own, sent = spec_named(folder, "gpt"), {}, {}
    for key, plan in (("whole", parse("pp=2,tp=2,microbatches=4")), ("part", sequenced("pp=2,tp=2,microbatches=4"))):
        ranks = ran(spec, plan)
        before = ranks[0].context.sent[0]
        reference.run_steps(ranks, 1)
        sent[key] = ranks[0].context.sent[0] - before
        own[key] = sum(piece.numel() for piece in ranks[0].engine.whole.pieces)
    edges = 8 * 8 * 8 * 8  # bytes of a step's activations that leave stage 0: 8 samples of 8 tokens of width 8
    assert own["whole"] == 0 < own["part"]
    # stage 0: half of the edge's bytes; for words and block each as before; and the gradients of what is whole
    assert sent["part"] == sent["whole"] - edges // 2 + 8 * own["part"]


# -- mistakes are seen -------------------------------------------------------------------------------------------

SEEN = [
    ("dropped-output", "gpt", "tp=2"),
    ("dropped-input-gradient", "gpt", "tp=2"),
    ("dropped-tokens", "gpt", "dp=2,tp=2"),
    ("dropped-token-gradients", "stream", "tp=2"),
    ("partial-gradients", "gpt", "dp=2,tp=2"),
    ("partial-gradients", "gpt", "pp=2,tp=2,microbatches=4"),
    ("partial-gradients", "stream", "tp=4"),
    ("wrong-part", "gpt", "tp=2"),
    ("summed-whole", "gpt", "tp=2"),
    ("counted-whole", "stream", "tp=2"),
]


@pytest.mark.parametrize("fault, name, text", SEEN)
def test_every_fault_is_seen(fault: str, name: str, text: str, folder: Path) -> None:
    spec, plan = spec_named(folder, name), sequenced(text)
    try:
        ranks = ran(spec, plan, fault)
    except ParaxisError:
        return
    assert not parts_differ(spec, plan, ranks) <= WRONG


def test_all_faults_of_shared_tokens_are_seen() -> None:
    own = {name for name, fault in FAULTS.items() if fault.needs(sequenced("tp=2")) and not fault.needs(parse("tp=2"))}
    assert own and own <= {fault for fault, _, _ in SEEN}


def test_a_loss_that_all_compute_alike_counts_in_parts(folder: Path) -> None:
    spec, plan = spec_named(folder, "thirds"), sequenced("tp=3")
    ranks = started(spec, plan)
    for rank in ranks:
        assert float(rank.engine.now.unit) == pytest.approx(1 / 3)
        rank.engine.now.unit.fill_(1.0)
    reference.run_steps(ranks, STEPS)
    assert parts_differ(spec, plan, ranks) > WRONG


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, plan, why", [("mlp", "tp=2", "nothing of what tp splits has"), ("cnn", "tp=2", "nothing")]
)
def test_networks_without_tokens_are_refused(name: str, plan: str, why: str, folder: Path) -> None:
    source, settings = NETS[name]
    with pytest.raises(PlanError, match=f"sequence=1: {why}"):
        started(spec_of(folder, f"tokens {name}", source, settings), sequenced(plan))


def test_tokens_that_do_not_divide_are_refused_with_what_would(folder: Path) -> None:
    spec = spec_named(folder, "gpt").model_copy(update={"network": "gpt:1-8-2-9"})
    with pytest.raises(PlanError, match="sequence=1: tp=2 does not divide its 9 tokens"):
        started(spec, sequenced("tp=2"))
    with pytest.raises(PlanError, match=r"all 8 tokens are needed from layer 1 on \(h.0.attn mixes them\)"):
        started(spec_named(folder, "gpt"), sequenced("tp=4"))
