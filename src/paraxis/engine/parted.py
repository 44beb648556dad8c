"""A backward in two halves: I makes the gradient of the input, W later that of the weights, from what I has kept.

Linear layers and convolutions, wherever they stand in a user's modules, keep (input, gradient of the output) in I; all
others make their weights' gradient there, as does a layer with hooks or with a forward of its own. Asking autograd
twice instead would compute the chain of input gradients twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from paraxis.program.instructions import Program

Key = tuple[int, int]  # (segment, microbatch)
Gradients = Callable[[Tensor, Tensor, Tensor, Sequence[bool]], Sequence[Tensor | None]]
CONVOLUTIONS: dict[type, Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Parting:
    """What the layers of a stage have kept for the W of each (segment, microbatch); `key` while an I is computed."""

    key: Key | None = None
    kept: dict[Key, list[Callable[[], None]]] = field(default_factory=dict)

    @contextmanager
    def keeping(self, key: Key) -> Iterator[None]:
        """Layers keep what they need for W, in place of computing it."""
        self.key = key
        self.kept[key] = []
        try:
            yield
        finally:
            self.key = None

    def finish(self, key: Key) -> None:
        """Compute what was left, and let go what it was kept for."""
        for compute in self.kept.pop(key):
            compute()

    def clear(self) -> None:
        """Forget all microbatches in flight."""
        self.key = None
        self.kept.clear()


class _Parted(torch.autograd.Function):
    """A layer with weights whose backward may leave their gradient for later; outside of an I it makes all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: "Layer") -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        return layer.compute(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        layer, parting = ctx.layer, ctx.layer.parting
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if parting.key is None:
            return *layer.gradients(gradient, x, weight, wanted), None
        if wanted[1] or wanted[2]:
            parting.kept[parting.key].append(partial(layer.add, gradient, x.detach(), (False, *wanted[1:])))
        upstream = layer.gradients(gradient, x, weight, (True, False, False))[0] if wanted[0] else None
        return upstream, None, None, None


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer or a convolution: what it computes, and its gradients of (input, weight, bias), those wanted."""

    module: Any
    parting: Parting
    own: Callable[[Tensor], Tensor]  # its forward, as it was
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gradients: Gradients
    dims: int  # of a batched input; 0: any

    def __call__(self, x: Tensor) -> Tensor:
        """The module's forward; its own where no I follows."""
        if not torch.is_grad_enabled() or (self.dims and x.ndim != self.dims):
            return self.own(x)
        given: Sequence[Any] = x, self.module.weight, self.module.bias
        if torch.is_autocast_enabled(kind := x.device.type):  # which does not look into what autograd calls
            dtype = torch.get_autocast_dtype(kind)
            given = tuple(t if t is None else t.to(dtype) for t in given)
        made: Tensor = _Parted.apply(*given, self)
        return made

    def add(self, gradient: Tensor, x: Tensor, wanted: Sequence[bool]) -> None:
        """W: what autograd would have added to the gradients of weight and bias."""
        weight = self.module.weight
        if weight.dtype != x.dtype or not weight.untyped_storage().nbytes():  # of another type, or let go by ZeRO 3
            weight = x.new_empty(()).expand(weight.shape)  # W asks it for its shape only
        with torch.no_grad():
            made = self.gradients(gradient, x, weight, wanted)
            for p, value in zip((self.module.weight, self.module.bias), made[1:], strict=True):
                if value is not None:
                    p.grad = value.to(p.dtype) if p.grad is None else p.grad.add_(value)


def _linear(gradient: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    rows = gradient.reshape(-1, gradient.shape[-1])
    return (
        gradient @ weight if wanted[0] else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    )


def _convolution(
    module: Any, gradient: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    outside = [0] * len(module.padding)
    like = module.stride, module.padding, module.dilation, False, outside, module.groups
    sizes = [weight.shape[0]] if wanted[2] else None
    made: Sequence[Tensor | None] = torch.ops.aten.convolution_backward(gradient, x, weight, sizes, *like, list(wanted))
    return [value if want else None for value, want in zip(made, wanted, strict=True)]


def parting_for(program: Program, stage: int, segments: Sequence[Sequence[nn.Module]]) -> Parting | None:
    """Of a stage whose program has I and W apart: its layers are told to keep; None for all other stages."""
    if not program.parted(stage):
        return None
    parting = Parting()
    for module in {m: None for segment in segments for layer in segment for m in layer.modules()}:
        part(module, parting)
    return parting


def can_part(module: Any) -> bool:
    """Whether it is a linear layer or a convolution that nobody watches, but for what counts its draws of masks."""
    if type(module) is not nn.Linear and type(module) not in CONVOLUTIONS:
        return False
    parameters = [p for p in (module.weight, module.bias) if p is not None]
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    watched = any(not str(getattr(hook, "__module__", "")).startswith("paraxis.") for hook in hooks)
    watched |= "forward" in vars(module)
    watched |= any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
    return not watched and all(type(p) is nn.Parameter for p in parameters)


def part(module: Any, parting: Parting) -> None:
    """Replace the forward of a layer that can part its backward; leave any other, and one that others watch, alone."""
    kind: type = type(module)
    if not can_part(module):
        return
    if kind is nn.Linear:
        module.forward = Layer(module, parting, module.forward, F.linear, _linear, dims=0)
    elif module.padding_mode == "zeros" and not isinstance(module.padding, str):
        like = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
        compute, gradients = partial(CONVOLUTIONS[kind], **like), partial(_convolution, module)
        module.forward = Layer(module, parting, module.forward, compute, gradients, dims=module.weight.ndim)
