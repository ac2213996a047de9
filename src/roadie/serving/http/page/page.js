// What moves on the page: the figures every two seconds, and the prompt with several adapters side by side.
"use strict";

const POLL_MS = 2000, SAMPLES = 60, MOST_ROWS = 200, SETTLE_MS = 250, BASE = "base";
const $ = (id) => document.getElementById(id);
const columns = new Map(); // name -> column
const rates = [];
let key = sessionStorage.getItem("key") || "";
let last = null, names = [], hasChosen = false, rowsShown = "";

const headers = () => (key ? { authorization: `Bearer ${key}` } : {});
const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 }), whole = new Intl.NumberFormat("en");

function element(kind, text, className) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// The figures.

async function poll() {
  try {
    const response = await fetch("v1/status", { headers: headers(), cache: "no-store" });
    if (response.status === 401) return askForKey();
    if (!response.ok) throw new Error(await messageOf(response));
    show(await response.json());
  } catch (error) {
    say(`no connection: ${error.message}`, "failed");
  }
}

function askForKey() {
  $("key-form").hidden = false;
  say(key ? "this key is not known" : "an API key is needed", "failed");
}

function say(text, className) {
  $("state").textContent = text;
  $("state").className = className || "";
}

function show(status) {
  say(status.ready ? "ready" : "takes no requests", status.ready ? "ready" : "failed");
  $("model").textContent = status.model;
  document.title = `roadie: ${status.model}`;
  showFigures(status.figures);
  showAdapters(status.adapters);
  if (!hasChosen) choose(status.adapters);
}

function showFigures(figures) {
  const now = performance.now();
  if (last) rates.push(Math.max(0, (figures.generated_tokens - last.tokens) * 1000 / (now - last.at)));
  if (rates.length > SAMPLES) rates.shift();
  last = { tokens: figures.generated_tokens, at: now };
  const shown = [
    ["running", figures.running], ["waiting", figures.queued],
    ["in slots", `${figures.resident_adapters} of ${figures.slots}`],
    ["cache in use", `${Math.round(100 * (1 - figures.blocks_free / figures.blocks))} %`],
    ["requests", figures.requests], ["tokens", figures.generated_tokens],
    ["loads", figures.loads], ["evictions", figures.evictions],
  ];
  $("figures").replaceChildren(...shown.map(([name, value]) => {
    const box = element("div");
    box.append(element("dt", name), element("dd", typeof value === "number" ? whole.format(value) : value));
    return box;
  }));
  drawRate();
}

function drawRate() {
  const most = Math.max(1, ...rates), step = 300 / (SAMPLES - 1), start = SAMPLES - rates.length;
  const points = rates.map((rate, index) => `${((start + index) * step).toFixed(1)},${(56 - 52 * rate / most).toFixed(1)}`);
  document.querySelector("#rate polyline").setAttribute("points", points.join(" "));
  $("rate-now").textContent = number.format(rates.length ? rates[rates.length - 1] : 0);
  $("rate-most").textContent = number.format(Math.max(0, ...rates));
}

function showAdapters(adapters) {
  names = adapters.map((adapter) => adapter.name);
  const inSlots = adapters.filter((adapter) => adapter.slot !== null).length;
  $("count").textContent = `${adapters.length}, ${inSlots} in slots`;
  $("filter").hidden = adapters.length < 20;
  const wanted = $("filter").value.trim().toLowerCase();
  const found = adapters.filter((adapter) => adapter.name.toLowerCase().includes(wanted));
  found.sort((one, other) => (other.running + other.queued) - (one.running + one.queued)
    || (other.slot !== null) - (one.slot !== null) || one.name.localeCompare(other.name));
  const rows = JSON.stringify(found.slice(0, MOST_ROWS));
  if (rows === rowsShown) return;
  rowsShown = rows;
  $("adapters").replaceChildren(...found.slice(0, MOST_ROWS).map(row));
  $("more").hidden = found.length <= MOST_ROWS;
  $("more").textContent = `and ${found.length - MOST_ROWS} more: filter by name`;
  $("names").replaceChildren(...[BASE, ...names].slice(0, 2000).map((name) => {
    const option = element("option");
    option.value = name;
    return option;
  }));
}

function row(adapter) {
  const made = element("tr");
  const state = element("td", adapter.state + (adapter.pinned ? ", pinned" : ""), `state-${adapter.state}`);
  if (adapter.error) state.title = adapter.error;
  const counts = [adapter.slot ?? "–", adapter.running, adapter.queued, adapter.requests, adapter.tokens];
  made.append(element("td", adapter.name), state, ...counts.map((count) => element("td", String(count), "number")));
  return made;
}

// Trying.

function choose(adapters) {
  hasChosen = true;
  for (const name of [BASE, ...adapters.slice(0, 3).map((adapter) => adapter.name)]) addColumn(name);
}

function addColumn(name) {
  if (columns.has(name) || (name !== BASE && !names.includes(name))) return false;
  const made = $("column").content.firstElementChild.cloneNode(true);
  const column = { name, made, slider: made.querySelector("input"), text: made.querySelector("pre"), timer: 0, stop: null };
  made.dataset.adapter = name;
  made.querySelector("h3").textContent = name === BASE ? "base model" : name;
  made.querySelector(".strength").hidden = name === BASE;
  column.slider.setAttribute("aria-label", `Strength of ${name}`);
  column.slider.addEventListener("input", () => strengthChanged(column));
  made.querySelector(".remove").addEventListener("click", () => removeColumn(column));
  columns.set(name, column);
  $("columns").append(made);
  return true;
}

function removeColumn(column) {
  if (column.stop) column.stop.abort();
  clearTimeout(column.timer);
  columns.delete(column.name);
  column.made.remove();
}

function strengthChanged(column) {
  column.made.querySelector("output").textContent = Number(column.slider.value).toFixed(2).replace(/\.?0+$/, "");
  clearTimeout(column.timer);
  column.timer = setTimeout(() => run(column), SETTLE_MS);
}

function requestOf(column) {
  const body = {
    model: BASE, prompt: $("prompt").value, stream: true, seed: Number($("seed").value),
    max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value),
    stream_options: { include_usage: true },
  };
  if (column.name !== BASE) body.adapters = { [column.name]: Number(column.slider.value) };
  return body;
}

async function run(column) {
  if (column.stop) column.stop.abort();
  const stop = column.stop = new AbortController();
  const prompt = $("prompt").value, answer = document.createTextNode("");
  column.text.className = "";
  column.text.replaceChildren(element("span", prompt, "prompt"), answer);
  measured(column, "waiting");
  showBusy();
  const began = performance.now();
  let first = 0, tokens = 0;
  try {
    for await (const event of events(requestOf(column), stop.signal)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      if (!event.choices.length) continue;
      first ||= performance.now();
      answer.data += event.choices[0].text;
    }
    const seconds = (performance.now() - first) / 1000;
    const rate = tokens > 1 && seconds > 0 ? `, ${number.format((tokens - 1) / seconds)} a second` : "";
    measured(column, `first token after ${Math.round(first - began)} ms, ${tokens} tokens${rate}`);
  } catch (error) {
    if (stop.signal.aborted) return measured(column, column.stop === stop ? "stopped" : "waiting");
    column.text.className = "failed";
    column.text.textContent = error.message;
    measured(column, "");
  } finally {
    if (column.stop === stop) column.stop = null;
    showBusy();
  }
}

function measured(column, text) {
  column.made.querySelector(".measured").textContent = text;
}

async function* events(body, signal) {
  const sent = { method: "POST", headers: { ...headers(), "content-type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await fetch("v1/completions", sent);
  if (!response.ok) throw new Error(await messageOf(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice("data: ".length));
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

function showBusy() {
  $("stop").disabled = ![...columns.values()].some((column) => column.stop);
}

$("try").addEventListener("submit", (event) => {
  event.preventDefault();
  for (const column of columns.values()) run(column);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("try").requestSubmit();
});
$("stop").addEventListener("click", () => columns.forEach((column) => column.stop && column.stop.abort()));
$("add").addEventListener("input", () => { if (addColumn($("add").value)) $("add").value = ""; });
$("add").addEventListener("keydown", (event) => { if (event.key === "Enter") event.preventDefault(); });
$("filter").addEventListener("input", poll);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("key", key);
  $("key").value = "";
  $("key-form").hidden = true;
  poll();
});
setInterval(() => { if (!document.hidden) poll(); }, POLL_MS);
poll();
