"""A thread that computes a stage and pauses in the middle of it, wherever its layers meet those of other ranks.

No module is cut: a forward (or a backward) is one call that stands still until the sums it waits for have been added up
by an instruction. Everything that a stage computes runs in its one thread, for OpenMP keeps a team for each caller.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from paraxis.errors import ProgramError
from paraxis.program.instructions import Program
from paraxis.program.meetings import STOPS

PATIENCE = 10.0  # seconds that a thread which is told to end has left


class Abandoned(BaseException):
    """Raised inside a computation that nobody will ever resume."""


@dataclass
class Pausing:
    """The computation of one stage and what is met in it, in the order of a forward; see program.meetings.

    `moments` has what is to be added up at each border: sums of batch norms lie there for good, other tensors come and
    are added up where they are. `words`: of each border (none: batch norms). `at` is the border that the computation
    stands at, None where it has ended. Used by one thread; what it computes meets the others through `met` and
    `met_back`, `share` and `share_back`.
    """

    moments: list[Tensor]
    words: Sequence[str] = ()
    at: int | None = None
    made: Any = None  # what the last computation returned
    kind: str = "F"  # of the computation: F, B or E
    _number: int = 0  # borders that this forward has come by
    _asked: SimpleQueue[Callable[[], Any] | bool | None] = field(default_factory=SimpleQueue)
    _told: SimpleQueue[int | BaseException | None] = field(default_factory=SimpleQueue)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.words = self.words or ("norm",) * len(self.moments)

    def forward(self, compute: Callable[[], Any], kind: str = "F") -> None:
        """Begin a forward, or an evaluation (E); returns where it stands at its first border, or at its end."""
        self._number = 0
        self._begin(compute, kind)

    def backward(self, compute: Callable[[], Any]) -> None:
        """Begin a backward."""
        self._begin(compute, "B")

    def run(self, compute: Callable[[], Any]) -> Any:
        """Compute something that meets nobody."""
        self._begin(compute, "F")
        return self.end()

    def resume(self) -> None:
        """Go on with the sums of all ranks, to the next border or to the end."""
        self._asked.put(True)
        self._listen()

    def end(self) -> Any:
        """What the computation has made."""
        made, self.made = self.made, None
        return made

    def check_forward(self, border: int | None) -> None:
        """Raises ProgramError unless the forward stands at this border (None: has ended)."""
        if self.at != border:
            where = "ended" if self.at is None else f"met {self._named(self.at)}"
            raise ProgramError(f"a forward has {where}, unlike when the network was tried; {self._advice()}")

    def check_backward(self, segment: int) -> None:
        """Raises ProgramError unless the backward stands in front of a segment, or further ahead.

        A batch norm whose gradient nobody needs has no backward: its sums are nothing.
        """
        if self.at is not None and self.at >= segment:
            raise ProgramError(f"the backward meets {self._named(self.at)} out of order; {self._advice()}")
        if segment and self.at != segment - 1:
            if self.words[segment - 1] != "norm":
                raise ProgramError(f"the backward does not meet {self._named(segment - 1)}; {self._advice()}")
            self.moments[segment - 1].zero_()

    def _named(self, border: int) -> str:
        return f"batch norm {border}" if self.words[border] == "norm" else f"border {border} ({self.words[border]})"

    def _advice(self) -> str:
        return "set bn_group lower" if "norm" in self.words else "leave tp out"

    def close(self) -> None:
        """End the thread, wherever it stands."""
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            self._asked.put(None)
            thread.join(PATIENCE)

    def _begin(self, compute: Callable[[], Any], kind: str) -> None:
        if self.at is not None:  # an interrupted step has left it there
            self._asked.put(False)
            self._told.get()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="paraxis-stage", daemon=True)
            self._thread.start()
        self.kind, self.at = kind, None
        self._asked.put(compute)
        self._listen()

    def _listen(self) -> None:
        found = self._told.get()
        self.at = found if isinstance(found, int) else None
        if isinstance(found, BaseException):
            raise found

    # -- in the thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        # Else all backwards on a GPU share one thread of autograd, in which one that stands still stops the others.
        with torch.autograd.set_multithreading_enabled(False):
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
        if self.kind == "B":
            raise ProgramError("a batch norm over all ranks is computed again in the backward; leave out checkpointing")
        if number == len(self.moments) or self.moments[number].shape != sums.shape:
            raise ProgramError(f"synchronised batch norm {number} was not there when the network was tried")
        self._number += 1
        return number, self.met_back(number, sums)

    def met_back(self, number: int, sums: Tensor) -> Tensor:
        """Of a batch norm in its backward: the sums of all replicas."""
        self.moments[number].copy_(sums)
        self._stand(number)
        return self.moments[number].clone()

    def passed(self, word: str) -> int:
        """Of a layer that several ranks share, in its forward: the number of the border that it stands at."""
        if self.kind == "B":
            raise ProgramError("a layer that is split is computed again in the backward; leave out checkpointing or tp")
        borders = enumerate(self.words[self._number :], self._number)
        number = next((n for n, own in borders if self.kind == "F" or self.kind in STOPS[own]), -1)
        if number < 0 or self.words[number] != word:
            raise ProgramError(f"a forward has met a layer that is split ({word}) unlike when the network was tried")
        self._number = number + 1
        return number

    def share(self, part: Tensor) -> Tensor:
        """The sum over the ranks that share a layer, in the place of one's own (contiguous) part."""
        return self.share_back(self.passed("act"), part)

    def share_back(self, number: int, part: Tensor) -> Tensor:
        """The same in the backward of border `number`."""
        self.moments[number] = part
        self._stand(number)
        self.moments[number] = part.new_empty(0)
        return part

    def _stand(self, number: int) -> None:
        self._told.put(number)
        go_on = self._asked.get()
        if go_on is None:
            self._asked.put(None)  # for the loop that this computation falls back into
        if go_on is not True:
            raise Abandoned


def pausing_for(stage: Any, program: Program, device: torch.device) -> Pausing | None:
    """Of a stage in whose middle ranks meet, the thread that computes it, which ends with the stage."""
    first, last = program.stages[stage.stage]
    words = program.borders(stage.stage)
    if all(word == "cut" for word in words):
        return None
    sizes = iter([size for own in stage.task.norms[first:last] for size in own])
    lengths = [next(sizes) if word == "norm" else 0 for word in words]
    made = Pausing([torch.zeros(n, dtype=torch.float64, device=device) for n in lengths], words)
    for module in (m for layer in stage.task.chain[first:last] for m in layer.modules()):
        if hasattr(module, "meeting"):
            module.meeting = made
    weakref.finalize(stage, made.close)
    return made
