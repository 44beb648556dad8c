"""Which device is this rank's, and how others reach what lies on it."""

import gc
import os

import torch

from paraxis.comm.base import Comm
from paraxis.comm.gpus import found_here
from paraxis.comm.links import links
from paraxis.comm.staged import IN_PLACE, THROUGH_HOST, StagedComm
from paraxis.engine.devices import CPU
from paraxis.plan.devices import check_devices, device_of
from paraxis.plan.plan import Plan
from paraxis.program.instructions import Program

LOCAL_RANK = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "LOCAL_RANK",
    "SLURM_LOCALID",
)
LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE", "LOCAL_WORLD_SIZE")


def device_for(plan: Plan, rank: int, launched: bool) -> torch.device:
    """Of this process, a rank of the plan, made its own; raises MissingError or PlanError, alike on all ranks.

    `launched`: whether a launcher tells each process its place on its host; else all of them are on this one.
    """
    if not plan.on_gpu():
        return CPU
    gpus = found_here()
    check_devices(plan, gpus, _told(LOCAL_SIZE, 0) if launched else 0)
    device = torch.device(device_of(plan, rank, _told(LOCAL_RANK, rank) if launched else rank, gpus.count))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def reaching(world: Comm, transport: str, device: torch.device) -> Comm:
    """A communicator for tensors of a device: NCCL's own, MPI's if it reads them, else one through host memory."""
    if device.type == "cpu" or transport == "nccl":
        return world
    if transport == "mpi":
        from paraxis.comm.mpi import cuda_aware

        return StagedComm(world, IN_PLACE if cuda_aware() else THROUGH_HOST)
    return StagedComm(world, THROUGH_HOST)


def open_links(world: Comm, program: Program) -> None:
    """What NCCL needs before ranks send to each other; raises PlanError for a program whose messages need tags."""
    if isinstance(world, StagedComm) or not hasattr(world, "open"):
        return
    world.open(links(program))


def allow(device: torch.device, limit: int | None) -> int:
    """Before a plan is set up: how many bytes its rank may take of a GPU beside those taken already (None: all), and a
    peak that begins anew. Gives the bytes that are taken already."""
    if device.type == "cpu":
        return 0
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    taken, reserved = (int(of(device)) for of in (torch.cuda.memory_allocated, torch.cuda.memory_reserved))
    torch.cuda.set_per_process_memory_fraction(min(1.0, (reserved + (limit or total)) / total), device)
    torch.cuda.reset_peak_memory_stats(device)
    return taken


def allocated(device: torch.device) -> int:
    """The most bytes that tensors have had on a GPU since then; 0 on a CPU, whose memory the kernel counts."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def give_back(device: torch.device) -> None:
    """What a plan that is gone has had of a GPU, so that the next one finds it."""
    if device.type == "cuda":
        gc.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()


def _told(names: tuple[str, ...], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), otherwise)
