"""Local SGD: replicas train apart, and take the mean of their weights every H steps.

Stich, "Local SGD Converges Fast and Communicates Little" (2019). The optimiser's momentum stays each replica's own.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from paraxis.sync.rule import Do, Rule

if TYPE_CHECKING:
    from torch import Tensor

MEAN = Do("AllReduce", buffer="params", reduction="mean")


def agreements(every: int) -> dict[int, list[Do]]:
    """The mean, after the last step of a period."""
    return {every: [MEAN]}


def emulate(replicas: "list[dict[str, Tensor]]", every: int) -> Iterator[None]:
    """The same by plain code on each replica's parameters."""
    while True:
        for _ in range(every):
            yield
        for name in replicas[0]:
            mean = replicas[0][name].clone()
            for own in replicas[1:]:
                mean += own[name]
            for own in replicas:
                own[name].copy_(mean / len(replicas))


RULE = Rule("average", "Stich 2019", agreements=agreements, epilogue=(MEAN,), emulate=emulate)
