"""Timelines as Trace Event Format: required fields, times that agree, arrows that lead from slice to slice."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from paraxis.errors import TaskError
from paraxis.measure.breakdown import events
from paraxis.measure.records import Event
from paraxis.plan.plan import parse
from paraxis.program.cut import Layout
from paraxis.program.lower import lower
from paraxis.program.simulate import Costs, simulate, uniform
from paraxis.program.timeline import cells
from paraxis.report.trace import trace, write

COSTS = Costs(lambda i: {"F": 1e-3, "B": 2e-3, "Update": 1e-4, "Load": 5e-5}.get(i.op, 0.0), lambda i: 3e-4)


def timeline(plan: str) -> list[Event]:
    program = lower(parse(plan), Layout((1,) * 4))
    return events(simulate(program, COSTS))


@pytest.mark.parametrize("plan", ["serial", "dp=2", "pp=2,microbatches=4", "dp=2,pp=2,microbatches=3"])
def test_every_event_has_what_the_format_requires(plan: str) -> None:
    spans = timeline(plan)
    document = json.loads(json.dumps(trace({"measured": spans, "simulated": spans}, parse(plan).dp)))
    assert set(document) == {"traceEvents", "displayTimeUnit"} and document["displayTimeUnit"] == "ms"
    for e in document["traceEvents"]:
        assert {"ph", "pid", "tid", "name"} <= e.keys() and e["ph"] in "XMsf"
        assert isinstance(e["pid"], int) and isinstance(e["tid"], int)
        if e["ph"] == "M":
            assert e["name"] in ("process_name", "process_sort_index", "thread_name") and len(e["args"]) == 1
        else:
            assert e["ts"] >= 0 and e["cat"]
        if e["ph"] == "X":
            assert e["dur"] > 0 and e["args"]["kind"] == e["cat"]
        if e["ph"] == "f":
            assert e["bp"] == "e"
    names = [e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"]
    assert names == ["measured", "simulated"]


@pytest.mark.parametrize("plan", ["dp=2", "pp=2,microbatches=4"])
def test_times_are_those_of_the_timeline_in_microseconds(plan: str) -> None:
    spans = timeline(plan)
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    for s in spans:
        seconds[s.rank, s.kind] += s.end - s.start
    micro: dict[tuple[int, str], float] = defaultdict(float)
    document = trace({"simulated": spans})
    complete = [e for e in document["traceEvents"] if e["ph"] == "X"]
    for e in complete:
        micro[e["tid"], e["cat"]] += e["dur"]
    assert micro == {key: pytest.approx(value * 1e6) for key, value in seconds.items()}
    assert max(e["ts"] + e["dur"] for e in complete) == pytest.approx(max(s.end for s in spans) * 1e6)
    assert {e["args"].get("microbatch") for e in complete if e["name"].startswith("F")} == {
        s.microbatch for s in spans if s.label.startswith("F")
    }


@pytest.mark.parametrize("dp, pp, m", [(1, 2, 4), (2, 2, 3), (1, 4, 2)])
def test_arrows_lead_from_stage_to_stage(dp: int, pp: int, m: int) -> None:
    spans = timeline(f"dp={dp},pp={pp},microbatches={m}")
    document = trace({"simulated": spans}, dp)["traceEvents"]
    ends = {e["id"]: e for e in document if e["ph"] == "f"}
    starts = {e["id"]: e for e in document if e["ph"] == "s"}
    assert starts.keys() == ends.keys() and len(starts) == 2 * dp * m * (pp - 1)
    slices = [e for e in document if e["ph"] == "X" and e["cat"] == "compute"]
    for number, leaves in starts.items():
        arrives = ends[number]
        assert arrives["tid"] - leaves["tid"] == (dp if leaves["name"] == "activation" else -dp)
        assert arrives["ts"] >= leaves["ts"]
        for end in (leaves, arrives):
            assert any(s["tid"] == end["tid"] and s["ts"] <= end["ts"] <= s["ts"] + s["dur"] for s in slices)


def test_replicas_without_stages_have_no_arrows() -> None:
    assert not [e for e in trace({"simulated": timeline("dp=2")}, 2)["traceEvents"] if e["ph"] in "sf"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", trace({"simulated": timeline("serial")}))
    assert json.loads(path.read_text())["traceEvents"]
    with pytest.raises(TaskError, match="cannot be written"):
        write(tmp_path / "no" / "t.json", {})


def test_several_stages_a_rank_are_told_apart() -> None:
    made = simulate(lower(parse("pp=2,schedule=interleaved,microbatches=2"), Layout((1,) * 4)), uniform())
    shown = events(made)
    wanted = {f"{s}{op}{m}" for s in range(4) for op in "FB" for m in (0, 1)}
    assert {e.label for e in shown if e.kind == "compute"} == wanted
    flows = [e for e in trace({"simulated": shown})["traceEvents"] if e["ph"] == "s"]
    assert Counter(e["name"] for e in flows) == {"activation": 6, "gradient": 6}, "over three borders, the ring's too"
    assert sum(e["tid"] == 1 for e in flows if e["name"] == "activation") == 2, "from stage 1 back to rank 0"
    lines = cells(made, 72)
    assert "2F0" in lines[0] and "1B1" in lines[1]
    parted = cells(simulate(lower(parse("pp=2,schedule=zb-h1,microbatches=3"), Layout((1, 1))), uniform()), 60)
    assert "A" in parted[0] and "a" in parted[0] and "0F0" not in parted[0]
