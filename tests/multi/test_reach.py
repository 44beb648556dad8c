"""Trials of the batch-size study on a real resident rank."""

from collections.abc import Iterator

import pytest

from paraxis.errors import TaskError
from paraxis.measure.noise import noise_scale
from paraxis.plan.plan import parse
from paraxis.session import Session, open_session
from paraxis.study.reach import by_rule, reach
from paraxis.task.spec import TaskSpec

SPEC = TaskSpec(network="mlp:64-32-4", data="synthetic:2000,64,4", batch=32, lr=0.1, momentum=0.9, validation=0.2)
PLAN = parse("serial")


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(SPEC, {}, {}, None, lambda what, done: None) as made:
        yield made


def test_steps_to_a_target_are_found_and_found_again(session: Session) -> None:
    found = reach(session, SPEC, PLAN, 0.9, 2000)
    assert found.steps is not None and found.looks[0] == 1 and found.seconds > 0 and found.stopped == ""
    assert found.accuracies[-1] >= 0.9 > max(found.accuracies[:-1], default=0.0)
    assert (found.looks[-2] if len(found.looks) > 1 else 0) <= found.steps <= found.looks[-1]
    again = reach(session, SPEC, PLAN, 0.9, 2000)
    assert (again.steps, again.looks, again.accuracies) == (found.steps, found.looks, found.accuracies)
    slow = reach(session, SPEC.model_copy(update={"lr": 1e-4}), PLAN, 0.9, 5)
    assert slow.steps is None and slow.looks == [1, 2, 3, 4, 5] and "within 5 steps" in slow.stopped


def test_a_trial_that_diverges_has_not_reached_the_target_and_the_next_one_runs(session: Session) -> None:
    wild = reach(session, SPEC.model_copy(update={"lr": 1e30}), PLAN, 0.99, 50)
    assert wild.steps is None and "lower lr" in wild.stopped
    assert reach(session, SPEC, PLAN, 0.5, 500).steps is not None


def test_rules_give_measures_and_series(session: Session) -> None:
    measures, series, why = by_rule(session, SPEC, PLAN, {"rule": "reach", "target": 0.9, "steps": 2000})
    assert measures["steps_to_target"] and why == "" and len(series["step"]) == len(series["accuracy"])
    measures, series, why = by_rule(session, SPEC, PLAN, {"rule": "noise", "steps": 40, "microbatches": 4})
    assert measures["microbatch"] == 8 and len(series["square_small"]) == len(series["square_large"]) == 40
    assert noise_scale(series["square_small"], series["square_large"], 8, 32).scale.value > 0
    with pytest.raises(TaskError, match="reach or noise"):
        by_rule(session, SPEC, PLAN, {"rule": "other"})
    with pytest.raises(TaskError, match="equal parts of 32"):
        by_rule(session, SPEC, PLAN, {"rule": "noise", "steps": 40, "microbatches": 5})
