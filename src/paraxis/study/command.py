"""`paraxis explore --study`: the command's part of a study."""

import json
from pathlib import Path

from rich.console import Console

from paraxis.errors import TaskError
from paraxis.progress import progress
from paraxis.run.joined import joined_ranks
from paraxis.study.definition import Definition, load, shipped
from paraxis.study.table import print_study


def run_study(name: str, out: Path | None, root: Path, budget: float | None, own: bool, json_: bool) -> int:
    """Run or resume a study, or list those there are; the exit code. `own`: options that belong to a single task."""
    if name == "list":
        print_list(json_)
        return 0
    if own:
        raise TaskError("--study says itself what to train: put network, workers and task options into a FILE.toml")
    if budget is not None and not budget > 0:
        raise TaskError(f"budget={budget:g}: it must be above 0 seconds")
    definition = load(name)
    folder = out or root / definition.name
    from paraxis.study.conduct import conduct_study
    from paraxis.study.page import write

    with joined_ranks() as joined, progress() as tell:
        document = conduct_study(definition, folder, float("inf") if budget is None else budget, tell, joined)
        tell("writing the report", 1.0)
        report = write(document, folder)
    if json_:
        print(json.dumps(document, indent=1))
    else:
        print_study(document, Console(highlight=False))
        print(f"trials: {folder / 'trials.csv'}")
        print(f"report: {report}")
    return 0 if any(trial["status"] == "ok" for trial in document["trials"]) else 1


def print_list(json_: bool) -> None:
    """The shipped studies, a line each."""
    studies: list[Definition] = [load(name) for name in shipped()]
    if json_:
        print(json.dumps({"studies": [{"name": s.name, "about": s.about} for s in studies]}, indent=1))
        return
    width = max(len(s.name) for s in studies)
    for s in studies:
        print(f"{s.name:<{width}}  {s.about}")
