"""Batch norm over the samples of all replicas: they add up what their layers measure, and compute the serial step."""

import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_native
import test_reference
import torch
from test_groups import narrow
from test_native import native_ranks, outcome_of, ran, spec_named
from test_reference import (
    BATCH_NORM,
    EXACT,
    HEAD,
    STEPS,
    TASKS,
    WRONG,
    Outcome,
    checked,
    difference,
    evaluated,
    outcome,
    plainly_evaluated,
    spec_of,
    started,
    trained,
)

from paraxis.errors import ProgramError
from paraxis.plan.plan import Plan, parse
from paraxis.program.check import check
from paraxis.program.instructions import MOMENTS, Program
from paraxis.run import reference
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

FLAT = (
    HEAD
    + """
def net():
    first = nn.BatchNorm1d(6, affine=False), nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Dropout(0.3)
    second = nn.Linear(8, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh()
    return nn.Sequential(*first, *second, nn.Linear(5, 3))
"""
)
TWICE = (
    HEAD
    + """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.unused = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
    def forward(self, x):
        x = self.norm(self.first(x))
        self.unused(x)
        return self.last(torch.relu(self.norm(self.second(x))) + x)

def net():
    return Net()
"""
)
IMAGES = {"data": "synthetic:64,1x6x6,3,seed=2", "batch": 16, "lr": 0.2, "momentum": 0.8}
ROWS = {"data": "synthetic:64,6,3,seed=2", "batch": 16, "lr": 0.2}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "images": (BATCH_NORM, IMAGES | {"clip": 0.5}),
    "flat": (FLAT, ROWS),
    "twice": (TWICE, ROWS),
}
PLANS = ("dp=2", "dp=4", "dp=2,pp=2", "dp=2,pp=3", "dp=2,zero=2", "dp=2,pp=2,zero=3")
CASES = [(name, plan) for name in NETS for plan in PLANS if name != "twice" or "pp" not in plan]


def whole(folder: Path, name: str, **changed: Any) -> TaskSpec:
    """A task whose batch norms go over the whole batch."""
    source, settings = NETS[name]
    return spec_of(folder, f"synchronised {name}", source, settings | {"bn_group": settings["batch"]} | changed)


@pytest.mark.parametrize("name, plan", CASES)
def test_replicas_equal_the_serial_run(name: str, plan: str, folder: Path) -> None:
    spec = whole(folder, name)
    assert difference(spec, parse(plan), trained(spec, parse(plan))) < EXACT


NATIVE_PLANS = ("dp=2", "dp=4", "dp=2,gradients=owner", "dp=2,pp=2", "dp=2,comm=mpi", "dp=2,pp=2,comm=mpi")
NATIVE = [f"{plan},engine=native" for plan in NATIVE_PLANS]
NORMS = {"batch": 20, "bn_group": 20, "momentum": 0.8, "clip": 0.5}


def natively(spec: TaskSpec, plan: Plan, fault: str = "") -> Outcome:
    return ran(spec, plan, fault) if plan.comm == "openmp" else outcome_of(native_ranks(spec, plan, fault))


@pytest.mark.parametrize("text", NATIVE)
def test_native_replicas_equal_the_serial_run(text: str, folder: Path) -> None:
    spec, plan = spec_named(folder, "norms", **NORMS), parse(text)
    assert difference(spec, plan, natively(spec, plan)) < EXACT
    assert difference(spec, plan, natively(spec, plan, "local-moments")) > WRONG


@pytest.mark.parametrize("text", ["dp=2,engine=native", "dp=3,engine=native", "dp=2,pp=2,engine=native"])
def test_natively_a_residual_network_and_slices_that_fill_no_block(text: str, folder: Path) -> None:
    spec, plan = spec_named(folder, "residual", bn_group=12), parse(text)
    assert difference(spec, plan, ran(spec, plan)) < EXACT


def test_a_residual_network_and_its_ways_around(folder: Path) -> None:
    spec, plan = narrow(folder, bn_group=16), parse("dp=2,pp=2")
    assert difference(spec, plan, trained(spec, plan)) < EXACT


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_single_precision_stays_near(engine: str, folder: Path) -> None:
    """Sums of replicas are in double precision, whatever the network is in."""
    spec = spec_named(folder, "norms", **NORMS)
    plan = parse(f"dp=2,engine={engine}" + ",comm=mpi" * (engine == "torch"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_reference, "task", lambda spec: make_task(spec, dtype=torch.float32))
        found = ran(spec, plan, dtype=torch.float32) if engine == "native" else trained(spec, plan)
    assert 1e-9 < difference(spec, plan, found) < 1e-4


# -- mutants ---------------------------------------------------------------------------------------------------


def program_without(buffer: str, spec: TaskSpec, plan: Plan) -> Program:
    """The program whose replicas keep a batch norm's sums to themselves."""
    whole = checked(plan, make_task(spec).layout(), 1)
    step = tuple(tuple(i for i in rank if i.buffer != buffer) for rank in whole.body("step"))
    return replace(whole, bodies=tuple((name, step if name == "step" else body) for name, body in whole.bodies))


@pytest.mark.parametrize("buffer", ["moments", "moment_grads"])
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_sums_that_are_not_added_up_fail_the_comparison(engine: str, buffer: str, folder: Path) -> None:
    spec = spec_named(folder, "norms", **NORMS)
    plan = parse(f"dp=2,engine={engine}" + ",comm=mpi" * (engine == "torch"))
    spoiled = program_without(buffer, spec, plan)
    with pytest.raises(ProgramError, match="before the replicas' sums of batch norm"):
        check(spoiled)
    with pytest.MonkeyPatch.context() as patch:
        for module in (test_reference, test_native):
            patch.setattr(module, "checked", lambda *_: spoiled)
        assert difference(spec, plan, (ran if engine == "native" else trained)(spec, plan)) > WRONG


@pytest.mark.parametrize("fault", ["local-moments", "dropped-reduction", "all-data"])
def test_faults_fail_the_comparison(fault: str, folder: Path) -> None:
    spec, plan = whole(folder, "images"), parse("dp=2")
    assert difference(spec, plan, trained(spec, plan, fault)) > WRONG


def test_it_is_not_what_slices_compute(folder: Path) -> None:
    spec, plan = whole(folder, "images"), parse("dp=2")
    assert difference(spec, plan, trained(whole(folder, "images", bn_group=None), plan)) > WRONG


# -- around it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["dp=2", "dp=2,pp=2"])
def test_evaluation_synchronises_nothing_and_leaves_no_trace(plan: str, folder: Path) -> None:
    source, settings = TASKS["batch norm"]
    spec = spec_of(folder, "batch norm", source, settings | {"bn_group": 16})
    ranks = started(spec, parse(plan))
    reference.run_steps(ranks, 2)
    scores, state = evaluated(ranks), {key: value for rank in ranks for key, value in rank.engine.state().items()}
    assert all(score == pytest.approx(plainly_evaluated(spec, state), rel=1e-10) for score in scores)
    assert not any(i.buffer in MOMENTS.values() for row in ranks[0].program.body("evaluate") for i in row)
    reference.run_steps(ranks, STEPS - 2)
    assert difference(spec, parse(plan), outcome(ranks)) < EXACT


def test_bytes_of_the_sums_are_counted(folder: Path) -> None:
    ranks = started(whole(folder, "images"), parse("dp=2"))
    reference.run_steps(ranks, 1)
    plain = started(whole(folder, "images", bn_group=None), parse("dp=2"))
    reference.run_steps(plain, 1)
    sent = [rank.context.sent[0] for rank in (*ranks, *plain)]
    sums = 2 * 8 * ((1 + 2 * 3) + (1 + 2 * 4))  # forward and backward, in doubles, of 3 and of 4 features
    assert sent[0] == sent[1] == sent[2] + sums


def stage_threads() -> int:
    return sum(thread.name == "paraxis-stage" for thread in threading.enumerate())


def test_a_failing_layer_is_reported_and_no_thread_is_left(folder: Path) -> None:
    gc.collect()
    assert stage_threads() == 0
    ranks = started(whole(folder, "twice"), parse("dp=2"))
    reference.run_steps(ranks, 1)
    assert stage_threads() == 2
    body, middle = ranks[0].bodies["step"], [i.op for i in ranks[0].program.body("step")[0]].index("F") + 1
    for action in body[:middle]:  # one rank stands in the middle of a forward, for ever
        action()
    with pytest.raises(AttributeError, match="no_such"):
        ranks[1].engine.at(0).pausing.run(lambda: torch.no_such)
    assert ranks[0].engine.at(0).pausing.at == 0 and stage_threads() == 2
    del ranks, body, action
    gc.collect()
    assert stage_threads() == 0


SOMETIMES = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    def forward(self, x):
        x, trial = self.first(x), x.shape[0] < 16
        return self.last({})

def net():
    return Net()
"""
OTHERWISE = {
    "unlike when the network was tried": "self.norm(x) if trial else x",
    "was not there when the network was tried": "self.norm(x if trial else self.norm(x))",
    "computed again in the backward": "torch.utils.checkpoint.checkpoint(self.norm, x, use_reentrant=False)",
}


@pytest.mark.parametrize("said", OTHERWISE)
def test_a_network_that_meets_other_batch_norms_is_told(said: str, folder: Path) -> None:
    source = HEAD + "import torch.utils.checkpoint\n" + SOMETIMES.format(OTHERWISE[said])
    spec = spec_of(folder, f"sometimes {len(OTHERWISE[said])}", source, ROWS | {"batch": 32, "bn_group": 32})
    with pytest.raises(ProgramError, match=said):
        reference.run_steps(started(spec, parse("dp=2")), STEPS)
