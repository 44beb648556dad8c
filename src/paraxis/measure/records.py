"""What is written to disk and printed by --json: one study, its plans and their raw samples.

Times are seconds, sizes are bytes. A field that nothing has filled is null, never absent.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["ok", "refused", "failed", "not run"]


class Record(BaseModel):
    """Base of all records: unknown fields are an error, so that a typing mistake cannot lose a figure."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Seconds(Record):
    """A measured time: median, 95% bootstrap interval and percentiles of the samples, and the samples themselves.

    `warmup` and `disturbed` are samples that were set aside, by rule, and count in no figure.
    """

    median: float
    low: float
    high: float
    samples: list[float]
    p5: float | None = None
    p25: float | None = None
    p75: float | None = None
    p95: float | None = None
    warmup: list[float] = []
    disturbed: list[float] = []


class Ratio(Record):
    """A paired ratio (above 1: this plan is faster) with its 95% bootstrap interval."""

    median: float
    low: float
    high: float


class Verified(Record):
    """The proof of one plan against the serial run (or the serial emulation of an inexact algorithm)."""

    against: str
    max_relative_difference: float | None
    tolerance: float
    passed: bool
    where: str | None = None  # the first step and tensor that differ
    note: str | None = None  # e.g. which randomness was switched off for the proof


class MeshRecord(Record):
    """Ranks along each axis."""

    dp: int
    pp: int
    tp: int


class Split(Record):
    """Where one step of a plan goes, in seconds, averaged over its ranks; with the remainder they add up to it."""

    compute: float
    optimizer: float
    communication: float  # exposed: not hidden under computation
    pipeline_wait: float  # the bubble: waiting for another stage
    straggler_wait: float  # waiting for a slower replica
    data: float
    overhead: float  # the interpreter: its null instructions, and handing steps over to threads
    remainder: float = 0.0  # of the timed step, what no clock has covered; below 0 where it covered slower steps


class MemoryRecord(Record):
    """Bytes that the rank which needs most holds at the peak of a step, computed from the program, in float32.

    The framework itself, the samples, and what an operation needs only while it runs come on top.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    communication: int  # activations and gradients on their way between ranks
    total: int


class Work(Record):
    """One kind of instruction on one rank: how often it is executed in a step, and the median of its seconds."""

    rank: int
    op: str  # F, B, Load, RecvActWait ...; of updates their rule
    count: float
    seconds: float


class Event(Record):
    """One instruction as executed: seconds from the start of the step."""

    rank: int
    label: str  # e.g. F0, B3, RecvAct
    kind: str  # compute | optimizer | communication | pipeline_wait | straggler_wait | data
    microbatch: int  # -1 where it has none
    stage: int = -1
    start: float
    end: float


class Learned(Record):
    """Scores of a plan on held-out samples while it trains from the task's start, one value a look.

    All plans of a study are looked at after the same steps. `seconds` are of training alone, `samples` those seen.
    """

    steps: list[int]
    samples: list[int]
    seconds: list[float]
    loss: list[float]
    accuracy: list[float]  # 0 to 1


class HeldOut(Record):
    """What `learned` was scored on: so many samples, spread over the set."""

    name: Literal["test", "validation"]
    samples: int


class Result(Record):
    """One plan: what it is, whether it is right, what it costs."""

    plan: str
    label: str  # the shortest text, as tables print it
    program: str | None = None
    mesh: MeshRecord
    schedule: str
    engine: str
    comm: str | None = None
    threads: int
    workers: int
    status: Status
    reason: str | None = None
    step_seconds: Seconds | None = None
    stopped: str | None = None  # why it had fewer rounds than others
    samples_per_second: float | None = None
    vs_today: Ratio | None = None
    speedup: float | None = None
    efficiency: float | None = None
    exact: bool
    verified: Verified | None = None
    exposed_comm_fraction: float | None = None
    bubble_fraction: float | None = None
    bytes_communicated: int | None = None  # sent by all ranks together in one step
    compile_seconds: float | None = None  # what its first step took more than its second, where it is compiled
    peak_memory_bytes: int | None = None  # of the rank that needs most, in host memory
    devices: list[str] = []  # of each rank, where one has a GPU
    peak_device_memory_bytes: int | None = None  # of the rank that needs most of its GPU, by PyTorch's allocator
    computed_memory: MemoryRecord | None = None  # null where it could not be computed
    oversubscribed: bool = False
    bound_by: str | None = None
    explanation: str | None = None  # what binds the plan and what to change, a sentence each
    split: Split | None = None
    split_by_rank: list[Split] = []
    work: list[Work] = []  # each rank's instructions
    records_per_step: int | None = None  # clocks read by the rank that reads most
    record_seconds: float | None = None  # what the interpreter adds to an instruction, its clock included
    losses: list[float] = []  # mean training loss of each step since the initial weights
    learned: Learned | None = None  # of the winner, of today, and of the fastest inexact plan of each kind
    timeline: list[Event] = []  # one measured step
    simulated: list[Event] = []  # the same step by the simulator, with measured stage costs
    program_text: list[str] = []  # the program drawn, a line a rank


class Baseline(Record):
    """The best serial run: one rank, any number of threads."""

    plan: str
    step_seconds: Seconds


class Recommendation(Record):
    """The plan to use and why; `command` trains with it."""

    plan: str
    label: str
    sentence: str
    why: str
    command: str
    vs_today: Ratio | None
    not_told_apart: list[str]
    too_few_rounds: list[str] = []  # of those: what had too few rounds in common with it for any difference to show


class Rate(Record):
    """What this machine was measured to do, with one core and with all usable ones, and how it was measured."""

    one_core: float
    all_cores: float
    how: str


class Machine(Record):
    """The machine the figures hold for. What it does not tell is null."""

    cpu: str
    usable_cores: int
    memory_bytes: int
    load_before: float
    load_after: float | None = None
    foreign_cores: float | None = None  # median of cores kept busy by other programs while measuring
    python: str
    torch: str
    mpi: str | None
    system: str
    gpus: list[str] = []
    caches: dict[str, int] = {}  # bytes by level, e.g. L1d; of one instance of it
    pinning: str | None = None
    frequency_hz: float | None = None
    memory_bytes_per_second: Rate | None = None
    flops_per_second: Rate | None = None  # float32, multiply and add counted apart
    versions: dict[str, str] = {}  # of paraxis, numpy, mpi4py, and the compiler of the native engine


class Roof(Record):
    """One layer in one direction against the machine. `share` is achieved / attainable, both in flops per second."""

    layer: int
    name: str
    direction: Literal["forward", "backward"]
    flops: float
    bytes: float
    seconds: float
    intensity: float
    attainable: float
    achieved: float
    share: float
    bound: Literal["compute", "memory"]


class Study(Record):
    """Everything one `explore` found; `study.json` is this record."""

    task: dict[str, Any]
    machine: Machine
    today: Result | None
    baseline: Baseline | None
    results: list[Result]
    recommendation: Recommendation | None
    roofline: list[Roof] = []  # of the linear and convolution layers in PyTorch, on the machine's measured peaks
    held_out: HeldOut | None = None
    accuracy_skipped: str | None = None  # why no plan has `learned`
    notes: list[str] = []
    finished: bool = False
    elapsed_seconds: float = 0.0
    version: str


def write(study: Study, folder: Path) -> Path:
    """Write `study.json` whole or not at all; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.json"
    draft = path.with_suffix(".json.part")
    draft.write_text(study.model_dump_json(indent=1))
    draft.replace(path)
    return path


def read(path: Path) -> Study:
    """Read a `study.json`, or the one in a folder; raises pydantic's ValidationError if it is not one."""
    return Study.model_validate_json((path / "study.json" if path.is_dir() else path).read_text())
