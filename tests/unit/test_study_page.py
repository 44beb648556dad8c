"""A study's page: which factor goes where, what charts show, escaping, size, what is refused or not reached."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from sample_trials import AVERAGING, HOSTILE, PIPELINE, SCALING, document
from test_report import inside, parse

from paraxis.report.sections import RAW_LIMIT
from paraxis.study import page, pictures
from paraxis.study.axes import Axes, axes_of, panels
from paraxis.study.definition import Grid, load, make
from paraxis.study.table import rows_of
from paraxis.study.trial import Trial


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], str]]:
    """(document, page) of two studies by name, drawn once."""
    folder = tmp_path_factory.mktemp("studies")
    studies = {
        name: document(values, folder / name) for name, values in {"pipes": PIPELINE, "often": AVERAGING}.items()
    }
    return {name: (study, page.html(study)) for name, study in studies.items()}


def words(html: str) -> str:
    return " ".join("".join(parse(html).words).split())


def texts(svg: str) -> list[str | None]:
    return [node.text for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]


def grid_of(values: dict[str, Any], document: dict[str, Any], number: int = 0) -> tuple[Grid, Any]:
    grid = make(values).grids()[number]
    return grid, rows_of(grid, [Trial.model_validate(t) for t in document["trials"]])


@pytest.mark.parametrize(
    ("name", "number", "across", "numeric", "series"),
    [
        ("pipeline", 0, "microbatches", True, ("engine", "comm", "schedule")),
        ("sync", 0, "sync", False, ()),
        ("sync", 1, "sync", False, ("workers",)),
        ("scaling", 0, "workers", True, ("engine", "comm")),
        ("scaling", 1, "workers", True, ("engine", "comm")),  # the batch follows from the workers
    ],
)
def test_the_first_number_goes_across_and_what_follows_from_it_makes_no_lines(
    name: str, number: int, across: str, numeric: bool, series: tuple[str, ...]
) -> None:
    grid = load(name).grids()[number]
    assert axes_of(grid, grid.cells()) == Axes(across, numeric, series)


def test_too_many_lines_become_panels() -> None:
    factors = {"lr": [0.1, 0.2, 0.4], "batch": [8, 16, 32], "optimizer": ["sgd", "adam", "adamw"]}
    grid = make({"measure": ["step_seconds"], "fixed": {"network": "mlp"}, "factors": factors})
    axes = axes_of(grid, grid.cells())
    assert (axes.across, axes.series) == ("lr", ("batch", "optimizer"))
    cut = list(panels(axes, [(cell, []) for cell in grid.cells()]))
    assert [title for title, *_ in cut] == ["batch=8", "batch=16", "batch=32"]
    assert all(len(rows) == 9 and inner.series == ("optimizer",) for _, inner, rows in cut)
    assert len(list(panels(axes, [(cell, []) for cell in grid.cells()], most=9))) == 1


def test_points_are_medians_with_intervals_and_dots_are_repeats(tmp_path: Path) -> None:
    grid, rows = grid_of(PIPELINE, document(PIPELINE, tmp_path))
    axes = axes_of(grid, grid.cells())
    points = pictures.points_of(axes, rows, "step_seconds")
    assert len(points) == 12 and points[0]["x"] == 2 and points[0]["series"] == "native gpipe"
    assert points[0]["y"] == pytest.approx(22.22) and points[0]["low"] == pytest.approx(22)  # ms
    assert len(pictures.dots_of(axes, rows, "step_seconds")) == 36
    drawn = texts(pictures.bubbles(axes, rows))
    for said in (pictures.MEASURED, pictures.REPLAYED, pictures.UNIFORM, "native gpipe", "torch 1f1b", "microbatches"):
        assert said in drawn
    assert pictures.against(axes, [], "step_seconds") == "" and pictures.bubbles(axes, []) == ""


def test_the_page_tells_what_was_asked_found_and_refused(made: Any) -> None:
    html = made["pipes"][1]
    said = words(html)
    assert "bubble: from 20.1% (engine=native schedule=gpipe microbatches=8) to 42.3%" in said
    assert "at most 4.0% of the step from what was measured" in said
    assert "AMD EPYC <i>, 2 usable cores, 8 GiB" in said and "0.2 cores busy with other programs" in said
    assert "paraxis explore --study pipes" in said and "36 trials in" in said
    assert len(re.findall(r'<figure><div class="wide"><svg', html)) == 2 and html.count("<svg") == 4
    said = words(made["often"][1])
    assert "MB/step sent is 4 in every trial." in said and "no <b>such</b> plan" in said and "refused" in said
    assert "accuracy: from 87.2% (workers=2 sync=average@8) to 94.2%" in said


def test_a_study_cut_short_says_so(tmp_path: Path) -> None:
    said = words(page.html(document(PIPELINE, tmp_path, budget=0.0)))
    assert "36 trials did not fit the budget" in said and "engine=torch schedule=1f1b microbatches=8 #2" in said


def test_laws_are_drawn_and_refused_in_words(tmp_path: Path) -> None:
    study, asked = document(SCALING, tmp_path), make(SCALING)
    html = page.laws(study, asked)
    assert "a law takes 3 worker counts" in words(html) and "strong scaling" in words(html)
    serial = {"value": 0.1, "low": 0.1, "high": 0.1}
    law = study["laws"][0] | {"refusal": None, "serial": serial, "sentence": "It fits."}
    fitted = page.laws(study | {"laws": [law]}, asked)
    assert "It fits." in words(fitted) and "not fitted" not in words(fitted)
    assert (curves(html), curves(fitted)) == (2, 4), "the ideal, and the law's own curve, in both widths"


def curves(html: str) -> int:
    """How many lines of many points are drawn."""
    return sum(len(line) > 300 for line in re.findall(r' d="([^"]*)"', html))


def test_hostile_strings_are_only_text_and_nothing_is_fetched(made: Any) -> None:
    for _, html in made.values():
        parsed = parse(html)
        assert html.count("<script") == 3 and "<b>" not in html.replace("<b>Paraxis</b>", "") and "<i>" not in html
        assert HOSTILE in "".join(parsed.words)
        ids = [attributes["id"] for _, attributes in parsed.tags if attributes.get("id")]
        assert len(ids) == len(set(ids)) and len(html) < 3_000_000
        for tag, attributes in parsed.tags:
            assert tag not in ("link", "iframe", "img", "object", "embed", "base") and "src" not in attributes
            assert attributes.get("href", "#")[:1] == "#" and not any(name.startswith("on") for name in attributes)  # type: ignore[index]


def test_raw_trials_round_trip_and_a_large_study_leaves_its_samples_out(made: Any, tmp_path: Path) -> None:
    study, html = made["pipes"]
    assert json.loads(inside(html)) == study and "it lacks" not in words(html)
    large = document(PIPELINE, tmp_path)
    large["trials"][0]["series"] = {"step_seconds": [0.123456789] * 200_000}
    block = page.record(large)[0]
    assert len(block) < 1.01 * RAW_LIMIT and "it lacks their series" in page.raw(large)
    assert json.loads(inside(block))["trials"][0]["measures"] == study["trials"][0]["measures"]


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    study = document(SCALING, tmp_path)
    html = page.write(study, tmp_path).read_text(encoding="utf-8")
    assert html.endswith("</html>\n") and json.loads(inside(html)) == study
    assert not list(tmp_path.glob("*.part"))
