"""The PyTorch engine: computes segments of one rank's stage, forwards by module calls, backwards by autograd.

It knows nothing of ranks, peers or schedules: an interpreter tells it what to compute and hands over what arrives.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraxis.engine.boundary import boundaries, leaf
from paraxis.engine.flat import Flat, flatten
from paraxis.engine.pausing import pausing_for
from paraxis.engine.rules import RULES, State
from paraxis.program.instructions import MOMENTS, Program
from paraxis.task.batches import Nest, Source, leaves, map_nest, samples
from paraxis.task.task import Task
from paraxis.task.trial import running

Key = tuple[int, int]  # (segment, microbatch)


class TorchEngine:
    """One rank's share of the computing; `step` is the optimiser step in progress. Not safe to share by threads."""

    def __init__(self, task: Task, program: Program, rank: int) -> None:
        _, self.stage, _ = program.mesh.coordinates(rank)
        self.task, self.draw = task, task.draw
        self.last_stage = self.stage == len(program.stages) - 1
        self.slice_size = task.batch // (program.mesh.dp * program.microbatches)
        self.entry, self.exit, self.entry_counts = boundaries(task, program, self.stage, self.slice_size)
        cuts = program.segments[self.stage]
        self.segments = [task.chain[first:last] for first, last in cuts]
        self.calls = [[task.callable(layer) for layer in segment] for segment in self.segments]
        self.altered = [first in task.altering for first, _ in cuts]
        self.hyper = task.hyper()
        unreached = task.keyed.unreached  # an optimiser leaves parameters alone that never get a gradient
        groups = [[p for p in g["params"] if id(p) not in unreached] for g in self.hyper.groups]
        self.flat: Flat = flatten(self.segments, groups, task.names, task.dtype)
        for p in (p for g in self.hyper.groups for p in g["params"] if id(p) in unreached):
            p.grad = None
        self.pausing = pausing_for(self, program)
        self._keep_own_parameters(task)
        self.gradients_flat = self.flat.grads[len(self.flat.totals) :]
        # Cut once: every tensor operation, be it a mere slice, costs microseconds of a step.
        self.runs: list[tuple[Tensor, Tensor, State, dict[str, Any]]] = [
            (self.flat.params[a:b], self.gradients_flat[a:b], {}, self.hyper.groups[group])
            for group, a, b in self.flat.runs
            if group >= 0
        ]
        self.part = 0, 1  # of the parameters, that this rank updates
        self.totals = self.flat.totals
        self.rule: Callable[..., None] | None = RULES.get(self.hyper.rule)
        self.unit = torch.ones((), dtype=task.dtype, device=self.flat.params.device)
        self.norm = torch.zeros(1, dtype=torch.float64)
        self.score = torch.zeros(3, dtype=torch.float64)
        self._own_statistics()
        replicas = program.mesh.dp if program.epilogue else 1  # those that agree later each train on their own batch
        self.known_weight = 0.0 if task.weight_in_data else task.batch / replicas
        self.source: Source = task.train
        self.step = 0
        self.losses: list[tuple[float, float]] = []
        self.clear()

    def clear(self) -> None:
        """Forget all microbatches in flight."""
        self.batches: dict[int, Nest] = {}
        self.counts: dict[int, dict[str, int]] = {}
        self.arrived: dict[int, Nest] = {}
        self.between: dict[Key, Nest] = {}
        self.stash: dict[Key, tuple[list[Tensor], list[Tensor]]] = {}
        self.gradients: dict[Key, list[Tensor | None]] = {}
        self.leaving: dict[int, list[Tensor]] = {}
        self.loss_sum = self.loss_weight = 0.0

    # -- computing ---------------------------------------------------------------------------------------------

    def load(self, microbatch: int, part: int) -> None:
        """Take samples of slice `part` of this step's global batch."""
        first = part * self.slice_size
        wanted = self.source.share(self.step, first, self.slice_size, self.stage == 0, self.last_stage)
        self.batches[microbatch] = wanted

    def forward(self, segment: int, microbatch: int, part: int) -> None:
        """F of one segment: keeps what its backward needs, and hands the output on."""
        last = segment == len(self.segments) - 1
        if self.pausing is None:
            x, entering = self._enter(segment, microbatch, part)
            self._leave(segment, microbatch, entering, _through(self.calls[segment], x, self._loss(last, microbatch)))
            return
        if segment == 0:
            x, self.entering = self._enter(segment, microbatch, part)
            calls = [call for own in self.calls for call in own]
            self.pausing.forward(partial(_through, calls, x, self._loss(True, microbatch)))
        else:
            self.pausing.resume()
        self.pausing.check_forward(None if last else segment)
        if last:
            self._leave(segment, microbatch, self.entering, self.pausing.end())

    def _enter(self, segment: int, microbatch: int, part: int) -> tuple[Nest, list[Tensor]]:
        self._draw_at(segment, microbatch, part)
        x, entering = self._input(segment, microbatch)
        if self.statistics and segment == 0:
            self._from_running()
        return x, entering

    def _loss(self, last: bool, microbatch: int) -> Callable[[Nest], Any] | None:
        """Of the last segment's output."""
        if not (last and self.last_stage):
            return None
        loss, batch = self.task.recipe.loss, self.batches.pop(microbatch)
        return lambda x: loss(x, batch)

    def _leave(self, segment: int, microbatch: int, entering: list[Tensor], made: Any) -> None:
        if self.statistics and segment == len(self.segments) - 1:
            self._to_statistics()
        if segment < len(self.segments) - 1:
            self.stash[segment, microbatch] = entering, leaves(made)
            self.between[segment + 1, microbatch] = made
        elif self.last_stage:
            loss, weight = made
            self.stash[segment, microbatch] = entering, [loss]
            self.loss_sum += loss.item()
            self.loss_weight += float(weight)
            if not self.known_weight:
                self.totals[0], self.totals[1] = self.loss_sum, self.loss_weight
        else:
            outputs = leaves(made)
            self.stash[segment, microbatch] = entering, outputs
            self.leaving[microbatch] = [t.detach().contiguous() for t in outputs]

    def _draw_at(self, segment: int, microbatch: int, part: int) -> None:
        """The masks of a microbatch; a module that is computed again later goes on counting where it was."""
        before = self.counts.pop(microbatch) if segment else self.entry_counts
        self.draw.at(self.step, part * self.slice_size, self.slice_size)
        self.draw.calls = self.counts[microbatch] = dict(before)

    def _input(self, segment: int, microbatch: int) -> tuple[Nest, list[Tensor]]:
        """(what a segment is called with, its tensors that collect a gradient)."""
        if segment == 0 and self.stage == 0:
            batch = self.batches[microbatch] if self.last_stage else self.batches.pop(microbatch)
            inputs = self.task.recipe.inputs(batch)
            return map_nest(inputs, Tensor.clone) if self.altered[0] else inputs, []
        nest = map_nest(self.between.pop((segment, microbatch)), leaf) if segment else self.arrived.pop(microbatch)
        entering = [t for t in leaves(nest) if t.requires_grad]
        if self.altered[segment]:  # its first layer works in place, which a leaf does not bear
            nest = map_nest(nest, lambda t: t.clone() if t.requires_grad else t)
        return nest, entering

    def backward(self, segment: int, microbatch: int) -> None:
        """B of one segment: adds to the flat gradients, and hands the input's gradient on."""
        if self.pausing is None:
            entering, descend = self._descent(segment, microbatch)
            descend()
        else:
            if segment == len(self.segments) - 1:
                self.entering, descend = self._descent(segment, microbatch)
                self.pausing.backward(descend)
            elif self.pausing.at == segment:
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

    def _descent(self, segment: int, microbatch: int) -> tuple[list[Tensor], Callable[[], None]]:
        """(what collects a gradient in front, autograd's work from what has been made there)."""
        entering, outputs = self.stash.pop((segment, microbatch))
        if segment == len(self.segments) - 1 and self.last_stage:
            return entering, partial(torch.autograd.backward, outputs, [self.unit])
        outputs = [t for t in outputs if t.requires_grad]
        return entering, partial(torch.autograd.backward, outputs, self.gradients.pop((segment, microbatch)))

    def evaluate(self, segment: int, microbatch: int, part: int) -> None:
        """Forward only, without noise; the last stage adds loss, weight and hits of the samples that are no padding."""
        self._apart(partial(self._evaluate, segment, microbatch, part))

    def _apart(self, compute: Callable[[], None]) -> None:
        """In the one thread that computes this stage."""
        compute() if self.pausing is None else self.pausing.run(compute)

    def _evaluate(self, segment: int, microbatch: int, part: int) -> None:
        self.draw.at(self.step, part * self.slice_size, self.slice_size)
        with torch.no_grad():
            x, _ = self._input(segment, microbatch)
            for call in self.calls[segment]:
                x = call(x)
            if segment < len(self.segments) - 1:
                self.between[segment + 1, microbatch] = x
            elif not self.last_stage:
                self.leaving[microbatch] = [t.detach().contiguous() for t in leaves(x)]
            else:
                valid = self.source.valid(self.step, part * self.slice_size, self.slice_size)
                self._add_score(x, self.batches.pop(microbatch), valid)

    def _add_score(self, output: Nest, batch: Nest, valid: int) -> None:
        if not valid:
            return
        size = samples(batch)
        output = map_nest(output, lambda t: t[:valid] if t.ndim and t.shape[0] == size else t)
        batch = map_nest(batch, lambda t: t[:valid] if t.ndim and t.shape[0] == size else t)
        loss, weight = self.task.recipe.loss(output, batch)
        target = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
        hits = 0
        if isinstance(output, Tensor) and output.ndim == 2 and isinstance(target, Tensor) and target.ndim == 1:
            hits = int((output.argmax(1) == target).sum())
        self.score += torch.tensor([float(loss), float(weight), hits], dtype=torch.float64)

    def training(self, on: bool) -> None:
        """Switch noise and batch statistics on or off, and drop what an interrupted phase left."""
        modules = [m for segment in self.segments for layer in segment for m in layer.modules()]
        if not on:
            self._modes = [m.training for m in modules]
            if self.statistics:
                self._from_running()
        for module, mode in zip(modules, self._modes, strict=True):
            module.training = on and mode

    # -- what crosses the stage's edges ------------------------------------------------------------------------

    def incoming(self, gradient: bool) -> list[Tensor]:
        """Empty buffers for an activation to come, or for the gradients of what this stage sent."""
        edge = self.exit if gradient else self.entry
        pairs = zip(leaves(edge.nest), edge.gradients, strict=True)
        return [torch.empty_like(t) for t, need in pairs if need or not gradient]

    def arrive(self, gradient: bool, microbatch: int, tensors: list[Tensor]) -> None:
        """Take over what has been received."""
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

    # -- buffers and updates -----------------------------------------------------------------------------------

    def buffer(self, name: str, bucket: int) -> Tensor:
        """A declared flat buffer, or a segment's part of the gradients."""
        if name == "grads":
            return self.flat.gradients(bucket)
        if name in MOMENTS.values() and self.pausing is not None:
            return self.pausing.moments[bucket]
        return {
            "params": self.flat.params,
            "totals": self.totals,
            "score": self.score,
            "norm": self.norm,
            "statistics": self.collected,
            "running": self.running,
        }[name]

    def keep_to(self, part: int, parts: int) -> None:
        """Update only one of `parts` equal shares of the parameters from now on."""
        if self.part != (part, parts):
            self.part = part, parts
            first, last = self._own_part()
            cut = [(max(a, first), min(b, last), group) for group, a, b in self.flat.runs if group >= 0]
            self.runs = [
                (self.flat.params[a:b], self.gradients_flat[a:b], {}, self.hyper.groups[group])
                for a, b, group in cut
                if a < b
            ]

    def only_own_part(self, part: int, parts: int) -> None:
        """Clear the parameters of the other shares, before they are gathered."""
        first, last = self._own_part()
        self.flat.params[:first].zero_()
        self.flat.params[last:].zero_()

    def _own_part(self) -> tuple[int, int]:
        part, parts = self.part
        each = -(-self.flat.params.numel() // parts)
        return min(part * each, self.flat.params.numel()), min((part + 1) * each, self.flat.params.numel())

    def zero(self) -> None:
        """Begin a step."""
        self.flat.grads.zero_()
        self.loss_sum = self.loss_weight = 0.0

    def scale(self) -> float:
        """1 / the weight of the batch that the gradients sum over."""
        return 1.0 / (self.known_weight or max(float(self.totals[1]), 1e-30))

    def gradient_norm(self) -> None:
        """Square of the gradient's norm on this stage."""
        gradients = self.gradients_flat
        first, last = self._own_part()
        own = gradients[first:last]
        self.norm[0] = float(torch.dot(own, own)) * self.scale() ** 2

    def update(self) -> None:
        """One optimiser step on the flat buffers."""
        scale = self.scale()
        clip = self.task.spec.clip
        if clip is not None:
            scale *= min(1.0, clip / (float(self.norm[0]) ** 0.5 + 1e-6))
        self._apart(partial(self._step, scale))
        self.hyper.advance()
        if self.last_stage:
            self.losses.append((self.loss_sum, self.loss_weight))
        self.step += 1

    def _step(self, scale: float) -> None:
        if self.rule is not None:
            for weights, gradients, state, group in self.runs:
                self.rule(weights, gradients, state, group, scale)
        elif self.hyper.optimizer is not None:
            self.gradients_flat.mul_(scale)
            self.hyper.optimizer.step()

    def _keep_own_parameters(self, task: Task) -> None:
        """The optimiser steps what lies on this stage; the layers of other stages are let go."""
        own = {id(p) for segment in self.segments for layer in segment for p in layer.parameters()}
        for group in self.hyper.groups:
            group["params"] = [p for p in group["params"] if id(p) in own]
        inside = {id(b) for segment in self.segments for layer in segment for b in layer.buffers()}
        if self.stage == 0:  # and the buffers that lie in no layer
            inside |= {id(b) for b in task.net.buffers()} - {id(b) for layer in task.chain for b in layer.buffers()}
        every = task.net.state_dict(keep_vars=True).items()
        self.named = {name: value for name, value in every if id(value) in own | inside}
        task.chain, task.net = [], torch.nn.Identity()

    # -- running statistics (law 3: they change once a step, by the mean over all groups) ----------------------

    def _own_statistics(self) -> None:
        modules = {id(m): m for segment in self.segments for layer in segment for m in layer.modules()}
        found = [b for m in modules.values() for b in running(m)]
        self.statistics = [b for b in found if b.is_floating_point()]
        self.counters = [(b, int(b)) for b in found if not b.is_floating_point()]
        flat = [b.reshape(-1) for b in self.statistics]
        self.running = torch.cat(flat) if flat else torch.zeros(0)
        self.collected = torch.zeros_like(self.running)
        self.groups = 0

    def _from_running(self) -> None:
        """Every microbatch starts from the statistics of the step before. Written through `data`: autograd has saved
        these buffers for the backwards to come, which do not use them in training."""
        pieces = self.running.split([b.numel() for b in self.statistics])
        for buffer, piece in zip(self.statistics, pieces, strict=True):
            buffer.data.copy_(piece.view_as(buffer))
        for buffer, count in self.counters:
            buffer.data.fill_(count)

    def _to_statistics(self) -> None:
        self.collected += torch.cat([b.reshape(-1) for b in self.statistics])
        self.groups += 1

    def update_statistics(self) -> None:
        """Running statistics become the mean of what every group would have made of them."""
        if self.statistics:
            self.running.copy_(self.collected).div_(self.groups)
            self.collected.zero_()
            self.groups = 0
            for index, (buffer, count) in enumerate(self.counters):
                self.counters[index] = buffer, count + 1

    # -- in and out --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """This stage's part of the network's state_dict."""
        if self.statistics:
            self._from_running()
        return {name: value.detach().clone() for name, value in self.named.items()}

    def bytes_held(self) -> int:
        """Bytes of the flat buffers and the optimiser's state."""
        kept = [self.flat.params, self.flat.grads, *(t for run in self.runs for t in run[2].values())]
        return sum(t.nbytes for t in kept)


def _through(calls: Sequence[Callable[[Any], Any]], x: Any, loss: Callable[[Nest], Any] | None) -> Any:
    """What layers make of an input, or its loss and weight."""
    for call in calls:
        x = call(x)
    return x if loss is None else loss(x)
