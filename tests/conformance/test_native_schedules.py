"""Several stages on a rank, and I and W apart, on the native engine: what the serial run computes."""

from pathlib import Path

import pytest
import test_native
import test_native_gpt
import torch
from test_native import HEAD, apart, in_float32, native, native_ranks, outcome_of, ran, spec_named, team_of
from test_reference import EXACT, WRONG, difference, emulated, spec_of, wanted

from paraxis.errors import PlanError
from paraxis.plan.plan import Plan, parse
from paraxis.program.faults import FAULTS
from paraxis.proof import MARGIN

text = test_native_gpt.text
PLANS = [
    *(f"pp=2,schedule={name},microbatches=4" for name in ("interleaved", "zb-h1", "zb-h2")),
    *("pp=3,schedule=zb-h1,microbatches=2", "pp=2,interleave=3,schedule=gpipe,microbatches=2", "pp=2,interleave=2"),
    *("dp=2,pp=2,schedule=zb-h2,microbatches=2", "dp=2,pp=2,schedule=interleaved,microbatches=2"),
    *("dp=2,pp=2,schedule=zb-h1,microbatches=2,sync=average@2", "dp=2,pp=2,interleave=2,sync=diloco@2"),
]
NETWORKS = ("mlp", "convolutions", "norms", "tiny")
CASES = [(name, plan) for name in NETWORKS for plan in PLANS]
CASES += [
    (name, plan) for name in ("cnn", "residual") for plan in (*PLANS[:2], "dp=2,pp=2,schedule=zb-h2,microbatches=2")
]


@pytest.mark.parametrize("name, plan", CASES)
def test_threads_compute_what_the_serial_run_computes(name: str, plan: str, folder: Path) -> None:
    spec = spec_named(folder, name)
    assert difference(spec, native(plan), ran(spec, native(plan))) < EXACT


RANKS = [
    *((plan, threads) for plan in PLANS for threads in (1, 2)),
    ("dp=2,pp=2,schedule=interleaved,microbatches=2,bucket_bytes=1M", 1),  # a reduction for each stage
    ("dp=2,pp=2,schedule=interleaved,microbatches=2,bucket_bytes=1M", 2),
    ("dp=2,pp=2,schedule=zb-h1,microbatches=2,sync=compressed", 1),
]


@pytest.mark.parametrize("plan, threads", RANKS)
def test_ranks_of_processes_compute_the_same(plan: str, threads: int, folder: Path) -> None:
    spec = spec_named(folder, "tiny", momentum=0.8, clip=0.1, batch=16)
    own = parse(f"{plan},engine=native,comm=mpi,threads={threads}")
    assert difference(spec, own, outcome_of(native_ranks(spec, own))) < EXACT


@pytest.mark.parametrize("plan", PLANS[:3])
def test_ranks_of_processes_have_running_statistics(plan: str, folder: Path) -> None:
    spec, own = spec_named(folder, "norms"), parse(f"{plan},engine=native,comm=mpi")
    assert difference(spec, own, outcome_of(native_ranks(spec, own))) < EXACT


@pytest.mark.parametrize("plan", [PLANS[0], "dp=2,pp=2,schedule=interleaved,microbatches=2", "dp=2,pp=2,interleave=2"])
@pytest.mark.parametrize("kind", test_native_gpt.KINDS)
def test_gpt_on_several_stages_a_rank(kind: str, plan: str, text: str) -> None:
    """The first and the last stage have a copy of the symbols each, on different ranks."""
    spec = test_native_gpt.spec_named(text, "tiny", **test_native_gpt.KINDS[kind])
    assert difference(spec, native(plan), ran(spec, native(plan))) < EXACT
    assert difference(spec, native(plan), ran(spec, native(plan), "untied")) > WRONG


@pytest.mark.parametrize("plan", ["pp=3,schedule=zb-h1,microbatches=4", "dp=2,pp=2,schedule=zb-h2,microbatches=4"])
@pytest.mark.parametrize("name", test_native_gpt.NETWORKS)
def test_gpt_with_i_and_w_apart(name: str, plan: str, text: str) -> None:
    spec = test_native_gpt.spec_named(text, name)
    assert difference(spec, native(plan), ran(spec, native(plan))) < EXACT
    own = parse(f"{plan},engine=native,comm=mpi")
    assert difference(spec, own, outcome_of(native_ranks(spec, own))) < EXACT


@pytest.mark.parametrize("plan", ["dp=2,pp=2,interleave=2", "dp=2,pp=2,interleave=2,schedule=gpipe"])
def test_norms_over_all_replicas_meet_on_every_stage(plan: str, folder: Path) -> None:
    spec = spec_named(folder, "norms", bn_group=20)
    assert difference(spec, native(plan), ran(spec, native(plan))) < EXACT
    own = parse(f"{plan},engine=native,comm=mpi")
    assert difference(spec, own, outcome_of(native_ranks(spec, own))) < EXACT


@pytest.mark.parametrize("plan", PLANS[:3])
def test_fast_kernels_stay_within_the_band_of_rounding(plan: str, folder: Path) -> None:
    spec = spec_named(folder, "convolutions")
    change = emulated(spec, 1, 1, 1)[1]
    twin, fast = ran(spec, native(plan)), ran(spec, native(plan), dtype=torch.float32)
    band = max(MARGIN * apart(in_float32(spec, 1), wanted(spec, Plan())[0], change), 1e-6)
    assert 0 < apart(fast, twin, change) < band < 1e-3


FAULTY = ("lost-weight-gradient", "lost-backward", "swapped-microbatch", "lost-update", "unzeroed")


MUTANTS = [(fault, plan) for fault in FAULTY for plan in PLANS[:3] if FAULTS[fault].needs(native(plan))]


@pytest.mark.parametrize("fault, plan", MUTANTS)
def test_a_spoiled_program_fails_the_comparison(fault: str, plan: str, folder: Path) -> None:
    spec, own = spec_named(folder, "tiny"), native(plan)
    assert difference(spec, own, ran(spec, own, fault)) > WRONG
    other = parse(f"{plan},engine=native,comm=mpi")
    assert difference(spec, other, outcome_of(native_ranks(spec, other, fault))) > WRONG


# -- schedules of a user's own ---------------------------------------------------------------------------------

OWN = {
    "both kinds of backwards": "F0 F1 B0 F2 I1 B2 W1\nF0 I0 F1 W0 B1 F2 B2",
    "weights last": "F0 F1 F2 I2 I0 I1 W1 W0 W2\nF2 I2 F0 I0 F1 I1 W0 W1 W2",
    "another order on each rank": "0F1 0F0 0F2 2F0 2F1 2F2 2B2 2B0 2B1 0I0 0I1 0B2 0W1 0W0\n"
    "1F2 1F0 1F1 3F1 3I1 3F0 3W1 3B0 3F2 3B2 1I2 1B0 1B1 1W2",
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("comm", ["openmp", "mpi"])
def test_schedules_of_a_users_own(name: str, comm: str, folder: Path) -> None:
    path = folder / f"{name.replace(' ', '_')}.txt"
    path.write_text(OWN[name])
    stages = 2 if "2F" in OWN[name] else 1
    plan = parse(f"pp=2,schedule={path},microbatches=3,interleave={stages},engine=native,comm={comm}")
    spec = spec_named(folder, "tiny", batch=12)
    found = ran(spec, plan) if comm == "openmp" else outcome_of(native_ranks(spec, plan))
    assert difference(spec, plan, found) < EXACT


def test_groups_of_threads_refuse_a_users_own_late_weights(folder: Path) -> None:
    path = folder / "late.txt"
    path.write_text(OWN["weights last"])
    plan = parse(f"pp=2,tp=2,schedule={path},microbatches=3,engine=native")
    with pytest.raises(PlanError, match="threads of a tp group keep nothing for a late W; take B or engine=torch"):
        team_of(spec_named(folder, "tiny", batch=12), plan)


# -- what would be wrong if it were not refused ----------------------------------------------------------------

SHARED = (
    HEAD
    + """
def net():
    again = nn.Linear(6, 6, bias=False)
    return nn.Sequential(again, nn.Tanh(), again, nn.Linear(6, 3))
"""
)


@pytest.mark.parametrize("comm", ["openmp", "mpi"])
def test_a_weight_on_two_stages_of_one_rank_is_refused(comm: str, folder: Path) -> None:
    spec = spec_of(folder, "shared", SHARED, test_native.NETS["tiny"][1])
    plan = parse(f"pp=2,schedule=interleaved,microbatches=4,engine=native,comm={comm}")
    with pytest.raises(PlanError, match=r"stages 0 and 2 of one rank both use 0\.weight; take another split"):
        team_of(spec, plan) if comm == "openmp" else native_ranks(spec, plan)
    plan = parse("pp=2,microbatches=4,split=2+2,engine=native")
    assert difference(spec, plan, ran(spec, plan)) < EXACT
