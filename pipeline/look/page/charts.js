// Small drawings in SVG: histograms, curves, dots. Each takes plain values and returns an element.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; texts become text nodes, never markup. */
function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Round values for an axis, about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = size * [1, 2, 5, 10].find((factor) => factor * size >= raw);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
  }
  const inside = found.filter((value) => value >= low && value <= high);
  return inside.length > 1 ? inside : ticks(low, high, 5);
}

/** A number with three digits, thousands as k and M. */
function short(value) {
  const size = Math.abs(value);
  if (size >= 999.5e6) return `${+(value / 1e9).toPrecision(3)}G`;
  if (size >= 999.5e3) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 9999.5) return `${+(value / 1e3).toPrecision(3)}k`;
  return String(+value.toPrecision(3));
}

function frame(width, height, label) {
  return draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
}

/** Counts between edges. */
function histogram({ name, unit, edges, counts, mean, median, note }) {
  const [width, height, foot] = [300, 132, 20];
  const words = `mean ${short(mean)}, median ${short(median)}${unit ? ` ${unit}` : ""}`;
  const svg = frame(width, height, `${name}: ${words}`);
  const most = Math.max(...counts, 1);
  const reach = edges[edges.length - 1] - edges[0];
  const x = (value) => ((value - edges[0]) / reach) * width;
  counts.forEach((count, number) => {
    const tall = (count / most) * (height - foot - 8);
    const left = x(edges[number]);
    svg.append(draw("rect", {
      class: "column", x: left + 0.75, y: height - foot - tall, rx: 1,
      width: Math.max(1, x(edges[number + 1]) - left - 1.5), height: tall,
    }, draw("title", {}, `${short(edges[number])} to ${short(edges[number + 1])}: ${count}`)));
  });
  svg.append(draw("line", { class: "axis", x1: 0, x2: width, y1: height - foot, y2: height - foot }));
  if (counts.length === 1) {
    svg.append(draw("text", { x: width / 2, y: height - 5, "text-anchor": "middle" }, short(edges[0])));
  }
  for (const value of counts.length === 1 ? [] : ticks(edges[0], edges[edges.length - 1], 6)) {
    const anchor = x(value) < 12 ? "start" : x(value) > width - 12 ? "end" : "middle";
    svg.append(draw("text", { x: x(value), y: height - 5, "text-anchor": anchor }, short(value)));
  }
  return make("figure", {}, make("figcaption", {}, make("h3", {}, name),
    make("p", { class: "note" }, words + (note ? ` (${note})` : ""))), svg);
}

/** Curves of one loss term: `curves` is [{name, colour, points: [[step, value]]}]. */
function lines(title, curves) {
  const [width, height, left, foot, head] = [340, 190, 40, 22, 8];
  const values = curves.flatMap((curve) => curve.points.map((point) => point[1]));
  const steps = curves.flatMap((curve) => curve.points.map((point) => point[0]));
  const [low, high, last] = [Math.min(...values), Math.max(...values), Math.max(...steps)];
  const isLog = low > 0 && high / low > 4;
  const scale = isLog ? Math.log : (value) => value;
  const span = scale(high) - scale(low) || 1;
  const x = (step) => left + (step / last) * (width - left - 4);
  const y = (value) => head + (1 - (scale(value) - scale(low)) / span) * (height - head - foot);
  const ends = curves.map((curve) => `${curve.name} ends at ${short(curve.points.at(-1)[1])}`);
  const svg = frame(width, height, `${title}: ${ends.join(", ")}`);
  for (const value of isLog ? logTicks(low, high) : ticks(low, high, 5)) {
    svg.append(draw("line", { class: "axis", x1: left, x2: width, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const step of ticks(0, last, 4)) {
    const anchor = step > 0.95 * last ? "end" : "middle";
    svg.append(draw("text", { x: x(step), y: height - 5, "text-anchor": anchor }, short(step)));
  }
  for (const { colour, name, points } of curves) {
    const path = points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`);
    svg.append(draw("polyline", { class: `line ${colour}`, points: path.join(" ") },
      draw("title", {}, name)));
  }
  return make("figure", {}, make("figcaption", {}, make("h3", {}, title)), svg);
}

/** Models that no other one beats in both latency and loss, the fastest first. */
function front(models) {
  const sorted = [...models].sort((a, b) => a.latency_ms - b.latency_ms || a.mlm_nll - b.mlm_nll);
  let best = Infinity;
  return sorted.filter((model) => {
    const better = model.mlm_nll < best;
    if (better) best = model.mlm_nll;
    return better;
  });
}

/** A dot per model: loss against latency, area by parameters; `width` in pixels. */
function scatter(models, width) {
  const [height, left, foot, head] = [Math.min(400, width), 52, 46, 24];
  const pick = (name) => models.map((model) => model[name]);
  const slow = Math.max(...pick("latency_ms")) * 1.15;
  const [low, high] = [Math.min(...pick("mlm_nll")), Math.max(...pick("mlm_nll"))];
  const pad = (high - low || high * 0.05 || 1) * 0.18;
  const x = (value) => left + (value / slow) * (width - left - 40);
  const y = (value) => head + ((high + pad - value) / (high - low + 2 * pad)) * (height - head - foot);
  const names = models.map((m) => `${m.name}: ${short(m.latency_ms)} ms, loss ${short(m.mlm_nll)}`);
  const svg = frame(width, height, `Loss against latency. ${names.join("; ")}`);
  for (const value of ticks(low - pad, high + pad, 5)) {
    svg.append(draw("line", { class: "axis", x1: left, x2: width, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(0, slow, Math.min(6, width / 80))) {
    svg.append(draw("text", { x: x(value), y: height - foot + 18, "text-anchor": "middle" }, short(value)));
  }
  svg.append(draw("text", { x: left, y: height - 6 }, "latency of one sequence, ms (left is faster)"));
  svg.append(draw("text", { x: left, y: 12 }, "held-out loss, nats (lower is better)"));
  const best = front(models).map((m) => `${x(m.latency_ms)},${y(m.mlm_nll)}`);
  svg.append(draw("polyline", { class: "front", points: best.join(" ") }));
  const largest = Math.max(...pick("params").map(Number), 1);
  const dots = models.map((model) => ({
    model, cx: x(model.latency_ms), cy: y(model.mlm_nll),
    radius: Math.max(5, 22 * Math.sqrt((model.params || 0) / largest)),
  })).sort((a, b) => b.radius - a.radius);
  for (const { model, cx, cy, radius } of dots) {
    svg.append(draw("circle", { class: `dot ${model.role}`, cx, cy, r: radius }));
  }
  svg.append(...labels(dots, width));
  return svg;
}

/** Names beside their dots: where there is room for them, and lower where another one stands. */
function labels(dots, width) {
  const [letter, line, gap] = [6.4, 14, 6]; // pixels, of the text's size
  const placed = [];
  return [...dots].sort((a, b) => a.cy - b.cy).map(({ model, cx, cy, radius }) => {
    const rooms = [width - cx - radius - gap, cx - radius - gap];
    const text = `${model.name}${model.params ? ` · ${short(model.params)}` : ""}`;
    const side = text.length * letter <= rooms[0] || rooms[0] >= rooms[1] ? 0 : 1;
    const most = Math.floor(rooms[side] / letter);
    const shown = text.length > most ? `${text.slice(0, Math.max(most - 1, 1))}…` : text;
    const start = side ? cx - radius - gap - shown.length * letter : cx + radius + gap;
    const near = placed.filter((other) => other.start < start + shown.length * letter && start < other.end);
    const level = Math.max(cy + 4, ...near.map((other) => other.level + line));
    placed.push({ start, end: start + shown.length * letter, level });
    return draw("text", { class: "strong", x: side ? cx - radius - gap : start, y: level,
      "text-anchor": side ? "end" : "start" }, shown);
  });
}
