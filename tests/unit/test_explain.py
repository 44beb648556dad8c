"""Each cause of a slow step is found from its figures, names a remedy, and goes when its figure changes."""

from dataclasses import replace

import pytest
from test_breakdown import MS, ticking

from paraxis.measure.explain import BINDS, Evidence, _loads, explain_today, fill, judge
from paraxis.measure.facts import Facts
from paraxis.measure.machine import describe
from paraxis.measure.records import MeshRecord, Result, Seconds, Split
from paraxis.plan.plan import parse
from paraxis.program.cut import Layout
from paraxis.program.lower import lower

NONE = dict.fromkeys((kind for kind in Split.model_fields if kind != "remainder"), 0.0)


def parts(**ms: float) -> Split:
    """A rank's step of 10 ms; what is not named is computing."""
    given = {kind: value / 1e3 for kind, value in ms.items()}
    return Split(**(NONE | {"compute": 10e-3 - sum(given.values())} | given))


def evidence(plan: str, *ranks: Split, **fields: object) -> Evidence:
    standard = {"cores": 8, "batch": 128, "parameters": 100_000, "layers": (1e-3,) * 8, "dispatch": 1e-4}
    rows = ranks if len(ranks) > 1 else ranks * parse(plan).mesh.size
    return Evidence(parse(plan), 10e-3, rows, **(standard | fields))  # type: ignore[arg-type]


def test_oversubscription() -> None:
    crowded = evidence("dp=4", parts(straggler_wait=5), cores=2)
    verdict = judge(crowded)
    assert verdict.short == "oversubscription" and "4 workers take turns on 2 cores" in verdict.sentence
    assert "fewer ranks, such as dp=2" in verdict.change
    assert judge(replace(crowded, cores=4)).cause == "imbalance"


def test_bubble() -> None:
    filling = evidence("pp=2,microbatches=4", parts(pipeline_wait=3))
    verdict = judge(filling)
    assert verdict.short == "bubble 30%" and verdict.change == "raise microbatches from 4 to 8"
    assert "8 to 16" in judge(evidence("pp=2,microbatches=8", parts(pipeline_wait=3))).change
    assert judge(evidence("pp=2,microbatches=4", parts(pipeline_wait=1000 * BINDS / 100 - 0.1))).cause == "compute"


def test_more_microbatches_are_not_advised_where_they_cannot_help() -> None:
    """The gain from 4 to 8 is at most 1/5 - 1/9 of 10 ms, 0.9 ms."""
    cheap = evidence("pp=2,microbatches=4", parts(pipeline_wait=3), dispatch=0.4e-3)
    assert judge(cheap).change.startswith("raise microbatches")
    assert "would cost 1 ms of calls" in judge(replace(cheap, dispatch=0.5e-3)).change
    assert "a larger batch" in judge(replace(cheap, batch=4)).change


def test_imbalance_of_stages() -> None:
    uneven = parts(pipeline_wait=0), parts(pipeline_wait=7)
    layers = (3e-3, 1e-3, 1e-3, 1e-3, 0.5e-3, 0.5e-3, 0.5e-3, 0.5e-3)
    found = judge(evidence("pp=2,microbatches=4,split=4+4", *uneven, layers=layers))
    assert found.cause == "imbalance" and "split=2+6 would balance it" in found.change
    best = judge(evidence("pp=2,microbatches=4,split=1+7", *uneven, layers=layers))
    assert best.cause == "imbalance" and "no cut of its 8 layers is more even" in best.change and "dp=2" in best.change
    even = parts(pipeline_wait=3.4), parts(pipeline_wait=3.6)
    assert judge(evidence("pp=2,microbatches=4,split=4+4", *even, layers=layers)).cause == "bubble"


def test_imbalance_of_replicas() -> None:
    waiting = evidence("dp=2", parts(straggler_wait=0), parts(straggler_wait=5))
    verdict = judge(waiting)
    assert verdict.short == "imbalance 25%" and "rank 0 works 33% longer than the mean" in verdict.seen
    assert "dp=1" in verdict.change
    assert judge(evidence("dp=2", parts(straggler_wait=0), parts(straggler_wait=3))).cause == "compute"


def test_latency_and_bandwidth() -> None:
    talking = evidence("dp=2,comm=mpi", parts(communication=4), sent=(40e6, 2.0))
    verdict = judge(talking)
    assert verdict.short == "bandwidth 40%" and "10 GB/s" in verdict.seen and "openmp" in verdict.change
    small = judge(replace(talking, sent=(40e3, 2.0)))
    assert small.short == "latency 40%" and "fewer steps" in small.change
    assert judge(replace(talking, sent=(1e6, 2.0))).cause == "latency", "0.25 GB/s: bytes are not what it waits for"
    assert judge(replace(talking, sent=(40e6, 2.0), memory=200e9)).cause == "latency"
    assert "threads" in judge(replace(talking, plan=parse("dp=2,engine=native"), sent=(0.0, 2.0))).seen
    buckets = replace(talking, plan=parse("dp=2,bucket_bytes=1M"), sent=(40e3, 2.0))
    assert judge(buckets).change == "one bucket (bucket_bytes=0)"
    assert "comm=mpi" in judge(replace(talking, plan=parse("dp=2,comm=gloo"), sent=(4e3, 2.0))).change
    stages = evidence("pp=2,microbatches=8", parts(communication=4), sent=(40e3, 32.0))
    assert judge(stages).change == "lower microbatches from 8 to 4"


def test_overhead_of_calls() -> None:
    calls = evidence("pp=2,microbatches=8", parts(), dispatch=1.3e-3)
    verdict = judge(calls)
    assert verdict.cause == "per-call overhead" and "lower microbatches from 8 to 4" in verdict.change
    assert judge(replace(calls, dispatch=1.2e-3)).cause == "compute"
    assert judge(replace(calls, plan=parse("pp=2,microbatches=8,engine=native"))).cause == "compute", "no framework"
    assert "engine=native" in judge(evidence("serial", parts(), dispatch=6e-3)).change
    assert judge(evidence("dp=2,engine=native", parts(overhead=3))).short == "per-call overhead 30%"


def test_memory_bandwidth() -> None:
    wide = evidence("pp=2,microbatches=4", parts(), parameters=10_000_000, memory=40e9)
    verdict = judge(wide)
    assert (
        verdict.cause == "memory bandwidth"
        and "240 MB" in verdict.seen
        and "microbatches from 4 to 2" in verdict.change
    )
    assert judge(replace(wide, memory=50e9)).cause == "compute" and judge(replace(wide, memory=None)).cause == "compute"
    slow = judge(evidence("threads=2", parts(optimizer=3), parameters=1_000))
    assert slow.short == "per-call overhead 30%" and "fewer threads than 2" in slow.change
    update = judge(evidence("serial", parts(optimizer=3), parameters=1_000_000))
    assert update.short == "memory bandwidth 30%" and "20 MB" in update.seen and "larger batch" in update.change


def test_data_and_compute() -> None:
    assert judge(evidence("serial", parts(data=3))).short == "data 30%"
    busy = evidence("dp=2,engine=native", parts(), cores=2)
    assert judge(busy).short == "compute" and judge(busy).change == "more cores"
    assert "6 of 8 cores are idle" in judge(replace(busy, cores=8)).change


def test_a_gpu_waits_for_launches_or_is_busy() -> None:
    eager = evidence("device=cuda", parts(), dispatch=6e-3, devices=("cuda:0",), cores=2)
    verdict = judge(eager)
    assert verdict.short == "launches" and "60% of the step" in verdict.seen and verdict.change.startswith("graphs=1, ")
    assert judge(replace(eager, plan=parse("device=cuda,engine=plain"))).change.startswith("engine=torch,graphs=1")
    assert "graphs" not in judge(replace(eager, plan=parse("device=cuda,precision=fp16"))).change
    replayed = judge(replace(eager, plan=parse("device=cuda,graphs=1")))
    assert replayed.short == "compute" and replayed.change.startswith("a larger batch, which fills it better, or prec")
    busy = judge(replace(eager, dispatch=1e-3))
    assert busy.short == "compute" and busy.change == "precision=tf32 or bf16, or more GPUs", "idle cores do not help"
    assert judge(replace(eager, dispatch=1e-3, plan=parse("device=cuda,precision=bf16"))).change == "more GPUs"
    update = judge(evidence("device=cuda", parts(optimizer=3), parameters=1_000, devices=("cuda:0",)))
    assert update.short == "per-call overhead 30%" and update.change.startswith("graphs=1")


def test_ranks_that_share_a_gpu_take_turns() -> None:
    both = evidence("dp=2,device=cuda,comm=mpi", parts(), devices=("cuda:0", "cuda:0"))
    assert judge(both).short == "shared GPU" and "2 ranks take turns on cuda:0" in judge(both).seen
    assert judge(replace(both, devices=("cuda:0", "cuda:1"))).short == "compute"
    unlike = evidence("pp=2,microbatches=4,devices=cpu+cuda:0", parts(), devices=("cpu", "cuda:0"), cores=2)
    assert judge(unlike).change == "all layers on the GPU, where its memory allows that, or more cores"


def test_the_largest_part_decides() -> None:
    both = evidence("pp=2,microbatches=4", parts(pipeline_wait=3, communication=2.9), sent=(1e3, 1.0))
    assert judge(both).cause == "bubble"
    swapped = evidence("pp=2,microbatches=4", parts(pipeline_wait=2.9, communication=3), sent=(1e3, 1.0))
    assert judge(swapped).cause == "latency"


def facts_with(dispatch: float) -> Facts:
    return Facts(
        layers=("Linear",) * 4, layout=Layout((9,) * 4), samples=8, forward=(1e-3,) * 4, backward=(1e-3,) * 4,
        dispatch=dispatch, batch=8, steps_per_epoch=None, network="n", parameters=9, switched_off=(), unkeyed=(),
        random=False, notes=(), has_test=False, first_batch=0,
    )  # fmt: skip


def measured(plan: str, seconds: float) -> Result:
    known = parse(plan)
    mesh = MeshRecord(dp=known.dp, pp=known.pp, tp=1)
    time = Seconds(median=seconds, low=seconds, high=seconds, samples=[seconds])
    return Result(
        plan=plan, label=plan, mesh=mesh, schedule=known.schedule, engine=known.engine, threads=1, workers=mesh.dp,
        status="ok", exact=True, step_seconds=time,
    )  # fmt: skip


@pytest.mark.parametrize("dispatch, cause", [(8e-3, "per-call overhead"), (1e-3, "compute")])
def test_the_frameworks_own_loop(dispatch: float, cause: str) -> None:
    today = measured("engine=plain", 10e-3)
    explain_today(today, facts_with(dispatch), describe())
    assert today.bound_by == cause and today.explanation is not None
    assert f"{dispatch / 10e-3:.0%} of" in today.explanation


@pytest.mark.parametrize("plan", ["serial", "dp=2", "dp=2,sync=average@3", "pp=2,microbatches=4,split=2+2"])
def test_every_field_that_follows_from_the_clocks_is_filled(plan: str) -> None:
    """Each instruction takes a millisecond, the record 250 ns of it; rounds differ, the median one counts."""
    program = lower(parse(plan), Layout((1,) * 4))
    windows = {r: ticking(program, 6, length=(1 + r) * MS, record=250.0) for r in range(3)}
    times = {r: seen.ended[0] / 1e9 / 6 for r, seen in windows.items()}
    result = measured(plan, times[1])
    fill(result, program, windows, times, facts_with(1e-6), describe())
    assert result.split is not None and len(result.split_by_rank) == program.mesh.size
    for parts in [result.split, *result.split_by_rank]:
        assert sum(parts.model_dump().values()) == pytest.approx(times[1]) and parts.remainder < 1e-9
    assert result.record_seconds == pytest.approx(250e-9)
    last = program.body(program.period[-1][0])
    assert result.records_per_step == max(len(row) for _, ranks in program.bodies[:-2] for row in ranks) + 1
    assert {w.rank for w in result.work} == set(range(program.mesh.size))
    # of a period of several steps, the one that is drawn is the one in which replicas meet, as in the simulated step
    labels = {i.label() for row in last for i in row if i.waits}
    assert labels <= {e.label for e in result.timeline} | {
        i.label() for row in last for i in row if i.base[:4] == "Send"
    }
    assert result.simulated and result.program_text and result.explanation
    assert result.bubble_fraction == result.split.pipeline_wait / times[1]


def test_several_stages_a_rank_are_weighed_together() -> None:
    costs, split = [1.0, 1.0, 4.0, 1.0, 1.0], (1, 1, 2, 1)
    assert _loads(costs, split, 2) == [6.0, 2.0], "stages 0 and 2 on rank 0, 1 and 3 on rank 1"
    assert _loads(costs, (2, 3), 2) == [2.0, 6.0]
