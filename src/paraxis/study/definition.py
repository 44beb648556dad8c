"""A study as one writes it: factors and their levels, what is fixed, what is measured. TOML in, trials' factors out."""

import json
import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from paraxis.errors import ParaxisError, TaskError
from paraxis.plan.plan import parse
from paraxis.study.trial import Factors, Scalar, identity
from paraxis.task.spec import TaskSpec

Measure = Literal[
    "step_seconds",
    "epoch_seconds",
    "samples_per_second",
    "seconds_to_target",
    "steps_to_target",
    "final_accuracy",
    "final_loss",
    "bytes",
    "memory",
    "bubble",
]
TRAINED = {"seconds_to_target", "steps_to_target", "final_accuracy", "final_loss"}  # only training to the end tells
TASK = frozenset(TaskSpec.model_fields) - {"live"}
RUN = frozenset({"plan", "epochs", "steps", "target", "evaluate_every", "rule"})
RULES = ("theirs",)  # other ways to train than a plan's: see `theirs`
PROCEDURES = {"batch-size": "paraxis.study.batch_size"}  # modules whose run(definition, runner) chooses the trials
SHIPPED = Path(__file__).parent / "shipped"


class Grid(BaseModel):
    """Factors crossed with each other. A level that is a table sets several factors at once, under one name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str = ""
    factors: dict[str, list[Scalar | Factors]] = {}
    fixed: Factors = {}
    exclude: list[dict[str, Scalar | list[Scalar]]] = []
    measure: list[Measure] = []
    repeats: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Grid":
        if type(self) is Grid:
            self._check_cells()
        return self

    def _check_cells(self) -> None:
        for name, levels in self.factors.items():
            if not levels:
                raise ValueError(f"factor {name} has no levels")
            if name in self.fixed:
                raise ValueError(f"{name} is both a factor and fixed")
        cells = self.cells()
        if len({identity(cell, 0) for cell in cells}) < len(cells):
            raise ValueError("two combinations of levels are the same trial")
        for cell in cells:
            self._check_cell(cell)
        refusals = [_why_not(cell) for cell in cells]
        if cells and all(refusals):  # some may: a grid holds corners that no plan can meet, and lists them as refused
            raise ValueError(f"no trial can run: {refusals[0]}")
        for rule in self.exclude:
            strange = [key for key in rule if not any(key in cell for cell in self._crossed())]
            if strange:
                raise ValueError(
                    f"exclude: {strange[0]} is no factor; {suggest(strange[0], sorted(self._crossed()[0]))}"
                )

    def _check_cell(self, cell: Factors) -> None:
        holes = set(_holes(str(cell.get("plan", ""))))
        allowed = TASK | RUN | holes | ({"workers"} if "rule" in cell else set())
        for key in cell:
            if key not in allowed:
                raise ValueError(f"{key} is no option of a task and no part of a plan; {suggest(key, list(allowed))}")
        lost = sorted(holes - cell.keys())
        if lost:
            raise ValueError(f"plan {cell['plan']!r} names {lost[0]!r}, which is no factor and not fixed")
        if cell.get("rule", RULES[0]) not in RULES:
            raise ValueError(f"rule={cell['rule']}: it takes {' or '.join(RULES)}")
        if "rule" not in cell and TRAINED & set(self.measure) and not cell.keys() & {"epochs", "steps", "target"}:
            wanted = next(m for m in self.measure if m in TRAINED)
            raise ValueError(f"measure {wanted}: it takes epochs or steps to train, fixed or as a factor")
        for measure in ("seconds_to_target", "steps_to_target"):
            if measure in self.measure and "target" not in cell:
                raise ValueError(f"measure {measure}: it takes a target, such as target = 0.95 under [fixed]")

    def _crossed(self) -> list[Factors]:
        """Every combination of levels over what is fixed."""
        out = []
        for levels in product(*self.factors.values()):
            cell = dict(self.fixed)
            for name, level in zip(self.factors, levels, strict=True):
                cell |= level if isinstance(level, dict) else {name: level}
            out.append(cell)
        return out

    def cells(self) -> list[Factors]:
        """The factors of every trial in the order of the levels; excluded combinations are left out."""
        return [cell for cell in self._crossed() if not any(_matches(cell, rule) for rule in self.exclude)]

    def varying(self) -> list[str]:
        """Names of the factors that differ among this grid's trials."""
        cells = self.cells()
        names = dict.fromkeys(key for cell in cells for key in cell)
        return [name for name in names if len({repr(cell.get(name)) for cell in cells}) > 1]


class Definition(Grid):
    """A whole study. What is written at the top holds for each `[[grid]]` that does not say otherwise.

    `order`: "random" mixes the trials of a grid (drawn from `order_seed`), "given" keeps them as written. All trials
    have their first repeat before any has its second. `vary_seed`: repeat r trains with seed + r. `measure_seconds`:
    how long step times are sampled. `procedure` says who chooses the trials: the grid, or code that takes `parameters`.
    """

    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")
    about: str = ""
    order: Literal["random", "given"] = "random"
    order_seed: int = 0
    vary_seed: bool = False
    measure_seconds: float = Field(1.5, gt=0)
    procedure: str = "grid"
    parameters: dict[str, Any] = {}
    grid: list[Grid] = []

    @model_validator(mode="before")
    @classmethod
    def _hand_down(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("grid"), list):
            return values
        top = {key: values[key] for key in ("measure", "repeats") if key in values}
        fixed = values.get("fixed", {})
        grids = [top | g | {"fixed": fixed | g.get("fixed", {})} for g in values["grid"] if isinstance(g, dict)]
        return values | {"grid": grids}

    @model_validator(mode="after")
    def _check_whole(self) -> "Definition":
        if self.grid and self.factors:
            raise ValueError("factors stand either at the top or in each [[grid]], not in both")
        if self.procedure == "grid" and not self.grid:
            self._check_cells()
        if not self.measure and not all(g.measure for g in self.grids()):
            raise ValueError("measure is missing: say what to measure, such as measure = ['step_seconds']")
        if self.procedure not in ("grid", *PROCEDURES):
            raise ValueError(f"procedure={self.procedure}: it takes {' or '.join(('grid', *PROCEDURES))}")
        if self.procedure == "grid":
            cells = [identity(cell, 0) for grid in self.grids() for cell in grid.cells()]
            if len(set(cells)) < len(cells):
                raise ValueError("two grids have the same trial")
            if not cells:
                raise ValueError("there is no trial left: give factors, or exclude less")
        return self

    def grids(self) -> list[Grid]:
        """The grids in the order of their importance."""
        return self.grid or [self]

    def digest(self) -> str:
        """What tells studies apart: everything but the words for people."""
        document = self.model_dump(mode="json", exclude={"about": True, "title": True, "grid": {"__all__": {"title"}}})
        return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

    def schedule(self) -> Iterator["Planned"]:
        """Every trial in the order in which it is to run."""
        for repeat in range(max(grid.repeats for grid in self.grids())):
            for number, grid in enumerate(self.grids()):
                if repeat >= grid.repeats:
                    continue
                cells = grid.cells()
                if self.order == "random":
                    random.Random(f"{self.order_seed}-{repeat}-{number}").shuffle(cells)
                yield from (Planned(grid, cell, repeat) for cell in cells)


@dataclass(frozen=True)
class Planned:
    """A trial to be run."""

    grid: Grid
    factors: Factors
    repeat: int

    def words(self) -> str:
        """What sets it apart, in words."""
        return words({name: self.factors[name] for name in self.grid.varying() if name in self.factors}, self.repeat)


def words(factors: Factors, repeat: int = 0) -> str:
    """`workers=2 batch=64 #1`."""
    return " ".join([*(f"{key}={value}" for key, value in factors.items()), *([f"#{repeat}"] if repeat else [])])


def plan_text(factors: Factors) -> str:
    """The plan's template filled in; "serial" where there is none."""
    template = str(factors.get("plan", "serial"))
    try:
        return template.format(**factors)
    except (ValueError, LookupError, AttributeError) as error:
        raise TaskError(f"plan {template!r}: {error}; write factors in braces, such as dp={{workers}}") from None


def load(name: str) -> Definition:
    """A shipped study by its name, or that of a TOML file; raises TaskError in one line."""
    path = Path(name)
    if not name.endswith(".toml"):
        path = SHIPPED / f"{name}.toml"
        if name not in shipped():
            raise TaskError(
                f"study {name!r} is not known; there are {', '.join(shipped())}, or a file such as mine.toml"
            )
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise TaskError(f"study {name}: it cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"study {name}: it is no TOML: {error}") from None
    return make({"name": path.stem} | values, f"study {name}")


def make(values: dict[str, Any], where: str = "study") -> Definition:
    """A definition from plain values; raises TaskError, one line that names the key."""
    try:
        return Definition.model_validate(values)
    except ValidationError as error:
        raise TaskError(f"{where}: {_first(error)}") from None


def shipped() -> list[str]:
    """Names of the studies that come with Paraxis."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def suggest(word: str, allowed: list[str]) -> str:
    """`did you mean batch?`, or all that there is."""
    close = get_close_matches(word, allowed, 1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(allowed))}"


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    keys = [str(key) for key in first["loc"] if key not in ("str", "int", "float", "bool") and "[" not in str(key)]
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        allowed = list(Grid.model_fields) if keys[0] == "grid" else list(Definition.model_fields)
        text = f"it is no key of a study; {suggest(keys[-1], allowed)}"
    return f"{'.'.join(keys)}: {text}" if keys else text


def _why_not(cell: Factors) -> str:
    """Why a trial is refused before anything is started, or ""."""
    try:
        spec_of(cell)
        if "rule" not in cell:
            parse(plan_text(cell))
    except ParaxisError as error:
        return str(error)
    return ""


def _holes(template: str) -> list[str]:
    try:
        return [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"plan {template!r}: {error}") from None


def _matches(cell: Factors, rule: dict[str, Scalar | list[Scalar]]) -> bool:
    return all(
        key in cell and cell[key] in (level if isinstance(level, list) else [level]) for key, level in rule.items()
    )


def spec_of(factors: Factors, seed: int = 0) -> TaskSpec:
    """The task that factors describe, its seed raised by `seed`; raises TaskError in one line."""
    settings: dict[str, Any] = {key: value for key, value in factors.items() if key in TASK}
    try:
        spec = TaskSpec(**settings)
    except ValidationError as error:
        raise TaskError(_first(error)) from None
    return spec.model_copy(update={"seed": spec.seed + seed}) if seed else spec
