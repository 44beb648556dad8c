"""Where a network is cut: into stages for the ranks of a pipeline, into segments between two communications."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice, pairwise

from paraxis.errors import PlanError
from paraxis.plan.plan import Plan, usual_bucket
from paraxis.program.instructions import Tie
from paraxis.program.shares import Split, Tokens, chosen, sharing, told, words_of


@dataclass(frozen=True)
class Layout:
    """What lowering has to know of a network: the trained `parameters` of each layer (of one that several share the
    first counts it), and what its training needs to agree on.

    `weight_in_data`: the loss's weight is known only after the forwards. `statistics`: it has running statistics.
    `clip`: gradients are clipped by their global norm. `cuttable`: empty, or why its layers cannot be split. `norms`:
    how many batch norms each layer has whose statistics cover the whole global batch (none: they cover slices).
    `unkeyed`: modules whose random numbers nobody can draw again.
    """

    parameters: tuple[int, ...]
    weight_in_data: bool = False
    statistics: bool = False
    clip: bool = False
    cuttable: str = ""
    tied: tuple[tuple[str, tuple[int, ...]], ...] = ()  # a parameter, and the layers that share it
    norms: tuple[int, ...] = ()
    splits: tuple[Split, ...] = ()  # what tensor parallelism can share, in the order of a forward
    tokens: tuple[Tokens, ...] = ()  # ... and how the tokens between them
    modules: tuple[str, ...] = ()  # names of those that have parameters of their own
    unkeyed: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()  # of each layer, how threads share it; see program.slices


def cut(plan: Plan, layout: Layout) -> tuple[tuple[int, int], ...]:
    """Layer ranges of the stages; raises PlanError with what binds and what would fit."""
    layers = len(layout.parameters)
    if plan.pp == 1:
        return ((0, layers),)
    if layout.cuttable:
        raise PlanError(f"pp={plan.pp}: {layout.cuttable}; dp takes any network")
    if plan.stages > layers:
        asked = f"pp={plan.pp}" + f",interleave={plan.interleave}" * (plan.interleave > 1)
        raise PlanError(f"{asked}: the network has {layers} layers, so at most {layers} stages")
    split = plan.split or balanced([1.0] * layers, plan.stages)
    if sum(split) != layers:
        raise PlanError(f"split={'+'.join(map(str, split))} sums to {sum(split)}, but the network has {layers} layers")
    ends = [sum(split[: i + 1]) for i in range(plan.stages)]
    return tuple(zip([0, *ends], ends, strict=False))


def ties(plan: Plan, layout: Layout, stages: Sequence[tuple[int, int]]) -> tuple[Tie, ...]:
    """The parameters that lie on several ranks of the pipeline."""
    found = []
    for name, layers in layout.tied:
        own = [s for s, (first, last) in enumerate(stages) if any(first <= layer < last for layer in layers)]
        if len({s % plan.pp for s in own}) > 1:
            found.append(Tie(name, tuple(own)))
    return tuple(found)


def balanced(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Numbers of consecutive layers such that the costliest stage is as cheap as can be."""
    return balanced_on([costs] * stages)


def balanced_on(costs: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """The same where a layer costs `costs[stage][layer]` in each stage (dynamic programming)."""
    stages, count = len(costs), len(costs[0])
    totals = [[sum(own[:i]) for i in range(count + 1)] for own in costs]
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
    for stage in range(1, stages + 1):
        for end in range(stage, count - stages + stage + 1):
            choices = (
                (max(best[stage - 1, start][0], totals[stage - 1][end] - totals[stage - 1][start]), start)
                for start in range(stage - 1, end)
                if (stage - 1, start) in best
            )
            worst, start = min(choices)
            best[stage, end] = worst, (*best[stage - 1, start][1], end - start)
    return best[stages, count][1]


def splits(costs: Sequence[Sequence[float]], most: int = 2000) -> list[tuple[int, ...]]:
    """Ways of cutting, of which the costliest stage costs least first; of very many only some."""
    stages, count = len(costs), len(costs[0])
    totals = [[sum(own[:i]) for i in range(count + 1)] for own in costs]
    found = []
    for inner in islice(combinations(range(1, count), stages - 1), most):
        ends = (0, *inner, count)
        worst = max(totals[s][b] - totals[s][a] for s, (a, b) in enumerate(pairwise(ends)))
        found.append((worst, tuple(b - a for a, b in pairwise(ends))))
    return [split for _, split in sorted(found)]


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
    if plan.bucket_bytes != usual_bucket(plan.zero):
        raise PlanError(
            "bucket_bytes: synchronised batch norm cuts stages where its layers are; leave bucket_bytes out"
        )
    return True


def words(plan: Plan, layout: Layout) -> tuple[tuple[str, ...], ...]:
    """Of each layer, what its ranks meet for, in the order of a forward; none at all: nothing. Raises PlanError."""
    meets = synchronised(plan, layout)
    if plan.tp == 1:
        return tuple(("norm",) * count for count in layout.norms) if meets else ()
    if meets:
        raise PlanError(f"tp={plan.tp}: batch norm over all ranks cannot be had with it; set bn_group lower")
    if plan.bucket_bytes != usual_bucket(plan.zero):
        raise PlanError("bucket_bytes: tensor parallelism cuts stages where its layers are; leave bucket_bytes out")
    if plan.sequence:
        return words_of([sharing(plan.tp, layout.splits, layout.tokens)], len(layout.parameters))
    return words_of(chosen(plan.tp, layout.splits), len(layout.parameters))


def met(stage: tuple[int, int], words: Sequence[Sequence[str]]) -> tuple[tuple[int, int], ...]:
    """Segments of a stage: each ends where ranks meet, and the layer in whose middle that is counts to the one it
    begins in; a gradient is met in front of a layer, and so are tokens that it gathers."""
    first, last = stage
    cuts = [
        layer + (own[0] not in ("grad", "gather") or n > 0)
        for layer, own in _numbered(stage, words)
        for n in range(len(own))
    ]
    return tuple(zip([first, *cuts], [*cuts, last], strict=True))


def told_of(plans: Sequence[Plan], layout: Layout) -> list[str]:
    """For people: what each of these plans splits over the ranks of a `tp` group, and what it leaves whole."""
    kinds = sorted({(p.tp, p.sequence, p.engine == "native") for p in plans if p.tp > 1})
    return [
        f"tp={tp} native: threads share every layer, each making its own channels of it"
        if native
        else told(tp, layout.splits, layout.modules, layout.tokens if sequence else None)
        for tp, sequence, native in kinds
    ]


def _numbered(stage: tuple[int, int], words: Sequence[Sequence[str]]) -> list[tuple[int, Sequence[str]]]:
    return [(layer, words[layer]) for layer in range(*stage)]
