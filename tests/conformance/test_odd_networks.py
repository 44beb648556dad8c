"""Networks and losses off the beaten track: each is held to the serial run, and those that fail say why."""

from pathlib import Path
from typing import Any

import pytest
from test_reference import EXACT, HEAD, difference, spec_of, trained

from paraxis.plan.plan import parse

GRID = "dp=2,pp=2,microbatches=2"
PAIRS = """
def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn({x}, generator=g), {y}) for _ in range(3)]
"""
LABELS = PAIRS.format(x="8, 6", y="torch.randint(0, 3, (8,), generator=g)")
DEEP = "def net():\n    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))\n"
OWN_LOSS = (
    "def loss(output, batch):\n    return F.cross_entropy(output, batch[1], reduction='sum'), len(batch[1]) * 0.3\n"
)
TIED = """
def net():
    twice = nn.Linear(6, 6)
    return nn.Sequential(twice, nn.Tanh(), twice, nn.Tanh(), nn.Linear(6, 3))
"""
FROZEN = """
def net():
    made = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    made[0].requires_grad_(False)
    return made
"""
SKIPS = """
class Part(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.linear = nn.Linear(6, out)
class First(Part):
    def forward(self, x, mask):
        return torch.tanh(self.linear(x)), mask, x, torch.tanh(self.linear(x))
class Between(Part):
    def forward(self, x, mask, skip, other):
        return torch.tanh(self.linear(x)).expand(-1, 6), mask, skip, other
class Last(Part):
    def forward(self, x, mask, skip, other):
        return self.linear(x * mask + skip + other)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([First(6), Between(1), Between(6), Last(3)])
    def forward(self, x, mask):
        found = x, mask
        for part in self.parts:
            found = part(*found)
        return found
    def stages(self):
        return list(self.parts)
def net():
    return Net()
def inputs(batch):
    return batch[0], batch[0] > 0
"""
SHARED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.drop = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3), nn.Dropout(0.5)
    def forward(self, x):
        return self.c(self.drop(self.b(self.drop(self.a(x)))))
    def stages(self):
        return [nn.Sequential(self.a, self.drop), nn.Sequential(self.b, self.drop), self.c]
def net():
    return Net()
"""
UNUSED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(2, 2)
    def forward(self, x):
        return self.used(x)
def net():
    return Net()
"""
IN_PLACE = "def net():\n    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))\n"
CUMULATIVE = (
    "def net():\n    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 3))\n"
)
FLAT_FIRST = "def net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))\n"
OPTIMIZER = "def optimizer(parameters):\n    return torch.optim.{}\n"
Settings = dict[str, Any]
Case = tuple[str, Settings, tuple[str, ...]]

FINE: dict[str, Case] = {
    "one loss weight a sample": (DEEP + LABELS + OWN_LOSS, {"clip": 0.1}, ("dp=2", GRID, f"{GRID},bucket_bytes=16")),
    "one regression target": (
        "def net():\n    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))\n"
        + PAIRS.format(x="8, 6", y="torch.randn(8, 1, generator=g)"),
        {},
        ("dp=2", GRID),
    ),
    "tied within a stage": (
        TIED + LABELS,
        {"momentum": 0.9, "weight_decay": 0.1},
        ("dp=2", "pp=2,split=3+2", "dp=2,bucket_bytes=16"),
    ),
    "frozen first layer": (FROZEN + LABELS, {}, ("dp=2", "pp=2,split=1+4", "pp=2,split=3+2", "dp=2,bucket_bytes=16")),
    "skips over stages": (SKIPS + LABELS, {}, ("dp=2", "pp=4,microbatches=4", GRID, "dp=2,bucket_bytes=16")),
    "shared dropout in one segment": (SHARED + LABELS, {}, ("dp=2", "dp=4,microbatches=2", "microbatches=4")),
    "batch norm with a momentum of its own": (
        CUMULATIVE.replace("None", "0.2") + LABELS,
        {},
        ("dp=2", "microbatches=2", GRID),
    ),
    "rmsprop": (
        DEEP + LABELS + OPTIMIZER.format("RMSprop(parameters, lr=0.01)"),
        {"clip": 0.2},
        ("dp=2", GRID, "dp=2,sync=average@4"),
    ),
    "amsgrad": (DEEP + LABELS + OPTIMIZER.format("Adam(parameters, lr=0.01, amsgrad=True)"), {}, ("dp=2", GRID)),
    "part of the parameters": (DEEP + LABELS + OPTIMIZER.format("SGD(parameters[2:4], lr=0.1)"), {}, ("dp=2", GRID)),
}
AMISS: dict[str, tuple[str, Settings, str, str]] = {
    "several regression targets": (
        DEEP + PAIRS.format(x="8, 6", y="torch.randn(8, 3, generator=g)"),
        {},
        "serial",
        "the engine divides by the samples, the default loss's weight is target.numel()",
    ),
    "cumulative batch norm": (
        CUMULATIVE + LABELS,
        {},
        "microbatches=2",
        "num_batches_tracked is not set back between microbatches, as running statistics are",
    ),
    "shared dropout over stages": (
        SHARED + LABELS,
        {},
        "pp=2",
        "each segment counts its calls from 0, so that the second use of a module draws the first one's mask",
    ),
    "shared dropout over segments": (
        SHARED + LABELS,
        {},
        "dp=2,bucket_bytes=16",
        "each segment counts its calls from 0, so that the second use of a module draws the first one's mask",
    ),
    "first stage without parameters": (
        FLAT_FIRST + LABELS + OWN_LOSS,
        {},
        "pp=2,split=1+3",
        "its totals are float32, so that the weight of the batch is rounded (and MPI is told two lengths)",
    ),
    "in-place layer first in a stage": (
        IN_PLACE + LABELS,
        {},
        "pp=2,split=1+2",
        "a leaf that requires grad is changed in place",
    ),
    "unused parameter with decay": (
        UNUSED + LABELS,
        {"weight_decay": 0.1},
        "serial",
        "torch leaves a parameter without gradient alone, the flat rules decay it",
    ),
}


def differs(folder: Path, name: str, source: str, settings: Settings, plan: str) -> float:
    spec = spec_of(folder, name, HEAD + source, settings)
    return difference(spec, parse(plan), trained(spec, parse(plan)))


@pytest.mark.parametrize("name, plan", [(name, plan) for name, case in FINE.items() for plan in case[2]])
def test_odd_networks_compute_what_the_serial_run_computes(name: str, plan: str, tmp_path: Path) -> None:
    source, settings, _ = FINE[name]
    assert differs(tmp_path, name, source, settings, plan) < EXACT


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=case[3])) for name, case in AMISS.items()]
)
def test_what_is_amiss(name: str, tmp_path: Path) -> None:
    source, settings, plan, _ = AMISS[name]
    assert differs(tmp_path, name, source, settings, plan) < EXACT
