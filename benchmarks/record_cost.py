"""What do the clocks cost that are always read? At most 0.1% of a step of `cnn`, batch 128, on the native engine.

    python benchmarks/record_cost.py [--rounds 9]

The cost of a record is that of an instruction which does nothing but be recorded, so it is if anything too high: the
interpreter's own loop is in it. Prints a line a plan; ends in one JSON line; exits 1 if a share is larger.
"""

import argparse
import json
import sys
from statistics import median

from steps import timed

from paraxis.api import make_spec, silent
from paraxis.plan.plan import parse
from paraxis.run.openmp import record_cost
from paraxis.session import open_session

LIMIT = 1e-3
PLANS = ("serial", "dp=2", "pp=2,microbatches=4", "pp=2,microbatches=16")


def main() -> int:
    """Measure steps and records."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=9)
    given = options.parse_args()
    plans = [parse("engine=native" + ("," + text if text != "serial" else "")) for text in PLANS]
    with open_session(make_spec("cnn", batch=128), {}, {}, None, silent) as session:
        session.begin(("solo",))
        rows = timed(session, plans, given.rounds, 0.25)
    here = record_cost() * 1e-9
    found = {}
    for row in rows:
        seconds = median(cost for seen in row.windows.values() for cost in seen.record) * 1e-9
        records = max(len(stamps) for seen in row.windows.values() for _, ranks in seen.steps for stamps in ranks)
        share = records * seconds / row.step
        found[row.plan.label()] = {"records": records, "seconds": seconds, "step": row.step, "share": share}
        cost = f"{records:4} records of {seconds * 1e9:5.1f} ns  {share:8.4%}"
        print(f"{row.plan.label():28} {row.step * 1e3:8.3f} ms  {cost}")
    worst = max(entry["share"] for entry in found.values())
    print(json.dumps({"benchmark": "record_cost", "limit": LIMIT, "record": here, "worst": worst, "plans": found}))
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
