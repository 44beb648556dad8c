"""Replays a rank's computing between its communications: each stretch of instructions becomes one recording.

Recording does nothing on the device, so a body is recorded as a whole before it is run: where it would communicate,
tensors only change hands, as they will. If that fails nothing has happened, and the body runs as it is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from paraxis.engine.fed import RULES, Fed, constants, fed_for, feeding, send
from paraxis.engine.graphs import Action, CudaRecorder, Recorder, Recording, Recordings, stretches
from paraxis.plan.plan import WARM
from paraxis.program.instructions import RECEIVES, SENDS, Instruction
from paraxis.run.interpreter import Rank
from paraxis.task.batches import Nest

COMPUTES = ("F", "B", "I", "W")
OWN = ("zero", "norm", "statistics", "step")  # updates of the engine itself


def obstacle(rank: Rank) -> str:
    """Why a rank's step cannot be recorded; "" if it may be tried."""
    engine = rank.engine
    if any(stage.pausing is not None for stage in engine.stages.values()):
        return "ranks meet in the middle of a stage (tp, or batch norms over several replicas)"
    if rank.program.zero > 1:
        return f"zero={rank.program.zero} gives memory back in every step"
    if engine.hyper.rule not in RULES:
        kind = type(engine.hyper.optimizer).__name__
        return f"{kind} as it is set runs itself; plain SGD, Adam and AdamW have rules that can be recorded"
    if engine.scaling is not None:
        return "precision=fp16 decides on the host whether gradients have overflowed; bf16 need not"
    if engine.task.keyed.unkeyed:
        return f"these modules draw random numbers that cannot be keyed: {', '.join(engine.task.keyed.unkeyed)}"
    return ""


def replay(rank: Rank, recorder: Recorder | None = None, warm: int = WARM) -> None:
    """Let a rank's steps be recorded after `warm` of them, and replayed from then on; `rank.remarks` say what could not
    be. Of a rank on a CPU nothing changes, unless it is given a recorder for it."""
    device = rank.engine.device
    if recorder is None and device.type != "cuda":
        return
    if reason := obstacle(rank):
        rank.remarks.append(f"graphs: fell back to eager: {reason}")
        return
    recorder = recorder or CudaRecorder(device)
    for stage in rank.engine.stages.values():
        stage.landing = {}
    fed = fed_for(rank.engine)
    for name in dict(rank.program.period):  # which may name a body twice
        body = Body(rank, name, fed, recorder, warm)
        rank.bodies[name] = body.actions()


class Body:
    """One body of a rank. `actions` are to be executed in the place of its own."""

    def __init__(self, rank: Rank, name: str, fed: Fed, recorder: Recorder, warm: int) -> None:
        self.engine, self.recorder, self.fed = rank.engine, recorder, fed
        self.instructions, self.acts = rank.program.body(name)[rank.rank], rank.bodies[name]
        self.parts = stretches([_computes(i) for i in self.instructions])
        self.loads = [act for i, act in zip(self.instructions, self.acts, strict=True) if i.op == "Load"]
        self.steps = [any(_steps(i) for i in self._own(number)) for number in range(len(self.parts))]
        self.recordings = Recordings(rank.remarks.append, warm)
        self.now: Recording | None = None  # what this pass replays

    def actions(self) -> list[Action]:
        """One for each instruction, as an interpreter expects them. The first F, B, I or W of a part does all of it, so
        that clocks find the time of a recording there; the first Load does that of all."""
        made = [_nothing if _computes(i) else act for i, act in zip(self.instructions, self.acts, strict=True)]
        for number, places in enumerate(self.parts):
            at = next((p for p in places if self.instructions[p].op in COMPUTES), places.start)
            made[at] = partial(self._part, number)
        loads = (p for p in self.parts[0] if self.instructions[p].op == "Load")
        place = next(loads, 0)
        made[place] = partial(self._begin, made[place])
        return made

    def _begin(self, act_here: Action) -> None:
        """All samples of the pass, then what it replays; `act_here` is what else is to be done in its place."""
        for load in self.loads:
            load()
        stages = self.engine.stages
        samples = {(s, m): nest for s, stage in stages.items() for m, nest in stage.batches.items()}
        self.now = self.recordings.next(samples, constants(self.engine), self._record)
        if self.now is None:
            for stage in stages.values():
                stage.batches = {m: nest for (s, m), nest in samples.items() if s == stage.stage}
        else:
            for stage in stages.values():
                stage.batches = {}
            send(self.engine, self.fed)
        act_here()

    def _part(self, number: int) -> None:
        if self.now is None:
            compute = partial(self._compute, number)
            if self.recordings.reason:
                compute()
            elif reason := self.recorder.warm(compute, self.recordings.last):
                self.recordings.give_up(reason)
            return
        self.now.parts[number]()
        if self.steps[number]:
            self.engine.advance(self.fed.sums)

    def _own(self, number: int) -> Sequence[Instruction]:
        return [self.instructions[place] for place in self.parts[number]]

    def _compute(self, number: int) -> None:
        for place in self.parts[number]:
            if self.instructions[place].op != "Load":
                self.acts[place]()

    # -- recording ---------------------------------------------------------------------------------------------

    def _record(self, inputs: dict[Any, Nest]) -> list[Action]:
        """All parts in turn; what this leaves behind in the stages is dropped."""
        stages, starts, made = self.engine.stages, {p.start: n for n, p in enumerate(self.parts)}, []
        self._drop()
        for (s, m), nest in inputs.items():
            stages[s].batches[m] = nest
        try:
            with feeding(self.engine, self.fed):
                for place, i in enumerate(self.instructions):
                    if place in starts:
                        made.append(self._recorded(starts[place]))
                    elif not _computes(i):
                        self._hand_over(i)
        finally:
            self._drop()
        return made

    def _recorded(self, number: int) -> Action:
        """A part's replay, after which what it has made for others lies where they take it from."""
        again = self.recorder.record(partial(self._compute, number))
        made = [(stage, dict(stage.leaving)) for stage in self.engine.stages.values() if stage.leaving]

        def act() -> None:
            again()
            for stage, tensors in made:
                stage.leaving |= tensors

        return act if made else again

    def _hand_over(self, i: Instruction) -> None:
        """What a transfer does to a stage, without its transfer."""
        if i.base in SENDS and i.starts:
            self.engine.at(i.stage).leave(i.microbatch)
        elif i.base in RECEIVES and i.waits:
            stage, gradient = self.engine.at(i.stage), i.base == "RecvGrad"
            stage.arrive(gradient, i.microbatch, stage.incoming(gradient))

    def _drop(self) -> None:
        for stage in self.engine.stages.values():
            stage.clear()
            stage.statistics.groups = 0


def _computes(i: Instruction) -> bool:
    """Whether it only computes, or loads samples, which is done before."""
    return i.op in ("Load", *COMPUTES) or (i.op == "Update" and i.rule in OWN)


def _steps(i: Instruction) -> bool:
    return i.op == "Update" and i.rule == "step"


def _nothing() -> None:
    """Done with the part that it belongs to."""
