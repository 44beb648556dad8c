"""ZeRO (Rajbhandari et al. 2020) as passes: replicas keep shares of what they would all keep, and send for the rest.

A bucket is a segment's part of a flat buffer. Stage 1: gradients are reduce-scattered, each replica updates its share
and the new parameters are gathered. Stage 2: gradients are whole only until they are reduced, microbatch by microbatch.
Stage 3: parameters too are whole only around their use; the next segment's are on their way while one is computed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from paraxis.errors import PlanError
from paraxis.plan.plan import Plan
from paraxis.program.cut import Layout
from paraxis.program.instructions import BACKWARD, Instruction, Tie

Body = list[Instruction]
Cuts = Sequence[Sequence[tuple[int, int]]]  # of every stage, its segments
Used = Mapping[tuple[int, int], tuple[int, ...]]  # by (stage, segment): the buckets that it computes with
I = Instruction  # noqa: E741  (the passes below are tables of instructions)


def check_zero(plan: Plan, meets: bool, ties: Sequence[Tie]) -> None:
    """Raises PlanError for what shards cannot be reconciled with."""
    asked = f"zero={plan.zero}"
    if plan.zero > 1 and ties:
        raise PlanError(f"{asked}: stages share {ties[0].parameter}, whose copies are added up whole; take zero=1")
    if plan.zero > 1 and meets:
        raise PlanError(f"{asked}: ranks meet in the middle of a layer (tp, bn_group); zero=1 shards what can be")
    if plan.zero > 1 and plan.schedule.startswith("zb"):
        raise PlanError(f"{asked}: schedule={plan.schedule} makes gradients of weights late; take 1f1b, or zero=1")


def used_buckets(segments: Cuts, layout: Layout) -> Used:
    """A segment computes with its own bucket, and with that of the first segment that shares a parameter with it."""
    used: dict[tuple[int, int], tuple[int, ...]] = {
        (s, k): (k,) for s, cuts in enumerate(segments) for k in range(len(cuts))
    }
    place = {layer: (s, k) for s, cuts in enumerate(segments) for k, (a, b) in enumerate(cuts) for layer in range(a, b)}
    for first, other in ((layers[0], other) for _, layers in layout.tied for other in layers[1:]):
        (stage, owner), user = place[first], place[other]
        if user[0] == stage and owner not in used[user]:
            used[user] = (*used[user], owner)
    return used


def shard_gradients(body: Body, used: Used) -> Body:
    """A bucket's gradients of a microbatch get memory before the first backward that adds to them, and are reduced into
    shares after the last; that is awaited, and the memory let go, after the next backward or where it is needed anew.
    """
    first: dict[tuple[int, int, int], int] = {}  # by (stage, bucket, microbatch)
    last: dict[tuple[int, int, int], int] = {}
    for n, i in enumerate(body):
        for bucket in used[i.stage, i.segment] if i.op in BACKWARD else ():
            first.setdefault((i.stage, bucket, i.microbatch), n)
            last[i.stage, bucket, i.microbatch] = n
    pending: dict[tuple[int, int], Body] = {}
    out: Body = []
    for n, i in enumerate(body):
        if i.op not in BACKWARD:
            out.append(i)
            continue
        own = used[i.stage, i.segment]
        for bucket in (k for k in own if first[i.stage, k, i.microbatch] == n):
            out += pending.pop((i.stage, bucket), [])
            out.append(_memory("Reserve", i, "grads", bucket))
        out += [i, *(o for key in list(pending) for o in pending.pop(key))]
        for bucket in (k for k in own if last[i.stage, k, i.microbatch] == n):
            start, wait = _both(i, "ReduceScatter", "grads", bucket, "sum")
            out.append(start)
            pending[i.stage, bucket] = [wait, _memory("Release", i, "grads", bucket)]
    return out + [o for own in pending.values() for o in own]


def shard_parameters(body: Body, used: Used) -> Body:
    """Parameters are gathered before a segment computes and let go after it, unless the next one needs them too; the
    next one's are on their way meanwhile."""
    computing = [n for n, i in enumerate(body) if i.op in ("F", *BACKWARD)]
    behind = dict(zip(computing, [*computing[1:], -1], strict=True))
    coming: dict[tuple[int, int], Body] = {}  # by (stage, bucket): the wait that makes it whole, until it is awaited
    out: Body = []

    def gather(i: Instruction) -> None:
        for bucket in used[i.stage, i.segment]:
            if (i.stage, bucket) not in coming:
                start, wait = _both(i, "AllGather", "params", bucket)
                out.extend([_memory("Reserve", i, "params", bucket), start])
                coming[i.stage, bucket] = [wait]

    for n, i in enumerate(body):
        if n not in behind:
            out.append(i)
            continue
        gather(i)
        for bucket in used[i.stage, i.segment]:
            out += coming[i.stage, bucket]
            coming[i.stage, bucket] = []
        after = body[behind[n]] if behind[n] >= 0 else None
        if after:
            gather(after)
        out.append(i)
        kept = {(after.stage, bucket) for bucket in used[after.stage, after.segment]} if after else set()
        for stage, bucket in [key for key in coming if key not in kept]:
            out.append(_memory("Release", i, "params", bucket, stage))
            del coming[stage, bucket]
    return out


def gather_parameters(buckets: Iterable[tuple[int, int]]) -> Body:
    """Behind the update of stages 1 and 2: every replica's new share, to all. `buckets`: (stage, bucket)."""
    ends = ("Start", "Wait")
    return [I(f"AllGather{end}", stage=s, axis="dp", buffer="params", bucket=k) for s, k in buckets for end in ends]


def copying(buckets: Iterable[tuple[int, int]]) -> Body:
    """Of stage 3, how the weights come to be read: gathered and copied a bucket at a time."""
    out: Body = []
    for stage, bucket in buckets:
        copy = I("Update", stage=stage, segment=bucket, bucket=bucket, rule="keep")
        gathered = _both(copy, "AllGather", "params", bucket)
        ends = (_memory(op, copy, "params", bucket) for op in ("Reserve", "Release"))
        out += [next(ends), *gathered, copy, next(ends)]
    return out


def _memory(op: str, i: Instruction, buffer: str, bucket: int, stage: int = -1) -> Instruction:
    """Memory of a bucket, that `i` computes with."""
    place = i.stage if stage < 0 else stage
    return I(op, stage=place, segment=i.segment, microbatch=i.microbatch, buffer=buffer, bucket=bucket, rule=_for(i))


def _both(i: Instruction, op: str, buffer: str, bucket: int, reduction: str = "") -> Body:
    """Start and wait of a bucket's collective, for the sake of what `i` computes."""
    both = I(op, i.stage, i.segment, i.microbatch, axis="dp", buffer=buffer, bucket=bucket, reduction=reduction)
    return [replace(both, op=f"{op}{end}", rule=_for(i)) for end in ("Start", "Wait")]


def _for(i: Instruction) -> str:
    return "" if i.op == "Update" else i.rule if i.rule == "again" else i.op
