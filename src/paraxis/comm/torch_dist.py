"""Ranks over torch.distributed: Gloo between processes on CPUs, NCCL between GPUs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paraxis.comm import exchange
from paraxis.comm.base import Request
from paraxis.comm.gpus import found_here
from paraxis.comm.links import Link, lane_of
from paraxis.errors import MissingError

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
    What lies in host memory goes over `control`: that is Gloo, also beside NCCL, whose `wait` holds up the GPU's stream
    and not the host.
    """

    def __init__(self, handle: Any, control: Any, ranks: Sequence[int], rank: int, root: "Root") -> None:
        self.handle, self.control, self.ranks, self.root = handle, control, tuple(ranks), root
        self.rank, self.size = rank, len(self.ranks)

    def _of(self, tensor: Tensor) -> Any:
        return self.handle if tensor.is_cuda else self.control

    def _end(self, tensor: Tensor, peer: int, tag: int, sends: bool) -> tuple[Any, int, int]:
        """(who carries a message, the peer's rank there, its tag there)."""
        mine, theirs = self.ranks[self.rank], self.ranks[peer]
        link = (mine, theirs, lane_of(tag)) if sends else (theirs, mine, lane_of(tag))
        if link in self.root.links and (tensor.is_cuda or self.root.backend == "gloo"):
            return self.root.links[link], int(sends), 0
        if self.root.tagless and tensor.is_cuda:
            raise RuntimeError(f"no link from rank {link[0]} to rank {link[1]} for messages of lane {link[2]}")
        return self._of(tensor), peer, tag

    def open(self, links: Sequence[Link]) -> None:
        """Connect the links of a program that begin or end here, in the order given, which all of its ranks follow.

        Only where messages have no tags. NCCL connects when it has something to carry, and both ends must come then.
        """
        if not self.root.tagless:
            return
        letter = torch.zeros(1, device="cuda" if self.root.backend == "nccl" else "cpu")
        self.all_reduce(letter)
        for link in links:
            name = self.ranks[link[0]], self.ranks[link[1]], link[2]
            if self.rank in link[:2] and name not in self.root.links:
                sends = link[0] == self.rank
                made = self.root.make("link " + " ".join(map(str, name)), int(not sends), 2)
                (made.send if sends else made.recv)([letter], int(sends), 0).wait()
                self.root.links[name] = made

    def group(self, ranks: Sequence[int]) -> "DistComm":
        """Some of the ranks, made once; only they take part, so that idle ranks may sleep on."""
        chosen = tuple(self.ranks[r] for r in ranks)
        if chosen not in self.root.known:
            self.root.known[chosen] = _connect(self.root, chosen, chosen.index(self.ranks[self.rank]))
        return self.root.known[chosen]

    def send(self, tensor: Tensor, peer: int, tag: int) -> DistRequest:
        """Begin to send."""
        handle, to, number = self._end(tensor, peer, tag, sends=True)
        return DistRequest(handle.send([tensor.detach()], to, number), tensor)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> DistRequest:
        """Begin to receive."""
        handle, whence, number = self._end(tensor, peer, tag, sends=False)
        return DistRequest(handle.recv([tensor.detach()], whence, number), tensor)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place."""
        self._of(tensor).allreduce(tensor).wait()

    def all_reduce_start(self, tensor: Tensor) -> DistRequest:
        """Begin to sum in place."""
        return DistRequest(self._of(tensor).allreduce(tensor), tensor)

    def reduce_scatter(self, tensor: Tensor) -> None:
        """Sum, each rank its part."""
        self.reduce_scatter_start(tensor).wait()

    def reduce_scatter_start(self, tensor: Tensor) -> Request:
        """Begin to sum, each rank its part. Gloo's own is an all-reduce of a copy."""
        if not tensor.is_cuda:
            return exchange.reduce_scatter_start(self, tensor)
        own = exchange.parts(tensor, self.size)[self.rank]
        return DistRequest(self.handle._reduce_scatter_base(own, tensor), tensor)

    def all_gather(self, tensor: Tensor) -> None:
        """Collect every rank's part."""
        self.all_gather_start(tensor).wait()

    def all_gather_start(self, tensor: Tensor) -> Request:
        """Begin to collect every rank's part. Gloo's own copies it twice."""
        if not tensor.is_cuda:
            return exchange.all_gather_start(self, tensor)
        return DistRequest(self.handle._allgather_base(tensor, exchange.parts(tensor, self.size)[self.rank]), tensor)

    def barrier(self) -> None:
        """Wait for all."""
        self.control.barrier().wait()


Make = Callable[[str, int, int], Any]  # (a name, one's rank, ranks) -> what carries for ranks of that name


@dataclass(frozen=True)
class Root:
    """What the communicators of one world share: how ranks find each other, and one another. `tagless`: messages need
    links of their own."""

    backend: str
    make: Make
    control: Make
    tagless: bool = False
    known: dict[tuple[int, ...], DistComm] = field(default_factory=dict)
    links: dict[Link, Any] = field(default_factory=dict)


def _connect(root: Root, ranks: tuple[int, ...], rank: int) -> DistComm:
    name = "ranks " + " ".join(map(str, ranks))
    control = root.control(name, rank, len(ranks))
    if root.backend == "gloo":
        return DistComm(control, control, ranks, rank, root)
    made = DistComm(root.make(name, rank, len(ranks)), control, ranks, rank, root)
    if root.known:  # ranks join a group one after the other, so its first sum must not wait until one is needed
        made.all_reduce(torch.zeros(1, device="cuda"))
    return made


def _gloo(store: Any) -> Make:
    return lambda name, rank, size: dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, LIMIT)


def _nccl(store: Any) -> Make:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = LIMIT
    return lambda name, rank, size: dist.ProcessGroupNCCL(dist.PrefixStore(name, store), rank, size, options)


def world(backend: str, address: str, rank: int, size: int) -> DistComm:
    """Join `size` ranks at tcp://HOST:PORT (or env:// under torchrun); raises MissingError where NCCL has no GPU."""
    gpus = found_here() if backend == "nccl" else None
    if gpus is not None and not gpus.count:
        raise MissingError(f"comm=nccl: no CUDA device here: {gpus.why}; comm=mpi or gloo works")
    store, rank, size = next(dist.rendezvous(address, rank, size, timeout=LIMIT))
    if gpus is None:
        root = Root(backend, _gloo(store), _gloo(store))
    else:
        torch.cuda.set_device(rank % gpus.count)
        root = Root(backend, _nccl(dist.PrefixStore("nccl", store)), _gloo(store), tagless=True)
    everyone = tuple(range(size))
    root.known[everyone] = _connect(root, everyone, rank)
    return root.known[everyone]


def share_line(comm: DistComm, line: bytes | None) -> bytes:
    """Rank 0's bytes on every rank; Gloo sleeps while it waits."""
    size = torch.tensor([len(line or b"")])
    comm.control.broadcast(size, 0).wait()
    buffer = torch.frombuffer(bytearray(line), dtype=torch.uint8) if line else torch.zeros(int(size), dtype=torch.uint8)
    comm.control.broadcast(buffer, 0).wait()
    return bytes(buffer.numpy())


def gather_lines(comm: DistComm, line: bytes) -> list[bytes]:
    """Every rank's bytes, on every rank."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(comm.size)]
    comm.control.allgather([sizes], [torch.tensor([len(line)])]).wait()
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(line.ljust(longest)), dtype=torch.uint8)
    buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in range(comm.size)]
    comm.control.allgather([buffers], [padded]).wait()
    return [bytes(b.numpy())[: int(size)] for b, size in zip(buffers, sizes, strict=True)]
