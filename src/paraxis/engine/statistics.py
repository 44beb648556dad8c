"""Running statistics (batch norm): they change once a step, by the mean over all groups of samples."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from paraxis.task.trial import running


class StageStatistics:
    """Those of one stage. `values` (n,) are the step's, `collected` (n,) sums of what each group has made of them."""

    def __init__(self, segments: Iterable[Iterable[nn.Module]], device: torch.device) -> None:
        modules = {id(m): m for segment in segments for layer in segment for m in layer.modules()}
        found = [b for m in modules.values() for b in running(m)]
        self.buffers = [b for b in found if b.is_floating_point()]
        self.counters = [b for b in found if not b.is_floating_point()]
        self.counts = torch.tensor([int(b) for b in self.counters], dtype=torch.int64, device=device)
        self.each = self.counts.unbind()
        flat = [b.reshape(-1) for b in self.buffers]
        self.use(torch.cat(flat) if flat else torch.zeros(0, device=device))

    def use(self, values: Tensor, collected: Tensor | None = None) -> None:
        """Keep them in this memory."""
        self.values, self.groups = values, 0
        self.collected = torch.zeros_like(values) if collected is None else collected
        self.pieces = self.values.split([b.numel() for b in self.buffers])

    def restore(self) -> None:
        """Every microbatch starts from the statistics of the step before. Written through `data`: autograd has saved
        these buffers for the backwards to come, which do not use them in training."""
        for buffer, piece in zip(self.buffers, self.pieces, strict=True):
            buffer.data.copy_(piece.view_as(buffer))
        for buffer, count in zip(self.counters, self.each, strict=True):
            buffer.data.copy_(count)

    def collect(self) -> None:
        """Add what a group has made of them."""
        if self.buffers:
            self.collected += torch.cat([b.reshape(-1) for b in self.buffers])
            self.groups += 1

    def advance(self) -> None:
        """Running statistics become the mean of what every group would have made of them."""
        if self.buffers:
            self.values.copy_(self.collected).div_(self.groups)
            self.collected.zero_()
            self.groups = 0
            self.counts += 1


def joined(stages: Sequence[StageStatistics]) -> tuple[Tensor, Tensor]:
    """(values, collected) of several stages as two flat buffers, of which each stage has its part."""
    values = torch.cat([s.values for s in stages])
    collected = torch.zeros_like(values)
    at = 0
    for s in stages:
        end = at + s.values.numel()
        s.use(values[at:end], collected[at:end])
        at = end
    return values, collected
