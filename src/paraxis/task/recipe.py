"""The user's own network: a file, or live objects of a notebook, as one set of functions."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from paraxis.errors import TaskError
from paraxis.task.batches import Nest

OPTIONAL = ("batches", "example", "inputs", "loss", "optimizer", "scheduler", "stages")


@dataclass(frozen=True)
class Recipe:
    """What a user gives; only `net` is needed. `own` names the functions that are the user's and not defaults.

    With `tokens` a sample is a sequence, whose loss is the mean over its tokens: it weighs 1, as any other sample.
    """

    name: str
    net: Callable[[], nn.Module]
    own: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    tokens: bool = False

    def ask(self, name: str, *arguments: Any) -> Any:
        """The answer of one of the user's own functions; raises TaskError with what it has raised."""
        try:
            return self.own[name](*arguments)
        except TaskError:
            raise
        except (Exception, SystemExit) as error:
            raise TaskError(f"{self.name}: {name}() failed: {type(error).__name__}: {_one_line(error)}") from error

    def inputs(self, batch: Nest) -> Any:
        """What the network is called with: a tensor, a tuple of arguments or a dict of keyword arguments."""
        if "inputs" in self.own:
            return self.own["inputs"](batch)
        return batch[0] if isinstance(batch, (list, tuple)) else batch

    def loss(self, output: Any, batch: Nest) -> tuple[Tensor, Any]:
        """(sum of the samples' losses, sum of their weights); scores are (n, classes), of tokens (n, t, classes)."""
        if "loss" in self.own:
            return checked_loss(self.own["loss"](output, batch), self.name)
        target = batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
        if not isinstance(target, Tensor):
            raise TaskError(f"{self.name}: batches are not pairs (inputs, targets); define loss(output, batch)")
        if target.is_floating_point():
            return F.mse_loss(output, target, reduction="sum"), target.numel()
        if self.tokens:
            total = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")
            return total / target.shape[1], target.shape[0]
        return F.cross_entropy(output, target, reduction="sum"), target.shape[0]

    def hits(self, output: Any, batch: Nest) -> float:
        """How many samples score highest at their label, of a sequence the share of its tokens; 0 without labels."""
        target = batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
        if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            return 0.0
        if output.ndim != 2 + self.tokens or output.shape[:-1] != target.shape:
            return 0.0
        right = output.argmax(-1) == target
        return float(right.sum()) / (target.shape[1] if self.tokens else 1)


def checked_loss(pair: Any, name: str) -> tuple[Tensor, Any]:
    """The user's (sum, weight); raises TaskError with what it should be."""
    if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Tensor) and pair[0].ndim == 0:
        return pair
    got = f"a tensor of shape {tuple(pair.shape)}" if isinstance(pair, Tensor) else type(pair).__name__
    raise TaskError(
        f"{name}: loss(output, batch) must return (sum of losses, sum of weights), not {got}; "
        "for example F.cross_entropy(output, batch[1], reduction='sum'), len(batch[1])"
    )


def from_file(text: str) -> Recipe:
    """The recipe of FILE.py or FILE.py:FUNCTION; raises TaskError."""
    name, _, function = text.partition(":")
    path = Path(name).resolve()
    if not path.is_file():
        raise TaskError(f"network file {name} does not exist")
    module = _load(path)
    make = getattr(module, function or "net", None)
    if not callable(make):
        raise TaskError(f"{name} defines no {function or 'net'}(); it should return an nn.Module")
    own = {key: getattr(module, key) for key in OPTIONAL if callable(getattr(module, key, None))}
    return Recipe(path.name, make, own)


def _load(path: Path) -> ModuleType:
    name = f"paraxis_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that dataclasses and named tuples in it can be found by name
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TaskError(f"{path.name} cannot be imported: {type(error).__name__}: {_one_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def from_objects(objects: Mapping[str, Any]) -> Recipe:
    """The recipe of live objects: `net` a module or a function, `batches` any iterable or a function."""
    net, batches = objects["net"], objects.get("batches")
    own = {key: objects[key] for key in OPTIONAL if callable(objects.get(key))}
    if batches is not None and not callable(batches):
        if iter(batches) is batches:
            raise TaskError(
                "batches is an iterator that can be read only once; give a list, a DataLoader or a function"
            )
        own["batches"] = lambda: batches
    # Each task starts from the network as it was given, which stays as it is.
    made = (lambda: deepcopy(net)) if isinstance(net, nn.Module) else net
    return Recipe(objects.get("name") or type(net).__name__, made, own)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
