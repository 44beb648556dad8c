"""What a network draws is keyed, whatever way it draws; what cannot be keyed is named and switched off."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paraxis.errors import TaskError
from paraxis.task.randomness import Draw, Keyed, KeyedFunctions, key_randomness
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

torch.set_num_threads(1)


class Functional(nn.Module):
    """F.dropout, twice, and once in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.a(x), 0.5, self.training)
        return F.dropout(self.b(F.dropout(x, training=self.training)), 0.2, self.training, inplace=True)


class Attention(nn.Module):
    """scaled_dot_product_attention with its own dropout."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.qkv, self.options = nn.Linear(8, 24), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        p = 0.4 if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, **self.options).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention of a sequence with itself."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


class SamplesSecond(nn.Module):
    """Time runs along the first dimension, samples along the second."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x.transpose(0, 1))).transpose(0, 1)


class Flattened(nn.Module):
    """Samples and time in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def prepared(net: nn.Module, x: Tensor) -> tuple[Keyed, Callable[[int, int], Tensor]]:
    """What became of a network's randomness, and its training forward on samples [first, first + count) of x."""
    draw = Draw(seed=3)

    def run(samples: int) -> Tensor:
        draw.at(5, 0, samples)
        return net(x[:samples]).square().mean()

    keyed = key_randomness(net.double(), draw, run, len(x))

    def forward(first: int, count: int) -> Tensor:
        draw.at(5, first, count)
        with torch.no_grad(), KeyedFunctions(draw):
            return net(x[first : first + count])

    return keyed, forward


def sequences(samples: int = 6, length: int = 5) -> Tensor:
    return torch.randn(samples, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class FunctionalSecond(SamplesSecond):
    """The same by F.dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x.transpose(0, 1)), 0.5, self.training).transpose(0, 1)


class Positions(nn.Module):
    """Dropout on a parameter, which has no samples: (length, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.drop = nn.Parameter(torch.ones(8, 8)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.places)[: x.shape[1]] + F.dropout(self.places, 0.5, self.training)[: x.shape[1]]


NETWORKS = {
    "nn.Dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.1)),
    "F.dropout": Functional,
    "attention": Attention,
    "causal attention": lambda: Attention(is_causal=True),
    "MultiheadAttention": lambda: SelfAttention(weights=False),
    "MultiheadAttention with weights": lambda: SelfAttention(weights=True),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True),
    "samples second": SamplesSecond,
    "flattened": Flattened,
    "F.dropout, samples second": lambda: nn.Sequential(nn.Linear(8, 8), FunctionalSecond()),
    "positions": Positions,
}


each = pytest.mark.parametrize("name", NETWORKS)


@each
def test_slices_of_samples_give_slices_of_the_whole(name: str) -> None:
    net, x = NETWORKS[name](), sequences()
    keyed, forward = prepared(net, x)
    assert keyed.switched_off == keyed.unkeyed == ()
    whole = forward(0, 6)
    for size in (1, 2, 3):
        parts = [forward(first, size) for first in range(0, 6, size)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(forward(0, 6), whole), "the same bits again"
    net.eval()
    assert not torch.allclose(forward(0, 6), whole), "dropout was on"


@each
def test_a_slice_as_long_as_another_dimension_is_no_exception(name: str) -> None:
    x = sequences(8, 4) if name != "flattened" else sequences(16, 4)
    _, forward = prepared(NETWORKS[name](), x)
    size = len(x) // 2
    torch.testing.assert_close(torch.cat([forward(0, size), forward(size, size)]), forward(0, len(x)))


def test_attention_without_dropout_is_left_to_the_framework() -> None:
    net, x = Attention(is_causal=True).eval(), sequences()
    _, forward = prepared(net, x)
    assert torch.equal(forward(0, 6), net(x))


OPTIONS = [{}, {"enable_gqa": True}, {"scale": 0.3}]


@pytest.mark.parametrize(
    "mask, options", [("none", {"is_causal": True}), *product(("none", "bool", "float"), OPTIONS)], ids=str
)
def test_attention_spelled_out_computes_what_the_framework_computes(mask: str, options: dict[str, object]) -> None:
    q = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2 if "enable_gqa" in options else 4, 5, 8, dtype=torch.float64)
    allowed = torch.rand(5, 5) > 0.3
    allowed[:, 0] = True
    masks = {"none": None, "bool": allowed, "float": torch.randn(5, 5, dtype=torch.float64)}
    options = options | {"attn_mask": masks[mask]}
    draw = Draw()
    draw.at(0, 0, 2)
    with KeyedFunctions(draw):  # a probability that rounds to none, so that only the arithmetic is compared
        ours = F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9, **options)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, **options), rtol=1e-12, atol=1e-12)


class Noise(nn.Module):
    """Adds noise, in training or always."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.always or self.training else x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def test_dropout_in_an_lstm_is_named_and_switched_off() -> None:
    net = Recurrent()
    keyed, forward = prepared(net, sequences())
    assert keyed.switched_off == ("lstm",) and keyed.unkeyed == ()
    assert not net.lstm.training and net.training
    assert torch.equal(forward(0, 6), forward(0, 6))


def test_noise_that_can_be_switched_off_is_and_other_noise_is_named() -> None:
    keyed, forward = prepared(nn.Sequential(nn.Linear(8, 8), Noise(always=False)), sequences())
    assert keyed.switched_off == ("1",) and keyed.unkeyed == ()
    assert torch.equal(forward(0, 6), forward(0, 6))
    keyed, _ = prepared(nn.Sequential(nn.Linear(8, 8), Noise(always=True)), sequences())
    assert keyed.switched_off == ("1",) and keyed.unkeyed == ("1",)


class NoiseAbove(Noise):
    """Noise of its own on top of a dropout that can be keyed."""

    def __init__(self) -> None:
        super().__init__(always=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x))


def test_only_the_module_that_draws_is_switched_off_and_what_it_holds_is_keyed() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), NoiseAbove()), sequences()
    keyed, forward = prepared(net, x)
    assert keyed.switched_off == ("1",) and keyed.unkeyed == ()
    assert [name for name, module in net.named_modules() if not module.training] == ["1"]
    whole = forward(0, 6)
    torch.testing.assert_close(torch.cat([forward(0, 2), forward(2, 4)]), whole)
    assert not torch.allclose(net.eval()(x), whole), "its dropout was on"


def test_parameters_that_the_loss_does_not_depend_on_are_told() -> None:
    used, unused = nn.Linear(8, 8), nn.Linear(8, 8)
    used.bias.requires_grad_(False)
    net = nn.Sequential(used, nn.Dropout(0.5))
    net.add_module("unused", unused)
    net.forward = lambda x: net[1](net[0](x))  # type: ignore[method-assign]
    keyed, _ = prepared(net, sequences())
    assert keyed.unreached == {id(unused.weight), id(unused.bias)}
    assert all(p.grad is None for p in net.parameters()), "no gradient is left behind"


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 5), nn.Linear(5, 3), nn.Dropout(0.5)
        self.position = nn.Parameter(torch.ones(1, 6))
    def forward(self, x):
        {body}
    def stages(self):
        return [self.a, self.b]

def net():
    return Net()
def batches():
    return [(torch.ones(8, 6), torch.arange(8) % 3)]
"""


def written(path: Path, body: str, stages: bool) -> TaskSpec:
    path.write_text(OWN.format(body=body) if stages else OWN.format(body=body).replace("def stages", "def parts"))
    return TaskSpec(network=str(path))


def test_noise_of_the_whole_network_does_not_break_the_task(tmp_path: Path) -> None:
    body = "return self.b(self.a(x + torch.randn_like(x) * self.training))"
    source = written(tmp_path / "noisy.py", body, stages=True)
    text = Path(source.network).read_text()
    Path(source.network).write_text(text.replace("        self.position = nn.Parameter(torch.ones(1, 6))\n", ""))
    task = make_task(source)
    assert task.keyed.switched_off == task.keyed.unkeyed == ("",), "it draws even so"
    assert [name for name, module in task.net.named_modules() if not module.training] == [""]


def test_dropout_of_what_has_no_samples_has_one_mask_for_all(tmp_path: Path) -> None:
    source = written(tmp_path / "position.py", "return self.b(self.a(x + self.drop(self.position)))", stages=False)
    task = make_task(source)
    assert task.keyed.switched_off == task.keyed.unkeyed == ()
    inputs = task.train.share(0, 0, 8)[0]
    outputs = []
    for first, count in ((0, 8), (0, 3), (5, 2)):
        task.draw.at(4, first, count)
        outputs.append(task.whole(inputs[:count]))
        assert torch.allclose(outputs[-1], outputs[0][0].expand(count, -1)), "the samples are all ones"
    task.draw.at(5, 0, 8)
    assert not torch.allclose(task.whole(inputs), outputs[0]), "another step, another mask"


class Recomputed(nn.Module):
    """Activation checkpointing around some layers."""

    def __init__(self, inner: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.inner, self.reentrant = nn.Linear(8, 8), inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)


DRAWN_AGAIN = r"is drawn again in the backward \(activation checkpointing\)"


@each
def test_recomputed_dropout_is_refused_in_words(name: str) -> None:
    with pytest.raises(TaskError, match=DRAWN_AGAIN):
        prepared(Recomputed(NETWORKS[name]()), sequences())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", NETWORKS)
def test_reentrantly_recomputed_dropout_is_refused_in_words(name: str) -> None:
    with pytest.raises(TaskError, match=DRAWN_AGAIN):
        prepared(Recomputed(NETWORKS[name](), reentrant=True), sequences())


class RecomputedFunction(Recomputed):
    """Recomputes a function: its dropout stands at no border of a module."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: F.dropout(self.inner(y), 0.5, self.training), x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_dropout_between_modules_is_refused_in_words(reentrant: bool) -> None:
    with pytest.raises(TaskError, match=DRAWN_AGAIN):
        prepared(RecomputedFunction(nn.Linear(8, 8), reentrant), sequences().requires_grad_())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_without_dropout_is_fine(reentrant: bool) -> None:
    keyed, _ = prepared(Recomputed(nn.Linear(8, 8), reentrant), sequences())
    assert keyed == Keyed()
