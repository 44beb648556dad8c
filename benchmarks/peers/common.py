"""What all peers share: MNIST in memory, the order of its batches, and the command line."""

import argparse
import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np

LR = 0.05
NETS = ("mlp", "mlp128", "wide", "cnn", "resnet18")
DATA = Path(__file__).resolve().parents[2] / "src" / "paraxis" / "task" / "mnist"


def parser(description: str | None, nets: tuple[str, ...] = NETS) -> argparse.ArgumentParser:
    """The options every peer takes; --batch is the global batch, --threads is per process."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--net", choices=nets, default=nets[0])
    options.add_argument("--batch", type=int, default=128, metavar="SAMPLES")
    options.add_argument("--threads", type=int, default=1, metavar="T")
    options.add_argument("--steps", type=int, default=100, help="steps to measure without --control")
    options.add_argument("--control", metavar="HOST:PORT", help="obey the harness listening there")
    options.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="default: %(default)s")
    return options


def mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The training images, float32 in [0, 1] shaped (n, 1, 28, 28), and their int64 labels."""

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"train-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    images = read("images-idx3", 16).reshape(-1, 1, 28, 28)
    return images.astype(np.float32) / 255, read("labels-idx1", 8).astype(np.int64)


def epochs(size: int, batch: int) -> Iterator[np.ndarray]:
    """Endless epochs of shuffled indices, one row per global batch; the same in every process."""
    rng = np.random.default_rng(0)
    while True:
        yield rng.permutation(size)[: size // batch * batch].reshape(-1, batch)
