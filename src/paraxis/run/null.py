"""The null interpreter: executes nothing and records only, so that what is left is the interpreter's own cost."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from paraxis.comm.local import Sent
from paraxis.program.instructions import Program
from paraxis.run.interpreter import Rank


class NullEngine:
    """Computes nothing; `calls` counts what it was told, unless it is only to be called as fast as can be."""

    def __init__(self, counting: bool = True) -> None:
        self.calls: dict[str, int] = {}
        self.empty = torch.zeros(0)
        self.counting = counting

    def at(self, stage: int) -> "NullEngine":
        """What computes a stage."""
        return self

    def __getattr__(self, name: str) -> Any:
        if not self.counting:
            return self._buffer if name == "buffer" else _nothing

        def count(*_: object) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return self.empty if name == "buffer" else []

        return count

    def _buffer(self, *_: object) -> torch.Tensor:
        return self.empty


def _nothing(*_: object) -> list[torch.Tensor]:
    return []


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

    receive = all_reduce_start = reduce_scatter_start = all_gather_start = send

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Nothing to add."""

    reduce_scatter = all_gather = all_reduce

    def barrier(self) -> None:
        """Nobody to wait for."""


def start(program: Program, rank: int, counting: bool = True) -> Rank:
    """An interpreter whose every instruction does nothing."""
    return Rank(program, rank, NullEngine(counting), NullComm(rank, program.mesh.size))


def record_cost(program: Program, rank: int, passes: int = 40) -> float:
    """Nanoseconds that the interpreter takes for one instruction of this program: loop, bound call, clock read."""
    ran = start(program, rank, counting=False)
    ran.run_traced(passes)
    found = [(rows[0][-1] - rows[0][0]) / (len(rows[0]) - 1) for _, rows in ran.clocks(passes) if len(rows[0]) > 1]
    return median(found) if found else 0.0
