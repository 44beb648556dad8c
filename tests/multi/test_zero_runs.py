"""ZeRO between real processes: proved, trained, saved and evaluated."""

from typing import Any

import pytest
from safetensors.torch import load_file

NETWORK = ("mlp:20-16-4", "--data", "synthetic:512,20,4", "--lr", "0.1")
OWN = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

def optimizer(parameters):
    return torch.optim.RMSprop(parameters, lr=0.01)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        "dp=2,zero=3,microbatches=2,bucket_bytes=512,comm=gloo",
        pytest.param("dp=2,zero=1,comm=mpi", marks=pytest.mark.slow),
        pytest.param("dp=2,zero=3,microbatches=2,bucket_bytes=512,comm=mpi", marks=pytest.mark.slow),
        pytest.param("dp=2,pp=2,zero=2,microbatches=2,bucket_bytes=512,comm=mpi", marks=pytest.mark.slow),
        pytest.param("dp=4,zero=3,bucket_bytes=512,comm=gloo", marks=pytest.mark.slow),
    ],
)
def test_shares_are_proved_on_their_ranks(desk: Any, plan: str) -> None:
    done = desk.run("verify", *NETWORK, "--clip", "0.5", "--plan", plan, "--steps", 4, "--json")
    assert done.rc == 0, done.err + done.out
    (result,) = done.document["results"]
    assert result["verified"]["passed"] and result["verified"]["max_relative_difference"] < 1e-10


@pytest.mark.slow
def test_what_is_trained_in_shares_is_saved_whole(desk: Any) -> None:
    """The same weights and score as whole replicas', up to the order of sums; every rank takes part in saving."""
    found = {}
    for number, plan in enumerate(("dp=2,comm=gloo", "dp=2,zero=3,bucket_bytes=512,comm=gloo")):
        out = f"run-{number}"
        done = desk.run("train", *NETWORK, "--validation", "0.2", "--plan", plan, "--epochs", 1, "--out", out, "--json")
        assert done.rc == 0, done.err
        weights = load_file(desk.folder / done.document["weights"])
        found[plan] = done.document["epochs"][0]["validation"]["accuracy"], weights
    (score, right), (other, weights) = found.values()
    assert score == pytest.approx(other, abs=0.02)
    assert set(weights) == set(right)
    assert all((weights[name] - right[name]).abs().max() < 1e-5 for name in right)
    assert max(weights[name].abs().max() for name in right) > 0.1


@pytest.mark.slow
def test_an_optimiser_of_ones_own_is_refused_in_one_line(desk: Any) -> None:
    path = desk.write("own.py", OWN)
    words = ("--data", "synthetic:64,6,3", "--batch", 16, "--plan", "dp=2,zero=1,comm=gloo", "--steps", 1)
    desk.run("verify", path, *words).refused("RMSprop needs whole parameters", "SGD, Adam and AdamW take shares")
