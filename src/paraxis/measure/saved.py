"""What autograd saves of each layer's forward, measured by two trial forwards of different size.

In mixed precision that depends on which operations torch.autocast computes in 16 bits, and for CPUs and GPUs it has
different lists. Nothing here knows them: the trial computes under autocast, on the device where the task lies.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from paraxis.engine.parted import Layer, Parting, can_part, part
from paraxis.engine.precision import TYPES, cast
from paraxis.program.memory import Piece, Sizes
from paraxis.program.shares import chosen, sharing
from paraxis.task.batches import Nest, leaves, map_nest
from paraxis.task.gathering import apart
from paraxis.task.shared import loss_of_parts, split
from paraxis.task.task import Task

PARTS = ("saved", "entering", "inputs", "outputs")
Seen = tuple[int, int, bool, int | None]  # (number of a storage, its bytes, whether a gradient is computed, its `of`)


@dataclass
class Trial:
    """One forward: of every layer what autograd has saved and what was entering. Storages live until it is over."""

    ignored: set[int]  # addresses of parameters and buffers
    data: set[int]  # addresses of samples
    weights: dict[int, int]  # numbers of trained parameters, below 0, by their id
    saved: list[list[Seen]] = field(default_factory=list)
    entering: list[list[Seen]] = field(default_factory=list)
    inputs: list[list[Seen]] = field(default_factory=list)
    outputs: list[list[Seen]] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)  # what is entering the layer in progress
    copies: dict[int, int] = field(default_factory=dict)  # addresses of 16-bit copies, and of what they are
    apart: bool = False  # whether a layer makes copies of its own, and not autocast

    def see(self, tensor: Tensor, into: list[Seen]) -> Tensor:
        """Write a tensor's storage down, unless it is ignored."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.ignored and storage.nbytes():
            self.held.append(tensor)
            number = self.numbers.setdefault(storage.data_ptr(), len(self.numbers))
            if storage.data_ptr() in self.data:  # of many batches; what arrives elsewhere is but this part of it
                into.append((-1 - number, tensor.nbytes, tensor.requires_grad, None))
            else:
                into.append((number, storage.nbytes(), tensor.requires_grad, self.copies.get(storage.data_ptr())))
        return tensor

    def copied(self, source: Tensor, made: Tensor) -> None:
        """Write down what a tensor is a 16-bit copy of, if in some segment autocast would make no other one of it."""
        of = self.weights.get(id(source))
        if of is None and any(source is t for t in self.given):
            of = self.numbers.get(source.untyped_storage().data_ptr())
        if of is not None and not self.apart and made.dtype in TYPES.values() and source.dtype == torch.float32:
            self.copies[made.untyped_storage().data_ptr()] = of
            self.held.append(made)


class Copying(TorchDispatchMode):
    """Within it a trial is told of all conversions, which autocast makes unseen by modules."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        """Do as asked."""
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.trial.copied(args[0], made)
        return made


@dataclass
class Nobody:
    """Where ranks that share layers would meet, for one that is tried alone: its parts count as the sums."""

    kind: str = "F"

    def share(self, part: Tensor) -> Tensor:
        """As if there were nothing to add."""
        return part

    def passed(self, word: str) -> int:
        """Borders are not counted."""
        return 0

    def share_back(self, number: int, part: Tensor) -> Tensor:
        """As `share`."""
        return part


def measure_sizes(
    task: Task, tp: int = 1, sequence: int = 0, precision: str = "fp32", parted: bool = False, most: int | None = None
) -> Sizes:
    """Bytes of every layer, of one rank's part where `tp` ranks share them, with `sequence` the tokens between, too
    (PlanError if they cannot).

    In mixed precision they hold for the kind of device where the task lies; `parted`: whether its layers leave their
    weights' gradient to a W. `most`: samples to try. The task is used up: layers are cut and parted in place, and its
    optimiser may take a step.
    """
    if tp > 1:
        tokens = sharing(tp, task.splits, task.tokens) if sequence else None
        own = tuple(task.splits[n] for n in tokens.splits) if tokens else chosen(tp, task.splits)
        if tokens:
            apart(task.net, task.chain, tokens, 0, tp)
        split(task.net, own, task.draw, 0, tp, tokens)
        task.shared_loss = loss_of_parts(task.net, own, 0, tp)
        for module in (m for m in task.net.modules() if hasattr(m, "meeting")):
            vars(module)["meeting"] = Nobody()
    if parted and precision in TYPES:  # else what they keep is the same, and hooks see it
        for module in task.net.modules():
            part(module, Parting())
    count = min(task.batch, max(most or task.batch, 2 * task.least))
    whole = try_forward(task, count, precision)
    less = max(task.least, count // 2)
    half = try_forward(task, less, precision)
    pairs = [(getattr(whole, part), getattr(half, part)) for part in PARTS]
    alike = all([_numbers(layer) for layer in a] == [_numbers(layer) for layer in b] for a, b in pairs)
    if not alike or less == count:  # only in proportion
        pairs, less = [(a, []) for a, _ in pairs], 0
    state = _state_bytes(task)
    saved, entering, inputs, outputs = (_pieces(a, b, count, less) for a, b in pairs)
    trained, tensors, frozen, held = _parameters(task, state)
    return Sizes(trained, frozen, held, saved, entering, inputs, outputs, _tied(task, state), tensors)


def try_forward(task: Task, samples: int, precision: str = "fp32") -> Trial:
    """The forward of a training step on the first samples; running statistics stay what they were."""
    batch = task.train.share(0, 0, samples)
    kept = [b.clone() for b in task.net.buffers()]
    own, data = [*task.net.parameters(), *task.net.buffers()], leaves(batch)
    weights = {id(p): -1 - n for n, p in enumerate(task.net.parameters()) if p.requires_grad}
    trial = Trial(_addresses(own), _addresses(data), weights)
    task.draw.at(0, 0, samples)
    inputs = task.recipe.inputs(batch)
    x: Nest = map_nest(inputs, Tensor.clone) if 0 in task.altering else inputs
    for index, layer in enumerate(task.chain):
        ends = index == len(task.chain) - 1
        calls = cast([partial(task.call, layer)], precision, ends)
        if ends:
            calls.append(lambda x: (task.shared_loss or task.recipe.loss)(x, batch)[0])
        x = _try_layer(trial, layer, calls, x, precision)
    trial.entering.append([])
    trial.see(x, trial.entering[-1])
    for buffer, old in zip(task.net.buffers(), kept, strict=True):
        buffer.copy_(old)
    return trial


def _try_layer(trial: Trial, layer: nn.Module, calls: list[Callable[[Any], Any]], x: Nest, precision: str) -> Any:
    """What a layer makes of what is entering, and all that the trial has to see of it."""
    for seen in (trial.entering, trial.inputs, trial.outputs, trial.saved):
        seen.append([])
    map_nest(x, partial(trial.see, into=trial.entering[-1]))
    trial.given = [t for t in leaves(x) if t.requires_grad]
    watching = [_watch(trial, m) for m in layer.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(partial(trial.see, into=trial.saved[-1]), _same))
        if precision in TYPES:
            stack.enter_context(Copying(trial))
        for call in calls:
            x = call(x)
    for end in watching:
        end()
    return x


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _watch(trial: Trial, module: Any) -> Callable[[], None]:
    """See what a layer keeps for its W: what it computes with, and what it makes. Gives what ends that."""
    parted, trained = vars(module).get("forward"), any(p.requires_grad for p in module.parameters(recurse=False))

    def see(x: Tensor, made: Tensor) -> None:
        if trained:
            trial.see(x, trial.inputs[-1])
            trial.see(made, trial.outputs[-1])

    def watch(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        see(given[0], made)

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made: Tensor = parted.compute(x, weight, bias)
        see(x, made)
        return made

    def forward(x: Tensor) -> Tensor:
        trial.apart = True
        try:
            return replace(parted, compute=compute)(x)
        finally:
            trial.apart = False

    if isinstance(parted, Layer):  # which computes with copies that no hook would see
        module.forward = forward
        return partial(setattr, module, "forward", parted)
    return module.register_forward_hook(watch).remove if can_part(module) else _nothing


def _nothing() -> None:
    """Of a layer that nobody has watched."""


def _addresses(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def _numbers(layer: list[Seen]) -> list[int]:
    return [number for number, *_ in layer]


def _pieces(whole: list[list[Seen]], half: list[list[Seen]], samples: int, less: int) -> tuple[tuple[Piece, ...], ...]:
    """A line through two sizes, or through one and nothing; each storage once a layer."""
    found = []
    for index, layer in enumerate(whole):
        pieces: dict[int, Piece] = {}
        for place, (number, size, gradient, of) in enumerate(layer):
            smaller = half[index][place][1] if half else 0
            each = (size - smaller) / (samples - less)
            gradient |= number in pieces and pieces[number].gradient
            pieces[number] = Piece(number, size - each * samples, each, gradient, of)
        found.append(tuple(pieces.values()))
    return tuple(found)


def _tied(task: Task, state: dict[int, int]) -> tuple[tuple[tuple[int, ...], int, int], ...]:
    """Trained parameters that stand in several layers: stages that do not hold the first have copies."""
    named = {name: p for name, p in task.net.named_parameters() if p.requires_grad}
    ties = [(layers, named[name]) for name, layers in task.layout().tied if name in named]
    return tuple((layers, p.nbytes, state.get(id(p), 0)) for layers, p in ties)


def _parameters(
    task: Task, state: dict[int, int]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[int, ...], tuple[int, ...]]:
    """(trained, those of each tensor, frozen with buffers, optimiser's state) bytes of each layer, what layers share
    with the first."""
    seen: set[int] = set()
    trained, tensors, frozen, held = [], [], [], []
    for layer in task.chain:
        fresh = [t for t in (*layer.parameters(), *layer.buffers()) if id(t) not in seen]
        seen |= {id(t) for t in fresh}
        own = [t for t in fresh if t.requires_grad]
        trained.append(sum(t.nbytes for t in own))
        tensors.append(tuple(t.nbytes for t in own))
        frozen.append(sum(t.nbytes for t in fresh if not t.requires_grad))
        held.append(sum(state.get(id(t), 0) for t in own))
    return tuple(trained), tuple(tensors), tuple(frozen), tuple(held)


def _state_bytes(task: Task) -> dict[int, int]:
    """Bytes that the optimiser keeps of each parameter; one that is not ours shows it after a step on no gradient."""
    hyper = task.hyper()
    reached = [(p, group) for group in hyper.groups for p in group["params"] if id(p) not in task.keyed.unreached]
    if hyper.rule != "native" or hyper.optimizer is None:
        copies = {"adam": lambda group: 2}.get(hyper.rule, lambda group: int(bool(group["momentum"])))
        return {id(p): copies(group) * p.nbytes for p, group in reached}
    for p, _ in reached:
        p.grad = torch.zeros_like(p)
    hyper.optimizer.step()
    state: dict[Any, dict[str, Any]] = dict(hyper.optimizer.state)
    return {
        id(p): sum(value.nbytes for value in kept.values() if isinstance(value, Tensor)) for p, kept in state.items()
    }
