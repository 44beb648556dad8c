"""In mixed precision the computed memory of a GPU's plans is what hooks count there: its own operations are tried."""

from pathlib import Path

import pytest
import torch
from test_memory import counted, named
from test_reference import HEAD, TASKS, spec_of

from paraxis.engine.devices import move
from paraxis.engine.torch_engine import TorchEngine
from paraxis.measure.saved import measure_sizes
from paraxis.plan.plan import Plan, parse
from paraxis.program.lower import lower
from paraxis.program.memory import Memory, memory
from paraxis.run import reference
from paraxis.run.held import counting
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda:0")
NORMS = {
    "norms": (
        HEAD
        + """
def net():
    wide = nn.Linear(6, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.LayerNorm(32)
    return nn.Sequential(*wide, nn.Linear(32, 3))
def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(256, 6, generator=g), torch.randint(0, 3, (256,), generator=g)) for _ in range(3)]
""",
        {"lr": 0.1},
    )
}


def on_gpu(spec: TaskSpec, plan: Plan) -> tuple[Memory, int]:
    """(computed from a few samples, counted activations) of a plan of one rank."""
    tried, task = make_task(spec), make_task(spec)
    move(tried, [tried.chain], GPU)
    sizes, program = measure_sizes(tried, precision=plan.precision, most=4), lower(plan, task.layout(), 3)
    (rank,) = reference.start(program, lambda r: TorchEngine(task, program, r, GPU))
    reference.run_steps([rank], 1)
    with counting(rank) as count:
        reference.run_steps([rank], 1)
    return memory(program, plan, sizes, task.batch)[0], count.peak


CASES = [(name, "bf16") for name in ("mlp", "transformer", "batch norm", "gpt", "norms")] + [("cnn", "fp16")]


@pytest.mark.parametrize("text", ["microbatches=2", "microbatches=2,recompute=all"])
@pytest.mark.parametrize("name, precision", CASES)
def test_activations_are_the_counted_ones(name: str, precision: str, text: str, folder: Path) -> None:
    spec = named(folder, name) if name == "gpt" else spec_of(folder, name, *(TASKS | NORMS)[name])
    computed, found = on_gpu(spec, parse(f"{text},device=cuda,precision={precision}"))
    assert computed.activations == pytest.approx(found, rel=0.01)


def test_the_lists_of_a_cpu_are_others(folder: Path) -> None:
    """Mutant: tried on the CPU, whose layer norms take 16 bits as they come; a GPU's are given 32."""
    spec = spec_of(folder, "norms", *NORMS["norms"])
    (elsewhere,), _ = counted(spec, parse("precision=bf16"))
    assert elsewhere.activations < 0.9 * on_gpu(spec, parse("precision=bf16,device=cuda"))[1]
