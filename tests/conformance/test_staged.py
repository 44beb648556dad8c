"""What a rank on a GPU does differently, on CPU tensors: staged transfers, losses that nobody waits for."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reference import EXACT, STEPS, TASKS, WRONG, checked, difference, outcome, settle, spec_of, task
from torch import Tensor

from paraxis.comm import staged
from paraxis.comm.local import LocalComm, Post
from paraxis.comm.staged import StagedComm, StagedRequest, Staging
from paraxis.engine import torch_engine, torch_stage
from paraxis.engine.torch_engine import TorchEngine
from paraxis.plan.devices import device_of
from paraxis.plan.plan import Plan, parse
from paraxis.run import reference
from paraxis.run.interpreter import Rank
from paraxis.task.spec import TaskSpec

FORCED = Staging(torch.empty_like, lambda _: None)  # every tensor is out of reach
PLANS = (
    "serial",
    "dp=2,bucket_bytes=64",
    "pp=2,microbatches=4",
    "dp=2,zero=1",
    "dp=2,zero=3,microbatches=2",
    "tp=2",
    "dp=2,pp=2,interleave=2,schedule=gpipe,microbatches=2,sync=compressed",
    "dp=2,sync=diloco@2:int8",
)


def late(device: torch.device, *words: Any) -> Any:
    """A step whose losses are added up as on a GPU."""
    return replace(STEP_ON(device, *words), sums=torch.zeros(2, dtype=torch.float64, device=device))


STEP_ON = torch_engine.step_on


def started(spec: TaskSpec, plan: Plan, staging: Staging) -> list[Rank]:
    """All ranks of a plan in this process, each on its device."""
    tasks = [task(spec) for _ in range(plan.mesh.size)]
    program = checked(plan, tasks[0].layout(), tasks[0].train.steps_per_epoch or 1)
    post, everyone = Post(), range(plan.mesh.size)
    return [
        Rank(
            program,
            r,
            TorchEngine(tasks[r], program, r, torch.device(device_of(plan, r, r, 1))),
            StagedComm(LocalComm(post, everyone, r), staging),
            blocking=False,
        )
        for r in everyone
    ]


def trained(spec: TaskSpec, plan: Plan, staging: Staging = FORCED) -> Any:
    ranks = started(spec, plan, staging)
    reference.run_steps(ranks, STEPS)
    settle(ranks)
    found = outcome(ranks)
    return found if plan.tp == 1 else replace(found, states=[])  # whose parts its losses stand for


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["tiny", "clip"])
def test_staged_ranks_with_late_losses_train_alike(
    name: str, plan: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "step_on", late)
    spec = spec_of(folder, name, *TASKS[name])
    assert difference(spec, parse(plan), trained(spec, parse(plan))) < EXACT


@pytest.mark.parametrize("plan", ["serial", "dp=2", "pp=2,microbatches=4"])
def test_a_weight_that_only_data_tell_is_never_waited_for(
    plan: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "step_on", late)
    spec = spec_of(folder, "transformer", *TASKS["transformer"])
    assert difference(spec, parse(plan), trained(spec, parse(plan))) < EXACT


@pytest.mark.parametrize("plan", ["dp=2", "pp=2,microbatches=4", "dp=2,zero=1"])
def test_what_is_not_copied_back_shows(plan: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StagedRequest, "wait", lambda self: self.request.wait())
    spec = spec_of(folder, "tiny", *TASKS["tiny"])
    assert not difference(spec, parse(plan), trained(spec, parse(plan))) < WRONG


def test_losses_that_are_forgotten_between_steps_show(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "step_on", late)
    spec, plan = spec_of(folder, "transformer", *TASKS["transformer"]), parse("dp=2")
    monkeypatch.setattr("paraxis.engine.torch_stage.Step.begin", lambda self: None)
    assert not difference(spec, plan, trained(spec, plan)) < WRONG


@dataclass
class Lazy:
    """A device that computes only when it is waited for: what is read before is NaN."""

    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def compute(self, tensor: Tensor, value: Tensor) -> None:
        tensor.fill_(float("nan"))
        self.pending.append((tensor, value))

    def settle(self, _: Tensor) -> None:
        for tensor, value in self.pending:
            tensor.copy_(value)
        self.pending.clear()


def test_a_transport_that_reaches_a_device_waits_for_it() -> None:
    lazy, post = Lazy(), Post()
    comms = [StagedComm(LocalComm(post, range(2), rank), Staging(lambda _: None, lazy.settle)) for rank in range(2)]
    sent, got = torch.zeros(3), torch.empty(3)
    lazy.compute(sent, torch.arange(3.0))
    comms[0].send(sent, 1, 0)
    comms[1].receive(got, 0, 0).wait()
    assert got.tolist() == [0.0, 1.0, 2.0]
    parts = [torch.zeros(4), torch.zeros(4)]
    lazy.compute(parts[1], torch.ones(4))
    requests = [comm.all_reduce_start(part) for comm, part in zip(comms, parts, strict=True)]
    for request in requests:
        request.wait()
    assert [part.tolist() for part in parts] == [[1.0] * 4] * 2


def test_tensors_of_a_cpu_go_as_they_are() -> None:
    tensor = torch.ones(2)
    assert staged.THROUGH_HOST.out(tensor).data_ptr() == tensor.data_ptr()
    assert staged.THROUGH_HOST.host(tensor).data_ptr() == tensor.data_ptr()


def test_what_leaves_a_stage_has_the_type_that_its_edge_was_tried_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast makes other types of some layers on a GPU than on the CPU."""
    monkeypatch.setattr(torch_stage, "cast", lambda calls, *_: [*calls, torch.Tensor.bfloat16])
    rank, _ = started(spec_of(folder, "tiny", *TASKS["tiny"]), parse("pp=2"), FORCED)
    stage = rank.engine.at(0)
    stage.load(0, 0)
    stage.forward(0, 0, 0)
    assert [t.dtype for t in stage.leave(0)] == [t.dtype for t in stage.incoming(True)] == [torch.float64]
