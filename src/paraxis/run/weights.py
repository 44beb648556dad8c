"""Weights of two runs, held to each other."""

import math
from collections.abc import Mapping

from torch import Tensor

from paraxis.task.shared import Shard

FEW = 50  # of so many elements, one may go either way where its gradient is nearly zero


def compare(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], shards: Mapping[str, Shard], change: float
) -> tuple[float, str]:
    """(the largest relative difference, its tensor); what is split is held to the same part of what is wanted."""
    worst, where = 0.0, ""
    for name, value in state.items():
        if name in wanted and value.is_floating_point():
            apart = difference(value, shards[name].of(wanted[name]) if name in shards else wanted[name], change)
            if not apart <= worst:
                worst, where = apart, name
    return worst, where


def difference(a: Tensor, b: Tensor, change: float) -> float:
    """The design's equality: max|a-b| / max(max|b|, the largest weight change in the model); infinite for NaN."""
    if not a.numel():
        return 0.0
    found = float((a.double() - b.double()).abs().max()) / max(float(b.abs().max()), change, 1e-30)
    return found if math.isfinite(found) else math.inf


def untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors wants every tensor to have memory of its own."""
    return {name: tensor.clone() for name, tensor in state.items()}


def rms(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def relative(
    state: dict[str, Tensor], wanted: dict[str, Tensor], shards: dict[str, Shard], moved: dict[str, float]
) -> tuple[dict[str, float], float]:
    """(of every tensor, of all together) how far they lie apart, relative to how far they have `moved` (both rms).

    Of each tensor the elements that lie furthest apart, one in FEW, are left out.
    """
    apart, squares, total = {}, 0.0, 0.0
    for name in (name for name in wanted if name in state and name in moved):
        whole, shard = wanted[name], shards.get(name)
        far = (state[name] - (shard.of(whole) if shard else whole)).double().abs().flatten()
        near = far.sort().values[: far.numel() - -(-far.numel() // FEW)] if far.numel() > 1 else far
        distance = rms(near) if bool(far.isfinite().all()) else math.inf
        apart[name] = distance / moved[name] if moved[name] else math.inf if distance else 0.0
        squares, total = squares + far.numel() * distance**2, total + far.numel() * moved[name] ** 2
    return apart, math.sqrt(squares / total) if total else 0.0
