"""Schedules: in which order a rank computes its stages' microbatches. Nothing here knows of peers or of seconds.

Each is a pure function (ranks, microbatches, rank, stages of each rank) -> [(op, stage, microbatch), ...].
Stage s lies on rank s % ranks: with several stages of each rank a microbatch goes round the ranks several times.
A backward is one B, or an I (the gradient of the input, which the stage before waits for) and, any time later, a W (the
gradient of the weights). Below p is the number of ranks, r one of them, m the microbatches, v the stages of each rank,
t_F, t_B, t_I and t_W what a rank takes for a microbatch (all of its stages); a live activation is that of one stage.
"""

from collections.abc import Callable
from itertools import pairwise

Order = list[tuple[str, int, int]]


def layerwise(ranks: int, microbatches: int, rank: int, stages: int = 1) -> Order:
    """Naive model parallelism: a microbatch travels through all stages and back before the next one starts."""
    own = range(rank, ranks * stages, ranks)
    return [(op, s, i) for i in range(microbatches) for op, order in (("F", own), ("B", reversed(own))) for s in order]


def gpipe(ranks: int, microbatches: int, rank: int, stages: int = 1) -> Order:
    """All forwards, then all backwards (Huang et al. 2019): bubble (p-1)/(m+p-1) of the step, all mv live."""
    own = range(rank, ranks * stages, ranks)
    return [(op, s, i) for op, order in (("F", own), ("B", reversed(own))) for s in order for i in range(microbatches)]


def one_f_one_b(ranks: int, microbatches: int, rank: int, stages: int = 1) -> Order:
    """Backward as early as possible (PipeDream-Flush, Narayanan et al. 2021): GPipe's bubble, at most p-r live."""
    warmup = min(ranks - 1 - rank, microbatches)
    order: Order = [("F", rank, i) for i in range(warmup)]
    for i in range(warmup, microbatches):
        order += [("F", rank, i), ("B", rank, i - warmup)]
    return order + [("B", rank, i) for i in range(microbatches - warmup, microbatches)]


def interleaved(ranks: int, microbatches: int, rank: int, stages: int = 2) -> Order:
    """1F1B of several stages a rank (Narayanan et al. 2021, section 2.2): bubble (p-1)(t_F+t_B)/v, for m >= p.

    Microbatches go through a rank's stages in groups of p, here of p or more where m is no multiple: a smaller group
    would not be back from the last rank when the first needs it. With groups of g = ceil(m / (m // p)) at most
    (v-1)g + 2(p-1-r) + 1 are live.
    """
    groups = max(1, microbatches // ranks)
    each, larger = divmod(microbatches, groups)
    ends = [n * each + min(n, larger) for n in range(groups + 1)]  # the larger groups first
    own = range(rank, ranks * stages, ranks)
    cut = [range(a, b) for a, b in pairwise(ends)]
    forward: Order = [("F", s, i) for group in cut for s in own for i in group]
    backward: Order = [("B", s, i) for group in cut for s in reversed(own) for i in group]
    warmup = min((stages - 1) * len(cut[0]) + 2 * (ranks - 1 - rank), len(forward))
    steady = [cell for pair in zip(forward[warmup:], backward, strict=False) for cell in pair]
    return forward[:warmup] + steady + backward[len(forward) - warmup :]


def zb_h1(ranks: int, microbatches: int, rank: int, stages: int = 1) -> Order:
    """ZB-H1 (Qi et al. 2023, section 2.1): W fills what 1F1B idles: bubble (p-1)(t_F+t_I-t_W), at most p live.

    For m >= p and t_W <= t_F. The bubble is a rank's from its own first F to its own last W: no barrier ends a step.
    """
    return _zero_bubble(microbatches, rank, warmup=ranks - rank, most=ranks)


def _zero_bubble(microbatches: int, rank: int, warmup: int, most: int) -> Order:
    """So many forwards first, then I and F in turn, with a W where `most` are live (from F to W) or no F is left."""
    order: Order = [("F", rank, i) for i in range(min(warmup, microbatches))]
    forwards, weights = len(order), 0
    for i in range(microbatches):
        order.append(("I", rank, i))
        if forwards in (microbatches, weights + most):
            order.append(("W", rank, weights))
            weights += 1
        if forwards < microbatches:
            order.append(("F", rank, forwards))
            forwards += 1
    return order + [("W", rank, i) for i in range(weights, microbatches)]


Schedule = Callable[[int, int, int, int], Order]
SCHEDULES: dict[str, Schedule] = {
    "layerwise": layerwise,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
}
STAGES = {"interleaved": 2}  # of each rank, for a plan that names none
ONE_STAGE = ("1f1b", "zb-h1")  # schedules of one stage a rank


def parted(name: str) -> bool:
    """Whether a schedule has its backward in two halves."""
    return any(op == "W" for op, _, _ in SCHEDULES[name](1, 1, 0, 1))
