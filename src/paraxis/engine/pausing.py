"""A thread that computes a stage and pauses in the middle of it, wherever its batch norms meet those of other replicas.

No module is cut: a forward (or a backward) is one call that stands still until the sums it waits for have been added up
by an instruction. Everything that a stage computes runs in its one thread, for OpenMP keeps a team for each caller.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from paraxis.errors import ProgramError
from paraxis.program.instructions import Program
from paraxis.task.norm import GroupedNorm

PATIENCE = 10.0  # seconds that a thread which is told to end has left


class Abandoned(BaseException):
    """Raised inside a computation that nobody will ever resume."""


@dataclass
class Pausing:
    """The computation of one stage and the sums of its batch norms, in the order of a forward; see task.moments.

    `at` is the batch norm that the computation stands at, None where it has ended. Used by one thread; what it computes
    meets the others through `met` and `met_back`.
    """

    moments: list[Tensor]
    at: int | None = None
    made: Any = None  # what the last computation returned
    _backward: bool = False
    _number: int = 0  # batch norms that this forward has met
    _asked: SimpleQueue[Callable[[], Any] | bool | None] = field(default_factory=SimpleQueue)
    _told: SimpleQueue[int | BaseException | None] = field(default_factory=SimpleQueue)
    _thread: threading.Thread | None = None

    def forward(self, compute: Callable[[], Any]) -> None:
        """Begin a forward; returns where it stands at its first batch norm, or at its end."""
        self._number = 0
        self._begin(compute, backward=False)

    def backward(self, compute: Callable[[], Any]) -> None:
        """Begin a backward."""
        self._begin(compute, backward=True)

    def run(self, compute: Callable[[], Any]) -> Any:
        """Compute something that meets nobody."""
        self._begin(compute, backward=False)
        return self.end()

    def resume(self) -> None:
        """Go on with the sums of all replicas, to the next batch norm or to the end."""
        self._asked.put(True)
        self._listen()

    def end(self) -> Any:
        """What the computation has made."""
        made, self.made = self.made, None
        return made

    def check_forward(self, number: int | None) -> None:
        """Raises ProgramError unless the forward stands at this batch norm (None: has ended)."""
        if self.at != number:
            where = "ended" if self.at is None else f"met batch norm {self.at}"
            raise ProgramError(f"a forward has {where}, unlike when the network was tried; set bn_group lower")

    def check_backward(self, segment: int) -> None:
        """Raises ProgramError unless the backward stands in front of a segment, or further ahead.

        A batch norm whose gradient nobody needs has no backward: its sums are nothing.
        """
        if self.at is not None and self.at >= segment:
            raise ProgramError(f"the backward meets batch norm {self.at} out of order; set bn_group lower")
        if segment and self.at != segment - 1:
            self.moments[segment - 1].zero_()

    def close(self) -> None:
        """End the thread, wherever it stands."""
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            self._asked.put(None)
            thread.join(PATIENCE)

    def _begin(self, compute: Callable[[], Any], backward: bool) -> None:
        if self.at is not None:  # an interrupted step has left it there
            self._asked.put(False)
            self._told.get()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="paraxis-stage", daemon=True)
            self._thread.start()
        self._backward, self.at = backward, None
        self._asked.put(compute)
        self._listen()

    def _listen(self) -> None:
        found = self._told.get()
        self.at = found if isinstance(found, int) else None
        if isinstance(found, BaseException):
            raise found

    # -- in the thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while callable(compute := self._asked.get()):
            try:
                self.made, failure = compute(), None
            except BaseException as error:
                self.made, failure = None, error
            compute = None
            self._told.put(failure)
            failure = None

    def met(self, sums: Tensor) -> tuple[int, Tensor]:
        """Of a batch norm in its forward: its number, and the sums of all replicas."""
        number = self._number
        if self._backward:
            raise ProgramError("a batch norm over all ranks is computed again in the backward; leave out checkpointing")
        if number == len(self.moments) or self.moments[number].shape != sums.shape:
            raise ProgramError(f"synchronised batch norm {number} was not there when the network was tried")
        self._number += 1
        return number, self._stand(number, sums)

    def met_back(self, number: int, sums: Tensor) -> Tensor:
        """Of a batch norm in its backward: the sums of all replicas."""
        return self._stand(number, sums)

    def _stand(self, number: int, sums: Tensor) -> Tensor:
        self.moments[number].copy_(sums)
        self._told.put(number)
        go_on = self._asked.get()
        if go_on is None:
            self._asked.put(None)  # for the loop that this computation falls back into
        if go_on is not True:
            raise Abandoned
        return self.moments[number].clone()


def pausing_for(stage: Any, program: Program, device: torch.device) -> Pausing | None:
    """Of a stage that is cut by batch norms, the thread that computes it, which ends with the stage."""
    first, last = program.stages[stage.stage]
    sizes = [size for own in stage.task.norms[first:last] for size in own]
    if not (program.synchronised() and sizes):
        return None
    made = Pausing([torch.zeros(size, dtype=torch.float64, device=device) for size in sizes])
    for norm in (m for layer in stage.task.chain[first:last] for m in layer.modules() if isinstance(m, GroupedNorm)):
        norm.meeting = made
    weakref.finalize(stage, made.close)
    return made
