"""Whether ranks can wait for each other for ever: one abstract run of all of them with synchronous sends.

A send's wait ends only when its receiver has posted, a receive's when its sender has started, a collective's when all
have joined.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from paraxis.errors import Deadlock, ProgramError
from paraxis.plan.plan import Mesh
from paraxis.program.grid import point_at
from paraxis.program.instructions import COLLECTIVES, SENDS, Instruction


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


def check_hang(mesh: Mesh, steps: Sequence[Sequence[Sequence[Instruction]]]) -> None:
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
        for axis in sorted({i.axis for i in instructions if i.axis}):
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
    return [(n, (*i.meeting, i.reduction)) for n, i in begun if i.starts and i.axis == axis]


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
        return *i.meeting, rank
    return i.base, i.edge, i.microbatch, rank, i.peer


def _mirror(i: Instruction, rank: int) -> Instruction:
    """The transfer that the peer must make for this one."""
    base = i.base.replace("Send", "Recv") if i.base in SENDS else i.base.replace("Recv", "Send")
    stage = i.edge + (base in ("RecvAct", "SendGrad"))
    return Instruction(base + "Start", stage=stage, microbatch=i.microbatch, peer=rank)
