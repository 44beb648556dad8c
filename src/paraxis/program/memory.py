"""The memory of a plan, computed from its program: what every rank holds while it executes a step. Bytes are here.

Counted is what training keeps: parameters, gradients, the optimiser's state, the buffers of a synchronisation rule,
what autograd saves of each microbatch from its forward to its backward, and what is on its way between ranks. Not
counted are the framework itself, the samples, and what an operation needs only while it runs.

In mixed precision (Micikevicius et al. 2018) the buffers stay in float32. Of what autograd saves the most is half as
large, but 16-bit copies of weights come in addition: those that torch.autocast makes in a forward live on in what is
saved, one of each weight for every microbatch and segment. Scaled losses add no tensor: a scale is a number.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from paraxis.plan.plan import Plan
from paraxis.program.agreeing import FLOAT, Agreeing, agreeing
from paraxis.program.instructions import BACKWARD, Instruction, Program
from paraxis.program.meetings import begins, reach


@dataclass(frozen=True)
class Piece:
    """A tensor's memory: the number of its storage, the bytes that it always has, and those that each sample adds.

    Storages of samples have numbers below 0: they are the data's, but copies where a stage receives them. `gradient`:
    whether its gradient is computed. `of`: of a 16-bit copy the storage, or below 0 the parameter, that autocast made
    it of; see `_stashed`.
    """

    storage: int
    fixed: float
    each: float
    gradient: bool = False
    of: int | None = None

    def bytes(self, samples: int) -> int:
        """For a microbatch of so many samples."""
        return round(self.fixed + self.each * samples)


Tied = tuple[tuple[int, ...], int, int]  # (layers, bytes, those of its state) of a parameter that is in several


@dataclass(frozen=True)
class Sizes:
    """Bytes of every layer in float32: of its trained `parameters` (one that several share counts with the first), of
    `frozen` parameters and buffers, of the optimiser's `state`; and, in the precision that it computes in, what
    autograd has `saved` of its forward, and what is `entering` it, at the end the loss; `inputs` and `outputs` of the
    layers in it whose weights' gradient can wait for a W. A storage has one number in all layers; those of parameters
    have none. `tensors` are the bytes of every trained parameter of a layer. For ranks that share layers (`tp`) they
    are those of one rank's part.
    """

    parameters: tuple[int, ...]
    frozen: tuple[int, ...]
    state: tuple[int, ...]
    saved: tuple[tuple[Piece, ...], ...]
    entering: tuple[tuple[Piece, ...], ...]
    inputs: tuple[tuple[Piece, ...], ...]
    outputs: tuple[tuple[Piece, ...], ...]
    tied: tuple[Tied, ...] = ()
    tensors: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds at the peak of a step; of what ranks have in common (threads, weights), its part."""

    parameters: int
    gradients: int
    optimizer: int  # its state, and what a synchronisation rule keeps beside the parameters
    activations: int
    communication: int  # received and sent activations and gradients that nothing else keeps, and packed sums

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


def memory(program: Program, plan: Plan, sizes: Sizes, batch: int) -> list[Memory]:
    """Of every rank of a program of the PyTorch engine, whose step has `batch` samples."""
    samples = batch // (plan.dp * plan.microbatches)
    alike: dict[int, Memory] = {}  # replicas hold the same, and so do ranks that share layers
    found = []
    for rank in range(program.mesh.size):
        place = program.mesh.coordinates(rank)[1]
        if place not in alike:
            alike[place] = _of_rank(program, plan, sizes, samples, rank)
        found.append(alike[place])
    return found


def largest(program: Program, plan: Plan, sizes: Sizes, batch: int) -> Memory:
    """Of the rank that needs most."""
    return greatest(memory(program, plan, sizes, batch), plan)


def greatest(found: Sequence[Memory], plan: Plan) -> Memory:
    """Of all ranks' the most; of those on GPUs if there are any, for that is where room is short."""
    places = [plan.devices()[plan.mesh.coordinates(rank)[1]] for rank in range(len(found))] if plan.on_gpu() else []
    counted = [own for own, place in zip(found, places, strict=False) if place != "cpu"]
    return max(counted or found, key=lambda m: m.total)


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

    agrees = _agreeing(program, sizes, [n for first, last in buckets for n in range(first, last)], copies)
    peak = _peak(program, sizes, samples, rank, agrees)
    return Memory(
        parameters=share(sizes.parameters, zero > 2) + frozen + peak["params"],
        gradients=share(sizes.parameters, zero > 1) + peak["grads"],
        optimizer=share(sizes.state, zero > 0) + agrees.kept,
        activations=peak["activations"],
        communication=peak["communication"],
    )


def _agreeing(program: Program, sizes: Sizes, layers: Iterable[int], copies: Iterable[Tied]) -> Agreeing:
    """What its synchronisation rule has on a rank with some layers, and copies of parameters of others."""
    every = {f"{n}.{k}": size // FLOAT for n, own in enumerate(sizes.tensors) for k, size in enumerate(own)}
    own = [name for n in layers for name in every if name.startswith(f"{n}.")]
    for (first, *_), size, _ in copies:
        own.append(next(name for name in every if name.startswith(f"{first}.") and every[name] == size // FLOAT))
    return agreeing(program, every, own)


# -- what is alive -------------------------------------------------------------------------------------------------

Holder = tuple[Hashable, ...]
Key = tuple[int, int, Hashable]  # (stage, microbatch, storage)
Holding = tuple[Holder, tuple[tuple[Key, int], ...]]
MOVING = ("arriving", "leaving", "packed")  # holders of what is on its way


def _peak(program: Program, sizes: Sizes, samples: int, rank: int, agrees: Agreeing) -> Counter[str]:
    """Bytes of each kind where a rank holds most in a period: a storage counts once, however many hold it.

    Kinds are `activations`, `communication`, and of buckets that are whole only for a while `params` and `grads`.
    """
    body = [i for name, _ in program.period for i in program.body(name)[rank]]
    parted = {_cell(i) for i in body if i.op == "W"}  # whose weights' gradient comes later
    held: dict[Holder, tuple[tuple[Key, int], ...]] = {}
    counts: Counter[Key] = Counter()
    now, most, found = 0, 0, Counter[str]()
    for i in body:
        for holder in _released(program, i):
            for key, size in held.pop(holder, ()):
                counts[key] -= 1
                now -= size * (not counts[key])
        taken = _taken(program, sizes, samples, i, parted)
        if i.starts and i.payload:
            taken = iter([(("packed", i.token), (((-1, -1, ("packed", i.token)), agrees.packed(i)),))])
        for holder, pieces in taken:
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


def _taken(
    program: Program, sizes: Sizes, samples: int, i: Instruction, parted: set[tuple[int, int, int]]
) -> Iterator[Holding]:
    """What an instruction begins to hold; `parted`: cells whose weights' gradient comes later."""
    stage, keyed = i.stage, partial(_keyed, program, sizes, samples, i)
    if i.op in ("RecvActStart", "RecvGradStart"):
        first, last = program.stages[stage]
        act = i.op == "RecvActStart"
        pieces = sizes.entering[first] if act else _wanted(sizes.entering[last])
        yield ("arriving", act, stage, i.microbatch), keyed(pieces, "" if act else "out")
        return
    if i.op == "Reserve":  # a whole bucket of parameters or gradients
        yield ("whole", i.buffer, stage, i.bucket), (((stage, -1, (i.buffer, i.bucket)), _whole(program, sizes, i)),)
    if i.op not in ("F", *BACKWARD) or not _ends(program, i):
        return
    first, last = _covered(program, i)
    ends = last == program.stages[stage][1]
    made, entering = sizes.entering[last], sizes.entering[first]
    if i.op in BACKWARD:
        holder = ("upstream", *_cell(i)) if i.segment else ("leaving", False, stage, i.microbatch)
        yield holder, keyed(_wanted(entering) if stage or i.segment else (), "in")
        yield from _factors(program, sizes, i, keyed, parted)
        return
    if i.rule == "light":
        yield ("kept", *_cell(i)), keyed(entering)
    else:
        tensors, copies = _stashed(program, sizes, i)
        made_of = {(stage, i.microbatch, ("copy", p.of, segment)): p.bytes(samples) for segment, p in copies}
        stash = *keyed((*tensors, *_wanted(entering), *made)), *made_of.items()
        yield ("stash", stage, i.microbatch, 0 if _paused(program, i) else i.segment), stash
    if i.rule != "again" and last < len(sizes.saved):
        handed = ("leaving", True, stage, i.microbatch) if ends else ("between", stage, i.microbatch, i.segment + 1)
        yield handed, keyed(made, "sent" if ends and i.rule == "light" else "")  # the forward to come makes its own


def _stashed(program: Program, sizes: Sizes, i: Instruction) -> tuple[list[Piece], list[tuple[int, Piece]]]:
    """What autograd has saved of a complete forward: (tensors, copies with the numbers of their segments).

    Within a segment autocast makes one copy of a parameter or of what came in with a gradient, for all uses there; of
    anything else it makes one for each use, which is a tensor like others.
    """
    first, last = _covered(program, i)
    leaves = {piece.storage for piece in _wanted(sizes.entering[first])}
    tensors, copies = [], []
    for segment, (start, end) in enumerate(program.segments[i.stage]):
        for piece in (piece for layer in range(max(first, start), min(last, end)) for piece in sizes.saved[layer]):
            if piece.of is not None and (piece.of < 0 or piece.of in leaves):
                copies.append((segment, piece))
            else:
                tensors.append(piece)
    return tensors, copies


def _factors(
    program: Program, sizes: Sizes, i: Instruction, keyed: Any, parted: set[tuple[int, int, int]]
) -> Iterator[Holding]:
    """What an I leaves for each W of its microbatch; where ranks meet in its middle, all of it counts when it ends."""
    cuts, words = program.segments[i.stage], program.borders(i.stage)
    for segment in begins("B", words) if _paused(program, i) else [i.segment]:
        if (i.stage, i.microbatch, segment) in parted:
            layers = slice(cuts[segment][0], cuts[reach("B", words, segment)][1])
            inputs, outputs = ([p for own in part[layers] for p in own] for part in (sizes.inputs, sizes.outputs))
            yield ("factors", i.stage, i.microbatch, segment), (*keyed(inputs), *keyed(outputs, "of output"))


def _paused(program: Program, i: Instruction) -> bool:
    """Whether ranks meet in the middle of a stage: autograd then has one graph of all of it."""
    return any(word != "cut" for word in program.borders(i.stage))


def _ends(program: Program, i: Instruction) -> bool:
    """Whether a forward or a backward is complete with an instruction: one that stands still goes on later."""
    words = program.borders(i.stage)
    return not _paused(program, i) or (
        i.segment == 0 if i.op in BACKWARD else reach("F", words, i.segment) == len(words)
    )


def _covered(program: Program, i: Instruction) -> tuple[int, int]:
    """The layers of a complete forward or backward."""
    return program.stages[i.stage] if _paused(program, i) else program.segments[i.stage][i.segment]


def _whole(program: Program, sizes: Sizes, i: Instruction) -> int:
    """Bytes of a bucket: of a segment, without what has a bucket of its own, or behind those such a tied parameter."""
    stages = [s for s, (first, last) in enumerate(program.stages) for _ in range(first, last)]
    places = ({stages[layer] % program.mesh.pp for layer in tie[0]} for tie in sizes.tied)
    ties = [tie for tie, ranks in zip(sizes.tied, places, strict=True) if len(ranks) > 1]  # as the program's
    if i.bucket < 0:  # all of them in one
        return sum(sum(sizes.parameters[first:last]) for own in program.segments for first, last in own)
    segments = program.segments[i.stage]
    if i.bucket >= len(segments):
        return ties[i.bucket - len(segments)][1]
    first, last = segments[i.bucket]
    return sum(sizes.parameters[first:last]) - sum(size for own, size, _ in ties if first <= own[0] < last)


def _released(program: Program, i: Instruction) -> Iterator[Holder]:
    """Which holders an instruction lets go."""
    cell, stage, microbatch = _cell(i), i.stage, i.microbatch
    if i.waits and i.payload:
        yield "packed", i.token
    elif i.op in ("SendActWait", "SendGradWait"):
        yield "leaving", i.op == "SendActWait", stage, microbatch
    elif i.op == "Release":
        yield "whole", i.buffer, stage, i.bucket
    elif i.op == "F" and i.rule == "again":
        yield "kept", *cell
    elif i.op == "F" and not (i.segment and _paused(program, i)):
        yield ("between", *cell) if i.segment else ("arriving", True, stage, microbatch)
    elif i.op in BACKWARD and _ends(program, i):
        ends = _covered(program, i)[1] == program.stages[stage][1]
        yield ("arriving", False, stage, microbatch) if ends else ("upstream", stage, microbatch, i.segment + 1)
    if i.op == "W" or (i.op in BACKWARD and _ends(program, i)):
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
    lists["tensors"] = tuple(map(tuple, document["tensors"]))
    lists["tied"] = tuple((tuple(layers), size, state) for layers, size, state in document["tied"])
    return Sizes(**lists)
