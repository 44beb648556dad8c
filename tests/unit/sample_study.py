"""A study built by hand, with everything that a report has to show and much that it has to survive."""

import math
from typing import Any

from paraxis.measure.records import (
    Baseline,
    Event,
    HeldOut,
    Learned,
    Machine,
    MeshRecord,
    Rate,
    Ratio,
    Recommendation,
    Result,
    Seconds,
    Split,
    Study,
    Verified,
)
from paraxis.measure.roofline import LayerWork, Work, roofline

HOSTILE = "<script>alert(1)</script>.py"
SENTENCE = (
    "Use dp=2 mpi: 12.8 ms per step against 16.8 ms today, 1.31x [1.24-1.38] faster, with the weights of the serial "
    "run."
)


def seconds(median: float, spread: float = 0.03) -> Seconds:
    """Samples around a median in ms, without a random generator."""
    samples = [median * (1 + spread * math.sin(i * 2.4)) / 1e3 for i in range(40)]
    return Seconds(
        median=median / 1e3, low=median * (1 - spread / 2) / 1e3, high=median * (1 + spread) / 1e3, samples=samples
    )


def split(total: float, **shares: float) -> Split:
    """A step of `total` ms in the given shares; compute takes the rest."""
    fields = ["optimizer", "communication", "pipeline_wait", "straggler_wait", "data", "overhead"]
    parts = {field: total / 1e3 * shares.get(field, 0.01) for field in fields}
    return Split(compute=total / 1e3 - sum(parts.values()), **parts)


def losses(start: float, bias: float = 0.0) -> list[float]:
    """A falling loss."""
    return [start * math.exp(-i / 25) + 0.2 + bias + 0.03 * math.sin(i * 1.7) for i in range(60)]


def learned(step: float, *accuracy: float) -> Learned:
    """Three looks at a plan whose step takes so many ms."""
    steps = [10, 40, 100]
    loss = [1 - score for score in accuracy]
    times = [n * step / 1e3 for n in steps]
    return Learned(steps=steps, samples=[n * 256 for n in steps], seconds=times, loss=loss, accuracy=list(accuracy))


def replicas(scale: float = 1.0) -> list[Event]:
    """One step of dp=2: forward, backward, reduce, update."""
    times = [("Load0", "data", 0, 0.2), ("F0", "compute", 0, 3.4), ("B0", "compute", 0, 6.2)]
    times += [("AllReduce", "communication", -1, 1.9), ("Update", "optimizer", -1, 0.4)]
    events = []
    for rank in range(2):
        now = 0.1 * rank
        for label, kind, microbatch, length in times:
            end = now + length * scale * (1 + 0.04 * rank * (kind == "compute"))
            events.append(
                Event(rank=rank, label=label, kind=kind, microbatch=microbatch, start=now / 1e3, end=end / 1e3)
            )
            now = end
    return events


def pipeline(scale: float = 1.0) -> list[Event]:
    """One step of pp=2 1f1b on four microbatches, with its bubble."""
    queues = [["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"], ["F0", "B0", "F1", "B1", "F2", "B2", "F3", "B3"]]
    ready: dict[tuple[str, int], float] = {}
    now = [0.0, 0.0]
    events: list[Event] = []

    def add(rank: int, label: str, kind: str, end: float) -> None:
        times = {"start": now[rank] / 1e3, "end": end / 1e3}
        events.append(Event(rank=rank, label=label, kind=kind, microbatch=int(label[1:]), **times))
        now[rank] = end

    while any(queues):
        for rank, queue in enumerate(queues):
            waits = bool(queue) and (queue[0][0], rank) in {("F", 1), ("B", 0)}
            if not queue or (waits and (queue[0], 1 - rank) not in ready):
                continue
            label = queue.pop(0)
            arrival = ready[label, 1 - rank] if waits else 0.0
            if arrival > now[rank]:
                add(rank, label, "pipeline_wait", arrival)
            add(rank, label, "compute", now[rank] + (1.3 if label[0] == "F" else 2.3) * scale)
            ready[label, rank] = now[rank]
    return events


def noted(time: Seconds) -> Seconds:
    """With percentiles, and with what was set aside."""
    low, high = time.median * 0.97, time.median * 1.05
    return time.model_copy(update={"p5": low, "p25": low, "p75": high, "p95": high, "warmup": [0.031, 0.019]})


def result(plan: str, label: str, mesh: tuple[int, int, int] = (1, 1, 1), **fields: Any) -> Result:
    """A result with defaults for what a test does not care about."""
    ranks = mesh[0] * mesh[1] * mesh[2]
    base: dict[str, Any] = {
        "plan": plan,
        "label": label,
        "mesh": MeshRecord(dp=mesh[0], pp=mesh[1], tp=mesh[2]),
        "schedule": "layerwise",
        "engine": "torch",
        "comm": "mpi" if ranks > 1 else None,
        "threads": 1,
        "workers": ranks,
        "status": "ok",
        "exact": True,
    }
    return Result(**(base | fields))


def measured(plan: str, label: str, mesh: tuple[int, int, int], time: float, proof: float, **fields: Any) -> Result:
    """A plan that ran."""
    base: dict[str, Any] = {
        "step_seconds": seconds(time),
        "samples_per_second": 256 / time * 1e3,
        "vs_today": Ratio(median=16.8 / time, low=16.3 / time, high=17.3 / time),
        "speedup": 15.9 / time,
        "efficiency": 20.2 / time / 2,
        "verified": Verified(
            against="serial run, 20 steps" if fields.get("exact", True) else "serial emulation, 20 steps",
            max_relative_difference=proof,
            tolerance=1e-5,
            passed=True,
        ),
        "peak_memory_bytes": 61_000_000,
        "bytes_communicated": 3_600_000,
        "losses": losses(2.1),
    }
    return result(plan, label, mesh, **(base | fields))


def today() -> Result:
    """One process of the framework with its default threads."""
    return result(
        "dp=1,pp=1,tp=1,engine=torch,threads=2",
        "today",
        threads=2,
        workers=2,
        step_seconds=seconds(16.8, 0.06),
        samples_per_second=15238.0,
        efficiency=0.60,
        bound_by="op overhead",
        peak_memory_bytes=92_000_000,
        split=split(16.8, optimizer=0.09, overhead=0.24),
        losses=losses(2.1),
        learned=learned(16.8, 0.42, 0.8, 0.93),
    )


def winning() -> Result:
    """The plan to recommend, with all that a winner has."""
    return measured(
        "dp=2,comm=mpi",
        "dp=2 mpi",
        (2, 1, 1),
        12.8,
        3e-7,
        step_seconds=noted(seconds(12.8)),
        bound_by="compute",
        explanation="It is bound by computing: <b>78%</b> of the step. More cores would help.",
        split=split(12.8, communication=0.15, optimizer=0.03),
        exposed_comm_fraction=0.15,
        learned=learned(12.8, 0.42, 0.81, 0.93),
        timeline=replicas(),
        simulated=replicas(0.95),
        program_text=["rank 0  Load0 F0 B0 AllReduce(grad) Update", "rank 1  Load0 F0 B0 AllReduce(grad) Update"],
    )


def pipelined() -> Result:
    """A pipeline with its bubble."""
    return measured(
        "pp=2,schedule=1f1b,microbatches=4,comm=mpi",
        "pp=2 1f1b m=4 mpi",
        (1, 2, 1),
        17.9,
        2e-7,
        bound_by="bubble 20%",
        bubble_fraction=0.2,
        split=split(17.9, pipeline_wait=0.2, communication=0.06),
        timeline=pipeline(),
        simulated=pipeline(0.93),
        schedule="1f1b",
        peak_memory_bytes=55_000_000,
        program_text=["rank 0  F0 F1 B0 F2 B1 F3 B2 B3 U", "rank 1  .  F0 B0 F1 B1 F2 B2 F3 B3 U <&>"],
    )


def others() -> list[Result]:
    """An oversubscribed plan, an inexact one, one over Gloo, a long text."""
    crowd = {"communication": 0.34, "straggler_wait": 0.21}
    long = "pp=2,schedule=gpipe,microbatches=8,recompute=all,comm=mpi"
    fields: list[tuple[str, str, tuple[int, int, int], float, float, dict[str, Any]]] = [
        ("dp=4,comm=mpi", "dp=4 mpi", (4, 1, 1), 24.1, 4e-7, {"oversubscribed": True, "split": split(24.1, **crowd)}),
        (
            "dp=2,sync=average@8",
            "dp=2 average@8 mpi",
            (2, 1, 1),
            11.9,
            2e-8,
            {"exact": False, "losses": losses(2.1, 0.1), "learned": learned(11.9, 0.4, 0.7, 0.88)},
        ),
        ("dp=2,comm=gloo", "dp=2 gloo", (2, 1, 1), 19.4, 3e-7, {"split": split(19.4, communication=0.41)}),
        (long, long, (1, 2, 1), 31.0, 5e-7, {"bound_by": "bubble 11%", "split": split(31.0, pipeline_wait=0.11)}),
    ]
    return [measured(plan, label, mesh, time, proof, **more) for plan, label, mesh, time, proof, more in fields]


def left_out() -> list[Result]:
    """What was not measured."""
    grid = "receive without a send:\n  rank 0 | F0 B0\n  rank 1 | F0 <script>alert(2)</script>\n              ^ here"
    return [
        result(
            "tp=2", "tp=2", (1, 1, 2), status="refused", reason="tensor parallel needs 2 | heads, this network has 3"
        ),
        result("pp=3", "pp=3", (1, 3, 1), status="refused", reason="3 stages need 3 layers: <b>2</b> & no more"),
        result("pp=2,schedule=zb", "pp=2 zb", (1, 2, 1), status="failed", reason=grid),
        result("dp=8", "dp=8 <i>", (8, 1, 1), status="not run", reason=None),
    ]


def build() -> Study:
    """A study as a small machine gives it: two cores, six plans beside today, refusals, a failure."""
    return Study(
        task={"network": HOSTILE, "parameters": 1_200_000, "global_batch": 256, "loss": "cross_entropy", "seed": 0},
        machine=Machine(
            cpu="AMD EPYC 7R13",
            usable_cores=2,
            memory_bytes=8 * 2**30,
            load_before=0.31,
            load_after=0.52,
            foreign_cores=0.1,
            python="3.11.9",
            torch="2.9.0",
            mpi="Open MPI 5.0.8",
            system="Linux 6.1",
            caches={"L1d": 32768, "L3": 33554432},
            frequency_hz=3.45e9,
            memory_bytes_per_second=Rate(one_core=12.4e9, all_cores=21.5e9, how="a triad of 64 MiB"),
            versions={"numpy": "2.3"},
        ),
        today=today(),
        baseline=Baseline(plan="engine=torch,threads=1", step_seconds=seconds(15.9)),
        results=[pipelined(), *others(), winning(), *left_out()],
        recommendation=Recommendation(
            plan="dp=2,comm=mpi",
            label="dp=2 mpi",
            sentence=SENTENCE,
            why="Each rank computes on its half of the batch; the reduction of 3.6 MB costs 1.9 ms of it.",
            command=f"paraxis train '{HOSTILE}' --plan dp=2,comm=mpi",
            vs_today=Ratio(median=1.31, low=1.24, high=1.38),
            not_told_apart=[],
        ),
        roofline=roofline(
            [LayerWork(0, f"layer {HOSTILE}", 128, Work(2e9, 1e7), Work(4e9, 3e7))], [0.05], [0.1], 1e11, 2e10
        ),
        held_out=HeldOut(name="test", samples=2500),
        notes=["dropout was switched off for the proofs </script><img src=x onerror=alert(3)>"],
        finished=True,
        elapsed_seconds=58.2,
        version="0.1.0",
    )


def bare(**fields: Any) -> Study:
    """A study with nothing in it, every optional field null."""
    machine = Machine(
        cpu="?",
        usable_cores=1,
        memory_bytes=2**30,
        load_before=0.0,
        python="3.11",
        torch="2.9",
        mpi=None,
        system="Linux",
    )
    base: dict[str, Any] = {"today": None, "baseline": None, "results": [], "recommendation": None}
    return Study(**({"task": {}, "machine": machine, "version": "0.1.0"} | base | fields))
