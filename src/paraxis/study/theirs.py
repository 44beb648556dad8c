"""Training by the rules of the original study's OpenMP program, to show what each of them costs.

Every thread starts from random weights of its own, trains its share of every epoch on them alone, and only at the end
are the threads' weights combined: by their sum, as it did, and by their mean.
"""

import time
from dataclasses import replace

import torch

from paraxis.errors import Diverged, PlanError, TaskError
from paraxis.plan.plan import Plan
from paraxis.program.lower import lower
from paraxis.run import openmp
from paraxis.run.openmp import Team
from paraxis.study.sampling import Sampled
from paraxis.study.trial import Factors
from paraxis.task.networks import build
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task


def train_as_they_did(spec: TaskSpec, factors: Factors) -> Sampled:
    """`workers` threads over `epochs`; the spec's batch is what one thread takes for one step.

    Measures: final_accuracy (weights summed), mean_accuracy (weights averaged), alone_accuracy (each thread by itself,
    averaged over threads), epoch_seconds. Raises TaskError, PlanError, Diverged.
    """
    workers, epochs = (int(factors.get(key, 1)) for key in ("workers", "epochs"))
    if workers < 1 or epochs < 1 or spec.own_file:
        raise TaskError("rule=theirs takes workers and epochs of 1 or more and a shipped network")
    torch.set_num_threads(1)
    team = _team(spec, workers)
    steps = team.task.train.steps_per_epoch or 1
    begun = time.perf_counter()
    team.steps(epochs * steps)
    seconds = (time.perf_counter() - begun) / epochs
    losses = [loss / weight for loss, weight in team.losses]
    if not all(map(_finite, losses)):
        raise Diverged("the loss is no longer a number: lower lr")
    found = Sampled(series={"train_loss": [sum(losses[-steps:]) / steps]})
    found.measures = {"epoch_seconds": seconds, "epoch_projected": 0.0, "alone_accuracy": _accuracy(team)}
    if workers > 1:
        team.settle()
    found.measures["mean_accuracy"] = _accuracy(team)
    for values in team.buffers("params"):
        values.mul_(workers)
    found.measures["final_accuracy"] = _accuracy(team)
    return found


def _team(spec: TaskSpec, workers: int) -> Team:
    """Threads with random weights of their own, that never agree by themselves."""
    whole = spec.model_copy(update={"batch": (spec.batch or 1) * workers})
    task = make_task(whole, {}, torch.float32)
    if task.test is None:
        raise TaskError("rule=theirs: there is no test set to score on")
    plan = (
        Plan(dp=workers, engine="native", comm="openmp", sync="average@epoch") if workers > 1 else Plan(engine="native")
    )
    program = lower(plan, task.layout(), task.train.steps_per_epoch or 1)
    if workers > 1:
        program = replace(program, period=(("local", 1),))
    team = openmp.start(task, program, hogwild=False)
    for rank in range(workers):
        state = build(spec.network, 1000 * (spec.seed + 1) + rank).state_dict()
        for layer, part, _ in team.ensemble.parts(rank):
            name = f"{layer}.{part}"
            if name not in state:
                raise PlanError(f"rule=theirs takes a plain chain of layers; {spec.network} has {name}")
            team.ensemble.put(rank, layer, part, state[name].contiguous().numpy().reshape(-1))
    return team


def _accuracy(team: Team) -> float:
    """Fraction of the test set that is right. Each thread scores its share with its own weights."""
    source = team.task.test
    assert source is not None
    return team.evaluate(source)[2] / float(source.size)  # type: ignore[attr-defined]


def _finite(value: float) -> bool:
    return value - value == 0
