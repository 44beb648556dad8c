"""The batch-size study: the search, the fit and the noise scale, on surfaces whose answers are known."""

import json
import math
import tomllib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import paraxis
from paraxis.errors import TaskError
from paraxis.measure.batch_sizes import BatchSizes
from paraxis.measure.critical import Point, fit_critical
from paraxis.measure.noise import noise_scale, noise_terms
from paraxis.study.batch_size import Parameters, run, search, tune
from paraxis.study.reach import crossing, looks
from paraxis.study.trial import Factors, OutOfTime, Trial, identity

CRIT, LEAST = 300.0, 80.0
Norms = dict[str, list[float]]


def trial(factors: Factors, measures: dict[str, float | None], series: Any = None, **more: Any) -> Trial:
    words: dict[str, Any] = {"status": "ok", "seconds": 1.0, "started": "2026-01-01T00:00:00Z", "version": "0"} | more
    return Trial(study="t", factors=factors, measures=measures, series=series or {}, **words)


class Surface:
    """A runner over steps(batch, lr, seed) = the hyperbola x a bowl in log lr whose bottom moves with the batch."""

    def __init__(self, noise: float = 0.0, lost_above: float = math.inf) -> None:
        self.noise, self.lost_above, self.asked = noise, lost_above, []  # type: ignore[var-annotated]
        self.records: dict[Any, Trial] = {}
        self.fresh = 0

    def best_lr(self, batch: int) -> float:
        return 0.02 * batch / (1 + batch / CRIT)

    def steps(self, batch: int, lr: float, seed: int) -> float:
        away = math.log2(lr / self.best_lr(batch))
        rough = math.exp(self.noise * np.random.default_rng(batch * 100 + seed).standard_normal())
        return LEAST * (1 + CRIT / batch) * (1 + 0.3 * away**2) * rough

    def __call__(self, factors: Factors, repeat: int) -> Trial:
        self.asked.append(factors)
        key = identity(factors, repeat)
        if key not in self.records:
            self.fresh += 1
            self.records[key] = self._run(factors)
        return self.records[key]

    def _run(self, factors: Factors) -> Trial:
        batch, lr = int(factors["batch"]), float(factors["lr"])
        if factors["rule"] == "noise":
            steps, parts = int(factors["steps"]), int(factors["microbatches"])
            return trial(factors, {"microbatch": batch / parts}, gaussian(steps, batch // parts, parts, scale=250.0))
        steps = self.steps(batch, lr, int(factors["seed"]))
        lost = steps > float(factors["steps"]) or batch > self.lost_above
        return trial(factors, {"steps_to_target": None if lost else steps})


def gaussian(steps: int, size: int, parts: int, scale: float, seed: int = 0) -> Norms:
    """Squared norms of gradients N(G, Sigma / size) with tr(Sigma) / |G|^2 = scale."""
    weights, rng = 40, np.random.default_rng(seed)
    truth = np.full(weights, 1 / math.sqrt(weights))
    one = math.sqrt(scale / weights / size)
    gradients = truth + one * rng.standard_normal((steps, parts, weights))
    whole = gradients.mean(1)
    return {
        "square_small": (gradients**2).sum(2).mean(1).tolist(),
        "square_large": (whole**2).sum(1).tolist(),
    }


PARAMETERS: dict[str, Any] = {"batches": [16, 64, 256, 1024, 4096], "lr": 0.3, "noise_batch": 256, "max_steps": 10_000}


def test_the_study_finds_the_rates_the_bend_and_the_noise() -> None:
    surface = Surface()
    found = tune(PARAMETERS, surface)
    assert found.finished and not found.notes
    for point in found.points:
        assert abs(math.log2(point.lr / surface.best_lr(point.batch))) <= 0.26, point  # half of half an octave
        assert len(point.steps) == 3 and not point.at_edge
    critical = found.critical
    assert critical.b_crit and critical.b_crit.value == pytest.approx(CRIT, rel=0.05)
    assert critical.least_steps and critical.least_steps.value == pytest.approx(LEAST, rel=0.05)
    assert critical.regimes == {
        "perfect scaling": [16, 64],
        "diminishing returns": [256, 1024],
        "maximal data parallelism": [4096],
    }
    assert found.noise and found.noise.scale.low < 250 < found.noise.scale.high
    assert "critical batch size is" in found.sentence and "noise scale" in found.sentence


def test_running_again_asks_for_the_same_and_runs_nothing() -> None:
    surface = Surface(noise=0.05)
    first = tune(PARAMETERS, surface)
    asked, fresh = list(surface.asked), surface.fresh
    surface.asked.clear()
    assert tune(PARAMETERS, surface) == first
    assert surface.asked == asked and surface.fresh == fresh
    assert len({identity(f, 0) for f in asked}) == len(asked), "no trial is asked for twice"


def test_a_study_cut_off_in_the_middle_goes_on_where_it_was() -> None:
    surface = Surface()
    whole = tune(PARAMETERS, surface)
    broken = Surface()

    def tired(factors: Factors, repeat: int) -> Trial:
        if broken.fresh == 30 and identity(factors, repeat) not in broken.records:
            raise OutOfTime("the budget is spent")
        return broken(factors, repeat)

    part = tune(PARAMETERS, tired)
    assert not part.finished and "budget is spent" in part.notes[-1]
    assert part.points == whole.points[: len(part.points)] and 0 < len(part.points) < len(whole.points)
    assert tune(PARAMETERS, broken) == whole and broken.fresh == surface.fresh


def test_a_search_is_widened_where_the_best_stands_at_the_edge() -> None:
    far = tune(PARAMETERS | {"lr": 0.3 / 64, "batches": [16], "noise_batch": 0}, Surface())
    assert far.points[0].widened == 4 and not far.points[0].at_edge
    assert far.points[0].lr == pytest.approx(0.3, rel=0.2)
    short = tune(PARAMETERS | {"lr": 0.3 / 64, "batches": [16], "noise_batch": 0, "widest": 1}, Surface())
    assert short.points[0].at_edge and "edge" in short.notes[0]


def test_trials_are_cut_off_at_what_is_hopeless() -> None:
    limits: list[int] = []

    def bowl(place: int, limit: int) -> float | None:
        limits.append(limit)
        steps = 100.0 + 10 * (place - 1) ** 2
        return steps if steps <= limit else None

    assert search(bowl, 0, 2, 4, 5000, 1.5) == (1, 0, False)
    assert limits[0] == 5000 and max(limits[1:]) == 165  # 1.5 x what the centre took


def test_what_is_never_reached_is_widened_both_ways_and_told() -> None:
    asked: list[int] = []

    def never(place: int, limit: int) -> None:
        asked.append(place)

    assert search(never, 0, 1, 4, 100, 1.5) == (None, 4, True)
    assert sorted(asked) == [-6, -4, -2, 0, 2, 4, 6]
    found = tune(PARAMETERS | {"batches": [16, 64, 128, 256, 4096]}, Surface(lost_above=1000))
    assert found.critical.left_out == [4096] and found.critical.b_crit
    assert any("batch 4096: no learning rate" in note for note in found.notes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seeds": [0, 1]}, "search_seed=0 is one of the seeds"),
        ({"batches": [64, 16]}, "batches must ascend"),
        ({"noise_batch": 100}, "noise_batch=100"),
        ({"targets": 0.9}, "targets"),
        ({"target": 95}, "target"),
    ],
)
def test_parameters_that_do_not_fit(values: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words) as error:
        tune(values, Surface())
    assert "\n" not in str(error.value)


def test_a_refused_trial_ends_the_study() -> None:
    def refuse(factors: Factors, repeat: int) -> Trial:
        return trial(factors, {}, status="refused", reason="engine=native has not been built")

    with pytest.raises(TaskError, match="has not been built"):
        tune(PARAMETERS, refuse)


def test_a_failed_trial_counts_as_not_reached_and_is_told() -> None:
    surface = Surface()

    def failing(factors: Factors, repeat: int) -> Trial:
        if factors["batch"] == 64 and factors["seed"] == 2:
            return trial(factors, {}, status="failed", reason="rank 0 died")
        return surface(factors, repeat)

    found = tune(PARAMETERS, failing)
    assert found.points[1].steps[1] is None and found.points[1].median < math.inf
    assert any("batch 64" in note and "seed 2 failed" in note and "rank 0 died" in note for note in found.notes)


def points(noise: float, seed: int, crit: float = CRIT) -> list[Point]:
    rng = np.random.default_rng(seed)
    out = []
    for batch in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        steps = LEAST * (1 + crit / batch) * np.exp(noise * rng.standard_normal(3))
        out.append(Point(batch=batch, lr=0.1, steps=steps.tolist()))
    return out


def test_the_fit_is_exact_without_noise() -> None:
    fit = fit_critical(points(0.0, 0))
    assert fit.b_crit and fit.least_samples and fit.misfit is not None
    assert fit.b_crit.value == pytest.approx(CRIT, rel=1e-3) and fit.misfit < 1e-3
    assert fit.b_crit.high / fit.b_crit.low < 1.01
    assert fit.least_samples.value == pytest.approx(CRIT * LEAST, rel=1e-3)
    assert fit.steps(CRIT) == pytest.approx(2 * LEAST, rel=1e-3)


def test_the_interval_of_the_fit_covers() -> None:
    hits = 0
    for seed in range(40):
        fit = fit_critical(points(0.1, seed), draws=200)
        assert fit.b_crit
        hits += fit.b_crit.low <= CRIT <= fit.b_crit.high
    assert 33 <= hits <= 40 and fit.b_crit.high / fit.b_crit.low < 3  # few seeds: somewhat less than 95%


def test_no_bend_no_critical_batch_size() -> None:
    perfect = fit_critical(points(0.0, 0, crit=1e9))
    assert perfect.b_crit is None and "one regime" in (perfect.refusal or "") and "larger" in perfect.sentence
    few = fit_critical(points(0.0, 0)[:3])
    assert few.b_crit is None and "3 batch sizes" in (few.refusal or "")


def test_the_noise_scale_of_known_gradients_is_found_and_a_mean_of_ratios_is_not() -> None:
    steps, size, parts, scale = 400, 8, 8, 500.0
    norms = gaussian(steps, size, parts, scale)
    found = noise_scale(norms["square_small"], norms["square_large"], size, size * parts)
    assert found.scale.value == pytest.approx(scale, rel=0.15)
    assert found.scale.low < scale < found.scale.high < 2 * scale
    assert found.variance == pytest.approx(scale, rel=0.05) and found.gradient == pytest.approx(1.0, rel=0.15)
    squared, variance = noise_terms(
        np.array(norms["square_small"]), np.array(norms["square_large"]), size, size * parts
    )
    assert abs(float((variance / squared).mean()) / scale - 1) > 0.3


def test_the_interval_of_the_noise_scale_covers() -> None:
    hits = 0
    for seed in range(60):
        norms = gaussian(100, 16, 8, 200.0, seed=seed)
        found = noise_scale(norms["square_small"], norms["square_large"], 16, 128, draws=400)
        hits += found.scale.low <= 200 <= found.scale.high
    assert 50 <= hits <= 60


def test_noise_that_hides_the_gradient_has_no_upper_bound() -> None:
    norms = gaussian(40, 2, 2, 50_000.0)
    found = noise_scale(norms["square_small"], norms["square_large"], 2, 4)
    assert found.scale.high == math.inf and "no bound" in found.sentence
    with pytest.raises(TaskError, match="first smaller"):
        noise_scale([1.0] * 40, [1.0] * 40, 8, 8)
    with pytest.raises(TaskError, match="30 steps"):
        noise_scale([1.0] * 5, [1.0] * 5, 8, 64)


def test_gradient_norms_of_a_linear_regression() -> None:
    """Inputs N(0, I), targets w x + e: at weights 0 the gradient is -2 w, the trace of its variance known."""
    import torch

    from paraxis.measure.gradients import gradient_norms
    from paraxis.task.spec import TaskSpec
    from paraxis.task.task import make_task

    size, width, noise = 64, 10, 2.0
    generator = torch.Generator().manual_seed(1)
    truth = torch.ones(1, width) / math.sqrt(width)
    batches = []
    for _ in range(300):
        x = torch.randn(size, width, generator=generator)
        batches.append((x, x @ truth.T + noise * torch.randn(size, 1, generator=generator)))

    def net() -> torch.nn.Module:
        made = torch.nn.Linear(width, 1, bias=False)
        torch.nn.init.zeros_(made.weight)
        return made

    spec = TaskSpec(live=True, batch=size, lr=1e-12, momentum=0.0)  # it stays where it is
    norms = gradient_norms(make_task(spec, {"net": net(), "batches": batches}), 300, 8)
    assert norms.size == 8 and len(norms.small) == 300
    # g = -2 x (x.w + e): E|g|^2 = 4 (|w|^2 (width + 2) + noise^2 width), |G|^2 = 4 |w|^2
    scale = (width + 2 + noise**2 * width) - 1
    found = noise_scale(norms.small, norms.large, 8, size)
    assert found.scale.low < scale < found.scale.high and found.scale.value == pytest.approx(scale, rel=0.2)
    assert found.gradient == pytest.approx(4.0, rel=0.2)


def test_gradient_norms_train_as_the_serial_run_does() -> None:
    import torch

    from paraxis.measure.gradients import gradient_norms
    from paraxis.run import serial
    from paraxis.task.spec import TaskSpec
    from paraxis.task.task import make_task

    spec = TaskSpec(network="mlp", data="synthetic:256,1x28x28,10", batch=32, lr=0.1)
    one, other = (make_task(spec, dtype=torch.float64) for _ in range(2))
    gradient_norms(one, 5, 4)
    serial.emulate([serial.replica(other)], 0, 5, 1, 1)
    for name, value in one.net.state_dict().items():
        assert torch.allclose(value, other.net.state_dict()[name], rtol=0, atol=1e-12), name
    with pytest.raises(TaskError, match="equal parts of 32"):
        gradient_norms(one, 5, 5)


def test_looks_are_dense_enough_and_end_at_the_limit() -> None:
    steps = list(looks(1000))
    assert steps[:3] == [1, 2, 3] and steps[-1] == 1000 and len(steps) < 110
    assert all(after - before <= max(1, math.ceil(before * 0.06)) for before, after in pairwise(steps))
    assert list(looks(1)) == [1]


def test_the_crossing_is_interpolated() -> None:
    assert crossing([10, 20], [0.4, 0.6], 0.5) == pytest.approx(15)
    assert crossing([10, 20], [0.5, 0.6], 0.5) == 10
    assert crossing([10, 20, 30], [0.1, 0.4, 0.45], 0.5) is None
    assert crossing([], [], 0.5) is None


def test_what_a_study_gets_is_plain_json() -> None:
    plain = run(SimpleNamespace(parameters=PARAMETERS), Surface())
    assert BatchSizes.model_validate_json(json.dumps(plain)) == tune(PARAMETERS, Surface())


def test_the_shipped_study_says_what_is_fixed() -> None:
    path = Path(paraxis.__file__).parent / "study" / "shipped" / "batch-size.toml"
    values = tomllib.loads(path.read_text())
    assert values["procedure"] == "batch-size"
    p = Parameters.model_validate(values["parameters"])
    assert values["parameters"].keys() == p.model_dump().keys(), "nothing is left to defaults that may change"
    assert p.batches == [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert p.rate(2) == pytest.approx(2 * p.lr) and p.limit(16) == 40_000 and p.limit(8192) == 732
