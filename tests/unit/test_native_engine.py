"""The native engine: its words are Python's, its kernels agree with each other, its layers with PyTorch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from paraxis.engine.native_engine import extension
from paraxis.plan.plan import parse
from paraxis.program.cut import Layout
from paraxis.program.instructions import MEMORY, MIDWAY, OPS
from paraxis.program.lower import lower
from paraxis.run import openmp, serial
from paraxis.task.spec import TaskSpec
from paraxis.task.task import Task, make_task

torch.set_num_threads(1)
EXACT, WRONG = 1e-10, 1e-6
native = extension()
Shape = tuple[int, int, int]


# -- words -----------------------------------------------------------------------------------------------------


def test_operations_are_one_list() -> None:
    assert tuple(native.OPS) == tuple(op for op in OPS if op not in MEMORY and not op.startswith(MIDWAY))


@pytest.mark.parametrize("text", ["dp=2", "dp=2,pp=2,microbatches=2", "dp=2,sync=diloco@2", "dp=2,sync=hogwild"])
def test_cpp_knows_every_rule_and_buffer_of_a_program(text: str) -> None:
    layout = Layout(parameters=(4, 4), statistics=True, clip=True)
    program = lower(parse(f"{text},engine=native"), layout, 2)
    seen = {i for _, ranks in program.bodies for rank in ranks for i in rank}
    assert {i.rule for i in seen} <= set(native.RULES) and {i.buffer for i in seen} <= set(native.BUFFERS)
    assert {i.op for i in seen} <= set(native.OPS)
    assert {"zero", "norm", "statistics", "evaluate"} < {i.rule for i in seen}


def test_a_word_that_cpp_does_not_know_is_an_error() -> None:
    for place, word in ((0, "Reserve"), (4, "ep"), (5, "outside"), (6, "inner")):
        words: list[Any] = ["Update", 0, 0, -1, "", "", "step", False]
        words[place] = word
        with pytest.raises(ValueError, match=f"{word} is not known"):
            made([linear(3, 2)], 4, bodies=[("step", [[tuple(words)]])])


# -- driving C++ by hand ---------------------------------------------------------------------------------------


def spec(kind: str, number: int, inside: Shape, outside: Shape, **fields: Any) -> Any:
    """The description of layer `number` of a stage, which reads what the one before has made."""
    made = native.Spec()
    made.kind, made.name, made.x, made.y = kind, str(number), number - 1, number
    made.in_, made.out = native.Shape(*inside), native.Shape(*outside)
    for key, value in fields.items():
        setattr(made, key, value)
    return made


def linear(inputs: int, outputs: int, number: int = 1, shape: Shape | None = None, **fields: Any) -> Any:
    h, w, c = shape or (1, 1, inputs)
    return spec("affine", number, (h, w, c), (1, 1, outputs), kernel_h=h, kernel_w=w, **fields)


def made(specs: list[Any], samples: int, kind: str = "Float", bodies: Any = None, tokens: int = 0) -> Any:
    """An ensemble of one thread that does plain SGD on the mean loss."""
    program = lower(parse("engine=native"), Layout(parameters=(1,)))
    hyper = native.Hyper()
    hyper.weight = samples
    whole = [(name, [[openmp._words(i) for i in rank] for rank in ranks]) for name, ranks in program.bodies]
    return getattr(native, kind)(
        dp=1,
        pp=1,
        stages=[specs],
        slice=samples,
        microbatches=1,
        bodies=bodies or whole,
        hyper=hyper,
        shared=False,
        usable_cores=1,
        seed=3,
        naive=False,
        ends=(True, True),
        kept=[0],
        tokens=tokens,
    )


def weights(ensemble: Any, dtype: Any) -> dict[str, np.ndarray]:
    found = {}
    for layer, part, count in ensemble.parts(0):
        found[f"{layer}.{part}"] = np.empty(count, dtype)
        ensemble.get(0, layer, part, found[f"{layer}.{part}"])
    return found


def stepped(specs: list[Any], samples: int, kind: str = "Float", seed: int = 0) -> dict[str, np.ndarray]:
    """What one step with rate 1 from random weights changes, which is the gradient; the loss beside it."""
    dtype = np.float32 if kind == "Float" else np.float64
    ensemble, source = made(specs, samples, kind), np.random.default_rng(seed)
    size, classes = specs[0].in_, specs[-1].out.c
    inputs = source.standard_normal((samples, size.h * size.w * size.c)).astype(np.float32).astype(dtype)
    for layer, part, count in ensemble.parts(0):
        scale = 1 / np.sqrt(count) if part == "weight" else 0.1
        values = (scale * source.standard_normal(count)).astype(np.float32)
        ensemble.put(0, layer, part, values.astype(dtype))
    targets = source.integers(0, classes, samples)
    before = weights(ensemble, dtype)
    losses = ensemble.run(0, [0], [1.0], inputs, targets, np.arange(samples), samples, 1.0)
    after = weights(ensemble, dtype)
    return {key: before[key] - after[key] for key in before} | {"loss": np.array(losses[0])}


def farthest(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest difference, each array's relative to its own largest value."""
    return max(float(np.abs(a[k] - b[k]).max() / max(np.abs(b[k]).max(), 1e-3)) for k in b)


# -- kernels against each other --------------------------------------------------------------------------------

KERNELS = ["baseline", "v3", "v4", "neon", "naive", ""]
ROUNDING = 2e-5


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    """A table of kernels by name, for as long as a test takes."""
    if not native.choose(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.choose("")


def convolution(
    c: int, out: int, kernel: tuple[int, int], stride: int, padding: int, size: tuple[int, int]
) -> list[Any]:
    (h, w), (kh, kw) = size, kernel
    oh, ow = (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1
    fields = {"kernel_h": kh, "kernel_w": kw, "stride": stride, "padding": padding}
    front = spec("affine", 1, (h, w, c), (h, w, c + 1), kernel_h=1, kernel_w=1)  # whose gradient needs the input's
    own = spec("affine", 2, (h, w, c + 1), (oh, ow, out), relu=True, **fields)
    return [front, own, linear(0, 3, 3, (oh, ow, out))]


CONVOLUTIONS = {
    "5x5": (1, 10, (5, 5), 1, 0, (12, 12)),
    "padded": (3, 17, (3, 3), 1, 1, (7, 5)),
    "strided": (2, 49, (3, 3), 2, 1, (8, 7)),
    "uneven": (4, 6, (2, 3), 2, 0, (7, 8)),
    "wide": (51, 5, (1, 1), 1, 0, (3, 3)),
    "all in the padding": (2, 3, (2, 2), 1, 3, (3, 3)),
    "whole image": (3, 70, (4, 4), 1, 0, (4, 4)),
}


@pytest.mark.parametrize("chosen", KERNELS, indirect=True)
def test_linear_layers_of_all_widths(chosen: str) -> None:
    """Up to two panels of outputs, with stubs of every width; the loss's rows are as odd."""
    assert native.kernels() == chosen or not chosen
    for outputs in range(1, 71):
        inputs, samples = 2 * (outputs * 7 % 31) + 1, 1 + outputs * 5 % 37
        layers = [linear(inputs, outputs, relu=outputs % 2 == 0), linear(outputs, 2 + outputs % 9, 2)]
        twin = stepped(layers, samples, "Double")
        assert farthest(stepped(layers, samples), twin) < ROUNDING, f"{inputs}-{outputs} of {samples} samples"


@pytest.mark.parametrize("chosen", KERNELS, indirect=True)
def test_convolutions_of_all_kinds(chosen: str) -> None:
    for name, case in CONVOLUTIONS.items():
        for samples in (5, 32):
            layers = convolution(*case)
            twin = stepped(layers, samples, "Double")
            assert farthest(stepped(layers, samples), twin) < ROUNDING, f"{name}, {samples} samples"
            assert farthest(stepped(layers, samples, seed=1), twin) > 100 * ROUNDING


def test_tables_of_kernels_are_chosen_by_name() -> None:
    usual = native.kernels()
    assert native.choose("baseline" if usual in ("v3", "v4", "baseline") else "naive") and native.choose("naive")
    assert native.kernels() == "naive" and not native.choose("abacus") and native.kernels() == "naive"
    assert native.choose("") and native.kernels() == usual


# -- each layer against PyTorch --------------------------------------------------------------------------------


def live(net: nn.Module, batch: Any, **given: Any) -> Task:
    objects = {"net": net, "batches": [batch]}
    return make_task(TaskSpec(network="own", live=True, **{"lr": 1.0, "momentum": 0.0} | given), objects, torch.float64)


def samples_of(shape: tuple[int, ...], count: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, *shape, generator=source, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (count,), generator=source)


def team_of(task: Task, text: str = "engine=native") -> openmp.Team:
    return openmp.start(task, lower(parse(text), task.layout()), hogwild=False)


def mismatch(net: nn.Module, batch: Any, **left_out: Any) -> float:
    """By how much one step with rate 1 differs from PyTorch's: of gradients, running statistics and the loss."""
    task = live(net, batch)
    team = team_of(live(net, batch, **left_out) if left_out else task)
    team.steps(1)
    found, oracle = team.state(), serial.replica(task)
    losses = serial.emulate([oracle], 0, 1, 1, 1)
    apart = [float((found[key] - value).abs().max()) for key, value in oracle.task.net.state_dict().items()]
    return max(*apart, abs(team.losses[0][0] / team.losses[0][1] - losses[0]))


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[nn.Module], tuple[int, int, int]]:
    """One layer of any kind that takes images, and the shape (channels, height, width) of those."""
    c, h, w = draw(st.integers(1, 5)), draw(st.integers(3, 7)), draw(st.integers(3, 7))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding = draw(st.integers(0, kernel // 2))
    pool = (kernel, stride, padding)
    choices = {
        "conv": lambda: nn.Conv2d(
            c, draw(st.integers(1, 20)), (kernel, draw(st.integers(1, 3))), stride, padding, bias=draw(st.booleans())
        ),
        "max": lambda: nn.MaxPool2d(*pool),
        "average": lambda: nn.AvgPool2d(*pool),
        "global": lambda: nn.AdaptiveAvgPool2d(1),
        "batch norm": lambda: nn.BatchNorm2d(c, eps=1e-3, momentum=draw(st.floats(0.1, 0.9))),
        "layer norm": lambda: nn.LayerNorm([c, h, w], eps=1e-3),
        "tanh GELU": lambda: nn.GELU(approximate="tanh"),
        **{kind.__name__: kind for kind in (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.Identity)},
        "dropout": lambda: nn.Dropout(draw(st.floats(0, 0.9))),
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, draw(st.integers(1, 60)))),
    }
    layer = choices[draw(st.sampled_from(sorted(choices)))]()
    return [layer, nn.ReLU()] if draw(st.booleans()) else [layer], (c, h, w)


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck), derandomize=True)
@given(layers(), st.integers(2, 37))
def test_each_layer_has_pytorchs_gradient(case: tuple[list[nn.Module], Shape], count: int) -> None:
    """Between a convolution, whose gradient needs that of the layer's input, and a linear layer."""
    parts, (c, h, w) = case
    torch.manual_seed(count)
    trunk = nn.Sequential(nn.Conv2d(2, c, 1), *parts, nn.Flatten())
    features = trunk(torch.zeros(2, 2, h, w)).shape[1]
    batch = samples_of((2, h, w), count)
    net = nn.Sequential(*trunk, nn.Linear(features, 3))
    assert mismatch(net, batch) < EXACT


def test_another_rate_or_other_masks_are_seen() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(0.4), nn.Flatten(), nn.Linear(18, 3))
    batch = samples_of((2, 3, 3), 21)
    assert mismatch(net, batch) < EXACT
    assert mismatch(net, batch, lr=0.999) > WRONG and mismatch(net, batch, seed=1) > WRONG


def test_a_stage_of_a_flatten_alone_hands_on_what_it_is_given() -> None:
    spec = TaskSpec(network="mlp", batch=32)
    task = make_task(spec, dtype=torch.float64)
    plan = parse("pp=4,microbatches=2,engine=native")
    team = openmp.start(task, lower(plan, task.layout(), task.train.steps_per_epoch or 1), False)
    team.steps(3)
    losses = serial.emulate([serial.replica(make_task(spec, dtype=torch.float64))], 0, 3, 1, 1)
    assert [loss / weight for loss, weight in team.losses] == pytest.approx(losses, rel=1e-12)
