"""What a resident rank keeps of a plan between requests."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paraxis.engine.devices import CPU
from paraxis.errors import RankError
from paraxis.plan.plan import Plan
from paraxis.run import serial
from paraxis.run.compiled import FirstSteps
from paraxis.run.interpreter import Rank
from paraxis.run.openmp import Team
from paraxis.task.shared import Shard


@dataclass
class Running:
    """A plan that has been set up on this rank."""

    plan: Plan
    cpus: list[int]
    rank: Rank | Team | None = None  # a program's rank, all of its ranks as threads, or ...
    plain: serial.Replica | None = None  # ... the framework's own loop
    device: torch.device = CPU
    first: FirstSteps | None = None  # of a compiled plan
    taken: int = 0  # bytes that others had of it before
    done: int = 0
    before: int = 0  # resident bytes before it was set up
    record: float = 0.0  # nanoseconds that its interpreter adds to an instruction, once measured
    losses: list[Tensor] = field(default_factory=list)  # of the framework's own loop


def shards_of(running: Running) -> dict[str, Shard]:
    """Of which tensors this rank has but a part."""
    return getattr(running.rank.engine, "shards", {}) if isinstance(running.rank, Rank) else {}


def some(value: Any) -> Any:
    """A value that is there; raises RankError."""
    if value is None:
        raise RankError("the plan is not set up on this rank")
    return value
