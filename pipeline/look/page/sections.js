// The sections below the sequences: bytes, training, models.
"use strict";

const SIZES = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]];

function bytes(size) {
  const [unit, name] = SIZES.find(([least]) => size >= least * 0.9995) || SIZES[3];
  return `${+(size / unit).toPrecision(3)} ${name}`;
}

function plainTable(caption, head, rows) {
  const cell = (name, value, number, attributes) =>
    make(name, { ...attributes, class: number ? "number" : null }, value);
  return make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": caption },
    make("table", {}, make("caption", {}, caption),
      make("thead", {}, make("tr", {}, ...head.map((name, n) => cell("th", name, n, { scope: "col" })))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value, n) =>
        (n ? cell("td", value, n, {}) : cell("th", value, n, { scope: "row" }))))))));
}

function showBudget() {
  const { bytes: whole, tokens: count } = data.totals;
  const stack = make("div", { class: "stack", "aria-hidden": "true" });
  data.columns.forEach((column, number) => {
    const part = make("i", { title: `${column.name}: ${bytes(column.stored_bytes)}` });
    part.style.setProperty("--share", column.stored_bytes / whole);
    part.style.opacity = 0.9 * 0.72 ** number + 0.1;
    stack.append(part);
  });
  const rows = data.columns.map((column) => [column.name, bytes(column.raw_bytes), bytes(column.stored_bytes),
    percent(column.stored_bytes / (column.raw_bytes || 1)), (column.stored_bytes / (count || 1)).toFixed(2)]);
  const caption = "A block is one compressed frame; its bytes are shared out as its columns weigh when compressed alone";
  byId("budget").append(stack, plainTable(caption, ["column", "raw", "on disk", "of raw", "bytes per token"], rows));
}

function showTraining() {
  const names = { loss: "loss", ce: "L_ce: T² KL to the teacher", mlm: "L_mlm: masked tokens", cos: "L_cos: 1 − cosine", mse: "L_mse: logits",
    rel: "L_rel: relations" };
  const colour = (entry) => `s${data.students.findIndex((student) => student.name === entry.name) % 6}`;
  const chips = make("p", { class: "chips" }, ...data.training.map((entry) =>
    make("span", {}, make("i", { class: `swatch ${colour(entry)}` }), entry.name)));
  const panels = make("div", { class: "panels" });
  for (const [term, title] of Object.entries(names)) {
    const curves = data.training.filter((entry) => entry.curves[term]).map((entry) =>
      ({ name: entry.name, colour: colour(entry), points: entry.curves[term] }));
    if (curves.length) panels.append(lines(title, curves));
  }
  byId("curves").append(chips, panels, make("p", { class: "note" }, "By training step."));
}

function showModels() {
  const rows = data.models.map((m) => [m.name, m.role ?? "", m.params ? short(m.params) : "", m.mlm_nll.toFixed(3), `${m.latency_ms.toPrecision(3)} ms`]);
  const roles = [...new Set(data.models.map((m) => m.role))].filter((role) => role);
  const plot = make("div");
  byId("pareto").append(
    make("p", { class: "chips" }, ...roles.map((role) => make("span", {}, make("i", { class: `swatch ${role}` }), role)),
      make("span", { class: "note" }, "Area of a dot: parameters; dashed: no model is both faster and better")),
    plot,
    make("details", {}, make("summary", { class: "note" }, "As a table"),
      plainTable("Models", ["model", "role", "parameters", "loss, nats", "latency"], rows)));
  const redraw = () => plot.replaceChildren(scatter(data.models, plot.clientWidth));
  addEventListener("resize", redraw);
  redraw();
}

function pairs(target, entries) {
  byId(target).append(...entries.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}
