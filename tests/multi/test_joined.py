"""Ranks that mpiexec or torchrun has started are joined; the document is printed once, and all of them end."""

from typing import Any

import pytest

MPIEXEC = ("mpiexec", "-n", 2, "--oversubscribe", "--bind-to", "none")
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", 2)


def ours(text: str) -> list[str]:
    """The lines that Paraxis has said itself, not the launcher, whose own words may end in a blank after a newline."""
    return [line.lstrip() for line in text.splitlines() if line.lstrip().startswith("paraxis: ")]


def test_mpiexec_and_a_proof(desk: Any) -> None:
    words = ("verify", "mlp", "--plan", "dp=2,comm=mpi", "--steps", 3, "--json")
    done = desk.launch(*MPIEXEC, "paraxis", *words)
    assert done.rc == 0, done.err
    assert done.document["passed"] and len(done.document["results"]) == 1
    assert done.document["results"][0]["verified"]["max_relative_difference"] < 1e-13
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_torchrun_and_training(desk: Any) -> None:
    words = ("train", "mlp", "--plan", "dp=2,comm=gloo", "--steps", 40, "--json")
    done = desk.launch(*TORCHRUN, "-m", "paraxis", *words)
    assert done.rc == 0, done.err
    assert len(done.document["losses"]) == 40 and done.document["test"]["samples"] == 10000
    assert (desk.folder / done.document["weights"]).is_file()


@pytest.mark.slow
def test_a_world_that_the_mesh_does_not_fill(desk: Any) -> None:
    done = desk.launch("mpiexec", "-n", 4, *MPIEXEC[3:], "paraxis", "verify", "mlp", "--plan", "dp=2")
    (line,) = ours(done.err)
    assert "dp=2" in line and "4" in line and "start 2" in line
    assert done.rc == 2 and "Traceback" not in done.err


def test_singletons_in_place_of_a_world(desk: Any) -> None:
    done = desk.run("verify", "mlp", "--plan", "dp=2", OMPI_COMM_WORLD_SIZE="2")
    done.refused("each is alone", "mpi4py", "mpiexec")


@pytest.mark.slow
def test_a_rank_that_raises_among_joined_ones(desk: Any) -> None:
    path = desk.write("bad.py", BAD)
    done = desk.launch(*MPIEXEC, "paraxis", "train", path, "--plan", "dp=2", "--steps", 20, tidy=False)
    assert done.rc != 0 and done.seconds < 60
    assert any("rank 1" in line and "bad sample" in line for line in ours(done.err)), done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_an_error_of_all_joined_ranks_is_said(desk: Any) -> None:
    path = desk.write("bad.py", BAD.replace("100.0", "float('nan')"))
    done = desk.launch(*MPIEXEC, "paraxis", "train", path, "--plan", "dp=2", "--steps", 20)
    (line,) = ours(done.err)
    assert "the loss is nan" in line and "step 4" in line and done.rc != 0
    assert "ABORT" not in done.err and "Traceback" not in done.err


@pytest.mark.slow
def test_joined_ranks_explore_and_then_train(desk: Any) -> None:
    path = desk.write("fine.py", BAD.replace("100.0", "1.0"))
    done = desk.launch(*MPIEXEC, "paraxis", "train", path, "--steps", 20, "--json")  # the best plan, not yet known
    if done.rc:  # for so small a network it may be one that these ranks cannot run, which is said
        (line,) = ours(done.err)
        assert "best plan: " in done.err and "of the 2 ranks that were started" in line
    else:
        assert len(done.document["losses"]) == 20


@pytest.mark.slow
def test_the_users_own_prints_do_not_disturb_the_document(desk: Any) -> None:
    path = desk.write("loud.py", "print('hello from my file')\n" + BAD.replace("100.0", "1.0"))
    done = desk.launch(*MPIEXEC, "paraxis", "train", path, "--plan", "dp=2", "--steps", 20, "--json")
    assert done.rc == 0, done.err
    assert len(done.document["losses"]) == 20


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [MPIEXEC, (*TORCHRUN, "--no-python")])
def test_bad_input_ends_all_ranks_with_one_line(desk: Any, launcher: tuple[object, ...]) -> None:
    for words in (("verify", "nope", "--plan", "dp=2"), ("train", "mlp", "--plan", "dp=2", "--lr", "-1")):
        done = desk.launch(*launcher, "paraxis", *words)
        assert len(ours(done.err)) == 1, done.err
        assert done.rc != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt.py", "batchnorm.py"])
def test_joined_ranks_explore(desk: Any, examples: Any, name: str) -> None:
    done = desk.launch(*MPIEXEC, "paraxis", "explore", examples / name, "--budget", 25, "--json")
    assert done.rc == 0, done.err
    rows = [r for r in done.document["results"] if r["status"] == "ok"]
    assert {r["comm"] for r in rows} == {"mpi", None} and all(r["verified"]["passed"] for r in rows)


@pytest.mark.slow
def test_train_joined_over_mpi_is_train_launched(desk: Any) -> None:
    words = ("train", "mlp", "--plan", "pp=2,microbatches=4", "--steps", 40, "--json")
    joined = desk.launch(*MPIEXEC, "paraxis", *words)
    launched = desk.run(*words)
    assert joined.rc == launched.rc == 0, joined.err + launched.err
    assert joined.document["losses"] == pytest.approx(launched.document["losses"], abs=1e-6)


BAD = """
import torch
from torch import nn
import torch.nn.functional as F

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

def batches():
    x = torch.randn(5, 16, 6, generator=torch.Generator().manual_seed(0))
    y = x[:, :, :3].argmax(2)
    x[3, 15, 0] = 100.0  # among the last samples of the fourth batch: only the last replica sees it
    return list(zip(x, y))

def inputs(batch):
    if (batch[0] > 50).any():
        raise ValueError("bad sample")
    return batch[0]
"""
