"""The passes of lowering: a schedule's order becomes a rank's whole list of instructions, communication included.

`training` and `evaluation` are the tables of contents; every pass takes a body and gives one back.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count

from paraxis.plan.own import find, is_own
from paraxis.plan.plan import Plan
from paraxis.plan.precision import SCALED
from paraxis.plan.schedules import Order
from paraxis.program.cut import Layout
from paraxis.program.instructions import CROSSING, GRADIENT, Instruction, Tie
from paraxis.program.meetings import Words, add_meetings, begins
from paraxis.program.recompute import recompute
from paraxis.program.zero import Used, buckets_of, copying, gather_parameters, shard_gradients, shard_parameters
from paraxis.sync.rule import Do, agree

Body = list[Instruction]
Cuts = tuple[Sequence[Sequence[tuple[int, int]]], Sequence[Words], Used]  # of every stage, its segments and borders
I = Instruction  # noqa: E741  (the passes below are tables of instructions)


def training(
    plan: Plan,
    layout: Layout,
    cuts: Cuts,
    ties: Sequence[Tie],
    rank: int,
    agree: str,
    reduce: Iterable[Do] = (),
    after: Iterable[Do] = (),
) -> Body:
    """One optimiser step of one rank; `agree`: how replicas do (gradient, shared, owner, hogwild, none).

    `reduce` and `after`: what a synchronisation rule does with gradients, and with weights once they have been updated.
    """
    dp, place, _ = plan.mesh.coordinates(rank)
    order = find(plan.schedule or "layerwise")(plan.pp, plan.microbatches, place, plan.interleave)
    body = recompute(expand(order, plan, dp, cuts), plan.recomputed())
    tied = add_ties(plan, ties, place)
    meets = any(word != "cut" for own in cuts[1] for word in own)
    if reduce:
        totals = _both("dp", "totals", "sum") if layout.weight_in_data else []  # which no rounding may reach
        body += [replace(i, stage=place) for i in [*totals, *follow(reduce)]]
    elif plan.zero > 1:
        shares = buckets_of(cuts[2], place, plan.pp)
        body = shard_gradients(body, cuts[2])
    elif agree == "gradient" and plan.dp > 1:
        whole = meets or ((plan.interleave > 1 or plan.recompute) and not plan.bucket_bytes)
        buckets = _whole(body) if whole else _each(cuts, body)
        shares = [(stage, bucket) for (stage, _), bucket in buckets.items()]
        if plan.zero == 1 and tied:  # shares are shares of sums, so copies are added up before
            tied += scatter(buckets)
        else:
            body = add_reductions(body, buckets, "ReduceScatter" if plan.zero else "AllReduce")
    if plan.zero == 3:
        body = shard_parameters(body, cuts[2])
    if plan.sequence and plan.zero < 2:
        body = add_whole(body)
    elif plan.sequence:  # of what replicas have reduced microbatch by microbatch, each has its share
        tied = _both("tp", "whole", "sum") + tied
    body = add_totals(body, plan, layout, place)
    body = add_transfers(body, plan, rank)  # last, so that a gradient is on its way before a reduction begins
    body = add_meetings(body, cuts[1])
    if agree == "owner":
        body = part_weight_gradients(body)
    body = [I("Update", stage=place, rule="zero"), *body]
    body += finish(plan, layout, place, agree, tied)
    if plan.zero in (1, 2):
        body += gather_parameters(shares)
    body += follow(after, layout.statistics)
    return pair_tokens(body)


def _whole(body: Body) -> dict[tuple[int, int], int]:
    """One bucket for all, complete with the last gradient of the body."""
    last = [i for i in body if i.op in ("B", "W")][-1]
    return {(last.stage, last.segment): -1}


def _each(cuts: Cuts, body: Body) -> dict[tuple[int, int], int]:
    """A bucket for every segment of the stages that a body computes."""
    return {(s, k): k for s in sorted({i.stage for i in body}) for k in range(len(cuts[0][s]))}


def expand(order: Order, plan: Plan, dp: int, cuts: Cuts, rule: str = "") -> Body:
    """F and B over a stage's segments, with the samples loaded where the first or the last stage needs them."""
    body = []
    for op, stage, microbatch in order:
        part = dp * plan.microbatches + microbatch
        if op == "F" and stage in (0, plan.stages - 1):
            body.append(I("Load", stage=stage, microbatch=microbatch, slice=part, rule=rule))
        own = begins("E" if rule == "evaluate" else WAYS.get(op, "B"), cuts[1][stage])
        run = own if op == "F" else reversed(own)
        body += [I(op, stage=stage, segment=k, microbatch=microbatch, slice=part, rule=rule) for k in run]
    return body


# Of F and B (or I): what a stage receives before it from the stage so far away, and what it sends after it to which.
EDGES = {"F": ("RecvAct", -1, "SendAct", +1), "B": ("RecvGrad", +1, "SendGrad", -1)}
WAYS = {"F": "F", "B": "B", "I": "B"}


def _way(i: Instruction) -> str:
    """Whether it goes forward or back through the stages; what is computed again has been sent the first time."""
    return WAYS.get(i.op, "") if i.rule != "again" else ""


def add_transfers(body: Body, plan: Plan, rank: int) -> Body:
    """Sends never block and receives are posted one ahead; a send's buffer is kept until the next one of its kind.

    Where a rank has several stages, or a user orders them, a sender would wait for a receive that is posted only after
    what the sender has yet to do. There an activation is kept until its gradient has come, as B needs it anyway, and
    that gradient's receive is posted as soon as the activation is sent: then nothing but data is waited for.
    """
    dp, _, tp = plan.mesh.coordinates(rank)
    patient = plan.interleave > 1 or is_own(plan.schedule)
    out: Body = []
    ends = {(_way(i), i.stage): i.segment for i in body if _way(i)}  # with which each stage's F and B end
    fronts = {(_way(i), i.stage): i.segment for i in reversed(body) if _way(i)}  # ... and begin
    todo: dict[tuple[str, int], list[int]] = {key: [] for key in ends}
    for i in body:
        if _way(i) and i.segment == fronts[_way(i), i.stage]:
            todo[_way(i), i.stage].append(i.microbatch)
    sending: dict[tuple[str, int, int], Instruction] = {}

    def transfer(op: str, stage: int, away: int, microbatch: int) -> Instruction:
        peer = plan.mesh.rank(dp, (stage + away) % plan.pp, tp)
        return I(op, stage=stage, microbatch=microbatch, peer=peer)

    def post(op: str, stage: int, microbatch: int = -1) -> None:
        receive, source, _, _ = EDGES[op]
        waiting = todo.get((op, stage), [])
        if 0 <= stage + source < plan.stages and (microbatch in waiting if microbatch >= 0 else waiting):
            taken = waiting.pop(waiting.index(microbatch) if microbatch >= 0 else 0)
            out.append(transfer(receive + "Start", stage, source, taken))

    for op, stage in ends:
        if not (patient and op == "B"):
            post(op, stage)
    for i in body:
        key = op, stage = _way(i), i.stage
        receive, source, send, target = EDGES.get(op, ("", 0, "", 0))
        if source and i.segment == fronts[key] and 0 <= stage + source < plan.stages:
            out.append(transfer(receive + "Wait", stage, source, i.microbatch))
            if not (patient and op == "B"):
                post(op, stage)
            elif ("F", stage, i.microbatch) in sending:
                out.append(sending.pop(("F", stage, i.microbatch)))
        out.append(i)
        if target and i.segment == ends[key] and 0 <= stage + target < plan.stages:
            name = op, stage, i.microbatch if patient and op == "F" else -1
            if name in sending:
                out.append(sending[name])
            out.append(transfer(send + "Start", stage, target, i.microbatch))
            sending[name] = transfer(send + "Wait", stage, target, i.microbatch)
            if patient and op == "F":
                post("B", stage, i.microbatch)
    return out + list(sending.values())


def add_reductions(body: Body, buckets: dict[tuple[int, int], int], op: str = "AllReduce") -> Body:
    """A bucket's reduction starts as soon as its last gradient is there; all are awaited before the update.

    `buckets`: the bucket that is complete with the last B (or W) of a (stage, segment); -1: all of the rank's.
    """
    ends = {(i.stage, i.segment): index for index, i in enumerate(body) if i.op in ("B", "W")}
    out: Body = []
    for index, i in enumerate(body):
        out.append(i)
        if i.op in ("B", "W") and ends[i.stage, i.segment] == index and (i.stage, i.segment) in buckets:
            out.append(_reduce("Start", i.stage, "grads", buckets[i.stage, i.segment], op))
    return out + [_reduce("Wait", stage, "grads", buckets[stage, k], op) for stage, k in reversed(buckets)]


def add_whole(body: Body) -> Body:
    """Parameters between splits see but a rank's own tokens: their gradients are added up as soon as all are there."""
    last = max(n for n, i in enumerate(body) if i.op in GRADIENT)
    return [*body[: last + 1], *_both("tp", "whole", "sum"), *body[last + 1 :]]


def scatter(buckets: dict[tuple[int, int], int]) -> Body:
    """Buckets reduced into shares one after the other, when all of them are complete."""
    ends = ("Start", "Wait")
    return [_reduce(end, stage, "grads", k, "ReduceScatter") for (stage, _), k in buckets.items() for end in ends]


def part_weight_gradients(body: Body) -> Body:
    """B becomes I; once all have what gradients are made of, each rank computes its own block: nothing to add up."""
    own = [replace(i, op="W", rule="owner") for i in body if i.op == "B"]
    parted = [replace(i, op="I") if i.op == "B" else i for i in body]
    return [*parted, *_both("dp", "factors", "", "AllGather"), *own]


def add_totals(body: Body, plan: Plan, layout: Layout, stage: int) -> Body:
    """Stages before the last learn the loss's weight, which only the last one sees, before bucket 0 carries it on."""
    if plan.pp == 1 or not layout.weight_in_data:
        return body
    first = ((n, i) for n, i in enumerate(body) if i.op == "AllReduceStart" and i.stage == stage)
    at = next((n for n, i in first if i.bucket <= 0), len(body))
    both = [I(f"AllReduce{end}", stage=stage, axis="pp", buffer="totals", reduction="sum") for end in ("Start", "Wait")]
    return [*body[:at], *both, *body[at:]]


def add_ties(plan: Plan, ties: Sequence[Tie], place: int) -> Body:
    """Ranks that have copies of a parameter add up its gradient, so that all copies take the same step."""
    body: Body = []
    for number, tie in enumerate(ties):
        places = sorted({stage % plan.pp for stage in tie.stages})
        axis = "pp" if len(places) == plan.pp else f"pp:{'+'.join(map(str, places))}"
        if place in places:
            body += [replace(i, bucket=number) for i in _both(axis, "tied", "sum")]
    return body


def finish(plan: Plan, layout: Layout, stage: int, agree: str, tied: Body) -> Body:
    """What stands between the reduced gradients and the next step; `tied` comes before a rank keeps to its own part."""
    body: Body = [*tied]
    common = agree in ("shared", "owner")
    if agree == "shared" and plan.dp > 1:
        body += _both("dp", "grads", "sum", "ReduceScatter")
    apart = plan.dp > 1 and (common or plan.zero > 0)  # of reduced gradients, each replica has its own share
    if apart and layout.weight_in_data:
        body += _both("dp", "totals", "sum")
    if normed(plan, layout):
        body.append(I("Update", stage=stage, rule="norm"))
        if apart:
            body += _both("dp", "norm", "sum")
        if plan.pp > 1:
            body += _both("pp", "norm", "sum")
        if plan.tp > 1:
            body += _both("tp", "norm", "sum")
    if layout.statistics:
        body += _both("dp", "statistics", "mean") if (common or agree == "gradient") and plan.dp > 1 else []
        body.append(I("Update", stage=stage, rule="statistics"))
    body.append(I("Update", stage=stage, rule="hogwild" if agree == "hogwild" else "step"))
    for axis, ranks in (("dp", plan.dp), ("tp", plan.tp)):
        body += _both(axis, "params", "", "AllGather") if common and ranks > 1 else []
    return body


def normed(plan: Plan, layout: Layout) -> bool:
    """Whether a step has the gradient's norm made: to clip by, or to tell whether scaled gradients have overflowed."""
    return layout.clip or plan.precision == SCALED


def follow(steps: Iterable[Do], statistics: bool = False) -> Body:
    """What a synchronisation rule asks for, in instructions, and if there are running `statistics` their mean."""
    body: Body = []
    for do in (steps := list(steps)):
        if do.op == "Update":
            body.append(I("Update", rule=do.rule, bucket=do.bucket))
            continue
        whole = do.op == "AllReduce"
        ends = (
            _both("dp", do.buffer, do.reduction)
            if whole
            else [I(do.op, axis="dp", buffer=do.buffer, reduction=do.reduction, token=CROSSING + max(do.bucket, 0))]
        )
        body += [replace(i, bucket=do.bucket, payload=do.payload) for i in ends]
    return body + (_both("dp", "running", "mean") if statistics and agree(steps) else [])


def evaluation(plan: Plan, layout: Layout, rank: int, cuts: Cuts) -> Body:
    """Forward only over the same stages; scores add up on the last one."""
    dp, place, _ = plan.mesh.coordinates(rank)
    own = range(place, plan.stages, plan.pp)
    body = expand([("F", s, i) for s in own for i in range(plan.microbatches)], plan, dp, cuts, rule="evaluate")
    if plan.zero == 3:
        body = shard_parameters(body, cuts[2])
    return pair_tokens(add_meetings(add_transfers(body, plan, rank), cuts[1]))


def scoring(plan: Plan, rank: int) -> Body:
    """Replicas of the last stage add up loss, weight and hits; the others have nothing to say."""
    last = plan.mesh.coordinates(rank)[1] == plan.pp - 1
    return pair_tokens(_both("dp", "score", "sum")) if last and plan.dp > 1 else []


def state(plan: Plan, rank: int, cuts: Cuts) -> Body:
    """How the weights that no rank has whole come to be read."""
    return pair_tokens(copying(buckets_of(cuts[2], plan.mesh.coordinates(rank)[1], plan.pp)))


def pair_tokens(body: Body) -> Body:
    """Number every start, and give its wait the same number; those that cross steps have one already."""
    tokens: dict[Instruction, int] = {}
    numbers = count()  # what is sent again, microbatch by microbatch, has another one each time
    out: Body = []
    for instruction in body:
        if instruction.token >= CROSSING:
            out.append(instruction)
        elif instruction.starts:
            key = replace(instruction, op=instruction.base + "Wait")
            tokens[key] = next(numbers)
            out.append(replace(instruction, token=tokens[key]))
        elif instruction.waits:
            out.append(replace(instruction, token=tokens[instruction]))
        else:
            out.append(instruction)
    return out


def _both(axis: str, buffer: str, reduction: str, op: str = "AllReduce") -> Body:
    return [I(f"{op}{end}", axis=axis, buffer=buffer, reduction=reduction) for end in ("Start", "Wait")]


def _reduce(end: str, stage: int, buffer: str, bucket: int, op: str = "AllReduce") -> Instruction:
    return I(f"{op}{end}", stage=stage, axis="dp", buffer=buffer, bucket=bucket, reduction="sum")
