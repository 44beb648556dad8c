"""An all-reduce whose elements travel in fewer bytes, over nothing but sends and receives.

As in any bandwidth-optimal all-reduce (Patarasuk and Yuan 2009) each rank adds up one piece of all and hands the sum
on; here both halves travel packed. Every rank unpacks the same bytes, its own included, so all have the same result.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from paraxis.comm.base import Comm, Request
from paraxis.comm.links import HALVES

ROW = 128  # elements that share a scale; pieces are whole rows


def pack_bf16(x: Tensor) -> Tensor:
    """8 bits of mantissa: 2 bytes an element."""
    return x.bfloat16().view(torch.uint8)


def unpack_bf16(letter: Tensor, like: Tensor) -> Tensor:
    """The inverse, but for what the rounding has taken."""
    return letter.view(torch.bfloat16).to(like.dtype)


def pack_int8(x: Tensor) -> Tensor:
    """255 levels up to the largest of each row: a byte an element, and 4 a row for that row's unit."""
    rows = torch.nn.functional.pad(x, (0, -x.numel() % ROW)).view(-1, ROW)
    units = (rows.abs().amax(1, keepdim=True) / 127).float()
    levels = (rows / torch.where(units > 0, units, 1).to(x.dtype)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([units.view(torch.uint8).view(-1), levels.view(torch.uint8).view(-1)[: x.numel()]])


def unpack_int8(letter: Tensor, like: Tensor) -> Tensor:
    """The inverse, but for what the rounding has taken."""
    count = -(-like.numel() // ROW)
    units = letter[: 4 * count].view(torch.float32).to(like.dtype)
    levels = letter[4 * count :].view(torch.int8).to(like.dtype)
    return levels * units.repeat_interleave(ROW)[: like.numel()]


Codec = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
CODECS: dict[str, Codec] = {"bf16": (pack_bf16, unpack_bf16), "int8": (pack_int8, unpack_int8)}


def packed(x: Tensor, payload: str) -> int:
    """Bytes of a tensor on its way."""
    return 2 * x.numel() if payload == "bf16" else x.numel() + 4 * -(-x.numel() // ROW)


class PackedSum:
    """A sum over all ranks under way, in place, of a flat tensor; `sent`: bytes that this rank has sent for it."""

    def __init__(self, comm: Comm, tensor: Tensor, payload: str) -> None:
        self.comm, self.payload, self.sent = comm, payload, 0
        each = -(-tensor.numel() // (comm.size * ROW)) * ROW
        self.pieces = [tensor[r * each : (r + 1) * each] for r in range(comm.size)]
        self.peers = [r for r in range(comm.size) if r != comm.rank]
        self.own = self._packed(self.pieces[comm.rank])
        self.sends: list[Request] = []
        self.sending: list[Tensor] = []
        self.adding = True
        self._exchange(
            HALVES[0], {r: self._packed(self.pieces[r]) for r in self.peers}, dict.fromkeys(self.peers, self.rank)
        )

    @property
    def rank(self) -> int:
        """This rank's place, and the number of its piece."""
        return self.comm.rank

    def letters(self) -> list[Tensor]:
        """What it holds: its own piece packed, what it sends and what it expects."""
        return [self.own, *self.sending, *(letter for _, letter in self.receives.values())]

    def ready(self) -> bool:
        """Whether `wait` would return at once; goes on to the second half when the first is there."""
        if self.adding and self._arrived():
            self._add()
        return not self.adding and self._arrived()

    def wait(self) -> None:
        """Return when the tensor holds the sum."""
        if self.adding:
            self._add()
        for peer, (request, letter) in self.receives.items():
            request.wait()
            self._unpack(letter, self.pieces[peer])
        for request in self.sends:
            request.wait()

    def _add(self) -> None:
        """The sum of one's own piece, in the order of ranks, and on with it."""
        self.adding = False
        piece, letters = self.pieces[self.rank], {self.rank: self.own}
        for peer, (request, letter) in self.receives.items():
            request.wait()
            letters[peer] = letter
        total = torch.zeros_like(piece)
        for rank in sorted(letters) if piece.numel() else ():
            total += CODECS[self.payload][1](letters[rank], piece)
        mine = self._packed(total)
        self._unpack(mine, piece)
        self._exchange(HALVES[1], dict.fromkeys(self.peers, mine), {r: r for r in self.peers})

    def _exchange(self, tag: int, letters: dict[int, Tensor], numbers: dict[int, int]) -> None:
        """Send a letter to each peer, and expect from each one of the size of piece `numbers[peer]`; none if empty."""
        self.receives: dict[int, tuple[Request, Tensor]] = {}
        for peer, number in numbers.items():
            if self.pieces[number].numel():
                size = packed(self.pieces[number], self.payload)
                room = torch.empty(size, dtype=torch.uint8, device=self.own.device)
                self.receives[peer] = self.comm.receive(room, peer, tag), room
        for peer, letter in letters.items():
            if letter.numel():
                self.sends.append(self.comm.send(letter, peer, tag))
                self.sending.append(letter)
                self.sent += letter.nbytes

    def _arrived(self) -> bool:
        return all(request.ready() for request, _ in self.receives.values())

    def _packed(self, x: Tensor) -> Tensor:
        return CODECS[self.payload][0](x) if x.numel() else torch.empty(0, dtype=torch.uint8, device=x.device)

    def _unpack(self, letter: Tensor, piece: Tensor) -> None:
        if piece.numel():
            piece.copy_(CODECS[self.payload][1](letter, piece))
