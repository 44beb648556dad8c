"""What explore, verify and train share: the task, its facts, and resident ranks of each transport, started once."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cloudpickle

from paraxis.errors import MissingError, OutOfMemory, ParaxisError, PlanError, TaskError
from paraxis.fitting import advised, check_fits, fitted
from paraxis.measure.facts import Facts, facts_of
from paraxis.measure.machine import ForeignLoad, pinning, usable_cores
from paraxis.measure.records import Status
from paraxis.plan.devices import Gpus, check_devices
from paraxis.plan.plan import Plan, period, with_split
from paraxis.plan.precision import MIXED
from paraxis.program.check import check
from paraxis.program.cut import balanced_on
from paraxis.program.instructions import Program
from paraxis.program.lower import lower
from paraxis.program.memory import Memory, Sizes, greatest, memory, sizes_of
from paraxis.run.joined import JoinedPool
from paraxis.run.launch import Pool, Starting, start, task_request
from paraxis.task.spec import DEFAULT_BATCH, SHIPPED, TaskSpec

Tell = Callable[[str, float], None]  # (what is being done, fraction done or -1)
AnyPool = Pool | JoinedPool


@dataclass
class Session:
    """One task on this machine. `sizes`: ranks to start of each transport; `joined`: ranks that were started for us."""

    spec: TaskSpec
    objects: dict[str, Any]
    sizes: dict[str, int]
    joined: JoinedPool | None
    folder: Path
    tell: Tell
    pools: dict[str, AnyPool] = field(default_factory=dict)
    starting: dict[str, Starting] = field(default_factory=dict)
    facts: Facts | None = None
    quiet: bool = True
    patience: float = math.inf  # seconds a request may take
    oracles: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    limit: int | None = None  # bytes that a rank may hold
    memories: dict[Plan, Memory | None] = field(default_factory=dict)  # computed so far
    costs: dict[str, tuple[list[float], float]] = field(default_factory=dict)  # by device, as far as measured
    parts: dict[tuple[Any, ...], Sizes] = field(default_factory=dict)  # of layers, shared or in mixed precision

    def known(self) -> Facts:
        """The task's facts, measured once by the rank that works alone."""
        if self.facts is None:
            self.tell("measuring the layers", -1)
            self.facts = facts_of(self.pool("solo").ask({"do": "facts"})[0])
        return self.facts

    def pool(self, transport: str) -> AnyPool:
        """The live ranks of a transport, started (again) if need be, with the task in hand."""
        pool = self.pools.get(transport)
        if pool is None or not pool.alive():
            if transport in self.starting:
                made: AnyPool = self.starting.pop(transport).join()
            elif self.joined and transport != "solo":
                if transport != self.joined.transport:
                    raise PlanError(
                        f"comm={transport}: these ranks were started with {self.joined.transport}; use that"
                    )
                made = self.joined
            else:
                made = self._start(transport).join()
            blob = cloudpickle.dumps(self.objects) if self.objects else b""
            made.ask(task_request(self.spec), range(made.size), blob=blob)
            if isinstance(made, Pool):
                made.patience = self.patience
            self.pools[transport] = pool = made
        return pool

    def _start(self, transport: str) -> Starting:
        size = self.sizes.get(transport, 1)
        return start(transport, size, oversubscribed=size > usable_cores())

    def begin(self, transports: Iterable[str]) -> dict[str, str]:
        """Start several transports at once and wait for all, so that nothing is timed meanwhile; why some are not."""
        missing = {}
        for transport in transports:
            if (
                transport not in self.pools
                and transport not in self.starting
                and not (self.joined and transport != "solo")
            ):
                try:
                    self.starting[transport] = self._start(transport)
                except MissingError as error:
                    missing[transport] = str(error)
        for transport in list(self.starting):
            self.tell(f"starting ranks over {transport}" if transport != "solo" else "loading the framework", -1)
            self.pool(transport)
        return missing

    def home(self, plan: Plan) -> AnyPool:
        """The pool on which a plan runs."""
        if plan.processes == 1:
            return self.pool("solo")
        pool = self.pool(plan.comm)
        if plan.mesh.size > pool.size:
            raise PlanError(f"{plan.short()} needs {plan.mesh.size} ranks, but there are {pool.size}")
        return pool

    def respec(self, spec: TaskSpec) -> None:
        """Go on with a changed task; what was set up is forgotten."""
        self.spec = spec
        self.memories.clear()
        self.costs.clear()
        self.parts.clear()
        blob = cloudpickle.dumps(self.objects) if self.objects else b""
        for pool in self.pools.values():
            pool.ask(task_request(spec), range(pool.size), blob=blob)

    def home_alive(self, plan: Plan) -> bool:
        """Whether the ranks of a plan still live."""
        pool = self.pools.get("solo" if plan.processes == 1 else plan.comm)
        return pool is not None and pool.alive()

    def settled(self, plan: Plan) -> Plan:
        """The plan with its stages balanced by measured cost, unless it says where to cut."""
        facts = self.known()
        if plan.pp == 1 or plan.split or facts.layout.cuttable or plan.stages > len(facts.layers):
            return plan
        self._check_devices(plan)
        places = plan.devices()
        costs = [self._costs(places[stage % plan.pp])[0] for stage in range(plan.stages)]
        return fitted(self, plan, costs) or with_split(plan, balanced_on(costs))

    def _costs(self, place: str) -> tuple[list[float], float]:
        """Seconds of each layer's forward and backward on a device, and of the calls for one sample; GPUs without a
        number count as the first one."""
        facts, place = self.known(), "cuda:0" if place == "cuda" else place
        if place not in self.costs:
            if place == "cpu":
                here = [f + b for f, b in zip(facts.forward, facts.backward, strict=True)]
                self.costs[place] = here, facts.dispatch
            else:
                self.tell(f"measuring the layers on {place}", -1)
                there = self.pool("solo").ask({"do": "costs", "device": place})[0]
                self.costs[place] = there["layers"], there["calls"]
        return self.costs[place]

    def known_on(self, plan: Plan) -> Facts:
        """The task's facts with the seconds that layers, and their calls, take where this plan computes them all."""
        facts, places = self.known(), set(plan.devices())
        if not plan.on_gpu() or len(places) > 1:
            return facts
        try:
            layers, calls = self._costs(places.pop())
            return replace(facts, forward=tuple(layers), backward=(0.0,) * len(facts.layers), dispatch=calls)
        except ParaxisError:  # such as no room for the layers on their own
            return facts

    def gpus(self) -> int:
        """GPUs of this host that the framework can use."""
        return int(self.pool("solo").facts["gpus"]["count"])

    def _check_devices(self, plan: Plan) -> None:
        """On this host; ranks that were started for us, on whatever hosts, look for themselves."""
        if plan.on_gpu() and not self.joined:
            check_devices(plan, Gpus(**self.pool("solo").facts["gpus"]))

    def program(self, plan: Plan) -> Program:
        """The checked program of a plan for this task; raises PlanError for one that the task cannot meet."""
        facts = self.known()
        check_divides(plan, facts.batch, self.spec.bn_group, facts.least)
        if "@epoch" in plan.sync and facts.steps_per_epoch is None:
            raise PlanError(
                f"sync={plan.sync}: batches() does not tell how long an epoch is; use "
                f"{plan.sync.replace('@epoch', '@H')} with H steps"
            )
        self._check_devices(plan)
        program = lower(plan, facts.layout, facts.steps_per_epoch or 1)
        check(program)
        check_fits(self, plan, self.memory(plan))
        return program

    def memory(self, plan: Plan) -> Memory | None:
        """What the rank that needs most holds; None where facts have no sizes. Raises PlanError as `program` does."""
        if plan not in self.memories:
            found = self.memory_of_ranks(plan)
            self.memories[plan] = greatest(found, plan) if found else None
        return self.memories[plan]

    def memory_of_ranks(self, plan: Plan) -> list[Memory]:
        """What every rank holds; none where facts have no sizes."""
        facts, alike = self.known(), replace(plan, engine="torch") if plan.engine == "plain" else plan
        check_divides(plan, facts.batch, self.spec.bn_group, facts.least)
        if plan.engine == "native":
            return [Memory(**own) for own in self.pool("solo").ask({"do": "reserved", "plan": plan.text()})[0]]
        program = lower(alike, facts.layout, facts.steps_per_epoch or 1)
        found = {}
        for place in dict.fromkeys(plan.devices()):
            if (sizes := self._sizes(plan, program, place)) is None:
                return []
            found[place] = memory(program, alike, sizes, facts.batch)
        places = [plan.devices()[plan.mesh.coordinates(rank)[1]] for rank in range(plan.mesh.size)]
        return [found[place][rank] for rank, place in enumerate(places)]

    def _sizes(self, plan: Plan, program: Program, place: str) -> Sizes | None:
        """Bytes of every layer as one rank has it; tried once for each way of sharing and for each precision, which on
        a GPU is another one than on a CPU: there it is tried too, unless it has no room for the whole network."""
        mixed = plan.precision in MIXED
        if plan.tp == 1 and not mixed:
            return self.known().sizes
        parted = mixed and any(program.parted(stage) for stage in range(len(program.stages)))
        there = mixed and place != "cpu" and self.gpus()
        device = "cpu" if not there else "cuda:0" if place == "cuda" else place
        words = {"tp": plan.tp, "sequence": plan.sequence, "precision": plan.precision if mixed else "fp32"}
        key = *words.values(), parted, device
        if key not in self.parts:
            request = {"do": "sizes", "parted": parted, "device": device} | words
            try:
                self.parts[key] = sizes_of(self.pool("solo").ask(request)[0])
            except OutOfMemory:
                self.parts[key] = sizes_of(self.pool("solo").ask(request | {"device": "cpu"})[0])
        return self.parts[key]

    def setup(self, key: str, plan: Plan, dtype: str = "float32", fault: str | None = None) -> list[Any]:
        """Set a plan up on all its ranks under a key."""
        cpus = pinning(plan.processes, plan.threads, self.quiet) if plan.comm != "openmp" else []
        request = {"do": "setup", "key": key, "plan": plan.text(), "dtype": dtype, "cpus": cpus, "fault": fault}
        with advised(self, key, plan):
            answers = self.home(plan).ask(request | {"limit": self.limit}, range(plan.processes))
        seen = {a["batch"] for a in answers} | ({self.known().first_batch} if dtype == "float32" else set()) - {0}
        if len(seen) > 1 and plan.engine != "plain":
            raise TaskError(
                "batches() gives other batches in other processes: draw only from random, numpy.random and torch, "
                "which are seeded alike everywhere, or from generators you seed"
            )
        return answers

    def ask(self, key: str, plan: Plan, request: dict[str, Any]) -> list[Any]:
        """Ask all processes of a plan that has been set up."""
        with advised(self, key, plan):
            return self.home(plan).ask(request | {"key": key}, range(plan.processes))

    def oracle(
        self, plan: Plan, steps: int, dtype: str, groups: int = 0, seed: int | None = None, parts: int = 1
    ) -> dict[str, Any]:
        """What a plan is proved against, made once: the losses, weights file and largest change of the serial run in
        its precision; with `parts` its layers' sums are made in another order."""
        facts = self.known()
        turns = plan.dp if plan.sync == "hogwild" else 1
        replicas = 1 if plan.exact or turns > 1 else plan.dp
        seed = self.spec.seed if seed is None else seed
        every = 1 if plan.exact else _every(plan, facts.steps_per_epoch)
        if not groups and self.spec.bn_group:
            groups = facts.batch // replicas // self.spec.bn_group
        groups = groups or (plan.dp // replicas * plan.microbatches if facts.layout.statistics else 1)
        sync = plan.sync if replicas > 1 else "gradient"
        key = (steps, dtype, groups, replicas, every, turns, seed, sync, plan.precision, self.device(plan), parts)
        if key not in self.oracles:
            path = str(self.folder / f"oracle-{'-'.join(map(str, key))}.safetensors")
            words = {"steps": steps, "dtype": dtype, "groups": groups, "replicas": replicas, "every": every}
            words |= {"turns": turns, "seed": seed, "sync": sync, "parts": parts, "precision": plan.precision}
            words["plan"] = Plan(precision=plan.precision, device=self.device(plan)).text()
            answer = self.pool("solo").ask({"do": "oracle", "file": path} | words)[0]
            self.oracles[key] = answer | {"file": path}
        return self.oracles[key]

    def device(self, plan: Plan) -> str:
        """Where the serial run of a plan's precision is made: on a GPU, if the plan has one; of fp32 on the CPU."""
        own = (device for device in plan.devices() if device != "cpu" and plan.precision != "fp32")
        return next(own, "cpu")

    def _own(self) -> list[Pool]:
        """Joined ranks outlive a session: another may follow, and whoever joined them has still to say how it ended."""
        return [pool for pool in self.pools.values() if isinstance(pool, Pool)]

    def close(self) -> None:
        """Let all ranks go that were started here."""
        for pool in self._own():
            pool.close()
        for starting in self.starting.values():
            starting.kill()
        self.pools, self.starting = {}, {}

    def kill(self) -> None:
        """End all ranks now that were started here."""
        for pool in self._own():
            pool.kill()
        for starting in self.starting.values():
            starting.kill()
        self.pools, self.starting = {}, {}


@contextmanager
def open_session(
    spec: TaskSpec, objects: dict[str, Any], sizes: dict[str, int], joined: JoinedPool | None, tell: Tell
) -> Iterator[Session]:
    """A session whose ranks end with it, however it ends."""
    check_early(spec)
    with tempfile.TemporaryDirectory(prefix="paraxis-run-") as folder:
        session = Session(spec, objects, sizes, joined, Path(folder), tell)
        session.quiet = ForeignLoad([]).settle() < 0.2
        try:
            yield session
        except BaseException:
            session.kill()
            raise
        session.close()


def writable(folder: Path) -> Path:
    """The folder, made if need be; raises TaskError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise TaskError(f"--out {folder} cannot be written: {error.strerror}") from None
    return folder


def check_early(spec: TaskSpec) -> None:
    """What can be refused before any rank is started, without the framework."""
    if spec.live or spec.own_file:
        if spec.own_file and not Path(spec.network.partition(":")[0]).is_file():
            raise TaskError(f"network file {spec.network.partition(':')[0]} does not exist")
        return
    family = spec.network.partition(":")[0]
    if family not in SHIPPED:
        raise TaskError(
            f"network {spec.network!r} is not known; there are {', '.join(SHIPPED)}, or a file such as mine.py"
        )


def check_batch(spec: TaskSpec, plan: Plan) -> None:
    """What `check_divides` finds, before anything is started, where the batch is known that early."""
    if spec.batch is not None or not (spec.live or spec.own_file):
        check_divides(plan, spec.batch or DEFAULT_BATCH, spec.bn_group)


def check_divides(plan: Plan, batch: int, group: int | None = None, least: int = 1) -> None:
    """Raises PlanError if a batch cannot be cut into equal slices of whole groups and of `least` samples or more."""
    parts = plan.dp * plan.microbatches
    if batch % parts:
        fit = batch // parts * parts or parts
        raise PlanError(
            f"batch={batch} does not divide into dp={plan.dp} x microbatches={plan.microbatches} = {parts} equal "
            f"slices; batch={fit} would"
        )
    size = batch // parts
    if group and size % group:
        _check_whole(plan, batch, group, size)
    if size < least:
        raise PlanError(
            f"dp={plan.dp} x microbatches={plan.microbatches}: slices of {_samples(size)}, of which batch norm has no "
            f"statistics; batch={parts * least} would do"
        )


def _check_whole(plan: Plan, batch: int, group: int, size: int) -> None:
    """A batch norm that goes beyond a slice goes over the whole batch, whose slices are computed at one time."""
    if plan.microbatches == 1 and plan.sync == "gradient" and group == batch:
        if plan.bucket_bytes:
            raise PlanError(f"bn_group={group}: with batch norm over all ranks leave out bucket_bytes")
        return
    common, parts = math.gcd(group, size), plan.dp * plan.microbatches
    fitting = [f"bn_group={common}"] * (common > 1)
    fitting += [f"bn_group={batch} (all)"] * (plan.microbatches == 1 and plan.dp > 1 and plan.sync == "gradient")
    fitting += ["microbatches=1"] * (plan.microbatches > 1 and plan.sync == "gradient" and group == batch)
    larger = f"batch={-(-batch // (parts * group)) * parts * group}"
    raise PlanError(
        f"bn_group={group} does not divide the slices of {_samples(size)} (batch={batch} over dp={plan.dp} x "
        f"microbatches={plan.microbatches}), and statistics are synchronised only over all ranks, with microbatches=1 "
        f"and sync=gradient; {', '.join(fitting)}{' or ' * bool(fitting)}{larger} would fit"
    )


def _samples(count: int) -> str:
    return f"{count} sample{'s' * (count != 1)}"


def _every(plan: Plan, steps_per_epoch: int | None) -> int:
    return period(plan.sync, steps_per_epoch or 1)


def failure(error: ParaxisError) -> tuple[Status, str]:
    """(status, reason) of a plan that ended in an error."""
    refused = error.exit_code == 2 and not isinstance(error, OutOfMemory)
    return ("refused" if refused else "failed"), str(error).splitlines()[0]
