"""The study `batch-size`: steps to a target over batch sizes, the learning rate tuned anew at each.

As Shallue et al. 2019 (Measuring the Effects of Data Parallelism on Neural Network Training): a batch size is judged by
its own best learning rate, and a search whose best stands at the edge is widened. Target, seeds and limits are
parameters, fixed before the first trial. A deterministic procedure: what it asks for next depends on what was measured
alone, so that resuming is running it again.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pydantic import Field, ValidationError, model_validator

from paraxis.errors import TaskError
from paraxis.measure.batch_sizes import BatchSizes, compared
from paraxis.measure.critical import Point, Tried, fit_critical
from paraxis.measure.noise import FEWEST, NoiseScale, noise_scale
from paraxis.measure.records import Record
from paraxis.study.trial import Factors, OutOfTime, Runner, Trial

Try = Callable[[int, int], float | None]  # (place of a learning rate, limit) -> steps to the target


class Parameters(Record):
    """What is fixed beforehand. Learning rates stand on a grid of factors sqrt(2) through `lr`.

    A search takes `octaves` doublings on both sides of where the batch size before had its best (at first: `lr`), up to
    `widest` more while the best stands at the edge, and then the two neighbours of the best. It trains with
    `search_seed`; the figures come from `seeds`, for the best of many trials with one seed flatters that seed.
    No trial takes more than `max_steps` steps or `max_samples` samples, or `patience` times the best so far.
    """

    network: str = "mlp"
    data: str = "mnist"
    plan: str = "engine=native"
    batches: list[int] = Field([2**k for k in range(4, 14)], min_length=1)
    target: float = Field(0.95, gt=0, lt=1)
    validation: float = Field(0.1, ge=0, lt=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    lr: float = Field(0.04, gt=0)
    octaves: int = Field(2, ge=1)
    widest: int = Field(4, ge=0)
    search_seed: int = 0
    seeds: list[int] = Field([1, 2, 3], min_length=1)
    max_steps: int = Field(40_000, ge=1)
    max_samples: int = Field(6_000_000, ge=1)
    patience: float = Field(1.5, ge=1)
    noise_batch: int = 512
    noise_parts: int = Field(16, ge=2)

    @model_validator(mode="after")
    def _check(self) -> "Parameters":
        if self.search_seed in self.seeds:
            raise ValueError(f"search_seed={self.search_seed} is one of the seeds; the search needs one of its own")
        if sorted(set(self.batches)) != self.batches or self.batches[0] < 1:
            raise ValueError("batches must ascend, from 1 or more, none twice")
        if self.noise_batch and (self.noise_batch not in self.batches or self.noise_batch % self.noise_parts):
            fit = "one of batches and a multiple of noise_parts, or 0 to leave the noise scale out"
            raise ValueError(f"noise_batch={self.noise_batch}: it takes {fit}")
        return self

    def limit(self, batch: int) -> int:
        """The most steps of a trial."""
        return max(1, min(self.max_steps, self.max_samples // batch))

    def rate(self, place: int) -> float:
        """The learning rate `place` half octaves above `lr`, to four digits."""
        return float(f"{self.lr * 2 ** (place / 2):.4g}")

    def task(self, batch: int, place: int, seed: int) -> Factors:
        """The factors that all trials have."""
        shared: Factors = {"network": self.network, "data": self.data, "validation": self.validation}
        own: Factors = {"batch": batch, "lr": self.rate(place), "seed": seed}
        return shared | own | {"optimizer": "sgd", "momentum": self.momentum}


class Definition(Protocol):
    """What this procedure reads of a study's definition."""

    @property
    def parameters(self) -> Mapping[str, Any]: ...


def run(definition: Definition, runner: Runner) -> dict[str, Any]:
    """The procedure as studies call it: the record of `BatchSizes` as plain JSON. Raises TaskError."""
    return tune(definition.parameters, runner).model_dump(mode="json")


def tune(parameters: Mapping[str, Any], runner: Runner) -> BatchSizes:
    """The whole study; where time runs out, what can be said by then. Raises TaskError for unfit parameters."""
    p = _parameters(parameters)
    points: list[Point] = []
    notes: list[str] = []
    place, finished, noise = 0, True, None
    try:
        for batch in p.batches:
            best, point = _batch(runner, p, batch, place, notes)
            points.append(point)
            if best is None:
                notes.append(f"batch {batch}: no learning rate reached the target within {p.limit(batch):,} steps")
                continue
            place = best
            if point.at_edge:
                notes.append(f"batch {batch}: the best learning rate, {point.lr:g}, still stands at the search's edge")
        noise = _noise(runner, p, points, notes) if p.noise_batch else None
    except OutOfTime as error:
        finished = False
        notes.append(f"unfinished: {error}")
    critical = fit_critical(points)
    words = f"{p.network} on {p.data}, to {p.target:.1%} of held-out samples. {critical.sentence}"
    sentence = " ".join(filter(None, [words, compared(critical, noise)]))
    return BatchSizes(
        parameters=p.model_dump(),
        points=points,
        critical=critical,
        noise=noise,
        finished=finished,
        notes=notes,
        sentence=sentence,
    )


def _parameters(values: Mapping[str, Any]) -> Parameters:
    try:
        return Parameters.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        text = first["msg"].removeprefix("Value error, ")
        raise TaskError(f"study batch-size: {key + ': ' if key else ''}{text}") from None


def _batch(runner: Runner, p: Parameters, batch: int, centre: int, notes: list[str]) -> tuple[int | None, Point]:
    """(place of the best learning rate, the point) of one batch size."""
    tried: dict[int, Tried] = {}

    def steps(place: int, limit: int) -> float | None:
        found = _steps(runner(_reach(p, batch, place, p.search_seed, limit), 0), notes)
        tried[place] = Tried(lr=p.rate(place), steps=found, limit=limit)
        return found

    best, widened, edge = search(steps, centre, p.octaves, p.widest, p.limit(batch), p.patience)
    searched = [tried[place] for place in sorted(tried)]
    if best is None:
        return None, Point(batch=batch, lr=p.rate(centre), steps=[None] * len(p.seeds), searched=searched, at_edge=True)
    reached = tried[best].steps
    assert reached is not None
    limit = min(p.limit(batch), math.ceil(4 * reached))
    figures = [_steps(runner(_reach(p, batch, best, seed, limit), 0), notes) for seed in p.seeds]
    rate = p.rate(best)
    return best, Point(batch=batch, lr=rate, steps=figures, searched=searched, widened=widened, at_edge=edge)


def search(
    steps: Try, centre: int, octaves: int, widest: int, limit: int, patience: float
) -> tuple[int | None, int, bool]:
    """(the best place, places added by widening, whether it stands at the edge); None where nothing reached the target.

    Places are half octaves. Those near the centre come first, so that what is worse is soon cut off: a trial may take
    `patience` times the fewest steps so far. Of equals the smaller learning rate is best.
    """
    known: dict[int, float] = {}

    def look(place: int) -> None:
        reached = [s for s in known.values() if s < math.inf]
        bound = min(limit, math.ceil(patience * min(reached))) if reached else limit
        found = steps(place, bound)
        known[place] = math.inf if found is None else found

    def best() -> int:
        return min(known, key=lambda place: (known[place], place))

    for away in range(octaves + 1):
        for place in dict.fromkeys((centre - 2 * away, centre + 2 * away)):
            look(place)
    widened = 0
    while widened < widest and best() in (min(known), max(known)):
        # Where nothing has reached the target yet the smallest is "best": both ends are tried in turn.
        lost = known[best()] == math.inf
        down = widened % 2 == 0 if lost else best() == min(known)
        look(min(known) - 2 if down else max(known) + 2)
        widened += 1
    if known[best()] == math.inf:
        return None, widened, True
    middle = best()
    for place in (middle - 1, middle + 1):
        look(place)
    return best(), widened, best() in (min(known), max(known))


def _reach(p: Parameters, batch: int, place: int, seed: int, limit: int) -> Factors:
    rule: Factors = {"rule": "reach", "plan": p.plan, "target": p.target, "steps": limit}
    return p.task(batch, place, seed) | rule


def _steps(trial: Trial, notes: list[str]) -> float | None:
    """Steps to the target; a trial that failed has not reached it, and is noted. Raises TaskError for a refused one."""
    if trial.status == "refused":
        raise TaskError(f"study batch-size: {trial.reason}")
    if trial.status == "failed":
        told = f"batch {trial.factors['batch']}, lr {trial.factors['lr']}, seed {trial.factors['seed']}"
        notes.append(f"{told} failed and counts as not reached: {trial.reason}")
    return trial.measures.get("steps_to_target")


def _noise(runner: Runner, p: Parameters, points: list[Point], notes: list[str]) -> NoiseScale | None:
    """Of a serial run at `noise_batch` with its best learning rate, for as long as it takes to the target."""
    point = next(x for x in points if x.batch == p.noise_batch)
    if not math.isfinite(point.median):
        notes.append(f"no noise scale: batch {p.noise_batch} did not reach the target")
        return None
    steps = max(FEWEST, math.ceil(point.median))
    rule: Factors = {"rule": "noise", "steps": steps, "microbatches": p.noise_parts}
    factors = p.task(p.noise_batch, 0, p.search_seed) | {"lr": point.lr} | rule
    trial = runner(factors, 0)
    if trial.status != "ok":
        notes.append(f"no noise scale: {trial.reason}")
        return None
    part = int(trial.measures["microbatch"] or 0)
    return noise_scale(trial.series["square_small"], trial.series["square_large"], part, p.noise_batch)
