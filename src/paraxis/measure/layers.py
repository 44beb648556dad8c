"""What each layer of a task costs on this machine: measured forwards and backwards, for balancing and simulating."""

from statistics import median
from time import perf_counter
from typing import Any

import torch

from paraxis.engine.devices import CPU, wait
from paraxis.measure.facts import Facts
from paraxis.measure.layer_work import layer_work
from paraxis.measure.saved import measure_sizes
from paraxis.task.batches import cut, digest, leaves, map_nest
from paraxis.task.norm import resting
from paraxis.task.task import Task
from paraxis.task.trial import apply, evaluating


def layer_seconds(
    task: Task, samples: int, seconds: float = 0.6, device: torch.device = CPU
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Median seconds of every layer's forward and of its backward on a slice of the first batch, on the task's device.

    They are timed repeatedly for about so many seconds.
    """
    first = task.train.share(0, 0, samples)
    task.draw.at(0, 0, samples)
    rounds: list[list[tuple[float, float]]] = []
    end = perf_counter() + seconds
    while len(rounds) < 3 or (perf_counter() < end and len(rounds) < 30):
        rounds.append(_round(task, first, device))
    kept, every = rounds[1:], range(len(task.chain))  # the first one warms up
    return tuple(median(r[k][0] for r in kept) for k in every), tuple(median(r[k][1] for r in kept) for k in every)


def measure_layers(task: Task, samples: int, seconds: float = 0.6) -> Facts:
    """Time every layer's forward and backward, and note what else the driver has to know."""
    layout, names = task.layout(), [type(layer).__name__ for layer in task.chain]
    forward, backward = layer_seconds(task, samples, seconds)
    one = task.train.share(0, 0, 1)
    task.draw.at(0, 0, 1)
    with resting(task.net):
        single = [sum(f + b for f, b in _round(task, one)) for _ in range(6)] if samples > 1 else [0.0]
    return Facts(
        layers=tuple(names),
        layout=layout,
        samples=samples,
        forward=forward,
        backward=backward,
        dispatch=median(single[1:] or single),
        batch=task.batch,
        steps_per_epoch=task.train.steps_per_epoch,
        network=task.recipe.name,
        parameters=sum(p.numel() for p in task.net.parameters()),
        switched_off=tuple(_titled(task, name) for name in task.keyed.switched_off),
        unkeyed=tuple(_titled(task, name) for name in task.keyed.unkeyed),
        random=task.keyed.functions or any("Dropout" in type(m).__name__ for m in task.net.modules()),
        notes=tuple(task.notes),
        has_test=task.test is not None,
        first_batch=digest(task.train),
        least=task.least,
        work=tuple(layer_work(task, samples)),
        sizes=measure_sizes(task),
    )


def calls_seconds(task: Task, device: torch.device) -> float:
    """Median seconds of a forward and backward of one sample that nobody waits for before its end: on a GPU what it
    takes to ask for them, for kernels of a single sample keep up with that."""
    one, taken = task.train.share(0, 0, 1), []
    task.draw.at(0, 0, 1)
    with resting(task.net):
        for _ in range(6):
            wait(device)
            start = perf_counter()
            _round(task, one)
            wait(device)
            taken.append(perf_counter() - start)
    return median(taken[1:])


def _titled(task: Task, name: str) -> str:
    """A module's name with its class, as people know it."""
    return f"{name or 'the network'} ({type(task.net.get_submodule(name)).__name__})"


def _round(task: Task, batch: Any, device: torch.device = CPU) -> list[tuple[float, float]]:
    """(forward, backward) seconds of every layer, the loss counted to the last one."""

    def now() -> float:
        wait(device)
        return perf_counter()

    x, stash, forward = task.recipe.inputs(batch), [], []
    for index, layer in enumerate(task.chain):
        x = map_nest(x, _cut)
        start = now()
        out = task.call(layer, x)
        if index == len(task.chain) - 1:
            out = task.recipe.loss(out, batch)[0]
        forward.append(now() - start)
        stash.append((x, out))
        x = out
    backward = []
    gradients: list[torch.Tensor] = []
    for index in reversed(range(len(stash))):
        x, out = stash[index]
        outs = [t for t in leaves(out) if t.requires_grad]
        start = now()
        if outs:
            torch.autograd.backward(outs, gradients if index < len(stash) - 1 else None)
        backward.append(now() - start)
        inputs = [t for t in leaves(x) if t.requires_grad]
        gradients = [t.grad if t.grad is not None else torch.zeros_like(t) for t in inputs]
    for p in task.net.parameters():
        p.grad = None
    return list(zip(forward, reversed(backward), strict=True))


def _cut(t: torch.Tensor) -> torch.Tensor:
    return t.detach().requires_grad_() if t.requires_grad else t.detach()


def coupled(task: Task, samples: int = 8) -> str:
    """A sentence if the loss couples samples, else "": the network's output on a batch is cut, and the loss with it."""
    count = min(samples, task.batch) // 2 * 2
    if count < 2:
        return ""
    batch = task.train.share(0, 0, count)
    with evaluating(task.net):
        output = apply(task.net, task.recipe.inputs(batch))
        whole, weight = task.recipe.loss(output, batch)
        halves = []
        for first in (0, count // 2):
            halves.append(task.recipe.loss(cut(output, count, first, count // 2), cut(batch, count, first, count // 2)))
    total, weights = sum(float(h[0]) for h in halves), sum(float(h[1]) for h in halves)
    if (
        abs(total - float(whole)) <= 1e-4 * max(abs(float(whole)), 1e-12)
        and abs(weights - float(weight)) <= 1e-6 * weights
    ):
        return ""
    return (
        f"the loss couples samples: over {count} samples it is {float(whole):.6g} with weight {float(weight):g}, "
        f"over their halves {total:.6g} with {weights:g}; loss() must return sums over samples"
    )
