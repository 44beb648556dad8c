"""Groups of threads that share every layer: where they wait, and that a program that forgets to is refused."""

from dataclasses import replace
from itertools import pairwise

import pytest
from torch import nn

from paraxis.errors import PlanError, ProgramError
from paraxis.plan.plan import parse
from paraxis.program.check import check
from paraxis.program.cut import Layout, told_of
from paraxis.program.instructions import Program, parse_program
from paraxis.program.lower import lower
from paraxis.program.slices import sliced
from paraxis.task.networks import build
from paraxis.task.sharing import letters

PAIR = parse("tp=2,engine=native")


def layout(*shares: str, **more: object) -> Layout:
    return Layout((1,) * len(shares), shares=shares, **more)  # type: ignore[arg-type]


def test_letters_of_what_is_shipped() -> None:
    assert letters(build("mlp", 0)) == ("", "m", "o", "m")
    assert letters(build("cnn", 0)) == ("m", "o", "r", "m", "o", "r", "", "m", "r", "o", "m")
    assert letters(build("gpt:1-8-2-4", 0).stages()) == ("oo", "amamoamomo", "am")
    assert letters(build("resnet18", 0).stages())[4:7] == ("mormo", "mormo", "mormmoo")
    assert letters([nn.Dropout(0.0), nn.Dropout(0.1)]) == ("", "o")


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (("m",), ()),
        (("o", "o"), ()),
        (("m", "m"), ("shared",)),
        (("m", "r", "m"), ("shared",)),
        (("m", "o", "m"), ("act_grads", "acts")),
        (("m", "r", "r", "m"), ("act_grads", "acts")),
        (("r", "m"), ("acts",)),
        (("o", "a", "o"), ("shared", "shared")),
        (("", "momo"), ("act_grads", "acts", "act_grads")),
    ],
)
def test_threads_wait_where_one_reads_what_others_write(shares: tuple[str, ...], words: tuple[str, ...]) -> None:
    segments, found = sliced(PAIR, layout(*shares), [(0, len(shares))])[0]
    assert found == ("shared", *words, "shared") and len(segments) == len(found) + 1
    assert segments[0] == (0, 0) and segments[-1] == (len(shares),) * 2
    assert all(a[1] == b[0] for a, b in pairwise(segments))


def test_layers_with_a_relu_of_their_own_stage_do_not_wait() -> None:
    one, other = sliced(PAIR, layout("m", "r", "m"), [(0, 1), (1, 3)])
    assert one[1] == ("shared", "shared") and other[1] == ("shared", "acts", "shared")


PLANS = ("tp=2", "tp=3,microbatches=2", "dp=2,tp=2", "pp=2,tp=2,microbatches=4", "dp=2,pp=2,tp=2,schedule=gpipe")


@pytest.mark.parametrize("text", PLANS)
def test_programs_of_groups_are_checked_and_parsed(text: str) -> None:
    program = lower(parse(f"{text},engine=native"), layout("m", "o", "a", "m", clip=True, statistics=True))
    check(program)
    assert parse_program(program.text()) == program and program.common()


def without(program: Program, buffer: str, axis: str) -> Program:
    bodies = [
        (name, tuple(tuple(i for i in row if (i.buffer, i.axis) != (buffer, axis)) for row in ranks))
        for name, ranks in program.bodies
    ]
    return replace(program, bodies=tuple(bodies))


@pytest.mark.parametrize(
    ("buffer", "axis", "part"),
    [
        ("acts", "tp", "before the other threads' parts of what segment 0 makes are there"),
        ("act_grads", "tp", "before the other threads' parts of the gradients behind segment"),
        ("params", "tp", "nobody waits for the other ranks' part of the shared weights"),
        ("params", "dp", "nobody waits for the other ranks' part of the shared weights"),
    ],
)
def test_a_program_that_does_not_wait_is_refused(buffer: str, axis: str, part: str) -> None:
    program = lower(parse("dp=2,tp=2,engine=native"), layout("m", "o", "m"))
    with pytest.raises(ProgramError, match=part):
        check(without(program, buffer, axis))


def test_what_a_group_cannot_do_is_refused() -> None:
    with pytest.raises(PlanError, match="batch norm over all ranks"):
        lower(parse("dp=2,tp=2,engine=native"), layout("o", norms=(1,)))
    with pytest.raises(PlanError, match="leave bucket_bytes out"):
        lower(parse("dp=2,tp=2,engine=native,bucket_bytes=64"), layout("m"))


def test_people_are_told_what_threads_share() -> None:
    assert told_of([PAIR, parse("dp=2")], layout("m")) == [
        "tp=2 native: threads share every layer, each making its own channels of it"
    ]
