"""Proves that a program computes only on what is there, and that it cannot hang, before anything is sent.

One abstract run of a period plus one step with synchronous sends: a send's wait ends only when its receiver
has posted, a receive's when its sender has started, a collective's when all have joined.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from paraxis.errors import ProgramError
from paraxis.program.check_meetings import Fail, State, buckets_of, check_meeting, check_midway, check_whole, covered
from paraxis.program.check_scaling import Verdict
from paraxis.program.check_shards import Shards
from paraxis.program.grid import point_at
from paraxis.program.hang import check_hang
from paraxis.program.instructions import (
    BACKWARD,
    COLLECTIVES,
    COMPUTE,
    CROSSING,
    MIDWAY,
    MOMENTS,
    RECEIVES,
    SENDS,
    SHARES,
    Instruction,
    Program,
)
from paraxis.sync.rule import updates


@dataclass(frozen=True)
class Checked:
    """What a correct program was found to need: most activations of stages alive at once on each rank.

    An activation lives from its F to its B, or to its W.
    """

    peak_live: tuple[int, ...]


def check(program: Program) -> Checked:
    """Raises ProgramError or Deadlock with the grid and an arrow at the fault; else tells the peak of live work."""
    peaks = [0] * program.mesh.size
    begin, steps = [name for name, _ in program.prologue], _unrolled(program)
    crossing: list[dict[int, Instruction]] = [{} for _ in peaks]  # begun in a step, to be awaited in a later one
    for number, part in enumerate((*begin, *steps, *_apart(program)), -len(begin)):
        body = program.body(part)
        if len(body) != program.mesh.size:
            raise ProgramError(f"body {part} has {len(body)} ranks, but the mesh has {program.mesh.size}")
        for rank, instructions in enumerate(body):
            peak = _check_rank(program, part, rank, instructions, crossing[rank])
            peaks[rank] = max(peaks[rank], peak)
            if number == len(steps) - 1:
                crossing[rank].clear()  # the step after the period is the first of another one
            elif crossing[rank] and not 0 <= number < len(steps) - 2:
                _fail_open(body, rank, part, next(iter(crossing[rank].values())))
        _check_slices(program, part)
    check_hang(program.mesh, [program.body(part) for part in (*begin, *_unrolled(program))])
    for name in _apart(program):
        check_hang(program.mesh, [program.body(name)])
    return Checked(tuple(peaks))


def _unrolled(program: Program) -> list[str]:
    """A period plus one step; long runs of one body are as good as two of it."""
    names = [name for name, times in program.period for _ in range(min(times, 2))]
    return [*names, names[0]]


def _apart(program: Program) -> list[str]:
    """Bodies that run by themselves."""
    shared = {name for name, _ in program.bodies} & {"evaluate", "score", "state"}
    return [*(name for name, _ in program.epilogue), *sorted(shared)]


def _check_slices(program: Program, part: str) -> None:
    """Every stage computes every slice of the global batch, each once (on every rank that shares its layers)."""
    wanted, tp = list(range(program.mesh.dp * program.microbatches)), program.mesh.tp
    for stage, own in ((stage, own) for stage in range(len(program.stages)) for own in range(tp)):
        rows = program.body(part)[own::tp]
        found = sorted(i.slice for row in rows for i in row if _computes(i, stage))
        if found and found != wanted:
            raise ProgramError(f"stage {stage} of {part} computes slices {found} of the batch instead of {wanted}")


def _computes(i: Instruction, stage: int) -> bool:
    """Whether it begins to compute a slice on a stage, for the first time."""
    return i.op == "F" and i.stage == stage and i.segment == 0 and i.rule != "again"


def _fail_open(body: Sequence[Sequence[Instruction]], rank: int, part: str, i: Instruction) -> NoReturn:
    """A period must end as it began, or it could not be repeated, nor be the last."""
    slot = len(body[rank]) - 1
    why = f"{i.op} {i.label()} (token {i.token}) is not awaited when the period ends"
    raise ProgramError(f"rank {rank}, slot {slot} of {part}: {why}\n{point_at(body, rank, slot)}")


def _check_rank(
    program: Program, part: str, rank: int, instructions: Sequence[Instruction], crossing: dict[int, Instruction]
) -> int:
    """What one rank can violate alone, in one body. Returns the peak of live microbatches.

    `crossing`: by token, what earlier steps have begun and this one may await; it becomes what this one leaves open.
    """
    body, shards, verdict = program.body(part), Shards(program, rank), Verdict(program)
    keys = {ops: {(i.stage, i.segment, i.microbatch) for i in instructions if i.op in ops} for ops in ("F", "BI")}
    state = State(leaks=keys["F"] - keys["BI"], open=dict(crossing))

    def fail(slot: int, why: str) -> NoReturn:
        raise ProgramError(f"rank {rank}, slot {slot} of {part}: {why}\n{point_at(body, rank, slot)}")

    for slot, i in enumerate(instructions):
        _check_token(state, i, slot, fail)
        shards.see(i, slot, fail)
        verdict.see(i, slot, fail)
        _check_place(program, rank, i, slot, fail)
        if i.op in MOMENTS:
            check_midway(program, state, i, slot, fail)
        if i.op == "F" and i.rule == "again":
            _check_again(state, i, slot, fail)
        elif i.op == "F":
            _check_forward(program, state, i, slot, fail)
        elif i.op == "W":
            _check_weight_gradient(state, i, slot, fail)
        elif i.op in BACKWARD:
            _check_backward(program, state, i, slot, fail)
        elif i.op == "Load":
            state.loaded.add((i.stage, i.microbatch))
        elif i.op.endswith("Start") and i.base in SENDS:
            _check_send(program, state, i, slot, fail)
        elif i.waits and i.base in RECEIVES:
            state.received.add((i.base, i.stage, i.microbatch))
        elif i.buffer in (*MOMENTS.values(), *SHARES) or i.base in MIDWAY:
            check_meeting(program, state, i, slot, fail)
        elif i.buffer == "tied":
            _check_tie(program, rank, state, i, slot, fail)
        elif i.buffer == "whole":
            check_whole(program, rank, state, i, slot, fail)
        elif i.base in COLLECTIVES or i.rule in ("step", "hogwild", "norm", *updates()):
            _check_write(program, rank, state, i, slot, fail)
        state.peak = max(state.peak, len({(f[0], f[2]) for f in (state.forward - state.backward) | state.parted}))
    _leave_open(state, crossing)
    if state.open:
        token, i = next(iter(state.open.items()))
        fail(len(instructions) - 1, f"{i.op} {i.label()} (token {token}) is never awaited")
    shards.end(len(instructions) - 1, fail)
    if any(i.op in BACKWARD for row in body for i in row):
        _check_complete(program, state, rank, fail, len(instructions) - 1)
        _check_shared(program, state, instructions, fail)
    return state.peak if any(i.op in BACKWARD for i in instructions) else 1


def _leave_open(state: State, crossing: dict[int, Instruction]) -> None:
    """To the steps that follow."""
    crossing.clear()
    crossing |= {token: state.open.pop(token) for token in list(state.open) if token >= CROSSING}


def _check_place(program: Program, rank: int, i: Instruction, slot: int, fail: Fail) -> None:
    if i.op in COMPUTE and not (0 <= i.microbatch < program.microbatches and i.stage in program.stages_of(rank)):
        own, stages = ", ".join(map(str, program.stages_of(rank))), len(program.stages)
        known = f"there are {program.microbatches} microbatches and {stages} stages, of which {own} here"
        fail(slot, f"{i.label()} of stage {i.stage}: {known}")


def _check_token(state: State, i: Instruction, slot: int, fail: Fail) -> None:
    if i.starts:
        if i.token in state.open:
            fail(slot, f"token {i.token} is already open")
        state.open[i.token] = i
    elif i.waits:
        begun = state.open.pop(i.token, None)
        if begun is None or (begun.base, begun.stage, begun.microbatch) != (i.base, i.stage, i.microbatch):
            fail(slot, f"{i.op} of token {i.token} has no start")


def _check_forward(program: Program, state: State, i: Instruction, slot: int, fail: Fail) -> None:
    key = (i.stage, i.segment, i.microbatch)
    if key in state.forward:
        fail(slot, f"{i.label()} runs twice")
    if i.segment > 0 and (i.stage, i.segment - 1, i.microbatch) not in state.forward:
        fail(slot, f"{i.label()} before the segment in front of it")
    if i.segment == 0 and i.stage > 0 and ("RecvAct", i.stage, i.microbatch) not in state.received:
        fail(slot, f"{i.label()} before its activation has arrived")
    if i.stage in (0, len(program.stages) - 1) and (i.stage, i.microbatch) not in state.loaded:
        fail(slot, f"{i.label()} before its samples are loaded")
    state.forward |= {(i.stage, k, i.microbatch) for k in covered(program, i)}
    if i.rule == "light":
        state.light[key] = i.slice


def _check_again(state: State, i: Instruction, slot: int, fail: Fail) -> None:
    key = (i.stage, i.segment, i.microbatch)
    if key not in state.light:
        why = "that has kept everything" if key in state.forward else "before it runs for the first time"
        fail(slot, f"{i.label()} computes again a forward {why}")
    first = state.light.pop(key)
    if i.slice != first:
        fail(slot, f"{i.label()} is of slice {i.slice}, but its first forward was of slice {first}")


def _check_backward(program: Program, state: State, i: Instruction, slot: int, fail: Fail) -> None:
    key = (i.stage, i.segment, i.microbatch)
    last_segment = len(program.segments[i.stage]) - 1
    own = covered(program, i)
    if key in state.backward:
        fail(slot, f"{i.label()} runs twice")
    if any((i.stage, k, i.microbatch) not in state.forward for k in own):
        fail(slot, f"{i.label()} before its forward")
    if key in state.light:
        fail(slot, f"{i.label()} before its forward, which has kept nothing, is computed again")
    if own[-1] < last_segment and (i.stage, own[-1] + 1, i.microbatch) not in state.backward:
        fail(slot, f"{i.label()} before the segment behind it")
    needs = own[-1] == last_segment and i.stage < len(program.stages) - 1
    if needs and ("RecvGrad", i.stage, i.microbatch) not in state.received:
        fail(slot, f"{i.label()} before its gradient has arrived")
    if (i.stage, i.segment) in state.reduced:
        fail(slot, f"{i.label()} adds to bucket {i.segment} after its reduction has started")
    state.backward |= {(i.stage, k, i.microbatch) for k in own}
    if i.op == "I":
        state.parted.add(key)


def _check_send(program: Program, state: State, i: Instruction, slot: int, fail: Fail) -> None:
    act = i.base == "SendAct"
    key = (i.stage, len(program.segments[i.stage]) - 1 if act else 0, i.microbatch)
    if key not in (state.forward if act else state.backward):
        fail(slot, f"{i.label()} before {'F' if act else 'B'}{i.microbatch} has made it")


def _check_weight_gradient(state: State, i: Instruction, slot: int, fail: Fail) -> None:
    key = (i.stage, i.segment, i.microbatch)
    if key not in state.parted:
        fail(slot, f"{i.label()} without an I{i.microbatch} before it")
    if i.rule == "owner" and not state.factors:
        fail(slot, f"{i.label()} before the other ranks' factors are there")
    if i.rule != "owner" and (i.stage, i.segment) in state.reduced:
        fail(slot, f"{i.label()} adds to bucket {i.segment} after its reduction has started")
    state.parted.remove(key)
    if i.rule == "owner":
        state.reduced.add((i.stage, i.segment))


def _check_tie(program: Program, rank: int, state: State, i: Instruction, slot: int, fail: Fail) -> None:
    """Copies are added up once and complete: after replicas have reduced them or, if that scatters, before."""
    tie = program.ties_of(rank).get(i.bucket)
    if tie is None:
        fail(slot, f"{i.label()}: this rank has no copy of tie {i.bucket}")
    if i.waits:
        state.tied.add(i.bucket)
        return
    if i.bucket in state.tied:
        fail(slot, f"{i.label()} adds up {tie.parameter} twice")
    own = [place for place in buckets_of(program, rank) if place[0] in tie.stages]
    done = sum(1 for s, k, _ in state.backward if (s, k) in own)
    if done < program.microbatches * len(own) or any(key[:2] in own for key in state.parted):
        fail(slot, f"the copies of {tie.parameter} are added up before their last backward")
    if program.zero > 1:
        return
    whole = not program.epilogue and not program.common() and not program.zero
    replicas = program.mesh.dp > 1 and whole
    if any(o.buffer == "grads" for o in state.open.values()) or any((p in state.reduced) != replicas for p in own):
        order = "after" if replicas else "before"
        fail(slot, f"the copies of {tie.parameter} must be added up {order} the replicas' reduction")


def _check_write(program: Program, rank: int, state: State, i: Instruction, slot: int, fail: Fail) -> None:
    """Reductions and updates: complete gradients only, and no write between F and B of a microbatch."""
    live = state.forward - state.backward
    writes = i.rule in ("step", "hogwild", *updates()) or (i.buffer == "params" and program.zero < 3)
    if writes and live & state.leaks:
        fail(slot, _leaked(min(live & state.leaks)[2]))
    if writes and live:
        fail(slot, f"{i.label()} writes parameters while microbatch {min(live)[2]} is between F and B")
    if i.starts and i.buffer == "grads" and program.zero < 2:  # or else microbatch by microbatch
        for stage, bucket in buckets_of(program, rank) if i.bucket < 0 else [(i.stage, i.bucket)]:
            done = sum(1 for s, k, _ in state.backward - state.parted if (s, k) == (stage, bucket))
            if done < program.microbatches:
                fail(slot, f"bucket {bucket} is reduced after {done} of {program.microbatches} microbatches")
            state.reduced.add((stage, bucket))
    if i.starts and i.buffer == "factors" and (live or not state.parted):
        fail(slot, f"{i.label()} before every microbatch has made its part")
    if i.waits and i.base == "AllGather":
        state.factors |= i.buffer == "factors"
        state.gathered |= i.buffer == "params" and program.zero < 3
    if i.rule in ("step", "norm") and (missing := program.ties_of(rank).keys() - state.tied):
        fail(slot, f"{i.label()} before the copies of {program.ties[min(missing)].parameter} have been added up")
    taken = updates()[i.rule][1] if i.rule in updates() else ()
    busy = [
        o for o in state.open.values() if o.buffer in taken and (o.bucket == i.bucket or -1 in (o.bucket, i.bucket))
    ]
    if busy:
        fail(slot, f"{i.label()} does not wait for the reduction of {busy[0].buffer}")
    if i.rule == "step":
        if state.parted:
            fail(slot, f"the update comes without W{min(state.parted)[2]}, its microbatch's gradient of weights")
        if any(o.buffer == "grads" for o in state.open.values()):
            fail(slot, "the update does not wait for the reduction")
        if program.sequenced() and not state.whole:
            fail(slot, "the update comes before the gradients of whole parameters are added up over tp")
        if state.gathered:
            fail(slot, "the update comes after the weights were gathered")
        agree = program.mesh.dp > 1 and not program.epilogue  # otherwise replicas agree on weights, later
        wanted = len(buckets_of(program, rank)) if agree and program.zero < 2 else 0
        if len(state.reduced) < wanted:
            fail(slot, f"the update comes after {len(state.reduced)} of {wanted} buckets were reduced")


def _check_complete(program: Program, state: State, rank: int, fail: Fail, slot: int) -> None:
    """A step of a stage computes every microbatch, forwards and backwards, and keeps nothing."""
    wanted = {(stage, k, m) for stage, k in buckets_of(program, rank) for m in range(program.microbatches)}
    missing = sorted(wanted - state.forward, key=lambda key: key[2])
    leaked = sorted(state.forward - state.backward, key=lambda key: key[2])
    if missing:
        fail(slot, f"microbatch {missing[0][2]} is never computed")
    if leaked:
        fail(slot, _leaked(leaked[0][2]))
    if state.parted:
        fail(slot, f"the gradient of weights of microbatch {min(state.parted)[2]} is never made: its W is missing")


def _leaked(microbatch: int) -> str:
    return f"the activation of microbatch {microbatch} is never used: its backward is missing"


def _check_shared(program: Program, state: State, instructions: Sequence[Instruction], fail: Fail) -> None:
    """New weights in a buffer that others read must be waited for by all, before the next step reads them."""
    if not program.common() or not any(i.rule == "step" for i in instructions):
        return
    waited = {i.axis for i in instructions if i.op == "AllGatherWait" and i.buffer == "params"}
    if not state.gathered or any(getattr(program.mesh, axis) > 1 for axis in {"dp", "tp"} - waited):
        fail(len(instructions) - 1, "nobody waits for the other ranks' part of the shared weights")
