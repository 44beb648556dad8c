"""The transports themselves, between real processes."""

import socket
from sys import executable
from typing import Any

UNLIKE = """
import sys, torch
from paraxis.comm.torch_dist import world

port, rank = int(sys.argv[1]), int(sys.argv[2])
everyone = world("gloo", f"tcp://127.0.0.1:{port}", rank, 4)
if rank < 2:
    pair = everyone.group([0, 1])
    pair.barrier()
if rank < 3:  # ranks 0 and 1 have made a group before, rank 2 has not, rank 3 sleeps
    three = everyone.group([0, 1, 2])
    total = torch.tensor([float(rank + 1)])
    three.all_reduce(total)
    there, back = three.send(total * rank, (rank + 1) % 3, 7), torch.zeros(1)
    three.receive(back, (rank - 1) % 3, 7).wait()
    there.wait()
    print(total.item(), back.item())
everyone.barrier()
"""


def test_gloo_groups_of_ranks_with_unlike_pasts(desk: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = desk.write("unlike.py", UNLIKE)
    ranks = [desk.start(script, port, rank, program=(executable,), GLOO_SOCKET_IFNAME="lo") for rank in range(4)]
    ends = [rank.finish(60) for rank in ranks]
    assert [end.rc for end in ends] == [0] * 4, [end.err for end in ends]
    assert [end.out.split() for end in ends] == [["6.0", "12.0"], ["6.0", "0.0"], ["6.0", "6.0"], []]
