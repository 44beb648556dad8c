"""The verify job: plans of one task, each proved on its own ranks."""

from typing import Any

from paraxis.errors import ParaxisError, PlanError, TaskError
from paraxis.fitting import record
from paraxis.measure.machine import usable_cores
from paraxis.plan.plan import Plan, parse
from paraxis.plan.space import TRANSPORTS, space
from paraxis.program.cut import told_of
from paraxis.proof import Proof, prove, prove_or_tell
from paraxis.run.joined import JoinedPool
from paraxis.session import Session, Tell, check_batch, open_session
from paraxis.task.spec import TaskSpec

DTYPES = ("float64", "float32")


def verify_task(
    spec: TaskSpec,
    objects: dict[str, Any],
    plan: str | Plan,
    workers: int | None,
    steps: int,
    dtype: str,
    tell: Tell,
    joined: JoinedPool | None = None,
    fault: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Prove one plan, or all of the space. The document has `passed`, `results` and `notes`.

    Raises PlanError for a single plan that cannot be met; in `all` such plans are listed as refused.
    """
    _check_words(workers, steps, dtype, fault)
    if plan == "today":
        raise PlanError(
            "today is the framework's own loop; there is nothing parallel to prove: try serial, dp=2 or all"
        )
    single = None if plan == "all" else parse(plan) if isinstance(plan, str) else plan
    count = single.processes if single else workers or (joined.size if joined else usable_cores())
    if joined and single and joined.size != count:
        raise PlanError(f"{single.short()} fills {count} of the {joined.size} ranks that were started; start {count}")
    comms = _comms(single, joined)
    if single:
        check_batch(spec, single)
    started = [comm for comm in comms if comm != "openmp" and count > 1]
    with open_session(spec, objects, dict.fromkeys(started, count), joined, tell) as session:
        session.limit = limit
        missing = session.begin(("solo", *started))
        notes = list(session.known().notes)
        coupling = session.pool("solo").ask({"do": "coupling"})[0]
        if single:
            proofs = [prove(session, session.settled(single), steps, dtype, fault)]
        else:
            proofs = list(_all(session, count, comms, missing, steps, dtype, fault, tell))
        notes += told_of([proof.plan for proof in proofs if proof.status == "ok"], session.known().layout)
        results = [_record(session, proof) for proof in proofs]
    failed = [r for r in results if r["status"] == "failed" or (r["verified"] and not r["verified"]["passed"])]
    if coupling:
        notes.append(coupling)
    unmeasured = not any(r["verified"] for r in results)
    return {"passed": not failed and not coupling and not unmeasured, "results": results, "notes": notes}


def _check_words(workers: int | None, steps: int, dtype: str, fault: str | None) -> None:
    from paraxis.program.faults import FAULTS

    if steps < 1:
        raise TaskError(f"steps={steps}: a proof takes at least one step")
    if workers is not None and workers < 1:
        raise TaskError(f"workers={workers}: a plan takes at least one worker")
    if dtype not in DTYPES:
        raise TaskError(f"dtype={dtype}: it takes {' or '.join(DTYPES)}")
    if fault is not None and fault not in FAULTS:
        raise TaskError(f"fault {fault!r} is not known; there are {', '.join(FAULTS)}")


def _comms(single: Plan | None, joined: JoinedPool | None) -> tuple[str, ...]:
    if joined:
        return (joined.transport,)
    if single:
        return (single.comm,) if single.comm else ()
    return TRANSPORTS


def _all(
    session: Session,
    count: int,
    comms: tuple[str, ...],
    missing: dict[str, str],
    steps: int,
    dtype: str,
    fault: str | None,
    tell: Tell,
) -> list[Proof]:
    facts = session.known()
    layers = 2 if facts.layout.cuttable else len(facts.layers)
    sequence = any(not own.why for own in facts.layout.tokens)
    plans = space(count, layers, comms, recompute=True, hybrids=True, sequence=sequence)
    for comm in comms:  # a proof takes no time from others: every transport has what else it can carry
        plans += [plan for plan in space(count, layers, (comm,)) if plan not in plans]
    proofs = []
    for number, plan in enumerate(plans):
        if plan.processes > 1 and plan.comm in missing:
            proofs.append(Proof(plan, None, None, [], "refused", missing[plan.comm]))
            continue
        tell(f"proving {plan.label()}", number / len(plans))
        proofs.append(prove_or_tell(session, session.settled(plan), steps, dtype, fault))
    return proofs


def _record(session: Session, proof: Proof) -> dict[str, Any]:
    try:
        memory = record(session.memory(proof.plan))
    except ParaxisError:  # a plan that the task cannot meet
        memory = None
    return {
        "plan": proof.plan.text(),
        "label": proof.plan.label(),
        "program": proof.program,
        "exact": proof.plan.exact,
        "status": proof.status,
        "reason": proof.reason,
        "computed_memory": memory.model_dump() if memory else None,
        "verified": proof.verified.model_dump() if proof.verified else None,
    }
