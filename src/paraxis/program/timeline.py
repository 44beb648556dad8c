"""Who did what, from when to when: the same type for a measured and a simulated step."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from paraxis.program.instructions import COLLECTIVES, CROSSING, MEMORY, RECEIVES, SENDS, Instruction, Program

KINDS = ("compute", "optimizer", "communication", "pipeline_wait", "straggler_wait", "data")


@dataclass(frozen=True)
class Span:
    """One instruction (or the part of it that is of one kind), in seconds from the start of the step."""

    rank: int
    instruction: Instruction
    start: float
    end: float
    kind: str


@dataclass(frozen=True)
class Timeline:
    """One step of all ranks."""

    spans: tuple[Span, ...]
    ranks: int

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((s.end for s in self.spans), default=0.0) - min((s.start for s in self.spans), default=0.0)

    def seconds(self) -> dict[str, float]:
        """Seconds of each kind, averaged over the ranks."""
        total = dict.fromkeys(KINDS, 0.0)
        for span in self.spans:
            total[span.kind] += (span.end - span.start) / self.ranks
        return total

    def bubble_fraction(self) -> float:
        """Idle while waiting for the pipeline / (ranks x makespan), a rank's head and tail of the step included."""
        busy = sum(s.end - s.start for s in self.spans if s.kind != "pipeline_wait")
        return 1 - busy / (self.ranks * self.makespan) if self.makespan else 0.0


DIGITS = "0123456789"
Clock = tuple[float, float]


def classify(program: Program, body: str, clocks: list[list[Clock]], known: "Resolved | None" = None) -> Timeline:
    """A timeline from each rank's (start, end) of each instruction, on one clock.

    A receive that ends waits for its sender until that has started, then for the transfer; a collective waits for
    the last to join. Seconds are counted from the earliest start. `known`: what `resolve` says of the body, which
    many timelines of it can share.
    """
    zero = min((clock[0][0] for clock in clocks if clock), default=0.0)
    spans: list[Span] = []
    for rank, instructions in enumerate(known or resolve(program, body)):
        for (i, kind, wait, counterparts), (start, end) in zip(instructions, clocks[rank], strict=True):
            if counterparts:
                ready = max(clocks[r][n][0] for r, n in counterparts)
                middle = min(max(start, ready), end)
                if middle > start:
                    spans.append(Span(rank, i, start - zero, middle - zero, wait))
                    start = middle
            spans.append(Span(rank, i, start - zero, end - zero, kind))
    return Timeline(tuple(spans), len(clocks))


# Of every rank's instructions: itself, its kind, the kind of the time in which its counterparts had not begun, and
# where those stand (rank, number).
Resolved = list[list[tuple[Instruction, str, str, list[tuple[int, int]]]]]


def resolve(program: Program, body: str) -> Resolved:
    """Whom each instruction of a body waits for, found out once."""
    ranks = program.body(body)
    begins = {_name(i, rank): (rank, n) for rank, row in enumerate(ranks) for n, i in enumerate(row) if i.starts}
    return [
        [
            (
                i,
                *_kind(i),
                [begins[name] for name in _awaited(program, i, rank) if name in begins or i.token < CROSSING],
            )
            for i in row
        ]
        for rank, row in enumerate(ranks)
    ]


def _kind(i: Instruction) -> tuple[str, str]:
    """(its kind, the kind of the time in which its counterpart had not begun)."""
    if i.base in COLLECTIVES:
        return "communication", "pipeline_wait" if i.axis.startswith("pp") else "straggler_wait"
    if i.base in (*SENDS, *RECEIVES):
        return "communication", "pipeline_wait"
    if i.op in MEMORY:
        return "communication", ""
    return {"Load": "data", "Update": "optimizer"}.get(i.op, "compute"), ""


def _name(i: Instruction, rank: int) -> tuple[object, ...]:
    if i.base in COLLECTIVES:
        return *i.meeting, rank
    return i.base, i.edge, i.microbatch, rank


def _awaited(program: Program, i: Instruction, rank: int) -> list[tuple[object, ...]]:
    """Names of the starts that have to have begun before an instruction can end."""
    if not i.waits or i.base in SENDS:
        return []  # its receiver posted early; what a send waits for is the transfer
    if i.base in COLLECTIVES:
        return [_name(i, r) for r in program.mesh.group(rank, i.axis)]
    return [(i.base.replace("Recv", "Send"), i.edge, i.microbatch, i.peer)]


Box = tuple[int, float, float, str]  # rank, start, end, the character that fills it and a word to stand in it


def cells(timeline: Timeline, width: int, seconds: float = 0.0) -> list[str]:
    """The timeline as text, a line a rank: a microbatch's last digit in F (plain) and B (bracketed by shade).

    `seconds`: what the whole width stands for (default: this timeline), so that two can be drawn to one scale.
    """
    zero = min((s.start for s in timeline.spans), default=0.0)
    ordered = sorted(timeline.spans, key=lambda s: s.kind == "compute")
    stages = {(s.rank, s.instruction.stage) for s in timeline.spans if s.kind == "compute"}
    staged = len(stages) > len({rank for rank, _ in stages})
    boxes = []
    for s in ordered:
        i = s.instruction
        word = f"{i.stage}{i.label()}" if staged and s.kind == "compute" else i.op
        boxes.append((s.rank, s.start - zero, s.end - zero, mark(s.kind, word, i.microbatch)))
    return rows(boxes, timeline.ranks, width, seconds or timeline.makespan)


def mark(kind: str, op: str, microbatch: int) -> str:
    """The character that stands for a span; behind it a label that begins with a stage, for where there is room."""
    if kind == "compute":
        word, op = op, op.lstrip(DIGITS)
        letters = "ABCDEFGHIJ" if op.startswith("W") else "abcdefghij"
        filling = str(microbatch % 10) if op.startswith("F") else letters[microbatch % 10]
        return filling + (f" {word}" if word != op else "")
    marks = {"pipeline_wait": "·", "straggler_wait": "·", "communication": "=", "optimizer": "u", "data": "l"}
    return marks.get(kind, "?")


def rows(boxes: Iterable[Box], ranks: int, width: int, seconds: float) -> list[str]:
    """A line a rank, `width` characters for `seconds`; later boxes cover earlier ones."""
    scale = width / seconds if seconds else 0.0
    lines: dict[int, list[str]] = defaultdict(lambda: [" "] * width)
    for rank, start, end, text in boxes:
        first, last = round(start * scale), min(round(end * scale), width)
        lines[rank][first:last] = [text[0]] * (last - first)
        if 1 < len(text) <= last - first + 1:
            lines[rank][first : first + len(text) - 1] = text[1:]
    return [f"rank {rank} |{''.join(lines[rank])}|" for rank in range(ranks)]
