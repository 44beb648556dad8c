"""The roofline: work counted by hand and by PyTorch's own counter, and what a machine allows."""

import json
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from paraxis.errors import TaskError
from paraxis.measure.facts import facts_of
from paraxis.measure.layer_work import layer_work
from paraxis.measure.layers import measure_layers
from paraxis.measure.roofline import LayerWork, Work, affine_work, in_words, roofline
from paraxis.task.resnet import Block
from paraxis.task.spec import TaskSpec
from paraxis.task.task import Task, make_task


def test_work_of_a_linear_layer_by_hand() -> None:
    forward, backward = affine_work(
        samples=8, inputs=3, outputs=5, weights=15, biases=5, per_output=3, size=4, first=False
    )
    assert forward == Work(2 * 8 * 3 * 5 + 8 * 5, 4 * (8 * 3 + 15 + 5 + 8 * 5))
    assert backward.flops == 4 * 8 * 3 * 5 + 8 * 5
    assert backward.bytes == 4 * (8 * 3 + 8 * 5 + 15 + 5) + 4 * (8 * 5 + 15 + 8 * 3)
    _, alone = affine_work(samples=8, inputs=3, outputs=5, weights=15, biases=5, per_output=3, size=4, first=True)
    assert alone.flops == 2 * 8 * 3 * 5 + 8 * 5


def residual() -> Task:
    """A network with two convolutions, a way around them and batch norms in one layer of its chain."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3), Block(6, 8, 2), torch.nn.Flatten(), torch.nn.Linear(8 * 3 * 3, 5)
    )
    batches = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))] * 2
    return make_task(TaskSpec(live=True), {"net": net, "batches": batches})


def zoo(network: str) -> Task:
    return make_task(TaskSpec(network=network, data="synthetic:64,1x28x28,10", batch=4))


@pytest.mark.parametrize("make", [lambda: zoo("mlp"), lambda: zoo("cnn:0"), residual])
def test_flops_are_those_that_pytorch_counts(make: Callable[[], Task]) -> None:
    task = make()
    before = {k: v.clone() for k, v in task.net.state_dict().items()}
    work = layer_work(task, 4)
    assert all(torch.equal(v, before[k]) for k, v in task.net.state_dict().items()), "the task is as it was"
    assert not any(m._forward_hooks for m in task.net.modules()), "hooks are taken off again"
    batch = task.train.share(0, 0, 4)
    with FlopCounterMode(display=False) as counter:
        task.net(batch[0]).sum().backward()
    ours = sum(w.forward.flops + w.backward.flops for w in work)
    theirs = counter.get_total_flops()  # of products alone, so ours may be more by the biases' sums
    assert theirs <= ours <= theirs * 1.05


def test_layers_that_multiply_are_found_in_their_places() -> None:
    task = zoo("cnn")
    kinds = [type(task.chain[w.index]).__name__ for w in layer_work(task, 2)]
    assert kinds == ["Conv2d", "Conv2d", "Linear", "Linear"]
    first = layer_work(task, 2)[0]
    assert first.forward.flops == 2 * 2 * 10 * 24 * 24 * 25 + 2 * 10 * 24 * 24
    assert first.forward.bytes == 4 * (2 * 784 + 250 + 10 + 2 * 10 * 24 * 24)


def test_a_machine_allows_the_lesser_of_two_roofs() -> None:
    layers = [
        LayerWork(0, "thin", 1, Work(100.0, 100.0), Work(200.0, 200.0)),
        LayerWork(2, "thick", 1, Work(1000.0, 10.0), Work(0.0, 0.0)),
    ]
    points = roofline(layers, [2.0, 9.0, 1.0], [4.0, 9.0, 1.0], peak=2000.0, bandwidth=100.0)
    assert [(p.name, p.direction, p.bound) for p in points] == [
        ("thin", "forward", "memory"),
        ("thin", "backward", "memory"),
        ("thick", "forward", "compute"),
    ]
    assert points[0].intensity == 1 and points[0].attainable == 100 and points[0].share == pytest.approx(0.5)
    assert points[2].attainable == 2000 and points[2].achieved == 1000 and points[2].share == pytest.approx(0.5)
    assert in_words(points).startswith("thin's backward takes 57%")
    assert in_words([]) == ""
    with pytest.raises(TaskError, match="no measured time"):
        roofline(layers, [1.0], [1.0], 1.0, 1.0)
    with pytest.raises(TaskError, match="bandwidth=0"):
        roofline(layers, [1.0] * 3, [1.0] * 3, 1.0, 0.0)


def test_measured_layers_carry_their_work_to_the_driver() -> None:
    facts = measure_layers(zoo("mlp"), 4, 0.05)
    back = facts_of(json.loads(json.dumps(facts.as_json())))
    assert back.work == facts.work and [facts.layers[w.index] for w in back.work] == ["Linear", "Linear"]
    points = roofline(back.work, back.forward, back.backward, peak=1e12, bandwidth=1e11)
    assert len(points) == 4 and all(0 < p.share < 1 for p in points)


def test_what_multiplies_unseen_has_no_roof() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            return y @ y.T @ y

    net = torch.nn.Sequential(Own(), torch.nn.Linear(6, 3))
    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))] * 2
    (work,) = layer_work(make_task(TaskSpec(live=True), {"net": net, "batches": batches}), 4)
    assert work.index == 1 and work.name == "Linear 1"
    assert work.backward.flops == 2 * (2 * 4 * 6 * 3) + 4 * 3, "it is not the first: its input gradient is wanted"
