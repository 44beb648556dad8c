"""The plain serial loop: what every plan is proved against, and what the user has today.

It knows nothing of programs, flat buffers or ranks: modules, autograd and torch.optim as one writes them by hand. For
inexact plans it emulates their algorithm with copies of the network trained one after the other, as the rule's own page
says it in plain code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paraxis.engine.devices import CPU, move
from paraxis.sync.rule import parse
from paraxis.task.batches import cut
from paraxis.task.task import Task
from paraxis.task.trial import apply, running


@dataclass
class Replica:
    """One copy of the network with its optimiser."""

    task: Task
    optimizer: torch.optim.Optimizer
    scheduler: object


def replica(task: Task, device: torch.device = CPU) -> Replica:
    """A copy ready to train, on a device."""
    move(task, [[task.net]], device)
    optimizer = task.optimizer()
    return Replica(task, optimizer, task.scheduler(optimizer))


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
        loss, own = task.recipe.loss(task.whole(task.recipe.inputs(part)), part)
        loss.backward()
        total, weight = total + float(loss.detach()), weight + float(own)
        for buffer, collected in zip(stats, after, strict=True):
            collected += buffer
    for buffer, old, collected in zip(stats, before, after, strict=True):
        buffer.copy_(collected / groups if buffer.is_floating_point() else old + 1)
    return total, weight


def descend(r: Replica, weight: float) -> None:
    """The rest of a step: gradients become those of the mean, and the optimiser follows them."""
    task = r.task
    for p in task.net.parameters():
        if p.grad is not None:
            p.grad /= weight
    if task.spec.clip is not None:
        nn.utils.clip_grad_norm_(task.net.parameters(), task.spec.clip)
    r.optimizer.step()
    if r.scheduler is not None:
        r.scheduler.step()  # type: ignore[attr-defined]


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


def plain_step(net: nn.Module, task: Task, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    """What the user has now: a plain training step on the whole batch, with the framework's own dropout."""
    batch = task.train.share(number, 0, task.batch)
    optimizer.zero_grad()
    loss, weight = task.recipe.loss(apply(net, task.recipe.inputs(batch)), batch)
    mean = loss / weight
    mean.backward()
    if task.spec.clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), task.spec.clip)
    optimizer.step()
    return mean.detach()
