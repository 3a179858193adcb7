"use strict";
/* What the page shows. Text of the model and of the user gets into it as text content alone, never as markup.

   Who computes is the class Model of another script. `Model.open(data)` promises one, with `tokenizer`, `config`
   (vocab_size and seq_len) and `write(ids, {temperature, topK, count, signal})`: the tokens that follow the ids one by
   one, up to `count` or more, each with its probability and the likeliest others, {id, probability, others: [{id,
   probability}]}. It ends behind a token that ends a text, and where the signal says so. */

const part = (id) => document.getElementById(id);
const text = part("text"), status = part("status"), panel = part("panel"), primary = part("write"), goOn = part("go-on");
const anew = part("anew"), prompt = part("prompt"), isChat = document.querySelector("main.chat") !== null;
const HARMFUL = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]/g;
const NAMES = { " ": "space", "\n": "line break", "\t": "tab", "": "nothing" };
const LEVELS = [0.5, 0.2, 0.05, 0.01]; // probabilities at which a token gets a darker ground
const WRITE = primary.textContent, HERE = isChat ? "answer" : "text";

let model = null;
let turns = []; // what was asked, and where the answer goes: {asked, ids, place, elements, decoder}; of a text it is one
let written = []; // tokens of all turns: {turn, id, probability, others, span}
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
  if (model.tokenizer.ends.has(id)) return `end of the ${HERE}`;
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

/** The text of a token, behind those before it in its turn. */
function heard({ turn, id }) {
  if (model.tokenizer.ends.has(id)) return " ∎";
  return shown(turn.decoder.decode(model.tokenizer.bytes(id), { stream: true }));
}

function append(turn, { id, probability, others }) {
  const level = LEVELS.filter((limit) => probability < limit).length;
  const token = { turn, id, probability, others, span: made("span", "", `t p${level}`) };
  token.span.textContent = heard(token);
  token.span.dataset.number = written.length;
  written.push(token);
  turn.place.append(token.span);
  if (isChat) text.scrollTop = text.scrollHeight;
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

/** Forget the tokens from a number on, and the turns behind the last that stays. */
function cut(number, last) {
  for (const { span } of written.splice(number)) span.remove();
  for (const { elements } of turns.splice(turns.indexOf(last) + 1)) elements.forEach((element) => element.remove());
  chosen = -1;
  panel.hidden = true;
  if (!last) return;
  last.decoder = new TextDecoder();
  for (const token of written) if (token.turn === last) token.span.textContent = heard(token);
}

/** Put another token in the place of one, and go on from there. */
async function take(number, other) {
  if (stopping) return;
  const { turn, others } = written[number];
  cut(number, turn);
  append(turn, { ...other, others });
  primary.focus();
  if (!model.tokenizer.ends.has(other.id)) await write();
  else goOn.disabled = true;
}

/** Begin a text with the prompt, or have a conversation go on with it. */
function begin() {
  const asked = prompt.value, { tokenizer, config } = model;
  if (isChat && !asked.trim()) return false;
  const ids = isChat ? tokenizer.said(asked) : tokenizer.encode(asked);
  if (!ids.every((id) => Number.isInteger(id) && id >= 0 && id < config.vocab_size)) {
    status.textContent = `This model has no tokenizer: write ids below ${config.vocab_size}, such as 1 2 3.`;
    return false;
  }
  const turn = { asked, ids, place: text, decoder: new TextDecoder(), elements: [made("span", shown(asked), "prompt")] };
  if (isChat) {
    turn.place = made("div", "", "answer");
    turn.elements = [made("div", shown(asked), "prompt"), turn.place];
    turn.elements.forEach((element, i) => element.setAttribute("aria-label", i ? "The model" : "You"));
    turn.elements.forEach((element) => element.setAttribute("role", "group"));
    prompt.value = "";
  } else {
    cut(0);
    if (!ids.length) ids.push(...tokenizer.starts);
  }
  turns.push(turn);
  text.append(...turn.elements);
  return true;
}

/** Ids of everything so far, and how many turns are left out of them: a conversation leaves room for an answer. */
function context(count) {
  const { tokenizer, config } = model, most = config.seq_len - Math.min(count, Math.floor(config.seq_len / 2));
  const parts = turns.map((turn, number) => {
    const ids = [...turn.ids, ...written.filter((token) => token.turn === turn).map(({ id }) => id)];
    if (number === turns.length - 1) return ids;
    return [...(tokenizer.ends.has(ids.at(-1)) ? ids.slice(0, -1) : ids), tokenizer.template.end];
  });
  const length = () => parts.reduce((total, ids) => total + ids.length, isChat ? 1 : 0);
  while (parts.length > 1 && length() > most) parts.shift();
  return { ids: [...(isChat ? [tokenizer.template.begin] : []), ...parts.flat()], left: turns.length - parts.length };
}

/** A setting within its bounds. */
function setting(id) {
  const field = part(id), value = Number(field.value);
  const within = Math.min(Math.max(Number.isFinite(value) ? value : Number(field.defaultValue), field.min), field.max);
  field.value = within;
  return within;
}

/** What of the text so far the model does not see, in a sentence. */
function unseen(ids, left) {
  const { seq_len } = model.config;
  const kept = turns.length - left, messages = kept === 1 ? "your last message" : `the last ${kept} of your messages`;
  if (left) return ` Of a conversation this long the model sees ${messages}.`;
  return ids.length > seq_len ? ` Of a text this long the model sees the last ${seq_len} tokens at most.` : "";
}

/** Write until enough tokens are there, a text ends, or somebody stops it. */
async function write() {
  const turn = turns.at(-1), count = setting("count"), { ids, left } = context(count), note = unseen(ids, left);
  const settings = { temperature: setting("temperature"), topK: setting("top-k"), count };
  stopping = new AbortController();
  primary.textContent = "Stop";
  goOn.disabled = anew.disabled = true;
  status.textContent = "Writing…" + note;
  text.setAttribute("aria-busy", "true");
  const before = written.length;
  let started = 0, failed = "";
  try {
    for await (const token of model.write(ids, { ...settings, signal: stopping.signal })) {
      append(turn, token);
      if (written.length === before + 1) started = performance.now();
      if (written.length >= before + count || stopping.signal.aborted) break;
    }
  } catch (error) {
    failed = `${error.message} `;
  }
  const n = written.length - before, seconds = (performance.now() - started) / 1000;
  const speed = n > 1 ? `, ${Math.round((n - 1) / seconds)} a second` : "";
  const ended = written.length > 0 && model.tokenizer.ends.has(written.at(-1).id);
  const end = n && ended ? ` The ${HERE} ends here.` : "";
  const told = failed && !n ? failed : `${failed}${n === 1 ? "1 token" : `${n} tokens`}${speed}.`;
  status.textContent = told + end + note;
  text.setAttribute("aria-busy", "false");
  stopping = null;
  primary.textContent = WRITE;
  if (isChat && written.at(-1)?.turn !== turn) takeBack(turn);
  goOn.disabled = ended || !turns.length;
  anew.disabled = !turns.length;
}

/** Take a message back that has no answer. */
function takeBack(turn) {
  cut(written.length, turns.at(-2));
  prompt.value ||= turn.asked;
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
anew.addEventListener("click", () => {
  cut(0);
  goOn.disabled = anew.disabled = true;
  status.textContent = "Ready.";
  prompt.focus();
});
part("temperature").addEventListener("input", ({ target }) => (part("shown-temperature").textContent = Number(target.value).toFixed(2)));
prompt.addEventListener("keydown", (event) => {
  const sends = event.ctrlKey || event.metaKey || (isChat && !event.shiftKey && !event.isComposing);
  if (event.key !== "Enter" || !sends) return;
  event.preventDefault();
  if (!stopping) part("form").requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stopping?.abort());
text.addEventListener("click", ({ target }) => target.dataset.number && choose(Number(target.dataset.number)));
text.addEventListener("keydown", (event) => {
  const to = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: written.length - 1 }[event.key];
  if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  choose(to);
});

if (isChat) part("form").before(part("output")); // a conversation grows above the line that one writes on
const opened = Model.open(part("model").textContent).then(
  (found) => {
    model = found;
    part("model").remove(); // its numbers are there by now
    primary.disabled = false;
    status.textContent = "Ready.";
    return found;
  },
  (error) => {
    status.textContent = `This browser cannot open the model: ${error.message}. Firefox 113, Chrome 111, Safari 16.4 and later can.`;
    throw error;
  },
);
