"""What the native engine cannot do it says, in one line and before it trains; so it does where it is not built."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_native_engine import EXACT, linear, live, made, mismatch, samples_of, team_of, weights
from torch import nn

from paraxis.engine import native_engine
from paraxis.errors import Diverged, MissingError, PlanError
from paraxis.run.duties import Duties
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

# -- what it refuses -------------------------------------------------------------------------------------------

IMAGE, ROW = (2, 6, 6), (6,)


def images(*front: nn.Module, features: int = 72) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(features, 3)), IMAGE


def rows(*front: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(6, 6), *front, nn.Linear(6, 3)), ROW


def frozen() -> tuple[nn.Module, tuple[int, ...]]:
    net, shape = rows(nn.Tanh())
    net[0].requires_grad_(False)  # type: ignore[index, operator]
    return net, shape


REFUSED = {
    "0 (Conv2d)": lambda: images(nn.Conv2d(2, 2, 1, groups=2)),
    "1 (Conv2d)": lambda: images(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=2, dilation=2)),
    "0 (Conv2d): it needs one stride": lambda: images(nn.Conv2d(2, 2, 3, padding="same")),
    "0 (Conv2d): it needs groups=1": lambda: images(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")),
    "0 (MaxPool2d)": lambda: images(nn.MaxPool2d((2, 3)), features=12),
    "1 (AvgPool2d)": lambda: images(nn.ReLU(), nn.AvgPool2d(4, ceil_mode=True), features=8),
    "0 (AdaptiveAvgPool2d)": lambda: images(nn.AdaptiveAvgPool2d(2), features=8),
    "0 (ConvTranspose2d)": lambda: images(nn.ConvTranspose2d(2, 2, 1)),
    "1 (BatchNorm1d)": lambda: rows(nn.BatchNorm1d(6, affine=False)),
    "1 (LayerNorm)": lambda: rows(nn.LayerNorm(6, elementwise_affine=False)),
    "1 (Softplus)": lambda: rows(nn.Softplus(), nn.ELU()),  # the first of them
    "1 (ELU)": lambda: rows(nn.ELU(), nn.Softplus()),
    "0 (Linear)": frozen,
    "a ReLU cannot be the last layer": lambda: (nn.Sequential(nn.Linear(6, 3), nn.ReLU()), ROW),
}


@pytest.mark.parametrize("named", REFUSED)
def test_the_first_layer_that_it_cannot_take_is_named_in_one_line(named: str) -> None:
    net, shape = REFUSED[named]()
    with pytest.raises(PlanError) as caught:
        team_of(live(net, samples_of(shape, 8)))
    assert named in str(caught.value) and "engine=native" in str(caught.value) and "\n" not in str(caught.value)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x[:, None])[0][:, -1])


OWN = {
    "Recurrent": ({"net": Recurrent()}, "own"),
    "not a loss of yours": ({"loss": lambda out, batch: (out.square().sum(), len(out))}, "own"),
    "not a inputs of yours": ({"inputs": lambda batch: batch[0]}, "own"),
    "SGD, Adam and AdamW": ({"optimizer": lambda parameters: torch.optim.Rprop(parameters)}, "own"),
}


@pytest.mark.parametrize("said", OWN)
def test_what_a_recipe_brings_and_cpp_has_not_is_named(said: str) -> None:
    objects = {"net": rows(nn.Tanh())[0], "batches": [samples_of(ROW, 8)]} | OWN[said][0]
    with pytest.raises(PlanError, match=said):
        team_of(make_task(TaskSpec(network="own", live=True), objects))


# -- what it must not take and compute wrongly -----------------------------------------------------------------


def tied() -> nn.Module:
    twice = nn.Linear(6, 6)
    return nn.Sequential(twice, nn.Tanh(), twice, nn.Tanh(), nn.Linear(6, 3))


def tied_weight() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    net[2].weight = net[0].weight
    return net


def resting(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), layer.eval(), nn.Linear(6, 3))


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    return net


def wide_window() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(18), nn.Flatten(), nn.Linear(2, 3))


class Doubled(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(6, 6), Doubled(nn.Linear(6, 3))])

    def stages(self) -> list[nn.Module]:
        return list(self.parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts[1](self.parts[0](x))


SILENT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ends in sigmoid": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Sigmoid()), ROW),
    "ends in tanh": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh()), ROW),
    "ends in a ReLU of its own": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.ReLU()), ROW),
    "one layer twice": (tied, ROW),
    "one weight twice": (tied_weight, ROW),
    "batch norm in eval mode": (lambda: resting(nn.BatchNorm1d(6)), ROW),
    "dropout in eval mode": (lambda: resting(nn.Dropout(0.5)), ROW),
    "hook": (hooked, ROW),
    "window of more than 256 places": (wide_window, (2, 18, 18)),
    "Sequential with a forward of its own": (Parts, ROW),
}


@pytest.mark.parametrize("name", SILENT)
def test_odd_networks_are_right_or_refused(name: str) -> None:
    make, shape = SILENT[name]
    net, batch = make(), samples_of(shape, 16)
    try:
        apart = mismatch(net, batch)
    except PlanError:
        return
    assert apart < EXACT


FINE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ends in GELU": (lambda: nn.Sequential(nn.Linear(6, 3), nn.GELU()), ROW),
    "ends in batch norm": (lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), ROW),
    "ends in dropout": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.3)), ROW),
    "ReLU first and twice": (
        lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.ReLU(), nn.Linear(5, 3)),
        ROW,
    ),
    "ends in a pool": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGE),
}


@pytest.mark.parametrize("name", FINE)
def test_odd_ends_are_right(name: str) -> None:
    make, shape = FINE[name]
    assert mismatch(make(), samples_of(shape, 16)) < EXACT


# -- arrays that do not fit ------------------------------------------------------------------------------------

X, Y, INDEX = np.ones((10, 6), np.float32), np.arange(10) % 3, np.arange(8)
# inputs, targets, index, batch, bodies, rates
WRONG_ARRAYS: dict[str, tuple[Any, ...]] = {
    "out of range": (X, Y, INDEX + 3, 8, [0], [1.0]),
    "number is out of range": (X, Y, INDEX - 1, 8, [0], [1.0]),
    "another shape": (X[:, :5].copy(), Y, INDEX, 8, [0], [1.0]),
    "have another shape": (X[:9], Y, INDEX, 8, [0], [1.0]),
    "network's own type": (X.astype(np.float64), Y, INDEX, 8, [0], [1.0]),
    "a contiguous array": (np.asfortranarray(X), Y, INDEX, 8, [0], [1.0]),
    "no whole number of batches": (X, Y, INDEX[:7], 8, [0], [1.0]),
    "whole number": (X, Y, INDEX, 0, [0], [1.0]),
    "fewer batches": (X, Y, INDEX, 8, [0, 0], [1.0, 1.0]),
    "or rates than steps": (X, Y, np.tile(INDEX, 2), 8, [0, 0], [1.0]),
}


@pytest.mark.parametrize("said", [*WRONG_ARRAYS, "class"])
def test_wrong_arrays_are_refused_and_nothing_is_trained(said: str) -> None:
    """A label beyond the classes lies within the padding of the output here: wrong, and harmless to the test."""
    more = {"class": (X, Y + 1, INDEX, 8, [0], [1.0])}
    inputs, targets, index, batch, bodies, rates = (WRONG_ARRAYS | more)[said]
    ensemble = made([linear(6, 3)], 8)
    before = weights(ensemble, np.float32)
    with pytest.raises(ValueError, match=said):
        ensemble.run(0, bodies, rates, inputs, targets, index, batch, 1.0)
    assert all(np.array_equal(value, before[key]) for key, value in weights(ensemble, np.float32).items())
    ensemble.run(0, [0], [1.0], X, Y, INDEX, 8, 1.0)
    assert not all(np.array_equal(value, before[key]) for key, value in weights(ensemble, np.float32).items())


def test_fractions_are_no_numbers_of_samples() -> None:
    with pytest.raises((TypeError, ValueError)):
        made([linear(6, 3)], 8).run(0, [0], [1.0], X, Y, INDEX + 0.5, 8, 1.0)


def test_weights_of_another_size_are_refused() -> None:
    ensemble = made([linear(6, 3)], 8)
    before = weights(ensemble, np.float32)
    for part, count in (("weight", 17), ("bias", 4), ("running_mean", 3)):
        with pytest.raises(ValueError, match=f"1.{part} has another size or is not there"):
            ensemble.put(0, "1", part, np.ones(count, np.float32))
    with pytest.raises(KeyError):
        ensemble.put(0, "2", "weight", np.ones(18, np.float32))
    assert all(np.array_equal(value, before[key]) for key, value in weights(ensemble, np.float32).items())


# -- loading ---------------------------------------------------------------------------------------------------

TORCH_WORKS = "import torch; torch.set_num_threads(2); x = torch.ones(300, 300); assert (x @ x)[0, 0] == 300"
LOAD = "from paraxis.engine.native_engine import extension; extension().kernels()"
MAPS = "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}, sep='\\n')"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("order", [(TORCH_WORKS, LOAD), (LOAD, TORCH_WORKS), ("import paraxis._native", TORCH_WORKS)])
def test_there_is_one_openmp_whoever_is_imported_first(order: tuple[str, str]) -> None:
    script = "\n".join([*order, MAPS])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert len(done.stdout.split()) == 1, done.stdout


def test_a_missing_extension_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = native_engine.find_spec
    monkeypatch.setattr(native_engine, "find_spec", lambda name: None if "_native" in name else find(name))
    native_engine.extension.cache_clear()
    with pytest.raises(MissingError, match=r"install a C\+\+ compiler .* pip install again; engine=torch needs none"):
        team_of(live(*odd_row()))
    monkeypatch.undo()
    assert native_engine.extension().OPS


def odd_row() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(6, 3)), samples_of(ROW, 8)


# -- a loss that is no number ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_loss_that_is_no_number_names_its_step(engine: str) -> None:
    """Fast kernels must not turn NaN into the 0 of a ReLU: both engines see it in the same step."""
    duties = Duties("solo")
    settings = {"network": "mlp:6-5-3", "data": "synthetic:64,6,3", "batch": 16, "lr": 1e30}
    duties.take_task({"spec": settings}, b"", print)
    words = {"key": "t", "plan": f"engine={engine}", "dtype": "float32", "cpus": []}
    duties.setup(words, b"", print)
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) on rank 0 in step 2: lower lr or clip gradients"):
        duties.train({"key": "t", "steps": 6}, b"", print)
    duties.take_task({"spec": settings | {"lr": 0.1}}, b"", print)
    duties.setup(words, b"", print)
    assert len(duties.train({"key": "t", "steps": 6}, b"", print)["losses"]) == 6
