"""Is every microsecond of a step accounted for, for every plan and engine? The remainder is to be at most 2%.

    python benchmarks/remainder.py [cnn mlp ...] [--workers 2] [--rounds 9]

Prints a line a plan; ends in one JSON line; exits 1 if a remainder is larger.
"""

import argparse
import json
import sys

from steps import timed

from paraxis.api import make_spec, silent
from paraxis.plan.space import space
from paraxis.session import open_session

LIMIT = 0.02


def main() -> int:
    """Time all plans of the networks, and print where their steps go."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("networks", nargs="*", default=["cnn", "mlp"])
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--seconds", type=float, default=0.2, help="of a chunk")
    given = options.parse_args()
    found = {}
    for network in given.networks:
        with open_session(
            make_spec(network), {}, dict.fromkeys(("mpi", "gloo"), given.workers), None, silent
        ) as session:
            session.begin(("solo", "mpi", "gloo"))
            layers = len(session.known().layers)
            plans = space(given.workers, layers, ("openmp", "mpi", "gloo"))
            for row in timed(session, plans, given.rounds, given.seconds):
                parts, step = row.split(), row.step
                name = f"{network} {row.plan.label()}"
                found[name] = parts.remainder / step
                shares = " ".join(f"{k} {v / step:.1%}" for k, v in parts.model_dump().items())
                print(f"{name:36} {step * 1e3:9.3f} ms  {shares}")
    worst = max(found, key=lambda name: abs(found[name]))
    print(json.dumps({"benchmark": "remainder", "limit": LIMIT, "worst": worst, "share": found[worst], "plans": found}))
    return int(abs(found[worst]) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
