"""The simulator against closed forms, and timelines that say what each rank waited for."""

from dataclasses import replace

import pytest

from paraxis.errors import Deadlock
from paraxis.plan.plan import Mesh, parse
from paraxis.program.cut import Layout
from paraxis.program.instructions import Instruction, Program
from paraxis.program.lower import lower
from paraxis.program.simulate import Costs, simulate, uniform
from paraxis.program.timeline import KINDS, Span, Timeline, cells, classify

SHAPES = [(p, m) for p in (2, 3, 4, 8) for m in (2, 3, 4, 8, 12)]
PIPELINES = pytest.mark.parametrize("p, m", SHAPES)


def pipeline(p: int, m: int, schedule: str, dp: int = 1) -> Program:
    return lower(parse(f"dp={dp},pp={p},microbatches={m},schedule={schedule}"), Layout(parameters=(1,) * p))


def hand_made(*rows: list[Instruction]) -> Program:
    """A program of one body `step` that need not be correct."""
    stages = tuple((n, n + 1) for n in range(len(rows)))
    return Program(
        mesh=Mesh(dp=1, pp=len(rows)),
        stages=stages,
        segments=tuple((stage,) for stage in stages),
        microbatches=1,
        buffers=(),
        bodies=(("step", tuple(map(tuple, rows))),),
        period=(("step", 1),),
    )


def kinds(timeline: Timeline, rank: int) -> list[tuple[str, float, float]]:
    """A rank's spans that take time: (kind, start, end)."""
    return [(s.kind, s.start, s.end) for s in timeline.spans if s.rank == rank and s.end > s.start]


def most_live(timeline: Timeline, rank: int) -> int:
    """Most microbatches between the start of their F and the end of their B."""
    ends = [(s.start, 1) if s.instruction.op == "F" else (s.end, -1) for s in spans_of(timeline, rank)]
    live = most = 0
    for _, change in sorted(ends):
        live += change
        most = max(most, live)
    return most


def spans_of(timeline: Timeline, rank: int) -> list[Span]:
    return [s for s in timeline.spans if s.rank == rank and s.instruction.op in ("F", "B")]


@PIPELINES
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("forward, backward", [(1.0, 2.0), (1.0, 1.0), (3.0, 0.5)])
def test_bubble_and_makespan_of_a_uniform_pipeline(
    p: int, m: int, schedule: str, forward: float, backward: float
) -> None:
    timeline = simulate(pipeline(p, m, schedule), uniform(forward, backward))
    assert timeline.makespan == pytest.approx((m + p - 1) * (forward + backward), rel=1e-12)
    assert timeline.bubble_fraction() == pytest.approx((p - 1) / (m + p - 1), rel=1e-12)
    assert timeline.seconds()["compute"] == pytest.approx(m * (forward + backward), rel=1e-12)
    assert timeline.ranks == p


@PIPELINES
def test_layerwise_takes_as_long_as_serial(p: int, m: int) -> None:
    timeline = simulate(pipeline(p, m, "layerwise"), uniform(1.0, 2.0))
    assert timeline.makespan == pytest.approx(3.0 * p * m, rel=1e-12)
    assert timeline.bubble_fraction() == pytest.approx(1 - 1 / p, rel=1e-12)


@PIPELINES
def test_1f1b_has_gpipes_bubble_with_less_alive(p: int, m: int) -> None:
    gpipe, better = (simulate(pipeline(p, m, schedule), uniform()) for schedule in ("gpipe", "1f1b"))
    for rank in range(p):
        assert most_live(gpipe, rank) == m
        assert most_live(better, rank) == min(p - rank, m)


def test_replicas_of_a_pipeline_run_side_by_side() -> None:
    one, two = simulate(pipeline(3, 4, "1f1b"), uniform()), simulate(pipeline(3, 4, "1f1b", dp=2), uniform())
    assert two.makespan == one.makespan and two.ranks == 6
    assert two.bubble_fraction() == pytest.approx(one.bubble_fraction())


def test_a_slow_stage_sets_the_pace() -> None:
    costs = Costs(lambda i: {"F": 1.0, "B": 2.0}.get(i.op, 0.0) * (3 if i.stage == 1 else 1))
    timeline = simulate(pipeline(2, 10, "gpipe"), costs)
    assert timeline.makespan == pytest.approx(1 + 10 * 9 + 2)


def test_transfers_lengthen_the_fill_and_the_drain() -> None:
    """GPipe with a latency t: p-1 hops forwards and p-1 back, the rest is hidden."""
    costs = Costs(lambda i: {"F": 1.0, "B": 1.0}.get(i.op, 0.0), lambda i: 0.25)
    assert simulate(pipeline(3, 4, "gpipe"), costs).makespan == pytest.approx((4 + 2) * 2 + 2 * 2 * 0.25)


def test_a_reduction_waits_for_the_last_and_hides_under_what_is_left() -> None:
    program = lower(parse("dp=2,bucket_bytes=4"), Layout(parameters=(1, 1)))
    seconds = {"F": 1.0, "B": 2.0, "Update": 0.5}
    timeline = simulate(program, Costs(lambda i: seconds.get(i.op, 0.0), lambda i: 1.5))
    # two segments: F 2 s, B1 till 4.5 s (zero takes 0.5 s), B0 till 6.5 s, under which bucket 1 travels; then bucket 0
    assert timeline.makespan == pytest.approx(0.5 + 2 + 4 + 1.5 + 0.5)
    found = timeline.seconds()
    assert found["communication"] == pytest.approx(1.5) and found["straggler_wait"] == 0
    assert found["optimizer"] == pytest.approx(1.0)


def test_the_first_body_of_the_period_unless_another_is_named() -> None:
    program = lower(parse("dp=2,sync=average@3"), Layout(parameters=(1,)))
    costs = Costs(lambda i: 1.0 if i.op in "FB" else 0.0, lambda i: 5.0)
    assert simulate(program, costs).makespan == 2
    assert simulate(program, costs, "average").makespan == 7
    assert simulate(program, costs, "evaluate").makespan == 1


def test_a_program_that_cannot_end_is_a_deadlock() -> None:
    program = pipeline(2, 2, "gpipe")
    rows = program.body("step")
    lost = tuple(i for i in rows[0] if not (i.base == "SendAct" and i.microbatch == 1))
    broken = replace(program, bodies=tuple((n, (lost, rows[1]) if n == "step" else b) for n, b in program.bodies))
    with pytest.raises(Deadlock, match="rank 1: RecvActWait stage=1 microbatch=1 peer=0"):
        simulate(broken, uniform())


# -- timelines -------------------------------------------------------------------------------------------------


def message(op: str, end: str, peer: int) -> Instruction:
    return Instruction(op + end, stage=1 - peer, microbatch=0, peer=peer, token=0)


def test_a_receive_waits_for_its_sender_and_then_for_the_transfer() -> None:
    sender = [Instruction("F", 0, 0, 0), message("SendAct", "Start", 1), message("SendAct", "Wait", 1)]
    receiver = [message("RecvAct", "Start", 0), message("RecvAct", "Wait", 0), Instruction("F", 1, 0, 0)]
    clocks = [[(10.0, 13.0), (13.0, 13.0), (13.0, 13.5)], [(10.0, 10.0), (10.0, 14.0), (14.0, 16.0)]]
    timeline = classify(hand_made(sender, receiver), "step", clocks)
    assert kinds(timeline, 0) == [("compute", 0, 3), ("communication", 3, 3.5)], "a send only transfers"
    assert kinds(timeline, 1) == [("pipeline_wait", 0, 3), ("communication", 3, 4), ("compute", 4, 6)]
    assert timeline.makespan == 6
    assert timeline.seconds() == dict.fromkeys(KINDS, 0.0) | {
        "compute": 2.5,
        "communication": 0.75,
        "pipeline_wait": 1.5,
    }
    assert timeline.bubble_fraction() == pytest.approx(1 - (3 + 0.5 + 1 + 2) / (2 * 6))


def test_a_receive_that_comes_late_waits_for_nobody() -> None:
    sender = [message("SendAct", "Start", 1), message("SendAct", "Wait", 1)]
    receiver = [message("RecvAct", "Start", 0), message("RecvAct", "Wait", 0)]
    clocks = [[(0.0, 0.0), (0.0, 1.0)], [(5.0, 5.0), (5.0, 6.0)]]
    assert kinds(classify(hand_made(sender, receiver), "step", clocks), 1) == [("communication", 5, 6)]


@pytest.mark.parametrize("axis, wait", [("dp", "straggler_wait"), ("pp", "pipeline_wait")])
def test_a_collective_waits_for_the_last_to_join(axis: str, wait: str) -> None:
    both = [Instruction(f"AllReduce{end}", axis=axis, buffer="norm", token=0) for end in ("Start", "Wait")]
    program = hand_made(both, both)
    program = replace(program, mesh=Mesh(dp=2) if axis == "dp" else Mesh(pp=2))
    timeline = classify(program, "step", [[(0.0, 0.0), (0.0, 4.0)], [(3.0, 3.0), (3.0, 4.0)]])
    assert kinds(timeline, 0) == [(wait, 0, 3), ("communication", 3, 4)]
    assert kinds(timeline, 1) == [("communication", 3, 4)]


def test_a_wait_never_outlasts_its_instruction() -> None:
    """Clocks of two processes differ a little: a receive may seem to end before its send began."""
    sender, receiver = [message("SendAct", "Start", 1)], [message("RecvAct", "Wait", 0)]
    timeline = classify(hand_made(sender, receiver), "step", [[(2.0, 2.0)], [(0.0, 1.5)]])
    assert kinds(timeline, 1) == [("pipeline_wait", 0, 1.5)]


def test_every_other_kind() -> None:
    ops = [Instruction("Load", 0, microbatch=0), Instruction("F", 0, 0, 0), Instruction("B", 0, 0, 0)]
    row = [*ops, Instruction("Update", 0, rule="step")]
    timeline = classify(hand_made(row), "step", [[(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]])
    assert [kind for kind, _, _ in kinds(timeline, 0)] == ["data", "compute", "compute", "optimizer"]
    assert sum(timeline.seconds().values()) == timeline.makespan == 4 and timeline.bubble_fraction() == 0


def test_an_empty_timeline_has_no_length() -> None:
    timeline = Timeline((), 2)
    assert timeline.makespan == timeline.bubble_fraction() == 0
    assert cells(timeline, 5) == ["rank 0 |     |", "rank 1 |     |"]


def test_cells_draw_a_textbook_pipeline() -> None:
    timeline = simulate(pipeline(2, 3, "gpipe"), uniform(1.0, 2.0))
    assert cells(timeline, 12) == ["rank 0 |012···aabbcc|", "rank 1 |·012aabbcc  |"]


def test_cells_draw_computing_above_waiting_and_letters_for_the_rest() -> None:
    row = [Instruction("Load", 0, microbatch=12), Instruction("F", 0, 0, 12), Instruction("B", 0, 0, 12)]
    row += [Instruction("Update", 0, rule="step")]
    pairs = enumerate(zip(row, ("data", "compute", "compute", "optimizer"), strict=True))
    spans = [Span(0, i, 2.0 * n, 2.0 * n + 2, kind) for n, (i, kind) in pairs]
    spans.append(Span(1, row[0], 0.0, 8.0, "straggler_wait"))
    spans.append(Span(1, row[1], 2.0, 4.0, "compute"))
    spans.append(Span(2, row[0], 0.0, 8.0, "communication"))
    assert cells(Timeline(tuple(spans), 3), 8) == ["rank 0 |ll22ccuu|", "rank 1 |··22····|", "rank 2 |========|"]
