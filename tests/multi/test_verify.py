"""`paraxis verify` with real ranks: plans equal the serial run, seeded faults and wrong losses do not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from paraxis.plan.plan import parse
from paraxis.program.faults import FAULTS

VERIFIED = {"against", "max_relative_difference", "tolerance", "passed", "where", "note"}
RESULT = {"plan", "label", "program", "exact", "status", "reason", "verified", "computed_memory"}
PLAN_OF = {  # a plan that can have the fault
    "wrong-mask": ("cnn", "dp=2"),
    "fresh-masks": (
        "cnn",
        "pp=2,schedule=gpipe,microbatches=2,recompute=all",
    ),  # 1f1b's last stage does not, and has it
    "local-statistics": ("resnet18", "dp=2"),
    "local-moments": ("resnet18", "dp=2"),
    "swapped-microbatch": ("mlp", "pp=2,microbatches=4"),
    "lost-backward": ("mlp", "pp=2,microbatches=4"),
    "lost-weight-gradient": ("mlp", "pp=2,schedule=zb-h1,microbatches=4"),
    "summed-weights": ("mlp", "dp=2,sync=average@2"),
    "never-agreed": ("mlp", "dp=2,sync=average@2"),
    "no-outer-momentum": ("mlp", "dp=2,sync=diloco@2"),
    "no-snapshot": ("mlp", "dp=2,sync=diloco@2"),
    "early-update": ("mlp", "dp=2,microbatches=2"),
    "stale-bucket": ("mlp", "dp=2,microbatches=2"),
    "untied": ("gpt:2-32-2-16", "pp=2,microbatches=2"),
    "dropped-output": ("cnn", "tp=2"),
    "dropped-input-gradient": ("cnn", "tp=2"),
    "wrong-part": ("cnn", "tp=2"),
    "summed-whole": ("cnn", "tp=2"),
    "counted-whole": ("mlp", "tp=2"),
    "stale-shard": ("mlp", "dp=2,zero=1"),
    "lost-shard": ("mlp", "dp=2,zero=3,microbatches=2"),
    "late-weights": ("mlp", "dp=2,pp=2,schedule=zb-h1,microbatches=2,zero=3"),
    "lost-slice": ("mlp", "tp=2,engine=native"),
    "impatient": ("mlp", "tp=2,engine=native"),
    "dropped-tokens": ("gpt:1-16-2-16", "tp=2,sequence=1"),
    "dropped-token-gradients": ("gpt:1-16-2-16", "tp=2,sequence=1"),
    "partial-gradients": ("gpt:1-16-2-16", "tp=2,sequence=1"),
}
WHOLE = {"local-moments": ("--batch", 8, "--bn-group", 8), "counted-whole": ("--clip", 0.05)}
PLACE = re.compile(
    r"step (?P<step>\d+): (parameter [\w.]+\.(weight|bias|running_\w+) on rank [0-3]|the loss of step (?P=step))"
    r" differs by \S+$"
)
QUICK = ("dropped-reduction", "swapped-microbatch")
BATCHES = """
import torch
from torch import nn
import torch.nn.functional as F

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

def batches():
    x = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(0))
    return [(part, part[:, :3].argmax(1)) for part in x]
"""


def proof(document: dict[str, Any]) -> dict[str, Any]:
    """The only result's proof."""
    (result,) = document["results"]
    assert result["status"] == "ok"
    return result["verified"]


def proves(desk: Any, network: object, plan: str, *words: str, steps: int = 5) -> dict[str, Any]:
    """The proof of a plan that must pass."""
    done = desk.run("verify", network, "--plan", plan, "--steps", steps, "--json", *words)
    assert done.rc == 0, done.err + done.out
    assert done.document["passed"]
    found = proof(done.document)
    assert found["passed"] and found["max_relative_difference"] <= found["tolerance"]
    return found


def test_data_parallel_over_mpi_is_serial_and_the_document_is_whole(desk: Any) -> None:
    done = desk.run("verify", "mlp", "--plan", "dp=2,comm=mpi", "--steps", 5, "--json")
    assert done.rc == 0, done.err
    document = done.document
    assert set(document) == {"passed", "results", "notes"} and document["passed"] is True
    (result,) = document["results"]
    assert set(result) == RESULT and set(result["verified"]) == VERIFIED
    assert parse(result["plan"]) == parse("dp=2,comm=mpi")
    assert result["exact"] and re.fullmatch("[0-9a-f]{16}", result["program"])
    assert 0 < result["verified"]["max_relative_difference"] < 1e-13  # not 0: the order of additions did change
    assert result["verified"]["tolerance"] == 1e-10


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param("dp=2,sync=diloco@2:bf16,comm=mpi", marks=pytest.mark.slow),
        "dp=2,sync=compressed,comm=gloo",
        pytest.param("dp=2,sync=compressed,comm=mpi", marks=pytest.mark.slow),
        pytest.param("dp=2,sync=diloco@4:int8:fragments=2,comm=gloo", marks=pytest.mark.slow),
        pytest.param("dp=4,sync=diloco@2:int8,comm=mpi", marks=pytest.mark.slow),
        pytest.param("dp=2,sync=diloco@8:int8:fragments=2:overlap=2,comm=mpi", marks=pytest.mark.slow),
        pytest.param("dp=2,sync=diloco@6:overlap=3,comm=gloo", marks=pytest.mark.slow),
        pytest.param("dp=2,pp=2,microbatches=2,sync=diloco@2,comm=mpi", marks=pytest.mark.slow),
        pytest.param("dp=2,engine=native,sync=diloco@2", marks=pytest.mark.slow),
        pytest.param("dp=2,engine=native,comm=mpi,sync=diloco@3:bf16", marks=pytest.mark.slow),
    ],
)
def test_rules_that_are_not_exact_are_their_emulation(desk: Any, plan: str) -> None:
    assert proves(desk, "cnn", plan)["against"].startswith("serial emulation of")


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["compressed", "diloco@2:int8"])
def test_rounding_to_the_other_side_lies_in_the_band_of_float32(desk: Any, sync: str) -> None:
    plan = f"dp=2,microbatches=2,sync={sync},comm=mpi"
    found = proves(desk, "cnn", plan, "--dtype", "float32")
    assert 1e-9 < found["max_relative_difference"] < found["tolerance"] < 1e-2


def test_a_pipeline_over_gloo_is_serial_in_a_table(desk: Any) -> None:
    done = desk.run("verify", "cnn", "--plan", "pp=2,schedule=1f1b,microbatches=4,comm=gloo", "--steps", 2)
    assert done.rc == 0, done.err
    row = next(line for line in done.out.splitlines() if line.startswith("pp=2 1f1b m=4 gloo"))
    assert row.split()[-1] == "yes" and "serial run" in row
    assert "dropout on" in done.out


@pytest.mark.slow
def test_batch_norm_over_groups_of_the_task(desk: Any, examples: Path) -> None:
    """Two groups a slice; a plan that has one group a slice is held to the same serial run."""
    found = [
        proves(desk, examples / "batchnorm.py", plan, "--bn-group", "8", steps=3)
        for plan in ("dp=2,comm=gloo", "dp=2,microbatches=2,comm=gloo")
    ]
    assert all(f["against"] == "serial run" for f in found)


@pytest.mark.slow
def test_batch_norm_over_all_ranks(desk: Any, examples: Path) -> None:
    proves(desk, examples / "batchnorm.py", "dp=2,comm=gloo", "--bn-group", 32, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,comm=mpi", "dp=2,engine=native", "dp=2,engine=native,comm=gloo", "dp=2,pp=2"])
def test_resnet18_with_batch_norm_over_all_ranks(desk: Any, plan: str) -> None:
    proves(desk, "resnet18", plan, "--batch", 8, "--bn-group", 8, steps=2)


@pytest.mark.slow
def test_gpt_with_its_first_and_last_stage_on_two_ranks_is_serial(desk: Any) -> None:
    proves(desk, "gpt:2-32-2-16", "pp=2,microbatches=4", steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2", "pp=2,microbatches=4", "pp=2,interleave=2,comm=gloo"])
def test_gpt_nano_is_serial(desk: Any, plan: str) -> None:
    proves(desk, "gpt:nano,dropout=0.1", plan, "--clip", 1, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,comm=mpi", "pp=2,microbatches=2,comm=mpi", "pp=2,microbatches=2,comm=gloo"])
@pytest.mark.parametrize("group", [(), ("--bn-group", 4)])
def test_resnet18_is_serial(desk: Any, plan: str, group: tuple[Any, ...]) -> None:
    proves(desk, "resnet18", plan, "--batch", 8, *group, steps=3)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(FAULTS)])
def test_a_seeded_fault_is_caught_and_placed(desk: Any, name: str) -> None:
    (network, plan), words = PLAN_OF.get(name, ("mlp", "dp=2")), WHOLE.get(name, ())
    plan = plan if "engine=native" in plan else f"{plan},comm=gloo"
    done = desk.run("verify", network, "--plan", plan, "--steps", 3, "--fault", name, *words, "--json")
    assert done.rc == 1, done.err + done.out
    assert not done.document["passed"]
    found = proof(done.document)
    assert not found["passed"]
    place = PLACE.match(found["where"])
    assert place and 1 <= int(place["step"]) <= 3, found["where"]


EVERY_FAULT = """
import json, sys
from paraxis.plan.plan import parse
from paraxis.proof import prove
from paraxis.session import open_session
from paraxis.task.spec import TaskSpec

comm, steps, wanted = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
found, pids = {}, set()
with open_session(TaskSpec(network="cnn"), {}, {comm: 2}, None, lambda what, done: None) as session:
    session.begin(("solo", comm))
    # A fault must not outlive its own proof on resident ranks, so every plan is proved without one at the end.
    for name, text in [*wanted.items(), *((f"none: {text}", text) for text in sorted(set(wanted.values())))]:
        plan = session.settled(parse(text))
        proof = prove(session, plan, steps, "float64", None if name.startswith("none") else name)
        found[name] = [proof.verified.passed, proof.verified.where]
        pids.add(tuple(session.pool(comm).pids))
print(json.dumps([found, sorted(pids)]))
"""
# The step that a fault spoils, if not the first.
LATER = dict.fromkeys(("unzeroed", "never-agreed", "summed-weights", "no-outer-momentum", "no-snapshot"), 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("comm", ["mpi", "gloo"])
def test_every_seeded_fault_on_the_same_resident_ranks(desk: Any, comm: str) -> None:
    others = {"local-statistics", "local-moments", "untied", "counted-whole"}  # what the cnn has not
    others |= {"dropped-tokens", "dropped-token-gradients", "partial-gradients", "late-weights", "lost-slice"}
    names = [name for name in FAULTS if name not in others | {"impatient"}]  # nor two processes
    wanted = {name: f"{PLAN_OF.get(name, ('', 'dp=2'))[1]},comm={comm}" for name in names}
    done = desk.launch("python", desk.write("every.py", EVERY_FAULT), comm, 3, json.dumps(wanted), limit=850)
    assert done.rc == 0, done.err
    found, pids = json.loads(done.out)
    assert len(names) >= 12 and [len(ranks) for ranks in pids] == [2], "the same two processes throughout"
    assert set(found) == {*names, *(f"none: {plan}" for plan in wanted.values())}
    for name, (passed, where) in found.items():
        assert passed == name.startswith("none: "), (name, where)
    for name in names:
        place = PLACE.match(found[name][1])
        assert place and int(place["step"]) == LATER.get(name, 1), (name, found[name][1])


@pytest.mark.slow
def test_a_fault_that_a_plan_cannot_have_is_refused(desk: Any) -> None:
    done = desk.run("verify", "mlp", "--plan", "pp=2,microbatches=2,comm=gloo", "--steps", 1, "--fault", "all-data")
    done.refused("trains on the same share", "needs dp > 1")


@pytest.mark.slow
def test_a_fault_that_does_not_show_is_refused(desk: Any) -> None:
    """The last stage has the dropout, and computes no forward again."""
    words = "--plan", "pp=2,microbatches=4,split=4+7,recompute=all,comm=gloo", "--steps", 1, "--fault", "fresh-masks"
    desk.run("verify", "cnn", *words).refused("passes with it", "so it changes nothing here")


@pytest.mark.parametrize(
    "plan", [pytest.param(plan, marks=pytest.mark.slow) for plan in ("dp=2,comm=mpi", "pp=2,microbatches=4,comm=gloo")]
)
def test_a_transformer_with_dict_batches(desk: Any, examples: Path, plan: str) -> None:
    found = proves(desk, examples / "gpt.py", plan)
    assert "dropout on" in found["note"]
    assert found["max_relative_difference"] > 0


@pytest.mark.slow
def test_an_lstm_is_proved_without_its_inner_dropout_and_says_so(desk: Any, examples: Path) -> None:
    assert "lstm (LSTM)" in proves(desk, examples / "lstm.py", "dp=2,comm=gloo")["note"]


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param("dp=2,microbatches=2,comm=gloo", marks=pytest.mark.slow),
        pytest.param("pp=2,microbatches=4,comm=gloo", marks=pytest.mark.slow),
        pytest.param("microbatches=4", marks=pytest.mark.slow),
        pytest.param("dp=2,comm=mpi", marks=pytest.mark.slow),
        pytest.param("pp=2,microbatches=4,schedule=gpipe,comm=mpi", marks=pytest.mark.slow),
        pytest.param("dp=2,sync=average@2,comm=gloo", marks=pytest.mark.slow),
        pytest.param("dp=2,pp=2,microbatches=2,comm=mpi", marks=pytest.mark.slow),
    ],
)
def test_batch_normalisation_by_microbatch(desk: Any, examples: Path, plan: str) -> None:
    proves(desk, examples / "batchnorm.py", plan)


def test_a_loss_that_couples_samples_is_named(desk: Any) -> None:
    mean = "def loss(output, batch):\n    return F.cross_entropy(output, batch[1]) * 16, 16\n"
    done = desk.run("verify", desk.write("mean.py", BATCHES + mean), "--plan", "dp=2,comm=gloo", "--steps", 2, "--json")
    assert done.rc == 1, done.err + done.out
    assert not done.document["passed"]
    (note,) = [n for n in done.document["notes"] if "couples samples" in n]
    assert "loss() must return sums over samples" in note


@pytest.mark.slow
def test_a_shuffled_loader_and_a_loss_of_ones_own(desk: Any) -> None:
    loader = """
def batches():
    from torch.utils.data import DataLoader, TensorDataset
    x = torch.randn(70, 6, generator=torch.Generator().manual_seed(0))  # 4 batches of 16 and a short one
    return DataLoader(TensorDataset(x, x[:, :3]), batch_size=16, shuffle=True)

def loss(output, batch):
    return ((output - batch[1]) ** 2).sum(), batch[1].numel()
"""
    proves(desk, desk.write("shuffled.py", BATCHES + loader), "dp=2,microbatches=2,comm=gloo", steps=9)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--optimizer adamw --weight-decay 0.1", "--clip 0.05 --momentum 0.9 --nesterov"])
@pytest.mark.parametrize("plan", ["dp=2,comm=gloo,bucket_bytes=1K", "pp=2,microbatches=4,comm=mpi"])
def test_optimisers_clipping_and_schedules(desk: Any, plan: str, words: str) -> None:
    proves(desk, "mlp:784-64-32-10", plan, *words.split(), "--lr-schedule", "cosine", "--warmup", "2", "--horizon", "6")


@pytest.mark.slow
def test_float32_lies_in_the_measured_band(desk: Any) -> None:
    found = proves(desk, "cnn", "dp=2,comm=mpi", "--dtype", "float32")
    assert 1e-9 < found["max_relative_difference"] < found["tolerance"] < 1e-2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_every_plan_of_four_workers(desk: Any, network: str) -> None:
    done = desk.run("verify", network, "--plan", "all", "--workers", 4, "--steps", 20, "--json", limit=850)
    assert done.rc == 0, done.err + done.out
    results = done.document["results"]
    fine = [r["status"] == "refused" or (r["status"] == "ok" and r["verified"]["passed"]) for r in results]
    assert all(fine)
    proved = [parse(r["plan"]) for r in results if r["verified"]]
    assert len(proved) >= 20
    assert {(p.dp, p.pp) for p in proved} >= {(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)}
    assert {p.schedule for p in proved} >= {"layerwise", "gpipe", "1f1b"}
    assert {p.comm for p in proved} >= {"mpi", "gloo"}
    assert {p.sync for p in proved} >= {"gradient", "average@8"}
