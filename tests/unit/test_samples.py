"""Samples on disk: written as they come, read again after a kill, and refused where they are of something else."""

from pathlib import Path

import pytest
import sample_study

from paraxis.errors import TaskError
from paraxis.measure.records import write
from paraxis.measure.samples import FILE, Sample, foreign_by_round, open_book, read
from paraxis.plan.plan import parse

TASK = {"network": "mlp", "batch": 128}


def sample(plan: str = "dp=2", number: int = 0, seconds: float = 0.5, foreign: float = 0.0, steps: int = 4) -> Sample:
    return Sample(
        plan=parse(plan).text(), round=number, seconds=seconds, steps=steps, foreign_cores=foreign, at=1.7e9 + number
    )


def begun(folder: Path, *samples: Sample) -> None:
    """What an exploration leaves behind."""
    study = sample_study.bare(task=TASK)
    write(study, folder)
    book = open_book(folder)
    for one in samples:
        book.add(one)


def test_a_sample_is_in_the_file_when_it_has_been_added(tmp_path: Path) -> None:
    book = open_book(tmp_path)
    kept = [sample(number=n) for n in range(3)]
    for count, one in enumerate(kept, start=1):
        book.add(one)
        assert read(tmp_path / FILE) == kept[:count]
    assert book.of(parse("dp=2")) == dict.fromkeys(range(3), 0.5) and book.of(parse("dp=4")) == {}


def test_going_on_drops_half_a_line_and_appends_whole_ones(tmp_path: Path) -> None:
    begun(tmp_path, sample(number=0), sample(number=1))
    with (tmp_path / FILE).open("a") as file:
        file.write(sample(number=2).model_dump_json()[:30])
    book = open_book(tmp_path, resume=True)
    assert [s.round for s in book.samples] == [0, 1]
    book.add(sample(number=2))
    assert [s.round for s in read(tmp_path / FILE)] == [0, 1, 2]
    assert open_book(tmp_path).samples == [] and read(tmp_path / FILE) == [], "without --resume it begins anew"


def test_what_cannot_be_gone_on_with_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="holds no study"):
        open_book(tmp_path, resume=True)
    begun(tmp_path, sample())
    (tmp_path / FILE).write_text('{"plan": 1}\n')
    with pytest.raises(TaskError, match=r"samples\.jsonl, line 1, is not a sample"):
        open_book(tmp_path, resume=True)


def test_another_task_machine_or_space_of_plans_is_refused(tmp_path: Path) -> None:
    begun(tmp_path, sample("dp=2"), sample("pp=2,microbatches=4,split=3+5"))
    book = open_book(tmp_path, resume=True)
    machine = sample_study.bare().machine
    plans = [parse(text).text() for text in ("dp=2", "dp=4", "pp=2,microbatches=4,split=3+5")]
    book.agrees(TASK, machine, plans)
    with pytest.raises(TaskError, match="batch=128, this exploration has batch=64"):
        book.agrees(TASK | {"batch": 64}, machine, plans)
    with pytest.raises(TaskError, match="usable_cores=1, this exploration has usable_cores=2"):
        book.agrees(TASK, machine.model_copy(update={"usable_cores": 2}), plans)
    with pytest.raises(TaskError, match=r"plan dp=2"):
        book.agrees(TASK, machine, plans[1:])
    open_book(tmp_path).agrees(TASK | {"batch": 64}, machine, [])


def test_stages_stay_cut_as_they_were(tmp_path: Path) -> None:
    begun(tmp_path, sample("pp=2,microbatches=4,split=3+5"))
    book = open_book(tmp_path, resume=True)
    cut = book.cut(parse("pp=2,microbatches=4"))
    assert cut is not None and cut.split == (3, 5)
    assert book.cut(parse("pp=2,microbatches=8")) is None


def test_foreign_load_of_a_round_is_weighted_by_time() -> None:
    found = foreign_by_round(
        [sample(foreign=1.0, steps=1), sample(foreign=0.0, steps=3), sample(number=2, foreign=0.2)]
    )
    assert found == {0: pytest.approx(0.25), 2: pytest.approx(0.2)}
