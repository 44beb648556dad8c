"""Flops and bytes of a task's linear, convolution and attention layers, from the shapes that one forward shows."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from paraxis.measure.roofline import NOTHING, LayerWork, Work, affine_work, attention_work
from paraxis.task.batches import map_nest
from paraxis.task.gpt import Attention
from paraxis.task.norm import resting
from paraxis.task.task import Task

Seen = tuple[nn.Module, tuple[int, ...], tuple[int, ...]]  # with the shapes that it read and wrote
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

MORE = (nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.Bilinear)  # products of their own


def layer_work(task: Task, samples: int) -> list[LayerWork]:
    """The layers of the chain that hold a linear or convolution layer; one that holds several is their sum.

    Indices are those of `measure_layers`. What else such a layer does (pointwise, norms) is in its time, not in its
    work, but for gpt's attention; layers of which we cannot tell what else they do (a user's class, PyTorch's own
    attention, recurrence) are left out.
    """
    names = {id(module): name for name, module in task.net.named_modules()}
    x = task.recipe.inputs(task.train.share(0, 0, samples))
    task.draw.at(0, 0, samples)
    found = []
    first = True
    with torch.no_grad(), resting(task.net):
        for index, layer in enumerate(task.chain):
            seen: list[Seen] = []
            hooks = [m.register_forward_hook(_recorder(seen)) for m in layer.modules() if _counted(m)]
            try:
                x = map_nest(task.call(layer, x), Tensor.detach)
            finally:
                for hook in hooks:
                    hook.remove()
            forward, backward = NOTHING, NOTHING
            for module, inputs, outputs in seen:
                f, b = _work(module, inputs, outputs, first)
                forward, backward, first = forward + f, backward + b, False
            first = first and not any(p.requires_grad for p in layer.parameters())
            if seen and all(map(_known, layer.modules())):
                name = " ".join(filter(None, (type(layer).__name__, names.get(id(layer)))))
                found.append(LayerWork(index, name, samples, forward, backward))
    return found


def _counted(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Attention, *CONVOLUTIONS))


def _known(module: nn.Module) -> bool:
    own = type(module).__module__.startswith(("torch.nn.modules", "paraxis.task"))
    return own and not isinstance(module, MORE)


def _recorder(seen: list[Seen]) -> Any:
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            seen.append((module, tuple(inputs[0].shape), tuple(output.shape)))

    return record


def _work(module: Any, inputs: tuple[int, ...], outputs: tuple[int, ...], first: bool) -> tuple[Work, Work]:
    if isinstance(module, Attention):  # what its linear layers do counts with them
        samples, positions, width = outputs
        return attention_work(samples, positions, width, module.c_proj.weight.element_size())
    weight = module.weight
    return affine_work(
        samples=inputs[0],
        inputs=prod(inputs[1:]),
        outputs=prod(outputs[1:]),
        weights=weight.numel(),
        per_output=prod(weight.shape[1:]),  # of a linear layer its inputs, of a convolution its window
        size=weight.element_size(),
        biases=0 if module.bias is None else module.bias.numel(),
        first=first,
    )
