"""Is a pipeline's bubble what its schedule makes of its own stages, and why is it above (p-1)/(m+p-1)?

    python benchmarks/bubble.py [cnn mlp:784-1024-1024-10] [--engines torch native] [--rounds 9]

pp=2 with GPipe and 1F1B on 1, 2, 4, 8 and 16 microbatches; torch over MPI, native on threads. The measured bubble
(time a rank waits for the pipeline / its step, mean over ranks, median over steps) stands beside the program replayed
with its own per-stage median times. Prints a table; ends in one JSON line; exits 1 where the two differ by more than 5
points.
"""

import argparse
import json
import sys
from statistics import median
from typing import Any

from steps import Timed, timed

from paraxis.api import make_spec, silent
from paraxis.measure.breakdown import replay
from paraxis.plan.plan import Plan
from paraxis.session import open_session

POINTS = 0.05
MICROBATCHES = (1, 2, 4, 8, 16)
COMMS = {"torch": "mpi", "native": "openmp"}
COLUMNS = ("ms/step", "bubble", "replay", "theory", "exposed", "largest", "F x m", "B x m")


def plans(engines: list[str]) -> list[Plan]:
    """All of them; a single microbatch is the same program under every schedule."""
    made = [
        Plan(pp=2, schedule=schedule, microbatches=m, engine=engine, comm=COMMS[engine])
        for engine in engines
        for schedule in ("gpipe", "1f1b")
        for m in MICROBATCHES
    ]
    return list(dict.fromkeys(made))


def figures(row: Timed, alone: Timed) -> dict[str, Any]:
    """What is said of a plan; `alone`: the same engine with a single microbatch."""
    plan, parts, lines = row.plan, row.split(), row.lines()
    again = replay(row.program, lines, "step")
    busy = [stage(row, rank, "F") + stage(row, rank, "B") for rank in range(2)]
    grown = {
        op: sum(stage(row, r, op) for r in range(2)) / sum(stage(alone, r, op) for r in range(2)) for op in ("F", "B")
    }
    m = plan.microbatches
    return {
        "step": row.step,
        "bubble": median(line.seconds()["pipeline_wait"] / sum(line.seconds().values()) for line in lines),
        "replay": again.bubble_fraction(),
        "theory": 1 / (m + 1),
        "exposed": parts.communication / row.step,
        "largest": max(busy) / sum(busy),
        **grown,
    }


def stage(row: Timed, rank: int, op: str) -> float:
    """Seconds that a rank's step spends in its forwards or backwards: microbatches times the median of one."""
    seen = [s.end - s.start for line in row.lines() for s in line.spans if s.rank == rank and s.instruction.op == op]
    return median(seen) * row.plan.microbatches


def main() -> int:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("networks", nargs="*", default=["cnn", "mlp:784-1024-1024-10"])
    options.add_argument("--engines", nargs="*", default=list(COMMS), choices=list(COMMS))
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--seconds", type=float, default=0.25, help="of a chunk")
    given = options.parse_args()
    found: dict[str, dict[str, Any]] = {}
    print(" " * 44, *(f"{name:>8}" for name in COLUMNS))
    for network in given.networks:
        with open_session(make_spec(network), {}, {"mpi": 2}, None, silent) as session:
            session.begin(("solo", "mpi") if "torch" in given.engines else ("solo",))
            rows = timed(session, plans(given.engines), given.rounds, given.seconds)
        alone = {row.plan.engine: row for row in rows if row.plan.microbatches == 1}
        for row in rows:
            name = f"{network} {row.plan.label()}"
            f = found[name] = figures(row, alone[row.plan.engine])
            shares = (f"{f[key]:8.1%}" for key in ("bubble", "replay", "theory", "exposed", "largest"))
            print(f"{name:44} {f['step'] * 1e3:8.2f}", *shares, f"{f['F']:8.2f} {f['B']:8.2f}")
    print(
        "The replay exceeds theory by what the larger stage computes beyond a half ('largest'), and a step what its\n"
        "kernels take longer on small microbatches ('F x m', 'B x m': of the time of the whole batch at once)."
    )
    worst = max(found, key=lambda name: abs(found[name]["bubble"] - found[name]["replay"]))
    points = abs(found[worst]["bubble"] - found[worst]["replay"])
    print(json.dumps({"benchmark": "bubble", "limit": POINTS, "worst": worst, "points": points, "plans": found}))
    return int(points > POINTS)


if __name__ == "__main__":
    sys.exit(main())
