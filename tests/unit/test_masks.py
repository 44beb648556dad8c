"""Masks follow from (seed, step, layer, sample): golden bits, no dependence on slices. So do initial weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paraxis.errors import TaskError
from paraxis.task.masks import dropout_key, kept, kept_of_part, kept_on, mix32, splitmix64, threshold, words_of
from paraxis.task.networks import build, initialise
from paraxis.task.randomness import Draw

torch.set_num_threads(1)
KEYS = st.integers(0, (1 << 64) - 1)
NEEDS_GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Golden vectors: plain Python integers by the formulas of docs/design, not by the module under test. The C++ engine
# has to give the same bits. splitmix64(1234567) is the published first output for that seed.
SPLITMIX = {0: 0xE220A8397B1DCDAF, 1: 0x910A2DEC89025CC1, 1234567: 6457827717110365317}
SPLITMIX[(1 << 64) - 1] = 0xE4D971771B652C20
MIX = {0: 0, 1: 0x688990C0, 2: 0xD1132181, 0xDEADBEEF: 0xE628C683, 0xFFFFFFFF: 0x6768824A}
KEY = {(0, 0, 0): 0x238275BC38FCBE91, (1, 2, 3): 0xD0734750FDE362B3, (42, 1000, 0xCAFEBABE): 0xB821DFA447273B96}
KEPT = {
    (0, 0, 4, 9, 0.5): ["000001011", "001011111", "001110111", "001111100"],
    (KEY[1, 2, 3], 5, 3, 16, 0.25): ["1011011100111101", "1111001111111101", "1110101111101111"],
    ((1 << 64) - 1, 0, 2, 7, 0.9): ["0101000", "0000000"],
    (KEY[42, 1000, 0xCAFEBABE], 1 << 20, 2, 8, 0.1): ["11111111", "11111111"],
}


def test_golden_splitmix64() -> None:
    assert {x: splitmix64(x) for x in SPLITMIX} == SPLITMIX


def test_golden_mix32() -> None:
    assert mix32(np.array(list(MIX), dtype=np.uint32)).tolist() == list(MIX.values())


def test_golden_dropout_key() -> None:
    assert {words: dropout_key(*words) for words in KEY} == KEY


@pytest.mark.parametrize("words", KEPT)
def test_golden_kept(words: tuple[int, int, int, int, float]) -> None:
    assert ["".join("01"[int(bit)] for bit in row) for row in kept(*words)] == KEPT[words]


@given(KEYS, st.integers(0, 1 << 31), st.integers(2, 12), st.integers(1, 33), st.floats(0.01, 0.99), st.data())
@settings(deadline=None)
def test_a_mask_does_not_depend_on_how_samples_are_split(
    key: int, first: int, samples: int, elements: int, p: float, data: st.DataObject
) -> None:
    whole = kept(key, first, samples, elements, p)
    assert whole.shape == (samples, elements) and whole.dtype == bool
    at = data.draw(st.integers(1, samples - 1))
    parts = [kept(key, first, at, elements, p), kept(key, first + at, samples - at, elements, p)]
    assert (np.concatenate(parts) == whole).all()
    fewer = data.draw(st.integers(1, elements))
    assert (kept(key, first, samples, fewer, p) == whole[:, :fewer]).all(), "element by element"


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.8])
def test_the_keep_rate_is_what_was_asked_for(p: float) -> None:
    mask = kept(dropout_key(1, 2, 3), 1000, 500, 400, p)
    sigma = (p * (1 - p) / mask.size) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * sigma
    for axis in (0, 1):  # neither a sample nor an element is favoured
        rates = mask.mean(axis)
        spread = (p * (1 - p) / mask.shape[axis]) ** 0.5
        assert np.abs(rates - (1 - p)).max() < 6 * spread and rates.std() == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("other", [(1, 2, 4), (1, 3, 3), (2, 2, 3)], ids=["layer", "step", "seed"])
def test_masks_of_another_layer_step_or_seed_are_unrelated(other: tuple[int, int, int]) -> None:
    a, b = (kept(dropout_key(*words), 0, 300, 300, 0.5) for words in ((1, 2, 3), other))
    assert abs((a == b).mean() - 0.5) < 4 * 0.5 / 300


def test_what_is_kept_is_scaled_so_that_the_mean_stays() -> None:
    draw = Draw(seed=7)
    draw.at(step=3, first=0, samples=64)
    out = draw.dropout(torch.ones(64, 1000, dtype=torch.float64), 0.3, "layer")
    scale = 65536 / (65536 - round(65536 * 0.3))
    assert set(out.unique().tolist()) == {0.0, scale}
    assert float(out.mean()) == pytest.approx(1, abs=0.01) and scale == pytest.approx(1 / 0.7, rel=1e-4)
    assert draw.dropout(torch.ones(64, 5), 0.3, "layer").dtype == torch.float32


def test_nothing_and_everything_can_be_dropped() -> None:
    draw = Draw()
    draw.at(0, 0, 4)
    x = torch.ones(4, 3)
    assert draw.dropout(x, 0.0, "l") is x and draw.dropout(x, 1e-6, "l") is x and threshold(1e-6) == 0
    assert not draw.dropout(x, 1.0, "l").any()
    assert draw.dropout(torch.ones(4, 0), 0.5, "l").shape == (4, 0)


def test_a_layer_used_twice_in_one_forward_draws_twice_and_anew_in_the_next() -> None:
    draw, x = Draw(), torch.ones(8, 50)
    draw.at(0, 0, 8)
    first, second = draw.dropout(x, 0.5, "l"), draw.dropout(x, 0.5, "l")
    draw.at(0, 0, 8)
    again, other = draw.dropout(x, 0.5, "l"), draw.dropout(x, 0.5, "m")
    assert torch.equal(first, again) and not torch.equal(first, second) and not torch.equal(first, other)


def test_a_dimension_that_does_not_count_the_samples_is_refused_in_words() -> None:
    draw = Draw(dims={("drop", 0): 1})
    draw.at(0, 0, 4)
    with pytest.raises(TaskError) as caught:
        draw.dropout(torch.ones(4, 6), 0.5, "drop")
    assert str(caught.value) == "dropout in drop: dimension 1 of (4, 6) does not count 4"


# -- initial weights -------------------------------------------------------------------------------------------


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first = build("mlp:20-20-20", 1).state_dict()
    torch.manual_seed(99)
    again, other = build("mlp:20-20-20", 1).state_dict(), build("mlp:20-20-20", 2).state_dict()
    longer = build("mlp:20-20-20-7", 1).state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name]) and not torch.equal(value, other[name])
        assert torch.equal(value, longer[name]), "whatever stands behind it"
    assert not torch.equal(first["1.weight"], first["3.weight"]), "equal shapes, other names"


def test_initial_weights_have_the_frameworks_distribution() -> None:
    weight = build("mlp:400-400-10", 3)[1].weight.detach()
    bound = 1 / 400**0.5
    assert float(weight.abs().max()) <= bound and float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_initialising_leaves_the_users_generator_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = torch.random.get_rng_state()
    initialise(net, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- on a device -----------------------------------------------------------------------------------------------

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.mark.parametrize("device", DEVICES)
@given(
    KEYS,
    st.integers(0, 1 << 30),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 3),
    st.floats(0.001, 0.999),
)
@settings(deadline=None)
def test_tensor_operations_give_the_same_bits(
    device: str, key: int, first: int, samples: int, outer: int, run: int, parts: int, p: float
) -> None:
    wanted = kept_of_part(key, first, samples, outer, run, parts - 1, parts, p)
    place = outer, run, parts - 1, parts
    there = torch.device(device)
    assert np.array_equal(kept_on(there, words_of(key), first, samples, place, p).cpu().numpy(), wanted)
    in_memory = torch.tensor(list(words_of(key)), dtype=torch.int32).to(there)
    assert np.array_equal(kept_on(there, (in_memory[0], in_memory[1]), first, samples, place, p).cpu().numpy(), wanted)


@pytest.mark.parametrize("words", KEPT)
def test_golden_kept_by_tensor_operations(words: tuple[int, int, int, int, float]) -> None:
    key, first, samples, elements, p = words
    found = kept_on(torch.device("cpu"), words_of(key), first, samples, (1, elements, 0, 1), p)
    assert ["".join("01"[int(bit)] for bit in row) for row in found] == KEPT[words]


def test_a_key_in_memory_is_read_there_and_nothing_else_changes_a_mask() -> None:
    draw, memory, x = Draw(seed=7), torch.zeros(1, dtype=torch.int64), torch.ones(8, 33)
    call = ("layer", 0)
    words = memory.view(torch.int32)
    for step in (3, 4):
        draw.words = None
        draw.at(step, 16, 8)
        wanted = draw.dropout(x, 0.3, "layer")
        memory.fill_(draw.key(call, step) - (draw.key(call, step) >> 63 << 64))
        draw.words = lambda _: (words[0], words[1])
        draw.at(99, 16, 8)
        assert torch.equal(draw.dropout(x, 0.3, "layer"), wanted), step
        memory.zero_()
        draw.at(step, 16, 8)
        assert not torch.equal(draw.dropout(x, 0.3, "layer"), wanted), "the host's step is not looked at"
