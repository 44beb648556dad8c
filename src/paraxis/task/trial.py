"""Trying a task out before anything is trained: does the network take the samples, do its stages compose to it?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paraxis.errors import TaskError
from paraxis.task.batches import Nest, leaves, map_nest
from paraxis.task.data import Data, check_fits
from paraxis.task.recipe import Recipe


def apply(module: Callable[..., Any], x: Any) -> Any:
    """module(x), module(*x) or module(**x)."""
    if isinstance(x, dict):
        return module(**x)
    return module(*x) if isinstance(x, (tuple, list)) else module(x)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in, which may differ among them."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def try_forward(net: nn.Module, recipe: Recipe, batch: Nest, data: Data | None) -> None:
    """One forward; the labels of data in memory must be among the network's outputs. Raises TaskError."""
    inputs = recipe.inputs(_copy(batch))
    try:
        with evaluating(net):
            output = apply(net, inputs)
    except Exception as error:
        shapes = ", ".join("x".join(map(str, t.shape[1:])) or "scalar" for t in leaves(inputs))
        wanted = f"{recipe.name} cannot take samples of shape {shapes}"
        raise TaskError(f"{wanted}: {type(error).__name__}: {one_line(error)}; give data whose samples fit") from error
    if data is None or "loss" in recipe.own or not isinstance(output, Tensor):
        return
    if recipe.tokens and (output.ndim != 3 or output.shape[:2] != inputs.shape):
        raise TaskError(
            f"{recipe.name}: of {'x'.join(map(str, inputs.shape))} tokens it makes {'x'.join(map(str, output.shape))} "
            "numbers; text needs scores of every token, (samples, context, 256), as gpt gives them"
        )
    if output.ndim == 2 + recipe.tokens:
        check_fits(data, output.shape[-1], None, recipe.name)


def try_loss(net: nn.Module, recipe: Recipe, batch: Nest) -> Tensor:
    """The loss of a batch in training mode; raises TaskError if it cannot be computed."""
    output = apply(net, recipe.inputs(batch))
    try:
        return recipe.loss(output, batch)[0]
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"{recipe.name}: its loss failed: {type(error).__name__}: {one_line(error)}") from error


def least_samples(net: nn.Module, recipe: Recipe, one: Nest) -> int:
    """1, or 2 where a batch norm meets a single value of one sample, which has no variance; `one` is one sample."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in net.modules()):
        return 1
    before = [b.clone() for b in net.buffers()]
    try:
        with torch.no_grad():
            apply(net, recipe.inputs(_copy(one)))
    except ValueError:
        return 2
    finally:
        for buffer, old in zip(net.buffers(), before, strict=True):
            buffer.copy_(old)
    return 1


def check_composition(
    net: nn.Module,
    recipe: Recipe,
    chain: list[nn.Module],
    call: Callable[[nn.Module, Any], Any],
    names: dict[int, str],
    batch: Nest,
) -> frozenset[int]:
    """The stages must compose to the network (in eval mode, so that nothing random differs) and hold all parameters.

    Returns the places of layers that change their input.
    """
    altering = set()
    with evaluating(net):
        whole = apply(net, recipe.inputs(_copy(batch)))
        x = recipe.inputs(_copy(batch))
        for place, layer in enumerate(chain):
            given = [(t, t._version) for t in leaves(x)]
            x = call(layer, x)
            altering |= {place for t, version in given if t._version != version}
    pairs = list(zip(leaves(whole), leaves(x), strict=False))
    same = len(leaves(whole)) == len(leaves(x)) and all(a.shape == b.shape for a, b in pairs)
    worst = max((float((a - b).abs().max()) for a, b in pairs if a.is_floating_point()), default=0.0) if same else 0.0
    scale = max((float(a.abs().max()) for a, _ in pairs if a.is_floating_point()), default=1.0)
    if not same or not worst <= 1e-4 * max(scale, 1e-30):
        raise TaskError(f"{recipe.name}: its stages do not compose to net: the outputs differ by {worst:.2g}")
    used = {id(p) for layer in chain for p in layer.parameters()}
    lost = [name for key, name in names.items() if key not in used]
    if lost:
        raise TaskError(f"{recipe.name}: parameter {lost[0]} of net is in none of its stages")
    return frozenset(altering)


def _copy(batch: Nest) -> Nest:
    return map_nest(batch, Tensor.clone)


def running(module: nn.Module) -> list[Tensor]:
    """The running statistics that a module changes in its forward: those of normalisation layers."""
    norm = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    return list(module.buffers(recurse=False)) if norm else []


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300]
