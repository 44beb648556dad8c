"""Studies: what a TOML may say, the order of trials, and a file that survives a kill without losing or doubling one."""

import csv
import io
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from paraxis.errors import TaskError
from paraxis.study import table
from paraxis.study.bench import Outcome
from paraxis.study.conduct import conduct
from paraxis.study.definition import PROCEDURES, Definition, load, make, plan_text, shipped, spec_of
from paraxis.study.ledger import FILE, open_ledger, read
from paraxis.study.sampling import Sampled
from paraxis.study.trial import Factors, OutOfTime, Runner, Trial, identity

GRID: dict[str, Any] = {
    "name": "grid",
    "measure": ["step_seconds"],
    "fixed": {"network": "mlp", "plan": "dp={workers},engine=native"},
    "factors": {"workers": [1, 2, 4], "batch": [32, 64, 128]},
    "repeats": 2,
}


def silent(what: str, fraction: float) -> None:
    """A tell."""


def fake(factors: Factors, repeat: int, measures: Collection[str]) -> Outcome:
    """A trial whose figure follows from its factors."""
    return Outcome("ok", None, Sampled({"step_seconds": 0.001 * int(factors["batch"]) + repeat}))


def core(trials: list[Trial]) -> list[str]:
    """Trials without what differs from run to run."""
    return [t.model_dump_json(exclude={"seconds", "started"}) for t in trials]


def run(folder: Path, values: dict[str, Any] = GRID, budget: float = 1e9, perform: Any = fake) -> dict[str, Any]:
    return conduct(make(values), folder, budget, silent, perform)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"factors": {"wrokers": [1]}}, ["wrokers is no option"]),
        ({"factors": {"btach": [1], "workers": [1]}}, ["btach", "did you mean batch?"]),
        ({"factors": {"workers": []}}, ["workers", "no levels"]),
        ({"factors": {"batch": [32]}}, ["names 'workers'"]),
        ({"factors": {"workers": [1, 1]}}, ["same trial"]),
        ({"factors": {"workers": 3}}, ["factors.workers", "list"]),
        ({"measure": ["step_second"]}, ["measure.0", "step_seconds"]),
        ({"measure": []}, ["measure is missing"]),
        ({"measure": ["final_accuracy"]}, ["final_accuracy", "epochs"]),
        ({"measure": ["steps_to_target"], "fixed": {**GRID["fixed"], "epochs": 1}}, ["target = 0.95"]),
        ({"repeats": 0}, ["repeats", "1"]),
        ({"repeat": 2}, ["repeat:", "did you mean repeats?"]),
        ({"order": "sorted"}, ["order", "random"]),
        ({"exclude": [{"worker": 2}]}, ["exclude", "did you mean workers?"]),
        ({"exclude": [{"workers": [1, 2, 4]}]}, ["no trial left"]),
        ({"fixed": {**GRID["fixed"], "batch": 2}}, ["batch", "both a factor and fixed"]),
        ({"fixed": {**GRID["fixed"], "lr": -1.0}}, ["no trial can run", "lr=-1"]),
        ({"fixed": {**GRID["fixed"], "plan": "dq={workers}"}}, ["no trial can run", "dq"]),
        ({"fixed": {**GRID["fixed"], "plan": "dp={workers"}}, ["dp={workers", "expected '}'"]),
        ({"fixed": {**GRID["fixed"], "rule": "ours"}}, ["rule=ours", "theirs"]),
        ({"procedure": "bach-size"}, ["procedure", "batch-size"]),
        ({"name": "../up"}, ["name"]),
        ({"grid": [{"factors": {"workers": [1]}}]}, ["not in both"]),
        ({"factors": {}, "grid": [{"factors": {"workers": [1]}}, {"factors": {"workers": [1, 2]}}]}, ["two grids"]),
        ({"factors": {}, "grid": [{"factors": {"workers": [1]}, "repeets": 2}]}, ["repeets", "did you mean repeats?"]),
    ],
)
def test_a_wrong_study_is_refused_in_one_line_that_names_the_key(change: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(TaskError) as caught:
        make(GRID | change)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("a = = 1")
    for name, part in ((f"{tmp_path}/bad.toml", "no TOML"), (f"{tmp_path}/none.toml", "No such"), ("orignal", "sync")):
        with pytest.raises(TaskError, match=part):
            load(name)


def test_factors_cross_levels_that_are_tables_go_together_and_exclude_leaves_out() -> None:
    sizes = [{"workers": 1, "batch": 64}, {"workers": 2, "batch": 128}]
    study = make(GRID | {"factors": {"size": sizes, "seed": [0, 1, 2]}, "exclude": [{"workers": 2, "seed": [1, 2]}]})
    found = [(c["workers"], c["batch"], c["seed"]) for c in study.cells()]
    assert found == [(1, 64, 0), (1, 64, 1), (1, 64, 2), (2, 128, 0)]
    assert study.varying() == ["workers", "batch", "seed"]
    assert plan_text(study.cells()[3]) == "dp=2,engine=native"
    assert spec_of(study.cells()[2], seed=10).seed == 12


def test_every_repeat_comes_after_all_trials_of_the_one_before_in_an_order_of_its_own() -> None:
    planned = list(make(GRID).schedule())
    assert [p.repeat for p in planned] == [0] * 9 + [1] * 9
    first, second = ([identity(p.factors, 0) for p in planned[i : i + 9]] for i in (0, 9))
    written = [identity(cell, 0) for cell in make(GRID).cells()]
    assert sorted(first) == sorted(second) == sorted(written)
    assert first != second and first != written and second != written
    assert [p.factors for p in planned] == [p.factors for p in make(GRID).schedule()]
    assert [p.factors for p in planned] != [p.factors for p in make(GRID | {"order_seed": 1}).schedule()]
    given = list(make(GRID | {"order": "given"}).schedule())
    assert [identity(p.factors, 0) for p in given] == written * 2


def test_grids_take_what_stands_at_the_top_and_come_in_turn() -> None:
    grids = [{"factors": {"workers": [1, 2]}, "repeats": 1}, {"factors": {"workers": [4]}, "fixed": {"batch": 8}}]
    study = make(GRID | {"factors": {}, "grid": grids, "order": "given"})
    assert [(p.factors["workers"], p.repeat) for p in study.schedule()] == [(1, 0), (2, 0), (4, 0), (4, 1)]
    assert study.grids()[1].cells()[0] == {**GRID["fixed"], "batch": 8, "workers": 4}


@pytest.mark.parametrize("name", shipped())
def test_shipped_studies_can_be_read_and_say_what_they_are(name: str) -> None:
    study = load(name)
    assert study.name == name and 20 < len(study.about) < 120
    assert study.procedure in PROCEDURES or len(list(study.schedule())) >= 4


def test_a_finished_study_runs_nothing_again(tmp_path: Path) -> None:
    document = run(tmp_path)
    assert len(document["trials"]) == 18 and document["finished"] and not document["not_reached"]
    content = (tmp_path / FILE).read_bytes()

    def never(*_: object) -> Outcome:
        raise AssertionError("it was recorded")

    assert run(tmp_path, perform=never)["trials"] == document["trials"]
    assert (tmp_path / FILE).read_bytes() == content
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert len(rows) == 18 and {row["workers"] for row in rows} == {"1", "2", "4"}
    assert all(float(row["step_seconds"]) == 0.001 * int(row["batch"]) + int(row["repeat"]) for row in rows)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_study
from paraxis.study.conduct import conduct
def slow(*words):
    time.sleep(0.02)
    return test_study.fake(*words)
conduct(test_study.make(test_study.GRID), Path({folder!r}), 1e9, test_study.silent, slow)
"""


def test_a_study_killed_in_the_middle_ends_with_the_same_records_none_twice(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole)
    wanted = core(read(whole)[1])
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(broken))
    held = []
    for until in (3, 9):
        process = subprocess.Popen([sys.executable, "-c", code])
        end = time.monotonic() + 60
        while not (broken / FILE).exists() or (broken / FILE).read_bytes().count(b"\n") < 1 + until:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        held.append(len(read(broken)[1]))
    assert 3 <= held[0] < held[1] < 18
    run(broken)
    assert core(read(broken)[1]) == wanted
    assert len({identity(t.factors, t.repeat) for t in read(broken)[1]}) == 18


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_torn_last_line_is_cut_off_and_its_trial_run_again(tmp_path: Path, kept: int) -> None:
    run(tmp_path)
    path = tmp_path / FILE
    wanted, lines = core(read(tmp_path)[1]), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    assert len(read(tmp_path)[1]) == 17
    calls = []

    def count(*words: Any) -> Outcome:
        calls.append(words)
        return fake(*words)

    run(tmp_path, perform=count)
    assert len(calls) == 1 and core(read(tmp_path)[1]) == wanted


def test_a_head_torn_off_begins_anew(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b'{"study": "gr')
    assert len(run(tmp_path)["trials"]) == 18 and read(tmp_path)[0] == make(GRID)


def test_the_same_trial_is_never_recorded_twice(tmp_path: Path) -> None:
    with open_ledger(tmp_path, make(GRID)) as ledger:
        trial = Trial(study="grid", factors={"batch": 1}, status="ok", seconds=1, started="now", version="0")
        ledger.append(trial)
        ledger.append(trial.model_copy(update={"factors": {"batch": True}}))  # another level, though equal to 1
        with pytest.raises(ValueError, match="already"):
            ledger.append(trial)
    assert len(read(tmp_path)[1]) == 2


def test_another_study_in_the_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    for change, part in (({"repeats": 3}, "earlier version"), ({"name": "other"}, "another study")):
        with pytest.raises(TaskError, match=f"{part}.*--out"):
            run(tmp_path, GRID | change)
    assert run(tmp_path, GRID | {"about": "said in other words"})["finished"]
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / FILE).write_text("hello\n")
    with pytest.raises(TaskError, match="no file of trials"):
        run(tmp_path)


def test_a_line_that_is_no_trial_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    lines = (tmp_path / FILE).read_text().splitlines()
    lines[3] = lines[3].replace('"status":"ok"', '"status":"fine"')
    (tmp_path / FILE).write_text("\n".join(lines) + "\n")
    with pytest.raises(TaskError, match=r"line 4 is no trial \(status"):
        run(tmp_path)


def hold(folder: str, ready: Any, over: Any) -> None:
    """Another process in the folder."""
    with open_ledger(Path(folder), make(GRID)):
        ready.set()
        over.wait(60)


def test_two_processes_do_not_share_a_folder_and_a_killed_one_gives_it_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, over = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(tmp_path), ready, over))
    other.start()
    assert ready.wait(60)
    with pytest.raises(TaskError, match=r"in use by another process"):
        run(tmp_path)
    other.kill()
    other.join()
    assert run(tmp_path)["finished"]


def test_what_no_longer_fits_the_budget_is_listed_and_nothing_is_cut(tmp_path: Path) -> None:
    said: list[str] = []

    def slow(*words: Any) -> Outcome:
        time.sleep(0.05)
        return fake(*words)

    document = conduct(make(GRID), tmp_path, 0.3, lambda what, _: said.append(what), slow)
    done, gone = len(document["trials"]), document["not_reached"]
    assert 3 <= done < 18 and done + len(gone) == 18 and not document["finished"]
    assert "about" in said[-1] and "trial" in said[-1]
    assert {identity(g["factors"], g["repeat"]) for g in gone} | {
        identity(t["factors"], t["repeat"]) for t in document["trials"]
    } == {identity(p.factors, p.repeat) for p in make(GRID).schedule()}
    assert run(tmp_path)["finished"]


def test_a_repeat_that_would_outlast_the_budget_is_not_begun(tmp_path: Path) -> None:
    study = GRID | {"factors": {"workers": [1], "batch": [32]}}

    def slow(*words: Any) -> Outcome:
        time.sleep(0.2)
        return fake(*words)

    document = run(tmp_path, study, 0.35, slow)
    assert len(document["trials"]) == 1 and document["not_reached"][0]["repeat"] == 1


def test_refused_and_failed_trials_are_recorded_with_their_reason(tmp_path: Path) -> None:
    def grumpy(factors: Factors, repeat: int, measures: Collection[str]) -> Outcome:
        return Outcome("failed", "rank 1 died") if factors["workers"] == 4 else fake(factors, repeat, measures)

    trials = run(tmp_path, perform=grumpy)["trials"]
    failed = [t for t in trials if t["status"] == "failed"]
    assert len(failed) == 6 and all(t["reason"] == "rank 1 died" and not t["measures"] for t in failed)


def test_a_procedure_chooses_its_trials_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search whose next trial depends on what the last one found."""
    calls: list[Factors] = []

    class Halving:
        @staticmethod
        def run(definition: Definition, runner: Runner) -> dict[str, Any]:
            batch = int(definition.parameters["start"])
            while (runner({"batch": batch}, 0).measures["step_seconds"] or 0) > 0.02:
                batch //= 2
            return {"batch": batch}

    def watched(factors: Factors, repeat: int, measures: Collection[str]) -> Outcome:
        calls.append(factors)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fake(factors, repeat, measures)

    monkeypatch.setattr("paraxis.study.conduct.import_module", lambda name: Halving)
    values = {k: v for k, v in GRID.items() if k not in ("factors", "fixed", "repeats")}
    values |= {"procedure": "batch-size", "parameters": {"start": 128}, "fixed": {"network": "mlp"}}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, values, perform=watched)
    document = run(tmp_path, values, perform=watched)
    assert document["analysis"] == {"batch": 16}
    assert [c["batch"] for c in calls] == [128, 64, 64, 32, 16] and calls[0]["network"] == "mlp"
    with pytest.raises(OutOfTime):
        run(tmp_path / "late", values, budget=0.0)


def test_the_table_shows_medians_intervals_reasons_and_what_is_missing(tmp_path: Path) -> None:
    from rich.console import Console

    def some(factors: Factors, repeat: int, measures: Collection[str]) -> Outcome:
        outcome = fake(factors, repeat, measures)
        if factors["workers"] == 4:
            return Outcome("refused", "no such thing", oversubscribed=True)
        return Outcome("ok", None, outcome.sampled, oversubscribed=factors["workers"] == 2)

    document = run(tmp_path, perform=some)
    document["not_reached"] = [{"factors": {"workers": 7}, "repeat": 1}]
    console = Console(width=60, record=True, file=io.StringIO())
    table.print_study(document, console)
    text = console.export_text()
    line = next(line.split() for line in text.splitlines() if line.startswith("2*") and " 64 " in line)
    assert line == ["2*", "64", "564", "[64-1,064]"]
    assert text.count("refused: ") == 6 and "no such thing" in text
    assert "not reached: workers=7 #1" in text and "oversubscribed" in text
    assert json.dumps(document)


def test_what_a_procedure_concludes_is_said(tmp_path: Path) -> None:
    from rich.console import Console

    document = run(tmp_path) | {"analysis": {"sentence": "Batches beyond 512 buy nothing.", "notes": ["one seed only"]}}
    console = Console(width=80, record=True, file=io.StringIO())
    table.print_study(document, console)
    assert "Batches beyond 512 buy nothing.\none seed only\n" in console.export_text()


def test_a_file_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(TaskError, match=r"cannot be written.*--out"):
        run(tmp_path)
    (tmp_path / "other").mkdir()
    with open_ledger(tmp_path / "other", make(GRID)) as ledger, Path("/dev/full").open("wb", buffering=0) as full:
        ledger.file = full
        with pytest.raises(TaskError, match=r"No space left.*what was finished is kept"):
            ledger.append(Trial(study="grid", factors={}, status="ok", seconds=1, started="now", version="0"))
        assert not ledger.trials


def test_a_figure_that_is_no_number_survives_the_file_the_document_and_the_table(tmp_path: Path) -> None:
    from rich.console import Console

    def diverged(*_: object) -> Outcome:
        return Outcome("ok", None, Sampled({"step_seconds": float("inf")}, {"loss": [float("nan")]}))

    document = run(tmp_path, perform=diverged)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert all(t.measures["step_seconds"] == float("inf") for t in read(tmp_path)[1])
    console = Console(width=80, record=True, file=io.StringIO())
    table.print_study(document, console)
    assert " inf" in console.export_text()
