"""Paraxis: an instrument for parallelism in neural networks."""

from typing import Any

__version__ = "0.1.0"
_WHERE = {
    "explore": "api",
    "train": "api",
    "verify": "api",
    "Plan": "plan.plan",
    "Mesh": "plan.plan",
    "parse": "plan.plan",
    "Layout": "program.lower",
    "lower": "program.lower",
    "Instruction": "program.instructions",
    "Program": "program.instructions",
    "check": "program.check",
    "simulate": "program.simulate",
    "Costs": "program.simulate",
    "Study": "measure.records",
    "Result": "measure.records",
    "TaskSpec": "task.spec",
    "ParaxisError": "errors",
    "PlanError": "errors",
    "ProgramError": "errors",
    "Deadlock": "errors",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Public names, imported when they are first used: the framework takes seconds."""
    if name not in _WHERE:
        raise AttributeError(f"module 'paraxis' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"paraxis.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
