"""Scattered pieces of a buffer, side by side for as long as they are on their way."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

Range = tuple[int, int]


class Packed:
    """Views of one buffer; where there are none a single number travels: some libraries refuse to send nothing."""

    def __init__(self, pieces: Sequence[Tensor], like: Tensor) -> None:
        self.pieces, self.memory, self.nothing = list(pieces), like[:0], like.new_zeros(1)

    def packed(self) -> Tensor:
        """(n,): what the pieces hold now, one after the other, in memory of its own."""
        self.memory = torch.cat(self.pieces) if self.pieces else self.nothing
        return self.memory

    def unpack(self) -> None:
        """Give the pieces what that memory holds now, and let it go."""
        if self.pieces:
            torch._foreach_copy_(self.pieces, list(self.memory.split([len(piece) for piece in self.pieces])))
        self.memory = self.memory[:0].clone()


def within(owned: Sequence[tuple[int, Tensor]], ranges: Collection[Range]) -> list[Tensor]:
    """Of a flat buffer of which runs are `owned` (their first number, the run), what lies within some ranges."""
    return [own[max(a - at, 0) : b - at] for at, own in owned for a, b in ranges if a < at + len(own) and b > at]
