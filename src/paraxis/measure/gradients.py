"""Squared gradient norms of microbatches and of the whole batch, along a serial run of a task."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from paraxis.errors import Diverged, TaskError
from paraxis.run.serial import Replica, replica
from paraxis.task.batches import cut
from paraxis.task.task import Task


@dataclass
class Norms:
    """Of every step: the mean |g|^2 over the microbatches (`size` samples each) and |g|^2 of the whole batch."""

    size: int
    small: list[float] = field(default_factory=list)
    large: list[float] = field(default_factory=list)


def gradient_norms(task: Task, steps: int, microbatches: int) -> Norms:
    """Train `steps` steps, looking at the gradients; every gradient is of the mean loss of its samples.

    Raises TaskError where the batch has not so many equal parts, Diverged where a gradient is not finite.
    """
    if not 2 <= microbatches <= task.batch or task.batch % microbatches:
        raise TaskError(f"microbatches={microbatches}: the noise scale takes 2 or more equal parts of {task.batch}")
    r, norms = replica(task), Norms(task.batch // microbatches)
    for number in range(steps):
        squares, whole = _step(r, number, microbatches)
        if not whole < float("inf"):
            raise Diverged(f"the gradient is not finite in step {number + 1}: lower lr or clip gradients")
        norms.small.append(sum(squares) / len(squares))
        norms.large.append(whole)
    return norms


def _step(r: Replica, number: int, microbatches: int) -> tuple[list[float], float]:
    """One optimiser step: (|g|^2 of each microbatch, |g|^2 of the batch)."""
    task, size = r.task, r.task.batch // microbatches
    parameters = [p for p in task.net.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    batch, squares, weights = task.train.share(number, 0, task.batch), [], 0.0
    for part in range(microbatches):
        samples = cut(batch, task.batch, part * size, size)
        task.draw.at(number, part * size, size)
        loss, own = task.recipe.loss(task.whole(task.recipe.inputs(samples)), samples)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        squares.append(_square(gradients) / float(own) ** 2)
        weights += float(own)
        torch._foreach_add_(total, gradients)
    for p, gradient in zip(parameters, total, strict=True):
        p.grad = gradient / weights
    whole = _square([t / weights for t in total])
    if task.spec.clip is not None:
        nn.utils.clip_grad_norm_(parameters, task.spec.clip)
    r.optimizer.step()
    if r.scheduler is not None:
        r.scheduler.step()  # type: ignore[attr-defined]
    return squares, whole


def _square(gradients: list[Tensor] | tuple[Tensor, ...]) -> float:
    return sum(float(g.double().square().sum()) for g in gradients)
