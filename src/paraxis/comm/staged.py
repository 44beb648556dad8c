"""Transfers of tensors that a transport cannot reach, through host memory; for MPI that can, in step with the GPU.

A transport between processes reads and writes when it likes, and knows nothing of the order in which a GPU works: what
is to be sent must have been computed, and what is to be received must find its memory free of earlier work. Both hold
once the GPU's stream has been waited for. What comes back is copied without waiting: later work of the stream sees it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraxis.comm.base import Comm, Request
from paraxis.comm.exchange import parts


@dataclass(frozen=True)
class Staging:
    """How tensors come within reach: `room` gives host memory for one (None: the transport reaches it as it lies),
    `settle` returns when all work on it that has been asked for is done."""

    room: Callable[[Tensor], Tensor | None]
    settle: Callable[[Tensor], None]

    def host(self, tensor: Tensor) -> Tensor:
        """Memory that the transport may use in its place, of any content."""
        found = self.room(tensor)
        if found is None:
            self.settle(tensor)
        return tensor.detach() if found is None else found

    def out(self, tensor: Tensor) -> Tensor:
        """Its values, where the transport may read them at once."""
        host = self.host(tensor)
        if host.data_ptr() != tensor.data_ptr():
            host.copy_(tensor.detach(), non_blocking=True)
            self.settle(tensor)
        return host


def _pinned(tensor: Tensor) -> Tensor | None:
    """Memory whose pages stay in place: a GPU copies to and from it by itself. PyTorch takes it back after that."""
    if tensor.device.type == "cpu":
        return None
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def _synchronise(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.current_stream(tensor.device).synchronize()


THROUGH_HOST = Staging(_pinned, _synchronise)  # tensors of a GPU over Gloo, or an MPI that only reads host memory
IN_PLACE = Staging(lambda _: None, _synchronise)  # an MPI that reads the memory of GPUs


class StagedRequest:
    """A transfer under way; `tensor` is what it is about, `back` copies what has come to it."""

    def __init__(self, request: Request, tensor: Tensor, back: Callable[[], Any]) -> None:
        self.request, self.tensor, self.back = request, tensor, back

    def wait(self) -> None:
        """Wait for completion; of what came, the copy is under way in the GPU's stream."""
        self.request.wait()
        self.back()

    def ready(self) -> bool:
        """Test for completion."""
        return self.request.ready()


class StagedComm:
    """The ranks of another communicator; each of them may stage, or not, as its tensors lie."""

    def __init__(self, inner: Comm, staging: Staging) -> None:
        self.inner, self.staging = inner, staging
        self.rank, self.size = inner.rank, inner.size

    def group(self, ranks: Sequence[int]) -> "StagedComm":
        """A communicator of some of the ranks."""
        return StagedComm(self.inner.group(ranks), self.staging)

    def send(self, tensor: Tensor, peer: int, tag: int) -> StagedRequest:
        """Begin to send."""
        return StagedRequest(self.inner.send(self.staging.out(tensor), peer, tag), tensor, _nothing)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> StagedRequest:
        """Begin to receive."""
        host = self.staging.host(tensor)
        return StagedRequest(self.inner.receive(host, peer, tag), tensor, _copy(host, tensor))

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place."""
        host = self.staging.out(tensor)
        self.inner.all_reduce(host)
        _copy(host, tensor)()

    def all_reduce_start(self, tensor: Tensor) -> StagedRequest:
        """Begin to sum in place."""
        host = self.staging.out(tensor)
        return StagedRequest(self.inner.all_reduce_start(host), tensor, _copy(host, tensor))

    def reduce_scatter(self, tensor: Tensor) -> None:
        """Sum, each rank its part."""
        host = self.staging.out(tensor)
        self.inner.reduce_scatter(host)
        self._own(host, tensor)()

    def reduce_scatter_start(self, tensor: Tensor) -> StagedRequest:
        """Begin to sum, each rank its part."""
        host = self.staging.out(tensor)
        return StagedRequest(self.inner.reduce_scatter_start(host), tensor, self._own(host, tensor))

    def all_gather(self, tensor: Tensor) -> None:
        """Collect every rank's part."""
        host = self._with_own_part(tensor)
        self.inner.all_gather(host)
        _copy(host, tensor)()

    def all_gather_start(self, tensor: Tensor) -> StagedRequest:
        """Begin to collect every rank's part."""
        host = self._with_own_part(tensor)
        return StagedRequest(self.inner.all_gather_start(host), tensor, _copy(host, tensor))

    def barrier(self) -> None:
        """Wait for all."""
        self.inner.barrier()

    def _own(self, host: Tensor, tensor: Tensor) -> Callable[[], Any]:
        return _copy(parts(host, self.size)[self.rank], parts(tensor, self.size)[self.rank])

    def _with_own_part(self, tensor: Tensor) -> Tensor:
        """Room for all parts, with one's own in its place: only that is read."""
        host = self.staging.host(tensor)
        if host.data_ptr() != tensor.data_ptr():
            parts(host, self.size)[self.rank].copy_(parts(tensor, self.size)[self.rank].detach(), non_blocking=True)
            self.staging.settle(tensor)
        return host


def _nothing() -> None:
    pass


def _copy(host: Tensor, tensor: Tensor) -> Callable[[], Any]:
    """What has come, to where it belongs; nothing where it came there by itself."""
    if host.data_ptr() == tensor.data_ptr():
        return _nothing
    return lambda: tensor.detach().copy_(host, non_blocking=True)
