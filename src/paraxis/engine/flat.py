"""Parameters and gradients of one stage as views of flat buffers, so that a reduction or an update is one call."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOTALS = 2  # loss sum and weight stand in front of the gradients, so that one reduction carries both


@dataclass(frozen=True)
class Flat:
    """`params` (n,) and `grads` (2 + n,) with the segments one after the other; `bounds`: each segment in `params`.

    `runs` are maximal ranges [first, last) of `params` with one parameter group each: (group, first, last). `members`
    are the parameters with their ranges. A segment may end with padding, of zeros.
    """

    params: Tensor
    grads: Tensor
    bounds: tuple[tuple[int, int], ...]
    runs: tuple[tuple[int, int, int], ...]
    names: tuple[tuple[str, int, int], ...]
    members: tuple[tuple[nn.Parameter, int, int], ...] = ()

    def gradients(self, bucket: int) -> Tensor:
        """What a reduction of a bucket sends: bucket 0 carries the totals in front; -1: all there is."""
        if bucket < 0:
            return self.grads
        first, last = self.bounds[bucket]
        return self.grads[TOTALS + first if bucket else 0 : TOTALS + last]

    @property
    def totals(self) -> Tensor:
        """(2,): loss sum and weight of this step so far."""
        return self.grads[:TOTALS]


def flatten(
    segments: Sequence[Sequence[nn.Module]],
    groups: Sequence[Iterable[nn.Parameter]],
    names: dict[int, str],
    dtype: torch.dtype,
    parts: int = 1,
    ends: Collection[int] = (),
    device: torch.device | None = None,
    apart: Sequence[str] = (),
) -> Flat:
    """Move the trainable parameters of the segments into flat buffers, in place; a shared one counts once.

    Within a segment parameters of one group stand together, so that an update has few ranges. The parameters named
    `apart` follow, each a segment of its own. Behind the segments `ends` they are padded to a multiple of `parts`.
    `device`: where all lie that is none of the parameters' own.
    """
    group_of = {id(p): index for index, group in enumerate(groups) for p in group}
    seen: set[int] = set()
    ordered: list[list[nn.Parameter]] = []
    for segment in segments:
        trained = [p for layer in segment for p in layer.parameters() if p.requires_grad]
        fresh = list({id(p): p for p in trained if id(p) not in seen}.values())
        seen |= {id(p) for p in fresh}
        ordered.append(sorted(fresh, key=lambda p: group_of.get(id(p), len(groups))))
    alone = [[p for own in ordered for p in own if names[id(p)] == name] for name in apart]
    ordered = [[p for p in own if names[id(p)] not in apart] for own in ordered] + alone
    every = [p for own in ordered for p in own]
    like = every[0] if every else torch.zeros(0, dtype=dtype, device=device)
    size = _padded(ordered, parts, ends)
    params = torch.zeros(size, dtype=like.dtype, device=like.device)
    bounds: list[tuple[int, int]] = []
    runs: list[tuple[int, int, int]] = []
    places: list[tuple[str, int, int]] = []
    members: list[tuple[nn.Parameter, int, int]] = []
    at = 0
    for number, own in enumerate(ordered):
        first = at
        for p in own:
            last = at + p.numel()
            params[at:last].copy_(p.detach().reshape(-1))
            p.data = params[at:last].view_as(p)
            group = group_of.get(id(p), -1)
            if runs and runs[-1][0] == group and runs[-1][2] == at:
                runs[-1] = (group, runs[-1][1], last)
            else:
                runs.append((group, at, last))
            places.append((names[id(p)], at, last))
            members.append((p, at, last))
            at = last
        at = _padded(ordered[: number + 1], parts, ends)
        bounds.append((first, at))
    grads = torch.zeros(TOTALS + size, dtype=like.dtype, device=like.device)  # now that what there was is gone
    for p, first, last in members:
        p.grad = grads[TOTALS + first : TOTALS + last].view_as(p)
    return Flat(params, grads, tuple(bounds), tuple(runs), tuple(places), tuple(members))


def _padded(segments: Sequence[Sequence[nn.Parameter]], parts: int, ends: Collection[int]) -> int:
    """Numbers that so many segments take, padding included."""
    at = first = 0
    for number, own in enumerate(segments):
        at += sum(p.numel() for p in own)
        if number in ends:
            at = first = first + -(-(at - first) // parts) * parts
    return at
