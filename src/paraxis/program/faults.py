"""Seeded faults: the mistakes that parallel training is known for, so that one can see the proof catch them.

A fault changes a finished program on all ranks, or spoils the engine of the last rank, behind the checker's back.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from paraxis.errors import PlanError
from paraxis.plan.plan import Plan
from paraxis.plan.schedules import SCHEDULES, parted
from paraxis.program.instructions import GRADIENT, SHARES, Instruction, Program

Rewrite = Callable[[Program, int, list[Instruction]], Iterable[Instruction]]


def _nothing(engine: Any) -> None:
    """Leaves an engine as it is."""


@dataclass(frozen=True)
class Fault:
    """One mistake: what it is, which plans can have it, and how it is made."""

    what: str
    needs: Callable[[Plan], bool]
    wanting: str
    rewrite: Rewrite | None = None
    spoil: Callable[[Any], None] = _nothing

    def mutated(self, plan: Plan, program: Program) -> Program:
        """The program with the fault; raises PlanError for a plan that cannot have it."""
        if not self.needs(plan):
            raise PlanError(f"this fault ({self.what}) needs {self.wanting}")
        if self.rewrite is None and plan.engine == "native":
            raise PlanError(f"this fault ({self.what}) is made inside engine=torch")
        if self.rewrite is None:
            return program
        bodies = []
        for name, ranks in program.bodies:
            training = name not in ("evaluate", "score", "settle", "state")
            spoiled = tuple(
                tuple(self.rewrite(program, rank, list(body))) if training else body for rank, body in enumerate(ranks)
            )
            bodies.append((name, spoiled))
        if tuple(bodies) == program.bodies:
            raise PlanError(f"this fault ({self.what}) finds nothing to spoil in {plan.short()}")
        return replace(program, bodies=tuple(bodies))


def _without(match: Callable[[Instruction], bool]) -> Rewrite:
    return lambda program, rank, body: [i for i in body if not match(i)]


def _with(match: Callable[[Instruction], bool], change: Callable[[Program, Instruction], Instruction]) -> Rewrite:
    return lambda program, rank, body: [change(program, i) if match(i) else i for i in body]


def _early(match: Callable[[Instruction], bool]) -> Rewrite:
    """Move what matches to just before the last that adds to a gradient."""

    def rewrite(program: Program, rank: int, body: list[Instruction]) -> list[Instruction]:
        moved = [i for i in body if match(i)]
        rest = [i for i in body if not match(i)]
        last = max((n for n, i in enumerate(rest) if i.op in GRADIENT), default=0)
        return rest[:last] + moved + rest[last:]

    return rewrite


def _on_last(rewrite: Rewrite) -> Rewrite:
    return lambda program, rank, body: rewrite(program, rank, body) if rank == program.mesh.size - 1 else body


def _swap_samples(program: Program, rank: int, body: list[Instruction]) -> list[Instruction]:
    """The last stage takes the targets of microbatches 0 and 1 for one another."""
    if program.mesh.coordinates(rank)[1] != program.mesh.pp - 1:
        return body
    swap = {0: 1, 1: 0}
    loads = [i for i in body if i.op == "Load"]
    slices = {i.microbatch: i.slice for i in loads}
    new = {i: replace(i, slice=slices[swap.get(i.microbatch, i.microbatch)]) for i in loads}
    return [new.get(i, i) for i in body]


def _skip_backward(program: Program, rank: int, body: list[Instruction]) -> list[Instruction]:
    """The first stage forgets the backward of its last microbatch."""
    last = program.microbatches - 1
    return [i for i in body if not (i.stage == 0 and i.op in GRADIENT and i.microbatch == last)]


def _skip_weights(program: Program, rank: int, body: list[Instruction]) -> list[Instruction]:
    """Of microbatch 1 every stage makes the input's gradient, but not that of its weights."""
    return [i for i in body if (i.op, i.microbatch) != ("W", 1)]


def _after_reducing(program: Program, rank: int, body: list[Instruction]) -> list[Instruction]:
    """Every W comes right before its bucket's memory is let go."""
    out = list(body)
    for w in (i for i in body if i.op == "W"):
        behind = out[out.index(w) :]
        ends = (
            i for i in behind if i.op == "Release" and (i.buffer, i.stage, i.bucket) == ("grads", w.stage, w.segment)
        )
        if end := next(ends, None):
            out.remove(w)
            out.insert(out.index(end), w)
    return out


def _local_slice(program: Program, i: Instruction) -> Instruction:
    return replace(i, slice=i.microbatch)


def _heavier(engine: Any) -> None:
    scale = engine.scale
    engine.scale = lambda: 2 * scale()


def _other_start(engine: Any) -> None:
    engine.flat.params.mul_(1.01)


def _late(engine: Any) -> None:
    for stage in engine.stages.values():
        stage.load = partial(_load_late, engine, stage, stage.load)


def _load_late(engine: Any, stage: Any, load: Callable[[int, int], None], microbatch: int, part: int) -> None:
    load(microbatch, part)
    size = stage.slice_size
    stage.batches[microbatch] = engine.source.share(engine.step + 1, part * size, size, stage.stage == 0, stage.last)


def _overwriting(engine: Any) -> None:
    engine.take_share = partial(_take_only, engine, engine.take_share)


def _take_only(engine: Any, take: Callable[[int, int], None], bucket: int, stage: int) -> None:
    engine.shares.buckets[stage, bucket].grads.own.zero_()
    take(bucket, stage)


def _other_rate(engine: Any) -> None:
    for group in engine.hyper.groups:
        group["lr"] *= 1.01


def _first_masks(engine: Any) -> None:
    """Of what is split, the masks of the first rank's part."""
    parts = engine.task.draw.parts
    parts.update({call: (dim, 0, count) for call, (dim, _, count) in parts.items()})


def _whole(engine: Any) -> list[tuple[int, int]]:
    """Ranges of the flat gradients that belong to tensors which every rank of a `tp` group has whole."""
    return [(first, last) for name, first, last in engine.flat.names if name not in engine.shards]


def _summed_whole(engine: Any) -> None:
    """What every rank has whole is added up over the ranks all the same."""
    update, ranks = engine.update, {shard.parts for shard in engine.shards.values()}.pop()

    def updated() -> None:
        for begins, own in engine.shares.own_gradients() if engine.shares else [(0, engine.gradients_flat)]:
            for first, last in _whole(engine):
                own[max(first - begins, 0) : max(last - begins, 0)].mul_(ranks)
        update()

    engine.update = updated


def _counted_whole(engine: Any) -> None:
    engine.counted = [engine.gradients_flat]


def _of(op: str, **wanted: object) -> Callable[[Instruction], bool]:
    return lambda i: i.base == op and all(getattr(i, key) == value for key, value in wanted.items())


def _reduces(i: Instruction) -> bool:
    """Gradients of ranks that have no weights in common."""
    return i.buffer == "grads" and (i.base == "AllReduce" or (i.base == "ReduceScatter" and i.bucket >= 0))


GRADS = _reduces
PARAMS, GATHERED = _of("AllReduce", buffer="params"), _of("AllGather", buffer="params")
STEP = _of("Update", rule="step")


def _replicas(p: Plan) -> bool:
    return p.dp > 1 and p.sync == "gradient"


def _agreeing(p: Plan) -> bool:
    return p.dp > 1 and p.sync not in ("gradient", "hogwild")


def _reducing_once(p: Plan) -> bool:
    return _replicas(p) and p.zero < 2


def _sharding(p: Plan) -> bool:
    return p.zero > 0


def _parted(p: Plan) -> bool:
    return p.zero > 1 and p.schedule.startswith("zb")


def _adding(p: Plan) -> bool:
    return p.zero > 1 and p.microbatches > 1


def _averaging(p: Plan) -> bool:
    return p.sync.startswith("average")


def _outer(p: Plan) -> bool:
    return p.sync.startswith("diloco")


def _replicated(p: Plan) -> bool:
    return p.dp > 1


def _pipelined(p: Plan) -> bool:
    return p.pp > 1 and p.microbatches > 1


def _halving(p: Plan) -> bool:
    return _pipelined(p) and p.schedule in SCHEDULES and parted(p.schedule)


def _recomputing(p: Plan) -> bool:
    return bool(p.recompute)


def _shared(p: Plan) -> bool:
    return p.tp > 1


def _grouped(p: Plan) -> bool:
    return p.tp > 1 and p.engine == "native"


def _sequenced(p: Plan) -> bool:
    return p.sequence > 0


def _any(p: Plan) -> bool:
    return True


FAULTS: dict[str, Fault] = {
    "dropped-reduction": Fault("gradients are not reduced", _replicas, "dp > 1", _without(GRADS)),
    "mean-of-sums": Fault(
        "gradients are averaged that should be summed",
        _replicas,
        "dp > 1",
        _with(GRADS, lambda p, i: replace(i, reduction="mean")),
    ),
    "stale-bucket": Fault(
        "a bucket is reduced before its last gradient", _reducing_once, "dp > 1 and zero < 2", _early(GRADS)
    ),
    "all-data": Fault(
        "every worker trains on the same share",
        _replicated,
        "dp > 1",
        _with(lambda i: i.op in ("Load", "F"), _local_slice),
    ),
    "wrong-mask": Fault(
        "dropout masks of the wrong samples",
        _replicated,
        "dp > 1 and a network with dropout",
        _with(lambda i: i.op == "F", _local_slice),
    ),
    "stale-shard": Fault("other ranks' shares are not gathered", _sharding, "zero > 0", _without(GATHERED)),
    "lost-shard": Fault(
        "one worker keeps only its last microbatch's share of the gradient",
        _adding,
        "zero=2 or 3 and microbatches > 1",
        spoil=_overwriting,
    ),
    "late-weights": Fault(
        "gradients of weights come when their bucket has been reduced",
        _parted,
        "zero=2 or 3 and schedule=zb-h1 or zb-h2",
        _after_reducing,
    ),
    "fresh-masks": Fault(
        "forwards that are computed again draw other dropout masks",
        _recomputing,
        "recompute=all and a network with dropout",
        _with(lambda i: i.rule == "again", lambda p, i: replace(i, slice=i.slice + 1)),
    ),
    "random-start": Fault("one worker starts from other weights", _any, "", spoil=_other_start),
    "late-batch": Fault("one worker is a batch ahead", _any, "", spoil=_late),
    "factor": Fault("one worker divides by half the batch", _any, "", spoil=_heavier),
    "other-rate": Fault("one worker has another learning rate", _any, "", spoil=_other_rate),
    "lost-update": Fault("one worker skips its update", _any, "", _on_last(_without(STEP))),
    "early-update": Fault("the update comes before the last backward", _any, "", _early(STEP)),
    "unzeroed": Fault("gradients of the step before are kept", _any, "", _without(_of("Update", rule="zero"))),
    "swapped-microbatch": Fault(
        "targets of two microbatches are swapped", _pipelined, "pp > 1 and microbatches > 1", _swap_samples
    ),
    "lost-backward": Fault(
        "a microbatch's backward is forgotten", _pipelined, "pp > 1 and microbatches > 1", _skip_backward
    ),
    "lost-weight-gradient": Fault(
        "the second half of a microbatch's backward is forgotten",
        _halving,
        "pp > 1, microbatches > 1 and a schedule with I and W apart, such as zb-h1",
        _skip_weights,
    ),
    "summed-weights": Fault(
        "weights are summed that should be averaged",
        _averaging,
        "sync=average@H",
        _with(PARAMS, lambda p, i: replace(i, reduction="sum")),
    ),
    "local-statistics": Fault(
        "running statistics are not reduced",
        _replicas,
        "dp > 1 and a network with batch norm",
        _without(_of("AllReduce", buffer="statistics")),
    ),
    "local-moments": Fault(
        "batch norm's sums are not added up over replicas",
        lambda p: _replicas(p) and p.microbatches == 1,
        "dp > 1, microbatches=1 and batch norm over the whole batch",
        _without(lambda i: i.buffer == "moments"),
    ),
    "untied": Fault(
        "copies of a tied parameter do not add up their gradients",
        lambda p: p.pp > 1,
        "pp > 1 and a network that ties weights across stages",
        _without(lambda i: i.buffer == "tied"),
    ),
    "lost-slice": Fault(
        "one thread leaves its part of a layer out",
        _grouped,
        "tp > 1 and engine=native",
        _on_last(_without(lambda i: i.op == "F" and i.segment == 1)),
    ),
    "impatient": Fault(
        "threads do not wait for others", _grouped, "tp > 1 and engine=native", _without(lambda i: i.buffer in SHARES)
    ),
    "dropped-output": Fault(
        "parts of outputs are not added up",
        _shared,
        "tp > 1",
        _without(lambda i: i.base in ("ReduceAct", "ScatterAct")),
    ),
    "dropped-input-gradient": Fault(
        "gradients of an input that ranks share are not added up",
        _shared,
        "tp > 1 and a split layer whose input needs a gradient",
        _without(lambda i: i.base in ("ReduceGrad", "ScatterGrad")),
    ),
    "dropped-tokens": Fault(
        "tokens of other ranks are not gathered", _sequenced, "tp > 1 and sequence=1", _without(_of("GatherAct"))
    ),
    "dropped-token-gradients": Fault(
        "gradients of other ranks' tokens are not gathered",
        _sequenced,
        "tp > 1 and sequence=1",
        _without(_of("GatherGrad")),
    ),
    "partial-gradients": Fault(
        "gradients of one's own tokens are not added up",
        _sequenced,
        "tp > 1 and sequence=1",
        _without(_of("AllReduce", buffer="whole")),
    ),
    "wrong-part": Fault(
        "dropout masks of another rank's part",
        _shared,
        "tp > 1 and dropout of what is split",
        spoil=_first_masks,
    ),
    "summed-whole": Fault("gradients that every rank has whole are added up", _shared, "tp > 1", spoil=_summed_whole),
    "counted-whole": Fault(
        "what every rank has whole counts twice in the norm", _shared, "tp > 1 and --clip", spoil=_counted_whole
    ),
    "never-agreed": Fault(
        "replicas never agree",
        _agreeing,
        "sync=average@H, diloco@H or compressed",
        _without(lambda i: i.base == "AllReduce" and i.buffer in ("params", "delta", "grads")),
    ),
    "no-outer-momentum": Fault(
        "the outer step forgets its momentum", _outer, "sync=diloco@H", _without(_of("Update", rule="nesterov"))
    ),
    "no-snapshot": Fault(
        "the weights at the start are not remembered", _outer, "sync=diloco@H", _without(_of("Update", rule="snapshot"))
    ),
}
