"""Ranks that raise, die, stop or lose their driver, and Ctrl-C: one line, the right exit code, and nobody is left."""

import os
import signal
import sys
import time
from typing import Any

import pytest

from paraxis.measure.records import read

TRANSPORTS = ("mpi", "gloo")
LONG = ("mlp", "--steps", 10_000_000)  # far beyond any test's patience
HALF_BAD = """
import torch
from torch import nn
import torch.nn.functional as F

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

def batches():
    x = torch.randn(9, 16, 6, generator=torch.Generator().manual_seed(0))
    y = x[:, :, :3].argmax(2)
    x[5, 15, 0] = 100.0  # among the last samples of the sixth batch: only the last replica sees it
    return list(zip(x, y))

def inputs(batch):
    if (batch[0] > 50).any():
        {fault}
    return batch[0]
"""


def training(desk: Any, plan: str, *words: object) -> Any:
    """A long training that is well under way."""
    running = desk.start("train", *(words or LONG), "--plan", plan)
    running.says("s  training")
    return running


@pytest.mark.parametrize("transport", [pytest.param("mpi", marks=pytest.mark.slow), "gloo"])
def test_one_rank_raises(desk: Any, transport: str) -> None:
    path = desk.write("bad.py", HALF_BAD.replace("{fault}", 'raise ValueError("bad\\nsample")'))
    done = desk.run("train", path, "--plan", f"dp=2,comm={transport}", "--epochs", 3)
    done.refused("rank 1 of 2", transport, "ValueError: bad sample", "bad.py:17", rc=1)
    assert done.seconds < 40


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise KeyboardInterrupt"])
def test_one_rank_leaves(desk: Any, fault: str) -> None:
    path = desk.write("bad.py", HALF_BAD.replace("{fault}", fault))
    for transport in TRANSPORTS:
        done = desk.run("train", path, "--plan", f"dp=2,comm={transport}", "--epochs", 3)
        done.refused("rank 1 of 2", transport, rc=1)


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_rank_aborts_and_has_said_why(desk: Any, transport: str) -> None:
    fault = "import os; os.write(2, b'free(): invalid pointer\\n'); os.abort()"
    path = desk.write("bad.py", HALF_BAD.replace("{fault}", fault))
    done = desk.run("train", path, "--plan", f"dp=2,comm={transport}", "--epochs", 3)
    done.refused("rank 1 of 2", transport, "SIGABRT: free(): invalid pointer", rc=1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_rank_is_killed(desk: Any, transport: str) -> None:
    running = training(desk, f"dp=2,comm={transport}")
    desk.ranks(transport)[1].kill()
    killed = time.monotonic()
    done = running.finish(20)
    done.refused("rank 1 of 2", transport, "SIGKILL", rc=1)
    assert time.monotonic() - killed < 6
    desk.check_tidy()


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_rank_is_stopped(desk: Any, transport: str) -> None:
    running = training(desk, f"dp=2,comm={transport}")
    desk.ranks(transport)[1].suspend()
    running.finish(100).refused("rank 1 of 2", "stopped", "kill -CONT", rc=1)
    desk.check_tidy()


@pytest.mark.slow
def test_a_long_step_is_no_stopped_rank(desk: Any) -> None:
    pause = "import os, time; os.path.exists('paused') or (open('paused', 'w'), time.sleep(75))"
    path = desk.write("bad.py", HALF_BAD.replace("{fault}", pause).replace("100.0", "51.0"))
    done = desk.run("train", path, "--plan", "dp=2,comm=gloo", "--epochs", 2, "--json", limit=150)
    assert done.rc == 0, done.err
    assert len(done.document["losses"]) == 18


@pytest.mark.parametrize("transport", ["mpi", pytest.param("gloo", marks=pytest.mark.slow)])
def test_the_driver_is_killed(desk: Any, transport: str) -> None:
    running = training(desk, f"dp=2,comm={transport}")
    assert len(desk.ranks(transport)) == 2
    running.process.kill()
    assert running.finish(10).rc == -signal.SIGKILL
    desk.check_gone(within=5)


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("wait", [0.0, 0.5, 1.5, 3.0])
def test_the_driver_is_killed_while_ranks_start(desk: Any, transport: str, wait: float) -> None:
    running = desk.start("train", *LONG, "--plan", f"dp=2,comm={transport}")
    running.says("loading the framework")
    time.sleep(wait)
    running.process.kill()
    running.finish(10)
    desk.check_gone(within=30)  # the framework has to be loaded before a rank notices


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,comm=mpi", "pp=2,microbatches=4,comm=gloo"])
def test_ctrl_c_while_training(desk: Any, plan: str) -> None:
    running = training(desk, plan)
    running.interrupt()
    interrupted = time.monotonic()
    running.finish(10).refused("interrupted", "kept", rc=130)
    assert time.monotonic() - interrupted < 5
    desk.check_tidy()


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_keeps_the_weights_of_the_last_epoch(desk: Any, how: signal.Signals) -> None:
    running = desk.start("train", "mlp", "--epochs", 1000, "--plan", "dp=2,comm=mpi")
    running.says("epoch 2")
    os.kill(running.process.pid, how)  # SIGTERM: as a scheduler does it
    running.finish(10).refused("interrupted", rc=130)
    assert [p.name for p in (desk.folder / "paraxis-run").iterdir()] == ["weights.safetensors"]
    desk.check_tidy()


def test_ctrl_c_while_exploring_keeps_what_is_known(desk: Any) -> None:
    running = desk.start("explore", "mlp", "--workers", 2, "--budget", 300, "--json")
    running.until((desk.folder / "paraxis-study" / "study.json").exists)
    running.interrupt()
    done = running.finish(10)
    desk.check_gone(within=2)
    done.refused("interrupted", "kept", rc=130)
    assert done.out == ""
    study = read(desk.folder / "paraxis-study")
    assert not study.finished and study.results
    desk.check_tidy()


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.05, 0.3, 1.0, 2.5])
def test_ctrl_c_while_ranks_start(desk: Any, wait: float) -> None:
    running = desk.start("train", *LONG, "--plan", "dp=2,comm=mpi")
    running.says("loading the framework")
    time.sleep(wait)
    running.interrupt()
    running.finish(10).refused("interrupted", rc=130)
    desk.check_tidy()


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.01, 0.1, 0.3])
def test_an_impatient_ctrl_c(desk: Any, gap: float) -> None:
    running = training(desk, "dp=2,comm=mpi")
    for _ in range(3):
        running.interrupt()
        time.sleep(gap)
        if running.process.poll() is not None:
            break
    done = running.finish(10)
    desk.check_gone(within=5)
    assert done.rc in (130, -signal.SIGINT)  # a shell shows both as 130
    assert "Traceback" not in done.err


FAREWELL = """
import atexit, os, signal, sys
from paraxis import cli

def app(*words, **options):
    os.kill(os.getpid(), signal.{first})

cli.app = app
atexit.register(os.kill, os.getpid(), signal.{second})  # while Python shuts down
cli.main()
"""


@pytest.mark.parametrize("first, second", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGCHLD", "SIGINT")])
def test_a_signal_in_the_farewell_ends_it_without_a_word(desk: Any, first: str, second: str) -> None:
    script = desk.write("farewell.py", FAREWELL.format(first=first, second=second))
    done = desk.start(script, program=(sys.executable,)).finish(30)
    assert done.rc == -getattr(signal, second)
    assert done.err == ("" if first == "SIGCHLD" else "paraxis: interrupted; what was finished is kept\n")


@pytest.mark.slow
def test_exploring_goes_on_without_the_plan_whose_ranks_die(desk: Any) -> None:
    running = desk.start("explore", "mlp", "--workers", 2, "--budget", 60, "--json")  # the start alone may take 15 s
    running.says("proving dp=2 gloo")
    desk.ranks("gloo")[0].kill()
    done = running.finish(120)
    assert done.rc == 0, done.err
    rows = {r["label"]: r for r in done.document["results"]}
    failed = [r for r in rows.values() if r["status"] == "failed"]
    assert len(failed) == 1 and "SIGKILL" in failed[0]["reason"] and failed[0]["comm"] == "gloo"
    assert rows["serial"]["status"] == rows["dp=2 mpi"]["status"] == "ok"
    desk.check_tidy()
