"""What the emulated GPU forbids: each rule of a real one that its tests rely on is kept."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_reference import TASKS, WRONG, difference, spec_of
from test_staged import trained

from paraxis.comm.staged import THROUGH_HOST, Staging
from paraxis.plan.plan import parse

EMULATED = torch.cuda.is_available() and torch.cuda.get_device_name() == "emulated GPU"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not EMULATED, reason="needs the emulated GPU: make emulated")]
GPU = torch.device("cuda:0")


@pytest.mark.parametrize("touch", ["ctypes.string_at(t.data_ptr(), 8)", "ctypes.memset(t.data_ptr(), 0, 8)"])
def test_the_host_cannot_touch_its_memory(touch: str) -> None:
    code = f"import ctypes, torch; t = torch.ones(8, device='cuda'); print(t.sum().item(), flush=True); {touch}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -11 and done.stdout == "8.0\n", done.stderr


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, b: a + b,
        lambda a, b: a @ b.view(4, 1),
        lambda a, b: torch.cat([a, b]),
        lambda a, b: b.add_(a),
    ],
)
def test_devices_do_not_mix(mix: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mix(torch.ones(4, device=GPU), torch.ones(4))
    if torch.cuda.device_count() > 1:
        with pytest.raises(RuntimeError, match=r"cuda:[01] and cuda:[01]"):
            mix(torch.ones(4, device=GPU), torch.ones(4, device="cuda:1"))


def test_numbers_may_come_from_the_host_but_not_be_written_there() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.tensor(2.0).add_(torch.tensor(2.0, device=GPU))
    assert (torch.ones(4, device=GPU) * torch.tensor(2.0)).tolist() == [2.0] * 4


def test_what_has_not_been_written_is_nan_and_what_is_gone_is_counted() -> None:
    before = torch.cuda.memory_allocated()
    fresh = torch.empty(1000, device=GPU)
    assert torch.cuda.memory_allocated() == before + 4096  # in grains of 512
    assert fresh.isnan().all()
    del fresh
    assert torch.cuda.memory_allocated() == before


def test_more_than_its_limit_is_out_of_memory() -> None:
    torch.cuda.set_per_process_memory_fraction(1e6 / torch.cuda.get_device_properties(GPU).total_memory, GPU)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.empty(1_000_000, device=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def test_who_does_not_wait_for_a_copy_reads_nothing() -> None:
    there = torch.empty(4, pin_memory=True)
    there.copy_(torch.arange(4.0, device=GPU), non_blocking=True)
    assert there.isnan().all()
    torch.cuda.synchronize()
    assert there.tolist() == [0, 1, 2, 3]


def test_a_copy_to_it_reads_the_host_as_late_as_may_be() -> None:
    here = torch.zeros(4).pin_memory()
    there = here.to(GPU, non_blocking=True)
    here.fill_(7)
    assert there.tolist() == [7] * 4


def test_ranks_that_do_not_wait_for_their_copies_are_found(folder: Path) -> None:
    hasty = Staging(THROUGH_HOST.room, lambda _: None)
    spec, plan = spec_of(folder, "tiny", *TASKS["tiny"]), parse("pp=2,microbatches=4,devices=cuda:0+cpu")
    assert not difference(spec, plan, trained(spec, plan, hasty)) < WRONG


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle(), stream=torch.cuda.Stream(GPU)):
        run()
    return graph


def test_a_capture_takes_down_and_a_replay_does() -> None:
    x, y = torch.ones(4, device=GPU), torch.zeros(4, device=GPU)
    graph = captured(lambda: y.add_(x * 2))
    assert y.tolist() == [0] * 4
    x.fill_(5)
    graph.replay()
    graph.replay()
    assert y.tolist() == [20] * 4


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda _: torch.cuda.synchronize(), lambda x: x.nonzero()]
)
def test_a_capture_cannot_wait(wait: Callable[[torch.Tensor], None]) -> None:
    x = torch.ones(4, device=GPU)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(lambda: wait(x))
    assert x.sum().item() == 4


def test_a_replay_finds_memory_that_is_gone() -> None:
    gone, y = [torch.ones(4, device=GPU)], torch.zeros(4, device=GPU)
    graph = captured(lambda: y.add_(gone[0]))
    gone.clear()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        graph.replay()


def test_captures_of_a_pool_share_memory() -> None:
    pool, stream, y = torch.cuda.graph_pool_handle(), torch.cuda.Stream(GPU), torch.zeros(4, device=GPU)
    addresses, graphs = [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool, stream=stream):
            made = y + 1
            addresses.append(made.data_ptr())
            del made
    assert addresses[0] == addresses[1]
