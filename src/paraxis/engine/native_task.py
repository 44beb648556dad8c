"""What the native engine takes from a task and gives back: samples, weights and the optimiser's numbers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paraxis.engine.native_engine import extension
from paraxis.engine.rules import Hyper
from paraxis.task.batches import ArraySource, Source
from paraxis.task.task import Task

ALL = 1 << 62


@dataclass(frozen=True)
class Feed:
    """Samples of some steps: `inputs` channels-last, `targets`, and which of them each step takes, (steps, batch)."""

    inputs: np.ndarray
    targets: np.ndarray
    index: np.ndarray
    size: int  # samples that count; those of the index from there on are padding
    scale: float  # of inputs that are bytes


def feed_of(task: Task, source: Source, step: int, steps: int, cache: dict[int, np.ndarray]) -> Feed:
    """Up to `steps` steps from `step` on; arrays in memory are made channels-last once and kept in `cache`."""
    if isinstance(source, ArraySource):
        if source.shuffled:
            index, size = source.numbers(step, steps), ALL
        else:
            numbers = np.arange(step * source.batch, (step + steps) * source.batch)
            index, size = np.minimum(numbers, source.size - 1).reshape(steps, -1), source.size - step * source.batch
        if source.tokens:  # bytes in memory: only those of these steps are made wide
            inputs, targets = (
                part.numpy()[index.reshape(-1)].astype(np.int64) for part in (source.inputs, source.targets)
            )
            return Feed(inputs, targets, np.arange(index.size).reshape(index.shape), size, 1.0)
        key, kept = id(source.inputs), source.inputs
        if key not in cache:
            cache[key] = channels_last(kept if kept.dtype == torch.uint8 else kept.to(task.dtype))
        return Feed(cache[key], source.targets.numpy(), index, size, 1 / 255)
    inputs, targets = source.share(step, 0, source.batch)
    data = channels_last(inputs.to(task.dtype)), targets.contiguous().numpy()
    return Feed(*data, np.arange(source.batch).reshape(1, -1), ALL, 1.0)


def channels_last(x: Tensor) -> np.ndarray:
    """Samples (n, c, h, w) as (n, h, w, c), others as they are; contiguous."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).contiguous().numpy()


def hyper_of(hyper: Hyper, weight: float, clip: float | None) -> Any:
    """What C++ has to know of the optimiser; the learning rate comes with every step."""
    group, out = hyper.groups[0], extension().Hyper()
    out.adam = hyper.rule == "adam"
    out.decay, out.weight, out.clip = group["weight_decay"], weight, clip or 0.0
    if out.adam:
        out.decoupled = bool(group.get("decoupled_weight_decay"))
        (out.beta1, out.beta2), out.epsilon = group["betas"], group["eps"]
    else:
        out.momentum, out.nesterov = group["momentum"], group["nesterov"]
    return out


def put_weights(ensemble: Any, task: Task, ranks: Iterable[int]) -> None:
    """Give some ranks the task's own weights."""
    state = task.net.state_dict()
    for rank in ranks:
        for layer, part, _ in ensemble.parts(rank):
            ensemble.put(rank, layer, part, state[f"{layer}.{part}"].contiguous().numpy().reshape(-1))


def get_weights(ensemble: Any, task: Task, ranks: Iterable[int], done: int) -> dict[str, Tensor]:
    """The part of the state_dict that lies on some ranks, after `done` steps."""
    like, state = task.net.state_dict(), {}
    for rank in ranks:
        for layer, part, _ in ensemble.parts(rank):
            name = f"{layer}.{part}"
            tensor = torch.empty_like(like[name], memory_format=torch.contiguous_format)
            ensemble.get(rank, layer, part, tensor.numpy().reshape(-1))
            state[name] = tensor
            if (count := f"{layer}.num_batches_tracked") in like:
                state[count] = like[count] + done
    return state
