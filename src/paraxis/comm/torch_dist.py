"""Ranks over torch.distributed: Gloo between processes on CPUs, NCCL between GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paraxis.comm import exchange
from paraxis.comm.base import Request

LIMIT = timedelta(minutes=30)


class DistRequest:
    """A transfer under way; keeps its tensor alive."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self.work, self.tensor = work, tensor

    def wait(self) -> None:
        """Wait for completion."""
        self.work.wait()

    def ready(self) -> bool:
        """Test for completion."""
        return bool(self.work.is_completed())


class DistComm:
    """Some ranks; peers are given by their place among them.

    It talks to the backend without the functions of torch.distributed: they cost tens of microseconds a call, and their
    `new_group` names a group after how many its ranks have made before, so that ranks with unlike pasts wait for ever.
    """

    def __init__(self, handle: Any, ranks: Sequence[int], rank: int, root: "Root") -> None:
        self.handle, self.ranks, self.root = handle, tuple(ranks), root
        self.rank, self.size = rank, len(self.ranks)

    def group(self, ranks: Sequence[int]) -> "DistComm":
        """Some of the ranks, made once; only they take part, so that idle ranks may sleep on."""
        chosen = tuple(self.ranks[r] for r in ranks)
        if chosen not in self.root.known:
            self.root.known[chosen] = _connect(self.root, chosen, chosen.index(self.ranks[self.rank]))
        return self.root.known[chosen]

    def send(self, tensor: Tensor, peer: int, tag: int) -> DistRequest:
        """Begin to send."""
        return DistRequest(self.handle.send([tensor.detach()], peer, tag), tensor)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> DistRequest:
        """Begin to receive."""
        return DistRequest(self.handle.recv([tensor.detach()], peer, tag), tensor)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place."""
        self.handle.allreduce(tensor).wait()

    def all_reduce_start(self, tensor: Tensor) -> DistRequest:
        """Begin to sum in place."""
        return DistRequest(self.handle.allreduce(tensor), tensor)

    def reduce_scatter(self, tensor: Tensor) -> None:
        """Sum, each rank its part."""
        self.reduce_scatter_start(tensor).wait()

    def reduce_scatter_start(self, tensor: Tensor) -> Request:
        """Begin to sum, each rank its part. Gloo's own is an all-reduce of a copy."""
        if self.root.backend == "gloo":
            return exchange.reduce_scatter_start(self, tensor)
        own = exchange.parts(tensor, self.size)[self.rank]
        return DistRequest(self.handle._reduce_scatter_base(own, tensor), tensor)

    def all_gather(self, tensor: Tensor) -> None:
        """Collect every rank's part."""
        self.all_gather_start(tensor).wait()

    def all_gather_start(self, tensor: Tensor) -> Request:
        """Begin to collect every rank's part. Gloo's own copies it twice."""
        if self.root.backend == "gloo":
            return exchange.all_gather_start(self, tensor)
        return DistRequest(self.handle._allgather_base(tensor, exchange.parts(tensor, self.size)[self.rank]), tensor)

    def barrier(self) -> None:
        """Wait for all."""
        self.handle.barrier().wait()


@dataclass(frozen=True)
class Root:
    """What the communicators of one world share: the store through which ranks find each other, and one another."""

    backend: str
    store: Any
    known: dict[tuple[int, ...], DistComm] = field(default_factory=dict)


def _connect(root: Root, ranks: tuple[int, ...], rank: int) -> DistComm:
    store = dist.PrefixStore("ranks " + " ".join(map(str, ranks)), root.store)
    if root.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = LIMIT
        return DistComm(dist.ProcessGroupNCCL(store, rank, len(ranks), options), ranks, rank, root)
    return DistComm(dist.ProcessGroupGloo(store, rank, len(ranks), LIMIT), ranks, rank, root)


def world(backend: str, address: str, rank: int, size: int) -> DistComm:
    """Join `size` ranks at tcp://HOST:PORT (or env:// under torchrun)."""
    if backend == "nccl":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    store, rank, size = next(dist.rendezvous(address, rank, size, timeout=LIMIT))
    root = Root(backend, store)
    everyone = tuple(range(size))
    root.known[everyone] = _connect(root, everyone, rank)
    return root.known[everyone]


def share_line(comm: DistComm, line: bytes | None) -> bytes:
    """Rank 0's bytes on every rank; Gloo sleeps while it waits."""
    size = torch.tensor([len(line or b"")])
    comm.handle.broadcast(size, 0).wait()
    buffer = torch.frombuffer(bytearray(line), dtype=torch.uint8) if line else torch.zeros(int(size), dtype=torch.uint8)
    comm.handle.broadcast(buffer, 0).wait()
    return bytes(buffer.numpy())


def gather_lines(comm: DistComm, line: bytes) -> list[bytes]:
    """Every rank's bytes, on every rank."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(comm.size)]
    comm.handle.allgather([sizes], [torch.tensor([len(line)])]).wait()
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(line.ljust(longest)), dtype=torch.uint8)
    buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in range(comm.size)]
    comm.handle.allgather([buffers], [padded]).wait()
    return [bytes(b.numpy())[: int(size)] for b, size in zip(buffers, sizes, strict=True)]
