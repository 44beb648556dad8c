"""Update rules: pure functions on flat buffers that compute what torch.optim computes, one call a range.

The hyperparameters come from a torch optimiser's groups, so that any torch scheduler can change them. An optimiser
that has no rule here runs itself on the same buffers (`native`).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
State = dict[str, Tensor]


@dataclass
class Hyper:
    """The hyperparameters of every parameter group (as a torch optimiser's `param_groups`), and how they change.

    `rule` computes the update; "native" lets `optimizer` do it. The rate follows `scheduler`, or `factor(step)` times
    its first value. A torch optimiser is only made for a user who brings one: its first use costs 2 s of imports.
    """

    rule: str
    groups: list[Group]
    optimizer: torch.optim.Optimizer | None = None
    scheduler: Any = None
    factor: Callable[[int], float] | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        self.rates = [group["lr"] for group in self.groups]
        self._follow()

    def advance(self) -> None:
        """The learning rate of the next step."""
        self.steps += 1
        if self.scheduler is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it wants to see optimizer.step(), which our rule replaces
                self.scheduler.step()
        self._follow()

    def _follow(self) -> None:
        if self.factor is not None:
            for group, rate in zip(self.groups, self.rates, strict=True):
                group["lr"] = rate * self.factor(self.steps)


def of_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any) -> Hyper:
    """The user's own optimiser and scheduler."""
    return Hyper(plain(optimizer), optimizer.param_groups, optimizer, scheduler)


def plain(optimizer: torch.optim.Optimizer) -> str:
    """The rule for an optimiser: "sgd", "adam", or "native" for one that must run itself."""
    flags = ("maximize", "amsgrad", "differentiable", "capturable")
    odd = any(group.get(flag) for group in optimizer.param_groups for flag in flags)
    odd = odd or any(group.get("dampening") for group in optimizer.param_groups)
    odd = odd or any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
    kind = type(optimizer)
    if odd or kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        return "native"
    return "sgd" if kind is torch.optim.SGD else "adam"


def sgd(w: Tensor, g: Tensor, state: State, group: Group, scale: float | Tensor) -> None:
    """SGD with momentum, Nesterov and weight decay (as torch.optim.SGD); the gradient is `scale` times g. Alters g."""
    lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
    if not momentum and not decay and not isinstance(scale, Tensor):
        w.add_(g, alpha=-lr * scale)
        return
    g.mul_(scale)
    if decay:
        g.add_(w, alpha=decay)
    if momentum:
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(g)
        buffer = state["momentum"].mul_(momentum).add_(g)
        g = g.add_(buffer, alpha=momentum) if group["nesterov"] else buffer
    w.add_(g, alpha=-lr)


def adam(w: Tensor, g: Tensor, state: State, group: Group, scale: float | Tensor) -> None:
    """Adam, or AdamW where the decay is decoupled (Kingma and Ba 2015; Loshchilov and Hutter 2019). Alters g."""
    lr, decay, eps = float(group["lr"]), group["weight_decay"], group["eps"]
    beta1, beta2 = group["betas"]
    if not state:
        state |= {"first": torch.zeros_like(g), "second": torch.zeros_like(g), "step": torch.zeros(())}
    state["step"] += 1
    step = int(state["step"])
    if in_one(w):
        adam_in_one(w, g, state, group, w.new_full((), step), lr, scale)
        return
    g.mul_(scale)
    if decay and group.get("decoupled_weight_decay"):
        w.mul_(1 - lr * decay)
    elif decay:
        g.add_(w, alpha=decay)
    state["first"].lerp_(g, 1 - beta1)
    state["second"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = (state["second"].sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    w.addcdiv_(state["first"], root, value=-lr / (1 - beta1**step))


def in_one(w: Tensor) -> bool:
    """Whether Adam's step is one kernel: on a GPU, which takes longer to go over the memory than to compute."""
    return w.is_cuda and w.dtype == torch.float32


def adam_in_one(
    w: Tensor, g: Tensor, state: State, group: Group, step: Tensor, lr: float | Tensor, scale: float | Tensor
) -> None:
    """`adam` by PyTorch's fused kernel; `step` and, as tensors, `lr` and `scale` are () float32 where w lies."""
    kernel = torch._fused_adamw_ if group.get("decoupled_weight_decay") else torch._fused_adam_
    beta1, beta2 = group["betas"]
    over = (
        scale.reciprocal().to(w.dtype) if isinstance(scale, Tensor) else w.new_full((), 1.0 / scale)
    )  # it divides by it
    rest = {"beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"], "eps": group["eps"]}
    lists: tuple[list[Tensor], ...] = [w], [g], [state["first"]], [state["second"]], [], [step]
    kernel(*lists, lr=lr, amsgrad=False, maximize=False, grad_scale=over, found_inf=None, **rest)


RULES = {"sgd": sgd, "adam": adam}
