"""Which device each rank of a plan computes on, and what a host must have for it. It imports no framework."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paraxis.errors import MissingError, PlanError

if TYPE_CHECKING:
    from paraxis.plan.plan import Plan


@dataclass(frozen=True)
class Gpus:
    """How many a host has that PyTorch can use; `why` there is none."""

    count: int = 0
    why: str = ""


def check_devices(plan: "Plan", gpus: Gpus, local: int = 0) -> None:
    """Raises MissingError for devices that a host has not, PlanError for what they cannot do together.

    `local`: ranks of the plan on each host (0: all of them). Every rank finds the same fault.
    """
    if not plan.on_gpu():
        return
    count = gpus.count
    if not count:
        raise MissingError(f"device={plan.device}: no CUDA device here: {gpus.why}; device=cpu works")
    for place in plan.devices():
        number = place.partition(":")[2]
        if number and int(number) >= count:
            there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise MissingError(f"device={place}: this machine has {count} CUDA device{'s' * (count > 1)}: {there}")
    if plan.comm == "nccl" and (shared := crowded(plan, count, local or plan.mesh.size)):
        ranks = local or plan.mesh.size
        rest = "device=cuda" if ranks <= count else f"device=cuda with at most {count} rank{'s' * (count > 1)} a host"
        raise PlanError(
            f"comm=nccl: {shared[1]} ranks would be on {shared[0]}, and NCCL takes one rank a GPU; "
            f"take comm=mpi or gloo, or {rest}"
        )


def crowded(plan: "Plan", count: int, local: int) -> tuple[str, int] | None:
    """(a GPU that several ranks of a host share, how many), of a host with `count` GPUs and `local` ranks."""
    ranks = [device_of(plan, rank, rank, count) for rank in range(min(local, plan.mesh.size))]
    shared = [device for device in ranks if device != "cpu" and ranks.count(device) > 1]
    return (shared[0], ranks.count(shared[0])) if shared else None


def untried(plan: "Plan", count: int) -> bool:
    """Whether a plan's ranks would be on several GPUs, which the authors have never had."""
    ranks = {device_of(plan, rank, rank, count) for rank in range(plan.mesh.size)} if count else set()
    return len(ranks - {"cpu"}) > 1


def device_of(plan: "Plan", rank: int, local: int, count: int) -> str:
    """ "cpu" or "cuda:N" of a rank, which is the `local`-th on its host with `count` GPUs.

    "cuda" alone is the GPU of that number, from the first one on again where there are fewer.
    """
    place = plan.devices()[plan.mesh.coordinates(rank)[1]]
    return f"cuda:{local % count}" if place == "cuda" else place
