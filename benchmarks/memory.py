"""Is the computed memory of a plan what it holds? Counted by hooks and flat buffers while it trains.

How far the resident set of its processes has grown stands beside it: there the framework's working memory comes on top.

    python benchmarks/memory.py [NETWORK] [--batch N]

Prints a table and one JSON line; exits 1 if a total is more than 5% off.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from paraxis.api import make_spec
from paraxis.errors import ParaxisError
from paraxis.plan.plan import parse
from paraxis.program.lower import lower
from paraxis.program.memory import memory
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
)
SETTINGS: dict[str, dict[str, Any]] = {
    "mlp:784-1024-1024-10": {"batch": 128},
    "resnet18": {"batch": 16, "lr": 0.01},
    "gpt:nano": {"batch": 8},
}
WITHIN = 0.05
COMM = "mpi"


def compare(session: Session, network: str, text: str) -> list[dict[str, Any]]:
    """A row a rank: computed and counted bytes."""
    plan = session.settled(parse(text))
    facts = session.known()
    session.program(plan)
    assert facts.sizes is not None, "the PyTorch engine's sizes are always measured"
    computed = memory(lower(plan, facts.layout, facts.steps_per_epoch or 1), plan, facts.sizes, facts.batch)
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


def main() -> int:
    """Compare, print, judge."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("network", nargs="*", default=list(SETTINGS))
    words.add_argument("--batch", type=int)
    given = words.parse_args()
    rows: list[dict[str, Any]] = []
    for network in given.network:
        settings = SETTINGS.get(network, {}) | ({"batch": given.batch} if given.batch else {})
        with open_session(make_spec(network, **settings), {}, {COMM: 2}, None, lambda *_: None) as session:
            session.begin(("solo", COMM))
            for text in PLANS:
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
    print(json.dumps({"benchmark": "memory", "worst": worst, "within": WITHIN, "rows": rows}))
    return 0 if worst <= WITHIN else 1


if __name__ == "__main__":
    sys.exit(main())
