// The page: temperature, keyboard, theme, and what happens when it opens.
"use strict";

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

/** Single letters: only while the focus is in the section, so that they are in nobody's way. */
function readerKeys(event) {
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
  byId("reader").addEventListener("keydown", readerKeys);
  openSequence(0);
  showList();
  setTemperature(data.start);
}

start();
