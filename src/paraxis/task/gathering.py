"""Tokens that the ranks of a `tp` group share between their splits (Korthikanti et al. 2022).

In front of a split every rank gathers the tokens of all, behind it each takes the sum for its own; backwards the other
way round. What crosses a border lies as (ranks, samples, own tokens, width), of which collectives see equal parts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paraxis.engine.precision import wide
from paraxis.errors import TaskError
from paraxis.program.shares import Tokens


class Meeting(Protocol):
    """Where ranks collect and add up their parts, in place; see task.shared.Sharing."""

    def passed(self, word: str) -> int:
        """In a forward: the number of the border that is met next."""

    def share_back(self, number: int, part: Tensor) -> Tensor:
        """What ranks make of their parts at that border."""


def collect(own: Tensor, index: int, parts: int, meet: Callable[[Tensor], object]) -> Tensor:
    """(n, t, w) of each rank -> (n, parts * t, w) of all."""
    every = own.new_empty(parts, *own.shape)
    every[index] = own
    meet(every)
    return every.movedim(0, 1).flatten(1, 2)


def reduce(part: Tensor, index: int, parts: int, meet: Callable[[Tensor], object]) -> Tensor:
    """Summands (n, parts * t, w) of each rank -> one's own tokens (n, t, w) of the sum."""
    every = wide(part).unflatten(1, (parts, -1)).movedim(1, 0).clone(memory_format=torch.contiguous_format)
    meet(every)
    return every[index].to(part.dtype, copy=True)


class Gather(torch.autograd.Function):
    """A rank's own tokens (n, t, w) -> those of all ranks; of the gradients each gets the sum for its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Meeting, index: int, parts: int) -> Tensor:
        ctx.place = index, parts, partial(at.share_back, at.passed("gather"))
        return collect(x, *ctx.place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return reduce(dy, *ctx.place), None, None, None


class Scatter(torch.autograd.Function):
    """This rank's part of a sum (n, t, w) -> its own tokens of it; back, the gradients of all tokens."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, at: Meeting, index: int, parts: int) -> Tensor:
        if part.shape[1] % parts:
            raise TaskError(f"sequence=1: {part.shape[1]} tokens cannot be shared by {parts} ranks")
        ctx.place = index, parts, partial(at.share_back, at.passed("scatter"))
        return reduce(part, *ctx.place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return collect(dy, *ctx.place), None, None, None


def gathered(index: int, parts: int, module: Any, given: tuple[Tensor]) -> tuple[Tensor]:
    """A hook in front of what needs all tokens. Where shapes alone are learned, one's own stand for the others'."""
    (x,) = given
    if module.meeting is None:
        return (x.repeat(1, parts, 1),)
    every: Tensor = Gather.apply(x, module.meeting, index, parts)
    return (every,)


def scattered(module: Any, part: Tensor, index: int, parts: int) -> Tensor:
    """What a module makes of its part, as one's own tokens of the sum."""
    if module.meeting is None:
        return own_tokens(part, index, parts)
    made: Tensor = Scatter.apply(part, module.meeting, index, parts)
    return made


def own_tokens(whole: Tensor, index: int, parts: int) -> Tensor:
    """One's own part of the dimension in front of the last."""
    count = whole.shape[-2] // parts
    return whole.narrow(-2, index * count, count)


def apart(net: nn.Module, chain: Sequence[nn.Module], tokens: Tokens, index: int, parts: int) -> None:
    """Cut tokens where nothing split makes them, and gather them where the network needs all of them again."""
    for name in tokens.cuts:
        net.get_submodule(name).register_forward_hook(partial(_cut, index, parts))
    if tokens.end >= 0:
        vars(chain[tokens.end])["meeting"] = None
        chain[tokens.end].register_forward_pre_hook(partial(gathered, index, parts))


def _cut(index: int, parts: int, module: nn.Module, given: Any, made: Tensor) -> Tensor:
    """A hook behind a module."""
    if made.shape[-2] % parts:
        raise TaskError(f"sequence=1: {made.shape[-2]} tokens cannot be shared by {parts} ranks")
    return own_tokens(made, index, parts)
