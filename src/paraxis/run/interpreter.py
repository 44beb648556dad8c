"""Executes a program: every instruction is bound once to a closure, then a short loop calls them.

`Rank` is one rank's interpreter; `body` binds a named body, `steps` runs optimiser steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, cast

from torch import Tensor

from paraxis.comm.base import Comm, Request
from paraxis.comm.exchange import collected_bytes
from paraxis.comm.links import LANES, tag_in
from paraxis.comm.payload import PackedSum
from paraxis.program.instructions import COLLECTIVES, GATHERS, MIDWAY, RECEIVES, SCATTERS, SENDS, Instruction, Program
from paraxis.run.clock import HOST, Clock
from paraxis.sync.rule import updates

Action = Callable[[], None]
PARTIAL, COLLECTED = ("ReduceScatter", *SCATTERS), ("AllGather", *GATHERS)


@dataclass(frozen=True)
class Context:
    """What the binders need: the engine that computes, the communicators that carry, the tokens that are open."""

    engine: Any
    world: Comm
    axes: dict[str, Comm]
    open: dict[int, list[Request]]
    sent: list[int]  # bytes that this rank has sent
    pipeline: int  # ranks along it
    microbatches: int


def bind(i: Instruction, context: Context) -> Action:
    """The closure that executes one instruction."""
    return BINDERS[i.op](i, context)


def _load(i: Instruction, c: Context) -> Action:
    return partial(c.engine.at(i.stage).load, i.microbatch, i.slice)


def _forward(i: Instruction, c: Context) -> Action:
    """F, or one of its kinds: "evaluate", "light", "again"."""
    return partial(getattr(c.engine.at(i.stage), i.rule or "forward"), i.segment, i.microbatch, i.slice)


def _backward(i: Instruction, c: Context) -> Action:
    return partial(c.engine.at(i.stage).backward, i.segment, i.microbatch)


def _input_gradient(i: Instruction, c: Context) -> Action:
    return partial(c.engine.at(i.stage).input_gradient, i.segment, i.microbatch)


def _weight_gradient(i: Instruction, c: Context) -> Action:
    """An owner's block is what `_gather` leaves of the factors' products: nothing is left to compute."""
    if i.rule == "owner":
        return lambda: None
    return partial(c.engine.at(i.stage).weight_gradient, i.segment, i.microbatch)


def _update(i: Instruction, c: Context) -> Action:
    if i.rule in updates():
        function, names = updates()[i.rule]
        views = c.engine.views(names, i.bucket)

        def follow() -> None:
            for own in views:
                function(*own)

        return follow
    rules = {"zero": "zero", "step": "update", "norm": "gradient_norm", "statistics": "update_statistics"}
    if i.rule == "keep":
        return partial(c.engine.copy, i.bucket, i.stage)
    action: Action = getattr(c.engine, rules[i.rule])
    return action


def _send(i: Instruction, c: Context) -> Action:
    tag, stage = tag_in(i, c.pipeline, c.microbatches), c.engine.at(i.stage)

    def start() -> None:
        tensors = stage.leave(i.microbatch)
        c.open[i.token] = [c.world.send(t, i.peer, tag + n * LANES) for n, t in enumerate(tensors)]
        c.sent[0] += sum(t.nbytes for t in tensors)

    return start


def _receive(i: Instruction, c: Context) -> Action:
    tag, gradient, stage = tag_in(i, c.pipeline, c.microbatches), i.base == "RecvGrad", c.engine.at(i.stage)

    def start() -> None:
        tensors = stage.incoming(gradient)
        c.open[i.token] = [c.world.receive(t, i.peer, tag + n * LANES) for n, t in enumerate(tensors)]

    return start


def _received(i: Instruction, c: Context) -> Action:
    gradient, stage = i.base == "RecvGrad", c.engine.at(i.stage)

    def wait() -> None:
        requests: Any = c.open.pop(i.token)
        for request in requests:
            request.wait()
        stage.arrive(gradient, i.microbatch, [request.tensor for request in requests])

    return wait


def _wait(i: Instruction, c: Context) -> Action:
    def wait() -> None:
        for request in c.open.pop(i.token):
            request.wait()

    return wait


def _collective(i: Instruction) -> str:
    """What a communicator calls it."""
    return "reduce_scatter" if i.base in PARTIAL else "all_gather" if i.base in COLLECTED else "all_reduce"


def _tensor(i: Instruction, c: Context) -> Tensor:
    """What a collective is about: a buffer, or what a stage that stands still in its middle has just made."""
    if i.base in MIDWAY:
        return cast(Tensor, c.engine.buffer(i.base, i.segment, i.stage))
    whole = i.payload and i.buffer == "grads"  # what is rounded on its way goes without the totals in front
    return cast(Tensor, c.engine.buffer("gradients" if whole else i.buffer, i.bucket, i.stage))


def _collect_start(i: Instruction, c: Context) -> Action:
    comm = c.axes[i.axis]
    begin = getattr(comm, _collective(i) + "_start")

    def pack() -> None:
        c.open[i.token] = [PackedSum(comm, _tensor(i, c), i.payload)]

    if i.payload:
        return pack

    def start() -> None:
        tensor = _tensor(i, c)
        c.open[i.token] = [begin(tensor)]
        c.sent[0] += collected_bytes(_collective(i), tensor, comm.size)

    return start


def _collect_wait(i: Instruction, c: Context) -> Action:
    finish = _finish(i, c)

    def wait() -> None:
        for request in c.open.pop(i.token):
            request.wait()
            c.sent[0] += getattr(request, "sent", 0)
        finish()

    return wait


def _collect_at_once(i: Instruction, c: Context) -> Action:
    """Start and wait next to each other: the blocking call, which is faster."""
    comm, finish = c.axes[i.axis], _finish(i, c)
    collect = getattr(comm, _collective(i))

    def meet() -> None:
        tensor = _tensor(i, c)
        collect(tensor)
        finish()
        c.sent[0] += collected_bytes(_collective(i), tensor, comm.size)

    if i.base in MIDWAY or i.buffer == "whole":
        return meet
    tensor = _tensor(i, c)
    count = collected_bytes(_collective(i), tensor, comm.size)

    def at_once() -> None:
        collect(tensor)
        finish()
        c.sent[0] += count

    return at_once


def _finish(i: Instruction, c: Context) -> Action:
    """What remains to be done with what a collective has brought."""
    take: Action = partial(c.engine.take_share, i.bucket, i.stage) if i.base == "ReduceScatter" else lambda: None
    take = c.engine.take_whole if i.buffer == "whole" else take
    if i.reduction != "mean":
        return take

    def mean() -> None:
        _tensor(i, c).div_(c.axes[i.axis].size)
        take()

    return mean


def _gather(i: Instruction, c: Context) -> Action:
    """Of weight gradients' factors an engine without I and W apart has but their products: it adds those up."""
    return _collect_start(_as_sum(i), c)


def _gathered(i: Instruction, c: Context) -> Action:
    return _collect_wait(_as_sum(i), c)


def _as_sum(i: Instruction) -> Instruction:
    return replace(i, op=i.op.replace("AllGather", "ReduceScatter"), buffer="grads") if i.buffer == "factors" else i


def _memory(i: Instruction, c: Context) -> Action:
    act = c.engine.reserve if i.op == "Reserve" else c.engine.release
    return partial(act, i.buffer, i.bucket, i.stage)


BINDERS: dict[str, Callable[[Instruction, Context], Action]] = {
    "Load": _load,
    "F": _forward,
    "B": _backward,
    "I": _input_gradient,
    "W": _weight_gradient,
    "Update": _update,
    **{f"{op}Start": _send for op in SENDS},
    **{f"{op}Wait": _wait for op in SENDS},
    **{f"{op}Start": _receive for op in RECEIVES},
    **{f"{op}Wait": _received for op in RECEIVES},
    "AllReduceStart": _collect_start,
    "AllReduceWait": _collect_wait,
    "ReduceScatterStart": _collect_start,
    "ReduceScatterWait": _collect_wait,
    "AllGatherStart": _gather,
    "AllGatherWait": _gathered,
    "Reserve": _memory,
    "Release": _memory,
    **{f"{op}Start": _collect_start for op in MIDWAY},
    **{f"{op}Wait": _wait for op in MIDWAY},
}


class Rank:
    """One rank of a program. `blocking` joins adjacent starts and waits into blocking calls.

    The engine's methods are bound here, once: what replaces one of them must do so before.
    """

    def __init__(
        self, program: Program, rank: int, engine: Any, world: Comm, blocking: bool = True, clock: Clock = HOST
    ) -> None:
        self.program, self.rank, self.engine, self.world, self.clock = program, rank, engine, world, clock
        mesh = program.mesh
        sizes = {"dp": mesh.dp, "pp": mesh.pp, "tp": mesh.tp}
        parts = {i.axis for _, ranks in program.bodies for i in ranks[rank] if ":" in i.axis}  # ranks with tied weights
        wanted = [axis for axis, size in sizes.items() if size > 1] + sorted(parts)
        axes = {axis: world.group(mesh.group(rank, axis)) for axis in wanted}
        self.context = Context(engine, world, axes, {}, [0], mesh.pp, program.microbatches)
        self.blocking = blocking
        self.bodies = {name: self.bind(ranks[rank]) for name, ranks in program.bodies}
        self.sent: dict[str, int] = {}  # bytes that the last pass over a body has sent
        self.done = 0  # optimiser steps
        self.stamps: list[tuple[str, list[int]]] = []  # of the steps that were traced last
        self.remarks: list[str] = []  # what a reader of its figures must know

    def bind(self, instructions: Sequence[Instruction]) -> list[Action]:
        """One action an instruction."""
        actions: list[Action] = []
        for n, i in enumerate(instructions):
            before, behind = instructions[n - 1 : n], instructions[n + 1 : n + 2]
            joins = self.blocking and i.base in COLLECTIVES and i.buffer != "factors" and not i.payload
            if joins and i.starts and behind and behind[0].token == i.token:
                actions.append(lambda: None)
            elif joins and i.waits and before and before[0].token == i.token:
                actions.append(_collect_at_once(i, self.context))
            else:
                actions.append(bind(i, self.context))
        return actions

    def run(self, name: str) -> None:
        """One pass over a body."""
        before = self.context.sent[0]
        for action in self.bodies[name]:
            action()
        self.sent[name] = self.context.sent[0] - before

    def begin(self) -> None:
        """The prologue, before the first step."""
        for name, times in self.program.prologue if not self.done else ():
            for _ in range(times):
                self.run(name)

    def run_traced(self, steps: int) -> None:
        """Optimiser steps with the clock read between instructions; `clocks` has what was read."""
        self.begin()
        self.stamps = []
        now, names, rows = self.clock.read, [], []
        for _ in range(steps):
            name = self.next_body()
            stamps = [now()]
            read = stamps.append
            for action in self.bodies[name]:
                action()
                read(now())
            names.append(name)
            rows.append(stamps)
            self.done += 1
        self.rest()
        self.stamps = list(zip(names, self.clock.told(rows), strict=True))

    def clocks(self, steps: int) -> list[tuple[str, list[list[int]]]]:
        """Of the last steps, which `run_traced` has run: (body, one list of nanoseconds) each."""
        return [(name, [stamps]) for name, stamps in self.stamps[-steps:]]

    def between(self) -> list[tuple[str, int, int]]:
        """What this rank did outside of instructions: nothing that would have to be timed."""
        return []

    def steps(self, count: int) -> None:
        """`count` optimiser steps."""
        self.begin()
        for _ in range(count):
            self.run(self.next_body())
            self.done += 1
        self.rest()

    def next_body(self) -> str:
        """Of the next step. What earlier ones have begun goes on: some libraries only move data while called.

        In the order of their beginning, which is that of all ranks: what goes on may send, and order may be its name.
        """
        all(request.ready() for request in chain.from_iterable(self.context.open.values()))
        return self.program.step_body(self.done)

    def rest(self) -> None:
        """Between calls nothing is under way, for its memory may be given back; a later Wait finds it done."""
        for request in chain.from_iterable(self.context.open.values()):
            request.wait()

    def sent_in_a_step(self) -> float:
        """Bytes that this rank sends in a step, averaged over the whole period, however much of it has been run.

        A body whose turn has not come yet, such as the one that ends a long epoch, is run once out of turn for it.
        """
        self.begin()
        while self.context.open:  # what is under way ends in its turn
            self.steps(1)
        for name in dict.fromkeys(name for name, _ in self.program.period if name not in self.sent):
            self.run(name)
            self.done += self.program.steps_in_period()  # goes on at the same place of the period
        total = sum(times * self.sent[name] for name, times in self.program.period)
        return total / self.program.steps_in_period()

    def settle(self) -> None:
        """The epilogue: replicas that agree only now and then agree now."""
        for name, times in self.program.epilogue:
            for _ in range(times):
                self.run(name)

    def state(self) -> dict[str, Tensor]:
        """This rank's part of the network's state_dict; where no rank has it whole, all must ask."""
        if "state" in self.bodies:
            self.run("state")
        return dict(self.engine.state())

    def square_sum(self) -> float:
        """Of the parameters of this rank, shares of others included; all must ask."""
        if "state" in self.bodies:
            self.run("state")
        return float(self.engine.square_sum())

    def evaluate(self, source: Any) -> list[float]:
        """[loss sum, weight, hits] over all of a source's samples, on ranks of the last stage."""
        engine = self.engine
        kept = engine.source, engine.step
        engine.training(False)
        engine.source, engine.score = source, engine.score.zero_()
        for engine.step in range(source.steps_per_epoch):
            self.run("evaluate")
        self.run("score")
        engine.source, engine.step = kept
        engine.training(True)
        return list(map(float, engine.score.tolist()))
