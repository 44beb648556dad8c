"""I and W apart: the same gradients as one backward, the weights' only in W, and nothing of it where others watch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paraxis.engine.parted import Parting, part

KEY = (0, 3)


class Own(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


class Twice(nn.Module):
    """One layer, used twice, deep inside of a user's module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"same": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        same = self.inner["same"]
        return x + F.gelu(same(same(x)))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear of a sequence": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "linear of one sample": (lambda: nn.Linear(6, 4), (6,)),
    "nested": (Twice, (5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, stride=2, dilation=2, padding=(1, 2)), (2, 2, 9, 8)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "several": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)), (5, 6)),
}


def parted(module: nn.Module) -> Parting:
    parting = Parting()
    for inner in module.modules():
        part(inner, parting)
    return parting


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(found: list[Any], wanted: list[Any]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_i_and_w_make_what_one_backward_makes(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    module = make().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    module(x).square().sum().backward()
    wanted, upstream = gradients(module), x.grad
    module.zero_grad()
    x.grad = None
    parting = parted(module)
    out = module(x).square().sum()
    with parting.keeping(KEY):
        out.backward()
    assert upstream is not None and x.grad is not None and torch.equal(x.grad, upstream), "I makes the input's"
    early = [p.grad is not None for layer in module.modules() for p in layer.parameters(recurse=False)]
    kinds = [type(layer) for layer in module.modules() for _ in layer.parameters(recurse=False)]
    assert early == [kind is nn.LayerNorm for kind in kinds], "W's are left"
    parting.finish(KEY)
    assert same(gradients(module), wanted) and not parting.kept
    module(x).square().sum().backward()
    assert same(gradients(module), [2 * g for g in wanted]), "outside of an I all of a backward is made, and added"


def test_microbatches_are_kept_apart_and_let_go() -> None:
    module = nn.Linear(3, 2).double()
    parting, xs = parted(module), torch.randn(2, 4, 3, dtype=torch.float64)
    outs = [module(x).sum() for x in xs]
    for m, out in enumerate(outs):
        with parting.keeping((0, m)):
            out.backward()
    assert sorted(parting.kept) == [(0, 0), (0, 1)]
    parting.finish((0, 1))
    assert module.weight.grad is not None and torch.allclose(module.weight.grad[0], xs[1].sum(0))
    parting.finish((0, 0))
    assert torch.allclose(module.weight.grad[0], xs.sum((0, 1)))
    with pytest.raises(KeyError):
        parting.finish((0, 0))


def test_a_frozen_weight_and_a_leaf_input_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for p in module[1].parameters():
        p.requires_grad_(False)
    parting = parted(module)
    out = module(torch.randn(2, 3)).sum()
    with parting.keeping(KEY):
        out.backward()
    assert len(parting.kept[KEY]) == 1, "only the first has weights to be trained"
    parting.finish(KEY)
    assert module[0].weight.grad is not None and module[1].weight.grad is None


@pytest.mark.parametrize("watch", ["forward", "full_backward", "weight", "own forward", "subclass", "circular"])
def test_a_layer_that_others_watch_is_left_alone(watch: str) -> None:
    module: Any = Own(3, 3) if watch == "subclass" else nn.Linear(3, 3)
    x = torch.randn(2, 3, 3, requires_grad=True)
    if watch == "forward":
        module.register_forward_hook(lambda *_: None)
    elif watch == "full_backward":
        module.register_full_backward_hook(lambda *_: None)
    elif watch == "weight":
        module.weight.register_hook(lambda g: g * 2)
    elif watch == "own forward":
        module.forward = lambda x: F.linear(x, module.weight.sin(), module.bias)
    elif watch == "circular":
        module = nn.Conv1d(3, 3, 2, padding=1, padding_mode="circular")
    own = vars(module).get("forward")
    parting = parted(module)
    assert vars(module).get("forward") is own
    with parting.keeping(KEY):
        module(x).sum().backward()
    assert module.weight.grad is not None and parting.kept == {KEY: []}, "its gradient comes in I"


def test_evaluation_takes_the_layers_own_forward_and_mixed_precision_parts_in_its_own() -> None:
    module, x = nn.Linear(3, 3), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        own = module(x)
    own.float().square().sum().backward()
    assert module.weight.grad is not None and own.dtype is torch.bfloat16
    alone, module.weight.grad = module.weight.grad, None
    parting = parted(module)
    with torch.no_grad():
        assert module(x).grad_fn is None
    with parting.keeping(KEY):
        with torch.autocast("cpu", torch.bfloat16):
            made = module(x)
        made.float().square().sum().backward()
    assert torch.equal(made, own) and module.weight.grad is None
    parting.finish(KEY)
    assert torch.allclose(module.weight.grad, alone, rtol=1e-2)
