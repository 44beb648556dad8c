"""What the checker knows of scaled losses: a step is taken or skipped by all ranks, so all must know of every overflow.

The norm of the gradient tells, for it is finite where every gradient is: it must be made of gradients that have been
reduced, and added up over all ranks that have parts of them, before the update.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from paraxis.plan.precision import SCALED
from paraxis.program.instructions import Instruction, Program

Fail = Callable[[int, str], NoReturn]


@dataclass
class Verdict:
    """The abstract state of one rank's norm within one step of a program."""

    program: Program
    made: bool = False
    reducing: int = 0  # reductions of gradients under way
    over: set[str] = field(default_factory=set)  # axes over which it has been added up

    def see(self, i: Instruction, slot: int, fail: Fail) -> None:
        """One instruction more; calls `fail` if it cannot stand here."""
        if self.program.precision != SCALED:
            return
        if i.buffer == "grads" and (i.starts or i.waits):
            self.reducing += 1 if i.starts else -1
        elif i.rule == "norm":
            if self.reducing:
                fail(slot, "the norm is made of gradients that are still being reduced")
            self.made = True
        elif i.waits and i.buffer == "norm" and self.made:
            self.over.add(i.axis)
        elif i.rule == "step":
            self._steps(slot, fail)

    def _steps(self, slot: int, fail: Fail) -> None:
        mesh = self.program.mesh
        if not self.made:
            fail(slot, "the update of scaled gradients comes without their norm, which tells of an overflow")
        apart = {"pp": mesh.pp > 1, "tp": mesh.tp > 1, "dp": self.program.zero > 0}
        if missing := [axis for axis, wanted in apart.items() if wanted and axis not in self.over]:
            fail(slot, f"the update comes before ranks along {missing[0]} tell each other of overflows")
