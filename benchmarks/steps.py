"""What benchmarks of steps share: plans timed in interleaved rounds, with the clocks of their instructions."""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median

from paraxis.errors import ParaxisError
from paraxis.measure.breakdown import Window, account, against, keep_middle, mean, middle_rounds, timelines, window
from paraxis.measure.records import Split
from paraxis.plan.plan import Plan
from paraxis.program.instructions import Program
from paraxis.program.timeline import Timeline
from paraxis.session import Session


@dataclass
class Timed:
    """A plan with the seconds of its steps by round, and the windows of the rounds in the middle."""

    plan: Plan
    program: Program
    times: dict[int, float] = field(default_factory=dict)
    windows: dict[int, Window] = field(default_factory=dict)

    @property
    def step(self) -> float:
        """The median step in seconds."""
        return median(self.times.values())

    def lines(self) -> list[Timeline]:
        """The timelines of the middle rounds."""
        chosen = middle_rounds(self.windows, self.times, wide=True)
        return [line for r in chosen for line in timelines(self.program, self.windows[r].steps)]

    def ranks(self) -> list[Split]:
        """Where the step of each rank goes."""
        chosen = [self.windows[r] for r in middle_rounds(self.windows, self.times)]
        parts = [account(self.program, seen, timelines(self.program, seen.steps)) for seen in chosen]
        return [mean(same) for same in zip(*parts, strict=True)]

    def split(self) -> Split:
        """Where the median step goes."""
        return against(mean(self.ranks()), self.step)


def timed(session: Session, plans: Sequence[Plan], rounds: int, seconds: float) -> list[Timed]:
    """Every plan that this task can meet, in `rounds` rounds of chunks of about `seconds`."""
    found: dict[str, Timed] = {}
    for wanted in plans:
        with suppress(ParaxisError):
            plan = session.settled(wanted)
            row = Timed(plan, session.program(plan))
            session.setup(plan.text(), plan)
            ask(session, row, -1, 0.0)
            found[plan.text()] = row
    rng = random.Random(0)
    for number in range(rounds):
        for row in rng.sample(list(found.values()), len(found)):
            ask(session, row, number, seconds)
    return list(found.values())


def ask(session: Session, row: Timed, number: int, seconds: float) -> None:
    """One chunk; round -1 only finds out how long a step takes."""
    steps = max(1, min(5000, round(seconds / row.times[-1 if number < 1 else number - 1]))) if row.times else 2
    request = {"do": "measure", "warm": 1 + steps // 10, "steps": steps, "trace": 1024}
    answers = session.ask(row.plan.text(), row.plan, request)
    row.times[number] = answers[0]["seconds"] / steps
    seen = window(answers)
    if number >= 0:
        row.times.pop(-1, None)
        assert seen is not None, "every step of a program is traced"
        row.windows = keep_middle(row.windows | {number: seen}, row.times)
