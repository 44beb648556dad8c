"""The task as every rank holds it: the network with its initial weights, its layers, its data, loss and optimiser."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from paraxis.engine.rules import Hyper, of_optimizer
from paraxis.errors import TaskError
from paraxis.program.lower import Layout
from paraxis.task import data as data_module
from paraxis.task.batches import ArraySource, Nest, Source, StreamSource, leaves, samples, seed_everything
from paraxis.task.networks import build
from paraxis.task.randomness import Draw, Keyed, KeyedFunctions, key_randomness
from paraxis.task.recipe import Recipe, from_file, from_objects
from paraxis.task.spec import DEFAULT_BATCH, TaskSpec

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

    @property
    def batch(self) -> int:
        """Samples in the global batch."""
        return self.train.batch

    @property
    def weight_in_data(self) -> bool:
        """Whether only the loss function knows a batch's weight."""
        return "loss" in self.recipe.own

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
        """`call` with what can be settled beforehand; PyTorch's own layers without hooks take one tensor: forward itself."""
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
            return self.recipe.own["optimizer"](parameters)
        s = self.spec
        if s.optimizer == "sgd":
            return torch.optim.SGD(parameters, s.lr, s.momentum, 0, s.weight_decay, s.nesterov)
        adam = torch.optim.Adam if s.optimizer == "adam" else torch.optim.AdamW
        return adam(parameters, s.lr, weight_decay=s.weight_decay)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """A learning-rate scheduler, stepped once per optimiser step, or None for a constant rate."""
        if "scheduler" in self.recipe.own:
            return self.recipe.own["scheduler"](optimizer)
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
        numbers |= {"momentum": s.momentum, "nesterov": s.nesterov} if s.optimizer == "sgd" else {}
        adamw = s.optimizer == "adamw"
        numbers |= {"betas": (0.9, 0.999), "eps": 1e-8, "decoupled_weight_decay": adamw} if s.optimizer != "sgd" else {}
        groups = [{"params": [p for p in self.net.parameters() if p.requires_grad]} | numbers]
        return Hyper("sgd" if s.optimizer == "sgd" else "adam", groups, factor=self.rate_factor())

    def layout(self) -> Layout:
        """What lowering has to know."""
        owners: dict[int, list[int]] = {}
        for index, layer in enumerate(self.chain):
            for parameter in layer.parameters():
                owners.setdefault(id(parameter), []).append(index)
        return Layout(
            parameters=tuple(sum(p.numel() for p in layer.parameters()) for layer in self.chain),
            weight_in_data=self.weight_in_data,
            statistics=any(b.is_floating_point() for m in self.net.modules() for b in running(m)),
            clip=self.spec.clip is not None,
            cuttable=self.cuttable,
            tied=tuple((at[0], at[-1], self.names[key]) for key, at in owners.items() if at[0] != at[-1]),
        )


def make_task(
    spec: TaskSpec, objects: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, plain: bool = False
) -> Task:
    """Build the task; `plain` leaves the network's own dropout as it is. Raises TaskError for what does not fit."""
    recipe = from_objects(objects or {}) if spec.live else from_file(spec.network) if spec.own_file else _zoo(spec)
    seed_everything(spec.seed)
    net = _build_net(recipe).to(dtype)
    train, test, validation, notes = _sources(spec, recipe, dtype)
    net.train()
    chain, cuttable = layers_of(net, recipe)
    draw = Draw(spec.seed)
    batch = train.share(0, 0, min(train.batch, 8))
    draw.at(0, 0, samples(batch))
    keyed = Keyed(False, (), ())
    _check_fits(spec, net, recipe, batch)
    if not plain:
        keyed = _key(net, draw, recipe, batch)
        chain, cuttable = layers_of(net, recipe)  # its dropouts have been swapped
    names = {id(p): name for name, p in net.named_parameters()}
    spread = not isinstance(net, nn.Sequential) or "stages" in recipe.own
    task = Task(spec, recipe, net, chain, cuttable, train, test, validation, dtype, draw, keyed, notes, spread, names)
    _check_composition(task, batch)
    return task


def _zoo(spec: TaskSpec) -> Recipe:
    return Recipe(spec.network, lambda: build(spec.network, spec.seed))


def _build_net(recipe: Recipe) -> nn.Module:
    try:
        net = recipe.net()
    except TaskError:
        raise
    except Exception as error:
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
            arrays, held = data_module.hold_out(data.train, spec.validation, spec.seed)
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
    """The data set in memory that a task trains on, if it is one."""
    return spec.data or (None if spec.live or spec.own_file else "mnist")


def keep_data(spec: TaskSpec) -> None:
    """Have the samples in memory now."""
    if (text := _data_name(spec)) is not None:
        _in_memory(text)


@lru_cache(maxsize=2)
def _in_memory(text: str) -> data_module.Data:
    """Every plan of a rank trains on the same samples, so they are read once."""
    return data_module.load(text)


def layers_of(net: nn.Module, recipe: Recipe) -> tuple[list[nn.Module], str]:
    """(layers in order, why they cannot be split or "")."""
    stages = recipe.own.get("stages") or (lambda n: n.stages() if callable(getattr(n, "stages", None)) else None)
    parts = stages(net)
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
    for layer in net:
        if isinstance(layer, nn.Sequential):
            yield from _flat(layer)
        else:
            yield layer


def _check_fits(spec: TaskSpec, net: nn.Module, recipe: Recipe, batch: Nest) -> None:
    """Try one forward; the labels of data in memory must be among the network's outputs."""
    inputs = recipe.inputs(batch)
    net.eval()
    try:
        with torch.no_grad():
            output = apply(net, inputs)
    except Exception as error:
        shapes = ", ".join("x".join(map(str, t.shape[1:])) or "scalar" for t in leaves(inputs))
        wanted = f"{recipe.name} cannot take samples of shape {shapes}"
        raise TaskError(f"{wanted}: {type(error).__name__}: {one_line(error)}; give data whose samples fit") from error
    net.train()
    text = _data_name(spec)
    if text is not None and "loss" not in recipe.own and isinstance(output, Tensor) and output.ndim == 2:
        data_module.check_fits(_in_memory(text), output.shape[1], None, recipe.name)


def _key(net: nn.Module, draw: Draw, recipe: Recipe, batch: Nest) -> Keyed:
    before = {id(b): b.clone() for b in net.buffers()}
    keyed = key_randomness(net, draw, lambda: apply(net, recipe.inputs(batch)))
    for buffer in net.buffers():
        buffer.copy_(before.get(id(buffer), buffer))
    return keyed


def _check_composition(task: Task, batch: Nest) -> None:
    """The user's stages must compose to the network (compared in eval mode, so that nothing random differs)."""
    if len(task.chain) < 2 and "stages" not in task.recipe.own:
        return
    task.net.eval()
    with torch.no_grad():
        whole = apply(task.net, task.recipe.inputs(batch))
        x = task.recipe.inputs(batch)
        for layer in task.chain:
            x = task.call(layer, x)
    task.net.train()
    _restore_eval(task)
    pairs = list(zip(leaves(whole), leaves(x), strict=False))
    same = len(leaves(whole)) == len(leaves(x)) and all(a.shape == b.shape for a, b in pairs)
    worst = max((float((a - b).abs().max()) for a, b in pairs if a.is_floating_point()), default=0.0) if same else 0.0
    scale = max((float(a.abs().max()) for a, _ in pairs if a.is_floating_point()), default=1.0)
    if not same or worst > 1e-4 * max(scale, 1e-30):
        raise TaskError(f"{task.recipe.name}: its stages do not compose to net: the outputs differ by {worst:.2g}")
    used = {id(p) for layer in task.chain for p in layer.parameters()}
    lost = [name for key, name in task.names.items() if key not in used]
    if lost:
        raise TaskError(f"{task.recipe.name}: parameter {lost[0]} of net is in none of its stages")


def _restore_eval(task: Task) -> None:
    """Modules whose randomness is switched off stay in eval mode."""
    modules = dict(task.net.named_modules())
    for text in task.keyed.switched_off:
        modules[text.rpartition(" (")[0]].eval()


def running(module: nn.Module) -> list[Tensor]:
    """The running statistics that a module changes in its forward: those of normalisation layers."""
    norm = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    return list(module.buffers(recurse=False)) if norm else []


def apply(module: Callable[..., Any], x: Any) -> Any:
    """module(x), module(*x) or module(**x)."""
    if isinstance(x, dict):
        return module(**x)
    return module(*x) if isinstance(x, (tuple, list)) else module(x)


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300]
