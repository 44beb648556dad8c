"""The PyTorch engine, one rank: its stages, the flat buffers of their parameters and gradients, and the updates."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraxis.engine.boundary import boundaries
from paraxis.engine.devices import CPU, move
from paraxis.engine.fed import Fed, descend
from paraxis.engine.flat import Flat, flatten
from paraxis.engine.kept import keep
from paraxis.engine.packed import Packed, within
from paraxis.engine.pausing import pausing_for
from paraxis.engine.rules import RULES, Hyper, State
from paraxis.engine.scaling import scaling_for
from paraxis.engine.sharding import Shards, ends, shard
from paraxis.engine.statistics import joined
from paraxis.engine.torch_stage import TorchStage, step_on
from paraxis.errors import PlanError, ProgramError
from paraxis.program.instructions import MIDWAY, MOMENTS, Program
from paraxis.program.shares import chosen, sharing
from paraxis.task.batches import Source
from paraxis.task.gathering import apart
from paraxis.task.shared import Shard, loss_of_parts, split
from paraxis.task.task import Task

O = torch.optim  # noqa: E741
BY_ELEMENT = (  # optimisers whose step of an element depends on that element alone
    *(O.SGD, O.Adam, O.AdamW, O.NAdam, O.RAdam, O.Adamax, O.Adagrad, O.Adadelta, O.RMSprop, O.Rprop),
)


class TorchEngine:
    """One rank's share of the computing, on one device; `step` is the optimiser step in progress.

    Not safe to share by threads.
    """

    def __init__(self, task: Task, program: Program, rank: int, device: torch.device = CPU) -> None:
        self.task, self.device = task, device
        own = program.stages_of(rank)
        self.score = torch.zeros(3, dtype=torch.float64, device=device)
        self.shards = _share(task, program, rank)
        edges = {stage: boundaries(task, program, stage) for stage in own}  # by the whole network, where it was made
        move(task, [task.chain[slice(*program.stages[stage])] for stage in own], device)
        # Gradients that ranks have of their own tokens are added up: what all of them compute alike counts in parts.
        alike = program.mesh.tp if program.sequenced() and task.shared_loss is None else 1
        self.now, self.alike = step_on(device, task, self.score, alike), alike
        self.stages = {stage: TorchStage(self.now, task, program, stage, edges[stage], device) for stage in own}
        self.last_stage = own[-1] == len(program.stages) - 1
        self.segments = [segment for stage in self.stages.values() for segment in stage.segments]
        places = [(stage, k) for stage in own for k in range(len(program.segments[stage]))]
        self.places = {place: n for n, place in enumerate(places)}  # of each (stage, segment) among `segments`
        self.hyper = task.hyper()
        _check_optimizer(self.hyper, program, bool(self.shards))
        unreached = task.keyed.unreached  # an optimiser leaves parameters alone that never get a gradient
        groups = [[p for p in g["params"] if id(p) not in unreached] for g in self.hyper.groups]
        self.shares: Shards | None = None
        apart = program.zero > 0 or program.common()
        tied = program.own_buckets(rank)
        places += tied.values()
        parts, padded = (program.mesh.dp, ends(program, rank, places)) if apart else (1, ())
        alone = [program.ties[n].parameter for n in tied] if apart else []
        self.flat: Flat = flatten(self.segments, groups, task.names, task.dtype, parts, padded, device, alone)
        if apart:
            self.shares = shard(self.flat, program, rank, places)
            self.flat = self.shares.flat
        for p in (p for g in self.hyper.groups for p in g["params"] if id(p) in unreached):
            p.grad = None
        sizes = {task.names[id(p)]: p.numel() for p in task.net.parameters() if p.requires_grad}
        self.kept = keep(program, self.flat.params, self.flat.names, sizes)
        for stage in self.stages.values():
            stage.pausing = pausing_for(stage, program, device)
        self._keep_own_parameters(task, first=own[0] == 0)
        self.gradients_flat = self.flat.grads[len(self.flat.totals) :]
        self.runs = self._runs()
        self.copies: dict[int, Tensor] = {}  # of parameters that no rank has whole
        self.totals = self.flat.totals
        self.rule: Callable[..., None] | None = RULES.get(self.hyper.rule)
        self._count(program, rank)
        self.norm = torch.zeros(1, dtype=torch.float64, device=device)
        self.scaling = scaling_for(program, task.batch)
        self.running, self.collected = joined([stage.statistics for stage in self.stages.values()])
        replicas = program.mesh.dp if program.epilogue else 1  # those that agree later each train on their own batch
        self.known_weight = 0.0 if task.weight_in_data else task.batch / replicas
        self.now.totals = self.totals if task.weight_in_data else None
        self.fed: Fed | None = None  # while a step is recorded, what it is fed
        self._losses: list[tuple[float, float] | Tensor] = []

    def _count(self, program: Program, rank: int) -> None:
        """Which of its gradients this rank counts in the norm: of what several ranks have, one copy."""
        owned = self.shares.own_gradients() if self.shares else [(0, self.gradients_flat)]
        named = {name: (first, last) for name, first, last in self.flat.names}
        self.tied = {number: named[tie.parameter] for number, tie in program.ties_of(rank).items()}
        self.own_buckets = program.own_buckets(rank)
        elsewhere = {self.tied[n] for n, tie in program.ties_of(rank).items() if tie.stages[0] not in self.stages}
        alike = {range_ for name, range_ in named.items() if name not in self.shards}
        if program.mesh.coordinates(rank)[2]:  # what is whole on every rank of its group is counted on the first
            elsewhere |= alike
        reduced = owned if program.zero > 1 else [(0, self.gradients_flat)]
        self.whole = Packed(within(reduced, sorted(alike)) if program.sequenced() else [], self.gradients_flat)
        self.elsewhere = elsewhere  # ranges of parameters that a rank before this one has, too
        counted = _without(list(elsewhere), max(at + len(own) for at, own in owned))  # in the norm: one copy of each
        self.counted = within(owned, counted)

    @property
    def step(self) -> int:
        """The optimiser step in progress."""
        return self.now.number

    @step.setter
    def step(self, number: int) -> None:
        self.now.number = number

    @property
    def source(self) -> Source:
        """Where samples come from."""
        return self.now.source

    @source.setter
    def source(self, source: Source) -> None:
        self.now.source = source

    def at(self, stage: int) -> TorchStage:
        """What computes a stage."""
        return self.stages[stage]

    def clear(self) -> None:
        """Forget all microbatches in flight."""
        for stage in self.stages.values():
            stage.clear()
        self.now.begin()

    def training(self, on: bool) -> None:
        """Switch noise and batch statistics on or off, and drop what an interrupted phase left."""
        for stage in self.stages.values():
            stage.training(on)

    # -- buffers and updates -----------------------------------------------------------------------------------

    def buffer(self, name: str, bucket: int, stage: int = -1) -> Tensor:
        """A declared flat buffer, or a segment's part of the gradients."""
        if self.shares and name in ("grads", "params"):
            return self.shares.buffer(name, bucket, stage)
        if name == "grads":
            return self.flat.gradients(bucket if bucket < 0 else self.places[stage, bucket])
        if name == "tied" and self.own_buckets:
            return self._shares().share("grads", *reversed(self.own_buckets[bucket]))
        if name == "whole":
            return self.whole.packed()
        if name == "tied":
            first, last = self.tied[bucket]
            return self.gradients_flat[first:last]
        if name in (*MOMENTS.values(), *MIDWAY):
            pausing = self.stages[stage].pausing
            assert pausing is not None, "only a stage that pauses has moments"
            return pausing.moments[bucket]
        if self.kept and name in self.kept.buffers:
            return self.kept.buffer(name, bucket)
        return {
            "params": self.flat.params,
            "gradients": self.gradients_flat,
            "totals": self.totals,
            "score": self.score,
            "norm": self.norm,
            "statistics": self.collected,
            "running": self.running,
        }[name]

    def reserve(self, name: str, bucket: int, stage: int) -> None:
        """Memory for a bucket's parameters or gradients."""
        self._shares().reserve(name, bucket, stage)

    def views(self, names: Sequence[str], fragment: int) -> list[list[Tensor]]:
        """What a synchronisation rule's update is made on."""
        return self.kept.views(names, fragment) if self.kept else []

    def release(self, name: str, bucket: int, stage: int) -> None:
        """Let it go."""
        self._shares().release(name, bucket, stage)

    def take_share(self, bucket: int, stage: int) -> None:
        """Keep one's own part of gradients that have been reduced."""
        self._shares().take_share(bucket, stage)

    def take_whole(self) -> None:
        """Keep the sums of the gradients of what every rank of a `tp` group has."""
        self.whole.unpack()

    def copy(self, bucket: int, stage: int) -> None:
        """Keep a copy of a bucket's parameters while they are whole."""
        self.copies |= {id(p): p.detach().clone() for p in self._shares().members(bucket, stage)}

    def _shares(self) -> Shards:
        if self.shares is None:
            raise ProgramError("this program shards nothing")
        return self.shares

    def _runs(self) -> list[tuple[Tensor, Tensor, State, dict[str, Any]]]:
        """What an update goes over, cut once: every tensor operation, be it a mere slice, costs microseconds."""
        if self.shares:
            found = self.shares.own_runs()
        else:
            found = [(group, self.flat.params[a:b], self.gradients_flat[a:b]) for group, a, b in self.flat.runs]
        return [(weights, grads, {}, self.hyper.groups[group]) for group, weights, grads in found if group >= 0]

    def zero(self) -> None:
        """Begin a step."""
        self.flat.grads.zero_()
        if self.scaling:
            self.now.unit.fill_(self.scaling.scale / self.alike)
        self.now.begin()

    def scale(self) -> float | Tensor:
        """1 / (the weight of the batch that gradients sum over x what losses are scaled by).

        On a GPU a tensor, if data alone tell the weight.
        """
        scaled = self.scaling.scale if self.scaling else 1.0
        if self.known_weight:
            return 1.0 / (self.known_weight * scaled)
        if self.now.sums is None:
            return 1.0 / (max(float(self.totals[1]), 1e-30) * scaled)
        return (self.totals[1].double().clamp_min(1e-30) * scaled).reciprocal()

    def gradient_norm(self) -> None:
        """Square of the gradient's norm on this rank."""
        self.norm.zero_()
        for own in self.counted:
            self.norm[0] += torch.dot(own, own)
        self.norm *= self.scale() ** 2

    def _clipped(self, scale: float | Tensor) -> float | Tensor:
        """What gradients are multiplied by so that their norm is at most what the task allows."""
        clip = self.task.spec.clip
        if clip is None:
            return scale
        if self.now.sums is None:
            return scale * min(1.0, clip / (float(self.norm[0]) ** 0.5 + 1e-6))
        return scale * (clip / (self.norm[0].sqrt() + 1e-6)).clamp_max(1.0)

    def update(self) -> None:
        """One optimiser step on the flat buffers; none if scaled gradients have overflowed, on any rank."""
        scale = self._clipped(self.scale())
        if self.scaling is None or self.scaling.takes(float(self.norm[0])):
            next(iter(self.stages.values())).apart(partial(self._step, scale))
        if self.fed is None:
            self.advance(self.now.sums)

    def advance(self, sums: Tensor | None) -> None:
        """What the host does behind an update; `sums` (2,) are the step's loss and weight if they lie on a device."""
        self.hyper.advance()
        if self.last_stage:
            self._losses.append((self.now.loss_sum, self.now.loss_weight) if sums is None else sums.clone())
        self.now.number += 1

    @property
    def losses(self) -> list[tuple[float, float]]:
        """(sum, weight) of every step since they were last taken; a GPU is waited for here and not before."""
        late = [own for own in self._losses if isinstance(own, Tensor)]
        known = iter(torch.stack(late).tolist() if late else ())
        self._losses = [tuple(next(known)) if isinstance(own, Tensor) else own for own in self._losses]
        return list(self._losses)  # type: ignore[arg-type]

    @losses.setter
    def losses(self, rest: list[tuple[float, float]]) -> None:
        self._losses = list(rest)

    def _step(self, scale: float | Tensor) -> None:
        if self.fed is not None:
            descend(self, self.fed, scale)
        elif self.rule is not None:
            for weights, gradients, state, group in self.runs:
                self.rule(weights, gradients, state, group, scale)
        elif self.hyper.optimizer is not None:
            self.gradients_flat.mul_(scale)
            self.hyper.optimizer.step()

    def _keep_own_parameters(self, task: Task, first: bool) -> None:
        """The optimiser steps what lies on this rank; the layers of others are let go."""
        own = {id(p) for segment in self.segments for layer in segment for p in layer.parameters()}
        for group in self.hyper.groups:
            group["params"] = [p for p in group["params"] if id(p) in own]
        inside = {id(b) for segment in self.segments for layer in segment for b in layer.buffers()}
        if first:  # and the buffers that lie in no layer
            inside |= {id(b) for b in task.net.buffers()} - {id(b) for layer in task.chain for b in layer.buffers()}
        every = task.net.state_dict(keep_vars=True).items()
        self.named = {name: value for name, value in every if id(value) in own | inside}
        task.chain, task.net = [], torch.nn.Identity()

    def update_statistics(self) -> None:
        """Running statistics become the mean of what every group would have made of them."""
        for stage in self.stages.values():
            stage.statistics.advance()

    # -- in and out --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """This rank's part of the network's state_dict, in host memory; of stage 3 of ZeRO, what the body `state` has
        just copied."""
        copies, self.copies = self.copies, {}
        for stage in self.stages.values():
            stage.statistics.restore()
        return {name: copies.get(id(value), value).detach().to(CPU, copy=True) for name, value in self.named.items()}

    def square_sum(self) -> float:
        """Of the parameters; as `state`."""
        copies, self.copies = self.copies, {}
        if copies:
            named = {id(self.named[name]): (first, last) for name, first, last in self.flat.names}
            return sum(float(t.square().sum()) for p, t in copies.items() if named[p] not in self.elsewhere)
        again = sum(float(self.flat.params[a:b].square().sum()) for a, b in self.elsewhere)
        return float(self.flat.params.square().sum()) - again

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of parameters and gradients, whole or in shares as they are now, and of the optimiser's state."""
        whole = self.shares.transient if self.shares else lambda name: 0
        return {
            "params": self.flat.params.nbytes + whole("params"),
            "grads": self.flat.grads.nbytes + whole("grads"),
            "state": sum(t.nbytes for run in self.runs for t in run[2].values())
            + sum(t.nbytes for t in (self.kept.buffers.values() if self.kept else ())),
        }

    def bytes_held(self) -> int:
        """Bytes of the flat buffers and the optimiser's state."""
        return sum(self.bytes_by_kind().values())


def _check_optimizer(hyper: Hyper, program: Program, split: bool) -> None:
    kind = type(hyper.optimizer)
    if split and hyper.optimizer is not None and kind not in BY_ELEMENT:
        parts = "may look at whole tensors, of which a rank has parts; dp takes it"
        raise PlanError(f"tp={program.mesh.tp}: {kind.__name__} {parts}")
    if program.zero and hyper.rule not in RULES:
        raise PlanError(f"zero={program.zero}: {kind.__name__} needs whole parameters; SGD, Adam and AdamW take shares")


def _without(parts: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The ranges of [0, size) that are left without some parts."""
    edges = [0, *(edge for part in sorted(parts) for edge in part), size]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _share(task: Task, program: Program, rank: int) -> dict[str, Shard]:
    """Keep this rank's part of what the ranks of its `tp` group share; of which tensors that leaves which part."""
    tp, index = program.mesh.tp, program.mesh.coordinates(rank)[2]
    if tp == 1:
        return {}
    own, tokens = chosen(tp, task.splits), None
    if program.sequenced():
        tokens = sharing(tp, task.splits, task.tokens)
        own = tuple(task.splits[n] for n in tokens.splits)
        apart(task.net, task.chain, tokens, index, tp)
    shards = split(task.net, own, task.draw, index, tp, tokens)
    task.shared_loss = loss_of_parts(task.net, own, index, tp)
    every = task.net.state_dict(keep_vars=True).items()
    return {name: shards[id(value)] for name, value in every if id(value) in shards}
