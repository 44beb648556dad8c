"""Ranks on a GPU compute what the serial run on the CPU computes: all ranks in one process, in float64."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_reference import EXACT, STEPS, TASKS, WRONG, difference, emulated, spec_of, task
from test_staged import started, trained

from paraxis.comm.staged import THROUGH_HOST, StagedRequest
from paraxis.engine.devices import wait
from paraxis.engine.torch_engine import TorchEngine
from paraxis.plan.plan import parse
from paraxis.run import serial
from paraxis.run.clock import clock_of
from paraxis.task.spec import TaskSpec

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda:0")
PLANS = (
    "device=cuda",
    "microbatches=4,device=cuda",
    "dp=2,bucket_bytes=64,device=cuda:0",
    "pp=2,microbatches=4,device=cuda:0",
    "pp=2,microbatches=4,devices=cpu+cuda:0",
    "pp=2,microbatches=4,devices=cuda:0+cpu,schedule=zb-h1",
    "pp=2,interleave=2,microbatches=4,schedule=interleaved,devices=cpu+cuda:0",
    "dp=2,zero=1,device=cuda:0",
    "dp=2,zero=3,microbatches=2,device=cuda:0",
    "tp=2,device=cuda:0",
    "pp=2,microbatches=2,recompute=all,device=cuda:0",
    "dp=2,sync=compressed,device=cuda:0",
    "dp=2,sync=diloco@2:int8,device=cuda:0",
)
CNN = TaskSpec(network="cnn", data="synthetic:64,1x28x28,10", batch=16, lr=0.05)
NANO = TaskSpec(network="gpt:nano", batch=4, lr=1e-3)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["tiny", "clip"])
def test_small_plans(name: str, plan: str, folder: Path) -> None:
    spec = spec_of(folder, name, *TASKS[name])
    assert difference(spec, parse(plan), trained(spec, parse(plan), THROUGH_HOST)) < EXACT


@pytest.mark.parametrize("plan", ["device=cuda", "dp=2,device=cuda:0", "pp=2,microbatches=2,devices=cpu+cuda:0"])
@pytest.mark.parametrize("name", ["mlp", "transformer", "batch norm", "cnn"])
def test_networks(name: str, plan: str, folder: Path) -> None:
    spec = CNN if name == "cnn" else spec_of(folder, name, *TASKS[name])
    assert difference(spec, parse(plan), trained(spec, parse(plan), THROUGH_HOST)) < EXACT


@pytest.mark.parametrize("plan", ["device=cuda", "tp=2,device=cuda:0", "pp=2,microbatches=2,devices=cpu+cuda:0"])
def test_gpt(plan: str) -> None:
    assert difference(NANO, parse(plan), trained(NANO, parse(plan), THROUGH_HOST)) < EXACT


@pytest.mark.parametrize("plan", ["dp=2,device=cuda:0", "pp=2,microbatches=4,devices=cpu+cuda:0"])
def test_what_is_not_copied_back_shows(plan: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StagedRequest, "wait", lambda self: self.request.wait())
    spec = spec_of(folder, "tiny", *TASKS["tiny"])
    assert not difference(spec, parse(plan), trained(spec, parse(plan), THROUGH_HOST)) < WRONG


def test_everything_of_a_rank_lives_on_its_device(folder: Path) -> None:
    spec = spec_of(folder, "clip", *TASKS["clip"])
    (rank,) = started(spec, parse("device=cuda"), THROUGH_HOST)
    engine: TorchEngine = rank.engine
    rank.steps(2)
    own = [engine.flat.params, engine.flat.grads, engine.score, engine.norm, engine.running, engine.now.unit]
    own += [p for segment in engine.segments for layer in segment for p in layer.parameters()]
    own += [t for run in engine.runs for key, t in run[2].items() if key != "step"]
    assert {t.device for t in own} == {GPU}
    assert {t.device.type for t in engine.state().values()} == {"cpu"}
    x, y = engine.source.share(0, 0, 4)
    assert x.device == y.device == GPU
    assert engine.task.validation is not None
    loss, weight, _ = rank.evaluate(engine.task.validation)
    assert weight == 37 and loss > 0


def test_a_traced_step_is_timed_by_the_gpu(folder: Path) -> None:
    spec = spec_of(folder, "mlp", *TASKS["mlp"])
    (rank,) = started(spec, parse("device=cuda"), THROUGH_HOST)
    rank.clock = clock_of(GPU)
    rank.steps(2)
    wait(GPU)
    rank.run_traced(3)
    rows = [row for _, (row,) in rank.clocks(3)]
    assert len(rows) == 3 and all(a <= b for row in rows for a, b in pairwise(row))
    assert 0 < rows[-1][-1] - rows[0][0] < 10e9


def test_the_plain_loop_runs_on_the_gpu(folder: Path) -> None:
    spec = TaskSpec(network="mlp:12-9-7-3", data="synthetic:64,1x3x4,3", batch=16, lr=0.2)
    own = serial.replica(task(spec), GPU)
    losses = [float(serial.plain_step(own.task.net, own.task, own.optimizer, number)) for number in range(STEPS)]
    assert {p.device for p in own.task.net.parameters()} == {GPU}
    assert losses == pytest.approx(emulated(spec, 1, 1, 1)[0].losses, rel=EXACT)


def test_float32_is_float32(folder: Path) -> None:
    """In TF32 products would differ in the third digit."""
    pytest.importorskip("paraxis.engine.precision").products("fp32")
    a = torch.randn(256, 256, device=GPU)
    apart = (a @ a).double() - a.double() @ a.double()
    assert float(apart.abs().max()) < 1e-3
    image = torch.randn(4, 16, 16, 16, device=GPU)
    kernel = torch.randn(16, 16, 3, 3, device=GPU)
    whole = torch.nn.functional.conv2d(image.double(), kernel.double())
    assert float((torch.nn.functional.conv2d(image, kernel).double() - whole).abs().max()) < 1e-3
