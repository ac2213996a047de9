// What moves on the page: the figures every two seconds, and a prompt, or a conversation, with several adapters side by side.
"use strict";

const POLL_MS = 2000, SAMPLES = 60, MOST_ROWS = 200, SETTLE_MS = 250, BASE = "base";
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const columns = new Map(); // name -> column
const rates = [];
let key = sessionStorage.getItem("key") || "";
let last = null, names = [], hasChosen = false, rowsShown = "", isChat = false;

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
  showRuns(status.runs);
  if (status.chat && !isChat) converse();
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

// Training: of each run the last step's figures, and their course.

function showRuns(runs) {
  $("training").hidden = !runs;
  if (!runs) return;
  $("runs-count").textContent = `${runs.filter((run) => run.state === "running").length} running`;
  $("runs").replaceChildren(...runs.map(runRow));
}

function runRow(run) {
  const made = element("tr"), now = run.steps[run.steps.length - 1], figureCell = (value) => element("td", value, "number");
  const name = element("td", run.id), state = element("td", run.state, `state-${run.state}`);
  name.title = run.kind;
  made.append(name, state, figureCell(now ? now.step + (run.num_steps ? ` of ${run.num_steps}` : "") : "–"));
  for (const figure of ["loss", "reward"]) {
    const cell = element("td"), values = run.steps.map((step) => step[figure]);
    if (values.some((value) => value !== null)) cell.append(course(values, `Course of the ${figure}`));
    made.append(figureCell(now && now[figure] !== null ? number.format(now[figure]) : "–"), cell);
  }
  made.append(figureCell(whole.format(run.tokens)), figureCell(number.format(run.tokens_per_s)));
  return made;
}

function course(values, label) {
  const made = document.createElementNS(SVG, "svg"), line = document.createElementNS(SVG, "polyline");
  const told = values.map((value, index) => [index, value]).filter(([, value]) => value !== null);
  const least = Math.min(...told.map(([, value]) => value)), most = Math.max(...told.map(([, value]) => value));
  const points = told.map(([index, value]) =>
    `${(100 * index / Math.max(1, values.length - 1)).toFixed(1)},${(18 - 16 * (value - least) / (most - least || 1)).toFixed(1)}`);
  line.setAttribute("points", points.join(" "));
  for (const [name, value] of [["viewBox", "0 0 100 20"], ["preserveAspectRatio", "none"], ["role", "img"], ["class", "course"],
    ["aria-label", label]]) made.setAttribute(name, value);
  made.append(line);
  return made;
}

// Trying.

function choose(adapters) {
  hasChosen = true;
  for (const name of [BASE, ...adapters.slice(0, 3).map((adapter) => adapter.name)]) addColumn(name);
}

// Models with a chat template are talked with; each column has a conversation of its own, by the same words of the user.
function converse() {
  isChat = true;
  $("prompt-label").textContent = "Message";
  $("prompt").value = "";
  $("run").textContent = "Send";
  $("again").hidden = false;
}

function startOver() {
  for (const column of columns.values()) {
    if (column.stop) column.stop.abort();
    column.stop = null;
    column.turns = [];
    column.answer.data = "";
    column.text.className = "";
    column.text.replaceChildren();
    column.made.querySelector(".copy").disabled = true;
    measured(column, "");
  }
  showBusy();
}

function send() {
  const message = $("prompt").value;
  if (isChat && (!message.trim() || isBusy())) return;
  for (const column of columns.values()) {
    if (isChat) column.turns.push({ role: "user", content: message });
    run(column);
  }
  if (isChat) $("prompt").value = "";
}

function addColumn(name) {
  if (columns.has(name) || (name !== BASE && !names.includes(name))) return false;
  const made = $("column").content.firstElementChild.cloneNode(true);
  const column = { name, made, slider: made.querySelector("input"), text: made.querySelector("pre"), timer: 0, stop: null };
  column.turns = [];
  column.answer = document.createTextNode("");
  made.dataset.adapter = name;
  made.querySelector("h3").textContent = name === BASE ? "base model" : name;
  made.querySelector(".strength").hidden = name === BASE;
  column.slider.setAttribute("aria-label", `Strength of ${name}`);
  column.slider.addEventListener("input", () => strengthChanged(column));
  made.querySelector(".copy").addEventListener("click", () => copy(column));
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
  column.timer = setTimeout(() => runAgain(column), SETTLE_MS);
}

function runAgain(column) {
  if (isChat && column.turns.length && column.turns[column.turns.length - 1].role === "assistant") column.turns.pop();
  if (!isChat || column.turns.length) run(column);
}

async function copy(column) {
  try {
    await navigator.clipboard.writeText(column.answer.data);
    measured(column, "copied");
  } catch { // pages that did not come by https may not write there: the text is selected instead
    getSelection().selectAllChildren(column.text);
  }
}

function requestOf(column) {
  const body = {
    model: BASE, stream: true, seed: Number($("seed").value),
    max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value),
    stream_options: { include_usage: true },
    ...(isChat ? { messages: column.turns } : { prompt: $("prompt").value }),
  };
  if (column.name !== BASE) body.adapters = { [column.name]: Number(column.slider.value) };
  return body;
}

async function run(column) {
  if (column.stop) column.stop.abort();
  const stop = column.stop = new AbortController();
  const answer = column.answer = document.createTextNode("");
  column.text.className = "";
  column.text.replaceChildren(...said(column), answer);
  column.text.scrollTop = column.text.scrollHeight;
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
      answer.data += event.choices[0].text ?? event.choices[0].delta.content ?? "";
      column.made.querySelector(".copy").disabled = !answer.data;
    }
    const seconds = (performance.now() - first) / 1000;
    const rate = tokens > 1 && seconds > 0 ? `, ${number.format((tokens - 1) / seconds)} a second` : "";
    measured(column, `first token after ${Math.round(first - began)} ms, ${tokens} tokens${rate}`);
  } catch (error) {
    if (stop.signal.aborted) return measured(column, column.stop === stop ? "stopped" : "waiting");
    column.text.className = "failed";
    column.text.textContent = error.message;
    measured(column, "");
    column.turns.pop(); // so that another message may be sent
  } finally {
    if (column.stop === stop) settle(column);
    showBusy();
  }
}

function settle(column) {
  column.stop = null;
  const turns = column.turns;
  if (turns.length && turns[turns.length - 1].role === "user") turns.push({ role: "assistant", content: column.answer.data });
}

// What stands before the answer.
function said(column) {
  if (!isChat) return [element("span", $("prompt").value, "prompt")];
  return column.turns.map((turn) => element("span", `${turn.content}\n\n`, turn.role === "user" ? "prompt" : ""));
}

function measured(column, text) {
  column.made.querySelector(".measured").textContent = text;
}

async function* events(body, signal) {
  const sent = { method: "POST", headers: { ...headers(), "content-type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await fetch(isChat ? "v1/chat/completions" : "v1/completions", sent);
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

function isBusy() {
  return [...columns.values()].some((column) => column.stop);
}

function showBusy() {
  $("stop").disabled = !isBusy();
  $("run").disabled = isChat && isBusy();
}

$("try").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("again").addEventListener("click", startOver);
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
