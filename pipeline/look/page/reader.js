// The sequences: their list, and the text of the chosen one.
"use strict";

/** What the page carries (see gather.py), and what is looked at. */
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (name) => document.getElementById(name);
const state = { shown: [], sequence: 0, position: -1, temperature: data.start, all: false };

// ---- their list ----------------------------------------------------------------------------

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
/** Mean of a figure over the masked positions of a sequence. */
function meanOf(sequence, figure) {
  const masked = new Set(sequence.masked.map((m) => m[0]));
  return mean(sequence.positions.filter((e) => masked.has(e.position)).map(figure));
}
/** Names of the orders, and the score that falls: at T = 1, so that the slider moves no sequence. */
const orders = {
  cache: ["as in the cache", null],
  unsure: ["teacher least sure", (s) => meanOf(s, (e) => e.entropy[data.start])],
  sure: ["teacher surest", (s) => -meanOf(s, (e) => e.entropy[data.start])],
};
data.students.forEach((student, number) => {
  orders[`far${number}`] = [`${student.name} furthest from the teacher`,
    (s) => meanOf(s, (e) => e.students[number].kl[data.start])];
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

// ---- the text of one -----------------------------------------------------------------------

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
  const shown = isFound ? make("mark", {}, text) : text;
  if (!masked && !entryAt[state.sequence].has(place)) {
    const special = sequence.special.includes(place);
    return special ? make("span", { class: "mark" }, text) : shown;
  }
  const button = make("button", { type: "button", class: `token ${masked ? masked.kind : "plain"}`,
    "aria-pressed": "false", tabindex: -1, "data-place": place }, shown);
  if (masked && masked.kind === "random") button.append(make("small", {}, data.words[masked.seen]));
  if (!entryAt[state.sequence].has(place)) button.disabled = true;
  button.addEventListener("click", () => openPosition(place));
  return button;
}

const tokens = () => [...byId("text").querySelectorAll("button:not(:disabled)")];

/** What masking did to a position, in words. */
function kindOf(masked) {
  if (!masked) return "not masked";
  if (masked.kind === "mask") return "masked";
  return masked.kind === "kept" ? "kept, still predicted" : `replaced by “${alone(masked.seen)}”`;
}

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
    button.setAttribute("aria-label", `${data.words[original]}, position ${place}, ${kindOf(masked)}${said}`);
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
