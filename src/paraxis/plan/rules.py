"""What keys of a plan cannot be had together, each refused with the reason and what would work."""

from difflib import get_close_matches
from typing import TYPE_CHECKING

from paraxis.errors import PlanError
from paraxis.plan.own import is_own
from paraxis.plan.precision import check_precision
from paraxis.plan.schedules import ONE_STAGE, SCHEDULES, STAGES, parted
from paraxis.sync import rule as sync_rule

if TYPE_CHECKING:
    from paraxis.plan.plan import Plan

ENGINES = ("torch", "native", "plain")
COMMS = ("openmp", "mpi", "gloo", "nccl")
GRADIENTS = ("private", "owner")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
SWITCHES = ("sequence", "compile", "graphs")
# Key, its only value under engine=native, and why.
NATIVE = (
    ("device", "cpu", "computes on CPUs; take engine=torch"),
    ("precision", "fp32", "computes in fp32; take engine=torch"),
    ("compile", 0, "is compiled already; torch.compile takes engine=torch"),
    ("graphs", 0, "computes on CPUs, and CUDA graphs record a GPU; take engine=torch,device=cuda"),
    ("sequence", 0, "has tp ranks that see all tokens in common memory; take engine=torch to share them out"),
)


def check(plan: "Plan") -> None:
    """Raises PlanError for the first thing that no network could meet."""
    words = {"schedule": ("", *SCHEDULES), "engine": ENGINES, "comm": ("", *COMMS), "gradients": GRADIENTS}
    words |= {"precision": PRECISIONS}
    for key, allowed in words.items():
        value = getattr(plan, key)
        if value not in allowed and not (key == "schedule" and is_own(value)):
            raise PlanError(f"{key}={value}: {suggest(value, [w for w in allowed if w])}")
    _check_engine(plan)
    _check_zero(plan)
    _check_sync(plan)
    _check_threads(plan)
    _check_interleave(plan)
    _check_device(plan)
    check_precision(plan)
    plan.recomputed()


def _check_engine(plan: "Plan") -> None:
    if plan.engine == "plain" and (plan.mesh.size > 1 or plan.microbatches > 1):
        raise PlanError("engine=plain is the framework's own loop in one process; parallel plans take engine=torch")
    if plan.tp > 1 and plan.engine == "native":
        _check_group(plan)
    if plan.comm == "openmp" and plan.engine != "native":
        rest = "engine=plain is one process; leave comm out"
        if plan.engine == "torch":
            rest = "engine=torch takes mpi or gloo" + ", and nccl on GPUs" * plan.on_gpu()
        raise PlanError(f"comm=openmp: only engine=native has threads as ranks; {rest}")
    if plan.sync == "hogwild" and (plan.comm or "openmp", plan.engine, plan.pp) != ("openmp", "native", 1):
        raise PlanError("sync=hogwild needs weights in common: dp=N,engine=native,comm=openmp with pp=1")
    threaded = plan.engine == "native" and (plan.comm or "openmp") == "openmp" and plan.sync == "gradient"
    if plan.gradients == "owner" and not (threaded and plan.microbatches == plan.pp == 1):
        raise PlanError("gradients=owner needs dp=N,engine=native,comm=openmp, sync=gradient, microbatches=1, pp=1")


def _check_group(plan: "Plan") -> None:
    if plan.comm not in ("", "openmp"):
        raise PlanError(
            f"tp={plan.tp},comm={plan.comm}: the threads of a tp group share memory; take comm=openmp, or engine=torch"
        )
    sync = sync_rule.parse(plan.sync)
    if plan.dp > 1 and (plan.sync == "hogwild" or (sync and sync.rule.agreements)):
        raise PlanError(f"tp={plan.tp}: threads of a tp group share weights that sync={plan.sync} lets replicas change")
    if plan.gradients == "owner":
        raise PlanError(f"gradients=owner: with tp={plan.tp} each thread of a group has its own block already")
    if plan.pp > 1 and plan.interleave > 1:
        raise PlanError(
            f"interleave={plan.interleave}: threads of a tp group share one stage; take interleave=1 or engine=torch"
        )
    if ordered(plan) and STAGES.get(plan.schedule, 1) > 1:
        raise PlanError(f"schedule={plan.schedule}: threads of a tp group share one stage; take 1f1b or engine=torch")
    if ordered(plan) and plan.schedule in SCHEDULES and parted(plan.schedule):
        raise PlanError(
            f"schedule={plan.schedule}: threads of a tp group keep nothing for a late W; take 1f1b or engine=torch"
        )


def _check_zero(plan: "Plan") -> None:
    if not 0 <= plan.zero <= 3:
        raise PlanError(f"zero={plan.zero}: it takes 0 (nothing sharded), 1, 2 or 3")
    if plan.zero == 0 or plan.dp == 1:
        return
    if plan.engine == "native" and (plan.comm or "openmp") == "openmp":
        raise PlanError(f"zero={plan.zero}: with comm=openmp replicas share one copy of the weights already")
    if plan.engine == "native":
        raise PlanError(f"zero={plan.zero}: engine=native keeps its weights whole; engine=torch can shard them")
    if (sync := sync_rule.parse(plan.sync)) is not None:
        why = "adds up whole gradients, packed" if sync.rule.gradients else "lets replicas differ"
        raise PlanError(f"zero={plan.zero}: sync={plan.sync} {why}; shares take sync=gradient")


def _check_sync(plan: "Plan") -> None:
    sync = sync_rule.parse(plan.sync)
    if sync is None or plan.dp == 1 or plan.engine != "native":
        return
    threads = (plan.comm or "openmp") == "openmp"
    if threads and sync.rule.gradients:
        raise PlanError(f"sync={plan.sync}: threads send nothing that could be smaller; take sync=gradient")
    cannot = [key for key, usual in (("fragments", 1), ("overlap", 0)) if sync.options.get(key, usual) != usual]
    why = ["engine=native has its weights in one piece"] * bool(cannot)
    if sync.payload and (threads or sync.payload == "int8"):
        rows = "int8 scales rows of one parameter, which engine=native has not"
        why.append("threads send nothing that could be smaller" if threads else rows)
        cannot.append(sync.payload)
    if why:
        raise PlanError(f"sync={plan.sync}: {', and '.join(why)}; leave out {' and '.join(cannot)}")


def _check_interleave(plan: "Plan") -> None:
    if plan.pp > 1 and plan.interleave > 1 and plan.microbatches > 1 and (plan.schedule or "1f1b") in ONE_STAGE:
        several = " or ".join(name for name in SCHEDULES if name not in ONE_STAGE)
        raise PlanError(f"interleave={plan.interleave}: several stages a rank take schedule={several}")


def _check_threads(plan: "Plan") -> None:
    inside = plan.mesh.size > 1 and plan.comm not in ("", "openmp")
    if plan.engine == "native" and plan.threads > 1 and not inside:
        raise PlanError(f"threads={plan.threads}: here threads are ranks; take dp={plan.dp * plan.threads} instead")


def _check_device(plan: "Plan") -> None:
    places = plan.device.split("+")
    for place in places:
        if place not in ("cpu", "cuda") and not (place.startswith("cuda:") and place[5:].isdecimal()):
            raise PlanError(
                f"device={plan.device}: it takes cpu, cuda, cuda:N, or one for each place of pp: cpu+cuda:0"
            )
    if len(places) not in (1, plan.pp):
        raise PlanError(f"device={plan.device} names {len(places)} devices, but pp={plan.pp}")
    for key in SWITCHES:
        if getattr(plan, key) not in (0, 1):
            raise PlanError(f"{key}={getattr(plan, key)}: it takes 0 or 1")
    for key, usual, why in NATIVE if plan.engine == "native" else ():
        if (value := getattr(plan, key)) != usual:
            gpu = ",device=cuda" * (value == "tf32")
            raise PlanError(f"{key}={value}: engine=native {why}{gpu}")
    if plan.graphs and (plan.compile or plan.precision == "fp16"):
        key = "compile=1" if plan.compile else "precision=fp16 (whose steps are taken or skipped as they come)"
        raise PlanError(f"graphs=1: what is recorded cannot be changed by {key}; leave one of the two out")
    if plan.compile and plan.tp > 1:
        raise PlanError(f"compile=1: with tp={plan.tp} ranks meet in the middle of layers; leave one of the two out")
    if plan.compile and ordered(plan) and plan.schedule in SCHEDULES and parted(plan.schedule):
        raise PlanError(f"compile=1: schedule={plan.schedule} parts the backward of layers; take 1f1b, or no compile")
    if plan.graphs and plan.engine == "plain":
        raise PlanError(
            "graphs=1: engine=plain is the framework's own loop as it stands; engine=torch records its steps"
        )
    if plan.graphs and not plan.on_gpu():
        raise PlanError("graphs=1: CUDA graphs take device=cuda")
    if plan.comm == "nccl" and plan.mesh.size > 1 and "cpu" in places:
        gpu = ", or device=cuda" * (plan.engine == "torch")
        raise PlanError(f"comm=nccl: it joins GPUs, and device={plan.device}; take comm=mpi or gloo{gpu}")


def ordered(plan: "Plan") -> bool:
    """Whether there is an order of microbatches that a schedule can choose."""
    return plan.pp > 1 and plan.microbatches > 1 and plan.schedule != ""


def suggest(word: str, allowed: list[str]) -> str:
    """What was meant, or what there is."""
    close = get_close_matches(word, allowed, 1)
    return f"did you mean {close[0]}?" if close else f"it takes one of {', '.join(allowed)}"
