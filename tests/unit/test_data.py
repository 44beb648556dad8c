"""Data sets: what is loaded is what was stored, and what cannot be used is refused in one line."""

import gzip
import hashlib
import io
import math
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paraxis.task.data as data_module
from paraxis.errors import TaskError
from paraxis.task.data import Arrays, Data, check_fits, hold_out, load

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


# --- names ---


@pytest.mark.parametrize("text", ["", "cifar10", "mnist:x", "MNIST", "idx:", "npz:", "idx", "no\nsuch\u2028name"])
def test_unknown_name(text: str) -> None:
    assert_refused(text, repr(text), "mnist, idx:DIR, npz:FILE or synthetic:N,SHAPE,CLASSES")


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


# --- NPZ ---


def save(path: Path, **arrays: object) -> str:
    np.savez(path / "set.npz", **arrays)  # type: ignore[arg-type]
    return f"npz:{path / 'set.npz'}"


@pytest.mark.parametrize("names", [("x", "y"), ("inputs", "targets"), ("x_train", "y_train")])
def test_npz_names(tmp_path: Path, names: tuple[str, str]) -> None:
    loaded = load(save(tmp_path, **{names[0]: PIXELS, names[1]: DIGITS}))
    assert loaded.test is None
    assert loaded.train.inputs.shape == (6, 4, 3)
    assert loaded.train.classes == 3
    np.testing.assert_array_equal(loaded.train.inputs, PIXELS)


def test_npz_with_test_set(tmp_path: Path) -> None:
    x = np.asfortranarray(np.linspace(-5, 5, 12).reshape(6, 2))
    text = save(tmp_path, x_train=x, y_train=DIGITS, x_test=x[:1], y_test=np.array([4]), note=np.array("by hand"))
    loaded = load(text)
    assert loaded.test is not None
    assert loaded.train.classes == loaded.test.classes == 5
    assert loaded.train.inputs.flags.c_contiguous
    np.testing.assert_array_equal(loaded.train.inputs, x.astype(np.float32))
    np.testing.assert_array_equal(loaded.test.inputs, x[:1].astype(np.float32))


def test_npz_without_the_arrays(tmp_path: Path) -> None:
    assert_refused(save(tmp_path, a=PIXELS, b=DIGITS), "set.npz", "found a, b", "x_train/y_train or x/y")
    assert_refused(save(tmp_path), "found none")
    assert_refused(save(tmp_path, x=PIXELS), "has x but no y")
    assert_refused(save(tmp_path, x=PIXELS, y=DIGITS, y_test=DIGITS), "has y_test but no x_test")


def test_npz_bad_pairs(tmp_path: Path) -> None:
    assert_refused(save(tmp_path, x=PIXELS, y=DIGITS[:4]), "set.npz: x", "6 samples", "set.npz: y", "4 labels")
    assert_refused(save(tmp_path, x=PIXELS, y=DIGITS[:, None]), "set.npz: y", "(6, 1)")
    assert_refused(save(tmp_path, x=PIXELS, y=np.int64(3)), "set.npz: y", "shape ()")
    assert_refused(save(tmp_path, x=DIGITS, y=DIGITS), "set.npz: x", "(6,)")
    assert_refused(save(tmp_path, x=PIXELS[:0], y=DIGITS[:0]), "(0, 4, 3)")
    assert_refused(save(tmp_path, x=PIXELS, y=DIGITS / 2), "set.npz: y", "float64")
    assert_refused(save(tmp_path, x=PIXELS * 1j, y=DIGITS), "set.npz: x", "complex128")
    assert_refused(save(tmp_path, x=PIXELS, y=DIGITS.astype(np.int64) - 1), "label -1 at index 0")
    assert_refused(save(tmp_path, x=PIXELS, y=DIGITS.astype(np.uint64) + np.uint64(2**63)), f"label {2**63} at index 0")
    with_nan = np.where(PIXELS == 50, np.nan, PIXELS)
    assert_refused(save(tmp_path, x=with_nan, y=DIGITS), "set.npz: x", "sample 4 holds nan")
    other = {"x_test": PIXELS[:, :, :2], "y_test": DIGITS}
    assert_refused(save(tmp_path, x=PIXELS, y=DIGITS, **other), "4x3", "4x2")


def test_npz_never_unpickles(tmp_path: Path) -> None:
    assert_refused(save(tmp_path, x=np.array([{}] * 6, object), y=DIGITS), "set.npz", "object arrays")


def test_npz_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    assert_refused(f"npz:{path}", path, "No such file")
    assert_refused("npz:a\0b", "null")
    for content in (b"", b"not a zip file", idx(PIXELS)):
        path.write_bytes(content)
        assert_refused(f"npz:{path}", path, "not a readable .npz")
    np.save(tmp_path / "one.npy", PIXELS)
    assert_refused(f"npz:{tmp_path}/one.npy", "one.npy", "not a readable .npz")


def test_npz_damaged_anywhere_is_refused_or_read(tmp_path: Path) -> None:
    """Every byte of the header of a member flipped: numpy raises many kinds of errors, the user sees one."""
    member = io.BytesIO()
    np.save(member, PIXELS)
    raw = member.getvalue()
    for place in range(len(raw)):
        for value in (0, ord("("), ord("9"), 255) if place < 128 else (255,):
            with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
                archive.writestr("x.npy", raw[:place] + bytes([value]) + raw[place + 1 :])
                archive.writestr("y.npy", b"")
            refusal(f"npz:{tmp_path}/set.npz")


def test_npz_truncated(tmp_path: Path) -> None:
    save(tmp_path, x=PIXELS, y=DIGITS)
    path = tmp_path / "set.npz"
    whole = path.read_bytes()
    for keep in range(0, len(whole), 7):
        path.write_bytes(whole[:keep])
        assert_refused(f"npz:{path}", path)


# --- synthetic ---


def test_synthetic_shapes() -> None:
    loaded = load("synthetic:100,1x28x28,10")
    assert loaded.name == "synthetic:100,1x28x28,10"
    assert loaded.test is None
    assert loaded.train.inputs.shape == (100, 1, 28, 28)
    assert loaded.train.inputs.dtype == np.float32
    assert loaded.train.targets.dtype == np.int64
    assert loaded.train.classes == 10
    assert np.bincount(loaded.train.targets).tolist() == [10] * 10
    assert load("synthetic:3,784,10").train.classes == 10


def test_synthetic_is_a_function_of_its_text() -> None:
    first, again, other = (load(f"synthetic:64,5x3,4{seed}").train for seed in ("", ",seed=0", ",seed=3"))
    np.testing.assert_array_equal(first.inputs, again.inputs)
    np.testing.assert_array_equal(first.targets, again.targets)
    assert not np.array_equal(first.inputs, other.inputs)


def test_synthetic_can_be_learned() -> None:
    """Softmax regression on one half classifies the other half, which it has not seen."""
    train, unseen = hold_out(load("synthetic:1024,784,10,seed=3").train, 0.5, 0)
    weights = np.zeros((784, 10), np.float32)
    losses = []
    for _ in range(20):
        scores = train.inputs @ weights
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        losses.append(-np.log(chances[np.arange(512), train.targets] + 1e-9).mean())
        chances[np.arange(512), train.targets] -= 1
        weights -= 0.01 * train.inputs.T @ chances / 512
    assert losses[0] == pytest.approx(math.log(10), rel=1e-3)
    assert losses[-1] < 0.5 * losses[0]
    assert ((unseen.inputs @ weights).argmax(1) == unseen.targets).mean() > 0.9


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "1024",
        "1024,784",
        "0,784,10",
        "10,0x3,2",
        "10,3,0",
        "-1,3,2",
        "1e3,3,2",
        "9,3,2,seed=-1",
        "9,3,2,3",
        "9,3x,2",
    ]
    + ["9,3,2,seed=", "9, 3,2", "9,3,2\n", "1_0,3,2", "٣,3,2", f"{'9' * 5000},3,2"],
)
def test_synthetic_bad_text(rest: str) -> None:
    assert_refused(f"synthetic:{rest}", repr(f"synthetic:{rest}"), "synthetic:1024,1x28x28,10")


@pytest.mark.parametrize("rest", [f"{10**17},784,10", f"10,{10**17},10", f"10,3,{10**17}", f"5,{'x'.join('1' * 99)},2"])
def test_synthetic_beyond_memory(rest: str) -> None:
    assert_refused(f"synthetic:{rest}", "does not fit in memory")


# --- check_fits ---


def small(targets: list[int], test: list[int] | None = None, shape: tuple[int, ...] = (1, 4, 3)) -> Data:
    def arrays(labels: list[int]) -> Arrays:
        return Arrays(np.zeros((len(labels), *shape), np.float32), np.array(labels), 1 + max(targets + (test or [])))

    return Data("small", arrays(targets), None if test is None else arrays(test))


def misfit(*args: object, **options: bool) -> str:
    with pytest.raises(TaskError) as caught:
        check_fits(*args, **options)  # type: ignore[arg-type]
    return one_line(caught.value)


def test_check_fits_accepts() -> None:
    data = small([0, 1, 2], [1])
    check_fits(data, 3, (1, 4, 3), "lenet")
    check_fits(data, 10, None, "lenet")
    check_fits(data, None, (1, 4, 3), "lenet")
    check_fits(data, None, None, "lenet")
    for shape in ((12,), (4, 3), (2, 6)):
        check_fits(data, 3, shape, "mlp", flatten=True)


def test_check_fits_labels() -> None:
    message = misfit(small([0, 2, 5, 9, 1]), 5, (1, 4, 3), "mlp:12-5")
    for part in (
        "data small",
        "train label 5 at index 2",
        "mlp:12-5",
        "5 outputs",
        "0..4",
        "give the network 10 outputs",
    ):
        assert part in message
    assert "test label 3 at index 1" in misfit(small([0, 1], [0, 3]), 2, None, "n")


def test_check_fits_shapes() -> None:
    data = small([0, 1])
    assert "shape 1x4x3 but network lenet takes 3x4x1" in misfit(data, 2, (3, 4, 1), "lenet")
    assert "1x4x3" in misfit(data, 2, (12,), "lenet")
    message = misfit(data, 2, (13,), "mlp", flatten=True)
    assert "1x4x3" in message and "takes 13;" in message


def test_check_fits_mnist(mnist: Data) -> None:
    check_fits(mnist, 10, (784,), "mlp", flatten=True)
    assert "train label 9 at index 4" in misfit(mnist, 9, None, "mlp")


# --- hold_out ---


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 2**40))
def test_hold_out_is_a_partition(count: int, fraction: float, seed: int) -> None:
    train = Arrays(np.arange(count, dtype=np.float32)[:, None], np.arange(count), count)
    if not 0 < round(count * fraction) < count:
        with pytest.raises(TaskError) as caught:
            hold_out(train, fraction, seed)
        assert f"of {count} samples" in one_line(caught.value)
        return
    rest, held = hold_out(train, fraction, seed)
    assert len(held.targets) == round(count * fraction)
    assert sorted([*rest.targets, *held.targets]) == list(range(count))
    for side in (rest, held):
        assert side.classes == count
        np.testing.assert_array_equal(side.inputs[:, 0], side.targets)
    np.testing.assert_array_equal(hold_out(train, fraction, seed)[1].targets, held.targets)


def test_hold_out_depends_on_the_seed() -> None:
    train = load("synthetic:100,3,10").train
    assert not np.array_equal(hold_out(train, 0.3, 0)[1].inputs, hold_out(train, 0.3, 1)[1].inputs)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, math.nan, math.inf, 1e-9, 1 - 1e-9])
def test_hold_out_leaves_something_on_both_sides(fraction: float) -> None:
    with pytest.raises(TaskError) as caught:
        hold_out(load("synthetic:10,3,2").train, fraction, 0)
    assert f"fraction {fraction} of 10 samples" in one_line(caught.value)


def test_hold_out_negative_seed() -> None:
    with pytest.raises(TaskError) as caught:
        hold_out(load("synthetic:10,3,2").train, 0.5, -1)
    assert "seed -1" in one_line(caught.value)
