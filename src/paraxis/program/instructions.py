"""The instruction set: what a rank can be told to do, as frozen data that prints and parses.

Names end in `Start` and `Wait` where an operation may go on meanwhile; both carry the same token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any

from paraxis.errors import ProgramError
from paraxis.plan.plan import Mesh

COMPUTE = ("F", "B", "I", "W")
BACKWARD = ("B", "I")  # what makes the gradient of a stage's input
GRADIENT = ("B", "I", "W")  # what adds to the gradients of weights
SENDS = ("SendAct", "SendGrad")
RECEIVES = ("RecvAct", "RecvGrad")
REDUCES = ("ReduceAct", "ReduceGrad")  # what ranks that share layers add up in the middle of a stage
GATHERS, SCATTERS = ("GatherAct", "GatherGrad"), ("ScatterAct", "ScatterGrad")  # ... or whose tokens they also share
MIDWAY = (*REDUCES, *GATHERS, *SCATTERS)
COLLECTIVES = ("AllReduce", "ReduceScatter", "AllGather", *MIDWAY)
MEMORY = ("Reserve", "Release")  # of a bucket that is whole only while it is needed (ZeRO)
MOMENTS = {"F": "moments", "B": "moment_grads"}  # what replicas add up where a batch norm cuts a stage
SHARES = ("acts", "act_grads")  # what threads of a `tp` group wait for in a forward and in a backward
CROSSING = 1 << 16  # tokens from here on may stay open from one step of a period to a later one of the same
HEAD = ("mesh", "microbatches", "precision", "stage", "meets", "buffer", "tie", "prologue", "period", "epilogue")
OPS = (
    *("Load", "F", "B", "I", "W", "Update"),
    *(f"{op}{end}" for op in (*SENDS, *RECEIVES, *COLLECTIVES) for end in ("Start", "Wait")),
    *MEMORY,
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operation of one rank; fields that an operation does not use keep their default.

    `slice` says which of the dp x microbatches equal slices of the global batch is meant, `peer` is a rank, `axis` a
    direction of the mesh (`pp:0+3`: of the pipeline these places), `buffer` a declared buffer, `bucket` a segment's
    or fragment's part of it (-1: all), `rule` an update rule, `payload` what summed elements travel as ("": as they
    are; else `grads` go without their totals).
    An `F` with rule "light" keeps only what the segment is called with; one with rule "again" computes it once more
    from that, right before the backward. A `W` with rule "owner" computes the rank's own block of the weights'
    gradient, over the samples of all replicas.
    Of buffers `moments` (in a forward) and `moment_grads` (in a backward), `bucket` is the batch norm between segments
    `bucket` and `bucket` + 1; of buffer `tied` it is the number of a tie. What is MIDWAY, such as a `ReduceAct`, or
    gathers `acts` or `act_grads`, stands between segments `segment` and `segment` + 1. Buffer `whole` has gradients of
    what all ranks of a `tp` group have. An F or B covers segments from `segment` on; see program.meetings.
    What shards a bucket's memory names the `segment`, microbatch and op (as `rule`) that it is made whole for.
    """

    op: str
    stage: int = -1
    segment: int = -1
    microbatch: int = -1
    slice: int = -1
    peer: int = -1
    axis: str = ""
    buffer: str = ""
    bucket: int = -1
    reduction: str = ""
    rule: str = ""
    token: int = -1
    payload: str = ""

    @property
    def base(self) -> str:
        """The operation without Start or Wait."""
        return self.op.removesuffix("Start").removesuffix("Wait")

    @property
    def starts(self) -> bool:
        """Whether it opens a token."""
        return self.op.endswith("Start")

    @property
    def waits(self) -> bool:
        """Whether it closes a token."""
        return self.op.endswith("Wait")

    @property
    def edge(self) -> int:
        """Of a transfer: the stage in front of the border that it crosses."""
        return self.stage - (self.base in ("RecvAct", "SendGrad"))

    @property
    def meeting(self) -> tuple[str | int, ...]:
        """Of a collective: what the ranks of its group must have in common."""
        place = -1 if self.axis.startswith("pp") else self.stage
        words = self.base, self.axis, self.buffer, self.rule, self.payload
        return *words, place, self.bucket, self.segment, self.microbatch

    def text(self) -> str:
        """`F stage=0 segment=1 microbatch=2`; `parse_instruction` gives the same back."""
        set_fields = (
            f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:] if getattr(self, f.name) != f.default
        )
        return " ".join([self.op, *set_fields])

    def label(self) -> str:
        """The few letters that stand in a cell of a grid."""
        if self.op in COMPUTE:
            mark = "'" * (self.rule == "again")
            return f"{self.op}{self.microbatch}" + (f".{self.segment}" if self.segment > 0 else "") + mark
        if self.op == "Update":
            return {"zero": "zero", "step": "step"}.get(self.rule, self.rule)
        short = {"SendAct": "sA", "SendGrad": "sG", "RecvAct": "rA", "RecvGrad": "rG", "AllReduce": "AR", "Load": "L"}
        short |= {"ReduceScatter": "RS", "AllGather": "AG", "ReduceAct": "RA", "ReduceGrad": "RG"}
        short |= {"GatherAct": "AGA", "GatherGrad": "AGG", "ScatterAct": "RSA", "ScatterGrad": "RSG"}
        mark = "<" if self.starts else ">" if self.waits else ""
        if self.base in MIDWAY:
            return f"{short[self.base]}{self.microbatch}.{self.segment}{mark}"
        if self.buffer in SHARES:
            return f"AG{'ag'[SHARES.index(self.buffer)]}{self.microbatch}.{self.segment}{mark}"
        if self.buffer in MOMENTS.values():
            return f"ARm{self.bucket}{mark}"
        if self.buffer == "tied":
            return f"ARt{self.bucket}{mark}"
        if self.op in MEMORY:
            return f"{'+' if self.op == 'Reserve' else '-'}{self.buffer[:1]}{self.bucket}"
        number = self.bucket if self.base in COLLECTIVES else self.microbatch
        return f"{short[self.base]}{number if number >= 0 else self.buffer[:1]}{mark}"


@dataclass(frozen=True)
class Buffer:
    """A named flat buffer of every rank; `shared` is one copy that several ranks see, `sharded` each replica's share.

    The buffer `state` is what the optimiser keeps of every parameter; it is declared only where it is sharded.
    """

    name: str
    scope: str = "private"


@dataclass(frozen=True)
class Tie:
    """A parameter of which several ranks of a pipeline have a copy, because each of these stages uses it."""

    parameter: str
    stages: tuple[int, ...]


Body = tuple[tuple[Instruction, ...], ...]


@dataclass(frozen=True)
class Program:
    """For every rank the complete list of instructions, in named bodies: prologue, a period of steps, epilogue.

    `stages` are layer ranges [first, last); `segments` cut each stage in turn. `period` and `epilogue` name
    bodies with the number of times they run. Body `evaluate` is forward only. `ties` are added up before an update.
    `words`: of every stage, what is met at each border between two segments (none: nothing); see program.meetings.
    `precision`: what segments compute in, and so what crosses the edges of stages; see plan.precision.
    """

    mesh: Mesh
    stages: tuple[tuple[int, int], ...]
    segments: tuple[tuple[tuple[int, int], ...], ...]
    microbatches: int
    buffers: tuple[Buffer, ...]
    bodies: tuple[tuple[str, Body], ...]
    period: tuple[tuple[str, int], ...]
    prologue: tuple[tuple[str, int], ...] = ()
    epilogue: tuple[tuple[str, int], ...] = ()
    ties: tuple[Tie, ...] = ()
    words: tuple[tuple[str, ...], ...] = ()
    precision: str = "fp32"

    def borders(self, stage: int) -> tuple[str, ...]:
        """What is met at each border between two segments of a stage."""
        return self.words[stage] if self.words else ("cut",) * (len(self.segments[stage]) - 1)

    def body(self, name: str) -> Body:
        """The instructions of a named body, one tuple a rank."""
        return dict(self.bodies)[name]

    def stages_of(self, rank: int) -> range:
        """The stages that lie on a rank: with several on each, a microbatch goes round the ranks several times."""
        return range(self.mesh.coordinates(rank)[1], len(self.stages), self.mesh.pp)

    def ties_of(self, rank: int) -> dict[int, Tie]:
        """By their numbers, the ties of which a rank has a copy."""
        own = set(self.stages_of(rank))
        return {number: tie for number, tie in enumerate(self.ties) if own & set(tie.stages)}

    def own_buckets(self, rank: int) -> dict[int, tuple[int, int]]:
        """(stage, bucket) of a rank's tied parameters, by the tie's number, where gradients are sharded."""
        ties = self.ties_of(rank).items() if self.zero > 1 else ()
        first = {number: min(set(self.stages_of(rank)) & set(tie.stages)) for number, tie in ties}
        return {number: (stage, len(self.segments[stage]) + number) for number, stage in first.items()}

    def common(self) -> bool:
        """Whether replicas have one copy of the weights."""
        return any(b.name == "params" and b.scope == "shared" for b in self.buffers)

    @property
    def zero(self) -> int:
        """The stage of ZeRO: how many of optimizer state, gradients and parameters replicas shard, in this order."""
        return sum(b.scope == "sharded" for b in self.buffers)

    def synchronised(self) -> bool:
        """Whether replicas have batch norms in common, which cut their stages into segments."""
        return any(b.name == "moments" for b in self.buffers)

    def sequenced(self) -> bool:
        """Whether the ranks of a `tp` group also share the tokens of what lies between their splits."""
        return any(b.name == "whole" for b in self.buffers)

    def parted(self, stage: int) -> bool:
        """Whether a stage makes the gradient of its weights apart from its input's, each microbatch's in its W."""
        cells = (i for _, ranks in self.bodies for row in ranks for i in row)
        return any(i.op == "W" and i.stage == stage and i.rule != "owner" for i in cells)

    def halved(self, stage: int) -> int:
        """Most microbatches of a stage that are between their I and W at once; 0 where nothing is parted."""
        last, most = len(self.segments[stage]) - 1, 0
        for row in (row for _, ranks in self.bodies for row in ranks if self.parted(stage)):
            live = 0
            for i in (i for i in row if i.stage == stage):
                live += i.op in BACKWARD and i.segment == last
                most = max(most, live)
                live -= i.op in ("B", "W") and i.segment == 0
        return most

    def steps_in_period(self) -> int:
        """Optimiser steps until the program repeats."""
        return sum(times for _, times in self.period)

    def step_body(self, step: int) -> str:
        """Which body step number `step` (from 0) runs."""
        place = step % self.steps_in_period()
        for name, times in self.period:
            if place < times:
                return name
            place -= times
        raise ProgramError("a period of no steps")

    def text(self) -> str:
        """The whole program as text; `parse_program` gives the same program back."""
        lines = [f"mesh dp={self.mesh.dp} pp={self.mesh.pp} tp={self.mesh.tp}", f"microbatches {self.microbatches}"]
        lines += [f"precision {self.precision}"] * (self.precision != "fp32")
        lines += [f"stage {a}-{b} segments {' '.join(f'{c}-{d}' for c, d in cuts)}" for (a, b), cuts in self._cuts()]
        lines += [" ".join(["meets", *words]) for words in self.words]
        lines += [f"buffer {b.name} {b.scope}" for b in self.buffers]
        lines += [f"tie {t.parameter} {'+'.join(map(str, t.stages))}" for t in self.ties]
        for part in ("prologue", "period", "epilogue"):
            lines.append(" ".join([part, *(f"{name}*{times}" for name, times in getattr(self, part))]))
        for name, body in self.bodies:
            for rank, instructions in enumerate(body):
                lines += [f"body {name} rank {rank}", *(f"  {i.text()}" for i in instructions)]
        return "\n".join(lines) + "\n"

    def digest(self) -> str:
        """16 hexadecimal digits that name this program."""
        return sha256(self.text().encode()).hexdigest()[:16]

    def _cuts(self) -> Iterator[tuple[tuple[int, int], tuple[tuple[int, int], ...]]]:
        return zip(self.stages, self.segments, strict=True)


def parse_instruction(line: str) -> Instruction:
    """The inverse of `Instruction.text`; raises ProgramError."""
    op, *words = line.split()
    types = {f.name: f.type for f in fields(Instruction)}
    if op not in OPS:
        raise ProgramError(f"{op!r} is not an instruction; there are {', '.join(OPS)}")
    values: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in types or key == "op":
            raise ProgramError(f"{key!r} is not a field of {op}: {line.strip()!r}")
        try:
            values[key] = int(value) if types[key] is int else value
        except ValueError:
            raise ProgramError(f"{key}={value!r} is not a number: {line.strip()!r}") from None
    return Instruction(op, **values)


def parse_program(text: str) -> Program:
    """The inverse of `Program.text`; raises ProgramError naming the line that cannot be read."""
    head: dict[str, list[list[str]]] = {}
    bodies: dict[str, list[list[Instruction]]] = {}
    current: list[Instruction] | None = None
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if line.startswith("  ") and current is not None:
            current.append(parse_instruction(line))
        elif words[:1] == ["body"] and len(words) == 4:
            current = []
            bodies.setdefault(words[1], []).append(current)
        elif words and words[0] in HEAD:
            head.setdefault(words[0], []).append(words[1:])
        else:
            raise ProgramError(f"this line of a program cannot be read: {line!r}")
    try:
        return _assemble(head, bodies)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ProgramError(f"the head of the program is incomplete or malformed: {error}") from None


def _assemble(head: dict[str, list[list[str]]], bodies: dict[str, list[list[Instruction]]]) -> Program:
    def pair(word: str) -> tuple[int, int]:
        first, last = word.split("-")
        return int(first), int(last)

    def runs(part: str) -> tuple[tuple[str, int], ...]:
        return tuple((w.split("*")[0], int(w.split("*")[1])) for w in head[part][0])

    mesh = Mesh(**{key: int(value) for key, value in (word.split("=") for word in head["mesh"][0])})
    return Program(
        mesh=mesh,
        stages=tuple(pair(words[0]) for words in head["stage"]),
        segments=tuple(tuple(pair(w) for w in words[2:]) for words in head["stage"]),
        microbatches=int(head["microbatches"][0][0]),
        buffers=tuple(Buffer(*words) for words in head.get("buffer", [])),
        bodies=tuple((name, tuple(map(tuple, ranks))) for name, ranks in bodies.items()),
        period=runs("period"),
        prologue=runs("prologue"),
        epilogue=runs("epilogue"),
        ties=tuple(Tie(name, tuple(map(int, stages.split("+")))) for name, stages in head.get("tie", [])),
        words=tuple(map(tuple, head.get("meets", []))),
        precision=head.get("precision", [["fp32"]])[0][0],
    )
