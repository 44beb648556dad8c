"""resnet18 and batch-norm groups: plans equal the serial run, whatever they cut, if their groups are the same."""

from pathlib import Path
from typing import Any

import pytest
import test_reference
from test_reference import EXACT, HEAD, WRONG, difference, spec_of, trained, wanted

from paraxis.plan.plan import parse
from paraxis.program.faults import FAULTS
from paraxis.task.spec import TaskSpec

# Images are large enough for several places in the last layers: two values of a channel make a batch norm a step
# function, which turns one rounding into another result.
NARROW = (
    HEAD
    + """
from paraxis.task.networks import initialise
from paraxis.task.resnet import ResNet

def net():
    made = ResNet(3, widths=(4, 6, 8, 10))
    initialise(made, 0)
    return made
"""
)
DATA = {"data": "synthetic:100,1x40x40,3,seed=2", "batch": 16, "lr": 0.02}
FULL = TaskSpec(network="resnet18", data="synthetic:32,1x33x33,10,seed=2", batch=4, lr=0.01)
OWN_GROUPS = (
    *("serial", "dp=2", "pp=2,microbatches=2", "pp=4,microbatches=2,schedule=gpipe"),
    *("dp=2,pp=2,microbatches=2", "dp=2,bucket_bytes=1K", "dp=2,sync=average@2"),
)
GROUPS_OF_4 = (
    *("serial", "microbatches=4", "dp=2", "dp=4", "dp=2,microbatches=2", "pp=2,microbatches=2"),
    *("dp=2,pp=2,microbatches=2", "pp=15", "dp=2,bucket_bytes=1K", "dp=2,sync=average@2"),
)


def narrow(folder: Path, **settings: Any) -> TaskSpec:
    return spec_of(folder, "narrow", NARROW, DATA | settings)


@pytest.mark.parametrize("plan", OWN_GROUPS)
def test_plans_equal_the_serial_run_in_their_own_groups(plan: str, folder: Path) -> None:
    spec = narrow(folder)
    assert difference(spec, parse(plan), trained(spec, parse(plan))) < EXACT


@pytest.mark.parametrize("plan", GROUPS_OF_4)
def test_plans_equal_the_serial_run_in_the_tasks_groups(plan: str, folder: Path) -> None:
    spec = narrow(folder, bn_group=4)
    assert difference(spec, parse(plan), trained(spec, parse(plan))) < EXACT


def test_one_serial_run_stands_for_all_exact_plans(folder: Path) -> None:
    """With groups of the task's own, what a plan is held to does not depend on the plan."""
    spec = narrow(folder, bn_group=4)
    oracles = {id(wanted(spec, parse(plan))) for plan in GROUPS_OF_4 if "average" not in plan}
    assert len(oracles) == 1
    apart = wanted(narrow(folder), parse("dp=2")), wanted(narrow(folder), parse("dp=4"))
    assert apart[0][0].losses != apart[1][0].losses


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("fault", ["local-statistics", "dropped-reduction", "all-data"])
def test_mutants_fail(fault: str, group: int | None, folder: Path) -> None:
    spec, plan = narrow(folder, bn_group=group), parse("dp=2,microbatches=2")
    assert FAULTS[fault].needs(plan)
    assert difference(spec, plan, trained(spec, plan, fault)) > WRONG


def test_other_groups_fail(folder: Path) -> None:
    """Groups of 8 that should be of 4, and a slice that should be cut into groups and is not."""
    of_4, plan = narrow(folder, bn_group=4), parse("dp=2")
    assert difference(of_4, plan, trained(narrow(folder, bn_group=8), plan)) > WRONG
    assert difference(of_4, plan, trained(narrow(folder), plan)) > WRONG


FULL_CASES = [  # all of them are held to the same serial run
    (2, "pp=2"),
    *(pytest.param(*c, marks=pytest.mark.slow) for c in ((None, "dp=2"), (None, "pp=2,microbatches=2"), (2, "dp=2"))),
]


@pytest.mark.parametrize("group, plan", FULL_CASES)
def test_the_shipped_network_equals_the_serial_run(
    group: int | None, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_reference, "STEPS", 2)
    spec = FULL.model_copy(update={"bn_group": group})
    assert difference(spec, parse(plan), trained(spec, parse(plan))) < EXACT
