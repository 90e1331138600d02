// The page: a chat, and the engine that answers. All text is put in as text, never as HTML.
"use strict";

const NUM_COLOURS = 8;
const MAX_STEPS = 160; // bars kept
const STORY_MS = 1500; // a running engine's sentences change no faster: they are to be read
const RETRY_MS = 1500;
const MAX_ANSWERS = 4; // with the events and a button they are as many connections as a browser opens
const FREE = 0, CACHED = 1, SHARED = 2, FIRST_REQUEST = 3; // as engine_view.py has them

const el = (id) => document.getElementById(id);
const make = (tag, text = "", name = "") => {
  const node = document.createElement(tag);
  if (text) node.textContent = text;
  if (name) node.className = name;
  return node;
};
const count = (number) => number.toLocaleString("en");

let facts = null;
let view = null; // the last snapshot
let rates = null;
let steps = []; // {number, shares}
let messages = []; // the conversation, as the server takes it
let hovered = null; // a cell of the map
let storyAt = 0;
let isPaused = false;
let isDrawn = true;
const answers = new Set(); // AbortControllers of what is being answered

// ---------------------------------------------------------------------------------------- colours
const colourOf = new Map(); // of requests in the order in which they were heard of: neighbours differ
function colourIndex(id) {
  if (!colourOf.has(id)) {
    colourOf.set(id, (colourIndex.next = ((colourIndex.next ?? -1) + 1) % NUM_COLOURS));
    if (colourOf.size > 2000) colourOf.delete(colourOf.keys().next().value);
  }
  return colourOf.get(id);
}
const colourName = (id) => `var(--r${colourIndex(id)})`;
function theme() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(name).trim();
  const requests = [...Array(NUM_COLOURS).keys()].map((index) => get(`--r${index}`));
  return { requests, ink: get("--ink"), soft: get("--soft"), line: get("--line"), panel: get("--panel"),
    warn: get("--warn"), cached: get("--cached"), shared: get("--shared") };
}

// ---------------------------------------------------------------------------------------- the server
const key = () => sessionStorage.getItem("folovllm-key");
function headers(extra = {}) {
  return key() ? { ...extra, Authorization: `Bearer ${key()}` } : extra;
}

async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

async function watch() {
  for (;;) {
    try {
      const response = await fetch("/page/events", { headers: headers(), cache: "no-store" });
      if (response.status === 401) {
        await askForKey(key() ? await errorOf(response) : "");
        continue;
      }
      if (!response.ok) throw new Error(await errorOf(response));
      for await (const data of serverEvents(response)) take(JSON.parse(data));
    } catch { /* the server is away: said below */ }
    setState("gone");
    await new Promise((wake) => setTimeout(wake, RETRY_MS));
  }
}

function take(event) {
  if (event.type === "facts") {
    facts = event;
    steps = [];
    showFacts();
    return;
  }
  isPaused = event.is_paused;
  rates = event;
  if (event.type === "snapshot") {
    view = event;
    for (const step of event.planned.filter((plan) => plan.shares.length)) {
      const at = steps.findIndex((other) => other.number === step.number);
      if (at >= 0) steps[at] = step; else steps.push(step);
    }
    steps = steps.slice(-MAX_STEPS);
    if (event.story.length) takeStory(event);
  }
  if (isDrawn) {
    isDrawn = false;
    requestAnimationFrame(draw);
  }
}

async function control(action) {
  const response = await fetch("/page/control", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify({ action }),
  });
  if (!response.ok) el("chat-error").textContent = await errorOf(response);
}

function askForKey(error) {
  el("key-error").textContent = error;
  const dialog = el("key-dialog");
  dialog.showModal();
  return new Promise((done) => {
    el("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("folovllm-key", el("key").value);
      dialog.close();
      done();
    };
    dialog.oncancel = (event) => event.preventDefault();
  });
}

// ---------------------------------------------------------------------------------------- what it shows
function showFacts() {
  el("stage").textContent = facts.stage;
  document.title = `FoloVLLM: ${facts.stage} at work`;
  const limits = Object.entries(facts.limits).filter(([, value]) => value !== "None").map(([name, value]) => `${name} ${value}`);
  el("model").textContent = [facts.model, ...limits].join(" · ");
  el("model").title = el("model").textContent;
  const { absent } = facts;
  el("memory").hidden = Boolean(absent.memory);
  el("memory-absent").hidden = !absent.memory;
  el("memory-absent").textContent = absent.memory || "";
  el("memory-legend").hidden = Boolean(absent.memory);
  el("shared-key").hidden = Boolean(absent.blocks);
  el("cached-key").hidden = Boolean(absent.hit_rate);
  el("memory-note").textContent = absent.memory ? "" : absent.blocks || "";
  el("blocks-head").textContent = absent.blocks ? "" : "Blocks";
  el("budget-key").hidden = Boolean(absent.budget);
  el("steps-note").textContent = absent.budget || "";
  el("hits-note").textContent = absent.hit_rate || "";
  el("step-note").textContent = absent.roofline || "";
  const noPreemption = "max_num_seqs" in facts.limits && "block_size" in facts.limits ? "" :
    "Nobody has to in this stage: room is reserved for the whole of a request.";
  el("preemptions-note").textContent = noPreemption;
  for (const id of ["pause", "step"]) {
    el(id).title = facts.may_control ? "" : "This server lets nobody pause it (--page)";
  }
}

function setState(state) {
  const node = el("state");
  const words = { running: "running", paused: "paused", idle: "idle", gone: "no server" };
  if (node.dataset.state !== state) {
    node.dataset.state = state;
    node.textContent = words[state];
  }
  const mayControl = Boolean(facts && facts.may_control) && state !== "gone";
  el("pause").disabled = !mayControl;
  el("step").disabled = !(mayControl && state === "paused");
  const label = state === "paused" ? "Resume" : "Pause";
  if (!el("pause").firstChild.textContent.startsWith(label)) el("pause").firstChild.textContent = `${label} `;
  el("story").setAttribute("aria-live", state === "paused" ? "polite" : "off");
}

function draw() {
  isDrawn = true;
  const isBusy = Boolean(view && view.requests.length);
  setState(isPaused ? "paused" : isBusy ? "running" : "idle");
  const left = rates && rates.pause_left_s;
  if (!isPaused) el("pause-left").textContent = "";
  else if (left != null) el("pause-left").textContent = `goes on by itself in ${left} s`;
  drawTiles();
  if (!view) return;
  drawRequests();
  drawSteps();
  drawMemory();
}

const seconds = (s) => (s < 1 ? `${(1000 * s).toFixed(s < 0.01 ? 1 : 0)} ms` : `${s.toFixed(2)} s`);

function againstRoofline({ step_s, least_s }) {
  if (least_s == null) return "no roofline: none or several were planned in it";
  return `roofline ${seconds(least_s)}: ${Math.round((100 * least_s) / step_s)} % of what this machine can do`;
}

function drawTiles() {
  if (!rates || !facts) return;
  const set = (id, text) => { if (el(id).textContent !== text) el(id).textContent = text; };
  set("rate", count(Math.round(rates.tokens_per_s)));
  set("rate-note", "of all requests, over the last 2 s");
  set("ttft", rates.ttft_p50_s == null ? "–" : seconds(rates.ttft_p50_s));
  set("ttft-note", rates.num_ttfts ? `median of ${rates.num_ttfts}, since this page watches` : "no first token yet");
  if (facts.absent.hit_rate) set("hits", "absent");
  else {
    set("hits", rates.hit_rate == null ? "–" : `${Math.round(100 * rates.hit_rate)} %`);
    set("hits-note", "of prompt tokens looked up, since this page watches");
  }
  if (view && view.step_s != null) {
    set("step-time", seconds(view.step_s));
    if (!facts.absent.roofline) set("step-note", againstRoofline(view));
  }
  set("preemptions", el("preemptions-note").textContent.startsWith("Nobody") ? "absent" : count(rates.num_preemptions));
  if (!el("preemptions-note").textContent) set("preemptions-note", "requests that lost their place, since this page watches");
}

function takeStory(event) {
  const now = performance.now();
  if (!event.is_paused && now - storyAt < STORY_MS) return;
  storyAt = now;
  const nodes = event.story.map((sentence) => {
    const paragraph = make("div", "", sentence.startsWith("Step") ? "planned" : "came");
    const [, head, rest] = sentence.match(/^(Step \d+): (.*)$/) || [null, "", sentence];
    if (head) paragraph.append(make("h3", head));
    const list = make("ul");
    for (const clause of rest.replace(/\.$/, "").split("; ")) list.append(clauseNode(clause));
    paragraph.append(list);
    return paragraph;
  });
  el("story").replaceChildren(...nodes);
  el("story").scrollTop = 0;
}

function clauseNode(clause) {
  const node = make("li");
  const names = /\brequests? ((?:(?:, | and )?\d+(?:-\d+)?(?! more)\b)+)/g;
  let at = 0;
  for (const match of clause.matchAll(names)) {
    const start = match.index + match[0].length - match[1].length;
    node.append(clause.slice(at, start));
    for (const part of match[1].split(/(\d+(?:-\d+)?)/)) node.append(/^\d/.test(part) ? nameNode(part) : part);
    at = start + match[1].length;
  }
  node.append(clause.slice(at));
  return node;
}

function nameNode(id) {
  const node = make("b", id);
  node.style.borderBottomColor = colourName(id);
  return node;
}

function drawRequests() {
  const shares = new Map();
  const last = view.planned.length ? view.planned[view.planned.length - 1] : null;
  if (last) drawRequests.last = last;
  const shown = last || (view.requests.length ? drawRequests.last : null);
  for (const share of shown ? shown.shares : []) shares.set(share.request_id, share);
  const rows = view.requests.map((request) => {
    const row = make("tr", "", request.status);
    const name = make("td");
    const chip = make("i", "", "chip");
    chip.style.background = colourName(request.request_id);
    name.append(chip, request.request_id);
    const share = shares.get(request.request_id);
    const cache = make("td");
    const meter = make("meter");
    const total = Math.max(request.num_prompt_tokens + request.max_tokens, 1);
    meter.max = total;
    meter.value = request.num_computed_tokens;
    meter.title = `${request.num_computed_tokens} of at most ${total} tokens`;
    meter.textContent = meter.title;
    cache.append(meter);
    const blocks = request.num_blocks == null ? "" : String(request.num_blocks);
    row.append(name, make("td", doing(request, share)), cache, make("td", blocks));
    return row;
  });
  el("requests").replaceChildren(...rows);
  const running = view.requests.filter((request) => request.status === "running").length;
  const waiting = view.requests.length - running + view.num_left_out;
  const most = facts && facts.max_num_seqs ? ` of at most ${facts.max_num_seqs}` : "";
  el("requests-note").textContent = `${running}${most} run, ${waiting} wait`;
}

function doing(request, share) {
  if (request.status === "waiting") return request.num_tokens > request.num_prompt_tokens ? "gave way, waits" : "waits";
  if (request.status === "swapped") return "in host memory";
  if (!share) return "no token";
  if (share.is_decode) return "decodes 1";
  return `prompt +${share.num_tokens}`;
}

// ---------------------------------------------------------------------------------------- pictures
function canvasOf(id) {
  const canvas = el(id), ratio = window.devicePixelRatio || 1;
  const { width, height } = canvas.parentElement.getBoundingClientRect();
  const size = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== size[0]) canvas.width = size[0];
  if (canvas.height !== size[1]) canvas.height = size[1];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  const em = parseFloat(getComputedStyle(document.documentElement).fontSize);
  context.font = `${Math.round(0.72 * em)}px system-ui, "DejaVu Sans", sans-serif`;
  return { context, width, height, em };
}

function stripes(context, colour, panel, gap) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = gap * 2;
  const pen = tile.getContext("2d");
  pen.fillStyle = panel;
  pen.fillRect(0, 0, gap * 2, gap * 2);
  pen.strokeStyle = colour;
  pen.lineWidth = gap;
  for (const shift of [-gap * 2, 0, gap * 2]) {
    pen.beginPath();
    pen.moveTo(shift - gap, gap * 3);
    pen.lineTo(shift + gap * 3, -gap);
    pen.stroke();
  }
  return context.createPattern(tile, "repeat");
}

function drawSteps() {
  const { context, width, height, em } = canvasOf("steps");
  const colours = theme(), left = 2.6 * em, bottom = 1.1 * em, top = 0.6 * em;
  const bar = Math.max(4, Math.min(1.5 * em, (width - left) / 48));
  const shown = steps.slice(-Math.floor((width - left) / bar));
  const sum = (step) => step.shares.reduce((total, share) => total + share.num_tokens, 0);
  const largest = Math.max(1, ...shown.map(sum));
  const budget = facts && facts.budget;
  const isBudgetShown = budget && budget <= 4 * largest;
  const most = isBudgetShown ? Math.max(largest, budget) : largest;
  const y = (tokens) => height - bottom - (tokens / most) * (height - bottom - top);
  context.fillStyle = colours.soft;
  context.textAlign = "right";
  for (const tick of most > 1 ? [0, Math.round(most / 2), most] : [0, 1]) {
    context.fillText(count(tick), left - 0.4 * em, y(tick) + 0.25 * em);
    context.fillStyle = colours.line;
    context.fillRect(left, Math.round(y(tick)), width - left, 1);
    context.fillStyle = colours.soft;
  }
  const patterns = colours.requests.map((colour) => stripes(context, colour, colours.panel, 3));
  shown.forEach((step, index) => {
    let below = 0;
    for (const share of step.shares) {
      const colour = colourIndex(share.request_id);
      const from = y(below), to = y(below + share.num_tokens);
      context.fillStyle = share.is_decode ? colours.requests[colour] : patterns[colour];
      context.fillRect(left + index * bar + 1, to, bar - 1.5, Math.max(from - to - (from - to > 4 ? 1 : 0), 0.7));
      below += share.num_tokens;
    }
  });
  context.fillStyle = colours.soft;
  context.textAlign = "left";
  if (shown.length) {
    context.fillText(`step ${count(shown[0].number)}`, left, height - 0.1 * em);
    const last = `${count(shown[shown.length - 1].number)}`;
    const end = Math.min(left + shown.length * bar, width);
    context.textAlign = "right";
    if (end - left > 9 * em) context.fillText(last, end, height - 0.1 * em);
  }
  if (isBudgetShown) {
    context.strokeStyle = colours.warn;
    context.setLineDash([6, 4]);
    context.beginPath();
    context.moveTo(left, y(budget));
    context.lineTo(width, y(budget));
    context.stroke();
    context.setLineDash([]);
  }
  const newest = shown[shown.length - 1];
  if (!newest) return;
  const decodes = newest.shares.filter((share) => share.is_decode).length;
  const label = `Step ${newest.number}: ${sum(newest)} tokens, ${decodes} of them decodes`;
  el("steps").setAttribute("aria-label", label);
  if (facts.absent.budget) return;
  const isSampled = shown.some((step, index) => index && step.number > shown[index - 1].number + 1);
  const note = isSampled ? "; steps between those shown were not recorded (at most 10 per second are)" : "";
  el("steps-note").textContent = `${label}, budget ${count(budget)}${note}`;
}

function mapShape(number, width, height) {
  const largest = 3 * parseFloat(getComputedStyle(document.documentElement).fontSize);
  let size = Math.min(Math.round(largest), Math.floor(Math.sqrt((width * height) / Math.max(number, 1))));
  while (size > 2 && Math.floor(width / size) * Math.floor(height / size) < number) size -= 1;
  return { size, columns: Math.max(1, Math.floor(width / size)) };
}

function drawMemory() {
  const { memory } = view;
  if (!memory) return;
  const { context, width, height } = canvasOf("memory");
  const colours = theme();
  const { size, columns } = mapShape(memory.cells.length, width, height);
  const gap = size > 10 ? 2 : size > 5 ? 1 : 0.5;
  const kept = new Set(memory.kept);
  const hatch = stripes(context, colours.cached, colours.panel, 2);
  memory.cells.forEach((cell, index) => {
    const x = (index % columns) * size, y = Math.floor(index / columns) * size, side = size - gap;
    if (cell === FREE) {
      context.strokeStyle = colours.line;
      context.lineWidth = 1;
      context.strokeRect(x + 0.5, y + 0.5, Math.max(side - 1, 1), Math.max(side - 1, 1));
    } else if (cell === CACHED) {
      context.fillStyle = size > 8 ? hatch : colours.cached;
      context.fillRect(x, y, side, side);
    } else if (cell === SHARED) {
      drawShared(context, colours, memory, index, x, y, side);
    } else {
      const { request_id } = view.requests[cell - FIRST_REQUEST];
      context.fillStyle = colours.requests[colourIndex(request_id)];
      context.fillRect(x, y, side, side);
      if (side > 16) drawName(context, colours, request_id, x, y, side);
    }
    if (kept.has(index) && size > 8) {
      context.fillStyle = colours.panel;
      context.beginPath();
      context.moveTo(x + side, y);
      context.lineTo(x + side - side * 0.34, y);
      context.lineTo(x + side, y + side * 0.34);
      context.fill();
    }
  });
  describeMemory();
}

function drawShared(context, colours, memory, index, x, y, side) {
  const holders = memory.holders[index] || [];
  const shown = holders.slice(0, 4);
  context.fillStyle = colours.shared;
  context.fillRect(x, y, side, side);
  const inner = side > 8 ? 2 : 1, breadth = (side - 2 * inner) / Math.max(shown.length, 1);
  shown.forEach((holder, number) => {
    context.fillStyle = colours.requests[colourIndex(view.requests[holder].request_id)];
    context.fillRect(x + inner + number * breadth, y + inner, breadth, side - 2 * inner);
  });
}

function drawName(context, colours, id, x, y, side) {
  context.fillStyle = colours.panel;
  context.textAlign = "center";
  if (context.measureText(id).width < side - 4) context.fillText(id, x + side / 2, y + side / 2 + 4);
}

function describeMemory() {
  const { memory } = view;
  const unit = memory.unit, used = memory.num_units - memory.num_free;
  let text = `${count(used)} of ${count(memory.num_units)} ${unit}s of ${count(memory.unit_len)} tokens held`;
  if (memory.num_cached != null) {
    const free = memory.num_free - memory.num_cached;
    text += `, ${count(memory.num_cached)} cached, ${count(free)} free`;
  }
  el("memory").setAttribute("aria-label", text);
  if (memory.stride > 1) text += `; a cell stands for ${memory.stride} ${unit}s`;
  if (facts.absent.blocks) text += ` · ${facts.absent.blocks}`;
  if (hovered != null && hovered < memory.cells.length) text = describeCell(hovered);
  el("memory-note").textContent = text;
}

function describeCell(index) {
  const { memory } = view, cell = memory.cells[index];
  const first = index * memory.stride, last = Math.min(first + memory.stride, memory.num_units) - 1;
  const name = memory.stride > 1 ? `${memory.unit}s ${first} to ${last}` : `${memory.unit} ${first}`;
  if (cell === FREE) return `${name}: free`;
  if (cell === CACHED) return `${name}: nobody's, kept for later prompts`;
  const id = (holder) => view.requests[holder].request_id;
  if (cell === SHARED) return `${name}: shared by requests ${(memory.holders[index] || []).map(id).join(", ") || "(several)"}`;
  const kept = memory.kept.includes(index) ? ", found by later prompts too" : "";
  return `${name}: request ${id(cell - FIRST_REQUEST)}${kept}`;
}

// ---------------------------------------------------------------------------------------- the chat
function addMessage(text, name) {
  const node = make("div", "", `said ${name}`);
  const body = make("span", text), note = make("small");
  node.append(body);
  if (name !== "user") node.append(note);
  el("log").append(node);
  el("log").scrollTop = el("log").scrollHeight;
  return { node, body, note };
}

// One call, also for several copies: a browser opens six connections to a server and no more.
async function ask(bubbles, body, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST", signal,
    headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body),
  });
  if (!response.ok) throw new Error(await errorOf(response));
  const id = response.headers.get("x-engine-request-id");
  bubbles.forEach((bubble, index) => {
    bubble.id = bubbles.length > 1 ? `${id}-${index}` : id;
    bubble.node.style.borderLeftColor = colourName(bubble.id);
    bubble.note.textContent = `request ${bubble.id}`;
  });
  for await (const data of serverEvents(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    for (const choice of chunk.choices) extend(bubbles[choice.index], choice.delta.content || "");
    if (chunk.usage) noteUsage(bubbles, chunk.usage);
  }
}

function extend(bubble, piece) {
  if (!piece) return;
  const log = el("log"), isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  bubble.body.append(piece);
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function noteUsage(bubbles, usage) {
  const found = (usage.prompt_tokens_details || {}).cached_tokens || 0;
  const last = bubbles[bubbles.length - 1];
  const told = `${usage.prompt_tokens} prompt tokens${found ? ` (${found} found)` : ""}`;
  const all = bubbles.length > 1 ? "; together " : ": ";
  last.note.textContent += `${all}${told}, ${usage.completion_tokens} new ones`;
}

async function send() {
  const content = el("message").value.trim();
  if (!content) return;
  if (answers.size >= MAX_ANSWERS) {
    el("chat-error").textContent = `${MAX_ANSWERS} messages are being answered: a browser opens no more connections. Copies need none.`;
    return;
  }
  el("message").value = "";
  el("chat-error").textContent = "";
  addMessage(content, "user");
  messages.push({ role: "user", content });
  const own = messages, controller = new AbortController();
  answers.add(controller);
  el("stop").disabled = false;
  el("log").setAttribute("aria-busy", "true");
  const copies = Math.min(16, Math.max(1, Number(el("copies").value) || 1));
  const body = {
    messages: [...messages], stream: true, stream_options: { include_usage: true }, n: copies,
    max_tokens: Math.max(1, Number(el("max-tokens").value) || 64),
  };
  const bubbles = [...Array(copies).keys()].map(() => addMessage("", "assistant"));
  try {
    await ask(bubbles, body, controller.signal);
  } catch (error) {
    if (error.name === "AbortError") for (const bubble of bubbles) bubble.note.textContent += " · stopped";
    else el("chat-error").textContent = bubbles[0].note.textContent = error.message;
  }
  own.push({ role: "assistant", content: bubbles[0].body.textContent });
  answers.delete(controller);
  el("stop").disabled = answers.size === 0;
  if (!answers.size) el("log").setAttribute("aria-busy", "false");
}

const stop = () => { for (const controller of answers) controller.abort(); };

// ---------------------------------------------------------------------------------------- hands
el("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
el("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  if (event.key === "Escape") el("message").blur();
});
el("stop").addEventListener("click", stop);
el("fresh").addEventListener("click", () => {
  stop();
  messages = [];
  el("log").replaceChildren();
  el("message").focus();
});
el("pause").addEventListener("click", () => control(isPaused ? "resume" : "pause"));
el("step").addEventListener("click", () => control("step"));
document.addEventListener("keydown", (event) => {
  const isTyping = /^(INPUT|TEXTAREA)$/.test(event.target.tagName);
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || el("key-dialog").open) return;
  const button = { p: "pause", s: "step" }[event.key.toLowerCase()];
  if (button && !el(button).disabled) { event.preventDefault(); el(button).click(); }
  if (event.key === "/") { event.preventDefault(); el("message").focus(); }
});
el("memory").addEventListener("pointermove", (event) => {
  if (!view || !view.memory) return;
  const box = el("memory").getBoundingClientRect();
  const { size, columns } = mapShape(view.memory.cells.length, box.width, box.height);
  const column = Math.floor((event.clientX - box.left) / size);
  hovered = column < columns ? Math.floor((event.clientY - box.top) / size) * columns + column : null;
  describeMemory();
});
el("memory").addEventListener("pointerleave", () => { hovered = null; if (view && view.memory) describeMemory(); });
const redraw = () => { if (view) draw(); };
new ResizeObserver(redraw).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
watch();
