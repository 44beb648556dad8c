"""ZeRO's programs: what is reserved, gathered, reduced and released when, and what the checker refuses."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_check import Row, edited, made, matches, moved, refused, without

from paraxis.comm import exchange
from paraxis.comm.local import LocalComm, Post
from paraxis.errors import PlanError
from paraxis.plan.plan import parse
from paraxis.program.check import check
from paraxis.program.cut import Layout
from paraxis.program.grid import draw, explain, simplify
from paraxis.program.instructions import Instruction, parse_program
from paraxis.program.lower import lower
from paraxis.program.shares import Split
from paraxis.program.simulate import Costs, simulate

FOUR = Layout(parameters=(2, 2, 2, 2))
EACH = ",bucket_bytes=8"  # a bucket a layer


def cells(plan: str, body: str = "step", layout: Layout = FOUR) -> str:
    """Rank 0 of a drawn body, without loads."""
    program = lower(parse(plan), layout)
    check(program)
    assert parse_program(program.text()) == program
    (line, *_) = draw(simplify(program.body(body)))
    return " ".join(word for word in line.split("|")[1].split() if not word.startswith("L"))


def test_stage_1_reduces_once_updates_and_gathers() -> None:
    assert cells("dp=2,zero=1") == "zero F0 B0 RS0< step AG0<"
    found = cells(f"dp=2,zero=1,microbatches=2{EACH}", layout=Layout((2, 2)))
    assert found == "zero F0 F0.1 B0.1 B0 F1 F1.1 B1.1 RS1< B1 RS0< RS1> RS0> step AG0< AG1<"


def test_stage_2_reduces_every_microbatch_and_keeps_no_more_than_two_buckets() -> None:
    found = cells(f"dp=2,zero=2{EACH}", layout=Layout((2, 2, 2)))
    backward = "+g2 B0.2 RS2< +g1 B0.1 RS2> -g2 RS1< +g0 B0 RS1> -g1 RS0< -g0"
    assert found == f"zero F0 F0.1 F0.2 {backward} step AG0< AG1< AG2<"
    assert cells("dp=2,zero=2,microbatches=2") == "zero F0 +g0 B0 RS0< F1 RS0> -g0 +g0 B1 RS0< -g0 step AG0<"


def test_stage_3_gathers_one_ahead_and_lets_go() -> None:
    found = cells(f"dp=2,zero=3{EACH}", layout=Layout((2, 2, 2)))
    forward = "+p0 AG0< +p1 AG1< F0 -p0 AG1> +p2 AG2< F0.1 -p1 AG2> F0.2"
    assert found.startswith(f"zero {forward} +g2 +p1 AG1< B0.2 -p2 RS2< +g1 AG1> +p0 AG0< B0.1 -p1 RS2> -g2")
    assert found.endswith("+g0 AG0> B0 -p0 RS1> -g1 RS0< -g0 step")
    assert cells(f"dp=2,zero=3{EACH}", "evaluate", Layout((2, 2, 2))) == f"{forward} -p2"
    assert cells(f"dp=2,zero=3{EACH}", "state", Layout((2, 2))) == "+p0 AG0< keep -p0 +p1 AG1< keep -p1"


def test_one_segment_stays_whole_and_says_so() -> None:
    assert cells("dp=2,zero=3") == "zero +p0 AG0< F0 +g0 B0 -p0 RS0< -g0 step"
    assert "is whole from its first F to the update" in explain(lower(parse("dp=2,zero=3"), FOUR))
    assert "is whole from" not in explain(lower(parse(f"dp=2,zero=3{EACH}"), FOUR))
    assert "RS reduce-scatter" in explain(lower(parse("dp=2,zero=1"), FOUR))


def test_a_shared_parameter_is_whole_wherever_it_is_needed() -> None:
    """It lies in the first segment's bucket; the last one needs it in F, and adds to it in B."""
    tied = Layout((2, 2, 2), tied=(("weight", (0, 2)),))
    words = cells(f"dp=2,zero=3{EACH}", layout=tied).split()
    assert words.count("+p0") == 3 and words.index("+g0") < words.index("B0.2") < words.index("RS0<")
    assert words.index("RS0<") > words.index("B0")


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_steps_of_a_pipeline_gather_by_stage(zero: int) -> None:
    program = lower(parse(f"dp=2,pp=2,microbatches=4,zero={zero}{EACH}"), Layout((2,) * 6, statistics=True, clip=True))
    check(program)
    for rank, row in enumerate(program.body("step")):
        own = {(i.stage, i.bucket) for i in row if i.base in ("ReduceScatter", "AllGather")}
        assert own == {(program.mesh.coordinates(rank)[1], k) for k in range(3)}
        assert sum(i.op == "ReduceScatterStart" for i in row) == 3 * (4 if zero > 1 else 1)
        assert sum(i.op == "Reserve" for i in row) == sum(i.op == "Release" for i in row)
    seconds = {"F": 1.0, "B": 2.0}
    slow = simulate(program, Costs(lambda i: seconds.get(i.op, 0.0), lambda i: 0.5 * (i.base == "AllGather")))
    fast = simulate(program, Costs(lambda i: seconds.get(i.op, 0.0)))
    assert slow.makespan > fast.makespan and slow.seconds()["communication"] > 0


def test_what_is_prefetched_hides_behind_computing() -> None:
    program = lower(parse(f"dp=2,zero=3{EACH}"), FOUR)
    costs = Costs(lambda i: {"F": 1.0, "B": 2.0}.get(i.op, 0.0), lambda i: 0.9 * (i.base == "AllGather"))
    assert simulate(program, costs).makespan == pytest.approx(4 * 3 + 0.9), "all but the first"


def test_a_parameter_that_stages_share_has_a_bucket_of_its_own() -> None:
    """Bucket 3 of either stage; its shares are added up when they are complete."""
    tied = Layout((2, 2, 2, 2, 2, 2, 0), tied=(("weight", (0, 6)),))
    program = lower(parse(f"dp=2,pp=2,split=3+4,zero=3,microbatches=2{EACH}"), tied)
    check(program)
    last_stage = program.mesh.rank(0, 1)
    assert program.own_buckets(0) == {0: (0, 3)} and program.own_buckets(last_stage) == {0: (1, 3)}
    for rank, row in enumerate(program.body("step")):
        words = [i.label() for i in row]
        assert words.count("RS3<") == 2 and words.index("ARt0<") > max(n for n, w in enumerate(words) if w == "RS3>")
        assert words.count("AG3<") >= 2 and "keep" in [i.rule for i in program.body("state")[rank] if i.bucket == 3]
    last = [(i.stage, i.bucket) for i in program.body("step")[last_stage] if i.op == "ReduceScatterStart"]
    assert set(last) == {(1, 0), (1, 1), (1, 2), (1, 3)}, "the last layer has nothing but its copy"


def test_tied_layers_of_two_stages_of_a_rank_share_the_first_one_s_bucket() -> None:
    tied = Layout((2, 2, 2, 0), tied=(("weight", (0, 2)),))
    program = lower(parse("dp=2,pp=2,interleave=2,schedule=gpipe,microbatches=2,zero=3"), tied)
    check(program)
    assert not program.ties
    gathered = [(i.stage, i.rule, i.segment) for i in program.body("step")[0] if i.op == "AllGatherWait"]
    assert {stage for stage, _, _ in gathered} == {0, 2}


def test_a_weight_s_gradient_is_reduced_after_its_w_and_needs_no_parameters() -> None:
    """I1 adds to what W0 completes: both are reduced then, and the rest when W1 has come."""
    program = lower(parse(f"dp=2,pp=2,schedule=zb-h1,microbatches=3,zero=3{EACH}"), FOUR)
    check(program)
    row = program.body("step")[program.mesh.rank(0, 1)]
    own = [i for i in row if (i.buffer, i.bucket) == ("grads", 0) or (i.op in ("I", "W") and i.segment == 0)]
    found = " ".join(i.label() for i in own)
    assert found == "+g0 I0 I1 W0 RS0< RS0> -g0 +g0 I2 W1 RS0< RS0> -g0 +g0 W2 RS0< RS0> -g0"
    assert {i.rule for i in row if i.buffer == "params"} == {"F", "I"}
    last = max(n for n, i in enumerate(row) if i.op == "Release" and i.buffer == "params")
    assert [i.label() for i in row[last:] if i.op in ("F", "I", "W")] == ["W1.1", "W1", "W2.1", "W2"]


def test_a_layer_that_ranks_meet_in_is_whole_on_both_sides_of_the_border() -> None:
    """One layer that is cut twice: it is gathered before its first part and let go after its last."""
    pair = Split("columns", 8, ("a", "b"), ((1, 1, "grad"), (1, 2, "act")), (1, 1))
    layout = replace(FOUR, splits=(pair,))
    program = lower(parse("dp=2,tp=2,zero=3"), layout)
    check(program)
    row = [i for i in program.body("step")[0] if i.bucket == 1 or i.op in ("F", "B")]
    found = " ".join(i.label() for i in row)
    assert found == "+p1 AG1< AG1> F0 F0.2 +g1 B0.1 B0 -p1 RS1< RS1> -g1"


def test_batch_norm_over_all_replicas_cuts_layers_in_two() -> None:
    norms = replace(FOUR, norms=(0, 1, 0, 0), statistics=True)
    words = [i for i in lower(parse("dp=2,zero=1"), norms).body("step")[0] if i.base == "ReduceScatter"]
    assert {i.bucket for i in words} == {-1}, "one bucket of everything, for segments end within layers"
    check(lower(parse("dp=2,zero=1"), norms))
    found = lower(parse("dp=2,zero=3"), norms)
    check(found)
    assert {i.bucket for i in found.body("step")[0] if i.base == "ReduceScatter"} == {0, 1}
    with pytest.raises(PlanError, match="leave bucket_bytes out"):
        lower(parse("dp=2,zero=2,bucket_bytes=8"), norms)


# -- mistakes ----------------------------------------------------------------------------------------------------

ONE, TWO, THREE = (f"dp=2,zero={zero},bucket_bytes=16" for zero in (1, 2, 3))
SEVERAL = "dp=2,zero=2,microbatches=2"


def early(op: str, before: str, **wanted: object) -> Callable[[Row], Row]:
    """A change: the first that matches goes in front of the first `before` of its segment."""

    def change(row: Row) -> Row:
        taken = next(i for i in row if matches(i, op, wanted))
        rest = [i for i in row if i is not taken]
        at = next(n for n, i in enumerate(rest) if i.op == before and i.segment == taken.segment)
        return [*rest[:at], taken, *rest[at:]]

    return change


def doubled(op: str, **wanted: object) -> Callable[[Row], Row]:
    """A change: what matches first stands twice."""

    def change(row: Row) -> Row:
        at = next(n for n, i in enumerate(row) if matches(i, op, wanted))
        return [*row[: at + 1], row[at], *row[at + 1 :]]

    return change


P, G = {"buffer": "params", "bucket": 0}, {"buffer": "grads", "bucket": 0}
SEEDED: dict[str, tuple[str, Callable[[Row], Row], str]] = {
    "never gathered": (THREE, without("AllGather", **P, rule="B"), "B0: its segment's parameters have been released"),
    "not gathered yet": (THREE, without("AllGather", **P, rule="F"), "F0: its segment's parameters are not gathered"),
    "no memory to gather": (THREE, without("Reserve", **P, rule="F"), "no memory for the parameters of segment 0"),
    "memory twice": (THREE, doubled("Reserve", **P), "the parameters of segment 0 have memory already"),
    "freed early": (THREE, early("Release", "B", **P, rule="B"), "B0: its segment's parameters have been released"),
    "freed early, F": (THREE, early("Release", "F", **P, rule="F"), "F0: its segment's parameters have been released"),
    "freed twice": (THREE, doubled("Release", **P), "the parameters of segment 0 have no memory to release"),
    "freed on its way": (THREE, early("Release", "AllGatherWait", **P, rule="F"), "are released on their way"),
    "never freed": (THREE, without("Release", **P, rule="B"), "the update comes while segment 0 of stage 0 is whole"),
    "never freed, gradients": (THREE, without("Release", **G), "the gradients of segment 0 of stage 0 are never"),
    "no memory to add to": (TWO, without("Reserve", **G), "B0: there is no memory for its segment's gradients"),
    "freed before reduced": (TWO, early("Release", "ReduceScatterStart", **G), "are released before they are reduced"),
    "not reduced": (SEVERAL, without("ReduceScatter", **G, microbatch=1), "are released before they are reduced"),
    "nothing to reduce": (TWO, early("ReduceScatterStart", "B", **G), "no gradients have been added to bucket 0"),
    "update before reduced": (
        TWO,
        moved("Update", "ReduceScatterWait", rule="step"),
        "does not wait for the reduction",
    ),
    "update without reducing": (ONE, without("ReduceScatter", **G), "the update comes after 1 of 2 buckets were"),
    "reduced too early": (
        "dp=2,zero=1,microbatches=2",
        moved("ReduceScatterStart", "B", bucket=0),
        "bucket 0 is reduced after 1 of 2",
    ),
    "not gathered": (ONE, without("AllGather", **P), "bucket 0 of stage 0 is not gathered after the update"),
    "gathered before the update": (ONE, moved("AllGather", "Update", **P), "the parameters are gathered before the"),
}


@pytest.mark.parametrize("name", SEEDED)
def test_mistakes_with_shares_are_refused_where_they_are(name: str) -> None:
    plan, change, why = SEEDED[name]
    check(made(plan))
    assert why in refused(edited(made(plan), 1, change), 1)


def test_shares_are_held_to_it_in_evaluation_too() -> None:
    assert "are not gathered" in refused(edited(made(THREE), 0, without("AllGather", **P), "evaluate"), 0)
    assert "never released" in refused(edited(made(THREE), 0, without("Release", **P), "state"), 0)


# -- the seam ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("own", [True, False], ids=["mailbox", "exchange"])
def test_equal_parts_are_summed_and_gathered(ranks: int, own: bool) -> None:
    post = Post()
    comms = [LocalComm(post, range(ranks), rank) for rank in range(ranks)]
    given = [torch.arange(3.0 * ranks) * (rank + 1) for rank in range(ranks)]
    total = sum(given, torch.zeros(3 * ranks))
    scatter = LocalComm.reduce_scatter_start if own else exchange.reduce_scatter_start
    gather = LocalComm.all_gather_start if own else exchange.all_gather_start
    requests = [scatter(comm, t) for comm, t in zip(comms, given, strict=True)]  # type: ignore[operator]
    assert all(request.ready() for request in requests)
    for rank, request in enumerate(requests):
        request.wait()
        assert torch.equal(exchange.parts(given[rank], ranks)[rank], exchange.parts(total, ranks)[rank])
    mine = [torch.full((2 * ranks,), -1.0) for _ in range(ranks)]
    for rank, t in enumerate(mine):
        exchange.parts(t, ranks)[rank].fill_(rank)
    for request in [gather(comm, t) for comm, t in zip(comms, mine, strict=True)]:  # type: ignore[operator]
        request.wait()
    assert all(t.tolist() == [float(rank) for rank in range(ranks) for _ in range(2)] for t in mine)
    assert not any(post.sums.values()) and not any(post.mail.values())


def test_labels() -> None:
    words = [Instruction("Reserve", bucket=3, buffer="params"), Instruction("Release", bucket=0, buffer="grads")]
    assert [i.label() for i in words] == ["+p3", "-g0"]
