"""The PyTorch engine, one stage: forwards by module calls, backwards by autograd.

It knows nothing of peers or schedules: an interpreter tells it what to compute and hands over what arrives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraxis.engine.boundary import Edges, leaf, slice_of
from paraxis.engine.parted import Parting, parting_for
from paraxis.engine.pausing import Pausing
from paraxis.engine.precision import cast
from paraxis.engine.statistics import StageStatistics
from paraxis.program.instructions import Program
from paraxis.program.meetings import reach
from paraxis.task.batches import Nest, Source, leaves, map_nest, samples
from paraxis.task.task import Task

Key = tuple[int, int]  # (segment, microbatch)


@dataclass
class Step:
    """What the stages of a rank have in common while it trains; an object of its own, so that no stage holds its rank.

    `number` is the optimiser step in progress; `totals` (2,) get loss sum and weight, if data alone tell the weight.
    On a GPU both are added up in `sums` (2,) in double precision, where nothing has to wait for them.
    """

    source: Source
    unit: Tensor
    score: Tensor
    totals: Tensor | None = None
    number: int = 0
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    sums: Tensor | None = None

    def add(self, loss: Tensor, weight: Any) -> None:
        """Of a microbatch, on the last stage."""
        if self.sums is not None:
            self.sums[0].add_(loss)
            self.sums[1].add_(weight)
            if self.totals is not None:
                self.totals.copy_(self.sums)
            return
        self.loss_sum += loss.item()
        self.loss_weight += float(weight)
        if self.totals is not None:
            self.totals[0], self.totals[1] = self.loss_sum, self.loss_weight

    def begin(self) -> None:
        """A step: nothing has been added up."""
        self.loss_sum = self.loss_weight = 0.0
        if self.sums is not None:
            self.sums.zero_()


def step_on(device: torch.device, task: Task, score: Tensor, alike: int = 1) -> Step:
    """Before the first step; `alike`: ranks that compute the same loss, of which each one's gradient counts in part."""
    sums = None if device.type == "cpu" else torch.zeros(2, dtype=torch.float64, device=device)
    return Step(task.train, torch.ones((), dtype=task.dtype, device=device) / alike, score, sums=sums)


@dataclass(frozen=True)
class Light:
    """What a segment was called with: enough to compute it again. `counts`: how often its modules had drawn masks."""

    nest: Nest
    batch: Nest
    counts: dict[str, int]


class TorchStage:
    """A run of layers on a rank, which shares its `now` with them. Not safe to share by threads."""

    def __init__(self, now: Step, task: Task, program: Program, stage: int, edges: Edges, device: torch.device) -> None:
        self.now, self.stage, self.device = now, stage, device
        self.task, self.draw = task, task.draw
        self.last = stage == len(program.stages) - 1
        self.slice_size = slice_of(task, program)
        self.entry, self.exit, self.entry_counts = edges
        cuts = program.segments[stage]
        self.segments = [task.chain[first:last] for first, last in cuts]
        self.parting: Parting | None = parting_for(program, stage, self.segments)
        self.calls = [
            cast(map(task.callable, own), program.precision, self._ends(k)) for k, own in enumerate(self.segments)
        ]
        self.plainly = self.calls  # uncompiled, for evaluations
        self.altered = [first in task.altering for first, _ in cuts]
        self.words = program.borders(stage)
        self.pausing: Pausing | None = None
        self.landing: dict[tuple[bool, int], list[Tensor]] | None = None  # where what arrives always lies, if it does
        self.statistics = StageStatistics(self.segments, device)
        self.clear()

    def clear(self) -> None:
        """Forget all microbatches in flight."""
        if self.parting is not None:
            self.parting.clear()
        self.batches: dict[int, Nest] = {}
        self.counts: dict[int, dict[str, int]] = {}
        self.arrived: dict[int, Nest] = {}
        self.between: dict[Key, Nest] = {}
        self.stash: dict[Key, tuple[list[Tensor], list[Tensor]]] = {}
        self.gradients: dict[Key, list[Tensor | None]] = {}
        self.leaving: dict[int, list[Tensor]] = {}
        self.kept: dict[Key, Light] = {}

    # -- computing ---------------------------------------------------------------------------------------------

    def load(self, microbatch: int, part: int) -> None:
        """Take samples of slice `part` of this step's global batch."""
        first = part * self.slice_size
        wanted = self.now.source.share(self.now.number, first, self.slice_size, self.stage == 0, self.last)
        self.batches[microbatch] = wanted

    def forward(self, segment: int, microbatch: int, part: int) -> None:
        """F of one segment: keeps what its backward needs, and hands the output on."""
        if self.pausing is None:
            x, entering = self._enter(segment, microbatch, part)
            made = _through(self.calls[segment], x, self._loss(segment, self._targets(segment, microbatch)))
            self._leave(segment, microbatch, made)
            self._keep(segment, microbatch, entering, made)
            return
        if segment == 0:
            x, self.entering = self._enter(segment, microbatch, part)
            calls = [call for own in self.calls for call in own]
            whole = len(self.segments) - 1
            self.pausing.forward(partial(_through, calls, x, self._loss(whole, self._targets(whole, microbatch))))
        else:
            self.pausing.resume()
        ends = reach("F", self.words, segment)
        self.pausing.check_forward(ends if ends < len(self.words) else None)
        if ends == len(self.words):
            made = self.pausing.end()
            self._leave(ends, microbatch, made)
            self._keep(ends, microbatch, self.entering, made)

    def light(self, segment: int, microbatch: int, part: int) -> None:
        """F that keeps only what the segment is called with; autograd notes operations, for they tell what needs a
        gradient, but not their tensors."""
        self._draw_at(segment, microbatch, part)
        if segment == 0:
            self.statistics.restore()
        kept = Light(self._taken(segment, microbatch), self._targets(segment, microbatch), self._before)
        self.kept[segment, microbatch] = kept
        x, _ = self._opened(segment, kept.nest)
        with torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: torch.empty(0)):
            self._leave(segment, microbatch, _through(self.calls[segment], x, self._loss(segment, kept.batch)))

    def again(self, segment: int, microbatch: int, part: int) -> None:
        """F once more, from what the first one has kept: the same masks; statistics and the loss have been counted."""
        kept = self.kept.pop((segment, microbatch))
        self.draw.at(self.now.number, part * self.slice_size, self.slice_size)
        self.draw.calls = dict(kept.counts)
        self.statistics.restore()
        x, entering = self._opened(segment, kept.nest)
        made = _through(self.calls[segment], x, self._loss(segment, kept.batch))
        self._keep(segment, microbatch, entering, made)

    def _enter(self, segment: int, microbatch: int, part: int) -> tuple[Nest, list[Tensor]]:
        self._draw_at(segment, microbatch, part)
        if segment == 0:
            self.statistics.restore()
        return self._opened(segment, self._taken(segment, microbatch))

    def _ends(self, segment: int) -> bool:
        """Whether the network ends with it."""
        return self.last and segment == len(self.segments) - 1

    def _targets(self, segment: int, microbatch: int) -> Nest:
        """The batch, of which the last segment's loss takes its targets; nothing more is wanted of it."""
        return self.batches.pop(microbatch) if self._ends(segment) else None

    def _loss(self, segment: int, batch: Nest) -> Callable[[Nest], Any] | None:
        """Of the last segment's output."""
        loss = self.task.shared_loss or self.task.recipe.loss
        return (lambda x: loss(x, batch)) if self._ends(segment) else None

    def _leave(self, segment: int, microbatch: int, made: Any) -> None:
        """Hand on what a segment has made, the first time."""
        if segment == len(self.segments) - 1:
            self.statistics.collect()
        if segment < len(self.segments) - 1:
            self.between[segment + 1, microbatch] = made
        elif self.last:
            loss, weight = made
            self.now.add(loss.detach(), weight)
        else:
            self.leaving[microbatch] = self._outgoing(made)

    def _outgoing(self, made: Nest) -> list[Tensor]:
        """As the next stage expects it: autocast leaves other types on a GPU than on the CPU where edges are tried."""
        pairs = zip(leaves(made), leaves(self.exit.nest), strict=True)
        return [t.detach().to(there.dtype).contiguous() for t, there in pairs]

    def _keep(self, segment: int, microbatch: int, entering: list[Tensor], made: Any) -> None:
        """Where a backward begins and where it ends."""
        self.stash[segment, microbatch] = entering, [made[0]] if self._ends(segment) else leaves(made)

    def _draw_at(self, segment: int, microbatch: int, part: int) -> None:
        """The masks of a microbatch; a module that is computed again later goes on counting where it was."""
        self._before = self.counts.pop(microbatch) if segment else self.entry_counts
        self.draw.at(self.now.number, part * self.slice_size, self.slice_size)
        self.draw.calls = self.counts[microbatch] = dict(self._before)

    def _taken(self, segment: int, microbatch: int) -> Nest:
        """What a segment is to be called with, which nobody else keeps."""
        if segment == 0 and self.stage == 0:
            batch = self.batches[microbatch] if self.last else self.batches.pop(microbatch)
            return self.task.recipe.inputs(batch)
        return map_nest(self.between.pop((segment, microbatch)), leaf) if segment else self.arrived.pop(microbatch)

    def _opened(self, segment: int, nest: Nest) -> tuple[Nest, list[Tensor]]:
        """(what a segment is called with, the tensors that collect a gradient)."""
        entering = [] if segment == self.stage == 0 else [t for t in leaves(nest) if t.requires_grad]
        if self.altered[segment]:  # its first layer works in place, which a leaf does not bear, nor a second forward
            nest = map_nest(nest, Tensor.clone)
        return nest, entering

    def backward(self, segment: int, microbatch: int) -> None:
        """B of one segment: adds to the flat gradients, and hands the input's gradient on."""
        if self.pausing is None:
            entering, descend = self._descent(segment, microbatch)
            descend()
        else:
            above = reach("B", self.words, segment)
            if above == len(self.words):
                self.entering, descend = self._descent(above, microbatch)
                self.pausing.backward(descend)
            elif self.pausing.at == above:
                self.pausing.resume()
            self.pausing.check_backward(segment)
            if segment:
                return
            entering, self.entering = self.entering, []
        upstream = [t.grad if t.grad is not None else torch.zeros_like(t) for t in entering]
        if segment:
            self.gradients[segment - 1, microbatch] = list(upstream)
        elif self.stage:
            self.leaving[microbatch] = [g.contiguous() for g in upstream]

    def input_gradient(self, segment: int, microbatch: int) -> None:
        """I of one segment: a backward that leaves to W what can be left; a whole one where the stage has no W."""
        if self.parting is None:
            self.backward(segment, microbatch)
            return
        with self.parting.keeping((segment, microbatch)):
            self.backward(segment, microbatch)

    def weight_gradient(self, segment: int, microbatch: int) -> None:
        """W of one segment: adds to the flat gradients what I has left."""
        assert self.parting is not None, "the program has a W for this stage"
        self.parting.finish((segment, microbatch))

    def _descent(self, segment: int, microbatch: int) -> tuple[list[Tensor], Callable[[], None]]:
        """(what collects a gradient in front, autograd's work from what has been made there)."""
        entering, outputs = self.stash.pop((segment, microbatch))
        if segment == len(self.segments) - 1 and self.last:
            return entering, partial(torch.autograd.backward, outputs, [self.now.unit])
        outputs = [t for t in outputs if t.requires_grad]
        return entering, partial(torch.autograd.backward, outputs, self.gradients.pop((segment, microbatch)))

    def evaluate(self, segment: int, microbatch: int, part: int) -> None:
        """Forward only, without noise; the last stage adds loss, weight and hits of the samples that are no padding."""
        if self.pausing is None or "norm" in self.words:
            self.apart(partial(self._evaluate, (segment,), microbatch, part))
            return
        if segment == 0:
            every = range(len(self.segments))
            self.pausing.forward(partial(self._evaluate, every, microbatch, part), "E")
        else:
            self.pausing.resume()
        ends = reach("E", self.words, segment)
        self.pausing.check_forward(ends if ends < len(self.words) else None)

    def apart(self, compute: Callable[[], None]) -> None:
        """In the one thread that computes this stage."""
        compute() if self.pausing is None else self.pausing.run(compute)

    def _evaluate(self, segments: Sequence[int], microbatch: int, part: int) -> None:
        self.draw.at(self.now.number, part * self.slice_size, self.slice_size)
        with torch.no_grad():
            x, _ = self._opened(segments[0], self._taken(segments[0], microbatch))
            x, segment = _through([call for k in segments for call in self.plainly[k]], x, None), segments[-1]
            if segment < len(self.segments) - 1:
                self.between[segment + 1, microbatch] = x
            elif not self.last:
                self.leaving[microbatch] = self._outgoing(x)
            else:
                valid = self.now.source.valid(self.now.number, part * self.slice_size, self.slice_size)
                self._add_score(x, self.batches.pop(microbatch), valid)

    def _add_score(self, output: Nest, batch: Nest, valid: int) -> None:
        if not valid:
            return
        size = samples(batch)
        output = map_nest(output, lambda t: t[:valid] if t.ndim and t.shape[0] == size else t)
        batch = map_nest(batch, lambda t: t[:valid] if t.ndim and t.shape[0] == size else t)
        loss, weight = self.task.recipe.loss(output, batch)
        hits = self.task.recipe.hits(output, batch)
        self.now.score += torch.tensor([float(loss), float(weight), hits], dtype=torch.float64).to(self.device)

    def training(self, on: bool) -> None:
        """Switch noise and batch statistics on or off, and drop what an interrupted phase left."""
        modules = [m for segment in self.segments for layer in segment for m in layer.modules()]
        if not on:
            self._modes = [m.training for m in modules]
            self.statistics.restore()
        for module, mode in zip(modules, self._modes, strict=True):
            module.training = on and mode

    # -- what crosses the stage's edges ------------------------------------------------------------------------

    def incoming(self, gradient: bool) -> list[Tensor]:
        """Empty buffers for an activation to come, or for the gradients of what this stage sent."""
        edge = self.exit if gradient else self.entry
        pairs = zip(leaves(edge.nest), edge.gradients, strict=True)
        return [torch.empty_like(t, device=self.device) for t, need in pairs if need or not gradient]

    def arrive(self, gradient: bool, microbatch: int, tensors: list[Tensor]) -> None:
        """Take over what has been received."""
        if self.landing is not None:
            lasting = self.landing.setdefault((gradient, microbatch), [torch.empty_like(t) for t in tensors])
            tensors = [there.copy_(t).detach() for there, t in zip(lasting, tensors, strict=True)]
        if gradient:
            self.gradients[len(self.segments) - 1, microbatch] = list(tensors)
            return
        fresh = iter(zip(tensors, self.entry.gradients, strict=True))

        def place(_: Tensor) -> Tensor:
            tensor, need = next(fresh)
            return tensor.requires_grad_() if need else tensor

        self.arrived[microbatch] = map_nest(self.entry.nest, place)

    def leave(self, microbatch: int) -> list[Tensor]:
        """What this stage has made for a neighbour."""
        return self.leaving.pop(microbatch)


def _through(calls: Sequence[Callable[[Any], Any]], x: Any, loss: Callable[[Nest], Any] | None) -> Any:
    """What layers make of an input, or its loss and weight."""
    for call in calls:
        x = call(x)
    return x if loss is None else loss(x)
