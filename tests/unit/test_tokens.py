"""Tokens that ranks can share: found in a network's forward, collected and summed, checked, refused, printed."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from test_check import Row, edited, moved, refused, without
from torch import Tensor, nn

from paraxis.errors import PlanError
from paraxis.plan.plan import parse
from paraxis.plan.space import space
from paraxis.program.check import check
from paraxis.program.cut import Layout, told_of
from paraxis.program.instructions import Program, parse_program
from paraxis.program.lower import lower
from paraxis.program.meetings import begins
from paraxis.program.shares import MEETS, Split, Tokens, tokens_of
from paraxis.program.simulate import simulate, uniform
from paraxis.task.gathering import collect, own_tokens, reduce
from paraxis.task.gpt import GPT, Shape
from paraxis.task.randomness import Draw, KeyedDropout
from paraxis.task.tensor import found, watch
from paraxis.task.tokens import find_tokens


def shared(net: nn.Module, x: Tensor, labels: Tensor | None = None, draw: Draw | None = None) -> tuple[Tokens, ...]:
    chain = net.stages() if isinstance(net, GPT) else list(net) if isinstance(net, nn.Sequential) else [net]
    trial = watch(net, chain, lambda layer, given: layer(given), x, draw or Draw())
    return find_tokens(trial, found(net, trial, labels))


class Stream(nn.Module):
    """A pair with something around it."""

    def __init__(self, around: Callable[["Stream", Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.c = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)
        self.scale, self.places, self.around = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(4, 8)), around

    def pair(self, x: Tensor) -> Tensor:
        """What is split."""
        return self.b(F.gelu(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Whatever `around` makes of it."""
        return self.around(self, x)


APART: dict[str, Callable[[Stream, Tensor], Tensor]] = {
    "a residual": lambda m, x: x + m.pair(m.norm(x)),
    "a norm behind": lambda m, x: m.norm(x + m.pair(x)),
    "a scale of every token": lambda m, x: x + m.pair(x * m.scale) * 0.5,
    "a layer that is not split": lambda m, x: F.relu(m.c(m.pair(x))),
    "a number of the samples": lambda m, x: x + m.pair(x) / x.ndim,
}
TOGETHER: dict[str, tuple[Callable[[Stream, Tensor], Tensor], str]] = {
    "a mean": (lambda m, x: m.pair(x) + x.mean(1, keepdim=True), "mean mixes them"),
    "a norm of whole samples": (lambda m, x: F.layer_norm(x + m.pair(x), (4, 8)), "layer_norm mixes them"),
    "a softmax": (lambda m, x: m.pair(x).softmax(1), "softmax mixes them"),
    "positions": (lambda m, x: m.pair(x + m.places), "a tensor of no module makes all of them"),
    "the number of tokens": (lambda m, x: m.pair(x) / m.norm(x).shape[1], "its shape is asked for"),
    "the size": (lambda m, x: m.pair(x) / m.norm(x).size(1), "its shape is asked for"),
}


def around(function: Callable[[Stream, Tensor], Tensor]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), Stream(function), nn.Flatten(), nn.Linear(32, 2))


@pytest.mark.parametrize("name", APART)
def test_between_splits_every_token_is_by_itself(name: str) -> None:
    (found,) = shared(around(APART[name]), torch.randn(6, 4, 3))
    assert not found.why and (found.tps, found.size, found.cuts, found.end) == ((2, 4), 4, ("0",), 2)
    assert [word for _, _, word in sorted(found.meets, key=lambda m: m[1])] == ["gather", "scatter", "gather"]


@pytest.mark.parametrize("name", TOGETHER)
def test_what_needs_all_tokens_is_said(name: str) -> None:
    function, why = TOGETHER[name]
    (found,) = shared(around(function), torch.randn(6, 4, 3))
    assert f"all 4 tokens are needed from layer 1 on ({why})" in found.why and not found.splits


def test_gpt_shares_tokens_from_its_words_to_its_classes() -> None:
    net, ids = GPT(Shape(2, 8, 2, 16)), torch.randint(0, 256, (4, 16))
    two, more = shared(net, ids, ids)
    assert (two.tps, two.cuts, two.end, two.why) == ((2,), ("wpe",), -1, "")
    words = [word for _, _, word in sorted((place, layer, word) for layer, place, word in two.meets)]
    assert words == ["scatter", *["gather", "scatter"] * 4, "gather", "act"]
    assert more.tps == (4, 8, 16) and "h.0.attn mixes them" in more.why
    own, _ = shared(net, ids)  # a loss of one's own sees all scores
    assert own.cuts == ("wpe", "wte") and own.end == 3 and not any(word == "act" for _, _, word in own.meets)


def test_dropout_between_splits_is_of_ones_own_tokens() -> None:
    draw = Draw(samples=6)
    net = nn.Sequential(nn.Linear(3, 8), KeyedDropout(0.5, "1", draw), *around(APART["a residual"])[1:])
    (found,) = shared(net, torch.randn(6, 4, 3), draw=draw)
    assert found.noise == ((("1", 0), -2),)


def test_networks_without_tokens_have_none() -> None:
    assert shared(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)), torch.randn(4, 6)) == ()
    assert shared(nn.Sequential(nn.Linear(6, 8)), torch.randn(4, 6)) == ()
    frozen = around(APART["a number of the samples"])
    frozen[0].requires_grad_(False)
    (found,) = shared(frozen, torch.randn(6, 4, 3))
    assert found.why, "a border of a pair whose input needs no gradient is not met in a backward"


def test_facts_carry_them() -> None:
    (found,) = shared(around(APART["a residual"]), torch.randn(6, 4, 3))
    assert tokens_of(json.loads(json.dumps(asdict(found)))) == found


# -- tokens of several ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("parts", [2, 4])
def test_what_is_collected_is_in_order_and_what_is_summed_is_ones_own(samples: int, parts: int) -> None:
    whole = torch.randn(samples, 8, 5)
    own = [own_tokens(whole, index, parts) for index in range(parts)]
    every = torch.stack(own)
    for index in range(parts):
        assert torch.equal(collect(own[index], index, parts, lambda t: t.copy_(every)), whole)
        kept = whole.clone()
        assert torch.equal(reduce(whole, index, parts, lambda t: t.mul_(parts)), parts * own[index])
        assert torch.equal(whole, kept), "what is given stays as it is"
    assert not torch.equal(collect(own[0], 0, parts, lambda t: t.copy_(every.flip(0))), whole)


# -- the program ---------------------------------------------------------------------------------------------------

PAIRS = (
    Split("columns", 8, ("a", "b"), ((0, 1, "grad"), (0, 2, "act")), (0, 0)),
    Split("columns", 8, ("c", "d"), ((2, 3, "grad"), (3, 4, "act")), (2, 3)),
)
ALONG = tuple((layer, place, MEETS[word]) for split in PAIRS for layer, place, word in split.meets)
TOKENS = (Tokens((2, 4), 8, splits=(0, 1), meets=ALONG), Tokens((8,), 8, "all 8 tokens are needed from layer 1 on"))
LAYOUT = Layout((2, 0, 3, 4), weight_in_data=True, statistics=True, clip=True, splits=PAIRS, tokens=TOKENS)
HYBRIDS = (
    *("tp=2", "tp=4,microbatches=2", "dp=2,tp=2", "pp=2,tp=2,microbatches=4", "dp=2,tp=2,zero=1", "dp=2,pp=2,tp=2"),
    *("pp=2,tp=2,schedule=zb-h1,microbatches=4", "dp=2,tp=2,sync=average@3", "dp=2,tp=2,sync=compressed"),
)


def made(text: str) -> Program:
    return lower(parse(f"{text},sequence=1"), LAYOUT, steps_per_epoch=5)


@pytest.mark.parametrize("text", HYBRIDS)
def test_hybrids_are_whole_programs(text: str) -> None:
    program = made(text)
    check(program)
    assert parse_program(program.text()) == program and program.sequenced()
    assert simulate(program, uniform()).makespan > 0
    for row in program.body(program.period[0][0]):
        acts = [i.base for i in row if i.starts and i.base in ("GatherAct", "ScatterAct")]
        grads = [i.base for i in row if i.starts and i.base in ("GatherGrad", "ScatterGrad")]
        assert len(acts) == len(grads) == program.microbatches * 4 // program.mesh.pp
        (whole,) = [n for n, i in enumerate(row) if i.buffer == "whole" and i.starts]
        assert not any(i.op in ("B", "I", "W") for i in row[whole:])
        assert not any(i.buffer == "grads" for i in row[:whole]), "before replicas reduce, and round, what is complete"
    assert not any(i.base.endswith("Grad") and i.axis for row in program.body("evaluate") for i in row)
    assert not lower(parse(text), LAYOUT, steps_per_epoch=5).sequenced()


def test_forwards_and_backwards_stop_at_both_borders() -> None:
    program = made("tp=2")
    assert program.words == (("gather", "scatter", "gather", "scatter"),)
    assert [begins(op, program.words[0]) for op in "FBE"] == [[0, 1, 2, 3, 4]] * 3
    labels = [i.label() for i in program.body("step")[0] if i.starts]
    assert [label for label in labels if label[:3] in ("AGA", "RSA", "AGG", "RSG")] == [
        *("AGA0.0<", "RSA0.1<", "AGA0.2<", "RSA0.3<", "AGG0.3<", "RSG0.2<", "AGG0.1<", "RSG0.0<")
    ]
    assert "ARw<" in labels


def doubled(row: Row) -> Row:
    at = next(n for n, i in enumerate(row) if i.buffer == "whole")
    return [*row[: at + 2], *(replace(i, token=99) for i in row[at : at + 2]), *row[at + 2 :]]


WHOLE = {"buffer": "whole"}
WRONG: dict[str, tuple[str, Callable[[Row], Row], str]] = {
    "tokens not gathered": ("tp=2", without("GatherAct", segment=0), "F0.1 before the other ranks' tokens behind"),
    "tokens not scattered": ("tp=2", without("ScatterAct", segment=1), "F0.2 before one's own tokens of segment 1"),
    "gradients not gathered": ("tp=2", without("GatherGrad", segment=3), "before the gradients of the other ranks'"),
    "gradients not scattered": ("tp=2", without("ScatterGrad", segment=2), "before the summed gradients of one's own"),
    "not added up": ("tp=2", without("AllReduce", **WHOLE), "before the gradients of whole parameters are added up"),
    "added up early": ("tp=2", moved("AllReduceStart", "B", **WHOLE), "are added up before their last backward"),
    "added up twice": ("tp=2", doubled, "adds up the gradients of whole parameters twice"),
    "added up late": ("dp=2,tp=2", moved("AllReduce", "Update", **WHOLE), "before the replicas' reduction"),
    "at another border": (
        "tp=2",
        lambda row: [replace(i, segment=0) if i.base == "ScatterAct" else i for i in row],
        "has borders",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_with_tokens_are_refused_where_they_are(name: str) -> None:
    text, change, why = WRONG[name]
    assert why in refused(edited(made(text), 1, change), 1)


@pytest.mark.parametrize(
    "text, layout, why",
    [
        ("tp=2", replace(LAYOUT, tokens=()), "nothing of what tp splits has .samples, tokens, width.; leave it out"),
        ("tp=8", LAYOUT, "all 8 tokens are needed from layer 1 on; leave it out"),
        ("tp=2", replace(LAYOUT, tokens=TOKENS[1:]), "tp=2 does not divide its 8 tokens; none would"),
        ("tp=3", LAYOUT, "tp=3: it divides none of"),
        ("tp=2,recompute=all", LAYOUT, "leave one of both out"),
    ],
)
def test_what_cannot_share_tokens_is_refused(text: str, layout: Layout, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        lower(parse(f"{text},sequence=1"), layout)


def test_people_are_told_what_is_shared() -> None:
    layout = replace(LAYOUT, modules=("a", "b", "c", "d", "norm"))
    plans = [parse("tp=2"), parse("tp=4,sequence=1"), parse("dp=2")]
    assert told_of(plans, layout) == [
        "tp=2 splits a+b by 8 columns, c+d by 8 columns; every rank has all of norm",
        "tp=4,sequence=1 splits a+b by 8 columns, c+d by 8 columns; every rank has all of norm, for 2 of 8 tokens",
    ]


def test_the_space_has_it_where_a_network_can() -> None:
    can = space(4, 4, hybrids=True, sequence=True)
    meshes = {parse(text).mesh for text in ("tp=2", "tp=4", "dp=2,tp=2", "pp=2,tp=2")}
    assert {plan.mesh for plan in can if plan.sequence} == meshes
    assert [plan for plan in can if not plan.sequence] == space(4, 4, hybrids=True)
    assert not any(plan.sequence for plan in space(4, 4, sequence=True)), "seldom the fastest"
