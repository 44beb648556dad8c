"""Ranks over torch.distributed: Gloo between processes on CPUs, NCCL between GPUs."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

LIMIT = timedelta(minutes=30)


class DistRequest:
    """A transfer under way; keeps its tensor alive."""

    def __init__(self, work: "dist.Work | None", tensor: Tensor) -> None:
        self.work, self.tensor = work, tensor

    def wait(self) -> None:
        """Wait for completion."""
        if self.work is not None:
            self.work.wait()

    def ready(self) -> bool:
        """Test for completion."""
        return self.work is None or self.work.is_completed()


class DistComm:
    """A process group; peers are given by their place in it."""

    def __init__(
        self, handle: "dist.ProcessGroup", ranks: Sequence[int], known: "dict[tuple[int, ...], DistComm]"
    ) -> None:
        self.handle, self.ranks, self._known = handle, tuple(ranks), known
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)

    def group(self, ranks: Sequence[int]) -> "DistComm":
        """A process group of some ranks, made once; only they take part, so that idle ranks may sleep on."""
        chosen = tuple(self.ranks[r] for r in ranks)
        if chosen not in self._known:
            made = dist.new_group(list(chosen), timeout=LIMIT, use_local_synchronization=True)
            self._known[chosen] = DistComm(made, chosen, self._known)
        return self._known[chosen]

    def send(self, tensor: Tensor, peer: int, tag: int) -> DistRequest:
        """Begin to send."""
        return DistRequest(dist.isend(tensor, self.ranks[peer], self.handle, tag), tensor)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> DistRequest:
        """Begin to receive."""
        return DistRequest(dist.irecv(tensor.detach(), self.ranks[peer], self.handle, tag), tensor)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place."""
        dist.all_reduce(tensor, group=self.handle)

    def all_reduce_start(self, tensor: Tensor) -> DistRequest:
        """Begin to sum in place."""
        return DistRequest(dist.all_reduce(tensor, group=self.handle, async_op=True), tensor)

    def barrier(self) -> None:
        """Wait for all."""
        dist.barrier(self.handle)


def world(backend: str, address: str, rank: int, size: int) -> DistComm:
    """Join `size` ranks at tcp://HOST:PORT (or env:// under torchrun)."""
    if backend == "nccl":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=size, timeout=LIMIT)
    known: dict[tuple[int, ...], DistComm] = {}
    known[tuple(range(size))] = DistComm(dist.distributed_c10d._get_default_group(), range(size), known)
    return known[tuple(range(size))]


def share_line(comm: DistComm, line: bytes | None) -> bytes:
    """Rank 0's bytes on every rank; Gloo sleeps while it waits."""
    size = torch.tensor([len(line or b"")])
    dist.broadcast(size, comm.ranks[0], comm.handle)
    buffer = torch.frombuffer(bytearray(line), dtype=torch.uint8) if line else torch.zeros(int(size), dtype=torch.uint8)
    dist.broadcast(buffer, comm.ranks[0], comm.handle)
    return bytes(buffer.numpy())


def gather_lines(comm: DistComm, line: bytes) -> list[bytes]:
    """Every rank's bytes, on every rank."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(comm.size)]
    dist.all_gather(sizes, torch.tensor([len(line)]), comm.handle)
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(line.ljust(longest)), dtype=torch.uint8)
    buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in range(comm.size)]
    dist.all_gather(buffers, padded, comm.handle)
    return [bytes(b.numpy())[: int(size)] for b, size in zip(buffers, sizes, strict=True)]
