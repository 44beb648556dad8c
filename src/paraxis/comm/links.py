"""Messages without tags: which one-way links a program needs between its ranks, and whether order alone names messages.

NCCL matches the n-th send to a peer with the n-th receive from it, and works a communicator's transfers off one by one:
activations and gradients that pass each other would wait for each other. So each direction has a link of its own for
each kind and each border between stages that it crosses.
"""

from collections import defaultdict
from collections.abc import Sequence

from paraxis.errors import PlanError
from paraxis.program.instructions import RECEIVES, SENDS, Instruction, Program

LEAVES, LANES = 64, 64  # tensors of one message at most; links between two ranks, of which more share one
HALVES = 0, 1  # the lanes of packed sums: parts to who adds them, and the sums back
Link = tuple[int, int, int]  # sender, receiver, lane


def tag_of(border: int, gradient: bool, microbatch: int, microbatches: int) -> int:
    """Of a message's first tensor, the others follow; `border`: which of those between two ranks it crosses."""
    lane = 2 * border + gradient
    return (lane // LANES * microbatches + microbatch) * LEAVES * LANES + lane % LANES


def tag_in(i: Instruction, ranks: int, microbatches: int) -> int:
    """The tag of a transfer in a pipeline of so many ranks, alike on both sides."""
    return tag_of(i.edge // ranks, i.base.endswith("Grad"), i.microbatch, microbatches)


def lane_of(tag: int) -> int:
    """Which of the links between two ranks a message takes."""
    return tag % LANES


def links(program: Program) -> list[Link]:
    """All links, in an order in which every rank can open its own; raises PlanError where that takes tags."""
    found: set[Link] = set()
    for _, body in program.bodies:
        sent, received = _orders(body, SENDS, program.mesh.pp), _orders(body, RECEIVES, program.mesh.pp)
        for link in sent.keys() | received.keys():
            if sent[link] != received[link]:
                raise PlanError(
                    f"comm=nccl: rank {link[1]} takes messages in another order than rank {link[0]} sends them, and "
                    "NCCL has no tags to tell them apart; comm=mpi or gloo has"
                )
        found |= sent.keys()
        for rank, row in enumerate(body):
            for axis in {i.axis for i in row if i.payload}:  # what is packed travels from each to each
                group = program.mesh.group(rank, axis)
                found |= {(rank, peer, half) for peer in group if peer != rank for half in HALVES}
    return sorted(found)


def _orders(
    body: Sequence[Sequence[Instruction]], kinds: tuple[str, str], ranks: int
) -> dict[Link, list[tuple[int, int]]]:
    """Of each link, the (edge, microbatch) of its messages as one side starts them; `ranks` along the pipeline."""
    found: dict[Link, list[tuple[int, int]]] = defaultdict(list)
    for rank, row in enumerate(body):
        for i in row:
            if i.starts and i.base in kinds:
                pair = (rank, i.peer) if kinds is SENDS else (i.peer, rank)
                lane = lane_of(tag_in(i, ranks, 1))
                found[*pair, lane].append((i.edge, i.microbatch))
    return found
