"""The native engine as one rank of MPI or Gloo: what `run.interpreter` asks of an engine, computed by C++.

Its own threads share the samples of every microbatch; to the program they are invisible.
"""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paraxis.engine.kept import keep
from paraxis.engine.native_engine import extension, stages_of, tokens_of
from paraxis.engine.native_task import Feed, check_native, feed_of, get_weights, hyper_of, put_weights
from paraxis.engine.rules import Hyper
from paraxis.errors import PlanError
from paraxis.program.instructions import MOMENTS, Program
from paraxis.task.batches import Source
from paraxis.task.task import Task


class NativeEngine:
    """One rank's share of the computing; `step` is the optimiser step in progress."""

    def __init__(self, task: Task, program: Program, rank: int, threads: int) -> None:
        _, self.stage, _ = program.mesh.coordinates(rank)
        self.task, self.hyper, self.threads = task, task.hyper(), threads
        self.last_stage = self.stage == len(program.stages) - 1
        self.last_segment = len(program.segments[self.stage]) - 1
        self.slice_size = task.batch // (program.mesh.dp * program.microbatches)
        self.weight = task.batch / (program.mesh.dp if program.epilogue else 1)
        self.ensemble = ensemble_of(task, program, self.stage, self.hyper, threads)
        put_weights(self.ensemble, task, [0])
        self.flat = SimpleNamespace(params=self._view("params"), grads=self._view("grads"))
        size = self.flat.params.numel()
        self.kept = keep(program, self.flat.params, [("", 0, size)], {"": size})
        self.running, self.statistics = self._view("running"), self._view("statistics")
        copies = [n for n, tie in program.ties_of(rank).items() if tie.stages[0] != self.stage]
        self.elsewhere = [self.ensemble.tied(0, n) for n in copies]  # what another stage counts in the norm
        self.norm = torch.zeros(1, dtype=torch.float64)
        self.score = torch.zeros(3, dtype=torch.float64)
        self.source: Source = task.train
        self.microbatches, self.step, self.done = program.microbatches, 0, 0
        self.losses: list[tuple[float, float]] = []
        self.held: dict[tuple[bool, int], list[Tensor]] = {}  # what has come in lives until it has been used
        self.leaving: dict[int, list[Tensor]] = {}
        self.places: dict[int, int] = {}  # of each microbatch's first sample in the global batch
        self._cache: dict[int, np.ndarray] = {}
        self._feed: tuple[tuple[int, int], Feed] | None = None

    def _view(self, name: str) -> Tensor:
        return torch.from_numpy(self.ensemble.buffer(0, name))

    def at(self, stage: int) -> "NativeEngine":
        """What computes a stage: there is but one."""
        return self

    # -- computing ---------------------------------------------------------------------------------------------

    def load(self, microbatch: int, part: int) -> None:
        """Take samples of slice `part` of this step's global batch."""
        key = id(self.source), self.step
        if self._feed is None or self._feed[0] != key:
            self._feed = key, feed_of(self.task, self.source, self.step, 1, self._cache)
        feed = self._feed[1]
        first = part * self.slice_size
        self.ensemble.load(microbatch, feed.inputs, feed.targets, feed.index[0], feed.size, feed.scale, first)

    def forward(self, segment: int, microbatch: int, part: int) -> None:
        """F: keeps what its backward needs, and hands the output on, where it lies."""
        self.places[microbatch] = part * self.slice_size
        self.ensemble.forward(segment, microbatch, self.step, self.places[microbatch], True)
        if segment == self.last_segment:
            self.leaving[microbatch] = self._made(self.ensemble.output, microbatch)

    def evaluate(self, segment: int, microbatch: int, part: int) -> None:
        """Forward only, without noise; the last stage adds loss, weight and hits."""
        self.ensemble.forward(segment, microbatch, self.step, part * self.slice_size, False)
        if segment < self.last_segment:
            return
        self.leaving[microbatch] = self._made(self.ensemble.output, microbatch)
        self.held.pop((False, microbatch), None)
        if self.last_stage:
            self.score += torch.tensor(self.ensemble.score(False, True), dtype=torch.float64)

    def backward(self, segment: int, microbatch: int) -> None:
        """B: adds to the gradients, and hands the input's gradient on."""
        self.ensemble.backward(segment, microbatch, self.step, self.places[microbatch])
        if segment:
            return
        self.leaving[microbatch] = self._made(self.ensemble.input_gradient, microbatch)
        self.held.pop((False, microbatch), None)
        self.held.pop((True, microbatch), None)

    def _made(self, part: Any, microbatch: int) -> list[Tensor]:
        """One tensor a thread; C++ writes there again only a step later."""
        return [torch.from_numpy(part(thread, microbatch)) for thread in range(self.threads)]

    def training(self, on: bool) -> None:
        """Forget what an interrupted phase left."""
        self.held.clear()
        self._feed = None

    # -- what crosses the stage's edges ------------------------------------------------------------------------

    def incoming(self, gradient: bool) -> list[Tensor]:
        """Empty buffers, one for each thread's samples."""
        like = self.ensemble.output(0, 0) if gradient else self.ensemble.input_gradient(0, 0)
        return [torch.empty(like.size, dtype=self.task.dtype) for _ in range(self.threads)]

    def arrive(self, gradient: bool, microbatch: int, tensors: list[Tensor]) -> None:
        """Take over what has been received."""
        self.held[gradient, microbatch] = tensors
        give = self.ensemble.give_gradient if gradient else self.ensemble.give_input
        for thread, tensor in enumerate(tensors):
            give(thread, microbatch, tensor.numpy())

    def leave(self, microbatch: int) -> list[Tensor]:
        """What this stage has made for a neighbour."""
        return self.leaving.pop(microbatch)

    # -- buffers and updates -----------------------------------------------------------------------------------

    def buffer(self, name: str, bucket: int, stage: int = -1) -> Tensor:
        """A declared flat buffer."""
        if name in MOMENTS.values():
            return torch.from_numpy(self.ensemble.moments(0, bucket))
        if name == "tied":
            first, last = self.ensemble.tied(0, bucket)
            return self.flat.grads[first:last]
        if self.kept and name in self.kept.buffers:
            return self.kept.buffer(name, bucket)
        named = {"grads": self.flat.grads, "params": self.flat.params, "running": self.running}
        return (
            named
            | {"gradients": self.flat.grads}
            | {"statistics": self.statistics, "norm": self.norm, "score": self.score}
        )[name]

    def views(self, names: Sequence[str], fragment: int) -> list[list[Tensor]]:
        """What a synchronisation rule's update is made on."""
        return self.kept.views(names, fragment) if self.kept else []

    def zero(self) -> None:
        """Begin a step."""
        self.ensemble.begin()

    def gradient_norm(self) -> None:
        """Square of the gradient's norm on this stage."""
        squares = self.flat.grads.double().square()
        for first, last in self.elsewhere:
            squares[first:last] = 0
        self.norm[0] = float(squares.sum()) / self.weight**2

    def update(self) -> None:
        """One optimiser step."""
        scale = 1 / self.weight
        if self.task.spec.clip is not None:
            scale *= min(1.0, self.task.spec.clip / (float(self.norm[0]) ** 0.5 + 1e-6))
        self.ensemble.finish(self.step, float(self.hyper.groups[0]["lr"]), scale)
        self.hyper.advance()
        if self.last_stage:
            loss, weight, _ = self.ensemble.score(True, False)
            self.losses.append((loss, weight))
        self.step += 1

    def update_statistics(self) -> None:
        """Running statistics become the mean of what every microbatch would have made of them."""
        self.running.copy_(self.statistics).div_(self.microbatches)
        self.statistics.zero_()
        self.done += 1

    def state(self) -> dict[str, Tensor]:
        """This stage's part of the network's state_dict."""
        return get_weights(self.ensemble, self.task, [0], self.done)

    def square_sum(self) -> float:
        """Of the parameters."""
        return float(self.flat.params.square().sum())

    def bytes_held(self) -> int:
        """Bytes of weights, gradients and the optimiser's state."""
        kept = sum(t.nbytes for t in self.kept.buffers.values()) if self.kept else 0
        return 3 * self.flat.params.nbytes + self.threads * self.flat.grads.nbytes + kept


def ensemble_of(task: Task, program: Program, stage: int, hyper: Hyper, threads: int, dry: bool = False) -> Any:
    """What C++ computes of a stage, with weights of zero; `dry`: it reserves no memory, but knows how much that would
    be. Raises PlanError for what it cannot do."""
    native, mesh = extension(), program.mesh
    check_native(program)
    if len(program.segments[stage]) > 1 and not program.synchronised():
        raise PlanError("engine=native reduces all gradients at once: leave out bucket_bytes")
    samples = task.batch // (mesh.dp * program.microbatches)
    if samples % threads:
        raise PlanError(f"threads={threads} do not divide the {samples} samples of a microbatch")
    if threads > 1 and task.layout().statistics:
        raise PlanError(f"threads={threads}: a batch norm needs its samples on one thread; use dp instead")
    make = native.Float if task.dtype == torch.float32 else native.Double
    return make(
        dp=threads,
        pp=1,
        stages=[stages_of(task, program, samples)[stage]],
        slice=samples // threads,
        microbatches=program.microbatches,
        bodies=[],
        hyper=hyper_of(hyper, task.batch / (mesh.dp if program.epilogue else 1), None),
        shared=True,
        usable_cores=len(os.sched_getaffinity(0)),
        seed=task.spec.seed,
        naive=False,
        whole=(stage, len(program.stages)),
        tokens=tokens_of(task),
        dry=dry,
    )
