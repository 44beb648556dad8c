"""The command on a machine with a GPU: proofs over real transports, unlike devices within a limit, errors."""

import json
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.cuda]
WIDE = "mlp:784-4096-4096-4096-10"  # 441 MB of weights, gradients and momentum


@pytest.mark.parametrize(
    ("network", "plan"),
    [
        ("mlp", "device=cuda"),
        ("cnn", "device=cuda"),
        ("gpt:nano", "device=cuda"),
        ("mlp", "dp=2,device=cuda:0,comm=gloo"),
        ("cnn", "dp=2,device=cuda,comm=mpi"),
        ("gpt:nano", "pp=2,microbatches=4,device=cuda:0,comm=gloo"),
        ("cnn", "pp=2,microbatches=4,devices=cpu+cuda:0,comm=gloo"),
        ("gpt:nano", "pp=2,microbatches=4,devices=cpu+cuda:0,comm=mpi"),
    ],
)
def test_proofs(network: str, plan: str, desk: Any) -> None:
    done = desk.run("verify", network, "--plan", plan, "--steps", 5, "--json", limit=300)
    assert done.rc == 0, done.err + done.out
    (result,) = done.document["results"]
    assert result["verified"]["passed"] and result["verified"]["max_relative_difference"] <= 1e-10


def test_a_network_too_large_for_the_gpu_trains_with_the_help_of_the_cpu(desk: Any) -> None:
    limit = "--memory-limit", "300M"
    desk.run("train", WIDE, "--plan", "device=cuda", "--steps", 2, *limit, limit=300).refused("more than the limit")
    words = "verify", WIDE, "--plan", "pp=2,microbatches=4,devices=cpu+cuda:0,comm=gloo", "--dtype", "float32"
    done = desk.run(*words, "--steps", 3, *limit, "--json", limit=300)
    assert done.rc == 0, done.err + done.out
    (result,) = done.document["results"]
    assert result["verified"]["passed"] and result["computed_memory"]["total"] <= 300e6


def test_no_room_is_one_line_that_says_what_would_fit(desk: Any) -> None:
    words = "train", WIDE, "--plan", "engine=plain,device=cuda", "--steps", 3, "--memory-limit", "200M"
    desk.run(*words, limit=300).refused("engine=plain,device=cuda: the GPU is out of memory", "200 MB allowed", ";")


def test_devices_that_are_not_there(desk: Any) -> None:
    count = torch.cuda.device_count()
    desk.run("train", "mlp", "--plan", f"device=cuda:{count}").refused(f"device=cuda:{count}: this machine has {count}")
    hidden = desk.run("train", "mlp", "--plan", "device=cuda", CUDA_VISIBLE_DEVICES="")
    hidden.refused("no CUDA device here", "CUDA_VISIBLE_DEVICES=", "device=cpu works")
    done = desk.run("verify", "mlp", "--plan", "dp=2,device=cuda:0,comm=nccl", limit=300)
    done.refused("comm=nccl: 2 ranks would be on cuda:0", "mpi or gloo")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("plan", ["dp=2", "dp=2,zero=3", "tp=2", "pp=2,microbatches=4", "dp=2,sync=compressed"])
def test_proofs_over_nccl(plan: str, desk: Any) -> None:
    done = desk.run("verify", "cnn", "--plan", f"{plan},device=cuda,comm=nccl", "--steps", 5, "--json", limit=300)
    assert done.rc == 0 and done.document["results"][0]["verified"]["passed"], done.err + done.out


@pytest.mark.slow
def test_an_exploration_has_the_gpu_as_today(desk: Any) -> None:
    done = desk.run("explore", "mlp", "--workers", 2, "--budget", 60, "--json", limit=300)
    assert done.rc == 0, done.err
    study = json.loads((desk.folder / "paraxis-study" / "study.json").read_text())
    assert "cuda" in study["today"]["plan"] and study["machine"]["gpus"] and study["machine"]["versions"]["driver"]
    rows = {r["label"]: r for r in study["results"]}
    one = rows["cuda"]
    assert one["status"] == "ok" and one["devices"] == ["cuda:0"] and one["peak_device_memory_bytes"] > 1e6
    assert one["verified"]["passed"] and one["split"]
