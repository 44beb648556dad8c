"""The train job: to the end with one plan, evaluated every epoch, weights kept after every epoch."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from paraxis.errors import PlanError, TaskError
from paraxis.fitting import advised, record
from paraxis.plan.plan import Plan
from paraxis.plan.precision import SCALED
from paraxis.proof import mean_losses, remarks
from paraxis.run.joined import JoinedPool
from paraxis.run.shards import together
from paraxis.session import Session, Tell, check_batch, open_session, writable
from paraxis.task.spec import TaskSpec

Epoch = dict[str, Any]
KEY = "train"  # under which the plan is set up


@dataclass(frozen=True)
class Length:
    """When to stop: after epochs, after steps, or when a target accuracy (0 to 1) is reached, whichever comes first."""

    epochs: int | None = None
    steps: int | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        for key in ("epochs", "steps"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise TaskError(f"{key}={value}: it takes 1 or more")
        if self.target is not None and not 0 < self.target <= 1:
            raise TaskError(f"target={self.target:g}: it takes an accuracy above 0 and at most 1, such as 0.98")

    def total(self, steps_per_epoch: int | None) -> int:
        """Steps at most; raises TaskError where an epoch's length is not known."""
        if self.steps is not None and self.epochs is None:
            return self.steps
        if steps_per_epoch is None:
            raise TaskError("batches() does not tell how long an epoch is: give --steps instead of --epochs")
        epochs = self.epochs or (100 if self.target else 1)
        return min(epochs * steps_per_epoch, self.steps or epochs * steps_per_epoch)


def train_task(
    spec: TaskSpec,
    objects: dict[str, Any],
    plan: Plan,
    length: Length,
    out: Path,
    tell: Tell,
    each_epoch: Callable[[Epoch], None],
    joined: JoinedPool | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Train and return {plan, epochs, losses, test, weights, seconds, computed_memory}.

    `limit` are the bytes that a rank may hold. Raises PlanError, TaskError, RankError.
    """
    if joined and joined.size != plan.processes:
        raise PlanError(f"{plan.short()} fills {plan.processes} of the {joined.size} ranks that were started")
    check_batch(spec, plan)
    sizes = {plan.comm: plan.processes} if plan.processes > 1 else {}
    writable(out)
    with open_session(spec, objects, sizes, joined, tell) as session:
        session.limit = limit
        missing = session.begin(("solo", *sizes))
        if plan.comm in missing:
            raise PlanError(missing[plan.comm])
        facts = session.known()
        total = length.total(facts.steps_per_epoch)
        if length.target is not None and not (facts.has_test or spec.validation):
            raise TaskError("target: there is no test set to reach it on; add --validation 0.1 or leave it out")
        if spec.lr_schedule == "cosine" and not spec.horizon:
            session.respec(spec.model_copy(update={"horizon": total}))
        plan = session.settled(plan)
        if plan.engine != "plain":
            session.program(plan)
        memory = record(session.memory(plan))
        session.setup(KEY, plan)
        begun = time.monotonic()
        epochs, losses = _epochs(session, plan, total, length.target, out, each_epoch)
        weights = _save(session, plan, out)
        test = evaluate(session, plan, "test") if facts.has_test else None
        notes = [*facts.notes, *remarks(session, KEY, plan), *_told(session, plan, total)]
    seconds = time.monotonic() - begun
    document = {"plan": plan.text(), "label": plan.label(), "epochs": epochs, "losses": losses, "seconds": seconds}
    document["computed_memory"] = memory.model_dump() if memory else None
    return document | {"test": test, "weights": str(weights), "notes": notes}


def _told(session: Session, plan: Plan, total: int) -> list[str]:
    """What there is to say of how a plan has computed."""
    notes = []
    if plan.precision == SCALED and (skipped := max(session.ask(KEY, plan, {"do": "skipped"}))):
        notes.append(f"{skipped} of {total} steps were skipped, whose gradients overflowed in {plan.precision}")
    if plan.compile:
        seconds = max(own or 0.0 for own in session.ask(KEY, plan, {"do": "compiling"}))
        notes.append(f"compiling took {seconds:.1f} s of it")
    return notes


def _epochs(
    session: Session, plan: Plan, total: int, target: float | None, out: Path, each_epoch: Callable[[Epoch], None]
) -> tuple[list[Epoch], list[float]]:
    facts = session.known()
    every = facts.steps_per_epoch or total
    watched = "validation" if session.spec.validation else "test" if facts.has_test else ""
    epochs: list[Epoch] = []
    losses: list[float] = []
    while len(losses) < total:
        count = min(every, total - len(losses))
        begun = time.monotonic()
        fresh = train_steps(session, plan, count, len(losses), total)
        losses += fresh
        seconds = time.monotonic() - begun
        score = evaluate(session, plan, watched) if watched else None
        mean = sum(fresh) / len(fresh)
        epoch = {
            "epoch": len(epochs) + 1,
            "steps": len(losses),
            "loss": mean,
            "seconds": seconds,
            watched or "test": score,
        }
        epochs.append(epoch)
        _save(session, plan, out)
        each_epoch(epoch)
        if target is not None and score is not None and score["accuracy"] >= target:
            break
    if plan.engine != "plain":
        session.ask(KEY, plan, {"do": "settle"})
    return epochs, losses


def train_steps(session: Session, plan: Plan, count: int, done: int, total: int, key: str = KEY) -> list[float]:
    """Train `count` steps more of what is set up under a key; the mean loss of each."""
    pool = session.home(plan)

    def news(message: dict[str, Any]) -> None:
        session.tell("training", (done + count - message["left"]) / total)

    request = {"do": "train", "key": key, "steps": count}
    with advised(session, key, plan):
        answers = pool.ask(request, range(plan.processes), news=news)
    return mean_losses([a["losses"] for a in answers])


def evaluate(session: Session, plan: Plan, which: str, key: str = KEY, most: int = 0) -> dict[str, float]:
    """Loss, accuracy and samples of a held-out set, or of at most so many spread over it."""
    answers = session.ask(key, plan, {"do": "evaluate", "set": which, "most": most})
    best = max(answers, key=lambda a: a["weight"])  # only the last stage's ranks have seen outputs
    weight = max(best["weight"], 1e-30)
    return {"loss": best["loss"] / weight, "accuracy": best["hits"] / best["samples"], "samples": best["samples"]}


def _save(session: Session, plan: Plan, out: Path) -> Path:
    """One plain state_dict from the parts of all stages; written whole or not at all."""
    if plan.processes == 1 or plan.zero == 3 or (plan.dp > 1 and not plan.exact):
        ranks = list(range(plan.processes))  # replicas agree, or gather, before they are saved, which takes all of them
    else:
        ranks = [rank for stage in range(plan.pp) for rank in plan.mesh.group(plan.mesh.rank(0, stage), "tp")]
    state: dict[str, Any] = {}
    parts = [str(session.folder / f"part-{rank}.safetensors") for rank in range(plan.processes)]
    answers = session.home(plan).ask({"do": "save", "key": KEY, "files": parts}, ranks)
    for place in range(0, len(ranks), plan.tp):
        own = [load_file(parts[rank]) for rank in ranks[place : place + plan.tp]]
        state |= together(own, answers[place]["split"])
    path = out / "weights.safetensors"
    draft = path.with_suffix(".part")
    save_file(state, draft, {"plan": plan.text(), "network": session.spec.network, "format": "pt"})
    draft.replace(path)
    return path
