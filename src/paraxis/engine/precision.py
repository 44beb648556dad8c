"""What segments compute in: torch.autocast around a segment's forward, and TF32 for a whole process.

Weights stay in float32. Autocast keeps the 16-bit copies that it makes of them until the outermost context ends: here
that of one segment and one microbatch, so that no copy is older than the weight, and none is shared by two graphs.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraxis.task.batches import Nest, leaves, map_nest

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Call = Callable[[Any], Any]


def cast(calls: Iterable[Call], precision: str, ends: bool = False) -> list[Call]:
    """What computes a segment in a precision; where the network `ends`, its output leaves in float32, for the loss."""
    own = list(calls)
    if precision not in TYPES:
        return own
    return [partial(_cast, own, TYPES[precision]), *[wide] * ends]


def _cast(calls: list[Call], dtype: torch.dtype, x: Nest) -> Any:
    with torch.autocast(next((t.device.type for t in leaves(x)), "cpu"), dtype):
        for call in calls:
            x = call(x)
    return x


def wide(nest: Nest) -> Nest:
    """The same with all 16-bit numbers in float32."""
    return map_nest(nest, lambda t: t.float() if t.dtype in TYPES.values() else t)


def summed(add_up: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
    """A sum over ranks in float32 at least, of parts in whatever they were computed in."""
    return add_up(part.float() if part.dtype in TYPES.values() else part)


def products(precision: str) -> None:
    """Let this process's GPUs multiply in TF32 or not; by default PyTorch lets convolutions do so, but not matrices.

    Of matrices by the older setting, which brings the newer one along: with that alone torch.compile may fail.
    """
    matrices, mode = ("high", "tf32") if precision == "tf32" else ("highest", "ieee")
    backends: Any = torch.backends
    if backends.cuda.matmul.fp32_precision != mode:
        torch.set_float32_matmul_precision(matrices)
    for place in (backends.cudnn.conv, backends.cudnn.rnn):
        if place.fp32_precision != mode:
            place.fp32_precision = mode
