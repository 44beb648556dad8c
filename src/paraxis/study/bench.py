"""Where trials run: resident ranks, kept from trial to trial, and what one trial does on them."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from paraxis.errors import ParaxisError
from paraxis.measure.facts import Facts
from paraxis.measure.machine import ForeignLoad, describe, usable_cores
from paraxis.plan.plan import Plan, parse
from paraxis.run.joined import JoinedPool
from paraxis.run.launch import Pool
from paraxis.session import Session, Tell, check_batch, failure, open_session
from paraxis.study.definition import plan_text, spec_of
from paraxis.study.sampling import Sampled, sample
from paraxis.study.trial import Factors, TrialStatus
from paraxis.task.spec import TaskSpec

RULES = "paraxis.study.reach"  # its by_rule(session, spec, plan, factors) gives (measures, series, why one is null)


@dataclass(frozen=True)
class Outcome:
    """What came of a trial."""

    status: TrialStatus
    reason: str | None = None
    sampled: Sampled = field(default_factory=Sampled)
    plan: str | None = None
    oversubscribed: bool = False
    machine: dict[str, Any] | None = None


@dataclass
class Bench:
    """Ranks that stay between trials, in two sets: those that outnumber the usable cores yield to each other.

    `facts` are kept by everything they depend on but the seed, for it takes about a second to measure them.
    """

    joined: JoinedPool | None
    tell: Tell
    seconds: float  # how long step times are sampled
    vary_seed: bool
    stack: ExitStack
    sessions: dict[bool, Session] = field(default_factory=dict)
    facts: dict[tuple[Any, ...], Facts] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def perform(self, factors: Factors, repeat: int, measures: Collection[str]) -> Outcome:
        """Run one trial; what the task or the plan forbids, or what goes wrong on the way, is an outcome, too."""
        plan: Plan | None = None
        workers, load = 1, ForeignLoad([])
        status: TrialStatus = "ok"
        reason: str | None = None
        try:
            spec = spec_of(factors, repeat if self.vary_seed else 0)
            if factors.get("rule") == "theirs":
                from paraxis.study.theirs import train_as_they_did

                sampled, workers = train_as_they_did(spec, factors), int(factors.get("workers", 1))
            else:
                plan = parse(plan_text(factors))
                workers = plan.workers
                check_batch(spec, plan)
                session = self._session(spec, plan)
                load = ForeignLoad([pid for pool in session.pools.values() for pid in pool.pids])
                plan = session.settled(plan)
                if plan.engine != "plain":
                    session.program(plan)
                if "rule" in factors:  # a procedure's own way to run a trial
                    found = import_module(RULES).by_rule(session, spec, plan, factors)
                    sampled, reason = Sampled(found[0], found[1]), found[2] or None
                else:
                    sampled = sample(session, plan, factors, measures, self.seconds)
        except ParaxisError as error:
            sampled = Sampled()
            state, reason = failure(error)
            status = "refused" if state == "refused" else "failed"
        text, over = plan.text() if plan else None, workers > usable_cores()
        return Outcome(status, reason, sampled, text, over, self._machine(load))

    def _session(self, spec: TaskSpec, plan: Plan) -> Session:
        """The session of a plan's ranks, the task in their hands; as many are started as are wanted by now."""
        crowded = plan.processes > usable_cores() and not self.joined
        if crowded not in self.sessions:
            opened = open_session(spec, {}, {}, self.joined, self.tell)
            self.sessions[crowded] = self.stack.enter_context(opened)
        session = self.sessions[crowded]
        if plan.processes > session.sizes.get(plan.comm, 1) and not self.joined:
            session.sizes[plan.comm] = plan.processes
            if isinstance(small := session.pools.pop(plan.comm, None), Pool):
                small.close()
        session.pools = {name: pool for name, pool in session.pools.items() if pool.alive()}
        session.respec(spec)
        session.begin(("solo",))
        session.home(plan)
        key = spec.network, spec.data, spec.batch, spec.bn_group, spec.validation
        session.facts = self.facts.get(key)
        self.facts[key] = replace(session.known(), first_batch=0)  # of another seed's first batch it says nothing
        return session

    def _machine(self, load: ForeignLoad) -> dict[str, Any]:
        """The machine, and how many cores other programs took during the trial."""
        self.machine = self.machine or describe().model_dump(exclude={"load_before", "load_after", "foreign_cores"})
        return self.machine | {"foreign_cores": round(load.cores(), 2)}


@contextmanager
def open_bench(joined: JoinedPool | None, tell: Tell, seconds: float, vary_seed: bool) -> Iterator[Bench]:
    """A bench on which nothing runs yet; its ranks end with it, however it ends."""
    with ExitStack() as stack:
        yield Bench(joined, tell, seconds, vary_seed, stack)
