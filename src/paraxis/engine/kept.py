"""What a synchronisation rule keeps beside the parameters, fragment by fragment, and what its updates see of it all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paraxis.comm.payload import ROW
from paraxis.program.instructions import Program
from paraxis.sync.rule import buffers, fragment_of

Place = tuple[str, int, int]  # a parameter's name, its first and last element in the flat buffer


@dataclass(frozen=True)
class Kept:
    """Buffers by name, with the fragments one after the other: `bounds[n]` of fragment n.

    `runs[n]`: (first, last) in the parameters and first in these buffers, of what belongs to fragment n.
    """

    params: Tensor
    buffers: dict[str, Tensor]
    bounds: list[tuple[int, int]]
    runs: list[list[tuple[int, int, int]]]

    def buffer(self, name: str, fragment: int) -> Tensor:
        """A whole buffer (-1), or a fragment's part of it."""
        first, last = self.bounds[fragment] if fragment >= 0 else (0, self.bounds[-1][1])
        return self.buffers[name][first:last]

    def views(self, names: Sequence[str], fragment: int) -> list[list[Tensor]]:
        """The named buffers, `params` among them, as tensors of equal size: one list for each run of a fragment."""
        chosen = [run for n, own in enumerate(self.runs) for run in own if fragment in (-1, n)]
        every = self.buffers | {"params": self.params}
        starts = [[a if name == "params" else c for name in names] for a, _, c in chosen]
        return [
            [every[name][at : at + b - a] for name, at in zip(names, own, strict=True)]
            for (a, b, _), own in zip(chosen, starts, strict=True)
        ]


def keep(program: Program, params: Tensor, places: Sequence[Place], sizes: Mapping[str, int]) -> Kept | None:
    """Buffers for the rule of a program, if it wants any; `sizes` are of all trained parameters, in their order.

    Where elements in a row share a scale on their way, every parameter begins with a row, so that what rounding does to
    it does not depend on its neighbours.
    """
    names = [b.name for b in program.buffers if b.name in buffers()]
    if not names:
        return None
    reduced = [i for _, body in program.bodies for i in body[0] if i.buffer in names]
    fragments = 1 + max([0, *(i.bucket for i in reduced)])
    row = ROW if any(i.payload == "int8" for i in reduced) else 1
    part = fragment_of(sizes, fragments)
    runs: list[list[tuple[int, int, int]]] = []
    bounds: list[tuple[int, int]] = []
    at = 0
    for fragment in range(fragments):
        first = at
        own: list[tuple[int, int, int]] = []
        for _, a, b in (place for place in places if part[place[0]] == fragment):
            if own and own[-1][1] == a and at - own[-1][2] == a - own[-1][0]:
                own[-1] = own[-1][0], b, own[-1][2]
            else:
                own.append((a, b, at))
            at += -(-(b - a) // row) * row
        runs.append(own)
        bounds.append((first, at))
    made = {name: torch.zeros(at, dtype=params.dtype, device=params.device) for name in names}
    return Kept(params, made, bounds, runs)
