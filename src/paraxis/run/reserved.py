"""The memory of a plan of the native engine: C++ tells what it would reserve, without reserving it."""

from collections.abc import Sequence

from paraxis.engine import native_rank
from paraxis.plan.plan import Plan
from paraxis.program.agreeing import FLOAT, Agreeing, agreeing
from paraxis.program.instructions import Instruction, Program
from paraxis.program.memory import Memory
from paraxis.run import openmp
from paraxis.task.task import Task


def native_memory(task: Task, program: Program, plan: Plan) -> list[Memory]:
    """Of every rank; raises PlanError for what C++ cannot do.

    Threads that have one copy of the weights (and of what the optimiser keeps of them) count a part of it each, so that
    the memory of the process is the sum of its ranks'. C++ reserves activations of all microbatches at once.
    """
    hyper = task.hyper()
    if plan.processes > 1:
        stages = [_of_process(task, program, plan, stage) for stage in range(len(program.stages))]
        return [stages[program.mesh.coordinates(rank)[1]] for rank in range(program.mesh.size)]
    ensemble = openmp.ensemble_of(task, program, hyper, plan.sync == "hogwild", dry=True)
    owners = program.mesh.dp if program.common() else 1
    found = []
    for rank in range(program.mesh.size):
        weights, gradients, state, activations, _, _ = ensemble.reserved(rank)
        found.append(Memory(weights // owners, gradients, state // owners, activations, 0))
    return found


def _of_process(task: Task, program: Program, plan: Plan, stage: int) -> Memory:
    """Of a rank that is a process, whose own threads have its weights in common."""
    ensemble = native_rank.ensemble_of(task, program, stage, task.hyper(), plan.threads, dry=True)
    rows = [ensemble.reserved(thread) for thread in range(plan.threads)]
    weights, _, state, _, _, _ = rows[0]
    entering, leaving = (sum(row[n] for row in rows) for n in (4, 5))
    body = [i for name, _ in program.period for i in program.body(name)[program.mesh.rank(0, stage)]]
    agrees = agreeing(program, {"": state // (2 * FLOAT)}, [""])  # the state has two numbers for each parameter
    return Memory(
        parameters=weights,
        gradients=sum(row[1] for row in rows),
        optimizer=state + agrees.kept,
        activations=sum(row[3] for row in rows),
        communication=_on_the_way(body, entering, leaving, agrees),
    )


def _on_the_way(body: Sequence[Instruction], entering: int, leaving: int, agrees: Agreeing) -> int:
    """The most that has come in and has not been used up by its backward, and letters of packed sums."""
    here: dict[object, int] = {}
    most = 0
    for i in body:
        if i.op in ("RecvActStart", "RecvGradStart"):
            here[i.base, i.microbatch] = entering if i.base == "RecvAct" else leaving
        elif i.op == "B" and not i.segment:
            here.pop(("RecvAct", i.microbatch), None)
            here.pop(("RecvGrad", i.microbatch), None)
        elif i.payload and i.starts:
            here[i.token] = agrees.packed(i)
        elif i.payload and i.waits:
            here.pop(i.token)
        most = max(most, sum(here.values()))
    return most
