"""Synchronisation rules: their text, their periods and edges, their updates, and numbers that travel packed."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import paraxis.sync
from paraxis.comm.local import LocalComm, Post
from paraxis.comm.payload import CODECS, ROW, PackedSum, packed
from paraxis.engine.kept import keep
from paraxis.errors import Deadlock, PlanError, ProgramError
from paraxis.plan.plan import Plan
from paraxis.plan.plan import parse as plan_of
from paraxis.program.check import check
from paraxis.program.cut import Layout
from paraxis.program.instructions import CROSSING, Instruction, Program, parse_program
from paraxis.program.lower import lower
from paraxis.program.simulate import simulate, uniform
from paraxis.sync.rule import PAYLOADS, buffers, fragment_of, parse, rules, settled, updates

LAYOUT = Layout(parameters=(3, 4))
WRITTEN = (("fragments",), ("overlap",), ("fragments", "overlap"))
APART = [name for name, rule in rules().items() if rule.agreements]


def made(text: str, epoch: int = 1) -> Program:
    program = lower(plan_of(f"dp=2,sync={text}"), LAYOUT, epoch)
    check(program)
    return program


@st.composite
def texts(draw: Callable[..., object]) -> str:
    """Every way to write every rule, its defaults and leading zeros included."""
    rule = draw(st.sampled_from(sorted(rules().values(), key=lambda r: r.name)))
    every = draw(st.sampled_from(["epoch", *map(str, range(20, 28)), "0040"]))
    words = [draw(st.sampled_from(["", *PAYLOADS]))] if "payload" in rule.options else []
    words += [f"{key}={draw(st.integers(1, 4))}" for key in rule.options if key in draw(st.sampled_from(WRITTEN))]
    chosen = draw(st.permutations([word for word in words if word]))
    return ":".join([rule.name + f"@{every}" * bool(rule.agreements), *chosen])


@given(texts())
def test_text_of_a_rule_and_of_its_program_is_read_back(text: str) -> None:
    sync = parse(text)
    assert sync is not None and parse(sync.text()) == sync and len(sync.text()) <= len(text)
    plan = plan_of(f"dp=2,sync={text}")
    assert plan == plan_of(plan.text()) == plan_of(plan.short()) and plan.sync == sync.text()
    program = lower(plan, LAYOUT, 24)
    check(program)
    again = parse_program(program.text())
    assert again == program and again.digest() == program.digest()
    assert program.prologue == ((("begin", 1),) if sync.rule.prologue else ())
    assert program.epilogue == ((("settle", 1),) if sync.rule.epilogue else ())
    wanted = sync.agreements(sync.every or 24)
    meeting = [n + 1 for n in range(program.steps_in_period()) if program.step_body(n) not in ("local", "step")]
    assert meeting == sorted(wanted), "replicas meet where the rule says, and nowhere else"
    assert {b.name for b in program.buffers} & buffers() == set(sync.rule.buffers)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("median@4", "it takes gradient, average@H,"),
        ("average", "with H steps or H=epoch"),
        ("diloco@0", "diloco@H"),
        ("diloco@-3", "diloco@H"),
        ("diloco@", "diloco@H"),
        ("gradient@4", "it takes gradient"),
        ("compressed@4", "average@H, compressed, diloco@H"),
        ("compressed:bf16", "compressed takes none"),
        ("average@4:bf16", "'bf16' is no option; average takes none"),
        ("diloco@4:fp4", "'fp4' is no option; diloco takes bf16, int8, fragments=N, overlap=N"),
        ("diloco@4:payload=bf16", "'payload=bf16' is no option"),
        ("diloco@4:fragments", "'fragments' is no option"),
        ("diloco@4:fragments=0", "'fragments=0' is no option"),
        ("diloco@4:bf16:int8", "gives an option twice"),
        ("diloco@4:fragments=2:fragments=3", "gives an option twice"),
        ("diloco@3:fragments=4", "H=4 or more would do"),
        ("diloco@4:overlap=4", "overlap=4 reaches beyond the step before; overlap=3 or H=5 would do"),
        ("diloco@4:fragments=4:overlap=1", "overlap=1 reaches beyond the step before; H=8 would do"),
    ],
)
def test_bad_text_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(f"dp=2,sync={text}")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_too_short_an_epoch_for_the_fragments_is_refused() -> None:
    with pytest.raises(PlanError, match="H=8 or more"):
        made("diloco@epoch:fragments=8", epoch=7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dp=2,engine=native,sync=diloco@4:bf16", "threads send nothing that could be smaller; leave out bf16"),
        ("dp=2,engine=native,sync=diloco@4:fragments=2", "leave out fragments"),
        ("dp=2,engine=native,sync=diloco@4:overlap=1", "leave out overlap"),
        ("dp=2,engine=native,comm=mpi,sync=diloco@8:fragments=2:overlap=1", "leave out fragments and overlap"),
        ("dp=2,engine=native,sync=compressed", "threads send nothing that could be smaller; take sync=gradient"),
        ("dp=2,engine=native,comm=mpi,sync=diloco@4:int8", "leave out int8"),
    ],
)
def test_what_the_native_engine_cannot_is_refused(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_of(text)
    assert plan_of(text.replace("dp=2,", "")).sync == "gradient", "without replicas it has no effect"


def test_rules_are_found_in_their_folder_and_do_not_share_names() -> None:
    files = {path.stem for path in Path(paraxis.sync.__path__[0]).glob("*.py")} - {"__init__", "rule"}
    assert set(rules()) == files
    assert all(rule.paper[-4:].isdecimal() for rule in rules().values())
    assert len(updates()) == sum(len(rule.updates) for rule in rules().values()), "no two updates of one name"
    assert set(CODECS) == set(PAYLOADS)
    for rule in rules().values():
        assert {name for f in rule.updates for name in updates()[f.__name__][1]} <= {"params", *rule.buffers}
        assert bool(rule.agreements) == bool(rule.emulate) and bool(rule.gradients) == bool(rule.emulate_sum)


def test_whether_replicas_have_met() -> None:
    assert [settled("average@3", n, 3) for n in (2, 3, 4, 6)] == [False, True, False, True]
    assert not settled("diloco@4:fragments=2", 4, 4), "the first fragment has moved on"
    assert settled("gradient", 5, 1)


def test_fragments_meet_in_turn_and_cover_everything() -> None:
    program = made("diloco@50:fragments=4")
    assert program.period == (
        *(("local", 11), ("diloco0", 1), ("local", 12), ("diloco1", 1)),
        *(("local", 11), ("diloco2", 1), ("local", 12), ("diloco3", 1)),
    )
    sizes = {"a": 10, "b": 1, "c": 10, "d": 1, "e": 18}
    part = fragment_of(sizes, 3)
    assert list(part.values()) == sorted(part.values()) and set(part.values()) == {0, 1, 2}
    assert set(fragment_of(sizes, 1).values()) == {0}
    assert fragment_of({"only": 4}, 2) == {"only": 1}


def test_what_is_sent_early_crosses_steps_within_a_period() -> None:
    program = made("diloco@8:fragments=2:overlap=2")
    runs = (("local", 1), ("diloco0", 1), ("local", 1), ("diloco1", 1))
    assert program.period == (*runs, ("local", 1), ("diloco2", 1), ("local", 1), ("diloco3", 1))
    names = [[(i.op, i.rule, i.bucket) for i in program.body(f"diloco{n}")[0][-5:]] for n in range(4)]
    updates_ = [("Update", rule, 0) for rule in ("nesterov", "outer", "mix")]
    assert names[0][-2:] == [("Update", "delta", 0), ("AllReduceStart", "", 0)]
    assert names[1][-4:] == [("AllReduceWait", "", 0), *updates_]
    tokens = [{i.token for i in program.body(f"diloco{n}")[0] if i.buffer == "delta"} for n in range(4)]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3] and min(min(own) for own in tokens) >= CROSSING
    line = simulate(program, uniform(), "diloco1")
    assert line.makespan > 0, "what an earlier step has begun is under way"


def swapped(program: Program, **bodies: str) -> Program:
    """The program with some of its bodies in the place of others."""
    found = tuple((name, program.body(bodies.get(name, name))) for name, _ in program.bodies)
    return Program(**{**vars(program), "bodies": found})


def test_a_token_is_open_from_one_step_to_a_later_one_and_no_longer() -> None:
    """Mutants: nobody waits, waits twice, begins twice, waits first, or begins on some ranks only."""
    program = made("diloco@8:overlap=2")
    check(program)
    for words, why in (
        ({"diloco1": "local"}, "is not awaited when the period ends"),
        ({"local": "diloco1"}, "AllReduceWait of token 65536 has no start"),
        ({"local": "diloco0"}, "delta does not wait for the reduction of delta"),
        ({"diloco0": "diloco1", "diloco1": "diloco0"}, "has no start"),
    ):
        with pytest.raises(ProgramError, match=why):
            check(swapped(program, **words))
    local, sent = program.body("local"), program.body("diloco0")
    bodies = tuple((n, (sent[0], local[1]) if n == "diloco0" else b) for n, b in program.bodies)
    with pytest.raises(ProgramError, match="has no start"):
        check(Program(**{**vars(program), "bodies": bodies}))


def test_what_is_under_way_is_not_written() -> None:
    """Mutant: the outer step does not wait for the sum, which is awaited behind it."""
    program = made("diloco@8:overlap=2")
    late = tuple((*(i for i in rank if not _sum(i)), *filter(_sum, rank)) for rank in program.body("diloco1"))
    bodies = tuple((n, late if n == "diloco1" else b) for n, b in program.bodies)
    with pytest.raises(ProgramError, match="nesterov does not wait for the reduction of delta"):
        check(Program(**{**vars(program), "bodies": bodies}))


def _sum(i: Instruction) -> bool:
    return i.op == "AllReduceWait" and i.buffer == "delta"


def test_a_reduction_that_an_update_does_not_wait_for_is_refused() -> None:
    program = made("diloco@1")
    body = [list(rank) for rank in program.body("diloco")]
    for rank in body:
        late = next(i for i in rank if i.op == "AllReduceWait")
        rank.remove(late)
        rank.append(late)
    bodies = tuple((n, tuple(map(tuple, body)) if n == "diloco" else b) for n, b in program.bodies)
    with pytest.raises(ProgramError, match="nesterov does not wait for the reduction of delta"):
        check(Program(**{**vars(program), "bodies": bodies}))


def test_ranks_that_pack_differently_are_refused() -> None:
    one, other = made("diloco@1:bf16"), made("diloco@1")
    bodies = tuple((n, (b[0], other.body(n)[1])) for n, b in one.bodies)
    with pytest.raises(Deadlock, match=r"ranks \[0, 1\] wait for each other"):
        check(Program(**{**vars(one), "bodies": bodies}))


# -- updates ---------------------------------------------------------------------------------------------------


def test_an_outer_step_is_the_frameworks_nesterov() -> None:
    noise = torch.Generator().manual_seed(0)
    params = torch.randn(7, generator=noise, dtype=torch.float64)
    kept = {name: torch.zeros_like(params) for name in ("snapshot", "delta", "momentum")} | {"params": params}
    theirs = params.clone()
    optimizer = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)

    def follow(rule: str) -> None:
        function, names = updates()[rule]
        function(*(kept[name] for name in names))

    follow("snapshot")
    for _ in range(3):
        change = torch.randn(7, generator=noise, dtype=torch.float64)
        params += change
        theirs.grad = -change
        optimizer.step()
        for rule in ("delta", "nesterov", "outer", "copy"):
            follow(rule)
        torch.testing.assert_close(params, theirs, rtol=1e-14, atol=1e-14)
    assert not torch.equal(kept["momentum"], torch.zeros(7, dtype=torch.float64))


# -- packed sums -----------------------------------------------------------------------------------------------


def summed(parts: list[Tensor], payload: str) -> tuple[list[Tensor], list[int]]:
    """What every rank has in the end, and the bytes that it has sent."""
    post, size = Post(), len(parts)
    own = [part.clone() for part in parts]
    sums = [PackedSum(LocalComm(post, range(size), r), own[r], payload) for r in range(size)]
    for _ in range(2):
        for one in sums:
            one.ready()
    assert all(one.ready() for one in sums)
    for one in sums:
        one.wait()
    assert not any(post.mail.values()), "every letter has been read"
    return own, [one.sent for one in sums]


@given(st.integers(2, 5), st.integers(0, 700), st.sampled_from(PAYLOADS), st.integers(0, 99))
def test_packed_sums_are_the_same_everywhere_and_near_the_sum(size: int, count: int, payload: str, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, generator=noise) for _ in range(size)]
    found, sent = summed(parts, payload)
    assert all(torch.equal(found[0], other) for other in found)
    exact = torch.stack(parts).sum(0)
    bound = 2**-8 if payload == "bf16" else 1 / 254
    largest = max([0.0, *(float(p.abs().max()) for p in [*parts, exact] if count)])
    assert float((found[0] - exact).abs().sum()) <= (size + 1) * bound * largest * count * 1.01
    if count > ROW:
        assert not torch.equal(found[0], exact), "rounding is real"
    whole = count * 4 * 2 * (size - 1) / size  # of float32 in an all-reduce of the least bytes
    share = 1 / 2 if payload == "bf16" else (1 + 4 / ROW) / 4
    assert sum(sent) / size == pytest.approx(share * whole, abs=2 * 4 * size)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_numbers_survive_packing_as_far_as_promised(payload: str) -> None:
    pack, unpack = CODECS[payload]
    x = torch.randn(300, generator=torch.Generator().manual_seed(1)).double()
    x[ROW : 2 * ROW] = 0.0
    letter = pack(x)
    assert letter.nbytes == packed(x, payload) and letter.dtype == torch.uint8
    once = unpack(letter, x)
    assert once.dtype == x.dtype and torch.equal(once[ROW : 2 * ROW], x[ROW : 2 * ROW])
    assert 0 < float((once - x).abs().max()) < 0.02
    assert torch.equal(unpack(pack(once), x), once), "what has been rounded is rounded no more"


# -- what a rule keeps -----------------------------------------------------------------------------------------


def test_fragments_of_buffers_are_contiguous_and_views_meet_the_parameters() -> None:
    params = torch.arange(10.0)
    places = [("a", 0, 3), ("c", 3, 7), ("b", 7, 10)]  # the flat order need not be the network's
    kept = keep(made("diloco@4:fragments=2"), params, places, {"a": 3, "b": 3, "c": 4})
    assert kept is not None and {t.numel() for t in kept.buffers.values()} == {10}
    (first, second), (third,) = kept.views(("params", "delta"), 0), kept.views(("params", "delta"), 1)
    assert first[0].tolist() == [0.0, 1.0, 2.0] and second[0].tolist() == [7.0, 8.0, 9.0]
    assert third[0].tolist() == [3.0, 4.0, 5.0, 6.0]
    for own in (first, second, third):
        own[1].copy_(own[0])
    assert kept.buffer("delta", 0).tolist() == [0.0, 1.0, 2.0, 7.0, 8.0, 9.0]
    assert sorted(kept.buffer("delta", -1).tolist()) == params.tolist()
    assert sum(own[0].numel() for own in kept.views(("params",), -1)) == 10


def test_rows_that_share_a_scale_never_share_a_parameter() -> None:
    kept = keep(made("diloco@4:int8"), torch.ones(10), [("a", 0, 4), ("b", 4, 10)], {"a": 4, "b": 6})
    assert kept is not None and kept.bounds == [(0, 2 * ROW)] and kept.runs == [[(0, 4, 0), (4, 10, ROW)]]
    assert keep(made("average@2"), torch.ones(10), [("a", 0, 10)], {"a": 10}) is None


def test_compressed_gradients_leave_the_weight_of_the_loss_as_it_is() -> None:
    """A weight that only the data tell is summed by itself: bfloat16 would make 1037 samples 1040."""
    layout = Layout(parameters=(3, 4), weight_in_data=True)
    program = lower(plan_of("dp=2,sync=compressed"), layout)
    check(program)
    begun = [(i.buffer, i.payload) for i in program.body("step")[0] if i.starts]
    assert begun == [("totals", ""), ("grads", "bf16")] and not program.epilogue and program.period == (("step", 1),)


@pytest.mark.parametrize("name", APART)
def test_replicas_meet_a_period_apart(name: str) -> None:
    program = made(f"{name}@50")
    meetings = [i for body, times in program.period for i in program.body(body)[0] * times if i.starts]
    assert len(meetings) == 1, "one reduction in 50 steps"
    each: list[Instruction] = [i for i in lower(Plan(dp=2), LAYOUT).body("step")[0] if i.starts]
    assert len(each) == 1


def test_meetings_are_evenly_spaced() -> None:
    for fragments in (2, 3, 5):
        sync = parse(f"diloco@50:fragments={fragments}")
        assert sync is not None
        steps = [0, *sorted(sync.agreements(50))]
        assert steps[-1] == 50 and {b - a for a, b in pairwise(steps)} <= {50 // fragments, 50 // fragments + 1}
