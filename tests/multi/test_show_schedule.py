"""`paraxis show FILE`: a user's own schedule on real ranks, from its check to its time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paraxis.measure.machine import usable_cores

ZB = "# ZB-H1 of two ranks\nF0 F1 I0 W0 F2 I1 W1 I2 W2\nF0 I0 F1 I1 W0 F2 I2 W1 W2\n"
PYTHON = """
def schedule(ranks, microbatches, rank, stages):
    own = range(rank, ranks * stages, ranks)
    forward = [("F", s, i) for i in range(microbatches) for s in own]
    return forward + [("B", s, i) for i in range(microbatches) for s in reversed(own)]
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own.txt", "own.py"])
def test_a_schedule_is_checked_proved_simulated_drawn_and_timed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(ZB if name.endswith(".txt") else PYTHON)
    words = ["--ranks", "2", "--microbatches", "3", "--interleave", "2"] * name.endswith(".py")
    command = [sys.executable, "-m", "paraxis", "show", str(path), *words, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stdout)
    assert shown["verified"]["passed"] and shown["verified"]["tolerance"] == 1e-10
    assert shown["makespan"] > 0 and 0 < shown["bubble_fraction"] < 1
    assert max(shown["peak_live_microbatches"]) == (2 if name.endswith(".txt") else 6)
    assert ("W2" if name.endswith(".txt") else "2F0") in "".join(shown["grid"])
    if usable_cores() >= 2:
        timed = shown["timed"]
        assert timed["own"] > 0 and timed["1f1b"] > 0 and timed["ratio"]["low"] <= timed["ratio"]["high"]
    else:
        assert shown["timed"] is None and "do not fit" in shown["not_timed"]
