// Ranks over time as SVG that can be zoomed: the timelines of the report and of the theatre.
"use strict";

const PHASES = {
  data: "data", forward: "forward", backward: "backward", compute: "other compute", communication: "communication",
  optimizer: "optimizer", pipeline_wait: "waiting for a stage", straggler_wait: "waiting for a replica", overhead: "other",
};
const DEEP = ["compute", "backward", "data"]; // need white text
const MOST_RANKS = 64;
const MARGIN = 58, ROW = 26, HEAD = 22, FOOT = 36;

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "text", "line", "path", "title", "defs", "pattern"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function phase(event) {
  if (event.kind === "compute") return { F: "forward", B: "backward", I: "backward", W: "backward" }[event.label.match(/[A-Z]/)?.[0]] || "compute";
  return event.kind in PHASES ? event.kind : "overhead";
}

// Three digits of a length that is a part of `whole`.
function figure(value, whole = value) {
  const digits = Math.max(0, Math.min(6, 2 - Math.floor(Math.log10(Math.abs(whole) || 1))));
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function ticks(from, to, most) {
  const rough = (to - from) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
  const first = Math.ceil(from / step - 1e-9);
  return Array.from({ length: Math.max(0, Math.floor(to / step + 1e-9) - first + 1) }, (_, i) => (first + i) * step);
}

// An instrument in `box`; show(panels) draws [{title, events, ends}], times in `unit` after multiplication by `scale`.
function gantt(box, { label, unit, scale, row = "rank" }) {
  let panels = [], whole = 1, view = [0, 1], places = [], chosen = -1;
  const tell = make("p", { class: "detail", "aria-live": "polite" });
  const plot = make("div", { class: "plot", tabindex: "0", role: "group", "aria-label":
    `${label}. Plus and minus zoom, left and right arrows move, 0 shows all, full stop and comma go through the instructions.` });
  const tools = make("div", { class: "tools", role: "toolbar", "aria-label": "Zoom" });
  const button = (text, name, action) => {
    const node = make("button", { type: "button", "aria-label": name, title: name }, text);
    node.onclick = action;
    tools.append(node);
  };
  button("+", "zoom in", () => zoom(0.5));
  button("−", "zoom out", () => zoom(2));
  button("‹", "earlier", () => move(-0.25));
  button("›", "later", () => move(0.25));
  button("all", "show the whole step", () => look(0, whole));
  const state = make("span", { class: "view" });
  tools.append(state);
  box.append(tools, plot, tell);
  const hint = () => `Point at, tap or step through (. and ,) the bars; drag, pinch, Ctrl + wheel or + and − to zoom.`;

  function look(from, to) {
    const length = Math.min(whole, Math.max(to - from, whole / 1000));
    const start = Math.min(Math.max(0, from), whole - length);
    view = [start, start + length];
    draw();
  }
  const zoom = (factor, at = (view[0] + view[1]) / 2) => look(at - (at - view[0]) * factor, at + (view[1] - at) * factor);
  const move = share => look(view[0] + share * (view[1] - view[0]), view[1] + share * (view[1] - view[0]));
  const width = () => Math.max(220, (plot.clientWidth || 900) - MARGIN - 8);
  const time = x => view[0] + (x - plot.getBoundingClientRect().left - MARGIN) / width() * (view[1] - view[0]);

  function choose(index) {
    chosen = index;
    for (const old of plot.querySelectorAll(".chosen")) old.classList.remove("chosen");
    const place = places[index];
    if (!place) return void (tell.textContent = hint());
    const { event, title } = place, long = (event.end - event.start) * scale;
    plot.querySelector(`[data-at="${index}"]`)?.classList.add("chosen");
    tell.textContent = [
      `${title ? title + ", " : ""}${row} ${event.rank}: ${event.label}`, PHASES[phase(event)],
      event.microbatch >= 0 ? `microbatch ${event.microbatch}` : "",
      `${figure(long)} ${unit}, from ${figure(event.start * scale, whole * scale)} to ${figure(event.end * scale, whole * scale)}`,
    ].filter(Boolean).join(" · ");
  }

  function step(by) {
    if (!places.length) return;
    const next = Math.min(places.length - 1, Math.max(0, chosen + by)), { event } = places[next];
    if (event.start < view[0] || event.end > view[1]) {
      const half = (view[1] - view[0]) / 2;
      look((event.start + event.end) / 2 - half, (event.start + event.end) / 2 + half);
    }
    choose(next);
  }

  function draw() {
    const wide = width(), x = t => MARGIN + (t - view[0]) / (view[1] - view[0]) * wide;
    const id = `h${gantt.count = (gantt.count || 0) + 1}`;
    const svg = make("svg", { role: "img", "aria-label": label }, hatches(id));
    let y = 0, index = 0;
    for (const panel of panels) {
      const ranks = panel.ranks.slice(0, MOST_RANKS), base = y + (panel.title ? HEAD : 4);
      const bottom = base + ranks.length * ROW;
      if (panel.title) svg.append(make("text", { x: MARGIN, y: y + 14, class: "heading" }, panel.title));
      for (const t of ticks(view[0] * scale, view[1] * scale, wide / 90)) {
        svg.append(make("line", { x1: x(t / scale), x2: x(t / scale), y1: base, y2: bottom, class: "grid" }));
        if (panel === panels.at(-1)) {
          svg.append(make("text", { x: x(t / scale), y: bottom + 14, class: "tick" }, `${+t.toPrecision(6)}`));
        }
      }
      const bars = make("svg", { x: MARGIN, y: base, width: wide, height: ranks.length * ROW });
      ranks.forEach((rank, i) => {
        svg.append(make("text", { x: MARGIN - 8, y: base + i * ROW + 16, class: "name" }, `${row} ${rank}`));
        bars.append(make("rect", { x: x(0) - MARGIN, y: i * ROW + 2, width: x(panel.end) - x(0), height: ROW - 4, class: "k-band" }));
      });
      for (const event of panel.events) {
        const at = index++, line = panel.line.get(event.rank);
        if (line >= ranks.length || event.end < view[0] || event.start > view[1]) continue;
        bars.append(...bar(event, at, x(event.start) - MARGIN, x(event.end) - MARGIN, line * ROW, id));
      }
      svg.append(bars);
      y = bottom;
    }
    svg.append(make("text", { x: MARGIN + wide, y: y + 31, class: "tick end" }, `${unit} since the start of the step`));
    svg.setAttribute("width", MARGIN + wide + 8);
    svg.setAttribute("height", y + FOOT);
    plot.replaceChildren(svg);
    const zoomed = view[1] - view[0] < whole * 0.999;
    plot.classList.toggle("zoomed", zoomed);
    state.textContent = zoomed
      ? `${figure(view[0] * scale, whole * scale)} to ${figure(view[1] * scale, whole * scale)} of ${figure(whole * scale)} ${unit}`
      : `all ${figure(whole * scale)} ${unit}`;
    choose(chosen);
  }

  function bar(event, at, left, right, top, id) {
    const role = phase(event), waits = role.endsWith("_wait"), width = Math.max(right - left, 0.4);
    const fill = waits ? `url(#${id}-${role})` : `var(--${role})`;
    const rect = make("rect", { x: left, y: top + 2, width, height: ROW - 4, style: `fill: ${fill}`, "data-at": at, class: `bar ${role}` });
    const room = (Math.min(right, 1e5) - left) / 7 - 0.5;
    const text = waits ? "" : [event.label, event.microbatch >= 0 ? `${event.microbatch}` : ""].find(t => t && t.length <= room);
    if (!text) return [rect];
    return [rect, make("text", { x: (left + right) / 2, y: top + 17, class: DEEP.includes(role) ? "on deep" : "on" }, text)];
  }

  const fingers = new Map();
  let held = null;
  plot.onpointerdown = e => {
    fingers.set(e.pointerId, e.clientX);
    held = { at: time(e.clientX), x: e.clientX, view: [...view], spread: spread() };
    if (e.target.dataset.at) choose(+e.target.dataset.at);
  };
  const spread = () => fingers.size > 1 ? Math.abs([...fingers.values()][0] - [...fingers.values()][1]) : 0;
  plot.onpointermove = e => {
    if (!fingers.has(e.pointerId)) {
      if (e.target.dataset.at) choose(+e.target.dataset.at);
      return;
    }
    fingers.set(e.pointerId, e.clientX);
    const span = held.view[1] - held.view[0];
    if (held.spread && spread()) {
      const factor = held.spread / Math.max(8, spread());
      look(held.at - (held.at - held.view[0]) * factor, held.at + (held.view[1] - held.at) * factor);
    } else if (Math.abs(e.clientX - held.x) > 3 && span < whole) {
      plot.setPointerCapture(e.pointerId);
      look(held.view[0] - (e.clientX - held.x) / width() * span, held.view[1] - (e.clientX - held.x) / width() * span);
    }
  };
  plot.onpointerup = plot.onpointercancel = plot.onpointerleave = e => fingers.delete(e.pointerId);
  plot.ondblclick = e => zoom(0.5, time(e.clientX));
  plot.addEventListener("wheel", e => {
    if (e.ctrlKey || e.metaKey) zoom(Math.exp(e.deltaY / 300), time(e.clientX));
    else if (Math.abs(e.deltaX) > Math.abs(e.deltaY) && view[1] - view[0] < whole) move(e.deltaX / width());
    else return;
    e.preventDefault();
  }, { passive: false });
  plot.onkeydown = e => {
    const action = {
      "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), "0": () => look(0, whole), Home: () => look(0, whole),
      ArrowLeft: () => move(-0.25), ArrowRight: () => move(0.25), ".": () => step(1), ",": () => step(-1),
    }[e.key];
    if (!action || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    action();
  };
  let before = 0;
  new ResizeObserver(() => {
    if (Math.abs(plot.clientWidth - before) > 1) draw();
    before = plot.clientWidth;
  }).observe(plot);

  return {
    show(given) {
      panels = given.filter(p => p.events.length).map(p => {
        const ranks = [...new Set(p.events.map(e => e.rank))].sort((a, b) => a - b);
        const end = p.events.reduce((most, e) => Math.max(most, e.end), 0);
        return { ...p, ranks, end, line: new Map(ranks.map((r, i) => [r, i])) };
      });
      places = panels.flatMap(p => p.events.map(event => ({ event, title: p.title })));
      whole = panels.reduce((most, p) => Math.max(most, p.end), 0) || 1;
      chosen = -1;
      look(0, whole);
    },
  };
}

function hatches(id) {
  const lines = [["pipeline_wait", 45], ["straggler_wait", -45]].map(([role, angle]) => make("pattern",
    { id: `${id}-${role}`, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: `rotate(${angle})` },
    make("rect", { width: 5, height: 5, style: "fill: var(--band)" }),
    make("line", { y2: 5, style: "stroke: var(--soft)", "stroke-width": 1.6 })));
  return make("defs", {}, ...lines);
}

function legend(events) {
  const used = new Set(events.map(phase));
  const entries = Object.entries(PHASES).filter(([role]) => used.has(role));
  return make("ul", { class: "legend" }, ...entries.map(([role, words]) => make("li", {}, make("i", { class: `k-${role}` }), words)));
}
