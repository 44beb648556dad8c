"""Paraxis from Python: the three main jobs on shipped networks, files, or live objects of a notebook."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paraxis.errors import TaskError
from paraxis.fitting import bytes_of
from paraxis.measure.records import Study, write
from paraxis.plan.plan import Plan, parse
from paraxis.session import Tell, writable
from paraxis.task.spec import TaskSpec

OBJECTS = ("example", "inputs", "loss", "optimizer", "scheduler", "stages")


def silent(what: str, fraction: float) -> None:
    """A `tell` that says nothing."""


def make_spec(network: Any = "cnn", **settings: Any) -> TaskSpec:
    """A TaskSpec from keyword arguments; raises TaskError in one line for what does not fit."""
    name = {"network": network} if isinstance(network, str) else {"live": True, "network": type(network).__name__}
    try:
        return TaskSpec(**name, **{key: value for key, value in settings.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        text = first["msg"].removeprefix("Value error, ")
        raise TaskError(f"{where}: {text}" if where else text) from None


def explore(
    network: Any = "cnn",
    batches: Any = None,
    *,
    workers: int | None = None,
    budget: float = 60.0,
    comms: tuple[str, ...] = ("openmp", "mpi", "gloo"),
    memory_limit: str | None = None,
    out: str | Path | None = None,
    tell: Tell = silent,
    **settings: Any,
) -> Study:
    """Find out which plan to train a network with on this machine; `out` is a folder for records and report.html.

    `network` is a shipped name, FILE.py[:FUNCTION], an nn.Module or a function that makes one; `batches` any iterable
    that can be read again. Settings are TaskSpec's fields, and loss, inputs, optimizer, scheduler, stages, example.
    Raises TaskError for a task that cannot be trained; plans that fail are rows of the study.
    """
    from paraxis.experiment import explore_task, save_to
    from paraxis.measure.samples import open_book

    spec, objects = _task(network, batches, settings)
    folder = writable(Path(out)) if out else None
    save, book = (save_to(folder), open_book(folder)) if folder else (lambda _: None, None)
    study = explore_task(spec, objects, workers, budget, comms, tell, save, book=book, limit=_bytes(memory_limit))
    if folder:
        from paraxis.report.page import write as write_page

        write(study, folder)
        write_page(study, folder)
    return study


def verify(
    network: Any = "cnn",
    batches: Any = None,
    *,
    plan: str | Plan = "all",
    workers: int | None = None,
    steps: int = 20,
    dtype: str = "float64",
    memory_limit: str | None = None,
    tell: Tell = silent,
    **settings: Any,
) -> dict[str, Any]:
    """Prove that plans compute what the serial run computes; the document that `verify --json` prints."""
    from paraxis.verification import verify_task

    spec, objects = _task(network, batches, settings)
    return verify_task(spec, objects, plan, workers, steps, dtype, tell, limit=_bytes(memory_limit))


def train(
    network: Any = "cnn",
    batches: Any = None,
    *,
    plan: str | Plan = "serial",
    epochs: int | None = None,
    steps: int | None = None,
    target: float | None = None,
    out: str | Path = "paraxis-run",
    memory_limit: str | None = None,
    tell: Tell = silent,
    each_epoch: Callable[[dict[str, Any]], None] = lambda _: None,
    **settings: Any,
) -> dict[str, Any]:
    """Train to the end with a plan; saves `weights.safetensors` in `out` and returns what `train --json` prints."""
    from paraxis.training import Length, train_task

    spec, objects = _task(network, batches, settings)
    chosen = parse(plan) if isinstance(plan, str) else plan
    length, limit = Length(epochs, steps, target), _bytes(memory_limit)
    return train_task(spec, objects, chosen, length, Path(out), tell, each_epoch, limit=limit)


def _bytes(limit: str | None) -> int | None:
    return None if limit is None else bytes_of(limit)


def _task(network: Any, batches: Any, settings: dict[str, Any]) -> tuple[TaskSpec, dict[str, Any]]:
    """The spec, and the live objects that go with it."""
    objects = {key: settings.pop(key) for key in OBJECTS if key in settings}
    spec = make_spec(network, **settings)
    if spec.live:
        objects |= {"net": network, "batches": batches}
    elif objects or batches is not None:
        names = ", ".join([*objects, *(["batches"] if batches is not None else [])])
        raise TaskError(
            f"{names} cannot be combined with the network name {network!r}: give a module, or define them in the file"
        )
    return spec, objects


def read_recommendation(folder: Path, network: str, limit: int | None = None) -> str | None:
    """The plan that an earlier exploration of the same network recommends, if there is one and it fits into a limit."""
    try:
        document = json.loads((folder / "study.json").read_text())
        if document["task"]["network"] == network and document["recommendation"]:
            plan = str(document["recommendation"]["plan"])
            own = [r["computed_memory"] for r in document["results"] if r["plan"] == plan and limit is not None]
            return plan if all(memory and memory["total"] <= limit for memory in own) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None
