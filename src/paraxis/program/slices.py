"""How the threads of a `tp` group share a stage on the native engine: one copy of everything, each makes a part of it.

Each thread computes its own channels of every layer's output (or heads, or blocks of samples); in a backward its own
channels of the input's gradient, for which it needs the whole gradient of the output, and its own block of the weights'
gradient. All of that lies in memory that the group has in common, so nothing is ever added up or sent: where a layer
reads what others have written, they have to be waited for. Such a wait is an all-gather of no bytes of the shared
buffer `acts` (in a forward) or `act_grads` (in a backward) on the axis `tp`, as that of `params` is after an update of
common weights. It stands between two segments like any other meeting (program.meetings).

Letters say how threads share a layer (csrc/layers/layer.h: Sharing). Of `o` each needs but its own channels:
elementwise functions, pools, batch norms, tables. `m` (matrices: linear layers and convolutions) reads all of its
input, and backwards all of its output's gradient. So does `a`, of which each makes another part than channels: layer
norms in blocks of samples, attention in heads; its neighbours wait, too. `r` is a ReLU: part of an `m` in front of it,
which is `w` with it, otherwise an `o`.
"""

from collections.abc import Sequence
from itertools import pairwise

from paraxis.errors import PlanError
from paraxis.plan.plan import Plan
from paraxis.program.cut import Layout

Cuts = tuple[tuple[tuple[int, int], ...], tuple[str, ...]]  # segments of a stage, and the words of their borders
READS_ALL = "mwa"


def grouped(plan: Plan) -> bool:
    """Whether the ranks of a `tp` group are threads that share all they have."""
    return plan.tp > 1 and plan.engine == "native"


def sliced(plan: Plan, layout: Layout, stages: Sequence[tuple[int, int]]) -> list[Cuts]:
    """Of each stage its segments and borders; raises PlanError for what a group cannot do.

    What comes in and what goes out, the loss included, belongs to no thread in particular: there all wait.
    """
    if plan.dp > 1 and any(layout.norms):
        raise PlanError(f"tp={plan.tp}: batch norm over all ranks cannot be had with it; set bn_group lower")
    if plan.bucket_bytes:
        raise PlanError("bucket_bytes: threads of a tp group make all gradients in one place; leave bucket_bytes out")
    return [_stage(stage, layout.shares) for stage in stages]


def _stage(stage: tuple[int, int], shares: Sequence[str]) -> Cuts:
    first, last = stage
    row = _resolved([(layer, letter) for layer in range(first, last) for letter in shares[layer]])
    cuts, words = [first], ["shared"]
    for (layer, before), (following, behind) in pairwise(row):
        forward, backward = behind in READS_ALL or before == "a", before in READS_ALL or behind == "a"
        if forward or backward:
            cuts.append(following if following > layer else layer + 1)
            words.append("shared" if forward and backward else "acts" if forward else "act_grads")
    cuts, words = [*cuts, last], [*words, "shared"]
    return tuple(zip([first, *cuts], [*cuts, last], strict=True)), tuple(words)


def _resolved(row: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Without ReLUs: each is part of a matrix right in front of it, which can have one, or a layer of its own."""
    out: list[tuple[int, str]] = []
    for layer, letter in row:
        if letter == "r" and out and out[-1][1] == "m":
            out[-1] = out[-1][0], "w"
        else:
            out.append((layer, "o" if letter == "r" else letter))
    return out
