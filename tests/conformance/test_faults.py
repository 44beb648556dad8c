"""Each seeded fault must fail the comparison with the serial run: as another result, or as a stall."""

from pathlib import Path

import pytest
from test_reference import EXACT, TASKS, WITH_AVERAGE, WRONG, difference, spec_of, trained

from paraxis.errors import ParaxisError
from paraxis.plan.plan import Plan, parse
from paraxis.program.faults import FAULTS
from paraxis.task.spec import TaskSpec

MUTABLE = [
    *WITH_AVERAGE,
    *map(parse, ("microbatches=2", "pp=2,schedule=gpipe,microbatches=4", "dp=2,bucket_bytes=64,microbatches=2")),
    parse("dp=2,pp=2,microbatches=2,sync=average@2"),
    parse("dp=2,sync=diloco@2"),
    parse("dp=2,microbatches=2,sync=compressed"),
    parse("dp=4,sync=diloco@3:bf16:fragments=2"),
    parse("dp=2,sync=diloco@4:overlap=2"),
    *map(parse, ("recompute=all", "pp=2,microbatches=4,recompute=all", "pp=2,schedule=zb-h1,microbatches=4")),
]


def fails(spec: TaskSpec, plan: Plan, fault: str) -> bool:
    """Whether a fault is seen, as another result or as a stall."""
    try:
        found = trained(spec, plan, fault)
    except ParaxisError:
        return True
    return difference(spec, plan, found) > WRONG


MUTANTS = [(name, plan) for name in FAULTS for plan in MUTABLE if FAULTS[name].needs(plan)]


STATISTICS = "local-statistics"  # a fault that only a network with batch norm can have
NORMS = (STATISTICS, "local-moments")  # which test_synchronised has
ELSEWHERE = (*NORMS, "untied")  # which test_tied has
MUTANTS = [(fault, plan) for fault, plan in MUTANTS if fault not in ELSEWHERE]


@pytest.mark.parametrize("plan", [plan for plan in MUTABLE if FAULTS[STATISTICS].needs(plan)], ids=Plan.short)
def test_statistics_that_are_not_reduced_fail_the_comparison(plan: Plan, folder: Path) -> None:
    assert fails(spec_of(folder, "batch norm", *TASKS["batch norm"]), plan, STATISTICS)


@pytest.mark.parametrize("fault, plan", MUTANTS, ids=lambda value: value if isinstance(value, str) else value.short())
def test_every_fault_fails_the_comparison(fault: str, plan: Plan, folder: Path) -> None:
    assert fails(spec_of(folder, "tiny", *TASKS["tiny"]), plan, fault)


OWN_LOSS = [*map(parse, ("dp=2,pp=2,microbatches=2", "dp=2,sync=average@4", "pp=2,microbatches=2,recompute=all"))]
OWN_LOSS += map(parse, ("dp=2,sync=diloco@2", "dp=2,zero=1", "dp=2,zero=2,microbatches=2"))


ABLE = [fault for fault in FAULTS if any(FAULTS[fault].needs(plan) for plan in OWN_LOSS)]


@pytest.mark.parametrize("fault", [fault for fault in ABLE if fault not in ("mean-of-sums", *ELSEWHERE)])
def test_every_fault_fails_on_a_loss_of_ones_own(fault: str, folder: Path) -> None:
    spec = spec_of(folder, "transformer", *TASKS["transformer"])
    assert fails(spec, next(plan for plan in OWN_LOSS if FAULTS[fault].needs(plan)), fault)


def test_a_mean_of_sums_is_no_fault_where_the_weight_travels_with_the_gradients(folder: Path) -> None:
    spec = spec_of(folder, "transformer", *TASKS["transformer"])
    assert difference(spec, OWN_LOSS[0], trained(spec, OWN_LOSS[0], "mean-of-sums")) < EXACT
