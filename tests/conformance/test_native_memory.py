"""The computed memory of a native plan is what C++ reserves for it, and what its ranks hold of what comes in."""

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_native import native, spec_named, team_of
from test_reference import spec_of

from paraxis.comm.payload import PackedSum
from paraxis.engine.native_engine import extension
from paraxis.engine.native_rank import NativeEngine
from paraxis.plan.plan import Plan, parse
from paraxis.program.agreeing import Agreeing
from paraxis.program.lower import lower
from paraxis.program.memory import Memory
from paraxis.run import openmp, reference
from paraxis.run.interpreter import Rank
from paraxis.run.reserved import native_memory
from paraxis.task.spec import TaskSpec
from paraxis.task.task import Task, make_task

WITHIN = 0.01  # a part of common weights is rounded down
THREADS = ("serial", "dp=4", "dp=2,microbatches=2", "dp=2,gradients=owner", "pp=2,microbatches=4", "dp=2,sync=diloco@2")
THREADS += ("dp=2,pp=2,microbatches=2", "dp=2,sync=average@2", "pp=2,schedule=zb-h2,microbatches=4")
THREADS += ("dp=2,pp=2,schedule=interleaved,microbatches=2", "dp=2,pp=2,schedule=zb-h1,microbatches=4")
THREADS += ("tp=2", "dp=2,tp=2", "pp=2,tp=2,microbatches=4")
RANKS = ("dp=2,threads=2", "pp=2,schedule=zb-h1,microbatches=4", "dp=2,sync=diloco@2:bf16")
RARE = ("dp=2", "pp=2,microbatches=4", "pp=2,schedule=gpipe,microbatches=4", "dp=4,sync=compressed")
RARE += ("dp=2,pp=2,schedule=interleaved,microbatches=4,threads=2", "dp=2,pp=2,microbatches=2,threads=2,sync=diloco@2")
WIDE: dict[str, Any] = {"data": "synthetic:100,1x3x4,80,seed=2", "batch": 64, "momentum": 0.9}


def wide(folder: Path, **more: Any) -> TaskSpec:
    return spec_of(folder, "native memory", "mlp:12-64-48-80", WIDE | more)


def computed(task: Task, plan: Plan) -> list[Memory]:
    return native_memory(task, lower(plan, task.layout(), 3), plan)


def reserved() -> int:
    gc.collect()
    return int(extension().reserved())


@pytest.mark.parametrize("text", THREADS)
@pytest.mark.parametrize("name", ["cnn", "norms"])
def test_threads_reserve_what_is_computed(name: str, text: str, folder: Path) -> None:
    spec, plan = spec_named(folder, name, batch=16), native(text)
    before = reserved()
    own = computed(make_task(spec), plan)
    assert reserved() == before, "nothing is reserved to know it"
    team = team_of(spec, plan, dtype=torch.float32)
    found = reserved() - before
    assert team.ranks == len(own) and abs(sum(m.total for m in own) / found - 1) < WITHIN


def ranks_of(spec: TaskSpec, plan: Plan) -> list[Rank]:
    task = make_task(spec)
    program = lower(plan, task.layout(), 3)
    return reference.start(program, lambda rank: NativeEngine(make_task(spec), program, rank, plan.threads))


def on_the_way(rank: Rank) -> int:
    """Bytes of what has come in, is awaited, or lies packed."""
    stages = rank.engine.stages.values()
    tensors = [t for stage in stages for own in stage.held.values() for t in own]
    for request in (r for requests in rank.context.open.values() for r in requests):
        tensors += request.letters() if isinstance(request, PackedSum) else [getattr(request, "tensor", torch.empty(0))]
    kept = rank.engine.kept.buffers.values() if rank.engine.kept else ()
    own = {t.data_ptr() for t in (rank.engine.flat.params, rank.engine.flat.grads, *kept)}
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.data_ptr() not in own}.values())


def counted(spec: TaskSpec, plan: Plan) -> list[int]:
    """Bytes of every rank, C++'s measured one rank after the other, and the most that was on its way."""
    task = make_task(spec)
    program, own = lower(plan, task.layout(), 3), []
    for rank in range(plan.mesh.size):
        before = reserved()
        engine = NativeEngine(make_task(spec), program, rank, plan.threads)
        own.append(reserved() - before + sum(t.nbytes for t in (engine.kept.buffers if engine.kept else {}).values()))
        del engine
    ranks, most = ranks_of(spec, plan), [0] * plan.mesh.size

    def looked(r: int, act: Any) -> None:
        act()
        most[r] = max(most[r], on_the_way(ranks[r]))

    for r, rank in enumerate(ranks):
        rank.bodies = {name: [partial(looked, r, act) for act in acts] for name, acts in rank.bodies.items()}
    reference.run_steps(ranks, program.steps_in_period())
    return [a + b for a, b in zip(own, most, strict=True)]


@pytest.mark.parametrize("text", [*RANKS, *(pytest.param(text, marks=pytest.mark.slow) for text in RARE)])
def test_ranks_of_processes_hold_what_is_computed(text: str, folder: Path) -> None:
    spec, plan = wide(folder), parse(f"{text},engine=native,comm=mpi")
    pairs = zip(computed(make_task(spec), plan), counted(spec, plan), strict=True)
    assert all(abs(own.total / found - 1) < WITHIN for own, found in pairs)


def test_weights_in_common_count_once(folder: Path) -> None:
    """Four threads on one copy hold a quarter each; with weights of their own (here: averaged) all of it each."""
    task = make_task(wide(folder))
    alone, *_ = computed(task, native("serial"))
    common, *_ = computed(task, native("dp=4"))
    apart, *_ = computed(task, native("dp=4,sync=average@2"))
    assert abs(4 * common.parameters - alone.parameters) < 4 and common.gradients == alone.gradients
    assert apart.parameters == alone.parameters and common.activations < 0.4 * alone.activations


@pytest.mark.parametrize("text, term", [("dp=2,sync=diloco@2:bf16", "kept"), ("dp=2,sync=compressed", "packed")])
def test_what_a_rule_holds_is_missed_where_it_is_left_out(
    text: str, term: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants: the formula without the term."""
    spec, plan = wide(folder, batch=16), parse(f"{text},engine=native,comm=mpi")
    found = counted(spec, plan)[0]
    assert abs(computed(make_task(spec), plan)[0].total / found - 1) < WITHIN
    monkeypatch.setattr(Agreeing, term, 0 if term == "kept" else lambda *_: 0)
    assert computed(make_task(spec), plan)[0].total / found < 1 - 5 * WITHIN


def test_a_dry_ensemble_that_would_have_other_buffers_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: microbatches that are left out of the sum."""
    spec, plan = wide(folder), native("dp=2,microbatches=4")
    own = sum(m.total for m in computed(make_task(spec), native("dp=2")))
    before = reserved()
    team = openmp.start(make_task(spec), lower(plan, make_task(spec).layout(), 3), hogwild=False)
    assert team.ranks == 2 and abs(own / (reserved() - before) - 1) > WITHIN
