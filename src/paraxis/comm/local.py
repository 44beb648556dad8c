"""All ranks in one process: mailboxes that make no rank wait, for the reference interpreter. Deterministic."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from paraxis.comm.exchange import parts


@dataclass
class Post:
    """Messages on their way between local ranks, by (sender, receiver, tag), and sums by (group, count)."""

    mail: dict[tuple[int, int, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    sums: dict[tuple[tuple[int, ...], int], dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def forget(self, name: tuple[tuple[int, ...], int], rank: int) -> None:
        """A rank has its sum; the last one to have it clears it away."""
        self.sums[name][~rank] = self.sums[name][rank]
        if len(self.sums[name]) == 2 * len(name[0]):
            del self.sums[name]


@dataclass
class Sent:
    """A send: over as soon as it has begun, because the mailbox keeps a copy."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def ready(self) -> bool:
        """Always."""
        return True


@dataclass
class Received:
    """A receive from a mailbox."""

    box: list[Tensor]
    tensor: Tensor

    def wait(self) -> None:
        """Take the letter out."""
        self.tensor.detach().copy_(self.box.pop(0))

    def ready(self) -> bool:
        """Whether the letter has come."""
        return bool(self.box)


@dataclass
class Summed:
    """A sum over a group, added in the order of its ranks."""

    post: Post
    name: tuple[tuple[int, ...], int]
    rank: int
    tensor: Tensor

    def wait(self) -> None:
        """Add up what every rank has put in."""
        parts = self.post.sums[self.name]
        total = parts[0].clone()
        for rank in range(1, len(self.name[0])):
            total += parts[rank]
        self.tensor.copy_(total)
        self.post.forget(self.name, self.rank)

    def ready(self) -> bool:
        """Whether all have put in theirs."""
        return len(self.post.sums[self.name]) >= len(self.name[0])


@dataclass
class Scattered(Summed):
    """A sum of which each rank takes its own part."""

    def wait(self) -> None:
        """Add up what every rank has put in of one's own part."""
        posted, ranks = self.post.sums[self.name], len(self.name[0])
        total = parts(posted[0], ranks)[self.rank].clone()
        for rank in range(1, ranks):
            total += parts(posted[rank], ranks)[self.rank]
        parts(self.tensor, ranks)[self.rank].copy_(total)
        self.post.forget(self.name, self.rank)


@dataclass
class Gathered(Summed):
    """Every rank's part, put together."""

    def wait(self) -> None:
        """Take out the others' parts."""
        posted = self.post.sums[self.name]
        for rank, part in enumerate(parts(self.tensor, len(self.name[0]))):
            part.copy_(posted[rank])
        self.post.forget(self.name, self.rank)


class LocalComm:
    """One rank of a `Post`; `members` are the ranks of the whole that belong to this communicator."""

    def __init__(self, post: Post, members: Sequence[int], me: int) -> None:
        self.post, self.members, self.me = post, tuple(members), me
        self.rank, self.size = self.members.index(me), len(self.members)
        self.count = 0

    def group(self, ranks: Sequence[int]) -> "LocalComm":
        """A communicator of some of these ranks."""
        return LocalComm(self.post, [self.members[r] for r in ranks], self.me)

    def send(self, tensor: Tensor, peer: int, tag: int) -> Sent:
        """Put a copy into the receiver's box."""
        self.post.mail[self.me, self.members[peer], tag].append(tensor.detach().clone())
        return Sent()

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Received:
        """Wait for a letter."""
        return Received(self.post.mail[self.members[peer], self.me, tag], tensor)

    def all_reduce_start(self, tensor: Tensor) -> Summed:
        """Put in one's own summand."""
        return Summed(self.post, self._put(tensor), self.rank, tensor)

    def _put(self, tensor: Tensor) -> tuple[tuple[int, ...], int]:
        name = self.members, self.count
        self.count += 1
        self.post.sums[name][self.rank] = tensor.detach().clone()
        return name

    def all_reduce(self, tensor: Tensor) -> None:
        """Blocking calls cannot be had in one process; start and wait are used instead."""
        self.all_reduce_start(tensor).wait()

    def reduce_scatter_start(self, tensor: Tensor) -> Scattered:
        """Put in one's own summand, for a part of the sum."""
        return Scattered(self.post, self._put(tensor), self.rank, tensor)

    def reduce_scatter(self, tensor: Tensor) -> None:
        """As all_reduce."""
        self.reduce_scatter_start(tensor).wait()

    def all_gather_start(self, tensor: Tensor) -> Gathered:
        """Put in one's own part."""
        return Gathered(self.post, self._put(parts(tensor, self.size)[self.rank]), self.rank, tensor)

    def all_gather(self, tensor: Tensor) -> None:
        """As all_reduce."""
        self.all_gather_start(tensor).wait()

    def barrier(self) -> None:
        """The reference interpreter runs ranks in turn."""


class Alone:
    """The world of a single rank."""

    rank, size = 0, 1

    def barrier(self) -> None:
        """Nobody to wait for."""
