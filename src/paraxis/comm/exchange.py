"""Reduce-scatter and all-gather from sends and receives: every rank with every other one at once.

A rank sends (p-1)/p of the bytes, which is the least there is, in p-1 messages. All are posted at the start, so that
they can travel while something else is computed; libraries' own non-blocking collectives go on only while one waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paraxis.comm.base import Comm, Request

SCATTER, GATHER = 7, 8  # tags; transfers of a program lie in communicators or tags of their own


@dataclass
class Exchange:
    """A collective under way: requests, and for a sum what each of the others will have sent."""

    requests: Sequence[Request]
    own: Tensor
    theirs: Sequence[Tensor] = field(default_factory=list)

    def wait(self) -> None:
        """Wait for all, and add up what came in the order of the ranks."""
        for request in self.requests:
            request.wait()
        for part in self.theirs:
            self.own += part

    def ready(self) -> bool:
        """Whether all has come."""
        return all(request.ready() for request in self.requests)


def parts(tensor: Tensor, ranks: int) -> Sequence[Tensor]:
    """The equal shares of a flat tensor, in the order of the ranks."""
    return tensor.view(ranks, -1).unbind()


def reduce_scatter_start(comm: Comm, tensor: Tensor) -> Exchange:
    """Begin to add up: a rank's own part of `tensor` (p * n,) will be the sum, the others stay as they are."""
    mine, own = parts(tensor, comm.size), parts(tensor, comm.size)[comm.rank]
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    theirs = [torch.empty_like(own) for _ in others]
    receives = [comm.receive(t, peer, SCATTER) for t, peer in zip(theirs, others, strict=True)]
    sends = [comm.send(mine[peer], peer, SCATTER) for peer in others]
    return Exchange([*receives, *sends], own, theirs)


def all_gather_start(comm: Comm, tensor: Tensor) -> Exchange:
    """Begin to collect: every rank's own part of `tensor` (p * n,), to all."""
    mine = parts(tensor, comm.size)
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    receives = [comm.receive(mine[peer], peer, GATHER) for peer in others]
    sends = [comm.send(mine[comm.rank], peer, GATHER) for peer in others]
    return Exchange([*receives, *sends], mine[comm.rank])


def collected_bytes(name: str, tensor: Tensor, ranks: int) -> int:
    """What each rank sends in a bandwidth-optimal collective: (p-1)/p of the bytes, in an all-reduce twice."""
    return (2 if name == "all_reduce" else 1) * (ranks - 1) * tensor.nbytes // ranks
