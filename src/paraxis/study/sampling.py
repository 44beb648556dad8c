"""What is measured in a trial: training to the end, step times, the bubble, bytes and memory."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from paraxis.errors import TaskError
from paraxis.measure.breakdown import replay, timelines, uniform_bubble, window
from paraxis.plan.plan import Plan
from paraxis.session import Session
from paraxis.study.definition import TRAINED
from paraxis.study.trial import Factors
from paraxis.training import KEY, Length, evaluate, train_steps

PACED = {"step_seconds", "epoch_seconds", "samples_per_second"}  # what a step's time tells
CHUNKS = 12  # of steps, in the seconds that step times are sampled
TRACED = 10  # steps of which every instruction is timed
BESIDE = {  # what is kept with a measure
    "epoch_seconds": ("epoch_projected",),
    "bubble": ("bubble_uniform", "bubble_replayed"),
    "steps_to_target": ("steps_trained",),
    "seconds_to_target": ("steps_trained",),
    "final_accuracy": ("steps_trained",),
    "final_loss": ("steps_trained",),
}


@dataclass
class Sampled:
    """Figures and curves of a trial. `epoch_projected`: 1 where an epoch's time is a step's times their number."""

    measures: dict[str, float | None] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sample(session: Session, plan: Plan, factors: Factors, wanted: Collection[str], seconds: float) -> Sampled:
    """Set the plan up and measure what is wanted. Raises what setting up and running raise."""
    length = _length(factors)
    out = Sampled(notes=list(session.known().notes))
    trains = bool(TRAINED & set(wanted)) or ("epoch_seconds" in wanted and bool({"epochs", "steps"} & factors.keys()))
    if trains:
        _hold_cosine(session, length)
    session.setup(KEY, plan)
    if trains:
        _train(session, plan, length, factors, out)
    epoch = session.known().steps_per_epoch
    by_step = {"step_seconds", "samples_per_second"} & set(wanted)
    if by_step or ("epoch_seconds" in wanted and "epoch_seconds" not in out.measures):
        samples = _step_times(session, plan, seconds)
        step = median(samples)
        out.series["step_seconds"] = samples
        out.measures |= {"step_seconds": step, "samples_per_second": session.known().batch / step}
        if "epoch_seconds" not in out.measures:
            out.measures |= {"epoch_seconds": step * epoch if epoch else None, "epoch_projected": 1.0}
    if "memory" in wanted:
        out.measures["memory"] = max(session.ask(KEY, plan, {"do": "memory"}))
    if "bubble" in wanted:
        out.measures |= _bubble(session, plan)
    if "bytes" in wanted:
        out.measures["bytes"] = sum(session.ask(KEY, plan, {"do": "traffic"}))
    kept = {*wanted, *(beside for measure in wanted for beside in BESIDE.get(measure, ()))}
    out.measures = {key: value for key, value in out.measures.items() if key in kept}
    return out


def _length(factors: Factors) -> Length:
    """How long to train: epochs, steps and target as the factors say."""
    words: dict[str, Any] = {key: factors[key] for key in ("epochs", "steps", "target") if key in factors}
    for key, value in words.items():
        if isinstance(value, (str, bool)) or (key != "target" and not isinstance(value, int)):
            raise TaskError(f"{key}={value}: it takes {'a fraction' if key == 'target' else 'a whole number'}")
    return Length(**words)


def _hold_cosine(session: Session, length: Length) -> None:
    """A cosine falls over the whole training unless it is told otherwise."""
    if session.spec.lr_schedule == "cosine" and not session.spec.horizon:
        total = length.total(session.known().steps_per_epoch)
        session.respec(session.spec.model_copy(update={"horizon": total}))


def _train(session: Session, plan: Plan, length: Length, factors: Factors, out: Sampled) -> None:
    """Train and evaluate every epoch, or every so many steps; only the training counts in seconds."""
    facts = session.known()
    total = length.total(facts.steps_per_epoch)
    watched = "validation" if session.spec.validation else "test" if facts.has_test else ""
    if length.target is not None and not watched:
        raise TaskError("target: there is no test set to reach it on; give validation = 0.1, or leave it out")
    every = int(factors.get("evaluate_every", 0)) or facts.steps_per_epoch or total
    done, spent, paces, reached, score = 0, 0.0, [], False, None
    curves: dict[str, list[float]] = {"step": [], "seconds": [], "train_loss": [], "accuracy": [], "loss": []}
    while done < total and not reached:
        count = min(every, total - done)
        begun = time.monotonic()
        losses = train_steps(session, plan, count, done, total)
        took = time.monotonic() - begun
        done, spent = done + count, spent + took
        paces.append(took / count)
        score = evaluate(session, plan, watched) if watched else None
        row = {"step": done, "seconds": spent, "train_loss": sum(losses) / len(losses)}
        row |= {"accuracy": score["accuracy"], "loss": score["loss"]} if score else {}
        for key, value in row.items():
            curves[key].append(value)
        reached = length.target is not None and score is not None and score["accuracy"] >= length.target
    out.series |= {key: values for key, values in curves.items() if values}
    last: dict[str, Any] = score or {"accuracy": None, "loss": curves["train_loss"][-1]}
    out.measures |= {"final_accuracy": last["accuracy"], "final_loss": last["loss"], "steps_trained": done}
    out.measures |= {"steps_to_target": done if reached else None, "seconds_to_target": spent if reached else None}
    if facts.steps_per_epoch and done >= facts.steps_per_epoch:
        out.measures |= {"epoch_seconds": median(paces) * facts.steps_per_epoch, "epoch_projected": 0.0}


def _step_times(session: Session, plan: Plan, seconds: float) -> list[float]:
    """Seconds of a step, one value a chunk of steps; a few chunks at least, unless a step takes longer than all."""
    first = _chunk(session, plan, warm=1, steps=1)
    if first > seconds:
        return [first]
    guess = _chunk(session, plan, warm=0, steps=max(1, min(50, round(0.05 / first))))
    steps = max(1, min(2000, round(seconds / CHUNKS / guess)))
    end = time.monotonic() + seconds
    samples: list[float] = []
    while len(samples) < 3 or (time.monotonic() < end and len(samples) < 100):
        samples.append(_chunk(session, plan, warm=0, steps=steps))
        if len(samples) == 1 and time.monotonic() > end:
            break
    return samples


def _chunk(session: Session, plan: Plan, warm: int, steps: int) -> float:
    answers = session.ask(KEY, plan, {"do": "measure", "warm": warm, "steps": steps, "trace": 0})
    return float(answers[0]["seconds"]) / steps


def _bubble(session: Session, plan: Plan) -> dict[str, float | None]:
    """The bubble as a fraction of ranks x step: measured, of uniform stages in theory, and of the program replayed with
    its own median times."""
    if plan.pp == 1:
        return {"bubble": 0.0, "bubble_uniform": 0.0, "bubble_replayed": 0.0}
    program = session.program(plan)
    answers = session.ask(KEY, plan, {"do": "measure", "warm": 3, "steps": TRACED, "trace": TRACED})
    seen = window(answers)
    if seen is None:
        raise TaskError(f"bubble: {plan.label()} reads no clocks")
    lines = timelines(program, seen.steps)
    return {
        "bubble": median(line.bubble_fraction() for line in lines),
        "bubble_uniform": uniform_bubble(plan),
        "bubble_replayed": replay(program, lines, seen.steps[-1][0]).bubble_fraction(),
    }
