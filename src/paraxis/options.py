"""What several commands take: the options of a task, and those that recur."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

Exports = Annotated[list[Literal["csv", "tensorboard"]] | None, Parameter(negative="")]
Limit = Annotated[str | None, Parameter(help="Refuse plans whose computed memory of a rank is more: 200M, 2G.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON document on standard output.")]


@Parameter(name="*")
@dataclass(frozen=True)
class TaskOptions:
    """The task: data, batch, optimiser.

    Parameters
    ----------
    data
        mnist, idx:DIR, npz:FILE, text[:FILES] or synthetic:N,SHAPE,CLASSES (default: mnist, for gpt Python's own
        sources, or batches() of your file).
    batch
        Samples per optimiser step over all replicas (default 128, for gpt 32, or what batches() yields).
    bn_group
        Samples that batch-norm statistics cover (default: those that a plan computes at once).
    optimizer
        Default: sgd, for gpt adamw.
    lr
        Learning rate (default 0.05, for gpt 0.001).
    momentum
        Of sgd (default 0.9).
    clip
        Largest global norm of the gradient.
    warmup
        Steps over which the learning rate rises.
    horizon
        Steps over which a cosine falls (default for train: the whole run).
    validation
        Fraction of the training samples held out.
    """

    data: str | None = None
    batch: int | None = None
    bn_group: int | None = None
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float = 0.0
    clip: float | None = None
    lr_schedule: Literal["constant", "warmup", "cosine"] = "constant"
    warmup: int = 0
    horizon: int = 0
    validation: float = 0.0
    seed: int = 0
