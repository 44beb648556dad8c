"""The report of a study built by hand: order, words, escaping, and what happens when figures are missing."""

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from sample_study import HOSTILE, SENTENCE, bare, build, left_out, pipelined, result, seconds, winning

from paraxis.measure.records import Event, Study, Verified
from paraxis.report import charts, curves, gantt, page, speedup, tables

NOTED = ("bound by computing: <b>78%</b>", "12.4–13.4", "L1d 32 KiB", "21.5 with all: a triad of 64 MiB", "3.45 GHz")
VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


def printed(study: Study, width: int, **options: Any) -> str:
    """What the terminal shows, as a pipe would get it."""
    stream = io.StringIO()
    tables.terminal(study, Console(file=stream, width=width, **options))
    return stream.getvalue()


class Balance(HTMLParser):
    """Collects tags, their attributes and text; every tag must be closed by its own."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open[-3:]}"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)


def parse(html: str) -> Balance:
    """The parsed page; fails on unbalanced tags."""
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def inside(html: str) -> str:
    """The raw record as a browser would read it."""
    found = re.search(r'<script type="application/json" id="study">(.*?)</script>', html, re.DOTALL)
    assert found
    return found.group(1)


@pytest.fixture(scope="module")
def report() -> str:
    """The page of the whole study, drawn once."""
    return page.html(build())


@pytest.mark.parametrize("width", [80, 140])
def test_table_is_sorted_with_today_among_the_plans(width: int) -> None:
    lines = printed(build(), width).splitlines()
    assert max(map(len, lines)) <= width
    marks = ["average@8", "dp=2 mpi", "today:", "1f1b", "gloo", "dp=4 mpi *", "pp=2,schedule=gpipe,"]
    rows = [next(i for i, line in enumerate(lines) if mark in line) for mark in marks]
    assert rows == sorted(rows)
    assert "16.8 [16.3-17.8]" in lines[rows[2]] and "1.00x" in lines[rows[2]] and "is serial" in lines[rows[2]]
    assert "12.8 [12.6-13.2]" in lines[rows[1]] and "1.31x" in lines[rows[1]] and "yes 3e-7" in lines[rows[1]]
    assert "bubble 20%" in lines[rows[3]] and "55" in lines[rows[3]]


def test_width_decides_how_much_is_written_out() -> None:
    wide, narrow = printed(build(), 140), printed(build(), 80)
    assert "1.31x [1.27-1.35]" in wide and "[1.27-1.35]" not in narrow
    assert "inexact, = emulation 2e-8" in wide and "inexact 2e-8" in narrow


@pytest.mark.parametrize("width", [40, 80, 140])
def test_terminal_tells_the_rest(width: int) -> None:
    text = " ".join(printed(build(), width).split())
    assert "2 refused, 1 failed, 1 not reached: all listed in the report" in text
    assert "* oversubscribed: more workers" in text and "inexact: another algorithm" in text
    assert "winner's step:" in text and "compute 78%" in text and "exposed communication 15%" in text
    assert SENTENCE in text
    assert f"paraxis train '{HOSTILE}' --plan dp=2,comm=mpi" in printed(build(), width)  # in one line
    assert "unfinished" not in text and "\x1b" not in text


def test_terminal_without_unicode_or_with_hostile_text() -> None:
    study = build()
    study.notes = ["\x1b[31mred\x07", "[bold]not markup[/bold]"]
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    plain = study.model_copy(update={"notes": []})
    tables.terminal(plain, Console(file=stream, width=80))
    text = printed(study, 80)
    assert "\x1b" not in text and "\x07" not in text and "[bold]not markup[/bold]" in text


def test_proof_that_fails_is_loud() -> None:
    study = build()
    proof = Verified(
        against="serial", max_relative_difference=0.0312, tolerance=1e-5, passed=False, where="step 3, fc1"
    )
    study.results[0].verified = proof
    assert "NO 3e-2" in printed(study, 140)


def test_apportion_adds_up() -> None:
    assert tables.apportion([0.5, 0.25, 0.25], 10) in ([5, 3, 2], [5, 2, 3])
    assert sum(tables.apportion([0.331, 0.331, 0.338], 61)) == 61
    assert tables.apportion([], 5) == [] and tables.apportion([0.0], 5) == [0]


def test_numbers_keep_three_digits() -> None:
    assert [tables.milliseconds(s) for s in (1.2345, 0.0128, 0.00128, 0.0001234)] == ["1,234", "12.8", "1.28", "0.123"]
    assert [tables.difference(x) for x in (3.1e-7, 0.0, None, 1e-15)] == ["3e-7", "0", "?", "1e-15"]
    assert [tables.percent(x) for x in (0.79, 0.004, 0.0, None)] == ["79%", "<1%", "0%", ""]
    assert [tables.megabytes(x) for x in (61_000_000, 3_600_000, 12_000, 0, None)] == ["61", "3.6", "0.012", "0", ""]


def test_page_is_whole_and_small(report: str) -> None:
    parsed = parse(report)
    names = [tag for tag, _ in parsed.tags]
    assert names.count("h1") == 1 and names.count("main") == 1 and names.count("svg") == 7 * 2 + 2 + 2 + 1
    assert len(report) < 3_000_000
    ids = [attributes["id"] for _, attributes in parsed.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] or "" for tag, attributes in parsed.tags if tag == "a" and "href" in attributes]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in parsed.tags if tag == "th")


def test_page_fetches_nothing(report: str) -> None:
    for tag, attributes in parse(report).tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        for name, value in attributes.items():
            assert name == "xmlns" or name.startswith("xmlns:") or "//" not in (value or ""), (tag, name, value)
            assert name != "src" and not name.startswith("on")
    css = report[report.index("<style>") : report.index("</style>")]
    assert "url(" not in css and "@import" not in css


def test_page_tells_everything(report: str) -> None:
    text = " ".join("".join(parse(report).words).split())
    for words in (
        SENTENCE,
        "AMD EPYC 7R13",
        "12.8 ms",
        "16.8 ms",
        "is serial",
        "not reached",
        "no reason recorded",
        *NOTED,
    ):
        assert words in text
    assert "unfinished" not in text
    for result_ in build().results:
        assert result_.label in text
    assert "tensor parallel needs 2 | heads" in text and "<&>" in text


def test_hostile_strings_are_only_text(report: str) -> None:
    assert report.count("<script") == 4 and "<img" not in report and "<b>2</b>" not in report and "<i>" not in report
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.py" in report
    study = build()
    hostile = '"><script>alert(4)</script>'
    study.results = [study.results[0].model_copy(update={"label": hostile, "bound_by": hostile, "program": hostile})]
    study.machine.cpu = study.version = study.recommendation.why = hostile  # type: ignore[union-attr]
    study.task = {hostile: {"a": hostile}}
    again = page.html(study)
    parse(again)
    assert again.count("<script") == 4


def test_raw_record_round_trips(report: str) -> None:
    assert "<" not in inside(report)
    assert Study.model_validate_json(inside(report)) == build()
    assert json.loads(inside(report))["task"]["network"] == HOSTILE


def test_charts_are_free_of_size_and_named() -> None:
    study = build()
    for draw in (charts.bars, charts.split, curves.losses):
        root = ElementTree.fromstring(draw(study))
        assert root.get("role") == "img" and root.get("viewBox") and not root.get("width") and not root.get("height")
        assert root[0].tag.endswith("title") and root[0].text
        box = [float(number) for number in (root.get("viewBox") or "").split()]
        assert 500 < box[2] < 900 and box[3] > 6 * 26  # its plans have their height
        assert "1a7399" in ElementTree.tostring(root, "unicode")


def test_timeline_draws_both_halves() -> None:
    svg = gantt.timeline(pipelined())
    words = [node.text for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]
    assert "measured" in words and "simulated" in words and words.count("F3") == 4 and words.count("B0") == 4
    assert svg.count("<pattern") == 1
    names = re.findall(r"url\(#([^)]*)\)", svg)
    assert names and all(f'id="{name}"' in svg for name in names)


def test_charts_of_nothing_are_empty() -> None:
    study = bare()
    assert [charts.bars(study), charts.split(study), curves.losses(study), gantt.timeline(left_out()[0])] == [""] * 4


def test_losses_that_are_not_numbers_are_left_out() -> None:
    study = bare(results=[result("dp=1", "dp=1", losses=[math.nan, 1.0, math.inf, 0.5])])
    assert "NaN" not in curves.losses(study)


@pytest.mark.parametrize("study", [bare(), bare(results=left_out()), bare(results=[result("dp=1", "dp=1")])])
def test_studies_without_figures(study: Study) -> None:
    html = page.html(study)
    parse(html)
    text = printed(study, 80)
    assert "No plan was measured" in html and "no plan was measured" in text
    assert "unfinished: stopped after" in html and "unfinished" in text
    assert Study.model_validate_json(inside(html)) == study


def test_study_cut_short_without_today() -> None:
    only = result("dp=2,comm=mpi", "dp=2 mpi", (2, 1, 1), step_seconds=seconds(12.8))
    study = bare(results=[only, *left_out()], elapsed_seconds=43.0)
    html, text = page.html(study), printed(study, 80)
    parse(html)
    assert "unfinished: stopped after 43 s with 1 plan measured, 1 not reached" in html
    assert "1 plan measured, none recommended" in html
    assert "not proved" in text and "today" not in text and "efficiency" not in text


def test_today_may_win() -> None:
    study = build()
    study.results = left_out()
    keep = {"plan": study.today.plan, "label": "today", "sentence": "Keep what you have.", "vs_today": None}  # type: ignore[union-attr]
    study.recommendation = study.recommendation.model_copy(update=keep)  # type: ignore[union-attr]
    html = page.html(study)
    parse(html)
    assert "Keep what you have." in html and "Against today" not in html


def test_page_of_a_large_study_stays_small() -> None:
    study = build()
    many = [Event(rank=i % 128, label=f"F{i}", kind="compute", microbatch=i, start=i, end=i + 1) for i in range(3000)]
    lines = [f"rank {i} " + "F0 B0 " * 50 for i in range(128)]
    large = {"timeline": many, "simulated": many, "program_text": lines}
    plans = [pipelined().model_copy(update={"plan": f"dp={i}", "label": f"dp={i}", **large}) for i in range(6)]
    study.results = [*plans, winning()]
    html = page.html(study)
    assert len(html) < 3_000_000 and "study.json has them" in html and "and 64 more ranks" in html
    kept = Study.model_validate_json(inside(html))
    assert kept.results[-1] == winning() and kept.results[0].step_seconds == plans[0].step_seconds


def test_write(tmp_path: Path) -> None:
    path = page.write(bare(), tmp_path / "new")
    assert path.name == "report.html" and [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_roofline_is_a_table_and_a_sentence() -> None:
    section = page.html(build()).partition('<section id="roofline"')[2].partition("</section>")[0]
    assert section.count("<tr>") == 3 and section.count(">40.0<") == 2 and section.count(">100.0<") == 2
    assert "s backward takes 67% of the time" in section and "<img" not in section
    assert 'id="roofline"' not in page.html(bare())


def test_accuracy_is_drawn_and_said_or_why_it_is_not(report: str) -> None:
    text = " ".join("".join(parse(report).words).split())
    assert "scored on 2,500 test samples" in text and "93.0% ±1.0%" in text and "88.0% ±1.3%" in text
    drawn = ElementTree.fromstring(curves.accuracy(build()))
    words = [node.text for node in drawn.iter() if node.tag.endswith("text")]
    assert "samples seen" in words and "seconds of training" in words and "dp=2 average@8 mpi (inexact)" in words
    study = bare(accuracy_skipped="there are no held-out samples", results=build().results[:1])
    assert curves.accuracy(study) == ""
    assert "Accuracy was not compared: there are no held-out samples." in "".join(parse(page.html(study)).words)


def test_plans_with_fewer_rounds_and_what_is_not_told_apart_are_said() -> None:
    study = build()
    assert "fewer rounds" not in printed(study, 200) + inside(page.html(study))
    stopped = next(r for r in study.results if r.label == "pp=2 1f1b m=4 mpi")
    stopped.stopped = "measured in 6 rounds: told apart from dp=2 mpi, which is <b>9</b> times as fast [8-10]"
    assert study.recommendation is not None
    study.recommendation.not_told_apart = ["near", "scarce", "rare"]
    study.recommendation.too_few_rounds = ["scarce", "rare"]
    told = printed(study, 200)
    assert "1 plan had fewer rounds than others, to leave more to the fastest" in told
    assert "Not told apart from: near\n" in told
    assert "Too few rounds to tell it apart from scarce, rare: raise --budget" in told
    html = page.html(study)
    words = " ".join(parse(html).words)
    assert "Plans with fewer rounds" in words and "which is <b>9</b> times as fast [8-10]" in words
    assert "Not told apart from: near." in words and "scarce, rare: raise --budget." in words
    study.recommendation.too_few_rounds = list(study.recommendation.not_told_apart)
    assert "Not told apart" not in printed(study, 200)


def test_laws_are_fitted_over_enough_counts_and_else_refused_once() -> None:
    study = build()
    text = "".join(parse(speedup.laws(study)).words) if speedup.laws(study) else ""
    assert text == "", "no plan of one worker, no speed-up"
    one = result("dp=1", "serial", step_seconds=seconds(20.0, 0.002), speedup=1.0, efficiency=1.0)
    study.results.append(one)
    text = "".join(parse(speedup.laws(study)).words)
    assert text.count("a law takes 3 worker counts within the 2 usable cores; there are 1, 2") == 1
    assert "1.56" in text  # 20 ms of one over 12.8 of two
    study.machine.usable_cores = 4
    four = result("dp=4", "dp=4 mpi", (4, 1, 1), step_seconds=seconds(8.0, 0.002), speedup=2.5, efficiency=0.62)
    study.results = [one, winning(), four.model_copy(update={"comm": "mpi"})]
    study.results[1].step_seconds = seconds(12.0, 0.002)  # 4 ms serial, 16 shared: s = 0.2
    text = "".join(parse(speedup.laws(study)).words)
    assert "Amdahl's law: a serial part of 20.0%" in text and "not fitted" not in text
