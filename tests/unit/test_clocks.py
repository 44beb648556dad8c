"""Clocks of several hosts: an offset that is known is found, over links with delays."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from threading import Barrier
from typing import Any

import pytest
from torch import Tensor

from paraxis.comm import clocks
from paraxis.comm.clocks import aligned, offset, one_clock

AHEAD = {0: 0, 1: 3_000_000_000, 2: -70_000_000}  # nanoseconds that a rank's host is ahead of rank 0's


@dataclass
class Link:
    """What ranks in threads talk through: letters that take a while, now and then a long one."""

    size: int
    letters: dict[tuple[int, int], Queue[int]] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.size)
        self.letters = {(a, b): Queue() for a in range(self.size) for b in range(self.size)}


@dataclass
class Later:
    """A transfer whose work is done when it is waited for."""

    act: Callable[[], Any]

    def wait(self) -> None:
        self.act()


@dataclass
class Threaded:
    """One rank of a link."""

    link: Link
    rank: int

    @property
    def size(self) -> int:
        return self.link.size

    def send(self, tensor: Tensor, peer: int, tag: int) -> Later:
        value = int(tensor)
        time.sleep(random.choice([5e-5, 5e-5, 5e-5, 4e-3]))
        return Later(lambda: self.link.letters[self.rank, peer].put(value))

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Later:
        return Later(lambda: tensor.fill_(self.link.letters[peer, self.rank].get(timeout=10)))

    def all_reduce(self, tensor: Tensor) -> None:
        self.link.sums[self.rank] = tensor.clone()
        self.link.barrier.wait(10)
        tensor.copy_(sum(self.link.sums.values()))
        self.link.barrier.wait(10)


def on_ranks(act: Callable[[Any], Any], size: int = 3) -> list[Any]:
    """What every rank of a new link makes of it."""
    link = Link(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: act(Threaded(link, rank)), range(size)))


def test_a_known_offset_is_found() -> None:
    found = on_ranks(lambda world: offset(world, lambda: time.perf_counter_ns() + AHEAD[world.rank]))
    assert found[0] == 0
    for rank in (1, 2):  # the delays are milliseconds: only the fastest round trips tell
        assert found[rank] == pytest.approx(-AHEAD[rank], abs=2_000_000)


def test_ranks_know_whether_they_share_a_clock() -> None:
    assert on_ranks(lambda world: one_clock(world, 7)) == [True] * 3
    assert on_ranks(lambda world: one_clock(world, 7 + (world.rank == 2))) == [False] * 3
    assert clocks.host() == clocks.host() > 0


def test_stamps_of_one_host_stay_and_those_of_several_are_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "offset", lambda world: 1000 * world.rank)
    traces = [("step", [[5, 8]])]
    assert on_ranks(lambda world: aligned(world, traces, mine=1)) == [traces] * 3
    shifted = on_ranks(lambda world: aligned(world, traces, mine=world.rank))
    assert shifted == [[("step", [[5 + 1000 * r, 8 + 1000 * r]])] for r in range(3)]
