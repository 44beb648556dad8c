"""A program, or a fault in one, drawn as text: ranks downwards, slots to the right."""

from collections.abc import Sequence

from paraxis.program.instructions import COMPUTE, Instruction, Program

Ranks = Sequence[Sequence[Instruction]]


def draw(body: Ranks, computing_only: bool = False, staged: bool | None = None) -> list[str]:
    """A line a rank, cells in columns; `computing_only` leaves transfers out, as textbooks draw a pipeline.

    `staged`: whether cells name their stage (default: if a rank has several).
    """
    rows = [[i for i in rank if not computing_only or i.op in (*COMPUTE, "Update")] for rank in body]
    labels = _labels(rows, several(body) if staged is None else staged)
    width = max((len(label) for row in labels for label in row), default=1)
    name = len(f"rank {len(labels) - 1}")
    return [
        f"{f'rank {r}':<{name}} | " + " ".join(f"{label:<{width}}" for label in row) for r, row in enumerate(labels)
    ]


def several(body: Ranks) -> bool:
    """Whether ranks have several stages, so that a cell has to say of which it is: `2F0`."""
    return any(len({i.stage for i in row if i.op in COMPUTE}) > 1 for row in body)


def cell(i: Instruction, staged: bool) -> str:
    """What stands in a cell; `staged`: with the stage in front of what is of a microbatch."""
    return f"{i.stage}{i.label()}" if staged and i.microbatch >= 0 else i.label()


def _labels(rows: Ranks, staged: bool) -> list[list[str]]:
    return [[cell(i, staged) for i in row] for row in rows]


def slot_width(body: Ranks) -> int:
    """Characters of a column, its space included."""
    return max((len(label) for row in _labels(body, several(body)) for label in row), default=1) + 1


def blocks(lines: Sequence[str], column: int, width: int) -> list[str]:
    """A drawn grid cut into blocks of whole columns that fit a terminal."""
    bar = lines[0].index("|") + 2
    room = max(1, (width - bar) // column) * column
    longest = max(len(line) for line in lines)
    cut = [[line[:bar] + line[at : at + room] for line in lines] for at in range(bar, longest, room)]
    return [line.rstrip() for n, block in enumerate(cut) for line in ([""] * (n > 0) + block)]


def point_at(body: Ranks, rank: int, slot: int, around: int = 6) -> str:
    """The grid near one slot of one rank, with an arrow under it."""
    first = max(0, slot - around)
    window = [row[first : slot + around + 1] for row in body]
    staged = several(body)
    lines = draw(window, staged=staged)
    width = max((len(label) for row in _labels(window, staged) for label in row), default=1)
    name = len(f"rank {len(body) - 1}")
    arrow = " " * (name + 3 + (slot - first) * (width + 1)) + "^"
    shown = range(max(0, rank - 3), min(len(lines), rank + 4))
    out = [line for r in shown for line in ([lines[r], arrow] if r == rank else [lines[r]])]
    return "\n".join(out)


def explain(program: Program) -> str:
    """Which cells mean what, and how the bodies follow each other."""
    runs = " then ".join(f"{name} x{times}" if times > 1 else name for name, times in program.period)
    keys = "F forward, B backward of a microbatch; L load; r/s receive/send A activation, G gradient; AR all-reduce"
    keys += ", ARm of a batch norm's sums" * program.synchronised()
    keys += ", RA/RG sums of outputs and input gradients of split layers" * (program.mesh.tp > 1)
    keys += ", AGA/RSA/AGG/RSG of tokens' activations and gradients, ARw of gradients that ranks have in parts" * (
        program.sequenced()
    )
    keys += ", ARt of a tied parameter's gradient" * bool(program.ties)
    keys += ", RS reduce-scatter, AG all-gather" * (program.zero > 0)
    keys += ", +/- memory for a segment's gradients (g)" * (program.zero > 1)
    keys += " and parameters (p)" * (program.zero > 2)
    explained = f"period: {runs}   ({keys}; < starts, > waits)"
    if program.zero > 2 and min(map(len, program.segments)) == 1:
        explained += "\na stage of one segment is whole from its first F to the update; a smaller bucket_bytes parts it"
    return explained


def simplify(body: Ranks) -> Ranks:
    """Adjacent start and wait as the one blocking call that they become."""
    out = []
    for row in body:
        kept: list[Instruction] = []
        for i in row:
            if kept and i.waits and kept[-1].starts and (kept[-1].base, kept[-1].token) == (i.base, i.token):
                continue
            kept.append(i)
        out.append(kept)
    return out
