"""A step whose operations stay the same: what differs from step to step is fed to them through memory of the device.

A recording (see `graphs`) repeats its kernels with the numbers they were launched with. Learning rates, what an
optimiser makes of the number of its step, and the keys of masks are therefore read from memory, to which one copy
brings them before each replay. Only while it is recorded does a step compute this way.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paraxis.engine.rules import Group, State, adam_in_one, in_one
from paraxis.errors import TaskError
from paraxis.task.masks import Words
from paraxis.task.randomness import Call

CONSTANT = ("momentum", "nesterov", "weight_decay", "decoupled_weight_decay", "betas", "eps")
Scale = float | Tensor
RunNumbers = Callable[[State, Group], list[float]]
FedRule = Callable[[Tensor, Tensor, State, Group, Tensor, Scale], None]


@dataclass
class Fed:
    """`there` (n,) int64 on the device gets what is written to `letter`, the host's: numbers, then keys.

    `numbers` (k,) are the first of them as float64, `words` each mask's key as two int32. `sums` (2,) get loss sum and
    weight of a step.
    """

    letter: Tensor
    there: Tensor
    numbers: Tensor
    words: dict[Call, Words]
    sums: Tensor

    def __post_init__(self) -> None:
        count = len(self.numbers)
        self.numbers_here = self.letter[:count].numpy().view(np.float64)
        self.keys_here = self.letter[count:].numpy().view(np.uint64)

    def send(self, numbers: Sequence[float], keys: Sequence[int]) -> None:
        """What the next replay is to read. From pageable memory: the driver keeps a copy before it returns, so that the
        letter may be written again at once, and nothing is waited for."""
        self.numbers_here[:] = numbers
        self.keys_here[:] = keys
        self.there.copy_(self.letter, non_blocking=True)

    def word(self, call: Call) -> Words:
        """Where a mask's key lies; raises TaskError for one that nobody writes."""
        if call not in self.words:
            raise TaskError(f"dropout in {call[0]} was not there when the network was tried")
        return self.words[call]


def fed_by(device: torch.device, numbers: int, calls: Sequence[Call], sums: Tensor | None = None) -> Fed:
    """Memory for so many numbers and the keys of these calls, in their order."""
    there = torch.zeros(numbers + len(calls), dtype=torch.int64, device=device)
    pairs = there.view(torch.int32).view(-1, 2)[numbers:]
    return Fed(
        letter=torch.zeros(len(there), dtype=torch.int64),
        there=there,
        numbers=there[:numbers].view(torch.float64),
        words={call: (pair[0], pair[1]) for call, pair in zip(calls, pairs, strict=True)},
        sums=torch.zeros(2, dtype=torch.float64, device=device) if sums is None else sums,
    )


# -- update rules whose numbers lie in memory ------------------------------------------------------------------


def sgd_numbers(state: State, group: Group) -> list[float]:
    """What `sgd` is fed in its next step."""
    return [-float(group["lr"])]


def sgd(w: Tensor, g: Tensor, state: State, group: Group, numbers: Tensor, scale: Scale) -> None:
    """`rules.sgd`; its buffer must be there already."""
    decay, momentum = group["weight_decay"], group["momentum"]
    if not momentum and not decay:
        w.addcmul_(g, numbers[0] * scale)
        return
    g.mul_(scale)
    if decay:
        g.add_(w, alpha=decay)
    if momentum:
        buffer = state["momentum"].mul_(momentum).add_(g)
        g = g.add_(buffer, alpha=momentum) if group["nesterov"] else buffer
    w.addcmul_(g, numbers[0])


def adam_numbers(state: State, group: Group) -> list[float]:
    """What `adam` is fed in its next step, which this counts."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    state["step"] += 1
    step = int(state["step"])
    return [1 - lr * group["weight_decay"], 1 / math.sqrt(1 - beta2**step), -lr / (1 - beta1**step), lr, step]


def adam(w: Tensor, g: Tensor, state: State, group: Group, numbers: Tensor, scale: Scale) -> None:
    """`rules.adam`; its moments must be there already."""
    decay, eps = group["weight_decay"], group["eps"]
    beta1, beta2 = group["betas"]
    if in_one(w):
        adam_in_one(w, g, state, group, numbers[4], numbers[3], scale)
        return
    g.mul_(scale)
    if decay and group.get("decoupled_weight_decay"):
        w.mul_(numbers[0])
    elif decay:
        g.add_(w, alpha=decay)
    state["first"].lerp_(g, 1 - beta1)
    state["second"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = state["second"].sqrt().mul_(numbers[1]).add_(eps)
    w.addcmul_(state["first"] / root, numbers[2])


RULES: dict[str, tuple[int, RunNumbers, FedRule]] = {"sgd": (1, sgd_numbers, sgd), "adam": (5, adam_numbers, adam)}


# -- a rank's step ---------------------------------------------------------------------------------------------


def fed_for(engine: Any) -> Fed:
    """Memory for what a rank's steps are fed."""
    numbers = RULES[engine.hyper.rule][0] * len(engine.runs)
    return fed_by(engine.device, numbers, list(engine.task.draw.shapes), engine.now.sums)


def constants(engine: Any) -> tuple[Any, ...]:
    """What a recording takes for granted of the hyperparameters; a scheduler of the user's may change any."""
    if engine.hyper.scheduler is None:
        return ()
    return tuple(group.get(key) for group in engine.hyper.groups for key in CONSTANT)


def send(engine: Any, fed: Fed) -> None:
    """Write what the step in progress differs in. Called once a step: it counts Adam's."""
    numbers = RULES[engine.hyper.rule][1]
    draw, step = engine.task.draw, engine.now.number
    fed.send(
        [value for _, _, state, group in engine.runs for value in numbers(state, group)],
        [draw.key(call, step) for call in fed.words],
    )


@contextmanager
def feeding(engine: Any, fed: Fed) -> Iterator[None]:
    """Within it the engine computes what it is fed, for a recording."""
    sums = engine.now.sums
    engine.fed, engine.now.sums, engine.task.draw.words = fed, fed.sums, fed.word
    try:
        yield
    finally:
        engine.fed, engine.now.sums, engine.task.draw.words = None, sums, None


def descend(engine: Any, fed: Fed, scale: Scale) -> None:
    """The update itself, of gradients times `scale`."""
    count, _, rule = RULES[engine.hyper.rule]
    dtype = engine.flat.params.dtype
    factor = scale.to(dtype) if isinstance(scale, Tensor) else scale
    for (weights, gradients, state, group), own in zip(engine.runs, fed.numbers.to(dtype).split(count), strict=True):
        rule(weights, gradients, state, group, own, factor)
