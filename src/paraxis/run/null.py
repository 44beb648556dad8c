"""The null interpreter: executes nothing and records only, so that what is left is the interpreter's own cost."""

from collections.abc import Sequence
from typing import Any

import torch

from paraxis.comm.local import Sent
from paraxis.program.instructions import Program
from paraxis.run.interpreter import Rank


class NullEngine:
    """Computes nothing; `calls` counts what it was told."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.empty = torch.zeros(0)

    def __getattr__(self, name: str) -> Any:
        def count(*_: object) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return self.empty if name == "buffer" else []

        return count


class NullComm:
    """Carries nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def group(self, ranks: Sequence[int]) -> "NullComm":
        """The same for fewer ranks."""
        return NullComm(list(ranks).index(self.rank) if self.rank in ranks else 0, len(ranks))

    def send(self, *_: object) -> Sent:
        """Done at once."""
        return Sent()

    receive = all_reduce_start = send

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Nothing to add."""

    def barrier(self) -> None:
        """Nobody to wait for."""


def start(program: Program, rank: int) -> Rank:
    """An interpreter whose every instruction does nothing."""
    return Rank(program, rank, NullEngine(), NullComm(rank, program.mesh.size))
