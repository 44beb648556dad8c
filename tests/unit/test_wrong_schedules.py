"""Five wrong schedules, each of which ends in the right picture: a grid with an arrow, or what each rank waits for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from paraxis.errors import Deadlock, ProgramError
from paraxis.plan.own import Asked
from paraxis.plan.plan import parse
from paraxis.plan.schedules import SCHEDULES, Order, gpipe
from paraxis.program.check import check
from paraxis.program.cut import Layout
from paraxis.program.instructions import Program
from paraxis.program.lower import lower
from paraxis.scheduling import plan_of

PIPE = "pp=2,microbatches=2"


def lost_receive() -> Program:
    """The last rank never takes the activation of microbatch 1."""
    program = lower(parse(PIPE), Layout((1, 1)))
    first, last = program.body("step")
    kept = tuple(i for i in last if not (i.base == "RecvAct" and i.microbatch == 1))
    return replace(program, bodies=(("step", (first, kept)), *program.bodies[1:]))


def crossed_sends() -> Program:
    """The last rank wants microbatch 1 first, the first sends 0 first, and a send ends when it has been received."""

    def crossed(ranks: int, microbatches: int, rank: int, stages: int) -> Order:
        order = gpipe(ranks, microbatches, rank, stages)
        return order if rank == 0 else [order[1], order[0], *order[2:]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCHEDULES, "1f1b", crossed)
        return lower(parse(PIPE), Layout((1, 1)))


LOST_RECEIVE = """\
rank 1, slot 8 of step: F1 before its activation has arrived
rank 0 | L0   F0   sA0< L1   F1   sA0> sA1< rG0> rG1< B0   rG1> B1   sA1>
rank 1 | L0   rA0> F0   B0   sG0< L1   F1   B1   sG0> sG1< sG1> step
                                       ^
"""
CROSSED_SENDS = """\
ranks [0, 1] wait for each other; the next instruction of each:
  rank 0: SendActWait stage=0 microbatch=0 peer=1 token=1
  rank 1: RecvActWait stage=1 microbatch=1 peer=0 token=0
rank 0 | rG0< L0   F0   sA0< L1   F1   sA0> sA1< rG0> rG1< B0   rG1> B1
                                       ^
rank 1 | rA1< L1   rA1> rA0< F1   L0   rA0> F0   B0   sG0< B1   sG0> sG1<
"""
MADE = {"lost receive": (lost_receive, LOST_RECEIVE), "crossed sends": (crossed_sends, CROSSED_SENDS)}
# A line a rank, as a user writes it down.
BACKWARD_FIRST = """\
rank 1, slot 8 of step: B1 before its forward
rank 0 | F0   sA0< rG0< L1   F1   sA1< rG1< rG0> sA0> B0   rG1> sA1> B1
rank 1 | L0   rA0> rA1< F0   B0   sG0< B1   sG0> sG1< L1   rA1> F1   sG1>
                                       ^
"""
MISSING = """\
rank 1, slot 8 of step: microbatch 1 is never computed
rank 0 | F0   sA0< rG0< L1   F1   sA1< rG1< rG0> sA0> B0   rG1> sA1> B1
rank 1 | L0   rA0> F0   B0   sG0< sG0> step
                                       ^
"""
LEAKED = """\
rank 0, slot 12 of step: the activation of microbatch 1 is never used: its backward is missing
rank 0 | F1   sA1< rG0> sA0> B0   sA1> step
                                       ^
rank 1 | B0   sG0< L1   rA1> F1   B1   sG0> sG1< sG1> step
"""
LOST_W = """\
rank 0, slot 16 of step: the update comes without W1, its microbatch's gradient of weights
rank 0 | sA0> I0   W0   rG1> sA1> I1   step
                                       ^
rank 1 | rA1> F1   I1   sG0> sG1< W1   sG1> step
"""
WRITTEN = {
    "backward before forward": ("F0 F1 B0 B1\nF0 B0 B1 F1", BACKWARD_FIRST),
    "missing microbatch": ("F0 F1 B0 B1\nF0 B0", MISSING),
    "leaked activation": ("F0 F1 B0\nF0 B0 F1 B1", LEAKED),
    "gradient of weights never made": ("F0 F1 I0 W0 I1\nF0 I0 W0 F1 I1 W1", LOST_W),
}


def said(error: Exception) -> str:
    return "".join(line.rstrip() + "\n" for line in str(error).splitlines())


@pytest.mark.parametrize("name", MADE)
def test_a_wrong_program_ends_in_its_picture(name: str) -> None:
    make: Callable[[], Program] = MADE[name][0]
    with pytest.raises((ProgramError, Deadlock)) as caught:
        check(make())
    assert said(caught.value) == MADE[name][1]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_wrong_schedule_that_a_user_wrote_ends_in_its_picture(name: str, tmp_path: Path) -> None:
    text, wanted = WRITTEN[name]
    path = tmp_path / "wrong.txt"
    path.write_text(text)
    with pytest.raises(ProgramError) as caught:
        plan_of(str(path), Asked())
    assert said(caught.value) == wanted and caught.value.exit_code == 2
