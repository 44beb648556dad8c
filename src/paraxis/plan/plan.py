"""A plan: the mesh of ranks, the schedule, how replicas agree, and what executes it. Text in, text out."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from paraxis.errors import PlanError, ProgramError
from paraxis.plan.own import is_own
from paraxis.plan.rules import SWITCHES, check, ordered, suggest
from paraxis.plan.schedules import STAGES
from paraxis.sync import rule as sync_rule

SHARDED_BUCKET = 512 << 10  # bytes of a bucket of ZeRO 2 and 3 by default: below it messages cost more than memory
WARM = 3  # steps of graphs=1 before one is recorded: libraries choose their kernels, and lazy buffers come into being
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
    with, and compute forwards again before the backwards. With `sequence` ranks of a `tp` group also share what lies
    between their splits, along the sequence (Korthikanti et al. 2022).
    `device` is "cpu", "cuda" (each rank the GPU of its number on its host), "cuda:0", or one for each place of the
    pipeline, such as "cpu+cuda:0". `precision` is "fp32" (the network's own), "tf32", "bf16" or "fp16" (scaled losses);
    `compile` and `graphs` (1 or 0) have torch.compile and CUDA graphs run the segments.
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
    sequence: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    compile: int = 0
    graphs: int = 0

    def __post_init__(self) -> None:
        for key in ("dp", "pp", "tp", "microbatches", "interleave", "threads"):
            if getattr(self, key) < 1:
                raise PlanError(f"{key}={getattr(self, key)}: it takes 1 or more")
        if self.bucket_bytes < 0:
            raise PlanError(f"bucket_bytes={self.bucket_bytes}: it takes 0 (all at once) or more, such as 1M")
        check(self)
        if self.interleave == 1 and ordered(self):
            object.__setattr__(self, "interleave", STAGES.get(self.schedule, 1))
        if self.split and len(self.split) != self.stages:
            ranks = f"pp={self.pp}" + f",interleave={self.interleave}" * (self.interleave > 1)
            named = f"{len(self.split)} stage{'s' * (len(self.split) > 1)}"
            raise PlanError(f"split={_plus(self.split)} names {named}, but {ranks}")
        if any(part < 1 for part in self.split):
            raise PlanError(f"split={_plus(self.split)}: every stage needs at least one layer")
        self._drop_what_has_no_effect()

    def _drop_what_has_no_effect(self) -> None:
        quiet: dict[str, Any] = {}
        if sync := sync_rule.parse(self.sync):
            quiet["sync"] = sync.text()
        if self.mesh.size == 1:
            quiet["comm"] = ""
        elif not self.comm:
            quiet["comm"] = "openmp" if self.engine == "native" else "mpi"
        if set(places := self.device.split("+")) == {places[0]}:
            quiet["device"] = places[0]
        if self.tp == 1:
            quiet["sequence"] = 0
        if self.dp == 1:
            quiet["sync"] = "gradient"
        if self.dp == 1 or self.sync != "gradient":
            quiet["bucket_bytes"] = 0
        if self.dp == 1:
            quiet |= {"gradients": "private", "zero": 0}
        elif not self.bucket_bytes:
            quiet.setdefault("bucket_bytes", usual_bucket(self.zero))
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

    def devices(self) -> tuple[str, ...]:
        """Of each place of the pipeline."""
        places = tuple(self.device.split("+"))
        return places * (self.pp if len(places) == 1 else 1)

    def on_gpu(self) -> bool:
        """Whether any rank computes on a GPU."""
        return "cuda" in self.device

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
        implied["bucket_bytes"] = usual_bucket(self.zero)
        shown = [f for f in differ if implied.get(f.name) != getattr(self, f.name)]
        return ",".join(f"{f.name}={_show(getattr(self, f.name))}" for f in shown) or "serial"

    def label(self) -> str:
        """The name in tables: `pp=2 1f1b m=4 mpi`."""
        if self.engine == "plain":
            options = [
                w for w in (self.precision, "compile" * self.compile, "graphs" * self.graphs) if w not in ("", "fp32")
            ]
            where = self.device if self.on_gpu() else f"{self.threads} thread{'s' * (self.threads > 1)}"
            return " ".join([f"today: 1 process, {where}", *options])
        words = [f"{axis}={getattr(self, axis)}" for axis in ("dp", "pp", "tp") if getattr(self, axis) > 1]
        words += [self.schedule.rpartition("/")[2]] * bool(self.schedule)
        words += [f"m={self.microbatches}"] * (self.microbatches > 1)
        words += [f"{self.interleave} stages a rank"] * (self.interleave > 1)
        words += [self.sync] * (self.sync != "gradient")
        words += [f"{self.gradients} gradients"] * (self.gradients != "private")
        words += [f"zero={self.zero}"] * (self.zero > 0)
        words += [f"recompute={self.recompute}"] * bool(self.recompute)
        words += [key for key in SWITCHES if getattr(self, key)]
        words += [self.precision] * (self.precision != "fp32")
        words += [self.device] * (self.device != "cpu")
        words += [f"threads={self.threads}"] * (self.threads > 1)
        words += [f"bucket={_bytes(self.bucket_bytes)}"] * (self.bucket_bytes != usual_bucket(self.zero))
        words += ["serial"] * (not words)
        words += ["native"] * (self.engine == "native" and self.comm != "openmp")
        return " ".join([*words, self.comm]).strip()


def parse(text: str) -> Plan:
    """The plan of `dp=2,pp=2,schedule=1f1b,microbatches=8`, of `serial` or of `today,precision=bf16`; or PlanError."""
    if text.strip() == "serial":
        return Plan()
    values: dict[str, Any] = {}
    known = {f.name: f.default for f in fields(Plan)}
    for item in filter(None, (part.strip() for part in text.split(","))):
        if item == "today":
            item = "engine=plain"
        key, equals, value = item.partition("=")
        key = "device" if key == "devices" else key
        if not equals and key in known:
            raise PlanError(f"plan {text!r}: {key} needs a value, such as {key}=2")
        if not equals or key not in known:
            raise PlanError(f"plan {text!r}: {key!r} is not a key; {suggest(key, list(known))}")
        if key in values:
            raise PlanError(f"plan {text!r} gives {key} twice")
        values[key] = _value(key, value, known[key])
    if not values:
        raise PlanError(f"plan {text!r} is empty; try serial, dp=2 or pp=2,microbatches=4")
    return Plan(**values)


def usual_bucket(zero: int) -> int:
    """Bytes of a bucket where a plan names none; 0: all at once."""
    return SHARDED_BUCKET if zero > 1 else 0


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


def _plus(parts: Iterable[int]) -> str:
    return "+".join(map(str, parts))


def _show(value: object) -> str:
    return _plus(value) if isinstance(value, tuple) else str(value)


def _bytes(count: int) -> str:
    for suffix, unit in reversed(SUFFIXES.items()):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{suffix}"
    return str(count)
