"""The plain serial loop: what every plan is proved against, and what the user has today.

It knows nothing of programs, flat buffers or ranks: modules, autograd and torch.optim as one writes them by hand. For
inexact plans it emulates their algorithm with copies of the network trained one after the other, as the rule's own page
says it in plain code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paraxis.engine.devices import CPU, move
from paraxis.run import mixed
from paraxis.sync.rule import parse
from paraxis.task.batches import cut
from paraxis.task.task import Task
from paraxis.task.trial import apply, evaluating, running


@dataclass
class Replica:
    """One copy of the network with its optimiser; `parts`: in how many its layers' sums are made (see run.mixed)."""

    task: Task
    optimizer: torch.optim.Optimizer
    scheduler: object
    precision: str
    scaler: torch.amp.GradScaler
    parts: int = 1
    compiled: Callable[..., Any] | None = None  # computes what the task's network does
    skipped: int = 0  # steps whose scaled gradients have overflowed


def replica(task: Task, precision: str = "fp32", parts: int = 1, device: torch.device = CPU) -> Replica:
    """A copy ready to train, on a device."""
    move(task, [[task.net]], device)
    optimizer = task.optimizer()
    scaler = mixed.scaler(task.net, precision, task.batch)
    return Replica(task, optimizer, task.scheduler(optimizer), precision, scaler, parts)


def plain(task: Task, precision: str = "fp32", device: torch.device = CPU) -> Replica:
    """What the user has now, ready to train."""
    made = replica(task, precision, 1, device)
    made.scaler = mixed.scaler(task.net, precision, 1)  # of mean losses
    return made


def step(r: Replica, number: int, first: int, count: int, groups: int) -> tuple[float, float]:
    """One optimiser step on samples [first, first + count) of the global batch, in equal groups: (loss sum, weight)."""
    total, weight = gradients(r, number, first, count, groups)
    descend(r, weight)
    return total, weight


def gradients(r: Replica, number: int, first: int, count: int, groups: int) -> tuple[float, float]:
    """As `step`, up to the gradients of the loss's sum."""
    task, size = r.task, count // groups
    r.optimizer.zero_grad()
    stats = [b for m in task.net.modules() for b in running(m)]
    before = [b.clone() for b in stats]
    after = [torch.zeros_like(b) for b in stats]
    batch = task.train.share(number, first, count)
    total = weight = 0.0
    for group in range(groups):
        for buffer, old in zip(stats, before, strict=True):
            buffer.copy_(old)
        part = cut(batch, count, group * size, size)
        task.draw.at(number, first + group * size, size)
        run = partial(task.whole, task.recipe.inputs(part))
        loss, own = task.recipe.loss(mixed.compute(task.net, run, r.precision, r.parts), part)
        r.scaler.scale(loss).backward()
        total, weight = total + float(loss.detach()), weight + float(own)
        for buffer, collected in zip(stats, after, strict=True):
            collected += buffer
    for buffer, old, collected in zip(stats, before, after, strict=True):
        buffer.copy_(collected / groups if buffer.is_floating_point() else old + 1)
    return total, weight


def descend(r: Replica, weight: float) -> None:
    """The rest of a step: gradients become those of the mean, and the optimiser follows them."""
    task = r.task
    r.scaler.unscale_(r.optimizer)
    for p in task.net.parameters():
        if p.grad is not None:
            p.grad /= weight
    if task.spec.clip is not None:
        nn.utils.clip_grad_norm_(task.net.parameters(), task.spec.clip)
    _take(r)
    if r.scheduler is not None:
        r.scheduler.step()  # type: ignore[attr-defined]


def _take(r: Replica) -> None:
    """The optimiser's step, unless scaled gradients have overflowed."""
    before = r.scaler.get_scale()
    r.scaler.step(r.optimizer)
    r.scaler.update()
    r.skipped += r.scaler.get_scale() < before


@torch.no_grad()
def emulate(
    replicas: Sequence[Replica], first_step: int, steps: int, groups: int, every: int, text: str = "gradient"
) -> list[float]:
    """Train replicas on their shares of each batch, and let them agree by the rule `text` of period `every`.

    Returns the mean loss of each step. Whenever they agree on something they take the mean of running statistics.
    """
    share = replicas[0].task.batch // len(replicas)
    sync = parse(text) if len(replicas) > 1 else None
    named = [dict(r.task.net.named_parameters()) for r in replicas]
    agreeing = sync.rule.emulate(named, every, **sync.options) if sync and sync.rule.emulate else iter(range(steps + 1))
    meets = {at % every for at in sync.meets(every)} | {0} if sync else set()
    next(agreeing)  # what it does before training
    losses = []
    for number in range(first_step, first_step + steps):
        with torch.enable_grad():
            pairs = [gradients(r, number, i * share, share, groups) for i, r in enumerate(replicas)]
        weights = [weight for _, weight in pairs]
        losses.append(sum(loss for loss, _ in pairs) / sum(weights))
        if sync and sync.rule.emulate_sum:
            weights = [sum(weights)] * len(replicas)
            for same in zip(*(own.values() for own in named), strict=True):
                if same[0].grad is not None:
                    total = sync.rule.emulate_sum([p.grad for p in same])
                    for p in same:
                        p.grad.copy_(total)
        for r, weight in zip(replicas, weights, strict=True):
            descend(r, weight)
        next(agreeing)
        if (number + 1) % every in meets:
            _average([list(r.task.net.buffers()) for r in replicas])
    return losses


def in_turn(r: Replica, steps: int, parts: int) -> list[float]:
    """What Hogwild comes to when nobody is in anybody's way: each part of a batch makes a step of its own, in turn."""
    size = r.task.batch // parts
    losses = []
    for number in range(steps):
        pairs = [step(r, number, part * size, size, 1) for part in range(parts)]
        losses.append(sum(loss for loss, _ in pairs) / sum(weight for _, weight in pairs))
    return losses


def average(nets: Sequence[nn.Module]) -> None:
    """Give all networks the mean of their floating state."""
    _average([list(net.state_dict().values()) for net in nets])


def _average(replicas: Sequence[Sequence[Tensor]]) -> None:
    for same in zip(*replicas, strict=True):
        if same[0].is_floating_point():
            mean = torch.stack([t.detach() for t in same]).mean(0)
            for tensor in same:
                tensor.detach().copy_(mean)


def plain_step(r: Replica, number: int) -> Tensor:
    """What the user has now: a plain training step on the whole batch, with the framework's own dropout."""
    task = r.task
    batch = task.train.share(number, 0, task.batch)
    r.optimizer.zero_grad()
    run = partial(apply, r.compiled or task.net, task.recipe.inputs(batch))
    loss, weight = task.recipe.loss(mixed.compute(task.net, run, r.precision), batch)
    r.scaler.scale(loss / weight).backward()
    if task.spec.clip is not None:
        r.scaler.unscale_(r.optimizer)
        nn.utils.clip_grad_norm_(task.net.parameters(), task.spec.clip)
    _take(r)
    return (loss / weight).detach()


def score(r: Replica, source: Any) -> dict[str, Any]:
    """Loss, weight and hits of all of a source's samples, and how many these are."""
    task, loss, weight, hits = r.task, 0.0, 0.0, 0.0
    with evaluating(task.net):
        for number in range(source.steps_per_epoch):
            batch = source.share(number, 0, source.valid(number, 0, source.batch))
            output = mixed.compute(task.net, partial(task.net, batch[0]), r.precision)
            total, own = task.recipe.loss(output, batch)
            loss, weight = loss + float(total), weight + float(own)
            hits += task.recipe.hits(output, batch)
    return {"loss": loss, "weight": weight, "hits": hits, "samples": source.size}
