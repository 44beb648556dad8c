"""The native engine as one rank of MPI or Gloo: what `run.interpreter` asks of an engine, computed by C++.

Its own threads share the samples of every microbatch; to the program they are invisible.
"""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from paraxis.engine.kept import keep
from paraxis.engine.native_engine import extension, stages_of, tokens_of
from paraxis.engine.native_stage import NativeStage, Now
from paraxis.engine.native_task import get_weights, hyper_of, put_weights
from paraxis.engine.rules import Hyper
from paraxis.errors import PlanError
from paraxis.program.instructions import MOMENTS, Program
from paraxis.task.batches import Source
from paraxis.task.task import Task


class NativeEngine:
    """One rank's share of the computing; `step` is the optimiser step in progress."""

    def __init__(self, task: Task, program: Program, rank: int, threads: int) -> None:
        own = program.stages_of(rank)
        self.task, self.hyper, self.threads = task, task.hyper(), threads
        self.last_stage = own[-1] == len(program.stages) - 1
        self.weight = task.batch / (program.mesh.dp if program.epilogue else 1)
        self.ensemble = ensemble_of(task, program, rank, self.hyper, threads)
        put_weights(self.ensemble, task, [0])
        self.flat = SimpleNamespace(params=self._view("params"), grads=self._view("grads"))
        size = self.flat.params.numel()
        self.kept = keep(program, self.flat.params, [("", 0, size)], {"": size})
        self.running, self.statistics = self._view("running"), self._view("statistics")
        copies = [n for n, tie in program.ties_of(rank).items() if tie.stages[0] not in own]
        self.elsewhere = [self.ensemble.tied(0, n) for n in copies]  # what another stage counts in the norm
        self.norm = torch.zeros(1, dtype=torch.float64)
        self.score = torch.zeros(3, dtype=torch.float64)
        self.now = Now(task, task.train, 0, self.score, {})
        self.stages = {stage: NativeStage(self.now, self.ensemble, program, stage, threads) for stage in own}
        self.microbatches, self.done = program.microbatches, 0
        self.losses: list[tuple[float, float]] = []

    def _view(self, name: str) -> Tensor:
        return torch.from_numpy(self.ensemble.buffer(0, name))

    def at(self, stage: int) -> NativeStage:
        """What computes a stage."""
        return self.stages[stage]

    @property
    def step(self) -> int:
        """The optimiser step in progress."""
        return self.now.step

    @step.setter
    def step(self, number: int) -> None:
        self.now.step = number

    @property
    def source(self) -> Source:
        """Where samples come from."""
        return self.now.source

    @source.setter
    def source(self, source: Source) -> None:
        self.now.source = source

    def training(self, on: bool) -> None:
        """Forget what an interrupted phase left."""
        self.now.fed = None
        for stage in self.stages.values():
            stage.clear()

    # -- buffers and updates -----------------------------------------------------------------------------------

    def buffer(self, name: str, bucket: int, stage: int = -1) -> Tensor:
        """A declared flat buffer, or a stage's part of the gradients."""
        if name in MOMENTS.values():
            return torch.from_numpy(self.ensemble.moments(self.stages[stage].number, bucket))
        if name == "grads" and bucket >= 0:
            first, last = self.ensemble.part_of(self.stages[stage].number)
            return self.flat.grads[first:last]
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
        """Square of the gradient's norm on this rank."""
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
        """This rank's part of the network's state_dict."""
        return get_weights(self.ensemble, self.task, [0], self.done)

    def square_sum(self) -> float:
        """Of the parameters."""
        return float(self.flat.params.square().sum())

    def bytes_held(self) -> int:
        """Bytes of weights, gradients and the optimiser's state."""
        kept = sum(t.nbytes for t in self.kept.buffers.values()) if self.kept else 0
        return 3 * self.flat.params.nbytes + self.threads * self.flat.grads.nbytes + kept


def ensemble_of(task: Task, program: Program, rank: int, hyper: Hyper, threads: int, dry: bool = False) -> Any:
    """What C++ computes on a rank, with weights of zero; `dry`: it reserves no memory, but knows how much that would
    be. Raises PlanError for what it cannot do."""
    native, mesh, own = extension(), program.mesh, program.stages_of(rank)
    if any(len(program.segments[stage]) > 1 for stage in own) and not program.synchronised():
        raise PlanError("engine=native reduces all gradients at once: leave out bucket_bytes")
    samples = task.batch // (mesh.dp * program.microbatches)
    if samples % threads:
        raise PlanError(f"threads={threads} do not divide the {samples} samples of a microbatch")
    if threads > 1 and task.layout().statistics:
        raise PlanError(f"threads={threads}: a batch norm needs its samples on one thread; use dp instead")
    specs = stages_of(task, program, samples)
    make = native.Float if task.dtype == torch.float32 else native.Double
    return make(
        dp=threads,
        pp=1,
        stages=[specs[stage] for stage in own],
        slice=samples // threads,
        microbatches=program.microbatches,
        bodies=[],
        hyper=hyper_of(hyper, task.batch / (mesh.dp if program.epilogue else 1), None),
        shared=True,
        usable_cores=len(os.sched_getaffinity(0)),
        seed=task.spec.seed,
        naive=False,
        ends=(own[0] == 0, own[-1] == len(program.stages) - 1),
        kept=[program.halved(stage) for stage in own],
        tokens=tokens_of(task),
        dry=dry,
    )
