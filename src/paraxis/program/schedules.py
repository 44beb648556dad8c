"""Schedules: in which order a stage computes its microbatches. Nothing here knows of peers or of seconds.

Each is a pure function (stages, microbatches, stage) -> [(op, microbatch), ...].
"""

from collections.abc import Callable

Order = list[tuple[str, int]]


def layerwise(stages: int, microbatches: int, stage: int) -> Order:
    """Naive model parallelism: a microbatch travels through all stages and back before the next one starts."""
    return [(op, i) for i in range(microbatches) for op in "FB"]


def gpipe(stages: int, microbatches: int, stage: int) -> Order:
    """All forwards, then all backwards (Huang et al. 2019): bubble (p-1)/(m+p-1), m live microbatches."""
    return [(op, i) for op in "FB" for i in range(microbatches)]


def one_f_one_b(stages: int, microbatches: int, stage: int) -> Order:
    """Backward as early as possible (PipeDream-Flush, Narayanan et al. 2021): GPipe's bubble, at most p-stage live."""
    warmup = min(stages - 1 - stage, microbatches)
    order: Order = [("F", i) for i in range(warmup)]
    for i in range(warmup, microbatches):
        order += [("F", i), ("B", i - warmup)]
    return order + [("B", i) for i in range(microbatches - warmup, microbatches)]


SCHEDULES: dict[str, Callable[[int, int, int], Order]] = {
    "layerwise": layerwise,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
}
