"""One global stream of batches, cut by us: any rank can name the samples of any slice of any step."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from functools import lru_cache, reduce
from itertools import chain
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from paraxis.errors import TaskError
from paraxis.task.data import Arrays
from paraxis.task.masks import splitmix64

Nest = Any
BLOCK_BYTES = 4 << 20  # of samples gathered at once
SHARE = 0.05  # of a GPU's memory that is left to this process, for a whole set of samples


class Source(Protocol):
    """Where samples come from. `share` gives samples [first, first + count) of a step's global batch."""

    batch: int

    @property
    def steps_per_epoch(self) -> int | None: ...

    def share(self, step: int, first: int, count: int, inputs: bool = True, targets: bool = True) -> Nest: ...

    def valid(self, step: int, first: int, count: int) -> int: ...

    def on(self, device: torch.device) -> "Source": ...


class ArraySource:
    """Samples in memory; each epoch is a permutation of (seed, epoch), its tail dropped. Tokens come as int64.

    `device` is where samples go to; they are gathered there, too, where the whole set has room.
    """

    device = torch.device("cpu")

    def __init__(self, arrays: Arrays, batch: int, seed: int, dtype: torch.dtype, shuffled: bool = True) -> None:
        self.arrays, size = arrays, len(arrays.targets)
        if shuffled and batch > size:
            raise TaskError(f"batch={batch} is more than the {size} training samples; at most {size} fit")
        self.inputs, self.targets = torch.from_numpy(arrays.inputs), torch.from_numpy(arrays.targets)
        self.batch, self.size, self.seed, self.dtype, self.shuffled = batch, size, seed, dtype, shuffled
        self.tokens = arrays.tokens
        self.steps_per_epoch: int = size // batch if shuffled else -(-size // batch)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._blocks: dict[tuple[int, int, bool, bool], tuple[tuple[int, int], list[Nest]]] = {}
        self._thinned: dict[int, ArraySource] = {}

    def share(self, step: int, first: int, count: int, inputs: bool = True, targets: bool = True) -> Nest:
        """(inputs, targets) as tensors, None for what is not asked for.

        Training samples are gathered for some steps at once and handed out as views: a gather a step costs more.
        """
        if not self.shuffled:
            start = step * self.batch + first
            chosen = torch.arange(start, start + count, device=self.inputs.device).clamp_(max=self.size - 1)
            return self._gather(chosen, inputs, targets)
        epoch, within = divmod(step, self.steps_per_epoch)
        steps = self._steps_at_once(count)
        key = first, count, inputs, targets
        name = epoch, within // steps
        if key not in self._blocks or self._blocks[key][0] != name:
            begin = within // steps * steps
            chosen = self._epoch_order(epoch)[begin : begin + steps, first : first + count]
            x, y = self._gather(chosen.reshape(-1), inputs, targets)
            none = (None,) * len(chosen)
            pieces = zip(none if x is None else x.split(count), none if y is None else y.split(count), strict=True)
            self._blocks[key] = name, list(pieces)
        return self._blocks[key][1][within % steps]

    def thinned(self, most: int) -> "ArraySource":
        """Every k-th of samples that are not shuffled, at most `most` of them; itself where all may stay."""
        stride = -(-self.size // most)
        if stride == 1:
            return self
        if stride not in self._thinned:  # kept, for engines know samples that they have laid out by their identity
            few = copy(self)
            few.inputs, few.targets = self.inputs[::stride].contiguous(), self.targets[::stride].contiguous()
            few.size, few._blocks, few._thinned = len(few.targets), {}, {}
            few.steps_per_epoch = -(-few.size // few.batch)
            self._thinned[stride] = few
        return self._thinned[stride]

    def on(self, device: torch.device) -> "ArraySource":
        """The same samples in the memory of a device; where they do not fit, copied there as they are asked for."""
        moved = copy(self)
        moved.device, moved._epoch, moved._blocks, moved._thinned = device, -1, {}, {}
        if held := resident(self.arrays, device):
            moved.inputs, moved.targets = held
        return moved

    def numbers(self, step: int, steps: int) -> np.ndarray:
        """Sample numbers of up to `steps` steps from `step` on, none beyond its epoch: int64 (steps, batch)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return np.ascontiguousarray(self._epoch_order(epoch)[within : within + steps].cpu().numpy())

    def _steps_at_once(self, count: int) -> int:
        return max(1, min(64, BLOCK_BYTES // max(1, 4 * count * self.inputs.shape[1:].numel())))

    def _epoch_order(self, epoch: int) -> Tensor:
        """Indices of every step of an epoch: int64 (steps, batch)."""
        if epoch != self._epoch:
            order = np.random.default_rng(splitmix64(self.seed) ^ epoch).permutation(self.size)
            self._epoch = epoch
            numbers = torch.from_numpy(order[: self.steps_per_epoch * self.batch]).view(-1, self.batch)
            self._order = numbers.to(self.inputs.device)
        return self._order

    def _gather(self, index: Tensor, inputs: bool, targets: bool) -> tuple[Tensor | None, Tensor | None]:
        x = sent(self.inputs.index_select(0, index), self.device) if inputs else None
        y = sent(self.targets.index_select(0, index), self.device).long() if targets else None
        return None if x is None else self._values(x), y

    def _values(self, x: Tensor) -> Tensor:
        if self.tokens:
            return x.long()
        if x.dtype != torch.uint8:
            return x.to(self.dtype)
        return x.div(255) if self.dtype == torch.float32 else x.to(self.dtype).div_(255)

    def valid(self, step: int, first: int, count: int) -> int:
        """How many of them are no padding."""
        return count if self.shuffled else max(0, min(count, self.size - step * self.batch - first))


class StreamSource:
    """Batches of the user's own iterable, read alike by every rank and cut as views; short last ones are dropped."""

    def __init__(self, make: Callable[[], Iterable[Nest]], batch: int | None, seed: int, dtype: torch.dtype) -> None:
        self.make, self.seed, self.dtype, self.device = make, seed, dtype, torch.device("cpu")
        self._step, self._epoch = -1, -1
        self._iterator: Iterator[Nest] = iter(())
        self._current: Nest = None
        self._whole = 0
        self._advance(0)
        self.steps_per_epoch: int | None = _whole_batches(make(), self._whole)
        self.batch = batch or self._whole
        if self.batch != self._whole:
            raise TaskError(f"batches() yields {self._whole} samples; batch={batch} needs batches of that size")

    def share(self, step: int, first: int, count: int, inputs: bool = True, targets: bool = True) -> Nest:
        """The nest with every tensor that counts the batch cut to the samples asked for."""
        if step != self._step:
            self._advance(step)
        return cut(self._current, self.batch, first, count)

    def valid(self, step: int, first: int, count: int) -> int:
        """All of them."""
        return count

    def on(self, device: torch.device) -> "StreamSource":
        """Itself, whose batches go to a device from now on."""
        self.device = device
        self._current = map_nest(self._current, lambda t: sent(t, device))
        return self

    def _advance(self, step: int) -> None:
        """Read on to a step; an earlier one begins again."""
        if step < self._step:
            self._step, self._epoch, self._iterator = -1, -1, iter(())
        while self._step < step:
            batch = next(self._iterator, None)
            if batch is None:
                self._open_epoch()
                continue
            batch = as_dtype(map_nest(batch, lambda t: sent(t, self.device)), self.dtype)
            self._whole = self._whole or samples(batch)
            if samples(batch) == self._whole:
                self._current, self._step = batch, self._step + 1

    def _open_epoch(self) -> None:
        self._epoch += 1
        seed_everything(splitmix64(self.seed) ^ self._epoch)
        self._iterator = iter(self.make())
        first = next(self._iterator, None)
        if first is None:
            raise TaskError(f"batches() gave no batch in epoch {self._epoch}; it must be iterable again and again")
        self._iterator = chain([first], self._iterator)


@lru_cache(maxsize=4)
def resident(arrays: Arrays, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """A set of samples on a device, once for all plans that a rank sets up; None if it would fill it."""
    inputs, targets = torch.from_numpy(arrays.inputs), torch.from_numpy(arrays.targets)
    if device.type == "cuda" and inputs.nbytes + targets.nbytes > SHARE * _room(device):
        return None
    return inputs.to(device), targets.to(device)


def _room(device: torch.device) -> float:
    """Bytes of a GPU that this process may still take."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(float(free), allowed - torch.cuda.memory_allocated(device))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the memory of a CPU to a GPU without waiting, through pages that stay in place."""
    if tensor.device == device:
        return tensor
    leaves_cpu = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if leaves_cpu else tensor.to(device)


def _whole_batches(batches: Iterable[Nest], size: int) -> int | None:
    """How many full batches an epoch has, where that can be told without reading it."""
    if isinstance(batches, (list, tuple)):
        return sum(samples(batch) == size for batch in batches)
    dataset: Any = getattr(batches, "dataset", None)
    return len(dataset) // size if isinstance(batches, DataLoader) and hasattr(dataset, "__len__") else None


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's own generators, for what a user's file draws by itself."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed >> 1)


def map_nest(nest: Nest, f: Callable[[Tensor], Any]) -> Nest:
    """f of every tensor in a nest of dicts, lists, tuples and named tuples; other leaves stay."""
    if isinstance(nest, Tensor):
        return f(nest)
    if isinstance(nest, Mapping):
        return {key: map_nest(value, f) for key, value in nest.items()}
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(map_nest(value, f) for value in nest))
    if isinstance(nest, (list, tuple)):
        return type(nest)(map_nest(value, f) for value in nest)
    return nest


def leaves(nest: Nest) -> list[Tensor]:
    """All tensors of a nest, in order."""
    if isinstance(nest, Tensor):
        return [nest]
    values = nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, (list, tuple)) else ()
    return [tensor for value in values for tensor in leaves(value)]


def samples(batch: Nest) -> int:
    """How many samples a batch holds: the first dimension of its first tensor; raises TaskError without one."""
    for tensor in leaves(batch):
        if tensor.ndim:
            return tensor.shape[0]
    raise TaskError("a batch holds no tensor with a first dimension of samples")


def cut(batch: Nest, size: int, first: int, count: int) -> Nest:
    """Views of samples [first, first + count) of every tensor whose first dimension counts the batch's samples."""
    return map_nest(batch, lambda t: t[first : first + count] if t.ndim and t.shape[0] == size else t)


def digest(source: Source) -> int:
    """A number that tells whether two processes read the same first batch."""
    tensors = leaves(source.share(0, 0, source.batch))
    return reduce(lambda crc, t: crc32(t.cpu().contiguous().numpy().tobytes(), crc), tensors, 0)


def as_dtype(nest: Nest, dtype: torch.dtype) -> Nest:
    """Floating tensors in another precision."""
    return map_nest(nest, lambda t: t.to(dtype) if t.is_floating_point() else t)
