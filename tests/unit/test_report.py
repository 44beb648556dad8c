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

from paraxis.measure.records import (
    Baseline,
    Event,
    Machine,
    MeshRecord,
    Ratio,
    Recommendation,
    Result,
    Seconds,
    Split,
    Study,
    Verified,
)
from paraxis.report import charts, page, tables

HOSTILE = "<script>alert(1)</script>.py"
SENTENCE = (
    "Use dp=2 mpi: 12.8 ms per step against 16.8 ms today, 1.31x [1.24-1.38] faster, with the weights of the serial "
    "run."
)
VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


def seconds(median: float, spread: float = 0.03) -> Seconds:
    """Samples around a median in ms, without a random generator."""
    samples = [median * (1 + spread * math.sin(i * 2.4)) / 1e3 for i in range(40)]
    return Seconds(
        median=median / 1e3, low=median * (1 - spread / 2) / 1e3, high=median * (1 + spread) / 1e3, samples=samples
    )


def split(total: float, **shares: float) -> Split:
    """A step of `total` ms in the given shares; compute takes the rest."""
    fields = ["optimizer", "communication", "pipeline_wait", "straggler_wait", "data", "overhead"]
    parts = {field: total / 1e3 * shares.get(field, 0.01) for field in fields}
    return Split(compute=total / 1e3 - sum(parts.values()), **parts)


def losses(start: float, bias: float = 0.0) -> list[float]:
    """A falling loss."""
    return [start * math.exp(-i / 25) + 0.2 + bias + 0.03 * math.sin(i * 1.7) for i in range(60)]


def replicas(scale: float = 1.0) -> list[Event]:
    """One step of dp=2: forward, backward, reduce, update."""
    times = [("Load0", "data", 0, 0.2), ("F0", "compute", 0, 3.4), ("B0", "compute", 0, 6.2)]
    times += [("AllReduce", "communication", -1, 1.9), ("Update", "optimizer", -1, 0.4)]
    events = []
    for rank in range(2):
        now = 0.1 * rank
        for label, kind, microbatch, length in times:
            end = now + length * scale * (1 + 0.04 * rank * (kind == "compute"))
            events.append(
                Event(rank=rank, label=label, kind=kind, microbatch=microbatch, start=now / 1e3, end=end / 1e3)
            )
            now = end
    return events


def pipeline(scale: float = 1.0) -> list[Event]:
    """One step of pp=2 1f1b on four microbatches, with its bubble."""
    queues = [["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"], ["F0", "B0", "F1", "B1", "F2", "B2", "F3", "B3"]]
    ready: dict[tuple[str, int], float] = {}
    now = [0.0, 0.0]
    events: list[Event] = []

    def add(rank: int, label: str, kind: str, end: float) -> None:
        times = {"start": now[rank] / 1e3, "end": end / 1e3}
        events.append(Event(rank=rank, label=label, kind=kind, microbatch=int(label[1:]), **times))
        now[rank] = end

    while any(queues):
        for rank, queue in enumerate(queues):
            waits = bool(queue) and (queue[0][0], rank) in {("F", 1), ("B", 0)}
            if not queue or (waits and (queue[0], 1 - rank) not in ready):
                continue
            label = queue.pop(0)
            arrival = ready[label, 1 - rank] if waits else 0.0
            if arrival > now[rank]:
                add(rank, label, "pipeline_wait", arrival)
            add(rank, label, "compute", now[rank] + (1.3 if label[0] == "F" else 2.3) * scale)
            ready[label, rank] = now[rank]
    return events


def result(plan: str, label: str, mesh: tuple[int, int, int] = (1, 1, 1), **fields: Any) -> Result:
    """A result with defaults for what a test does not care about."""
    ranks = mesh[0] * mesh[1] * mesh[2]
    base: dict[str, Any] = {
        "plan": plan,
        "label": label,
        "mesh": MeshRecord(dp=mesh[0], pp=mesh[1], tp=mesh[2]),
        "schedule": "layerwise",
        "engine": "torch",
        "comm": "mpi" if ranks > 1 else None,
        "threads": 1,
        "workers": ranks,
        "status": "ok",
        "exact": True,
    }
    return Result(**(base | fields))


def measured(plan: str, label: str, mesh: tuple[int, int, int], time: float, proof: float, **fields: Any) -> Result:
    """A plan that ran."""
    base: dict[str, Any] = {
        "step_seconds": seconds(time),
        "samples_per_second": 256 / time * 1e3,
        "vs_today": Ratio(median=16.8 / time, low=16.3 / time, high=17.3 / time),
        "speedup": 15.9 / time,
        "efficiency": 20.2 / time / 2,
        "verified": Verified(
            against="serial run, 20 steps" if fields.get("exact", True) else "serial emulation, 20 steps",
            max_relative_difference=proof,
            tolerance=1e-5,
            passed=True,
        ),
        "peak_memory_bytes": 61_000_000,
        "bytes_communicated": 3_600_000,
        "losses": losses(2.1),
    }
    return result(plan, label, mesh, **(base | fields))


def today() -> Result:
    """One process of the framework with its default threads."""
    return result(
        "dp=1,pp=1,tp=1,engine=torch,threads=2",
        "today",
        threads=2,
        workers=2,
        step_seconds=seconds(16.8, 0.06),
        samples_per_second=15238.0,
        efficiency=0.60,
        bound_by="op overhead",
        peak_memory_bytes=92_000_000,
        split=split(16.8, optimizer=0.09, overhead=0.24),
        losses=losses(2.1),
    )


def winning() -> Result:
    """The plan to recommend, with all that a winner has."""
    return measured(
        "dp=2,comm=mpi",
        "dp=2 mpi",
        (2, 1, 1),
        12.8,
        3e-7,
        bound_by="compute",
        split=split(12.8, communication=0.15, optimizer=0.03),
        exposed_comm_fraction=0.15,
        timeline=replicas(),
        simulated=replicas(0.95),
        program_text=["rank 0  Load0 F0 B0 AllReduce(grad) Update", "rank 1  Load0 F0 B0 AllReduce(grad) Update"],
    )


def pipelined() -> Result:
    """A pipeline with its bubble."""
    return measured(
        "pp=2,schedule=1f1b,microbatches=4,comm=mpi",
        "pp=2 1f1b m=4 mpi",
        (1, 2, 1),
        17.9,
        2e-7,
        bound_by="bubble 20%",
        bubble_fraction=0.2,
        split=split(17.9, pipeline_wait=0.2, communication=0.06),
        timeline=pipeline(),
        simulated=pipeline(0.93),
        schedule="1f1b",
        peak_memory_bytes=55_000_000,
        program_text=["rank 0  F0 F1 B0 F2 B1 F3 B2 B3 U", "rank 1  .  F0 B0 F1 B1 F2 B2 F3 B3 U <&>"],
    )


def others() -> list[Result]:
    """An oversubscribed plan, an inexact one, one over Gloo, a long text."""
    crowd = {"communication": 0.34, "straggler_wait": 0.21}
    long = "pp=2,schedule=gpipe,microbatches=8,recompute=all,comm=mpi"
    fields: list[tuple[str, str, tuple[int, int, int], float, float, dict[str, Any]]] = [
        ("dp=4,comm=mpi", "dp=4 mpi", (4, 1, 1), 24.1, 4e-7, {"oversubscribed": True, "split": split(24.1, **crowd)}),
        (
            "dp=2,sync=average@8",
            "dp=2 average@8 mpi",
            (2, 1, 1),
            11.9,
            2e-8,
            {"exact": False, "losses": losses(2.1, 0.1)},
        ),
        ("dp=2,comm=gloo", "dp=2 gloo", (2, 1, 1), 19.4, 3e-7, {"split": split(19.4, communication=0.41)}),
        (long, long, (1, 2, 1), 31.0, 5e-7, {"bound_by": "bubble 11%", "split": split(31.0, pipeline_wait=0.11)}),
    ]
    return [measured(plan, label, mesh, time, proof, **more) for plan, label, mesh, time, proof, more in fields]


def left_out() -> list[Result]:
    """What was not measured."""
    grid = "receive without a send:\n  rank 0 | F0 B0\n  rank 1 | F0 <script>alert(2)</script>\n              ^ here"
    return [
        result(
            "tp=2", "tp=2", (1, 1, 2), status="refused", reason="tensor parallel needs 2 | heads, this network has 3"
        ),
        result("pp=3", "pp=3", (1, 3, 1), status="refused", reason="3 stages need 3 layers: <b>2</b> & no more"),
        result("pp=2,schedule=zb", "pp=2 zb", (1, 2, 1), status="failed", reason=grid),
        result("dp=8", "dp=8 <i>", (8, 1, 1), status="not run", reason=None),
    ]


def build() -> Study:
    """A study as a small machine gives it: two cores, six plans beside today, refusals, a failure."""
    return Study(
        task={"network": HOSTILE, "parameters": 1_200_000, "global_batch": 256, "loss": "cross_entropy", "seed": 0},
        machine=Machine(
            cpu="AMD EPYC 7R13",
            usable_cores=2,
            memory_bytes=8 * 2**30,
            load_before=0.31,
            load_after=0.52,
            foreign_cores=0.1,
            python="3.11.9",
            torch="2.9.0",
            mpi="Open MPI 5.0.8",
            system="Linux 6.1",
        ),
        today=today(),
        baseline=Baseline(plan="engine=torch,threads=1", step_seconds=seconds(15.9)),
        results=[pipelined(), *others(), winning(), *left_out()],
        recommendation=Recommendation(
            plan="dp=2,comm=mpi",
            label="dp=2 mpi",
            sentence=SENTENCE,
            why="Each rank computes on its half of the batch; the reduction of 3.6 MB costs 1.9 ms of it.",
            command=f"paraxis train '{HOSTILE}' --plan dp=2,comm=mpi",
            vs_today=Ratio(median=1.31, low=1.24, high=1.38),
            not_told_apart=[],
        ),
        notes=["dropout was switched off for the proofs </script><img src=x onerror=alert(3)>"],
        finished=True,
        elapsed_seconds=58.2,
        version="0.1.0",
    )


def bare(**fields: Any) -> Study:
    """A study with nothing in it, every optional field null."""
    machine = Machine(
        cpu="?",
        usable_cores=1,
        memory_bytes=2**30,
        load_before=0.0,
        python="3.11",
        torch="2.9",
        mpi=None,
        system="Linux",
    )
    base: dict[str, Any] = {"today": None, "baseline": None, "results": [], "recommendation": None}
    return Study(**({"task": {}, "machine": machine, "version": "0.1.0"} | base | fields))


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
    assert names.count("h1") == 1 and names.count("main") == 1 and names.count("svg") == 3 * 2 + 2
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
    for words in (SENTENCE, "AMD EPYC 7R13", "12.8 ms", "16.8 ms", "is serial", "not reached", "no reason recorded"):
        assert words in text
    assert "unfinished" not in text
    for result_ in build().results:
        assert result_.label in text
    assert "tensor parallel needs 2 | heads" in text and "<&>" in text


def test_hostile_strings_are_only_text(report: str) -> None:
    assert report.count("<script") == 2 and "<img" not in report and "<b>2</b>" not in report and "<i>" not in report
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.py" in report
    study = build()
    hostile = '"><script>alert(4)</script>'
    study.results = [study.results[0].model_copy(update={"label": hostile, "bound_by": hostile, "program": hostile})]
    study.machine.cpu = study.version = study.recommendation.why = hostile  # type: ignore[union-attr]
    study.task = {hostile: {"a": hostile}}
    again = page.html(study)
    parse(again)
    assert again.count("<script") == 2


def test_raw_record_round_trips(report: str) -> None:
    assert "<" not in inside(report)
    assert Study.model_validate_json(inside(report)) == build()
    assert json.loads(inside(report))["task"]["network"] == HOSTILE


def test_charts_are_free_of_size_and_named() -> None:
    study = build()
    for draw in (charts.bars, charts.split, charts.losses):
        root = ElementTree.fromstring(draw(study))
        assert root.get("role") == "img" and root.get("viewBox") and not root.get("width") and not root.get("height")
        assert root[0].tag.endswith("title") and root[0].text
        box = [float(number) for number in (root.get("viewBox") or "").split()]
        assert 500 < box[2] < 900 and box[3] > 6 * 26  # its plans have their height
        assert "1a7399" in ElementTree.tostring(root, "unicode")


def test_timeline_draws_both_halves() -> None:
    svg = charts.timeline(pipelined())
    words = [node.text for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]
    assert "measured" in words and "simulated" in words and words.count("F3") == 4 and words.count("B0") == 4
    assert svg.count("<pattern") == 1
    names = re.findall(r"url\(#([^)]*)\)", svg)
    assert names and all(f'id="{name}"' in svg for name in names)


def test_charts_of_nothing_are_empty() -> None:
    study = bare()
    assert [charts.bars(study), charts.split(study), charts.losses(study), charts.timeline(left_out()[0])] == [""] * 4


def test_losses_that_are_not_numbers_are_left_out() -> None:
    study = bare(results=[result("dp=1", "dp=1", losses=[math.nan, 1.0, math.inf, 0.5])])
    assert "NaN" not in charts.losses(study)


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
