"""The space of plans for a number of workers, the most promising first and every rung of workers early.

It asks each question once, for a plan more is time less for all others. Replicas and the plainest pipeline are tried
over every transport, for these tell transports apart. What else an axis can do is tried with threads as ranks and over
the first transport between processes, for these tell engines apart. What only fills a pipeline's bubble in another way
(more microbatches, several stages a rank, zero bubble) runs the same program over every transport, and is tried on the
fastest one. What saves memory or messages is tried where there are messages: threads share memory, and send nothing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from paraxis.plan.plan import Mesh, Plan
from paraxis.plan.schedules import SCHEDULES, STAGES, parted

AVERAGE_EVERY = 8
ELABORATE = [name for name in SCHEDULES if name in STAGES or parted(name)]  # several stages a rank, or I and W apart
TRANSPORTS = ("openmp", "mpi", "gloo")


def rungs(workers: int) -> list[int]:
    """1, 2, 4 ... and the number of workers itself."""
    powers = [1 << k for k in range(workers.bit_length()) if 1 << k < workers]
    return [*powers, workers]


def space(
    workers: int,
    layers: int,
    comms: tuple[str, ...] = TRANSPORTS,
    inexact: bool = True,
    recompute: bool = False,
    hybrids: bool = False,
    sequence: bool = False,
    native: bool = True,
) -> list[Plan]:
    """Distinct plans for 1, 2, 4 ... workers over the given transports, rungs taken in turn; openmp: native.

    With `recompute` one plan more for each grid of ranks, that trades time for memory; with `hybrids` also what joins
    several axes or options and is seldom the fastest, over the first transport between processes. `sequence`: whether
    ranks can share the tokens of a sample; `native`: whether the native engine takes the network.
    """
    columns = [list(_rung(count, layers, comms, inexact, native)) for count in rungs(workers)]
    process = next((comm for comm in comms if comm != "openmp"), "")
    if hybrids and process:
        own = (_hybrids(count, layers, inexact, sequence) for count in rungs(workers))
        columns = [
            [*column, *(replace(plan, comm=process) for plan in more)]
            for column, more in zip(columns, own, strict=True)
        ]
    if recompute:
        columns = [[*column, *_recomputed(column)] for column in columns]
    mixed = [plan for row in zip_longest(*columns) for plan in row if plan is not None]
    return list(dict.fromkeys(mixed))


def _rung(workers: int, layers: int, comms: tuple[str, ...], inexact: bool, native: bool) -> Iterator[Plan]:
    """Plans that use exactly so many workers."""
    threads, processes = [comm for comm in comms if comm == "openmp"], [comm for comm in comms if comm != "openmp"]
    if workers == 1:
        yield from [Plan(engine="native")] * len(threads)
        yield from [Plan()] * bool(processes)
        return
    first = processes[:1]
    grids = [{"dp": workers // p, "pp": p} for p in rungs(workers)[1:] if p <= layers and workers % p == 0]
    yield from _over(comms, dp=workers)
    for tp in dict.fromkeys((workers, 2)):
        if workers % tp == 0:
            yield from _over([*threads, *first], dp=workers // tp, tp=tp)
    for grid in grids:
        yield from _over(comms, **grid, schedule="1f1b", microbatches=2 * grid["pp"])
    for grid in grids:
        yield from _over([*threads, *first], **grid, schedule="layerwise")
    for grid in grids:
        yield from _over([*threads, *first], **grid, schedule="gpipe", microbatches=2 * grid["pp"])
    yield from _over(threads, dp=workers, gradients="owner")
    yield from [Plan(threads=workers)] * bool(first)
    for ranks in rungs(workers // 2)[1:]:
        if workers % ranks == 0:
            yield from _over(first, dp=ranks, threads=workers // ranks)
    if inexact:
        yield from _over([*threads, *first], dp=workers, sync=f"average@{AVERAGE_EVERY}")
    yield from _over(first, dp=workers, zero=1)
    fastest = threads if native and threads else first or threads
    for grid in grids:
        yield from _over(fastest, **grid, schedule="1f1b", microbatches=4 * grid["pp"])
        for name in ELABORATE:
            if grid["pp"] * STAGES.get(name, 1) <= layers:
                yield from _over(fastest, **grid, schedule=name, microbatches=2 * grid["pp"])
    if inexact:
        yield from _over(first, dp=workers, sync="compressed")
        yield from _over(first or threads, dp=workers, sync=f"diloco@{AVERAGE_EVERY}")
    yield from (plan for zero in (3, 2) for plan in _over(first, dp=workers, zero=zero))


def told_of_space(comms: tuple[str, ...], native: bool = True) -> list[str]:
    """For people: what is not tried over every transport, and why."""
    processes = [comm for comm in comms if comm != "openmp"]
    if len(comms) < 2:
        return []
    fastest = "openmp" if native and "openmp" in comms else processes[0]
    return [
        "to leave time for the others, more microbatches, interleaved and zero-bubble schedules are tried over "
        f"{fastest} only, and what saves memory or messages over {processes[0]} only; verify and train take every plan"
    ]


def _over(comms: Iterable[str], **kind: Any) -> Iterator[Plan]:
    """A kind of plan over each of some transports."""
    for comm in comms:
        yield Plan(**kind, comm=comm, engine="native" if comm == "openmp" else "torch")


def _hybrids(workers: int, layers: int, inexact: bool, sequence: bool) -> Iterator[Plan]:
    """Plans of so many workers that join several axes, or an axis and an option."""
    if workers == 1:
        return
    yield Plan(dp=workers, microbatches=2)
    yield Plan(dp=workers, microbatches=2, zero=3)
    if inexact:
        yield Plan(dp=workers, sync="average@epoch")
        yield Plan(dp=workers, sync=f"diloco@{AVERAGE_EVERY}:bf16")
        yield Plan(dp=workers, sync=f"diloco@{AVERAGE_EVERY}:int8:fragments=2")
    if sequence:
        yield Plan(tp=workers, sequence=1)
    if workers % 2 or workers < 4 or layers < 2:
        return
    rest = workers // 2
    if sequence:
        yield Plan(dp=rest, tp=2, sequence=1)
        yield Plan(dp=rest, tp=2, sequence=1, zero=1)
        yield Plan(pp=2, tp=rest, sequence=1, schedule="1f1b", microbatches=4)
        yield Plan(pp=2, tp=rest, sequence=1, schedule="zb-h1", microbatches=4)
    for schedule in ("1f1b", "gpipe", "zb-h1"):
        yield Plan(pp=2, tp=rest, schedule=schedule, microbatches=4)
    for zero in (1, 2, 3):
        yield Plan(dp=rest, tp=2, zero=zero)
        yield Plan(dp=rest, pp=2, microbatches=4, zero=zero)
    yield Plan(dp=rest, pp=2, schedule="zb-h1", microbatches=4, zero=3)
    if rest % 2 == 0:
        yield Plan(dp=rest // 2, pp=2, tp=2, microbatches=4)
        yield Plan(dp=rest // 2, pp=2, tp=2, microbatches=4, zero=3)
    if inexact:
        for rule in ("average", "diloco"):
            yield Plan(dp=rest, pp=2, microbatches=4, sync=f"{rule}@{AVERAGE_EVERY}")
            yield Plan(dp=rest, tp=2, sync=f"{rule}@{AVERAGE_EVERY}")


def on_gpus(gpus: int, workers: int, layers: int, comms: tuple[str, ...]) -> list[Plan]:
    """Plans for a host with so many GPUs: NCCL joins several, a single one is also shared, or helped by a CPU."""
    if not gpus:
        return []
    found = [Plan(device="cuda"), Plan(device="cuda", graphs=1)]
    for ranks in rungs(gpus)[1:]:
        found += [Plan(dp=ranks, device="cuda", comm="nccl"), Plan(dp=ranks, device="cuda", comm="nccl", graphs=1)]
        found.append(Plan(dp=ranks, zero=1, device="cuda", comm="nccl"))
        found.append(Plan(tp=ranks, device="cuda", comm="nccl"))
        if ranks <= layers:
            found.append(Plan(pp=ranks, microbatches=2 * ranks, schedule="1f1b", device="cuda", comm="nccl"))
    process = next((comm for comm in comms if comm in ("mpi", "gloo")), "")
    if gpus == 1 and workers > 1 and process:
        found.append(Plan(dp=2, device="cuda", comm=process))
        if layers > 1:
            found.append(Plan(pp=2, microbatches=4, device="cpu+cuda:0", comm=process))
    return found


def _recomputed(plans: list[Plan]) -> Iterator[Plan]:
    """Of each grid of PyTorch ranks the first plan, computing forwards again."""
    firsts: dict[Mesh, Plan] = {}
    for plan in plans:
        if plan.engine == "torch" and plan.threads == plan.tp == 1 and plan.exact:
            firsts.setdefault(plan.mesh, plan)
    for plan in firsts.values():
        yield replace(plan, recompute="all")


def in_bf16(plans: Iterable[Plan]) -> Iterator[Plan]:
    """Of each grid of ranks on GPUs the first plan, eager and recorded, in bf16; on CPUs one has to ask for it.

    A GPU multiplies 16-bit matrices many times as fast, a CPU without instructions for them not at all.
    """
    firsts: dict[tuple[Mesh, int], Plan] = {}
    for plan in plans:
        if plan.on_gpu() and plan.exact and plan.precision == "fp32":
            firsts.setdefault((plan.mesh, plan.graphs), plan)
    for plan in firsts.values():
        yield replace(plan, precision="bf16")
