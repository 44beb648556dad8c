"""Ranks over MPI: buffer calls only, in place. The only module that imports mpi4py."""

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from mpi4py import MPI
from torch import Tensor

from paraxis.comm import exchange

TYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int64: MPI.INT64_T,
    torch.int32: MPI.INT32_T,
}


def _bytes(tensor: Tensor) -> list[object]:
    """The memory of a contiguous tensor as MPI sees it; a numpy view would make its storage non-resizable."""
    return [MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes), MPI.BYTE]


def _numbers(tensor: Tensor) -> list[object]:
    return [MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes), TYPES[tensor.dtype]]


class MpiRequest:
    """A transfer under way; keeps its tensor alive."""

    def __init__(self, request: MPI.Request, tensor: Tensor) -> None:
        self.request, self.tensor = request, tensor

    def wait(self) -> None:
        """Wait, spinning inside MPI."""
        self.request.Wait()

    def ready(self) -> bool:
        """Test for completion."""
        return bool(self.request.Test())


class MpiComm:
    """A communicator of mpi4py; `ranks` are its members' ranks in the world."""

    def __init__(self, comm: MPI.Intracomm, ranks: Sequence[int], known: "dict[tuple[int, ...], MpiComm]") -> None:
        self.comm, self.ranks, self._known = comm, tuple(ranks), known
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def group(self, ranks: Sequence[int]) -> "MpiComm":
        """A communicator of some ranks, made once; only they take part, so that idle ranks may sleep on."""
        chosen = tuple(self.ranks[r] for r in ranks)
        if chosen not in self._known:
            made = self.comm.Create_group(self.comm.Get_group().Incl(list(ranks)))
            self._known[chosen] = MpiComm(made, chosen, self._known)
        return self._known[chosen]

    def send(self, tensor: Tensor, peer: int, tag: int) -> MpiRequest:
        """Begin to send."""
        return MpiRequest(self.comm.Isend(_bytes(tensor), peer, tag), tensor)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> MpiRequest:
        """Begin to receive."""
        return MpiRequest(self.comm.Irecv(_bytes(tensor), peer, tag), tensor)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place; faster than start and wait, of which Open MPI overlaps nothing."""
        self.comm.Allreduce(MPI.IN_PLACE, _numbers(tensor))

    def all_reduce_start(self, tensor: Tensor) -> MpiRequest:
        """Begin to sum in place."""
        return MpiRequest(self.comm.Iallreduce(MPI.IN_PLACE, _numbers(tensor)), tensor)

    def reduce_scatter(self, tensor: Tensor) -> None:
        """Sum, each rank its part; Open MPI's own took several times as long for megabytes."""
        exchange.reduce_scatter_start(self, tensor).wait()

    def reduce_scatter_start(self, tensor: Tensor) -> exchange.Exchange:
        """Begin to sum, each rank its part."""
        return exchange.reduce_scatter_start(self, tensor)

    def all_gather(self, tensor: Tensor) -> None:
        """Collect every rank's part."""
        self.comm.Allgather(MPI.IN_PLACE, _bytes(tensor))

    def all_gather_start(self, tensor: Tensor) -> exchange.Exchange:
        """Begin to collect every rank's part."""
        return exchange.all_gather_start(self, tensor)

    def barrier(self) -> None:
        """Wait for all, spinning."""
        self.comm.Barrier()


def world() -> MpiComm:
    """All ranks that were started together."""
    everyone = tuple(range(MPI.COMM_WORLD.Get_size()))
    known: dict[tuple[int, ...], MpiComm] = {}
    known[everyone] = MpiComm(MPI.COMM_WORLD, everyone, known)
    return known[everyone]


def share_line(comm: MpiComm, line: bytes | None) -> bytes:
    """Rank 0's bytes on every rank; the others sleep until they come, because a wait in MPI burns a core."""
    _sleep_until_all(comm)
    size = torch.tensor([len(line or b"")])
    comm.comm.Bcast(_numbers(size), 0)
    buffer = bytearray(line) if line is not None else bytearray(int(size))
    comm.comm.Bcast([buffer, MPI.BYTE], 0)
    return bytes(buffer)


def gather_lines(comm: MpiComm, line: bytes) -> list[bytes]:
    """Every rank's bytes, on every rank."""
    _sleep_until_all(comm)
    mine, sizes = torch.tensor([len(line)]), torch.zeros(comm.size, dtype=torch.int64)
    comm.comm.Allgather(_numbers(mine), _numbers(sizes))
    counts = [int(n) for n in sizes]
    buffer = bytearray(sum(counts))
    comm.comm.Allgatherv([line, MPI.BYTE], [buffer, counts, MPI.BYTE])
    ends = [sum(counts[: r + 1]) for r in range(comm.size)]
    return [bytes(buffer[end - n : end]) for end, n in zip(ends, counts, strict=True)]


def _sleep_until_all(comm: MpiComm) -> None:
    request = comm.comm.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)


def cuda_aware() -> bool:
    """Whether this MPI reads the memory of GPUs, by what it says itself; PARAXIS_CUDA_AWARE=0 or 1 overrules it.

    Open MPI and MPICH have MPIX_Query_cuda_support; a library without it does not.
    """
    if (told := os.environ.get("PARAXIS_CUDA_AWARE")) in ("0", "1"):
        return told == "1"
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    loaded = {line.split(None, 5)[-1] for line in lines if "/libmpi" in line}
    for path in sorted(loaded):
        try:
            ask = ctypes.CDLL(path).MPIX_Query_cuda_support
        except (OSError, AttributeError):
            continue
        return bool(ask())
    return False


def library() -> str:
    """The MPI library's own first line about itself."""
    return MPI.Get_library_version().splitlines()[0].split(",")[0].strip()
