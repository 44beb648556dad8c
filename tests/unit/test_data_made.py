"""Data sets from NPZ files and from nothing, whether they fit a network, and samples that are held out."""

import io
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import DIGITS, PIXELS, assert_refused, idx, misfit, one_line, refusal

from paraxis.errors import TaskError
from paraxis.task.data import Arrays, Data, check_fits, hold_out, load

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
