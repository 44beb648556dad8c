"""The computed memory of a plan is what hooks and flat buffers count while the plan runs, rank by rank."""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_odd_networks import FINE
from test_reference import HEAD, STREAM, TASKS, spec_of

from paraxis.engine.torch_engine import TorchEngine
from paraxis.measure.facts import Facts, facts_of
from paraxis.measure.layers import measure_layers
from paraxis.measure.saved import measure_sizes
from paraxis.plan.plan import Plan, parse
from paraxis.program.agreeing import Agreeing
from paraxis.program.instructions import Program
from paraxis.program.lower import lower
from paraxis.program.memory import Memory, Sizes, largest, memory
from paraxis.run import reference
from paraxis.run.held import counting, held
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

WITHIN = 0.01  # a learning rate's counter here, a padded share there
TEXTS = (
    "serial",
    "microbatches=4",
    "recompute=all",
    "dp=2,bucket_bytes=64",
    "pp=2,microbatches=4",
    "pp=2,schedule=gpipe,microbatches=4",
    "pp=2,microbatches=4,recompute=all",
    "pp=2,schedule=gpipe,microbatches=4,recompute=0",
    "pp=2,schedule=interleaved,microbatches=4,recompute=all",
    "pp=2,schedule=zb-h1,microbatches=4",
    "dp=2,zero=1",
    "dp=2,zero=2,bucket_bytes=1000",
    "dp=2,zero=3,bucket_bytes=1000,recompute=all",
    "dp=2,pp=2,microbatches=2,zero=3",
    "dp=2,pp=2,microbatches=4,zero=3,schedule=zb-h1,bucket_bytes=1000",
)
PAIRS = [(name, text) for name in ("cnn", "transformer") for text in TEXTS if "zero" not in text or name == "cnn"]
PAIRS += [("batch norm", text) for text in ("serial", "dp=2,pp=2,microbatches=4", "microbatches=2,recompute=all")]
SHARED = [("wide", "tp=2"), ("wide", "dp=2,tp=2"), ("wide", "pp=2,tp=2,microbatches=4"), ("gpt", "tp=2")]
SHARED += [("gpt", "pp=2,tp=2,microbatches=4"), ("gpt", "pp=2,tp=2,schedule=zb-h1,microbatches=4")]
SHARED += [("gpt", "tp=2,sequence=1"), ("gpt", "dp=2,pp=2,tp=2,microbatches=2,sequence=1")]
SHARED += [("gpt", "dp=2,tp=2,zero=1"), ("gpt", "pp=2,tp=2,schedule=interleaved,interleave=2,microbatches=2")]
AGREEING = [("wide", f"dp=2,sync={sync}") for sync in ("average@2", "compressed", "diloco@2", "diloco@2:bf16")]
AGREEING += [("wide", "dp=4,sync=diloco@2:int8:fragments=2"), ("gpt", "dp=2,pp=2,microbatches=2,sync=diloco@2:int8")]
AGREEING += [("wide", "dp=2,sync=diloco@4:bf16:overlap=2")]
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "wide": ("mlp:12-64-48-80", {"batch": 64, "data": STREAM.format("1x3x4,80"), "momentum": 0.9}),
    "gpt": ("gpt:2-16-2-8,dropout=0.2", {"batch": 16, "optimizer": "adam"}),
}
PAIRS += [("mlp", text) for text in ("serial", "pp=2,interleave=2,schedule=gpipe,microbatches=2")]


@cache
def sizes_of(spec: TaskSpec, tp: int = 1, sequence: int = 0, precision: str = "fp32", parted: bool = False) -> Sizes:
    return measure_sizes(make_task(spec), tp, sequence, precision, parted)


def named(folder: Path, name: str) -> TaskSpec:
    source, settings = NETS[name]
    if name == "gpt":
        text = folder / "letters.txt"
        text.write_bytes(bytes(range(32, 128)) * 12)
        settings = settings | {"data": f"text:{text}"}
    return spec_of(folder, f"memory {name}", source, settings)


def counted(spec: TaskSpec, plan: Plan) -> tuple[list[Memory], list[dict[str, int]]]:
    """(computed, counted) of every rank, in a step that is not the first."""
    task = make_task(spec)
    program: Program = lower(plan, task.layout(), 3)
    ranks = reference.start(program, lambda r: TorchEngine(make_task(spec), program, r))
    for scaling in (rank.engine.scaling for rank in ranks if rank.engine.scaling):
        scaling.scale = 1.0  # a first step that is skipped leaves an optimiser without its state
    reference.run_steps(ranks, 1)
    with ExitStack() as stack:
        counts = [stack.enter_context(counting(rank)) for rank in ranks]
        reference.run_steps(ranks, program.steps_in_period())
    found = [held(rank, count.peak) for rank, count in zip(ranks, counts, strict=True)]
    parted = plan.precision != "fp32" and any(map(program.parted, range(len(program.stages))))
    sizes = sizes_of(spec, plan.tp, plan.sequence, plan.precision, parted)
    return memory(program, plan, sizes, task.batch), found


def apart(spec: TaskSpec, plan: Plan) -> float:
    """How far the two are from each other, of the rank where it is most."""
    pairs = zip(*counted(spec, plan), strict=True)
    return max(abs(computed.total / sum(found.values()) - 1) for computed, found in pairs)


@pytest.mark.parametrize("name, text", PAIRS)
def test_computed_bytes_are_the_counted_ones(name: str, text: str, folder: Path) -> None:
    assert apart(spec_of(folder, name, *TASKS[name]), parse(text)) < WITHIN


@pytest.mark.parametrize("name, text", SHARED)
def test_ranks_that_share_layers_hold_their_part(name: str, text: str, folder: Path) -> None:
    assert apart(named(folder, name), parse(text)) < 2 * WITHIN


@pytest.mark.parametrize("name, text", AGREEING)
def test_what_a_rule_keeps_and_packs_counts(name: str, text: str, folder: Path) -> None:
    """How much of what streams lies packed at once depends on when it is looked after: at most what is computed."""
    assert apart(named(folder, name), parse(text)) < (8 if "overlap" in text else 2) * WITHIN


@pytest.mark.parametrize("name, text", [("wide", "tp=2"), ("gpt", "pp=2,tp=2,microbatches=4")])
def test_sizes_of_the_whole_network_are_no_parts(name: str, text: str, folder: Path) -> None:
    """Mutant: what is split counted as if it were whole."""
    spec, plan = named(folder, name), parse(text)
    (right, *_), (found, *_) = counted(spec, plan)
    wrong = memory(lower(plan, make_task(spec).layout(), 3), plan, sizes_of(spec), spec.batch or 0)[0]
    assert wrong.total > 1.3 * sum(found.values()) and right.activations < 0.8 * wrong.activations


def test_tokens_of_other_ranks_are_not_held(folder: Path) -> None:
    """Mutant: between its splits a rank held all tokens."""
    spec, plan = named(folder, "gpt"), parse("tp=2,sequence=1")
    (right, *_), (found, *_) = counted(spec, plan)
    wrong = memory(lower(plan, make_task(spec).layout(), 3), plan, sizes_of(spec, 2), spec.batch or 0)[0]
    assert wrong.total > 1.05 * sum(found.values()) and right.activations < wrong.activations


@pytest.mark.parametrize("sync, term", [("diloco@2", "copies"), ("diloco@2:bf16", "packed"), ("compressed", "packed")])
def test_a_rule_whose_buffers_or_letters_are_forgotten_is_missed(
    sync: str, term: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants: the formula without the term. The batch is small: letters only count beyond the activations."""
    spec, plan = named(folder, "wide").model_copy(update={"batch": 4}), parse(f"dp=2,sync={sync}")
    assert apart(spec, plan) < WITHIN
    monkeypatch.setattr(Agreeing, *{"copies": ("kept", 0), "packed": ("packed", lambda *_: 0)}[term])
    assert apart(spec, plan) > 5 * WITHIN


@pytest.mark.parametrize("name", ["rmsprop", "tied within a stage", "frozen first layer"])
def test_odd_networks_too(name: str, folder: Path) -> None:
    source, settings, plans = FINE[name]
    assert apart(spec_of(folder, name, HEAD + source, settings), parse(plans[1])) < 2 * WITHIN


def test_what_is_left_out_of_the_program_is_missed(folder: Path) -> None:
    """Mutants: sizes that forget a layer, and a rank that keeps what it should let go."""
    spec, plan = spec_of(folder, "cnn", *TASKS["cnn"]), parse("pp=2,schedule=gpipe,microbatches=4")
    whole, (computed, found) = sizes_of(spec), counted(spec, plan)
    program = lower(plan, make_task(spec).layout(), 3)
    spoiled = replace(whole, saved=tuple(() if n == 1 else own for n, own in enumerate(whole.saved)))
    less = memory(program, plan, spoiled, spec.batch or 0)[0]
    assert abs(computed[0].total / sum(found[0].values()) - 1) < WITHIN < 1 - less.total / sum(found[0].values())
    light = parse("pp=2,schedule=gpipe,microbatches=4,recompute=all")
    assert (
        memory(lower(light, make_task(spec).layout(), 3), light, whole, 16)[0].activations < computed[0].activations / 2
    )


def test_schedules_keep_what_their_formulas_say(folder: Path) -> None:
    """GPipe keeps all m microbatches of a stage, 1F1B at most p - stage."""
    spec = spec_of(folder, "mlp", "mlp:64-64-64-64-64-10", {"batch": 64, "data": "synthetic:128,1x8x8,10"})
    task = make_task(spec)

    def of(text: str, rank: int) -> int:
        plan = parse(text)
        return memory(lower(plan, task.layout()), plan, sizes_of(spec), 64)[rank].activations

    one = of("pp=2,microbatches=8", 1)
    assert of("pp=2,schedule=gpipe,microbatches=8", 1) == 8 * one
    first = of("pp=2,schedule=layerwise,microbatches=8", 0)
    assert of("pp=2,microbatches=8", 0) == 2 * first and of("pp=2,schedule=gpipe,microbatches=8", 0) == 8 * first
    assert largest(lower(parse("dp=2"), task.layout()), parse("dp=2"), sizes_of(spec), 64).communication == 0


def test_a_trial_uses_up_nothing(folder: Path) -> None:
    spec = spec_of(folder, "batch norm", *TASKS["batch norm"])
    task = make_task(spec)
    before = {name: value.clone() for name, value in task.net.state_dict().items()}
    measure_sizes(task)
    assert all(torch.equal(value, before[name]) for name, value in task.net.state_dict().items())


def test_facts_carry_them_to_the_driver(folder: Path) -> None:
    task = make_task(spec_of(folder, "tiny", *TASKS["tiny"]))
    facts: Facts = measure_layers(task, task.batch, seconds=0.01)
    assert facts.sizes == sizes_of(task.spec) and facts_of(facts.as_json()) == facts
