"""The GPUs that PyTorch finds on this host, and which of them is this rank's."""

import os

import torch

from paraxis.comm.base import Comm
from paraxis.comm.staged import IN_PLACE, THROUGH_HOST, StagedComm
from paraxis.engine.devices import CPU
from paraxis.plan.devices import Gpus, check_devices, device_of
from paraxis.plan.plan import Plan

LOCAL_RANK = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "LOCAL_RANK",
    "SLURM_LOCALID",
)
LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE", "LOCAL_WORLD_SIZE")


def found_here() -> Gpus:
    """What PyTorch can use; takes no memory of a GPU."""
    if torch.version.cuda is None:
        return Gpus(0, f"torch {torch.__version__} was built without CUDA")
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "no GPU, or no driver for it" if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden}"
        return Gpus(0, f"torch {torch.__version__} with CUDA {torch.version.cuda} finds none ({seen})")
    return Gpus(torch.cuda.device_count())


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


def _told(names: tuple[str, ...], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), otherwise)
