"""The memory of a plan, computed from its program: what every rank holds while it executes a step. Bytes are here.

Counted is what training keeps: parameters, gradients, the optimiser's state, what autograd saves of each microbatch
from its forward to its backward, and what is on its way between ranks. Not counted are the framework itself, the
samples, and what an operation needs only while it runs.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from paraxis.plan.plan import Plan
from paraxis.program.instructions import BACKWARD, Instruction, Program


@dataclass(frozen=True)
class Piece:
    """A tensor's memory: the number of its storage, the bytes that it always has, and those that each sample adds.

    Storages of samples have numbers below 0: they are the data's, but copies where a stage receives them. `gradient`:
    whether its gradient is computed.
    """

    storage: int
    fixed: float
    each: float
    gradient: bool = False

    def bytes(self, samples: int) -> int:
        """For a microbatch of so many samples."""
        return round(self.fixed + self.each * samples)


@dataclass(frozen=True)
class Sizes:
    """Bytes of every layer in float32: of its trained `parameters` (one that several share counts with the first), of
    `frozen` parameters and buffers, of the optimiser's `state`; what autograd has `saved` of its forward, and what is
    `entering` it, at the end the loss; `inputs` and `outputs` of the layers in it whose weights' gradient
    can wait for a W. A storage has one number in all layers; those of parameters have none.
    """

    parameters: tuple[int, ...]
    frozen: tuple[int, ...]
    state: tuple[int, ...]
    saved: tuple[tuple[Piece, ...], ...]
    entering: tuple[tuple[Piece, ...], ...]
    inputs: tuple[tuple[Piece, ...], ...]
    outputs: tuple[tuple[Piece, ...], ...]
    tied: tuple[
        tuple[tuple[int, ...], int, int], ...
    ] = ()  # (layers, parameter's bytes, its state's) of those in several


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds at the peak of a step."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    communication: int  # received and sent activations and gradients that nothing else keeps

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


def memory(program: Program, plan: Plan, sizes: Sizes, batch: int) -> list[Memory]:
    """Of every rank of a program of the PyTorch engine, whose step has `batch` samples."""
    samples = batch // (plan.dp * plan.microbatches)
    alike: dict[tuple[int, ...], Memory] = {}  # replicas hold the same
    found = []
    for rank in range(program.mesh.size):
        place = program.mesh.coordinates(rank)[1:]
        if place not in alike:
            alike[place] = _of_rank(program, plan, sizes, samples, rank)
        found.append(alike[place])
    return found


def largest(program: Program, plan: Plan, sizes: Sizes, batch: int) -> Memory:
    """Of the rank that needs most."""
    return max(memory(program, plan, sizes, batch), key=lambda m: m.total)


def _of_rank(program: Program, plan: Plan, sizes: Sizes, samples: int, rank: int) -> Memory:
    zero, stages = plan.zero, program.stages_of(rank)
    buckets = [cut for stage in stages for cut in program.segments[stage]]
    frozen = sum(sum(sizes.frozen[first:last]) for first, last in buckets)

    def here(layer: int) -> bool:
        return any(first <= layer < last for first, last in buckets)

    copies = [tie for tie in sizes.tied if any(map(here, tie[0])) and not here(tie[0][0])]

    def share(part: tuple[int, ...], sharded: bool) -> int:
        """Of every bucket all, or with ZeRO (Rajbhandari et al. 2020) what one of its replicas keeps."""
        whole = [sum(part[first:last]) for first, last in buckets]
        whole += [state if part is sizes.state else size for _, size, state in copies]
        return sum(-(-size // plan.dp) if sharded else size for size in whole)

    peak = _peak(program, sizes, samples, rank)
    return Memory(
        parameters=share(sizes.parameters, zero > 2) + frozen + peak["params"],
        gradients=share(sizes.parameters, zero > 1) + peak["grads"],
        optimizer=share(sizes.state, zero > 0),
        activations=peak["activations"],
        communication=peak["communication"],
    )


# -- what is alive -------------------------------------------------------------------------------------------------

Holder = tuple[Hashable, ...]
Key = tuple[int, int, Hashable]  # (stage, microbatch, storage)
Holding = tuple[Holder, tuple[tuple[Key, int], ...]]
MOVING = ("arriving", "leaving")  # holders of what is on its way


def _peak(program: Program, sizes: Sizes, samples: int, rank: int) -> Counter[str]:
    """Bytes of each kind where a step of a rank holds most: a storage counts once, however many hold it.

    Kinds are `activations`, `communication`, and of buckets that are whole only for a while `params` and `grads`.
    """
    body = program.body(program.period[0][0])[rank]
    parted = {_cell(i) for i in body if i.op == "W"}  # whose weights' gradient comes later
    held: dict[Holder, tuple[tuple[Key, int], ...]] = {}
    counts: Counter[Key] = Counter()
    now, most, found = 0, 0, Counter[str]()
    for i in body:
        for holder in _released(program, i):
            for key, size in held.pop(holder, ()):
                counts[key] -= 1
                now -= size * (not counts[key])
        for holder, pieces in _taken(program, sizes, samples, i, _cell(i) in parted):
            held[holder] = pieces
            for key, size in pieces:
                now += size * (not counts[key])
                counts[key] += 1
        if now > most:
            most, found = now, _by_kind(held)
    return found


def _by_kind(held: dict[Holder, tuple[tuple[Key, int], ...]]) -> Counter[str]:
    """What is both kept for a backward and on its way counts to the activations."""
    kinds: dict[Key, tuple[str, int]] = {}
    for holder, pieces in held.items():
        kind = str(holder[1]) if holder[0] == "whole" else "communication" if holder[0] in MOVING else "activations"
        kinds |= {key: (kind, size) for key, size in pieces if kind != "communication" or key not in kinds}
    total: Counter[str] = Counter()
    for kind, size in kinds.values():
        total[kind] += size
    return total


def _taken(program: Program, sizes: Sizes, samples: int, i: Instruction, parted: bool) -> Iterator[Holding]:
    """What an instruction begins to hold."""
    stage, keyed = i.stage, partial(_keyed, program, sizes, samples, i)
    if i.op in ("RecvActStart", "RecvGradStart"):
        first, last = program.stages[stage]
        act = i.op == "RecvActStart"
        pieces = sizes.entering[first] if act else _wanted(sizes.entering[last])
        yield ("arriving", act, stage, i.microbatch), keyed(pieces, "" if act else "out")
        return
    if i.op == "Reserve":  # a whole bucket of parameters or gradients
        yield ("whole", i.buffer, stage, i.bucket), (((stage, -1, (i.buffer, i.bucket)), _whole(program, sizes, i)),)
    if i.op not in ("F", *BACKWARD):
        return
    first, last = program.segments[stage][i.segment]
    ends = i.segment == len(program.segments[stage]) - 1
    made, entering = sizes.entering[last], sizes.entering[first]
    if i.op in BACKWARD:
        holder = ("upstream", *_cell(i)) if i.segment else ("leaving", False, stage, i.microbatch)
        yield holder, keyed(_wanted(entering) if stage or i.segment else (), "in")
        if parted:
            inputs, outputs = (
                [p for layer in part[first:last] for p in layer] for part in (sizes.inputs, sizes.outputs)
            )
            yield ("factors", *_cell(i)), (*keyed(inputs), *keyed(outputs, "of output"))
        return
    if i.rule == "light":
        yield ("kept", *_cell(i)), keyed(entering)
    else:
        saved = [piece for layer in range(first, last) for piece in sizes.saved[layer]]
        yield ("stash", *_cell(i)), keyed((*saved, *_wanted(entering), *made))
    if i.rule != "again" and last < len(sizes.saved):
        handed = ("leaving", True, stage, i.microbatch) if ends else ("between", stage, i.microbatch, i.segment + 1)
        yield handed, keyed(made, "sent" if ends and i.rule == "light" else "")  # the forward to come makes its own


def _whole(program: Program, sizes: Sizes, i: Instruction) -> int:
    """Bytes of a bucket: of a segment, without what has a bucket of its own, or behind those such a tied parameter."""
    stages = [s for s, (first, last) in enumerate(program.stages) for _ in range(first, last)]
    places = ({stages[layer] % program.mesh.pp for layer in tie[0]} for tie in sizes.tied)
    ties = [tie for tie, ranks in zip(sizes.tied, places, strict=True) if len(ranks) > 1]  # as the program's
    segments = program.segments[i.stage]
    if i.bucket >= len(segments):
        return ties[i.bucket - len(segments)][1]
    first, last = segments[i.bucket]
    return sum(sizes.parameters[first:last]) - sum(size for own, size, _ in ties if first <= own[0] < last)


def _released(program: Program, i: Instruction) -> Iterator[Holder]:
    """Which holders an instruction lets go."""
    cell, stage, microbatch = _cell(i), i.stage, i.microbatch
    if i.op in ("SendActWait", "SendGradWait"):
        yield "leaving", i.op == "SendActWait", stage, microbatch
    elif i.op == "Release":
        yield "whole", i.buffer, stage, i.bucket
    elif i.op == "F" and i.rule == "again":
        yield "kept", *cell
    elif i.op == "F":
        yield ("between", *cell) if i.segment else ("arriving", True, stage, microbatch)
    elif i.op in BACKWARD:
        ends = i.segment == len(program.segments[stage]) - 1
        yield ("arriving", False, stage, microbatch) if ends else ("upstream", stage, microbatch, i.segment + 1)
    if i.op in (*BACKWARD, "W"):
        yield "factors" if i.op == "W" else "stash", *cell


def _cell(i: Instruction) -> tuple[int, int, int]:
    return i.stage, i.microbatch, i.segment


def _wanted(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Those whose gradient is computed."""
    return tuple(piece for piece in pieces if piece.gradient)


def _keyed(
    program: Program, sizes: Sizes, samples: int, i: Instruction, pieces: Iterable[Piece], side: str = ""
) -> tuple[tuple[Key, int], ...]:
    """Every storage once; `side` tells gradients from tensors, and those of what comes in from what goes out."""
    first = program.stages[i.stage][0]
    received = {piece.storage for piece in sizes.entering[first]} if first else set()
    found = {p.storage: p.bytes(samples) for p in pieces if p.storage >= 0 or p.storage in received}
    return tuple(((i.stage, i.microbatch, (side, number) if side else number), size) for number, size in found.items())


def sizes_of(document: dict[str, Any]) -> Sizes:
    """From a plain dict, as `dataclasses.asdict` makes it."""
    lists: dict[str, Any] = {key: tuple(document[key]) for key in ("parameters", "frozen", "state")}
    for key in ("saved", "entering", "inputs", "outputs"):
        lists[key] = tuple(tuple(Piece(**piece) for piece in layer) for layer in document[key])
    lists["tied"] = tuple((tuple(layers), size, state) for layers, size, state in document["tied"])
    return Sizes(**lists)
