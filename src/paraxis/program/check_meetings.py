"""What the checker knows of one rank within a step, and of what ranks collect and add up in the middle of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from paraxis.program.instructions import MIDWAY, SHARES, Instruction, Program
from paraxis.program.meetings import WORDS, awaited, begins, kind, reach

Fail = Callable[[int, str], NoReturn]
SUMS = {
    "moments": "the replicas' sums of batch norm {}",
    "moment_grads": "the replicas' sums of batch norm {}'s gradient",
    "ReduceAct": "the summed outputs of segment {}",
    "ReduceGrad": "the summed gradients behind segment {}",
    "acts": "the other threads' parts of what segment {} makes",
    "act_grads": "the other threads' parts of the gradients behind segment {}",
    "GatherAct": "the other ranks' tokens behind segment {}",
    "ScatterGrad": "the summed gradients of one's own tokens behind segment {}",
    "ScatterAct": "one's own tokens of segment {}",
    "GatherGrad": "the gradients of the other ranks' tokens of segment {}",
}


@dataclass
class State:
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
    whole: bool = False  # gradients of what every rank of tp has, over the tokens of all of them
    parted: set[tuple[int, int, int]] = field(default_factory=set)  # I whose W is still to come
    leaks: set[tuple[int, int, int]] = field(default_factory=set)  # forwards whose backward never comes
    light: dict[tuple[int, int, int], int] = field(default_factory=dict)  # slices of forwards that kept nothing more
    factors: bool = False  # of weight gradients: those of all ranks are there
    gathered: bool = False
    peak: int = 0


def covered(program: Program, i: Instruction) -> range:
    """The segments that a computation covers."""
    return range(i.segment, reach(kind(i), program.borders(i.stage), i.segment) + 1)


def buckets_of(program: Program, rank: int) -> list[tuple[int, int]]:
    """(stage, segment) of all that lies on a rank."""
    return [(stage, k) for stage in program.stages_of(rank) for k in range(len(program.segments[stage]))]


def check_midway(program: Program, state: State, i: Instruction, slot: int, fail: Fail) -> None:
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
    return i.microbatch if met in (*MIDWAY, *SHARES) else -1


def check_meeting(program: Program, state: State, i: Instruction, slot: int, fail: Fail) -> None:
    """What ranks add up in the middle of a stage has just been made, and is used by what comes next."""
    stage, forward = i.stage, i.buffer in ("moments", "acts") or i.base.endswith("Act")
    words, border = program.borders(stage), i.segment if i.base in MIDWAY or i.buffer in SHARES else i.bucket
    word = WORDS.get(i.base, i.buffer if i.buffer in SHARES else "norm")
    if not 0 <= border < len(words) or words[border] not in (word, "shared" if i.buffer in SHARES else word):
        found = f"{sum(w == word for w in words)} batch norms" if word == "norm" else f"borders {', '.join(words)}"
        fail(slot, f"{i.label()}: stage {stage} has {found}")
    mine = {(s, k) for s, k, m in (state.forward if forward else state.backward) if m == max(i.microbatch, 0)}
    before, behind = (border, border + 1) if forward else (border + 1, border)
    if (stage, before) not in mine or (stage, behind) in mine:
        fail(slot, f"{i.label()} must stand between segments {before} and {behind}")
    if i.waits:
        state.met.add((i.buffer or i.base, stage, border, i.microbatch))


def check_whole(program: Program, rank: int, state: State, i: Instruction, slot: int, fail: Fail) -> None:
    """What ranks have computed from their tokens alone is added up once, complete, and before replicas reduce it."""
    if i.starts:
        done = len(state.backward) - len(state.parted)
        if state.whole:
            fail(slot, f"{i.label()} adds up the gradients of whole parameters twice")
        if done < program.microbatches * len(buckets_of(program, rank)):
            fail(slot, f"{i.label()}: gradients of whole parameters are added up before their last backward")
        if program.zero < 2 and state.reduced:
            fail(slot, f"{i.label()}: gradients of whole parameters must be added up before the replicas' reduction")
        if any(o.buffer == "grads" for o in state.open.values()):
            fail(slot, f"{i.label()} does not wait for the replicas' reduction")
    state.whole |= i.waits
