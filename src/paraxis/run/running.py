"""What a resident rank keeps of a plan between requests."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from paraxis.engine.devices import CPU
from paraxis.plan.plan import Plan
from paraxis.run import serial
from paraxis.run.interpreter import Rank
from paraxis.run.openmp import Team


@dataclass
class Running:
    """A plan that has been set up on this rank."""

    plan: Plan
    cpus: list[int]
    rank: Rank | Team | None = None  # a program's rank, all of its ranks as threads, or ...
    plain: serial.Replica | None = None  # ... the framework's own loop
    device: torch.device = CPU
    taken: int = 0  # bytes that others had of it before
    done: int = 0
    before: int = 0  # resident bytes before it was set up
    record: float = 0.0  # nanoseconds that its interpreter adds to an instruction, once measured
    losses: list[Tensor] = field(default_factory=list)  # of the framework's own loop


class Alone:
    """The world of a single rank."""

    rank, size = 0, 1

    def barrier(self) -> None:
        """Nobody to wait for."""
