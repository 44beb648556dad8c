"""THE conformance test: every small plan, through the reference interpreter, computes what plain serial code computes.

In float64, over some steps: losses, every parameter and running statistic, on every rank. Each seeded fault must fail.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paraxis.engine.torch_engine import TorchEngine
from paraxis.plan.plan import Plan, parse, period
from paraxis.plan.space import space
from paraxis.program.check import check
from paraxis.program.cut import Layout
from paraxis.program.faults import FAULTS
from paraxis.program.instructions import Program
from paraxis.program.lower import lower
from paraxis.run import null, reference, serial
from paraxis.run.interpreter import Rank
from paraxis.task.spec import TaskSpec
from paraxis.task.task import Task, make_task

torch.set_num_threads(1)
STEPS, EXACT, WRONG = 6, 1e-10, 1e-6
STREAM = "synthetic:100,{},seed=2"  # with validation=0.37: 63 to train on, 3 steps an epoch, and 37 held out

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn
"""
TINY = (
    HEAD
    + """
def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
"""
)
BATCH_NORM = (
    HEAD
    + """
def net():
    first = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
    second = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16, 3))
"""
)
TRANSFORMER = (
    HEAD
    + """
class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.drop = nn.Dropout(0.2)
    def forward(self, ids, hidden):
        return {"x": self.drop(self.words(ids) + self.places), "hidden": hidden}

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
    def forward(self, x, hidden):
        return {"x": self.layer(x, src_key_padding_mask=hidden), "hidden": hidden}

class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
    def forward(self, x, hidden):
        return {"x": x + F.gelu(self.linear(self.norm(x))), "hidden": hidden}

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 11)
    def forward(self, x, hidden):
        return self.out(F.dropout(x, 0.1, self.training))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([Embed(), Block(), Mix(), Head()])
    def forward(self, ids, hidden):
        found = {"ids": ids, "hidden": hidden}
        for part in self.parts:
            found = part(**found)
        return found

def net():
    return Net()
def stages(net):
    return list(net.parts)
def batches():
    source = torch.Generator().manual_seed(1)
    for _ in range(3):
        ids = torch.randint(0, 11, (16, 5), generator=source)
        lengths = torch.randint(2, 6, (16, 1), generator=source)
        hidden = torch.arange(5) >= lengths
        labels = ids.roll(-1, 1).masked_fill(hidden, -100)
        yield {"ids": ids, "hidden": hidden, "labels": labels, "weights": torch.rand(16, generator=source) + 0.5}
def inputs(batch):
    return {"ids": batch["ids"], "hidden": batch["hidden"]}
def loss(output, batch):
    each = F.cross_entropy(output.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none")
    counted = (batch["labels"] != -100) * batch["weights"][:, None]
    return (each * batch["weights"][:, None]).sum(), counted.sum()
"""
)
HELD = {"batch": 16, "validation": 0.37}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp:12-9-7-3", HELD | {"data": STREAM.format("1x3x4,3"), "lr": 0.2}),
    "cnn": ("cnn", HELD | {"data": STREAM.format("1x28x28,10"), "optimizer": "adam", "lr": 0.002}),
    "transformer": (TRANSFORMER, {"lr": 0.3}),
    "batch norm": (BATCH_NORM, HELD | {"data": STREAM.format("1x6x6,3"), "lr": 0.2}),
    "clip": (
        TINY,
        HELD
        | {"data": STREAM.format("6,3"), "lr": 0.5, "clip": 0.3, "momentum": 0.9, "nesterov": True}
        | {"weight_decay": 0.01, "lr_schedule": "cosine", "warmup": 2, "horizon": 8},
    ),
    "tiny": (TINY, HELD | {"data": STREAM.format("6,3"), "lr": 0.5}),
}
MORE = (
    "microbatches=4",
    "dp=2,bucket_bytes=64",
    "dp=4,microbatches=2,bucket_bytes=64",
    "dp=2,pp=2,microbatches=2,bucket_bytes=64",
    "pp=3,schedule=layerwise,microbatches=2",
    "pp=3,schedule=gpipe,microbatches=2",
    "pp=2,interleave=2",
    "dp=2,pp=2,interleave=2,schedule=gpipe,microbatches=2",
    "dp=2,pp=2,interleave=2,schedule=gpipe,microbatches=2,bucket_bytes=64",
    "pp=2,schedule=interleaved,microbatches=4",
    "dp=2,pp=2,schedule=interleaved,microbatches=4,bucket_bytes=64",
    "pp=3,schedule=zb-h1,microbatches=4",
    "pp=3,schedule=zb-h2,microbatches=8",
    "dp=2,pp=2,schedule=zb-h1,microbatches=2,bucket_bytes=64",
    "dp=2,pp=2,schedule=zb-h1,microbatches=2,sync=average@2",
    "dp=2,microbatches=2,sync=average@2",
    "dp=2,pp=2,microbatches=2,sync=average@4",
    "dp=4,sync=average@epoch",
    "dp=2,sync=compressed",
    "dp=4,microbatches=2,sync=compressed",
    "dp=2,pp=2,microbatches=2,sync=compressed",
    "dp=2,pp=2,interleave=2,schedule=gpipe,microbatches=2,sync=compressed",
    "dp=2,sync=diloco@2",
    "dp=4,microbatches=2,sync=diloco@4",
    "dp=2,pp=2,microbatches=2,sync=diloco@1",
    "dp=2,pp=2,microbatches=2,sync=diloco@2:int8",
    "dp=4,sync=diloco@3:bf16:fragments=2",
    "dp=2,sync=diloco@4:overlap=2",
    "dp=4,sync=diloco@4:bf16:fragments=2:overlap=1",
    "dp=2,pp=2,microbatches=2,sync=diloco@4:fragments=2:overlap=1",
    "dp=2,pp=2,interleave=2,schedule=gpipe,microbatches=2,sync=diloco@4:fragments=4:int8",
)
PLANS = [*(plan for plan in space(4, 4, comms=("mpi",)) if plan.threads == plan.tp == 1), *map(parse, MORE)]
FEW = [*map(parse, ("serial", "dp=2", "pp=2,microbatches=4", "dp=2,pp=2,microbatches=2,bucket_bytes=64"))]
WITH_AVERAGE = [*FEW, parse("dp=2,sync=average@4")]


@dataclass(frozen=True)
class Outcome:
    """Mean loss of every step, and the state of every rank (of the serial run: of one)."""

    losses: list[float]
    states: list[dict[str, Tensor]]


def spec_of(folder: Path, name: str, source: str, settings: dict[str, Any]) -> TaskSpec:
    """A task of a shipped network, or of a recipe that is written to a file."""
    if "\n" not in source:
        return TaskSpec(network=source, **settings)
    path = folder / f"{name.replace(' ', '_')}.py"
    path.write_text(source)
    return TaskSpec(network=str(path), **settings)


def task(spec: TaskSpec) -> Task:
    return make_task(spec, dtype=torch.float64)


@cache
def checked(plan: Plan, layout: Layout, epoch: int) -> Program:
    program = lower(plan, layout, epoch)
    check(program)
    return program


def started(spec: TaskSpec, plan: Plan, fault: str = "") -> list[Rank]:
    """All ranks of a plan, set to go; with a fault in the program or in the last rank's engine."""
    tasks = [task(spec) for _ in range(plan.mesh.size)]
    program = checked(plan, tasks[0].layout(), tasks[0].train.steps_per_epoch or 1)
    program = FAULTS[fault].mutated(plan, program) if fault else program

    def engine(rank: int) -> TorchEngine:
        made = TorchEngine(tasks[rank], program, rank)
        if fault and rank == plan.mesh.size - 1:
            FAULTS[fault].spoil(made)  # before its instructions are bound, as ranks do
        return made

    return reference.start(program, engine)


def settle(ranks: list[Rank]) -> None:
    """Replicas that agree only now and then agree now."""
    for name, _ in ranks[0].program.epilogue:
        reference.run_body(ranks, name)


def outcome(ranks: list[Rank]) -> Outcome:
    rows = [rank.engine.losses for rank in ranks if rank.engine.losses]
    losses = [sum(loss for loss, _ in step) / sum(weight for _, weight in step) for step in zip(*rows, strict=True)]
    if "state" in ranks[0].bodies:
        reference.run_body(ranks, "state")  # as Rank.state does, on all ranks together
    return Outcome(losses, [rank.engine.state() for rank in ranks])


def trained(spec: TaskSpec, plan: Plan, fault: str = "") -> Outcome:
    ranks = started(spec, plan, fault)
    reference.run_steps(ranks, STEPS)
    settle(ranks)
    return outcome(ranks)


@cache
def emulated(spec: TaskSpec, replicas: int, groups: int, every: int, sync: str = "gradient") -> tuple[Outcome, float]:
    """Plain code for the same algorithm, and the largest change of a weight."""
    copies = [serial.replica(task(spec)) for _ in range(replicas)]
    before = {name: value.clone() for name, value in copies[0].task.net.state_dict().items()}
    losses = serial.emulate(copies, 0, STEPS, groups, every, sync)
    serial.average([copy.task.net for copy in copies])
    after = copies[0].task.net.state_dict()
    return Outcome(losses, [after]), max(float((after[n] - before[n]).abs().max()) for n in after)


@cache
def traits(spec: TaskSpec) -> tuple[bool, int]:
    """(whether it has running statistics, steps of an epoch)."""
    own = task(spec)
    return own.layout().statistics, own.train.steps_per_epoch or 1


def wanted(spec: TaskSpec, plan: Plan) -> tuple[Outcome, float]:
    statistics, epoch = traits(spec)
    replicas = 1 if plan.exact else plan.dp
    groups = plan.dp // replicas * plan.microbatches if statistics else 1
    every = period(plan.sync, epoch) if replicas > 1 else 1
    if spec.bn_group:  # a group at a time, through the network's own batch norm
        groups = task(spec).batch // replicas // spec.bn_group
        spec = spec.model_copy(update={"bn_group": None})
    return emulated(spec, replicas, groups, every, plan.sync if replicas > 1 else "gradient")


def difference(spec: TaskSpec, plan: Plan, found: Outcome) -> float:
    """The design's equality over all ranks: max|a-b| / max(max|b|, the largest change); of losses relative."""
    right, change = wanted(spec, plan)
    if len(found.losses) != len(right.losses):
        return float("inf")
    worst = [abs(a - b) / abs(b) for a, b in zip(found.losses, right.losses, strict=True)]
    for state in found.states:
        for name, value in state.items():
            b = right.states[0][name]
            worst.append(float((value - b).abs().max()) / max(float(b.abs().max()), change))
    return max(float("inf") if value != value else value for value in worst)


@pytest.mark.parametrize("plan", PLANS, ids=Plan.short)
@pytest.mark.parametrize("name", [name for name in TASKS if name != "tiny"])
def test_every_plan_computes_what_the_serial_run_computes(name: str, plan: Plan, folder: Path) -> None:
    spec = spec_of(folder, name, *TASKS[name])
    found = trained(spec, plan)
    assert difference(spec, plan, found) < EXACT
    names = set(wanted(spec, plan)[0].states[0])
    for replica in range(plan.dp):
        ranks = [plan.mesh.rank(replica, stage) for stage in range(plan.pp)]
        parts = [set(found.states[rank]) for rank in ranks]
        assert set.union(*parts) == names and sum(map(len, parts)) == len(names), "every tensor on one stage"


@pytest.mark.parametrize("name", TASKS)
def test_training_is_worth_comparing(name: str, folder: Path) -> None:
    """Tasks that learn nothing, or diverge, would prove nothing."""
    right, change = wanted(spec_of(folder, name, *TASKS[name]), Plan())
    assert change > 1e-3 and max(right.losses) < 10 and len(set(right.losses)) == STEPS


def test_masks_groups_and_replicas_do_change_the_result(folder: Path) -> None:
    """What the oracle is told matters: otherwise equality with it would not hold the plans to anything."""
    spec = spec_of(folder, "batch norm", *TASKS["batch norm"])
    assert difference(spec, parse("microbatches=2"), trained(spec, parse("microbatches=4"))) > WRONG
    spec = spec_of(folder, "tiny", *TASKS["tiny"])
    assert difference(spec, Plan(), trained(spec, parse("dp=2,sync=average@2"))) > WRONG
    other = TaskSpec(**(spec.model_dump() | {"seed": 1}))
    assert difference(spec, Plan(), trained(other, Plan())) > WRONG


@pytest.mark.parametrize("name", ["mlp", "batch norm"])
def test_the_serial_oracle_is_the_plain_loop(name: str, folder: Path) -> None:
    """Without dropout, one replica in one group is what the user has today."""
    spec = spec_of(folder, name, *TASKS[name])
    own = task(spec)
    plain = serial.plain(own)
    losses = [float(serial.plain_step(plain, number)) for number in range(STEPS)]
    assert difference(spec, Plan(), Outcome(losses, [own.net.state_dict()])) < EXACT


# -- evaluation ------------------------------------------------------------------------------------------------


def evaluated(ranks: list[Rank]) -> list[list[float]]:
    """What Rank.evaluate does, on all ranks together: the scores of the last stage's ranks."""
    kept = [(rank.engine.source, rank.engine.step) for rank in ranks]
    for rank in ranks:
        rank.engine.training(False)
        rank.engine.source = rank.engine.task.validation
        rank.engine.score.zero_()
    for step in range(ranks[0].engine.source.steps_per_epoch):
        for rank in ranks:
            rank.engine.step = step
        reference.run_body(ranks, "evaluate")
    reference.run_body(ranks, "score")
    for rank, (source, step) in zip(ranks, kept, strict=True):
        rank.engine.source, rank.engine.step = source, step
        rank.engine.training(True)
    return [rank.engine.score.tolist() for rank in ranks if rank.engine.last_stage]


def plainly_evaluated(spec: TaskSpec, state: dict[str, Tensor]) -> list[float]:
    own = task(spec)
    own.net.load_state_dict(state)
    source: Any = own.validation
    inputs, targets = (torch.cat(parts) for parts in zip(*(source.share(n, 0, 16) for n in range(3)), strict=True))
    inputs, targets = inputs[: source.size], targets[: source.size]
    with torch.no_grad():
        output = own.net.eval()(inputs)
        loss = torch.nn.functional.cross_entropy(output, targets, reduction="sum")
    return [float(loss), float(len(targets)), float((output.argmax(1) == targets).sum())]


@pytest.mark.parametrize("plan", [*WITH_AVERAGE, parse("dp=4,pp=2,microbatches=2")], ids=Plan.short)
@pytest.mark.parametrize("name", ["mlp", "cnn", "batch norm"])
def test_evaluation_equals_a_plain_one_padding_left_out(name: str, plan: Plan, folder: Path) -> None:
    spec = spec_of(folder, name, *TASKS[name])
    ranks = started(spec, plan)
    reference.run_steps(ranks, 2)
    settle(ranks)
    whole = {key: value for rank in ranks for key, value in rank.engine.state().items()}
    scores = evaluated(ranks)
    assert len(scores) == plan.dp
    for score in scores:
        assert score == pytest.approx(plainly_evaluated(spec, whole), rel=1e-10)
    assert scores[0][1] == 37


@pytest.mark.parametrize("plan", FEW, ids=Plan.short)
@pytest.mark.parametrize("name", ["cnn", "batch norm"])
def test_evaluation_leaves_no_trace_in_training(name: str, plan: Plan, folder: Path) -> None:
    spec = spec_of(folder, name, *TASKS[name])
    ranks = started(spec, plan)
    reference.run_steps(ranks, 2)
    first, second = evaluated(ranks), evaluated(ranks)
    assert first == second
    reference.run_steps(ranks, STEPS - 2)
    assert difference(spec, plan, outcome(ranks)) < EXACT


# -- the null interpreter --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=Plan.short)
def test_the_null_interpreter_is_told_everything_and_does_nothing(plan: Plan, folder: Path) -> None:
    program: Program = lower(plan, task(spec_of(folder, "clip", *TASKS["clip"])).layout(), steps_per_epoch=3)
    steps = 2 * program.steps_in_period()
    for rank in range(plan.mesh.size):
        ran = null.start(program, rank)
        ran.steps(steps)
        ran.run("evaluate")
        rows = [program.body(program.step_body(n))[rank] for n in range(steps)]
        ops = [i.op for row in rows for i in row]
        calls = ran.engine.calls
        halves = {"forward": "F", "backward": "B", "input_gradient": "I", "weight_gradient": "W"}
        assert {name: calls.get(name, 0) for name in halves} == {name: ops.count(op) for name, op in halves.items()}
        assert calls["evaluate"] == plan.microbatches * sum(len(program.segments[s]) for s in program.stages_of(rank))
        assert calls["update"] == steps and ran.done == steps
        assert not ran.context.open, "no token stays open"


@pytest.mark.parametrize(
    "text, fewer",
    [
        *(("average@50", 50), ("diloco@50", 50), ("diloco@50:bf16", 100), ("compressed", 2)),
        ("diloco@50:int8", 50 / ((1 + 4 / 128) / 4)),
    ],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_rules_send_so_many_times_fewer_bytes(text: str, fewer: float, ranks: int) -> None:
    """Counted letter by letter where numbers travel packed; at H=50 at least 40 times fewer than gradients."""

    def sent(sync: str) -> float:
        program = lower(parse(f"dp={ranks},sync={sync}"), Layout(parameters=(2, 3)))
        engine = null.NullEngine()
        engine.empty = torch.zeros(ranks * 1280)
        return Rank(program, 0, engine, null.NullComm(0, ranks)).sent_in_a_step()

    assert sent("gradient") / sent(text) == pytest.approx(fewer, rel=1e-9)


def test_a_period_sends_what_its_letters_weigh(folder: Path) -> None:
    """With real buffers, fragments included: over a period every parameter travels once."""
    spec = spec_of(folder, "tiny", *TASKS["tiny"])
    found = {}
    for text in ("gradient", "average@4", "diloco@4", "diloco@4:fragments=2", "compressed", "diloco@4:bf16"):
        ranks = started(spec, parse(f"dp=2,sync={text}"))
        reference.run_steps(ranks, 4)
        found[text] = sum(rank.context.sent[0] for rank in ranks)
    count = sum(p.numel() for p in task(spec).net.parameters())
    every = 2 * 8 * count  # two ranks, float64
    assert found["average@4"] == found["diloco@4"] == found["diloco@4:fragments=2"] == every
    assert found["compressed"] == every and found["gradient"] == 4 * (every + 2 * 8 * 2), "bfloat16 has a quarter"
    assert found["diloco@4:bf16"] == every / 4


@pytest.mark.parametrize("text", ["dp=2", "dp=2,sync=average@4", "dp=2,sync=average@epoch", "dp=2,sync=average@1"])
@pytest.mark.parametrize("steps", [0, 1, 5, 8])
def test_bytes_of_a_step_are_those_of_the_whole_period_however_little_of_it_was_run(text: str, steps: int) -> None:
    program = lower(parse(text), Layout(parameters=(2, 3)), steps_per_epoch=1000)
    engine = null.NullEngine()
    engine.empty = torch.zeros(100)  # every buffer: two ranks that reduce 400 bytes send 400 each
    ran = Rank(program, 0, engine, null.NullComm(0, 2))
    ran.steps(steps)
    reductions = sum(i.op == "AllReduceStart" for i in program.body(program.period[-1][0])[0])
    assert reductions > 0
    assert ran.sent_in_a_step() == pytest.approx(reductions * 400 / program.steps_in_period(), rel=1e-12)
