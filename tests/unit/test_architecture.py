"""The house rules: who imports whom, what is public, what is light, how long things are."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import paraxis

SOURCE = Path(paraxis.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# Read top to bottom: a layer imports only what stands above it (and its own).
LAYERS = [
    {"errors"},
    {"sync"},
    {"plan"},
    {"program"},
    {"comm"},
    {"engine", "task"},
    {"run", "measure"},
    {"session", "fitting", "bands", "proof", "recommend", "report", "progress", "options"},
    {"rounds", "accuracy", "experiment", "study", "verification", "training", "showing", "scheduling", "doctor"},
    {"api", "cli", "__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def place(path: Path) -> str:
    """The layer's name of a source file."""
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else path.stem


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> list[str]:
    """Full names of what a file imports, wherever in it."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_layers_import_downwards(path: Path) -> None:
    for name in imported(path):
        if not name.startswith("paraxis."):
            continue
        target = name.split(".")[1]
        if target in LEVEL:
            assert LEVEL[target] <= LEVEL[place(path)], f"{path.relative_to(SOURCE)} imports {name}"


def test_every_file_has_its_layer() -> None:
    assert {place(path) for path in FILES} <= LEVEL.keys()


def test_only_the_seam_imports_mpi4py() -> None:
    users = {str(p.relative_to(SOURCE)) for p in FILES if any(n.split(".")[0] == "mpi4py" for n in imported(p))}
    assert users == {"comm/mpi.py"}


def test_no_pickle_and_no_leftovers() -> None:
    for path in FILES:
        names = {name.split(".")[0] for name in imported(path)}
        assert not names & {"pickle", "shelve", "marshal"}, path
        text = path.read_text()
        assert "NotImplementedError" not in text and "TODO" not in text, path


def test_sizes() -> None:
    for path in FILES:
        assert path.read_text().count("\n") <= 400, f"{path} is longer than 400 lines"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 55, f"{path}: {node.name} has {length} lines"


def test_public_names() -> None:
    assert len(paraxis.__all__) == 20
    for name in paraxis.__all__:
        assert getattr(paraxis, name) is not None
    assert callable(paraxis.explore) and callable(paraxis.verify) and callable(paraxis.train)
    with pytest.raises(AttributeError):
        _ = paraxis.nothing  # type: ignore[attr-defined]


LIGHT = """
import sys
sys.argv = ["paraxis", *{words!r}]
try:
    from paraxis.cli import main
    main()
except SystemExit:
    pass
heavy = [name for name in ("torch", "mpi4py", "altair") if name in sys.modules]
print("heavy:", heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["show", "pp=2,microbatches=4"],
        ["explore", "--schema"],
        ["explore", "--study", "list"],
    ],
)
def test_light_commands_load_no_framework(words: list[str]) -> None:
    code = LIGHT.format(words=words)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "heavy: []" in run.stderr, run.stderr
    assert run.stdout


def test_schedules_are_short_pure_functions() -> None:
    from paraxis.plan import schedules

    module = tree(Path(schedules.__file__))
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    public = {node.name for node in functions if not node.name.startswith("_")}
    assert {function.__name__ for function in schedules.SCHEDULES.values()} == public - {"parted"}
    assert all((node.end_lineno or 0) - node.lineno < 40 for node in functions)
    assert not [node for node in ast.walk(module) if isinstance(node, (ast.Global, ast.Nonlocal))]
