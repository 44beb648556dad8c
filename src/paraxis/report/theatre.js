// The bubble theatre: a pipeline's program, its simulation and its picture, as the sliders say.
// order() is plan/schedules.py and simulate() is program/simulate.py, in so far as a plan with dp=1 needs them.
"use strict";

// How many stages each rank has.
const stagesOf = ({ p, m, schedule }) => schedule === "interleaved" && p > 1 && m > 1 ? 2 : 1;
const opOf = label => label.match(/[A-Z]/)?.[0];

// In which order a rank computes its stages' microbatches: [operation, stage, microbatch].
function order(schedule, p, m, rank) {
  const all = (op, stage = rank) => Array.from({ length: m }, (_, i) => [op, stage, i]);
  if (p === 1 || m === 1 || schedule === "layerwise") return all("F").flatMap(([, s, i]) => [["F", s, i], ["B", s, i]]);
  if (schedule === "gpipe") return [...all("F"), ...all("B")];
  if (schedule === "zb-h1") return zeroBubble(m, rank, p - rank, p);
  if (schedule === "zb-h2") return zeroBubble(m, rank, 2 * (p - rank) - 1, 2 * p - 1);
  let forward = all("F"), backward = all("B"), warmup = p - 1 - rank;
  if (schedule === "interleaved") {
    const groups = Math.max(1, Math.floor(m / p)), each = Math.floor(m / groups), larger = m % groups;
    const ends = Array.from({ length: groups + 1 }, (_, n) => n * each + Math.min(n, larger));
    const cut = (op, own) => ends.slice(1).flatMap((end, n) => own.flatMap(s => all(op, s).slice(ends[n], end)));
    forward = cut("F", [rank, rank + p]);
    backward = cut("B", [rank + p, rank]);
    warmup = ends[1] + 2 * warmup;
  }
  warmup = Math.min(warmup, forward.length);
  const steady = forward.slice(warmup).flatMap((cell, n) => [cell, backward[n]]);
  return [...forward.slice(0, warmup), ...steady, ...backward.slice(forward.length - warmup)];
}

// So many forwards first, then I and F in turn, with a W where `most` are live or no F is left.
function zeroBubble(m, rank, warmup, most) {
  const cells = [];
  let forwards = Math.min(warmup, m), weights = 0;
  for (let i = 0; i < forwards; i++) cells.push(["F", rank, i]);
  for (let i = 0; i < m; i++) {
    cells.push(["I", rank, i]);
    if (forwards === m || forwards === weights + most) cells.push(["W", rank, weights++]);
    if (forwards < m) cells.push(["F", rank, forwards++]);
  }
  while (weights < m) cells.push(["W", rank, weights++]);
  return cells;
}

// Spans {rank, label, kind, microbatch, start, end} of one step, in the time of one forward. Ranks take turns to go on as
// far as they can: a transfer begins when its sender has computed and its receiver waits for nothing else, and takes `link`.
// With several stages a rank each takes so much less.
function simulate(setting) {
  const { p, m, schedule, backward, factor, heavy, link } = setting, each = stagesOf(setting), stages = p * each;
  const todo = Array.from({ length: p }, (_, rank) => order(schedule, p, m, rank));
  const place = todo.map(() => 0), now = todo.map(() => 0), sent = new Map(), spans = [];
  const costs = { F: 1, B: backward, I: backward / 2, W: backward / 2 };
  for (let moved = true; moved;) {
    moved = false;
    for (let rank = 0; rank < p; rank++) {
      for (; place[rank] < todo[rank].length; place[rank]++) {
        const [op, stage, microbatch] = todo[rank][place[rank]], way = op === "I" ? "B" : op, name = each > 1 ? `${stage}` : "";
        const source = op === "F" ? stage - 1 : op === "W" ? -1 : stage + 1;
        if (source >= 0 && source < stages) {
          const ready = sent.get(`${way}${microbatch} ${source}`);
          if (ready === undefined) break;
          const label = `${name}${op === "F" ? "rA" : "rG"}${microbatch}>`, end = Math.max(now[rank], ready + link);
          const middle = Math.min(Math.max(now[rank], ready), end);
          if (middle > now[rank]) spans.push({ rank, label, kind: "pipeline_wait", microbatch, start: now[rank], end: middle });
          if (end > middle) spans.push({ rank, label, kind: "communication", microbatch, start: middle, end });
          now[rank] = end;
        }
        const end = now[rank] + costs[op] / each * (rank === heavy ? factor : 1);
        spans.push({ rank, label: `${name}${op}${microbatch}`, kind: "compute", microbatch, start: now[rank], end });
        now[rank] = end;
        if (op !== "W") sent.set(`${way}${microbatch} ${stage}`, end);
        moved = true;
      }
    }
  }
  return spans;
}

// What a rank keeps for its backwards: [time, activations] at every change, and the most.
function live(spans, rank) {
  const steps = [[0, 0]];
  let count = 0, most = 0;
  for (const span of spans) {
    if (span.rank !== rank || span.kind !== "compute") continue;
    const op = opOf(span.label);
    if (op === "I") continue;  // kept until its W
    count += op === "F" ? 1 : -1;
    most = Math.max(most, count);
    steps.push([op === "F" ? span.start : span.end, count]);
  }
  return { steps, most };
}

function figures(spans, { p, m }) {
  const makespan = spans.reduce((most, s) => Math.max(most, s.end), 0);
  const busy = spans.reduce((sum, s) => sum + (s.kind === "pipeline_wait" ? 0 : s.end - s.start), 0);
  const peaks = Array.from({ length: p }, (_, rank) => live(spans, rank).most);
  return { makespan, bubble: 1 - busy / (p * makespan), theory: (p - 1) / (m + p - 1), peaks };
}

// A rank ends when it has nothing left to do; what is then missing to the end of the step is bubble as well.
function tails(spans, p, makespan) {
  const end = Array.from({ length: p }, () => 0);
  for (const s of spans) end[s.rank] = Math.max(end[s.rank], s.end);
  return end.flatMap((start, rank) => start < makespan
    ? [{ rank, label: "done", kind: "pipeline_wait", microbatch: -1, start, end: makespan }] : []);
}

function memory(spans, setting, makespan, box) {
  const { p } = setting, m = setting.m * stagesOf(setting);
  const row = 34, left = MARGIN, wide = Math.max(220, (box.clientWidth || 900) - left - 8), x = t => left + t / makespan * wide;
  const svg = make("svg", { role: "img", "aria-label": "Live activations of each stage over time", width: left + wide + 8, height: p * row + 6 });
  for (let rank = 0; rank < p; rank++) {
    const { steps, most } = live(spans, rank), base = (rank + 1) * row, y = n => base - n / m * (row - 8);
    let path = `M${x(0)} ${base}`;
    for (const [time, count] of steps) path += `H${x(time)}V${y(count)}`;
    svg.append(make("text", { x: left - 8, y: base - 6, class: "name" }, `rank ${rank}`),
      make("line", { x1: left, x2: left + wide, y1: y(m), y2: y(m), class: "grid" }),
      make("path", { d: `${path}H${x(makespan)}V${base}Z`, class: "live" }),
      make("text", { x: left + wide - 4, y: base - 10, class: "tick end", "data-peak": most }, `at most ${most} of ${m}`));
  }
  box.replaceChildren(svg);
}

function theatre(root) {
  const form = root.querySelector("form"), screen = root.querySelector(".screen"), store = root.querySelector(".memory");
  const inputs = Object.fromEntries([...form.elements].filter(e => e.name).map(e => [e.name, e]));
  const number = name => +inputs[name].value;
  const drawn = gantt(screen, { label: "The simulated pipeline", unit: "forwards", scale: 1 });
  const read = () => ({
    p: number("p"), m: number("m"), schedule: inputs.schedule.value, backward: number("backward"), factor: number("factor"),
    heavy: Math.min(number("heavy"), number("p") - 1), link: number("link"),
  });

  function write(hash) {
    for (const [name, value] of new URLSearchParams(hash.replace(/^#/, ""))) if (name in inputs) inputs[name].value = value;
  }

  function play() {
    inputs.heavy.max = number("p") - 1;
    const setting = read(), spans = simulate(setting), f = figures(spans, setting);
    for (const input of Object.values(inputs)) {
      const shown = input.parentNode.querySelector("output");
      if (shown) shown.textContent = input.value + (input.dataset.unit ?? "");
    }
    drawn.show([{ title: "", events: [...spans, ...tails(spans, setting.p, f.makespan)] }]);
    memory(spans, setting, f.makespan, store);
    const percent = share => `${(100 * share).toFixed(1)}%`;
    const shown = {
      makespan: `${figure(f.makespan)} forwards`, bubble: percent(f.bubble), theory: percent(f.theory),
      peak: `${Math.max(...f.peaks)} of ${setting.m * stagesOf(setting)}`,
    };
    for (const [name, text] of Object.entries(shown)) root.querySelector(`[data-figure=${name}]`).textContent = text;
  }

  form.hidden = false;
  root.classList.add("live");
  form.oninput = play;
  form.onsubmit = e => e.preventDefault();
  form.onreset = () => setTimeout(play);
  // A page of its own is set by its address: theatre.html#p=8&m=16&schedule=gpipe
  if (root.dataset.address) {
    addEventListener("hashchange", () => { write(location.hash); play(); });
    form.addEventListener("change", () => history.replaceState(null, "", `#${new URLSearchParams(new FormData(form))}`));
    write(location.hash);
  }
  let before = 0;
  new ResizeObserver(() => {
    if (Math.abs(store.clientWidth - before) > 1) play();
    before = store.clientWidth;
  }).observe(store);
  play();
}

document.querySelectorAll(".theatre").forEach(theatre);
