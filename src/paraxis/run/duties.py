"""What a resident rank can be asked to do. Each duty takes (request, blob, tell) and returns its answer."""

import gc
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paraxis.comm.clocks import shift
from paraxis.comm.gpus import found_here
from paraxis.comm.local import Alone
from paraxis.engine.compiling import compile_network, compile_segments
from paraxis.engine.devices import CPU, move
from paraxis.engine.native_rank import NativeEngine
from paraxis.engine.precision import products
from paraxis.engine.torch_engine import TorchEngine
from paraxis.errors import Diverged
from paraxis.measure.gradients import gradient_norms
from paraxis.measure.layers import calls_seconds, coupled, layer_seconds, measure_layers
from paraxis.measure.saved import measure_sizes
from paraxis.plan.plan import Plan, parse
from paraxis.program.check import check
from paraxis.program.faults import FAULTS, Fault
from paraxis.program.lower import lower
from paraxis.run import openmp, serial
from paraxis.run.agreement import agreed
from paraxis.run.clock import clock_of
from paraxis.run.compiled import FirstSteps
from paraxis.run.devices import allocated, allow, device_for, give_back, open_links, reaching
from paraxis.run.graphs import replay
from paraxis.run.held import counted
from paraxis.run.interpreter import Rank
from paraxis.run.openmp import Team
from paraxis.run.oracle import DTYPES, train_oracle
from paraxis.run.reserved import native_memory
from paraxis.run.resident import peak_bytes, reset_peak
from paraxis.run.running import Running, shards_of, some
from paraxis.run.weights import compare, difference, relative, untied
from paraxis.run.window import record_cost, timed, window_of
from paraxis.sync.rule import settled
from paraxis.task.batches import digest
from paraxis.task.spec import TaskSpec
from paraxis.task.task import Task, keep_data, make_task

Tell = Callable[[dict[str, Any]], None]
FEW = 16  # samples whose forward a GPU has room for, if it has for the network


class Duties:
    """One rank's memory between requests: its world, the task, the plans it has set up."""

    def __init__(self, transport: str, rank: int = 0, size: int = 1, address: str = "") -> None:
        self.transport, self.rank = transport, rank
        self.launched = transport == "mpi" or address == "env://"
        self.world: Any = None
        if transport == "mpi":
            from paraxis.comm import mpi

            self.world = mpi.world()
            self.rank = self.world.rank
        elif transport in ("gloo", "nccl"):
            from paraxis.comm import torch_dist

            self.world = torch_dist.world(transport, address, rank, size)
        self.spec = TaskSpec()
        self.objects: dict[str, Any] = {}
        self.plans: dict[str, Running] = {}
        self.tried: Task | None = None  # one that native plans are compiled for, to know what they would hold
        self.base = 0  # resident bytes of this process before any plan, the data in memory
        self.default_threads = torch.get_num_threads()
        self.every_cpu = sorted(os.sched_getaffinity(0))
        torch.set_num_threads(1)

    def hello(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Who is here."""
        library = ""
        if self.transport == "mpi":
            from paraxis.comm import mpi

            library = mpi.library()
        size = self.world.size if self.world else 1
        own = {"size": size, "threads": self.default_threads, "torch": torch.__version__, "library": library}
        return own | {"gpus": asdict(found_here())}

    def take_task(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """The task to work on; live objects of a notebook come with it, over a line only our own children have."""
        self.spec = TaskSpec.model_validate(request["spec"])
        self.objects = cloudpickle.loads(blob) if blob else {}
        self.plans.clear()
        self.tried = None
        return {}

    def facts(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """What the driver has to know of the task."""
        task = self._task(torch.float32)
        return measure_layers(task, task.batch).as_json()

    def sizes(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Bytes of every layer of one rank's part, where `tp` ranks share layers; on a GPU a few samples tell them."""
        device, task = torch.device(request["device"]), self._task(torch.float32)
        allow(device, None)
        move(task, [task.chain], device)
        how = request["tp"], request["sequence"], request["precision"], request["parted"]
        found = asdict(measure_sizes(task, *how, None if device == CPU else FEW))
        del task
        give_back(device)
        return found

    def reserved(self, request: dict[str, Any], blob: bytes, tell: Tell) -> list[dict[str, int]]:
        """Of every rank of a plan of the native engine, bytes that it would hold."""
        plan, task = parse(request["plan"]), self.tried or self._task(torch.float32)
        self.tried = task
        program = lower(plan, task.layout(), task.train.steps_per_epoch or 1)
        return [asdict(m) for m in native_memory(task, program, plan)]

    def coupling(self, request: dict[str, Any], blob: bytes, tell: Tell) -> str:
        """A sentence if the loss couples samples."""
        return coupled(self._task(torch.float64))

    def noise(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Squared gradient norms along a serial run, for the gradient noise scale."""
        self._activate(Running(Plan(), []))
        return asdict(gradient_norms(self._task(torch.float32), request["steps"], request["microbatches"]))

    def _task(self, dtype: torch.dtype, plain: bool = False) -> Task:
        return make_task(self.spec, self.objects, dtype, plain)

    # -- proof -------------------------------------------------------------------------------------------------

    def oracle(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Train serially (or emulate an inexact algorithm) and keep the weights in a file.

        It computes one batch-norm group at a time, so the network's own batch norms do.
        """
        plan = parse(request["plan"])
        self._activate(Running(plan, []))  # one thread, whatever plan this process has run before
        return train_oracle(self.spec, self.objects, request, device_for(plan, self.rank, self.launched))

    def compare_files(self, request: dict[str, Any], blob: bytes, tell: Tell) -> float:
        """The largest relative difference of two weight files."""
        a, b = load_file(request["a"]), load_file(request["b"])
        return max(difference(a[k], b[k], request["change"]) for k in b if b[k].is_floating_point())

    def bands(self, request: dict[str, Any], blob: bytes, tell: Tell) -> list[Any]:
        """How far two weight files lie apart, tensor by tensor and as a whole, relative to how far each has moved."""
        return list(relative(load_file(request["a"]), load_file(request["b"]), {}, request["moved"]))

    def prove(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Train the first steps of a plan and compare this rank's weights with those of the file."""
        running = self._ready(request["key"])
        self._steps(running, request["steps"])
        rank = running.rank
        if rank and not settled(running.plan.sync, request["steps"], rank.program.steps_in_period()):
            rank.settle()
        wanted, state = load_file(request["file"]), self._state(running)
        worst, where = compare(state, wanted, shards_of(running), request["change"])
        apart = relative(state, wanted, shards_of(running), request.get("moved", {}))[0]  # in mixed precision
        told = {"apart": apart, "losses": self._losses(running), "skipped": self.skipped(request, blob, tell)}
        return {"difference": worst, "where": where, "compared": list(state)} | told

    def skipped(self, request: dict[str, Any], blob: bytes, tell: Tell) -> int:
        """Steps that were not taken, because scaled gradients had overflowed."""
        running = self.plans[request["key"]]
        keeper = running.plain or getattr(getattr(running.rank, "engine", None), "scaling", None)
        return keeper.skipped if keeper else 0

    # -- running plans -----------------------------------------------------------------------------------------

    def setup(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Lower, check and bind a plan on this rank; raises what makes it impossible before anything is sent."""
        plan = parse(request["plan"])
        dtype = DTYPES[request["dtype"]]
        device = device_for(plan, self.rank, self.launched)
        taken = allow(device, request.get("limit"))
        running = Running(plan, request["cpus"][self.rank] if request["cpus"] else [], device=device, taken=taken)
        self.plans[request["key"]] = running
        self._activate(running)
        keep_data(self.spec)
        running.before = reset_peak()
        self.base = self.base or running.before
        if plan.engine == "plain":
            running.plain = serial.plain(self._task(dtype, plain=True), plan.precision, device)
            if plan.compile:
                running.plain.compiled = compile_network(running.plain.task.net)
            return {"program": None, "bytes": 0, "batch": 0}
        fault: Fault | None = FAULTS[request["fault"]] if request.get("fault") else None
        task = self._task(dtype)
        batch = digest(task.train)  # in host memory still: a GPU divides by a number in another way
        program = lower(plan, task.layout(), task.train.steps_per_epoch or 1)
        check(program)
        if fault:
            program = fault.mutated(plan, program)
        if plan.engine == "native" and plan.processes == 1:
            running.rank = openmp.start(task, program, plan.sync == "hogwild")
            return {"program": program.digest(), "bytes": running.rank.bytes_held(), "batch": batch}
        world: Any = self.world.group(range(plan.mesh.size)) if self.world else Alone()
        world = reaching(world, self.transport, device)
        open_links(world, program)
        engine: Any
        if plan.engine == "native":
            engine = NativeEngine(task, program, self.rank, plan.threads)
        else:
            engine = TorchEngine(task, program, self.rank, device)
            if plan.compile:
                compile_segments(engine)
        if fault and self.rank == plan.mesh.size - 1:
            fault.spoil(engine)
        running.rank = Rank(program, self.rank, engine, world, clock=clock_of(device))
        if plan.graphs:
            replay(running.rank)
        gc.collect()
        gc.freeze()  # what lives as long as this rank need not be looked at again in the middle of a chunk
        return {"program": program.digest(), "bytes": engine.bytes_held(), "batch": batch}

    def measure(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Seconds of `steps` steps between two barriers, with the clocks of up to `trace` (see `timed`)."""
        running = self._ready(request["key"])
        rank = running.rank
        self._steps(running, request["warm"])
        seconds, traced, begun, ended = timed(
            running, partial(self._steps, running), request["steps"], request["trace"]
        )
        if rank is not None and traced and not running.record:
            running.record = record_cost(rank)
        several = traced and running.plan.processes > 1
        apart = shift(rank.world) if several and isinstance(rank, Rank) else 0
        seen = window_of(rank, traced, begun, ended, running.record, apart)
        return {"seconds": seconds, "window": seen, "losses": self._losses(running)}

    def traffic(self, request: dict[str, Any], blob: bytes, tell: Tell) -> float:
        """Bytes that this rank sends in a step."""
        running = self._ready(request["key"])
        return running.rank.sent_in_a_step() if isinstance(running.rank, Rank) else 0.0

    def remarks(self, request: dict[str, Any], blob: bytes, tell: Tell) -> list[str]:
        """What a reader of this rank's figures must know, such as that its CUDA graphs could not be recorded."""
        rank = self._ready(request["key"]).rank
        return list(rank.remarks) if isinstance(rank, Rank) else []

    def memory(self, request: dict[str, Any], blob: bytes, tell: Tell) -> int:
        """The peak of resident bytes since the plan was set up, less what plans set up before it hold."""
        return peak_bytes() - max(0, self.plans[request["key"]].before - self.base)

    def device_memory(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """This rank's device, and the most bytes that its allocator has handed out since the plan was set up."""
        running = self.plans[request["key"]]
        return {"device": str(running.device), "bytes": allocated(running.device) - running.taken}

    def costs(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Seconds of each layer's forward and backward on a device, and those of its calls for one sample."""
        device = torch.device(request["device"])
        self._activate(Running(Plan(), []))
        allow(device, None)
        task = self._task(torch.float32)
        move(task, [task.chain], device)
        forward, backward = layer_seconds(task, task.batch, device=device)
        calls = calls_seconds(task, device) if task.batch > 1 else 0.0
        del task
        give_back(device)
        return {"layers": [f + b for f, b in zip(forward, backward, strict=True)], "calls": calls}

    def held(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, int]:
        """Bytes of each kind at the peak of a period, counted while it runs, and how far the process has grown."""
        running = self._ready(request["key"])
        rank = some(running.rank)
        self._steps(running, 2)
        grown = peak_bytes() - running.before
        steps = rank.program.steps_in_period()
        return counted(rank, lambda: self._steps(running, steps)) | {"grown": grown}

    def norm(self, request: dict[str, Any], blob: bytes, tell: Tell) -> float:
        """Sum of squares of this rank's parameters, of which it counts what no rank before it has."""
        return float(some(self._ready(request["key"]).rank).square_sum())

    def drop(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Forget a plan."""
        device = self.plans[request["key"]].device if request["key"] in self.plans else CPU
        self.plans.pop(request["key"], None)
        give_back(device)
        return {}

    def train(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Train some steps, telling how far it is about every second."""
        running = self._ready(request["key"])
        left, chunk, told = request["steps"], 1, time.perf_counter()
        while left:
            count = min(chunk, left)
            begun = time.perf_counter()
            self._steps(running, count)
            left -= count
            chunk = max(1, min(1000, int(count * 0.2 / max(time.perf_counter() - begun, 1e-6))))
            if time.perf_counter() - told > 0.5:
                told = time.perf_counter()
                tell({"left": left})
        return {"losses": self._losses(running)}

    def evaluate(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Score on held-out samples; replicas that disagree are averaged for it and go on as they were."""
        running = self._ready(request["key"])
        rank = running.rank
        task = some(running.plain).task if rank is None else rank.task if isinstance(rank, Team) else rank.engine.task
        source: Any = task.test if request["set"] == "test" else task.validation
        if most := request.get("most"):
            source = source.thinned(most)
        if rank is None:
            return serial.score(some(running.plain), source)
        with agreed(rank):
            loss, weight, hits = rank.evaluate(source)
        return {"loss": loss, "weight": weight, "hits": hits, "samples": source.size}

    def settle(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """The program's epilogue."""
        running = self._ready(request["key"])
        if running.rank is not None:
            running.rank.settle()
        return {}

    def save(self, request: dict[str, Any], blob: bytes, tell: Tell) -> dict[str, Any]:
        """Write this rank's part of the state_dict to a file."""
        running = self._ready(request["key"])
        with agreed(running.rank) if running.rank is not None else nullcontext():
            state = self._state(running)
        save_file(untied({k: v.contiguous() for k, v in state.items()}), request["files"][self.rank])
        return {"split": {name: (shard.dim, shard.blocks) for name, shard in shards_of(running).items()}}

    # -- what they share ---------------------------------------------------------------------------------------

    def _ready(self, key: str) -> Running:
        running = self.plans[key]
        self._activate(running)
        return running

    def _activate(self, running: Running) -> None:
        """The plan's precision, threads and cores: every thread of this process moves, new ones inherit."""
        products(running.plan.precision)
        threads = running.plan.threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        wanted = set(running.cpus or self.every_cpu)
        if os.sched_getaffinity(0) != wanted:
            for thread in Path("/proc/self/task").iterdir():
                try:
                    os.sched_setaffinity(int(thread.name), wanted)
                except (ProcessLookupError, PermissionError):
                    continue

    def compiling(self, request: dict[str, Any], blob: bytes, tell: Tell) -> float | None:
        """Seconds that it took to compile a plan; None until it has made two steps."""
        return getattr(self.plans[request["key"]].first, "compiling", None)

    def _steps(self, running: Running, count: int) -> None:
        if running.plan.compile:
            running.first = running.first or FirstSteps(running.device)
            running.first.run(partial(self._go, running), count)
        else:
            self._go(running, count)

    def _go(self, running: Running, count: int) -> None:
        if running.rank is not None:
            running.rank.steps(count)
            return
        plain = some(running.plain)
        for _ in range(count):
            loss = serial.plain_step(plain, running.done)
            if plain.scheduler is not None:
                plain.scheduler.step()
            running.losses.append(loss)
            running.done += 1

    def _losses(self, running: Running) -> list[tuple[float, float]]:
        """Loss sum and weight of every step since they were last asked for."""
        if running.rank is None:
            means, running.losses = running.losses, []
            return [(loss, 1.0) for loss in (torch.stack(means).tolist() if means else ())]
        keeper = running.rank if isinstance(running.rank, Team) else running.rank.engine
        out, keeper.losses = keeper.losses, []
        for number, (loss, _) in enumerate(out, running.rank.done - len(out) + 1):
            if not math.isfinite(loss):
                error = Diverged(f"the loss is {loss} on rank {self.rank} in step {number}: lower lr or clip gradients")
                error.step = number
                raise error
        return out

    def _state(self, running: Running) -> dict[str, Tensor]:
        if running.rank is not None:
            return running.rank.state()
        return {k: v.detach().to(CPU, copy=True) for k, v in some(running.plain).task.net.state_dict().items()}
