"""What a program can get wrong where a computation stands still in the middle of a stage, and ranks meet."""

from collections.abc import Callable
from typing import NoReturn, Protocol

from paraxis.program.instructions import MIDWAY, SHARES, Instruction, Program
from paraxis.program.meetings import WORDS, awaited, begins, kind, reach

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
Fail = Callable[[int, str], NoReturn]
Cell = tuple[int, int, int]  # (stage, segment, microbatch)


class State(Protocol):
    """What of a rank's abstract state is looked at here."""

    forward: set[Cell]
    backward: set[Cell]
    met: set[tuple[str, int, int, int]]
    midway: dict[int, Instruction]


def check_midway(program: Program, state: "State", i: Instruction, slot: int, fail: Fail) -> None:
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


def check_meeting(program: Program, state: "State", i: Instruction, slot: int, fail: Fail) -> None:
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
