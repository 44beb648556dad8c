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
        places = [_of_process(task, program, plan, place) for place in range(program.mesh.pp)]
        return [places[program.mesh.coordinates(rank)[1]] for rank in range(program.mesh.size)]
    ensemble = openmp.ensemble_of(task, program, hyper, plan.sync == "hogwild", dry=True)
    owners = program.mesh.dp * program.mesh.tp if program.common() else 1
    found = []
    for rank in range(program.mesh.size):
        weights, gradients, state, activations = ensemble.reserved(rank)
        found.append(Memory(weights // owners, gradients, state // owners, activations, 0))
    return found


def _of_process(task: Task, program: Program, plan: Plan, place: int) -> Memory:
    """Of a rank that is a process, whose own threads have its weights in common."""
    first = program.mesh.rank(0, place)
    ensemble = native_rank.ensemble_of(task, program, first, task.hyper(), plan.threads, dry=True)
    rows = [ensemble.reserved(thread) for thread in range(plan.threads)]
    weights, _, state, _ = rows[0]
    edges = {}
    for number, stage in enumerate(program.stages_of(first)):
        pairs = [ensemble.edges(number, thread) for thread in range(plan.threads)]
        edges[stage] = {"RecvAct": sum(a for a, _ in pairs), "RecvGrad": sum(b for _, b in pairs)}
    body = [i for name, _ in program.period for i in program.body(name)[first]]
    agrees = agreeing(program, {"": state // (2 * FLOAT)}, [""])  # the state has two numbers for each parameter
    return Memory(
        parameters=weights,
        gradients=sum(row[1] for row in rows),
        optimizer=state + agrees.kept,
        activations=sum(row[3] for row in rows),
        communication=_on_the_way(body, edges, agrees),
    )


def _on_the_way(body: Sequence[Instruction], edges: dict[int, dict[str, int]], agrees: Agreeing) -> int:
    """The most that has come in and has not been used up by its B or W, and letters of packed sums."""
    here: dict[object, int] = {}
    most = 0
    for i in body:
        if i.op in ("RecvActStart", "RecvGradStart"):
            here[i.base, i.stage, i.microbatch] = edges[i.stage][i.base]
        elif i.op in ("B", "W") and not i.segment:
            here.pop(("RecvAct", i.stage, i.microbatch), None)
            here.pop(("RecvGrad", i.stage, i.microbatch), None)
        elif i.payload and i.starts:
            here[i.token] = agrees.packed(i)
        elif i.payload and i.waits:
            here.pop(i.token)
        most = max(most, sum(here.values()))
    return most
