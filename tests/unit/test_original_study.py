"""The page that answers the original study: their figures, ours from the records alone, and their rule."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paraxis.errors import TaskError
from paraxis.study.bench import Outcome
from paraxis.study.conduct import conduct
from paraxis.study.definition import load, spec_of
from paraxis.study.original import BATCHES, CNN_MPI, OPENMP, RESNET_MPI, SERIAL, main, page
from paraxis.study.sampling import Sampled
from paraxis.study.theirs import train_as_they_did
from paraxis.study.trial import Factors, Trial


def made(factors: Factors, repeat: int) -> dict[str, float | None]:
    """Figures that follow from the factors: half a millisecond a step and 50 us a sample, divided among workers."""
    workers, batch = int(factors.get("workers", 1)), int(factors.get("batch", 32))
    steps, local = 60_000 // batch, batch / min(workers, 2)
    seconds = steps * (0.5e-3 + 50e-6 * local) * (1 + 0.01 * repeat)
    return {"epoch_seconds": seconds, "epoch_projected": 0.0, "final_accuracy": 0.9, "bytes": 1e6} | (
        {"final_accuracy": 0.2, "mean_accuracy": 0.3, "alone_accuracy": 0.8} if "rule" in factors else {}
    )


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    """Two repeats of the shipped study."""
    words: dict[str, Any] = {"study": "original", "status": "ok", "seconds": 1.0, "version": "0", "started": "2020"}
    machine = {"cpu": "a processor", "usable_cores": 2, "foreign_cores": 0.1}
    return [
        Trial(**words, factors=p.factors, repeat=p.repeat, measures=made(p.factors, p.repeat), machine=machine)
        for p in load("original").schedule()
        if p.repeat < 2
    ]


def row(text: str, start: str, after: str) -> list[str]:
    """The cells of the first row that begins so, after a heading."""
    lines = text[text.index(after) :].splitlines()
    return [cell.strip() for cell in next(line for line in lines if line.startswith(f"| {start} |")).split("|")[1:-1]]


def test_every_published_figure_is_on_the_page_with_and_without_ours(trials: list[Trial]) -> None:
    for text in (page(trials), page([])):
        for workers, seconds in CNN_MPI.items():
            assert row(text, str(workers), "## CNN over MPI") == [str(workers), *map(str, seconds)]
        for workers, second in RESNET_MPI.items():
            assert row(text, str(workers), "## ResNet-18")[1] == f"{second:.0f}"
        for threads, (second, right) in OPENMP.items():
            assert row(text, str(threads), "## MLP on OpenMP")[1:3] == [f"{second:g}", f"{right}%"]
        for network, times in SERIAL.items():
            assert row(text, f"{network.upper()}, 1 thread", "## Serial")[1:4] == [str(t) for t in times]


def test_our_figures_are_those_of_the_records(trials: list[Trial]) -> None:
    text = page(trials)
    one, two = (row(text, name, "Ours, after one epoch") for name in ("1, PyTorch", "2, PyTorch over MPI"))
    for place, batch in enumerate(BATCHES):
        seconds = [(made({"workers": w, "batch": batch}, 0)["epoch_seconds"] or 0) * 1.005 for w in (1, 2)]
        assert float(one[1 + place]) == pytest.approx(seconds[0], rel=0.01)
        assert float(two[1 + place]) == pytest.approx(seconds[1], rel=0.01)
        assert two[4 + place].startswith(f"{seconds[0] / seconds[1]:.2f}x [")
    # By their rule two workers go over all samples each: as slow as one, but for the sharing of what a step costs.
    whole, epoch = row(text, "64", "Why they saw a slow-down"), made({"workers": 2, "batch": 128}, 0)["epoch_seconds"]
    assert float(whole[2]) == pytest.approx(2 * 1.005 * (epoch or 0), rel=0.01)
    assert row(text, "8", "## MLP on OpenMP")[6:] == ["20.0%", "30.0%", "80.0%"]
    found = re.search(r"CNN (\S+) ms \+ (\S+) us a sample", text)
    assert found and float(found[1]) == pytest.approx(0.5, rel=0.02) and float(found[2]) == pytest.approx(50, rel=0.02)
    assert "a processor, 2 usable cores" in text and "each trial once to 2 times" in text


def test_what_was_not_run_is_a_dash_and_no_sentence(trials: list[Trial]) -> None:
    text = page([])
    assert "Measured on the same" not in text and "Random starts" not in text and "a sample" not in text
    assert set(row(text, "2, PyTorch over MPI", "Ours, after")[1:]) == {"-"}
    some = page([t.model_copy(update={"oversubscribed": True}) for t in trials[:1]])
    assert row(some, "1, PyTorch", "Ours, after")[1].endswith("*") and "nan" not in some.lower()


def test_the_command_takes_the_folder_of_that_study_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def quick(factors: Factors, repeat: int, measures: Any) -> Outcome:
        return Outcome("ok", None, Sampled(made(factors, repeat)))

    assert main([str(tmp_path)]) == 2 and "cannot be read" in capsys.readouterr().err
    conduct(load("pipeline"), tmp_path / "other", 1e9, lambda *_: None, quick)
    assert main([str(tmp_path / "other")]) == 2 and "not original" in capsys.readouterr().err
    conduct(load("original"), tmp_path / "original", 1e9, lambda *_: None, quick)
    assert main([str(tmp_path / "original")]) == 0
    assert capsys.readouterr().out.startswith("# The original study, answered")


def test_random_starts_combined_once_lose_what_each_thread_had_learnt(tmp_path: Path) -> None:
    """On classes of several clusters each in few dimensions, so that no linear map tells them apart."""
    rng = np.random.default_rng(0)
    centres, cluster = rng.normal(size=(40, 6)), rng.integers(0, 40, 2400)
    y, spread = cluster % 10, rng.normal(size=(6, 784)) / 6
    x = ((centres[cluster] + 0.1 * rng.normal(size=(2400, 6))) @ spread).reshape(-1, 1, 28, 28).astype("f4")
    np.savez(tmp_path / "d.npz", x_train=x[:2000], y_train=y[:2000], x_test=x[2000:], y_test=y[2000:])
    found = {}
    for workers in (1, 4):
        factors: Factors = {"network": "mlp", "data": f"npz:{tmp_path}/d.npz", "batch": 1, "lr": 0.1, "momentum": 0.0}
        factors |= {"workers": workers, "epochs": 4, "rule": "theirs"}
        found[workers] = train_as_they_did(spec_of(factors), factors).measures
    right = {w: [m[k] or 0.0 for k in ("alone_accuracy", "mean_accuracy", "final_accuracy")] for w, m in found.items()}
    assert len(set(right[1])) == 1 and right[1][0] > 0.9
    assert right[4][0] > 0.7 and max(right[4][1:]) < right[4][0] - 0.1 and right[4][1] != right[4][2], right
    with pytest.raises(TaskError, match="workers and epochs"):
        train_as_they_did(spec_of({}), {"workers": 0})
