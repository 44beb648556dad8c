"""What plans learn, not only how fast: a few of them trained from the task's start, scored on held-out samples.

Exact plans compute the serial step, so one stands for all; an inexact plan is another algorithm, and only its accuracy
after the same samples, beside the exact one's, tells whether its faster step is worth anything.
"""

import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from statistics import median

from paraxis.errors import ParaxisError
from paraxis.measure.records import HeldOut, Learned, Study
from paraxis.plan.plan import Plan
from paraxis.rounds import Clock, Row
from paraxis.session import Session
from paraxis.training import evaluate, train_steps

SHARE, LEAST = 0.15, 3.0  # of the budget, and the seconds below which nothing is kept for it
LOOKS = 6  # at each plan; their steps grow as squares, for accuracy rises fastest at first
LOOKING = 1 / 3  # of the time; held-out samples are thinned to it
FEWEST_STEPS, FEWEST_SAMPLES, MOST_EPOCHS = 20, 500, 3
PROBED, PROBING = 1000, 0.1  # samples scored to know how long it takes, and the share of the time for that


@dataclass
class Pupil:
    """A plan that is trained from the start; `learned` grows by a value a look."""

    row: Row
    key: str
    pace: float = inf  # seconds that it takes to score a sample
    done: int = 0
    learned: Learned = field(default_factory=lambda: Learned(steps=[], samples=[], seconds=[], loss=[], accuracy=[]))

    @property
    def step(self) -> float:
        """Seconds of a step, as measured."""
        return median(self.row.times.values())

    @property
    def plan(self) -> Plan:
        """What is trained."""
        return self.row.plan


def held_out(session: Session) -> str:
    """The set that is scored: "validation", "test", or "" where there is none."""
    return "validation" if session.spec.validation else "test" if session.known().has_test else ""


def reserve(session: Session, budget: float) -> float:
    """Seconds of the budget that measuring leaves for accuracy."""
    return SHARE * budget if held_out(session) and SHARE * budget >= LEAST else 0.0


def learn(session: Session, rows: list[Row], study: Study, clock: Clock, budget: float) -> None:
    """Fill in `learned` of the winner, of today and of the fastest inexact plan of each kind, or why there is none."""
    which = held_out(session)
    if not which:
        spec = session.spec
        remedy = (
            "--validation 0.1" if spec.data or not (spec.own_file or spec.live) else "--data npz:FILE with a test set"
        )
        study.accuracy_skipped = f"there are no held-out samples to score on; {remedy} would give some"
        return
    if not reserve(session, budget):
        study.accuracy_skipped = (
            f"{SHARE:.0%} of the budget are kept for it, and of {budget:g} s that is too little; "
            f"--budget {LEAST / SHARE:g} or more would do"
        )
        return
    chosen = pupils(rows, study)
    clock = Clock(min(clock.budget, clock.spent() + reserve(session, budget)), clock.start)
    if clock.left() < LEAST / 2 or not chosen:
        study.accuracy_skipped = "proving and measuring have spent the budget; raise --budget"
        return
    epoch, batch = session.known().steps_per_epoch, session.known().batch
    for pupil in chosen:
        pupil.pace = pupil.step / batch / 2  # a forward is a third of a step; better known once it has been tried
    if _too_few(study, chosen, _lengths(chosen, clock.left(), epoch)[0]):
        return
    session.tell("comparing accuracy", min(1.0, clock.spent() / clock.budget))
    _forget(session, rows)
    probed = max(batch, min(PROBED, int(PROBING * clock.left() / sum(pupil.pace for pupil in chosen))))
    chosen = [pupil for pupil in chosen if clock.left() > 0 and _ready(session, pupil, which, probed, study)]
    if not chosen:
        study.accuracy_skipped = "no plan could be set up anew in the time that is kept for it; raise --budget"
        return
    steps, most = _lengths(chosen, clock.left(), epoch)
    if not _too_few(study, chosen, steps):
        _look(session, chosen, study, which, looks(steps), most, clock)


def _too_few(study: Study, chosen: list[Pupil], steps: int) -> bool:
    """Whether so many steps are not worth their time; says so."""
    if steps < FEWEST_STEPS:
        study.accuracy_skipped = (
            f"what is left of the budget trains {len(chosen)} plans for {steps} steps each, and fewer than "
            f"{FEWEST_STEPS} tell nothing; raise --budget"
        )
    return steps < FEWEST_STEPS


def pupils(rows: list[Row], study: Study) -> list[Pupil]:
    """The winner, today, and the fastest inexact plan of each kind of synchronisation, once each."""
    live = [row for row in rows if row.live and row.times]
    best = study.recommendation.plan if study.recommendation else None
    kinds: dict[str, Row] = {}
    for row in sorted(live, key=lambda row: median(row.times.values())):
        if not row.plan.exact:
            kinds.setdefault(row.plan.sync.partition("@")[0], row)
    chosen = [row for row in live if row.result.plan == best or row.plan.engine == "plain"]
    return [Pupil(row, f"learn {number}") for number, row in enumerate([*chosen, *kinds.values()])]


def looks(steps: int) -> list[int]:
    """Steps after which every plan is scored; the last is `steps`."""
    return sorted({max(1, round(steps * (i / LOOKS) ** 2)) for i in range(1, LOOKS + 1)})


def _forget(session: Session, rows: list[Row]) -> None:
    """Give back the memory of what was set up to be timed: those weights have been trained by chunks of any length."""
    for row in rows:
        if row.live and session.home_alive(row.plan):
            with suppress(ParaxisError):  # ranks that have gone have nothing to give back
                session.ask(row.key, row.plan, {"do": "drop"})


def _ready(session: Session, pupil: Pupil, which: str, probed: int, study: Study) -> bool:
    """Set it up anew and find out how long it takes to score it."""
    try:
        session.setup(pupil.key, pupil.plan)
        begun = time.perf_counter()
        scored = evaluate(session, pupil.plan, which, pupil.key, probed)
        pupil.pace = (time.perf_counter() - begun) / scored["samples"]
    except ParaxisError as error:
        _excuse(study, pupil, error)
        return False
    return True


def _lengths(chosen: list[Pupil], left: float, epoch: int | None) -> tuple[int, int]:
    """(steps of each plan, held-out samples at most) that fit into `left` seconds."""
    most = max(FEWEST_SAMPLES, int(LOOKING * left / LOOKS / sum(pupil.pace for pupil in chosen)))
    looking = LOOKS * most * sum(pupil.pace for pupil in chosen)
    step = sum(pupil.step for pupil in chosen)
    return max(0, min(int((left - looking) / step), MOST_EPOCHS * (epoch or 1 << 30))), most


def _look(
    session: Session, chosen: list[Pupil], study: Study, which: str, steps: list[int], most: int, clock: Clock
) -> None:
    """Train all plans from look to look, in an order drawn anew each time: what drifts on the machine falls on all.

    A look counts once every plan has had it, so that all have the same points, however the budget ends it.
    """
    scored = 0
    for number, until in enumerate(steps):
        for pupil in random.Random(number).sample(chosen, len(chosen)):
            if clock.left() <= 0:
                break
            try:
                scored = _advance(session, pupil, until, which, most)
            except ParaxisError as error:
                _excuse(study, pupil, error)
                chosen = [other for other in chosen if other is not pupil]
        if clock.left() <= 0:
            break
    common = min((len(pupil.learned.steps) for pupil in chosen), default=0)
    if not common:
        study.accuracy_skipped = "the budget was spent before every plan had been scored once; raise --budget"
        return
    study.held_out = HeldOut(name="validation" if which == "validation" else "test", samples=scored)
    for pupil in chosen:
        lists = {key: values[:common] for key, values in pupil.learned.model_dump().items()}
        pupil.row.result.learned = Learned(**lists)


def _advance(session: Session, pupil: Pupil, until: int, which: str, most: int) -> int:
    """Train up to a step and score; only the training counts in seconds. Returns how many samples were scored."""
    begun = time.perf_counter()
    train_steps(session, pupil.plan, until - pupil.done, pupil.done, until, pupil.key)
    took = time.perf_counter() - begun
    score = evaluate(session, pupil.plan, which, pupil.key, most)
    seen = pupil.learned
    seen.steps.append(until)
    seen.samples.append(until * session.known().batch)
    seen.seconds.append(took + (seen.seconds[-1] if seen.seconds else 0.0))
    seen.loss.append(score["loss"])
    seen.accuracy.append(score["accuracy"])
    pupil.done = until
    return int(score["samples"])


def _excuse(study: Study, pupil: Pupil, error: ParaxisError) -> None:
    study.notes.append(f"no accuracy of {pupil.row.result.label}: {str(error).splitlines()[0]}")
