"""What a study is made of: trials of factor levels, each recorded once.

A study is a deterministic procedure over a `Runner`; a runner returns what is recorded and runs only what is not, so
resuming a study is running it again.
"""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from paraxis.errors import ParaxisError
from paraxis.measure.records import Record

Scalar = str | int | float | bool
Factors = dict[str, Scalar]
TrialStatus = Literal["ok", "refused", "failed"]


class Trial(Record):
    """One run of a network under given factors. `seconds` is what the trial took of the study's time.

    A measure that was asked for and that this trial has not (a target never reached) is null. Times are seconds,
    accuracies fractions, bytes per step of all ranks together.
    """

    study: str
    factors: Factors
    repeat: int = 0
    status: TrialStatus
    reason: str | None = None
    measures: dict[str, float | None] = Field(default_factory=dict)
    series: dict[str, list[float]] = Field(default_factory=dict)
    seconds: float
    started: str  # ISO 8601, UTC
    machine: dict[str, Any] | None = None
    version: str
    plan: str | None = None  # in full, where the factors name one that can be met
    oversubscribed: bool = False  # more workers than usable cores
    notes: list[str] = Field(default_factory=list)


class OutOfTime(ParaxisError):
    """The budget of a study is spent: what is recorded stays, what is missing is listed as not reached."""

    exit_code = 1


Runner = Callable[[Factors, int], Trial]  # (factors, repeat): the recorded trial, or a fresh one, then recorded


def identity(factors: Factors, repeat: int) -> tuple[tuple[tuple[str, str], ...], int]:
    """What tells trials apart: equal factors in any order are the same trial, and 1, 1.0 and true are not."""
    return tuple(sorted((key, repr(value)) for key, value in factors.items())), repeat
