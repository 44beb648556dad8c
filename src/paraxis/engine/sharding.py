"""ZeRO's memory (Rajbhandari et al. 2020): of each bucket of the flat buffers a rank's share, and the whole when told.

Buckets are padded so that shares are equal. What is whole only for a while keeps its tensors: memory is taken from the
storage they share and given back to it, so that what autograd has saved between F and B is valid when B comes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from paraxis.engine.flat import TOTALS, Flat
from paraxis.program.instructions import Program

Place = tuple[int, int]  # (stage, bucket); EVERYTHING where one bucket has all of the rank's parameters
EVERYTHING = (-1, -1)


@dataclass(frozen=True, repr=False, eq=False)  # to print a tensor that has no memory ends the process
class Part:
    """Of one buffer and bucket, the `whole` (p * n,), this rank's `place` in it (n,) and its `own` share (n,).

    The share is that place itself where the whole stays; else it lies apart and outlives the whole.
    """

    whole: Tensor
    place: Tensor
    own: Tensor

    def resize(self, full: bool) -> None:
        """Give the whole its memory, or take it away."""
        self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size() if full else 0)


@dataclass(frozen=True, repr=False, eq=False)
class Bucket:
    """Parameters [first, last) of a flat buffer with their gradients, of which the share begins at `own`."""

    first: int
    last: int
    own: int
    params: Part
    grads: Part


@dataclass(frozen=True, repr=False, eq=False)
class Shards:
    """The buckets of one rank and `flat` buffers of what it keeps; `zero` is the stage (1 too where ranks share)."""

    zero: int
    flat: Flat
    buckets: dict[Place, Bucket]

    def buffer(self, name: str, bucket: int, stage: int) -> Tensor:
        """What a collective is about."""
        return self._part(name, bucket, stage).whole

    def share(self, name: str, bucket: int, stage: int) -> Tensor:
        """This rank's part of it."""
        return self._part(name, bucket, stage).own

    def reserve(self, name: str, bucket: int, stage: int) -> None:
        """Memory for the whole: parameters with one's own share in place, gradients of nothing."""
        part = self._part(name, bucket, stage)
        part.resize(True)
        if name == "params":
            part.place.copy_(part.own)
        else:
            part.whole.zero_()

    def release(self, name: str, bucket: int, stage: int) -> None:
        """Give it back."""
        self._part(name, bucket, stage).resize(False)

    def take_share(self, bucket: int, stage: int) -> None:
        """Add what was reduced to the share of it that is kept."""
        if self.zero > 1:
            part = self._part("grads", bucket, stage)
            part.own.add_(part.place)

    def members(self, bucket: int, stage: int) -> list[nn.Parameter]:
        """The parameters of a bucket."""
        wanted = self.buckets[stage, bucket]
        return [p for p, a, _ in self.flat.members if wanted.first <= a < wanted.last]

    def own_runs(self) -> list[tuple[int, Tensor, Tensor]]:
        """(parameter group, weights, gradients) of the ranges that this rank updates."""
        out = []
        for b in self.buckets.values():
            size = b.params.own.numel()
            for group, first, last in self.flat.runs:
                start, end = max(first - b.own, 0), min(last - b.own, size)
                if start < end:
                    out.append((group, b.params.own[start:end], b.grads.own[start:end]))
        return out

    def own_gradients(self) -> list[tuple[int, Tensor]]:
        """Those this rank has the sums of, and where each run of them begins in the flat buffer."""
        return [(b.own, b.grads.own) for b in self.buckets.values()]

    def transient(self, name: str) -> int:
        """Bytes of what is whole at the moment and will not stay."""
        parts = [b.params if name == "params" else b.grads for b in self.buckets.values()]
        return sum(p.whole.untyped_storage().nbytes() for p in parts if p.own is not p.place)

    def _part(self, name: str, bucket: int, stage: int) -> Part:
        found = self.buckets[EVERYTHING if bucket < 0 else (stage, bucket)]
        return found.params if name == "params" else found.grads


def one_for_all(program: Program, rank: int) -> bool:
    """Whether a rank's shares are parts of a single bucket."""
    rows = (program.body(name)[rank] for name, _ in program.period)
    return all(i.bucket < 0 for row in rows for i in row if i.base in ("ReduceScatter", "AllGather"))


def ends(program: Program, rank: int, places: Sequence[Place]) -> set[int]:
    """Behind which of its segments a rank's flat buffers are padded."""
    return {len(places) - 1} if one_for_all(program, rank) else set(range(len(places)))


def shard(flat: Flat, program: Program, rank: int, places: Sequence[Place]) -> Shards:
    """Part flat buffers that were made with `ends`; parameters and gradients move to the memory of their buckets."""
    replica, parts = program.mesh.coordinates(rank)[0], program.mesh.dp
    whole = one_for_all(program, rank)
    bounds = {EVERYTHING: (0, flat.params.numel())} if whole else dict(zip(places, flat.bounds, strict=True))
    sizes = [(b - a) // parts for a, b in bounds.values()]
    kept = flat.params.new_empty(sum(sizes)) if program.zero > 2 else flat.params
    reduced = flat.grads.new_zeros(TOTALS + sum(sizes)) if program.zero > 1 else flat.grads
    buckets, at = {}, 0
    for (place, (first, last)), size in zip(bounds.items(), sizes, strict=True):
        grads, params = flat.grads[TOTALS + first : TOTALS + last], flat.params[first:last]
        buckets[place] = Bucket(
            first,
            last,
            first + replica * size,
            _part(params, parts, replica, kept[at : at + size] if program.zero > 2 else None),
            _part(grads, parts, replica, reduced[TOTALS + at : TOTALS + at + size] if program.zero > 1 else None),
        )
        at += size
    _move(flat, buckets.values(), program.zero)
    return Shards(max(1, program.zero), replace(flat, params=kept, grads=reduced), buckets)


def _part(whole: Tensor, parts: int, place: int, own: Tensor | None) -> Part:
    """`own`: memory of the share, if the whole is not to stay; it then has memory of its own to give back."""
    if own is None:
        here = whole.view(parts, -1)[place]
        return Part(whole, here, here)
    apart = whole.clone()
    here = apart.view(parts, -1)[place]
    own.copy_(here)
    return Part(apart, here, own)


def _move(flat: Flat, buckets: Iterable[Bucket], zero: int) -> None:
    """Let parameters and gradients be views of their buckets, and take away what is not to stay."""
    for bucket in buckets:
        for p, a, b in flat.members:
            if bucket.first <= a < bucket.last:
                p.data = bucket.params.whole[a - bucket.first : b - bucket.first].view_as(p)
                if p.grad is not None:
                    p.grad = bucket.grads.whole[a - bucket.first : b - bucket.first].view_as(p)
        if zero > 1:
            bucket.grads.resize(False)
        if zero > 2:
            bucket.params.resize(False)
