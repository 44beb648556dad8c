"""What the checker knows of ZeRO: which buckets are whole on a rank, and when shares may be updated and gathered."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from paraxis.program.instructions import GRADIENT, MEMORY, Instruction, Program
from paraxis.program.meetings import kind, reach

Fail = Callable[[int, str], NoReturn]
Bucket = tuple[int, int]  # (stage, bucket)
NEEDS = {"params": "parameters", "grads": "gradients"}


@dataclass
class Shards:
    """The abstract state of one rank's shares within one step; `buckets` are those that its program ever speaks of."""

    program: Program
    rank: int
    zero: int = 0  # the program's stage
    buckets: frozenset[Bucket] = frozenset()
    tied: dict[int, Bucket] = field(default_factory=dict)  # by the number of the tie
    whole: dict[str, set[Bucket]] = field(default_factory=lambda: {"params": set(), "grads": set()})  # have memory
    gathered: set[Bucket] = field(default_factory=set)  # whose parameters are there, of all replicas
    released: set[Bucket] = field(default_factory=set)  # whose parameters have been let go
    added: dict[Bucket, set[int]] = field(default_factory=dict)  # microbatches whose gradients wait to be reduced
    reducing: set[Bucket] = field(default_factory=set)
    reduced: set[Bucket] = field(default_factory=set)  # at least once
    updated: bool = False

    def __post_init__(self) -> None:
        self.zero = self.program.zero
        rows = (ranks[self.rank] for _, ranks in self.program.bodies) if self.zero else ()
        self.buckets = frozenset(
            (i.stage, i.bucket) for row in rows for i in row if i.base in ("AllGather", "ReduceScatter")
        )
        self.tied = self.program.own_buckets(self.rank)

    def see(self, i: Instruction, slot: int, fail: Fail) -> None:
        """One instruction more; calls `fail` if it cannot stand here."""
        if not self.zero:
            return
        if i.op in ("F", *GRADIENT) or i.rule == "keep":
            self._computes(i, slot, fail)
        elif i.op in MEMORY:
            self._memory(i, slot, fail)
        elif i.base == "AllGather" and i.buffer == "params":
            self._gathers(i, slot, fail)
        elif i.base == "ReduceScatter" and i.buffer == "grads":
            self._reduces(i, slot, fail)
        elif i.buffer == "tied" and self.tied:
            self._adds_copies(i, slot, fail)
        elif i.rule == "step":
            self._updates(slot, fail)

    def _computes(self, i: Instruction, slot: int, fail: Fail) -> None:
        """Of the segments that it covers; which of a layer that is cut has which part, the program does not say."""
        ends = i.segment if i.rule == "keep" else reach(kind(i), self.program.borders(i.stage), i.segment)
        own = [place for k in range(i.segment, ends + 1) if (place := (i.stage, k)) in self.buckets]
        if self.zero == 3 and i.op != "W":
            for place in own:
                if place not in self.gathered:
                    late = "have been released" if place in self.released else "are not gathered"
                    fail(slot, f"{i.label()}: its segment's parameters {late}")
        if self.zero > 1 and i.op in GRADIENT:
            for place in own:
                if place not in self.whole["grads"]:
                    fail(slot, f"{i.label()}: there is no memory for its segment's gradients")
                if place in self.reducing:
                    fail(slot, f"{i.label()} adds to bucket {place[1]} while it is reduced")
            ties = [place for place in self.tied.values() if place in self.whole["grads"] - self.reducing]
            for place in (*own, *ties):
                self.added.setdefault(place, set()).add(i.microbatch)

    def _memory(self, i: Instruction, slot: int, fail: Fail) -> None:
        bucket, whole = (i.stage, i.bucket), self.whole.get(i.buffer, set())
        if i.op == "Reserve":
            if bucket in whole:
                fail(slot, f"{i.label()}: the {NEEDS[i.buffer]} of segment {i.bucket} have memory already")
            whole.add(bucket)
            return
        if bucket not in whole:
            fail(slot, f"{i.label()}: the {NEEDS[i.buffer]} of segment {i.bucket} have no memory to release")
        if i.buffer == "grads" and (bucket in self.added or bucket in self.reducing):
            fail(slot, f"{i.label()}: the gradients of segment {i.bucket} are released before they are reduced")
        if i.buffer == "params" and bucket not in self.gathered:
            fail(slot, f"{i.label()}: the parameters of segment {i.bucket} are released on their way")
        whole.remove(bucket)
        if i.buffer == "params":
            self.gathered.discard(bucket)
            self.released.add(bucket)

    def _gathers(self, i: Instruction, slot: int, fail: Fail) -> None:
        bucket = i.stage, i.bucket
        if self.zero == 3 and bucket not in self.whole["params"]:
            fail(slot, f"{i.label()}: there is no memory for the parameters of segment {i.bucket}")
        if self.zero < 3 and not self.updated:
            fail(slot, f"{i.label()}: the parameters are gathered before the update")
        if i.waits:
            self.gathered.add(bucket)

    def _reduces(self, i: Instruction, slot: int, fail: Fail) -> None:
        bucket = i.stage, i.bucket
        if self.zero == 1:
            return  # once for all microbatches, as an all-reduce
        if i.starts and bucket not in self.added:
            fail(slot, f"{i.label()}: no gradients have been added to bucket {i.bucket}")
        if i.starts:
            self.reducing.add(bucket)
            self.added.pop(bucket)
        else:
            self.reducing.discard(bucket)
            self.reduced.add(bucket)

    def _adds_copies(self, i: Instruction, slot: int, fail: Fail) -> None:
        """Shares of a tied parameter's gradient, of all microbatches: when their bucket has been let go."""
        place = self.tied.get(i.bucket, (-1, -1))
        if i.starts and (place not in self.reduced or place in self.whole["grads"]):
            parameter = self.program.ties[i.bucket].parameter
            fail(slot, f"the copies of {parameter} must be added up after the replicas' reduction")

    def _updates(self, slot: int, fail: Fail) -> None:
        self.updated = True
        if self.added:
            fail(slot, f"the update comes before the gradients of bucket {min(self.added)[1]} are reduced")
        if self.zero == 3 and self.whole["params"]:
            stage, bucket = min(self.whole["params"])
            fail(slot, f"the update comes while segment {bucket} of stage {stage} is whole: it would go stale")

    def end(self, slot: int, fail: Fail) -> None:
        """The body ends."""
        for buffer in ("params", "grads") if self.zero else ():
            if self.whole[buffer]:
                stage, bucket = min(self.whole[buffer])
                fail(slot, f"the {NEEDS[buffer]} of segment {bucket} of stage {stage} are never released")
        if self.zero in (1, 2) and self.updated:
            for stage, bucket in sorted(self.buckets - self.gathered):
                fail(slot, f"bucket {bucket} of stage {stage} is not gathered after the update")
