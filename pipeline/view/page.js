// The page: which sequence and position are looked at, at which temperature, and what was said.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (name) => document.getElementById(name);
const state = { shown: [], sequence: 0, position: -1, temperature: data.start, all: false };
const TEACHER_ROWS = 8;
const STUDENT_ROWS = 3;

// ---- probabilities -------------------------------------------------------------------------

/** Log-probabilities are a logit over T less a normaliser; the page holds both (see positions.py). */
function teacherProbability(entry, number) {
  const [logit, t] = [entry.logits[number], state.temperature];
  if (logit === null || !entry.stored_norm.length) return null;
  const temperature = data.temperatures[t];
  if (number < entry.stored) return Math.exp(logit / temperature - entry.stored_norm[t]);
  const bias = data.bias[t] ? data.bias[t][entry.tokens[number]] : 0;
  return Math.exp((logit + bias) / temperature - entry.rest_norm[t]);
}

function studentProbability(told, number) {
  const t = state.temperature;
  return Math.exp(told.logits[number] / data.temperatures[t] - told.norm[t]);
}

/** One function per source: token number to probability, null where it is not known. */
function sourcesOf(entry) {
  const students = entry.students.map((told, s) => ({
    name: data.students[s].name, colour: `s${s % 6}`, told,
    probability: (number) => studentProbability(told, number),
  }));
  if (!entry.stored_norm.length) return students;
  const teacher = { name: "teacher", colour: "teacher", told: null,
    probability: (number) => teacherProbability(entry, number) };
  return [teacher, ...students];
}

function percent(p) {
  if (p === null) return "–";
  if (p >= 0.9995) return "100%";
  if (p >= 0.0995) return `${(100 * p).toFixed(1)}%`;
  if (p >= 0.000095) return `${(100 * p).toFixed(2)}%`;
  return "<0.01%";
}

const inner = new Set(data.inner);
/** A token out of its context: an ellipsis leads the rest of a word. */
const alone = (word) => (inner.has(word) ? `…${data.words[word]}` : data.words[word]);

// ---- sequences -----------------------------------------------------------------------------

/** Text of a sequence and where each token begins in it. */
function spell(sequence) {
  let text = "";
  const starts = sequence.words.map((word, place) => {
    if (place && sequence.glued[place] === "0") text += " ";
    const start = text.length;
    text += data.words[word];
    return start;
  });
  return { text, lower: text.toLowerCase(), starts };
}

const spelled = data.sequences.map(spell);
const maskedAt = data.sequences.map((s) => new Map(s.masked.map((m, i) => [m[0], { kind: m[2], label: m[1], seen: s.seen[i] }])));
const entryAt = data.sequences.map((s) => new Map(s.positions.map((entry) => [entry.position, entry])));

function query() {
  return byId("search").value.trim().toLowerCase();
}

/** Tokens of a sequence that a search touches. */
function hits(number, wanted) {
  const { lower, starts } = spelled[number];
  const found = new Set();
  for (let at = wanted ? lower.indexOf(wanted) : -1; at >= 0; at = lower.indexOf(wanted, at + 1)) {
    starts.forEach((start, place) => {
      const end = start + data.words[data.sequences[number].words[place]].length;
      if (start < at + wanted.length && end > at) found.add(place);
    });
  }
  return found;
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / (values.length || 1);
const orders = {
  cache: ["as in the cache", null],
  unsure: ["teacher least sure", (s) => mean(s.positions.map((e) => e.entropy[state.temperature]))],
  sure: ["teacher surest", (s) => -mean(s.positions.map((e) => e.entropy[state.temperature]))],
};
data.students.forEach((student, number) => {
  orders[`far${number}`] = [`${student.name} furthest from the teacher`,
    (s) => mean(s.positions.map((e) => e.students[number].kl[state.temperature]))];
});

function fillOrders() {
  const known = data.sequences.some((s) => s.positions.some((e) => e.entropy.length));
  for (const [name, [label]] of Object.entries(orders)) {
    if (name === "cache" || known) byId("order").append(make("option", { value: name }, label));
  }
}

function showList() {
  const wanted = query();
  const score = orders[byId("order").value][1];
  state.shown = data.sequences.map((_, number) => number)
    .filter((number) => spelled[number].lower.includes(wanted));
  if (score) state.shown.sort((a, b) => score(data.sequences[b]) - score(data.sequences[a]));
  byId("list").replaceChildren(...state.shown.map((number) => listItem(number, wanted)));
  const of = `${state.shown.length} of ${data.sequences.length} sequences`;
  byId("found").textContent = wanted ? `${of} with “${wanted}”` : `${data.sequences.length} sequences, sampled`;
  if (state.shown.length && !state.shown.includes(state.sequence)) openSequence(state.shown[0]);
  else select();
}

function listItem(number, wanted) {
  const sequence = data.sequences[number];
  const found = hits(number, wanted);
  const first = found.size ? Math.max(0, Math.min(...found) - 8) : 0;
  const excerpt = make("span", { class: "excerpt" }, first ? "… " : "");
  sequence.words.slice(first, first + 34).forEach((word, offset) => {
    const place = first + offset;
    if (sequence.special.includes(place) && !maskedAt[number].has(place)) return;
    if (excerpt.textContent && sequence.glued[place] === "0") excerpt.append(" ");
    const name = found.has(place) ? "mark" : maskedAt[number].has(place) ? "b" : null;
    excerpt.append(name ? make(name, {}, data.words[word]) : data.words[word]);
  });
  const [round, block, row] = sequence.at;
  const item = make("li", { role: "option", id: `sequence-${number}`, tabindex: -1 }, excerpt,
    make("span", { class: "note" }, `round ${round}, block ${block}, row ${row} · ${sequence.masked.length} masked`));
  item.addEventListener("click", () => { openSequence(number); item.focus(); });
  return item;
}

/** Mark the chosen sequence in the list; it alone can be tabbed to. */
function select() {
  for (const item of byId("list").children) {
    const chosen = item.id === `sequence-${state.sequence}`;
    item.setAttribute("aria-selected", chosen);
    item.tabIndex = chosen ? 0 : -1;
  }
}

function openSequence(number) {
  state.sequence = number;
  const sequence = data.sequences[number];
  const [round, block, row] = sequence.at;
  byId("where").textContent = `Round ${round}, block ${block}, row ${row} · ${sequence.words.length} tokens, ${sequence.masked.length} masked`;
  showText();
  select();
  const first = sequence.positions.find((e) => maskedAt[number].has(e.position)) || sequence.positions[0];
  openPosition(first ? first.position : -1, false);
}

// ---- one sequence --------------------------------------------------------------------------

function showText() {
  const sequence = data.sequences[state.sequence];
  const found = hits(state.sequence, query());
  const parts = [];
  sequence.words.forEach((word, place) => {
    if (place && sequence.glued[place] === "0") parts.push(" ");
    parts.push(tokenOf(sequence, word, place, found.has(place)));
  });
  byId("text").replaceChildren(...parts);
  shade();
}

function tokenOf(sequence, word, place, isFound) {
  const text = data.words[word];
  const masked = maskedAt[state.sequence].get(place);
  const inner = isFound ? make("mark", {}, text) : text;
  if (!masked && !entryAt[state.sequence].has(place)) {
    const special = sequence.special.includes(place);
    return special ? make("span", { class: "mark" }, text) : inner;
  }
  const button = make("button", { type: "button", class: `token ${masked ? masked.kind : "plain"}`,
    "aria-pressed": "false", tabindex: -1, "data-place": place }, inner);
  if (masked && masked.kind === "random") button.append(make("small", {}, data.words[masked.seen]));
  if (!entryAt[state.sequence].has(place)) button.disabled = true;
  button.addEventListener("click", () => openPosition(place));
  return button;
}

const tokens = () => [...byId("text").querySelectorAll("button:not(:disabled)")];
const KINDS = {
  mask: "masked", random: "masked, another token shown", kept: "masked, the token itself shown",
};

/** Under each position a bar as long as what the teacher (else the student) gives the original. */
function shade() {
  for (const button of tokens()) {
    const place = Number(button.dataset.place);
    const entry = entryAt[state.sequence].get(place);
    const masked = maskedAt[state.sequence].get(place);
    const original = masked ? masked.label : data.sequences[state.sequence].words[place];
    const source = sourcesOf(entry)[0];
    const number = entry.tokens.indexOf(original);
    const p = source && number >= 0 ? source.probability(number) : null;
    button.style.setProperty("--sure", p || 0);
    const said = p === null ? "" : `, ${source.name} ${percent(p)}`;
    button.setAttribute("aria-label", `${data.words[original]}, position ${place}, ${masked ? KINDS[masked.kind] : "not masked"}${said}`);
  }
}

function openPosition(place, speak = true) {
  state.position = place;
  state.all = false;
  for (const button of tokens()) {
    const chosen = Number(button.dataset.place) === place;
    button.setAttribute("aria-pressed", chosen);
    button.tabIndex = chosen ? 0 : -1;
  }
  showDistribution();
  if (speak) announce();
}

// ---- what was said there -------------------------------------------------------------------

function showDistribution() {
  const box = byId("distribution");
  const entry = entryAt[state.sequence].get(state.position);
  if (!entry) {
    box.replaceChildren(make("p", { class: "note" }, "No position of this sequence carries a signal."));
    return;
  }
  const sources = sourcesOf(entry);
  if (!sources.length) {
    box.replaceChildren(heading(entry), make("p", { class: "note" }, data.signal === "masks"
      ? "This cache holds masks alone: there is no teacher to hear. Name students with --student."
      : "This cache holds draws alone: no probability of a token is known."));
    return;
  }
  const rows = rowsOf(entry, sources);
  box.replaceChildren(heading(entry), make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Distribution" },
    table(entry, sources, rows)), footer(entry, rows));
}

function originalOf(entry) {
  const masked = maskedAt[state.sequence].get(entry.position);
  return masked ? masked.label : data.sequences[state.sequence].words[entry.position];
}

function heading(entry) {
  const masked = maskedAt[state.sequence].get(entry.position);
  const seen = masked && masked.kind !== "mask" ? `, shown as “${alone(masked.seen)}”` : "";
  return make("h3", {}, `“${alone(originalOf(entry))}” at position ${entry.position}${masked ? "" : ", not masked"}${seen}`);
}

/** Tokens by the first source's probability: the likeliest of each source, and the original. */
function rowsOf(entry, sources) {
  const every = entry.tokens.map((_, number) => number);
  const ranked = (source) => [...every].sort((a, b) => (source.probability(b) ?? -1) - (source.probability(a) ?? -1));
  const kept = new Set();
  sources.forEach((source, s) => ranked(source).slice(0, s ? STUDENT_ROWS : TEACHER_ROWS).forEach((n) => kept.add(n)));
  kept.add(entry.tokens.indexOf(originalOf(entry)));
  return ranked(sources[0]).filter((number) => state.all || kept.has(number));
}

function table(entry, sources, rows) {
  const told = rows.map((number) => sources.map((source) => source.probability(number)));
  const top = Math.max(...told.flat().map((p) => p || 0), 1e-9);
  const head = make("tr", {}, make("th", { scope: "col" }, "token"), ...sources.map((source) =>
    make("th", { scope: "col" }, make("i", { class: `swatch ${source.colour}` }), source.name)));
  const body = rows.map((number, row) => make("tr", { class: entry.tokens[number] === originalOf(entry) ? "original" : null, "data-token": entry.tokens[number] },
    make("th", { scope: "row" }, alone(entry.tokens[number])),
    ...sources.map((source, s) => share(told[row][s], top, source.colour))));
  const rest = sources.map((_, s) => Math.max(0, 1 - told.reduce((sum, row) => sum + (row[s] || 0), 0)));
  const foot = [make("tr", { class: "rest" }, make("th", { scope: "row" }, "all other tokens"),
    ...rest.map((p) => figure(percent(p), { "data-probability": p.toPrecision(6) }))),
    ...summary(entry, sources)];
  const caption = make("caption", {}, `Probabilities at T = ${data.temperatures[state.temperature]}`);
  return make("table", { class: "distribution" }, caption, make("thead", {}, head), make("tbody", {}, ...body, ...foot));
}

function share(p, top, colour) {
  const bar = make("i", { class: colour, "aria-hidden": "true" });
  bar.style.setProperty("--share", (p || 0) / top);
  return make("td", { class: "told", "data-probability": p === null ? "" : p.toPrecision(6) },
    make("div", { class: "share" }, make("span", { class: "number" }, percent(p)), bar));
}

/** A cell whose figure stands below the probabilities. */
function figure(text, attributes) {
  return make("td", { class: "told", ...attributes }, make("div", { class: "share" }, make("span", { class: "number" }, text)));
}

/** Entropy, mass of the stored tokens; KL and cosine of each student. */
function summary(entry, sources) {
  const t = state.temperature;
  const partial = data.signal === "sparse" ? "≥ " : "";
  const row = (name, pick) => {
    const cells = sources.map((source) => pick(source));
    if (cells.every((cell) => cell === null)) return null;
    return make("tr", { class: "sum" }, make("th", { scope: "row" }, name), ...cells.map((cell) => figure(cell ?? "", {})));
  };
  const rows = [
    row("entropy, nats", ({ told }) => (told ? null : `${partial}${entry.entropy[t].toFixed(2)}`)),
    entry.stored ? row("mass of the stored tokens", ({ told }) => (told ? null : percent(entry.head_mass[t]))) : null,
    row("KL from the teacher, nats", ({ told }) => (told && told.kl.length ? `${partial}${told.kl[t].toFixed(3)}` : null)),
    row("cosine of the hidden states", ({ told }) => (told && told.cosine !== null ? told.cosine.toFixed(3) : null)),
  ];
  return rows.filter((found) => found !== null);
}

function footer(entry, rows) {
  const line = make("div", { class: "after" });
  if (rows.length < entry.tokens.length || state.all) {
    const button = make("button", { type: "button", class: "quiet", id: "more", "aria-expanded": state.all },
      state.all ? "Fewer tokens" : `All ${entry.tokens.length} tokens kept of this position`);
    button.addEventListener("click", () => { state.all = !state.all; showDistribution(); byId("more").focus(); });
    line.append(button);
  }
  return line;
}

function announce() {
  const entry = entryAt[state.sequence].get(state.position);
  if (!entry) return;
  const words = sourcesOf(entry).map((source) => {
    const best = entry.tokens.map((_, number) => number)
      .reduce((a, b) => ((source.probability(b) ?? -1) > (source.probability(a) ?? -1) ? b : a));
    return `${source.name}: ${alone(entry.tokens[best])} ${percent(source.probability(best))}`;
  });
  byId("live").textContent = `Position ${entry.position}, original ${data.words[originalOf(entry)]}, T = ${data.temperatures[state.temperature]}. ${words.join(", ")}.`;
}

// ---- temperature, keyboard, theme ----------------------------------------------------------

function setTemperature(number) {
  state.temperature = Math.min(Math.max(number, 0), data.temperatures.length - 1);
  const value = data.temperatures[state.temperature];
  const slider = byId("temperature");
  slider.value = state.temperature;
  slider.setAttribute("aria-valuetext", `T = ${value}`);
  byId("temperature-value").textContent = value;
  const held = data.signal === "masks" ? "" : data.held.includes(value)
    ? "a temperature of the cache" : `the cache was made for T = ${data.held.join(", ")}`;
  byId("temperature-note").textContent = held;
  shade();
  showDistribution();
}

/** Move the focus among elements by arrow keys. */
function step(elements, by) {
  const at = elements.indexOf(document.activeElement);
  const next = elements[Math.min(Math.max(at + by, 0), elements.length - 1)];
  if (next) next.focus();
  return next;
}

function listKeys(event) {
  const moves = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  if (event.key in moves) {
    const item = step([...byId("list").children], moves[event.key]);
    if (item) openSequence(Number(item.id.slice("sequence-".length)));
  } else if (event.key === "Enter" || event.key === " ") {
    const chosen = byId("text").querySelector("[aria-pressed=true]");
    if (chosen) chosen.focus();
  } else return;
  event.preventDefault();
}

function textKeys(event) {
  const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
  const rows = { ArrowDown: 1, ArrowUp: -1 };
  if (event.key in moves) {
    const token = step(tokens(), moves[event.key]);
    if (token) openPosition(Number(token.dataset.place));
  } else if (event.key in rows) {
    const at = state.shown.indexOf(state.sequence) + rows[event.key];
    if (at < 0 || at >= state.shown.length) return;
    openSequence(state.shown[at]);
    const chosen = byId("text").querySelector("[aria-pressed=true]");
    if (chosen) chosen.focus();
    announce();
  } else if (event.key === "Escape") {
    byId(`sequence-${state.sequence}`)?.focus();
  } else return;
  event.preventDefault();
}

function pageKeys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=search], select")) return;
  if (event.key === "/") byId("search").focus();
  else if (event.key === "[" || event.key === "]") {
    setTemperature(state.temperature + (event.key === "]" ? 1 : -1));
    announce();
  } else return;
  event.preventDefault();
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", dark);
}

function startTheme() {
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("distilcache-theme"); } catch { /* storage is switched off */ }
  setTheme(chosen ? chosen === "dark" : preferred.matches);
  preferred.addEventListener("change", () => { if (!chosen) setTheme(preferred.matches); });
  byId("theme").addEventListener("click", () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("distilcache-theme", chosen); } catch { /* for this visit alone */ }
    setTheme(chosen === "dark");
  });
}

// ---- the other sections --------------------------------------------------------------------

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
  const names = { loss: "loss", ce: "L_ce: KL to the teacher", mlm: "L_mlm: masked tokens", cos: "L_cos: 1 − cosine", mse: "L_mse: logits" };
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
  byId("pareto").append(
    make("p", { class: "chips" }, ...roles.map((role) => make("span", {}, make("i", { class: `swatch ${role}` }), role)),
      make("span", { class: "note" }, "Area of a dot: parameters; dashed: no model is both faster and better")),
    scatter(data.models),
    make("details", {}, make("summary", { class: "note" }, "As a table"),
      plainTable("Models", ["model", "role", "parameters", "loss, nats", "latency"], rows)));
}

function pairs(target, entries) {
  byId(target).append(...entries.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function start() {
  startTheme();
  byId("title").textContent = data.title;
  pairs("facts", data.facts);
  for (const [name, value] of data.provenance) byId("provenance").append(make("dt", {}, name), make("dd", {}, value));
  showBudget();
  byId("histograms").append(...data.histograms.map(histogram));
  if (data.training.length) showTraining(); else byId("training").remove();
  if (data.models.length) showModels(); else byId("models").remove();
  const names = { reader: "Sequences", bytes: "Bytes", signals: "Signals", training: "Training", models: "Models", origin: "Provenance" };
  for (const [id, name] of Object.entries(names)) if (byId(id)) byId("sections").append(make("a", { href: `#${id}` }, name));
  byId("temperature").max = data.temperatures.length - 1;
  byId("temperature").disabled = data.temperatures.length < 2;
  byId("temperature").addEventListener("input", (event) => setTemperature(Number(event.target.value)));
  byId("temperature").addEventListener("change", announce);
  fillOrders();
  byId("order").addEventListener("change", showList);
  byId("search").addEventListener("input", () => { showList(); showText(); openPosition(state.position, false); });
  byId("list").addEventListener("keydown", listKeys);
  byId("text").addEventListener("keydown", textKeys);
  document.addEventListener("keydown", pageKeys);
  openSequence(0);
  showList();
  setTemperature(data.start);
}

start();
