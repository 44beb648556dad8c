"""CUDA graphs: what is asked of a device, recorded once and from then on replayed as one launch.

To launch a kernel from Python takes longer than a small network's kernel runs. A recording has fixed kernels, addresses
and numbers; `Recordings` decides when to make one, and falls back to what is recorded where one cannot be made.
"""

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from paraxis.plan.plan import WARM
from paraxis.task.batches import Nest, leaves, map_nest

Action = Callable[[], None]
Record = Callable[[dict[Any, Nest]], list[Action]]
SHAPES = 8  # recordings of one body at most: each keeps the memory of its tensors


class Recorder(Protocol):
    """What makes recordings."""

    def warm(self, run: Action, last: bool = False) -> str:
        """Run it as it is, where it will be recorded; of the last time before that, say what forbids it ("": nothing
        that has been seen)."""

    def record(self, run: Action) -> Action:
        """Take down what `run` asks of the device, without doing it; the result does it. Raises what cannot be."""


class CudaRecorder:
    """CUDA graphs of one device. They share memory, as recordings that are replayed in the order they were made may."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, run: Action, last: bool = False) -> str:
        """On the stream of the recordings, for autograd's nodes keep to the stream that they were made on."""
        usual = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            waited = last and waits(run)
            if not last:
                run()
        usual.wait_stream(self.stream)
        return "a module, or the loss, asks the device for a value and waits for it" if waited else ""

    def record(self, run: Action) -> Action:
        """One graph. What autocast has kept would not be computed again, so it keeps nothing meanwhile."""
        graph, kept = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        usual = torch.cuda.current_stream(self.stream.device)
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                run()
        except Exception as error:
            torch.cuda.set_stream(usual)
            self._recover()
            cause = error.__context__  # that a failed capture cannot be ended is told in its place
            raise cause if isinstance(cause, Exception) else error from None
        finally:
            torch.set_autocast_cache_enabled(kept)
        return graph.replay

    def _recover(self) -> None:
        """A capture that could not be ended leaves two things waiting for its end: the allocator, which would refuse to
        empty its cache from then on, and the generator of random numbers."""
        index = self.stream.device.index
        with suppress(AttributeError, RuntimeError):  # such as that nothing is waiting
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        generator = torch.cuda.default_generators[index]
        with suppress(AttributeError, RuntimeError):
            generator.graphsafe_set_state(generator.clone_state())


def waits(run: Action) -> bool:
    """Whether the host has to wait for the device in it, as far as PyTorch tells."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return any("called a synchronizing CUDA operation" in str(own.message) for own in told)


@dataclass
class Recording:
    """What has become of a body with samples of one shape: how often it has run, and once recorded, its parts.

    `inputs` are the samples that the parts read, by name, as nests of tensors that stay where they are.
    """

    passes: int = 0
    inputs: dict[Any, Nest] = field(default_factory=dict)
    parts: list[Action] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)  # the leaves of `inputs`

    def take(self, fresh: dict[Any, Nest]) -> None:
        """Copy samples to where the parts read them."""
        for there, here in zip(self.places, leaves(fresh), strict=True):
            there.copy_(here, non_blocking=True)


@dataclass
class Recordings:
    """The recordings of one body, by what they take for granted; `reason` is why there will be no more, as `tell` gets.

    None of this holds whoever records: what is dropped must go at once, with the memory of its device.
    """

    tell: Callable[[str], None]
    warm: int = WARM
    most: int = SHAPES
    known: dict[Hashable, Recording] = field(default_factory=dict)
    reason: str = ""
    last: bool = False  # whether this pass is the last one before a recording

    def next(self, samples: dict[Any, Nest], granted: Hashable, record: Record) -> Recording | None:
        """What to replay in the pass that begins, with its samples in place; None: run it as it is.

        `record(inputs)` makes a recording, all parts in turn, and leaves everything else as it was.
        """
        if self.reason:
            return None
        found = self.known.setdefault((signature(samples), granted), Recording())
        self.last = not found.parts and found.passes == self.warm - 1
        if not found.parts and found.passes < self.warm:
            found.passes += 1
            return None
        if not found.parts:
            if sum(bool(own.parts) for own in self.known.values()) == self.most:
                self.give_up(f"more than {self.most} shapes of samples or settings of the optimiser")
                return None
            found.inputs = {name: map_nest(nest, Tensor.clone) for name, nest in samples.items()}
            found.places = leaves(found.inputs)
            try:
                found.parts = record(found.inputs)
            except Exception as error:
                self.give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
                return None
        found.take(samples)
        return found

    def give_up(self, reason: str) -> None:
        """Run it as it is from now on, and say why."""
        self.reason = reason
        self.known.clear()
        self.tell(f"graphs: fell back to eager: {reason}")


def signature(nest: Nest) -> Hashable:
    """Shapes and types of all tensors, and all else by its value: what a recording takes for granted of samples."""
    if isinstance(nest, Tensor):
        return nest.shape, nest.dtype
    if isinstance(nest, Mapping):
        return tuple((key, signature(value)) for key, value in nest.items())
    return tuple(map(signature, nest)) if isinstance(nest, (tuple, list)) else repr(nest)


def stretches(free: Sequence[bool]) -> list[range]:
    """The longest runs of places that are `free`, in order."""
    found: list[range] = []
    for place, own in enumerate(free):
        if own and found and found[-1].stop == place:
            found[-1] = range(found[-1].start, place + 1)
        elif own:
            found.append(range(place, place + 1))
    return found
