"""Our schedules in the simulator: no worse than PyTorch's, as good as their papers say, correct for every shape."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import schedules as bench  # noqa: E402

from paraxis.plan.plan import Plan  # noqa: E402
from paraxis.plan.schedules import ONE_STAGE, SCHEDULES  # noqa: E402
from paraxis.program.check import check  # noqa: E402
from paraxis.program.cut import Layout  # noqa: E402
from paraxis.program.lower import lower  # noqa: E402
from paraxis.program.simulate import simulate, uniform  # noqa: E402

FEW = [(p, v, m) for p in (2, 3, 5) for v in (1, 2, 3) for m in (2, 3, 6, 7)]


def test_no_schedule_is_worse_than_pytorchs() -> None:
    rows = list(bench.against_theirs(FEW))
    assert {row["schedule"] for row in rows} == {"gpipe", "1f1b", "interleaved"} and len(rows) > 40
    assert [row for row in rows if not row["no_worse"]] == []
    assert all(row["makespan@0.25"] > row["makespan@0"] for row in rows), "a slow link is felt"


def test_a_worse_schedule_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "1f1b", SCHEDULES["gpipe"])
    rows = [row for row in bench.against_theirs([(3, 1, 6)]) if row["schedule"] == "1f1b"]
    assert [row["no_worse"] for row in rows] == [False], "for its peak"
    monkeypatch.setitem(SCHEDULES, "gpipe", SCHEDULES["layerwise"])
    rows = [row for row in bench.against_theirs([(3, 1, 6)]) if row["schedule"] == "gpipe"]
    assert [row["no_worse"] for row in rows] == [False], "for its makespan"


def test_zero_bubble_schedules_reach_their_papers_formulas() -> None:
    rows = list(bench.against_paper([(p, 1, m) for p in (2, 3, 5) for m in (3, 5, 9)]))
    assert {row["schedule"] for row in rows} == {"zb-h1", "zb-h2"} and len(rows) > 40
    assert [row for row in rows if not row["reached"]] == []
    assert any(row["bubble"] == 0 for row in rows), "F, I and W alike"
    worse = bench.bubble(simulate(bench.program_of("1f1b", (3, 1, 9)), bench.halves(1, 1, 1)))
    assert worse == 2 * (1 + 2), "1F1B: (p-1)(t_F+t_B)"


def test_interleaved_takes_any_number_of_microbatches_at_the_least_makespan() -> None:
    rows = list(bench.interleaved_ideal([(p, v, m) for p in (3, 4) for v in (2, 3) for m in range(4, 20)]))
    assert len(rows) > 20 and all(row["reached"] for row in rows)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "layerwise"])
def test_every_shape_passes_the_checker(name: str) -> None:
    for p, v, m in FEW:
        if v == 1 or name not in ONE_STAGE:
            plan = Plan(pp=p, interleave=v, microbatches=m, schedule=name)
            program = lower(plan, Layout((1,) * plan.stages))
            assert max(check(program).peak_live) == bench.peak(program)
            assert simulate(program, uniform()).makespan >= 3 * m * plan.interleave
