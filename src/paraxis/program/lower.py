"""From a plan to a program: schedules order the computing, passes add everything that communicates.

Read `lower` first: it is the table of contents.
"""

from collections.abc import Iterable, Sequence

from paraxis.plan.plan import Plan, period
from paraxis.program.cut import Layout, bucketed, cut, met, synchronised, ties, words
from paraxis.program.instructions import MOMENTS, SHARES, Buffer, Instruction, Program, Tie
from paraxis.program.passes import evaluation, follow, normed, pair_tokens, scoring, state, training
from paraxis.program.recompute import check_recompute, sublinear
from paraxis.program.slices import grouped, sliced
from paraxis.program.zero import used_buckets
from paraxis.sync.rule import Do, Sync, parse


def lower(plan: Plan, layout: Layout, steps_per_epoch: int = 1) -> Program:
    """The complete program of every rank; raises PlanError if the network cannot be cut as the plan asks."""
    stages = cut(plan, layout)
    meets = () if grouped(plan) else words(plan, layout)
    check_recompute(plan, layout, bool(meets))
    segments = tuple(met(stage, meets) if meets else bucketed(stage, layout, plan.bucket_bytes) for stage in stages)
    segments = tuple(sublinear(own) if s in plan.recomputed() else own for s, own in enumerate(segments))
    borders = tuple(tuple(w for own in meets[first:last] for w in own) for first, last in stages) if meets else ()
    if grouped(plan):
        segments, borders = (tuple(part) for part in zip(*sliced(plan, layout, stages), strict=True))
    met_in = [[n for n in range(*stage) for _ in meets[n]] for stage in stages] if meets else []
    between = borders or tuple(("cut",) * (len(own) - 1) for own in segments)
    tied = ties(plan, layout, stages)
    cuts = segments, between, used_buckets(segments, between, met_in, layout, tied, plan.pp) if plan.zero > 1 else {}
    sync = parse(plan.sync)

    def step(agree: str, reduce: Iterable[Do] = (), after: Iterable[Do] = ()) -> list[list[Instruction]]:
        ranks = range(plan.mesh.size)
        return [training(plan, layout, cuts, tied, rank, agree, reduce, after) for rank in ranks]

    def alike(steps: Iterable[Do], statistics: bool = False) -> list[list[Instruction]]:
        return [pair_tokens(follow(steps, statistics))] * plan.mesh.size

    bodies, runs = {}, [("step", 1)]
    if sync is None:
        bodies["step"] = step(plan.gradients if plan.gradients == "owner" else "shared" if shared(plan) else plan.sync)
    elif sync.rule.gradients:
        bodies["step"] = step("gradient", reduce=sync.rule.gradients)
    else:
        found, runs = agreements(sync, period(plan.sync, steps_per_epoch))
        bodies["local"] = step("none")
        bodies |= {name: step("none", after=steps) for name, steps in found.items()}
    edges = {"begin": sync.rule.prologue, "settle": sync.rule.epilogue} if sync else {}
    bodies |= {name: alike(steps, name == "settle" and layout.statistics) for name, steps in edges.items() if steps}
    bodies["evaluate"] = [evaluation(plan, layout, rank, cuts) for rank in range(plan.mesh.size)]
    bodies["score"] = [scoring(plan, rank) for rank in range(plan.mesh.size)]
    if plan.zero == 3:
        bodies["state"] = [state(plan, rank, cuts) for rank in range(plan.mesh.size)]
    return Program(
        mesh=plan.mesh,
        stages=stages,
        segments=segments,
        microbatches=plan.microbatches,
        buffers=tuple(buffers(layout, plan, tied)),
        bodies=tuple((name, tuple(tuple(body) for body in ranks)) for name, ranks in bodies.items()),
        period=tuple(runs),
        prologue=(("begin", 1),) if "begin" in bodies else (),
        epilogue=(("settle", 1),) if "settle" in bodies else (),
        ties=tied,
        words=borders,
        precision=plan.precision,
    )


def agreements(sync: Sync, every: int) -> tuple[dict[str, list[Do]], list[tuple[str, int]]]:
    """(body -> what replicas do after its step, the period: such bodies and the local steps between them)."""
    bodies: dict[str, list[Do]] = {}
    runs: list[tuple[str, int]] = []
    steps, before = sync.agreements(every), 0
    for number, at in enumerate(sorted(steps)):
        name = sync.rule.name + (str(number) if len(steps) > 1 else "")
        bodies[name] = steps[at]
        runs += [("local", at - 1 - before)] * (at - 1 > before) + [(name, 1)]
        before = at
    return bodies, runs


def shared(plan: Plan) -> bool:
    """Whether ranks that train the same layers have one copy of the weights that all of them see."""
    return plan.comm == "openmp" and plan.dp * plan.tp > 1 and plan.sync == "gradient"


def buffers(layout: Layout, plan: Plan, tied: Sequence[Tie] = ()) -> list[Buffer]:
    """The flat buffers that a program's instructions may mention."""
    names = ["params", "grads", "totals", "score"]
    names += ["statistics", "running"] * layout.statistics + ["norm"] * normed(plan, layout)
    names += list(MOMENTS.values()) * synchronised(plan, layout)
    names += ["tied"] * bool(tied)
    names += ["whole"] * plan.sequence
    names += ["factors"] * (plan.gradients == "owner")
    names += ["state"] * (plan.zero > 0)
    names += SHARES * grouped(plan)
    sync = parse(plan.sync)
    names += sync.rule.buffers if sync else ()
    scopes = dict.fromkeys(names, "private") | dict.fromkeys(("state", "grads", "params")[: plan.zero], "sharded")
    common = ("params", "running", "factors", *SHARES) if shared(plan) or plan.sync == "hogwild" else ()
    return [Buffer(name, "shared" if name in common else scopes[name]) for name in names]
