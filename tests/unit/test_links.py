"""Messages without tags: the links that NCCL needs, tried over Gloo with its tags left out."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from paraxis.comm.links import links
from paraxis.comm.torch_dist import DistComm, Root, _connect, _gloo
from paraxis.engine.torch_engine import TorchEngine
from paraxis.errors import PlanError
from paraxis.plan.plan import Plan, parse
from paraxis.program.instructions import Program
from paraxis.program.lower import lower
from paraxis.run.interpreter import Rank
from paraxis.task.spec import TaskSpec
from paraxis.task.task import Task, make_task

SPEC = TaskSpec(network="mlp:12-9-8-7-3", data="synthetic:64,1x3x4,3", batch=16)


def made(text: str) -> tuple[Plan, Program, list[Task]]:
    plan = parse(text)
    tasks = [make_task(SPEC, dtype=torch.float64) for _ in range(plan.mesh.size)]
    return plan, lower(plan, tasks[0].layout()), tasks


def run(text: str, store: dist.Store, tagless: bool = True) -> tuple[list[float], int]:
    """(mean losses of some steps, links that rank 0 has opened) of a plan whose ranks are threads over Gloo."""
    plan, program, tasks = made(text)

    def rank(number: int) -> tuple[list[tuple[float, float]], int]:
        root = Root("gloo", _gloo(store), _gloo(store), tagless)
        everyone = tuple(range(plan.mesh.size))
        root.known[everyone] = world = _connect(root, everyone, number)
        world.open(links(program))
        own = Rank(program, number, TorchEngine(tasks[number], program, number), world)
        own.steps(3)
        return own.engine.losses, len(root.links)

    with ThreadPoolExecutor(plan.mesh.size) as threads:
        found = list(threads.map(rank, range(plan.mesh.size)))
    rows = zip(*(losses for losses, _ in found if losses), strict=True)
    return [sum(a for a, _ in row) / sum(b for _, b in row) for row in rows], found[0][1]


@pytest.mark.parametrize(
    ("text", "opened"),
    [
        ("pp=2,microbatches=4", 2),
        ("pp=2,schedule=interleaved,microbatches=4", 6),
        ("dp=2,pp=2,microbatches=2,sync=compressed", 6),
    ],
)
def test_order_alone_names_messages(text: str, opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (plain, none), (linked, own) = run(text, dist.HashStore(), tagless=False), run(text, dist.HashStore())
    assert linked == pytest.approx(plain, rel=1e-12) and (none, own) == (0, opened)


def test_a_program_that_needs_tags_is_refused() -> None:
    _, program, _ = made("pp=2,microbatches=4")
    name, ranks = program.bodies[0]
    row = list(ranks[1])
    first, second = [n for n, i in enumerate(row) if i.op == "RecvActStart"][:2]
    row[first], row[second] = row[second], row[first]
    swapped = replace(program, bodies=((name, (ranks[0], tuple(row))), *program.bodies[1:]))
    with pytest.raises(PlanError, match=r"rank 1 takes messages in another order than rank 0 sends them.*mpi or gloo"):
        links(swapped)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1"])
def test_every_schedule_of_ours_needs_no_tags(schedule: str) -> None:
    _, program, _ = made(f"pp=2,microbatches=4,schedule={schedule}")
    found = links(program)
    assert {(0, 1, 0), (1, 0, 1)} <= set(found) and found == sorted(found)


def test_only_nccl_opens_links() -> None:
    root = Root("gloo", _gloo(dist.HashStore()), _gloo(dist.HashStore()))
    DistComm(None, None, (0, 1), 0, root).open([(0, 1, 0)])
    assert not root.links
