"""Does dropping out in a race make anybody wrong, and what does it save? Races replayed from recorded rounds.

    python benchmarks/race_check.py [--trials 300] [--rounds 12]    prints a table, ends in one JSON line

A race is a whole measuring loop, the one that `explore` runs, in which a chunk's time is a recorded one: today and
three plans alike it in truth (see `statistics_check.py`), and some that take three times as long. Its budget is that of
so many rounds of all plans; who drops out, and who has the rounds that are left, is up to the loop. It is wrong to say
that the fastest of those alike is faster than today, or than any of them; what is behind should be told apart.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
from statistics_check import DATA, Times, draw

from paraxis import rounds as racing
from paraxis.experiment import blank
from paraxis.measure.records import Machine, Study, Verified
from paraxis.measure.samples import Book
from paraxis.measure.statistics import apart
from paraxis.plan.plan import Plan
from paraxis.rounds import MOST, Clock, Row, compared, measure

ALIKE = 4
PROVED = Verified(against="serial", max_relative_difference=0.0, tolerance=1e-6, passed=True)


class Calm:
    """Nobody else on the machine."""

    def __init__(self, pids: list[int]) -> None:
        """Whatever they are."""

    def cores(self) -> float:
        """None that others keep busy."""
        return 0.0


@dataclass
class Replay:
    """A session whose chunks take recorded times; every chunk takes one tick of the clock."""

    recorded: dict[str, Times]
    number: int = 0
    ticks: int = 0
    pools: dict[str, Any] = field(default_factory=dict)

    def tell(self, what: str, fraction: float) -> None:
        """The number of the round is what is told."""
        self.number = int(what.rpartition(" ")[2]) - 1

    def ask(self, key: str, plan: Plan, request: dict[str, Any]) -> list[Any]:
        """A chunk of the current round."""
        self.ticks += 1
        seconds = request["steps"] * self.recorded[key][self.number]
        return [{"seconds": seconds, "window": None, "losses": [(1.0, 1.0)]}]

    def home_alive(self, plan: Plan) -> bool:
        """Nothing fails."""
        return True


@dataclass(frozen=True)
class Ticks(Clock):
    """A budget in chunks."""

    session: Any = None

    def spent(self) -> float:
        """Chunks so far."""
        return float(self.session.ticks)


@dataclass
class Tally:
    """Over all races: wrong claims, plans behind that were told apart, and rounds of today and of those behind."""

    faster: int = 0
    slower: int = 0
    behind: int = 0
    today: int = 0
    dropped: int = 0


def row(number: int) -> Row:
    """Today, or a plan that differs from all others."""
    plan = Plan(dp=1 + number, engine="torch") if number else Plan(engine="plain")
    made = Row(plan, plan.text(), blank(plan))
    made.result.verified = PROVED if number else None
    return made


def race(alike: list[Times], behind: list[Times], budget: int, tally: Tally) -> None:
    """One exploration's measuring, counted."""
    rows = [row(number) for number in range(len(alike) + len(behind))]
    session = Replay(dict(zip((r.key for r in rows), [*alike, *behind], strict=True)))
    machine = Machine(cpu="", usable_cores=1, memory_bytes=1, load_before=0.0, python="", torch="", mpi=None, system="")
    study = Study(task={}, machine=machine, today=None, baseline=None, results=[], recommendation=None, version="")
    with patch.object(racing, "ForeignLoad", Calm):
        measure(session, rows, Ticks(float(budget), session=session), study, Book())  # type: ignore[arg-type]
    best, others = compared(rows)
    told = apart({result.plan: pair for result, pair in others})
    same, late = [r.plan.text() for r in rows[: len(alike)]], rows[len(alike) :]
    ahead = best is not None and best.plan in same
    tally.faster += ahead and same[0] in told
    tally.slower += ahead and bool(told & set(same))
    tally.behind += sum(r.plan.text() in told for r in late)
    tally.today += len(rows[0].measured)
    tally.dropped += sum(len(r.measured) for r in late)


def races(plans: list[Any], budget: int, trials: int, behind: int, seed: int = 0) -> dict[str, float]:
    """Rates over races with so many plans far behind, whose budget is `budget` rounds of all plans."""
    rng, tally = np.random.default_rng([seed, budget, behind]), Tally()
    for trial in range(trials):
        own, other = plans[trial % len(plans)], plans[(trial + 1) % len(plans)]
        alike = draw(own, MOST, rng)[:ALIKE]
        late = [times for _ in range(-(-behind // len(other))) for times in draw(other, MOST, rng)][:behind]
        pace = 3 * median(alike[0].values()) / median(late[0].values()) if late else 1.0
        late = [{n: seconds * pace for n, seconds in times.items()} for times in late]
        race(alike, late, budget * (ALIKE + behind), tally)
    late_ones = max(1, trials * behind)
    return {
        "faster": tally.faster / trials,
        "slower": tally.slower / trials,
        "behind": tally.behind / late_ones,
        "rounds_of_today": tally.today / trials,
        "rounds_of_those_behind": tally.dropped / late_ones,
    }


def main() -> None:
    """Print rates with and without plans behind, for several budgets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--rounds", type=int, nargs="+", default=[6, 8, 12, 20])
    args = parser.parse_args()
    data = json.loads(DATA.read_text())
    plans, found = list(data["copies"].values()), []
    for budget in args.rounds:
        for behind in (0, 20):
            rates = races(plans, budget, args.trials, behind)
            found.append({"budget": budget, "behind": behind} | rates)
            words = (
                f"budget of {budget:>2} rounds, {behind:>2} behind: wrongly faster than today {rates['faster']:.1%}, "
                f"wrongly slower {rates['slower']:.1%}"
            )
            if behind:
                words += (
                    f"; behind told apart {rates['behind']:.1%} in {rates['rounds_of_those_behind']:.1f} rounds each, "
                    f"today has {rates['rounds_of_today']:.1f}"
                )
            print(words, file=sys.stderr)
    worst = max(rates["faster"] for rates in found)
    print(json.dumps({"recorded": data["recorded"], "races": found, "false_faster": worst, "ok": worst <= 0.05}))


if __name__ == "__main__":
    main()
