"""What autograd saves of each layer's forward, measured by two trial forwards of different size."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paraxis.engine.parted import can_part
from paraxis.program.memory import Piece, Sizes
from paraxis.program.shares import chosen, sharing
from paraxis.task.batches import Nest, leaves, map_nest
from paraxis.task.gathering import apart
from paraxis.task.shared import loss_of_parts, split
from paraxis.task.task import Task

PARTS = ("saved", "entering", "inputs", "outputs")
Seen = tuple[int, int, bool]  # (number of a storage, its bytes, whether a gradient is computed)


@dataclass
class Trial:
    """One forward: of every layer what autograd has saved and what was entering. Storages live until it is over."""

    ignored: set[int]  # addresses of parameters and buffers
    data: set[int]  # addresses of samples
    saved: list[list[Seen]] = field(default_factory=list)
    entering: list[list[Seen]] = field(default_factory=list)
    inputs: list[list[Seen]] = field(default_factory=list)
    outputs: list[list[Seen]] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)

    def see(self, tensor: Tensor, into: list[Seen]) -> Tensor:
        """Write a tensor's storage down, unless it is ignored."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.ignored and storage.nbytes():
            self.held.append(tensor)
            number = self.numbers.setdefault(storage.data_ptr(), len(self.numbers))
            if storage.data_ptr() in self.data:  # of many batches; what arrives elsewhere is but this part of it
                into.append((-1 - number, tensor.nbytes, tensor.requires_grad))
            else:
                into.append((number, storage.nbytes(), tensor.requires_grad))
        return tensor


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


def measure_sizes(task: Task, tp: int = 1, sequence: int = 0) -> Sizes:
    """Bytes of every layer, of one rank's part where `tp` ranks share them, with `sequence` the tokens between, too
    (PlanError if they cannot).

    The task's optimiser may take a step for it, so that the task is used up.
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
    whole = try_forward(task, task.batch)
    less = max(task.least, task.batch // 2)
    half = try_forward(task, less)
    pairs = [(getattr(whole, part), getattr(half, part)) for part in PARTS]
    alike = all([_numbers(layer) for layer in a] == [_numbers(layer) for layer in b] for a, b in pairs)
    if not alike or less == task.batch:  # only in proportion
        pairs, less = [(a, []) for a, _ in pairs], 0
    state = _state_bytes(task)
    saved, entering, inputs, outputs = (_pieces(a, b, task.batch, less) for a, b in pairs)
    trained, tensors, frozen, held = _parameters(task, state)
    return Sizes(trained, frozen, held, saved, entering, inputs, outputs, _tied(task, state), tensors)


def try_forward(task: Task, samples: int) -> Trial:
    """The forward of a training step on the first samples; running statistics stay what they were."""
    batch = task.train.share(0, 0, samples)
    kept = [b.clone() for b in task.net.buffers()]
    own, data = [*task.net.parameters(), *task.net.buffers()], leaves(batch)
    trial = Trial(_addresses(own), _addresses(data))
    task.draw.at(0, 0, samples)
    inputs = task.recipe.inputs(batch)
    x: Nest = map_nest(inputs, Tensor.clone) if 0 in task.altering else inputs
    for index, layer in enumerate(task.chain):
        saved: list[Seen] = []
        for part in (trial.entering, trial.inputs, trial.outputs):
            part.append([])
        map_nest(x, partial(trial.see, into=trial.entering[-1]))
        hooks = [m.register_forward_hook(_watch(trial)) for m in layer.modules() if can_part(m)]
        with torch.autograd.graph.saved_tensors_hooks(partial(trial.see, into=saved), lambda t: t):
            x = task.call(layer, x)
            if index == len(task.chain) - 1:
                x = (task.shared_loss or task.recipe.loss)(x, batch)[0]
        trial.saved.append(saved)
        for hook in hooks:
            hook.remove()
    trial.entering.append([])
    trial.see(x, trial.entering[-1])
    for buffer, old in zip(task.net.buffers(), kept, strict=True):
        buffer.copy_(old)
    return trial


def _watch(trial: Trial) -> Any:
    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        trial.see(inputs[0], trial.inputs[-1])
        trial.see(output, trial.outputs[-1])

    return watch


def _addresses(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def _numbers(layer: list[Seen]) -> list[int]:
    return [number for number, _, _ in layer]


def _pieces(whole: list[list[Seen]], half: list[list[Seen]], samples: int, less: int) -> tuple[tuple[Piece, ...], ...]:
    """A line through two sizes, or through one and nothing; each storage once a layer."""
    found = []
    for index, layer in enumerate(whole):
        pieces: dict[int, Piece] = {}
        for place, (number, size, gradient) in enumerate(layer):
            smaller = half[index][place][1] if half else 0
            each = (size - smaller) / (samples - less)
            gradient |= number in pieces and pieces[number].gradient
            pieces[number] = Piece(number, size - each * samples, each, gradient)
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
