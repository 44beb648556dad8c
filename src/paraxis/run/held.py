"""What a rank really holds while it trains, counted: the check of what `program.memory` computes.

Hooks see what autograd saves and when it lets it go; the engine's own stores and what is on its way are looked at after
every instruction. A storage counts once, however many hold it.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraxis.comm.payload import PackedSum
from paraxis.engine.native_engine import extension
from paraxis.engine.native_rank import NativeEngine
from paraxis.program.instructions import SENDS, Instruction
from paraxis.run.interpreter import Rank
from paraxis.run.openmp import Team
from paraxis.task.batches import leaves


class Saved:
    """A tensor that autograd has saved, until it lets go of it."""

    __slots__ = ("book", "tensor")

    def __init__(self, tensor: Tensor, book: dict[int, tuple[int, int]]) -> None:
        self.tensor, self.book = tensor, book
        at, count = _address(tensor), book.get(_address(tensor), (0, 0))[1]
        book[at] = tensor.untyped_storage().nbytes(), count + 1

    def __del__(self) -> None:
        at = _address(self.tensor)
        size, count = self.book[at]
        if count == 1:
            del self.book[at]
        else:
            self.book[at] = size, count - 1


@dataclass
class Watched:
    """A source of samples that writes down where they lie: they are the data's, no activations."""

    source: Any
    seen: set[int]

    def share(self, *words: Any) -> Any:
        """What the source gives."""
        given = self.source.share(*words)
        self.seen |= {_address(t) for t in leaves(given)}
        return given

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


@dataclass
class Count:
    """Bytes that are alive now, by address of their storage, and the most that were at once."""

    rank: Rank
    ignored: set[int]
    saved: dict[int, tuple[int, int]] = field(default_factory=dict)
    sending: dict[int, list[Tensor]] = field(default_factory=dict)
    peak: int = 0

    def watching(self) -> Any:
        """Within this context what autograd saves is written down."""
        return torch.autograd.graph.saved_tensors_hooks(lambda t: Saved(t, self.saved), lambda saved: saved.tensor)

    def look(self) -> None:
        """After an instruction."""
        sizes = {at: size for at, (size, _) in self.saved.items()}
        for t in self._stored():
            sizes[_address(t)] = t.untyped_storage().nbytes()
        shares = self.rank.engine.shares  # which may have made buckets whole for a while
        whole = sum(shares.transient(name) for name in ("params", "grads")) if shares else 0
        self.peak = max(self.peak, whole + sum(size for at, size in sizes.items() if at not in self.ignored))

    def _stored(self) -> Iterable[Tensor]:
        for stage in self.rank.engine.stages.values():
            kept = [light.nest for light in stage.kept.values()]
            if stage.parting is not None:
                kept += [compute.args for computes in stage.parting.kept.values() for compute in computes]
            nests = (stage.stash, stage.arrived, stage.between, stage.leaving, stage.gradients)
            for nest in (*kept, *(own for store in nests for own in store.values())):
                yield from (t for t in leaves(nest) if isinstance(t, Tensor))
        for tensors in self.sending.values():
            yield from tensors
        every: Iterable[Any] = (r for requests in self.rank.context.open.values() for r in requests)
        for request in every:
            if isinstance(request, PackedSum):
                yield from request.letters()
            elif hasattr(request, "tensor"):
                yield request.tensor


@contextmanager
def counting(rank: Rank) -> Any:
    """Count while the rank's bodies run within this context; gives the Count. Slow: for checks, not for timings."""
    engine = rank.engine
    own = [engine.flat.params, engine.flat.grads, engine.running, engine.collected, engine.norm, engine.score]
    modules = [m for stage in engine.stages.values() for segment in stage.segments for m in segment]
    own += [t for m in modules for t in (*m.parameters(), *m.buffers())]
    own += [p.grad for m in modules for p in m.parameters() if p.grad is not None]
    own += list(engine.kept.buffers.values()) if engine.kept else []
    count = Count(rank, {_address(t) for t in own})
    before, source = rank.bodies, engine.source
    engine.source = Watched(source, count.ignored)
    pausing = [stage.pausing for stage in engine.stages.values() if stage.pausing is not None]
    for one in pausing:  # which computes in a thread of its own, where hooks of this one are not heard
        vars(one)["forward"] = partial(_forward, count, one.forward)
    rank.bodies = {
        name: [
            partial(_counted, count, i, act) for i, act in zip(rank.program.body(name)[rank.rank], acts, strict=True)
        ]
        for name, acts in before.items()
    }
    try:
        yield count
    finally:
        rank.bodies, engine.source = before, source
        for one in pausing:
            vars(one).pop("forward")


def _counted(count: Count, i: Instruction, act: Callable[[], None]) -> None:
    if i.starts and i.base in SENDS:
        count.sending[i.token] = list(count.rank.engine.at(i.stage).leaving[i.microbatch])
    with count.watching():
        act()
    if i.waits:
        count.sending.pop(i.token, None)
    count.look()


def _forward(count: Count, begin: Callable[..., None], compute: Callable[[], Any], kind: str = "F") -> None:
    def watched() -> Any:
        with count.watching():
            return compute()

    begin(watched, kind)


def held(rank: Rank, peak: int) -> dict[str, int]:
    """Bytes of the flat buffers (of ZeRO the shares), the optimiser's state and the counted peak of all else."""
    engine = rank.engine
    inside = [t for segment in engine.segments for m in segment for t in (*m.parameters(), *m.buffers())]
    frozen = {id(t): t.nbytes for t in inside if not t.requires_grad}
    state = [t for run in engine.runs for t in run[2].values()]
    if engine.hyper.optimizer is not None:
        state += [t for own in engine.hyper.optimizer.state.values() for t in own.values() if isinstance(t, Tensor)]
    kept = engine.kept.buffers.values() if engine.kept else ()
    return {
        "parameters": engine.flat.params.nbytes + sum(frozen.values()),
        "gradients": engine.gradients_flat.nbytes,
        "optimizer": sum(t.nbytes for t in state) + sum(t.nbytes for t in kept),
        "activations": peak,
    }


def counted(rank: Rank | Team, train: Callable[[], None]) -> dict[str, int]:
    """Bytes of each kind while `train` runs; of the native engine what C++ has reserved in this process and what a rule
    keeps, all in one, without what has just come in."""
    if isinstance(rank, Rank) and not isinstance(rank.engine, NativeEngine):
        with counting(rank) as count:
            train()
        return held(rank, count.peak)
    train()
    kept = rank.engine.kept if isinstance(rank, Rank) else None
    return {"reserved": int(extension().reserved()) + sum(t.nbytes for t in (kept.buffers if kept else {}).values())}


def _address(tensor: Tensor) -> int:
    """Of the storage itself, not of its memory, which ZeRO takes and gives back."""
    return int(tensor.untyped_storage()._cdata)
