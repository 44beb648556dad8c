"""Where ranks that share layers can share the tokens between them, too, found from the forward that showed the layers.

Between two splits most networks work on every token by itself: layer-norm, dropout, adding to the residual stream.
There a rank can keep its own part of the tokens (Korthikanti et al. 2022). The tensors are (samples, tokens, width), or
without the samples; what has no tokens is the same for all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from paraxis.program.shares import MEETS, Split, Tokens, chosen
from paraxis.task.randomness import KeyedDropout
from paraxis.task.tensor import ELEMENTWISE, Step, Trial

PLAIN = ELEMENTWISE | {"contiguous", "clone", "to", "float", "double", "detach"}


def find_tokens(trial: Trial | None, splits: Sequence[Split]) -> tuple[Tokens, ...]:
    """For every number of ranks that divides the tokens and any of the splits, how they share tokens or why not."""
    if trial is None:
        return ()
    size = next((trial.alive[v - 1].shape[1] for v in _entered(trial, splits) if trial.alive[v - 1].ndim == 3), 0)
    usable = [split for split in splits if _fits(trial, split, size)]
    found: dict[tuple[int, ...], list[int]] = {}
    for tp in (n for n in range(2, size + 1) if size % n == 0 and any(split.size % n == 0 for split in splits)):
        fitting = [split for split in usable if split.size % tp == 0]
        own = chosen(tp, fitting) if fitting else ()
        found.setdefault(tuple(splits.index(split) for split in own), []).append(tp)
    return tuple(_shared(trial, splits, n, size, tuple(tps)) for n, tps in (found or {(): []}).items() if size)


class _Ends(Exception):
    """Tokens cannot be apart from a layer on, for a reason."""

    def __init__(self, layer: int, why: str) -> None:
        super().__init__(why)
        self.layer = layer


@dataclass
class _Flow:
    """One look at a forward: which values have a rank's own tokens, if the modules `cuts` take them."""

    trial: Trial
    size: int
    enters: set[str]  # modules that are given all tokens, and make parts of columns, heads or classes
    leaves: set[str]  # modules whose parts make sums
    cuts: set[str]
    apart: set[int] = field(default_factory=set)  # values of one's own tokens
    inside: set[int] = field(default_factory=set)  # values between the first and the last module of a split
    noise: list[tuple[tuple[str, int], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.maker = {value: step for step in self.trial.steps for value in step.gives}

    def follow(self, end: int) -> bool:
        """Through all layers in front of `end`; False if a cut has been added, so that all must be looked at again.

        Raises _Ends.
        """
        before = len(self.cuts)
        for step in (step for step in self.trial.steps if step.layer < end):
            self._see(step)
            for value in step.gives:
                if value in self.apart and self.trial.sized.get(value, end) < end:
                    raise _Ends(self.trial.sized[value], "its shape is asked for")
        return len(self.cuts) == before

    def _see(self, step: Step) -> None:
        named = step.name if step.module is not None else ""
        if named in self.enters or named in self.leaves:
            if named in self.enters:
                self._want(step.takes[0], step)
            (self.apart if named in self.leaves else self.inside).update(step.gives)
        elif self.inside.intersection(step.takes):
            self.inside.update(step.gives)
        elif self.apart.intersection(step.takes):
            if not self._each_by_itself(step):
                raise _Ends(step.layer, f"{step.name} mixes them")
            for value in step.takes:
                self._want(value, step)
            self.noise += [(step.noise, -2)] if step.noise else []
            self.apart.update(step.gives)
        elif named in self.cuts:
            self.apart.update(step.gives)

    def _want(self, value: int, user: Step) -> None:
        """A rank's own tokens of a value, unless it has none: cut them out where its maker makes them."""
        shape = self.trial.alive[value - 1].shape
        if value in self.apart or len(shape) < 2 or shape[-2] == 1:
            return
        maker = self.maker.get(value)
        if maker is None or len(shape) > 3 or shape[-2] != self.size or not self._each_by_itself(maker, new=True):
            raise _Ends(user.layer, f"{maker.name if maker else 'a tensor of no module'} makes all of them")
        if maker.module is not None:
            self.cuts.add(maker.name)
            return
        for taken in maker.takes:
            self._want(taken, maker)

    def _each_by_itself(self, step: Step, new: bool = False) -> bool:
        """Whether it makes every token from the same token of what it takes; `new`: or makes tokens that can be cut."""
        if step.module is not None:
            once = self.trial.calls[step.name] == 1
            return once and (type(step.module) is nn.Linear or (new and type(step.module) is nn.Embedding))
        shapes = [self.trial.alive[value - 1].shape for value in step.gives]
        same = all(1 < len(shape) < 4 and shape[-2] == self.size for shape in shapes)
        return same and (step.noise is not None or step.name in PLAIN or step.dims == 1)


def _shared(trial: Trial, splits: Sequence[Split], numbers: Sequence[int], size: int, tps: tuple[int, ...]) -> Tokens:
    """The longest run of layers from the first on in which tokens can be apart."""
    own = {n: splits[n] for n in numbers}
    end, cuts, why = len(trial.begins) - 1, set[str](), "what it splits works on whole samples"
    last = trial.entries[-1]
    while own:
        names = [_ends_of(split) for split in own.values()]
        flow = _Flow(trial, size, set().union(*(a for a, _ in names)), set().union(*(b for _, b in names)), cuts)
        try:
            if not flow.follow(end):
                continue  # once more, with what has turned out to be cut
            given = trial.entries[end]
            if end == len(trial.begins) - 1 and last in flow.apart:
                raise _Ends(end - 1, "its output has all tokens")
            if given not in flow.inside and given not in flow.apart:
                return Tokens(tps, size, f"{why}, and layer {end} is given more than one tensor of tokens")
            return _told(trial, own, flow, end if end < len(trial.begins) - 1 else -1, size, tps)
        except _Ends as found:
            why, end = f"all {size} tokens are needed from layer {found.layer} on ({found})", found.layer
            cuts = set()
        own = {n: split for n, split in own.items() if _before(trial, split, end)}
    return Tokens(tps, size, f"{why}, and nothing is split before")


def _told(trial: Trial, own: dict[int, Split], flow: _Flow, end: int, size: int, tps: tuple[int, ...]) -> Tokens:
    beyond = trial.clock + 1  # the place of the loss, whose parts stay sums
    meets = [(a, b, word if b == beyond else MEETS[word]) for split in own.values() for a, b, word in split.meets]
    meets += [(end, trial.begins[end], "gather")] * (end >= 0)
    modules = {step.name: step.module for step in trial.steps if step.module is not None}
    inner = [getattr(modules.get(name), "dropout", None) for split in own.values() for name in _ends_of(split)[1]]
    noise = [*flow.noise, *(((layer.name, 0), -2) for layer in inner if isinstance(layer, KeyedDropout))]
    return Tokens(tps, size, "", tuple(own), tuple(meets), tuple(sorted(flow.cuts)), end, tuple(noise))


def _ends_of(split: Split) -> tuple[set[str], set[str]]:
    """The modules of a forward that are given all tokens, and those that make sums."""
    if split.unit == "heads":
        attention = split.modules[0].rpartition(".")[0]
        return {attention}, {attention}
    if split.unit == "classes":
        return {split.modules[-1]}, set(split.modules[:-1])
    return set(split.modules[:-1]), {split.modules[-1]}


def _steps(trial: Trial, split: Split, part: int) -> list[Step]:
    names = _ends_of(split)[part]
    return [step for step in trial.steps if step.module is not None and step.name in names]


def _entered(trial: Trial, splits: Iterable[Split]) -> list[int]:
    return [step.takes[0] for split in splits for step in _steps(trial, split, 0)]


def _fits(trial: Trial, split: Split, size: int) -> bool:
    """Whether its input has tokens, and all its borders are met in a backward, too."""
    shapes = [trial.alive[value - 1].shape for value in _entered(trial, [split])]
    trained = all(step.trained for step in _steps(trial, split, 0))
    tables = [step.module for step in _steps(trial, split, 1) if isinstance(step.module, nn.Embedding)]
    trained &= all(table.weight.requires_grad for table in tables)
    return trained and all(len(shape) == 3 and shape[1] == size for shape in shapes)


def _before(trial: Trial, split: Split, end: int) -> bool:
    return all(step.layer < end for part in (0, 1) for step in _steps(trial, split, part))
