"""compile=1: segments that torch.compile has made compute what the plain ones do, and what cannot be is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paraxis.engine.compiling import compile_network, compile_segments
from paraxis.engine.devices import CPU
from paraxis.engine.torch_engine import TorchEngine
from paraxis.errors import MissingError, PlanError
from paraxis.plan.plan import parse
from paraxis.program.lower import lower
from paraxis.run import reference
from paraxis.run.compiled import FirstSteps
from paraxis.run.interpreter import Rank
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

SPEC = TaskSpec(network="mlp:12-9-7-3", data="synthetic:100,1x3x4,3,seed=2", batch=16, validation=0.37, lr=0.2)
DROPOUT = """
import torch
from torch import nn
def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3))
"""
FUNCTION = """
import torch, torch.nn.functional as F
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)
    def forward(self, x):
        return F.dropout(self.a(x), 0.5, self.training)
def net():
    return Net()
"""


def trained(spec: TaskSpec, text: str, backend: str = "", steps: int = 4) -> list[Rank]:
    plan = parse(text)
    tasks = [make_task(spec) for _ in range(plan.mesh.size)]
    program = lower(plan, tasks[0].layout(), tasks[0].train.steps_per_epoch or 1)

    def engine(rank: int) -> TorchEngine:
        made = TorchEngine(tasks[rank], program, rank)
        if backend:
            compile_segments(made, backend)
        return made

    ranks = reference.start(program, engine)
    reference.run_steps(ranks, steps)
    return ranks


def own(folder: Path, source: str) -> TaskSpec:
    path = folder / "own.py"
    path.write_text(source)
    return SPEC.model_copy(update={"network": str(path), "data": "synthetic:100,6,3,seed=2"})


def alike(a: list[Rank], b: list[Rank]) -> None:
    for mine, theirs in zip(a, b, strict=True):
        for name, value in mine.engine.state().items():
            assert torch.allclose(value, theirs.engine.state()[name], atol=1e-6), name


@pytest.mark.parametrize("text", ["serial", "dp=2", "pp=2,microbatches=2,recompute=all", "precision=bf16"])
def test_compiled_segments_compute_what_plain_ones_do(text: str) -> None:
    torch._dynamo.reset()
    alike(trained(SPEC, text, "eager"), trained(SPEC, text))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_keyed_masks_and_statistics_stay_right_and_nothing_is_compiled_for_ever(tmp_path: Path) -> None:
    torch._dynamo.reset()
    spec = own(tmp_path, DROPOUT)
    ranks = trained(spec, "microbatches=2", "eager", steps=3)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    reference.run_steps(ranks, 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made > 0
    alike(ranks, trained(spec, "microbatches=2", steps=6))


def test_the_last_samples_of_an_evaluation_do_not_compile_anew() -> None:
    torch._dynamo.reset()
    (rank,) = trained(SPEC, "serial", "eager")
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert rank.evaluate(rank.engine.task.validation)[1] == 37
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("tp=2,compile=1", "compile=1: with tp=2 ranks meet in the middle of layers"),
        ("pp=2,microbatches=2,schedule=zb-h1,compile=1", "compile=1: schedule=zb-h1 parts the backward"),
    ],
)
def test_what_cannot_be_compiled_is_refused(text: str, wanted: str) -> None:
    with pytest.raises(PlanError, match=wanted):
        parse(text)


def test_dropout_that_is_called_as_a_function_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="calls dropout as a function"):
        trained(own(tmp_path, FUNCTION), "serial", "eager")


def test_without_a_compiler_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(MissingError, match=r"needs a C\+\+ compiler on a CPU, and there is no no-such-compiler"):
        compile_network(torch.nn.Linear(2, 2))
    compile_network(torch.nn.Linear(2, 2), backend="eager")


def test_first_steps_tell_how_long_compiling_took(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 9.0, 10.0, 12.0])
    monkeypatch.setattr("paraxis.run.compiled.perf_counter", lambda: next(ticks))
    first, done = FirstSteps(CPU), []
    first.run(done.append, 1)
    assert first.compiling is None
    first.run(done.append, 5)
    assert first.compiling == 9.0 - 2.0 and done == [1, 1, 4]


def test_a_failed_compilation_is_one_line_and_other_errors_are_themselves() -> None:
    def fails(graph: Any, given: Any) -> Any:
        raise RuntimeError("no\nsuch instruction")

    torch._dynamo.reset()
    broken = torch.compile(lambda x: x + 1, backend=fails)
    with pytest.raises(PlanError, match=r"compile=1: torch.compile failed .*; leave compile out") as caught:
        FirstSteps(CPU).run(lambda _: broken(torch.ones(2)), 1)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ZeroDivisionError):
        FirstSteps(CPU).run(lambda _: 1 // 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["compile=1", "today,compile=1"])
def test_training_with_torch_compile(plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from paraxis.cli import app

    words = ["train", "mlp:12-9-3", "--data", "synthetic:100,1x3x4,3", "--batch", "16", "--steps", "4", "--json"]
    with pytest.raises(SystemExit) as ended:
        app([*words, "--plan", plan, "--out", str(tmp_path)])
    assert not ended.value.code
    document = json.loads(capsys.readouterr().out)
    assert len(document["losses"]) == 4 and any(note.startswith("compiling took") for note in document["notes"])
