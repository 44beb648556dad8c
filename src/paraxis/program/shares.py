"""Which parts of a network the ranks of a `tp` group share, and what is left whole on each (Shoeybi et al. 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paraxis.errors import PlanError


@dataclass(frozen=True)
class Split:
    """Modules of a network that belong together: each of several ranks can have an equal part of their `size` units.

    `meets` are what ranks then meet for: (layer of the chain, place in the order of a forward, word of the border).
    `span` is the first and the last layer of the chain that have a part in it. `noise`: dropout of tensors that are
    split with it, as (which call of which module, the dimension that is split).
    """

    unit: str  # "columns", "heads", "classes" or "words"
    size: int
    modules: tuple[str, ...]
    meets: tuple[tuple[int, int, str], ...]
    span: tuple[int, int]
    noise: tuple[tuple[tuple[str, int], int], ...] = ()

    def label(self) -> str:
        """`1+3 by 1024 columns`."""
        return f"{'+'.join(self.modules)} by {self.size} {self.unit}"


def split_of(document: dict[str, Any]) -> Split:
    """A split from what JSON has made of its fields."""
    meets = tuple((layer, place, word) for layer, place, word in document["meets"])
    noise = tuple(((name, number), dim) for (name, number), dim in document["noise"])
    first, last = document["span"]
    return Split(document["unit"], document["size"], tuple(document["modules"]), meets, (first, last), noise)


MEETS = {"grad": "gather", "act": "scatter"}  # what becomes of a split's borders where ranks share tokens, too


@dataclass(frozen=True)
class Tokens:
    """How ranks that share `splits` (by number) also share the tokens between them (Korthikanti et al. 2022).

    For each of these `tps`, unless there is a reason `why` not. A sample has `size` tokens, in the dimension in front
    of the last. `meets` are all that ranks then meet for, as in a Split. Of what the modules `cuts` make, every rank
    takes its own tokens; layer `end` of the chain (-1: none) is given all of them, and what it makes no rank shares.
    `noise` as in a Split: dropout of a rank's own tokens.
    """

    tps: tuple[int, ...]
    size: int
    why: str = ""
    splits: tuple[int, ...] = ()
    meets: tuple[tuple[int, int, str], ...] = ()
    cuts: tuple[str, ...] = ()
    end: int = -1
    noise: tuple[tuple[tuple[str, int], int], ...] = ()


def tokens_of(document: dict[str, Any]) -> Tokens:
    """From what JSON has made of its fields."""
    lists: dict[str, Any] = {key: tuple(document[key]) for key in ("tps", "splits", "cuts")}
    lists["meets"] = tuple((layer, place, word) for layer, place, word in document["meets"])
    lists["noise"] = tuple(((name, number), dim) for (name, number), dim in document["noise"])
    return Tokens(**(document | lists))


def sharing(tp: int, splits: Sequence[Split], tokens: Sequence[Tokens]) -> Tokens:
    """How `tp` ranks share tokens; raises PlanError where they cannot."""
    chosen(tp, splits)
    if not tokens:
        raise PlanError(
            "sequence=1: nothing of what tp splits has (samples, tokens, width); leave it out, as for mlp and cnn"
        )
    known = next((own for own in tokens if tp in own.tps), None)
    if known is None:
        fitting = ", ".join(f"tp={n}" for n in sorted(n for own in tokens for n in own.tps if not own.why))
        raise PlanError(f"sequence=1: tp={tp} does not divide its {tokens[0].size} tokens; {fitting or 'none'} would")
    if known.why:
        raise PlanError(f"sequence=1: {known.why}; leave it out")
    return known


def chosen(tp: int, splits: Sequence[Split]) -> tuple[Split, ...]:
    """The splits that `tp` ranks share; a module that two of them want goes to the first. Raises PlanError for none."""
    taken: set[str] = set()
    found = []
    for split in splits:
        if split.size % tp == 0 and not taken & set(split.modules):
            found.append(split)
            taken |= set(split.modules)
    if not found:
        raise PlanError(f"tp={tp}: {_why_none(tp, splits)}; dp takes any network")
    return tuple(found)


def _why_none(tp: int, splits: Sequence[Split]) -> str:
    if not splits:
        return (
            "none of its layers can be split: it has no two nn.Linear with only elementwise functions between them, no "
            "attention of gpt's and not enough classes"
        )
    sizes = ", ".join(split.label() for split in splits[:4]) + ", ..." * (len(splits) > 4)
    fitting = sorted({n for split in splits for n in range(2, split.size + 1) if split.size % n == 0})
    shown = ", ".join(f"tp={n}" for n in fitting[:6]) + " ..." * (len(fitting) > 6)
    return f"it divides none of {sizes}; {shown or 'nothing'} would fit"


def words_of(splits: Sequence[Split | Tokens], layers: int) -> tuple[tuple[str, ...], ...]:
    """Of each layer of the chain, the words of the borders in it."""
    ordered = sorted((place, layer, word) for split in splits for layer, place, word in split.meets)
    return tuple(tuple(word for _, layer, word in ordered if layer == own) for own in range(layers))


def told(tp: int, splits: Sequence[Split], modules: Sequence[str], tokens: Sequence[Tokens] | None = None) -> str:
    """A sentence: what is split, and which modules every rank has whole; with `tokens`, whose tokens it shares."""
    own, plan = chosen(tp, splits), f"tp={tp}"
    if tokens is not None:
        along = sharing(tp, splits, tokens)
        own, plan = tuple(splits[n] for n in along.splits), f"{plan},sequence=1"
    taken = {name for split in own for name in split.modules}
    left = [name or "the network" for name in modules if name not in taken]
    each = f"; every rank has all of {', '.join(_runs(left))}" if left else ""
    each += f", for {along.size // tp} of {along.size} tokens" if tokens is not None else ""
    return f"{plan} splits {', '.join(split.label() for split in own)}{each}"


def _runs(names: Sequence[str]) -> list[str]:
    """At most eight names, and how many more there are."""
    return [*names[:8], *[f"{len(names) - 8} more"] * (len(names) > 8)]
