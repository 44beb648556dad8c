"""Where ranks meet in the middle of a stage: the words of its borders, and the instructions that stand there.

Between two segments of a stage there is a border. Its word says what is met there, and thereby which computations stop:
a forward (F), a backward (B), an evaluation (E). What does not stop runs on, so that an F, B or E covers all segments
from the one that it names to the next border that stops it.
"""

from collections.abc import Sequence
from dataclasses import replace

from paraxis.errors import ProgramError
from paraxis.program.instructions import BACKWARD, MOMENTS, SHARES, Instruction

STOPS = {
    "cut": "FBE",  # nothing is met: gradients of what lies behind are complete
    "norm": "FBE",  # replicas add up what a batch norm measures (nothing in an evaluation)
    "act": "FE",  # tp: what each rank has made of its part of a layer becomes the whole output
    "grad": "B",  # tp: the gradients of an input that every rank has used become one
    "gather": "FBE",  # tp: ranks that have a part of the tokens each get all of them; back, each the sum for its own
    "scatter": "FBE",  # tp: each gets its tokens of what all ranks have made a part of; back, all of the gradient
    "acts": "FE",  # tp, threads: what each has made of the outputs in front is there for all
    "act_grads": "B",  # tp, threads: what each has made of the gradients behind is there for all
    "shared": "FBE",  # both
}
SHARED = ("acts", "act_grads", "shared")
# tp: by its word, what stands at a border where a computation of a kind stops
MET: dict[str, dict[str, str]] = {
    "act": {"F": "ReduceAct", "E": "ReduceAct"},
    "grad": {"B": "ReduceGrad"},
    "gather": {"F": "GatherAct", "E": "GatherAct", "B": "ScatterGrad"},
    "scatter": {"F": "ScatterAct", "E": "ScatterAct", "B": "GatherGrad"},
}
WORDS = {op: word for word, ops in MET.items() for op in ops.values()}  # the borders at which they stand
Words = Sequence[str]  # of one stage's borders; none: all of its borders are plain cuts


def kind(i: Instruction) -> str:
    """F, B or E: what a computation is."""
    return "E" if i.rule == "evaluate" else "F" if i.op == "F" else "B"


def begins(op: str, words: Words) -> list[int]:
    """The segments that a stage's computations of a kind name, in the order of the layers."""
    return [0, *(border + 1 for border, word in enumerate(words) if op in STOPS[word])]


def reach(op: str, words: Words, segment: int) -> int:
    """The last segment that a computation covers which names `segment` as its first."""
    return next((n for n in range(segment, len(words)) if op in STOPS[words[n]]), len(words))


def add_meetings(body: list[Instruction], words: Sequence[Words]) -> list[Instruction]:
    """Where a computation stops at a border, what is met there is added up before the next one goes on."""
    out: list[Instruction] = []
    for i in body:
        out.append(i)
        if i.op in ("F", *BACKWARD):
            op = kind(i)
            border = i.segment - 1 if op == "B" else reach(op, words[i.stage], i.segment)
            if 0 <= border < len(words[i.stage]):
                out += _meeting(i, op, words[i.stage][border], border)
    return out


def _meeting(i: Instruction, op: str, word: str, border: int) -> list[Instruction]:
    if word == "norm" and op != "E":
        made = Instruction("AllReduce", i.stage, axis="dp", buffer=MOMENTS[op], bucket=border, reduction="sum")
    elif word in SHARED:
        made = Instruction("AllGather", i.stage, border, i.microbatch, axis="tp", buffer=SHARES[op == "B"])
    elif word in MET:
        made = Instruction(MET[word][op], i.stage, border, i.microbatch, axis="tp")
        made = replace(made, reduction="" if made.op.startswith("Gather") else "sum")
    else:
        return []
    return [replace(made, op=f"{made.op}{end}") for end in ("Start", "Wait")]


def awaited(i: Instruction, words: Words) -> tuple[int, str] | None:
    """(border, buffer or operation) that must have been met before a computation can begin; None: nothing."""
    op = kind(i)
    border = reach(op, words, i.segment) if op == "B" else i.segment - 1
    if not 0 <= border < len(words) or words[border] == "cut":
        return None
    if words[border] == "norm":
        return None if op == "E" else (border, MOMENTS[op])
    return border, SHARES[op == "B"] if words[border] in SHARED else MET[words[border]][op]


def check_words(words: Words, segments: int) -> None:
    """Raises ProgramError for borders that are not between segments, or words that mean nothing."""
    strange = [word for word in words if word not in STOPS]
    if strange or len(words) != segments - 1:
        raise ProgramError(f"{segments} segments have borders {', '.join(words) or 'without words'}: {strange or ''}")
