"""Studies with real ranks: a killed one ends as if nothing had been, Ctrl-C is quick, misplaced words are refused."""

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NATIVE = """
about = "small"
repeats = 2
vary_seed = true
measure = ["final_accuracy", "final_loss", "steps_to_target", "epoch_seconds"]
fixed = { data = "npz:small.npz", network = "mlp", batch = 16, epochs = 2, target = 0.99, evaluate_every = 5 }

[[grid]]
title = "plans"
fixed = { plan = "dp={workers},engine=native,sync={sync}", momentum = 0.0 }
factors.sync = ["gradient", "average@3", "hogwild"]
factors.workers = [1, 2]
exclude = [{ workers = 1, sync = ["average@3", "hogwild"] }, { workers = 2, sync = "hogwild" }]

[[grid]]
title = "their rule"
measure = ["final_accuracy"]
fixed = { rule = "theirs", momentum = 0.0, workers = 2, lr = 0.1 }
"""
MIXED = """
measure = ["step_seconds", "epoch_seconds", "bytes", "memory", "bubble"]
measure_seconds = 0.2
fixed = { data = "synthetic:256,1x4x4,4", network = "mlp:16-8-8-4", batch = 32, plan = "{plans},comm=mpi" }
factors.plans = ["dp=1", "dp=2", "pp=2,schedule=gpipe,microbatches=4", "dp=3", "pp=2,microbatches=64"]
"""
LONG = """
measure = ["final_loss"]
fixed = { data = "synthetic:256,1x4x4,4", network = "mlp:16-8-4", plan = "engine=native" }
factors.run = [{ steps = 5 }, { steps = 1_000_000_000 }]
order = "given"
"""


def small(desk: Any) -> None:
    """A data set that has a test set."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 320)
    x = rng.normal(size=(320, 1, 28, 28)) + y[:, None, None, None]
    parts = {"x_train": x[:256], "y_train": y[:256], "x_test": x[256:], "y_test": y[256:]}
    np.savez(desk.folder / "small.npz", **{k: v.astype("f4") if k[0] == "x" else v for k, v in parts.items()})
    desk.write("native.toml", NATIVE)


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The trials in a folder, a torn line left out."""
    path = folder / "trials.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines[1:] if line.endswith(b"\n")]


def without_times(trials: list[dict[str, Any]]) -> list[Any]:
    """What must be the same in every run."""
    kept = ("final_accuracy", "mean_accuracy", "alone_accuracy", "final_loss", "steps_to_target", "steps_trained")
    keys = ("factors", "repeat", "status", "reason", "plan", "oversubscribed")
    return [[t[k] for k in keys] + [{k: t["measures"].get(k) for k in kept}, t["series"].get("loss")] for t in trials]


@pytest.mark.slow
def test_a_study_killed_in_the_middle_resumes_to_the_same_records(desk: Any) -> None:
    small(desk)
    whole = desk.run("explore", "--study", "native.toml", "--out", "whole", "--json").document
    assert [t["status"] for t in whole["trials"]] == ["ok"] * 8 and whole["finished"]
    captions = re.findall("<figcaption>([^:]*):", (desk.folder / "whole" / "report.html").read_text())
    assert captions[:3] == ["accuracy", "loss", "s/epoch"]  # the target is out of reach
    assert all(t["measures"]["final_accuracy"] is not None for t in whole["trials"])
    running = desk.start("explore", "--study", "native.toml", "--out", "killed")
    running.until(lambda: len(recorded(desk.folder / "killed")) >= 2)
    running.process.send_signal(signal.SIGKILL)
    running.process.wait()
    desk.check_gone(10)
    before = recorded(desk.folder / "killed")
    done = desk.start("explore", "--study", "native.toml", "--out", "killed").finish()
    assert done.rc == 0 and "their rule" in done.out and "trials.csv" in done.out
    assert "report.html" in done.out and "gradient" in (desk.folder / "killed" / "report.html").read_text()
    after = recorded(desk.folder / "killed")
    assert after[: len(before)] == before and without_times(after) == without_times(whole["trials"])


def test_ctrl_c_ends_within_two_seconds_and_keeps_what_is_finished(desk: Any) -> None:
    desk.write("long.toml", LONG)
    running = desk.start("explore", "--study", "long.toml")
    running.says("trial 2 of 2")
    time.sleep(0.5)
    running.interrupt()
    begun = time.monotonic()
    running.finish(10).refused("interrupted", rc=130)
    assert time.monotonic() - begun < 2
    assert [t["factors"]["steps"] for t in recorded(desk.folder / "paraxis-study" / "long")] == [5]
    assert "256,1x4x4,4" in (desk.folder / "paraxis-study" / "long" / "trials.csv").read_text()
    desk.check_gone()


@pytest.mark.slow
def test_trials_of_several_processes_share_their_ranks(desk: Any) -> None:
    desk.write("mixed.toml", MIXED)
    document = desk.run("explore", "--study", "mixed.toml", "--json").document
    trials = {t["factors"]["plans"]: t for t in document["trials"]}
    assert {name: t["status"] for name, t in trials.items()} == {
        "dp=1": "ok",
        "dp=2": "ok",
        "pp=2,schedule=gpipe,microbatches=4": "ok",
        "dp=3": "refused",
        "pp=2,microbatches=64": "refused",
    }
    assert "batch=30 would" in trials["dp=3"]["reason"]
    two, pipe = trials["dp=2"]["measures"], trials["pp=2,schedule=gpipe,microbatches=4"]["measures"]
    parameters = 16 * 8 + 8 + 8 * 8 + 8 + 8 * 4 + 4
    assert two["bytes"] == pytest.approx(2 * 4 * parameters, rel=0.1) and trials["dp=1"]["measures"]["bytes"] == 0
    assert two["epoch_projected"] == 1 and two["epoch_seconds"] == pytest.approx(two["step_seconds"] * 8)
    assert pipe["bubble_uniform"] == pytest.approx(0.2) and 0 < pipe["bubble"] < 1 and two["bubble"] == 0


def test_words_that_belong_to_a_single_task_are_refused(desk: Any) -> None:
    for words in (["mlp"], ["--lr", 0.1], ["--workers", 2]):
        desk.run("explore", *words, "--study", "sync").refused("--study says itself")
    desk.run("explore", "--study", "snyc").refused("snyc", "there are", "sync")
    desk.run("explore", "--study", "sync", "--budget", 0).refused("budget=0")
    listed = desk.run("explore", "--study", "list").out
    assert all(name in listed for name in ("original", "pipeline", "scaling", "sync"))
