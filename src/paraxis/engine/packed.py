"""Scattered pieces of a buffer, side by side for as long as they are on their way."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Packed:
    """Views of one buffer and memory of their size, of at least one number: some libraries refuse to send none."""

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self.pieces = list(pieces)
        self.memory = self.pieces[0].new_zeros(max(1, sum(map(len, self.pieces)))) if pieces else torch.zeros(1)
        self.places = list(self.memory[: sum(map(len, self.pieces))].split([len(piece) for piece in self.pieces]))

    def packed(self) -> Tensor:
        """(n,): what the pieces hold now, one after the other."""
        if self.pieces:
            torch._foreach_copy_(self.places, self.pieces)
        return self.memory

    def unpack(self) -> None:
        """Give the pieces what the memory holds."""
        if self.pieces:
            torch._foreach_copy_(self.pieces, self.places)
