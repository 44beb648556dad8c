"""What crosses the edges of a stage, learned from one forward of the layers in front of it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraxis.engine.precision import cast
from paraxis.errors import TaskError
from paraxis.program.instructions import Program
from paraxis.task.batches import Nest, leaves, map_nest
from paraxis.task.task import Task


@dataclass(frozen=True)
class Boundary:
    """What crosses the front of a stage for one microbatch: the nest with its tensors' shapes, types and gradients."""

    nest: Nest
    gradients: tuple[bool, ...]


Edges = tuple[Boundary, Boundary, dict[str, int]]


def slice_of(task: Task, program: Program) -> int:
    """Samples of a microbatch."""
    return task.batch // (program.mesh.dp * program.microbatches)


def boundaries(task: Task, program: Program, stage: int) -> Edges:
    """(entry, exit, how often layers in front have drawn masks) of a stage; their tensors lie where the task does."""
    samples = slice_of(task, program)
    batch = map_nest(task.train.share(0, 0, samples), Tensor.clone)
    task.draw.at(0, 0, samples)
    x = task.recipe.inputs(batch)
    entry = exit_ = Boundary(x, ())
    counts: dict[str, int] = {}
    first, last = program.stages[stage]
    if len(program.stages) > 1:
        saved = [b.clone() for b in task.net.buffers()]
        for index, layer in enumerate(task.chain[:last]):
            if index == first:
                entry, counts = _shapes(x), dict(task.draw.calls)
            (call,) = cast([partial(task.call, layer)], program.precision)
            x = call(x)
        exit_ = _shapes(x)
        for buffer, old in zip(task.net.buffers(), saved, strict=True):
            buffer.copy_(old)
    return entry, exit_, counts


def leaf(t: Tensor) -> Tensor:
    """The same values, where a gradient ends if there is one."""
    return t.detach().requires_grad_() if t.requires_grad else t.detach()


def _shapes(x: Any) -> Boundary:
    tensors = leaves(x)
    if not tensors:
        raise TaskError(f"a stage must pass tensors on, not {type(x).__name__}")
    empty = map_nest(x, lambda t: torch.empty_like(t, requires_grad=False, memory_format=torch.contiguous_format))
    return Boundary(empty, tuple(t.requires_grad for t in tensors))
