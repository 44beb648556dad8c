"""gpt: GPT-2's structure, names and initial weights; text as windows of bytes; the loss and hits of sequences."""

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paraxis.api import make_spec
from paraxis.errors import TaskError
from paraxis.measure.layer_work import layer_work
from paraxis.measure.layers import coupled, measure_layers
from paraxis.task.data import load
from paraxis.task.gpt import GPT, Attention, shape_of
from paraxis.task.networks import ZOO, build
from paraxis.task.recipe import Recipe
from paraxis.task.spec import SHIPPED, TaskSpec
from paraxis.task.task import make_task

TINY = "gpt:2-8-2-4"


@pytest.fixture(scope="module")
def nano() -> GPT:
    made = build("gpt", 3)
    assert isinstance(made, GPT)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """1001 bytes, each of which tells where it stands."""
    path = tmp_path / "bytes.bin"
    path.write_bytes(bytes(n % 251 for n in range(1001)))
    return path


# -- the network -----------------------------------------------------------------------------------------------


def expected(layers: int, width: int, context: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of GPT-2's state_dict, its linear weights as nn.Linear has them."""
    found: dict[str, tuple[int, ...]] = {"wte.weight": (256, width), "wpe.weight": (context, width)}
    for n in range(layers):
        for name, shape in {
            "ln_1": (width,),
            "attn.c_attn": (3 * width, width),
            "attn.c_proj": (width, width),
            "ln_2": (width,),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }.items():
            found |= {f"h.{n}.{name}.weight": shape, f"h.{n}.{name}.bias": shape[:1]}
    return found | {"ln_f.weight": (width,), "ln_f.bias": (width,), "lm_head.weight": (256, width)}


def test_names_shapes_and_numbers_are_gpt2s(nano: GPT) -> None:
    assert {name: tuple(value.shape) for name, value in nano.state_dict().items()} == expected(4, 128, 64)
    assert sum(p.numel() for p in nano.parameters()) == 834_304
    with torch.device("meta"):
        small = GPT(shape_of("small"))
    assert sum(p.numel() for p in small.parameters()) == 85_449_216
    assert nano.lm_head.weight is nano.wte.weight


def test_it_computes_what_gpt2_computes(nano: GPT) -> None:
    """Held to a few lines of plain functions, written from the paper's figure."""
    ids = torch.randint(256, (3, 10), generator=torch.Generator().manual_seed(0))
    p = nano.state_dict()
    x = p["wte.weight"][ids] + p["wpe.weight"][:10]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (128,), p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    for n in range(4):
        heads = [
            t.view(3, 10, 4, 32).transpose(1, 2)
            for t in linear(norm(x, f"h.{n}.ln_1"), f"h.{n}.attn.c_attn").chunk(3, -1)
        ]
        scores = heads[0] @ heads[1].transpose(2, 3) / 32**0.5
        weights = scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + linear((weights @ heads[2]).transpose(1, 2).reshape(3, 10, 128), f"h.{n}.attn.c_proj")
        inner = linear(norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc")
        gelu = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        x = x + linear(gelu, f"h.{n}.mlp.c_proj")
    wanted = norm(x, "ln_f") @ p["wte.weight"].T
    assert torch.allclose(nano(ids), wanted, atol=2e-5)
    assert float(wanted.abs().max()) > 0.5


def test_no_position_sees_what_comes_behind_it(nano: GPT) -> None:
    ids = torch.arange(20)[None]
    other = ids.clone()
    other[0, 12:] = 200
    before, after = nano(ids), nano(other)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6) and not torch.allclose(before, after, atol=1e-2)


def test_stages_compose_to_the_network_and_hold_its_modules(nano: GPT) -> None:
    x: Any = torch.randint(256, (2, 7))
    whole = nano(x)
    assert len(nano.stages()) == 6
    for stage in nano.stages():
        x = stage(x)
    assert torch.equal(x, whole)
    own = {id(m) for stage in nano.stages() for m in stage.modules()}
    inside = {name for name, m in nano.named_modules() if id(m) not in own}
    assert inside == {"", "h"}


def test_initial_weights_are_gpt2s_and_follow_from_seed_and_name(nano: GPT) -> None:
    for name, value in nano.state_dict().items():
        if name.endswith("bias") or ".ln" in name or name.startswith("ln"):
            assert bool((value == float("ln" in name and name.endswith("weight"))).all()), name
        else:
            deviation = 0.02 / 8**0.5 if name.endswith("c_proj.weight") else 0.02
            assert float(value.std()) == pytest.approx(deviation, rel=0.05), name
    same, other = build("gpt:nano,dropout=0.1", 3).state_dict(), build("gpt", 4).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in nano.state_dict().items())
    assert not torch.equal(same["wte.weight"], other["wte.weight"])
    assert not torch.equal(same["h.0.attn.c_proj.weight"], same["h.1.attn.c_proj.weight"])


def test_dropout_is_there_only_if_it_is_asked_for(nano: GPT) -> None:
    assert not any(isinstance(m, nn.Dropout) for m in nano.modules())
    noisy = build("gpt:2-8-2-4,dropout=0.5", 0)
    assert [m.p for m in noisy.modules() if isinstance(m, nn.Dropout)] == [0.5] * 5
    assert [m.p for m in noisy.modules() if isinstance(m, Attention)] == [0.5] * 2
    x = torch.zeros(2, 4, dtype=torch.int64)
    assert not torch.equal(noisy(x), noisy(x)) and torch.equal(noisy.eval()(x), noisy(x))
    keyed = make_task(TaskSpec(network="gpt:2-8-2-4,dropout=0.5", batch=4)).keyed
    assert keyed.functions and not keyed.switched_off and not keyed.unkeyed


@pytest.mark.parametrize(
    "options, words",
    [
        ("huge", "it takes gpt:nano, gpt:small or gpt:LAYERS-WIDTH-HEADS-CONTEXT, such as gpt:4-128-4-64"),
        ("4-128-4", "it takes gpt:nano"),
        ("0-128-4-64", "it takes gpt:nano"),
        ("nano,", "it takes gpt:nano"),
        ("4-128-3-64", "a width of 128 cannot be split among 3 heads"),
        ("nano,dropout=1", "from 0 to below 1, such as dropout=0.1"),
        ("nano,dropout=1.1.1", "from 0 to below 1"),
    ],
)
def test_options_that_make_no_network_are_refused(options: str, words: str) -> None:
    with pytest.raises(TaskError) as caught:
        build(f"gpt:{options}", 0)
    assert words in str(caught.value) and str(caught.value).startswith(f"gpt:{options}: ")


def test_the_light_list_of_families_is_the_zoos() -> None:
    assert tuple(ZOO) == SHIPPED


# -- text ------------------------------------------------------------------------------------------------------


def test_windows_stand_side_by_side_and_none_crosses_into_the_test_set(file: Path) -> None:
    data = load(f"text:{file},context=8")
    raw = np.frombuffer(file.read_bytes(), np.uint8)
    assert data.test and data.train.tokens and data.train.classes == 256
    border = 1001 - 100
    for part, first, last in ((data.train, 0, border), (data.test, border, 1001)):
        count = (last - first - 1) // 8
        assert part.inputs.shape == part.targets.shape == (count, 8) and part.inputs.dtype == np.uint8
        np.testing.assert_array_equal(part.inputs.ravel(), raw[first : first + 8 * count])
        np.testing.assert_array_equal(part.targets.ravel(), raw[first + 1 : first + 1 + 8 * count])


def test_files_patterns_and_folders_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, letter in (("z.txt", "1"), ("b/y.txt", "2"), ("b/x.txt", "3"), ("a.md", "4")):
        (tmp_path / name).write_text(letter * 40)

    def letters(files: str) -> str:
        data = load(f"text:{files},context=3")
        assert data.test
        train = bytes([data.train.inputs[0, 0], *data.train.targets.ravel()]).decode()
        return "".join(dict.fromkeys(train + bytes(data.test.inputs.ravel()).decode()))

    assert letters(f"{tmp_path}/z.txt+{tmp_path}/a.md") == "14"
    assert letters(str(tmp_path)) == "4321"
    assert letters(f"{tmp_path}/*.txt+{tmp_path}/b") == "132"
    assert letters(f"{tmp_path}/**/*.txt") == "321"


def test_without_files_it_is_pythons_own_library() -> None:
    data, same = load("text"), load("text:")
    assert data.test and same.test
    assert data.train.inputs.shape[1] == 64
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    assert len(files) > 100 and bytes(data.train.inputs[0]) == files[0].read_bytes()[:64]
    total = sum(f.stat().st_size for f in files)
    assert (
        total - (1 << 16) - 64 <= data.train.inputs.size < total - (1 << 16) and data.test.inputs.size == (1 << 16) - 64
    )
    np.testing.assert_array_equal(data.train.inputs, same.train.inputs)


def test_text_that_cannot_be_had_is_refused(tmp_path: Path, file: Path) -> None:
    for text, words in (
        (f"text:{tmp_path}/no*", "no such file; give files, a folder or a pattern"),
        (f"text:{file}+nothing", "'nothing': no such file"),
        (f"text:{file},context=100", "the last tenth of 1001 bytes holds no window of 100 and the byte after it"),
    ):
        with pytest.raises(TaskError) as caught:
            load(text)
        assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


# -- the task --------------------------------------------------------------------------------------------------


def tiny(file: Path, network: str = TINY, **more: Any) -> Any:
    return make_task(TaskSpec(**({"network": network, "data": f"text:{file}", "batch": 8} | more)), dtype=torch.float64)


def test_batches_are_bytes_in_an_order_of_seed_and_epoch(file: Path) -> None:
    """Windows are as long as the network's context."""
    task, other = tiny(file), tiny(file, seed=1)
    x, y = task.train.share(0, 0, 8)
    assert x.shape == y.shape == (8, 4) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal((x + 1) % 251, y)
    steps = task.train.steps_per_epoch
    assert steps == 900 // 4 // 8
    starts = [tuple(task.train.share(step, 0, 8)[0][:, 0].tolist()) for step in range(2 * steps)]
    again = [tuple(tiny(file).train.share(step, 0, 8)[0][:, 0].tolist()) for step in range(2 * steps)]
    assert starts == again and starts[:steps] != starts[steps:]
    assert starts[0] != tuple(other.train.share(0, 0, 8)[0][:, 0].tolist())
    assert task.test.size == 24 and tiny(file, validation=0.2).validation.size == 45


def test_a_sample_weighs_one_and_its_loss_is_the_mean_over_its_bytes(file: Path) -> None:
    task = tiny(file)
    batch = task.train.share(0, 0, 8)
    with torch.no_grad():
        output = task.net(batch[0])
    total, weight = task.recipe.loss(output, batch)
    each = torch.stack([F.cross_entropy(o, t) for o, t in zip(output, batch[1], strict=True)])
    assert weight == 8 and not task.weight_in_data
    assert float(total) == pytest.approx(float(each.sum()), rel=1e-12)
    right = F.one_hot(batch[1], 256).double()
    right[0, 0] = right[3] = torch.zeros(256)
    assert task.recipe.hits(right, batch) == 8 - 1 - 0.25 + float((batch[1][3] == 0).double().mean())
    assert not coupled(task)


def test_hits_of_other_samples_are_counted_as_before() -> None:
    plain = Recipe("net", nn.Identity)
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert plain.hits(scores, (None, torch.tensor([1, 0, 0]))) == 2
    for output, target in (
        (scores, torch.zeros(3, 2)),
        (scores[:, :, None], torch.zeros(3)),
        ((scores,), torch.zeros(3)),
    ):
        assert plain.hits(output, (None, target)) == 0


def test_data_and_networks_that_do_not_fit_are_refused(file: Path) -> None:
    for settings, words in (
        ({"network": TINY, "data": "mnist"}, "cannot take samples of shape 1x28x28"),
        ({"network": "mlp:4-3", "data": f"text:{file},context=4"}, "mlp:4-3 cannot take samples of shape 4"),
        ({"network": TINY, "data": f"text:{file},context=9"}, "9 bytes are more than the network's context of 4"),
    ):
        with pytest.raises(TaskError) as caught:
            make_task(TaskSpec(**settings, batch=8))
        assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1
    with pytest.raises(TaskError, match="of 8x4 tokens it makes 8 numbers; text needs scores of every token"):
        own = {"net": lambda: nn.Sequential(nn.Embedding(256, 1), nn.Flatten(), nn.Linear(4, 1), nn.Flatten(0))}
        make_task(TaskSpec(live=True, data=f"text:{file},context=4", batch=8), own)
    with pytest.raises(TaskError, match=r"has no output: network .* has 100 outputs"):
        own = {"net": lambda: nn.Sequential(nn.Embedding(256, 5), nn.Linear(5, 100))}
        make_task(TaskSpec(live=True, data=f"text:{file},context=4", batch=8), own)


def test_a_network_of_ones_own_reads_text(file: Path) -> None:
    own = {"net": lambda: nn.Sequential(nn.Embedding(256, 5), nn.Linear(5, 256))}
    task = make_task(TaskSpec(live=True, data=f"text:{file},context=4", batch=8), own)
    total, weight = task.recipe.loss(task.net(task.train.share(0, 0, 8)[0]), task.train.share(0, 0, 8))
    assert weight == 8 and float(total.detach()) == pytest.approx(8 * 5.5, rel=0.1)


def test_layers_are_measured_and_their_work_counted(file: Path) -> None:
    task = tiny(file)
    facts = measure_layers(task, 8, seconds=0.0)
    assert facts.layers == ("Embed", "Block", "Block", "Head") and not facts.random
    assert facts.layout.tied == (("wte.weight", (0, 3)),)
    tokens, width = 8 * 4, 8
    works = {work.index: work for work in layer_work(task, 8)}
    assert sorted(works) == [1, 2, 3], "a look-up is no product"
    biased = tokens * (3 + 1 + 4 + 1) * width
    causal = 2 * 2 * 8 * width * (1 + 2 + 3 + 4)
    assert works[1].forward.flops == 2 * tokens * 12 * width**2 + biased + causal
    assert works[1].backward.flops == 4 * tokens * 12 * width**2 + biased + 2 * causal
    assert works[3].forward.flops == 2 * tokens * width * 256


# -- what a family has by default ------------------------------------------------------------------------------


def test_gpt_has_defaults_of_its_own_and_what_is_said_comes_first() -> None:
    spec = make_spec("gpt:small")
    assert (spec.data, spec.batch, spec.optimizer, spec.lr) == ("text", 32, "adamw", 1e-3)
    said = make_spec("gpt", data="text:x", batch=4, optimizer="sgd", lr=None)
    assert (said.data, said.batch, said.optimizer, said.lr) == ("text:x", 4, "sgd", 0.05)
    assert make_spec("gpt", optimizer="adam").lr == 1e-3 and make_spec("gpt", lr=0.1).lr == 0.1
    plain = make_spec("cnn")
    assert (plain.data, plain.batch, plain.optimizer, plain.lr) == (None, None, "sgd", 0.05)
    assert TaskSpec.model_validate(spec.model_dump()) == spec
    assert make_spec(nn.Identity()).optimizer == "sgd"
