"""The experiment: the space of plans -> prove -> measure in interleaved rounds -> recommend."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from paraxis import __version__
from paraxis.accuracy import learn, reserve
from paraxis.errors import MissingError, ParaxisError, TaskError
from paraxis.fitting import record
from paraxis.measure import records
from paraxis.measure.explain import explain_today, fill
from paraxis.measure.machine import describe, pinned, usable_cores
from paraxis.measure.records import Baseline, Machine, MeshRecord, Result, Roof, Study
from paraxis.measure.roofline import roofline
from paraxis.measure.samples import Book
from paraxis.measure.speed import with_speeds
from paraxis.measure.statistics import ENOUGH, paired
from paraxis.plan.devices import crowded, untried
from paraxis.plan.plan import Plan
from paraxis.plan.precision import told_of_precision
from paraxis.plan.space import in_bf16, on_gpus, space, told_of_space
from paraxis.program.cut import told_of
from paraxis.proof import prove, steps_for
from paraxis.recommend import recommend
from paraxis.rounds import SHORTEST, Clock, Row, baseline_of, chunk, compared, lost, measure, together
from paraxis.run.joined import JoinedPool
from paraxis.session import Session, Tell, failure, open_session
from paraxis.task.spec import TaskSpec

UNTRIED = (
    "plans marked untried: the authors had no two GPUs, and have never run them: trust their proofs, not their names"
)
PROOF_STEPS = 4
REPORTING = 6.0  # seconds of the budget kept for the statistics and the report
LEAST = 3  # plans whatever the budget: today, and the first ones with one worker and with several
PROOF_SHARE = 0.6  # of the budget left after start-up: what is not set up and proved by then is not reached
RACING = 1.3  # what is kept for measuring, in times that six rounds of all plans take
Save = Callable[[Study], None]


def explore_task(
    spec: TaskSpec,
    objects: dict[str, Any],
    workers: int | None,
    budget: float,
    comms: tuple[str, ...],
    tell: Tell,
    save: Save,
    joined: JoinedPool | None = None,
    book: Book | None = None,
    accuracy: bool = True,
    limit: int | None = None,
) -> Study:
    """Find out what each plan buys. `save` is called with every better version of the study, the last one whole.

    Samples go into `book` as they come; what it holds already is gone on with. `accuracy` says whether a share of the
    budget goes into what plans learn; `limit` are the bytes that a rank may hold. Raises TaskError for a task that
    cannot be trained at all, or is not that of the book; a plan that fails is a row, not an error.
    """
    book = book or Book()
    if not budget > 0 or (workers is not None and workers < 1):
        raise TaskError(f"budget={budget:g}, workers={workers}: both must be above 0")
    clock = Clock(budget - min(REPORTING, 0.2 * budget))
    count = workers or (joined.size if joined else usable_cores())
    comms = (joined.transport,) if joined else comms
    started = [comm for comm in comms if comm != "openmp" and count > 1]
    with open_session(spec, objects, dict.fromkeys(started, count), joined, tell) as session:
        session.limit = limit
        session.patience = max(60.0, budget)  # beyond it, ranks wait for each other: no plan may cost more than all
        missing = session.begin(("solo", *started))
        missing |= _over_nccl(session)
        facts = session.known()
        study = _empty(spec, session, count)
        study.notes += facts.notes
        if "mpi" in session.pools:
            study.machine.mpi = session.pools["mpi"].facts["library"]
        rows = _rows(session, count, comms, missing, book)
        study.notes += _told(session, rows, comms if count > 1 else ())
        today = _today(session)
        book.agrees(study.task, study.machine, [row.plan.text() for row in (today, *rows)])
        kept = min(reserve(session, budget), max(0.0, clock.left() / 4)) if accuracy else 0.0
        every, shorter = [today, *rows], Clock(clock.budget - kept, clock.start)
        try:
            _set_up(session, every, shorter, lambda: _publish(study, session, today, rows, save))
            measure(session, every, shorter, study, book, spare=kept)
            _traffic(session, [r for r in rows if r.live])
            _publish(study, session, today, rows, save)
            if accuracy:
                learn(session, every, study, clock, budget)
            study.finished = True
        finally:
            study.elapsed_seconds = clock.spent()
            _publish(study, session, today, rows, save)
    return study


def _over_nccl(session: Session) -> dict[str, str]:
    """Ranks for the GPUs, where there are several; why there are none."""
    if session.joined or session.gpus() < 2:
        return {"nccl": "comm=nccl joins GPUs, of which there are not several here"}
    session.sizes["nccl"] = session.gpus()
    try:
        return session.begin(("nccl",))
    except ParaxisError as error:
        return {"nccl": str(error)}


def _empty(spec: TaskSpec, session: Session, workers: int) -> Study:
    facts = session.known()
    task = spec.model_dump() | {"batch": facts.batch, "parameters": facts.parameters, "workers": workers}
    task |= {"name": facts.network, "layers": len(facts.layers), "steps_per_epoch": facts.steps_per_epoch}
    machine = with_speeds(describe())  # the ranks are up and asleep
    machine.pinning = pinned(session.quiet)
    study = Study(
        task=task, machine=machine, today=None, baseline=None, results=[], recommendation=None, version=__version__
    )
    study.roofline = _roofs(session, machine)
    return study


def _roofs(session: Session, machine: Machine) -> list[Roof]:
    """The layers, measured in PyTorch with its default threads, under what as many cores were measured to do."""
    facts, flops, carried = session.known(), machine.flops_per_second, machine.memory_bytes_per_second
    if flops is None or carried is None:
        return []
    alone = session.pool("solo").facts["threads"] == 1
    peaks = (flops.one_core, carried.one_core) if alone else (flops.all_cores, carried.all_cores)
    return roofline(facts.work, facts.forward, facts.backward, *peaks)


def _rows(session: Session, workers: int, comms: tuple[str, ...], missing: dict[str, str], book: Book) -> list[Row]:
    """Every plan of the space; those that the task cannot meet, or whose transport is missing, are refused at once."""
    facts = session.known()
    layers = 2 if facts.layout.cuttable else len(facts.layers)  # so that the refusal is listed once a kind
    rows, gpus = [], session.gpus()
    words: Any = {"recompute": session.limit is not None, "hybrids": workers >= 4, "native": _takes_native(session)}
    plans = space(workers, layers, comms, **words, sequence=any(not own.why for own in facts.layout.tokens))
    plans = [*on_gpus(0 if comms == ("openmp",) else gpus, workers, layers, comms), *plans]
    for plan in [*plans, *in_bf16(plans)]:
        row = Row(plan, plan.text(), blank(plan))
        if plan.on_gpu() and (shared := crowded(plan, gpus, plan.mesh.size)):
            row.result.label += f" ({shared[1]} ranks on {shared[0]})"
        row.result.label += " (untried)" * untried(plan, gpus)
        try:
            if plan.comm in missing and plan.processes > 1:
                raise MissingError(missing[plan.comm])
            row.plan = book.cut(plan) or session.settled(plan)
            row.result.plan = row.plan.text()
            row.result.computed_memory = record(session.memory(row.plan))
            row.result.program = session.program(row.plan).digest()
        except ParaxisError as error:
            row.result.status, row.result.reason = failure(error)
        rows.append(row)
    return rows


def _told(session: Session, rows: list[Row], comms: tuple[str, ...]) -> list[str]:
    """What one must know of the plans to read the figures."""
    told = [UNTRIED] * any(untried(row.plan, session.gpus()) for row in rows)
    told += told_of([row.plan for row in rows if row.live], session.known().layout)
    return told + told_of_space(comms, _takes_native(session))


def _takes_native(session: Session) -> bool:
    """Whether the native engine is there and takes the network."""
    try:
        return session.memory(Plan(engine="native")) is not None
    except ParaxisError:
        return False


def blank(plan: Plan) -> Result:
    """The record of a plan of which nothing is known yet."""
    return Result(
        plan=plan.text(),
        label=plan.label(),
        mesh=MeshRecord(dp=plan.dp, pp=plan.pp, tp=plan.tp),
        schedule=plan.schedule,
        engine=plan.engine,
        comm=plan.comm or None,
        threads=plan.threads,
        workers=plan.workers,
        status="ok",
        exact=plan.exact,
        oversubscribed=plan.workers > usable_cores(),
    )


def _today(session: Session) -> Row:
    """The user's own way: one process, the framework's default threads; a GPU if there is one."""
    threads = session.pool("solo").facts["threads"]
    plan = Plan(engine="plain", threads=threads, device="cuda" if session.gpus() else "cpu")
    row = Row(plan, "today", blank(plan))
    row.result.computed_memory = record(session.memory(plan))
    return row


def _set_up(session: Session, rows: list[Row], clock: Clock, publish: Callable[[], None]) -> None:
    """Prove every plan and time it once; the budget may end this early.

    It is early if those that are proved would else not have the rounds that it takes to tell them apart, and some more
    for the fastest.
    """
    until = clock.spent() + PROOF_SHARE * clock.left()
    for number, row in enumerate(row for row in rows if row.live):
        needed = RACING * ENOUGH * sum(other.cost for other in rows if other.live)
        if number >= LEAST and (clock.spent() > until or clock.left() < needed):
            row.result.status, row.result.reason = "not run", "the budget was spent before its turn; raise --budget"
            continue
        session.tell(f"proving {row.plan.label()}", clock.spent() / clock.budget)
        try:
            _prove_row(session, row)
            _time_once(session, row)
            _memory(session, row)
        except ParaxisError as error:
            row.result.status, row.result.reason = failure(error)
            if not session.home_alive(row.plan):
                lost(session, rows, row)
        publish()


def _prove_row(session: Session, row: Row) -> None:
    if row.plan.engine == "plain":
        session.setup(row.key, row.plan)
        return
    steps = steps_for(row.plan, PROOF_STEPS, session.known().steps_per_epoch)
    proof = prove(session, row.plan, steps, "float32", key=row.key, keep=True)
    row.result.verified, row.result.losses = proof.verified, list(proof.losses)
    if proof.verified and not proof.verified.passed:
        row.result.status, row.result.reason = (
            "failed",
            f"not equal to {proof.verified.against}: {proof.verified.where}",
        )


def _time_once(session: Session, row: Row) -> None:
    """A few steps to know how many make a chunk."""
    if not row.live:
        return
    answers = chunk(session, row, warm=1, steps=2, trace=0)
    guess = answers[0]["seconds"] / 2
    row.cost = SHORTEST + 2 * guess  # a chunk has a step at least, and one before it
    row.steps = max(1, min(2000, round(0.1 / guess)))


def _memory(session: Session, row: Row) -> None:
    """Peak bytes of the rank that needs most, resident as if the plan were alone in its process, and of its GPU."""
    if row.live:
        row.result.peak_memory_bytes = max(session.ask(row.key, row.plan, {"do": "memory"}))
    if row.live and row.plan.on_gpu():
        found = session.ask(row.key, row.plan, {"do": "device_memory"})
        row.result.devices = [own["device"] for own in found]
        row.result.peak_device_memory_bytes = max(own["bytes"] for own in found)
    if row.live and row.plan.compile:
        row.result.compile_seconds = max(own or 0.0 for own in session.ask(row.key, row.plan, {"do": "compiling"}))


def _traffic(session: Session, rows: list[Row]) -> None:
    """Bytes that all ranks together send in a step."""
    for row in rows:
        try:
            answers = session.ask(row.key, row.plan, {"do": "traffic"})
        except ParaxisError:
            continue
        row.result.bytes_communicated = round(sum(answers))


def _publish(study: Study, session: Session, today: Row, rows: list[Row], save: Save) -> None:
    """Fill in every figure that follows from what has been measured so far, and hand the study out."""
    study.results = [row.result for row in rows]
    study.today = today.result if today.times else None
    serial = [row for row in rows if row.plan.mesh.size == 1 and row.times]
    best = baseline_of([today, *rows])
    plainest = [row for row in reversed(serial) if row.plan.threads == 1]  # on a GPU: eager, in fp32
    ones = {(row.plan.engine, row.plan.on_gpu()): row for row in plainest}
    if best is not None:
        study.baseline = Baseline(plan=best.result.plan, step_seconds=best.sorted.record())
    for row in (today, *rows):
        one = ones.get(("native" if row.plan.engine == "native" else "torch", row.plan.on_gpu()))
        _derive(row, session, today, best, one, study)
    study.recommendation = recommend(study, *compared([today, *rows]))
    save(study)


def _derive(row: Row, session: Session, today: Row, best: Row | None, one: Row | None, study: Study) -> None:
    result = row.result
    if not row.times:
        return
    result.step_seconds = row.sorted.record()
    result.samples_per_second = study.task["batch"] / result.step_seconds.median
    result.vs_today = paired(*together(row, today)) if today.times else None
    if best is not None:
        result.speedup = _times_as_fast(row, best)
    if one is not None and one.times and (times := _times_as_fast(row, one)) is not None:
        result.efficiency = times / result.workers
    if row.plan.engine == "plain":
        explain_today(result, session.known_on(row.plan), study.machine)
    elif row.windows:
        fill(result, session.program(row.plan), row.windows, row.times, session.known_on(row.plan), study.machine)
    if told := told_of_precision(row.plan):
        result.explanation = f"{result.explanation or ''} {told}".strip()


def _times_as_fast(row: Row, other: Row) -> float | None:
    """The ratio of their medians, over the rounds that both had: the machine's pace may change behind one's last."""
    mine, theirs = together(row, other)
    return median(theirs.values()) / median(mine.values()) if mine and theirs else None


def save_to(folder: Path) -> Save:
    """A `save` that writes study.json at every call."""
    return lambda study: (records.write(study, folder), None)[1]
