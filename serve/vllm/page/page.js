// The page /depth: asks the server, colours every token by its recurrences, and draws the engine's counters.
// In order: settings and dials, colours, replies, requests, counters, start. Addresses are relative to the page's.
"use strict";

const $ = (id) => document.getElementById(id);
const state = {
  settings: null, // the reply of /v1/depth
  name: "", // the model's, in requests
  first: [], // the conversation at R, and the one at the second R
  second: [],
  deepest: 1, // the depth at the end of the colour scale
  stop: null, // AbortController of the running question
};

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children); // strings become text, never HTML
  return made;
}

// ---- settings and dials ---------------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  if (response.status === 401) return "The server wants an API key, or another one: give it under “API key”.";
  try {
    const { error } = await response.json();
    return error.message ?? String(error);
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

async function readSettings() {
  const get = (path) => fetch(path, { headers: headers() });
  const [depth, models] = await Promise.all([get("v1/depth"), get("v1/models")]);
  if (!depth.ok || !models.ok) {
    const text = await failure(depth.ok ? models : depth);
    $("model").textContent = text;
    throw new Error(text);
  }
  state.settings = await depth.json();
  state.name = (await models.json()).data[0].id;
  $("model").textContent = `${state.name}, engine=${state.settings.engine}`;
  fillDials();
}

function fillDials() {
  const { settings } = state;
  for (const id of ["depth", "depth-b"]) {
    $(id).max = settings.max_recurrences;
    $(id).value = id === "depth" ? settings.num_recurrences : 1;
    $(id).disabled = settings.max_recurrences === 1 || fixedDepth();
  }
  $("rule").replaceChildren(...Object.keys(settings.exit_rules).map((name) => new Option(name)));
  if (!$("rule").options.length) $("rule").append(new Option("fixed"));
  $("rule").value = settings.exit_rule;
  $("decoder").replaceChildren(
    ...Object.entries(settings.decoders).map(([name, reason]) => {
      const option = new Option(reason ? `${name} (not here)` : name, name);
      option.disabled = Boolean(reason);
      option.title = reason ?? "";
      return option;
    }),
  );
  $("decoder").value = settings.decoder;
  $("compare").disabled = fixedDepth();
  const why = settings.routed
    ? "A router decides the depth of every token of this model."
    : `This server runs every token at R = ${settings.num_recurrences} (engine=fixed).`;
  $("note").textContent = fixedDepth() ? why : "";
  $("note").hidden = !fixedDepth();
  $("policy").textContent = policyOf(settings);
  turnDials();
}

function policyOf({ kv_policy: policy, router_kv: routed, engine }) {
  // The server's own choice, for all requests.
  if (!policy) return `router.kv=${routed}`;
  if (engine === "fixed") return `kv_policy=${policy}`;
  if (policy === "per-depth") return `kv_policy=${policy}: exits save latency, not work.`;
  return `kv_policy=${policy}: exits save work, and change what later tokens read.`;
}

const fixedDepth = () => state.settings.engine === "fixed" || state.settings.routed;

function turnDials() {
  const { settings } = state;
  if (!settings) return;
  const compared = $("compare").checked;
  const depths = compared ? [+$("depth").value, +$("depth-b").value] : [+$("depth").value];
  $("depth-value").value = depths[0];
  $("depth-b-value").value = $("depth-b").value;
  $("second").hidden = !compared;
  const rule = $("rule").value;
  $("rule").disabled = fixedDepth() || $("decoder").value === "diffusion";
  $("threshold").disabled = $("rule").disabled || rule === "fixed";
  $("threshold").placeholder = settings.exit_rules[rule] ?? "none";
  $("decoder").disabled = fixedDepth();
  const trained = settings.trained_recurrences?.max;
  const most = Math.max(...depths);
  $("beyond").hidden = !trained || fixedDepth();
  $("beyond").textContent = trained && most > trained ? `The model was trained at up to ${trained} recurrences.` : "";
  paint(Math.max(...depths, settings.routed ? settings.max_recurrences : 1));
}

// ---- colours --------------------------------------------------------------------------------------------------------

// Viridis (van der Walt and Smith): lightness rises along it, for readers who do not tell its hues apart, too.
const VIRIDIS = [0x440154, 0x482878, 0x3e4989, 0x31688e, 0x26828e, 0x1f9e89, 0x35b779, 0x6ece58, 0xb5de2b, 0xfde725];
const dark = matchMedia("(prefers-color-scheme: dark)");

function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return [16, 8, 0].map((shift) => {
    const [a, b] = [VIRIDIS[low], VIRIDIS[low + 1]].map((colour) => (colour >> shift) & 255);
    return Math.round(a + (b - a) * (place - low));
  });
}

function ink(colour) {
  // Black or white, whichever has more contrast (relative luminance of WCAG 2.2).
  const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const [red, green, blue] = colour.map((part) => linear(part / 255));
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) ? "#000000" : "#ffffff";
}

function paint(most = state.deepest) {
  // Colours of depths 1 to `most`. The deepest is the farthest from the page's own colour, in both themes.
  state.deepest = most;
  for (let depth = 1; depth <= most; depth++) {
    const share = most === 1 ? 0.5 : (depth - 1) / (most - 1);
    const colour = viridis(dark.matches ? share : 1 - share);
    document.documentElement.style.setProperty(`--fill-${depth}`, `rgb(${colour.join(" ")})`);
    document.documentElement.style.setProperty(`--ink-${depth}`, ink(colour));
  }
  const step = Math.max(1, Math.ceil(most / 16));
  const shown = Array.from({ length: most }, (_, n) => n + 1).filter((n) => n === 1 || n === most || n % step === 0);
  const steps = shown.map((depth) => coloured(make("span", { class: "step" }, String(depth)), depth));
  $("legend").replaceChildren(make("span", { class: "name" }, "recurrences"), ...steps);
  $("legend").setAttribute("aria-label", `Colours of tokens, from 1 to ${most} recurrences`);
}

function coloured(element, depth) {
  element.style.background = `var(--fill-${depth})`;
  element.style.color = `var(--ink-${depth})`;
  return element;
}

// ---- replies --------------------------------------------------------------------------------------------------------

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

class Reply {
  // One reply of a turn: its tokens as they come, then a summary and a table of them.
  constructor(title) {
    this.tokens = []; // [text, depth]
    this.text = make("p", { class: "text" });
    this.summary = make("div", { class: "summary" }, "no tokens yet");
    this.element = make("article", { class: "reply" }, make("h3", {}, title), this.text, this.summary);
    this.title = title;
    this.content = ""; // what the model said, for the conversation
    this.started = performance.now();
  }

  add(texts, depths) {
    if (Math.max(...depths) > state.deepest) paint(Math.max(...depths));
    const spans = depths.map((depth, n) => {
      this.tokens.push([texts[n], depth]);
      const title = texts[n] ? count(depth, "recurrence") : `${count(depth, "recurrence")}, no text of its own`;
      const kind = texts[n] ? "token" : "token blank";
      return coloured(make("span", { class: kind, title, "data-depth": depth }, texts[n]), depth);
    });
    this.text.append(...spans);
    this.summary.textContent = this.numbers();
  }

  numbers() {
    const depths = this.tokens.map(([, depth]) => depth);
    const mean = depths.reduce((sum, depth) => sum + depth, 0) / depths.length;
    const seconds = ((this.ended ?? performance.now()) - this.started) / 1000;
    const [least, most] = [Math.min(...depths), Math.max(...depths)];
    const spread = least === most ? count(most, "recurrence") : `${mean.toFixed(2)} recurrences (${least} to ${most})`;
    const speed = `${(depths.length / seconds).toFixed(1)} tokens/s${this.stopped ? ", stopped" : ""}`;
    return `${count(depths.length, "token")}, ${spread}, ${speed}`;
  }

  fail(text) {
    this.failed = true;
    this.text.after(make("p", { class: "failure", role: "alert" }, text));
    if (!this.tokens.length) this.summary.textContent = "no reply";
  }

  finish() {
    this.ended = performance.now();
    if (!this.tokens.length) {
      if (this.content) this.summary.textContent = "the server sent no depths";
      return this.text.append(this.content);
    }
    const details = make("details", {}, make("summary", {}, this.numbers()));
    details.addEventListener("toggle", () => details.querySelector("table") ?? details.append(this.table()));
    this.summary.replaceChildren(details);
  }

  table() {
    const cells = (kind, ...texts) => make("tr", {}, ...texts.map((text) => make(kind, {}, String(text))));
    const head = make("thead", {}, cells("th", "token", "text", "recurrences"));
    const rows = this.tokens.map(([text, depth], n) => cells("td", n + 1, JSON.stringify(text).slice(1, -1), depth));
    return make("table", {}, head, make("tbody", {}, ...rows));
  }
}

// ---- requests -------------------------------------------------------------------------------------------------------

function bodyOf(question, conversation, depth) {
  const body = {
    model: state.name,
    stream: true,
    return_recurrences: true,
    max_tokens: +$("max-tokens").value,
    temperature: +$("temperature").value,
  };
  if ($("kind").value === "chat") body.messages = [...conversation, { role: "user", content: question }];
  else body.prompt = question;
  if (fixedDepth()) return body;
  body.num_recurrences = depth;
  body.decoder = $("decoder").value;
  if (body.decoder === "diffusion") return body; // it has no exit rules
  body.exit_rule = $("rule").value;
  if (!$("threshold").disabled && $("threshold").value !== "") body.exit_threshold = +$("threshold").value;
  return body;
}

async function* chunks(body, signal) {
  // The chunks of a streamed reply. Throws an Error with the server's message.
  const path = body.messages ? "v1/chat/completions" : "v1/completions";
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error(await failure(response));
  let rest = "";
  for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: {")) continue;
      const chunk = JSON.parse(event.slice("data: ".length));
      if (chunk.error) throw new Error(chunk.error.message ?? String(chunk.error));
      yield chunk;
    }
  }
}

async function answer(reply, question, conversation, depth, signal) {
  const turns = $("turns");
  try {
    for await (const { choices } of chunks(bodyOf(question, conversation, depth), signal)) {
      for (const choice of choices) {
        const atEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40;
        const text = choice.delta ? (choice.delta.content ?? "") : choice.text;
        reply.content += text;
        if (choice.recurrences?.length) reply.add(choice.tokens, choice.recurrences);
        if (atEnd) turns.scrollTop = turns.scrollHeight;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") reply.stopped = true;
    else reply.fail(error.message);
  }
  reply.finish();
  if (reply.failed) return;
  conversation.push({ role: "user", content: question }, { role: "assistant", content: reply.content });
}

function titleOf(depth) {
  if (fixedDepth()) return state.settings.routed ? "depths by the router" : `R = ${depth}`;
  const decoder = $("decoder").value;
  if (decoder === "diffusion") return `R = ${depth}, diffusion`;
  const threshold = $("threshold").value || state.settings.exit_rules[$("rule").value];
  const rule = $("rule").value === "fixed" ? "" : `, ${$("rule").value} ${threshold}`;
  return `R = ${depth}${rule}${decoder === "plain" ? "" : `, ${decoder}`}`;
}

async function ask(question) {
  const sides = [[state.first, +$("depth").value]];
  if ($("compare").checked) {
    if (!state.second.length) state.second = [...state.first]; // both go on from the same conversation
    sides.push([state.second, +$("depth-b").value]);
  }
  const replies = sides.map(([, depth]) => new Reply(titleOf(depth)));
  const group = make("div", { class: "replies" }, ...replies.map((reply) => reply.element));
  $("turns").append(make("li", { class: "turn" }, make("p", { class: "question" }, question), group));
  $("turns").scrollTop = $("turns").scrollHeight;
  state.stop = new AbortController();
  busy(true);
  $("status").textContent = "The model answers.";
  await Promise.all(
    sides.map(([conversation, depth], n) => answer(replies[n], question, conversation, depth, state.stop.signal)),
  );
  if (sides.length === 1) state.second = [];
  busy(false);
  const done = replies.filter((reply) => reply.tokens.length);
  $("status").textContent = done.length ? "The model has answered." : "No reply.";
  $("reader").textContent = done.map((reply) => `${reply.title}: ${reply.numbers()}. ${reply.content}`).join("\n");
}

function busy(yes) {
  $("send").disabled = $("clear").disabled = yes;
  $("stop").disabled = !yes;
}

async function submit(event) {
  event?.preventDefault();
  const question = $("question").value;
  if (!question.trim() || $("send").disabled) return;
  try {
    await readSettingsOnce();
  } catch (error) {
    $("status").textContent = error.message;
    $("key").focus();
    return;
  }
  $("question").value = "";
  await ask(question);
}

const readSettingsOnce = async () => state.settings ?? readSettings();

// ---- counters -------------------------------------------------------------------------------------------------------

const counters = { first: null, last: null, lanes: [], at: 0, refused: null }; // refused: a key that is not asked again
const SECONDS = 60;

function parseMetrics(text) {
  // Sums over labels of our metrics, and the buckets of exit depths, which are cumulative.
  const found = { exits: new Map() };
  for (const line of text.split("\n")) {
    const [, name, labels, value] = /^loopwise:(\w+)(\{.*\})? (\S+)$/.exec(line) ?? [];
    if (!name) continue;
    if (name === "exit_depth_bucket") {
      const bound = /le="([^"]+)"/.exec(labels)[1];
      if (bound !== "+Inf") found.exits.set(+bound, +value);
    } else found[name] = (found[name] ?? 0) + +value;
  }
  return found.core_passes_total === undefined ? null : found;
}

async function poll() {
  const key = $("key").value.trim();
  if (document.visibilityState !== "visible" || key === counters.refused) return;
  let found = null;
  try {
    const response = await fetch("metrics", { headers: headers() });
    counters.refused = response.status === 401 ? key : null;
    found = response.ok ? parseMetrics(await response.text()) : null;
  } catch {
    $("live-note").textContent = "The server does not answer.";
    return;
  }
  $("counters").hidden = !found;
  if (!found) {
    const without = state.settings?.engine === "fixed" ? "engine=fixed has no lanes to count." : "The server has no counters of lanes.";
    $("live-note").textContent = counters.refused === null ? without : "The counters want the API key, too.";
    return;
  }
  const now = performance.now() / 1000;
  counters.first ??= found;
  if (counters.last) drawRates(found, counters.last, now - counters.at);
  [counters.last, counters.at] = [found, now];
  drawExits(found, counters.first);
}

function drawRates(found, last, seconds) {
  const passes = found.core_passes_total - last.core_passes_total;
  const tokens = found.exit_depth_count - last.exit_depth_count;
  const lanes = passes ? (found.lanes_per_tick_sum - last.lanes_per_tick_sum) / passes : 0;
  $("rate-tokens").textContent = (tokens / seconds).toFixed(1);
  $("rate-passes").textContent = (passes / seconds).toFixed(0);
  $("rate-lanes").textContent = lanes.toFixed(1);
  $("live-note").textContent = passes ? "The engine runs." : "The engine is idle.";
  counters.lanes = [...counters.lanes, lanes].slice(-SECONDS);
  const most = Math.max(...counters.lanes, 1);
  const height = (number) => Math.log2(1 + number); // prompts have a hundred lanes where a token has one
  const heights = Array.from({ length: SECONDS }, (_, n) => height(counters.lanes.at(n - SECONDS) ?? 0));
  const bars = heights.map((one) => bar(one, height(most)));
  $("lanes").replaceChildren(make("span", { class: "peak" }, `most ${most.toFixed(1)}`), ...bars);
  $("lanes").setAttribute("aria-label", `Mean lanes of a tick: now ${lanes.toFixed(1)}, most ${most.toFixed(1)}`);
}

function bar(value, most) {
  const made = make("div", { class: "bar" });
  made.style.height = `${(100 * value) / most}%`;
  return made;
}

function drawExits(found, first) {
  let before = 0;
  const tokens = [...found.exits].map(([depth, sum]) => {
    const upTo = sum - (first.exits.get(depth) ?? 0);
    const here = upTo - before;
    before = upTo;
    return [depth, here];
  });
  const all = before || 1;
  const most = Math.max(...tokens.map(([, number]) => number), 1);
  const each = Math.ceil(tokens.length / 16);
  const bars = tokens.map(([depth, number]) => {
    const made = coloured(bar(number, most), depth);
    made.title = `${count(depth, "recurrence")}: ${count(number, "token")}`;
    if (depth % each === 0 || depth === 1) made.append(make("span", {}, String(depth)));
    const share = `${Math.round((100 * number) / all)} %`;
    if (number && tokens.length <= 8) made.append(make("b", { class: "share" }, share));
    if (depth > state.deepest) made.style.background = "var(--bar)";
    return made;
  });
  $("exits").replaceChildren(...bars);
  const said = tokens.filter(([, number]) => number).map(([depth, number]) => `${depth}: ${number}`);
  $("exits").setAttribute("aria-label", `Tokens by recurrences: ${said.join(", ") || "none yet"}`);
}

// ---- start ----------------------------------------------------------------------------------------------------------

function start() {
  const dials = ["depth", "depth-b", "compare", "rule", "threshold", "decoder"];
  for (const id of dials) $(id).addEventListener("input", turnDials);
  dark.addEventListener("change", () => paint());
  $("rule").addEventListener("input", () => ($("threshold").value = ""));
  $("numbers").addEventListener("input", () => $("turns").classList.toggle("numbers", $("numbers").checked));
  $("key").addEventListener("change", () => readSettings().catch(() => {}));
  $("ask").addEventListener("submit", submit);
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  });
  $("stop").addEventListener("click", () => state.stop?.abort());
  $("clear").addEventListener("click", () => {
    [state.first, state.second] = [[], []];
    $("turns").replaceChildren();
    $("status").textContent = "A new conversation.";
    $("question").focus();
  });
  $("reset").addEventListener("click", () => {
    counters.first = counters.last;
    $("since").textContent = new Date().toLocaleTimeString();
    if (counters.last) drawExits(counters.last, counters.first);
  });
  readSettings().catch(() => {});
  const again = () => poll().finally(() => setTimeout(again, 1000)); // one at a time, however long a step takes
  again();
}

start();
