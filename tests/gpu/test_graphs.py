"""CUDA graphs: replayed steps compute what the serial run computes on a CPU, and are replayed indeed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recorded import ASKS, LENGTHS, once
from test_reference import (
    EXACT,
    HELD,
    STREAM,
    TASKS,
    WRONG,
    checked,
    difference,
    evaluated,
    outcome,
    settle,
    spec_of,
    task,
)
from test_reference import started as started_on_cpu

import paraxis
from paraxis.engine import graphs
from paraxis.engine.fed import Fed
from paraxis.engine.graphs import CudaRecorder, Recording
from paraxis.engine.torch_engine import TorchEngine
from paraxis.plan.plan import WARM, parse
from paraxis.run import reference
from paraxis.run.graphs import replay
from paraxis.run.interpreter import Rank
from paraxis.task.masks import kept_of_part, kept_on, words_of
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
STEPS = 6  # as long as the serial run that they are compared with


class Counting(CudaRecorder):
    """The recorder, counting."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.recorded = self.played = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """A replay that is counted."""
        again = super().record(run)
        self.recorded += 1

        def play() -> None:
            self.played += 1
            again()

        return play


def started(spec: TaskSpec, text: str, graphs: bool = True, dtype: Any = None) -> tuple[list[Rank], list[Counting]]:
    """All ranks of a plan on one GPU, in this process."""
    plan, device = parse(text), torch.device("cuda", 0)
    tasks = [make_task(spec, dtype=dtype) if dtype else task(spec) for _ in range(plan.mesh.size)]
    program = checked(plan, tasks[0].layout(), tasks[0].train.steps_per_epoch or 1)
    ranks = reference.start(program, lambda rank: TorchEngine(tasks[rank], program, rank, device))
    recorders = [Counting(device) for _ in ranks] if graphs else []
    for rank, recorder in zip(ranks, recorders, strict=False):
        replay(rank, recorder, WARM - 1)
    return ranks, recorders


def on_cpu(ranks: list[Rank]) -> Any:
    """What they have come to, where it can be compared."""
    found = outcome(ranks)
    return type(found)(found.losses, [{name: value.cpu() for name, value in own.items()} for own in found.states])


def trained(spec: TaskSpec, text: str) -> tuple[float, list[Rank], list[Counting]]:
    ranks, recorders = started(spec, text)
    reference.run_steps(ranks, STEPS)
    settle(ranks)
    return difference(spec, parse(text), on_cpu(ranks)), ranks, recorders


CASES = [
    *((name, "serial") for name in TASKS),
    *((name, "pp=2,microbatches=4") for name in TASKS),
    *(("tiny", text) for text in ("dp=2,zero=1", "dp=2,sync=diloco@2", "pp=2,microbatches=2,recompute=all")),
    *(("cnn", text) for text in ("microbatches=4", "dp=2,pp=2,microbatches=2,bucket_bytes=64")),
    ("clip", "pp=3,schedule=zb-h1,microbatches=4"),
    ("batch norm", "dp=2,pp=2,microbatches=2"),
]


@pytest.mark.parametrize("name, text", CASES, ids=lambda word: word.replace(" ", "_"))
def test_replayed_steps_compute_what_the_serial_run_computes(name: str, text: str, folder: Path) -> None:
    found, ranks, recorders = trained(spec_of(folder, name, *TASKS[name]), text)
    assert [rank.remarks for rank in ranks] == [[]] * len(ranks), "nothing fell back"
    assert all(recorder.played for recorder in recorders), "some steps were replayed"
    assert found < EXACT


@pytest.mark.parametrize("name", ["tiny", "cnn", "clip"])
def test_a_step_that_is_not_fed_is_found(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: every replay has the first one's masks, rate and bias corrections."""
    monkeypatch.setattr(Fed, "send", once(Fed.send))
    assert trained(spec_of(folder, name, *TASKS[name]), "serial")[0] > WRONG


def test_samples_that_are_not_brought_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recording, "take", once(Recording.take))
    assert trained(spec_of(folder, "mlp", *TASKS["mlp"]), "serial")[0] > WRONG


def test_many_steps_in_a_row_read_each_its_own_letter(folder: Path) -> None:
    """The host runs far ahead of the device: what it has written for one step must not reach another."""
    spec = spec_of(folder, "tiny", *TASKS["tiny"])
    (graphed, _), (eager, _) = started(spec, "serial"), started(spec, "serial", graphs=False)
    for ranks in (graphed, eager):
        reference.run_steps(ranks, 400)
    mine, theirs = on_cpu(graphed), on_cpu(eager)
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-8)
    for name, value in theirs.states[0].items():
        torch.testing.assert_close(mine.states[0][name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("network", ["cnn", "resnet18", "gpt:nano,dropout=0.1"])
def test_the_zoo_is_recorded_in_float32(network: str) -> None:
    data = {} if network.startswith("gpt") else {"data": "synthetic:64,1x28x28,10"}
    spec = TaskSpec(network=network, batch=16, **data) if data else TaskSpec(network=network, batch=16, data="text")
    (graphed, recorders), (eager, _) = (started(spec, "serial", own, torch.float32) for own in (True, False))
    for ranks in (graphed, eager):
        reference.run_steps(ranks, STEPS)
    assert graphed[0].remarks == [] and recorders[0].played
    assert graphed[0].engine.losses[-1][0] == pytest.approx(eager[0].engine.losses[-1][0], rel=1e-2)


def test_evaluations_between_replays_leave_no_trace(folder: Path) -> None:
    spec = spec_of(folder, "batch norm", *TASKS["batch norm"])
    ranks, recorders = started(spec, "pp=2,microbatches=2")
    reference.run_steps(ranks, WARM)
    assert evaluated(ranks) == evaluated(ranks)
    reference.run_steps(ranks, STEPS - WARM)
    assert difference(spec, parse("pp=2,microbatches=2"), on_cpu(ranks)) < EXACT
    assert all(recorder.played for recorder in recorders)


def test_other_shapes_are_recorded_anew(folder: Path) -> None:
    spec = spec_of(folder, "lengths", LENGTHS, {"lr": 0.3})
    ranks, (recorder,) = started(spec, "serial")
    reference.run_steps(ranks, 10)
    plain = started_on_cpu(spec, parse("serial"))
    reference.run_steps(plain, 10)
    assert recorder.recorded == 2 and ranks[0].remarks == []
    assert on_cpu(ranks).losses == pytest.approx(outcome(plain).losses, rel=1e-10)


@pytest.mark.parametrize("text", ["serial", "pp=2,microbatches=2"])
def test_what_asks_for_a_value_runs_as_it_is_and_says_why(text: str, folder: Path) -> None:
    """A recording that has failed must leave the device and its memory fit for work."""
    spec = spec_of(folder, "asks", ASKS, HELD | {"data": STREAM.format("6,3"), "lr": 0.1})
    found, ranks, _ = trained(spec, text)
    said = [remark for rank in ranks for remark in rank.remarks]
    assert len(said) == 1 and said[0].startswith("graphs: fell back to eager: ")
    assert found < EXACT


def test_a_capture_that_fails_leaves_the_device_fit_for_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has foreseen: the allocator and the generator of random numbers must not wait for its end."""
    monkeypatch.setattr(graphs, "waits", lambda run: run() is not None)
    spec = spec_of(folder, "asks", ASKS, HELD | {"data": STREAM.format("6,3"), "lr": 0.1})
    found, (rank,), (recorder,) = trained(spec, "serial")
    assert len(rank.remarks) == 1 and "captur" in rank.remarks[0] and not recorder.played and found < EXACT
    torch.cuda.empty_cache()
    found, (rank,), (recorder,) = trained(spec_of(folder, "tiny", *TASKS["tiny"]), "serial")
    assert rank.remarks == [] and recorder.played and found < EXACT


def test_masks_have_the_same_bits_on_a_gpu() -> None:
    for run in (7, 8, 4096):
        wanted = torch.from_numpy(kept_of_part(0xF234567890ABCDEF, 3, 5, 2, run, 1, 3, 0.3))
        found = kept_on(torch.device("cuda"), words_of(0xF234567890ABCDEF), 3, 5, (2, run, 1, 3), 0.3)
        assert torch.equal(found.cpu(), wanted)


def test_a_plan_with_graphs_is_proved_from_the_outside() -> None:
    document = paraxis.verify("cnn", plan="device=cuda,graphs=1", steps=6)
    assert document["passed"] and "graphs: fell back" not in str(document)
