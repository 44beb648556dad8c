"""What the checker knows of ZeRO: which buckets are whole on a rank, and when shares may be updated and gathered."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from paraxis.program.instructions import BACKWARD, MEMORY, Instruction

Fail = Callable[[int, str], NoReturn]
Bucket = tuple[int, int]  # (stage, bucket)
NEEDS = {"params": "parameters", "grads": "gradients"}


@dataclass
class Shards:
    """The abstract state of one rank's shares within one step; `zero` is the program's stage."""

    zero: int
    whole: dict[str, set[Bucket]] = field(default_factory=lambda: {"params": set(), "grads": set()})  # have memory
    gathered: set[Bucket] = field(default_factory=set)  # whose parameters are there, of all replicas
    released: set[Bucket] = field(default_factory=set)  # whose parameters have been let go
    added: dict[Bucket, set[int]] = field(default_factory=dict)  # microbatches whose gradients wait to be reduced
    reducing: set[Bucket] = field(default_factory=set)
    updated: bool = False

    def see(self, i: Instruction, slot: int, fail: Fail) -> None:
        """One instruction more; calls `fail` if it cannot stand here."""
        if not self.zero:
            return
        if i.op == "F" or i.op in BACKWARD or i.rule == "copy":
            self._computes(i, slot, fail)
        elif i.op in MEMORY:
            self._memory(i, slot, fail)
        elif i.base == "AllGather" and i.buffer == "params":
            self._gathers(i, slot, fail)
        elif i.base == "ReduceScatter" and i.buffer == "grads":
            self._reduces(i, slot, fail)
        elif i.rule == "step":
            self._updates(slot, fail)

    def _computes(self, i: Instruction, slot: int, fail: Fail) -> None:
        own = i.stage, i.segment
        if self.zero == 3 and own not in self.gathered:
            late = "have been released" if own in self.released else "are not gathered"
            fail(slot, f"{i.label()}: its segment's parameters {late}")
        if self.zero > 1 and i.op in BACKWARD:
            if own not in self.whole["grads"]:
                fail(slot, f"{i.label()}: there is no memory for its segment's gradients")
            if own in self.reducing:
                fail(slot, f"{i.label()} adds to bucket {i.segment} while it is reduced")
            self.added.setdefault(own, set()).add(i.microbatch)

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

    def _updates(self, slot: int, fail: Fail) -> None:
        self.updated = True
        if self.added:
            fail(slot, f"the update comes before the gradients of bucket {min(self.added)[1]} are reduced")
        if self.zero == 3 and self.whole["params"]:
            stage, bucket = min(self.whole["params"])
            fail(slot, f"the update comes while segment {bucket} of stage {stage} is whole: it would go stale")

    def end(self, buckets: set[Bucket], slot: int, fail: Fail) -> None:
        """The body ends; `buckets` are those of the rank, one for all of them being -1."""
        for buffer in ("params", "grads") if self.zero else ():
            if self.whole[buffer]:
                stage, bucket = min(self.whole[buffer])
                fail(slot, f"the {NEEDS[buffer]} of segment {bucket} of stage {stage} are never released")
        if self.zero in (1, 2) and self.updated and not any(bucket < 0 for _, bucket in self.gathered):
            for stage, bucket in sorted(buckets - self.gathered):
                fail(slot, f"bucket {bucket} of stage {stage} is not gathered after the update")
