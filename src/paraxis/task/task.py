"""The task as every rank holds it: the network with its initial weights, its layers, its data, loss and optimiser."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from paraxis.engine.rules import Hyper, of_optimizer
from paraxis.errors import TaskError
from paraxis.program.cut import Layout
from paraxis.program.shares import Split, Tokens
from paraxis.task import data as data_module
from paraxis.task.batches import ArraySource, Nest, Source, StreamSource, leaves, map_nest, seed_everything
from paraxis.task.gpt import shape_of
from paraxis.task.moments import counting
from paraxis.task.networks import build
from paraxis.task.norm import GroupedNorm, group_norms, resting
from paraxis.task.randomness import Draw, Keyed, KeyedFunctions, key_randomness
from paraxis.task.recipe import Recipe, from_file, from_objects
from paraxis.task.sharing import letters
from paraxis.task.spec import DEFAULT_BATCH, TaskSpec
from paraxis.task.tensor import found, watch
from paraxis.task.text import in_windows_of, is_text
from paraxis.task.tokens import find_tokens
from paraxis.task.trial import apply, check_composition, least_samples, one_line, running, try_forward, try_loss

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MANY_INPUTS = (nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.Bilinear, nn.Sequential, nn.ModuleList)


@dataclass
class Task:
    """What one rank trains. `chain`: the layers in order, or the whole network where it cannot be cut (`cuttable`)."""

    spec: TaskSpec
    recipe: Recipe
    net: nn.Module
    chain: list[nn.Module]
    cuttable: str
    train: Source
    test: Source | None
    validation: Source | None
    dtype: torch.dtype
    draw: Draw
    keyed: Keyed
    notes: list[str] = field(default_factory=list)
    spread: bool = False  # layers are the user's stages, or the whole network
    names: dict[int, str] = field(default_factory=dict)  # id(parameter) -> its name in the state_dict
    weight_in_data: bool = False  # only the loss function knows a batch's weight
    altering: frozenset[int] = frozenset()  # places of layers that change their input
    least: int = 1  # samples without which its batch norms have no statistics
    norms: list[list[int]] = field(default_factory=list)  # how long the sums of each layer's whole batch norms are
    splits: tuple[Split, ...] = ()  # what several ranks can share
    tokens: tuple[Tokens, ...] = ()  # ... and how the tokens between
    shared_loss: Callable[..., Any] | None = None  # in a forward, where they share the classes too

    @property
    def batch(self) -> int:
        """Samples in the global batch."""
        return self.train.batch

    def whole(self, x: Any) -> Any:
        """The network on its inputs; dropout keyed."""
        return self._keyed(lambda: apply(self.net, x))

    def call(self, layer: nn.Module, x: Any) -> Any:
        """A layer on what the one before gave; stages take a tuple as arguments, as nn.Sequential does not."""
        return self._keyed(lambda: apply(layer, x) if self.spread else layer(x))

    def _keyed(self, run: Callable[[], Any]) -> Any:
        if not self.keyed.functions:
            return run()
        with KeyedFunctions(self.draw):
            return run()

    def callable(self, layer: nn.Module) -> Callable[[Any], Any]:
        """`call` with what can be settled beforehand: of PyTorch's own layers without hooks, the forward itself."""
        hooked = any(getattr(layer, hooks) for hooks in HOOKS)
        own = type(layer).__module__.startswith(("torch.nn.modules", "paraxis.task"))
        if self.keyed.functions or hooked or not own or isinstance(layer, MANY_INPUTS):
            return partial(self.call, layer)
        forward: Callable[[Any], Any] = layer.forward
        return forward

    def optimizer(self) -> torch.optim.Optimizer:
        """The user's or the chosen optimiser over all parameters; it carries the hyperparameters of each group."""
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        if "optimizer" in self.recipe.own:
            made = self.recipe.ask("optimizer", parameters)
            if not isinstance(made, torch.optim.Optimizer):
                raise TaskError(
                    f"{self.recipe.name}: optimizer(parameters) must return a torch.optim.Optimizer, "
                    f"not {type(made).__name__}"
                )
            return made
        s = self.spec
        if s.optimizer == "sgd":
            return torch.optim.SGD(parameters, s.lr, s.sgd_momentum, 0, s.weight_decay, s.nesterov)
        adam = torch.optim.Adam if s.optimizer == "adam" else torch.optim.AdamW
        return adam(parameters, s.lr, weight_decay=s.weight_decay)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """A learning-rate scheduler, stepped once per optimiser step, or None for a constant rate."""
        if "scheduler" in self.recipe.own:
            return self.recipe.ask("scheduler", optimizer)
        factor = self.rate_factor()
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor) if factor else None

    def rate_factor(self) -> Callable[[int], float] | None:
        """The chosen schedule: step -> factor of the learning rate; None for a constant rate."""
        s = self.spec
        if s.lr_schedule == "constant":
            return None
        horizon = max(s.horizon, s.warmup + 1)

        def factor(step: int) -> float:
            if step < s.warmup:
                return (step + 1) / s.warmup
            if s.lr_schedule == "warmup":
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - s.warmup) / (horizon - s.warmup))))

        return factor

    def hyper(self) -> Hyper:
        """What the flat update rules need: the user's optimiser taken apart, or the chosen one's numbers."""
        if self.recipe.own.keys() & {"optimizer", "scheduler"}:
            optimizer = self.optimizer()
            return of_optimizer(optimizer, self.scheduler(optimizer))
        s = self.spec
        numbers: dict[str, Any] = {"lr": s.lr, "weight_decay": s.weight_decay}
        numbers |= {"momentum": s.sgd_momentum, "nesterov": s.nesterov} if s.optimizer == "sgd" else {}
        adamw = s.optimizer == "adamw"
        numbers |= {"betas": (0.9, 0.999), "eps": 1e-8, "decoupled_weight_decay": adamw} if s.optimizer != "sgd" else {}
        groups = [{"params": [p for p in self.net.parameters() if p.requires_grad]} | numbers]
        return Hyper("sgd" if s.optimizer == "sgd" else "adam", groups, factor=self.rate_factor())

    def layout(self) -> Layout:
        """What lowering has to know."""
        owners: dict[int, list[int]] = {}
        for index, layer in enumerate(self.chain):
            for parameter in filter(lambda p: p.requires_grad, layer.parameters()):
                owners.setdefault(id(parameter), []).append(index)
        return Layout(
            parameters=tuple(
                sum(p.numel() for p in layer.parameters() if owners.get(id(p), [-1])[0] == index)
                for index, layer in enumerate(self.chain)
            ),
            weight_in_data=self.weight_in_data,
            statistics=any(b.is_floating_point() for m in self.net.modules() for b in running(m)),
            clip=self.spec.clip is not None,
            cuttable=self.cuttable,
            tied=tuple((self.names[key], tuple(at)) for key, at in owners.items() if len(at) > 1),
            norms=tuple(map(len, self.norms)),
            unkeyed=self.keyed.unkeyed,
            splits=self.splits,
            shares=letters(self.chain),
            tokens=self.tokens,
            modules=tuple(n for n, m in self.net.named_modules() if any(True for _ in m.parameters(recurse=False))),
        )


def make_task(
    spec: TaskSpec, objects: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, plain: bool = False
) -> Task:
    """Build the task; `plain` leaves its own dropout and batch norms alone. Raises TaskError for what does not fit."""
    recipe = from_objects(objects or {}) if spec.live else from_file(spec.network) if spec.own_file else _zoo(spec)
    seed_everything(spec.seed)
    net = _build_net(recipe).to(dtype)
    train, test, validation, notes = _sources(spec, recipe, dtype)
    if not any(module.training for module in net.modules()):
        net.train()
    draw, names = Draw(spec.seed), {id(p): name for name, p in net.named_parameters()}
    count = min(train.batch, 8)
    batch = train.share(0, 0, count)
    text = _data_name(spec)
    recipe = replace(recipe, tokens=text is not None and is_text(text))
    try_forward(net, recipe, batch, _in_memory(text) if text else None)
    least = 1 if plain else _least(net, recipe, train, spec)
    if spec.bn_group and not plain:
        group_norms(net, spec.bn_group, draw, recipe.name)
    keyed = Keyed() if plain else _key(net, draw, recipe, train, count)
    chain, cuttable = layers_of(net, recipe)
    spread = not isinstance(net, nn.Sequential) or "stages" in recipe.own
    task = Task(spec, recipe, net, chain, cuttable, train, test, validation, dtype, draw, keyed, notes, spread, names)
    task.least = least
    draw.at(0, 0, count)
    if len(chain) > 1 or "stages" in recipe.own:
        task.altering = check_composition(net, recipe, chain, task.call, names, batch)
    if spec.bn_group == train.batch and not plain:
        task.norms = _whole_norms(task, batch, count)
    if not plain:
        draw.at(0, 0, count)
        labels = None if "loss" in recipe.own else _targets(batch)
        trial = watch(net, chain, task.call, recipe.inputs(batch), draw)
        task.splits = found(net, trial, labels)
        task.tokens = find_tokens(trial, task.splits)
    task.weight_in_data = "loss" in recipe.own or any(t.is_floating_point() for t in leaves(_targets(batch)))
    return task


def _targets(batch: Nest) -> Nest:
    return batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else ()


def _key(net: nn.Module, draw: Draw, recipe: Recipe, source: Source, count: int) -> Keyed:
    """Key the network's randomness, and leave its statistics as they were."""

    def run(samples: int) -> Tensor:
        draw.at(0, 0, samples)
        with resting(net) if samples < count else nullcontext():  # of fewer samples only the shapes matter
            return try_loss(net, recipe, source.share(0, 0, samples))

    before = [b.clone() for b in net.buffers()]
    keyed = key_randomness(net, draw, run, count)
    for buffer, old in zip(net.buffers(), before, strict=True):
        buffer.copy_(old)
    return keyed


def _whole_norms(task: Task, batch: Nest, samples: int) -> list[list[int]]:
    """Of each layer, its batch norms in the order of a forward: replicas add up their sums, one after the other."""
    x, sizes = task.recipe.inputs(map_nest(batch, Tensor.clone)), []
    task.draw.at(0, 0, samples)
    with counting(task.net, GroupedNorm) as count:
        for layer in task.chain:
            x = task.call(layer, x)
            sizes.append(count.sizes)
            count.sizes = []
    return sizes


def _least(net: nn.Module, recipe: Recipe, source: Source, spec: TaskSpec) -> int:
    least = least_samples(net, recipe, source.share(0, 0, 1))
    for name, size in (("batch", source.batch), ("bn_group", spec.bn_group or least)):
        if size < least:
            raise TaskError(f"{name}={size}: batch norm in {recipe.name} needs at least {least} samples at once")
    return least


def _zoo(spec: TaskSpec) -> Recipe:
    return Recipe(spec.network, lambda: build(spec.network, spec.seed))


def _build_net(recipe: Recipe) -> nn.Module:
    try:
        net = recipe.net()
    except TaskError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"{recipe.name}: net() failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(net, nn.Module):
        raise TaskError(f"{recipe.name}: net() must return an nn.Module, not {type(net).__name__}")
    return net


def _sources(
    spec: TaskSpec, recipe: Recipe, dtype: torch.dtype
) -> tuple[Source, Source | None, Source | None, list[str]]:
    """(training, test, validation) streams and what the report must say about them."""
    text = _data_name(spec)
    if text:
        data = _in_memory(text)
        arrays, held = data.train, None
        if spec.validation:
            arrays, held = _parted(text, spec.validation, spec.seed)
        batch = spec.batch or DEFAULT_BATCH
        return (
            ArraySource(arrays, batch, spec.seed, dtype),
            ArraySource(data.test, batch, spec.seed, dtype, shuffled=False) if data.test else None,
            ArraySource(held, batch, spec.seed, dtype, shuffled=False) if held else None,
            [],
        )
    if spec.validation:
        raise TaskError("validation splits data in memory (--data); batches() of your own must be split in your file")
    if "batches" in recipe.own:
        return StreamSource(recipe.own["batches"], spec.batch, spec.seed, dtype), None, None, []
    if "example" in recipe.own:
        note = "trained on one example batch, repeated: times are real, the loss curve means nothing"
        return StreamSource(lambda: [recipe.own["example"]()], spec.batch, spec.seed, dtype), None, None, [note]
    raise TaskError(f"{recipe.name} has no data: define batches() or example() in it, or add --data")


def _data_name(spec: TaskSpec) -> str | None:
    """The data set in memory that a task trains on, if it is one. Text comes in windows as long as gpt's context."""
    text = spec.data or (None if spec.live or spec.own_file else "mnist")
    family, _, options = spec.network.partition(":")
    if text and is_text(text) and family == "gpt" and not spec.live:
        return in_windows_of(text, shape_of(options).context)
    return text


def keep_data(spec: TaskSpec) -> None:
    """Have the samples in memory now."""
    if (text := _data_name(spec)) is not None:
        _in_memory(text)


@lru_cache(maxsize=2)
def _in_memory(text: str) -> data_module.Data:
    """Every plan of a rank trains on the same samples, so they are read once."""
    return data_module.load(text)


@lru_cache(maxsize=2)
def _parted(text: str, fraction: float, seed: int) -> tuple[data_module.Arrays, data_module.Arrays]:
    return data_module.hold_out(_in_memory(text).train, fraction, seed)


def layers_of(net: nn.Module, recipe: Recipe) -> tuple[list[nn.Module], str]:
    """(layers in order, why they cannot be split or "")."""
    method = getattr(net, "stages", None)
    parts = recipe.ask("stages", net) if "stages" in recipe.own else method() if callable(method) else None
    if parts is not None:
        parts = list(parts)
        odd = [type(part).__name__ for part in parts if not isinstance(part, nn.Module)]
        if odd or not parts:
            raise TaskError(f"{recipe.name}: stages must be a list of nn.Modules, found {', '.join(odd) or 'none'}")
        return parts, ""
    if isinstance(net, nn.Sequential):
        return list(_flat(net)), ""
    why = f"{type(net).__name__} is no nn.Sequential and has no stages(net), so its layers cannot be split"
    return [net], why


def _flat(net: nn.Sequential) -> Iterator[nn.Module]:
    """Layers in order; one that works in place stays with the layer in front, whose output it alters."""
    held: nn.Module | None = None
    for layer in net:
        for part in _flat(layer) if isinstance(layer, nn.Sequential) else (layer,):
            if held is not None and getattr(part, "inplace", False):
                held = nn.Sequential(held, part)
            else:
                if held is not None:
                    yield held
                held = part
    if held is not None:
        yield held
