"""Data sets as plain arrays: MNIST, IDX directories, NPZ files, text and synthetic classes.

Everything is checked here, once, so that no rank of a training run meets a bad label or a NaN later.
"""

import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paraxis.errors import TaskError
from paraxis.task.text import is_text, windows

_FORMS = "mnist, idx:DIR, npz:FILE, text[:FILES] or synthetic:N,SHAPE,CLASSES[,seed=S]"
_SIZE = r"[1-9]\d{0,17}"
_SYNTHETIC = re.compile(rf"({_SIZE}),({_SIZE}(?:x{_SIZE})*),({_SIZE})(?:,seed=(\d{{1,18}}))?", re.ASCII)
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_NPZ_TRAIN = (("x_train", "y_train"), ("x", "y"), ("inputs", "targets"))
_NPZ_TEST = (("x_test", "y_test"),)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Samples and labels: `inputs` (n, ...), `targets` int64 (n,), each in 0 .. `classes` - 1.

    `inputs` are float32, or uint8 that stand for [0, 1] in steps of 1/255: a quarter of the memory of every rank.
    With `tokens` both are uint8 (n, context) that stand for themselves: bytes, and the byte after each.
    """

    inputs: np.ndarray
    targets: np.ndarray
    classes: int
    tokens: bool = False


@dataclass(frozen=True)
class Data:
    """A named data set; `name` is the text it was loaded from, `test` is None where there is no test set."""

    name: str
    train: Arrays
    test: Arrays | None


_Split = tuple[np.ndarray, np.ndarray]


def load(text: str) -> Data:
    """Load `mnist`, `idx:DIR`, `npz:FILE`, `text[:FILES][,context=T]` or `synthetic:N,SHAPE,CLASSES[,seed=S]`.

    Unsigned bytes stand for [0, 1], all other inputs keep their values; IDX images without
    channels, (n, h, w), become (n, 1, h, w). `classes` is the largest label of train and test, plus 1
    (for synthetic data: CLASSES).

    Raises TaskError, one line that names the file, where the data cannot be read or used.
    """
    kind, _, rest = text.partition(":")
    if text == "mnist":
        return _data(text, *_idx_set(Path(__file__).with_name("mnist")))
    if kind == "idx" and rest:
        return _data(text, *_idx_set(Path(os.path.expanduser(rest))))
    if kind == "npz" and rest:
        return _data(text, *_npz_set(Path(os.path.expanduser(rest))))
    if is_text(text):
        train, test, context = windows(text)
        return Data(text, _tokens(train, context), _tokens(test, context))
    if kind == "synthetic":
        return _synthetic(text, rest)
    raise _error("data", f"no data set is called {text!r}", f"use {_FORMS}")


def check_fits(
    data: Data, outputs: int | None, sample_shape: tuple[int, ...] | None, network: str, flatten: bool = False
) -> None:
    """Check that `network` can train on `data`: it takes one sample of `sample_shape`, gives `outputs` scores.

    None stands for "any". With `flatten` only the number of elements of a sample has to agree.

    Raises TaskError that gives both shapes, or the first label that has no output and its index.
    """
    where = f"data {data.name}"
    shape = data.train.inputs.shape[1:]
    same: Callable[[tuple[int, ...]], object] = math.prod if flatten else tuple
    if sample_shape is not None and same(shape) != same(sample_shape):
        fault = f"samples have shape {_shape(shape)} but network {network} takes {_shape(sample_shape)}"
        raise _error(where, fault, "change the network's input shape or reshape the data")
    for part, arrays in (("train", data.train), ("test", data.test)):
        if outputs is None or arrays is None:
            continue
        beyond = arrays.targets >= outputs
        if beyond.any():
            index = int(np.argmax(beyond))
            fault = f"{part} label {arrays.targets[index]} at index {index} has no output:"
            fault += f" network {network} has {outputs} outputs, for labels 0..{outputs - 1}"
            raise _error(where, fault, f"give the network {data.train.classes} outputs")


def hold_out(train: Arrays, fraction: float, seed: int) -> tuple[Arrays, Arrays]:
    """Split off a validation set: returns (rest, held out), round(n * `fraction`) samples held out.

    The choice depends on n, `fraction` and `seed` alone, so every rank makes the same one.

    Raises TaskError where the fraction leaves nothing on either side, or the seed is negative.
    """
    count = len(train.targets)
    if seed < 0:
        raise _error("validation split", f"seed {seed} is negative", "use 0 or more")
    held = round(count * fraction) if 0 < fraction < 1 else 0
    if not 0 < held < count:
        fault = f"fraction {fraction} of {count} samples leaves one side empty"
        raise _error("validation split", fault, "use a fraction between 0 and 1 that leaves a sample on both sides")
    order = np.random.default_rng(seed).permutation(count)
    # Sorted, the copies below walk through memory once and both sides keep the order of the data.
    rest, chosen = np.sort(order[held:]), np.sort(order[:held])
    left, right = (replace(train, inputs=train.inputs[side], targets=train.targets[side]) for side in (rest, chosen))
    return left, right


def _error(where: object, fault: str, remedy: str) -> TaskError:
    # Paths and messages of other libraries may hold line breaks; the user gets one line all the same.
    return TaskError(" ".join(f"{where}: {fault}; {remedy}".split()))


def _reason(error: Exception) -> object:
    # Without the number and the path that str() of an OSError adds: the message has the path already.
    return getattr(error, "strerror", None) or error


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"


def _tokens(raw: np.ndarray, context: int) -> Arrays:
    """Windows side by side: each byte is predicted once an epoch. Without a copy of its own torch warns."""
    inputs, targets = (np.array(part).reshape(-1, context) for part in (raw[:-1], raw[1:]))
    return Arrays(inputs, targets, 256, tokens=True)


def _data(name: str, train: _Split, test: _Split | None) -> Data:
    if test is not None and test[0].shape[1:] != train[0].shape[1:]:
        fault = f"train samples have shape {_shape(train[0].shape[1:])}, test samples {_shape(test[0].shape[1:])}"
        raise _error(f"data {name}", fault, "give both the same shape")
    classes = 1 + max(int(targets.max()) for _, targets in filter(None, (train, test)))
    return Data(name, Arrays(*train, classes), Arrays(*test, classes) if test else None)


def _split(inputs_at: object, inputs: np.ndarray, targets_at: object, targets: np.ndarray) -> _Split:
    # Lengths first: a pair that does not belong together explains any later fault better.
    if inputs.ndim and targets.ndim and len(inputs) != len(targets):
        fault = f"holds {len(inputs)} samples but {targets_at} holds {len(targets)} labels"
        raise _error(inputs_at, fault, "give one label per sample")
    return _inputs(inputs_at, inputs), _targets(targets_at, targets)


def _inputs(where: object, raw: np.ndarray) -> np.ndarray:
    if raw.dtype.kind not in "buif":
        raise _error(where, f"inputs have type {raw.dtype.name}", "store real numbers, such as float32")
    if raw.ndim < 2 or not raw.size:
        raise _error(where, f"inputs have shape {raw.shape}", "store one or more samples as (samples, features...)")
    if raw.dtype == np.uint8:
        return np.array(raw)  # a copy of its own, because torch warns about memory that cannot be written to
    with np.errstate(over="ignore"):
        inputs = np.ascontiguousarray(raw, dtype=np.float32)
    # The extremes show any NaN or infinity without an array of flags as long as the data.
    if not (np.isfinite(inputs.min()) and np.isfinite(inputs.max())):
        first = np.unravel_index(np.argmin(np.isfinite(inputs)), inputs.shape)
        fault = f"sample {first[0]} holds {raw[first]}, which is not a finite float32"
        raise _error(where, fault, "remove or replace such values")
    return inputs


def _targets(where: object, raw: np.ndarray) -> np.ndarray:
    if raw.dtype.kind not in "bui":
        raise _error(where, f"labels have type {raw.dtype.name}", "store integers, such as int64")
    if raw.ndim != 1:
        raise _error(where, f"labels have shape {raw.shape}", "store one integer per sample, shape (samples,)")
    targets = raw.astype(np.int64)
    # Unsigned labels beyond int64 have wrapped to negative ones, so one test finds both.
    if targets.min() < 0:
        index = int(np.argmax(targets < 0))
        raise _error(where, f"label {raw[index]} at index {index} is not in 0..2^63-1", "number the classes from 0")
    return targets


def _idx_set(folder: Path) -> tuple[_Split, _Split | None]:
    try:
        present = set(os.listdir(folder))
    except (OSError, ValueError) as error:
        remedy = "give a directory that holds train-images-idx3-ubyte[.gz] and its labels"
        raise _error(folder, f"cannot be listed ({_reason(error)})", remedy) from None
    train = _idx_split(folder, present, "train")
    if train is None:
        raise _error(folder, "has neither train-images-idx3-ubyte[.gz] nor its labels", "add both files")
    return train, _idx_split(folder, present, "t10k")


def _idx_split(folder: Path, present: set[str], part: str) -> _Split | None:
    found: list[Path] = []
    for stem, suffix in (f"{part}-images", "idx3-ubyte"), (f"{part}-labels", "idx1-ubyte"):
        names = (f"{stem}{joint}{suffix}{packed}" for joint in "-." for packed in ("", ".gz"))
        found += [folder / name for name in names if name in present][:1]
    if not found:
        return None
    if len(found) == 1:
        other = f"{part}-labels-idx1-ubyte" if "images" in found[0].name else f"{part}-images-idx3-ubyte"
        raise _error(folder, f"has {found[0].name} but no {other}[.gz]", "add it or remove the other")
    images, labels = found
    inputs, targets = _read_idx(images, "images"), _read_idx(labels, "labels")
    return _split(images, inputs[:, None] if inputs.ndim == 3 else inputs, labels, targets)


def _read_idx(path: Path, wanted: str) -> np.ndarray:
    """Read one IDX file (magic 0, 0, type, axes; big-endian sizes; values) without copying its values."""
    raw = _read_unpacked(path)
    magic = f"magic number 0x{raw[:4].hex()}"
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise _error(path, f"is not an IDX file ({magic}, {len(raw)} bytes)", "give an IDX file, raw or gzipped")
    code, axes = raw[2], raw[3]
    if code not in _IDX_TYPES:
        known = ", ".join(f"0x{code:02x}" for code in _IDX_TYPES)
        raise _error(path, f"has the unsupported IDX type code 0x{code:02x}", f"use one of {known}")
    if not 1 <= axes <= 8:
        raise _error(path, f"has {axes} axes ({magic})", "use 1 for labels, 2 to 8 for images")
    holds = "labels" if axes == 1 else "images"
    if holds != wanted:
        raise _error(path, f"is mislabelled: it holds {holds} ({magic}), not {wanted}", "swap or rename the files")
    start = 4 + 4 * axes
    shape = struct.unpack_from(f">{axes}I", raw, 4) if len(raw) >= start else ()
    dtype = np.dtype(_IDX_TYPES[code])
    needed = start + dtype.itemsize * math.prod(shape) if shape else start
    if len(raw) != needed:
        state = "truncated" if len(raw) < needed else "too long"
        fault = f"is {state}: its header {shape or ''} says {needed} bytes, the file has {len(raw)}"
        raise _error(path, f"{fault} (unpacked)", "fetch or write the file again")
    return np.frombuffer(raw, dtype, offset=start).reshape(shape)


def _read_unpacked(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        # By content, not by name: browsers unpack downloads and keep their names.
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fault = f"is a truncated or corrupt gzip file of {len(raw)} bytes ({error})"
        raise _error(path, fault, "fetch or pack the file again") from None
    except OSError as error:
        raise _error(path, f"cannot be read ({_reason(error)})", "give a readable file") from None


def _npz_set(path: Path) -> tuple[_Split, _Split | None]:
    arrays = _read_npz(path)
    train, test = (_npz_split(path, arrays, pairs) for pairs in (_NPZ_TRAIN, _NPZ_TEST))
    if train is None:
        fault = f"has no training arrays (found {', '.join(arrays) or 'none'})"
        raise _error(path, fault, f"store {' or '.join('/'.join(pair) for pair in _NPZ_TRAIN)}")
    return train, test


def _npz_split(path: Path, arrays: dict[str, np.ndarray], pairs: tuple[tuple[str, str], ...]) -> _Split | None:
    for pair in pairs:
        missing = [name for name in pair if name not in arrays]
        if len(missing) == 1:
            there = next(name for name in pair if name in arrays)
            raise _error(path, f"has {there} but no {missing[0]}", "store both")
        if not missing:
            x, y = pair
            return _split(f"{path}: {x}", arrays[x], f"{path}: {y}", arrays[y])
    return None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    known = {name for pair in _NPZ_TRAIN + _NPZ_TEST for name in pair}
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            # The names of other arrays are kept for the message, their values are not read.
            empty = np.empty(0)
            return {name: np.asarray(archive[name]) if name in known else empty for name in archive.files}
    except OSError as error:
        raise _error(path, f"cannot be read ({_reason(error)})", "give a readable .npz file") from None
    except Exception as error:
        # A damaged header makes numpy raise almost anything, TokenError and MemoryError among others.
        fault = f"is not a readable .npz file ({type(error).__name__}: {error})"
        raise _error(path, fault, "write it with numpy.savez, without object arrays") from None


def _synthetic(text: str, rest: str) -> Data:
    match = _SYNTHETIC.fullmatch(rest)
    if match is None:
        example = "use synthetic:N,SHAPE,CLASSES[,seed=S], such as synthetic:1024,1x28x28,10"
        raise _error("data", f"{text!r} does not say how many samples, of what shape, in how many classes", example)
    count, classes = int(match[1]), int(match[3])
    shape = tuple(map(int, match[2].split("x")))
    rng = np.random.default_rng(int(match[4] or 0))
    try:
        means = rng.standard_normal((classes, *shape), dtype=np.float32)
        targets = rng.permutation(count) % classes
        inputs = rng.standard_normal((count, *shape), dtype=np.float32)
        inputs += means[targets]
    except (MemoryError, ValueError):
        raise _error("data", f"{text!r} does not fit in memory", "ask for fewer or smaller samples") from None
    return Data(text, Arrays(inputs, targets, classes), None)
