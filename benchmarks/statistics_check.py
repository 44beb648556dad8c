"""Is "faster" said of plans that are alike, and how small a difference is found? Resamples recorded rounds to know.

    python benchmarks/statistics_check.py --record [--rounds 60]    measures, and writes benchmarks/data/aa-rounds.json
    python benchmarks/statistics_check.py [--trials 1000]           resamples it, prints tables, ends in one JSON line

A recording holds several plans, each set up twice, measured in interleaved rounds of random order as `explore` does.
From it, blocks of neighbouring rounds are drawn (Kuensch 1989: what one round does to the next stays in), and which of
a plan's two copies is called the first is a coin of each block: then both are alike in truth. The second is made slower
by a known ratio, and the functions that `explore` uses are asked. "faster" counts if said of either at a ratio of 0.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from paraxis.measure.statistics import at_a_look, clear, corrected, sort_rounds, told_apart
from paraxis.rounds import LOOKS

DATA = Path(__file__).parent / "data" / "aa-rounds.json"
PLANS = ("engine=plain,threads=1", "engine=torch", "engine=native", "dp=2,engine=native", "dp=2,comm=mpi")
ROUNDS, RATIOS = (6, 10, 20, 40), (0.0, 0.01, 0.03, 0.10)
BLOCK = 3  # rounds; of the logarithms of two copies' ratio, neighbours correlate little
OTHERS = 20  # plans that a winner is compared with in an exploration on two cores
Times = dict[int, float]


def record(rounds: int, seconds: float) -> dict[str, Any]:
    """Step seconds of two copies of every plan by round, and the cores that other programs kept busy."""
    from paraxis.api import make_spec, silent
    from paraxis.experiment import blank
    from paraxis.measure.machine import ForeignLoad, describe
    from paraxis.plan.plan import parse
    from paraxis.rounds import Row, chunk
    from paraxis.session import open_session

    rng = random.Random(0)
    with open_session(make_spec("cnn"), {}, {"mpi": 2}, None, silent) as session:
        session.begin(("solo", "mpi"))
        rows = []
        for copy in (0, 1):
            for text in PLANS:
                plan = parse(text)
                session.setup(f"{text}#{copy}", plan)
                row = Row(plan, f"{text}#{copy}", blank(plan))
                row.steps = max(1, round(seconds / (chunk(session, row, 2, 2, 0)[0]["seconds"] / 2)))
                rows.append(row)
        foreign = []
        for number in range(rounds):
            load = ForeignLoad([pid for pool in session.pools.values() for pid in pool.pids])
            for row in rng.sample(rows, len(rows)):
                answers = chunk(session, row, 1 + row.steps // 10, row.steps, 3)
                row.measured[number] = answers[0]["seconds"] / row.steps
            foreign.append(round(load.cores(), 2))
    half = len(PLANS)
    pairs = {a.plan.text(): [_column(a), _column(b)] for a, b in zip(rows[:half], rows[half:], strict=True)}
    facts = describe()
    about = {"cpu": facts.cpu, "usable_cores": facts.usable_cores, "torch": facts.torch, "network": "cnn"}
    return about | {"recorded": time.strftime("%Y-%m-%d"), "foreign_cores": foreign, "pairs": pairs}


def _column(row: Any) -> list[float]:
    return [float(f"{row.measured[number]:.4g}") for number in sorted(row.measured)]


def draw(pair: Any, rounds: int, rng: np.random.Generator) -> tuple[Times, Times]:
    """Two plans alike: blocks of a recorded pair's rounds, the copies swapped by a coin of each block."""
    columns = np.asarray(pair)
    starts = rng.integers(0, columns.shape[1], -(-rounds // BLOCK))
    picked = ((starts[:, None] + np.arange(BLOCK)) % columns.shape[1]).ravel()[:rounds]
    swapped = np.repeat(rng.integers(0, 2, len(starts)), BLOCK)[:rounds]
    first, second = columns[swapped, picked], columns[1 - swapped, picked]
    return dict(enumerate(first.tolist())), dict(enumerate(second.tolist()))


def verdict(first: Times, second: Times, level: float) -> int:
    """1 if the first is said to be faster, -1 if the second is, 0 if neither; warm-up is set aside before."""
    a, b = sort_rounds(first, ()).kept, sort_rounds(second, ()).kept
    if not told_apart(a, b, level):
        return 0
    return 1 if median(b[r] / a[r] for r in a.keys() & b.keys()) > 1 else -1


def at_last(first: Times, second: Times, others: int) -> int:
    """The verdict of an exploration that may end at any look, and ends with the last of these rounds."""
    level = corrected(others)
    for look in (n for n in LOOKS if n < len(first)):
        a, b = ({r: v for r, v in whole.items() if r < look} for whole in (first, second))
        if clear(sort_rounds(a, ()).kept, sort_rounds(b, ()).kept, at_a_look(level, len(LOOKS))):
            return verdict(a, b, level)
    return verdict(first, second, level)


def slower(times: Times, ratio: float) -> Times:
    """The same plan, made slower."""
    return {r: v * (1 + ratio) for r, v in times.items()}


def rates(pairs: list[Any], rounds: int, ratio: float, trials: int, others: int, looks: bool, seed: int = 0) -> float:
    """How often "faster" is said: of either at a ratio of 0, else of the one that is."""
    rng, said = np.random.default_rng([seed, rounds, round(1000 * ratio)]), 0
    for trial in range(trials):
        first, second = draw(pairs[trial % len(pairs)], rounds, rng)
        second = slower(second, ratio)
        found = at_last(first, second, others) if looks else verdict(first, second, corrected(others))
        said += found == 1 or (not ratio and found == -1)
    return said / trials


def chosen(pairs: list[Any], rounds: int, trials: int) -> float:
    """How often the fastest of several plans, all alike in truth, is said to be faster than the first of them."""
    rng, said = np.random.default_rng(rounds), 0
    for _ in range(trials):
        both = [draw(np.asarray(pair) / np.median(pair), rounds, rng) for pair in pairs]
        plans = [times for pair in both for times in pair]
        best = min(plans[1:], key=lambda times: median(times.values()))
        said += verdict(best, plans[0], corrected(len(plans) - 1)) == 1
    return said / trials


def neighbours(pairs: list[Any]) -> list[float]:
    """For every pair: correlation of the logarithm of its copies' ratio with that of the round before."""
    logs = [np.log(np.asarray(first) / np.asarray(second)) for first, second in pairs]
    return [round(float(np.corrcoef(log[1:], log[:-1])[0, 1]), 2) for log in logs]


def main() -> None:
    """Record or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--chunk", type=float, default=0.05, help="seconds of a recorded chunk")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    if args.record:
        args.data.parent.mkdir(parents=True, exist_ok=True)
        args.data.write_text(json.dumps(record(args.rounds, args.chunk)) + "\n")
        return
    data = json.loads(args.data.read_text())
    pairs = list(data["pairs"].values())
    result: dict[str, Any] = {"cpu": data["cpu"], "recorded": data["recorded"], "trials": args.trials}
    result["correlation_of_neighbours"] = neighbours(pairs)
    for name, others, looks in (("alone", 1, False), ("corrected", OTHERS, False), ("looks", OTHERS, True)):
        print(f"{name:<10} said at " + "".join(f"{ratio:>8.0%}" for ratio in RATIOS), file=sys.stderr)
        result[name] = {}
        for rounds in ROUNDS:
            trials = args.trials // 4 if looks else args.trials
            row = [rates(pairs, rounds, ratio, trials, others, looks) for ratio in RATIOS]
            print(f"  {rounds:>3} rounds       " + "".join(f"{rate:>8.1%}" for rate in row), file=sys.stderr)
            result[name][rounds] = dict(zip(map(str, RATIOS), row, strict=True))
    result["chosen"] = {rounds: chosen(pairs, rounds, args.trials // 4) for rounds in ROUNDS}
    print("the fastest of 10 alike said to be faster: ", result["chosen"], file=sys.stderr)
    zeros = [row["0.0"] for name in ("alone", "corrected", "looks") for row in result[name].values()]
    result["false_faster"] = max(*zeros, *result["chosen"].values())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
