"""Data sets: what is loaded is what was stored, and what cannot be used is refused in one line."""

import gzip
import hashlib
import math
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paraxis.task.data as data_module
from paraxis.errors import TaskError
from paraxis.task.data import Data, check_fits, load

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    """An IDX file, written from the format's definition and not with the module under test."""
    header = bytes([0, 0, CODES[array.dtype.str[1:]], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_set(folder: Path, images: np.ndarray | bytes, labels: np.ndarray | bytes, part: str = "train") -> None:
    for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        (folder / name).write_bytes(content if isinstance(content, bytes) else idx(content))


def refusal(text: str) -> str:
    with pytest.raises(TaskError) as caught:
        load(text)
    return one_line(caught.value)


def misfit(*args: object, **options: bool) -> str:
    with pytest.raises(TaskError) as caught:
        check_fits(*args, **options)  # type: ignore[arg-type]
    return one_line(caught.value)


def one_line(error: TaskError) -> str:
    message = str(error)
    assert message
    assert len(message.splitlines()) == 1
    assert "; " in message, "says what would work"
    assert error.exit_code == 2
    return message


def assert_refused(text: str, *parts: object) -> None:
    message = refusal(text)
    for part in parts:
        assert str(part) in message


PIXELS = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
DIGITS = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)


@pytest.fixture(scope="module")
def mnist() -> Data:
    return load("mnist")


# --- MNIST ---


def test_mnist_shapes_and_types(mnist: Data) -> None:
    assert mnist.name == "mnist"
    assert mnist.test is not None
    for arrays, count in ((mnist.train, 60000), (mnist.test, 10000)):
        assert arrays.inputs.shape == (count, 1, 28, 28)
        assert arrays.inputs.dtype == np.uint8
        assert arrays.targets.shape == (count,)
        assert arrays.targets.dtype == np.int64
        assert arrays.classes == 10
        assert (arrays.inputs.min(), arrays.inputs.max()) == (0, 255)
        # torch.from_numpy warns about arrays that cannot be written to.
        assert arrays.inputs.flags.writeable and arrays.inputs.flags.c_contiguous
        assert arrays.targets.flags.writeable


def test_mnist_known_values(mnist: Data) -> None:
    assert mnist.test is not None
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.train.targets).tolist() == train
    assert np.bincount(mnist.test.targets).tolist() == test
    assert mnist.train.targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert mnist.test.targets[:5].tolist() == [7, 2, 1, 0, 4]
    pixels = mnist.train.inputs[0, 0].astype(np.float64)
    assert round(float(pixels.sum(dtype=np.float64))) == 27525
    assert mnist.train.inputs[0, 0, 5, 12] == 3


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
        ("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
        ("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
        ("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
    ],
)
def test_mnist_is_the_published_database(name: str, digest: str) -> None:
    packed = Path(data_module.__file__).parent / "mnist" / f"{name}.gz"
    assert hashlib.md5(gzip.decompress(packed.read_bytes()), usedforsecurity=False).hexdigest() == digest


def test_mnist_loads_fast() -> None:
    # Processor time, and the best of three: other programs on the machine do not make the test fail.
    def seconds() -> float:
        start = time.process_time()
        load("mnist")
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 1.0


def test_never_imports_torch() -> None:
    code = "import sys, paraxis.task.data as d; d.load('synthetic:4,2,2'); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_check_fits_mnist(mnist: Data) -> None:
    check_fits(mnist, 10, (784,), "mlp", flatten=True)
    assert "train label 9 at index 4" in misfit(mnist, 9, None, "mlp")


# --- names ---


@pytest.mark.parametrize("text", ["", "cifar10", "mnist:x", "MNIST", "idx:", "npz:", "idx", "no\nsuch\u2028name"])
def test_unknown_name(text: str) -> None:
    assert_refused(text, repr(text), "mnist, idx:DIR, npz:FILE, text[:FILES] or synthetic:N,SHAPE,CLASSES")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.sampled_from(["", "idx:/nowhere/", "npz:/nowhere/", "synthetic:"]))
def test_any_other_text_is_refused_in_one_line(tail: str, kind: str) -> None:
    if kind != "synthetic:" and tail != "mnist":
        refusal(kind + tail)


# --- IDX ---


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_idx_round_trip(draw: st.DataObject) -> None:
    shape = tuple(draw.draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)))
    kind = draw.draw(st.sampled_from(sorted(CODES)))
    label_kind = draw.draw(st.sampled_from(["u1", "i1", "i2", "i4"]))
    joint, packed = draw.draw(st.sampled_from("-.")), draw.draw(st.booleans())
    raw = draw.draw(st.binary(min_size=math.prod(shape), max_size=math.prod(shape)))
    # Of the wider types every value must differ from its byte-swapped one for the test to notice the order.
    images = (np.frombuffer(raw, "u1").astype(kind) + np.array(1, kind)).reshape(shape)
    labels = np.array(draw.draw(st.lists(st.integers(0, 127), min_size=shape[0], max_size=shape[0])), label_kind)
    with tempfile.TemporaryDirectory() as folder:
        for name, array in (("images{}idx3-ubyte", images), ("labels{}idx1-ubyte", labels)):
            path = Path(folder, f"train-{name.format(joint)}{'.gz' if packed else ''}")
            path.write_bytes(gzip.compress(idx(array), 1) if packed else idx(array))
        loaded = load(f"idx:{folder}")
    expected = images if kind == "u1" else images.astype(np.float32)
    sample = (1, *shape[1:]) if len(shape) == 3 else shape[1:]
    assert loaded.test is None
    assert loaded.train.inputs.dtype == (np.uint8 if kind == "u1" else np.float32)
    assert loaded.train.inputs.shape == (shape[0], *sample)
    np.testing.assert_array_equal(loaded.train.inputs.ravel(), expected.ravel())
    np.testing.assert_array_equal(loaded.train.targets, labels)
    assert loaded.train.classes == int(labels.max()) + 1


def test_idx_test_set_counts_towards_the_classes(tmp_path: Path) -> None:
    write_set(tmp_path, PIXELS, DIGITS)
    write_set(tmp_path, PIXELS[:2], np.array([7, 1], np.uint8), "t10k")
    loaded = load(f"idx:{tmp_path}")
    assert loaded.name == f"idx:{tmp_path}"
    assert loaded.test is not None
    assert loaded.test.targets.tolist() == [7, 1]
    assert loaded.train.classes == loaded.test.classes == 8


def test_idx_unpacked_file_that_kept_its_gz_name(tmp_path: Path) -> None:
    write_set(tmp_path, PIXELS, DIGITS)
    (tmp_path / IMAGES).rename(tmp_path / f"{IMAGES}.gz")
    assert load(f"idx:{tmp_path}").train.inputs.shape == (6, 1, 4, 3)


def test_idx_missing_directory(tmp_path: Path) -> None:
    assert_refused(f"idx:{tmp_path}/none", tmp_path / "none", "No such file", IMAGES)
    assert_refused("idx:a\0b", "null")
    (tmp_path / "file").touch()
    assert_refused(f"idx:{tmp_path}/file", "Not a directory")


def test_idx_missing_files(tmp_path: Path) -> None:
    assert_refused(f"idx:{tmp_path}", tmp_path, f"neither {IMAGES}[.gz]")
    (tmp_path / IMAGES).write_bytes(idx(PIXELS))
    assert_refused(f"idx:{tmp_path}", tmp_path, f"has {IMAGES} but no {LABELS}[.gz]")
    (tmp_path / LABELS).write_bytes(idx(DIGITS))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(DIGITS))
    assert_refused(f"idx:{tmp_path}", "has t10k-labels-idx1-ubyte but no t10k-images-idx3-ubyte[.gz]")


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 9, 15, 16, 87])
def test_idx_truncated(tmp_path: Path, keep: int) -> None:
    whole = idx(PIXELS)
    assert len(whole) == 88
    write_set(tmp_path, whole[:keep], DIGITS)
    assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, f"{keep} bytes" if keep < 4 else f"the file has {keep}")
    if keep >= 16:
        assert_refused(f"idx:{tmp_path}", "truncated", "(6, 4, 3) says 88 bytes")


def test_idx_too_long(tmp_path: Path) -> None:
    write_set(tmp_path, idx(PIXELS) + b"\0", DIGITS)
    assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, "too long", "says 88 bytes", "has 89")


def test_idx_sizes_beyond_any_file(tmp_path: Path) -> None:
    write_set(tmp_path, b"\0\0\x08\x03" + b"\xff" * 12, DIGITS)
    assert_refused(f"idx:{tmp_path}", "truncated", (2**32 - 1) ** 3 + 16)


@pytest.mark.parametrize("keep", [5, 12, 40, -8, -1])
def test_idx_truncated_gzip(tmp_path: Path, keep: int) -> None:
    packed = gzip.compress(idx(PIXELS))[:keep]
    write_set(tmp_path, packed, DIGITS)
    assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, "truncated or corrupt gzip", f"{len(packed)} bytes")


def test_idx_corrupt_gzip(tmp_path: Path) -> None:
    packed = gzip.compress(idx(PIXELS))
    for place in range(2, len(packed)):
        damaged = packed[:place] + bytes([packed[place] ^ 0xFF]) + packed[place + 1 :]
        write_set(tmp_path, damaged, DIGITS)
        if not 4 <= place <= 9:  # the time and the system: they carry no data
            assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, "gzip")


def test_idx_wrong_magic(tmp_path: Path) -> None:
    write_set(tmp_path, b"\x89PNG\r\n\x1a\n" + bytes(20), DIGITS)
    assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, "not an IDX file", "0x89504e47")


def test_idx_mislabelled(tmp_path: Path) -> None:
    write_set(tmp_path, DIGITS, PIXELS)
    assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, "mislabelled", "holds labels", "0x00000801", "not images")
    write_set(tmp_path, PIXELS, PIXELS)
    assert_refused(f"idx:{tmp_path}", tmp_path / LABELS, "mislabelled", "holds images", "0x00000803", "not labels")


def test_idx_unsupported_type_and_axes(tmp_path: Path) -> None:
    write_set(tmp_path, b"\0\0\x0a\x03" + bytes(12), DIGITS)
    assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, "type code 0x0a", "0x08, 0x09, 0x0b, 0x0c, 0x0d, 0x0e")
    for axes in (0, 9, 255):
        write_set(tmp_path, bytes([0, 0, 8, axes]), DIGITS)
        assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, f"{axes} axes")


def test_idx_counts_differ(tmp_path: Path) -> None:
    write_set(tmp_path, PIXELS, DIGITS[:5])
    assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, "6 samples", tmp_path / LABELS, "5 labels")


def test_idx_bad_labels(tmp_path: Path) -> None:
    write_set(tmp_path, PIXELS, np.array([0, 1, -3, 2, -1, 0], np.int8))
    assert_refused(f"idx:{tmp_path}", tmp_path / LABELS, "label -3 at index 2")
    write_set(tmp_path, PIXELS, DIGITS.astype(np.float32))
    assert_refused(f"idx:{tmp_path}", tmp_path / LABELS, "float32", "integers")


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "f4"), (np.inf, "f8"), (-np.inf, "f4"), (1e39, "f8")])
def test_idx_not_finite(tmp_path: Path, value: float, kind: str) -> None:
    images = PIXELS.astype(kind)
    images[4, 1, 2] = value
    write_set(tmp_path, images, DIGITS)
    assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, "sample 4 holds", value, "finite")


@pytest.mark.parametrize("shape", [(0, 4, 3), (6, 0, 3)])
def test_idx_empty(tmp_path: Path, shape: tuple[int, ...]) -> None:
    write_set(tmp_path, np.zeros(shape, np.uint8), DIGITS[: shape[0]])
    assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, "inputs have shape")


def test_idx_train_and_test_shapes_differ(tmp_path: Path) -> None:
    write_set(tmp_path, PIXELS, DIGITS)
    write_set(tmp_path, PIXELS[:, :2], DIGITS, "t10k")
    assert_refused(f"idx:{tmp_path}", "1x4x3", "1x2x3")


def test_file_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / IMAGES).mkdir()
    (tmp_path / LABELS).write_bytes(idx(DIGITS))
    assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, "Is a directory")
    assert_refused(f"npz:{tmp_path}", tmp_path, "Is a directory")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, PIXELS, DIGITS)
    np.savez(tmp_path / "set.npz", x=PIXELS, y=DIGITS)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Not by chmod: root may read everything.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert_refused(f"idx:{tmp_path}", tmp_path / IMAGES, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr("os.listdir", refuse)
        assert_refused(f"idx:{tmp_path}", tmp_path, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert_refused(f"npz:{tmp_path}/set.npz", tmp_path / "set.npz", "Permission denied")


def test_line_breaks_in_paths_stay_out_of_messages(tmp_path: Path) -> None:
    folder = tmp_path / "two\nlines"
    folder.mkdir()
    write_set(folder, b"", b"")
    assert_refused(f"idx:{folder}", "two lines/", "not an IDX file")
