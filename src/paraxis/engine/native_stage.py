"""The native engine, one stage of a rank of MPI or Gloo: C++ computes it, this keeps what comes in until it is used.

It knows nothing of peers or schedules: an interpreter tells it what to compute and hands over what arrives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paraxis.engine.native_task import Feed, feed_of
from paraxis.program.instructions import Program
from paraxis.task.batches import Source
from paraxis.task.task import Task


@dataclass
class Now:
    """What the stages of a rank have in common while it trains: the optimiser step in progress and its samples."""

    task: Task
    source: Source
    step: int
    score: Tensor  # (3,) loss, weight and hits of an evaluation
    cache: dict[int, np.ndarray]
    fed: tuple[tuple[int, int], Feed] | None = None

    def feed(self) -> Feed:
        """The samples of this step's global batch."""
        key = id(self.source), self.step
        if self.fed is None or self.fed[0] != key:
            self.fed = key, feed_of(self.task, self.source, self.step, 1, self.cache)
        return self.fed[1]


class NativeStage:
    """A run of layers on a rank, `number` among those there; its `threads` share the samples of every microbatch."""

    def __init__(self, now: Now, ensemble: Any, program: Program, stage: int, threads: int) -> None:
        self.now, self.ensemble, self.threads = now, ensemble, threads
        self.number = stage // program.mesh.pp
        self.last = stage == len(program.stages) - 1
        self.last_segment = len(program.segments[stage]) - 1
        self.slice_size = now.task.batch // (program.mesh.dp * program.microbatches)
        self.parted = program.parted(stage)
        self.places: dict[int, int] = {}  # of each microbatch's first sample in the global batch
        self.clear()

    def clear(self) -> None:
        """Forget all microbatches in flight."""
        self.held: dict[tuple[bool, int], list[Tensor]] = {}  # what has come in lives until it has been used
        self.leaving: dict[int, list[Tensor]] = {}

    # -- computing ---------------------------------------------------------------------------------------------

    def load(self, microbatch: int, part: int) -> None:
        """Take samples of slice `part` of this step's global batch."""
        feed, first = self.now.feed(), part * self.slice_size
        words = feed.inputs, feed.targets, feed.index[0], feed.size, feed.scale
        self.ensemble.load(self.number, microbatch, *words, first)

    def forward(self, segment: int, microbatch: int, part: int) -> None:
        """F: keeps what its backward needs, and hands the output on, where it lies."""
        self.places[microbatch] = part * self.slice_size
        self.ensemble.forward(self.number, segment, microbatch, self.now.step, self.places[microbatch], True)
        if segment == self.last_segment:
            self.leaving[microbatch] = self._made(self.ensemble.output, microbatch)

    def evaluate(self, segment: int, microbatch: int, part: int) -> None:
        """Forward only, without noise; the last stage adds loss, weight and hits."""
        self.ensemble.forward(self.number, segment, microbatch, self.now.step, part * self.slice_size, False)
        if segment < self.last_segment:
            return
        self.leaving[microbatch] = self._made(self.ensemble.output, microbatch)
        self.held.pop((False, microbatch), None)
        if self.last:
            self.now.score += torch.tensor(self.ensemble.score(False, True), dtype=torch.float64)

    def backward(self, segment: int, microbatch: int) -> None:
        """B: adds to the gradients, and hands the input's gradient on."""
        self._back(segment, microbatch, parted=False)
        if not segment:
            self._let_go(microbatch)

    def input_gradient(self, segment: int, microbatch: int) -> None:
        """I: a backward that leaves the gradients of matrices to W; a whole one where the stage has no W."""
        if self.parted:
            self._back(segment, microbatch, parted=True)
        else:
            self.backward(segment, microbatch)

    def weight_gradient(self, segment: int, microbatch: int) -> None:
        """W: adds to the gradients what I has left."""
        self.ensemble.weigh(self.number, segment, microbatch)
        if not segment:
            self._let_go(microbatch)

    def _back(self, segment: int, microbatch: int, parted: bool) -> None:
        words = segment, microbatch, self.now.step, self.places[microbatch]
        self.ensemble.backward(self.number, *words, parted)
        if not segment:
            self.leaving[microbatch] = self._made(self.ensemble.input_gradient, microbatch)

    def _let_go(self, microbatch: int) -> None:
        self.held.pop((False, microbatch), None)
        self.held.pop((True, microbatch), None)

    def _made(self, part: Callable[[int, int, int], np.ndarray], microbatch: int) -> list[Tensor]:
        """One tensor a thread; C++ writes there again only a step later."""
        return [torch.from_numpy(part(self.number, thread, microbatch)) for thread in range(self.threads)]

    # -- what crosses the stage's edges ------------------------------------------------------------------------

    def incoming(self, gradient: bool) -> list[Tensor]:
        """Empty buffers, one for each thread's samples."""
        part = self.ensemble.output if gradient else self.ensemble.input_gradient
        like = part(self.number, 0, 0)
        return [torch.empty(like.size, dtype=self.now.task.dtype) for _ in range(self.threads)]

    def arrive(self, gradient: bool, microbatch: int, tensors: list[Tensor]) -> None:
        """Take over what has been received."""
        self.held[gradient, microbatch] = tensors
        give = self.ensemble.give_gradient if gradient else self.ensemble.give_input
        for thread, tensor in enumerate(tensors):
            give(self.number, thread, microbatch, tensor.numpy())

    def leave(self, microbatch: int) -> list[Tensor]:
        """What this stage has made for a neighbour."""
        return self.leaving.pop(microbatch)
