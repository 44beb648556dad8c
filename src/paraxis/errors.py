"""Errors for people: each message is one line that says what is wrong and what would work."""


class ParaxisError(Exception):
    """Base of all errors whose message is meant for the user; `exit_code` is the command line's."""

    exit_code = 2
    step: int | None = None  # the optimiser step in which it showed, where there is one


class TaskError(ParaxisError, ValueError):
    """The network, the data or a training setting cannot be used as given."""


class PlanError(ParaxisError, ValueError):
    """A plan cannot be met: the message says what binds and what would fit."""


class ProgramError(ParaxisError, ValueError):
    """A program is ill-formed; the message draws the rank x slot grid with an arrow at the fault."""


class MissingError(ParaxisError, RuntimeError):
    """Something this machine lacks (MPI, a GPU, a compiler); the message says how to get it."""


class OutOfMemory(ParaxisError, MemoryError):
    """A device has no room left; the message says of how much. `bytes` is what it has, where that is known."""

    bytes: int | None = None


class Deadlock(ParaxisError, RuntimeError):
    """No rank can go on; the message prints every rank's next instruction."""

    exit_code = 1


class Diverged(ParaxisError, ArithmeticError):
    """The loss is no longer a number; the message names the step."""

    exit_code = 1


class RankError(ParaxisError, RuntimeError):
    """A rank raised, died or stopped answering; the message names it and says why."""

    exit_code = 1
