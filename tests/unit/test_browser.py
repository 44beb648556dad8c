"""The report and the theatre used in headless Chromium: nothing fails, nothing is fetched, everything can be used."""

import json
from pathlib import Path

import pytest
from browser import Told, use
from sample_study import build
from sample_trials import PIPELINE, document

from paraxis.plan.plan import Plan
from paraxis.program.cut import Layout
from paraxis.program.instructions import Instruction
from paraxis.program.lower import lower
from paraxis.program.simulate import Costs, simulate
from paraxis.report import page, theatre
from paraxis.study import page as study_page

pytestmark = pytest.mark.browser

USE_REPORT = """
const told = {};
const visible = root => [...root].filter(node => node.checkVisibility());
const boxes = visible(document.querySelectorAll("main svg, header svg"));
told.empty = boxes.filter(s => !s.querySelector("rect, path") || s.getBoundingClientRect().width < 100).length;
told.pictures = boxes.length;
const tall = svg => svg.getBoundingClientRect().height > 50;
told.drawn = Object.fromEntries(["split", "timeline", "scaling", "loss", "accuracy", "memory", "traffic", "theatre"]
  .map(id => [id, visible(document.querySelectorAll(`#${id} svg`)).filter(tall).length]));

const table = document.querySelector("table.sortable");
const cells = i => [...table.tBodies[0].rows].map(row => row.cells[i].textContent), names = () => cells(0);
const head = text => [...table.tHead.rows[0].cells].find(c => c.textContent.trim() === text);
const column = text => cells(head(text).cellIndex);
told.before = names();
head("MB/rank").querySelector("button").click();
told.ascending = [head("MB/rank").ariaSort, column("MB/rank")];
head("MB/rank").querySelector("button").click();
told.descending = [head("MB/rank").ariaSort, column("MB/rank")];
head("Plan").querySelector("button").click();
told.byName = [head("Plan").ariaSort, head("MB/rank").ariaSort, names()];
const filter = document.querySelector(".filter input");
filter.value = "MPI pp"; filter.dispatchEvent(new Event("input"));
told.filtered = visible(table.tBodies[0].rows).map(r => r.cells[0].textContent);
told.count = document.querySelector(".filter output").textContent;
filter.value = ""; filter.dispatchEvent(new Event("input"));
told.all = visible(table.tBodies[0].rows).length;

const line = document.querySelector("#timeline .gantt"), plot = line.querySelector(".plot");
const bar = () => plot.querySelector('[data-at="1"]').getBoundingClientRect().width;
const key = k => plot.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true, cancelable: true }));
told.widths = [bar()];
line.querySelector(".tools button").click(); told.widths.push(bar());
key("0"); told.widths.push(bar());
key("+"); key("ArrowLeft"); key("ArrowLeft"); told.widths.push(bar());
const clientX = plot.getBoundingClientRect().left + 60;
plot.dispatchEvent(new WheelEvent("wheel", { deltaY: -300, ctrlKey: true, clientX, cancelable: true }));
told.widths.push(bar());
told.view = line.querySelector(".view").textContent;
key("0"); key("."); key(".");
told.detail = line.querySelector(".detail").textContent;
told.still = line.querySelector(".still").checkVisibility();
const other = document.querySelector("#programs details:has(.gantt)");
other.open = true; await wait();
told.opened = other.querySelectorAll(".plot .bar").length;

const links = ["download", "samples"].map(id => document.getElementById(id));
for (const link of links) { link.addEventListener("click", e => e.preventDefault()); link.click(); }
told.saved = links.map(link => [link.checkVisibility(), link.href.startsWith("blob:"), link.download]);
told.csv = samples().split("\\r\\n").slice(0, 2);
told.copy = document.querySelector("button.copy") !== null;

const slide = (name, value) => {
  const input = document.querySelector(`.theatre [name=${name}]`);
  input.value = value; input.dispatchEvent(new Event("input", { bubbles: true }));
};
const shown = name => document.querySelector(`[data-figure=${name}]`).textContent;
told.theatre = [shown("bubble"), shown("peak")];
slide("m", 16); slide("schedule", "gpipe"); slide("p", 3);
told.slid = [shown("bubble"), shown("theory"), shown("peak"), shown("makespan")];
told.width = innerWidth;
told.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
return told;
"""


def quiet(told: Told) -> None:
    """No error, nothing refused by the page's policy, nothing fetched, an empty console."""
    assert told.errors == [] and told.refused == [] and told.fetched == [] and told.console == []


@pytest.fixture(scope="module")
def html() -> str:
    """The report of the study built by hand."""
    return page.html(build())


@pytest.mark.parametrize("width", [1280, 390])
def test_report_is_drawn_sorted_filtered_zoomed_and_slid(html: str, width: int, tmp_path: Path) -> None:
    told = use(html, USE_REPORT, tmp_path, width)
    quiet(told)
    found = told.result
    assert found["width"] == width
    assert found["empty"] == 0 and found["pictures"] >= 10 and all(found["drawn"].values()), found["drawn"]
    rising = [int(text) for text in found["ascending"][1]]
    assert found["ascending"][0] == "ascending" and rising == sorted(rising) and len(set(rising)) > 2
    assert found["descending"] == ["descending", [str(number) for number in sorted(rising, reverse=True)]]
    assert found["byName"][:2] == ["ascending", None] and found["byName"][2] != found["before"]
    assert sorted(found["byName"][2]) == sorted(found["before"])
    assert len(found["filtered"]) == 2 and all("pp=2" in name for name in found["filtered"])
    assert found["count"] == "2 of 7 plans" and found["all"] == len(found["before"]) == 7
    whole, button, again, key, wheel = found["widths"]
    assert button == pytest.approx(2 * whole, rel=0.02) and again == pytest.approx(whole, rel=1e-3)
    assert key == pytest.approx(2 * whole, rel=0.02) and wheel > 1.5 * key and " of " in found["view"]
    assert found["detail"].startswith("measured, rank 0: F0 · forward · microbatch 0 · 3.40 ms, from 0.2 to 3.6")
    assert not found["still"] and found["opened"] >= 16
    assert found["saved"] == [[True, True, "study.json"], [True, True, "samples.csv"]]
    assert found["csv"][0] == "plan,label,kind,sample,seconds" and found["csv"][1].startswith('"dp=1,pp=1')
    assert found["theatre"] == ["27.3%", "4 of 8"] and found["slid"] == ["11.1%", "11.1%", "16 of 16", "54.0 forwards"]
    assert found["overflow"] <= 0, "the page scrolls sideways"


def test_a_broken_page_is_noticed(tmp_path: Path) -> None:
    """The instrument itself: an error, a fetch and a policy must not pass in silence."""
    html = (
        '<html><head><meta http-equiv="Content-Security-Policy" content="img-src \'none\'"><style></style></head><body>'
        '<img src="https://example.org/a.png"><script>undefinedName()</script></body></html>'
    )
    told = use(html, "return 1;", tmp_path)
    assert told.result == 1 and len(told.errors) == 1 and told.refused == ["img-src https://example.org/a.png"]
    assert any("undefinedName" in line for line in told.console)


# -- the theatre -----------------------------------------------------------------------------------------------

FIELDS = ("p", "m", "schedule", "backward", "factor", "heavy", "link")
Setting = tuple[int, int, str, float, float, int, float]
SETTINGS: list[Setting] = [
    (p, m, schedule, backward, factor, min(heavy, p - 1), link)
    for schedule in ("layerwise", "gpipe", "1f1b")
    for p, m in ((1, 1), (1, 4), (2, 1), (2, 2), (3, 2), (4, 8), (5, 3), (8, 12), (16, 5))
    for backward, factor, heavy, link in ((2, 1, 0, 0), (0.75, 1, 0, 0.375), (1, 2.5, 1, 0), (2.25, 1.75, 15, 1.125))
] + [(16, 64, "1f1b", 2.0, 1.25, 7, 0.125)]
SLIDE = """
const settings = %s, fields = %s, told = [];
const form = document.querySelector(".theatre form");
for (const setting of settings) {
  setting.forEach((value, i) => { form.elements[fields[i]].value = value; });
  form.dispatchEvent(new Event("input", { bubbles: true }));
  fields.forEach((name, i) => { if (form.elements[name].value != setting[i]) throw Error(`${name} ${setting[i]}`); });
  const values = fields.map((name, i) => name === "schedule" ? setting[i] : +form.elements[name].value);
  const spans = simulate(Object.fromEntries(fields.map((name, i) => [name, values[i]])));
  const bars = [...document.querySelectorAll(".theatre .plot .bar")];
  const x = r => [+r.getAttribute("x"), +r.getAttribute("width"), r.parentNode.querySelectorAll(".k-band").length];
  told.push({
    spans: spans.map(s => [s.rank, s.label, s.kind, s.microbatch, s.start, s.end]),
    drawn: bars.map(r => [Math.round((+r.getAttribute("y") - 2) / 26), r.classList[1], ...x(r)]),
    plot: +document.querySelector(".theatre .plot svg svg").getAttribute("width"),
    peaks: [...document.querySelectorAll(".theatre [data-peak]")].map(t => +t.dataset.peak),
    makespan: document.querySelector("[data-figure=makespan]").textContent,
    bubble: document.querySelector("[data-figure=bubble]").textContent,
  });
}
return told;
"""
Cell = tuple[int, str, str, int, float, float]


def by_python(setting: Setting) -> tuple[list[Cell], list[int], float, float]:
    """Spans that take time, each rank's most live microbatches, makespan and bubble, from the lowered program."""
    p, m, schedule, backward, factor, heavy, link = setting
    program = lower(Plan(pp=p, microbatches=m, schedule=schedule), Layout((1,) * p))

    def compute(i: Instruction) -> float:
        return {"F": 1.0, "B": backward}.get(i.op, 0.0) * (factor if i.stage == heavy else 1)

    line = simulate(program, Costs(compute, lambda i: link))
    cells = [
        (s.rank, s.instruction.label(), s.kind, s.instruction.microbatch, s.start, s.end)
        for s in line.spans
        if s.end > s.start
    ]
    peaks = []
    for body in program.body("step"):
        live = [0]
        live += [live[-1] + sum({"F": 1, "B": -1}.get(i.op, 0) for i in body[: n + 1]) for n in range(len(body))]
        peaks.append(max(live))
    return cells, peaks, line.makespan, line.bubble_fraction()


def test_every_cell_of_the_theatre_is_the_simulators(tmp_path: Path) -> None:
    told = use(theatre.html(), SLIDE % (json.dumps(SETTINGS), json.dumps(FIELDS)), tmp_path)
    quiet(told)
    assert len(told.result) == len(SETTINGS)
    for setting, shown in zip(SETTINGS, told.result, strict=True):
        cells, peaks, makespan, bubble = by_python(setting)
        assert sorted(map(tuple, shown["spans"])) == sorted(cells), setting
        assert shown["peaks"] == peaks, setting
        assert float(shown["makespan"].split()[0].replace(",", "")) == pytest.approx(makespan, rel=6e-3), setting
        assert float(shown["bubble"].rstrip("%")) == pytest.approx(100 * bubble, abs=0.051), setting
        scale = shown["plot"] / makespan
        colours = {"F": "forward", "B": "backward"}
        wanted = [(r, colours.get(t[0], k), s * scale, max(0.4, (e - s) * scale)) for r, t, k, _, s, e in cells]
        ends = {rank: max(e for r, *_, e in cells if r == rank) for rank in range(setting[0])}
        tails = [
            (r, "pipeline_wait", e * scale, max(0.4, (makespan - e) * scale)) for r, e in ends.items() if e < makespan
        ]
        drawn = sorted((r, role, x, width) for r, role, x, width, _ in shown["drawn"])
        for got, want in zip(drawn, sorted([*wanted, *tails]), strict=True):
            assert got[:2] == want[:2] and abs(got[2] - want[2]) + abs(got[3] - want[3]) < 1e-6, setting


ADDRESS = """
location.hash = "p=3&m=16&schedule=gpipe&unknown=1"; await wait(100);
const shown = name => document.querySelector(`[data-figure=${name}]`).textContent;
const told = [shown("theory"), shown("peak")];
const form = document.querySelector(".theatre form");
form.elements.m.value = 4; form.elements.m.dispatchEvent(new Event("change", { bubbles: true }));
told.push(location.hash);
form.reset(); await wait(100);
return [...told, shown("peak")];
"""


def test_theatre_is_set_by_its_address(tmp_path: Path) -> None:
    told = use(theatre.html(), ADDRESS, tmp_path)
    quiet(told)
    theory, peak, address, again = told.result
    assert (theory, peak, again) == ("11.1%", "16 of 16", "4 of 8")
    assert address == "#p=3&m=4&schedule=gpipe&backward=2&factor=1&heavy=0&link=0"
    assert 'data-address="yes"' not in theatre.fragment()  # the report's address belongs to its sections


def test_shipped_theatre_is_the_generated_one() -> None:
    """`python -m paraxis.report.theatre docs/theatre.html` writes it."""
    shipped = (Path(__file__).parents[2] / "docs" / "theatre.html").read_text(encoding="utf-8")
    start = shipped.index("<script>")
    assert shipped[start:] == theatre.html()[theatre.html().index("<script>") :]
    assert shipped[: shipped.index("</style>")] == theatre.html()[: theatre.html().index("</style>")]


# -- a study's page --------------------------------------------------------------------------------------------

USE_STUDY = """
const told = {};
const visible = root => [...root].filter(node => node.checkVisibility());
const boxes = visible(document.querySelectorAll("main figure svg"));
told.pictures = boxes.length;
told.empty = boxes.filter(s => !s.querySelector("path") || s.getBoundingClientRect().height < 80).length;
told.beyond = boxes.filter(s => s.getBoundingClientRect().right > innerWidth + 1).length;
const table = document.querySelector("table.sortable");
const head = text => [...table.tHead.rows[0].cells].find(c => c.textContent.trim() === text);
const column = text => [...table.tBodies[0].rows].map(row => row.cells[head(text).cellIndex].textContent);
told.before = column("bubble");
head("bubble").querySelector("button").click(); told.rising = column("bubble");
head("microbatches").querySelector("button").click();
head("microbatches").querySelector("button").click(); told.falling = column("microbatches");
const filter = document.querySelector(".filter input");
filter.value = "torch 1f1b"; filter.dispatchEvent(new Event("input"));
told.count = document.querySelector(".filter output").textContent;
const links = ["download", "samples"].map(id => document.getElementById(id));
for (const link of links) { link.addEventListener("click", e => e.preventDefault()); link.click(); }
told.saved = links.map(link => [link.checkVisibility(), link.href.startsWith("blob:")]);
told.csv = samples().split("\\r\\n").slice(0, 2);
told.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
return told;
"""


@pytest.fixture(scope="module")
def study_html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of trials made by hand."""
    return study_page.html(document(PIPELINE, tmp_path_factory.mktemp("pipes")))


@pytest.mark.parametrize("width", [1280, 390])
def test_a_studys_page_is_drawn_sorted_and_saved(study_html: str, width: int, tmp_path: Path) -> None:
    told = use(study_html, USE_STUDY, tmp_path, width)
    quiet(told)
    found = told.result
    assert found["pictures"] == 2 and found["empty"] == 0 and found["beyond"] == 0
    rising = [float(text.split("%")[0]) for text in found["rising"]]
    assert rising == sorted(rising) and found["before"] != found["rising"] and len(rising) == 12
    assert found["falling"] == ["8"] * 4 + ["4"] * 4 + ["2"] * 4 and found["count"] == "3 of 12 rows"
    assert found["saved"] == [[True, True]] * 2
    assert found["csv"][0].endswith("microbatches,repeat,status,measure,sample,value")
    assert found["overflow"] <= 0, "the page scrolls sideways"
