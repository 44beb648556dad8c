"""The native engine: threads that execute a program in C++ compute what plain serial code computes.

In float64 the naive twins of the kernels run, to rounding; in float32 the fast ones, within a measured band.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_reference
import torch
from test_reference import (
    EXACT,
    HEAD,
    STEPS,
    TASKS,
    TINY,
    WRONG,
    Outcome,
    checked,
    difference,
    emulated,
    outcome,
    plainly_evaluated,
    settle,
    spec_of,
    started,
    task,
    trained,
    traits,
    wanted,
)

from paraxis.engine.native_rank import NativeEngine
from paraxis.errors import PlanError
from paraxis.plan.plan import Plan, parse
from paraxis.program.faults import FAULTS
from paraxis.program.instructions import Program
from paraxis.program.lower import shared
from paraxis.proof import MARGIN
from paraxis.run import openmp, reference
from paraxis.run.interpreter import Rank
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

CONVOLUTIONS = (
    HEAD
    + """
def net():
    first = nn.Conv2d(2, 5, 3, 2, 1), nn.ReLU(), nn.Dropout(0.3)
    second = nn.Conv2d(5, 4, (2, 3), 1, 2, bias=False), nn.AvgPool2d(2, padding=1), nn.Tanh()
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3))
"""
)
NORMS = (
    HEAD
    + """
def net():
    first = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.GELU()
    second = nn.Flatten(), nn.Linear(27, 8), nn.BatchNorm1d(8), nn.Sigmoid(), nn.LayerNorm(8)
    return nn.Sequential(*first, *second, nn.Linear(8, 3))
"""
)
RESIDUAL = (
    HEAD
    + """
from paraxis.task.networks import initialise
from paraxis.task.resnet import ResNet

def net():
    made = ResNet(3, widths=(3, 4, 5, 6))
    initialise(made, 0)
    return made
"""
)
DATA = "synthetic:130,{},3,seed=2"
HELD = {"validation": 0.4}  # 78 to train on, 52 held out: the last batch of each is padded
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp:12-50-7-3", HELD | {"data": DATA.format("1x3x4"), "batch": 12, "lr": 0.2}),
    "cnn": ("cnn", HELD | {"data": "synthetic:60,1x28x28,10,seed=2", "batch": 12, "optimizer": "adam", "lr": 0.002}),
    "convolutions": (CONVOLUTIONS, HELD | {"data": DATA.format("2x7x8"), "batch": 20, "lr": 0.2}),
    "norms": (NORMS, HELD | {"data": DATA.format("1x8x8"), "batch": 20, "lr": 0.1}),
    "tiny": (TINY, HELD | {"data": DATA.format("6"), "batch": 16, "lr": 0.2}),
    "residual": (RESIDUAL, {"data": "synthetic:40,1x40x40,3,seed=2", "batch": 12, "lr": 0.02}),
}


def native(text: str) -> Plan:
    """A plan on threads."""
    return parse("engine=native" if text == "serial" else f"{text},engine=native")


PLANS = [
    *map(native, ("serial", "microbatches=2", "dp=2", "dp=4", "dp=2,microbatches=2", "pp=2")),
    *map(native, (f"pp=2,schedule={schedule},microbatches=4" for schedule in ("layerwise", "gpipe", "1f1b"))),
    *map(native, ("dp=2,pp=2,microbatches=2", "pp=3,microbatches=2", "dp=2,sync=average@2", "dp=2,sync=average@epoch")),
    native("dp=2,pp=2,microbatches=2,sync=average@4"),
    *map(native, ("dp=2,sync=diloco@2", "dp=4,pp=2,microbatches=1,sync=diloco@3", "dp=2,sync=diloco@epoch")),
    *map(native, ("dp=2,gradients=owner", "dp=4,gradients=owner")),
    *map(native, ("tp=2", "tp=3,microbatches=2", "dp=2,tp=2", "dp=2,tp=2,microbatches=2", "pp=2,tp=2,microbatches=2")),
]
FEW = [native(text) for text in ("serial", "dp=2", "dp=2,gradients=owner", "dp=2,pp=2,microbatches=2", "dp=2,tp=2")]
HEAVY = {
    "cnn": ("dp=4", "dp=3,gradients=owner", "pp=2,microbatches=4", "tp=2", "dp=2,tp=3"),
    "residual": ("dp=2", "dp=2,gradients=owner", "dp=2,pp=2,microbatches=2", "tp=2", "pp=2,tp=2,microbatches=2"),
}
CASES = [(name, plan) for name in NETS for plan in PLANS if name not in HEAVY]
CASES += [(name, native(text)) for name, texts in HEAVY.items() for text in texts]


def spec_named(folder: Path, name: str, **changed: Any) -> TaskSpec:
    source, settings = NETS[name]
    return spec_of(folder, f"native {name}", source, settings | changed)


def team_of(spec: TaskSpec, plan: Plan, fault: str = "", dtype: torch.dtype = torch.float64) -> openmp.Team:
    own = make_task(spec, dtype=dtype)
    assert own.batch % (plan.dp * plan.microbatches) == 0, "the session refuses other plans"
    program = checked(plan, own.layout(), own.train.steps_per_epoch or 1)
    return openmp.start(own, FAULTS[fault].mutated(plan, program) if fault else program, hogwild=False)


def ran(spec: TaskSpec, plan: Plan, fault: str = "", dtype: torch.dtype = torch.float64) -> Outcome:
    team = team_of(spec, plan, fault, dtype)
    team.steps(test_reference.STEPS)
    team.settle()
    return Outcome([loss / weight for loss, weight in team.losses], [team.state()])


def apart(a: Outcome, b: Outcome, change: float) -> float:
    """The design's equality of two runs whose weights change by `change` at most."""
    worst = [abs(x - y) / abs(y) for x, y in zip(a.losses, b.losses, strict=True)]
    for name, value in b.states[0].items():
        distance = (a.states[0][name].double() - value.double()).abs().max()
        worst.append(float(distance) / max(float(value.abs().max()), change))
    return max(float("inf") if value != value else value for value in worst)


# -- plans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, plan", CASES, ids=lambda v: v if isinstance(v, str) else v.short())
def test_every_native_plan_computes_what_the_serial_run_computes(name: str, plan: Plan, folder: Path) -> None:
    spec = spec_named(folder, name)
    found = ran(spec, plan)
    assert difference(spec, plan, found) < EXACT
    assert found.states[0].keys() == wanted(spec, plan)[0].states[0].keys()


@pytest.mark.parametrize("name", NETS)
def test_training_is_worth_comparing(name: str, folder: Path) -> None:
    right, change = emulated(spec_named(folder, name), 1, 1, 1)
    assert change > 1e-3 and max(right.losses) < 10 and len(set(right.losses)) == STEPS
    assert difference(spec_named(folder, name), Plan(), ran(spec_named(folder, name, seed=1), FEW[0])) > WRONG


# What one can do to a program without leaving threads at a gate for ever.
SAFE = {"all-data", "wrong-mask", "lost-update", "unzeroed", "summed-weights", "never-agreed", "local-statistics"}
SAFE |= {"swapped-microbatch", "lost-backward", "no-outer-momentum", "no-snapshot", "lost-slice", "impatient"}
MUTABLE = [*FEW, *map(native, ("pp=2,microbatches=4", "dp=2,sync=average@2", "dp=2,microbatches=2"))]
MUTABLE += [native("dp=2,sync=diloco@2")]
MUTANTS = [(fault, plan) for fault in FAULTS for plan in MUTABLE if fault in SAFE and FAULTS[fault].needs(plan)]


@pytest.mark.parametrize("fault, plan", MUTANTS, ids=lambda v: v if isinstance(v, str) else v.short())
def test_a_spoiled_program_fails_the_comparison(fault: str, plan: Plan, folder: Path) -> None:
    """C++ executes what the program says, not what would be right."""
    spec = spec_named(folder, "norms" if fault == "local-statistics" else "tiny")
    assert difference(spec, plan, ran(spec, plan, fault)) > WRONG


GROUPS = ("serial", "dp=2", "microbatches=4", "dp=2,microbatches=2", "pp=2,microbatches=2", "dp=2,sync=average@2")


@pytest.mark.parametrize("plan", [native(text) for text in GROUPS], ids=Plan.short)
def test_statistics_of_the_tasks_own_groups(plan: Plan, folder: Path) -> None:
    spec = spec_named(folder, "norms", batch=64, bn_group=16)
    assert difference(spec, plan, ran(spec, plan)) < EXACT


def test_other_groups_fail(folder: Path) -> None:
    spec, plan = spec_named(folder, "norms", batch=64, bn_group=16), native("dp=2")
    for other in (32, None):
        assert (
            difference(spec, plan, ran(spec_named(folder, "norms", batch=64, bn_group=other), native("serial"))) > WRONG
        )


# -- optimisers ------------------------------------------------------------------------------------------------

# Settings, and what must not go unnoticed if C++ left it out.
OPTIMISERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"momentum": 0.0}, {"momentum": 0.1}),
    "plain decay": ({"momentum": 0.0, "weight_decay": 0.05}, {"weight_decay": 0.0}),
    "momentum": ({"momentum": 0.8, "weight_decay": 0.05}, {"momentum": 0.0}),
    "nesterov": ({"momentum": 0.8, "nesterov": True, "weight_decay": 0.05}, {"nesterov": False}),
    "adam": ({"optimizer": "adam", "lr": 0.02, "weight_decay": 0.05}, {"optimizer": "adamw"}),
    "adamw": ({"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.05}, {"weight_decay": 0.0}),
    "clip": ({"clip": 0.1}, {"clip": None}),
    "clip adam": ({"clip": 0.1, "optimizer": "adam", "lr": 0.02, "weight_decay": 0.05}, {"clip": None}),
    "warmup": ({"lr_schedule": "warmup", "warmup": 4}, {"lr_schedule": "constant"}),
    "cosine": ({"lr_schedule": "cosine", "warmup": 2, "horizon": 8}, {"horizon": 7}),
}
OPTIMISED = [*FEW, native("pp=2,microbatches=4"), native("dp=2,sync=average@2")]


@pytest.mark.parametrize("plan", OPTIMISED, ids=Plan.short)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_and_rates(name: str, plan: Plan, folder: Path) -> None:
    settings, left_out = OPTIMISERS[name]
    spec = spec_named(folder, "tiny", **settings)
    assert difference(spec, plan, ran(spec, plan)) < EXACT
    assert difference(spec, plan, ran(spec_named(folder, "tiny", **settings | left_out), plan)) > WRONG


def test_a_gradient_below_the_limit_is_not_clipped(folder: Path) -> None:
    spec, plan = spec_named(folder, "tiny", clip=1e6), native("dp=2")
    assert difference(spec_named(folder, "tiny"), plan, ran(spec, plan)) < EXACT


# -- float32 ---------------------------------------------------------------------------------------------------


@cache
def in_float32(spec: TaskSpec, groups: int) -> Outcome:
    """The serial run in single precision: how far it is from double precision is the measure of rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_reference, "task", lambda spec: make_task(spec, dtype=torch.float32))
        return emulated.__wrapped__(spec, 1, groups, 1)[0]


# 1 - 0.999 in single precision is wrong by 1.3e-5: ten times PyTorch's rounding, which subtracts in double precision.
SINGLE: list[Any] = [
    *((name, {}) for name in ("mlp", "convolutions", "norms")),
    ("cnn", {"optimizer": "sgd", "lr": 0.05}),  # Adam divides rounding by rounding where a gradient is almost zero
    ("tiny", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05, "clip": 0.1}),
    *(("tiny", {"optimizer": name, "lr": 0.02, "weight_decay": 0.05}) for name in ("adam", "adamw")),
]


@pytest.mark.parametrize("plan", FEW, ids=Plan.short)
@pytest.mark.parametrize("name, changed", SINGLE)
def test_fast_kernels_stay_within_the_band_of_rounding(
    name: str, changed: dict[str, Any], plan: Plan, folder: Path
) -> None:
    spec = spec_named(folder, name, **changed)
    groups = plan.dp * plan.microbatches if traits(spec)[0] else 1
    change = emulated(spec, 1, groups, 1)[1]
    twin, fast = ran(spec, plan), ran(spec, plan, dtype=torch.float32)
    band = max(MARGIN * apart(in_float32(spec, groups), wanted(spec, plan)[0], change), 1e-6)
    assert 0 < apart(fast, twin, change) < band < 1e-3
    slower = spec_named(folder, name, **changed | {"lr": 0.99 * spec.lr})
    assert apart(ran(slower, plan, dtype=torch.float32), twin, change) > band


# -- a run in pieces, evaluation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["serial", "dp=2,pp=2,microbatches=2", "dp=2,sync=average@4", "dp=2,sync=diloco@2", "tp=2"]
)
def test_several_calls_train_what_one_call_trains(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, plan = spec_named(folder, "norms", momentum=0.8), native(text)
    once, pieces = team_of(spec, plan), team_of(spec, plan)
    once.steps(STEPS)
    monkeypatch.setattr(openmp, "AT_ONCE", 2)
    for count in (1, 4, 1):
        pieces.steps(count)
    assert pieces.losses == once.losses and pieces.done == once.done == STEPS
    assert all(torch.equal(value, once.state()[name]) for name, value in pieces.state().items())
    pieces.steps(1)
    assert not all(torch.equal(value, once.state()[name]) for name, value in pieces.state().items())


@pytest.mark.parametrize("plan", [*FEW, native("dp=2,sync=average@4"), native("dp=2,sync=diloco@4")], ids=Plan.short)
@pytest.mark.parametrize("name", ["norms", "convolutions"])
def test_evaluation_equals_a_plain_one_and_leaves_no_trace(name: str, plan: Plan, folder: Path) -> None:
    spec = spec_named(folder, name, batch=16)
    team = team_of(spec, plan)
    team.steps(2)
    before = team.state()
    with team.agreed():
        score, state = team.evaluate(team.task.validation), team.state()  # type: ignore[arg-type]
    assert score == pytest.approx(plainly_evaluated_whole(spec, state), rel=1e-10)
    assert score[1] == 52
    assert score != pytest.approx(plainly_evaluated_whole(spec, task(spec).net.state_dict()), rel=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in team.state().items())
    team.steps(STEPS - 2)
    team.settle()
    assert difference(spec, plan, Outcome([a / b for a, b in team.losses], [team.state()])) < EXACT


def plainly_evaluated_whole(spec: TaskSpec, state: dict[str, torch.Tensor]) -> list[float]:
    """All 52 held-out samples, one by one batch."""
    source: Any = task(spec).validation
    assert source.size == 52 and source.steps_per_epoch == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_reference, "range", lambda _: range(4), raising=False)
        return plainly_evaluated(spec, state)


# -- the same program in the reference interpreter -------------------------------------------------------------

SHARED = [native(text) for text in ("dp=2", "dp=4", "dp=2,microbatches=2", "dp=2,pp=2,microbatches=2")]
SHARED.append(native("dp=2,gradients=owner"))


@pytest.mark.parametrize("plan", SHARED, ids=Plan.short)
@pytest.mark.parametrize("name", ["batch norm", "clip", "tiny"])
def test_the_reference_interpreter_takes_the_same_program(name: str, plan: Plan, folder: Path) -> None:
    """Reduce-scatter, step on one's own part, all-gather: every rank ends with all weights of its stage."""
    spec = spec_of(folder, name, *TASKS[name])
    assert shared(plan) and difference(spec, plan, trained(spec, plan)) < EXACT


@pytest.mark.parametrize("left_out", ["ReduceScatter", "AllGather"])
def test_both_halves_of_a_shared_step_are_needed(left_out: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, plan = spec_of(folder, "tiny", *TASKS["tiny"]), SHARED[0]

    def without(*words: Any) -> Program:
        program = checked(*words)
        keep = [
            (name, tuple(tuple(i for i in rank if i.base != left_out) for rank in ranks))
            for name, ranks in program.bodies
        ]
        return replace(program, bodies=tuple(keep))

    monkeypatch.setattr(test_reference, "checked", without)
    ranks = started(spec, plan)
    reference.run_steps(ranks, STEPS)
    assert difference(spec, plan, outcome(ranks)) > WRONG


# -- one rank of several processes -----------------------------------------------------------------------------

RANKS = ("dp=2", "dp=4,microbatches=2", "pp=2,microbatches=4", "dp=2,pp=2,microbatches=2", "dp=2,sync=average@2")
RANKS += ("dp=2,sync=diloco@2:bf16", "dp=2,sync=compressed")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("text", RANKS)
@pytest.mark.parametrize("name", ["tiny", "norms"])
def test_ranks_of_processes_compute_the_same(name: str, text: str, threads: int, folder: Path) -> None:
    """What MPI would carry goes through the reference interpreter; threads share the samples of a microbatch."""
    spec = spec_named(folder, name, momentum=0.8, clip=0.1, batch=16)
    plan = parse(f"{text},engine=native,comm=mpi,threads={threads}")
    if name == "norms" and threads > 1:
        with pytest.raises(PlanError, match="batch norm needs its samples on one thread"):
            native_ranks(spec, plan)
        return
    assert difference(spec, plan, outcome_of(native_ranks(spec, plan))) < EXACT
    assert difference(spec, plan, outcome_of(native_ranks(spec, plan, "lost-update"))) > WRONG


def native_ranks(spec: TaskSpec, plan: Plan, fault: str = "") -> list[Rank]:
    tasks = [task(spec) for _ in range(plan.mesh.size)]
    program = checked(plan, tasks[0].layout(), tasks[0].train.steps_per_epoch or 1)
    program = FAULTS[fault].mutated(plan, program) if fault else program
    return reference.start(program, lambda rank: NativeEngine(tasks[rank], program, rank, plan.threads))


def outcome_of(ranks: list[Rank]) -> Outcome:
    reference.run_steps(ranks, STEPS)
    settle(ranks)
    return outcome(ranks)
