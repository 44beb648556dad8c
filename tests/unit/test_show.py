"""`paraxis show STUDY PLAN`: what a study knows of one plan, for people, as JSON and as a trace."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from sample_study import bare, build, pipelined

from paraxis.cli import app
from paraxis.errors import PlanError, TaskError
from paraxis.measure.records import Result, Study, Work, write
from paraxis.report.one import document_of_plan, find, print_plan, study_of

EXPLAINED = "Bound by bubble: ranks wait. To change it: raise microbatches from 4 to 8."


def study() -> Study:
    made = build()
    assert made.results[0].split is not None
    half = made.results[0].split
    made.results[0].split_by_rank = [half, half.model_copy(update={"pipeline_wait": 0.004})]
    made.results[0].work = [
        Work(rank=0, op="F", count=4, seconds=1.3e-3),
        Work(rank=1, op="B", count=4, seconds=2.3e-3),
    ]
    made.results[0].explanation = EXPLAINED
    made.results[0].records_per_step, made.results[0].record_seconds = 40, 30e-9
    return made


def printed(result: Result, width: int = 120) -> str:
    out = io.StringIO()
    print_plan(study(), result, Console(file=out, width=width))
    return out.getvalue()


def show(folder: Path, *words: str) -> int:
    code = app(["show", str(folder), *words], exit_on_error=False, print_error=False, result_action="return_value")
    assert isinstance(code, int)
    return code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(study(), tmp_path)
    return tmp_path


def test_a_plan_with_fewer_rounds_says_why() -> None:
    result = pipelined()
    assert "told apart" not in printed(result)
    result.stopped = "measured in 6 rounds: told apart from dp=2 mpi"
    assert result.stopped in printed(result)


@pytest.mark.parametrize(
    "text, label",
    [
        ("best", "dp=2 mpi"),
        ("today", "today"),
        ("dp=2 mpi", "dp=2 mpi"),
        ("dp=2", "dp=2 mpi"),
        ("comm=mpi,pp=2,microbatches=4", "pp=2 1f1b m=4 mpi"),
        ("sync=average@8,dp=2", "dp=2 average@8 mpi"),
        ("tp=2", "tp=2"),
    ],
)
def test_a_plan_is_found_by_label_text_or_what_it_means(text: str, label: str) -> None:
    assert find(study(), text).label == label


def test_where_stages_are_cut_need_not_be_said() -> None:
    made = study()
    made.results[0].plan = "pp=2,microbatches=4,split=3+5"
    assert find(made, "pp=2,microbatches=4") is made.results[0]
    assert find(made, "pp=2,microbatches=4,split=3+5") is made.results[0]
    with pytest.raises(PlanError, match="not in this study"):
        find(made, "pp=2,microbatches=4,split=4+4")


@pytest.mark.parametrize("text", ["dp=3", "dp=2 mpj", "nothing like it"])
def test_a_plan_that_is_not_there_gets_the_nearest_ones(text: str) -> None:
    with pytest.raises(PlanError, match="is not in this study; it has '"):
        find(study(), text)
    with pytest.raises(PlanError, match="recommends no plan"):
        find(bare(), "best")


def test_what_is_printed_of_a_pipeline() -> None:
    text = printed(study().results[0])
    lines = text.splitlines()
    assert lines[0].startswith("pp=2 1f1b m=4 mpi") and "17.9 ms a step" in text and "16.8" in text
    row = next(line for line in lines if line.startswith("pipeline bubble"))
    assert row.split()[2:] == ["3.6", "(20.0%)", "4.0", "(22.3%)", "3.6", "(20.0%)"], "each rank, and the mean"
    assert "rank 1: 4 B of 2.3" in text and "40 records of 30 ns, 0.007% of the step" in text
    assert EXPLAINED in text
    measured, simulated = (next(n for n, line in enumerate(lines) if line.startswith(w)) for w in ("meas", "simu"))
    assert lines[measured + 1].startswith("rank 0 |0") and lines[simulated + 2].startswith("rank 1 |·")
    assert len(lines[simulated + 1]) == len(lines[measured + 1])
    assert lines[simulated + 1].rstrip("|").rstrip() != lines[simulated + 1].rstrip("|"), "one scale: it ends earlier"


def test_the_difference_is_that_of_the_step_and_the_simulated_one() -> None:
    made = study()
    made.results[0].simulated = pipelined().timeline
    longest = max(e.end for e in made.results[0].simulated)
    document = document_of_plan(made, "pp=2 1f1b m=4 mpi")
    assert document["simulated_seconds"] == pytest.approx(longest)
    assert document["difference"] == pytest.approx(17.9e-3 / longest - 1)
    assert document["explanation"] == EXPLAINED and document["split_by_rank"][1]["pipeline_wait"] == 0.004


@pytest.mark.parametrize("label", [r.label for r in build().results] + ["today"])
@pytest.mark.parametrize("width", [60, 120])
def test_every_plan_can_be_printed(label: str, width: int) -> None:
    result = find(study(), label)
    text = printed(result, width)
    assert result.label in text and "\x1b" not in text
    assert (result.status != "ok") == (f"{result.status}: " in text)
    json.dumps(document_of_plan(study(), label))


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(folder, "best", "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"] == "dp=2,comm=mpi"
    assert show(folder / "study.json", "dp=2 gloo") == 0
    assert "19.4 ms a step" in capsys.readouterr().out
    assert show(folder) == 0 and "ms/step" in capsys.readouterr().out
    assert show(folder, "best", "--trace", str(folder / "t.json")) == 0
    events = json.loads((folder / "t.json").read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"measured", "simulated"}
    assert show(Path("pp=2,microbatches=4"), "--trace", str(folder / "s.json")) == 0
    spans = [e for e in json.loads((folder / "s.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert {e["name"] for e in spans if e["tid"] == 1} >= {"F0", "B3"}


def test_bad_input_is_one_line(folder: Path, tmp_path: Path) -> None:
    for words, what in (
        ((tmp_path / "none",), "holds no study.json"),
        ((folder, "dp=2,sync=average@8", "--trace", str(tmp_path / "t")), "this plan was not measured"),
        ((folder, "--trace", str(tmp_path / "t")), "needs a plan"),
    ):
        with pytest.raises(TaskError, match=what) as caught:
            show(*words)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    (folder / "study.json").write_text('{"task": {}}')
    with pytest.raises(TaskError, match="is no study\\.json of this version"):
        study_of(folder)
