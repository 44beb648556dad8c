"""Which plans fit into the memory that a rank may have: told before anything is set up, from computed bytes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from paraxis.errors import OutOfMemory, ParaxisError, PlanError
from paraxis.measure.records import MemoryRecord
from paraxis.plan.plan import Plan, with_split
from paraxis.plan.precision import MIXED
from paraxis.plan.space import space
from paraxis.program.cut import splits
from paraxis.program.memory import Memory

if TYPE_CHECKING:
    from paraxis.session import Session

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
TRIED = 64  # ways of cutting whose memory is computed
SMALLER = "smaller microbatches (microbatches=4), recompute=all or device=cpu need less"
UNKNOWN = "its memory could not be computed, so that it is not known to fit into --memory-limit"


def bytes_of(text: str) -> int:
    """`200M`, `1.5GB`, `2GiB`, `123456` -> bytes (M is a million, Mi 2^20); raises PlanError."""
    word = text.strip().upper().removesuffix("B")
    binary, word = word.endswith("I"), word.removesuffix("I")
    digits = word.rstrip("KMGT")
    unit = word[len(digits) :]
    try:
        if unit not in UNITS or not float(digits) > 0:
            raise ValueError(text)
        return int(float(digits) * (1024 ** list(UNITS).index(unit) if binary else UNITS[unit]))
    except (ValueError, OverflowError):
        raise PlanError(f"--memory-limit {text}: it takes a size above 0, such as 200M or 2G") from None


def record(memory: Memory | None) -> MemoryRecord | None:
    """As it stands in documents."""
    return None if memory is None else MemoryRecord(**asdict(memory), total=memory.total)


def parts(memory: Memory | MemoryRecord) -> str:
    """`412 MB a rank (parameters 45, gradients 45, optimizer 90, activations 232)`: what is nothing is left out."""
    names = ("parameters", "gradients", "optimizer", "activations", "communication")
    told = ", ".join(f"{name} {_mb(getattr(memory, name))}" for name in names if getattr(memory, name))
    return f"{_mb(memory.total)} MB a rank ({told})"


def check_fits(session: "Session", plan: Plan, memory: Memory | None) -> None:
    """Raises PlanError if a plan needs more than a rank may have, with the numbers and one that would fit."""
    limit = session.limit
    if limit is None or plan.engine == "plain":
        return
    if memory is None:
        raise PlanError(f"{plan.short()}: {UNKNOWN}")
    if memory.total > limit:
        told = f"{plan.short()} needs {parts(memory)}, more than the limit of {_mb(limit)} MB"
        raise PlanError(f"{told}; {_instead(session, plan, limit)}")


def fitted(session: "Session", plan: Plan, costs: Sequence[Sequence[float]]) -> Plan | None:
    """Where some ranks have a GPU of limited memory: the cheapest cut with which they keep to it, if there is one."""
    limit, unlike = session.limit, len(set(plan.devices())) > 1
    for split in splits(costs)[:TRIED] if limit and unlike else ():
        made = with_split(plan, split)
        memory = session.memory(made)
        if memory is not None and limit is not None and memory.total <= limit:
            return made
    return None


@contextmanager
def advised(session: "Session", key: str, plan: Plan) -> Iterator[None]:
    """Whoever runs out of a GPU's memory is forgotten on its ranks, and the error says which plan would fit."""
    try:
        yield
    except OutOfMemory as error:
        if session.home_alive(plan):
            session.home(plan).ask({"do": "drop", "key": key}, range(plan.processes))
        limit, computed = session.limit or error.bytes, session.memory(plan)
        if limit and computed:  # which is less than what it really needs
            limit = min(limit, int(0.9 * computed.total))
        limited = f" ({_mb(session.limit)} MB allowed)" if session.limit else ""
        told = f"{plan.short()}: {error}{limited}"
        raise OutOfMemory(f"{told}; {_instead(session, plan, limit) if limit else SMALLER}") from None


def _instead(session: "Session", plan: Plan, limit: int) -> str:
    """The first plan of as many ranks that fits, or the smallest."""
    found = []
    for other in _others(session, plan):
        try:
            memory = session.memory(session.settled(other))
        except ParaxisError:
            continue
        if memory is not None:
            found.append((memory.total, other))
        if memory is not None and memory.total <= limit:
            return f"{other.short()} would need {_mb(memory.total)} MB{_unlike(plan, other)}"
    if not found:
        return "no other plan was found for it"
    total, least = min(found, key=lambda pair: pair[0])
    return f"none of its kind fits, the smallest is {least.short()} with {_mb(total)} MB{_unlike(plan, least)}"


def _unlike(plan: Plan, other: Plan) -> str:
    """That another plan does not compute the same numbers."""
    return "" if other.precision == plan.precision else f", but computes in {other.precision}"


def _others(session: "Session", plan: Plan) -> Iterator[Plan]:
    """Those first that differ in the fewest keys; behind all that compute in the plan's precision those that do not.

    That is fp32 for mixed precision, whose copies of weights may need more room than its small activations save.
    """
    own = dict.fromkeys(_on_less_of_a_gpu(plan) if plan.on_gpu() else _of_as_many_ranks(session, plan))
    near = sorted((other for other in own if other != plan), key=partial(_differing, plan))
    yield from near
    precision = "fp32" if plan.precision in MIXED else "bf16"
    yield from chain.from_iterable(_changed(other, precision=precision) for other in (plan, *near))


def _differing(plan: Plan, other: Plan) -> int:
    """The keys in which plans differ as one types them; where stages are cut nobody need have typed."""
    a, b = (set(replace(own, split=()).short().split(",")) for own in (plan, other))
    return len({item.partition("=")[0] for item in a ^ b})


def _of_as_many_ranks(session: "Session", plan: Plan) -> Iterator[Plan]:
    """Of the same transport and as many ranks (of a single one: two)."""
    yield from _smaller(plan)
    layers, comm = len(session.known().layers), plan.comm or "mpi"
    for grid in space(max(2, plan.mesh.size), layers, (comm,), inexact=False, recompute=True):
        for other in _changed(grid, precision=plan.precision):
            yield other
            yield from _changed(other, sequence=1)


def _on_less_of_a_gpu(plan: Plan) -> Iterator[Plan]:
    """With less in each GPU, and consecutive layers on the CPU."""
    own = replace(plan, engine="torch", graphs=0)
    yield from _smaller(own)
    for gpu in sorted(set(plan.devices()) - {"cpu"})[:1] if plan.mesh.size == 1 else ():
        device = f"cpu+{'cuda:0' if gpu == 'cuda' else gpu}"
        for parts in (1, 4, 16):
            yield from _changed(own, pp=2, microbatches=parts, device=device)


def _smaller(plan: Plan) -> Iterator[Plan]:
    """On the same ranks: forwards computed again, shared tokens (where `tp` ranks share layers), less at once."""
    schedule = "" if plan.schedule == "layerwise" else plan.schedule
    for parts in (plan.microbatches * n for n in (1, 2, 4, 8, 16)):
        for own in (plan, *_changed(plan, sequence=1)):
            yield from _changed(own, microbatches=parts, schedule=schedule)
            yield from _changed(own, microbatches=parts, schedule=schedule, recompute="all")


def _changed(plan: Plan, **values: Any) -> Iterator[Plan]:
    """The plan with other values, if there is one."""
    try:
        yield replace(plan, **values)
    except PlanError:
        return


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count >= 10e6 else f"{count / 1e6:.2g}"
