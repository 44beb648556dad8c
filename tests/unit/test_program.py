"""Programs: what schedules order, what lowering adds to it, and that a program is text that can be read again."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paraxis.errors import PlanError, ProgramError
from paraxis.plan.plan import Plan, parse
from paraxis.plan.schedules import ONE_STAGE, SCHEDULES, parted
from paraxis.plan.space import space
from paraxis.program.cut import Layout, balanced, bucketed, cut
from paraxis.program.instructions import OPS, Instruction, Program, Tie, parse_instruction, parse_program
from paraxis.program.lower import lower

GOLDEN = Path(__file__).parents[1] / "golden" / "regenerate.py"
RICH: dict[str, Any] = {"weight_in_data": True, "statistics": True, "clip": True, "tied": (("w", (0, 2, 3)),)}
NUMBERS = ("stage", "segment", "microbatch", "slice", "peer", "bucket", "token")
WORDS = ("axis", "buffer", "reduction", "rule")
PLANS = [
    *(plan for plan in space(4, 4, comms=("mpi",)) if plan.threads == plan.tp == 1),
    *map(parse, ("microbatches=3", "dp=2,bucket_bytes=8", "dp=3,pp=2,microbatches=3,bucket_bytes=8")),
    *map(parse, ("pp=4,schedule=gpipe,microbatches=6", "dp=2,pp=2,microbatches=2,sync=average@3")),
    parse("pp=3,schedule=layerwise,microbatches=2"),
    *map(parse, (f"dp=2,pp=2,microbatches=2,bucket_bytes=8,zero={z}" for z in (1, 2, 3))),
    *map(parse, ("pp=2,interleave=2", "dp=2,pp=2,interleave=2,schedule=gpipe,microbatches=3,bucket_bytes=8")),
]
EVERY_PLAN = pytest.mark.parametrize("plan", PLANS, ids=Plan.short)
EVERY_NETWORK = pytest.mark.parametrize("needs", [{}, RICH], ids=["plain", "rich"])


def lowered(plan: Plan, needs: dict[str, Any]) -> Program:
    return lower(plan, Layout(parameters=(2, 0, 3, 4), **needs), steps_per_epoch=5)


def golden() -> object:
    """The script that writes the golden files, as a module."""
    spec = importlib.util.spec_from_file_location("regenerate", GOLDEN)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- schedules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@given(st.integers(1, 8), st.integers(1, 12), st.data())
@settings(deadline=None, max_examples=60)
def test_every_schedule_computes_each_microbatch_once_forward_then_backward(
    name: str, ranks: int, microbatches: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    stages = 1 if name in ONE_STAGE else data.draw(st.integers(1, 3))
    order = SCHEDULES[name](ranks, microbatches, rank, stages)
    own = range(rank, ranks * stages, ranks)
    ops = "FIW" if parted(name) else "FB"
    assert Counter(order) == Counter((op, s, i) for op in ops for s in own for i in range(microbatches))
    for before, behind in pairwise(ops):
        assert all(order.index((before, s, i)) < order.index((behind, s, i)) for s in own for i in range(microbatches))
    for op in ops:
        for stage in own:
            assert [i for o, s, i in order if (o, s) == (op, stage)] == list(range(microbatches)), "one order for all"


@given(st.integers(1, 8), st.integers(1, 12), st.data())
@settings(deadline=None)
def test_live_microbatches_of_each_schedule(stages: int, microbatches: int, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, stages - 1))

    def live(name: str) -> int:
        count, most = 0, 0
        for op, _, _ in SCHEDULES[name](stages, microbatches, stage, 1):
            count += 1 if op == "F" else -1
            most = max(most, count)
        return most

    assert live("layerwise") == 1
    assert live("gpipe") == microbatches
    assert live("1f1b") == min(stages - stage, microbatches)


# -- lowering --------------------------------------------------------------------------------------------------


@EVERY_PLAN
@EVERY_NETWORK
def test_every_sample_is_seen_once_by_every_layer(plan: Plan, needs: dict[str, Any]) -> None:
    program = lowered(plan, needs)
    slices = Counter(range(plan.dp * plan.microbatches))
    for name, ranks in program.bodies:
        if name in ("score", "settle", "begin", "state"):
            continue
        for stage, cuts in enumerate(program.segments):
            rows = [
                [i for i in row if i.stage == stage] for r, row in enumerate(ranks) if stage in program.stages_of(r)
            ]
            for op in "F" if name == "evaluate" else "FIW" if parted(plan.schedule or "gpipe") else "FB":
                for segment in range(len(cuts)):
                    seen = Counter(i.slice for row in rows for i in row if i.op == op and i.segment == segment)
                    assert seen == slices, (name, stage, op, segment)
            loaded = Counter(i.slice for row in rows for i in row if i.op == "Load")
            assert loaded == (slices if stage in (0, plan.stages - 1) else Counter())


@EVERY_PLAN
@EVERY_NETWORK
def test_every_send_has_its_receive_and_every_start_its_wait(plan: Plan, needs: dict[str, Any]) -> None:
    program = lowered(plan, needs)
    for _, ranks in program.bodies:
        messages: Counter[tuple[str, int, int, int, int]] = Counter()
        for rank, row in enumerate(ranks):
            starts = [(i.token, i.base, i.microbatch) for i in row if i.starts]
            assert sorted(starts) == sorted((i.token, i.base, i.microbatch) for i in row if i.waits)
            assert len({token for token, _, _ in starts}) == len(starts)
            for i in row:
                if i.starts and i.peer >= 0:
                    pair = (rank, i.peer) if i.base.startswith("Send") else (i.peer, rank)
                    messages[i.base[4:], i.edge, i.microbatch, *pair] += 1 if i.base.startswith("Send") else -1
                    mine, other = map(program.mesh.coordinates, (rank, i.peer))
                    away = (mine[1] - other[1]) % plan.pp
                    assert mine[0] == other[0] and away in (1, plan.pp - 1), "neighbours of one replica"
        assert not any(messages.values())


@EVERY_PLAN
@EVERY_NETWORK
def test_collectives_are_joined_by_all_members_in_one_order(plan: Plan, needs: dict[str, Any]) -> None:
    program = lowered(plan, needs)
    sizes = {"dp": plan.dp, "pp": plan.pp}
    declared = {buffer.name for buffer in program.buffers}
    for _, ranks in program.bodies:
        for rank, row in enumerate(ranks):
            for axis in ("dp", "pp"):
                mine = [(i.op, i.buffer, i.bucket, i.reduction) for i in row if i.axis == axis]
                assert not mine or sizes[axis] > 1, "nobody reduces alone"
                for other in program.mesh.group(rank, axis):
                    theirs = [(i.op, i.buffer, i.bucket, i.reduction) for i in ranks[other] if i.axis == axis]
                    assert mine == theirs
            assert {i.buffer for i in row} - {""} <= declared


@EVERY_PLAN
@EVERY_NETWORK
def test_a_step_ends_with_its_update_and_replicas_agree_once_a_period(plan: Plan, needs: dict[str, Any]) -> None:
    program, apart = lowered(plan, needs), plan.sync not in ("gradient", "compressed")
    steps = [program.step_body(n) for n in range(program.steps_in_period() + 1)]
    assert steps[0] == steps[-1]
    for name in set(steps):
        for row in program.body(name):
            rules = [i.rule for i in row if i.op == "Update"]
            assert rules[0] == "zero" and rules.count("step") == 1 and row[0].rule == "zero"
            assert rules[-1] == "step" or (name, rules[-1]) == ("diloco", "copy")
            agree = [i for i in row if i.starts and i.axis == "dp" and i.buffer in ("grads", "params", "delta")]
            assert bool(agree) == (plan.dp > 1 and name != "local")
            reduced = {i.bucket for i in agree if i.buffer == "grads"}
            flat = (plan.interleave > 1 and not plan.bucket_bytes) or plan.sync == "compressed"
            buckets = {-1} if flat else set(range(len(program.segments[row[0].stage])))
            own = program.own_buckets(program.body(name).index(row)).values()  # of parameters that stages share
            assert reduced == (buckets | {bucket for _, bucket in own} if agree and not apart else set())
    assert program.epilogue == ((("settle", 1),) if apart else ())
    assert sum(name not in ("local", "step") for name in steps) == (apart + (apart and len(steps) == 2))


def test_average_once_an_epoch_takes_the_epochs_steps() -> None:
    program = lower(parse("dp=2,sync=average@epoch"), Layout(parameters=(2,)), steps_per_epoch=7)
    assert program.period == (("local", 6), ("average", 1))
    assert [program.step_body(n) for n in (0, 5, 6, 7, 13)] == ["local", "local", "average", "local", "average"]
    assert lower(parse("dp=2,sync=average@1"), Layout(parameters=(2,))).period == (("average", 1),)


def test_a_reduction_starts_as_soon_as_its_last_gradient_is_there() -> None:
    row = lower(parse("dp=2,microbatches=2,bucket_bytes=4"), Layout(parameters=(1, 1, 1))).body("step")[0]
    labels = [i.label() for i in row if i.op != "Load"]
    last_backwards = ["B1.2", "AR2<", "B1.1", "AR1<", "B1", "AR0<"]
    assert labels[-10:] == [*last_backwards, "AR2>", "AR1>", "AR0>", "step"]


def test_gradients_leave_before_a_reduction_begins() -> None:
    row = lower(parse("dp=2,pp=2,microbatches=2"), Layout(parameters=(1, 1))).body("step")[2]
    ops = [i.op for i in row]
    assert ops.index("AllReduceStart") > max(n for n, op in enumerate(ops) if op == "SendGradStart")


# -- cuts ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 80))
@settings(deadline=None)
def test_buckets_are_full_from_the_back_and_part_the_stage(parameters: list[int], size: int) -> None:
    layout = Layout(parameters=tuple(parameters))
    segments = bucketed((0, len(parameters)), layout, size)
    assert [a for a, _ in segments] == [0, *(b for _, b in segments[:-1])] and segments[-1][1] == len(parameters)
    held = [4 * sum(parameters[a:b]) for a, b in segments]
    assert all(count >= size for count in held[1:]), "only the last to be reduced may be smaller"
    assert all(4 * sum(parameters[a + 1 : b]) < size for a, b in segments[1:]), "none goes on when it is full"
    assert held[0] > 0 or len(segments) == 1, "no reduction of nothing"


def test_one_bucket_unless_asked_and_stages_have_their_own() -> None:
    layout = Layout(parameters=(1, 1, 1, 1))
    assert lower(parse("dp=2"), layout).segments == (((0, 4),),)
    assert lower(parse("dp=2,pp=2,split=1+3,bucket_bytes=8"), layout).segments == (((0, 1),), ((1, 2), (2, 4)))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
@settings(deadline=None, max_examples=60)
def test_balanced_is_as_good_as_the_best_of_all_cuts(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    split = balanced(costs, stages)
    assert len(split) == stages and sum(split) == len(costs) and min(split) >= 1

    def worst(ends: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in zip((0, *ends), (*ends, len(costs)), strict=True))

    best = min(worst(ends) for ends in combinations(range(1, len(costs)), stages - 1))
    assert worst(tuple(sum(split[: n + 1]) for n in range(stages - 1))) == best


@pytest.mark.parametrize(
    "plan, layout, words",
    [
        ("pp=4", Layout((1, 1, 1)), "the network has 3 layers, so at most 3 stages"),
        ("pp=2,split=3+5", Layout((1, 1, 1)), "split=3+5 sums to 8, but the network has 3 layers"),
        ("pp=2", Layout((5,), cuttable="Net has no stages(net)"), "Net has no stages(net); dp takes any network"),
    ],
)
def test_cuts_that_the_network_cannot_meet_are_refused(plan: str, layout: Layout, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        lower(parse(plan), layout)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_one_stage_takes_any_network() -> None:
    assert cut(parse("dp=4"), Layout((5, 5), cuttable="no", tied=(("w", (0, 1)),))) == ((0, 2),)


@pytest.mark.parametrize(
    "plan, stages, axis",
    [
        ("dp=2,pp=4", (0, 2, 3), "pp:0+2+3"),
        ("dp=2,pp=2,split=2+2", (0, 1), "pp"),
        ("dp=2,pp=2,split=3+1", (0, 1), "pp"),
        ("pp=2,interleave=2", (0, 2, 3), "pp"),
        ("pp=4,sync=average@3,dp=2", (0, 2, 3), "pp:0+2+3"),
        ("pp=2,split=1+3,dp=2,comm=openmp,engine=native", (0, 1), "pp"),
    ],
)
def test_copies_of_a_tied_weight_are_added_up_once_a_step_before_the_update(
    plan: str, stages: tuple[int, ...], axis: str
) -> None:
    layout = Layout((1, 1, 1, 1), clip=True, tied=(("w", (0, 2, 3)),))
    program = lower(parse(plan), layout, steps_per_epoch=5)
    assert program.ties == (Tie("w", stages),)
    for name, _ in program.period:
        for rank, row in enumerate(program.body(name)):
            tied = [n for n, i in enumerate(row) if i.buffer == "tied"]
            assert len(tied) == 2 * bool(program.ties_of(rank)) and {row[n].axis for n in tied} <= {axis}
            assert all(row[n].bucket == 0 and row[n].reduction == "sum" for n in tied)
            norm = next(n for n, i in enumerate(row) if i.rule == "norm")
            assert all(max(n for n, i in enumerate(row) if i.op == "B") < n < norm for n in tied)


@pytest.mark.parametrize("plan", ["serial", "dp=4", "pp=2,split=2+2", "pp=2,interleave=2,split=1+1+1+1"])
def test_layers_of_one_rank_share_a_weight_without_a_word(plan: str) -> None:
    tied = (("w", (0, 2)),) if "interleave" in plan else (("w", (0, 1)),)
    program = lower(parse(plan), Layout((1, 1, 1, 1), tied=tied))
    assert not program.ties and "tied" not in program.text()


# -- text ------------------------------------------------------------------------------------------------------


@EVERY_PLAN
@EVERY_NETWORK
def test_a_program_is_text_that_reads_back(plan: Plan, needs: dict[str, Any]) -> None:
    program = lowered(plan, needs)
    again = parse_program(program.text())
    assert again == program and again.digest() == program.digest()
    assert program.digest() == sha256(program.text().encode()).hexdigest()[:16]


@given(
    st.builds(
        Instruction,
        op=st.sampled_from(OPS),
        **{name: st.integers(-1, 999) for name in NUMBERS},
        **{name: st.sampled_from(["", "dp", "grads", "mean"]) for name in WORDS},
    )
)
@settings(deadline=None)
def test_an_instruction_is_a_line_that_reads_back(instruction: Instruction) -> None:
    assert parse_instruction(instruction.text()) == instruction
    assert "\n" not in instruction.text()


@pytest.mark.parametrize(
    "text, words",
    [
        ("body step rank 0\n  Fly stage=0", "'Fly' is not an instruction; there are Load, F, B"),
        ("body step rank 0\n  F stge=0", "'stge' is not a field of F"),
        ("body step rank 0\n  F op=B", "'op' is not a field of F"),
        ("body step rank 0\n  F stage=one", "stage='one' is not a number"),
        ("nonsense 3", "this line of a program cannot be read: 'nonsense 3'"),
        ("microbatches 2", "the head of the program is incomplete or malformed"),
        ("mesh dp=two", "the head of the program is incomplete or malformed"),
        ("", "the head of the program is incomplete"),
    ],
)
def test_unreadable_programs_name_the_line(text: str, words: str) -> None:
    with pytest.raises(ProgramError) as caught:
        parse_program(text)
    assert words in str(caught.value)


def test_blank_lines_within_a_body_are_passed_over() -> None:
    text = lower(Plan(), Layout((1,))).text()
    assert parse_program(text.replace("  Update", "  \n  Update")) == parse_program(text)


@pytest.mark.parametrize("name", golden().CASES)  # type: ignore[attr-defined]
def test_golden(name: str) -> None:
    """A change of lowering shows as a readable difference; if it is meant, regenerate (see the script)."""
    script = golden()
    made, text = script.made(name), script.path(name).read_text()  # type: ignore[attr-defined]
    assert made.text() == text
    assert parse_program(text) == made


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.parent.glob("*.txt")} == set(golden().CASES)  # type: ignore[attr-defined]


def test_digests_name_programs_in_every_process() -> None:
    """Records of two runs are compared by digest, so it must not depend on Python's hash seed."""
    code = (
        "from paraxis.plan.plan import parse; from paraxis.program.lower import Layout, lower;"
        "print(lower(parse('dp=2,pp=2,microbatches=3,bucket_bytes=8'), Layout((2, 2, 2, 2))).digest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        for seed in ("1", "2")
    ]
    mine = lower(parse("dp=2,pp=2,microbatches=3,bucket_bytes=8"), Layout((2, 2, 2, 2))).digest()
    assert [run.stdout.decode().strip() for run in runs] == [mine, mine]


def test_different_plans_have_different_digests() -> None:
    digests = [lowered(plan, {}).digest() for plan in dict.fromkeys(PLANS)]
    assert len(set(digests)) == len(digests)
