"""A plan: the mesh of ranks, the schedule, how replicas agree, and what executes it. Text in, text out."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from paraxis.errors import PlanError, ProgramError
from paraxis.plan.own import is_own
from paraxis.plan.schedules import ONE_STAGE, SCHEDULES, STAGES, parted
from paraxis.sync import rule as sync_rule

ENGINES = ("torch", "native", "plain")
COMMS = ("openmp", "mpi", "gloo", "nccl")
GRADIENTS = ("private", "owner")
SHARDED_BUCKET = 512 << 10  # bytes of a bucket of ZeRO 2 and 3 by default: below it messages cost more than memory
SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Mesh:
    """The grid of ranks; `tp` runs fastest and `pp` slowest, so that the chattiest ranks are neighbours."""

    dp: int = 1
    pp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.dp * self.pp * self.tp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(dp, pp, tp) of a rank."""
        return rank // self.tp % self.dp, rank // (self.tp * self.dp), rank % self.tp

    def rank(self, dp: int, pp: int, tp: int = 0) -> int:
        """The rank at a place of the grid."""
        return (pp * self.dp + dp) * self.tp + tp

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that share all coordinates with `rank` but that of `axis`, in order; of `pp:0+3` only those two."""
        dp, pp, tp = self.coordinates(rank)
        if axis == "dp":
            return tuple(self.rank(i, pp, tp) for i in range(self.dp))
        if axis == "pp":
            return tuple(self.rank(dp, i, tp) for i in range(self.pp))
        if axis == "tp":
            return tuple(self.rank(dp, pp, i) for i in range(self.tp))
        places = axis.removeprefix("pp:").split("+")
        if axis.startswith("pp:") and all(p.isdecimal() and int(p) < self.pp for p in places):
            return tuple(self.rank(dp, int(p), tp) for p in places)
        raise ProgramError(f"axis {axis!r} is not one of dp, pp, tp, nor some of the {self.pp} places of pp: pp:0+1")


@dataclass(frozen=True)
class Plan:
    """How to train; equal programs have equal text, because keys without effect take their default.

    `interleave` is the number of stages on each rank (2 with schedule=interleaved unless more are asked for), `split`
    the number of layers of each stage (empty: balanced by measured cost); `threads` are an engine's own in one rank;
    `bucket_bytes` 0 reduces all gradients at once; `sync` is "gradient", "hogwild" or a rule of paraxis.sync, such as
    "average@8" or "diloco@epoch:bf16". Under comm=openmp ranks are threads, whose weight `gradients` are "private"
    (each rank those of its samples, then summed) or "owner" (each its own block, over all). `zero` is the stage of ZeRO
    (Rajbhandari et al. 2020): of optimizer state (1), gradients too (2) and parameters too (3), each replica keeps only
    its share. Stages that `recompute` names ("all", or numbers such as "0+2") keep only what their segments are called
    with, and compute forwards again before the backwards.
    Raises PlanError for values that no network could meet.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    schedule: str = ""
    microbatches: int = 1
    interleave: int = 1
    split: tuple[int, ...] = ()
    sync: str = "gradient"
    engine: str = "torch"
    comm: str = ""
    threads: int = 1
    bucket_bytes: int = 0
    gradients: str = "private"
    zero: int = 0
    recompute: str = ""

    def __post_init__(self) -> None:
        for key in ("dp", "pp", "tp", "microbatches", "interleave", "threads"):
            if getattr(self, key) < 1:
                raise PlanError(f"{key}={getattr(self, key)}: it takes 1 or more")
        if self.bucket_bytes < 0:
            raise PlanError(f"bucket_bytes={self.bucket_bytes}: it takes 0 (all at once) or more, such as 1M")
        self._check_words()
        if self.interleave == 1 and self._ordered():
            object.__setattr__(self, "interleave", STAGES.get(self.schedule, 1))
        if self.split and len(self.split) != self.stages:
            ranks = f"pp={self.pp}" + f",interleave={self.interleave}" * (self.interleave > 1)
            raise PlanError(f"split={_plus(self.split)} names {len(self.split)} stages, but {ranks}")
        if any(part < 1 for part in self.split):
            raise PlanError(f"split={_plus(self.split)}: every stage needs at least one layer")
        self._drop_what_has_no_effect()

    def _check_words(self) -> None:
        words = {"schedule": ("", *SCHEDULES), "engine": ENGINES, "comm": ("", *COMMS), "gradients": GRADIENTS}
        for key, allowed in words.items():
            value = getattr(self, key)
            if value not in allowed and not (key == "schedule" and is_own(value)):
                raise PlanError(f"{key}={value}: {_suggest(value, [w for w in allowed if w])}")
        self._check_engine()
        self._check_zero()
        self._check_sync()
        self._check_threads()
        self._check_interleave()
        self.recomputed()

    def _check_engine(self) -> None:
        if self.engine == "plain" and (self.mesh.size > 1 or self.microbatches > 1):
            raise PlanError("engine=plain is the framework's own loop in one process; parallel plans take engine=torch")
        if self.tp > 1 and self.engine == "native":
            raise PlanError(f"tp={self.tp}: engine=native has no tensor parallelism; engine=torch has")
        if self.comm == "openmp" and self.engine != "native":
            raise PlanError(
                f"comm=openmp: only engine=native has threads as ranks; engine={self.engine} takes mpi or gloo"
            )
        if self.sync == "hogwild" and (self.comm or "openmp", self.engine, self.pp) != ("openmp", "native", 1):
            raise PlanError("sync=hogwild needs weights in common: dp=N,engine=native,comm=openmp with pp=1")
        threaded = self.engine == "native" and (self.comm or "openmp") == "openmp" and self.sync == "gradient"
        if self.gradients == "owner" and not (threaded and self.microbatches == self.pp == 1):
            raise PlanError("gradients=owner needs dp=N,engine=native,comm=openmp, sync=gradient, microbatches=1, pp=1")

    def _check_zero(self) -> None:
        if not 0 <= self.zero <= 3:
            raise PlanError(f"zero={self.zero}: it takes 0 (nothing sharded), 1, 2 or 3")
        if self.zero == 0 or self.dp == 1:
            return
        if self.engine == "native" and (self.comm or "openmp") == "openmp":
            raise PlanError(f"zero={self.zero}: with comm=openmp replicas share one copy of the weights already")
        if self.engine == "native":
            raise PlanError(f"zero={self.zero}: engine=native keeps its weights whole; engine=torch can shard them")
        if self.sync != "gradient":
            raise PlanError(f"zero={self.zero}: with sync={self.sync} replicas differ; shares take sync=gradient")

    def _check_sync(self) -> None:
        sync = sync_rule.parse(self.sync)
        if sync is None or self.dp == 1 or self.engine != "native":
            return
        threads = (self.comm or "openmp") == "openmp"
        if threads and sync.rule.gradients:
            raise PlanError(f"sync={self.sync}: threads send nothing that could be smaller; take sync=gradient")
        if threads and sync.payload:
            raise PlanError(f"sync={self.sync}: threads send nothing; leave out {sync.payload}")
        if sync.fragments > 1 or sync.payload == "int8":
            what = "fragments" if sync.fragments > 1 else "int8"
            raise PlanError(f"sync={self.sync}: engine=native has its weights in one piece; leave out {what}")

    def _check_interleave(self) -> None:
        if self.interleave > 1 and self.microbatches > 1 and (self.schedule or "1f1b") in ONE_STAGE:
            several = ", ".join(name for name in SCHEDULES if name not in ONE_STAGE)
            raise PlanError(f"interleave={self.interleave}: several stages a rank take schedule={several}")
        known = self.schedule in SCHEDULES  # of a user's own the engine says what it has not
        if self.engine == "native" and self._ordered() and known and (self.schedule in STAGES or parted(self.schedule)):
            whole = ", ".join(name for name in SCHEDULES if name not in STAGES and not parted(name))
            raise PlanError(f"schedule={self.schedule}: engine=native takes {whole}; this one takes engine=torch")

    def _ordered(self) -> bool:
        """Whether there is an order of microbatches that a schedule can choose."""
        return self.pp > 1 and self.microbatches > 1 and self.schedule != ""

    def _check_threads(self) -> None:
        inside = self.mesh.size > 1 and self.comm not in ("", "openmp")
        if self.engine == "native" and self.threads > 1 and not inside:
            ranks = self.dp * self.threads
            raise PlanError(f"threads={self.threads}: here threads are ranks, write dp={ranks},engine=native")

    def _drop_what_has_no_effect(self) -> None:
        quiet: dict[str, Any] = {}
        if sync := sync_rule.parse(self.sync):
            quiet["sync"] = sync.text()
        if self.mesh.size == 1:
            quiet["comm"] = ""
        elif not self.comm:
            quiet["comm"] = "openmp" if self.engine == "native" else "mpi"
        if self.dp == 1:
            quiet["sync"] = "gradient"
        if self.dp == 1 or self.sync != "gradient":
            quiet["bucket_bytes"] = 0
        if self.dp == 1:
            quiet |= {"gradients": "private", "zero": 0}
        elif self.zero > 1 and not self.bucket_bytes:
            quiet["bucket_bytes"] = SHARDED_BUCKET
        if self.recompute and self.recomputed() == set(range(self.stages)):
            quiet["recompute"] = "all"
        elif self.recompute:
            quiet["recompute"] = _plus(sorted(self.recomputed()))
        if self.pp == 1:
            quiet |= {"schedule": "", "split": (), "interleave": 1}
        elif not is_own(self.schedule) and (self.microbatches == 1 or not self.schedule):
            quiet["schedule"] = "layerwise" if self.microbatches == 1 else "1f1b"
        for key, value in quiet.items():
            object.__setattr__(self, key, value)

    @property
    def mesh(self) -> Mesh:
        """The grid of ranks."""
        return Mesh(self.dp, self.pp, self.tp)

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all of its ranks."""
        return self.pp * self.interleave

    def recomputed(self) -> set[int]:
        """The stages that compute their forwards again; raises PlanError for what names none."""
        words = self.recompute.split("+") if self.recompute not in ("", "all") else []
        if not all(word.isdecimal() and int(word) < self.stages for word in words):
            known = f"stages 0 to {self.stages - 1} joined by +" if self.stages > 1 else "0"
            raise PlanError(f"recompute={self.recompute}: it takes all, or {known}")
        if self.recompute and self.engine != "torch":
            raise PlanError(
                f"recompute={self.recompute}: engine={self.engine} keeps what it computes; engine=torch can"
            )
        return set(range(self.stages)) if self.recompute == "all" else set(map(int, words))

    @property
    def workers(self) -> int:
        """Ranks times threads: the cores that the plan can use."""
        return self.mesh.size * self.threads

    @property
    def processes(self) -> int:
        """Processes that it runs in: one a rank, or one for all where ranks are threads."""
        return 1 if self.comm == "openmp" else self.mesh.size

    @property
    def exact(self) -> bool:
        """Whether it computes the serial step up to the order of float additions."""
        return self.sync == "gradient"

    def text(self) -> str:
        """Every key, as records keep it; `parse` gives the same plan back."""
        return ",".join(f"{f.name}={_show(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != ())

    def short(self) -> str:
        """Only the keys that differ from their default, as one types it."""
        differ = [f for f in fields(self) if getattr(self, f.name) != f.default]
        implied: dict[str, object] = {"schedule": "layerwise" if self.microbatches == 1 else "1f1b"}
        implied |= {"bucket_bytes": SHARDED_BUCKET} if self.zero > 1 else {}
        shown = [f for f in differ if implied.get(f.name) != getattr(self, f.name)]
        return ",".join(f"{f.name}={_show(getattr(self, f.name))}" for f in shown) or "serial"

    def label(self) -> str:
        """The name in tables: `pp=2 1f1b m=4 mpi`."""
        if self.engine == "plain":
            return f"today: 1 process, {self.threads} thread{'s' * (self.threads > 1)}"
        words = [f"{axis}={getattr(self, axis)}" for axis in ("dp", "pp", "tp") if getattr(self, axis) > 1]
        words += [self.schedule.rpartition("/")[2]] * bool(self.schedule)
        words += [f"m={self.microbatches}"] * (self.microbatches > 1)
        words += [f"{self.interleave} stages a rank"] * (self.interleave > 1)
        words += [self.sync] * (self.sync != "gradient")
        words += [f"{self.gradients} gradients"] * (self.gradients != "private")
        words += [f"zero={self.zero}"] * (self.zero > 0)
        words += [f"recompute={self.recompute}"] * bool(self.recompute)
        words += [f"threads={self.threads}"] * (self.threads > 1)
        usual = SHARDED_BUCKET if self.zero > 1 else 0
        words += [f"bucket={_bytes(self.bucket_bytes)}"] * (self.bucket_bytes != usual)
        words += ["serial"] * (not words)
        words += ["native"] * (self.engine == "native" and self.comm != "openmp")
        return " ".join([*words, self.comm]).strip()


def parse(text: str) -> Plan:
    """The plan of `dp=2,pp=2,schedule=1f1b,microbatches=8` or of the alias `serial`; raises PlanError."""
    if text.strip() == "serial":
        return Plan()
    values: dict[str, Any] = {}
    known = {f.name: f.default for f in fields(Plan)}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals and key in known:
            raise PlanError(f"plan {text!r}: {key} needs a value, such as {key}=2")
        if not equals or key not in known:
            raise PlanError(f"plan {text!r}: {key!r} is not a key; {_suggest(key, list(known))}")
        if key in values:
            raise PlanError(f"plan {text!r} gives {key} twice")
        values[key] = _value(key, value, known[key])
    if not values:
        raise PlanError(f"plan {text!r} is empty; try serial, dp=2 or pp=2,microbatches=4")
    return Plan(**values)


def period(sync: str, steps_per_epoch: int) -> int:
    """Steps until replicas have agreed on everything: 1, H of `average@H`, or an epoch's steps; raises PlanError."""
    found = sync_rule.parse(sync)
    return 1 if found is None or not found.rule.agreements else found.every or steps_per_epoch


def with_split(plan: Plan, split: Iterable[int]) -> Plan:
    """The same plan with its stages settled."""
    return replace(plan, split=tuple(split)) if plan.pp > 1 else plan


def _value(key: str, value: str, default: object) -> object:
    if isinstance(default, str):
        return value
    try:
        if key == "split":
            return tuple(int(part) for part in value.split("+"))
        if value[-1:] in SUFFIXES and key == "bucket_bytes":
            return int(value[:-1]) * SUFFIXES[value[-1]]
        return int(value)
    except ValueError:
        wanted = "layer counts such as 3+5" if key == "split" else "a whole number"
        raise PlanError(f"{key}={value}: it takes {wanted}") from None


def _suggest(word: str, allowed: list[str]) -> str:
    close = get_close_matches(word, allowed, 1)
    return f"did you mean {close[0]}?" if close else f"it takes one of {', '.join(allowed)}"


def _plus(parts: Iterable[int]) -> str:
    return "+".join(map(str, parts))


def _show(value: object) -> str:
    return _plus(value) if isinstance(value, tuple) else str(value)


def _bytes(count: int) -> str:
    for suffix, unit in reversed(SUFFIXES.items()):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{suffix}"
    return str(count)
