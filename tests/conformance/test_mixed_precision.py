"""Plans in bf16 and fp16 against the serial run in the same precision: within the band of another order of its sums.

Every fault must fall out of that band; and a step whose scaled gradients overflow is skipped by all ranks or by none.
"""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from test_reference import TASKS, outcome, settle, spec_of
from test_tensor_parallel import NETS, spec_named
from torch import Tensor

from paraxis.bands import LEAST, UNIT, Bands, losses_apart
from paraxis.engine.torch_engine import TorchEngine
from paraxis.plan.plan import Plan, parse, period
from paraxis.program.check import check
from paraxis.program.faults import FAULTS
from paraxis.program.lower import lower
from paraxis.run import reference, serial
from paraxis.run.interpreter import Rank
from paraxis.run.weights import relative, rms
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

STEPS = 6
State = dict[str, Tensor]


def named(folder: Path, name: str, shared: bool) -> TaskSpec:
    return spec_named(folder, name) if shared or name not in TASKS else spec_of(folder, name, *TASKS[name])


def started(spec: TaskSpec, plan: Plan, fault: str = "", scale: float = 0.0) -> list[Rank]:
    tasks = [make_task(spec) for _ in range(plan.mesh.size)]
    program = lower(plan, tasks[0].layout(), tasks[0].train.steps_per_epoch or 1)
    check(program)
    program = FAULTS[fault].mutated(plan, program) if fault else program

    def engine(rank: int) -> TorchEngine:
        made = TorchEngine(tasks[rank], program, rank)
        if scale and made.scaling:
            made.scaling.scale = scale
        if fault and rank == plan.mesh.size - 1:
            FAULTS[fault].spoil(made)
        return made

    return reference.start(program, engine)


def ran(spec: TaskSpec, plan: Plan, fault: str = "", scale: float = 0.0) -> list[Rank]:
    ranks = started(spec, plan, fault, scale)
    reference.run_steps(ranks, STEPS)
    settle(ranks)
    return ranks


@cache
def alone(
    spec: TaskSpec, precision: str, replicas: int, every: int, sync: str, groups: int, parts: int, scale: float = 0.0
) -> tuple[list[float], State, dict[str, float], int]:
    """(losses, weights, how far each has moved, steps skipped) of the serial run."""
    copies = [serial.replica(make_task(spec), precision, parts) for _ in range(replicas)]
    if scale:
        copies[0].scaler = torch.amp.GradScaler("cpu", scale)
    before = {k: v.clone() for k, v in copies[0].task.net.state_dict().items()}
    losses = serial.emulate(copies, 0, STEPS, groups, every, sync)
    serial.average([c.task.net for c in copies])
    after = copies[0].task.net.state_dict()
    moved = {k: rms(after[k] - before[k]) for k in after if after[k].is_floating_point()}
    return losses, after, moved, copies[0].skipped


def furthest(spec: TaskSpec, plan: Plan, ranks: list[Rank], scale: float = 0.0) -> tuple[float, float, str]:
    """What `bands` says of ranks of the reference interpreter."""
    own = make_task(spec)
    statistics, replicas = own.layout().statistics, 1 if plan.exact else plan.dp
    every = period(plan.sync, own.train.steps_per_epoch or 1) if replicas > 1 else 1
    slices = plan.dp // replicas * plan.microbatches
    words = spec, plan.precision, replicas, every, plan.sync if replicas > 1 else "gradient"
    right = alone(*words, slices if statistics else 1, 1, scale)
    regrouped = slices if statistics or slices > 1 else 4
    other = alone(*words, regrouped, plan.tp if plan.tp > 1 else 2 if statistics else 1, scale)
    tensors, whole = relative(other[1], right[1], {}, right[2])
    bands = Bands(tensors, whole, max(losses_apart(other[0], right[0]), LEAST * UNIT[plan.precision]))
    found = outcome(ranks)
    apart = [relative(s, right[1], r.engine.shards, right[2])[0] for r, s in zip(ranks, found.states, strict=True)]
    return bands.furthest(apart, losses_apart(found.losses, right[0]), plan.tp)


CASES = [
    *(("mlp", text) for text in ("dp=2", "dp=2,zero=3", "tp=2", "dp=2,sync=average@2", "recompute=all,microbatches=2")),
    *(("mlp", text) for text in ("pp=3,schedule=zb-h1,microbatches=4", "dp=2,pp=2,microbatches=2,zero=1")),
    *(("cnn", text) for text in ("dp=2", "pp=2,microbatches=2", "pp=2,microbatches=2,recompute=all")),
    ("cnn", "dp=2,pp=2,microbatches=4,zero=3,schedule=zb-h1"),
    ("transformer", "dp=2,pp=2,microbatches=2"),
    *(("batch norm", text) for text in ("dp=2", "pp=2,microbatches=2,recompute=1")),
    *(("gpt", text) for text in ("tp=2", "tp=2,sequence=1", "pp=2,microbatches=2", "microbatches=2,recompute=all")),
    ("blocks", "dp=2,tp=2"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name, text", CASES)
def test_plans_lie_within_the_band_of_the_serial_run(name: str, text: str, precision: str, folder: Path) -> None:
    plan = parse(f"{text},precision={precision}")
    spec = named(folder, name, plan.tp > 1 and name in NETS)
    apart, limit, what = furthest(spec, plan, ran(spec, plan))
    assert apart <= limit, what
    assert limit < 0.7 or "weight" not in what  # a band that everything passes would prove nothing


SEEN = [
    *(("mlp", "dp=2", fault) for fault in ("dropped-reduction", "mean-of-sums", "all-data", "random-start", "factor")),
    *(("mlp", "dp=2", fault) for fault in ("late-batch", "lost-update", "early-update")),
    ("mlp", "dp=2,zero=3", "stale-shard"),
    *(("mlp", "pp=2,microbatches=4", fault) for fault in ("swapped-microbatch", "lost-backward", "other-rate")),
    *(("mlp", "tp=2", fault) for fault in ("dropped-output", "summed-whole", "counted-whole")),
    *(("cnn", "dp=2", fault) for fault in ("dropped-reduction", "wrong-mask")),
    *(("gpt", "tp=2", fault) for fault in ("dropped-output", "dropped-input-gradient", "wrong-part", "lost-update")),
    ("gpt", "pp=2,microbatches=2", "untied"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name, text, fault", SEEN)
def test_faults_lie_outside_of_it(name: str, text: str, fault: str, precision: str, folder: Path) -> None:
    plan = parse(f"{text},precision={precision}")
    spec = named(folder, name, plan.tp > 1)
    apart, limit, _ = furthest(spec, plan, ran(spec, plan, fault))
    assert not apart <= limit


def test_another_precision_lies_outside_of_it(folder: Path) -> None:
    """A plan that forgot its precision would not pass for one that has it."""
    spec, plan = spec_of(folder, "mlp", *TASKS["mlp"]), parse("dp=2,precision=fp16")
    for other in ("bf16", "fp32"):
        apart, limit, _ = furthest(spec, plan, ran(spec, replace(plan, precision=other)))
        assert (apart > limit) == (other == "bf16")  # fp32 rounds less than fp16, which rounds little: within its band


# -- overflows -----------------------------------------------------------------------------------------------------

TOO_MUCH = 2.0**19  # of which some steps overflow and others do not
ALL_SKIP = ("dp=2", "pp=2,microbatches=2", "tp=2", "dp=2,zero=1", "dp=2,zero=3")


@pytest.mark.parametrize("text", ALL_SKIP)
def test_all_ranks_skip_the_steps_that_the_serial_run_skips(text: str, folder: Path) -> None:
    spec, plan = spec_named(folder, "mlp"), parse(f"{text},precision=fp16")
    ranks = ran(spec, plan, scale=TOO_MUCH)
    told = {(r.engine.scaling.skipped, r.engine.scaling.scale) for r in ranks}
    skipped = alone(spec, "fp16", 1, 1, "gradient", 1, 1, TOO_MUCH)[3]
    assert told == {(skipped, TOO_MUCH / 2**skipped)} and 0 < skipped < STEPS
    apart, limit, what = furthest(spec, plan, ranks, TOO_MUCH)
    assert apart <= limit, what
    assert all(bool(r.engine.flat.params.isfinite().all()) for r in ranks)


@pytest.mark.parametrize("text", ["pp=2,microbatches=2", "tp=2", "dp=2,zero=1"])
def test_one_rank_that_overflows_stops_all(text: str, folder: Path) -> None:
    """Ranks hear of an overflow that is none of theirs, and a rank that hears of none would go on alone."""
    spec, plan = spec_named(folder, "mlp"), parse(f"{text},precision=fp16")
    ranks = started(spec, plan)
    last = ranks[-1].engine
    norm = last.gradient_norm

    def overflowing() -> None:
        norm()
        last.norm[0] = math.inf

    bodies = ranks[-1].bodies["step"]
    place = next(n for n, i in enumerate(ranks[-1].program.body("step")[-1]) if i.rule == "norm")
    bodies[place] = overflowing
    before = [rank.engine.flat.params.clone() for rank in ranks]
    reference.run_steps(ranks, 1)
    for rank, old in zip(ranks, before, strict=True):
        assert rank.engine.scaling.skipped == 1 and torch.equal(rank.engine.flat.params, old)
    bodies[place] = norm
    reference.run_steps(ranks, 1)
    assert all(not torch.equal(r.engine.flat.params, old) for r, old in zip(ranks, before, strict=True))
