"""resnet18: torchvision's structure and names, initial weights by our rule, layers that compose; grouped batch norm."""

from typing import Any

import pytest
import torch
from torch import nn

from paraxis.errors import TaskError
from paraxis.task.networks import build, initialise
from paraxis.task.norm import GroupedNorm, group_norms, resting
from paraxis.task.randomness import Draw
from paraxis.task.resnet import Block, ResNet

NARROW = (4, 6, 8, 10)
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{key}": () if key == "num_batches_tracked" else (width,) for key in NORM}


def expected() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a resnet18's state_dict in their order, from its structure."""
    found = {"conv1.weight": (64, 1, 7, 7), **norm("bn1", 64)}
    inputs = 64
    for layer, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            at = f"layer{layer}.{block}"
            found |= {f"{at}.conv1.weight": (width, inputs, 3, 3), **norm(f"{at}.bn1", width)}
            found |= {f"{at}.conv2.weight": (width, width, 3, 3), **norm(f"{at}.bn2", width)}
            if inputs != width:
                found |= {f"{at}.downsample.0.weight": (width, inputs, 1, 1), **norm(f"{at}.downsample.1", width)}
            inputs = width
    return found | {"fc.weight": (10, 512), "fc.bias": (10,)}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return build("resnet18", 0)


def test_names_and_shapes_are_torchvisions(net: nn.Module) -> None:
    found = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert len(found) == 122
    assert list(found.items()) == list(expected().items())
    assert sum(p.numel() for p in net.parameters()) == 11_175_370
    assert [name for name, _ in net.named_children() if name != "flatten"] == [
        *("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc")
    ]


def test_initial_weights_keep_the_variance_of_what_flows_back(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and bool((module.bias == 0).all()), name


def test_initial_weights_follow_from_the_seed_and_the_name() -> None:
    nets = [ResNet(3, widths=NARROW) for _ in range(3)]
    for made, seed in zip(nets, (5, 5, 6), strict=True):
        torch.rand(3)
        initialise(made, seed)
    first, same, other = (made.state_dict() for made in nets)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["layer3.0.conv1.weight"], other["layer3.0.conv1.weight"])
    assert not torch.equal(first["layer1.0.conv1.weight"], first["layer1.1.conv1.weight"])


@pytest.mark.parametrize("size", [28, 32, 64])
def test_layers_compose_to_the_network_and_leave_their_input_alone(size: int) -> None:
    net = ResNet(3, channels=2, widths=NARROW)
    layers = net.stages()
    assert [type(layer) for layer in layers].count(Block) == 8 and len(layers) == 15
    x = torch.randn(4, 2, size, size, generator=torch.Generator().manual_seed(0))
    whole = net(x)
    for layer in layers:
        before = x.clone()
        out = layer(x)
        assert torch.equal(x, before), type(layer).__name__
        x = out
    assert x.shape == (4, 3) and torch.allclose(whole, x, atol=1e-5)


def test_options_are_refused() -> None:
    with pytest.raises(TaskError, match="resnet18:50: it takes no options"):
        build("resnet18:50", 0)


# -- batch norm over groups ------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, (12, 3)),
    "1d with places": (nn.BatchNorm1d, (12, 3, 5)),
    "2d": (nn.BatchNorm2d, (12, 3, 4, 4)),
    "3d": (nn.BatchNorm3d, (12, 3, 2, 2, 2)),
}


def grouped(layer: nn.Module, group: int, samples: int) -> GroupedNorm:
    holder = nn.Sequential(layer)
    group_norms(holder, group, Draw(samples=samples), "net")
    assert isinstance(holder[0], GroupedNorm)
    return holder[0]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_is_normalised_as_the_frameworks_own_does(kind: str, momentum: float | None) -> None:
    make, shape = KINDS[kind]
    plain = make(3, momentum=momentum).double()
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    copies = [make(3, momentum=momentum).double() for _ in range(4)]
    for copy in copies[1:]:
        copy.load_state_dict(plain.state_dict())
    own = grouped(plain, 4, 12)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    out, parts = own(x), torch.cat([copy(part) for copy, part in zip(copies[1:], y.split(4), strict=True)])
    assert torch.equal(out, parts)
    out.square().sum().backward()
    parts.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(copy, name) for copy in copies[1:]]).mean(0)
        assert torch.allclose(getattr(own, name), mean, rtol=1e-14)
    assert int(own.num_batches_tracked) == 1
    own.eval()
    assert not torch.equal(own(x), copies[0].eval()(x)), "the running statistics have moved"


def test_without_running_statistics_groups_are_normalised_in_training() -> None:
    own, plain = grouped(nn.BatchNorm1d(3, track_running_stats=False), 4, 12), nn.BatchNorm1d(3)
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(own(x), torch.cat([plain(part) for part in x.split(4)]))


def test_rows_of_a_sample_stay_together_and_a_trial_is_one_group() -> None:
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grouped(nn.BatchNorm1d(3), 2, 6)(x), grouped(nn.BatchNorm1d(3), 4, 12)(x)), "two rows a sample"
    assert torch.equal(grouped(nn.BatchNorm1d(3), 8, 12)(x), nn.BatchNorm1d(3)(x))
    with pytest.raises(TaskError, match=r"\(12, 3\), whose rows do not count 5"):
        grouped(nn.BatchNorm1d(3), 5, 5)(x)
    with pytest.raises(ValueError, match="expected 4D"):
        grouped(nn.BatchNorm2d(3), 4, 12)(x)


def test_swapping_keeps_tensors_names_modes_and_what_is_shared() -> None:
    shared = nn.BatchNorm1d(3)
    frozen = nn.BatchNorm1d(3).eval()
    net = nn.Sequential(shared, nn.Sequential(shared, frozen))
    before = {name: id(value) for name, value in net.state_dict(keep_vars=True).items()}
    group_norms(net, 2, Draw(samples=4), "net")
    assert {name: id(value) for name, value in net.state_dict(keep_vars=True).items()} == before
    inner = net[1]
    assert net[0] is inner[0] and net[0].training and not inner[1].training
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inner[1](x), frozen(x))
    with resting(net):
        assert not net[0].training and net.training
    assert net[0].training and not inner[1].training


def test_what_cannot_be_grouped_is_refused() -> None:
    with pytest.raises(TaskError, match=r"bn_group=2: mine has no nn\.BatchNorm layer"):
        group_norms(nn.Sequential(nn.Linear(2, 2)), 2, Draw(), "mine")
    with pytest.raises(TaskError, match="bn_group=2: mine has a SyncBatchNorm"):
        group_norms(nn.Sequential(nn.SyncBatchNorm(2)), 2, Draw(), "mine")
