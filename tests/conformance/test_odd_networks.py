"""Networks and losses off the beaten track: each is held to the serial run, and those that fail say why."""

from pathlib import Path
from typing import Any

import pytest
from test_reference import EXACT, HEAD, difference, spec_of, task, trained

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
FROZEN_NORM = """
def net():
    made = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    made[1].running_mean.fill_(0.5)
    made[1].eval()
    return made
"""
BLOCK_IN_PLACE = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
    def forward(self, x):
        return self.linear(F.relu(x, inplace=True))
def net():
    return nn.Sequential(nn.Linear(6, 5), Block(), nn.Linear(5, 3))
"""
STAGE_IN_PLACE = """
def net():
    return nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 3)))
def stages(net):
    return list(net)
"""
FUNCTIONAL_SECOND = """
class Part(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.linear = nn.Linear(6, out)
    def forward(self, x):
        return F.dropout(self.linear(x.transpose(0, 1)), 0.5, self.training).transpose(0, 1)
def net():
    return nn.Sequential(Part(6), Part(3), nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten())
""" + PAIRS.format(x="8, 4, 6", y="torch.randint(0, 3, (8,), generator=g)")
LEAF = "in place on what has been detached at the front of a segment: a leaf that requires grad"
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
    "several regression targets": (
        DEEP + PAIRS.format(x="8, 6", y="torch.randn(8, 3, generator=g)"),
        {},
        ("serial", "dp=2", GRID),
    ),
    "cumulative batch norm": (CUMULATIVE + LABELS, {}, ("microbatches=2", "dp=2", GRID)),
    "batch norm in eval mode": (FROZEN_NORM + LABELS, {}, ("serial", "dp=2", GRID)),
    "shared dropout over stages": (SHARED + LABELS, {}, ("pp=2", "pp=3", GRID)),
    "first stage without parameters": (FLAT_FIRST + LABELS + OWN_LOSS, {}, ("pp=2,split=1+3", f"{GRID},split=1+3")),
    "in-place layer": (IN_PLACE + LABELS, {}, ("serial", "pp=2", "dp=2,bucket_bytes=16", GRID)),
    "unused parameter with decay": (
        UNUSED + LABELS,
        {"weight_decay": 0.1},
        ("serial", "dp=2", "dp=2,sync=average@2"),
    ),
    "unused parameter with adamw": (
        UNUSED + LABELS,
        {"optimizer": "adamw", "weight_decay": 0.1, "clip": 0.1},
        ("serial", "dp=2"),
    ),
    "shared dropout over segments": (SHARED + LABELS, {}, ("dp=2,bucket_bytes=16",)),
    "functional dropout, samples second": (FUNCTIONAL_SECOND, {}, ("dp=2",)),
    "block that begins in place": (BLOCK_IN_PLACE + LABELS, {}, ("pp=2,split=1+2", "dp=2,bucket_bytes=16")),
    "own stage that begins in place": (STAGE_IN_PLACE + LABELS, {}, ("pp=2",)),
    "network that alters its inputs": (
        "def net():\n    return nn.Sequential(nn.ELU(inplace=True), nn.Linear(6, 5), nn.Linear(5, 3))\n",
        {"data": "synthetic:64,6,3,seed=2", "batch": 16},
        ("serial",),
    ),
}


def differs(folder: Path, name: str, source: str, settings: Settings, plan: str) -> float:
    spec = spec_of(folder, name, HEAD + source, settings)
    return difference(spec, parse(plan), trained(spec, parse(plan)))


@pytest.mark.parametrize("name, plan", [(name, plan) for name, case in FINE.items() for plan in case[2]])
def test_odd_networks_compute_what_the_serial_run_computes(name: str, plan: str, folder: Path) -> None:
    source, settings, _ = FINE[name]
    assert differs(folder, name, source, settings, plan) < EXACT


def test_an_in_place_layer_stays_with_the_one_in_front(folder: Path) -> None:
    spec = spec_of(folder, "in place", HEAD + IN_PLACE + LABELS, {})
    assert [len(list(layer.children())) for layer in task(spec).chain] == [2, 0]
