"""Clocks of several hosts read as one. Within a host all processes read the same clock, and nothing is done."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from zlib import crc32

import torch

from paraxis.comm.base import Comm

Stamps = list[tuple[str, list[list[int]]]]  # of a rank's steps: the body's name, nanoseconds of its instructions
TAG = 1  # no program is under way then
ROUNDS, KEPT = 40, 10  # round trips, and how many of the fastest are believed
BOOT = Path("/proc/sys/kernel/random/boot_id")  # containers of one host share it, as they share its clock


def host() -> int:
    """A number of whatever the clock of this process belongs to."""
    return crc32((BOOT.read_text() if BOOT.exists() else platform.node()).encode())


def one_clock(world: Comm, mine: int) -> bool:
    """Whether all ranks are on one host; every rank must ask."""
    hosts = torch.zeros(world.size, dtype=torch.int64)
    hosts[world.rank] = mine
    world.all_reduce(hosts)
    return bool((hosts == mine).all())


def offset(world: Comm, now: Callable[[], int] = time.perf_counter_ns) -> int:
    """Nanoseconds to add to this rank's clock to read that of rank 0; every rank must ask.

    Cristian (1989), Probabilistic clock synchronization: a rank asks for the time, and takes the answer for that of the
    middle of the round trip. It errs by at most half of the round trip, so the fastest ones are believed.
    """
    letter = torch.zeros(1, dtype=torch.int64)
    if world.rank == 0:
        for peer in range(1, world.size):
            for _ in range(ROUNDS):
                world.receive(letter, peer, TAG).wait()
                letter[0] = now()
                world.send(letter, peer, TAG).wait()
        return 0
    found = []
    for _ in range(ROUNDS):
        asked = now()
        world.send(letter, 0, TAG).wait()
        world.receive(letter, 0, TAG).wait()
        told = now()
        found.append((told - asked, int(letter) - (asked + told) // 2))
    return round(median(difference for _, difference in sorted(found)[:KEPT]))


def aligned(world: Comm, traces: Stamps, mine: int | None = None) -> Stamps:
    """The stamps as rank 0's clock would have shown them; every rank must ask."""
    if one_clock(world, host() if mine is None else mine):
        return traces
    shift = offset(world)
    return [(name, [[stamp + shift for stamp in row] for row in rows]) for name, rows in traces]
