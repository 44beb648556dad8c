"""Random plans of every axis at once, through the reference interpreter: each computes what the serial run computes."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_reference import EXACT, WRONG
from test_tensor_parallel import parts_differ, ran

from paraxis.plan.plan import Plan
from paraxis.plan.schedules import ONE_STAGE, SCHEDULES, STAGES
from paraxis.task.spec import TaskSpec

FEW, MANY = 4, 200
RELAXED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Of two to eight ranks, over 8 samples and a network of 6 layers, the last of which shares a weight."""
    dp, pp, tp = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    m = draw(st.sampled_from([1, 2, 4]))
    name = draw(st.sampled_from([*SCHEDULES]))
    v = 1 if name in ONE_STAGE or pp == 1 else draw(st.integers(STAGES.get(name, 1), 2))
    more: dict[str, Any] = {"zero": draw(st.integers(0, 3)), "schedule": name if pp > 1 else ""}
    if tp == 1:
        more |= {"bucket_bytes": draw(st.sampled_from([0, 100, 2000]))}
        more |= {"recompute": draw(st.sampled_from(["", "all", "0"]))}
    plan = Plan(dp=dp, pp=pp, tp=tp, microbatches=m, interleave=v, **more)
    assume(1 < plan.mesh.size <= 8)
    return plan


@pytest.fixture(scope="module")
def spec(folder: Path) -> TaskSpec:
    """A tiny transformer with dropout, a weight that the first layer and the last share, and a clipped gradient."""
    path = folder / "numbers.txt"
    path.write_text(" ".join(str(n) for n in range(800)))
    return TaskSpec(network="gpt:4-8-2-4,dropout=0.2", data=f"text:{path}", batch=8, lr=0.02, clip=0.5, validation=0.2)


@given(plans())
@settings(max_examples=FEW, **RELAXED)
def test_random_plans_compute_the_serial_step(spec: TaskSpec, plan: Plan) -> None:
    assert parts_differ(spec, plan, ran(spec, plan)) < EXACT


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a second each, of which a machine that others keep busy makes several
@given(plans())
@settings(max_examples=MANY, **RELAXED)
def test_many_random_plans_compute_the_serial_step(spec: TaskSpec, plan: Plan) -> None:
    assert parts_differ(spec, plan, ran(spec, plan)) < EXACT


@pytest.mark.parametrize("fault", ["untied", "late-weights", "lost-shard", "dropped-output"])
def test_a_mistake_in_one_of_them_is_seen(fault: str, spec: TaskSpec) -> None:
    plan = Plan(dp=2, pp=2, tp=1 + (fault == "dropped-output"), microbatches=2, schedule="zb-h1", zero=3)
    assert parts_differ(spec, plan, ran(spec, plan, fault)) > WRONG
