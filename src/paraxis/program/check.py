"""Proves that a program computes only on what is there, and that it cannot hang, before anything is sent.

One abstract run of a period plus one step with synchronous sends: a send's wait ends only when its receiver
has posted, a receive's when its sender has started, a collective's when all have joined.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from paraxis.errors import ProgramError
from paraxis.program.check_shards import Shards
from paraxis.program.grid import point_at
from paraxis.program.hang import check_hang
from paraxis.program.instructions import (
    BACKWARD,
    COLLECTIVES,
    COMPUTE,
    MOMENTS,
    RECEIVES,
    REDUCES,
    SENDS,
    SHARES,
    Instruction,
    Program,
)
from paraxis.program.meetings import awaited, begins, kind, reach
from paraxis.sync.rule import updates

SUMS = {
    "moments": "the replicas' sums of batch norm {}",
    "moment_grads": "the replicas' sums of batch norm {}'s gradient",
    "ReduceAct": "the summed outputs of segment {}",
    "ReduceGrad": "the summed gradients behind segment {}",
    "acts": "the other threads' parts of what segment {} makes",
    "act_grads": "the other threads' parts of the gradients behind segment {}",
}
Fail = Callable[[int, str], NoReturn]


@dataclass(frozen=True)
class Checked:
    """What a correct program was found to need: most activations of stages alive at once on each rank.

    An activation lives from its F to its B, or to its W.
    """

    peak_live: tuple[int, ...]


@dataclass
class _Rank:
    """The abstract state of one rank within one step."""

    place: int = 0
    forward: set[tuple[int, int, int]] = field(default_factory=set)  # (stage, segment, microbatch)
    backward: set[tuple[int, int, int]] = field(default_factory=set)
    loaded: set[tuple[int, int]] = field(default_factory=set)
    received: set[tuple[str, int, int]] = field(default_factory=set)
    open: dict[int, Instruction] = field(default_factory=dict)
    reduced: set[tuple[int, int]] = field(default_factory=set)  # (stage, bucket)
    met: set[tuple[str, int, int, int]] = field(default_factory=set)  # (buffer or op, stage, border, microbatch)
    midway: dict[int, Instruction] = field(default_factory=dict)  # of each stage, what stands still in the middle of it
    tied: set[int] = field(default_factory=set)  # ties whose copies have been added up
    parted: set[tuple[int, int, int]] = field(default_factory=set)  # I whose W is still to come
    leaks: set[tuple[int, int, int]] = field(default_factory=set)  # forwards whose backward never comes
    light: dict[tuple[int, int, int], int] = field(default_factory=dict)  # slices of forwards that kept nothing more
    factors: bool = False  # of weight gradients: those of all ranks are there
    gathered: bool = False
    peak: int = 0


def check(program: Program) -> Checked:
    """Raises ProgramError or Deadlock with the grid and an arrow at the fault; else tells the peak of live work."""
    peaks = [0] * program.mesh.size
    begin = [name for name, _ in program.prologue]
    for part in (*begin, *_unrolled(program), *_apart(program)):
        body = program.body(part)
        if len(body) != program.mesh.size:
            raise ProgramError(f"body {part} has {len(body)} ranks, but the mesh has {program.mesh.size}")
        for rank, instructions in enumerate(body):
            peak = _check_rank(program, part, rank, instructions)
            peaks[rank] = max(peaks[rank], peak)
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


def _check_rank(program: Program, part: str, rank: int, instructions: Sequence[Instruction]) -> int:
    """What one rank can violate alone, in one body. Returns the peak of live microbatches."""
    body, shards = program.body(part), Shards(program.zero)
    keys = {ops: {(i.stage, i.segment, i.microbatch) for i in instructions if i.op in ops} for ops in ("F", "BI")}
    state = _Rank(leaks=keys["F"] - keys["BI"])

    def fail(slot: int, why: str) -> NoReturn:
        raise ProgramError(f"rank {rank}, slot {slot} of {part}: {why}\n{point_at(body, rank, slot)}")

    for slot, i in enumerate(instructions):
        _check_token(state, i, slot, fail)
        shards.see(i, slot, fail)
        if i.op in COMPUTE and not (0 <= i.microbatch < program.microbatches and i.stage in program.stages_of(rank)):
            own, stages = ", ".join(map(str, program.stages_of(rank))), len(program.stages)
            known = f"there are {program.microbatches} microbatches and {stages} stages, of which {own} here"
            fail(slot, f"{i.label()} of stage {i.stage}: {known}")
        if i.op in MOMENTS:
            _check_midway(program, state, i, slot, fail)
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
        elif i.buffer in (*MOMENTS.values(), *SHARES) or i.base in REDUCES:
            _check_meeting(program, state, i, slot, fail)
        elif i.buffer == "tied":
            _check_tie(program, rank, state, i, slot, fail)
        elif i.base in COLLECTIVES or i.rule in ("step", "hogwild", "norm", *updates()):
            _check_write(program, rank, state, i, slot, fail)
        state.peak = max(state.peak, len({(f[0], f[2]) for f in (state.forward - state.backward) | state.parted}))
    if state.open:
        token, i = next(iter(state.open.items()))
        fail(len(instructions) - 1, f"{i.op} {i.label()} (token {token}) is never awaited")
    shards.end(set(_buckets(program, rank)), len(instructions) - 1, fail)
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
        if begun is None or (begun.base, begun.stage, begun.microbatch) != (i.base, i.stage, i.microbatch):
            fail(slot, f"{i.op} of token {i.token} has no start")


def _check_forward(program: Program, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    key = (i.stage, i.segment, i.microbatch)
    if key in state.forward:
        fail(slot, f"{i.label()} runs twice")
    if i.segment > 0 and (i.stage, i.segment - 1, i.microbatch) not in state.forward:
        fail(slot, f"{i.label()} before the segment in front of it")
    if i.segment == 0 and i.stage > 0 and ("RecvAct", i.stage, i.microbatch) not in state.received:
        fail(slot, f"{i.label()} before its activation has arrived")
    if i.stage in (0, len(program.stages) - 1) and (i.stage, i.microbatch) not in state.loaded:
        fail(slot, f"{i.label()} before its samples are loaded")
    state.forward |= {(i.stage, k, i.microbatch) for k in _covered(program, i)}
    if i.rule == "light":
        state.light[key] = i.slice


def _check_again(state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    key = (i.stage, i.segment, i.microbatch)
    if key not in state.light:
        why = "that has kept everything" if key in state.forward else "before it runs for the first time"
        fail(slot, f"{i.label()} computes again a forward {why}")
    first = state.light.pop(key)
    if i.slice != first:
        fail(slot, f"{i.label()} is of slice {i.slice}, but its first forward was of slice {first}")


def _check_backward(program: Program, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    key = (i.stage, i.segment, i.microbatch)
    last_segment = len(program.segments[i.stage]) - 1
    own = _covered(program, i)
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


def _check_send(program: Program, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    act = i.base == "SendAct"
    key = (i.stage, len(program.segments[i.stage]) - 1 if act else 0, i.microbatch)
    if key not in (state.forward if act else state.backward):
        fail(slot, f"{i.label()} before {'F' if act else 'B'}{i.microbatch} has made it")


def _covered(program: Program, i: Instruction) -> range:
    """The segments that a computation covers."""
    return range(i.segment, reach(kind(i), program.borders(i.stage), i.segment) + 1)


def _check_midway(program: Program, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    """What stands still where ranks meet goes on before its stage computes anything else, and once they have met."""
    words, op = program.borders(i.stage), kind(i)
    if i.segment not in begins(op, words):
        fail(slot, f"{i.label()}: nothing stops a computation in front of segment {i.segment} of stage {i.stage}")
    before = state.midway.pop(i.stage, None)
    if before and (kind(before), before.microbatch) != (op, i.microbatch):
        fail(slot, f"{i.label()} while {before.label()} stands still in the middle of stage {i.stage}")
    wanted = awaited(i, words)
    if wanted and (wanted[1], i.stage, wanted[0], _of_microbatch(i, wanted[1])) not in state.met:
        fail(slot, f"{i.label()} before {SUMS[wanted[1]].format(wanted[0])} are there")
    ends = i.segment - 1 if op == "B" else reach(op, words, i.segment)
    if 0 <= ends < len(words) and words[ends] != "cut":
        state.midway[i.stage] = i


def _of_microbatch(i: Instruction, met: str) -> int:
    """Batch norms over all ranks have but one."""
    return i.microbatch if met in (*REDUCES, *SHARES) else -1


def _check_meeting(program: Program, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    """What ranks add up in the middle of a stage has just been made, and is used by what comes next."""
    stage, forward = i.stage, i.buffer in ("moments", "acts") or i.base == "ReduceAct"
    words, border = program.borders(stage), i.segment if i.base in REDUCES or i.buffer in SHARES else i.bucket
    word = {"ReduceAct": "act", "ReduceGrad": "grad"}.get(i.base, i.buffer if i.buffer in SHARES else "norm")
    if not 0 <= border < len(words) or words[border] not in (word, "shared" if i.buffer in SHARES else word):
        found = f"{sum(w == word for w in words)} batch norms" if word == "norm" else f"borders {', '.join(words)}"
        fail(slot, f"{i.label()}: stage {stage} has {found}")
    mine = {(s, k) for s, k, m in (state.forward if forward else state.backward) if m == max(i.microbatch, 0)}
    before, behind = (border, border + 1) if forward else (border + 1, border)
    if (stage, before) not in mine or (stage, behind) in mine:
        fail(slot, f"{i.label()} must stand between segments {before} and {behind}")
    if i.waits:
        state.met.add((i.buffer or i.base, stage, border, i.microbatch))


def _check_weight_gradient(state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
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


def _check_tie(program: Program, rank: int, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    """Copies are added up once and complete: after replicas have reduced them or, if that scatters, before."""
    tie = program.ties_of(rank).get(i.bucket)
    if tie is None:
        fail(slot, f"{i.label()}: this rank has no copy of tie {i.bucket}")
    if i.waits:
        state.tied.add(i.bucket)
        return
    if i.bucket in state.tied:
        fail(slot, f"{i.label()} adds up {tie.parameter} twice")
    own = [place for place in _buckets(program, rank) if place[0] in tie.stages]
    done = sum(1 for s, k, _ in state.backward if (s, k) in own)
    if done < program.microbatches * len(own) or any(key[:2] in own for key in state.parted):
        fail(slot, f"the copies of {tie.parameter} are added up before their last backward")
    whole = not program.epilogue and not program.common() and not program.zero
    replicas = program.mesh.dp > 1 and whole
    if any(o.buffer == "grads" for o in state.open.values()) or any((p in state.reduced) != replicas for p in own):
        order = "after" if replicas else "before"
        fail(slot, f"the copies of {tie.parameter} must be added up {order} the replicas' reduction")


def _check_write(program: Program, rank: int, state: _Rank, i: Instruction, slot: int, fail: Fail) -> None:
    """Reductions and updates: complete gradients only, and no write between F and B of a microbatch."""
    live = state.forward - state.backward
    writes = i.rule in ("step", "hogwild", *updates()) or (i.buffer == "params" and program.zero < 3)
    if writes and live & state.leaks:
        fail(slot, _leaked(min(live & state.leaks)[2]))
    if writes and live:
        fail(slot, f"{i.label()} writes parameters while microbatch {min(live)[2]} is between F and B")
    if i.starts and i.buffer == "grads":
        for stage, bucket in _buckets(program, rank) if i.bucket < 0 else [(i.stage, i.bucket)]:
            done = sum(1 for s, k, _ in state.backward - state.parted if (s, k) == (stage, bucket))
            if done < program.microbatches and program.zero > 1:
                return  # reduced microbatch by microbatch
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
    busy = [o for o in state.open.values() if i.rule in updates() and o.buffer in updates()[i.rule][1]]
    if busy:
        fail(slot, f"{i.label()} does not wait for the reduction of {busy[0].buffer}")
    if i.rule == "step":
        if state.parted:
            fail(slot, f"the update comes without W{min(state.parted)[2]}, its microbatch's gradient of weights")
        if any(o.buffer == "grads" for o in state.open.values()):
            fail(slot, "the update does not wait for the reduction")
        if state.gathered:
            fail(slot, "the update comes after the weights were gathered")
        agree = program.mesh.dp > 1 and not program.epilogue  # otherwise replicas agree on weights, later
        wanted = len(_buckets(program, rank)) if agree else 0
        if len(state.reduced) < wanted:
            fail(slot, f"the update comes after {len(state.reduced)} of {wanted} buckets were reduced")


def _buckets(program: Program, rank: int) -> list[tuple[int, int]]:
    """(stage, segment) of all that lies on a rank."""
    return [(stage, k) for stage in program.stages_of(rank) for k in range(len(program.segments[stage]))]


def _check_complete(program: Program, state: _Rank, rank: int, fail: Fail, slot: int) -> None:
    """A step of a stage computes every microbatch, forwards and backwards, and keeps nothing."""
    wanted = {(stage, k, m) for stage, k in _buckets(program, rank) for m in range(program.microbatches)}
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


def _check_shared(program: Program, state: _Rank, instructions: Sequence[Instruction], fail: Fail) -> None:
    """New weights in a buffer that others read must be waited for by all, before the next step reads them."""
    if not program.common() or not any(i.rule == "step" for i in instructions):
        return
    waited = {i.axis for i in instructions if i.op == "AllGatherWait" and i.buffer == "params"}
    if not state.gathered or any(getattr(program.mesh, axis) > 1 for axis in {"dp", "tp"} - waited):
        fail(len(instructions) - 1, "nobody waits for the other ranks' part of the shared weights")
