"""From a plan to a program: schedules order the computing, the passes below add everything that communicates.

Read `lower` first: it is the table of contents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from paraxis.errors import PlanError
from paraxis.plan.plan import Plan, period
from paraxis.program.instructions import MOMENTS, Buffer, Instruction, Program
from paraxis.program.schedules import SCHEDULES

Body = list[Instruction]
I = Instruction  # noqa: E741  (the passes below are tables of instructions)


@dataclass(frozen=True)
class Layout:
    """What lowering has to know of a network: parameters of each layer, and what its training needs to agree on.

    `weight_in_data`: the loss's weight is known only after the forwards. `statistics`: it has running statistics.
    `clip`: gradients are clipped by their global norm. `cuttable`: empty, or why its layers cannot be split. `norms`:
    how many batch norms each layer has whose statistics cover the whole global batch (none: they cover slices).
    """

    parameters: tuple[int, ...]
    weight_in_data: bool = False
    statistics: bool = False
    clip: bool = False
    cuttable: str = ""
    tied: tuple[tuple[int, int, str], ...] = ()  # (first layer, last layer, parameter) that share one parameter
    norms: tuple[int, ...] = ()


def lower(plan: Plan, layout: Layout, steps_per_epoch: int = 1) -> Program:
    """The complete program of every rank; raises PlanError if the network cannot be cut as the plan asks."""
    stages = cut(plan, layout)
    split = norm_by_norm if synchronised(plan, layout) else bucketed
    segments = tuple(split(stage, layout, plan.bucket_bytes) for stage in stages)
    every = period(plan.sync, steps_per_epoch)
    bodies, runs = {}, []
    if plan.sync in ("gradient", "hogwild"):
        agree = plan.gradients if plan.gradients == "owner" else "shared" if shared(plan) else plan.sync
        bodies["step"] = [training(plan, layout, segments, rank, agree) for rank in range(plan.mesh.size)]
        runs = [("step", 1)]
    else:
        bodies["local"] = [training(plan, layout, segments, rank, "none") for rank in range(plan.mesh.size)]
        bodies["average"] = [training(plan, layout, segments, rank, "average") for rank in range(plan.mesh.size)]
        bodies["settle"] = [averaging(layout, first_token=0) for _ in range(plan.mesh.size)]
        runs = [("local", every - 1)] * (every > 1) + [("average", 1)]
    bodies["evaluate"] = [evaluation(plan, rank, segments) for rank in range(plan.mesh.size)]
    bodies["score"] = [scoring(plan, rank) for rank in range(plan.mesh.size)]
    return Program(
        mesh=plan.mesh,
        stages=stages,
        segments=segments,
        microbatches=plan.microbatches,
        buffers=tuple(buffers(layout, plan)),
        bodies=tuple((name, tuple(tuple(body) for body in ranks)) for name, ranks in bodies.items()),
        period=tuple(runs),
        epilogue=(("settle", 1),) if "settle" in bodies else (),
    )


def cut(plan: Plan, layout: Layout) -> tuple[tuple[int, int], ...]:
    """Layer ranges of the stages; raises PlanError with what binds and what would fit."""
    layers = len(layout.parameters)
    if plan.pp == 1:
        return ((0, layers),)
    if layout.cuttable:
        raise PlanError(f"pp={plan.pp}: {layout.cuttable}; dp takes any network")
    if plan.pp > layers:
        raise PlanError(f"pp={plan.pp}: the network has {layers} layers, so at most {layers} stages")
    split = plan.split or balanced([1.0] * layers, plan.pp)
    if sum(split) != layers:
        raise PlanError(f"split={'+'.join(map(str, split))} sums to {sum(split)}, but the network has {layers} layers")
    ends = [sum(split[: i + 1]) for i in range(plan.pp)]
    stages = tuple(zip([0, *ends], ends, strict=False))
    for first, last, name in layout.tied:
        if [a <= first < b for a, b in stages] != [a <= last < b for a, b in stages]:
            raise PlanError(f"pp={plan.pp}: layers {first} and {last} share {name} and must stay in one stage")
    return stages


def balanced(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Numbers of consecutive layers such that the costliest stage is as cheap as can be (dynamic programming)."""
    count = len(costs)
    total = [sum(costs[:i]) for i in range(count + 1)]
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
    for stage in range(1, stages + 1):
        for end in range(stage, count - stages + stage + 1):
            choices = (
                (max(best[stage - 1, start][0], total[end] - total[start]), start)
                for start in range(stage - 1, end)
                if (stage - 1, start) in best
            )
            worst, start = min(choices)
            best[stage, end] = worst, (*best[stage - 1, start][1], end - start)
    return best[stages, count][1]


def bucketed(stage: tuple[int, int], layout: Layout, bucket_bytes: int) -> tuple[tuple[int, int], ...]:
    """Segments of a stage: a new one, from the last layer backwards, whenever a bucket is full of float32 gradients."""
    first, last = stage
    if not bucket_bytes:
        return (stage,)
    cuts, held, end = [], 0, last
    for layer in range(last - 1, first, -1):
        held += 4 * layout.parameters[layer]
        if held >= bucket_bytes and any(layout.parameters[first:layer]):
            cuts.append((layer, end))
            end, held = layer, 0
    return tuple(reversed([*cuts, (first, end)]))


def synchronised(plan: Plan, layout: Layout) -> bool:
    """Whether replicas sum up what their batch norms measure; raises PlanError for a plan that cannot."""
    if plan.dp == 1 or not any(layout.norms):
        return False
    if plan.microbatches > 1 or plan.sync != "gradient":
        raise PlanError("batch norm over the whole batch needs microbatches=1 and sync=gradient; or a smaller bn_group")
    if plan.bucket_bytes:
        raise PlanError(
            "bucket_bytes: synchronised batch norm cuts stages where its layers are; leave bucket_bytes out"
        )
    return True


def norm_by_norm(stage: tuple[int, int], layout: Layout, bucket_bytes: int) -> tuple[tuple[int, int], ...]:
    """Segments of a stage: each ends in the middle of a batch norm, whose layer counts to the one it begins in."""
    first, last = stage
    cuts = [layer + 1 for layer in range(first, last) for _ in range(layout.norms[layer])]
    return tuple(zip([first, *cuts], [*cuts, last], strict=True))


def shared(plan: Plan) -> bool:
    """Whether replicas reduce gradients into one copy of the weights that all of them see."""
    return plan.comm == "openmp" and plan.dp > 1 and plan.sync == "gradient"


def buffers(layout: Layout, plan: Plan) -> list[Buffer]:
    """The flat buffers that a program's instructions may mention."""
    names = ["params", "grads", "totals", "score"]
    names += ["statistics", "running"] * layout.statistics + ["norm"] * layout.clip
    names += list(MOMENTS.values()) * synchronised(plan, layout)
    names += ["factors"] * (plan.gradients == "owner")
    common = ("params", "running", "factors") if shared(plan) or plan.sync == "hogwild" else ()
    return [Buffer(name, "shared" if name in common else "private") for name in names]


def training(plan: Plan, layout: Layout, segments: Sequence[Sequence[tuple[int, int]]], rank: int, agree: str) -> Body:
    """One optimiser step of one rank; `agree`: how replicas do (gradient, shared, owner, hogwild, average, none)."""
    dp, stage, _ = plan.mesh.coordinates(rank)
    order = SCHEDULES[plan.schedule or "layerwise"](plan.pp, plan.microbatches, stage)
    cuts = len(segments[stage])
    body = expand(order, plan, stage, dp, cuts)
    meets = synchronised(plan, layout)
    if agree == "gradient" and plan.dp > 1:
        body = add_reductions(body, stage, {0: -1} if meets else {k: k for k in range(cuts)})
    body = add_totals(body, plan, layout, stage)
    body = add_transfers(body, plan, rank)  # last, so that a gradient is on its way before a reduction begins
    if meets:
        body = add_moments(body, stage, cuts)
    if agree == "owner":
        body = part_weight_gradients(body)
    body = [I("Update", stage=stage, rule="zero"), *body]
    body += finish(plan, layout, stage, agree)
    return pair_tokens(body)


def expand(order: list[tuple[str, int]], plan: Plan, stage: int, dp: int, cuts: int, rule: str = "") -> Body:
    """F and B over a stage's segments, with the samples loaded where the first or the last stage needs them."""
    body = []
    for op, microbatch in order:
        part = dp * plan.microbatches + microbatch
        if op == "F" and stage in (0, plan.pp - 1):
            body.append(I("Load", stage=stage, microbatch=microbatch, slice=part, rule=rule))
        run = range(cuts) if op == "F" else reversed(range(cuts))
        body += [I(op, stage=stage, segment=k, microbatch=microbatch, slice=part, rule=rule) for k in run]
    return body


def add_transfers(body: Body, plan: Plan, rank: int) -> Body:
    """Sends never block and receives are posted one ahead; a send's buffer is kept until the next one of its kind."""
    dp, stage, tp = plan.mesh.coordinates(rank)
    out: Body = []
    last = {i.op: i.segment for i in body if i.op in "FB"}
    edges = {"F": ("RecvAct", stage - 1, "SendAct", stage + 1), "B": ("RecvGrad", stage + 1, "SendGrad", stage - 1)}
    todo = {op: [i.microbatch for i in body if i.op == op and i.segment == _first(op, last)] for op in "FB"}
    sending: dict[str, Instruction] = {}

    def transfer(op: str, to: int, microbatch: int) -> Instruction:
        return I(op, stage=stage, microbatch=microbatch, peer=plan.mesh.rank(dp, to, tp))

    def post(op: str) -> None:
        receive, source, _, _ = edges[op]
        if 0 <= source < plan.pp and todo[op]:
            out.append(transfer(receive + "Start", source, todo[op].pop(0)))

    for op in "FB":
        post(op)
    for instruction in body:
        op, microbatch = instruction.op, instruction.microbatch
        receive, source, send, target = edges.get(op, ("", -1, "", -1))
        if op in edges and instruction.segment == _first(op, last) and 0 <= source < plan.pp:
            out.append(transfer(receive + "Wait", source, microbatch))
            post(op)
        out.append(instruction)
        if op in edges and instruction.segment == last[op] and 0 <= target < plan.pp:
            if send in sending:
                out.append(sending[send])
            out.append(transfer(send + "Start", target, microbatch))
            sending[send] = transfer(send + "Wait", target, microbatch)
    return out + list(sending.values())


def _first(op: str, last: dict[str, int]) -> int:
    """The segment with which a stage's F or B begins, given the one with which each ends."""
    return 0 if op == "F" else last["F"]


def add_reductions(body: Body, stage: int, buckets: dict[int, int]) -> Body:
    """A bucket's reduction starts as soon as its last gradient is there; all are awaited before the update.

    `buckets`: the bucket that is complete with the last backward of a segment.
    """
    ends = {i.segment: index for index, i in enumerate(body) if i.op == "B"}
    out: Body = []
    for index, instruction in enumerate(body):
        out.append(instruction)
        if instruction.op == "B" and ends[instruction.segment] == index and instruction.segment in buckets:
            out.append(_reduce("Start", stage, "grads", buckets[instruction.segment]))
    return out + [_reduce("Wait", stage, "grads", k) for k in reversed(buckets.values())]


def add_moments(body: Body, stage: int, cuts: int) -> Body:
    """Between two segments of a stage replicas add up what they have measured: of samples, then of gradients."""
    out: Body = []
    for i in body:
        out.append(i)
        number = i.segment if i.op == "F" else i.segment - 1
        if i.op in MOMENTS and 0 <= number < cuts - 1:
            out += [_reduce(end, stage, MOMENTS[i.op], number) for end in ("Start", "Wait")]
    return out


def part_weight_gradients(body: Body) -> Body:
    """B becomes I; once all have what gradients are made of, each rank computes its own block: nothing to add up."""
    own = [replace(i, op="W", rule="owner") for i in body if i.op == "B"]
    parted = [replace(i, op="I") if i.op == "B" else i for i in body]
    return [*parted, *_both("dp", "factors", "", "AllGather"), *own]


def add_totals(body: Body, plan: Plan, layout: Layout, stage: int) -> Body:
    """Stages before the last learn the loss's weight, which only the last one sees, before bucket 0 carries it on."""
    if plan.pp == 1 or not layout.weight_in_data:
        return body
    at = next((n for n, i in enumerate(body) if i.op == "AllReduceStart" and i.bucket <= 0), len(body))
    both = [I(f"AllReduce{end}", stage=stage, axis="pp", buffer="totals", reduction="sum") for end in ("Start", "Wait")]
    return [*body[:at], *both, *body[at:]]


def finish(plan: Plan, layout: Layout, stage: int, agree: str) -> Body:
    """What stands between the reduced gradients and the next step."""
    body: Body = []
    common = agree in ("shared", "owner")
    if agree == "shared":
        body += _both("dp", "grads", "sum", "ReduceScatter")
    if layout.clip:
        body.append(I("Update", stage=stage, rule="norm"))
        if common:
            body += _both("dp", "norm", "sum")
        if plan.pp > 1:
            body += _both("pp", "norm", "sum")
    if layout.statistics:
        body += _both("dp", "statistics", "mean") if (common or agree == "gradient") and plan.dp > 1 else []
        body.append(I("Update", stage=stage, rule="statistics"))
    body.append(I("Update", stage=stage, rule="hogwild" if agree == "hogwild" else "step"))
    if common:
        body += _both("dp", "params", "", "AllGather")
    return body + (averaging(layout, None) if agree == "average" else [])


def averaging(layout: Layout, first_token: int | None) -> Body:
    """Replicas take the mean of their weights (local SGD, Stich 2019); momentum stays each replica's own."""
    body = _both("dp", "params", "mean") + (_both("dp", "running", "mean") if layout.statistics else [])
    return body if first_token is None else pair_tokens(body)


def evaluation(plan: Plan, rank: int, segments: Sequence[Sequence[tuple[int, int]]]) -> Body:
    """Forward only over the same stages; scores add up on the last one."""
    dp, stage, _ = plan.mesh.coordinates(rank)
    order = [("F", i) for i in range(plan.microbatches)]
    body = expand(order, plan, stage, dp, len(segments[stage]), rule="evaluate")
    return pair_tokens(add_transfers(body, plan, rank))


def scoring(plan: Plan, rank: int) -> Body:
    """Replicas of the last stage add up loss, weight and hits; the others have nothing to say."""
    last = plan.mesh.coordinates(rank)[1] == plan.pp - 1
    return pair_tokens(_both("dp", "score", "sum")) if last and plan.dp > 1 else []


def pair_tokens(body: Body) -> Body:
    """Number every start, and give its wait the same number."""
    tokens: dict[Instruction, int] = {}
    out: Body = []
    for instruction in body:
        if instruction.starts:
            key = replace(instruction, op=instruction.base + "Wait")
            tokens[key] = len(tokens)
            out.append(replace(instruction, token=tokens[key]))
        elif instruction.waits:
            out.append(replace(instruction, token=tokens[instruction]))
        else:
            out.append(instruction)
    return out


def _both(axis: str, buffer: str, reduction: str, op: str = "AllReduce") -> Body:
    return [I(f"{op}{end}", axis=axis, buffer=buffer, reduction=reduction) for end in ("Start", "Wait")]


def _reduce(end: str, stage: int, buffer: str, bucket: int) -> Instruction:
    return I(f"AllReduce{end}", stage=stage, axis="dp", buffer=buffer, bucket=bucket, reduction="sum")
