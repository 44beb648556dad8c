"""What binds a plan and what to change, decided from its measured figures by thresholds that stand here."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, median

from paraxis.measure.breakdown import (
    Times,
    Window,
    account,
    against,
    events,
    mean,
    middle_rounds,
    replay,
    timelines,
    work,
)
from paraxis.measure.facts import Facts
from paraxis.measure.records import Machine, Result, Split
from paraxis.plan.plan import Plan, parse
from paraxis.program.cut import balanced
from paraxis.program.grid import draw, simplify
from paraxis.program.instructions import Program

BINDS = 0.20  # of the step: the largest part that is not computing binds from here on
HALF = 0.50  # of the computing: what calls, or weights on their way from memory, must take to bind it
UNEVEN = 0.50  # of the waiting: what uneven stages must explain of it to be the cause
EVENER = 0.98  # of the largest stage: what another cut must be below to be worth it
SMALL = 64 << 10  # bytes of a message up to which its time is latency
SLOW = 0.10  # of the memory's bandwidth: a rate below it is not limited by bytes
SEEN = 60  # steps that are enough for the medians of instructions
LARGER = "a larger batch, for its kernels take longer, but not longer to ask for"
USUAL = 10e9  # bytes a second: the memory of one core, where it has not been measured


@dataclass(frozen=True)
class Evidence:
    """The figures that decide. Seconds are of one step; `layers` are forward and backward of one whole batch; `sent`
    are bytes and messages of one rank; `dispatch` is a forward and backward of one sample; `memory` is bytes a second;
    `devices` are those of the ranks, where any has a GPU.
    """

    plan: Plan
    step: float
    ranks: tuple[Split, ...]
    cores: int
    batch: int
    parameters: int
    layers: tuple[float, ...] = ()
    dispatch: float = 0.0
    sent: tuple[float, float] = (0.0, 0.0)
    memory: float | None = None
    devices: tuple[str, ...] = ()

    @property
    def parts(self) -> Split:
        """The mean over ranks."""
        return mean(self.ranks)


@dataclass(frozen=True)
class Verdict:
    """A cause, its share of the step (0: it has none of its own), what was seen, and what to change."""

    cause: str
    share: float
    seen: str
    change: str

    @property
    def short(self) -> str:
        """Two or three words for a table."""
        return f"{self.cause} {self.share:.0%}" if self.share else self.cause

    @property
    def sentence(self) -> str:
        """What binds and what to do about it."""
        return f"Bound by {self.cause}: {self.seen}. To change it: {self.change}."


def judge(e: Evidence) -> Verdict:
    """What binds a plan: too many workers for the cores, else the largest part that is not computing, else what the
    computing itself waits for."""
    plan, parts = e.plan, e.parts
    if plan.workers > e.cores:
        fit = f"dp={e.cores}" if plan.dp > 1 and e.cores > 1 else "serial" if e.cores == 1 else f"{e.cores} workers"
        seen = f"{plan.workers} workers take turns on {e.cores} core{'s' * (e.cores > 1)}"
        return Verdict("oversubscription", 0.0, seen, f"fewer ranks, such as {fit}")
    judges = {
        "pipeline_wait": _pipeline,
        "straggler_wait": _straggler,
        "communication": _communication,
        "overhead": _interpreter,
        "optimizer": _optimizer,
        "data": _data,
    }
    kind = max(judges, key=lambda name: float(getattr(parts, name)))
    share = getattr(parts, kind) / e.step if e.step else 0.0
    return judges[kind](e, share) if share >= BINDS else _computing(e)


def _pipeline(e: Evidence, share: float) -> Verdict:
    """Waiting for another stage: because stages are uneven, or because the pipeline fills and drains."""
    plan = e.plan
    busy = [fmean(_busy(e.ranks[plan.mesh.rank(d, p)]) for d in range(plan.dp)) for p in range(plan.pp)]
    lost = max(busy) - fmean(busy)
    if lost >= UNEVEN * e.parts.pipeline_wait:
        one = "stage" if plan.interleave == 1 else "rank"
        seen = f"the slowest {one} computes {_ms(max(busy))} of a step, the mean {one} {_ms(fmean(busy))}"
        return Verdict("imbalance", share, seen, _even_out(e, busy))
    m, p = plan.interleave * plan.microbatches, plan.pp  # of several stages a rank each is so much shorter
    seen = f"ranks wait {share:.0%} of the step for the pipeline to fill and drain"
    return Verdict("bubble", share, seen, _more_microbatches(e, (p - 1) / (m + p - 1), (p - 1) / (2 * m + p - 1)))


def _even_out(e: Evidence, busy: Sequence[float]) -> str:
    """The best cut by the layers' times, each stage's in proportion to what it took: engines differ in what is dear."""
    plan, largest = e.plan, max(busy) / (sum(busy) or 1.0)
    costs = list(e.layers)
    if sum(plan.split) == len(costs):
        scales = [
            seconds / (load or 1.0) for seconds, load in zip(busy, _loads(costs, plan.split, plan.pp), strict=True)
        ]
        for stage, (first, last) in enumerate(_ranges(plan.split)):
            costs[first:last] = [cost * scales[stage % plan.pp] for cost in costs[first:last]]
    even = balanced(costs, plan.stages) if len(costs) >= plan.stages else ()
    best = max(_loads(costs, even, plan.pp), default=1.0) / (sum(costs) or 1.0) if even else 1.0
    if not even or even == plan.split or best >= EVENER * largest:
        limit = f"no cut of its {len(costs)} layers is more even, so {1 / largest:.2f}x is its limit"
        return f"{limit}; dp={plan.pp * plan.dp} divides the samples instead"
    text = "+".join(map(str, even))
    return f"split={text} would balance it: {best:.0%} of the computing on its largest stage, not {largest:.0%}"


def _loads(costs: Sequence[float], split: Sequence[int], ranks: int) -> list[float]:
    """What each rank computes of a step, stage s lying on rank s % ranks."""
    each = [sum(costs[a:b]) for a, b in _ranges(split)]
    return [sum(each[rank::ranks]) for rank in range(ranks)]


def _ranges(split: Sequence[int]) -> list[tuple[int, int]]:
    """Layer ranges of stages with so many layers."""
    ends = list(accumulate(split))
    return list(zip([0, *ends], ends, strict=False))


def _more_microbatches(e: Evidence, now: float, then: float) -> str:
    """Twice as many, if the batch divides and the calls they cost do not eat what they gain."""
    plan = e.plan
    twice = 2 * plan.microbatches
    if e.batch % (plan.dp * twice):
        return f"a larger batch, which more than {plan.microbatches} microbatches divide"
    calls = plan.microbatches * e.dispatch / plan.pp if plan.engine == "torch" else 0.0
    if calls > (now - then) * e.step:
        return (
            f"a larger batch: {twice} microbatches would cost {_ms(calls)} of calls more and gain at most "
            f"{_ms((now - then) * e.step)}"
        )
    return f"raise microbatches from {plan.microbatches} to {twice}"


def _straggler(e: Evidence, share: float) -> Verdict:
    busy = [_busy(r) for r in e.ranks]
    slow = max(range(len(busy)), key=lambda r: busy[r])
    over = busy[slow] / fmean(busy) - 1 if sum(busy) else 0.0
    seen = f"ranks wait {share:.0%} of the step for the slowest; rank {slow} works {over:.0%} longer than the mean"
    fewer = f"dp={e.plan.dp // 2}" if e.plan.dp > 2 else "dp=1"
    change = "keep other programs off its core" + (f", or fewer ranks: {fewer}" if e.plan.dp > 1 else "")
    return Verdict("imbalance", share, seen, change)


def _communication(e: Evidence, share: float) -> Verdict:
    """Messages whose time their bytes do not explain are latency."""
    plan, (sent, messages) = e.plan, e.sent
    each = sent / messages if messages else 0.0
    rate = sent / e.parts.communication
    seen = (
        f"{messages:.3g} message{'s' * (messages != 1)} a step, of {_bytes(each)}, take {_ms(e.parts.communication)}: "
        f"{rate / 1e9:.2g} GB/s"
        if sent
        else f"{messages:.3g} meetings of threads a step take {_ms(e.parts.communication)}"
    )
    if each <= SMALL or rate < SLOW * (e.memory or USUAL):
        return Verdict("latency", share, seen, _fewer_messages(plan))
    change = "a larger batch, for the bytes stay the same" if plan.dp > 1 else "a split where activations are smaller"
    if plan.zero == 3:
        change += f", or zero=2, which gathers parameters once a step instead of {1 + plan.microbatches} times or more"
    elif plan.tp > 1:
        change = "dp in the place of tp, whose bytes grow with the batch"
    elif plan.comm == "gloo":
        change += ", or comm=mpi"
    elif plan.dp > 1:
        change += ", or engine=native,comm=openmp, which moves no weights between replicas"
    return Verdict("bandwidth", share, seen, change)


def _fewer_messages(plan: Plan) -> str:
    if plan.zero > 1:
        return f"larger buckets (bucket_bytes={2 * plan.bucket_bytes})"
    if plan.bucket_bytes:
        return "one bucket (bucket_bytes=0)"
    if plan.tp > 1 and plan.engine == "native":
        return f"dp={plan.dp * plan.tp} in the place of tp: replicas meet twice a step, not at every layer"
    if plan.comm == "gloo":
        return "comm=mpi, whose messages start sooner"
    if plan.pp > 1 and plan.microbatches > 1:
        return f"lower microbatches from {plan.microbatches} to {plan.microbatches // 2}"
    return "a larger batch, so that there are fewer steps" + (
        " or engine=native,comm=openmp" if plan.comm == "mpi" else ""
    )


def _interpreter(e: Evidence, share: float) -> Verdict:
    seen = f"the interpreter takes {_ms(e.parts.overhead)} of a step of {_ms(e.step)}"
    return Verdict("per-call overhead", share, seen, _fewer_calls(e.plan))


def _fewer_calls(plan: Plan) -> str:
    if "cpu" not in plan.devices():
        graphs = not plan.graphs and plan.precision != "fp16"
        torch = "engine=torch," * (plan.engine == "plain")
        return f"{torch}graphs=1, which asks for all that was recorded at once, or a larger batch" if graphs else LARGER
    if plan.threads > 1:
        return f"fewer threads than {plan.threads}, which meet in every call, or a larger batch"
    if plan.microbatches > 1:
        return f"lower microbatches from {plan.microbatches} to {plan.microbatches // 2}, or a larger batch"
    return "a larger batch" + (", or engine=native, whose calls cost nanoseconds" if plan.engine != "native" else "")


def _optimizer(e: Evidence, share: float) -> Verdict:
    """An update reads weights, gradients and momentum and writes two of them, and computes next to nothing."""
    moved = 5 * 4 * e.parameters / e.plan.pp / (e.plan.dp if e.plan.zero else 1)
    rate = moved / e.parts.optimizer
    seen = f"the update takes {share:.0%} of the step and streams about {_bytes(moved)}, {rate / 1e9:.2g} GB/s"
    if rate < SLOW * (e.memory or USUAL):
        return Verdict("per-call overhead", share, f"{seen}, far below what memory gives", _fewer_calls(e.plan))
    return Verdict(
        "memory bandwidth", share, seen, "a larger batch: an update costs the same for any number of samples"
    )


def _data(e: Evidence, share: float) -> Verdict:
    seen = f"finding and copying samples takes {_ms(e.parts.data)} of a step"
    change = "cheaper samples: bytes in memory (--data) rather than a batches() that computes them, or smaller ones"
    return Verdict("data", share, seen, change)


def _computing(e: Evidence) -> Verdict:
    plan, parts = e.plan, e.parts
    if "cpu" not in plan.devices():
        return _computing_on_gpu(e)
    calls = plan.microbatches * e.dispatch / plan.pp if plan.engine in ("torch", "plain") else 0.0
    if calls > HALF * parts.compute:
        seen = f"a forward and backward of a single sample takes {_ms(e.dispatch)}, {calls / e.step:.0%} of the step"
        return Verdict("per-call overhead", 0.0, seen, _fewer_calls(plan))
    # F and B read the weights, and B writes their gradients, once a microbatch, however few samples that has.
    moved = 3 * 4 * e.parameters / plan.pp * plan.microbatches
    if e.memory and moved / e.memory > HALF * parts.compute:
        seen = f"weights of {_bytes(moved)} pass through memory in a step's {_ms(parts.compute)} of computing"
        change = f"lower microbatches from {plan.microbatches} to {plan.microbatches // 2}, or " * (
            plan.microbatches > 1
        )
        return Verdict("memory bandwidth", 0.0, seen, f"{change}a larger batch, which reads them no more often")
    idle = e.cores - plan.workers
    seen = f"{parts.compute / e.step:.0%} of the step is computing"
    if plan.engine == "plain":
        seen = f"calls take at most {calls / e.step:.0%} of its {_ms(e.step)}"
    if plan.on_gpu():
        return Verdict("compute", 0.0, seen, "all layers on the GPU, where its memory allows that, or more cores")
    if idle > 0:
        return Verdict(
            "compute", 0.0, seen, f"more workers: {idle} of {e.cores} cores {'is' if idle == 1 else 'are'} idle"
        )
    return Verdict("compute", 0.0, seen, "more cores" + ("" if plan.engine == "native" else " or engine=native"))


def _computing_on_gpu(e: Evidence) -> Verdict:
    """Small kernels run faster than anybody asks for them; the rest is up to the GPU, and who else is on it."""
    plan, compute = e.plan, e.parts.compute
    device, ranks = Counter(e.devices).most_common(1)[0] if e.devices else ("", 1)
    if ranks > 1:
        seen = f"{ranks} ranks take turns on {device}"
        return Verdict("shared GPU", 0.0, seen, f"device={device} alone, which sends nothing, or a GPU for each rank")
    calls = plan.microbatches * e.dispatch / plan.pp
    if calls > HALF * compute and not plan.graphs:
        seen = f"to ask the GPU for a forward and backward takes {_ms(calls)}, {calls / e.step:.0%} of the step"
        return Verdict("launches", 0.0, seen, _fewer_calls(plan))
    faster = {"fp32": "precision=tf32 or bf16, or ", "tf32": "precision=bf16, or "}.get(plan.precision, "")
    larger = "a larger batch, which fills it better, or " * (calls > HALF * compute)
    return Verdict("compute", 0.0, f"{compute / e.step:.0%} of the step is computing", f"{larger}{faster}more GPUs")


def _busy(parts: Split) -> float:
    return parts.compute + parts.optimizer + parts.data + parts.overhead


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _bytes(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"


# -- into the records ----------------------------------------------------------------------------------------------


def fill(
    result: Result,
    program: Program,
    windows: Mapping[int, Window],
    times: Times,
    facts: Facts,
    machine: Machine,
) -> None:
    """Every field of a result that follows from the clocks of its timed steps. `result.step_seconds` must be there."""
    assert result.step_seconds is not None  # for the type checker
    chosen = middle_rounds(windows, times)
    step = fmean(times[r] for r in chosen) if set(chosen) <= times.keys() else result.step_seconds.median
    by_round = [account(program, windows[r], timelines(program, windows[r].steps)) for r in chosen]
    ranks = [mean(same) for same in zip(*by_round, strict=True)]
    result.split_by_rank = [against(parts, step) for parts in ranks]
    result.split = against(mean(ranks), step)
    result.exposed_comm_fraction = result.split.communication / step
    result.bubble_fraction = result.split.pipeline_wait / step
    result.records_per_step = max(len(row) for _, rows in windows[chosen[0]].steps for row in rows)
    result.record_seconds = median(windows[chosen[0]].record) / 1e9
    steps = [s for r in middle_rounds(windows, times, wide=True) for s in windows[r].steps]
    last = program.period[-1][0]  # of a period of several steps, the one in which replicas meet, if it was seen
    alike = [s for s in steps if s[0] == last] or steps
    every = timelines(program, steps[:: 1 + len(steps) // SEEN])
    result.work = work(program, every)
    drawn = timelines(program, alike[:: 1 + len(alike) // SEEN])
    result.timeline = events(sorted(drawn, key=lambda line: line.makespan)[len(drawn) // 2])
    result.simulated = events(replay(program, [*every, *drawn], last))
    result.program_text = draw(simplify(program.body(last)))
    say(result, judge(evidence(result, program, facts, machine)))


def evidence(result: Result, program: Program, facts: Facts, machine: Machine) -> Evidence:
    """The figures of a measured plan."""
    assert result.step_seconds is not None  # for the type checker
    plan = parse(result.plan)
    bodies = [(times, program.body(name)) for name, times in program.period]
    messages = sum(t * sum(i.starts for row in rows for i in row) for t, rows in bodies)
    scale = plan.mesh.size * program.steps_in_period()
    sent = (result.bytes_communicated or 0) / plan.mesh.size
    return Evidence(
        plan=plan,
        step=result.step_seconds.median,
        ranks=tuple(result.split_by_rank),
        cores=machine.usable_cores,
        batch=facts.batch,
        parameters=facts.parameters,
        layers=tuple((f + b) * facts.batch / facts.samples for f, b in zip(facts.forward, facts.backward, strict=True)),
        dispatch=facts.dispatch,
        sent=(sent, messages / scale),
        memory=machine.memory_bytes_per_second.all_cores if machine.memory_bytes_per_second else None,
        devices=tuple(result.devices),
    )


def explain_today(result: Result, facts: Facts, machine: Machine) -> None:
    """The framework's own loop has no instructions: all that is known is the cost of its calls."""
    assert result.step_seconds is not None  # for the type checker
    step = result.step_seconds.median
    nothing = dict.fromkeys(Split.model_fields, 0.0)
    whole = Split(**(nothing | {"compute": step}))
    plan = parse(result.plan)
    where = tuple(result.devices)
    seen = Evidence(plan, step, (whole,), machine.usable_cores, facts.batch, 0, (), facts.dispatch, devices=where)
    say(result, judge(seen))


def say(result: Result, verdict: Verdict) -> None:
    """Record a verdict."""
    result.bound_by, result.explanation = verdict.short, verdict.sentence
