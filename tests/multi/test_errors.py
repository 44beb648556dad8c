"""What goes wrong at the user's end: one line says what, and what would work; the right exit code; nothing left."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GLOO = "dp=2,comm=gloo"
WITHOUT_MPI = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.startswith("mpi4py") else found(name, package)
"""
NET = (
    "import torch\nfrom torch import nn\ndef net(): return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))\n"
)
DATA = "def batches(): return [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(5)]\n"

QUICK = [  # words, what the one line must hold; none of them needs the framework
    ("verify mpl", "'mpl'", "mlp", "cnn"),
    ("verify Cnn", "'Cnn'", "cnn"),
    ("verify there-is-none.py", "there-is-none.py", "does not exist"),
    ("verify mlp --plan dp=two", "dp=two", "whole number"),
    ("verify mlp --plan dp=0", "dp=0", "1 or more"),
    ("verify mlp --plan ddp=2", "ddp", "did you mean dp"),
    ("verify mlp --plan dp=2,comm=mpich", "mpich", "mpi"),
    ("verify mlp --plan pp=2,split=1+1+1", "split=1+1+1", "pp=2"),
    ("verify mlp --plan tp=2,sequence=2", "sequence=2", "0 or 1"),
    ("verify mlp --plan dp=2,dp=4", "dp twice"),
    ("verify mlp --steps 0", "steps=0", "at least one"),
    ("verify mlp --dtype float16", "float16", "float64"),
    ("verify mlp --fault nonsense", "nonsense", "dropped-reduction"),
    ("verify mlp --lr -1", "lr=-1", "above 0"),
    ("verify mlp --lr nan", "lr"),
    ("verify mlp --batch 0", "batch=0", "at least one"),
    ("verify mlp --workers 0", "workers=0", "at least one"),
    ("train cnn --plan serial --target 98", "target=98", "0.98"),
    ("explore mlp --budget 0", "budget"),
    ("verify mlp --nosuch 1", "--nosuch", "--help"),
    ("verify mlp --steps many", "many"),
    ("verify mlp --optimizer lion", "lion", "adamw"),
    ("verify mlp --momentum 0.9 --optimizer adam", "momentum", "sgd"),
    ("train mlp --epochs 0", "epochs=0", "1 or more"),
    ("train mlp --plan serial --validation 1.5", "validation=1.5", "fraction"),
    ("train mlp --plan serial --lr-schedule warmup", "warmup"),
    ("train mlp --plan serial --out /dev/null/deep", "/dev/null/deep", "cannot be written"),
    ("explore mlp --out /proc/nothing", "/proc/nothing", "cannot be written"),
    ("show dp=0", "dp=0"),
    ("nosuchverb", "nosuchverb"),
    (
        "verify resnet18 --plan dp=2,microbatches=2 --batch 16 --bn-group 6",
        *("bn_group=6", "slices of 4 samples", "synchronised only over all ranks", "bn_group=2 or batch=24 would fit"),
    ),
    ("verify resnet18 --plan dp=4 --batch 16 --bn-group 8", "slices of 4", "bn_group=4, bn_group=16 (all) or batch=32"),
    ("verify resnet18 --plan microbatches=2 --batch 16 --bn-group 16", "bn_group=8, microbatches=1 or batch=32 would"),
    ("train resnet18 --plan dp=2,sync=average@2 --batch 16 --bn-group 16", "sync=gradient", "bn_group=8 or batch=32"),
    ("verify resnet18 --plan dp=2,bucket_bytes=1M --batch 16 --bn-group 16", "bn_group=16", "leave out bucket_bytes"),
    ("verify resnet18 --bn-group 0", "bn_group=0", "at least one"),
]

FILES = {  # contents of a network file, what the one line must hold
    "syntax": ("def net(:\n", "mine.py", "SyntaxError"),
    "no net": ("x = 1\n", "mine.py", "net()", "nn.Module"),
    "raises": (NET + "def net(): raise RuntimeError('no weights\\nhere')\n", "mine.py", "RuntimeError", "no weights"),
    "no module": (NET + DATA + "def net(): return 42\n", "mine.py", "nn.Module", "int"),
    "no data": (NET, "mine.py", "batches()", "--data"),
    "no batch": (NET + "def batches(): return []\n", "batches()"),
    "loss of a mean": (NET + DATA + "def loss(o, b): return o.mean()\n", "loss(output, batch)", "sum of losses"),
    "other shape": (
        NET + "def batches(): return [(torch.randn(16, 5), torch.randint(3, (16,)))]\n",
        "mine.py",
        "shape 5",
        "8x5",
    ),
    "exits": ("import sys\nsys.exit('usage: mine.py DATA')\n", "mine.py", "SystemExit"),
    "bad stages": (NET + DATA + "def stages(net): return [net[0], net[2]]\n", "stages", "compose"),
    "no optimiser": (NET + DATA + "def optimizer(p): return 0.1\n", "mine.py", "optimizer(parameters)", "float"),
    "stages raise": (NET + DATA + "def stages(net): return net.parts\n", "mine.py", "stages()", "AttributeError"),
    "optimiser raises": (NET + DATA + "def optimizer(p): return torch.optim.SGD(p, lr=-1)\n", "optimizer", "mine.py"),
}


def few(value: Any, quick: bool = False) -> Any:
    """A parameter that is only tried by default if it is said to be quick: each costs a start of the framework."""
    return pytest.param(value, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("case", [few(case, n % 3 == 0) for n, case in enumerate(QUICK)], ids=lambda case: case[0])
def test_what_can_be_refused_at_once(desk: Any, case: tuple[str, ...]) -> None:
    words, *parts = case
    done = desk.run(*words.split())
    done.refused(*parts)
    assert done.out == "" and done.seconds < 5


@pytest.mark.parametrize("name", [few(name, name in ("syntax", "raises", "exits")) for name in FILES])
def test_a_network_file_that_cannot_be_used(desk: Any, name: str) -> None:
    text, *parts = FILES[name]
    done = desk.run("train", desk.write("mine.py", text), "--plan", "serial", "--steps", 2)
    done.refused(*parts)
    assert done.seconds < 30


def test_a_layer_that_cannot_be_split(desk: Any, examples: Path) -> None:
    done = desk.run("verify", examples / "lstm.py", "--plan", "pp=2,comm=gloo")
    done.refused("pp=2", "Classifier", "stages(net)", "dp takes any network")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, parts",
    [
        ("mlp serial --bn-group 4", ("bn_group=4", "mlp", "no nn.BatchNorm")),
        ("resnet18 serial --batch 1", ("batch=1", "at least 2 samples")),
        ("resnet18 serial --bn-group 1", ("bn_group=1", "at least 2 samples")),
        ("resnet18 microbatches=8 --batch 8", ("slices of 1 sample", "batch=16 would do")),
    ],
)
def test_batch_norms_without_enough_samples(desk: Any, words: str, parts: tuple[str, ...]) -> None:
    network, plan, *rest = words.split()
    desk.run("verify", network, "--plan", plan, *rest).refused(*parts)


@pytest.mark.slow
def test_more_stages_than_layers(desk: Any) -> None:
    desk.run("verify", "mlp", "--plan", "pp=5,comm=gloo").refused("pp=5", "4 layers", "at most 4")


def test_a_batch_that_does_not_divide(desk: Any) -> None:
    done = desk.run("verify", "mlp", "--plan", GLOO, "--batch", 127)
    done.refused("batch=127", "2 equal slices", "batch=126 would")


@pytest.mark.slow
def test_a_batch_larger_than_the_data(desk: Any) -> None:
    words = ("train", "mlp:20-4", "--data", "synthetic:100,20,4", "--batch", 128, "--plan", "serial")
    desk.run(*words).refused("batch=128", "100")


def idx(code: int, shape: tuple[int, ...], values: bytes) -> bytes:
    """An IDX file from the format's definition."""
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values


@pytest.mark.parametrize("fault", [few("truncated"), few("mislabelled", True), few("packed")])
def test_damaged_idx_files(desk: Any, fault: str) -> None:
    images, labels = idx(8, (200, 28, 28), bytes(200 * 784)), idx(8, (200,), bytes(200))
    images = images[:-5] if fault == "truncated" else gzip.compress(images)[:-9] if fault == "packed" else images
    labels = images if fault == "mislabelled" else labels
    (desk.folder / "train-images-idx3-ubyte").write_bytes(images)
    (desk.folder / "train-labels-idx1-ubyte").write_bytes(labels)
    done = desk.run("train", "mlp", "--plan", "serial", "--data", f"idx:{desk.folder}")
    part = "labels-idx1" if fault == "mislabelled" else "images-idx3"
    done.refused(part, "truncated" if fault == "packed" else fault, ";")


@pytest.mark.parametrize("plan", ["serial", few(GLOO)])
def test_labels_beyond_the_networks_classes(desk: Any, plan: str) -> None:
    labels = np.arange(256) % 10
    labels[100] = 12
    np.savez(desk.folder / "data.npz", x_train=np.zeros((256, 784), np.float32), y_train=labels)
    done = desk.run("train", "mlp", "--plan", plan, "--data", f"npz:{desk.folder}/data.npz")
    done.refused("label 12", "index 100", "10 outputs")


@pytest.mark.slow
def test_samples_that_do_not_fit_the_network(desk: Any) -> None:
    done = desk.run("train", "mlp", "--plan", "serial", "--data", "synthetic:256,20,10")
    done.refused("20", "784")
    desk.run("train", "cnn", "--plan", "serial", "--data", "synthetic:256,3x28x28,10").refused("3", "28", "cnn")


def test_no_mpi(desk: Any) -> None:
    desk.write("sitecustomize.py", WITHOUT_MPI)
    done = desk.run("verify", "mlp", "--plan", "dp=2,comm=mpi", PYTHONPATH=str(desk.folder))
    done.refused("MPI is missing", "pip install", "comm=gloo")


@pytest.mark.slow
def test_no_mpi_still_explores_over_gloo(desk: Any) -> None:
    desk.write("sitecustomize.py", WITHOUT_MPI)
    # Two cores with neighbours take 15 s up to the first measurement: the budget is for three plans after it.
    words = ("explore", "mlp", "--engine", "torch", "--workers", 2, "--budget", 60)
    done = desk.run(*words, "--json", PYTHONPATH=str(desk.folder))
    assert done.rc == 0, done.err
    rows = done.document["results"]
    assert all(r["status"] == "refused" and "MPI is missing" in r["reason"] for r in rows if r["comm"] == "mpi")
    assert any(r["status"] == "ok" and r["comm"] == "gloo" for r in rows)


@pytest.mark.parametrize("plan", [few("serial"), few("dp=2,comm=mpi"), GLOO])
def test_a_loss_that_is_not_a_number_names_its_step(desk: Any, plan: str) -> None:
    nan = """
def batches():
    x = torch.randn(9, 16, 6)
    x[5, 15, 0] = float("nan")  # among the last samples of step 6
    return [(part, torch.zeros(16).long()) for part in x]
"""
    done = desk.run("train", desk.write("mine.py", NET + nan), "--plan", plan)
    done.refused("the loss is nan", "step 6", "rank 0" if plan == "serial" else "rank 1", "lr", rc=1)


@pytest.mark.slow
def test_a_learning_rate_that_blows_up(desk: Any) -> None:
    done = desk.run("train", "mlp:784-64-10", "--plan", GLOO, "--lr", 1e12, "--steps", 50)
    done.refused("the loss is", "step", "rank", "lower lr", rc=1)


@pytest.mark.slow
def test_a_long_temporary_folder(desk: Any) -> None:
    long = desk.folder / ("a-folder-of-a-cluster-with-a-long-name" * 3)
    long.mkdir()
    done = desk.run("verify", "mlp", "--plan", GLOO, "--steps", 1, "--json", TMPDIR=str(long))
    assert done.rc == 0 or done.refused("TMPDIR"), done.err


def test_a_reader_that_has_gone(desk: Any) -> None:
    command = "paraxis show pp=4,microbatches=64 --json | head -1; exit ${PIPESTATUS[0]}"
    done = desk.launch("bash", "-c", command)
    assert done.out == "{\n"
    assert done.rc != 0 and done.err.count("\n") <= 1 and "Traceback" not in done.err
