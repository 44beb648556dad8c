"""Batch-norm over groups of the task's own size, so that plans which cut the batch differently compute the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paraxis.errors import TaskError
from paraxis.task.moments import Meeting, Synchronised
from paraxis.task.randomness import Draw

PLAIN: tuple[type, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GroupedNorm(_BatchNorm):
    """nn.BatchNorm*d with statistics over `group` consecutive samples; takes over a module's own tensors.

    Running statistics become the mean of what every group alone would have made of them. With a `meeting` the one group
    goes over all replicas that come there.
    """

    meeting: Meeting | None = None

    def __init__(self, norm: Any, group: int, draw: Draw) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name, parameter in norm.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.kind, self.group, self.draw = type(norm), group, draw
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        check: Any = self.kind._check_input_dim
        check(self, input)

    def forward(self, x: Tensor) -> Tensor:
        """x (samples first, features, ...) normalised; raises TaskError if its first dimension counts no samples."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        samples = self.draw.samples
        if x.shape[0] % samples:
            raise TaskError(f"bn_group: a batch norm meets {tuple(x.shape)}, whose rows do not count {samples} samples")
        if self.meeting is not None:
            return self._synchronised(x, self.meeting)
        # A trial before training may have fewer samples than a group; plans are held to whole groups.
        groups = 1 if samples % self.group else samples // self.group
        return self._normalised(x.chunk(groups))

    def _synchronised(self, x: Tensor, meeting: Meeting) -> Tensor:
        y, mean, variance = Synchronised.apply(x, self.weight, self.bias, self.eps, self.running_mean, meeting)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            factor = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, factor)
            self.running_var.lerp_(variance, factor)
        made: Tensor = y
        return made

    def _normalised(self, parts: tuple[Tensor, ...]) -> Tensor:
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or count is None:
            own = [F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps) for x in parts]
            return torch.cat(own)
        factor = 1.0 / (int(count) + 1) if self.momentum is None else self.momentum
        # Autograd keeps the tensors that a group has updated: each has copies, and none is written to again.
        made = [(mean.clone(), var.clone()) for _ in parts]
        own = [
            F.batch_norm(x, *statistics, self.weight, self.bias, True, factor, self.eps)
            for x, statistics in zip(parts, made, strict=True)
        ]
        with torch.no_grad():
            mean.copy_(torch.stack([m for m, _ in made]).mean(0))
            var.copy_(torch.stack([v for _, v in made]).mean(0))
            count += 1
        return torch.cat(own)


def group_norms(net: nn.Module, group: int, draw: Draw, name: str) -> None:
    """Swap the batch norms inside a network for grouped ones, in place; one that stands in two places stays one.

    Raises TaskError where there is none, or one of a kind that cannot be grouped.
    """
    swapped: dict[int, GroupedNorm] = {}
    for module in list(net.modules()):
        for child, norm in list(module._modules.items()):
            if not isinstance(norm, _BatchNorm):
                continue
            if type(norm) not in PLAIN:
                raise TaskError(f"bn_group={group}: {name} has a {type(norm).__name__}, which cannot be grouped")
            setattr(module, child, swapped.setdefault(id(norm), GroupedNorm(norm, group, draw)))
    if not swapped:
        raise TaskError(f"bn_group={group}: {name} has no nn.BatchNorm layer to group; leave bn_group out")


@contextmanager
def resting(net: nn.Module) -> Iterator[None]:
    """Batch norms use their running statistics: so that one sample can pass, of which some cannot make statistics."""
    norms = [(m, m.training) for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm, _ in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm, mode in norms:
            norm.training = mode
