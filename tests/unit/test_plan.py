"""Plans: one text for one program, errors that help, a mesh whose places are unique, a space worth searching."""

from itertools import product
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paraxis.errors import PlanError, ProgramError
from paraxis.plan.plan import Mesh, Plan, parse, period, with_split
from paraxis.plan.rules import COMMS, PRECISIONS, SCHEDULES
from paraxis.plan.schedules import STAGES
from paraxis.plan.space import AVERAGE_EVERY, rungs, space, told_of_space
from paraxis.program.cut import Layout, cut
from paraxis.program.lower import lower

SYNCS = st.one_of(
    st.just("gradient"), st.just("average@epoch"), st.integers(1, 999).map(lambda steps: f"average@{steps}")
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Every valid plan: what has no effect is given as well, and has to vanish."""
    if draw(st.integers(0, 9)) == 0:
        return Plan(engine="plain", threads=draw(st.integers(1, 64)))
    pp = draw(st.integers(1, 5))
    native = draw(st.booleans())
    schedule = draw(st.sampled_from(["", *SCHEDULES]))
    microbatches = draw(st.integers(1, 64))
    stages = pp * (STAGES.get(schedule, 1) if pp > 1 and microbatches > 1 else 1)
    split = draw(st.just(()) | st.lists(st.integers(1, 20), min_size=stages, max_size=stages).map(tuple))
    device = draw(st.sampled_from(["cpu", "cuda", "cuda:1", "+".join(["cpu", "cuda:0", "cuda", "cpu", "cuda"][:pp])]))
    device = "cpu" if native else device
    without = ({"openmp"} if not native else set()) | ({"nccl"} if "cpu" in device else set())
    comms = [comm for comm in COMMS if comm not in without]
    comm = draw(st.sampled_from(["", *comms]))
    dp = draw(st.integers(1, 128))
    inside = not native or (dp * pp > 1 and comm not in ("", "openmp"))
    precision = draw(st.sampled_from([p for p in PRECISIONS if "cuda" in device or p != "tf32"]))
    graphs = draw(st.integers(0, 1)) if "cuda" in device and precision != "fp16" else 0
    return Plan(
        engine="native" if native else "torch",
        dp=dp,
        pp=pp,
        schedule=schedule,
        microbatches=microbatches,
        split=split,
        sync=draw(SYNCS),
        comm=comm,
        threads=draw(st.integers(1, 64)) if inside else 1,
        bucket_bytes=draw(st.integers(0, 1 << 30)),
        device=device,
        precision="fp32" if native else precision,
        compile=0 if native or graphs or schedule.startswith("zb") else draw(st.integers(0, 1)),
        graphs=graphs,
    )


def refusal(text: str) -> str:
    """The message with which a plan's text is refused: one line, for people."""
    with pytest.raises(PlanError) as caught:
        parse(text)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    assert caught.value.exit_code == 2 and isinstance(caught.value, ValueError)
    return message


@given(plans())
@settings(deadline=None)
def test_full_text_gives_the_same_plan_back(plan: Plan) -> None:
    assert parse(plan.text()) == plan
    assert parse(plan.text()).text() == plan.text()


@given(plans())
@example(Plan(pp=2, microbatches=2, schedule="layerwise"))
@settings(deadline=None)
def test_short_text_gives_the_same_plan_back(plan: Plan) -> None:
    assert parse(plan.short()) == plan
    assert len(plan.short()) < len(plan.text())


@pytest.mark.parametrize(
    "text, short",
    [
        ("pp=2,microbatches=2,schedule=layerwise", "pp=2,schedule=layerwise,microbatches=2,comm=mpi"),
        ("pp=2,microbatches=2,schedule=1f1b", "pp=2,microbatches=2,comm=mpi"),
        ("pp=2,schedule=layerwise", "pp=2,comm=mpi"),
    ],
)
def test_short_text_names_a_schedule_that_is_not_implied(text: str, short: str) -> None:
    assert parse(text).short() == short


@given(plans())
@settings(deadline=None)
def test_text_of_every_plan_can_be_a_name(plan: Plan) -> None:
    """Texts are keys of records and words of a shell: no spaces, every key once."""
    keys = [item.partition("=")[0] for item in plan.text().split(",")]
    assert len(keys) == len(set(keys))
    assert not set(plan.text()) & set(" \t\n'\"$;&|<>()")
    assert plan.label() and plan.label() == plan.label().strip()


@pytest.mark.parametrize(
    "text, same",
    [
        ("serial", "dp=1"),
        (" serial ", "pp=1,tp=1"),
        ("comm=gloo", "serial"),
        ("sync=average@4", "serial"),
        ("bucket_bytes=1M", "serial"),
        ("schedule=gpipe", "serial"),
        ("split=8", "serial"),
        ("schedule=gpipe,microbatches=4", "microbatches=4"),
        ("dp=2", "dp=2,comm=mpi"),
        ("dp=2,bucket_bytes=2K", "dp=2,bucket_bytes=2048"),
        ("dp=2,sync=average@4,bucket_bytes=2K", "dp=2,sync=average@4"),
        ("pp=2,schedule=1f1b", "pp=2,schedule=layerwise"),
        ("pp=2,microbatches=4", "pp=2,microbatches=4,schedule=1f1b"),
        ("pp=2,bucket_bytes=1G", "pp=2"),
        (" dp=2 , threads=2,", "threads=2,dp=2"),
    ],
)
def test_keys_without_effect_take_their_default(text: str, same: str) -> None:
    assert parse(text) == parse(same)
    assert parse(text).text() == parse(same).text()


@pytest.mark.parametrize("key", ["threads=3", "bucket_bytes=1", "sync=average@3", "microbatches=2", "comm=gloo"])
def test_keys_with_effect_stay(key: str) -> None:
    assert parse(f"dp=2,{key}") != parse("dp=2")
    assert key in parse(f"dp=2,{key}").short().split(",")


def test_equal_programs_have_equal_text_and_different_programs_have_not() -> None:
    layout = Layout(parameters=(100,) * 6)
    axes = product((1, 2), (1, 2, 3), ("", *SCHEDULES), (1, 2, 4), ("gradient", "average@1", "average@3"), (0, 400))
    texts: dict[str, set[str]] = {}
    for dp, pp, schedule, m, sync, bucket in axes:
        plan = Plan(dp=dp, pp=pp, schedule=schedule, microbatches=m, sync=sync, bucket_bytes=bucket)
        if not (schedule == "zb-h2" and m <= pp):  # of so few microbatches it is ZB-H1
            texts.setdefault(lower(plan, layout, 5).text(), set()).add(plan.text())
    assert [several for several in texts.values() if len(several) > 1] == []
    assert len(texts) == len({text for several in texts.values() for text in several}) > 30


def test_a_leading_zero_is_no_other_plan() -> None:
    assert parse("dp=2,sync=average@08") == parse("dp=2,sync=average@8")


@pytest.mark.parametrize(
    "text, words",
    [
        ("ddp=2", "'ddp' is not a key; did you mean dp?"),
        ("dp=2,shedule=gpipe", "did you mean schedule?"),
        ("dp=2,micro_batches=4", "did you mean microbatches?"),
        ("zzz=1", "it takes one of dp, pp, tp"),
        ("pp=2,microbatches=2,schedule=1fb1", "did you mean 1f1b?"),
        ("pp=2,microbatches=2,schedule=zigzag", "it takes one of layerwise, gpipe, 1f1b"),
        ("dp=2,comm=mpii", "did you mean mpi?"),
        ("pp=2,device=cpu+gpu", "device=cpu+gpu: it takes cpu, cuda, cuda:N, or one for each place of pp: cpu+cuda:0"),
        ("pp=3,devices=cpu+cuda:0", "device=cpu+cuda:0 names 2 devices, but pp=3"),
        ("dp=2,comm=nccl", "comm=nccl: it joins GPUs, and device=cpu; take comm=mpi or gloo"),
        ("graphs=1", "graphs=1: CUDA graphs take device=cuda"),
        ("compile=2", "compile=2: it takes 0 or 1"),
        ("precision=fp8", "precision=fp8: it takes one of fp32, tf32, bf16, fp16"),
        ("device=cuda,engine=native", "device=cuda: engine=native computes on CPUs; take engine=torch"),
        ("dp=2,comm=pigeons", "it takes one of openmp, mpi, gloo, nccl"),
        ("engine=troch", "did you mean torch?"),
        ("dp=2,dp=4", "gives dp twice"),
        ("", "is empty; try serial"),
        (" , ,", "is empty; try serial"),
        ("tp=2,engine=native,comm=mpi", "the threads of a tp group share memory; take comm=openmp, or engine=torch"),
        ("dp=2,tp=2,engine=native,sync=average@4", "share weights that sync=average@4 lets replicas change"),
        ("dp=2,tp=2,engine=native,gradients=owner", "with tp=2 each thread of a group has its own block already"),
        ("pp=2,tp=2,engine=native,interleave=3", "interleave=3: threads of a tp group share one stage"),
        (
            "pp=2,tp=2,engine=native,microbatches=4,schedule=interleaved",
            "schedule=interleaved: threads of a tp group share",
        ),
        (
            "pp=2,tp=2,engine=native,microbatches=4,schedule=zb-h1",
            "zb-h1: threads of a tp group keep nothing for a late",
        ),
        ("dp=0", "dp=0: it takes 1 or more"),
        ("threads=-1", "threads=-1: it takes 1 or more"),
        ("dp=two", "dp=two: it takes a whole number"),
        ("dp=1.5", "it takes a whole number"),
        ("dp=2,bucket_bytes=3Q", "bucket_bytes=3Q: it takes a whole number"),
        ("pp=2,split=3+x", "layer counts such as 3+5"),
        ("pp=2,split=3+5+1", "names 3 stages, but pp=2"),
        ("pp=3,split=3+5", "names 2 stages, but pp=3"),
        ("pp=2,split=0+8", "every stage needs at least one layer"),
        ("dp=2,sync=average", "it takes gradient, average@H, compressed, diloco@H or hogwild, with"),
        ("dp=2,sync=average@0", "or hogwild, with H steps or H=epoch"),
        ("dp=2,sync=median@4", "gradient, average@H"),
        ("engine=plain,dp=2", "parallel plans take engine=torch"),
        ("engine=plain,microbatches=2", "parallel plans take engine=torch"),
    ],
)
def test_bad_text_is_refused_in_one_line_that_helps(text: str, words: str) -> None:
    assert words in refusal(text)


def test_negative_buckets_are_refused() -> None:
    assert "bucket_bytes" in refusal("dp=2,bucket_bytes=-5")


def test_a_key_without_value_is_told_so() -> None:
    assert refusal("dp") == "plan 'dp': dp needs a value, such as dp=2"


def test_period_counts_the_steps_between_agreements() -> None:
    assert [period(sync, 7) for sync in ("gradient", "average@1", "average@12", "average@epoch")] == [1, 1, 12, 7]


def test_what_a_plan_says_of_itself() -> None:
    plan = parse("dp=3,pp=2,threads=2,sync=average@4,microbatches=4")
    assert (plan.mesh.size, plan.workers, plan.exact) == (6, 12, False)
    assert parse("dp=3,pp=2").exact
    assert plan.label() == "dp=3 pp=2 1f1b m=4 average@4 threads=2 mpi"
    assert parse("dp=2,bucket_bytes=3M").label() == "dp=2 bucket=3M mpi"
    assert Plan().label() == Plan().short() == "serial"
    assert Plan(engine="plain", threads=2).label() == "today: 1 process, 2 threads"


def test_stages_can_be_settled_later_but_only_where_there_are_some() -> None:
    assert with_split(parse("pp=2"), [3, 5]) == parse("pp=2,split=3+5")
    assert with_split(Plan(), [8]) == Plan()
    with pytest.raises(PlanError, match="names 3 stages"):
        with_split(parse("pp=2"), [3, 5, 1])


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
@settings(deadline=None)
def test_ranks_and_coordinates_are_inverse(dp: int, pp: int, tp: int) -> None:
    mesh = Mesh(dp, pp, tp)
    places = [mesh.coordinates(rank) for rank in range(mesh.size)]
    assert [mesh.rank(*place) for place in places] == list(range(dp * pp * tp))
    assert set(places) == set(product(range(dp), range(pp), range(tp)))
    assert places[-1] == (dp - 1, pp - 1, tp - 1)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
@settings(deadline=None)
def test_groups_of_an_axis_part_the_ranks(dp: int, pp: int, tp: int) -> None:
    mesh = Mesh(dp, pp, tp)
    for place, (axis, size) in enumerate({"dp": dp, "pp": pp, "tp": tp}.items()):
        groups = {mesh.group(rank, axis) for rank in range(mesh.size)}
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
        for group in groups:
            assert [mesh.coordinates(rank)[place] for rank in group] == list(range(size))
            others = {tuple(c for n, c in enumerate(mesh.coordinates(rank)) if n != place) for rank in group}
            assert len(others) == 1


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(ProgramError, match="axis 'dq' is not one of dp, pp, tp"):
        Mesh(dp=2).group(0, "dq")
    for beyond in ("pp:0+3", "pp:", "pp:1+x"):
        with pytest.raises(ProgramError, match="some of the 3 places of pp"):
            Mesh(dp=2, pp=3).group(0, beyond)
    assert Mesh(dp=2, pp=3).group(5, "pp:0+2") == Mesh(dp=2, pp=3).group(1, "pp:0+2") == (1, 5)


def test_tensor_neighbours_are_next_to_each_other_and_stages_furthest_apart() -> None:
    mesh = Mesh(dp=2, pp=2, tp=2)
    assert [mesh.group(0, axis) for axis in ("tp", "dp", "pp")] == [(0, 1), (0, 2), (0, 4)]


def test_rungs_double_and_end_with_all_workers() -> None:
    assert [rungs(n) for n in (1, 2, 3, 6, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.mark.parametrize("workers", [1, 2, 3, 6, 8, 12, 24])
@pytest.mark.parametrize("layers, more", [(1, False), (5, False), (1, True), (5, True)])
def test_space_holds_distinct_plans_of_every_rung_that_the_network_can_meet(
    workers: int, layers: int, more: bool
) -> None:
    found = space(workers, layers, recompute=more, hybrids=more)
    assert not more or set(space(workers, layers)) <= set(found)
    assert len(set(found)) == len(found)
    assert len({plan.text() for plan in found}) == len({plan.label() for plan in found}) == len(found)
    assert [plan.workers for plan in found[: len(rungs(workers))]] == rungs(workers), "every rung early"
    assert {plan.workers for plan in found} == set(rungs(workers))
    layout = Layout(parameters=(4,) * layers)
    for plan in found:
        assert parse(plan.text()) == parse(plan.short()) == plan
        assert len(cut(plan, layout)) == plan.stages <= layers, "that all can be lowered is what test_check shows"


def test_space_offers_every_kind() -> None:
    found = space(4, 4)
    assert found[0] == Plan(engine="native") and Plan() in found
    assert {plan.comm for plan in found} == {"", "openmp", "mpi", "gloo"}
    assert all((plan.engine == "native") == (plan.comm == "openmp") for plan in found if plan.comm)
    assert {plan.schedule for plan in found} == {"", *SCHEDULES}
    assert {plan.sync for plan in found} == {"gradient", "compressed", f"average@{AVERAGE_EVERY}", "diloco@8"}
    assert {plan.zero for plan in found} == {0, 1, 2, 3} and parse("dp=4,zero=1") in found
    assert parse("dp=2,threads=2") in found and parse("threads=4") in found and parse("dp=2,pp=2") in found
    assert parse("dp=2,tp=2") in found and parse("dp=4,engine=native,gradients=owner") in found


def schedules_over(comm: str, **words: Any) -> set[tuple[str, int]]:
    return {(plan.schedule, plan.microbatches) for plan in space(2, 8, **words) if plan.pp == 2 and plan.comm == comm}


def test_space_asks_each_question_once() -> None:
    """The bubble's on the fastest transport, that of engines on one of each kind, that of transports on all."""
    assert len(space(2, 8)) == 27
    plain = {("1f1b", 4)}
    engines = plain | {("layerwise", 1), ("gpipe", 4)}
    bubble = {("1f1b", 8), ("interleaved", 4), ("zb-h1", 4), ("zb-h2", 4)}
    assert schedules_over("openmp") == engines | bubble
    assert schedules_over("mpi") == engines and schedules_over("gloo") == plain
    assert schedules_over("mpi", native=False) == engines | bubble, "no threads train this network"
    assert schedules_over("openmp", native=False) == engines
    assert schedules_over("gloo", comms=("gloo",)) == engines | bubble
    assert schedules_over("openmp", comms=("openmp",)) == engines | bubble
    messages = [plan for plan in space(2, 8) if plan.zero or plan.sync in ("compressed", "diloco@8")]
    assert len(messages) == 5 and {plan.comm for plan in messages} == {"mpi"}, "threads send nothing that could be less"


def test_people_are_told_what_is_not_tried_everywhere() -> None:
    assert "over openmp only, and what saves memory or messages over mpi only" in told_of_space(("openmp", "mpi"))[0]
    assert "schedules are tried over mpi only" in told_of_space(("openmp", "mpi", "gloo"), native=False)[0]
    assert "schedules are tried over gloo only" in told_of_space(("gloo", "mpi"))[0]
    assert told_of_space(("mpi",)) == told_of_space(()) == []


def test_what_is_asked_first_is_what_a_short_budget_reaches() -> None:
    labels = [plan.label() for plan in space(2, 8)]
    reached = labels[:12]
    assert {"dp=2 openmp", "dp=2 mpi", "dp=2 gloo", "tp=2 openmp", "tp=2 mpi", "pp=2 layerwise mpi"} <= set(reached)
    assert min(map(labels.index, ("pp=2 zb-h1 m=4 openmp", "pp=2 1f1b m=8 openmp"))) >= 12


def test_space_keeps_to_what_it_is_told() -> None:
    assert all(plan.exact for plan in space(8, 4, inexact=False))
    assert {plan.comm for plan in space(8, 4, comms=("gloo",))} == {"", "gloo"}
    assert all(plan.pp == 1 for plan in space(8, 1))


def test_shards_have_buckets_and_no_effect_alone() -> None:
    assert parse("zero=3") == Plan() and parse("pp=2,microbatches=2,zero=2") == parse("pp=2,microbatches=2")
    for zero, bucket in ((0, 0), (1, 0), (2, 512 << 10), (3, 512 << 10)):
        plan = parse(f"dp=2,zero={zero}")
        assert plan.bucket_bytes == bucket and plan.exact and parse(plan.short()) == parse(plan.text()) == plan
        assert "bucket" not in plan.short() + plan.label()
    assert parse("dp=2,zero=3,bucket_bytes=1M").label() == "dp=2 zero=3 bucket=1M mpi"
    assert parse("dp=2,zero=3,bucket_bytes=1M").short() == "dp=2,comm=mpi,bucket_bytes=1048576,zero=3"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("dp=2,zero=4", "it takes 0 (nothing sharded), 1, 2 or 3"),
        ("dp=2,zero=1,engine=native", "with comm=openmp replicas share one copy of the weights already"),
        ("dp=2,zero=1,engine=native,comm=mpi", "engine=native keeps its weights whole; engine=torch can shard them"),
        ("dp=2,zero=2,sync=average@4", "sync=average@4 lets replicas differ; shares take sync=gradient"),
        ("dp=2,zero=x", "a whole number"),
    ],
)
def test_what_cannot_be_sharded_is_refused(text: str, part: str) -> None:
    assert part in refusal(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("dp=2,comm=openmp", "only engine=native"),
        ("dp=2,engine=native,threads=2", "take dp=4 instead"),
        ("engine=native,threads=2", "take dp=2 instead"),
        ("dp=2,sync=hogwild", "engine=native,comm=openmp"),
        ("dp=2,pp=2,engine=native,sync=hogwild", "pp=1"),
        ("dp=2,gradients=owner", "engine=native,comm=openmp"),
        ("dp=2,pp=2,engine=native,gradients=owner", "pp=1"),
        ("dp=2,engine=native,gradients=own", "did you mean owner"),
    ],
)
def test_the_native_engine_says_what_it_needs(text: str, part: str) -> None:
    assert part in refusal(text)


def test_native_ranks_are_threads_of_one_process() -> None:
    plan = parse("dp=2,pp=2,engine=native")
    assert (plan.comm, plan.mesh.size, plan.processes, plan.workers) == ("openmp", 4, 1, 4)
    assert parse("dp=2,engine=native,comm=mpi,threads=2").processes == 2
