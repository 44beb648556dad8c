"""A user's own schedules: read, held to their shape, and refused in one line that says what is wrong where."""

import subprocess
import sys
from pathlib import Path

import pytest

from paraxis.errors import PlanError
from paraxis.plan.own import Asked, Shape, find, shape_of
from paraxis.plan.plan import Plan, parse
from paraxis.plan.schedules import SCHEDULES, one_f_one_b
from paraxis.program.check import check
from paraxis.program.cut import Layout
from paraxis.program.grid import draw
from paraxis.program.lower import lower
from paraxis.scheduling import plan_of

PYTHON = "from paraxis.plan.schedules import gpipe as schedule, one_f_one_b as other\n"
TEXT = "# 1F1B of two ranks\nrank 0 | F0 F1 B0 F2 B1 B2\n\nF0 B0 F1 B1 F2 B2  # the last\n"


def written(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def program(name: str, text: str, layers: int = 4) -> list[str]:
    """What the ranks compute, as it is drawn."""
    return draw(lower(parse(f"{text},schedule={name}"), Layout((1,) * layers)).body("step"), computing_only=True)


def test_a_file_gives_the_program_of_the_schedule_that_it_writes_down(tmp_path: Path) -> None:
    python, text = written(tmp_path, "own.py", PYTHON), written(tmp_path, "own.txt", TEXT)
    assert program(python, "pp=2,microbatches=3") == program("gpipe", "pp=2,microbatches=3")
    assert program(f"{python}:other", "pp=2,microbatches=3") == program("1f1b", "pp=2,microbatches=3")
    assert program(text, "pp=2,microbatches=3") == program("1f1b", "pp=2,microbatches=3")
    assert shape_of(text) == Shape(2, 3, 1)
    plan = parse(f"pp=2,microbatches=3,schedule={text}")
    assert parse(plan.text()) == parse(plan.short()) == plan


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "layerwise"])
def test_every_schedule_can_be_written_down(name: str, tmp_path: Path) -> None:
    plan = Plan(pp=3, microbatches=4, schedule=name)
    orders = [SCHEDULES[name](3, 4, rank, plan.interleave) for rank in range(3)]
    path = written(tmp_path, "own.txt", "\n".join(" ".join(f"{s}{op}{m}" for op, s, m in row) for row in orders))
    assert shape_of(path) == Shape(3, 4, plan.interleave)
    assert [find(path)(3, 4, rank, plan.interleave) for rank in range(3)] == orders
    check(lower(Plan(pp=3, microbatches=4, interleave=plan.interleave, schedule=path), Layout((1,) * 6)))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = Path(written(tmp_path, "own.txt", "F0 B0\nF0 B0"))
    assert find(str(path))(2, 1, 0, 1) == [("F", 0, 0), ("B", 0, 0)]
    path.write_text("F0 I0 W0\nF0 B0")
    assert find(str(path))(2, 1, 0, 1) == [("F", 0, 0), ("I", 0, 0), ("W", 0, 0)]


MALFORMED = {
    "nothing there": ("missing.txt", None, "No such file"),
    "no cell": ("a.txt", "F0 B0\nF0 X0", "line 2: 'X0' is no cell"),
    "empty": ("a.txt", "# nothing\n", "is empty; it takes a line a rank"),
    "stages that do not lie evenly": ("a.txt", "0F0 2F0 2B0 0B0\n1F0 1B0", "3 stages do not lie evenly"),
    "another shape": ("a.txt", "F0 B0\nF0 B0", "is one of pp=2,microbatches=1"),
    "a stage on the wrong rank": (
        "a.txt",
        "1F0 F0 F1 F2 B0 B1 B2\nF0 F1 F2 B0 B1 B2",
        "stands on rank 0, where stage 0",
    ),
    "no backward": ("a.txt", "F0 F1 F2\nF0 F1 F2", "rank 0 of 2 has no backward"),
    "does not load": ("a.py", "import nowhere_at_all", "does not load: ModuleNotFoundError"),
    "does not parse": ("a.py", "def schedule(:", "does not load: SyntaxError"),
    "no function": ("a.py", "x = 1", "has no function schedule(ranks"),
    "raises": ("a.py", "def schedule(p, m, r, v):\n    return 1 / 0", "schedule(2, 3, 0, 1) raised ZeroDivisionError"),
    "no cells": ("a.py", "def schedule(p, m, r, v):\n    return [('F', 0)]", "is no (op, stage, microbatch)"),
    "an unknown operation": ("a.py", "def schedule(p, m, r, v):\n    return [('X', 0, 0)]", "with op F, B, I or W"),
    "a microbatch too many": (
        "a.py",
        "def schedule(p, m, r, v):\n    return [('F', r, m)]",
        "there are 3 microbatches",
    ),
}


@pytest.mark.parametrize("mistake", MALFORMED)
def test_a_malformed_file_is_refused_in_one_line(mistake: str, tmp_path: Path) -> None:
    name, text, part = MALFORMED[mistake]
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError) as caught:
        program(str(path), "pp=2,microbatches=3")
    assert part in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 2


def test_only_the_names_of_files_are_taken_for_files() -> None:
    assert find("1f1b") is one_f_one_b
    with pytest.raises(PlanError, match="did you mean gpipe"):
        parse("pp=2,microbatches=2,schedule=gpip")


def test_a_shape_is_asked_for_or_read_off(tmp_path: Path) -> None:
    python, text = written(tmp_path, "own.py", PYTHON), written(tmp_path, "own.txt", TEXT)
    plan = plan_of(python, Asked())
    assert (plan.pp, plan.microbatches, plan.interleave, plan.schedule) == (3, 6, 1, python)
    plan = plan_of(python, Asked(ranks=2, microbatches=5, interleave=2))
    assert (plan.pp, plan.microbatches, plan.interleave) == (2, 5, 2)
    plan = plan_of(text, Asked(ranks=2))
    assert (plan.pp, plan.microbatches, plan.interleave) == (2, 3, 1)
    with pytest.raises(PlanError, match="is one of pp=2,microbatches=3"):
        plan_of(text, Asked(microbatches=4))
    for asked in (Asked(ranks=1), Asked(ranks=0), Asked(ranks=2, microbatches=0)):
        with pytest.raises(PlanError):
            plan_of(python, asked)


def test_the_command_refuses_a_malformed_file_without_loading_a_framework(tmp_path: Path) -> None:
    path = written(tmp_path, "own.txt", "F0 B0\nF0 Q0")
    code = f"import sys; sys.argv = ['paraxis', 'show', {path!r}]\nfrom paraxis.cli import main\n"
    code += "try:\n    main()\nfinally:\n    print('torch' in sys.modules)\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2 and run.stdout == "False\n", run.stderr
    assert run.stderr.count("\n") == 1 and "line 2: 'Q0' is no cell" in run.stderr.replace("\n", " ")
