// The report's own script: without it everything can still be read; with it tables sort, timelines zoom, figures leave.
"use strict";

const record = document.getElementById("study")?.textContent ?? "null";
const study = JSON.parse(record);

function offer(id, type, content) {
  const link = document.getElementById(id);
  if (!link) return;
  // Made when it is asked for: a page that is only read should not hold its figures twice.
  link.onclick = () => { link.href = URL.createObjectURL(new Blob([content()], { type })); };
  link.href = "#raw";
  link.hidden = false;
}

function csv(rows) {
  const cell = value => {
    // A text that a spreadsheet would take for a formula gets an apostrophe.
    const text = `${typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? "'" : ""}${value ?? ""}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map(row => row.map(cell).join(",") + "\r\n").join("");
}

function measured() {
  const today = study.today && !study.results.some(r => r.plan === study.today.plan) ? [study.today] : [];
  return [...today, ...study.results];
}

// A study's trials: a line for every measure, and one for every sample of its series.
function trials() {
  const names = key => [...new Set(study.trials.flatMap(t => Object.keys(t[key] ?? {})))], factors = names("factors");
  const rows = study.trials.flatMap(t => {
    const lead = [...factors.map(key => t.factors[key]), t.repeat, t.status];
    return [
      ...Object.entries(t.measures).map(([key, value]) => [...lead, key, "", value]),
      ...Object.entries(t.series ?? {}).flatMap(([key, values]) => values.map((v, i) => [...lead, key, i, v])),
    ];
  });
  return csv([[...factors, "repeat", "status", "measure", "sample", "value"], ...rows]);
}

function samples() {
  if (study.trials) return trials();
  const kinds = ["samples", "warmup", "disturbed"]; // the last two were set aside and count in no figure
  const rows = measured().flatMap(r => kinds.flatMap(kind =>
    (r.step_seconds?.[kind] ?? []).map((s, i) => [r.plan, r.label, kind === "samples" ? "kept" : kind, i, s])));
  return csv([["plan", "label", "kind", "sample", "seconds"], ...rows]);
}

// A click on a head, or Enter on it, sorts; cells without a figure stay below.
function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const cell = row.cells[i], key = cell.dataset.v;
    return key !== undefined ? (key === "" ? null : +key) : cell.textContent.trim().toLowerCase() || null;
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : `${a}`.localeCompare(`${b}`, "en", { numeric: true });
  heads.forEach((head, i) => {
    const button = make("button", { type: "button", class: "sort" }, ...head.childNodes);
    head.replaceChildren(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => [value(row, i), row]);
      rows.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : compare(a, b) * (down ? -1 : 1)));
      body.append(...rows.map(([, row]) => row));
    };
  });
}

// Every word must occur in the row.
function filterable(table) {
  const rows = [...table.tBodies[0].rows], input = make("input", { type: "search", placeholder: study?.trials ? "" : "dp mpi, bubble, inexact ..." });
  const noun = study?.trials ? "rows" : "plans";
  const count = make("output", {}, `${rows.length} ${noun}`);
  input.oninput = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      left += !row.hidden;
    }
    count.textContent = left === rows.length ? `${left} ${noun}` : `${left} of ${rows.length} ${noun}`;
  };
  table.parentNode.before(make("div", { class: "filter" }, make("label", {}, "Filter ", input), count));
}

// The drawn timeline stays in the page for printers; on a screen the instrument takes its place.
function instrument(box) {
  if (box.classList.contains("live")) return;
  const result = measured().find(r => r.plan === box.dataset.plan);
  const events = result ? [...result.timeline, ...result.simulated] : [];
  if (!events.length) return;
  box.classList.add("live");
  const screen = make("div", { class: "screen" }, legend(events));
  box.prepend(screen);
  gantt(screen, { label: `Timeline of ${result.label}`, unit: "ms", scale: 1e3 }).show([
    { title: "measured", events: result.timeline }, { title: "simulated", events: result.simulated },
  ]);
}

if (study) {
  offer("download", "application/json", () => record);
  offer("samples", "text/csv", samples);
}
for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = !navigator.clipboard;
  button.onclick = () => navigator.clipboard.writeText(button.previousElementSibling.textContent)
    .then(() => { button.textContent = "copied"; });
}
document.querySelectorAll("table.sortable").forEach(table => { sortable(table); filterable(table); });
for (const box of document.querySelectorAll("figure.gantt")) {
  const fold = box.closest("details");
  if (fold) fold.addEventListener("toggle", () => fold.open && instrument(box));
  else instrument(box);
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
