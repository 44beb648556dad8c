"""What ranks can share: found in a network's forward, chosen for a number of ranks, cut, checked and put together."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_check import edited, moved, refused, without
from torch import Tensor, nn

from paraxis.engine.pausing import Pausing
from paraxis.errors import PlanError, ProgramError
from paraxis.plan.plan import parse
from paraxis.program.check import check
from paraxis.program.cut import Layout
from paraxis.program.instructions import REDUCES, Instruction, Program, parse_program
from paraxis.program.lower import lower
from paraxis.program.meetings import begins, reach
from paraxis.program.shares import Split, chosen, split_of, told
from paraxis.program.simulate import simulate, uniform
from paraxis.run.shards import whole
from paraxis.task.gpt import GPT, Shape
from paraxis.task.masks import kept, kept_of_part
from paraxis.task.randomness import Draw, KeyedDropout
from paraxis.task.shared import CrossEntropy, Shard
from paraxis.task.tensor import find


def found(net: nn.Module, *shape: int, labels: Tensor | None = None) -> list[str]:
    x = torch.randn(4, *shape) if shape else torch.randint(0, 5, (4, 3))
    splits = find(net, [net], lambda layer, given: layer(given), x, Draw(), labels)
    return [split.label() for split in splits]


class Wrapped(nn.Module):
    """Two layers and something between them."""

    def __init__(self, between: Callable[..., Any], width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, width), nn.Linear(width, 6), nn.Linear(6, width)
        self.scale, self.between = nn.Parameter(torch.ones(width)), between

    def forward(self, x: Tensor) -> Tensor:
        """Whatever `between` makes of it."""
        return self.between(self, x)


SPLIT: dict[str, Callable[..., Tensor]] = {
    "a function": lambda m, x: m.b(F.gelu(m.a(x))),
    "nothing": lambda m, x: m.b(m.a(x)),
    "in place": lambda m, x: m.b(m.a(x).relu_().mul_(2.0)),
    "several": lambda m, x: m.b(torch.tanh(m.a(x) * 0.5 + 1).sigmoid()),
    "a residual around": lambda m, x: x + m.b(F.relu(m.a(x))),
    "a square of its own": lambda m, x: m.b(h * h.sigmoid() if (h := m.a(x)).ndim else h),
}
GATED: dict[str, Callable[..., Tensor]] = {
    "a gate": lambda m, x: m.b(F.silu(m.a(x)) * m.c(x)),
}
WHOLE: dict[str, Callable[..., Tensor]] = {
    "a softmax": lambda m, x: m.b(m.a(x).softmax(-1)),
    "a norm": lambda m, x: m.b(F.layer_norm(m.a(x), (8,))),
    "another user": lambda m, x: m.b(F.relu(h := m.a(x))) + h[:, :6],
    "a parameter": lambda m, x: m.b(m.a(x) * m.scale),
    "another tensor": lambda m, x: m.b(m.a(x) + torch.ones(8)),
    "a sum over columns": lambda m, x: m.b(m.a(x) * m.c(x).sum(-1, keepdim=True)),
    "a reshape": lambda m, x: m.b(m.a(x).view(-1, 2, 4).flip(1).flatten(1)),
    "a layer called twice": lambda m, x: m.b(m.a(x)) + m.b(m.a(2 * x)),
    "weights used elsewhere": lambda m, x: m.b(m.a(x)) + m.b.weight.sum(),
    "its own input": lambda m, x: m.b(F.pad(x, (0, 2))),
}


@pytest.mark.parametrize("between", SPLIT)
def test_two_layers_with_elementwise_functions_between_are_a_pair(between: str) -> None:
    assert found(Wrapped(SPLIT[between]), 6) == ["a+b by 8 columns"]


def test_a_gate_makes_three_layers_one_split() -> None:
    assert found(Wrapped(GATED["a gate"]), 6) == ["a+c+b by 8 columns"]


@pytest.mark.parametrize("between", WHOLE)
def test_what_mixes_columns_or_goes_elsewhere_is_no_pair(between: str) -> None:
    assert found(Wrapped(WHOLE[between]), 6) == []


def test_layers_of_another_class_hooked_or_tied_are_left_whole() -> None:
    class Own(nn.Linear):
        pass

    hooked = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    hooked[0].register_forward_hook(lambda module, given, made: made * 2)
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    tied[0].weight = tied[2].weight
    for net in (nn.Sequential(Own(6, 8), nn.ReLU(), nn.Linear(8, 6)), hooked, tied, nn.Sequential(nn.Linear(6, 8))):
        assert found(net, 6) == []
    parametrised = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    nn.utils.parametrizations.weight_norm(parametrised[0])
    assert found(parametrised, 6) == []


def test_pairs_may_overlap_and_the_first_that_divides_is_taken() -> None:
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    splits = find(net, list(net), lambda layer, x: layer(x), torch.randn(4, 6), Draw(), None)
    assert [s.label() for s in splits] == ["0+2 by 9 columns", "2+4 by 8 columns"]
    assert [s.label() for s in chosen(3, splits)] == ["0+2 by 9 columns"]
    assert [s.label() for s in chosen(2, splits)] == ["2+4 by 8 columns"]
    assert [[w for _, _, w in s.meets] for s in splits] == [["act"], ["grad", "act"]], "data need no gradient"
    with pytest.raises(PlanError, match=r"divides none of 0\+2 by 9 columns, 2\+4 by 8 columns; tp=2, tp=3, tp=4"):
        chosen(5, splits)
    assert told(2, splits, ["0", "2", "4"]) == "tp=2 splits 2+4 by 8 columns; every rank has all of 0"


def test_dropout_between_is_known_by_its_call() -> None:
    draw = Draw()
    net = nn.Sequential(nn.Linear(6, 8), KeyedDropout(0.5, "1", draw), nn.Linear(8, 6))
    (split,) = find(net, list(net), lambda layer, x: layer(x), torch.randn(4, 6), draw, None)
    assert split.noise == ((("1", 0), -1),) and split.span == (0, 2)
    assert "dropout" not in vars(draw), "the draw is as it was"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert split_of({"unit": "columns", "size": 8, "modules": ["0", "2"], "meets": [[2, 9, "act"]], "span": [0, 2],
                     "noise": [[["1", 0], -1]]}) == replace(split, meets=((2, 9, "act"),))  # fmt: skip


def test_gpt_shares_heads_columns_and_its_tied_words() -> None:
    net, ids = GPT(Shape(2, 8, 2, 16)), torch.randint(0, 256, (4, 16))
    splits = find(net, net.stages(), lambda layer, x: layer(x), ids, Draw(), ids)
    assert sorted({split.label() for split in splits}) == [
        *("h.0.attn.c_attn+h.0.attn.c_proj by 2 heads", "h.0.mlp.c_fc+h.0.mlp.c_proj by 32 columns"),
        *("h.1.attn.c_attn+h.1.attn.c_proj by 2 heads", "h.1.mlp.c_fc+h.1.mlp.c_proj by 32 columns"),
        "wte+lm_head by 256 classes",
    ]
    assert not [s for s in find(net, net.stages(), lambda m, x: m(x), ids, Draw(), None) if s.unit == "classes"]
    words = [word for _, _, word in sorted((place, layer, word) for s in splits for layer, place, word in s.meets)]
    assert words == ["act", *["grad", "act"] * 4, "grad", "act"]


@pytest.mark.parametrize("classes, enough", [(64, True), (63, False)])
def test_few_classes_are_not_worth_it(classes: int, enough: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, classes))
    labels = torch.zeros(4, dtype=torch.int64)
    assert found(net, 6, labels=labels) == ([f"2 by {classes} classes"] if enough else [])
    assert found(net, 6, labels=None) == [], "a loss of one's own sees all scores"


# -- parts of tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim, blocks, parts", [(0, 1, 2), (0, 3, 2), (1, 1, 4), (0, 3, 4), (1, 2, 2)])
def test_parts_make_the_whole(dim: int, blocks: int, parts: int) -> None:
    tensor = torch.randn(24, 8)
    cut = [Shard(dim, index, parts, blocks).of(tensor) for index in range(parts)]
    assert all(part.numel() * parts == tensor.numel() and part.is_contiguous() for part in cut)
    assert np.array_equal(whole([part.numpy() for part in cut], dim, blocks), tensor.numpy())
    assert not np.array_equal(whole([part.numpy() for part in reversed(cut)], dim, blocks), tensor.numpy())


def test_heads_are_split_within_queries_keys_and_values() -> None:
    rows = torch.arange(12)[:, None]  # 3 blocks of 2 heads of 2
    assert Shard(0, 1, 2, 3).of(rows)[:, 0].tolist() == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize("outer, run, parts", [(1, 6, 2), (3, 4, 2), (2, 5, 3), (1, 1, 4), (4, 2, 1)])
def test_masks_of_parts_are_parts_of_the_mask(outer: int, run: int, parts: int) -> None:
    every = kept(7, 3, 5, outer * parts * run, 0.4).reshape(5, outer, parts, run)
    for index in range(parts):
        mask = kept_of_part(7, 3, 5, outer, run, index, parts, 0.4)
        assert np.array_equal(mask.reshape(5, outer, run), every[:, :, index])
    assert parts == 1 or not np.array_equal(every[:, :, 0], every[:, :, 1])


class Ranks:
    """Several ranks' meeting, played by one: each pass adds what a rank tells, the last passes have it all."""

    kind = "F"

    def __init__(self) -> None:
        self.told: Tensor | None = None
        self.done = False

    def share(self, part: Tensor) -> Tensor:
        if not self.done:
            self.told = part.clone() if self.told is None else self.told + part
            return part
        assert self.told is not None
        return part.copy_(self.told)

    def passed(self, word: str) -> int:
        return 0

    def share_back(self, number: int, part: Tensor) -> Tensor:
        return part


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("far", [0.0, 800.0])
def test_cross_entropy_of_parts_is_that_of_the_whole(parts: int, far: float) -> None:
    generator = torch.Generator().manual_seed(parts)
    scores = (3 * torch.randn(6, 8, generator=generator, dtype=torch.float64) + far).requires_grad_()
    labels = torch.tensor([0, 7, 3, -100, 4, 1])
    right = F.cross_entropy(scores, labels, reduction="sum")
    (slope,) = torch.autograd.grad(2 * right, scores)
    meeting, slopes, losses = Ranks(), [], []
    for meeting.done in (False, True):
        slopes, losses = [], []
        for index, own in enumerate(scores.detach().chunk(parts, 1)):
            own = own.clone().requires_grad_()
            loss = CrossEntropy.apply(own, labels, index, parts, meeting)
            losses.append(loss.detach())
            slopes.append(torch.autograd.grad(2 * loss, own)[0])
    assert all(torch.allclose(loss, right, rtol=1e-13) for loss in losses)
    assert torch.allclose(torch.cat(slopes, 1), slope, rtol=1e-12, atol=1e-14)


# -- the program -----------------------------------------------------------------------------------------------

PAIRS = (
    Split("columns", 8, ("a", "b"), ((0, 1, "grad"), (0, 2, "act")), (0, 0)),
    Split("columns", 8, ("c", "d"), ((2, 3, "grad"), (3, 4, "act")), (2, 3)),
)
LAYOUT = Layout(parameters=(2, 0, 3, 4), weight_in_data=True, statistics=True, clip=True, splits=PAIRS)
HYBRIDS = (
    *("tp=2", "tp=4", "tp=2,microbatches=3", "dp=2,tp=2", "pp=2,tp=2,microbatches=4", "pp=4,tp=2,microbatches=2"),
    *("dp=2,pp=2,tp=2,schedule=gpipe,microbatches=2", "dp=2,tp=2,sync=average@3", "pp=2,interleave=2,tp=2"),
    *(f"dp=2,{axes},zero={zero}" for axes in ("tp=2", "pp=2,tp=2,schedule=zb-h1,microbatches=2") for zero in (1, 2, 3)),
)


def made(text: str) -> Program:
    return lower(parse(text), LAYOUT, steps_per_epoch=5)


@pytest.mark.parametrize("text", HYBRIDS)
def test_hybrids_are_whole_programs(text: str) -> None:
    program = made(text)
    check(program)
    assert parse_program(program.text()) == program
    assert simulate(program, uniform()).makespan > 0
    for rank, row in enumerate(program.body(program.period[0][0])):
        for before, i in pairwise(row):
            if i.op in ("ReduceActStart", "ReduceGradStart"):
                assert before.op in ("F" if i.base == "ReduceAct" else "BI"), "what has just been made"
        sums = [i for i in row if i.base in REDUCES and i.starts]
        stages = [program.stages[s] for s in program.stages_of(rank)]
        own = sum(first <= layer < last for first, last in stages for p in PAIRS for layer, _, _ in p.meets)
        assert len(sums) == own * program.microbatches
    assert not any(i.base == "ReduceGrad" for row in program.body("evaluate") for i in row)
    assert any(i.base == "ReduceAct" for row in program.body("evaluate") for i in row)


def test_forwards_and_backwards_stop_where_they_meet() -> None:
    program = made("tp=2")
    assert program.words == (("grad", "act", "grad", "act"),)
    row = program.body("step")[0]
    assert [(i.op, i.segment) for i in row if i.op in ("F", "B")] == [
        *(("F", 0), ("F", 2), ("F", 4), ("B", 3), ("B", 1), ("B", 0))
    ]
    assert begins("E", program.words[0]) == [0, 2, 4] and begins("B", program.words[0]) == [0, 1, 3]
    assert reach("F", program.words[0], 2) == 3 and reach("B", program.words[0], 1) == 2
    assert any("ReduceAct" in i.op and i.label() == "RA0.1<" for i in row)


WRONG: dict[str, tuple[Callable[[list[Instruction]], list[Instruction]], str]] = {
    "lost": (without("ReduceAct", segment=1), "F0.2 before the summed outputs of segment 1"),
    "lost back": (without("ReduceGrad", segment=2), "before the summed gradients behind segment 2"),
    "late": (moved("ReduceActWait", "Update", segment=1), "before the summed outputs of segment 1"),
    "elsewhere": (lambda row: [replace(i, segment=0) if i.base == "ReduceAct" else i for i in row], "has borders"),
    "another microbatch": (
        lambda row: [replace(i, microbatch=1 - i.microbatch) if i.base == "ReduceAct" else i for i in row],
        "must stand between segments 1 and 2",
    ),
    "nothing stops it": (
        lambda row: [replace(i, segment=1) if i.op == "F" and i.segment == 2 else i for i in row],
        "nothing stops a computation in front of segment 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_sums_that_are_missing_or_in_the_wrong_place_are_refused(name: str) -> None:
    change, why = WRONG[name]
    assert why in refused(edited(made("tp=2,microbatches=2"), 1, change), 1)


def test_a_computation_goes_on_before_its_stage_begins_another() -> None:
    def crossed(row: list[Instruction]) -> list[Instruction]:
        """The second microbatch's first run in front of the first one's second run."""
        begun = next(n for n, i in enumerate(row) if i.op == "F" and i.microbatch == 1)
        moving = [row[begun - 1], row[begun]] if row[begun - 1].op == "Load" else [row[begun]]
        rest = [i for i in row if i not in moving]
        at = next(n for n, i in enumerate(rest) if i.op == "F" and (i.segment, i.microbatch) == (2, 0))
        return [*rest[:at], *moving, *rest[at:]]

    program = made("tp=2,pp=2,schedule=gpipe,microbatches=2")
    assert "stands still in the middle of stage 0" in refused(edited(program, 0, crossed), 0)


def test_ranks_that_sum_in_another_order_are_refused() -> None:
    def other(row: list[Instruction]) -> list[Instruction]:
        return [replace(i, stage=7) if i.base == "ReduceAct" and i.segment == 1 else i for i in row]

    program = made("tp=2")
    body = program.body("step")
    with pytest.raises((ProgramError, IndexError)):
        check(replace(program, bodies=(("step", (tuple(other(list(body[0]))), body[1])), *program.bodies[1:])))


@pytest.mark.parametrize(
    "text, layout, why",
    [
        ("tp=2", replace(LAYOUT, splits=()), "none of its layers can be split"),
        ("tp=3", LAYOUT, r"divides none of a\+b by 8 columns, c\+d by 8 columns; tp=2, tp=4, tp=8 would fit"),
        ("dp=2,tp=2,bucket_bytes=1K", LAYOUT, "leave bucket_bytes out"),
        ("dp=2,tp=2,zero=3,bucket_bytes=1K", LAYOUT, "leave bucket_bytes out"),
        ("dp=2,tp=2", replace(LAYOUT, norms=(1, 0, 0, 0)), "set bn_group lower"),
    ],
)
def test_what_cannot_be_shared_is_refused(text: str, layout: Layout, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        lower(parse(text), layout)


def test_the_thread_comes_by_borders_in_their_order() -> None:
    pausing = Pausing([torch.empty(0)] * 3, ("grad", "act", "grad"))
    numbers: list[Any] = []

    def forward() -> Tensor:
        numbers.append(pausing.passed("grad"))
        made = pausing.share(torch.ones(2))
        numbers.append(pausing.passed("grad"))
        return made

    pausing.forward(forward)
    assert pausing.at == 1
    pausing.moments[1].mul_(5)
    pausing.resume()
    assert pausing.at is None and pausing.end().tolist() == [5, 5] and numbers == [0, 2]
    pausing.forward(lambda: pausing.share(torch.ones(2)), "E")
    assert pausing.at == 1, "an evaluation meets no gradients"
    with pytest.raises(ProgramError, match="unlike when the network was tried"):
        pausing.forward(lambda: pausing.share(torch.ones(2)))
    with pytest.raises(ProgramError, match="computed again in the backward"):
        pausing.backward(lambda: pausing.passed("grad"))
    pausing.backward(lambda: pausing.share_back(0, torch.ones(1)))
    with pytest.raises(ProgramError, match=r"does not meet border 2 \(grad\)"):
        pausing.check_backward(3)
    pausing.close()
