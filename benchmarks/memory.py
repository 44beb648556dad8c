"""Is the computed memory of a plan what it holds? Counted by hooks, flat buffers and C++ while it trains.

How far the resident set of its processes has grown stands beside it: there the framework's working memory comes on top.
Plans of the native engine on threads are one process, whose row is the sum of its ranks.

    python benchmarks/memory.py [NETWORK ...] [--batch N] [--plan PLAN ...]

Prints a table and one JSON line; exits 1 if a total is more than 5% off, or if ZeRO-3 on 4 ranks holds 30% or more of
the parameter, gradient and optimizer bytes of plain data parallelism.
"""

import argparse
import json
import sys
from dataclasses import asdict, astuple
from typing import Any

from paraxis.api import make_spec
from paraxis.errors import ParaxisError
from paraxis.plan.plan import parse
from paraxis.program.memory import Memory
from paraxis.session import Session, open_session

PLANS = (
    "serial",
    "recompute=all",
    "microbatches=4",
    "dp=2",
    "dp=2,zero=3",
    "pp=2,microbatches=4",
    "pp=2,microbatches=4,schedule=gpipe",
    "pp=2,microbatches=4,schedule=zb-h1",
    "pp=2,microbatches=4,schedule=gpipe,recompute=all",
    "dp=2,recompute=all",
    "tp=2",
    "pp=2,tp=2,microbatches=4",
    "dp=2,sync=diloco@4",
    "dp=2,sync=diloco@4:int8:fragments=2",
    "dp=2,sync=compressed",
    "dp=4",
    "dp=4,zero=3",
    "engine=native",
    "dp=2,engine=native",
    "pp=2,microbatches=4,engine=native",
    "dp=2,sync=diloco@4,engine=native",
    "dp=2,engine=native,comm=mpi",
    "pp=2,microbatches=4,engine=native,comm=mpi",
)
PLAIN, SHARDED = (parse(text).short() for text in ("dp=4", "dp=4,zero=3"))
STATES = ("parameters", "gradients", "optimizer")
SETTINGS: dict[str, dict[str, Any]] = {
    "mlp:784-1024-1024-10": {"batch": 128},
    "resnet18": {"batch": 16, "lr": 0.01},
    "gpt:nano": {"batch": 8},
}
WITHIN = 0.05
LESS = 0.3  # what ZeRO-3 on 4 ranks may hold of the states of plain data parallelism
COMM = "mpi"


def compare(session: Session, network: str, text: str) -> list[dict[str, Any]]:
    """A row a rank: computed and counted bytes."""
    plan = session.settled(parse(text))
    session.sizes[COMM] = plan.processes
    session.program(plan)
    computed = session.memory_of_ranks(plan)
    if plan.processes == 1:
        computed = [Memory(*(sum(kind) for kind in zip(*map(astuple, computed), strict=True)))]
    session.setup("memory", plan)
    counted = session.ask("memory", plan, {"do": "held"})
    session.close()  # the next plan's processes grow from nothing
    rows = []
    for rank, (mine, theirs) in enumerate(zip(computed, counted, strict=True)):
        grown = theirs.pop("grown")
        total = sum(theirs.values())
        row = {"network": network, "plan": plan.short(), "rank": rank, "computed": asdict(mine), "counted": theirs}
        rows.append(row | {"off": mine.total / total - 1, "total": total, "grown": grown})
    return rows


def sharded(rows: list[dict[str, Any]], network: str) -> float:
    """What a rank of ZeRO-3 counts of its states, of what one of plain data parallelism does; 0: one was not run."""
    held = {
        row["plan"]: sum(row["counted"][state] for state in STATES)
        for row in rows
        if row["network"] == network and row["plan"] in (PLAIN, SHARDED)
    }
    return held[SHARDED] / held[PLAIN] if len(held) == 2 else 0.0


def main() -> int:
    """Compare, print, judge."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("network", nargs="*", default=list(SETTINGS))
    words.add_argument("--batch", type=int)
    words.add_argument("--plan", nargs="*", default=list(PLANS))
    given = words.parse_args()
    rows: list[dict[str, Any]] = []
    for network in given.network:
        settings = SETTINGS.get(network, {}) | ({"batch": given.batch} if given.batch else {})
        with open_session(make_spec(network, **settings), {}, {COMM: 2}, None, lambda *_: None) as session:
            for text in given.plan:
                try:
                    found = compare(session, network, text)
                except ParaxisError as error:
                    print(f"{network:<22} {text:<50} refused: {str(error).splitlines()[0]}")
                    continue
                rows += found
                for row in found:
                    computed = row["total"] * (1 + row["off"])
                    print(
                        f"{network:<22} {row['plan']:<50} rank {row['rank']}  computed {computed / 1e6:8.2f} MB  "
                        f"counted {row['total'] / 1e6:8.2f} MB ({row['off']:+.2%})  grown {row['grown'] / 1e6:6.0f} MB"
                    )
    worst = max((abs(row["off"]) for row in rows), default=1.0)
    shares = {network: share for network in given.network if (share := sharded(rows, network))}
    for network, share in shares.items():
        print(f"{network:<22} {SHARDED} holds {share:.1%} of the parameters, gradients and optimizer state of {PLAIN}")
    words_of = {"benchmark": "memory", "worst": worst, "within": WITHIN, "zero3_of_dp": shares, "less": LESS}
    print(json.dumps(words_of | {"rows": rows}))
    return 0 if worst <= WITHIN and all(share < LESS for share in shares.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
