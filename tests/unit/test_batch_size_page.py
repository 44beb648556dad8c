"""The page and the pictures of the batch-size study, from its record."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_batch_size import PARAMETERS, Surface

from paraxis.measure.batch_sizes import BatchSizes
from paraxis.report.batch_size_page import page, write_page
from paraxis.report.study_charts import alone, rates_by_batch, steps_by_batch
from paraxis.study.batch_size import tune


@pytest.fixture(scope="module")
def found() -> BatchSizes:
    return tune(PARAMETERS, Surface(noise=0.05))


def texts(svg: str) -> str:
    return " ".join("".join(t.itertext()) for t in ElementTree.fromstring(svg).iter() if t.tag.endswith("text"))


@pytest.mark.parametrize("width", [760, 380])
def test_the_chart_shows_regimes_intervals_and_every_point(found: BatchSizes, width: int) -> None:
    svg = steps_by_batch(found, width)
    said = texts(svg)
    assert "critical batch size" in said and "gradient noise scale" in said and "4,096" in said
    assert ("maximal data parallelism" in said) == (width > 480)
    dots = [p for p in re.findall("<path[^>]*>", svg) if re.search(r' d="[^"]*A', p)]
    assert sum("--accent" in dot for dot in dots) == len(found.points)
    assert sum("--soft" in dot for dot in dots) == sum(len(p.steps) for p in found.points)
    assert "NaN" not in svg and "<script" not in svg
    assert float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0]) <= width + 30


def test_without_a_fit_the_points_are_drawn_alone(found: BatchSizes) -> None:
    bare = found.model_copy(
        update={"critical": found.critical.model_copy(update={"b_crit": None, "refusal": "few"}), "noise": None}
    )
    said = texts(steps_by_batch(bare))
    assert "critical" not in said and "4,096" in said
    assert steps_by_batch(found.model_copy(update={"points": []})) == ""
    assert rates_by_batch(found.model_copy(update={"points": []})) == ""


def test_a_picture_alone_has_a_size_and_ink_in_both_modes(found: BatchSizes) -> None:
    svg = alone(rates_by_batch(found))
    root = ElementTree.fromstring(svg)
    assert float(root.attrib["width"]) > 600 and float(root.attrib["height"]) > 200
    assert "prefers-color-scheme:dark" in svg
    assert "learning rate" in texts(svg)


def test_the_page_says_what_was_fixed_and_found(found: BatchSizes) -> None:
    text = page(found, {"cpu": "Some CPU"})
    assert found.sentence in text and "seed 0 and judged with 1, 2, 3" in text and "on Some CPU" in text
    rows = [line for line in text.splitlines() if re.match(r"\| [\d,]+ \|", line)]
    assert len(rows) == len(found.points)
    for point, row in zip(found.points, rows, strict=True):
        assert f"| {point.lr:g} | {point.median:,.0f} (" in row
    assert "| critical batch size |" in text and "| gradient noise scale" in text
    cut = page(found.model_copy(update={"finished": False, "notes": ["unfinished: the budget"]}))
    assert "- unfinished: the budget" in cut and "was not finished" in cut


def test_the_page_is_written_from_what_explore_prints(found: BatchSizes, tmp_path: Path) -> None:
    document: dict[str, Any] = json.loads(json.dumps({"analysis": found.model_dump(mode="json"), "trials": []}))
    path = write_page(document, tmp_path / "docs")
    assert path.read_text() == page(found)
    for name in re.findall(r"\]\((.*?\.svg)\)", path.read_text()):
        ElementTree.parse(path.parent / name)
