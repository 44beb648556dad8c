"""The original study's OpenMP table again, with what each of its choices costs: accuracy by number of threads.

    python benchmarks/threads_study.py [--ranks 1 2 4 8 16] [--epochs 5] [--seeds 1] [--out docs/threads-study.md]

The study trained an MLP (784-50-10, sigmoid) on MNIST with learning rate 0.1: every thread started from weights of its
own, and the threads' weights were combined. Writes a page and ends in one JSON line.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from paraxis.api import make_spec
from paraxis.plan.plan import parse
from paraxis.program.lower import lower
from paraxis.run import openmp
from paraxis.run.openmp import Team
from paraxis.task.networks import build
from paraxis.task.task import make_task

THEIRS = {1: 94.7, 4: 78.9, 16: 52.8, 64: 43.2, 128: 23.1}  # % of the test set, by threads
NET, RATE, BATCH = "mlp", 0.1, 16
PAGE = Path(__file__).resolve().parents[1] / "docs" / "threads-study.md"
Row = dict[str, float]  # % of the test set, by what was measured


@dataclass(frozen=True)
class Run:
    """What one training is told; `batch` is the samples of one optimiser step of one thread."""

    ranks: int
    epochs: int
    batch: int
    seed: int

    def team(self, sync: str = "gradient") -> Team:
        """The threads. Where they share each step's gradient, they also share its batch; else each has its own."""
        several = self.ranks > 1
        plan = parse(f"dp={self.ranks},engine=native,comm=openmp,sync={sync}" if several else "engine=native")
        batch = self.batch * (self.ranks if sync != "gradient" else 1)
        task = make_task(make_spec(NET, batch=batch, lr=RATE, momentum=0.0, seed=self.seed))
        program = lower(plan, task.layout(), task.train.steps_per_epoch or 1)
        return openmp.start(task, program, hogwild=several and sync == "hogwild")

    def train(self, team: Team, epochs: int) -> None:
        """Epochs of the global stream."""
        team.steps(epochs * (team.task.train.steps_per_epoch or 1))


def accuracy(team: Team) -> float:
    """% of the test set. Each thread scores its share with its own weights: disagreeing ones give their mean."""
    source: Any = team.task.test
    return 100 * team.evaluate(source)[2] / source.size


def scatter(team: Team, seed: int) -> None:
    """Every thread gets initial weights of its own."""
    for rank in range(team.ranks):
        state = build(NET, 1000 * (seed + 1) + rank).state_dict()
        for layer, part, _ in team.ensemble.parts(rank):
            team.ensemble.put(rank, layer, part, state[f"{layer}.{part}"].contiguous().numpy().reshape(-1))


def never(team: Team) -> None:
    """Leave the averaging steps out: replicas agree only when they are settled."""
    if team.ranks > 1:
        team.program = replace(team.program, period=(("local", 1),))


def gradient(run: Run) -> Row:
    """Every step is the serial step, its samples cut among the threads."""
    team = run.team()
    run.train(team, run.epochs)
    return {"gradient": accuracy(team)}


def hogwild(run: Run) -> Row:
    """Common weights, on which every thread steps by itself."""
    team = run.team("hogwild")
    run.train(team, run.epochs)
    return {"hogwild": accuracy(team)}


def common(run: Run) -> Row:
    """Private weights from one start, averaged after every epoch."""
    team = run.team("average@epoch")
    run.train(team, run.epochs)
    return {"average": accuracy(team)}


def longer(run: Run) -> Row:
    """The same with as many steps of every thread as one thread alone makes."""
    team = run.team("average@epoch")
    run.train(team, run.epochs * run.ranks)
    return {"average, all the steps": accuracy(team)}


def often(run: Run) -> Row:
    """Private weights from random starts, averaged after every epoch; the first average stands alone."""
    team = run.team("average@epoch")
    scatter(team, run.seed)
    run.train(team, 1)
    first = accuracy(team)
    run.train(team, run.epochs - 1)
    return {"random, first average": first, "random, every epoch": accuracy(team)}


def once(run: Run) -> Row:
    """Private weights from random starts, combined once at the end: by their mean, and by their sum."""
    team = run.team("average@epoch")
    scatter(team, run.seed)
    never(team)
    run.train(team, run.epochs)
    found = {"random, each alone": accuracy(team)}
    team.settle()
    found["random, once"] = accuracy(team)
    for values in team.buffers("params"):
        values.mul_(team.ranks)
    return found | {"random, once, summed": accuracy(team)}


def start_once(run: Run) -> Row:
    """As `once`, but all threads start from the same weights: what the start alone does."""
    team = run.team("average@epoch")
    never(team)
    run.train(team, run.epochs)
    team.settle()
    return {"common, once": accuracy(team)}


WAYS: tuple[Callable[[Run], Row], ...] = (gradient, hogwild, common, often, once, start_once)
COLUMNS = {
    "gradient": "sync=gradient",
    "hogwild": "sync=hogwild",
    "average": "average@epoch",
    "random, every epoch": "random starts, average@epoch",
    "random, once": "random starts, averaged once",
}
CAUSES = {
    "random, each alone": "threads alone, not combined",
    "common, once": "one start, averaged once",
    "random, once": "random starts, averaged once",
    "random, first average": "random starts, after 1 epoch",
    "random, once, summed": "random starts, summed once",
    "average": "average@epoch",
    "average, all the steps": "average@epoch, all the steps",
}


def measure(args: argparse.Namespace) -> dict[int, dict[str, list[float]]]:
    """Threads -> what -> accuracies, one a seed."""
    table: dict[int, dict[str, list[float]]] = {}
    for ranks in args.ranks:
        found = table.setdefault(ranks, {})
        ways = [*WAYS, *([longer] if 1 < ranks <= args.longest else [])]
        for seed in range(args.seeds):
            for way in ways:
                begun = time.monotonic()
                row = way(Run(ranks, args.epochs, args.batch, seed))
                for what, value in row.items():
                    found.setdefault(what, []).append(round(value, 2))
                words = ", ".join(f"{what} {value:.1f}" for what, value in row.items())
                print(f"{ranks:3} threads: {words} ({time.monotonic() - begun:.1f} s)", file=sys.stderr, flush=True)
    return table


def cell(values: list[float] | None) -> str:
    """A mean, with its range where there are several seeds."""
    if not values:
        return "-"
    text = f"{mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f}-{max(values):.1f})"


def grid(table: dict[int, dict[str, list[float]]], columns: dict[str, str], theirs: bool) -> list[str]:
    """A Markdown table: a row for each number of threads."""
    heads = ["threads", *(["the study"] if theirs else []), *columns.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for ranks in sorted({*table, *(THEIRS if theirs else ())}):
        study = [f"{THEIRS[ranks]}" if ranks in THEIRS else "-"] if theirs else []
        cells = [cell(table.get(ranks, {}).get(column)) for column in columns]
        lines.append("| " + " | ".join([str(ranks), *study, *cells]) + " |")
    return lines


def causes(table: dict[int, dict[str, list[float]]]) -> list[str]:
    """One sentence a cause, each with figures of the run."""
    many = max(table)

    def of(what: str, ranks: int = many) -> str:
        return cell(table[ranks].get(what))

    lines = [
        f"- **Random starts, not threads.** At {many} threads every one of them had learnt ({of('random, each alone')} "
        f"% by itself); their mean has {of('random, once')} %. Hidden unit 7 of one network has nothing to do with "
        "hidden unit 7 of another, so the mean of both computes neither.",
        f"- **The same averaging from one start** gives {of('common, once')} %: nothing else was changed.",
        f"- **Once replicas have agreed, they stay close.** After the first average of random starts there are "
        f"{of('random, first average')} % left, at the end {of('random, every epoch')} %, as all epochs but the first "
        "begin from common weights.",
        f"- **Summing instead of averaging** gives {of('random, once, summed')} %: no remedy either.",
    ]
    counted = [ranks for ranks in table if "average, all the steps" in table[ranks]]
    if counted:
        top = max(counted)
        lines.append(
            f"- **What averaging from one start still loses is steps**, as each of N threads makes 1/N of them: at "
            f"{top} threads {of('average', top)} %, and {of('average, all the steps', top)} % with as many steps of "
            f"every thread as one thread alone makes (which has {of('gradient', min(table))} %)."
        )
    return [
        *lines,
        f"- **Reducing gradients loses nothing** ({of('gradient')} % at {many} threads): the same step, cut up. "
        f"Hogwild ({of('hogwild')} %) also keeps every sample's step, on weights that others are changing.",
    ]


def page(table: dict[int, dict[str, list[float]]], args: argparse.Namespace) -> str:
    """The page, all figures from the run."""
    seeds = "one seed" if args.seeds == 1 else f"mean and range of {args.seeds} seeds"
    return "\n".join(
        [
            "# Why more threads trained worse, and why they need not",
            "",
            "Written by `python benchmarks/threads_study.py`; do not edit.",
            "",
            "A study of an MLP (784-50-10, sigmoid, MNIST, learning rate 0.1) in C++ with OpenMP lost accuracy with",
            "every thread it added. Each thread started from random weights of its own, trained one sample at a time,",
            "and the threads' weights were combined. Ours: the same network, data and rate in the native engine,",
            f"{args.epochs} epochs in all (shared among the threads), {args.batch} samples a step of each",
            "thread (of all threads together with `sync=gradient`), no momentum;",
            f"% of the 10,000 test images, {seeds}.",
            "",
            *grid(table, COLUMNS, theirs=True),
            "",
            "## The causes, one at a time",
            "",
            *causes(table),
            "",
            *grid({k: v for k, v in table.items() if k > 1}, CAUSES, theirs=False),
            "",
            f"Measured with {len(os.sched_getaffinity(0))} cores: with more threads than cores nothing here changes",
            "but the time, except under Hogwild, whose order of updates is the machine's.",
            "",
        ]
    )


def main() -> None:
    """Train everything, write the page, print the JSON line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of threads")
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--batch", type=int, default=BATCH, help="samples a step of each thread; default: %(default)s")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--longest", type=int, default=8, help="most threads that also make all the steps of one")
    options.add_argument("--out", type=Path, default=PAGE)
    args = options.parse_args()
    args.ranks = sorted(set(args.ranks))
    if args.batch % max(args.ranks):
        options.error(f"--batch {args.batch} must divide into {max(args.ranks)} threads")
    torch.set_num_threads(1)
    table = measure(args)
    args.out.write_text(page(table, args))
    print(json.dumps({"epochs": args.epochs, "batch": args.batch, "theirs": THEIRS, "accuracy": table}))


if __name__ == "__main__":
    main()
