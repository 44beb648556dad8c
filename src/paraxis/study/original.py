"""The page that answers the original study: its figures beside ours on the same factors, and each cause, measured.

    python -m paraxis.study.original [FOLDER] > docs/original-study.md

FOLDER holds the trials of `paraxis explore --study original`. Every figure of ours on the page is read from them; what
has not been run is a dash, and a sentence that needs it is left out.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from paraxis.errors import ParaxisError
from paraxis.measure.records import Ratio
from paraxis.measure.statistics import paired
from paraxis.report.tables import ratio
from paraxis.study.ledger import read
from paraxis.study.trial import Trial

SAMPLES = 60_000  # of MNIST's training set
BATCHES = (32, 64, 128)
# Published: seconds an epoch at batch 32, 64 and 128, by number of workers.
CNN_MPI = {
    1: (19.3, 18.7, 18.4),
    4: (20.0, 19.1, 18.5),
    16: (23.5, 21.1, 20.9),
    64: (26.9, 24.5, 23.9),
    128: (32.9, 29.7, 28.9),
}
RESNET_MPI = {1: 330.0, 4: 353.0, 16: 781.0, 32: 801.0}
OPENMP = {1: (25.2, 94.7), 4: (7.0, 78.9), 16: (10.6, 52.8), 64: (41.4, 43.2), 128: (77.0, 23.1)}  # seconds, % right
SERIAL = {"mlp": (19.6, 11.3, 7.8), "cnn": (21.4, 14.0, 10.5)}
# Their programs, run on a machine of two cores like the one this project is developed on.
THEIR_CODE = {
    "CNN over MPI, 1 worker": "16.7-20.6 s an epoch",
    "CNN over MPI, 2 workers": "20.1-22.0 s an epoch",
    "OpenMP MLP (784-128-10), 1 thread": "4.6-5.1 s an epoch, 93% right",
    "OpenMP MLP (784-128-10), 2 threads": "2.4-2.5 s an epoch, 85% right",
}
MPI, ALL_DATA = "dp={workers},comm=mpi", "dp={workers},comm=mpi,sync=average@epoch"
NATIVE, PLAIN = "dp={workers},engine=native", "engine=plain,threads={threads}"
Line = Sequence[str]
Cell = list[Trial]  # the repeats of one trial, in order; empty where it has not been run
Find = Callable[..., Cell]


def page(trials: list[Trial]) -> str:
    """The whole page in Markdown."""
    find = finder(trials)
    parts = [head(trials), cnn(find), resnet(find), threads(find), serial(find), foot(trials)]
    return "\n\n".join(parts) + "\n"


def finder(trials: list[Trial]) -> Find:
    """A look-up of the trials that have given factors."""

    def find(**wanted: Any) -> Cell:
        return [t for t in trials if t.status == "ok" and all(t.factors.get(k) == v for k, v in wanted.items())]

    return find


# -- what the page is made of --------------------------------------------------------------------------------------


def grid(heads: Line, rows: Iterable[Line]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def value(cell: Cell, measure: str = "epoch_seconds") -> float | None:
    """A measure's median over the repeats."""
    values = [v for t in cell if (v := t.measures.get(measure)) is not None]
    return median(values) if values else None


def time_of(cell: Cell) -> str:
    """Seconds an epoch as a cell: ~ where projected, * where oversubscribed."""
    seconds = value(cell)
    if seconds is None:
        return "-"
    mark = "~" if cell[0].measures.get("epoch_projected") else ""
    return f"{mark}{digits(seconds)}" + ("*" if cell[0].oversubscribed else "")


def right_of(cell: Cell, measure: str = "final_accuracy") -> str:
    """An accuracy as a cell."""
    share = value(cell, measure)
    return "-" if share is None else f"{share:.1%}"


def digits(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def factor(slow: Cell, fast: Cell) -> Ratio | None:
    """How many times faster `fast` is, repeat by repeat."""
    times = [{t.repeat: s for t in cell if (s := t.measures.get("epoch_seconds"))} for cell in (fast, slow)]
    return paired(times[0], times[1])


def their_epoch(cell: Cell) -> Cell:
    """Trials with the seconds of an epoch in which each worker goes over all samples: as many of ours as workers."""
    out = []
    for t in cell:
        ours = t.measures.get("epoch_seconds")
        theirs = None if ours is None else ours * float(t.factors["workers"])
        out.append(t.model_copy(update={"measures": t.measures | {"epoch_seconds": theirs}}))
    return out


def gain_of(slow: Cell, fast: Cell) -> str:
    """A factor as a cell, with the range of several repeats."""
    if slow is fast:
        return "1" if slow else "-"
    return ratio(factor(slow, fast), spread=min(len(slow), len(fast)) > 1) or "-"


def middle(pairs: Iterable[tuple[Cell, Cell]]) -> str:
    """The median factor of several pairs, or "" where one has not been run."""
    found = [factor(*pair) for pair in pairs]
    known = [f.median for f in found if f]
    return f"{median(known):.2f}x" if known and len(known) == len(found) else ""


# -- its sections --------------------------------------------------------------------------------------------------


def head(trials: list[Trial]) -> str:
    """What this page is, and where its figures come from."""
    return f"""# The original study, answered

Written by `python -m paraxis.study.original` from {len(trials)} recorded trials; do not edit.
To make it anew: `paraxis explore --study original --budget 900`, then that command.

A study trained an MLP, a CNN and a ResNet-18 on MNIST with OpenMP threads and with PyTorch processes over MPI, to see
what data parallelism buys. It found slow-downs and lost accuracy, and concluded that training "is not really amenable
to message passing". Below, each of its tables stands beside ours on the same factors and on equal terms: the global
batch is the same for any number of workers, its samples are divided among them, and their gradients are averaged. Where
a rule of theirs is the cause, that rule is run as well, on our engines, so that only the rule differs.

Seconds are for one epoch of {SAMPLES:,} samples. `~`: projected, a measured step's time x the steps of an epoch. `*`:
more workers than usable cores, so they take turns; a slow-down there says nothing about parallelism. Their machine had
more and other cores than ours: compare the course of a column, not its height."""


def cnn(find: Find) -> str:
    """CNN over MPI: the same work divided, and the rule under which it was not."""
    split = {(w, b): find(network="cnn", plan=MPI, workers=w, batch=b) for w in (1, 2, 4, 8) for b in BATCHES}
    native = {(w, b): find(network="cnn", plan=NATIVE, workers=w, batch=b) for w in (1, 2) for b in BATCHES}
    whole = {b: their_epoch(find(network="cnn", plan=ALL_DATA, workers=2, batch=2 * b)) for b in BATCHES}
    theirs = grid(
        ["workers", *(f"batch {b}" for b in BATCHES)],
        [[str(w), *(f"{s}" for s in row)] for w, row in CNN_MPI.items()],
    )
    ours = grid(
        [
            "workers",
            *(f"batch {b}: s" for b in BATCHES),
            *(f"speed-up, {b}" for b in BATCHES),
            *(f"right, {b}" for b in BATCHES),
        ],
        [
            [
                name,
                *(time_of(cells[w, b]) for b in BATCHES),
                *(gain_of(cells[1, b], cells[w, b]) for b in BATCHES),
                *(right_of(cells[w, b]) for b in BATCHES),
            ]
            for cells, w, name in (
                *((split, w, f"{w}, PyTorch{' over MPI' * (w > 1)}") for w in (1, 2, 4, 8)),
                *((native, w, f"{w}, native thread{'s' * (w > 1)}") for w in (1, 2)),
            )
        ],
    )
    rule = grid(
        ["2 workers, batch of each", "divided", "each over all the data", "right, divided", "right, all the data"],
        [[f"{b}", time_of(split[2, b]), time_of(whole[b]), right_of(split[2, b]), right_of(whole[b])] for b in BATCHES],
    )
    return "\n\n".join(
        [
            "## CNN over MPI: 0.6x with 128 workers",
            "Published, seconds an epoch:",
            theirs,
            _their_code("CNN"),
            "Ours, after one epoch:",
            ours,
            "### Why they saw a slow-down",
            _all_the_data(split, whole),
            rule,
            _master(split),
        ]
    )


def _their_code(word: str) -> str:
    runs = "; ".join(f"{name}: {figure}" for name, figure in THEIR_CODE.items() if word in name)
    return f"Their program on two cores such as ours: {runs}."


def _all_the_data(split: dict[tuple[int, int], Cell], whole: dict[int, Cell]) -> str:
    """Every worker over all samples: by their figures, and by ours."""
    done = 128 * CNN_MPI[1][0] / CNN_MPI[128][0]
    text = (
        "**N workers did N times the work.** Each of their workers went over all 60,000 samples in an order of its "
        "own, so the best that N cores could do was to be no slower than one. By their own table, 128 workers went "
        f"through 128 x 60,000 samples in 32.9 s: {done:.0f} times as many a second as one worker."
    )
    theirs, ours = (
        middle((split[1, b], cells[b]) for b in BATCHES) for cells in (whole, {b: split[2, b] for b in BATCHES})
    )
    if theirs and ours:
        text += (
            " Measured on the same network and ranks: by their rule two workers take an epoch at "
            f"{theirs} the speed of one (median over the batches), with the data divided at {ours}."
        )
    return text


def _master(split: dict[tuple[int, int], Cell]) -> str:
    """Pickles to a master that does not train."""
    text = (
        "**A master that did not train.** Weights went as pickles to rank 0, which did not train: one of the processes "
        "is no worker, and what it has to take in grows with their number."
    )
    sent = value(split[2, 128], "bytes")
    if sent:
        text += (
            f" Ours has no master: the two ranks reduce their gradients in place and send {sent / 1e6:.2f} MB a step "
            f"together, {sent * (SAMPLES // 128) / 1e6:.0f} MB an epoch at batch 128."
        )
    return text + " What pickling itself cost them has not been measured here."


def resnet(find: Find) -> str:
    """ResNet-18 over MPI, from a few steps."""
    trials = {w: find(network="resnet18", plan=MPI, workers=w) for w in (1, 2, 4)}
    rows = [
        [
            str(w),
            digits(RESNET_MPI[w]) if w in RESNET_MPI else "-",
            time_of(trials.get(w, [])),
            gain_of(trials[1], trials.get(w, [])),
        ]
        for w in sorted({*RESNET_MPI, *trials})
    ]
    parts = [
        "## ResNet-18 over MPI: 0.42x with 32 workers",
        grid(["workers", "published, s", "ours, s", "our speed-up"], rows),
        "An epoch of ResNet-18 does not fit the budget here: ours is projected from a few steps at batch 32, without "
        "an accuracy. The rule is the one above, each worker over all the data: by their own table 32 workers went "
        f"through {32 * RESNET_MPI[1] / RESNET_MPI[32]:.0f} times as many samples a second as one.",
        "**Accuracy fell from 98.6% to 96.8%** from 1 to 32 workers (at a learning rate of 0.1; the times above were "
        "taken at 10). We have not trained it to the end, so for this network that cause is not measured. What "
        "averaging weights costs, and that averaged gradients cost nothing, is measured on the MLP below.",
    ]
    sent, gain = value(trials[2], "bytes"), factor(trials[1], trials[2])
    if sent and gain:
        speed = f"Divided among two workers, a step has {gain.median:.2f} times the speed of one worker's"
        parts.insert(2, f"{speed}, with {sent / 1e6:.0f} MB sent in it.")
    return "\n\n".join(parts)


def threads(find: Find) -> str:
    """The MLP on OpenMP threads: accuracy lost by random starts, not by threads."""
    ours = {w: find(network="mlp", plan=NATIVE, workers=w) for w in (1, 2, 4, 8)}
    rule = {w: find(network="mlp", rule="theirs", workers=w) for w in (1, 2, 4, 8)}
    rows = []
    for w in sorted({*OPENMP, *ours}):
        published = [digits(OPENMP[w][0]), f"{OPENMP[w][1]}%"] if w in OPENMP else ["-", "-"]
        mine, their = ours.get(w, []), rule.get(w, [])
        measures = ("final_accuracy", "mean_accuracy", "alone_accuracy")
        rows.append(
            [str(w), *published, time_of(mine), right_of(mine), time_of(their), *(right_of(their, m) for m in measures)]
        )
    heads = ["threads", "published, s", "right", "gradients averaged, s", "right", "their rule, s", "right, summed"]
    parts = [
        "## MLP on OpenMP threads: from 95% to 23% right",
        grid([*heads, "averaged", "each alone"], rows),
        "Ours: 784-50-10 with a sigmoid, learning rate 0.1, no momentum, five epochs. With gradients averaged, 16 "
        "samples a step whatever the number of threads: few, as theirs, so that the accuracies can be compared, and as "
        "many as our kernels take side by side, so that two threads have nothing to divide (at 128 they do: "
        "`benchmarks/native.py mlp:128`, `docs/log.md`). By their rule: each thread starts from random weights of its "
        "own, trains one sample at a time on its share of the data, and the weights are combined once, at the end. "
        "They summed them; the mean, and the threads uncombined, stand beside it. (Theirs computes in double "
        "precision, ours in single.) " + _their_code("OpenMP"),
    ]
    many = max((w for w in (2, 4, 8) if rule[w] and ours[w]), default=0)
    if many:
        parts.append(_random_starts(ours[many], rule[many], ours[1], many))
    parts.append(
        "**Why it became slow beyond 4 threads** cannot be settled on cores as few as these: with more threads than "
        "cores ours take turns, too (`*`). [Why more threads trained worse](threads-study.md) takes the accuracy "
        "apart, cause by cause."
    )
    return "\n\n".join(parts)


def _random_starts(ours: Cell, rule: Cell, one: Cell, many: int) -> str:
    return (
        f"**Random starts, not threads, lost the accuracy.** At {many} threads each one by itself had learnt "
        f"({right_of(rule, 'alone_accuracy')} right); their weights combined have {right_of(rule, 'mean_accuracy')} "
        f"averaged and {right_of(rule)} summed, for unit k of one network has nothing to do with unit k of another. "
        f"With averaged gradients {many} threads have {right_of(ours)}, and one thread {right_of(one)}: the same "
        "steps, cut up."
    )


def serial(find: Find) -> str:
    """Serial PyTorch: why larger batches are faster."""
    rows, causes = [], []
    for network, published in SERIAL.items():
        for count in (1, 2):
            trials = [find(network=network, plan=PLAIN, threads=count, batch=b) for b in BATCHES]
            name = f"{network.upper()}, {count} thread{'s' * (count > 1)}"
            rows.append([name, *map(str, published), *map(time_of, trials), *map(right_of, trials)])
            if count == 1:
                causes += _per_call(network, trials)
    heads = ["network", *(f"published, {b}" for b in BATCHES), *(f"ours, {b}" for b in BATCHES)]
    parts = [
        "## Serial PyTorch: larger batches are faster",
        grid([*heads, *(f"right, {b}" for b in BATCHES)], rows),
    ]
    if causes:
        parts.append(
            "**A step costs something however few samples it has.** The line through the seconds of a step at the "
            "three batch sizes has a height at 0, which is the framework's own cost of a step's calls: "
            + "; ".join(causes)
            + ". An epoch at batch 32 "
            "pays it 1,875 times, at batch 128 only 468 times; it also makes only as many steps."
        )
    return "\n\n".join(parts)


def _per_call(network: str, trials: list[Cell]) -> list[str]:
    """The line through seconds of a step against the batch: its height at 0, and its slope."""
    points = [(b, s / (SAMPLES // b)) for b, t in zip(BATCHES, trials, strict=True) if (s := value(t)) is not None]
    if len(points) < len(BATCHES):
        return []
    slope, height = np.polyfit([float(b) for b, _ in points], [s for _, s in points], 1)
    if not height > 0:
        return [f"{network.upper()}: the three points show no such cost"]
    share = height / points[0][1]
    return [f"{network.upper()} {height * 1e3:.2f} ms + {slope * 1e6:.1f} us a sample, {share:.0%} of a step of 32"]


def foot(trials: list[Trial]) -> str:
    """Machine, load, versions, and what has not been shown."""
    machines = sorted({f"{m['cpu']}, {m['usable_cores']} usable cores" for t in trials if (m := t.machine)})
    loads = [t.machine["foreign_cores"] for t in trials if t.machine]
    lacking = sorted({f"{t.status}: {t.reason}" for t in trials if t.status != "ok"})
    lines = ["## What these figures rest on"]
    if trials:
        most = max(t.repeat for t in trials) + 1
        lines += [
            f"Machine: {'; '.join(machines) or 'not recorded'}. Other programs kept {median(loads or [0.0]):.1f} cores "
            f"busy in the median trial and {max(loads or [0.0]):.1f} in the worst.",
            f"Recorded from {min(t.started for t in trials)[:16]} to {max(t.started for t in trials)[:16]} UTC with "
            f"Paraxis {trials[0].version}, each trial once to {most} times: medians, and for speed-ups the range over "
            "the repeats. `trials.jsonl` has every sample.",
        ]
    lines += [
        "Not shown: 16 workers and more on as many cores, which this machine has not; an epoch of ResNet-18; why "
        "theirs fell in speed beyond 4 threads; the cost of their pickles.",
        *(f"Missing trials: {text}" for text in lacking),
    ]
    return "\n\n".join(lines)


def main(words: list[str]) -> int:
    """Print the page of a folder's trials; the exit code."""
    folder = Path(words[0]) if words else Path("paraxis-study/original")
    try:
        definition, trials = read(folder)
    except ParaxisError as error:
        print(f"paraxis: {error}", file=sys.stderr)
        return error.exit_code
    if definition.name != "original":
        print(f"paraxis: {folder} holds the study {definition.name}, not original", file=sys.stderr)
        return 2
    sys.stdout.write(page(trials))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
