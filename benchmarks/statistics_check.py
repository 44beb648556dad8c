"""Is "faster" said of plans that are alike, and how small a difference is found? Resamples recorded rounds to know.

    python benchmarks/statistics_check.py --record [--rounds 60]    measures, and writes benchmarks/data/aa-rounds.json
    python benchmarks/statistics_check.py [--trials 1000]           resamples it, prints tables, ends in one JSON line

A recording holds several plans, each set up several times, measured in interleaved rounds of random order as `explore`
does. From it, blocks of neighbouring rounds are drawn (Kuensch 1989: what one round does to the next stays in), and a
plan's copies are shuffled in each block: then all are alike in truth. The second is made slower by a known ratio, and
the functions that `explore` uses are asked. "faster" counts if said of either at a ratio of 0.
"""

import argparse
import json
import random
import sys
import time
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from paraxis.measure.statistics import RISK, clear, corrected, sort_rounds, told_apart
from paraxis.rounds import LOOKS

DATA = Path(__file__).parent / "data" / "aa-rounds.json"
PLANS, COPIES = ("engine=torch", "engine=native", "dp=2,engine=native", "dp=2,comm=mpi"), 4
ROUNDS, RATIOS = (6, 10, 20, 40), (0.0, 0.01, 0.03, 0.10)
BLOCK = 3  # rounds; of the logarithms of two copies' ratio, neighbours correlate little
OTHERS = 20  # plans that a winner is compared with in an exploration on two cores
Times = dict[int, float]


def record(rounds: int, seconds: float) -> dict[str, Any]:
    """Step seconds of the copies of every plan by round, and the cores that other programs kept busy."""
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
        for copy in range(COPIES):
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
    copies = {text: [_column(row) for row in rows if row.key.startswith(f"{text}#")] for text in PLANS}
    facts = describe()
    about = {"cpu": facts.cpu, "usable_cores": facts.usable_cores, "torch": facts.torch, "network": "cnn"}
    return about | {"recorded": time.strftime("%Y-%m-%d"), "foreign_cores": foreign, "copies": copies}


def _column(row: Any) -> list[float]:
    return [float(f"{row.measured[number]:.4g}") for number in sorted(row.measured)]


def draw(copies: Any, rounds: int, rng: np.random.Generator) -> list[Times]:
    """Plans alike: blocks of the recorded rounds of a plan's copies, which are shuffled in each block."""
    columns = np.asarray(copies)
    starts = rng.integers(0, columns.shape[1], -(-rounds // BLOCK))
    picked = ((starts[:, None] + np.arange(BLOCK)) % columns.shape[1]).ravel()[:rounds]
    order = rng.permuted(np.tile(np.arange(len(columns)), (len(starts), 1)), axis=1)
    places = np.repeat(order, BLOCK, axis=0)[:rounds].T
    return [dict(enumerate(columns[place, picked].tolist())) for place in places]


def verdict(first: Times, second: Times, level: float) -> int:
    """1 if the first is said to be faster, -1 if the second is, 0 if neither; warm-up is set aside before."""
    a, b = sort_rounds(first, ()).kept, sort_rounds(second, ()).kept
    if not told_apart(a, b, level):
        return 0
    return 1 if median(b[r] / a[r] for r in a.keys() & b.keys()) > 1 else -1


def at_last(first: Times, second: Times, others: int) -> int:
    """The verdict of an exploration that may end at any look, and ends with the last of these rounds."""
    for look in (n for n in LOOKS if n < len(first)):
        a, b = ({r: v for r, v in whole.items() if r < look} for whole in (first, second))
        pair = sort_rounds(a, ()).kept, sort_rounds(b, ()).kept
        if clear(pair, told_apart(*pair, corrected(others, RISK / len(LOOKS)))):
            return verdict(a, b, corrected(others))
    return verdict(first, second, corrected(others))


def slower(times: Times, ratio: float) -> Times:
    """The same plan, made slower."""
    return {r: v * (1 + ratio) for r, v in times.items()}


def rates(plans: list[Any], rounds: int, ratio: float, trials: int, others: int, looks: bool, seed: int = 0) -> float:
    """How often "faster" is said: of either at a ratio of 0, else of the one that is."""
    rng, said = np.random.default_rng([seed, rounds, round(1000 * ratio)]), 0
    for trial in range(trials):
        first, second, *_ = draw(plans[trial % len(plans)], rounds, rng)
        second = slower(second, ratio)
        found = at_last(first, second, others) if looks else verdict(first, second, corrected(others))
        said += found == 1 or (not ratio and found == -1)
    return said / trials


def chosen(plans: list[Any], rounds: int, trials: int) -> float:
    """How often the fastest of several plans, all alike in truth, is said to be faster than a given other."""
    rng, said = np.random.default_rng(rounds), 0
    for trial in range(trials):
        today, *rest = draw(plans[trial % len(plans)], rounds, rng)
        best = min(rest, key=lambda times: median(times.values()))
        said += verdict(best, today, corrected(len(rest))) == 1
    return said / trials


def neighbours(plans: list[Any]) -> list[float]:
    """For every plan: correlation of the logarithm of two copies' ratio with that of the round before, over pairs."""
    logs = [[np.log(np.asarray(a) / np.asarray(b)) for a, b in combinations(copies, 2)] for copies in plans]
    return [round(float(np.mean([np.corrcoef(x[1:], x[:-1])[0, 1] for x in of])), 2) for of in logs]


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
    plans = list(data["copies"].values())
    result: dict[str, Any] = {"cpu": data["cpu"], "recorded": data["recorded"], "trials": args.trials}
    result["correlation_of_neighbours"] = neighbours(plans)
    for name, others, looks in (("alone", 1, False), ("corrected", OTHERS, False), ("looks", OTHERS, True)):
        print(f"{name:<10} said at " + "".join(f"{ratio:>8.0%}" for ratio in RATIOS), file=sys.stderr)
        result[name] = {}
        for rounds in ROUNDS:
            trials = args.trials // 4 if looks else args.trials
            row = [rates(plans, rounds, ratio, trials, others, looks) for ratio in RATIOS]
            print(f"  {rounds:>3} rounds       " + "".join(f"{rate:>8.1%}" for rate in row), file=sys.stderr)
            result[name][rounds] = dict(zip(map(str, RATIOS), row, strict=True))
    result["chosen"] = {rounds: chosen(plans, rounds, args.trials) for rounds in ROUNDS}
    print(f"the fastest of {COPIES} alike said to be faster: {result['chosen']}", file=sys.stderr)
    zeros = [row["0.0"] for name in ("alone", "corrected", "looks") for row in result[name].values()]
    result["false_faster"] = max(*zeros, *result["chosen"].values())
    print(json.dumps(result | {"ok": result["false_faster"] <= 0.05}))


if __name__ == "__main__":
    main()
