"""What is told of the machine."""

import time
from pathlib import Path

import pytest

from paraxis.measure import speed
from paraxis.measure.machine import caches, describe, pinned
from paraxis.measure.speed import copying, multiplying, rate, with_speeds


def cache(folder: Path, number: int, level: str, kind: str, size: str) -> None:
    place = folder / f"index{number}"
    place.mkdir()
    for name, text in (("level", level), ("type", kind), ("size", size)):
        (place / name).write_text(text + "\n")


def test_caches_by_level(tmp_path: Path) -> None:
    cache(tmp_path, 0, "1", "Data", "48K")
    cache(tmp_path, 1, "1", "Instruction", "32K")
    cache(tmp_path, 2, "3", "Unified", "32M")
    (tmp_path / "index3").mkdir()
    assert caches(tmp_path) == {"L1d": 48 << 10, "L1i": 32 << 10, "L3": 32 << 20}
    assert caches(tmp_path / "absent") == {}


def test_the_machine_as_it_is() -> None:
    machine = describe()
    assert machine.usable_cores >= 1 and machine.versions["numpy"] and machine.memory_bytes > 1 << 28
    assert machine.flops_per_second is None and machine.frequency_hz != 0
    assert "busy" in pinned(quiet=False) and "busy" not in pinned(quiet=True)


def test_speeds_are_measured_in_a_process_of_their_own() -> None:
    machine = with_speeds(describe())
    assert machine.flops_per_second is not None and machine.memory_bytes_per_second is not None
    # A processor of the last decades, however busy it is with other things.
    assert 1e8 < machine.flops_per_second.one_core < 1e13 and 1e8 < machine.memory_bytes_per_second.one_core < 1e13
    assert "512x512" in machine.flops_per_second.how


def test_a_machine_that_cannot_be_measured_is_described_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LIMIT", 1e-3)
    assert with_speeds(describe()).flops_per_second is None


def test_a_rate_counts_what_all_threads_do_together() -> None:
    found = rate(lambda: lambda: time.sleep(5e-3), 10.0, 2)
    assert 100 < found <= 2 * 10.0 / 5e-3
    assert rate(lambda: copying(1 << 20), 1.0, 1) > 1 and rate(multiplying, 1.0, 1) > 1
