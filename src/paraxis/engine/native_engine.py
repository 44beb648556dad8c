"""The native engine's front: compiles an nn.Module to the layers that C++ has, and moves weights in and out.

Activations in C++ are channels-last, so images are permuted once, on their way in.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from paraxis.engine import native_tokens
from paraxis.errors import MissingError, PlanError
from paraxis.program.instructions import Program
from paraxis.task.gpt import Attention
from paraxis.task.norm import GroupedNorm
from paraxis.task.randomness import KeyedDropout, track
from paraxis.task.resnet import Block
from paraxis.task.task import HOOKS, Task

Shape = tuple[int, int, int]  # (height, width, channels)
LANES = 16  # samples side by side, as in csrc/kernels/kernels.h
LAST = (
    "affine",
    "average_pool",
    "batch_norm",
    "layer_norm",
    "dropout",
    "gelu",
    "gelu_tanh",
)  # whose backward needs not its output
FUSING = ("affine", "batch_norm", "residual", "max_pool")


@lru_cache(maxsize=1)
def extension() -> Any:
    """The compiled module; raises MissingError where it has not been built."""
    if find_spec("paraxis._native") is None:
        raise MissingError(
            "the native engine has not been built: install a C++ compiler (g++ or clang++) and run pip install again; "
            "engine=torch needs none"
        )
    _share_openmp()
    from paraxis import _native

    return _native


def _share_openmp() -> None:
    """Load the OpenMP library that PyTorch brings, so that there is one, whoever is imported first."""
    spec = find_spec("torch")
    for folder in spec.submodule_search_locations or () if spec else ():
        for library in Path(folder, "lib").glob("libgomp*.so*"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@dataclass
class Compiler:
    """Layers on their way to C++: `shape` and `place` are of the activation that the next one reads."""

    names: dict[int, str]  # id(module) -> its name in the network
    shape: Shape
    samples: int  # of a microbatch
    flat: bool = False
    tokens: int = 0  # of a sample; 0: it is no sequence
    symbols: bool = False  # what comes in are numbers that stand for themselves, until they are embedded
    place: int = 0
    count: int = 0
    specs: list[Any] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    weights: dict[int, int] = field(default_factory=dict)  # id(parameter) -> number of the layer that has it
    ties: dict[int, int] = field(default_factory=dict)  # id(parameter) -> number of what other stages have a copy of

    def need(self, condition: bool, name: str, module: nn.Module, what: str) -> None:
        """Raises PlanError naming the module, unless the condition holds."""
        if not condition:
            raise PlanError(f"engine=native cannot take {name} ({type(module).__name__}): it needs {what}")

    def need_bare(self, module: nn.Module, name: str) -> None:
        """Raises PlanError where somebody but the task, which follows where a function draws, has a hook."""
        found = (hook for hooks in HOOKS for hook in getattr(module, hooks).values())
        alone = all(getattr(hook, "__module__", "") == track.__module__ for hook in found)
        self.need(alone, name, module, "no hooks")

    def need_trained(self, module: nn.Module, name: str) -> None:
        """Raises PlanError where a parameter is frozen."""
        self.need(all(p.requires_grad for p in module.parameters()), name, module, "all parameters trained")

    def add(
        self, kind: str, module: nn.Module, out: Shape | None = None, weight: Tensor | None = None, **fields: Any
    ) -> None:
        """Append a layer that reads the current activation; `weight`: what it may have in common with one before it."""
        native = extension()
        spec = native.Spec()
        spec.kind, spec.name, spec.x = kind, self.names.get(id(module), ""), self.place
        self.count += 1
        spec.y, spec.in_ = self.count, native.Shape(*self.shape)
        self.shape = out or self.shape
        spec.out = native.Shape(*self.shape)
        for key, value in fields.items():
            setattr(spec, key, value)
        same = self.weights.get(id(weight), -1)
        for parameter in module.parameters(recurse=False):
            alone = parameter is weight and same >= 0 and self.specs[same].kind == "embedding" and not spec.bias
            self.need(alone or id(parameter) not in self.weights, spec.name, module, "parameters of its own")
            if id(parameter) in self.ties:
                matrix = parameter is weight and (kind == "embedding" or not spec.bias)
                self.need(matrix, spec.name, module, "to share a matrix alone, without a bias")
            self.weights.setdefault(id(parameter), len(self.specs))
        spec.same, spec.tie = same, self.ties.get(id(weight), -1) if same < 0 else -1
        self.specs.append(spec)
        self.place = self.count


def compile_layers(
    layers: Sequence[nn.Module],
    task: Task,
    shape: tuple[int, ...],
    samples: int,
    starts: bool,
    ends: bool,
    ties: dict[int, int],
) -> tuple[list[Any], Shape, bool]:
    """(C++ layers, shape behind them, whether that is flat); raises PlanError naming a layer that it cannot take.

    `shape` as of `input_shape`; `samples`: of a microbatch; `starts`: samples come in; `ends`: the last layer is the
    network's last, whose output the loss overwrites; `ties`: id(parameter) -> number of what other stages have, too.
    """
    names = {id(module): name for name, module in task.net.named_modules()}
    tokens = tokens_of(task)
    compiler = Compiler(names, (shape[0], shape[1], shape[2]), samples, len(shape) > 3, tokens, bool(tokens) and starts)
    compiler.ties = ties
    for layer in layers:
        _layer(layer, compiler)
    if not compiler.specs:  # a stage of a Flatten alone hands on what it is given
        compiler.add("average_pool", nn.Identity(), kernel_h=1, kernel_w=1, stride=1)
    last = compiler.specs[-1] if ends and compiler.specs else None
    if last is not None and (last.relu or last.kind not in LAST):
        kind = "ReLU" if last.relu or last.kind == "relu" else last.kind
        raise PlanError(f"engine=native: a {kind} cannot be the last layer; leave it to the loss")
    return compiler.specs, compiler.shape, compiler.flat


def _layer(module: nn.Module, c: Compiler) -> None:
    name = c.names.get(id(module), "") or type(module).__name__
    c.need_bare(module, name)
    if type(module) in LAYERS:
        fits = not c.tokens or isinstance(module, native_tokens.TOKENWISE)
        c.need(fits, name, module, "samples that are no sequences")
        c.need(not c.symbols or isinstance(module, nn.Embedding), name, module, "an Embedding in front of it")
        c.need(id(module) not in c.seen or not [*module.parameters()], name, module, "to stand in one place")
        c.need(module.training, name, module, "to be in training mode")
        c.seen.add(id(module))
        LAYERS[type(module)](module, c, name)
    elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for child in module:
            _layer(child, c)
    elif isinstance(module, Block):
        _basic_block(module, c)
    elif type(module) in native_tokens.PARTS and c.tokens:
        c.need(module.training, name, module, "to be in training mode")
        native_tokens.PARTS[type(module)](module, c, _layer)
    else:
        known = ", ".join(sorted(kind.__name__ for kind in LAYERS))
        raise PlanError(f"engine=native cannot take {name} ({type(module).__name__}); it has {known}, Sequential")


def _linear(m: Any, c: Compiler, name: str) -> None:
    h, w, channels = c.shape
    c.need(c.flat and h * w * channels == m.in_features, name, m, "one row of features a sample")
    c.need_trained(m, name)
    weight = m.weight if h * w == 1 else None  # behind a Flatten it has an order of its own
    c.add("affine", m, (1, 1, m.out_features), weight, kernel_h=h, kernel_w=w, bias=m.bias is not None)


def _conv(m: Any, c: Compiler, name: str) -> None:
    h, w, channels = c.shape
    c.need(m.groups == 1 and m.dilation == (1, 1) and m.padding_mode == "zeros", name, m, "groups=1, dilation=1, zeros")
    c.need(
        m.stride[0] == m.stride[1] and not isinstance(m.padding, str), name, m, "one stride and a padding in numbers"
    )
    c.need(m.padding[0] == m.padding[1] and not c.flat and m.in_channels == channels, name, m, "images, equal paddings")
    c.need_trained(m, name)
    (kh, kw), stride, padding = m.kernel_size, m.stride[0], m.padding[0]
    out = (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1, m.out_channels
    fields = {"kernel_h": kh, "kernel_w": kw, "stride": stride, "padding": padding, "bias": m.bias is not None}
    c.add("affine", m, out, **fields)


def _pool(kind: str) -> Callable[[Any, Compiler, str], None]:
    def pool(m: Any, c: Compiler, name: str) -> None:
        h, w, channels = c.shape
        kernel, padding = _one(m.kernel_size), _one(m.padding)
        stride = _one(m.stride if m.stride is not None else m.kernel_size)
        c.need(None not in (kernel, stride, padding), name, m, "square windows")
        plain = getattr(m, "dilation", 1) == 1 and not m.ceil_mode and getattr(m, "count_include_pad", True)
        c.need(kernel * kernel <= 256, name, m, "windows of at most 256 places")
        c.need(bool(plain) and not getattr(m, "divisor_override", None), name, m, "no dilation, ceil_mode or divisor")
        out = (h + 2 * padding - kernel) // stride + 1, (w + 2 * padding - kernel) // stride + 1, channels
        c.add(kind, m, out, kernel_h=kernel, kernel_w=kernel, stride=stride, padding=padding)

    return pool


def _one(value: Any) -> Any:
    """The number of a square pair, None of another one."""
    if isinstance(value, (tuple, list)):
        return value[0] if len(set(value)) == 1 else None
    return value


def _global_pool(m: Any, c: Compiler, name: str) -> None:
    h, w, channels = c.shape
    c.need(_one(m.output_size) == 1, name, m, "an output of 1x1")
    c.add("average_pool", m, (1, 1, channels), kernel_h=h, kernel_w=w, stride=1)


def _relu(m: nn.Module, c: Compiler, name: str) -> None:
    last = c.specs[-1] if c.specs else None
    if last is not None and last.kind in FUSING and last.y == c.place and not last.relu:
        last.relu = True
    else:
        c.add("relu", m)


def _pointwise(kind: str) -> Callable[[Any, Compiler, str], None]:
    def pointwise(m: Any, c: Compiler, name: str) -> None:
        c.add(kind, m)

    return pointwise


def _gelu(m: Any, c: Compiler, name: str) -> None:
    c.add("gelu" if m.approximate == "none" else "gelu_tanh", m)


def _dropout(m: Any, c: Compiler, name: str) -> None:
    if m.p > 0:
        c.add("dropout", m, p=m.p, key=native_tokens.first_draw(name))


def _flatten(m: Any, c: Compiler, name: str) -> None:
    c.need(m.start_dim == 1 and m.end_dim in (-1, 3), name, m, "start_dim=1")
    c.flat = True


def _batch_norm(m: Any, c: Compiler, name: str) -> None:
    fine = m.affine and m.track_running_stats and m.momentum is not None and m.num_features == c.shape[2]
    c.need(fine, name, m, "affine=True, running statistics and a momentum")
    c.need_trained(m, name)
    group = getattr(m, "group", 0)
    across = max(1, group // c.samples)  # replicas: plans are held to whole slices
    within = across > 1 or group == c.samples
    c.need(within or group % LANES == 0, name, m, f"bn_group to be a multiple of {LANES}, or the slice")
    c.add("batch_norm", m, epsilon=m.eps, momentum=m.momentum, group=0 if within else group, across=across)


def _layer_norm(m: Any, c: Compiler, name: str) -> None:
    size = c.shape[0] * c.shape[1] * c.shape[2]
    fine = m.elementwise_affine and m.bias is not None and _product(m.normalized_shape) == size
    c.need(fine, name, m, "a weight and a bias over all features of a sample")
    c.need_trained(m, name)
    c.add("layer_norm", m, epsilon=m.eps)


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _basic_block(m: Any, c: Compiler) -> None:
    """ResNet's block: two convolutions and what goes around them; sum and ReLU are part of the second normalisation."""
    entry, shape = c.place, c.shape
    for part in (m.conv1, m.bn1, nn.ReLU(), m.conv2):
        _layer(part, c)
    main, main_shape, skip = c.place, c.shape, entry
    if m.downsample is not None:
        c.place, c.shape = entry, shape
        _layer(m.downsample, c)
        skip = c.place
        c.place, c.shape = main, main_shape
    _layer(m.bn2, c)
    c.specs[-1].skip, c.specs[-1].relu = skip, True


def _nothing(m: nn.Module, c: Compiler, name: str) -> None:
    """It does nothing."""


LAYERS: dict[type[nn.Module], Callable[[Any, Compiler, str], None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.MaxPool2d: _pool("max_pool"),
    nn.AvgPool2d: _pool("average_pool"),
    nn.AdaptiveAvgPool2d: _global_pool,
    nn.ReLU: _relu,
    nn.Sigmoid: _pointwise("sigmoid"),
    nn.Tanh: _pointwise("tanh"),
    nn.GELU: _gelu,
    nn.Dropout: _dropout,
    KeyedDropout: _dropout,
    nn.Flatten: _flatten,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm1d: _batch_norm,
    GroupedNorm: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: native_tokens.embedding,
    nn.Identity: _nothing,
}


def input_shape(task: Task) -> tuple[int, ...]:
    """(h, w, c) of a sample, with a fourth entry where it is flat; raises PlanError for what is no image or vector."""
    inputs = task.recipe.inputs(task.train.share(0, 0, 1))
    if tokens_of(task):
        return 1, 1, 1, 1
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim not in (2, 4):
        raise PlanError("engine=native takes one tensor of samples, (n, features) or (n, channels, height, width)")
    if inputs.ndim == 2:
        return 1, 1, inputs.shape[1], 1
    return inputs.shape[2], inputs.shape[3], inputs.shape[1]


def tokens_of(task: Task) -> int:
    """Length of a sample, where samples are sequences of symbols; otherwise 0."""
    return int(task.train.share(0, 0, 1)[0].shape[1]) if task.recipe.tokens else 0


def check_task(task: Task) -> None:
    """Raises PlanError for a task whose loss, optimiser or randomness C++ does not have."""
    own = task.recipe.own
    for part in ("loss", "inputs"):
        if part in own:
            raise PlanError(
                f"engine=native has softmax cross-entropy of batches (inputs, targets), not a {part} of yours"
            )
    batch = task.train.share(0, 0, 1)
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and not batch[1].is_floating_point()):
        raise PlanError("engine=native needs batches (inputs, class numbers)")
    if batch[1].ndim != 1 + task.recipe.tokens:
        raise PlanError("engine=native needs one class number a sample")
    modules, drawing = dict(task.net.named_modules()), {name for name, _ in task.draw.shapes}
    odd = sorted(name for name in drawing if type(modules.get(name)) not in (KeyedDropout, Attention))
    if odd or task.keyed.unkeyed or task.keyed.switched_off:
        raise PlanError("engine=native has the randomness of nn.Dropout and of gpt's attention only")
    hyper = task.hyper()
    if hyper.rule == "native" or len(hyper.groups) != 1:
        raise PlanError("engine=native has SGD, Adam and AdamW with one group of parameters")


def stages_of(task: Task, program: Program, samples: int) -> list[list[Any]]:
    """C++ layers of every stage, for microbatches of `samples`; raises PlanError for what it cannot take."""
    check_task(task)
    _check_copies(task, program)
    shape, found = input_shape(task), []
    numbers = {tie.parameter: number for number, tie in enumerate(program.ties)}
    ties = {key: numbers[name] for key, name in task.names.items() if name in numbers}
    for number, (first, last) in enumerate(program.stages):
        ends = number == len(program.stages) - 1
        layers = task.chain[first:last]
        specs, out, flat = compile_layers(layers, task, shape, samples, number == 0, ends, ties)
        found.append(specs)
        shape = (*out, 1) if flat else out
    return found


def _check_copies(task: Task, program: Program) -> None:
    """Raises PlanError where two stages of one rank use a parameter, of which each would have a copy of its own."""
    seen: dict[tuple[int, int], int] = {}  # (place, id of a parameter) -> stage
    for stage, (first, last) in enumerate(program.stages):
        place = stage % program.mesh.pp
        for p in {id(p) for layer in task.chain[first:last] for p in layer.parameters()}:
            before = seen.setdefault((place, p), stage)
            if before != stage:
                shared = f"stages {before} and {stage} of one rank both use {task.names.get(p, 'a parameter')}"
                raise PlanError(f"engine=native: {shared}; take another split or interleave, or engine=torch")
