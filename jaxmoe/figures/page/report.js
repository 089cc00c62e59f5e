"use strict";
// Draws the figures that the page carries as JSON. No library and no network: the page must work from a disk.
const tip = document.getElementById("tip");
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const el = (tag, attributes = {}, parent = null, text = null) => {
  const svg = ["svg", "path", "line", "rect", "text", "g", "circle"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
};
function show(event, text) {
  tip.textContent = text;
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.min(event.clientX + 14, innerWidth - box.width - 8) + "px";
  tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18) + "px";
}
const hide = () => { tip.style.display = "none"; };
const number = x => x === null || Number.isNaN(x) ? "none" : Math.abs(x) >= 1e-3 && Math.abs(x) < 1e5 || x === 0 ? String(+x.toPrecision(4)) : x.toExponential(2);

// The inverse of `pack` in figure.py.
function unpack(packed) {
  if (packed === null || packed === undefined) return null;
  const bytes = Uint8Array.from(atob(packed.data), c => c.charCodeAt(0));
  const steps = new DataView(bytes.buffer);
  const values = new Float64Array(bytes.length / 2);
  for (let i = 0; i < values.length; i++) {
    const step = steps.getUint16(2 * i, true);
    values[i] = step === 65535 ? NaN : packed.low + step * packed.step;
  }
  return { values, shape: packed.shape };
}
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (Number.isFinite(v)) { low = Math.min(low, v); high = Math.max(high, v); }
  return low <= high ? [low, high] : [0, 1];
}

// Nine anchors of viridis, and a diverging scale through the paper's own colour.
const VIRIDIS = [[68,1,84],[71,44,122],[59,81,139],[44,113,142],[33,144,141],[39,173,129],[92,200,99],[170,220,50],[253,231,37]];
const mix = (a, b, t) => a.map((x, i) => Math.round(x + (b[i] - x) * t));
const viridis = t => { const at = Math.min(Math.max(t, 0), 1) * 8, i = Math.min(Math.floor(at), 7); return mix(VIRIDIS[i], VIRIDIS[i + 1], at - i); };
const rgb = text => { const c = document.createElement("canvas").getContext("2d"); c.fillStyle = text; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3); };
const diverging = middle => t => t < 0 ? mix(middle, [33, 102, 172], Math.min(-t, 1)) : mix(middle, [178, 24, 43], Math.min(t, 1));

function pager(parent, names, draw, first = Math.floor(names.length / 2)) {
  const place = el("div");
  if (names.length > 1) {
    const bar = el("div", { class: "pages" }, parent);
    const slider = el("input", { type: "range", min: 0, max: names.length - 1, value: first, "aria-label": "page" }, bar);
    const label = el("output", {}, bar);
    const go = () => { label.textContent = names[+slider.value]; place.replaceChildren(); draw(place, +slider.value); };
    slider.addEventListener("input", go);
    parent.append(place);
    go();
  } else {
    parent.append(place);
    draw(place, 0);
  }
}

function heatmap(parent, figure) {
  const column = k => figure.column_names ? figure.column_names[k] : k;
  const data = unpack(figure.values), [, rows, columns] = data.shape;
  let [low, high] = extent(data.values);
  const middle = figure.center, reach = middle === null ? 0 : Math.max(middle - low, high - middle) || 1;
  const scale = middle === null ? v => viridis((v - low) / (high - low || 1)) : (d => v => d((v - middle) / reach))(diverging(rgb(color("--paper"))));
  pager(parent, figure.page_names, (place, page) => {
    const left = 46, top = 4, bottom = 38, right = 92, width = Math.max(480, Math.min(parent.clientWidth - 4, 1180));
    const cell = Math.max((width - left - right) / columns, 1), tall = Math.max(Math.min(rows > columns / 2 ? cell : Math.max(cell, 11), 26), 3);
    const height = top + tall * rows + bottom, ratio = devicePixelRatio || 1;
    const canvas = el("canvas", { width: width * ratio, height: height * ratio, style: `width:${width}px;height:${height}px`, role: "img", "aria-label": figure.title }, place);
    const c = canvas.getContext("2d");
    c.scale(ratio, ratio);
    for (let r = 0; r < rows; r++) for (let k = 0; k < columns; k++) {
      const v = data.values[(page * rows + r) * columns + k];
      c.fillStyle = Number.isNaN(v) ? color("--panel") : `rgb(${scale(v)})`;
      c.fillRect(left + k * cell, top + r * tall, Math.ceil(cell * ratio) / ratio, Math.ceil(tall * ratio) / ratio);
    }
    c.fillStyle = color("--soft");
    c.font = "12px system-ui, sans-serif";
    c.textAlign = "right"; c.textBaseline = "middle";
    const rowStep = Math.ceil(14 / tall), columnStep = [1, 2, 4, 8, 16, 32, 64].find(s => s * cell >= 24) || 64;
    for (let r = 0; r < rows; r += rowStep) c.fillText(figure.row_names[r], left - 6, top + (r + .5) * tall);
    c.textAlign = "center";
    for (let k = 0; k < columns; k += columnStep) c.fillText(column(k), left + (k + .5) * cell, top + rows * tall + 11);
    c.fillText(figure.column_label, left + columns * cell / 2, top + rows * tall + 28);
    c.save(); c.translate(9, top + rows * tall / 2); c.rotate(-Math.PI / 2); c.fillText(figure.row_label, 0, 0); c.restore();
    const x = width - right + 14, long = Math.min(rows * tall, 180);
    for (let i = 0; i < long; i++) { c.fillStyle = `rgb(${scale(high - (high - low) * i / long)})`; c.fillRect(x, top + i, 12, 1.5); }
    c.fillStyle = color("--soft"); c.textAlign = "left";
    c.fillText(number(high), x + 17, top + 6);
    if (long > 30) c.fillText(number(low), x + 17, top + long - 6);
    canvas.addEventListener("mousemove", event => {
      const box = canvas.getBoundingClientRect(), zoom = width / box.width;
      const k = Math.floor(((event.clientX - box.left) * zoom - left) / cell), r = Math.floor(((event.clientY - box.top) * zoom - top) / tall);
      if (k < 0 || r < 0 || k >= columns || r >= rows) return hide();
      const names = figure.row_label.split(" ")[0] === "layer" ? `layer ${figure.row_names[r]}, ${figure.column_label} ${column(k)}` : `${figure.row_label} ${figure.row_names[r]}, ${figure.column_label} ${column(k)}`;
      show(event, `${figure.page_names[page] ? figure.page_names[page] + "\n" : ""}${names}\n${figure.unit}: ${number(data.values[(page * rows + r) * columns + k])}`);
    });
    canvas.addEventListener("mouseleave", hide);
  });
}

function ticks(low, high, log) {
  if (log) { const out = []; for (let e = Math.ceil(Math.log10(low) - 1e-9); e <= Math.log10(high) + 1e-9; e++) out.push(10 ** e); return out; }
  const raw = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find(s => s * power >= raw) * power;
  const out = []; for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) out.push(Math.abs(v) < step * 1e-6 ? 0 : v);
  return out;
}
function frame(place, xs, ys, options) {
  const width = Math.max(420, Math.min(place.clientWidth - 4, 1000)), height = 330, right = 14, top = 10, bottom = 42;
  // The axis' name stands left of its longest number, of seven pixels a character.
  const left = Math.max(62, 30 + 7 * Math.max(...ticks(...ys, options.log_y).map(t => number(t).length)));
  const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": options.title }, place);
  const fit = ([a, b], log) => log ? [Math.log10(a), Math.log10(b)] : [a, b];
  const [x0, x1] = fit(xs, options.log_x), [y0, y1] = fit(ys, options.log_y);
  const x = v => left + ((options.log_x ? Math.log10(v) : v) - x0) / (x1 - x0 || 1) * (width - left - right);
  const y = v => height - bottom - ((options.log_y ? Math.log10(v) : v) - y0) / (y1 - y0 || 1) * (height - top - bottom);
  for (const t of ticks(...ys, options.log_y)) {
    el("line", { class: "axis", x1: left, x2: width - right, y1: y(t), y2: y(t) }, svg);
    el("text", { x: left - 7, y: y(t) + 4, "text-anchor": "end" }, svg, number(t));
  }
  if (options.x_ticks !== false) for (const t of ticks(...xs, options.log_x)) el("text", { x: x(t), y: height - bottom + 17, "text-anchor": "middle" }, svg, number(t));
  el("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, svg, options.x_label);
  el("text", { transform: `translate(13 ${(height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, svg, options.y_label);
  return { svg, x, y, width, height, left, right, top, bottom };
}
// The dark end of the scale is invisible on dark paper, the light one on light paper.
const shade = (i, n) => { const from = rgb(color("--paper"))[0] < 128 ? .3 : .05; return `rgb(${viridis(n > 1 ? from + .9 * (1 - from) * i / (n - 1) : .5)})`; };

function lines(parent, figure) {
  const xs = unpack(figure.x).values, series = figure.series.map(s => ({ ...s, y: unpack(s.y).values, low: s.low && unpack(s.low).values, high: s.high && unpack(s.high).values }));
  const all = series.flatMap(s => [...s.y, ...(s.low || []), ...(s.high || [])]);
  let [low, high] = extent(figure.log_y ? all.filter(v => v > 0) : all);
  if (!figure.log_y) {
    if (figure.from_zero) low = Math.min(low, 0);
    const room = (high - low) * .04;
    if (!figure.from_zero) low -= room;
    high = high === low ? low + 1 : high + room;
  }
  const f = frame(parent, extent(xs), [low, high], figure);
  const solid = series.filter(s => !s.dashed).length;
  let at = 0;
  const paint = s => s.dashed ? color("--soft") : figure.ordered ? shade(at++, solid) : color(`--s${at++ % 8}`);
  const path = (ys, back = false, bridged = false) => {
    let out = "", pen = false;
    const order = back ? [...xs.keys()].reverse() : [...xs.keys()];
    for (const i of order) { if (!Number.isFinite(ys[i])) { if (!bridged) pen = back; continue; } out += `${pen ? "L" : "M"}${f.x(xs[i]).toFixed(1)} ${f.y(ys[i]).toFixed(1)}`; pen = true; }
    return out;
  };
  const legend = el("div", { class: "legend" });
  const painted = series.map(s => ({ ...s, color: paint(s) }));
  const shown = painted.filter(s => !s.dashed);
  for (const s of painted) {
    if (s.low && s.high) el("path", { d: path(s.low) + path(s.high, true).replace("M", "L") + "Z", fill: s.color, opacity: .16 }, f.svg);
    el("path", { d: path(s.y, false, s.bridged), fill: "none", stroke: s.color, "stroke-width": 1.8, "stroke-dasharray": s.dashed ? "5 4" : "none" }, f.svg);
    const there = s.bridged ? [...xs.keys()].filter(i => Number.isFinite(s.y[i])) : [];
    if (there.length < 40) for (const i of there) el("circle", { r: 2.5, cx: f.x(xs[i]), cy: f.y(s.y[i]), fill: s.color }, f.svg);
    if (series.length <= 14 || s.dashed || s === shown[0] || s === shown[shown.length - 1]) {
      const item = el("span", {}, legend);
      el("i", { style: `border-color:${s.color};border-top-style:${s.dashed ? "dashed" : "solid"}` }, item);
      item.append(s.name + (series.length > 14 && s === shown[0] ? " to" : ""));
    }
  }
  if (series.length > 1) parent.append(legend);
  const dot = el("circle", { r: 4, fill: color("--ink"), visibility: "hidden" }, f.svg);
  f.svg.addEventListener("mousemove", event => {
    const box = f.svg.getBoundingClientRect(), px = (event.clientX - box.left) * f.width / box.width, py = (event.clientY - box.top) * f.height / box.height;
    let best = null;
    for (const s of painted) for (let i = 0; i < xs.length; i++) {
      if (!Number.isFinite(s.y[i])) continue;
      const d = (f.x(xs[i]) - px) ** 2 + (f.y(s.y[i]) - py) ** 2;
      if (best === null || d < best.d) best = { d, s, i };
    }
    if (!best) return;
    dot.setAttribute("cx", f.x(xs[best.i])); dot.setAttribute("cy", f.y(best.s.y[best.i])); dot.setAttribute("visibility", "visible");
    const band = best.s.low ? `  [${number(best.s.low[best.i])}, ${number(best.s.high[best.i])}]` : "";
    show(event, `${best.s.name}\n${figure.x_label} ${number(xs[best.i])}: ${number(best.s.y[best.i])}${band}`);
  });
  f.svg.addEventListener("mouseleave", () => { hide(); dot.setAttribute("visibility", "hidden"); });
}

function bars(parent, figure) {
  const data = unpack(figure.values), [, groups, categories] = data.shape, [, high] = extent(data.values);
  pager(parent, figure.page_names, (place, page) => {
    const f = frame(parent.clientWidth ? Object.assign(place, {}) : parent, [-.5, categories - .5], [0, Math.max(high, figure.baseline) * 1.04], { title: figure.title, x_label: figure.category_label, y_label: figure.y_label, x_ticks: false });
    const slot = f.x(1) - f.x(0), wide = slot * .84 / groups, step = [1, 2, 4, 8, 16, 32].find(s => s * slot >= 22) || 32;
    for (let k = 0; k < categories; k++) {
      if (k % step === 0) el("text", { x: f.x(k), y: f.height - f.bottom + 17, "text-anchor": "middle" }, f.svg, k);
      for (let g = 0; g < groups; g++) {
        const v = data.values[(page * groups + g) * categories + k];
        const bar = el("rect", { x: f.x(k) - slot * .42 + g * wide, y: f.y(v), width: Math.max(wide - .3, .5), height: Math.max(f.y(0) - f.y(v), 0), fill: color(`--s${g % 8}`) }, f.svg);
        bar.addEventListener("mousemove", event => show(event, `${figure.page_names[page]}, ${figure.category_label} ${k}\n${figure.groups[g]}: ${number(v)}\n${figure.baseline_name}`));
        bar.addEventListener("mouseleave", hide);
      }
    }
    el("line", { x1: f.left, x2: f.width - f.right, y1: f.y(figure.baseline), y2: f.y(figure.baseline), stroke: color("--ink"), "stroke-dasharray": "5 4" }, f.svg);
    const legend = el("div", { class: "legend" }, place);
    figure.groups.forEach((name, g) => { const item = el("span", {}, legend); el("i", { style: `border-color:${color(`--s${g % 8}`)}` }, item); item.append(name); });
    const item = el("span", {}, legend); el("i", { style: "border-top-style:dashed" }, item); item.append(figure.baseline_name);
  });
}

function passage(parent, figure) {
  const experts = unpack(figure.experts), weights = unpack(figure.weights), margins = unpack(figure.margins), losses = unpack(figure.losses);
  const [, n, k] = experts.shape;
  pager(parent, figure.page_names, (place, page) => {
    const box = el("div", { class: "passage" }, place);
    for (let i = 0; i < n; i++) {
      if (i === 0 || figure.domains[i] !== figure.domains[i - 1]) el("h3", {}, box, figure.domains[i]);
      const at = (page * n + i) * k, first = experts.values[at];
      const span = el("span", { style: `background:hsl(${(first * 222.49) % 360} 75% 55% / .38)` }, box, figure.pieces[i]);
      span.addEventListener("mousemove", event => {
        const list = Array.from({ length: k }, (_, j) => `${experts.values[at + j]} (${number(+weights.values[at + j].toFixed(3))})`).join(", ");
        show(event, `${JSON.stringify(figure.pieces[i])}, ${figure.page_names[page]}\nexperts (weight): ${list}\nmargin ${number(margins.values[page * n + i])}${losses ? `\nloss of the next token ${number(losses.values[i])}` : ""}`);
      });
      span.addEventListener("mouseleave", hide);
    }
  });
}

function highlighted(parent, figure) {
  pager(parent, figure.page_names, (place, page) => {
    const box = el("div", { class: "passage" }, place);
    figure.pieces[page].forEach((piece, i) => el("span", { class: figure.kinds[page][i] }, box, piece));
  }, 0);
}

function samples(parent, figure) {
  pager(parent, figure.page_names, (place, page) => {
    const box = el("div", { class: "samples" }, place);
    figure.prompts[page].forEach((prompt, i) => {
      const text = el("p", {}, box);
      el("b", {}, text, prompt);
      text.append(figure.texts[page][i]);
    });
  }, figure.page_names.length - 1);
}

function table(parent, figure) {
  const box = el("div", { class: "scroll" }, parent), node = el("table", {}, box), head = el("tr", {}, el("thead", {}, node)), body = el("tbody", {}, node);
  for (const name of figure.header) el("th", {}, head, name);
  for (const row of figure.body) {
    const line = el("tr", {}, body);
    for (const cell of row) el("td", typeof cell === "number" ? { class: "number" } : {}, line, typeof cell === "number" ? number(cell) : cell ?? "");
  }
}

const KINDS = { heatmap, lines, bars, passage, highlighted, samples, table };
const figures = JSON.parse(document.getElementById("figures").textContent);
function draw() {
  const main = document.querySelector("main"), nav = document.querySelector("nav");
  main.replaceChildren(); nav.replaceChildren();
  for (const figure of figures) {
    const section = el("section", { id: figure.key }, main);
    el("h2", {}, section, figure.title);
    el("p", {}, section, figure.caption);
    KINDS[figure.kind](section, figure);
    el("a", { href: `#${figure.key}` }, nav, figure.title);
  }
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
let waiting;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 150); });
