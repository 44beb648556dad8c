"""Are our schedules as good as PyTorch's, and do the zero-bubble ones reach their paper's formulas? Simulated.

    python benchmarks/schedules.py [--most-ranks 8] [--most-microbatches 32]

Every schedule of ours and of torch.distributed.pipelining goes through the same passes and the same simulator, for
every (p, v, m), stages alike, a backward of two forwards, links free and then not. With p = 1 or m = 1 there is one
order. Ends in one JSON line.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

from paraxis.plan.plan import Plan
from paraxis.program.cut import Layout
from paraxis.program.instructions import Program
from paraxis.program.lower import lower
from paraxis.program.simulate import Costs, simulate, uniform
from paraxis.program.timeline import Timeline

THEIRS = Path(__file__).with_name("torch_schedules.py")
PAIRS = {"gpipe": "gpipe", "1f1b": "one_f_one_b", "interleaved": "interleaved"}  # ours, the function with theirs
LINKS = (0.0, 0.25)  # seconds of a transfer, where a forward takes one
Shape = tuple[int, int, int]  # p, v, m
# t_F, t_I, t_W: as in the paper no W takes longer than an F
HALVES = ((1.0, 1.0, 1.0), (2.0, 3.0, 1.0), (4.0, 4.0, 3.0), (2.0, 1.0, 1.0))


def program_of(schedule: str, shape: Shape) -> Program:
    """One replica of p ranks with v stages each."""
    p, v, m = shape
    return lower(Plan(pp=p, interleave=v, microbatches=m, schedule=schedule), Layout((1,) * (p * v)))


def peak(program: Program) -> int:
    """Most activations of stages alive on a rank, from F to B or W."""
    most = 0
    for row in program.body("step"):
        live = 0
        for i in row:
            live += (i.op == "F") - (i.op in ("B", "W"))
            most = max(most, live)
    return most


def halves(forward: float, back: float, weights: float) -> Costs:
    """Seconds of F, I and W."""
    costs = {"F": forward, "I": back, "W": weights, "B": back + weights}
    return Costs(lambda i: costs.get(i.op, 0.0))


def bubble(line: Timeline) -> float:
    """Most idle seconds of a rank between the begin of its first F and its end, as the zero-bubble paper counts."""
    most = 0.0
    for rank in range(line.ranks):
        spans = [s for s in line.spans if s.rank == rank and s.kind == "compute"]
        busy = sum(s.end - s.start for s in spans)
        most = max(most, spans[-1].end - spans[0].start - busy)
    return most


def against_theirs(shapes: Iterable[Shape]) -> Iterator[dict[str, float | str | bool]]:
    """Ours and PyTorch's of every shape: makespan without and with slow links, and the peak."""
    for p, v, m in shapes:
        for ours, theirs in PAIRS.items():
            if (ours == "interleaved") != (v > 1) or (ours == "interleaved" and m % max(1, m // p)):
                continue  # theirs refuses such a number of microbatches
            pair = [program_of(name, (p, v, m)) for name in (ours, f"{THEIRS}:{theirs}")]
            row: dict[str, float | str | bool] = {"schedule": ours, "p": p, "v": v, "m": m}
            better = True
            for link in LINKS:
                costs = replace(uniform(), transfer=lambda _, link=link: link)
                mine, other = (simulate(program, costs).makespan for program in pair)
                row |= {f"makespan@{link:g}": mine, f"theirs@{link:g}": other}
                better &= mine <= other * (1 + 1e-12)
            mine, other = map(peak, pair)
            yield row | {"peak": mine, "their_peak": other, "no_worse": better and mine <= other}


def against_paper(shapes: Iterable[Shape]) -> Iterator[dict[str, float | str | bool]]:
    """ZB-H1 and ZB-H2: bubble and peak, and what Qi et al. 2023 (table 1) say."""
    for (p, _, m), (f, i, w) in product([s for s in shapes if s[1] == 1], HALVES):
        for name, limit, formula in (
            ("zb-h1", p, (p - 1) * (f + i - w)),
            ("zb-h2", 2 * p - 1, (p - 1) * (f + i - 2 * w)),
        ):
            if m < limit:
                continue
            program = program_of(name, (p, 1, m))
            idle, live = bubble(simulate(program, halves(f, i, w))), peak(program)
            row = {"schedule": name, "p": p, "m": m, "costs": f"{f:g} {i:g} {w:g}", "bubble": idle, "formula": formula}
            yield row | {"peak": live, "limit": limit, "reached": abs(idle - formula) < 1e-9 and live == limit}


def interleaved_ideal(shapes: Iterable[Shape]) -> Iterator[dict[str, float | str | bool]]:
    """Ours of numbers of microbatches that theirs refuses: the makespan, and the least there is with such a fill."""
    for p, v, m in shapes:
        if v > 1 and m >= p and m % (m // p):
            mine = simulate(program_of("interleaved", (p, v, m)), uniform()).makespan
            least = 3.0 * (m * v + p - 1)
            yield {"schedule": "interleaved", "p": p, "v": v, "m": m, "makespan": mine, "least": least} | {
                "reached": abs(mine - least) < 1e-9
            }


def shapes_up_to(ranks: int, stages: int, microbatches: int) -> list[Shape]:
    """Every (p, v, m) with more than one rank and more than one microbatch."""
    return list(product(range(2, ranks + 1), range(1, stages + 1), range(2, microbatches + 1)))


def main() -> None:
    """Print a row a comparison, and a summary as JSON."""
    options = argparse.ArgumentParser(description="Our schedules against PyTorch's and against formulas, simulated.")
    options.add_argument("--most-ranks", type=int, default=8)
    options.add_argument("--most-stages", type=int, default=4)
    options.add_argument("--most-microbatches", type=int, default=32)
    args = options.parse_args()
    shapes = shapes_up_to(args.most_ranks, args.most_stages, args.most_microbatches)
    summary: dict[str, object] = {"benchmark": "schedules", "shapes": len(shapes)}
    for name, rows, good in (
        ("theirs", against_theirs(shapes), "no_worse"),
        ("paper", against_paper(shapes), "reached"),
        ("refused_by_theirs", interleaved_ideal(shapes), "reached"),
    ):
        found = list(rows)
        for row in found:
            print(
                " ".join(
                    f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
                )
            )
        summary |= {name: len(found), f"{name}_{good}": sum(bool(row[good]) for row in found)}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
