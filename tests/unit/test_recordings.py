"""When a body is recorded, what a recording takes for granted, what it is fed, and how it falls back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paraxis.engine import fed, rules
from paraxis.engine.fed import fed_by
from paraxis.engine.graphs import Recordings, signature, stretches
from paraxis.errors import PlanError, TaskError
from paraxis.plan.plan import parse

torch.set_num_threads(1)


class Recorded(Recordings):
    """With a way to record."""

    record: Callable[[dict[Any, Any]], list[Callable[[], None]]]

    def next(self, samples: dict[Any, Any], granted: Any) -> Any:  # type: ignore[override]
        """As it is asked by a body."""
        return super().next(samples, granted, self.record)


def recordings(fails: str = "", **options: int) -> tuple[Recorded, list[dict[Any, Any]], list[str]]:
    """With what was recorded and what was told."""
    made: list[dict[Any, Any]] = []
    told: list[str] = []

    def record(inputs: dict[Any, Any]) -> list[Callable[[], None]]:
        made.append(inputs)
        if fails:
            raise RuntimeError(fails)
        return [lambda: None]

    own = Recorded(told.append, **options)
    own.record = record
    return own, made, told


def batch(size: int, value: float = 0.0) -> dict[Any, Any]:
    return {(0, 0): (torch.full((size, 3), value), torch.zeros(size, dtype=torch.int64))}


def test_it_is_recorded_after_so_many_passes_and_then_replayed() -> None:
    own, made, _ = recordings(warm=2)
    assert [own.next(batch(4), ()) is None for _ in range(5)] == [True, True, False, False, False]
    assert len(made) == 1


def test_samples_are_brought_to_where_the_recording_reads_them() -> None:
    own, made, _ = recordings(warm=0)
    given = batch(4, 1.0)
    own.next(given, ())
    place = made[0][0, 0][0]
    assert place.data_ptr() != given[0, 0][0].data_ptr(), "not where they happened to lie"
    for value in (2.0, 3.0):
        own.next(batch(4, value), ())
        assert bool((place == value).all())


def test_other_shapes_types_and_settings_are_recorded_anew_and_old_ones_are_kept() -> None:
    own, made, _ = recordings(warm=1)
    seen = [(batch(4), ()), (batch(5), ()), (batch(4), ("momentum", 0.5))]
    for samples, granted in seen * 3:
        own.next(samples, granted)
    assert len(made) == 3
    assert len({signature(batch(4)), signature(batch(5)), signature({(0, 0): batch(4)[0, 0], "length": 3})}) == 3
    double = {(0, 0): tuple(t.double() for t in batch(4)[0, 0])}
    assert signature(double) != signature(batch(4))


def test_more_shapes_than_memory_is_kept_for_are_run_as_they_are() -> None:
    own, made, told = recordings(warm=0, most=2)
    assert [own.next(batch(size), ()) is None for size in (2, 3, 4, 2)] == [False, False, True, True]
    assert len(made) == 2 and not own.known, "what was recorded is let go"
    assert told == ["graphs: fell back to eager: more than 2 shapes of samples or settings of the optimiser"]


def test_what_cannot_be_recorded_is_told_once_in_one_line() -> None:
    own, made, told = recordings("a value\n  was asked for", warm=1)
    assert [own.next(batch(4), ()) for _ in range(4)] == [None] * 4
    assert len(made) == 1 and told == ["graphs: fell back to eager: RuntimeError: a value was asked for"]


@pytest.mark.parametrize(
    "free, wanted", [("", []), ("0", []), ("1", [(0, 1)]), ("0110111", [(1, 3), (4, 7)]), ("1101", [(0, 2), (3, 4)])]
)
def test_stretches(free: str, wanted: list[tuple[int, int]]) -> None:
    assert [(r.start, r.stop) for r in stretches([c == "1" for c in free])] == wanted


def test_a_letter_brings_numbers_and_keys() -> None:
    calls = [("drop", 0), ("drop", 1)]
    own = fed_by(torch.device("cpu"), 2, calls)
    key = 0xF234567890ABCDEF
    own.send([0.1, -2.5], [key, 7])
    assert own.numbers.tolist() == [0.1, -2.5]
    low, high = (int(word) & 0xFFFFFFFF for word in own.word(calls[0]))
    assert (high << 32) + low == key and int(own.word(calls[1])[0]) == 7
    with pytest.raises(TaskError, match="dropout in other was not there when the network was tried"):
        own.word(("other", 0))


SGD = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
ADAM = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
GROUPS = [
    *(("sgd", SGD | more) for more in ({}, {"weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True})),
    *(
        ("adam", ADAM | more)
        for more in ({}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": 1})
    ),
]


@pytest.mark.parametrize("memory", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name, group", GROUPS)
def test_rules_that_are_fed_compute_what_the_others_compute(name: str, group: dict[str, Any], memory: bool) -> None:
    source = torch.Generator().manual_seed(1)
    mine = theirs = torch.randn(50, dtype=torch.float64, generator=source)
    mine, mine_state, their_state = mine.clone(), {}, {}
    count, numbers, rule = fed.RULES[name]
    for step in range(5):
        gradient: Tensor = torch.randn(50, dtype=torch.float64, generator=source)
        group = group | {"lr": 0.1 / (step + 1)}
        scale = torch.tensor(0.25, dtype=torch.float64) if memory else 0.25
        rules.RULES[name](theirs, gradient.clone(), their_state, group, 0.25)
        if step == 0:  # what is lazily made has been made by steps that were not recorded
            mine_state = {key: value.clone() for key, value in their_state.items()}
            mine.copy_(theirs)
            continue
        values = numbers(mine_state, group)
        assert len(values) == count
        rule(mine, gradient.clone(), mine_state, group, torch.tensor(values, dtype=torch.float64), scale)
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-15)
    assert mine_state.keys() == their_state.keys()
    assert all(torch.equal(mine_state[key], their_state[key]) for key in ("step",) if key in their_state)


@pytest.mark.parametrize("memory", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("group", [group for name, group in GROUPS if name == "adam"])
def test_adam_in_one_kernel_is_adam(group: dict[str, Any], memory: bool) -> None:
    """The kernel that GPUs take, here a CPU's."""
    source = torch.Generator().manual_seed(1)
    theirs = torch.randn(50, generator=source)
    mine, mine_state, their_state = theirs.clone(), {}, {}
    for step in range(1, 5):
        gradient = torch.randn(50, generator=source)
        rules.adam(theirs, gradient.clone(), their_state, group, 0.25)
        mine_state = mine_state or {"first": torch.zeros(50), "second": torch.zeros(50)}
        words: list[Any] = [torch.tensor(0.1), torch.tensor(0.25)] if memory else [0.1, 0.25]
        rules.adam_in_one(mine, gradient, mine_state, group, torch.tensor(float(step)), *words)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_graphs_are_for_our_engine_on_gpus() -> None:
    assert parse("device=cuda,graphs=1").graphs == 1
    for text, reason in (
        ("graphs=1", "CUDA graphs take device=cuda"),
        ("engine=plain,device=cuda,graphs=1", "as it st"),
    ):
        with pytest.raises(PlanError, match=reason):
            parse(text)
