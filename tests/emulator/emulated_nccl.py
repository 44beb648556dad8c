"""NCCL between emulated GPUs: Gloo, with NCCL's rules.

A communicator does what it is asked one by one, in that order; messages have no tags; it connects when it first has
something to carry, and both ends must come then; it takes tensors of one GPU, without gaps.
"""

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import emulated
import torch
import torch.distributed as dist
from torch import Tensor


class Work:
    """What was asked for; `wait` returns when it is done, where NCCL would only hold up the stream."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run, self.done, self.error = run, threading.Event(), None

    def wait(self) -> None:
        self.done.wait()
        if self.error is not None:
            raise self.error

    def is_completed(self) -> bool:
        return self.done.is_set()


class ProcessGroupNCCL:
    """As much of PyTorch's class of this name as paraxis uses."""

    class Options:
        _timeout = timedelta(minutes=30)

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        self.rank, self.size, self.device = rank, size, None
        self.connect = lambda: dist.ProcessGroupGloo(dist.PrefixStore("emulated", store), rank, size, options._timeout)
        self.asked: queue.Queue[Work] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        emulated.EMULATOR.gpu_aside()
        self.gloo: Any = None
        while True:
            work = self.asked.get()
            try:
                self.gloo = self.gloo or self.connect()
                work.run()
            except Exception as error:
                work.error = error
            work.done.set()
            del work

    def _ask(self, tensors: list[Tensor], run: Callable[[], None]) -> Work:
        for tensor in tensors:
            if not tensor.is_cuda or not tensor.is_contiguous():
                raise RuntimeError("Tensors must be CUDA and dense")
            self.device = self.device or tensor.device
            if tensor.device != self.device:
                raise RuntimeError(f"a communicator of {self.device} got a tensor of {tensor.device}")
        work = Work(run)
        self.asked.put(work)
        return work

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Work:
        (tensor,) = tensors
        return self._ask(tensors, lambda: self.gloo.send([tensor.cpu()], to, 0).wait())

    def recv(self, tensors: list[Tensor], whence: int, tag: int) -> Work:
        (tensor,) = tensors

        def run() -> None:
            host = torch.empty_like(tensor, device="cpu")
            self.gloo.recv([host], whence, 0).wait()
            tensor.copy_(host)

        return self._ask(tensors, run)

    def allreduce(self, tensor: Tensor) -> Work:
        def run() -> None:
            host = tensor.cpu()
            self.gloo.allreduce(host).wait()
            tensor.copy_(host)

        return self._ask([tensor], run)

    def _reduce_scatter_base(self, own: Tensor, whole: Tensor) -> Work:
        def run() -> None:
            host = whole.cpu()
            self.gloo.allreduce(host).wait()
            own.copy_(host.view(self.size, -1)[self.rank].view_as(own))

        return self._ask([own, whole], run)

    def _allgather_base(self, whole: Tensor, own: Tensor) -> Work:
        def run() -> None:
            parts = [torch.empty(own.shape, dtype=own.dtype) for _ in range(self.size)]
            self.gloo.allgather([parts], [own.cpu()]).wait()
            whole.copy_(torch.cat([part.flatten() for part in parts]).view_as(whole))

        return self._ask([whole, own], run)
