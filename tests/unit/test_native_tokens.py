"""The native engine on tokens: kernels agree with each other, layers with PyTorch; what does not fit is named."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_native_engine import EXACT, KERNELS, ROUNDING, WRONG, chosen, farthest, made, native, spec, team_of, weights
from torch import Tensor, nn

from paraxis.errors import PlanError
from paraxis.run import serial
from paraxis.task import gpt
from paraxis.task.spec import TaskSpec
from paraxis.task.task import Task, make_task

__all__ = ["chosen"]  # a fixture

# -- kernels against each other --------------------------------------------------------------------------------

SYMBOLS = 61


def layers_of(tokens: int, heads: int, size: int, **changed: Any) -> list[Any]:
    """A transformer of one block, every kind of layer in it; the last one uses the first one's table."""
    c = heads * size
    one, row, three, wide = (1, 1, 1), (1, 1, c), (1, 1, 3 * c), (1, 1, 2 * c + 1)
    square = {"kernel_h": 1, "kernel_w": 1}
    found = [
        spec("embedding", 1, one, row, entries=SYMBOLS),
        spec("position", 2, row, row, entries=tokens + 3),
        spec("layer_norm", 3, row, row),
        spec("affine", 4, row, three, **square),
        spec("attention", 5, three, row, heads=heads, entries=tokens, p=0.3, key=6),
        spec("dropout", 6, row, row, p=0.2, key=5),
        spec("residual", 7, row, row, skip=2),
        spec("affine", 8, row, wide, **square),
        spec("gelu_tanh", 9, wide, wide),
        spec("affine", 10, wide, row, **square),
        spec("gelu", 11, row, row),
        spec("affine", 12, row, (1, 1, SYMBOLS), bias=False, same=0, **square),
    ]
    for key, value in changed.items():
        name, number = key.rsplit("_", 1)
        setattr(found[int(number) - 1], name, value)
    return found


def stepped(layers: list[Any], tokens: int, samples: int, kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    """What one step with rate 1 from random weights changes, which is the gradient; the loss beside it."""
    dtype = np.float32 if kind == "Float" else np.float64
    ensemble, source = made(layers, samples, kind, tokens=tokens), np.random.default_rng(seed)
    inputs, targets = (source.integers(0, SYMBOLS, (samples, tokens)) for _ in range(2))
    for layer, part, count in ensemble.parts(0):
        values = (0.3 * source.standard_normal(count)).astype(np.float32)
        ensemble.put(0, layer, part, values.astype(dtype))
    before = weights(ensemble, dtype)
    losses = ensemble.run(0, [0], [1.0], inputs, targets, np.arange(samples), samples, 1.0)
    after = weights(ensemble, dtype)
    return {key: before[key] - after[key] for key in before} | {"loss": np.array(losses[0])}


SIZES = [(5, 1, 3, 7), (16, 2, 8, 2), (37, 2, 5, 3), (48, 3, 16, 1)]  # tokens, heads, size of a head, samples


@pytest.mark.parametrize("chosen", KERNELS, indirect=True)
def test_tables_of_kernels_agree_on_layers_of_tokens(chosen: str) -> None:
    for tokens, heads, size, samples in SIZES:
        layers = layers_of(tokens, heads, size)
        twin = stepped(layers, tokens, samples, "Double")
        assert farthest(stepped(layers, tokens, samples, "Float"), twin) < 5 * ROUNDING, (tokens, heads, size)
        assert farthest(stepped(layers, tokens, samples, "Float", seed=1), twin) > 100 * ROUNDING


@pytest.mark.parametrize("chosen", KERNELS, indirect=True)
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
def test_gelu_is_right_wherever_it_bends(kind: str, chosen: str) -> None:
    """Through a table of one column, whose gradient tells the slope at each of its entries."""
    square = {"kernel_h": 1, "kernel_w": 1, "bias": False}
    layers = [spec("embedding", 1, (1, 1, 1), (1, 1, 1), entries=81), spec(kind, 2, (1, 1, 1), (1, 1, 1))]
    layers.append(spec("affine", 3, (1, 1, 1), (1, 1, 2), **square))
    found = []
    for name, dtype in (("Double", np.float64), ("Float", np.float32)):
        ensemble = made(layers, 1, name, tokens=81)
        ensemble.put(0, "1", "weight", np.linspace(-10, 10, 81).astype(dtype))
        ensemble.put(0, "3", "weight", np.array([0.1, -0.1], dtype))
        before = weights(ensemble, dtype)
        ensemble.run(0, [0], [81.0], np.arange(81).reshape(1, -1), np.ones((1, 81), np.int64), np.arange(1), 1, 1.0)
        found.append(before["1.weight"] - weights(ensemble, dtype)["1.weight"])
    x = torch.linspace(-10, 10, 81, dtype=torch.float64, requires_grad=True)
    y = nn.GELU(approximate="none" if kind == "gelu" else "tanh")(x)
    loss = nn.functional.cross_entropy(
        torch.stack([0.1 * y, -0.1 * y], 1), torch.ones(81, dtype=torch.int64), reduction="sum"
    )
    (slope,) = torch.autograd.grad(loss, x)
    assert np.abs(found[0] - slope.numpy()).max() < EXACT
    assert np.abs(found[1] - slope.numpy()).max() < 2e-6


# -- each layer against PyTorch --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "cubes.txt"
    path.write_text(" ".join(str(n**3) for n in range(300)))
    return str(path)


def task_of(net: nn.Module, text: str, context: int, batch: int, **given: Any) -> Task:
    words = {"data": f"text:{text},context={context}", "batch": batch, "lr": 1.0, "momentum": 0.0} | given
    return make_task(TaskSpec(network="own", live=True, **words), {"net": net}, torch.float64)


def mismatch(net: nn.Module, *words: Any, **left_out: Any) -> float:
    """By how much one step with rate 1 differs from PyTorch's: of gradients and the loss."""
    team = team_of(task_of(net, *words, **left_out))
    team.steps(1)
    oracle = serial.replica(task_of(net, *words))
    losses = serial.emulate([oracle], 0, 1, 1, 1)
    found = team.state()
    apart = [float((found[key] - value).abs().max()) for key, value in oracle.task.net.state_dict().items()]
    return max(*apart, abs(team.losses[0][0] / team.losses[0][1] - losses[0]))


PARTS: dict[str, Callable[[gpt.Shape], list[nn.Module]]] = {
    "norm": lambda shape: [nn.LayerNorm(shape.width, eps=1e-3)],
    "linear": lambda shape: [nn.Linear(shape.width, 7, bias=False), nn.ReLU(), nn.Linear(7, shape.width)],
    "attention": lambda shape: [gpt.Attention(shape)],
    "mlp": lambda shape: [gpt.MLP(shape), nn.Sigmoid()],
    "block": lambda shape: [gpt.Block(shape)],
    "drawing block": lambda shape: [gpt.Block(replace(shape, dropout=0.3))],
    "gelu": lambda shape: [nn.GELU(), nn.Linear(shape.width, shape.width)],
    "dropout": lambda shape: [nn.Dropout(0.4)],
    "tanh": lambda shape: [nn.Tanh(), nn.Identity()],
}


class Stages(nn.Module):
    """Modules one after the other, which a pipeline may cut anywhere."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def stages(self) -> list[nn.Module]:
        return list(self.parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def network(shape: gpt.Shape, names: list[str], tied: bool, places: bool) -> nn.Module:
    symbols, out = nn.Embedding(256, shape.width), nn.Linear(shape.width, 256, bias=False)
    if tied:
        out.weight = symbols.weight
    first = gpt.Embed(symbols, nn.Embedding(shape.context, shape.width), nn.Identity()) if places else symbols
    return Stages(
        first, *(part for name in names for part in PARTS[name](shape)), nn.Sequential(nn.LayerNorm(shape.width), out)
    )


@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 35)),
    st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=2),
    *(st.booleans() for _ in range(2)),
    st.integers(1, 5),
)
def test_layers_of_tokens_have_pytorchs_gradient(
    text: str, sizes: tuple[int, int, int], names: list[str], tied: bool, places: bool, batch: int
) -> None:
    heads, size, context = sizes
    torch.manual_seed(batch)
    net = network(gpt.Shape(1, heads * size, heads, context + 2), names, tied, places)
    assert mismatch(net, text, context, batch) < EXACT


@pytest.mark.parametrize("name", sorted(PARTS))
def test_each_layer_of_tokens_alone(name: str, text: str) -> None:
    assert mismatch(network(gpt.Shape(1, 12, 3, 21), [name], True, True), text, 21, 3) < EXACT


def test_another_rate_or_other_masks_are_seen(text: str) -> None:
    net = network(gpt.Shape(1, 8, 2, 9), ["dropout", "drawing block"], True, True)
    assert mismatch(net, text, 9, 4) < EXACT
    assert mismatch(net, text, 9, 4, lr=0.999) > WRONG and mismatch(net, text, 9, 4, seed=1) > WRONG


# -- what it refuses -------------------------------------------------------------------------------------------


def flattening() -> nn.Module:
    return Stages(nn.Embedding(256, 4), nn.Flatten(2), nn.Linear(4, 256))


def hooked() -> nn.Module:
    net = network(gpt.Shape(1, 8, 2, 9), ["block"], False, True)
    net.parts[1].attn.register_forward_hook(lambda module, args, output: 2 * output)  # type: ignore
    return net


def tied_with_a_bias() -> nn.Module:
    net = Stages(nn.Embedding(256, 6), nn.Linear(6, 256))
    net.parts[1].weight = net.parts[0].weight  # type: ignore[union-attr]
    return net


def tied_linears() -> nn.Module:
    a, b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    b.weight = a.weight
    return Stages(nn.Embedding(256, 6), a, nn.Tanh(), b, nn.Linear(6, 256))


class Strange(gpt.MLP):
    """A part with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def strange() -> nn.Module:
    net = network(gpt.Shape(1, 8, 2, 9), ["block"], False, True)
    net.parts[1].mlp = Strange(gpt.Shape(1, 8, 2, 9))  # type: ignore[union-attr]
    return net


def padded() -> nn.Module:
    return Stages(nn.Embedding(256, 6, padding_idx=0), nn.Linear(6, 256))


class Dropping(gpt.Head):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def dropping() -> nn.Module:
    return Stages(nn.Embedding(256, 6), Dropping(nn.LayerNorm(6), nn.Linear(6, 256)))


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "parts.1 (Flatten): it needs samples that are no sequences": flattening,
    "parts.1.attn (Attention): it needs no hooks": hooked,
    "1 (Linear): it needs parameters of its own": tied_with_a_bias,
    "3 (Linear): it needs parameters of its own": tied_linears,
    "mlp (Strange)": strange,
    "0 (Embedding): it needs no padding_idx": padded,
    "the randomness of nn.Dropout and of gpt's attention only": dropping,
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_it_cannot_take_is_named_in_one_line(named: str, text: str) -> None:
    with pytest.raises(PlanError) as caught:
        team_of(task_of(REFUSED[named](), text, 9, 4))
    assert named in str(caught.value) and "engine=native" in str(caught.value) and "\n" not in str(caught.value)


WRONG_LAYERS: dict[str, dict[str, Any]] = {
    "it is no layer of such samples": {"kind_3": "batch_norm"},
    "1: it is no layer of such samples": {"kind_1": "affine"},
    "it has fewer tokens": {"entries_2": 8},
    "attention takes queries": {"heads_5": 3},
    "cannot use the parameters of that layer": {"same_12": 3},
}


@pytest.mark.parametrize("said", WRONG_LAYERS)
def test_cpp_refuses_layers_that_do_not_fit(said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(layers_of(9, 2, 4, **WRONG_LAYERS[said]), 3, tokens=9)
    with pytest.raises(ValueError, match="it is no layer of such samples"):
        made(layers_of(9, 2, 4), 3)


X = np.zeros((3, 9), np.int64)
ARRAYS: dict[str, tuple[Any, Any]] = {
    "token 61 is none of 61 symbols": (X + 61, X),
    "token -1 is none of 61 symbols": (X - 1, X),
    "label 61 is none of 61 classes": (X, X + 61),
    "must be a contiguous array of int64": (X.astype(np.float32), X),
    "have another shape": (X[:, :8].copy(), X),
    "out of range": (X[:2].copy(), X[:2].copy()),
}


@pytest.mark.parametrize("said", ARRAYS)
def test_wrong_tokens_are_refused_and_nothing_is_trained(said: str) -> None:
    ensemble = made(layers_of(9, 2, 4), 3, tokens=9)
    before = weights(ensemble, np.float32)
    with pytest.raises(ValueError, match=said):
        ensemble.run(0, [0], [1.0], *ARRAYS[said], np.arange(3), 3, 1.0)
    assert all(np.array_equal(value, before[key]) for key, value in weights(ensemble, np.float32).items())
    assert native.BUFFERS.count("tied") == 1
