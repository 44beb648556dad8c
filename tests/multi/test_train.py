"""`paraxis train` with real ranks: what is trained and saved is what a loop written by hand would give."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from paraxis.task.data import load
from paraxis.task.networks import build

OWN = """
import torch
from torch import nn

def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

def batches():
    x = torch.randn(5, 16, 6, generator=torch.Generator().manual_seed(0))
    return [(part, part[:, :3].argmax(1)) for part in x]
"""
SYNTHETIC = ("mlp:20-16-4", "--data", "synthetic:2048,20,4", "--lr", "0.1")


def train(desk: Any, *words: object, limit: float = 120) -> dict[str, Any]:
    """The document of a training run that must end well."""
    done = desk.run("train", *words, "--json", limit=limit)
    assert done.rc == 0, done.err
    return done.document


def weights(desk: Any, document: dict[str, Any]) -> dict[str, Tensor]:
    """What has been saved; nothing else lies beside it."""
    path = desk.folder / document["weights"]
    assert [p.name for p in path.parent.iterdir()] == ["weights.safetensors"]
    return load_file(path)


def apart(a: list[float], b: list[float]) -> float:
    """The largest difference of two loss curves of equal length."""
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def own_task() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """What OWN defines."""
    space: dict[str, Any] = {}
    exec(OWN, space)
    return space["net"](), space["batches"]()


def by_hand(
    steps: int, rates: list[float], replicas: int = 1, every: int = 1, outer: float = 0.0
) -> tuple[nn.Module, list[float]]:
    """SGD with momentum 0.9 on OWN as one writes it; replicas train on their shares and agree now and then.

    They take the mean of their weights, or the global weights take an outer step of that rate after it.
    """
    net, batches = own_task()
    nets = [deepcopy(net) for _ in range(replicas)]
    optimizers = [torch.optim.SGD(n.parameters(), lr=rates[0], momentum=0.9) for n in nets]
    losses, share = [], 16 // replicas
    whole = deepcopy(net)
    outside = torch.optim.SGD(whole.parameters(), lr=outer, momentum=0.9, nesterov=True)
    for step in range(steps):
        x, y = batches[step % len(batches)]
        parts = []
        for number, (copy, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            mine = slice(number * share, (number + 1) * share)
            optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.zero_grad()
            loss = F.cross_entropy(copy(x[mine]), y[mine])
            loss.backward()
            optimizer.step()
            parts.append(loss.item())
        losses.append(sum(parts) / replicas)
        if (step + 1) % every == 0 or step == steps - 1:
            average(nets)
        if outer and (step + 1) % every == 0:
            for mine, mean in zip(whole.parameters(), nets[0].parameters(), strict=True):
                mine.grad = mine.detach() - mean.detach()
            outside.step()
            for copy in nets:
                copy.load_state_dict(whole.state_dict())
    return nets[0], losses


def average(nets: list[nn.Module]) -> None:
    """All networks get their mean."""
    with torch.no_grad():
        for same in zip(*(n.parameters() for n in nets), strict=True):
            mean = torch.stack(tuple(same)).mean(0)
            for p in same:
                p.copy_(mean)


def test_data_parallel_training_is_serial_training(desk: Any) -> None:
    parallel = train(desk, "mlp", "--plan", "dp=2,comm=mpi", "--steps", 60, "--out", "two")
    serial = train(desk, "mlp", "--plan", "serial", "--steps", 60, "--out", "one")
    assert len(serial["losses"]) == 60 and serial["losses"][-1] < serial["losses"][0]
    assert apart(parallel["losses"], serial["losses"]) < 1e-4
    a, b = weights(desk, parallel), weights(desk, serial)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in b)

    net, data = build("mlp", seed=0), load("mnist").test
    assert data is not None
    net.load_state_dict(a, strict=True)
    with torch.no_grad():
        guess = net(torch.from_numpy(data.inputs).float() / 255).argmax(1)
    accuracy = float((guess == torch.from_numpy(data.targets)).float().mean())
    assert parallel["test"] | {"loss": 0} == {
        "loss": 0,
        "accuracy": pytest.approx(accuracy, abs=2e-4),
        "samples": 10000,
    }


@pytest.mark.slow
def test_a_file_with_a_cosine_is_the_loop_by_hand(desk: Any) -> None:
    words = ("--momentum", 0.9, "--lr", 0.3, "--lr-schedule", "cosine", "--epochs", 3)
    document = train(desk, desk.write("own.py", OWN), "--plan", "dp=2,microbatches=2,comm=gloo", *words)
    net, losses = by_hand(15, [0.15 * (1 + math.cos(math.pi * step / 15)) for step in range(15)])
    assert apart(document["losses"], losses) < 1e-5
    assert [epoch["steps"] for epoch in document["epochs"]] == [5, 10, 15]
    saved = weights(desk, document)
    assert all(torch.allclose(saved[key], value, atol=1e-5) for key, value in net.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("sync, outer", [("average@4", 0.0), ("diloco@4", 0.7)])
def test_replicas_apart_are_the_loop_by_hand_although_saved_between_two_agreements(
    desk: Any, sync: str, outer: float
) -> None:
    words = ("--momentum", 0.9, "--lr", 0.3, "--epochs", 3)
    document = train(desk, desk.write("own.py", OWN), "--plan", f"dp=2,sync={sync},comm=gloo", *words)
    net, losses = by_hand(15, [0.3] * 15, replicas=2, every=4, outer=outer)
    assert apart(document["losses"], losses) < 1e-5
    saved = weights(desk, document)
    assert all(torch.allclose(saved[key], value, atol=1e-5) for key, value in net.state_dict().items())


def test_a_pipeline_stops_at_its_target_and_saves_every_stage(desk: Any) -> None:
    plan = "pp=2,microbatches=4,comm=gloo"
    document = train(desk, *SYNTHETIC, "--plan", plan, "--validation", 0.25, "--target", 0.9, "--batch", 64)
    *before, last = [epoch["validation"] for epoch in document["epochs"]]
    assert last["accuracy"] >= 0.9 and all(score["accuracy"] < 0.9 for score in before)
    assert last["samples"] == 512 and document["test"] is None
    assert len(document["losses"]) == 24 * len(document["epochs"])  # 1536 samples are left to train on
    build("mlp:20-16-4", seed=0).load_state_dict(weights(desk, document), strict=True)


def test_a_target_without_anything_to_reach_it_on_is_refused(desk: Any) -> None:
    desk.run("train", *SYNTHETIC, "--plan", "serial", "--target", 0.9).refused("target", "--validation")


@pytest.mark.slow
def test_an_example_file_learns_in_a_pipeline(desk: Any, examples: Path) -> None:
    document = train(desk, examples / "gpt.py", "--plan", "pp=2,microbatches=4,comm=gloo", "--epochs", 4)
    assert len(document["losses"]) == 32
    assert document["losses"][-1] < 0.8 * document["losses"][0]
    assert "0.weight" in weights(desk, document) and document["test"] is None


@pytest.mark.slow
def test_todays_loop_and_a_pipeline_learn_alike(desk: Any) -> None:
    words = ("mlp", "--steps", 60, "--lr", 0.5)
    today = train(desk, *words, "--plan", "today", "--out", "today")
    piped = train(desk, *words, "--plan", "pp=2,microbatches=4,comm=mpi", "--out", "piped")
    assert apart(today["losses"], piped["losses"]) < 1e-4
    assert abs(today["test"]["accuracy"] - piped["test"]["accuracy"]) < 2e-3


@pytest.mark.slow
def test_the_best_plan_is_explored_where_nothing_is_known(desk: Any) -> None:
    document = train(desk, "mlp", "--steps", 20)
    assert len(document["losses"]) == 20
    assert not (desk.folder / "paraxis-study").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_axes_reach_the_accuracy_of_the_serial_run(desk: Any) -> None:
    words = ("cnn", "--epochs", 5, "--lr", 0.05, "--momentum", 0.9)
    serial = train(desk, *words, "--plan", "serial", "--out", "one", limit=400)
    parallel = train(desk, *words, "--plan", "dp=2,comm=mpi", "--out", "two", limit=400)
    assert serial["test"]["accuracy"] > 0.98 and parallel["test"]["accuracy"] > 0.98
    assert apart(serial["losses"][:10], parallel["losses"][:10]) < 1e-5
    # From about step 25 on float32 curves part, because another order of the same sum tips a ReLU or a maximum over.
    # A serial run that adds in the order of the replicas has their very losses, so nothing else is different.
    halves = train(
        desk, *words[:1], "--steps", 400, *words[3:], "--plan", "microbatches=2", "--out", "three", limit=200
    )
    assert halves["losses"] == parallel["losses"][:400]
