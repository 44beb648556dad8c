"""What stands on which axis: which factor of a grid is drawn across, and what the others make of colours and panels."""

from collections.abc import Iterator
from dataclasses import dataclass

from paraxis.study.definition import Grid
from paraxis.study.table import Row, level
from paraxis.study.trial import Factors, Scalar

MOST = 8  # series in one chart
COUNTS = ("seed",)  # numbers that are names


@dataclass(frozen=True)
class Axes:
    """`across` is drawn from left to right, by value where it is `numeric`; every combination of `series` is a line."""

    across: str
    numeric: bool
    series: tuple[str, ...]

    def name(self, cell: Factors) -> str:
        """What a line is called: words as they are, numbers with their factor."""
        return " ".join(label(key, cell[key]) for key in self.series if key in cell)


def label(key: str, value: Scalar) -> str:
    """`gpipe`, `batch=64`."""
    return level(value) if isinstance(value, str) else f"{key}={level(value)}"


def axes_of(grid: Grid, cells: list[Factors]) -> Axes:
    """Across goes the first number with three levels or more, else the factor with most levels, numbers first.

    Factors that follow from the one across (a batch that grows with the workers) make no lines of their own.
    """
    names = [name for name in grid.varying() if name != "plan"] or ["plan"]
    levels = {name: list(dict.fromkeys(cell[name] for cell in cells if name in cell)) for name in names}
    numbers = [name for name in names if is_number(name, levels[name])]
    long = [name for name in numbers if len(levels[name]) > 2]
    across = long[0] if long else max([*numbers, *names], key=lambda name: len(levels[name]))
    series = tuple(
        name for name in names if name != across and len(levels[name]) > 1 and not follows(name, across, cells)
    )
    return Axes(across, across in numbers, series)


def is_number(name: str, levels: list[Scalar]) -> bool:
    """Whether a factor's levels lie on a line."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in levels)
    return bool(levels) and numbers and name not in COUNTS


def follows(name: str, of: str, cells: list[Factors]) -> bool:
    """Whether one factor's level is known once that of another is."""
    pairs = {(repr(cell.get(of)), repr(cell.get(name))) for cell in cells}
    return len(pairs) == len({known for known, _ in pairs})


def panels(axes: Axes, rows: list[Row], most: int = MOST) -> Iterator[tuple[str, Axes, list[Row]]]:
    """(title, axes, rows) of charts with few enough lines: the first of the series' factors goes into the title."""
    if len({axes.name(cell) for cell, _ in rows}) <= most or not axes.series:
        yield "", axes, rows
        return
    first, *rest = axes.series
    inner = Axes(axes.across, axes.numeric, tuple(rest))
    for value in dict.fromkeys(repr(cell.get(first)) for cell, _ in rows):
        some = [(cell, same) for cell, same in rows if repr(cell.get(first)) == value]
        head = label(first, some[0][0][first]) if first in some[0][0] else ""
        for title, deeper, few in panels(inner, some, most):
            yield " ".join(filter(None, [head, title])), deeper, few
