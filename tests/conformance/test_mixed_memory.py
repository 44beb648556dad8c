"""In mixed precision, too, the computed memory is what hooks and flat buffers count; of activations every byte."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_memory import NETS, STREAM, WITHIN, apart, counted, named, sizes_of
from test_odd_networks import FINE, LABELS
from test_reference import HEAD, TASKS, spec_of

from paraxis.errors import OutOfMemory
from paraxis.measure.layers import measure_layers
from paraxis.plan.plan import Plan, parse
from paraxis.program.lower import lower
from paraxis.program.memory import Piece, Sizes, memory
from paraxis.run.duties import Duties
from paraxis.session import Session
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

# What comes into a layer is in float32 and is copied three times, unless it is a leaf: what a stage has received, a
# segment begins with. Two layers share a weight, of which every segment has a copy.
THREE = (
    HEAD
    + """
class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
    def forward(self, x):
        return self.norm(x + torch.tanh(self.q(x)) * self.k(x) + self.v(x))
def net():
    layers = Three(), Three(), Three(), nn.Linear(6, 3)
    layers[2].v.weight = layers[1].v.weight
    return nn.Sequential(*layers)
"""
    + LABELS
)
CASES = [
    ("mlp", "pp=3,schedule=zb-h1,microbatches=4"),
    ("mlp", "pp=2,interleave=2,schedule=gpipe,microbatches=2"),
    ("cnn", "serial"),
    ("cnn", "dp=2,bucket_bytes=64"),
    ("cnn", "pp=2,schedule=zb-h1,microbatches=4"),
    ("cnn", "pp=2,schedule=gpipe,microbatches=4,recompute=0"),
    ("batch norm", "dp=2,pp=2,microbatches=4"),
    ("transformer", "pp=2,microbatches=4"),
    ("transformer", "dp=2,recompute=all"),
    ("wide", "pp=2,tp=2,microbatches=4"),
    ("gpt", "tp=2"),
    ("gpt", "pp=2,tp=2,schedule=zb-h1,microbatches=4,sequence=1"),
    ("three", "serial"),
    ("three", "pp=2,split=2+2,microbatches=4"),
    ("three", "dp=2,pp=2,split=1+3,bucket_bytes=16"),
    ("three", "pp=3,split=1+2+1,microbatches=2,schedule=zb-h1"),
    ("frozen first layer", "pp=2,split=1+4,microbatches=4,schedule=zb-h1"),
    ("tied within a stage", "pp=2,split=3+2"),
]
SHARDED = [("cnn", "dp=2,zero=2,bucket_bytes=1000"), ("cnn", "dp=2,pp=2,microbatches=4,zero=3,schedule=zb-h1")]


def task_named(folder: Path, name: str) -> TaskSpec:
    if name in NETS:
        return named(folder, name)
    if name == "three":
        return spec_of(folder, name, THREE, {"lr": 0.1})
    if name in FINE:
        return spec_of(folder, name, HEAD + FINE[name][0], FINE[name][1])
    return spec_of(folder, name, *TASKS[name])


def missing(spec: TaskSpec, plan: Plan) -> list[int]:
    """Of every rank, how many bytes of activations more are counted than computed."""
    pairs = zip(*counted(spec, plan), strict=True)
    return [found["activations"] - own.activations - own.communication for own, found in pairs]


@pytest.mark.parametrize("name, text", CASES)
def test_activations_are_the_counted_ones_to_the_byte(name: str, text: str, folder: Path) -> None:
    spec, plan = task_named(folder, name), replace(parse(text), precision="bf16")
    assert set(missing(spec, plan)) == {0}


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_fp16_keeps_as_much(name: str, folder: Path) -> None:
    """Its losses are scaled by a number, which is no tensor."""
    spec, plan = task_named(folder, name), parse("pp=2,microbatches=2,precision=fp16")
    assert set(missing(spec, plan)) == {0}
    assert [m.total for m in counted(spec, plan)[0]] == [
        m.total for m in counted(spec, replace(plan, precision="bf16"))[0]
    ]


@pytest.mark.parametrize("name, text", SHARDED)
def test_shares_stay_in_float32(name: str, text: str, folder: Path) -> None:
    assert apart(task_named(folder, name), replace(parse(text), precision="bf16")) < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("network, batch", [("mlp", 32), ("cnn", 16), ("gpt:nano", 2), ("resnet18", 4)])
def test_the_zoo(network: str, batch: int, precision: str) -> None:
    spec = TaskSpec(network=network, batch=batch)
    for text in ("dp=1", "pp=2,microbatches=2"):
        for own, found in zip(*counted(spec, parse(f"{text},precision={precision}")), strict=True):
            assert own.activations + own.communication == found["activations"]
            assert abs(own.total / sum(found.values()) - 1) < 1e-5  # a learning rate's counter


def test_a_network_by_hand(folder: Path) -> None:
    """Autograd keeps what products are made of, in 16 bits: inputs, and those weights behind which a gradient is
    wanted. The loss is made in float32, of its softmax and of the labels, which are the data's."""
    spec = spec_of(folder, "by hand", "mlp:12-64-48-80", {"batch": 64, "data": STREAM.format("1x3x4,80")})
    task = make_task(spec)

    def of(text: str) -> int:
        plan = parse(f"{text},precision=bf16")
        program = lower(plan, task.layout())
        return memory(program, plan, sizes_of(spec, precision="bf16"), 64)[0].activations

    weights, rows, outputs = 2 * (64 * 48 + 48 * 80), 2 * (12 + 64 + 48), 4 * 80
    loss = of("dp=1") - weights - 64 * rows
    assert 64 * outputs <= loss <= 64 * outputs + 64  # and some numbers
    assert of("dp=2") == weights + 32 * (rows + outputs) + loss - 64 * outputs
    assert of("microbatches=4") == weights + 16 * (rows + outputs) + loss - 64 * outputs


def test_a_microbatch_in_flight_has_its_own_copies(folder: Path) -> None:
    """Of a large network and small microbatches GPipe in bf16 keeps more than in fp32: m times half of the weights."""
    spec = spec_of(folder, "deep", "mlp:64-64-64-64-64-10", {"batch": 8, "data": "synthetic:128,1x8x8,10"})
    task, found = make_task(spec), {}
    for precision in ("fp32", "bf16"):
        plan = parse(f"pp=2,split=4+6,schedule=gpipe,microbatches=8,precision={precision}")
        assert set(missing(spec, plan)) == {0}
        ranks = memory(lower(plan, task.layout()), plan, sizes_of(spec, precision=precision), 8)
        found[precision] = ranks[1].activations
    inside = sizes_of(spec).parameters[4:]
    copies = 8 * sum(size // 2 for size in inside)  # biases are copied, too, but nobody keeps those copies
    assert found["fp32"] + 0.9 * copies < found["bf16"] < found["fp32"] + copies


def forgotten(piece: Piece) -> Piece | None:
    return None if piece.of is not None and piece.of < 0 else piece


def one_each(piece: Piece) -> Piece | None:
    return replace(piece, of=None)


def as_leaf(piece: Piece) -> Piece | None:
    return piece if piece.of is None else replace(piece, of=-1000 - abs(piece.of))


def spoiled(sizes: Sizes, change: Callable[[Piece], Piece | None]) -> Sizes:
    made = (tuple(piece for piece in map(change, own) if piece is not None) for own in sizes.saved)
    return replace(sizes, saved=tuple(made))


@pytest.mark.parametrize(
    "change, name, text",
    [
        (forgotten, "three", "serial"),
        (one_each, "three", "serial"),  # the weight that two layers share
        (one_each, "three", "pp=2,split=1+3"),  # and what has been received
        (as_leaf, "three", "serial"),  # what is no leaf there
    ],
)
def test_copies_are_counted_as_autocast_makes_them(
    change: Callable[[Piece], Piece | None], name: str, text: str, folder: Path
) -> None:
    """Mutants: copies of weights forgotten, one for each use, or one only of what autocast copies again and again."""
    spec, plan = task_named(folder, name), replace(parse(text), precision="bf16")
    program, sizes = lower(plan, make_task(spec).layout(), 3), sizes_of(spec, precision="bf16")
    right, wrong = (memory(program, plan, own, spec.batch or 8) for own in (sizes, spoiled(sizes, change)))
    assert set(missing(spec, plan)) == {0}
    assert any(a.activations != b.activations for a, b in zip(right, wrong, strict=True))


@pytest.mark.parametrize(
    "text, how", [("serial", ("fp32", False)), ("pp=2,schedule=zb-h1,microbatches=4", ("bf16", False))]
)
def test_another_trial_misses_them(text: str, how: tuple[str, bool], folder: Path) -> None:
    """Mutants: tried in float32, or with whole backwards where plans leave weights' gradients to a W."""
    spec, plan = task_named(folder, "transformer"), replace(parse(text), precision="bf16")
    program = lower(plan, make_task(spec).layout(), 3)
    wrong = memory(program, plan, sizes_of(spec, 1, 0, *how), make_task(spec).batch)
    found = counted(spec, plan)[1]
    assert any(a.activations + a.communication != b["activations"] for a, b in zip(wrong, found, strict=True))


class Solo:
    """The rank that works alone, in this process; on its GPUs, which there are not, samples take more, or too much."""

    def __init__(self, spec: TaskSpec, gpus: int, room: bool) -> None:
        self.duties, self.facts, self.room = Duties("solo"), {"gpus": {"count": gpus}}, room
        self.duties.spec, self.asked = spec, []  # type: ignore[var-annotated]

    def alive(self) -> bool:
        return True

    def ask(self, request: dict[str, Any]) -> list[Any]:
        self.asked.append(request["device"])
        on_gpu = request["device"] != "cpu"
        if on_gpu and not self.room:
            raise OutOfMemory("the GPU is out of memory")
        sizes = self.duties.sizes(request | {"device": "cpu"}, b"", lambda _: None)
        twice = [[piece | {"each": 2 * piece["each"]} for piece in own] for own in sizes["saved"]]
        return [sizes | {"saved": twice} if on_gpu else sizes]


def session_with(spec: TaskSpec, gpus: int, room: bool = True) -> tuple[Session, list[str]]:
    solo: Any = Solo(spec, gpus, room)
    task = make_task(spec)
    facts = measure_layers(task, task.batch, seconds=0.01)
    return Session(spec, {}, {}, None, Path(), lambda *_: None, pools={"solo": solo}, facts=facts), solo.asked


def test_a_session_tries_each_precision_once(folder: Path) -> None:
    spec, texts = (
        task_named(folder, "cnn"),
        ("dp=2,precision=bf16", "pp=2,schedule=zb-h1,microbatches=4,precision=bf16"),
    )
    session, asked = session_with(spec, 0)
    for text in texts:
        assert session.memory_of_ranks(parse(text)) == counted(spec, parse(text))[0]
    assert session.memory_of_ranks(parse("dp=4,precision=bf16")) and session.memory(parse("dp=2"))
    assert asked == ["cpu", "cpu"]  # with whole backwards, and with W


def test_where_a_plan_computes_it_is_tried(folder: Path) -> None:
    """A GPU's own lists of operations count for it, unless the network has no room there; or no GPU is there to ask."""
    spec, text = task_named(folder, "cnn"), "pp=2,microbatches=4,precision=bf16,device={}"
    one, other = counted(spec, parse(text.format("cpu")))[0]
    session, asked = session_with(spec, 1)
    found = session.memory_of_ranks(parse(text.format("cpu+cuda:0")))
    assert found[0] == one and found[1].activations > other.activations and asked == ["cpu", "cuda:0"]
    for gpus, room, wanted in ((1, False, ["cuda:0", "cpu"]), (0, True, ["cpu"])):
        session, asked = session_with(spec, gpus, room)
        assert session.memory_of_ranks(parse(text.format("cuda"))) == [one, other] and asked == wanted
