"""What of a network several ranks can share, found from the module: one forward shows where its tensors flow.

A pair is an nn.Linear whose input comes from other nn.Linears through nothing but elementwise functions: those may be
split by columns and it by rows. So may the heads of gpt's attention, and the classes of a last nn.Linear.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paraxis.program.shares import Split
from paraxis.task.batches import Nest, map_nest
from paraxis.task.randomness import Call, Draw
from paraxis.task.shared import heads_of

LEAST_CLASSES = 64  # below it, adding up the gradient of a last layer's input costs more than the layer
NAMES = (
    "relu relu_ relu6 gelu silu mish sigmoid sigmoid_ tanh tanh_ elu elu_ selu selu_ celu celu_ leaky_relu leaky_relu_ "
    "softplus softsign logsigmoid hardtanh hardtanh_ hardswish hardsigmoid tanhshrink softshrink hardshrink threshold "
    "mul mul_ __mul__ __rmul__ add add_ __add__ __radd__ sub sub_ __sub__ div div_ __truediv__ neg abs square exp clamp"
)
NORMS = ("layer_norm", "rms_norm")
ELEMENTWISE = frozenset(NAMES.split())  # what makes an element of its output of those at its place in its inputs


@dataclass
class Step:
    """One function or module of the trial: which values it took and gave, by their numbers."""

    name: str  # of the function; of a module its name in the network
    takes: list[int]
    gives: list[int]
    module: nn.Module | None = None
    noise: Call | None = None
    layer: int = 0
    begun: int = 0
    ended: int = 0
    trained: bool = False  # its input needs a gradient
    dims: int = 0  # over how many dimensions it normalises


@dataclass
class Trial(TorchFunctionMode):
    """Writes down the steps of a forward; within a module that is looked at as a whole, none but its own."""

    names: dict[int, str]  # id(module) -> name
    whole: set[int]  # ids of the modules that are looked at as a whole
    layer: int = 0
    steps: list[Step] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    elsewhere: set[int] = field(default_factory=set)  # ids of parameters that are used outside of their modules
    clock: int = 0
    inside: list[Step] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)  # so that ids stay theirs
    sized: dict[int, int] = field(default_factory=dict)  # values whose shape is asked for -> in which layer
    entries: list[int] = field(default_factory=list)  # what each layer of the chain is given, and what it ends with ...
    begins: list[int] = field(default_factory=list)  # ... at which place

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Every function on tensors."""
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            name = getattr(func, "__name__", "?")
            if name == "size" or func == Tensor.shape.__get__:  # type: ignore[attr-defined]
                self.sized.setdefault(self.number(args[0]), self.layer)
            self.note(name, (args, kwargs or {}), out, dims=_dims(name, args, kwargs or {}))
        return out

    def note(self, name: str, given: Any, made: Any, **more: Any) -> None:
        """Keep a step, unless it makes no tensor."""
        taken, gives = _tensors(given), _tensors(made)
        self.elsewhere |= {id(t) for t in taken if isinstance(t, nn.Parameter)}
        if not gives:
            return
        step = Step(name, [self.number(t) for t in taken], [], **({"layer": self.layer} | more))
        step.gives = [self.number(t, fresh=True) for t in gives]
        self.steps.append(step)

    def number(self, t: Tensor, fresh: bool = False) -> int:
        """Of a value; what has been changed in place is another one."""
        if fresh or id(t) not in self.numbers:
            self.alive.append(t)
            self.numbers[id(t)] = len(self.alive)
        return self.numbers[id(t)]

    def arrive(self, x: Any) -> None:
        """Between two layers, at either end of all: a single tensor, or 0."""
        self.entries.append(self.number(x) if isinstance(x, Tensor) else 0)
        self.begins.append(self.clock)

    def enter(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """A hook in front of a module."""
        name = self.names[id(module)]
        self.calls[name] = self.calls.get(name, 0) + 1
        self.clock += 1
        if id(module) in self.whole:
            trained = any(t.requires_grad for t in _tensors(given))
            self.inside.append(Step(name, [], [], module, None, self.layer, self.clock, 0, trained))

    def leave(self, module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        """A hook behind a module."""
        self.clock += 1
        if id(module) in self.whole:
            begun = self.inside.pop()
            if not self.inside:
                same = {"module": module, "layer": self.layer, "begun": begun.begun, "ended": self.clock}
                self.note(begun.name, given, made, trained=begun.trained, **same)

    def dropout(self, draw: Draw) -> Callable[[Tensor, float, str], Tensor]:
        """In the place of a draw's dropout: the same, seen as one step."""
        real = draw.dropout

        def dropout(x: Tensor, p: float, name: str) -> Tensor:
            self.inside.append(Step("dropout", [], []))
            out = real(x, p, name)
            self.inside.pop()
            if not self.inside and out is not x:
                self.note("dropout", x, out, noise=(name, draw.calls[name]))
            return out

        return dropout


def watch(
    net: nn.Module, chain: list[nn.Module], call: Callable[[nn.Module, Any], Any], inputs: Nest, draw: Draw
) -> Trial | None:
    """A forward of `inputs`, written down; None where nothing could be split."""
    linear = [m for m in net.modules() if type(m) is nn.Linear]
    if len(linear) < 2 and all(m.out_features < LEAST_CLASSES for m in linear):
        return None
    whole = {id(m) for m in net.modules() if type(m) in (nn.Linear, nn.Embedding) or heads_of(m)}
    trial = Trial({id(m): name for name, m in net.named_modules()}, whole)
    before = [b.clone() for b in net.buffers()]
    with ExitStack() as stack:
        for module in net.modules():
            stack.callback(module.register_forward_pre_hook(trial.enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(trial.leave).remove)
        vars(draw)["dropout"] = trial.dropout(draw)
        stack.callback(vars(draw).pop, "dropout")
        x: Any = map_nest(inputs, Tensor.clone)
        for trial.layer, layer in enumerate(chain):
            trial.arrive(x)
            with trial:
                x = call(layer, x)
        trial.arrive(x)
    for buffer, old in zip(net.buffers(), before, strict=True):
        buffer.copy_(old)
    return trial


def found(net: nn.Module, trial: Trial | None, labels: Any) -> tuple[Split, ...]:
    """All that can be split, in the order of the forward; `labels` are those of the default loss, else None.

    Pairs may overlap: whoever chooses takes the first of two.
    """
    if trial is None:
        return ()
    seen = _Found(net, trial)
    return (*seen.by_columns(), *seen.by_heads(), *seen.by_classes(labels))


def find(
    net: nn.Module, chain: list[nn.Module], call: Callable[[nn.Module, Any], Any], inputs: Nest, draw: Draw, labels: Any
) -> tuple[Split, ...]:
    """All that can be split of a network, tried out."""
    return found(net, watch(net, chain, call, inputs, draw), labels)


class _Found:
    """What a trial has shown."""

    def __init__(self, net: nn.Module, trial: Trial) -> None:
        owners: dict[int, int] = {}
        for module in net.modules():
            for p in module.parameters(recurse=False):
                owners[id(p)] = owners.get(id(p), 0) + 1
        self.net, self.trial, self.owners = net, trial, owners
        self.maker = {value: step for step in trial.steps for value in step.gives}
        self.users: dict[int, list[Step]] = {}
        for step in trial.steps:
            for value in step.takes:
                self.users.setdefault(value, []).append(step)

    def free(self, step: Step, kind: type[nn.Module] = nn.Linear, owners: int = 1) -> bool:
        """Whether a module may be split: it is called once, nobody watches it or uses its parameters otherwise."""
        m = step.module
        if type(m) is not kind or self.trial.calls[step.name] != 1 or not step.name:
            return False
        own = list(m.parameters(recurse=False))
        hooks = (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        watched = any(not getattr(hook, "__module__", "").startswith("paraxis.") for hook in hooks)
        plain = {"weight", "bias"} >= dict(m.named_parameters()).keys() and not watched
        return plain and all(self.owners[id(p)] == owners and id(p) not in self.trial.elsewhere for p in own)

    def by_columns(self) -> Iterable[Split]:
        """Pairs, or several first layers of one second (gates)."""
        for second in self.trial.steps:
            if not self.free(second):
                continue
            inner: list[Step] = []
            firsts = self._firsts(second.takes[0], [second], inner)
            if not firsts:
                continue
            firsts.sort(key=lambda step: step.begun)
            meets = [(step.layer, step.begun, "grad") for step in firsts if step.trained]
            meets.append((second.layer, second.ended, "act"))
            noise = tuple((step.noise, -1) for step in inner if step.noise)
            names = (*(step.name for step in firsts), second.name)
            width: Any = second.module.in_features  # type: ignore[union-attr]
            yield Split("columns", width, names, tuple(meets), (firsts[0].layer, second.layer), noise)

    def _firsts(self, value: int, users: list[Step], inner: list[Step]) -> list[Step]:
        """The layers from which a value comes elementwise, if all that is made on the way is used for it alone."""
        queue, firsts = [value], []
        while queue:
            value = queue.pop()
            maker = self.maker.get(value)
            if maker is None:
                return []
            if maker in inner or maker in firsts:
                continue
            if maker.module is not None:
                if not self.free(maker):
                    return []
                firsts.append(maker)
            elif maker.noise or (maker.name in ELEMENTWISE and self._alike(maker)):
                inner.append(maker)
                queue += maker.takes
            else:
                return []
        inside = [*inner, *users]
        made = [value for step in (*firsts, *inner) for value in step.gives]
        return firsts if all(user in inside for value in made for user in self.users.get(value, [])) else []

    def _alike(self, step: Step) -> bool:
        """Whether nothing is spread over a dimension: an element of the output comes from those at its own place."""
        shapes = {self.trial.alive[value - 1].shape for value in (*step.takes, *step.gives)}
        return len(shapes) == 1

    def by_heads(self) -> Iterable[Split]:
        """Attentions that know how many heads they have from their first layer."""
        for step in self.trial.steps:
            heads = heads_of(step.module) if step.module is not None else 0
            own = list(step.module.parameters()) if step.module is not None else []
            if not heads or self.trial.calls[step.name] != 1 or any(self.owners[id(p)] > 1 for p in own):
                continue
            grads = [(step.layer, step.begun, "grad")] * step.trained
            names = f"{step.name}.c_attn", f"{step.name}.c_proj"
            noise = (((step.name, 0), -3),)
            meets = (*grads, (step.layer, step.ended, "act"))
            yield Split("heads", heads, names, meets, (step.layer, step.layer), noise)

    def by_classes(self, labels: Any) -> Iterable[Split]:
        """A last layer, with the embedding whose weight it may share."""
        made, last = self.trial.entries[-1], len(self.trial.entries) - 2
        head = self.maker.get(made)
        if head is None or not isinstance(labels, Tensor):
            return
        output = self.trial.alive[made - 1]
        if output.shape[:-1] != labels.shape:
            return
        ends = (last, self.trial.clock + 1, "act")
        grads = [(head.layer, head.begun, "grad")] * head.trained
        if self.free(head) and output.shape[-1] >= LEAST_CLASSES:
            yield Split("classes", output.shape[-1], (head.name,), (*grads, ends), (head.layer, last))
        if not self.free(head, owners=2) or output.shape[-1] < LEAST_CLASSES:
            return
        weight = head.module.weight  # type: ignore[union-attr]
        for step in self.trial.steps:
            plain = step.module is not None and _plain(step.module)
            if plain and self.free(step, nn.Embedding, 2) and step.module.weight is weight:  # type: ignore[union-attr]
                meets = ((step.layer, step.ended, "act"), *grads, ends)
                yield Split("classes", output.shape[-1], (step.name, head.name), meets, (head.layer, last))


def _plain(module: nn.Module) -> bool:
    """Whether an embedding is a mere table."""
    return all(not getattr(module, key, None) for key in ("max_norm", "scale_grad_by_freq", "sparse")) and (
        getattr(module, "padding_idx", None) is None
    )


def _dims(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Over how many dimensions a function normalises; 0: over none."""
    if name not in NORMS:
        return 0
    return len(kwargs["normalized_shape"] if "normalized_shape" in kwargs else args[1])


def _tensors(nest: Any) -> list[Tensor]:
    """All tensors in tuples, lists and dicts."""
    if isinstance(nest, Tensor):
        return [nest]
    inside = nest.values() if isinstance(nest, dict) else nest if isinstance(nest, (tuple, list)) else ()
    return [t for item in inside for t in _tensors(item)]
