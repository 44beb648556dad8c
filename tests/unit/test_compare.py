"""Studies side by side, and studies for other tools."""

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sample_study import HOSTILE, build, left_out, seconds
from test_report import parse

from paraxis.errors import MissingError, TaskError
from paraxis.measure import records
from paraxis.measure.records import Seconds, Study
from paraxis.report import compare, export, tables


def slower(factor: float, plan: str = "") -> Study:
    """The study built by hand, on a machine that is slower (for one plan, or for all)."""
    study = build()
    for result in [study.today, *study.results]:
        if result and result.step_seconds and (not plan or result.plan == plan):
            result.step_seconds = seconds(result.step_seconds.median * 1e3 * factor)
    return study


def drawn(rng: np.random.Generator, mean: float) -> Seconds:
    samples = list(rng.lognormal(math.log(mean), 0.05, 30))
    return Seconds(median=float(np.median(samples)), low=0.0, high=1.0, samples=samples)


def test_unpaired_ratio_covers_the_truth() -> None:
    """In 60 trials the 95% interval of the ratio holds the true 1.25 about as often as it says."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(60):
        ratio = compare.unpaired(drawn(rng, 1.25e-3), drawn(rng, 1e-3))
        assert ratio is not None
        held += ratio.low <= 1.25 <= ratio.high
    assert 52 <= held <= 60


def test_too_few_samples_tell_nothing() -> None:
    few = Seconds(median=1.0, low=1.0, high=1.0, samples=[1.0, 1.0, 1.0, 1.0])
    assert compare.unpaired(few, seconds(2.0)) is None and compare.unpaired(seconds(2.0), few) is None


def test_what_differs_is_told_apart_and_what_does_not_is_not() -> None:
    other = slower(0.5, plan="dp=2,comm=mpi")
    found = compare.compare([("a", build()), ("b", other)])
    lines = {line.label: line.entries for line in found.lines}
    fast = lines["dp=2 mpi"][1]
    assert fast.apart and fast.ratio and fast.ratio.median == pytest.approx(2.0) and fast.ratio.low > 1.9
    assert [label for label, entries in lines.items() if entries[1].apart] == ["dp=2 mpi"]
    assert lines["today"][0].seconds and lines["today"][1].ratio
    assert lines["tp=2"][1].why == "refused" and lines["dp=8 <i>"][0].why == "not reached"
    assert len(found.lines) == 1 + len(build().results)


def test_plans_of_only_one_study_are_listed() -> None:
    less = build()
    less.results = [r for r in less.results if r.plan != "dp=2,comm=gloo"]
    entries = {line.label: line.entries for line in compare.compare([("a", less), ("b", build())]).lines}["dp=2 gloo"]
    assert entries[0].why == "absent" and entries[1].seconds and entries[1].ratio is None


def test_unequal_tasks_and_busy_machines_are_named() -> None:
    other = build()
    other.task = {**other.task, "seed": 1}
    other.machine.foreign_cores = 1.4
    other.finished = False
    words = " ".join(compare.compare([("a", build()), ("b", other)]).warnings)
    assert "not the same task: seed 0 and 1" in words and "1.4 cores were busy" in words and "b: unfinished" in words
    with pytest.raises(TaskError, match="two studies"):
        compare.compare([("a", build())])


def test_comparison_on_a_terminal_as_json_and_as_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "old", tmp_path / "new"]
    records.write(build(), folders[0])
    records.write(slower(1.5), folders[1])
    stream = io.StringIO()
    compare.show(folders, tmp_path / "out" / "both.html", False, Console(file=stream, width=120))
    shown = stream.getvalue()
    assert "0.67x [0.65-0.68]" in shown and "12.8 [12.6-13.2]" in shown and "Ratios are unpaired" in shown
    html = (tmp_path / "out" / "both.html").read_text(encoding="utf-8")
    parse(html)
    assert "old and new" in html and HOSTILE not in html and html.count("<script") == 2
    assert html.count("<svg") == 2 and html.count("dp=2 gloo") == 3  # in two pictures and the table
    compare.show(folders, None, True, Console(file=stream))
    document = json.loads(capsys.readouterr().out)
    ratio = next(p for p in document["plans"] if p["label"] == "today")["studies"][1]["ratio"]
    assert ratio["median"] == pytest.approx(1 / 1.5)


def test_folders_without_a_study_are_named(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(TaskError, match=r"study\.json"):
            compare.opened([path, path])


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paraxis", "show", *words], capture_output=True, text=True, check=False
    )


def test_show_compares_and_exports(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b", "c")]
    for folder in folders:
        records.write(build(), Path(folder))
    run = command(*folders, "--out", str(tmp_path / "c.html"))
    assert run.returncode == 0 and "1.00x ~" in run.stdout and (tmp_path / "c.html").exists(), run.stderr
    run = command(folders[0], "--export", "csv")
    assert run.returncode == 0 and (tmp_path / "a" / "samples.csv").exists(), run.stderr
    run = command(folders[0], "--out", str(tmp_path / "d.html"))
    assert run.returncode == 2 and "paraxis show DIR DIR --out" in run.stderr and "Traceback" not in run.stderr


def test_folders_of_one_name_keep_their_paths(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "study", tmp_path / "b" / "study"]
    for path in paths:
        records.write(build(), path)
    assert [name for name, _ in compare.opened(paths)] == [str(path) for path in paths]


# -- exports ---------------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_holds_every_plan_and_every_sample(tmp_path: Path) -> None:
    study = build()
    results, samples, losses, looks = (rows(path) for path in export.export(study, tmp_path, ["csv"]))
    plans = tables.everything(study)
    assert [row["plan"] for row in results] == [r.plan for r in plans] and len(export.line(plans[0])) == len(
        export.HEADS
    )
    best = next(row for row in results if row["plan"] == "dp=2,comm=mpi")
    assert float(best["step_seconds"]) == 0.0128 and best["proved"] == "True" and float(best["equals_to"]) == 3e-7
    assert best["peak_memory_bytes"] == "61000000" and best["comm"] == "mpi" and best["vs_today"]
    kept = [float(row["seconds"]) for row in samples if row["plan"] == "dp=2,comm=mpi" and row["kind"] == "kept"]
    assert [row["seconds"] for row in samples if row["kind"] == "warmup"] == ["0.031", "0.019"]
    assert kept == next(r for r in plans if r.plan == "dp=2,comm=mpi").step_seconds.samples  # type: ignore[union-attr]
    assert len(losses) == sum(len(r.losses) for r in plans)
    assert [row["accuracy"] for row in looks if row["plan"] == "dp=2,comm=mpi"] == ["0.42", "0.81", "0.93"]
    assert len(looks) == 9 and looks[0]["label"] == "today" and float(looks[2]["samples"]) == 25600
    assert next(r["reason"] for r in results if r["status"] == "failed") == left_out()[2].reason


def test_csv_is_no_formula(tmp_path: Path) -> None:
    study = build()
    study.results[0].label = "=HYPERLINK(1)"
    assert rows(export.to_csv(study, tmp_path)[0])[1]["label"] == "'=HYPERLINK(1)"


def test_tensorboard_is_asked_for_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    for ask in (lambda: export.export(build(), tmp_path, ["tensorboard"]), lambda: export.require(["tensorboard"])):
        with pytest.raises(MissingError, match=r"pip install 'paraxis\[tensorboard\]'"):
            ask()
    export.require(["csv"])


@pytest.mark.slow
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    study = build()
    for _ in range(2):  # the second export replaces the first
        written = export.export(study, tmp_path, ["tensorboard"])
    assert len(written) == 1 + sum(r.status == "ok" for r in study.results)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "dp=2_mpi"))
    events.Reload()
    best = next(r for r in study.results if r.plan == "dp=2,comm=mpi")
    assert [e.value for e in events.Scalars("training loss")] == pytest.approx(best.losses, rel=1e-6)
    assert len(events.Scalars("seconds per step")) == len(best.step_seconds.samples)  # type: ignore[union-attr]
