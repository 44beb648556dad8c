"""Mixed precision as one writes it by hand, for the serial run: torch.autocast and torch.amp.GradScaler.

It has nothing from the engines, which are held to it. `Reordered` makes the same sums in another order, so that one can
see how far apart that alone takes two runs in one precision.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paraxis.plan.precision import PATIENCE, first_scale
from paraxis.task.batches import map_nest

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compute(net: nn.Module, run: Callable[[], Any], precision: str, parts: int = 1) -> Any:
    """What `run` makes with the network in a precision, given on in float32; with the sums of layers in so many parts.

    The loss of it is then a float32 one, whatever it is made of.
    """
    with ExitStack() as stack:
        if precision in HALF:
            device = next((p.device.type for p in net.parameters()), "cpu")
            stack.enter_context(torch.autocast(device, dtype=HALF[precision]))
        if parts > 1:
            stack.enter_context(Reordered(parts))
        made = run()
    return map_nest(made, lambda t: t.float() if t.dtype in HALF.values() else t)


def scaler(net: nn.Module, precision: str, batch: int) -> torch.amp.GradScaler:
    """For losses that are summed over a batch; one that does nothing unless gradients are in float16."""
    device = next((p.device.type for p in net.parameters()), "cpu")
    start = first_scale(batch)
    return torch.amp.GradScaler(device, start, growth_interval=PATIENCE, enabled=precision == "fp16")


class Reordered(TorchFunctionMode):
    """Within it, linear layers and 2-d convolutions make their outputs in parts, each the sum of parts of their inputs.

    In mixed precision every part is rounded by itself, in the forward as in the backward.
    """

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Replace the two functions, pass on all others."""
        kwargs = kwargs or {}
        weight: Any = args[1] if len(args) > 1 else None
        able = func in (F.linear, F.conv2d) and isinstance(weight, Tensor) and min(weight.shape[:2]) >= self.parts
        if not able or kwargs.get("groups", args[6] if len(args) > 6 else 1) != 1:
            return func(*args, **kwargs)
        dim = -1 if func is F.linear else -3
        x, bias = args[0], args[2] if len(args) > 2 else kwargs.pop("bias", None)
        rows, inputs = weight.tensor_split(self.parts), x.tensor_split(self.parts, dim)
        made = [
            reduce(add, [func(a, w, None, *args[3:], **kwargs) for a, w in zip(inputs, own, strict=True)])
            for own in (row.tensor_split(self.parts, 1) for row in rows)
        ]
        out = torch.cat(made, dim)
        if bias is None:
            return out
        return out + bias.to(out.dtype).view(-1, *[1] * (-1 - dim))
