"""The narrow seam: what any transport offers to a program, and to whoever starts one."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Request(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """Return when its buffer may be used again (a send) or holds what came (a receive, a collective)."""

    def ready(self) -> bool:
        """Whether `wait` would return at once."""


class Comm(Protocol):
    """Some ranks that talk to each other; `rank` is one's own place among them. Buffers are contiguous tensors.

    Peers are named by their rank in this communicator. Collectives work in place, sums and gathers of parts on a flat
    tensor of `size` equal parts, of which each rank's own is at its place: a reduce-scatter leaves its sum there, other
    parts are undefined; an all-gather fills in the other ranks'.
    """

    rank: int
    size: int

    def group(self, ranks: Sequence[int]) -> "Comm":
        """A communicator of some of the ranks; only they call it."""

    def send(self, tensor: Tensor, peer: int, tag: int) -> Request: ...

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Request: ...

    def all_reduce(self, tensor: Tensor) -> None: ...

    def all_reduce_start(self, tensor: Tensor) -> Request: ...

    def reduce_scatter(self, tensor: Tensor) -> None: ...

    def reduce_scatter_start(self, tensor: Tensor) -> Request: ...

    def all_gather(self, tensor: Tensor) -> None: ...

    def all_gather_start(self, tensor: Tensor) -> Request: ...

    def barrier(self) -> None: ...
