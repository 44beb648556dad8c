"""torch.compile of a rank's segments: one function for each, compiled at its first call; evaluations stay as they are.

Dynamo keeps what it has compiled with a function's code, and gives up a code that it has compiled for many: so every
segment has one of its own. Keyed masks are drawn outside of what is compiled, for their keys change with every step.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from paraxis.engine.torch_engine import TorchEngine
from paraxis.errors import MissingError, PlanError

Call = Callable[[Any], Any]
COMPILERS = ("g++", "clang++")


def compile_segments(engine: TorchEngine, backend: str = "inductor") -> None:
    """Let segments be compiled, each with autocast around it if it has any.

    Raises PlanError for what cannot be compiled, MissingError without a C++ compiler.
    """
    _check_compiler(engine.device, backend)
    if engine.task.keyed.functions:
        raise PlanError(
            "compile=1: this network calls dropout as a function, whose keyed masks torch.compile would freeze; "
            "use nn.Dropout modules, or leave compile out"
        )
    if any(stage.pausing is not None for stage in engine.stages.values()):
        raise PlanError("compile=1: ranks meet in the middle of a layer (bn_group); set bn_group lower")
    if any(stage.parting is not None for stage in engine.stages.values()):
        raise PlanError("compile=1: this schedule parts the backward of layers; take 1f1b, or no compile")
    draw: Any = engine.task.draw
    vars(draw)["dropout"] = torch.compiler.disable(draw.dropout)
    for stage in engine.stages.values():
        stage.calls = [
            [_compiled(calls, f"stage_{stage.stage}_segment_{k}", backend)] for k, calls in enumerate(stage.calls)
        ]


def compile_network(net: nn.Module, backend: str = "inductor") -> Callable[..., Any]:
    """A whole network, as its user would have it compiled; raises MissingError."""
    _check_compiler(next((p.device for p in net.parameters()), torch.device("cpu")), backend)
    compiled: Callable[..., Any] = torch.compile(net, dynamic=False, backend=backend)
    return compiled


def _compiled(calls: Sequence[Call], name: str, backend: str) -> Call:
    def segment(x: Any) -> Any:
        for call in calls:
            x = call(x)
        return x

    own = FunctionType(segment.__code__.replace(co_name=name), globals(), name, None, segment.__closure__)
    made: Call = torch.compile(own, dynamic=False, backend=backend)
    return made


def _check_compiler(device: torch.device, backend: str) -> None:
    wanted = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else list(COMPILERS)
    if device.type == "cpu" and backend == "inductor" and not any(map(shutil.which, wanted)):
        raise MissingError(
            f"compile=1: torch.compile needs a C++ compiler on a CPU, and there is no {' or '.join(wanted)}; "
            "install one, or leave compile out"
        )
