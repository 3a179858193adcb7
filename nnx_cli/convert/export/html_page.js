"use strict";
/* What the page shows. Text of the model and of the user gets into it as text content alone, never as markup. */

const part = (id) => document.getElementById(id);
const text = part("text"), status = part("status"), panel = part("panel"), primary = part("write"), goOn = part("go-on");
const HARMFUL = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]/g;
const NAMES = { " ": "space", "\n": "line break", "\t": "tab", "": "nothing" };
const LEVELS = [0.5, 0.2, 0.05, 0.01]; // probabilities at which a token gets a darker ground

let model = null; // {tokenizer, config, write}: see Model
let ids = []; // of the prompt and what follows it
let promptLength = 0; // ids of it
let written = []; // tokens after the prompt: {id, probability, others, span}
let decoder = new TextDecoder(); // of their bytes
let chosen = -1; // the token in the panel
let stopping = null; // ends the writing that is under way

/** Text with what could drive a screen or turn its direction made visible. */
function shown(words) {
  return words.replace(HARMFUL, (c) => {
    const code = c.charCodeAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

/** A token in words. */
function named(id) {
  if (model.tokenizer.ends.has(id)) return "end of the text";
  const bytes = model.tokenizer.bytes(id);
  if (bytes.length === 0) return `token ${id}`;
  try {
    const words = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    return NAMES[words] ?? `“${shown(words).replaceAll("\n", "⏎")}”`;
  } catch {
    return "part of a character: " + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ");
  }
}

const percent = (p) => `${(100 * p).toFixed(p < 0.0995 ? 2 : 1)} %`;

function made(tag, words, className = "") {
  const element = document.createElement(tag);
  element.textContent = words;
  element.className = className;
  return element;
}

function pressed(words, className, action) {
  const button = made("button", words, className);
  button.type = "button";
  button.addEventListener("click", action);
  return button;
}

function append(token) {
  const end = model.tokenizer.ends.has(token.id);
  const level = LEVELS.filter((limit) => token.probability < limit).length;
  token.span = made("span", end ? " ∎" : shown(decoder.decode(model.tokenizer.bytes(token.id), { stream: true })), `t p${level}`);
  token.span.dataset.number = written.length;
  written.push(token);
  ids.push(token.id);
  text.append(token.span);
}

/** Show a token's probability and what stood beside it. */
function choose(number) {
  if (!written.length) return;
  written[chosen]?.span.classList.remove("chosen");
  chosen = number = Math.min(Math.max(number, 0), written.length - 1);
  const { id, probability, others, span } = written[chosen];
  span.classList.add("chosen");
  span.scrollIntoView({ block: "nearest" });
  const list = made("ul", "");
  for (const other of others) {
    const item = made("li", ""), button = pressed(`${named(other.id)} ${percent(other.probability)}`, "quiet", () => take(number, other));
    if (other.id === id) button.setAttribute("aria-current", "true");
    item.append(button);
    list.append(item);
  }
  const head = made("div", ""), before = pressed("‹", "step", () => choose(chosen - 1)), after = pressed("›", "step", () => choose(chosen + 1));
  before.setAttribute("aria-label", "Token before");
  after.setAttribute("aria-label", "Token after");
  const said = `Token ${number + 1} of ${written.length}: ${named(id)}, ${percent(probability)}. Go on with:`;
  head.append(before, made("p", said), after);
  const focused = panel.contains(document.activeElement) ? document.activeElement.textContent : null;
  panel.replaceChildren(head, list);
  panel.hidden = false;
  [before, after].find((button) => button.textContent === focused)?.focus(); // where the user went on from
}

/** Forget the tokens from a number on. */
function cut(number) {
  for (const { span } of written.splice(number)) span.remove();
  ids.length = promptLength + number;
  decoder = new TextDecoder();
  for (const token of written) token.span.textContent = shown(decoder.decode(model.tokenizer.bytes(token.id), { stream: true }));
  chosen = -1;
  panel.hidden = true;
}

/** Put another token in the place of one, and go on from there. */
async function take(number, { id, probability }) {
  if (stopping) return;
  const { others } = written[number];
  cut(number);
  append({ id, probability, others });
  primary.focus();
  if (!model.tokenizer.ends.has(id)) await write();
}

/** Begin with the prompt. */
function begin() {
  const prompt = part("prompt").value;
  cut(0);
  ids = model.tokenizer.encode(prompt);
  if (!ids.every((id) => Number.isInteger(id) && id >= 0 && id < model.config.vocab_size)) {
    status.textContent = `This model has no tokenizer: write ids below ${model.config.vocab_size}, such as 1 2 3.`;
    return false;
  }
  text.replaceChildren(made("span", shown(prompt), "prompt"));
  if (!ids.length) ids = [...model.tokenizer.starts];
  promptLength = ids.length;
  return true;
}

/** A setting within its bounds. */
function setting(id) {
  const field = part(id), value = Number(field.value);
  const within = Math.min(Math.max(Number.isFinite(value) ? value : Number(field.defaultValue), field.min), field.max);
  field.value = within;
  return within;
}

/** Write until enough tokens are there, a text ends, or somebody stops it. */
async function write() {
  const n = setting("count"), { seq_len } = model.config;
  const note = ids.length > seq_len ? ` Of a text this long the model sees the last ${seq_len} tokens at most.` : "";
  const settings = { temperature: setting("temperature"), topK: setting("top-k") };
  stopping = new AbortController();
  primary.textContent = "Stop";
  goOn.disabled = true;
  status.textContent = "Writing…" + note;
  text.setAttribute("aria-busy", "true");
  let count = 0, started = 0;
  for await (const token of model.write(ids, { ...settings, signal: stopping.signal })) {
    append(token);
    if (count++ === 0) started = performance.now();
    if (count >= n || stopping.signal.aborted) break;
  }
  const speed = count > 1 ? `, ${Math.round((count - 1) / ((performance.now() - started) / 1000))} a second` : "";
  const ended = model.tokenizer.ends.has(ids.at(-1));
  status.textContent = `${count === 1 ? "1 token" : `${count} tokens`}${speed}.` + (ended ? " The text ends here." : "") + note;
  text.setAttribute("aria-busy", "false");
  stopping = null;
  primary.textContent = "Write";
  goOn.disabled = ended;
}

part("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (stopping) stopping.abort();
  else if (model && begin()) write();
});
goOn.addEventListener("click", () => {
  primary.focus();
  if (!stopping) write();
});
part("temperature").addEventListener("input", ({ target }) => (part("shown-temperature").textContent = Number(target.value).toFixed(2)));
part("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) part("form").requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stopping?.abort());
text.addEventListener("click", ({ target }) => target.dataset.number && choose(Number(target.dataset.number)));
text.addEventListener("keydown", (event) => {
  const to = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: written.length - 1 }[event.key];
  if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  choose(to);
});

const opened = Model.open(part("weights").textContent).then(
  (found) => {
    model = found;
    part("weights").remove(); // the text of the weights: they are numbers by now
    primary.disabled = false;
    status.textContent = "Ready.";
    return found;
  },
  (error) => {
    status.textContent = `This browser cannot open the model: ${error.message}. Firefox 113, Chrome 111, Safari 16.4 and later can.`;
    throw error;
  },
);
