"""Where a rank's tensors live: one device, to which its layers and its samples move once they are known."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from paraxis.task.task import Task

CPU = torch.device("cpu")


def move(task: Task, own: Iterable[Sequence[nn.Module]], device: torch.device) -> None:
    """Let a rank's own layers and all samples of the task live on its device, in place.

    Parameters stay the objects that they are, buffers become others. The layers of other ranks stay where they are.
    """
    if device == CPU:
        return
    for layer in (layer for layers in own for layer in layers):
        layer.to(device)
    place(task, device)


def place(task: Task, device: torch.device) -> None:
    """The same of the samples alone."""
    task.train = task.train.on(device)
    task.test = task.test.on(device) if task.test else None
    task.validation = task.validation.on(device) if task.validation else None


def wait(device: torch.device) -> None:
    """Until all that was asked of a device has been done; a CPU does what it is told at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
