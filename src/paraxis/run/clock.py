"""What is read between the instructions of a traced step: the clock of the host, or marks in the stream of a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import torch


@dataclass(frozen=True)
class Clock:
    """`read` makes a mark; `told` says of rows of marks, once the last one is reached, their nanoseconds by the host's
    clock (perf_counter_ns)."""

    read: Callable[[], Any]
    told: Callable[[Sequence[list[Any]]], list[list[int]]]


HOST = Clock(perf_counter_ns, list)


def clock_of(device: torch.device) -> Clock:
    """A GPU does later what it is told now: only events in its stream tell when it has come to an instruction's end."""
    return HOST if device.type == "cpu" else Clock(_event, _nanoseconds)


def _event() -> Any:
    made = torch.cuda.Event(enable_timing=True)
    made.record()
    return made


def _nanoseconds(rows: Sequence[list[Any]], now: Callable[[], int] = perf_counter_ns) -> list[list[int]]:
    """The host reads its clock when the last event has come, and counts back: events tell milliseconds in between."""
    if not rows:
        return []
    last = rows[-1][-1]
    last.synchronize()
    end = now()
    return [[end - round(event.elapsed_time(last) * 1e6) for event in row] for row in rows]
