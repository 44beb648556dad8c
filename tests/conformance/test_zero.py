"""ZeRO through the reference interpreter: every stage computes what serial code computes, and keeps only shares."""

from pathlib import Path

import pytest
from test_reference import EXACT, TASKS, difference, spec_of, trained

from paraxis.plan.plan import Plan, parse

PLANS = [
    *(parse(f"dp={dp},zero={z},microbatches={m},bucket_bytes=64") for z in (1, 2, 3) for dp in (2, 4) for m in (1, 2)),
    *(parse(f"dp=2,pp=2,zero={z},microbatches=2,bucket_bytes=64") for z in (1, 2, 3)),
    *(parse(f"dp=2,zero={z}") for z in (1, 2, 3)),
    parse("dp=2,pp=2,interleave=2,zero=1,schedule=gpipe,microbatches=2"),
    parse("dp=2,pp=2,interleave=2,zero=3,schedule=gpipe,microbatches=2,bucket_bytes=64"),
    parse("dp=2,pp=2,zero=3"),
]


@pytest.mark.parametrize("plan", PLANS, ids=Plan.short)
@pytest.mark.parametrize("name", [name for name in TASKS if name != "tiny"])
def test_shares_compute_what_the_serial_run_computes(name: str, plan: Plan, folder: Path) -> None:
    spec = spec_of(folder, name, *TASKS[name])
    assert difference(spec, plan, trained(spec, plan)) < EXACT
