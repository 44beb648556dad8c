"""ZeRO (Rajbhandari et al. 2020) as passes: replicas keep shares of what they would all keep, and send for the rest.

A bucket is a segment's part of a flat buffer, under tp of the rank's own part of it. Stage 1: gradients are
reduce-scattered, each replica updates its share and the new parameters are gathered. Stage 2: gradients are whole only
until they are reduced, microbatch by microbatch. Stage 3: parameters too are whole only around their use; the next
segment's are on their way while one is computed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from paraxis.program.cut import Layout
from paraxis.program.instructions import BACKWARD, GRADIENT, Instruction, Tie
from paraxis.program.meetings import begins, kind, reach

Body = list[Instruction]
Place = tuple[int, int]  # (stage, bucket)
Segments = Sequence[Sequence[tuple[int, int]]]  # of every stage
Words = Sequence[Sequence[str]]  # of every stage, of its borders
Used = Mapping[tuple[str, int, int], tuple[Place, ...]]  # by (F, B or E; stage; the segment named): its buckets
I = Instruction  # noqa: E741  (the passes below are tables of instructions)


def used_buckets(
    segments: Segments, words: Words, met: Sequence[Sequence[int]], layout: Layout, tied: Sequence[Tie], pp: int
) -> Used:
    """What each computation computes with; `met`: the layers in which the borders of every stage lie, if in any.

    A segment needs its own bucket and that of a layer in whose middle it begins or ends. Of a parameter that several
    layers of a rank use, the first one's. One that other ranks have copies of has a bucket of its own, behind those of
    its stage's segments: a share of it is a share of the same numbers on all of them, so that shares can be added up.
    """
    cells = {layer: (s, k) for s, cuts in enumerate(segments) for k, cut in enumerate(cuts) for layer in range(*cut)}
    homes = {layer: [cell] if layout.parameters[layer] else [] for layer, cell in cells.items()}
    numbers = {tie.parameter: number for number, tie in enumerate(tied)}
    for name, layers in layout.tied:
        for layer in layers:
            stage, bucket = next(cells[one] for one in layers if (cells[one][0] - cells[layer][0]) % pp == 0)
            homes[layer].append((stage, len(segments[stage]) + numbers[name] if name in numbers else bucket))

    def needed(stage: int, k: int) -> set[Place]:
        borders = met[stage][max(k - 1, 0) : k + 1] if met else ()
        return {home for layer in (*range(*segments[stage][k]), *borders) for home in homes[layer]}

    return {
        (op, s, k): tuple(sorted({place for n in range(k, reach(op, own, k) + 1) for place in needed(s, n)}))
        for s, own in enumerate(words)
        for op in "FBE"
        for k in begins(op, own)
    }


def buckets_of(used: Used, place: int, pp: int) -> list[Place]:
    """All that lie at one place of a pipeline of `pp` ranks."""
    return sorted({bucket for (_, s, _), own in used.items() if s % pp == place for bucket in own})


def _needs(i: Instruction, used: Used) -> tuple[Place, ...]:
    return used[kind(i), i.stage, i.segment]


def shard_gradients(body: Body, used: Used) -> Body:
    """A bucket's gradients get memory before a backward that adds to them, and are reduced into shares after the last
    one of a microbatch: its W, where that is apart. They go with what an I of a later microbatch has added already.
    The reduction is awaited, and the memory let go, after the next backward or where it is needed anew.
    """
    adding = [(n, i) for n, i in enumerate(body) if i.op in GRADIENT]
    last = {(place, i.microbatch): n for n, i in adding for place in _needs(i, used)}
    whole: set[Place] = set()
    pending: dict[Place, Body] = {}
    out: Body = []
    for n, i in enumerate(body):
        if i.op not in GRADIENT:
            out.append(i)
            continue
        own = _needs(i, used)
        for place in (place for place in own if place not in whole):
            out += pending.pop(place, [])
            out.append(_memory("Reserve", i, "grads", place))
        whole |= {*own}
        out += [i, *(o for place in list(pending) for o in pending.pop(place))]
        for place in (place for place in own if last[place, i.microbatch] == n):
            start, wait = _both(i, "ReduceScatter", "grads", place, "sum")
            out.append(start)
            pending[place] = [wait, _memory("Release", i, "grads", place)]
            whole.remove(place)
    return out + [o for own in pending.values() for o in own]


def shard_parameters(body: Body, used: Used) -> Body:
    """Parameters are gathered before a computation and let go after it, unless the next one needs them too; the next
    one's are on their way meanwhile. A W needs none: it has what went in, and the gradient of what came out."""
    computing = [n for n, i in enumerate(body) if i.op in ("F", *BACKWARD)]
    behind = dict(zip(computing, [*computing[1:], -1], strict=True))
    coming: dict[Place, Body] = {}  # the wait that makes it whole, until it is awaited
    out: Body = []

    def gather(i: Instruction) -> None:
        for place in _needs(i, used):
            if place not in coming:
                start, wait = _both(i, "AllGather", "params", place)
                out.extend([_memory("Reserve", i, "params", place), start])
                coming[place] = [wait]

    for n, i in enumerate(body):
        if n not in behind:
            out.append(i)
            continue
        gather(i)
        for place in _needs(i, used):
            out += coming[place]
            coming[place] = []
        after = body[behind[n]] if behind[n] >= 0 else None
        if after:
            gather(after)
        out.append(i)
        kept = _needs(after, used) if after else ()
        for place in [place for place in coming if place not in kept]:
            out.append(_memory("Release", i, "params", place))
            del coming[place]
    return out


def gather_parameters(buckets: Iterable[Place]) -> Body:
    """Behind the update of stages 1 and 2: every replica's new share, to all."""
    ends = ("Start", "Wait")
    return [I(f"AllGather{end}", stage=s, axis="dp", buffer="params", bucket=k) for s, k in buckets for end in ends]


def copying(buckets: Iterable[Place]) -> Body:
    """Of stage 3, how the weights come to be read: gathered and copied a bucket at a time."""
    out: Body = []
    for stage, bucket in buckets:
        copy, place = I("Update", stage=stage, segment=bucket, bucket=bucket, rule="keep"), (stage, bucket)
        first, last = (_memory(op, copy, "params", place) for op in ("Reserve", "Release"))
        out += [first, *_both(copy, "AllGather", "params", place), copy, last]
    return out


def _memory(op: str, i: Instruction, buffer: str, place: Place) -> Instruction:
    """Memory of a bucket, that `i` computes with."""
    stage, bucket = place
    return I(op, stage, i.segment, i.microbatch, buffer=buffer, bucket=bucket, rule=_for(i))


def _both(i: Instruction, op: str, buffer: str, place: Place, reduction: str = "") -> Body:
    """Start and wait of a bucket's collective, for the sake of what `i` computes."""
    stage, bucket = place
    both = I(op, stage, i.segment, i.microbatch, axis="dp", buffer=buffer, bucket=bucket, reduction=reduction)
    return [replace(both, op=f"{op}{end}", rule=_for(i)) for end in ("Start", "Wait")]


def _for(i: Instruction) -> str:
    return "" if i.op == "Update" else i.rule if i.rule == "again" else i.op
