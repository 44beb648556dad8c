"""Recorded steps compute what the serial run computes, on a CPU, by tapes that hold to what CUDA graphs hold to."""

import gc
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from test_reference import (
    EXACT,
    HEAD,
    HELD,
    STEPS,
    STREAM,
    TASKS,
    WRONG,
    difference,
    evaluated,
    outcome,
    settle,
    spec_of,
)
from test_reference import started as reference_started
from torch import Tensor

from paraxis.engine.fed import Fed
from paraxis.engine.graphs import Recording
from paraxis.plan.plan import parse
from paraxis.run import reference
from paraxis.run.graphs import replay
from paraxis.run.interpreter import Rank
from paraxis.task.spec import TaskSpec

torch.set_num_threads(1)
WARM = 2


def started(spec: TaskSpec, text: str) -> tuple[list[Rank], list[TapeRecorder]]:
    """All ranks of a plan, each with a recorder."""
    ranks = reference_started(spec, parse(text))
    recorders = [TapeRecorder() for _ in ranks]
    for rank, recorder in zip(ranks, recorders, strict=True):
        replay(rank, recorder, WARM)
    return ranks, recorders


def trained(spec: TaskSpec, text: str) -> tuple[float, list[Rank], list[TapeRecorder]]:
    """(how far from serial, the ranks, what recorded their steps)."""
    ranks, recorders = started(spec, text)
    reference.run_steps(ranks, STEPS)
    settle(ranks)
    return difference(spec, parse(text), outcome(ranks)), ranks, recorders


CASES = [
    *(
        ("tiny", text)
        for text in ("serial", "microbatches=4", "pp=2,microbatches=4", "pp=2,microbatches=2,recompute=all")
    ),
    *(("tiny", text) for text in ("dp=2,zero=1", "dp=2,microbatches=2,sync=average@2", "dp=2,sync=diloco@2")),
    *(("cnn", text) for text in ("serial", "dp=2,pp=2,microbatches=2,bucket_bytes=64")),
    *(("batch norm", text) for text in ("microbatches=2", "dp=2,pp=2,microbatches=2", "pp=3,microbatches=2")),
    *(("clip", text) for text in ("serial", "dp=2,pp=2,microbatches=2", "pp=3,schedule=zb-h1,microbatches=4")),
    ("mlp", "pp=2,schedule=interleaved,microbatches=4"),
    ("transformer", "microbatches=2"),
    ("transformer", "dp=2"),
]


@pytest.mark.parametrize("name, text", CASES, ids=lambda word: word.replace(" ", "_"))
def test_replayed_steps_compute_what_the_serial_run_computes(name: str, text: str, folder: Path) -> None:
    found, ranks, recorders = trained(spec_of(folder, name, *TASKS[name]), text)
    assert found < EXACT
    bodies = len(parse_period(ranks[0]))
    for rank, recorder in zip(ranks, recorders, strict=True):
        assert rank.remarks == []
        steps = STEPS - WARM * bodies if bodies > 1 else STEPS - WARM
        assert recorder.recorded and recorder.played >= steps, "most of the steps were replayed"
        if len(ranks) == 1:
            assert recorder.recorded == 1, "a step that meets nobody is one recording"


def parse_period(rank: Rank) -> list[str]:
    """The bodies of its steps."""
    return [name for name, _ in rank.program.period]


def once(function: Callable[..., None]) -> Callable[..., None]:
    """A fault: what is to be done in every step is done in the first one."""
    done: list[int] = []

    def forgetful(own: Any, *words: Any) -> None:
        if id(own) not in done:
            done.append(id(own))
            function(own, *words)

    return forgetful


@pytest.mark.parametrize("name", ["tiny", "cnn"])
def test_a_step_that_is_not_fed_is_found(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: every replay has the first one's masks, rate and bias corrections."""
    spec = spec_of(folder, name, *TASKS[name])
    monkeypatch.setattr(Fed, "send", once(Fed.send))
    assert trained(spec, "serial")[0] > WRONG


def test_a_schedule_that_is_not_fed_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TASKS["mlp"][1] | {"lr_schedule": "cosine", "warmup": 2, "horizon": 8}
    spec = spec_of(folder, "mlp", TASKS["mlp"][0], settings)
    assert trained(spec, "serial")[0] < EXACT
    monkeypatch.setattr(Fed, "send", once(Fed.send))
    assert trained(spec, "serial")[0] > WRONG


def test_samples_that_are_not_brought_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recording, "take", once(Recording.take))
    assert trained(spec_of(folder, "mlp", *TASKS["mlp"]), "serial")[0] > WRONG


def test_activations_that_lie_elsewhere_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives must lie where the recording reads it."""
    spec = spec_of(folder, "mlp", *TASKS["mlp"])
    ranks, _ = started(spec, "pp=2,microbatches=2")
    ranks[1].engine.stages[1].landing = None
    reference.run_steps(ranks, STEPS)
    assert not difference(spec, parse("pp=2,microbatches=2"), outcome(ranks)) < WRONG


def test_evaluations_between_replays_leave_no_trace(folder: Path) -> None:
    spec = spec_of(folder, "batch norm", *TASKS["batch norm"])
    ranks, recorders = started(spec, "pp=2,microbatches=2")
    reference.run_steps(ranks, WARM + 1)
    assert evaluated(ranks) == evaluated(ranks)
    reference.run_steps(ranks, STEPS - WARM - 1)
    assert difference(spec, parse("pp=2,microbatches=2"), outcome(ranks)) < EXACT
    assert all(recorder.played for recorder in recorders)


def test_a_body_that_comes_twice_in_a_period_is_recorded_once(folder: Path) -> None:
    ranks, recorders = started(spec_of(folder, "tiny", *TASKS["tiny"]), "dp=2,sync=diloco@4:overlap=2")
    names = parse_period(ranks[0])
    assert len(set(names)) < len(names)
    reference.run_steps(ranks, 12)
    for rank, recorder in zip(ranks, recorders, strict=True):
        assert rank.remarks == [] and recorder.warmed == WARM * recorder.recorded and recorder.played


LENGTHS = (
    HEAD
    + """
class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)
def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), Mean(), nn.Linear(8, 3))
def batches():
    source = torch.Generator().manual_seed(1)
    for number in range(6):
        yield torch.randn(8, 2 + number % 2, 6, generator=source), torch.arange(8) % 3
"""
)


def test_other_shapes_are_recorded_anew(folder: Path) -> None:
    spec = spec_of(folder, "lengths", LENGTHS, {"lr": 0.3})
    ranks, (recorder,) = started(spec, "serial")
    reference.run_steps(ranks, 4 * WARM)
    assert recorder.recorded == 2 and recorder.played == 2 * WARM
    plain = reference_started(spec, parse("serial"))
    reference.run_steps(plain, 4 * WARM)
    mine, theirs = outcome(ranks), outcome(plain)
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-12)
    for name, value in theirs.states[0].items():
        torch.testing.assert_close(mine.states[0][name], value, rtol=1e-12, atol=1e-12)


ASKS = HEAD + "def net():\n    return nn.Sequential(nn.Linear(6, 8), Asking(), nn.Dropout(0.4), nn.Linear(8, 3))\n"
ASKS += """
class Asking(nn.Module):
    def forward(self, x):
        return x / 2 if float(x.detach().abs().max()) < 1e9 else x
"""
RUNS_ITSELF = TASKS["tiny"][0] + "def optimizer(parameters):\n    return torch.optim.RMSprop(parameters, 0.01)\n"
DRAWS = HEAD + "def net():\n    return nn.Sequential(nn.Linear(6, 8), Noise(), nn.Linear(8, 3))\n"
DRAWS += """
class Noise(nn.Module):
    def forward(self, x):
        return x + 0 * torch.rand(())
"""
FALLS = [
    (ASKS, "serial", r"^graphs: fell back to eager: RuntimeError: operation not permitted when stream is capturing$"),
    (ASKS, "pp=2,microbatches=2", r"RuntimeError: operation not permitted when stream is capturing"),
    (
        RUNS_ITSELF,
        "serial",
        r"^graphs: fell back to eager: RMSprop as it is set runs itself; plain SGD, Adam and AdamW",
    ),
    (DRAWS, "serial", r"these modules draw random numbers that cannot be keyed: 1"),
    (TASKS["tiny"][0], "dp=2,zero=2", r"zero=2 gives memory back in every step"),
]


@pytest.mark.parametrize("number", range(len(FALLS)))
def test_what_cannot_be_recorded_runs_as_it_is_and_says_why(number: int, folder: Path) -> None:
    source, text, reason = FALLS[number]
    spec = spec_of(folder, f"falls{number}", source, HELD | {"data": STREAM.format("6,3"), "lr": 0.1})
    found, ranks, recorders = trained(spec, text)
    assert found < EXACT
    said = [remark for rank in ranks for remark in rank.remarks]
    assert said and all(torch_free(remark) for remark in said)
    assert any(re.search(reason, remark) for remark in said), said
    failing = [recorder for rank, recorder in zip(ranks, recorders, strict=True) if rank.remarks]
    assert all(recorder.played == 0 for recorder in failing)


@pytest.mark.parametrize("text", ["serial", "pp=2,microbatches=2"])
def test_what_is_seen_before_a_recording_prevents_it(text: str, folder: Path) -> None:
    """In the middle of a body, whose other parts then run as they are, too."""
    spec = spec_of(folder, "tiny", *TASKS["tiny"])
    ranks = reference_started(spec, parse(text))
    recorders = [TapeRecorder("a module asks for a value") for _ in ranks]
    for rank, recorder in zip(ranks, recorders, strict=True):
        replay(rank, recorder, WARM)
    reference.run_steps(ranks, STEPS)
    assert difference(spec, parse(text), outcome(ranks)) < EXACT
    for rank, recorder in zip(ranks, recorders, strict=True):
        assert rank.remarks == ["graphs: fell back to eager: a module asks for a value"]
        assert recorder.recorded == recorder.played == 0


def torch_free(remark: str) -> bool:
    """One line, that says what has happened."""
    return "\n" not in remark and remark.startswith("graphs: fell back to eager: ")


def test_a_scheduler_that_changes_more_than_the_rate_is_followed(folder: Path) -> None:
    source = TASKS["tiny"][0] + (
        "def optimizer(parameters):\n    return torch.optim.SGD(parameters, 0.1, momentum=0.9)\n"
        "def scheduler(optimizer):\n    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=50)\n"
    )
    spec = spec_of(folder, "cycles", source, HELD | {"data": STREAM.format("6,3")})
    found, _, (recorder,) = trained(spec, "serial")
    assert found < EXACT and recorder.played == 0, "another momentum in every step: nothing comes twice"


def test_what_is_dropped_goes_at_once(folder: Path) -> None:
    """Resident ranks freeze what they set up: the collector never finds a circle among it."""
    ranks, recorders = started(spec_of(folder, "cnn", *TASKS["cnn"]), "pp=2,microbatches=2")
    reference.run_steps(ranks, STEPS)
    engines = [weakref.ref(rank.engine) for rank in ranks]
    gc.disable()
    try:
        ranks.clear()
        recorders.clear()
        assert [engine() for engine in engines] == [None, None]
    finally:
        gc.enable()


def memory_of(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def test_gradients_stay_where_they_are(folder: Path) -> None:
    """A replay adds to the addresses it was recorded with."""
    ranks, _ = started(spec_of(folder, "cnn", *TASKS["cnn"]), "serial")
    parameters = [p for p, _, _ in ranks[0].engine.flat.members]
    before = memory_of([p.grad for p in parameters]), memory_of(parameters)
    reference.run_steps(ranks, STEPS)
    assert before == (memory_of([p.grad for p in parameters]), memory_of(parameters))
