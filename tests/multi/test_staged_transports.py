"""Staged transfers between real processes: the whole protocol, with every tensor out of the transport's reach."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import sys
import torch
from paraxis.comm.exchange import parts
from paraxis.comm.staged import StagedComm, Staging

copied = []
def room(tensor):
    copied.append(tensor.numel())
    return torch.empty_like(tensor)

if sys.argv[1] == "mpi":
    from paraxis.comm.mpi import world
    inner = world()
else:
    from paraxis.comm.torch_dist import world
    inner = world("gloo", f"tcp://127.0.0.1:{sys.argv[2]}", int(sys.argv[3]), 3)
comm = StagedComm(inner, Staging(room, lambda tensor: None))
rank, size = comm.rank, comm.size
on, back = (rank + 1) % size, (rank - 1) % size
for dtype in (torch.float32, torch.float64):
    there, here = torch.full((5,), rank, dtype=dtype), torch.empty(5, dtype=dtype)
    receive, send = comm.receive(here, back, 3), comm.send(there, on, 3)
    receive.wait(), send.wait()
    assert receive.ready() and here.tolist() == [back] * 5, here
    total = torch.arange(6, dtype=dtype) * (rank + 1)
    comm.all_reduce(total)
    assert total.tolist() == [6.0 * k for k in range(6)]
    again = torch.arange(6, dtype=dtype)
    comm.all_reduce_start(again).wait()
    assert again.tolist() == [3.0 * k for k in range(6)]
    for start in (True, False):
        sums = torch.arange(6, dtype=dtype) + rank
        comm.reduce_scatter_start(sums).wait() if start else comm.reduce_scatter(sums)
        assert parts(sums, 3)[rank].tolist() == [3 * (2 * rank + k) + 3 for k in range(2)], sums
        gathered = torch.full((6,), -1, dtype=dtype)
        parts(gathered, 3)[rank].fill_(rank)
        comm.all_gather_start(gathered).wait() if start else comm.all_gather(gathered)
        assert gathered.tolist() == [0, 0, 1, 1, 2, 2], gathered
letter = torch.empty(4, dtype=torch.uint8) if rank else torch.arange(4, dtype=torch.uint8)
if rank < 2:
    pair = comm.group([0, 1])
    (pair.send if rank == 0 else pair.receive)(letter, 1 - rank, 0).wait()
    assert letter.tolist() == [0, 1, 2, 3]
comm.barrier()
assert len(copied) > 12
print("fine")
"""


@pytest.mark.slow
def test_the_protocol_over_gloo(desk: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = desk.write("staged.py", SCRIPT)
    words = ("gloo", port)
    ranks = [desk.start(script, *words, r, program=(sys.executable,), GLOO_SOCKET_IFNAME="lo") for r in range(3)]
    ends = [rank.finish(60) for rank in ranks]
    assert [(end.rc, end.out) for end in ends] == [(0, "fine\n")] * 3, [end.err for end in ends]


@pytest.mark.slow
def test_the_protocol_over_mpi(desk: Any) -> None:
    pytest.importorskip("mpi4py")
    script = desk.write("staged.py", SCRIPT)
    here = Path(sys.executable)
    done = desk.launch("mpiexec", "-n", 3, "--oversubscribe", here, "-m", "mpi4py", script, "mpi")
    assert (done.rc, done.out) == (0, "fine\n" * 3), done.err
