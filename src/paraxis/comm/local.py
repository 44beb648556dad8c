"""All ranks in one process: mailboxes that make no rank wait, for the reference interpreter. Deterministic."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Post:
    """Messages on their way between local ranks, by (sender, receiver, tag), and sums by (group, count)."""

    mail: dict[tuple[int, int, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    sums: dict[tuple[tuple[int, ...], int], dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))


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

    parts: dict[int, Tensor]
    size: int
    tensor: Tensor

    def wait(self) -> None:
        """Add up what every rank has put in."""
        total = self.parts[0].clone()
        for rank in range(1, self.size):
            total += self.parts[rank]
        self.tensor.copy_(total)

    def ready(self) -> bool:
        """Whether all have put in theirs."""
        return len(self.parts) == self.size


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
        """Put in one's own part."""
        parts = self.post.sums[self.members, self.count]
        self.count += 1
        parts[self.rank] = tensor.detach().clone()
        return Summed(parts, self.size, tensor)

    def all_reduce(self, tensor: Tensor) -> None:
        """Blocking calls cannot be had in one process; start and wait are used instead."""
        self.all_reduce_start(tensor).wait()

    def barrier(self) -> None:
        """The reference interpreter runs ranks in turn."""
