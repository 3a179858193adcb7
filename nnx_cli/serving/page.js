"use strict";

const part = (name) => document.getElementById(name);
const messages = []; // of a conversation, where the model has learned those
let isChat = false;
let running = null; // what ends the answer that is being written

function say(words) {
  part("state").textContent = words;
}

function setBusy(busy) {
  part("write").disabled = busy;
  part("stop").disabled = !busy;
  part("text").readOnly = busy && !isChat;
}

/** Ask, and hand every event of the answer to `take`. */
async function ask(path, asked, take) {
  const headers = { "content-type": "application/json" };
  if (part("key").value) headers.authorization = "Bearer " + part("key").value;
  const settings = {
    temperature: Number(part("temperature").value),
    max_tokens: Number(part("tokens").value),
    stream: true,
  };
  running = new AbortController();
  const response = await fetch(path, {
    method: "POST",
    headers,
    body: JSON.stringify({ ...asked, ...settings }),
    signal: running.signal,
  });
  if (response.status === 401) part("locked").hidden = false;
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") continue; // and read to the end
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      take(found.choices[0]);
    }
  }
}

function shown(role, text) {
  const box = document.createElement("div");
  box.className = role;
  box.textContent = text;
  part("log").append(box);
  return box;
}

async function goOn() {
  const text = part("text");
  await ask("/v1/completions", { prompt: text.value }, (choice) => {
    text.value += choice.text;
    text.scrollTop = text.scrollHeight;
  });
}

async function reply() {
  messages.push({ role: "user", content: part("text").value });
  shown("user", part("text").value);
  part("text").value = "";
  const box = shown("assistant", "");
  try {
    await ask("/v1/chat/completions", { messages }, (choice) => {
      box.textContent += choice.delta.content || "";
    });
  } finally {
    messages.push({ role: "assistant", content: box.textContent });
  }
}

part("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setBusy(true);
  say("writing");
  try {
    await (isChat ? reply() : goOn());
    say("");
  } catch (error) {
    say(error.name === "AbortError" ? "stopped" : error.message);
  }
  setBusy(false);
});

part("stop").addEventListener("click", () => running && running.abort());

fetch("/health")
  .then((response) => response.json())
  .then((health) => {
    part("model").textContent = health.model;
    document.title = health.model;
    isChat = health.chat;
    if (isChat) {
      part("about").textContent = "It answers.";
      part("asked").textContent = "Message";
      part("text").rows = 3;
      part("write").textContent = "Send";
    }
  })
  .catch(() => say("the server does not answer"));
