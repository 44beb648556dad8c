"""Sizes that people write, and what a plan that needs too much is told."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paraxis.api import read_recommendation
from paraxis.errors import PlanError
from paraxis.fitting import bytes_of, check_fits, parts, record
from paraxis.plan.plan import Plan, parse
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


# -- what would fit ------------------------------------------------------------------------------------------------

ALL = Memory(0, 0, 0, 100, 0)


class Asked:
    """A session of a network of six layers, that notes of which plans it was asked how many bytes they take."""

    limit = 50

    def __init__(self, size: Callable[[Plan], int]) -> None:
        self.size, self.plans = size, []  # type: ignore[var-annotated]

    def known(self) -> Any:
        return SimpleNamespace(layers=range(6))

    def settled(self, plan: Plan) -> Plan:
        return plan

    def memory(self, plan: Plan) -> Any:
        self.plans.append(plan)
        return SimpleNamespace(total=self.size(plan))


def advice(text: str, size: Callable[[Plan], int]) -> tuple[str, list[Plan]]:
    """What a plan that needs 100 of 50 bytes is told, and which others have been looked at for it."""
    session: Any = Asked(size)
    with pytest.raises(PlanError) as caught:
        check_fits(session, parse(text), ALL)
    told, _, instead = str(caught.value).partition("; ")
    assert "more than the limit" in told
    return instead, session.plans


@pytest.mark.parametrize(
    "text, fits, wanted",
    [
        ("tp=2", "sequence=1", "tp=2,comm=mpi,sequence=1"),
        ("dp=2,tp=2,zero=1", "sequence=1", "dp=2,tp=2,comm=mpi,zero=1,sequence=1"),
        ("dp=2", "sequence=1", "tp=2,comm=mpi,sequence=1"),
        ("tp=2,precision=bf16", "sequence=1", "tp=2,comm=mpi,sequence=1,precision=bf16"),
        ("dp=2", "zero=3", "dp=2,comm=mpi,zero=3"),
        ("dp=2,precision=fp16", "zero=3", "dp=2,comm=mpi,zero=3,precision=fp16"),
        ("tp=2,device=cuda", "sequence=1", "tp=2,comm=mpi,sequence=1,device=cuda"),
        ("dp=2", "precision=bf16", "dp=2,comm=mpi,precision=bf16"),
        ("microbatches=4,device=cuda", "precision=bf16", "microbatches=4,device=cuda,precision=bf16"),
        ("dp=2,precision=bf16", "precision=fp32", "dp=2,comm=mpi"),
    ],
)
def test_what_differs_least_of_what_fits_is_told(text: str, fits: str, wanted: str) -> None:
    instead, _ = advice(text, lambda plan: 40 if f",{fits}," in f",{plan.text()}," else 100)
    words = instead.partition(" would need 4e-05 MB")
    other = parse(wanted).precision
    assert words[0] == wanted
    assert words[2] == ("" if other == parse(text).precision else f", but computes in {other}")


@pytest.mark.parametrize("text", ["dp=2", "tp=2,microbatches=2", "pp=2,microbatches=4,precision=bf16", "device=cuda"])
def test_another_precision_is_looked_at_last(text: str) -> None:
    """Every key changed but that; and nothing twice, nor the plan itself."""
    instead, plans = advice(text, lambda plan: 100)
    own = parse(text)
    assert instead.startswith("none of its kind fits, the smallest is") and own not in plans
    alike = [plan.precision == own.precision for plan in plans]
    assert alike == sorted(alike, reverse=True) and not all(alike) and len(plans) == len(set(plans))
    counts = [len(set(plan.short().split(",")) - set(own.short().split(","))) for plan in plans[:2]]
    assert counts == [1, 1]


def test_sixteen_parts_come_before_sixteen_bits() -> None:
    """What computes the same is told, though another precision would differ in fewer keys."""

    def size(plan: Plan) -> int:
        return 40 if plan.precision == "bf16" or (plan.microbatches == 16 and plan.recompute) else 100

    instead, _ = advice("dp=2", size)
    assert instead == "dp=2,microbatches=16,comm=mpi,recompute=all would need 4e-05 MB"


def test_the_native_engine_is_told_of_no_other_precision() -> None:
    instead, plans = advice("dp=2,engine=native", lambda plan: 40 if plan.precision == "bf16" else 100)
    assert instead.startswith("none of its kind fits") and {plan.engine for plan in plans} == {"native"}


def test_what_the_network_cannot_share_is_not_told() -> None:
    def size(plan: Plan) -> int:
        if plan.sequence:
            raise PlanError("sequence=1: nothing of what tp splits has (samples, tokens, width)")
        return 40 if plan.microbatches == 4 else 100

    assert advice("tp=2", size)[0] == "tp=2,microbatches=4,comm=mpi would need 4e-05 MB"
