"""What plans are proved against: the serial run, or the emulation of an inexact algorithm; its weights in a file."""

from typing import Any

import torch
from safetensors.torch import save_file

from paraxis.engine.devices import CPU
from paraxis.run import serial
from paraxis.run.weights import rms, untied
from paraxis.sync.rule import settled
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def train_oracle(
    spec: TaskSpec, objects: dict[str, Any], request: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Train as the request says, see `Session.oracle`; mean losses, the largest change of a weight, steps skipped.

    It computes one batch-norm group at a time, so the network's own batch norms do.
    """
    spec = spec.model_copy(update={"bn_group": None, "seed": request["seed"]})
    dtype, how = DTYPES[request["dtype"]], (request["precision"], request["parts"], device)
    copies = [serial.replica(make_task(spec, objects, dtype), *how) for _ in range(request["replicas"])]
    before = {k: v.to(CPU, copy=True) for k, v in copies[0].task.net.state_dict().items()}
    if request["turns"] > 1:
        losses = serial.in_turn(copies[0], request["steps"], request["turns"])
    else:
        losses = serial.emulate(copies, 0, request["steps"], request["groups"], request["every"], request["sync"])
    if request["replicas"] > 1 and not settled(request["sync"], request["steps"], request["every"]):
        serial.average([c.task.net for c in copies])
    after = {k: v.to(CPU, copy=True).contiguous() for k, v in copies[0].task.net.state_dict().items()}
    changes = [float((after[k] - before[k]).abs().max()) for k in after if after[k].is_floating_point()]
    save_file(untied(after), request["file"])
    moved = {k: rms(after[k] - before[k]) for k in after if after[k].is_floating_point()}
    skipped = copies[0].skipped
    return {"losses": losses, "change": max(changes, default=0.0), "moved": moved, "skipped": skipped}
