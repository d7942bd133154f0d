// What teacher and students say at the chosen position, at the chosen temperature.
"use strict";

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
  const focused = box.contains(document.activeElement) ? document.activeElement.id : null;
  box.replaceChildren(heading(entry), make("div", { class: "wide", id: "told", tabindex: 0, role: "region", "aria-label": "Distribution" },
    table(entry, sources, rows)), footer(entry, rows));
  if (focused) (byId(focused) || byId("told")).focus({ preventScroll: true });
}

function originalOf(entry) {
  const masked = maskedAt[state.sequence].get(entry.position);
  return masked ? masked.label : data.sequences[state.sequence].words[entry.position];
}

function heading(entry) {
  const masked = maskedAt[state.sequence].get(entry.position);
  const kind = masked && masked.kind === "mask" ? "" : `, ${kindOf(masked)}`;
  return make("h3", {}, `“${alone(originalOf(entry))}” at position ${entry.position}${kind}`);
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
    entry.stored ? row("mass of the stored tokens", ({ told }) => (told ? null : percent(entry.topk_mass[t]))) : null,
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
    button.addEventListener("click", () => { state.all = !state.all; showDistribution(); });
    line.append(button);
  }
  if (rows.some((row) => inner.has(entry.tokens[row]))) line.append(make("p", { class: "note" }, "…: the rest of a word"));
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
