"""Schedules: in which order a rank computes its stages' microbatches. Nothing here knows of peers or of seconds.

Each is a pure function (ranks, microbatches, rank, stages of each rank) -> [(op, stage, microbatch), ...].
Stage s lies on rank s % ranks: with several stages of each rank a microbatch goes round the ranks several times.
"""

from collections.abc import Callable

Order = list[tuple[str, int, int]]


def layerwise(ranks: int, microbatches: int, rank: int, stages: int = 1) -> Order:
    """Naive model parallelism: a microbatch travels through all stages and back before the next one starts."""
    own = range(rank, ranks * stages, ranks)
    return [(op, s, i) for i in range(microbatches) for op, order in (("F", own), ("B", reversed(own))) for s in order]


def gpipe(ranks: int, microbatches: int, rank: int, stages: int = 1) -> Order:
    """All forwards, then all backwards (Huang et al. 2019): bubble (p-1)/(m+p-1), m live microbatches."""
    own = range(rank, ranks * stages, ranks)
    return [(op, s, i) for op, order in (("F", own), ("B", reversed(own))) for s in order for i in range(microbatches)]


def one_f_one_b(ranks: int, microbatches: int, rank: int, stages: int = 1) -> Order:
    """Backward as early as possible (PipeDream-Flush, Narayanan et al. 2021): GPipe's bubble, at most p-stage live."""
    warmup = min(ranks - 1 - rank, microbatches)
    order: Order = [("F", rank, i) for i in range(warmup)]
    for i in range(warmup, microbatches):
        order += [("F", rank, i), ("B", rank, i - warmup)]
    return order + [("B", rank, i) for i in range(microbatches - warmup, microbatches)]


SCHEDULES: dict[str, Callable[[int, int, int, int], Order]] = {
    "layerwise": layerwise,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
}
ONE_STAGE = ("1f1b",)  # schedules of one stage a rank
