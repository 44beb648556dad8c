"""What the driver knows of a task; it imports no framework."""

from dataclasses import asdict, dataclass
from typing import Any

from paraxis.measure.roofline import LayerWork, work_of
from paraxis.program.cut import Layout
from paraxis.program.memory import Sizes, sizes_of
from paraxis.program.shares import split_of, tokens_of


@dataclass(frozen=True)
class Facts:
    """What the driver knows of a task: its layout, seconds of each layer on one batch of `samples`, and notes.

    `dispatch` is the seconds that a forward and backward of a single sample takes: the framework's own cost per step.
    """

    layers: tuple[str, ...]
    layout: Layout
    samples: int
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    dispatch: float
    batch: int
    steps_per_epoch: int | None
    network: str
    parameters: int
    switched_off: tuple[str, ...]
    unkeyed: tuple[str, ...]
    random: bool
    notes: tuple[str, ...]
    has_test: bool
    first_batch: int  # its digest in float32
    least: int = 1  # samples that must be computed at once, or batch norm has no statistics
    work: tuple[LayerWork, ...] = ()  # of its linear and convolution layers, on one batch
    sizes: Sizes | None = None  # what the PyTorch engine keeps of each layer

    def as_json(self) -> dict[str, Any]:
        """As a plain dict; `facts_of` reads it back."""
        return asdict(self)


def facts_of(document: dict[str, Any]) -> Facts:
    """The inverse of `Facts.as_json`."""
    lists: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in document.items()}
    layout: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in document["layout"].items()
    }
    layout["tied"] = tuple((name, tuple(layers)) for name, layers in layout["tied"])
    layout["splits"] = tuple(split_of(split) for split in layout["splits"])
    layout["tokens"] = tuple(tokens_of(tokens) for tokens in layout["tokens"])
    work = tuple(work_of(layer) for layer in document.get("work", ()))
    sizes = sizes_of(document["sizes"]) if document.get("sizes") else None
    return Facts(**(lists | {"layout": Layout(**layout), "work": work, "sizes": sizes}))
