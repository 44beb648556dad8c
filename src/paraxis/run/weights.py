"""Weights of two runs, held to each other."""

import math
from collections.abc import Mapping

from torch import Tensor

from paraxis.task.shared import Shard


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
