"""Runs a program with threads as ranks: C++ executes it, this hands over samples and learning rates.

A `Team` looks to its callers like the interpreter of a single rank, for it is one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paraxis.engine.native_engine import extension, stages_of, tokens_of
from paraxis.engine.native_task import feed_of, get_weights, hyper_of, put_weights
from paraxis.engine.rules import Hyper
from paraxis.errors import PlanError, ProgramError
from paraxis.measure.machine import usable_cores
from paraxis.program.instructions import Instruction, Program
from paraxis.sync.rule import buffers as kept_by_rules
from paraxis.task.batches import Source
from paraxis.task.task import Task

AT_ONCE = 256  # steps handed over at once, so that an interruption is soon noticed


@dataclass
class Team:
    """All ranks of a program in one process; `done` counts optimiser steps."""

    task: Task
    program: Program
    ensemble: Any
    hyper: Hyper
    names: list[str]  # of the bodies, in the order of their numbers
    done: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    _cache: dict[int, np.ndarray] = field(default_factory=dict)
    _between: list[tuple[str, int, int]] = field(default_factory=list)  # of the last calls

    @property
    def ranks(self) -> int:
        """Threads."""
        return self.program.mesh.size

    def steps(self, count: int) -> None:
        """`count` optimiser steps."""
        self._between = self._between[-4 * AT_ONCE :]
        for name, times in self.program.prologue if not self.done else ():
            for _ in range(times):
                self.ensemble.settle(self.names.index(name))
        while count:
            begun = perf_counter_ns()
            feed = feed_of(self.task, self.task.train, self.done, min(count, AT_ONCE), self._cache)
            fed, steps = perf_counter_ns(), len(feed.index)
            bodies = [self.names.index(self.program.step_body(self.done + n)) for n in range(steps)]
            rates = []
            for _ in range(steps):
                rates.append(float(self.hyper.groups[0]["lr"]))
                self.hyper.advance()
            words = feed.inputs, feed.targets, feed.index, self.task.batch, feed.scale
            self.losses += self.ensemble.run(self.done, bodies, rates, *words)
            self._between += [("data", begun, fed), ("overhead", fed, perf_counter_ns())]
            self.done += steps
            count -= steps

    def run_traced(self, steps: int) -> None:
        """As `steps`: the clocks are always read."""
        self.steps(steps)

    def clocks(self, steps: int) -> list[tuple[str, list[list[int]]]]:
        """Of the last steps (body, nanoseconds around every instruction of each rank), as far as they are kept."""
        kept = range(max(self.done - steps, self.done - extension().RING), self.done)
        return [(self.program.step_body(n), self.ensemble.stamps(n)) for n in kept]

    def between(self) -> list[tuple[str, int, int]]:
        """(kind, start, end) of finding samples, and of handing steps over to C++, the time it runs them included."""
        return self._between

    def settle(self) -> None:
        """The epilogue: replicas that agree only now and then agree now."""
        for name, times in self.program.epilogue:
            for _ in range(times):
                self.ensemble.settle(self.names.index(name))

    def evaluate(self, source: Source) -> list[float]:
        """[loss sum, weight, hits] over all of a source's samples."""
        feed = feed_of(self.task, source, 0, source.steps_per_epoch or 0, self._cache)
        words = feed.inputs, feed.targets, feed.index, source.batch, feed.size, feed.scale
        return list(self.ensemble.evaluate(self.names.index("evaluate"), *words))

    def state(self) -> dict[str, Tensor]:
        """The network's state_dict; replicas with weights of their own give those of the first."""
        return get_weights(self.ensemble, self.task, self._firsts(), self.done)

    def buffers(self, name: str, ranks: list[int] | None = None) -> list[Tensor]:
        """A flat buffer of some ranks (default: all), as it lies in memory."""
        return [torch.from_numpy(self.ensemble.buffer(r, name)) for r in ranks or range(self.ranks)]

    def bytes_held(self) -> int:
        """Bytes of weights, gradients and the optimiser's state."""
        copies = 3 + sum(b.name in kept_by_rules() for b in self.program.buffers)
        own = [
            {t.data_ptr(): t.nbytes for t in self.buffers(name)} for name in ("params", "grads")
        ]  # some are in common
        return copies * sum(own[0].values()) + sum(own[1].values())

    def square_sum(self) -> float:
        """Sum of squares of all parameters, counted once."""
        return sum(float(t.double().square().sum()) for t in self.buffers("params", self._firsts()))

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Replicas that disagree take their mean for a while, and go on as they were."""
        kept = (
            [t.clone() for name in ("params", "running") for t in self.buffers(name)] if self.program.epilogue else []
        )
        self.settle()
        yield
        for now, before in zip((t for name in ("params", "running") for t in self.buffers(name)), kept, strict=False):
            now.copy_(before)

    def _firsts(self) -> list[int]:
        """One rank of each stage."""
        return [self.program.mesh.rank(0, p) for p in range(self.program.mesh.pp)]


def start(task: Task, program: Program, hogwild: bool) -> Team:
    """A team with the task's initial weights; raises PlanError for what C++ cannot do."""
    hyper = task.hyper()
    ensemble = ensemble_of(task, program, hyper, hogwild)
    put_weights(ensemble, task, range(program.mesh.size))
    return Team(task, program, ensemble, hyper, [name for name, _ in program.bodies])


def ensemble_of(task: Task, program: Program, hyper: Hyper, hogwild: bool, dry: bool = False) -> Any:
    """What C++ executes, with weights of zero; `dry`: it reserves no memory, but knows how much that would be."""
    native, mesh = extension(), program.mesh
    if hogwild:
        plain = hyper.rule == "sgd" and not (hyper.groups[0]["momentum"] or hyper.groups[0]["weight_decay"])
        if not plain or task.spec.clip:
            raise PlanError("sync=hogwild is plain SGD: give --momentum 0, no decay and no clipping")
    if task.altering:
        raise PlanError(
            "engine=native: a layer works in place and alters its neighbour's output; make it inplace=False"
        )
    if any(len(cuts) > 1 for cuts in program.segments) and not (program.synchronised() or mesh.tp > 1):
        raise PlanError("engine=native reduces all gradients at once: leave out bucket_bytes")
    if mesh.tp > 1 and any(program.halved(stage) for stage in range(len(program.stages))):
        raise PlanError(f"tp={mesh.tp}: threads of a tp group keep nothing for a late W; take B or engine=torch")
    every = [i for _, ranks in program.bodies for rank in ranks for i in rank]
    unknown = {i.rule for i in every} - set(native.RULES) | {i.buffer for i in every} - set(native.BUFFERS)
    if unknown:
        raise PlanError(f"engine=native has no {', '.join(sorted(unknown))} for threads; comm=mpi or engine=torch has")
    words = [(name, [[_words(i) for i in rank] for rank in ranks]) for name, ranks in program.bodies]
    samples = task.batch // (mesh.dp * program.microbatches)
    make = native.Float if task.dtype == torch.float32 else native.Double
    replicas = mesh.dp if program.epilogue else 1
    ensemble = make(
        dp=mesh.dp,
        pp=mesh.pp,
        stages=stages_of(task, program, samples),
        slice=samples,
        microbatches=program.microbatches,
        bodies=words,
        hyper=hyper_of(hyper, task.batch / replicas, task.spec.clip),
        shared=program.common(),
        usable_cores=usable_cores(),
        seed=task.spec.seed,
        naive=False,
        ends=(True, True),
        kept=[program.halved(stage) for stage in range(len(program.stages))],
        tokens=tokens_of(task),
        dry=dry,
        tp=mesh.tp,
    )
    for rank in range(mesh.size) if mesh.tp > 1 else ():
        if (found := tuple(ensemble.borders(rank))) != (wanted := program.borders(program.stages_of(rank)[0])):
            raise ProgramError(f"rank {rank}: its layers have borders {found}, its program {wanted}")
    return ensemble


def _words(i: Instruction) -> tuple[Any, ...]:
    axis = i.axis.partition(":")[0]  # which places of a pipeline C++ knows from the tie
    words = i.op, i.microbatch, i.slice, i.peer, axis, i.buffer, i.rule
    return *words, i.reduction == "mean", i.segment, i.bucket, i.stage


@lru_cache(maxsize=1)
def record_cost(count: int = 256, passes: int = 200) -> float:
    """Nanoseconds of one instruction that does nothing, its record included: what C++ adds to each.

    A network of one weight gets a body of `count` such instructions; the median of `passes` passes is taken, the first
    ones left out, for they make room for their records.
    """
    native = extension()
    spec = native.Spec()
    spec.kind, spec.name, spec.x, spec.y = "affine", "one", 0, 1
    spec.in_ = spec.out = native.Shape(1, 1, 1)
    spec.kernel_h = spec.kernel_w = 1
    nothing = ("SendActWait", -1, -1, -1, "", "", "", False, -1, -1, -1)
    ensemble = native.Float(
        dp=1,
        pp=1,
        stages=[[spec]],
        slice=1,
        microbatches=1,
        bodies=[("step", [[nothing] * count])],
        hyper=native.Hyper(),
        shared=False,
        usable_cores=usable_cores(),
        seed=0,
        naive=False,
        ends=(True, True),
        kept=[0],
    )
    samples = np.zeros((1, 1), np.float32), np.zeros(1, np.int64)
    warm = native.RING
    for first in (0, warm):
        steps = warm if first == 0 else min(passes, native.RING)
        ensemble.run(first, [0] * steps, [0.0] * steps, *samples, np.zeros((steps, 1), np.int64), 1, 1.0)
    found = [ensemble.stamps(n)[0] for n in range(warm, warm + min(passes, native.RING))]
    return float(np.median([(row[-1] - row[0]) / count for row in found]))
