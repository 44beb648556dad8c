// The bubble theatre: a pipeline's program, its simulation and its picture, as the sliders say.
// order() is program/schedules.py and simulate() is program/simulate.py, in so far as a plan with dp=1 needs them.
"use strict";

// In which order a stage computes its microbatches.
function order(schedule, p, m, stage) {
  const all = op => Array.from({ length: m }, (_, i) => [op, i]);
  if (p === 1 || m === 1 || schedule === "layerwise") return all("F").flatMap(([, i]) => [["F", i], ["B", i]]);
  if (schedule === "gpipe") return [...all("F"), ...all("B")];
  const warmup = Math.min(p - 1 - stage, m);
  const steady = all("F").slice(warmup).flatMap(([, i]) => [["F", i], ["B", i - warmup]]);
  return [...all("F").slice(0, warmup), ...steady, ...all("B").slice(m - warmup)];
}

// Spans {rank, label, kind, microbatch, start, end} of one step, in the time of one forward. Ranks take turns to go on as
// far as they can: a transfer begins when its sender has computed and its receiver waits for nothing else, and takes `link`.
function simulate({ p, m, schedule, backward, factor, heavy, link }) {
  const todo = Array.from({ length: p }, (_, stage) => order(schedule, p, m, stage));
  const place = todo.map(() => 0), now = todo.map(() => 0), sent = new Map(), spans = [];
  for (let moved = true; moved;) {
    moved = false;
    for (let rank = 0; rank < p; rank++) {
      for (; place[rank] < todo[rank].length; place[rank]++) {
        const [op, microbatch] = todo[rank][place[rank]], source = op === "F" ? rank - 1 : rank + 1;
        if (source >= 0 && source < p) {
          const ready = sent.get(`${op}${microbatch} ${source}`);
          if (ready === undefined) break;
          const label = `${op === "F" ? "rA" : "rG"}${microbatch}>`, end = Math.max(now[rank], ready + link);
          const middle = Math.min(Math.max(now[rank], ready), end);
          if (middle > now[rank]) spans.push({ rank, label, kind: "pipeline_wait", microbatch, start: now[rank], end: middle });
          if (end > middle) spans.push({ rank, label, kind: "communication", microbatch, start: middle, end });
          now[rank] = end;
        }
        const end = now[rank] + (op === "F" ? 1 : backward) * (rank === heavy ? factor : 1);
        spans.push({ rank, label: `${op}${microbatch}`, kind: "compute", microbatch, start: now[rank], end });
        now[rank] = end;
        sent.set(`${op}${microbatch} ${rank}`, end);
        moved = true;
      }
    }
  }
  return spans;
}

// What a stage keeps for its backwards: [time, microbatches] at every change, and the most.
function live(spans, rank) {
  const steps = [[0, 0]];
  let count = 0, most = 0;
  for (const span of spans) {
    if (span.rank !== rank || span.kind !== "compute") continue;
    count += span.label[0] === "F" ? 1 : -1;
    most = Math.max(most, count);
    steps.push([span.label[0] === "F" ? span.start : span.end, count]);
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

function memory(spans, { p, m }, makespan, box) {
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
      peak: `${Math.max(...f.peaks)} of ${setting.m}`,
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
