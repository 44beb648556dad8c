"""The checker: good programs pass, and each seeded mistake is refused with a picture that points at it."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from paraxis.errors import Deadlock, PlanError, ProgramError
from paraxis.plan.plan import Plan, parse
from paraxis.plan.space import space
from paraxis.program.check import check
from paraxis.program.cut import Layout
from paraxis.program.faults import FAULTS, _nothing
from paraxis.program.grid import cell, draw, explain, several, simplify
from paraxis.program.instructions import MOMENTS, Instruction, Program, parse_program
from paraxis.program.lower import lower
from paraxis.program.shares import Split, Tokens

I = Instruction  # noqa: E741
Row = list[Instruction]
SPLITS = (Split("columns", 12, ("0", "3"), ((0, 1, "grad"), (3, 2, "act")), (0, 3)),)
PLAIN = Layout(parameters=(2, 0, 3, 4), splits=SPLITS)
TIED = Layout(parameters=(2, 0, 3, 4), clip=True, tied=(("w", (0, 2, 3)),))
TOKENS = (Tokens((2,), 4, splits=(0,), meets=((0, 1, "gather"), (3, 2, "scatter"))),)
RICH = Layout(
    parameters=(2, 0, 3, 4),
    splits=SPLITS,
    tokens=TOKENS,
    shares=("m", "o", "m", "m"),
    weight_in_data=True,
    statistics=True,
    clip=True,
    tied=TIED.tied,
)
ODD = (
    "microbatches=3",
    "dp=2,bucket_bytes=8",
    "dp=3,pp=2,microbatches=3,bucket_bytes=8",
    "pp=4,microbatches=2",
    "pp=4,schedule=gpipe,microbatches=9",
    "pp=3,schedule=layerwise,microbatches=3",
    "pp=2,interleave=2",
    "dp=2,pp=2,interleave=2,schedule=gpipe,microbatches=5",
    "dp=2,pp=2,interleave=2,schedule=gpipe,microbatches=2,bucket_bytes=8",
    "dp=2,pp=2,schedule=interleaved,microbatches=5,bucket_bytes=8",
    "pp=2,schedule=interleaved,microbatches=2",
    "dp=2,pp=2,schedule=zb-h1,microbatches=5,bucket_bytes=8",
    "dp=2,pp=3,schedule=zb-h2,microbatches=7",
    "pp=4,schedule=zb-h2,microbatches=5",
    "dp=2,pp=4,schedule=zb-h1,microbatches=6,sync=average@3",
    "dp=2,pp=4,microbatches=5,sync=average@3",
    "dp=2,sync=average@1",
    "dp=2,zero=1",
    "dp=3,pp=2,zero=2,microbatches=3,bucket_bytes=8",
    "dp=2,pp=2,zero=3,schedule=gpipe,microbatches=2,bucket_bytes=8",
    "dp=2,pp=2,interleave=2,zero=1,schedule=gpipe,microbatches=2",
)


def made(text: str, layout: Layout = PLAIN) -> Program:
    return lower(parse(text), layout, steps_per_epoch=5)


def edited(program: Program, rank: int, change: Callable[[Row], Row], body: str = "step") -> Program:
    """The program with one rank's body changed."""
    rows = [tuple(change(list(row))) if r == rank else row for r, row in enumerate(program.body(body))]
    return replace(program, bodies=tuple((n, tuple(rows) if n == body else b) for n, b in program.bodies))


def without(op: str, **wanted: object) -> Callable[[Row], Row]:
    """A change: leave out what matches (its Start and its Wait, if `op` names both)."""
    return lambda row: [i for i in row if not matches(i, op, wanted)]


def swapped(first: int, second: int) -> Callable[[Row], Row]:
    """A change: two slots change places."""

    def change(row: Row) -> Row:
        row[first], row[second] = row[second], row[first]
        return row

    return change


def moved(op: str, before: str, **wanted: object) -> Callable[[Row], Row]:
    """A change: what matches `op` goes in front of the last instruction `before`."""

    def change(row: Row) -> Row:
        taken = [i for i in row if matches(i, op, wanted)]
        rest = [i for i in row if not matches(i, op, wanted)]
        assert taken, "the mistake is made"
        at = max(n for n, i in enumerate(rest) if i.op == before)
        return [*rest[:at], *taken, *rest[at:]]

    return change


def matches(i: Instruction, op: str, wanted: dict[str, object]) -> bool:
    return op in (i.op, i.base) and all(getattr(i, key) == value for key, value in wanted.items())


def refused(program: Program, rank: int | None = None) -> str:
    """Why a program is ill-formed, once its picture has been looked at: the arrow stands under the fault's cell."""
    with pytest.raises(ProgramError) as caught:
        check(program)
    reason, *picture = str(caught.value).splitlines()
    words = reason.replace(",", "").replace(":", "").split()
    place, slot, body = int(words[1]), int(words[3]), words[5] if words[4] == "of" else "step"
    if rank is not None:
        assert place == rank, reason
    arrow = next(n for n, line in enumerate(picture) if line.strip() == "^")
    assert sum("^" in line for line in picture) == 1
    assert picture[arrow - 1].startswith(f"rank {place}")
    if slot < len(program.body(body)[place]):
        label = cell(program.body(body)[place][slot], several(program.body(body)))
        assert picture[arrow - 1][picture[arrow].index("^") :].split()[0] == label, str(caught.value)
    return reason


@pytest.mark.parametrize("layout", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("plan", [*space(6, 4, comms=("mpi",)), *map(parse, ODD)], ids=Plan.short)
def test_every_plan_of_the_space_passes(plan: Plan, layout: Layout) -> None:
    peaks = check(lower(plan, layout, steps_per_epoch=5)).peak_live
    stages = [plan.mesh.coordinates(rank)[1] for rank in range(plan.mesh.size)]
    m = plan.microbatches
    v = plan.interleave
    live = {"": lambda s: 1, "layerwise": lambda s: v, "gpipe": lambda s: m * v, "1f1b": lambda s: min(plan.pp - s, m)}
    group = -(-m // max(1, m // plan.pp))
    live["interleaved"] = lambda s: min((v - 1) * group + 2 * (plan.pp - 1 - s) + 1, m * v)
    live["zb-h1"] = lambda s: min(plan.pp, m)
    live["zb-h2"] = lambda s: min(2 * plan.pp - 1, m)
    assert peaks == tuple(live[plan.schedule](stage) for stage in stages)


def test_a_long_period_is_checked_as_fast_as_a_short_one() -> None:
    check(made("dp=2,sync=average@1000000"))


PIPE, GPIPE, DATA = "pp=2,microbatches=3", "pp=2,schedule=gpipe,microbatches=3", "dp=2,bucket_bytes=16,microbatches=2"
OWNER = "dp=2,engine=native,gradients=owner"
LIGHT = "pp=2,schedule=gpipe,microbatches=3,recompute=all"
SEEDED = {
    "lost activation": (PIPE, 1, without("RecvAct", microbatch=1), "F1 before its activation has arrived"),
    "lost gradient": (PIPE, 0, without("RecvGrad", microbatch=2), "B2 before its gradient has arrived"),
    "samples not loaded": (PIPE, 0, without("Load", microbatch=1), "F1 before its samples are loaded"),
    "targets not loaded": (PIPE, 1, without("Load", microbatch=1), "F1 before its samples are loaded"),
    "lost send": (PIPE, 0, without("SendAct", microbatch=2), ""),
    "backward first": ("serial", 0, swapped(2, 3), "B0 before its forward"),
    "forward twice": ("serial", 0, lambda row: [*row[:3], *row[2:]], "F0 runs twice"),
    "backward twice": ("serial", 0, lambda row: [*row[:4], *row[3:]], "B0 runs twice"),
    "segments out of order": (DATA, 0, swapped(2, 3), "F0.1 before the segment in front of it"),
    "segments back out of order": (DATA, 0, swapped(4, 5), "B0 before the segment behind it"),
    "missing backward": (
        "microbatches=3",
        0,
        without("B", microbatch=1),
        "the activation of microbatch 1 is never used",
    ),
    "sent before it is made": (GPIPE, 0, moved("SendActStart", "Load", microbatch=2), "before F2 has made it"),
    "gradient sent before it is made": (PIPE, 1, moved("SendGradStart", "B", microbatch=2), "before B2 has made it"),
    "reduced too early": (DATA, 0, moved("AllReduceStart", "B", bucket=0), "bucket 0 is reduced after 1 of 2"),
    "update without waiting": (DATA, 0, moved("Update", "AllReduceWait", rule="step"), "does not wait for the"),
    "update without reducing": (DATA, 1, without("AllReduce", bucket=1), "after 1 of 2 buckets were reduced"),
    "open token": (PIPE, 0, without("SendActWait", microbatch=2), "SendActStart sA2< (token 4) is never awaited"),
    "wait without start": (PIPE, 0, without("SendActStart", microbatch=0), "SendActWait of token 1 has no start"),
    "token used twice": (PIPE, 0, lambda row: [replace(i, token=1) if i.starts else i for i in row], "already open"),
    "update too early": ("microbatches=2", 0, moved("Update", "B", rule="step"), "while microbatch 1 is between F and"),
    "never computed again": (
        LIGHT,
        0,
        without("F", rule="again", microbatch=1),
        "B1 before its forward, which has kept",
    ),
    "computed again twice": (
        LIGHT,
        0,
        lambda row: [i for i in row for _ in range(1 + (i.rule == "again" and i.microbatch == 1))],
        "F1' computes again a forward that has kept everything",
    ),
    "computed again before the first time": (
        LIGHT,
        0,
        lambda row: [replace(i, rule={"light": "again", "again": "light"}.get(i.rule, i.rule)) for i in row],
        "F0' computes again a forward before it runs for the first time",
    ),
    "computed again though all was kept": (
        LIGHT,
        0,
        lambda row: [replace(i, rule="" if i.rule == "light" else i.rule) for i in row],
        "F0' computes again a forward that has kept everything",
    ),
    "computed again with other masks": (
        LIGHT,
        0,
        lambda row: [replace(i, slice=0) if i.rule == "again" else i for i in row],
        "F1' is of slice 0, but its first forward was of slice 1",
    ),
    "weight gradients forgotten": (OWNER, 0, without("W"), "the update comes without W0"),
    "weight gradients without factors": (
        OWNER,
        1,
        without("AllGather", buffer="factors"),
        "W0 before the other",
    ),
    "factors before they are made": (
        OWNER,
        1,
        moved("AllGatherStart", "I", buffer="factors"),
        "before every",
    ),
    "weight gradients twice": (OWNER, 0, lambda row: [*row[:7], *row[6:]], "W0 without an I0 before it"),
    "unknown microbatch": ("serial", 0, lambda row: [*row, I("F", 0, 0, 5)], "there are 1 microbatches and 1 stages"),
    "unknown stage": ("serial", 0, lambda row: [*row, I("F", 7, 0, 0)], "there are 1 microbatches and 1 stages"),
}


@pytest.mark.parametrize("name", [name for name in SEEDED if name != "lost send"])
def test_seeded_mistakes_of_one_rank_are_refused_where_they_are(name: str) -> None:
    plan, rank, change, words = SEEDED[name]
    check(made(plan))
    assert words in refused(edited(made(plan), rank, change), rank)


def test_a_lost_send_stalls_its_receiver() -> None:
    plan, rank, change, _ = SEEDED["lost send"]
    with pytest.raises(Deadlock, match="rank 1: RecvActWait stage=1 microbatch=2 peer=0"):
        check(edited(made(plan), rank, change))


COPIES = "dp=2,pp=2,microbatches=2"


@pytest.mark.parametrize("plan", [COPIES, "pp=4,microbatches=2", "dp=2,pp=2,comm=openmp,engine=native"])
def test_copies_of_a_weight_that_are_never_added_up_are_refused(plan: str) -> None:
    assert "norm before the copies of w have been added up" in refused(
        edited(made(plan, TIED), 0, without("AllReduce", buffer="tied")), 0
    )


@pytest.mark.parametrize("plan", [COPIES, "dp=2,pp=2,comm=openmp,engine=native"])
def test_copies_of_a_weight_are_added_up_when_their_gradients_are_complete(plan: str) -> None:
    early = edited(made(plan, TIED), 3, moved("AllReduce", "B", buffer="tied"))
    assert "the copies of w are added up before their last backward" in refused(early, 3)


def test_copies_of_a_weight_and_its_replicas_are_added_up_in_one_order_on_all_ranks() -> None:
    """Else one rank would add what its replicas have reduced to what the other's have not."""

    def beside(grads: str) -> Callable[[Row], Row]:
        def change(row: Row) -> Row:
            tied, rest = [i for i in row if i.buffer == "tied"], [i for i in row if i.buffer != "tied"]
            at = next(n for n, i in enumerate(rest) if (i.op, i.buffer) == (grads, "grads")) + grads.endswith("Wait")
            return [*rest[:at], *tied, *rest[at:]]

        return change

    private, shared = made(COPIES, TIED), made("dp=2,pp=2,comm=openmp,engine=native", TIED)
    check(edited(private, 2, beside("AllReduceWait")))
    assert "must be added up after the replicas' red" in refused(edited(private, 2, beside("AllReduceStart")), 2)
    for scattering in (shared, made("dp=2,pp=2,zero=1", TIED)):
        check(edited(scattering, 1, beside("ReduceScatterStart")))
        late = edited(scattering, 1, beside("ReduceScatterWait"))
        assert "must be added up before the replicas' red" in refused(late, 1)


def test_shares_of_a_tied_parameter_are_added_up_when_they_are_complete() -> None:
    program = made("dp=2,pp=2,zero=2,microbatches=2", TIED)
    own = program.own_buckets(1)[0]
    check(program)

    def early(row: Row) -> Row:
        """The copies are added up before the last reduction of their bucket."""
        tied, rest = [i for i in row if i.buffer == "tied"], [i for i in row if i.buffer != "tied"]
        at = max(n for n, i in enumerate(rest) if i.op == "ReduceScatterStart" and (i.stage, i.bucket) == own)
        return [*rest[:at], *tied, *rest[at:]]

    assert "w must be added up after the replicas' red" in refused(edited(program, 1, early), 1)
    lost = [("ReduceScatter", "are released before they are reduced"), ("Release", "have memory already")]
    for op, why in lost:
        change = without(op, buffer="grads", stage=own[0], bucket=own[1], microbatch=0)
        assert why in refused(edited(program, 1, change), 1)


def test_a_weight_that_a_rank_has_no_copy_of_and_one_added_up_twice_are_refused() -> None:
    def twice(row: Row) -> Row:
        tied = [i for i in row if i.buffer == "tied"]
        at = next(n for n, i in enumerate(row) if i.rule == "norm")
        return [*row[:at], *(replace(i, token=99) for i in tied), *row[at:]]

    assert "adds up w twice" in refused(edited(made(COPIES, TIED), 0, twice), 0)
    copies = made("pp=4,microbatches=2", TIED)
    own = [i for i in copies.body("step")[0] if i.buffer == "tied"]
    assert "this rank has no copy of tie 0" in refused(edited(copies, 1, lambda row: [*row[:-1], *own, row[-1]]), 1)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_microbatch_left_out_is_refused(stage: int) -> None:
    def gone(row: Row) -> Row:
        return [i for i in row if not (i.microbatch == 2 and i.op in "FB") and i.base not in ("SendAct", "SendGrad")]

    assert "microbatch 2 is never computed" in refused(edited(made(GPIPE), stage, gone), stage)


def test_an_activation_kept_for_ever_is_refused() -> None:
    leak = edited(edited(made(GPIPE), 0, without("B", microbatch=1)), 0, without("Update", rule="step"))
    assert "the activation of microbatch 1 is never used: its backward is missing" in refused(leak, 0)


def test_crossed_sends_are_refused() -> None:
    """Stage 0 sends microbatch 1 where 0 is due: every message exists, but each waits for the other."""

    def cross(row: Row) -> Row:
        other = {0: 1, 1: 0}
        sends = {i: replace(i, microbatch=other.get(i.microbatch, i.microbatch)) for i in row if i.base == "SendAct"}
        return [sends.get(i, i) for i in row]

    assert "before F1 has made it" in refused(edited(made(PIPE), 0, cross), 0)


def test_a_send_to_the_wrong_rank_is_refused() -> None:
    def astray(row: Row) -> Row:
        return [replace(i, peer=1) if i.base == "SendAct" else i for i in row]

    program = edited(made("pp=3,microbatches=2"), 1, astray)
    with pytest.raises((ProgramError, Deadlock), match=r"rank \[?\d"):
        check(program)


def test_a_receive_that_nobody_sends_to_is_refused() -> None:
    """It is never awaited by anyone else, so only the pairing can find it."""
    extra = [I("SendActStart", 0, microbatch=2, peer=1, token=99), I("SendActWait", 0, microbatch=2, peer=1, token=99)]
    program = edited(made(PIPE), 0, lambda row: [*row, extra[0]], "step")
    assert "token 99) is never awaited" in refused(program, 0)
    with pytest.raises(Deadlock, match="rank 0: SendActWait stage=0 microbatch=2 peer=1 token=99"):
        check(edited(made(PIPE), 0, lambda row: [*row, *extra]))


@pytest.mark.parametrize("body", ["step", "score"])
def test_a_collective_that_only_some_join_is_a_deadlock(body: str) -> None:
    program = made("dp=2", RICH)
    buffer = "statistics" if body == "step" else "score"
    with pytest.raises(Deadlock, match=f"rank 0: AllReduceWait axis=dp buffer={buffer}"):
        check(edited(program, 1, without("AllReduce", buffer=buffer), body))


def test_an_agreement_that_only_some_join_is_a_deadlock() -> None:
    for body in ("average", "settle"):
        with pytest.raises(Deadlock, match="AllReduceWait axis=dp buffer=params"):
            check(edited(made("dp=2,sync=average@4"), 0, without("AllReduce", buffer="params"), body))


def test_blocking_collectives_in_opposite_order_are_a_deadlock() -> None:
    program = made("dp=2", RICH)

    def opposite(row: Row) -> Row:
        """The statistics go first, then the gradients."""
        early = [i for i in row if i.buffer == "statistics"]
        rest = [i for i in row if i.buffer != "statistics"]
        at = next(n for n, i in enumerate(rest) if i.op == "AllReduceStart")
        return [*rest[:at], *early, *rest[at:]]

    with pytest.raises(Deadlock) as caught:
        check(edited(program, 1, opposite))
    message = str(caught.value)
    assert "buffer=grads" in message and "buffer=statistics" in message


def test_collectives_under_way_in_opposite_order_are_refused() -> None:
    """Both started before either is awaited: no stall, but bucket 0 would be added to bucket 1."""
    program = made(DATA)

    def opposite(row: Row) -> Row:
        starts = [n for n, i in enumerate(row) if i.op == "AllReduceStart"]
        rest = [i for n, i in enumerate(row) if n not in starts]
        at = max(n for n, i in enumerate(rest) if i.op == "B") + 1
        return [*rest[:at], *(row[n] for n in reversed(starts)), *rest[at:]]

    assert "collectives are matched by their order" in refused(edited(program, 1, opposite), 0)


def test_a_sum_here_and_a_mean_there_are_refused() -> None:
    def mean(row: Row) -> Row:
        return [replace(i, reduction="mean") if i.buffer == "grads" else i for i in row]

    assert "collectives are matched by their order" in refused(edited(made("dp=2"), 1, mean), 0)


@pytest.mark.parametrize("body", ["step", "evaluate"])
@pytest.mark.parametrize("plan", ["dp=2,pp=2,microbatches=2", "microbatches=3", "dp=2,bucket_bytes=8"])
def test_a_slice_of_the_batch_computed_twice_and_another_never_are_refused(plan: str, body: str) -> None:
    program = made(plan)
    last, slices = program.mesh.size - 1, range(program.mesh.dp * program.microbatches)

    def doubled(row: Row) -> Row:
        return [replace(i, slice=0) if i.slice == slices[-1] and i.op in ("Load", "F", "B") else i for i in row]

    found = [0, *slices[:-1]]
    with pytest.raises(ProgramError) as caught:
        check(edited(program, last, doubled, body))
    wanted = f"stage {len(program.stages) - 1} of {body} computes slices {found} of the batch instead of {[*slices]}"
    assert str(caught.value) == wanted


def blocking(row: Row) -> Row:
    """Sends are awaited where they start, receives are posted only when they are needed: 1F1B as it must not be."""
    waits = {i.token: i for i in row if i.waits}
    starts = {i.token: i for i in row if i.starts}
    out: Row = []
    for i in row:
        if i.base.startswith("Send"):
            out += [i, waits[i.token]] if i.starts else []
        elif i.base.startswith("Recv"):
            out += [starts[i.token], i] if i.waits else []
        else:
            out.append(i)
    return out


def test_a_pipeline_of_blocking_sends_is_a_deadlock_that_names_everybody() -> None:
    program = made("dp=1,pp=3,microbatches=4")
    for rank in range(3):
        program = edited(program, rank, blocking)
    with pytest.raises(Deadlock) as caught:
        check(program)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("ranks [0, 1") and "wait for each other" in lines[0]
    for rank in range(3):
        assert lines[1 + rank].startswith(f"  rank {rank}: ") and len(lines[1 + rank].split()) > 2
    assert "SendActWait" in lines[1] and any(line.strip() == "^" for line in lines[4:])
    assert caught.value.exit_code == 1


def test_weights_must_not_change_between_forward_and_backward() -> None:
    program = made("pp=2,schedule=gpipe,microbatches=2,dp=2,sync=average@1")

    def early(row: Row) -> Row:
        average = [i for i in row if i.buffer == "params"]
        rest = [i for i in row if i.buffer != "params"]
        at = next(n for n, i in enumerate(rest) if i.op == "B")
        return [*rest[:at], *average, *rest[at:]]

    assert "writes parameters while microbatch 0 is between F and B" in refused(edited(program, 0, early, "average"))


def test_a_body_needs_all_ranks() -> None:
    program = made("dp=2")
    short = tuple((name, ranks[:1] if name == "evaluate" else ranks) for name, ranks in program.bodies)
    with pytest.raises(ProgramError, match="body evaluate has 1 ranks, but the mesh has 2"):
        check(replace(program, bodies=short))


def test_grids_line_up() -> None:
    ranks = made("pp=2,microbatches=12").body("step")
    lines = draw(ranks, computing_only=True)
    assert [line.split(" | ")[0] for line in lines] == ["rank 0", "rank 1"]
    assert [line.split()[3] for line in lines] == ["zero", "zero"] and "B11" in lines[0]
    assert lines[0].index("F0") == lines[1].index("F0")
    joined = simplify(made("dp=2,microbatches=2").body("step"))
    assert [i.op for i in joined[0]].count("AllReduceWait") == 0 and "AllReduceStart" in [i.op for i in joined[0]]
    assert "local x2 then average" in explain(made("dp=2,sync=average@3"))


# -- batch norm over all replicas --------------------------------------------------------------------------------

WHOLE = replace(RICH, norms=(1, 2, 0, 0))


@pytest.mark.parametrize("plan", ["dp=2", "dp=3,pp=2", "dp=2,pp=4", "dp=2,engine=native", "dp=2,pp=2,engine=native"])
def test_batch_norms_cut_stages_and_replicas_meet_there(plan: str) -> None:
    program = made(plan, WHOLE)
    check(program)
    assert program.synchronised() and parse_program(program.text()) == program
    for rank, row in enumerate(program.body("step")):
        first, last = program.stages[program.mesh.coordinates(rank)[1]]
        norms = sum(WHOLE.norms[first:last])
        joined = [(i.buffer, i.bucket) for i in row if i.base == "AllReduce" and i.starts and "moment" in i.buffer]
        assert joined == [("moments", k) for k in range(norms)] + [("moment_grads", k) for k in reversed(range(norms))]
        grads = [i for i in row if i.starts and i.buffer == "grads"]
        assert len(grads) == 1, "gradients are reduced at once"
    assert "ARm of" in explain(program) and any("ARm1" in line for line in draw(simplify(program.body("step"))))
    assert not any(i.buffer in MOMENTS.values() for row in program.body("evaluate") for i in row)


def test_what_computes_alone_is_not_cut_by_batch_norms() -> None:
    for plan in ("serial", "pp=2", "pp=2,microbatches=2"):
        assert made(plan, WHOLE) == made(plan, RICH)


@pytest.mark.parametrize("plan", ["dp=2,microbatches=2", "dp=2,sync=average@2", "dp=2,bucket_bytes=8"])
def test_what_cannot_have_batch_norms_over_all_replicas_is_refused(plan: str) -> None:
    with pytest.raises(PlanError, match=r"microbatches=1|leave it out|leave bucket_bytes out"):
        made(plan, WHOLE)


SUMS: dict[str, tuple[Callable[[Row], Row], str]] = {
    "never": (without("AllReduce", buffer="moments", bucket=1), "F0.2 before the replicas' sums of batch norm 1"),
    "never back": (without("AllReduce", buffer="moment_grads", bucket=1), "batch norm 1's gradient"),
    "too late": (moved("AllReduceWait", "Update", buffer="moments", bucket=0), "F0.1 before the replicas' sums"),
    "too early": (swapped(2, 3), "must stand between segments 0 and 1"),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_in_the_wrong_place_are_refused(name: str) -> None:
    change, why = SUMS[name]
    assert why in refused(edited(made("dp=2", WHOLE), 1, change), 1)


# -- faults ----------------------------------------------------------------------------------------------------

CARRIERS = [
    *map(parse, ("dp=2", "dp=2,microbatches=2", "dp=2,pp=2,microbatches=2", "dp=2,sync=average@2", "serial", "tp=2"))
]
CARRIERS.append(parse("dp=2,sync=diloco@2"))
CARRIERS += map(parse, ("dp=2,zero=1", "dp=2,zero=3,microbatches=2,bucket_bytes=8"))
CARRIERS += map(parse, ("pp=2,microbatches=2,recompute=all", "dp=2,pp=2,zero=2,microbatches=2,schedule=zb-h1"))
CARRIERS.append(parse("tp=2,sequence=1"))
THREADS = parse("tp=2,engine=native")  # for what only they can have


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_changes_the_program_or_spoils_an_engine(name: str) -> None:
    """That a spoiled engine computes something else is what tests/conformance shows."""
    fault = FAULTS[name]
    able = [plan for plan in CARRIERS if fault.needs(plan)] or [plan for plan in [THREADS] if fault.needs(plan)]
    assert able and fault.what
    for plan in able:
        program = lower(plan, replace(RICH, norms=(0, 1, 0, 2)) if name == "local-moments" else RICH)
        mutated = fault.mutated(plan, program)
        assert (mutated != program) != (fault.spoil is not _nothing), "one of both, not both"
        assert [(n, len(ranks)) for n, ranks in mutated.bodies] == [(n, len(ranks)) for n, ranks in program.bodies]
        for body in ("evaluate", "score"):
            assert mutated.body(body) == program.body(body)


@pytest.mark.parametrize("name", [name for name in FAULTS if not FAULTS[name].needs(Plan())])
def test_a_plan_that_cannot_have_a_fault_is_told_what_it_needs(name: str) -> None:
    with pytest.raises(PlanError, match=r"needs (dp > 1|pp > 1|tp > 1|sync=(average|diloco)@H|zero|recompute=all)"):
        FAULTS[name].mutated(Plan(), lower(Plan(), PLAIN))


ORDER = ["dropped-reduction", "stale-bucket", "early-update", "lost-backward", "all-data", "wrong-mask"]


@pytest.mark.parametrize("name", ORDER)
def test_faults_of_order_are_what_the_checker_finds(name: str) -> None:
    plan = parse("dp=2,pp=2,microbatches=2")
    with pytest.raises(ProgramError):
        check(FAULTS[name].mutated(plan, lower(plan, PLAIN)))
