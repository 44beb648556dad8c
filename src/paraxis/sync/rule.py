"""What a synchronisation rule is, how it is written in a plan (`diloco@50:int8:fragments=4`), and which ones there are.

A file of this folder with a `RULE` is one. Nothing here knows of ranks, engines or transports: a rule says as plain
data which updates and reductions follow a step, and passes make instructions of that.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import paraxis.sync as package
from paraxis.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

PAYLOADS = ("bf16", "int8")
Options = dict[str, str | int]


@dataclass(frozen=True)
class Do:
    """What follows a step on every replica: `Update` of a rule, or `AllReduce` of a buffer over the replicas, or one
    end of it (`AllReduceStart`, and `AllReduceWait` after a later step of the same period).

    `payload`: what the reduced elements travel as ("": as they are). `bucket`: the fragment meant (-1: everything).
    """

    op: str
    rule: str = ""
    buffer: str = ""
    reduction: str = ""
    payload: str = ""
    bucket: int = -1


@dataclass(frozen=True)
class Rule:
    """One way to agree, named after its paper.

    A rule with `agreements` trains replicas apart: (every, **options) -> what follows which steps (1 to `every`) of a
    period, or PlanError. One with `gradients` lists instead what makes the replicas' gradients one in every step.
    `options`: names and defaults. `buffers` are kept beside the parameters, as long as they and zero at first.
    `updates` are pure functions of flat tensors, alike in size, whose parameters are named after the buffers.

    The other side of the proof is plain code written apart from the updates: `emulate(replicas, every, **options)` gets
    each replica's parameters by name before training, and goes on after every step; `emulate_sum(parts)` makes one
    gradient of the replicas' own.
    """

    name: str
    paper: str
    options: Mapping[str, str | int] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    updates: tuple[Callable[..., None], ...] = ()
    prologue: tuple[Do, ...] = ()
    gradients: tuple[Do, ...] = ()
    agreements: Callable[..., dict[int, list[Do]]] | None = None
    epilogue: tuple[Do, ...] = ()
    emulate: Callable[..., Iterator[None]] | None = None
    emulate_sum: "Callable[[list[Tensor]], Tensor] | None" = None


@dataclass(frozen=True)
class Sync:
    """A rule as a plan asks for it; `every` in steps, 0: an epoch's."""

    rule: Rule
    every: int
    options: Options

    def text(self) -> str:
        """The shortest text that `parse` reads so."""
        when = f"@{self.every or 'epoch'}" if self.rule.agreements else ""
        chosen = {key: value for key, value in self.options.items() if value != self.rule.options[key]}
        words = (str(value) if key == "payload" else f"{key}={value}" for key, value in chosen.items())
        return ":".join([self.rule.name + when, *words])

    @property
    def payload(self) -> str:
        """What reduced elements travel as, where not as they are."""
        every = [*self.rule.gradients, *(do for own in self.agreements(1 << 30).values() for do in own)]
        return next((do.payload for do in every if do.payload), "")

    @property
    def fragments(self) -> int:
        """Into how many parts the parameters are cut, to agree at different steps."""
        return int(self.options.get("fragments", 1))

    def agreements(self, every: int) -> dict[int, list[Do]]:
        """What follows which steps of a period of `every`; raises PlanError for a period that is too short."""
        return self.rule.agreements(every, **self.options) if self.rule.agreements else {}

    def meets(self, every: int) -> list[int]:
        """After which steps of a period replicas agree on something."""
        return [at for at, steps in self.agreements(every).items() if agree(steps)]


def agree(steps: Iterable[Do]) -> bool:
    """Whether replicas agree on something with these, and do not only begin to."""
    return any(do.op in ("AllReduce", "AllReduceWait") for do in steps)


@cache
def rules() -> dict[str, Rule]:
    """All rules by name."""
    files = (import_module(f"{package.__name__}.{file.name}") for file in iter_modules(package.__path__))
    return {file.RULE.name: file.RULE for file in files if hasattr(file, "RULE")}


@cache
def updates() -> dict[str, tuple[Callable[..., None], tuple[str, ...]]]:
    """Of every update by name: its function, and the buffers that it takes."""
    return {f.__name__: (f, tuple(signature(f).parameters)) for rule in rules().values() for f in rule.updates}


@cache
def buffers() -> frozenset[str]:
    """Names of all buffers that some rule keeps beside the parameters."""
    return frozenset(name for rule in rules().values() for name in rule.buffers)


@lru_cache(maxsize=256)
def parse(text: str) -> Sync | None:
    """The rule that a plan names, None for `gradient` and `hogwild`, which need none; raises PlanError."""
    if text in ("gradient", "hogwild"):
        return None
    head, *words = text.split(":")
    name, at, every = head.partition("@")
    rule = rules().get(name)
    if rule is None or bool(at) != bool(rule.agreements) or (at and every != "epoch" and not _counts(every)):
        forms = ", ".join(f"{known}{'@H' * bool(rules()[known].agreements)}" for known in sorted(rules()))
        raise PlanError(f"sync={text}: it takes gradient, {forms} or hogwild, with H steps or H=epoch")
    options: Options = dict(rule.options)
    given = [_option(rule, text, word) for word in words]
    if len(dict(given)) < len(given):
        raise PlanError(f"sync={text} gives an option twice")
    found = Sync(rule, 0 if not at or every == "epoch" else int(every), options | dict(given))
    found.agreements(found.every or 1 << 30)
    return found


def settled(text: str, steps: int, every: int) -> bool:
    """Whether replicas that agree so, with a period of `every`, have the same weights after so many steps."""
    sync = parse(text)
    return sync is None or (steps % every == 0 and len(sync.agreements(every)) < 2)


def _counts(word: str) -> bool:
    return word.isdecimal() and int(word) >= 1


def _option(rule: Rule, text: str, word: str) -> tuple[str, str | int]:
    key, equals, value = word.partition("=")
    if not equals and word in PAYLOADS and "payload" in rule.options:
        return "payload", word
    if equals and key != "payload" and key in rule.options and _counts(value):
        return key, int(value)
    known = [word for word in PAYLOADS if "payload" in rule.options]
    known += [f"{key}=N" for key in rule.options if key != "payload"]
    raise PlanError(f"sync={text}: {word!r} is no option; {rule.name} takes {', '.join(known) or 'none'}")


def fragment_of(sizes: Mapping[str, int], fragments: int) -> dict[str, int]:
    """Of every parameter (name -> elements, in the network's order): the fragment in which its middle lies."""
    total, at, found = max(sum(sizes.values()), 1), 0, {}
    for name, size in sizes.items():
        found[name] = min((2 * at + size) * fragments // (2 * total), fragments - 1)
        at += size
    return found
