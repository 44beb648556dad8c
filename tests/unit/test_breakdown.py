"""Every nanosecond of a window is accounted for once: instruction, interpreter, what lay between, or nobody."""

import random

import pytest

from paraxis.measure.breakdown import (
    Window,
    account,
    against,
    keep_middle,
    mean,
    middle_rounds,
    replay,
    timelines,
    window,
    work,
)
from paraxis.measure.records import Split
from paraxis.plan.plan import parse
from paraxis.program.cut import Layout
from paraxis.program.instructions import Program
from paraxis.program.lower import lower
from paraxis.program.simulate import Costs, simulate
from paraxis.run import null
from paraxis.run.interpreter import Rank
from paraxis.run.running import Running
from paraxis.run.window import BEHIND, timed

MS = 1_000_000
PARTS = [kind for kind in Split.model_fields if kind != "remainder"]


def program_of(text: str) -> Program:
    return lower(parse(text), Layout((1,) * 4))


def ticking(program: Program, steps: int, gap: int = 0, length: int = MS, late: int = 0, record: float = 0.0) -> Window:
    """Every instruction takes `length`, `gap` lies between steps, each rank starts `late` after the one before it."""
    now = [late * rank for rank in range(program.mesh.size)]
    seen = []
    for n in range(steps):
        name = program.step_body(n)
        rows = []
        for rank, instructions in enumerate(program.body(name)):
            row = [now[rank] + length * k for k in range(len(instructions) + 1)]
            rows.append(row)
            now[rank] = row[-1] + gap * (n < steps - 1)
        seen.append((name, rows))
    ranks = program.mesh.size
    return Window(tuple(seen), (0,) * ranks, (max(now),) * ranks, ((),) * ranks, (record,) * ranks)


def accounted(program: Program, seen: Window) -> list[Split]:
    return account(program, seen, timelines(program, seen.steps))


def covered(parts: Split) -> float:
    return sum(getattr(parts, kind) for kind in PARTS)


def test_instructions_that_follow_each_other_leave_no_remainder() -> None:
    program = program_of("serial")
    (parts,) = accounted(program, ticking(program, 5))
    ops = [i.op for i in program.body("step")[0]]
    assert parts.compute == pytest.approx(2e-3) and parts.data == pytest.approx(1e-3)
    assert parts.optimizer == pytest.approx(1e-3 * ops.count("Update"))
    assert parts.overhead == 0 and parts.remainder == pytest.approx(0, abs=1e-12)
    assert covered(parts) == pytest.approx(1e-3 * len(ops))


def test_what_no_clock_covers_is_the_remainder_and_nothing_is_scaled_to_hide_it() -> None:
    program = program_of("serial")
    (tight,) = accounted(program, ticking(program, 4))
    (loose,) = accounted(program, ticking(program, 4, gap=2 * MS))
    assert loose.remainder == pytest.approx(3 * 2e-3 / 4)
    assert covered(loose) == pytest.approx(covered(tight)), "the parts do not grow to fill the step"


@pytest.mark.parametrize("text", ["dp=2", "pp=2,microbatches=4", "dp=2,pp=2,microbatches=2", "dp=2,sync=average@3"])
@pytest.mark.parametrize("late", [0, MS // 3])
def test_parts_and_remainder_are_the_step_on_every_rank(text: str, late: int) -> None:
    program = program_of(text)
    seen = ticking(program, 6, gap=MS // 7, late=late, record=150.0)
    for parts in accounted(program, seen):
        assert covered(parts) + parts.remainder == pytest.approx((seen.ended[0] - seen.begun[0]) / 1e9 / 6)
        assert all(getattr(parts, kind) >= 0 for kind in PARTS)


def test_the_interpreters_own_cost_is_taken_from_the_instructions_and_shown() -> None:
    program = program_of("serial")
    (bare,), (parts,) = (accounted(program, ticking(program, 3, record=r)) for r in (0.0, 250.0))
    count = len(program.body("step")[0])
    assert parts.overhead == pytest.approx(count * 250e-9)
    assert covered(parts) == pytest.approx(covered(bare)), "nothing is counted twice"
    assert bare.compute - parts.compute == pytest.approx(2 * 250e-9)


def test_an_instruction_shorter_than_a_record_is_all_overhead() -> None:
    program = program_of("serial")
    (parts,) = accounted(program, ticking(program, 3, length=100, record=250.0))
    assert parts.compute == 0 and parts.overhead == pytest.approx(len(program.body("step")[0]) * 100e-9)


def test_what_a_process_does_between_steps_has_its_own_kind() -> None:
    program = program_of("serial")
    seen = ticking(program, 2, gap=5 * MS)
    end = seen.steps[0][1][0][-1]
    pieces = (("overhead", 0, end + MS), ("data", end + MS, end + 3 * MS), ("overhead", end + 3 * MS, seen.ended[0]))
    (bare,) = accounted(program, seen)
    (parts,) = accounted(program, Window(seen.steps, seen.begun, seen.ended, (pieces,), (0.0,)))
    assert parts.data - bare.data == pytest.approx(2e-3 / 2)
    assert parts.overhead == pytest.approx((1e-3 + 2e-3) / 2)
    assert parts.remainder == pytest.approx(0, abs=1e-12)


def test_a_rank_that_ends_early_waits_for_the_others() -> None:
    for text, kind in (("dp=2,sync=average@4", "straggler_wait"), ("pp=2,microbatches=2", "pipeline_wait")):
        program = program_of(text)
        seen = ticking(program, 1, late=0)
        late = Window(seen.steps, seen.begun, tuple(e + 4 * MS for e in seen.ended), seen.between, seen.record)
        first, longer = accounted(program, seen)[0], accounted(program, late)[0]
        assert getattr(longer, kind) - getattr(first, kind) == pytest.approx(4e-3)
        assert longer.remainder == pytest.approx(0, abs=1e-12)


def test_only_the_first_ranks_window_counts() -> None:
    """A rank that began earlier, and one that left the barrier later."""
    program = program_of("dp=2")
    seen = ticking(program, 2)
    early = Window(seen.steps, (MS, 0), seen.ended, seen.between, seen.record)
    for parts in accounted(program, early):
        assert covered(parts) + parts.remainder == pytest.approx((seen.ended[0] - MS) / 1e9 / 2)
        assert abs(parts.remainder) < 1e-12
    late = ticking(program, 2, late=MS)
    tardy = Window(late.steps, (0, MS), late.ended, late.between, late.record)
    assert accounted(program, tardy)[1].straggler_wait >= 1e-3 / 2 - 1e-12


@pytest.mark.parametrize("text", ["serial", "dp=2", "pp=2,microbatches=8", "dp=2,bucket_bytes=4"])
def test_the_null_interpreter_measures_what_an_instruction_costs(text: str) -> None:
    program = program_of(text)
    cost = null.record_cost(program, 0)
    assert 20 < cost < 100_000, "nanoseconds"
    ran: Rank = null.start(program, 0, counting=False)
    ran.run_traced(7)
    assert ran.done == 7 and not ran.engine.calls and len(ran.clocks(3)) == 3
    for name, (row,) in ran.clocks(7):
        assert len(row) == len(program.body(name)[0]) + 1 and row == sorted(row)


@pytest.mark.parametrize("text, traced, more", [("serial", 100, 0), ("device=cuda", BEHIND, BEHIND)])
def test_on_a_gpu_what_is_traced_is_not_timed(text: str, traced: int, more: int) -> None:
    """Its marks take as long as its kernels."""
    rank: Rank = null.start(program_of("serial"), 0, counting=False)
    seconds, seen, begun, ended = timed(Running(parse(text), [], rank), rank.steps, 100, 1024)
    assert seen == traced == len(rank.stamps) and rank.done == 100 + more
    assert begun <= rank.stamps[0][1][0] and rank.stamps[-1][1][-1] <= ended
    assert (seconds == (ended - begun) / 1e9) == (not more) and seconds > 0
    assert timed(Running(parse(text), [], rank), rank.steps, 10, 0)[1] == 0 and rank.done == 110 + more


def test_the_chosen_rounds_have_the_median_step() -> None:
    program = program_of("serial")
    rng = random.Random(3)
    for count in range(1, 14):
        times = {r: rng.uniform(1, 2) for r in range(count)}
        windows = keep_middle({r: ticking(program, 1) for r in times}, times, count=5)
        chosen, order = middle_rounds(windows, times), sorted(times.values())
        median = (order[(count - 1) // 2] + order[count // 2]) / 2
        assert sum(times[r] for r in chosen) / len(chosen) == pytest.approx(median)
        assert len(windows) == min(count, 5) and set(chosen) <= set(middle_rounds(windows, times, wide=True))


def test_answers_of_processes_become_one_window_and_threads_are_one_process() -> None:
    program = program_of("dp=2")
    seen = ticking(program, 3)
    rest = {"begun": 5, "ended": 9, "between": [["data", 1, 2]], "record": 30.0, "shift": 0}
    apart = [{"window": rest | {"steps": [[n, [rows[r]]] for n, rows in seen.steps]}} for r in range(2)]
    together = [{"window": rest | {"steps": [[n, rows] for n, rows in seen.steps]}}]
    for answers in (apart, together):
        found = window(answers)
        assert found is not None and found.steps == seen.steps
        assert found.begun == (5, 5) and found.between == ((("data", 1, 2),),) * 2 and found.record == (30.0, 30.0)
    assert window([{"window": None}]) is None and window([apart[0], {}]) is None


def test_clocks_of_two_hosts_become_one() -> None:
    program = program_of("dp=2")
    seen = ticking(program, 3)
    end, far = seen.ended[0], 10**15
    rest = {"between": [], "record": 0.0, "shift": 0}
    here = {"steps": [[n, [rows[0]]] for n, rows in seen.steps], "begun": 0, "ended": end} | rest
    there = {"steps": [[n, [[t - far for t in rows[1]]]] for n, rows in seen.steps], "begun": -far, "ended": end - far}
    found = window([{"window": here}, {"window": there | rest | {"shift": far}}])
    assert found is not None and found.steps == seen.steps and found.begun == (0, 0)
    assert all(abs(parts.remainder) < 1e-12 for parts in accounted(program, found))


def steady(program: Program, forward: list[float], backward: list[float], transfer: float, steps: int) -> Window:
    """Two stages that run step after step without a barrier, as the simulator has them."""
    now, out = [0.0, 0.0], []
    seconds = {"F": forward, "B": backward}
    for _ in range(steps):
        # the first instruction of a rank takes until its last step has ended
        costs = Costs(
            lambda i, now=now: seconds[i.op][i.stage] if i.op in seconds else now[i.stage] * (i.rule == "zero"),
            lambda i: transfer,
        )
        rows = []
        for rank in range(2):
            spans = [s for s in simulate(program, costs).spans if s.rank == rank]
            pairs = zip(spans, [*spans[1:], None], strict=True)
            last = [s.end for s, behind in pairs if behind is None or behind.instruction is not s.instruction]
            rows.append([round(t * 1e9) for t in (now[rank], *last)])
        out.append(("step", rows))
        now = [row[-1] / 1e9 for row in rows]
    end = max(row[-1] for row in out[-1][1])
    return Window(tuple(out), (0, 0), (end, end), ((), ()), (0.0, 0.0))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("m", [2, 4, 8, 16])
@pytest.mark.parametrize("uneven", [1.0, 1.6])
def test_the_bubble_of_a_running_pipeline_is_that_of_its_replay(schedule: str, m: int, uneven: float) -> None:
    """Also where ranks are not at the same step at the same time; for equal stages it is the textbook's."""
    program = lower(parse(f"pp=2,schedule={schedule},microbatches={m}"), Layout((1, 1)))
    seen = steady(program, [1.0 / m, uneven / m], [2.0 / m, 2 * uneven / m], 0.02 / m, 8)
    lines = timelines(program, seen.steps)
    parts, step = mean(accounted(program, seen)), seen.ended[0] / 1e9 / 8
    again = replay(program, lines, "step")
    assert parts.pipeline_wait / step == pytest.approx(again.bubble_fraction(), abs=0.01)
    assert again.makespan == pytest.approx(step, rel=0.01)
    assert parts.remainder == pytest.approx(0, abs=1e-6)
    above = parts.pipeline_wait / step - 1 / (m + 1)
    assert abs(above) < 0.01 if uneven == 1 else above > 0.03


def test_work_counts_instructions_of_a_step() -> None:
    program = program_of("pp=2,microbatches=4")
    found = {(w.rank, w.op): w for w in work(program, timelines(program, ticking(program, 3).steps))}
    assert found[0, "F"].count == found[1, "B"].count == 4 and found[0, "step"].count == 1
    assert found[0, "F"].seconds == pytest.approx(1e-3)


def test_a_split_against_a_longer_step_has_a_larger_remainder() -> None:
    parts = Split(**dict.fromkeys(PARTS, 1.0))
    assert against(parts, 10.0).remainder == pytest.approx(10 - len(PARTS))
    assert mean([parts, against(parts, 10.0)]).remainder == pytest.approx((10 - len(PARTS)) / 2)
