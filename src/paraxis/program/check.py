"""Proves that a program cannot hang or compute on what is not there, before anything is sent.

One abstract run of a period plus one step with synchronous sends: a send's wait ends only when its receiver
has posted, a receive's when its sender has started, a collective's when all have joined.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from paraxis.errors import Deadlock, ProgramError
from paraxis.plan.plan import Mesh
from paraxis.program.grid import point_at
from paraxis.program.instructions import (
    BACKWARD,
    COLLECTIVES,
    COMPUTE,
    MOMENTS,
    RECEIVES,
    SENDS,
    Instruction,
    Program,
)

Fail = Callable[[int, str], NoReturn]


@dataclass(frozen=True)
class Checked:
    """What a correct program was found to need: most microbatches alive at once on each rank."""

    peak_live: tuple[int, ...]


@dataclass
class _Rank:
    """The abstract state of one rank within one step."""

    place: int = 0
    forward: set[tuple[int, int, int]] = field(default_factory=set)  # (stage, segment, microbatch)
    backward: set[tuple[int, int, int]] = field(default_factory=set)
    loaded: set[int] = field(default_factory=set)
    received: set[tuple[str, int, int]] = field(default_factory=set)
    open: dict[int, Instruction] = field(default_factory=dict)
    reduced: set[int] = field(default_factory=set)
    met: set[tuple[str, int]] = field(default_factory=set)  # (buffer, batch norm) whose sums over replicas are there
    parted: set[tuple[int, int, int]] = field(default_factory=set)  # backwards that left the weights' gradient to a W
    factors: bool = False  # of weight gradients: those of all ranks are there
    gathered: bool = False
    peak: int = 0


def check(program: Program) -> Checked:
    """Raises ProgramError or Deadlock with the grid and an arrow at the fault; else tells the peak of live work."""
    peaks = [0] * program.mesh.size
    for part in (*_unrolled(program), *(name for name, _ in program.epilogue), "evaluate", "score"):
        body = program.body(part)
        if len(body) != program.mesh.size:
            raise ProgramError(f"body {part} has {len(body)} ranks, but the mesh has {program.mesh.size}")
        for rank, instructions in enumerate(body):
            peak = _check_rank(program, part, rank, instructions)
            peaks[rank] = max(peaks[rank], peak)
        _check_slices(program, part)
    _check_hang(program.mesh, [program.body(part) for part in _unrolled(program)])
    for name in ("evaluate", "score", *(name for name, _ in program.epilogue)):
        _check_hang(program.mesh, [program.body(name)])
    return Checked(tuple(peaks))


def _unrolled(program: Program) -> list[str]:
    """A period plus one step; long runs of one body are as good as two of it."""
    names = [name for name, times in program.period for _ in range(min(times, 2))]
    return [*names, names[0]]


def _check_slices(program: Program, part: str) -> None:
    """Every stage computes every slice of the global batch, each once."""
    wanted = list(range(program.mesh.dp * program.microbatches))
    for stage in range(len(program.stages)):
        cells = [i for row in program.body(part) for i in row if i.op == "F" and i.stage == stage and i.segment == 0]
        if cells and sorted(i.slice for i in cells) != wanted:
            found = sorted(i.slice for i in cells)
            raise ProgramError(f"stage {stage} of {part} computes slices {found} of the batch instead of {wanted}")


def _check_rank(program: Program, part: str, rank: int, instructions: Sequence[Instruction]) -> int:
    """What one rank can violate alone, in one body. Returns the peak of live microbatches."""
    state, body = _Rank(), program.body(part)
    stage_last = len(program.stages) - 1

    def fail(slot: int, why: str) -> NoReturn:
        raise ProgramError(f"rank {rank}, slot {slot} of {part}: {why}\n{point_at(body, rank, slot)}")

    for slot, i in enumerate(instructions):
        _check_token(state, i, slot, fail)
        if i.op in COMPUTE and not (0 <= i.microbatch < program.microbatches and 0 <= i.stage <= stage_last):
            fail(slot, f"{i.label()}: there are {program.microbatches} microbatches and {stage_last + 1} stages")
        if i.op == "F":
            _check_forward(program, state, i, slot, fail)
        elif i.op == "W":
            _check_weight_gradient(state, i, slot, fail)
        elif i.op in BACKWARD:
            _check_backward(program, state, i, slot, fail)
        elif i.op == "Load":
            state.loaded.add(i.microbatch)
        elif i.op.endswith("Start") and i.base in SENDS:
            _check_send(program, state, i, slot, fail)
        elif i.waits and i.base in RECEIVES:
            state.received.add((i.base, i.stage, i.microbatch))
        elif i.buffer in MOMENTS.values():
            _check_moments(program, rank, state, i, slot, fail)
        elif i.base in COLLECTIVES or i.rule in ("step", "hogwild"):
            _check_write(program, rank, state, i, slot, fail)
        state.peak = max(state.peak, len({f[2] for f in state.forward - state.backward}))
    if state.open:
        token, i = next(iter(state.open.items()))
        fail(len(instructions) - 1, f"{i.op} {i.label()} (token {token}) is never awaited")
    if any(i.op in BACKWARD for row in body for i in row):
        _check_complete(program, state, rank, fail, len(instructions) - 1)
        _check_shared(program, state, instructions, fail)
    return state.peak if any(i.op in BACKWARD for i in instructions) else 1


def _check_token(state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    if i.starts:
        if i.token in state.open:
            fail(slot, f"token {i.token} is already open")
        state.open[i.token] = i
    elif i.waits:
        begun = state.open.pop(i.token, None)
        if begun is None or begun.base != i.base or begun.microbatch != i.microbatch:
            fail(slot, f"{i.op} of token {i.token} has no start")


def _check_forward(program: Program, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    key = (i.stage, i.segment, i.microbatch)
    if key in state.forward:
        fail(slot, f"{i.label()} runs twice")
    if i.segment > 0 and (i.stage, i.segment - 1, i.microbatch) not in state.forward:
        fail(slot, f"{i.label()} before the segment in front of it")
    if (
        i.segment > 0
        and program.synchronised()
        and i.rule != "evaluate"
        and ("moments", i.segment - 1) not in state.met
    ):
        fail(slot, f"{i.label()} before the replicas' sums of batch norm {i.segment - 1} are there")
    if i.segment == 0 and i.stage > 0 and ("RecvAct", i.stage, i.microbatch) not in state.received:
        fail(slot, f"{i.label()} before its activation has arrived")
    if i.stage in (0, len(program.stages) - 1) and i.microbatch not in state.loaded:
        fail(slot, f"{i.label()} before its samples are loaded")
    state.forward.add(key)


def _check_backward(program: Program, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    key = (i.stage, i.segment, i.microbatch)
    last_segment = len(program.segments[i.stage]) - 1
    if key in state.backward:
        fail(slot, f"{i.label()} runs twice")
    if key not in state.forward:
        fail(slot, f"{i.label()} before its forward")
    if i.segment < last_segment and (i.stage, i.segment + 1, i.microbatch) not in state.backward:
        fail(slot, f"{i.label()} before the segment behind it")
    if i.segment < last_segment and program.synchronised() and ("moment_grads", i.segment) not in state.met:
        fail(slot, f"{i.label()} before the replicas' sums of batch norm {i.segment}'s gradient are there")
    needs = i.segment == last_segment and i.stage < len(program.stages) - 1
    if needs and ("RecvGrad", i.stage, i.microbatch) not in state.received:
        fail(slot, f"{i.label()} before its gradient has arrived")
    if i.segment in state.reduced:
        fail(slot, f"{i.label()} adds to bucket {i.segment} after its reduction has started")
    state.backward.add(key)
    if i.op == "I":
        state.parted.add(key)


def _check_send(program: Program, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    act = i.base == "SendAct"
    key = (i.stage, len(program.segments[i.stage]) - 1 if act else 0, i.microbatch)
    if key not in (state.forward if act else state.backward):
        fail(slot, f"{i.label()} before {'F' if act else 'B'}{i.microbatch} has made it")


def _check_moments(program: Program, rank: int, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    """What replicas add up in the middle of a batch norm has just been measured, and is used by what comes next."""
    stage, forward = program.mesh.coordinates(rank)[1], i.buffer == "moments"
    if not 0 <= i.bucket < len(program.segments[stage]) - 1:
        fail(slot, f"{i.label()}: stage {stage} has {len(program.segments[stage]) - 1} batch norms")
    done = {segment for _, segment, _ in (state.forward if forward else state.backward)}
    before, behind = (i.bucket, i.bucket + 1) if forward else (i.bucket + 1, i.bucket)
    if before not in done or behind in done:
        fail(slot, f"{i.label()} must stand between segments {before} and {behind}")
    if i.waits:
        state.met.add((i.buffer, i.bucket))


def _check_weight_gradient(state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    key = (i.stage, i.segment, i.microbatch)
    if key not in state.parted:
        fail(slot, f"{i.label()} without an I{i.microbatch} before it")
    if not state.factors:
        fail(slot, f"{i.label()} before the other ranks' factors are there")
    state.parted.remove(key)
    state.reduced.add(i.segment)


def _check_write(program: Program, rank: int, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    """Reductions and updates: complete gradients only, and no write between F and B of a microbatch."""
    live = state.forward - state.backward
    if (i.rule in ("step", "hogwild") or i.buffer == "params") and live:
        fail(slot, f"{i.label()} writes parameters while microbatch {min(live)[2]} is between F and B")
    if i.starts and i.buffer == "grads":
        stage = program.mesh.coordinates(rank)[1]
        for bucket in range(len(program.segments[stage])) if i.bucket < 0 else (i.bucket,):
            done = sum(1 for s, k, _ in state.backward if k == bucket)
            if done < program.microbatches:
                fail(slot, f"bucket {bucket} is reduced after {done} of {program.microbatches} microbatches")
            state.reduced.add(bucket)
    if i.starts and i.buffer == "factors" and (live or not state.parted):
        fail(slot, f"{i.label()} before every microbatch has made its part")
    if i.waits and i.base == "AllGather":
        state.factors |= i.buffer == "factors"
        state.gathered |= i.buffer == "params"
    if i.rule == "step":
        if state.parted:
            fail(slot, f"the update comes without W{min(state.parted)[2]}, its microbatch's gradient of weights")
        if any(o.buffer == "grads" for o in state.open.values()):
            fail(slot, "the update does not wait for the reduction")
        if state.gathered:
            fail(slot, "the update comes after the weights were gathered")
        agree = program.mesh.dp > 1 and not program.epilogue  # otherwise replicas agree on weights, later
        wanted = len(program.segments[i.stage]) if agree else 0
        if len(state.reduced) < wanted:
            fail(slot, f"the update comes after {len(state.reduced)} of {wanted} buckets were reduced")


def _check_complete(program: Program, state: _Rank, rank: int, fail: Fail, slot: int) -> None:
    """A step of a stage computes every microbatch, forwards and backwards, and keeps nothing."""
    stage = program.mesh.coordinates(rank)[1]
    cuts = range(len(program.segments[stage]))
    wanted = {(stage, k, m) for k in cuts for m in range(program.microbatches)}
    missing = sorted(wanted - state.forward, key=lambda key: key[2])
    leaked = sorted(state.forward - state.backward, key=lambda key: key[2])
    if missing:
        fail(slot, f"microbatch {missing[0][2]} is never computed")
    if leaked:
        fail(slot, f"the activation of microbatch {leaked[0][2]} is never used: its backward is missing")


def _check_shared(program: Program, state: _Rank, instructions: Sequence[Instruction], fail: Fail) -> None:
    """New weights in a buffer that others read must be waited for by all, before the next step reads them."""
    if program.common() and not state.gathered and any(i.rule == "step" for i in instructions):
        fail(len(instructions) - 1, "nobody waits for the other ranks' part of the shared weights")


@dataclass
class _World:
    """How often each rank has started and awaited each transfer, over the unrolled steps."""

    mesh: Mesh
    started: Counter[Hashable] = field(default_factory=Counter)
    waited: Counter[Hashable] = field(default_factory=Counter)

    def may_pass(self, i: Instruction, rank: int) -> bool:
        """Whether the other side has begun what this rank waits for, as many times as this rank has."""
        nth = self.waited[_key(i, rank)] + 1
        if i.base in COLLECTIVES:
            return all(self.started[_key(i, r)] >= nth for r in self.mesh.group(rank, i.axis))
        return self.started[_key(_mirror(i, rank), i.peer)] >= nth


def _check_hang(mesh: Mesh, steps: Sequence[Sequence[Sequence[Instruction]]]) -> None:
    """Run all ranks together; whoever cannot go on waits, and if all wait it is a deadlock."""
    ranks = [[i for body in steps for i in body[rank]] for rank in range(mesh.size)]
    places = [0] * mesh.size
    world = _World(mesh)
    moved = True
    while moved:
        moved = False
        for rank, instructions in enumerate(ranks):
            while places[rank] < len(instructions):
                i = instructions[places[rank]]
                if i.waits and not world.may_pass(i, rank):
                    break
                (world.started if i.starts else world.waited)[_key(i, rank)] += i.token >= 0
                places[rank] += 1
                moved = True
    stuck = [r for r, place in enumerate(places) if place < len(ranks[r])]
    if stuck:
        nexts = (f"  rank {r}: {ranks[r][p].text() if p < len(ranks[r]) else 'done'}" for r, p in enumerate(places))
        picture = point_at(ranks, stuck[0], places[stuck[0]])
        raise Deadlock(
            "\n".join([f"ranks {stuck} wait for each other; the next instruction of each:", *nexts, picture])
        )
    _check_pairs(world, ranks)


def _check_pairs(world: _World, ranks: Sequence[Sequence[Instruction]]) -> None:
    """Every send has its receive, and the members of a group join the same collectives in the same order."""
    for rank, instructions in enumerate(ranks):
        for axis in ("dp", "pp", "tp"):
            _check_order(world.mesh, ranks, rank, axis, _collectives(instructions, axis))
    for rank, instructions in enumerate(ranks):
        for slot, i in enumerate(instructions):
            if not i.starts:
                continue
            collective = i.base in COLLECTIVES
            others = world.mesh.group(rank, i.axis) if collective else (i.peer,)
            mirrored = i if collective else _mirror(i, rank)
            for other in others:
                if world.started[_key(mirrored, other)] != world.started[_key(i, rank)]:
                    why = f"{i.label()} has no counterpart on rank {other}"
                    raise ProgramError(f"rank {rank}, slot {slot}: {why}\n{point_at(ranks, rank, slot)}")


def _collectives(instructions: Sequence[Instruction], axis: str) -> list[tuple[int, Hashable]]:
    """(slot, what is joined) of one rank's collectives along an axis: libraries match them by their order alone."""
    begun = enumerate(instructions)
    return [(n, (i.base, i.buffer, i.bucket, i.reduction)) for n, i in begun if i.starts and i.axis == axis]


def _check_order(
    mesh: Mesh, ranks: Sequence[Sequence[Instruction]], rank: int, axis: str, mine: list[tuple[int, Hashable]]
) -> None:
    for other in mesh.group(rank, axis):
        theirs = _collectives(ranks[other], axis)
        for (slot, joined), (_, also) in zip(mine, theirs, strict=False):
            if joined != also:
                why = f"{joined} meets {also} of rank {other}: collectives are matched by their order"
                raise ProgramError(f"rank {rank}, slot {slot}: {why}\n{point_at(ranks, rank, slot)}")


def _key(i: Instruction, rank: int) -> Hashable:
    if i.base in COLLECTIVES:
        return i.base, i.axis, i.buffer, i.bucket, rank
    return i.base, i.microbatch, rank, i.peer


def _mirror(i: Instruction, rank: int) -> Instruction:
    """The transfer that the peer must make for this one."""
    base = i.base.replace("Send", "Recv") if i.base in SENDS else i.base.replace("Recv", "Send")
    return Instruction(base + "Start", microbatch=i.microbatch, peer=rank)
