"""Sizes that people write, and what a plan that needs too much is told."""

import json
from pathlib import Path

import pytest

from paraxis.api import read_recommendation
from paraxis.errors import PlanError
from paraxis.fitting import bytes_of, parts, record
from paraxis.plan.plan import Plan
from paraxis.plan.space import space
from paraxis.program.memory import Memory

MEMORY = Memory(45_000_000, 45_000_000, 90_000_000, 231_600_000, 0)


@pytest.mark.parametrize(
    "text, wanted",
    [("200M", 200_000_000), ("2G", 2 * 10**9), ("1.5GB", 15 * 10**8), ("2GiB", 2 << 30), ("64Ki", 65536), ("123", 123)],
)
def test_sizes(text: str, wanted: int) -> None:
    assert bytes_of(text) == wanted


@pytest.mark.parametrize("text", ["", "M", "-3M", "0", "2 apples", "1e999", "nanG"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="it takes a size above 0, such as 200M or 2G"):
        bytes_of(text)


def test_numbers_in_words_and_in_records() -> None:
    told = "412 MB a rank (parameters 45, gradients 45, optimizer 90, activations 232)"
    assert parts(MEMORY) == told
    kept = record(MEMORY)
    assert kept is not None and kept.total == 411_600_000 and parts(kept) == told and record(None) is None


def test_the_space_recomputes_one_plan_a_grid_where_asked() -> None:
    more = set(space(4, 8, recompute=True)) - set(space(4, 8))
    assert all(plan.recompute == "all" and plan.engine == "torch" for plan in more)
    grids = [plan.mesh for plan in more]
    assert len(grids) == len(set(grids)) and {(m.dp, m.pp) for m in grids if m.tp == 1} >= {
        (1, 1),
        (4, 1),
        (1, 4),
        (2, 2),
    }
    assert not any(plan.recompute for plan in space(4, 8))


@pytest.mark.parametrize(
    "total, limit, known", [(100, 100, True), (101, 100, False), (None, 100, False), (None, None, True)]
)
def test_an_earlier_recommendation_serves_if_it_fits(
    total: int | None, limit: int | None, known: bool, tmp_path: Path
) -> None:
    plan = Plan(dp=2).text()
    memory = None if total is None else {"total": total}
    document = {"task": {"network": "cnn"}, "recommendation": {"plan": plan}}
    document["results"] = [{"plan": plan, "computed_memory": memory}]  # type: ignore[assignment]
    (tmp_path / "study.json").write_text(json.dumps(document))
    assert read_recommendation(tmp_path, "cnn", limit) == (plan if known else None)
