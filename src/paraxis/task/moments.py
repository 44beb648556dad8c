"""Batch norm in halves: what its samples sum up to, then what the sums of all replicas make of them.

Whoever computes a stage adds the sums up in between; see `Meeting`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Meeting(Protocol):
    """Where replicas add up their sums: (1 + 2 features,) in double precision, the first one a count of values."""

    def met(self, sums: Tensor) -> tuple[int, Tensor]:
        """(number of this batch norm among those of the forward, the sums of all replicas)."""

    def met_back(self, number: int, sums: Tensor) -> Tensor:
        """The same in the backward of that batch norm."""


class Synchronised(torch.autograd.Function):
    """(x, weight, bias, epsilon, pivot, meeting) -> (y, mean, unbiased variance), statistics those of all replicas.

    Second moments are about `pivot`, a mean that all replicas know, or about 0 (None); sums of doubles bear that it is
    not the batch's. The gradients of weight and bias are sums over one's own samples, as those of every parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, pivot: Tensor | None, at: Meeting
    ) -> tuple[Tensor, Tensor, Tensor]:
        features, dims = x.shape[1], _others(x)
        own = x.new_full((1,), x.numel() // features, dtype=torch.float64)
        about = x.new_zeros(features, dtype=torch.float64) if pivot is None else pivot.double()
        variance, mean = (t.double() for t in torch.var_mean(x, dims, correction=0))
        apart = mean - about
        number, total = at.met(torch.cat([own, own * apart, own * (variance + apart * apart)]))
        count, first, second = total[0], total[1 : 1 + features], total[1 + features :]
        apart = first / count
        mean, variance = about + apart, (second / count - apart * apart).clamp_min(0)
        scale = (variance + eps).rsqrt()
        y = F.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean.to(x.dtype), scale.to(x.dtype))
        ctx.at, ctx.number, ctx.count = at, number, float(count)
        unbiased = variance * (count / (count - 1).clamp_min(1))
        made = mean.to(x.dtype), unbiased.to(x.dtype)
        ctx.mark_non_differentiable(*made)
        return y, *made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
        """Its second half is PyTorch's own formula (Ioffe & Szegedy 2015), with the sums of all replicas."""
        x, weight, mean, scale = ctx.saved_tensors
        features, dims = x.shape[1], _others(x)
        unit = (x - _wide(mean, x)) * _wide(scale, x)
        sums, products = dy.sum(dims), (dy * unit).sum(dims)
        own = dy.new_full((1,), x.numel() // features, dtype=torch.float64)
        total = ctx.at.met_back(ctx.number, torch.cat([own, sums.double(), products.double()])) / ctx.count
        dx = None
        if ctx.needs_input_grad[0]:
            factor = scale if weight is None else scale * weight
            shift, slope = total[1 : 1 + features].to(x.dtype), total[1 + features :].to(x.dtype)
            dx = (dy - _wide(shift, x)).addcmul_(unit, _wide(slope, x), value=-1).mul_(_wide(factor, x))
        needs = ctx.needs_input_grad
        return dx, products if needs[1] else None, sums if needs[2] else None, None, None, None


def _others(x: Tensor) -> list[int]:
    """All dimensions but that of the features."""
    return [0, *range(2, x.ndim)]


def _wide(value: Tensor, x: Tensor) -> Tensor:
    """One value a feature, in the shape that meets x."""
    return value.view(1, -1, *[1] * (x.ndim - 2))


class Count:
    """A meeting of one: it writes down how long the sums of each batch norm are."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def met(self, sums: Tensor) -> tuple[int, Tensor]:
        """Its own sums are those of all."""
        self.sizes.append(len(sums))
        return len(self.sizes) - 1, sums

    def met_back(self, number: int, sums: Tensor) -> Tensor:
        """Its own sums are those of all."""
        return sums


@contextmanager
def counting(net: nn.Module, kind: type[nn.Module]) -> Iterator[Count]:
    """Count the batch norms of a `kind` that a forward goes through; running statistics stay what they were."""
    count, norms = Count(), [m for m in net.modules() if isinstance(m, kind)]
    before = [b.clone() for b in net.buffers()]
    for norm in norms:
        norm.meeting = count  # type: ignore[assignment]
    try:
        with torch.no_grad():
            yield count
    finally:
        for norm in norms:
            norm.meeting = None  # type: ignore[assignment]
        for buffer, old in zip(net.buffers(), before, strict=True):
            buffer.copy_(old)
