"""Timelines as Chrome trace JSON, which Perfetto and chrome://tracing open: a process a timeline, a thread a rank.

Source of the format: "Trace Event Format" (Google, 2016): complete events (X), metadata (M), flows (s, f).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paraxis.errors import TaskError
from paraxis.measure.records import Event

MICRO = 1e6  # its unit of time is the microsecond
COLOURS = {
    "compute": "thread_state_running",
    "optimizer": "thread_state_iowait",
    "communication": "thread_state_runnable",
    "pipeline_wait": "thread_state_sleeping",
    "straggler_wait": "thread_state_sleeping",
}


def trace(timelines: Mapping[str, Sequence[Event]], replicas: int = 1) -> dict[str, Any]:
    """The document of some timelines by name; `replicas` ranks stand between a stage and the next (dp x tp)."""
    out: list[dict[str, Any]] = []
    for pid, (name, events) in enumerate(timelines.items(), 1):
        out.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}})
        out.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
        for rank in sorted({e.rank for e in events}):
            out.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": rank, "args": {"name": f"rank {rank}"}})
        out += [_complete(e, pid) for e in events]
        out += _flows(events, pid, replicas)
    return {"traceEvents": out, "displayTimeUnit": "ms"}


def write(path: Path, document: Mapping[str, Any]) -> Path:
    """Write a document of `trace`; raises TaskError if the file cannot be written."""
    try:
        path.write_text(json.dumps(document))
    except OSError as error:
        raise TaskError(f"--trace {path} cannot be written: {error.strerror}") from None
    return path


def _complete(e: Event, pid: int) -> dict[str, Any]:
    args: dict[str, Any] = {"kind": e.kind}
    args |= {"microbatch": e.microbatch} if e.microbatch >= 0 else {}
    args |= {"stage": e.stage} if e.stage >= 0 else {}
    event = {"name": e.label, "cat": e.kind, "ph": "X", "pid": pid, "tid": e.rank, "args": args}
    event |= {"ts": e.start * MICRO, "dur": (e.end - e.start) * MICRO}
    return event | ({"cname": COLOURS[e.kind]} if e.kind in COLOURS else {})


def _flows(events: Sequence[Event], pid: int, replicas: int) -> Iterable[dict[str, Any]]:
    """Arrows from a microbatch's F to its F on the next stage, and from its B (or I) to its B on the stage before."""
    computed: dict[tuple[str, int, int, int], list[Event]] = {}
    for e in events:
        op = e.label.lstrip("0123456789")[:1].replace("I", "B")
        if e.kind == "compute" and op in ("F", "B"):
            stage = e.stage if e.stage >= 0 else e.rank // replicas
            computed.setdefault((op, e.microbatch, stage, e.rank % replicas), []).append(e)
    number = 0
    for (op, microbatch, stage, replica), made in computed.items():
        taken = computed.get((op, microbatch, stage + (1 if op == "F" else -1), replica))
        if not taken:
            continue
        number += 1
        source, target = made[-1], taken[0]
        common = {"name": "activation" if op == "F" else "gradient", "cat": "transfer", "pid": pid}
        common["id"] = pid * 1_000_000 + number
        # An arrow belongs to the slice around its time, so it starts a little before the end.
        leaves = source.start + 0.999 * (source.end - source.start)
        yield common | {"ph": "s", "tid": source.rank, "ts": leaves * MICRO}
        yield common | {"ph": "f", "bp": "e", "tid": target.rank, "ts": target.start * MICRO}
