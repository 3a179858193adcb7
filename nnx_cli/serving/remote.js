"use strict";
/* A model behind the server that the page came from: it is asked for tokens as ids, with the likeliest of each. */

const LIKELIEST = 9, MARK = "token_id:"; // before an id among the tokens of an answer

class Model {
  constructor({ config, tokenizer }, headers) {
    this.config = config;
    this.tokenizer = new Tokenizer(tokenizer);
    this.headers = headers;
  }

  /** A model that is described in the page; where the server has a key, it tells that only who brings it. */
  static async open(data) {
    const described = JSON.parse(data);
    if (described) return new Model(described, {});
    for (const key = keyField(); ; ) {
      await new Promise((resolve) => key.addEventListener("change", resolve, { once: true }));
      const headers = { authorization: `Bearer ${key.value}` }, response = await fetch("/v1/page", { headers });
      if (response.ok) return new Model(await response.json(), headers);
      key.setCustomValidity("The server has another key.");
      key.reportValidity();
      key.setCustomValidity("");
    }
  }

  /** The tokens that follow `ids`, one by one. Throws what the server says where it refuses. */
  async *write(ids, { temperature, topK, count, signal }) {
    const { seq_len, max_prompt_tokens } = this.config;
    const prompt = ids.slice(windowStart(ids.length, seq_len)).slice(-max_prompt_tokens);
    const asked = { prompt, temperature, max_tokens: count, logprobs: LIKELIEST, stream: true, return_tokens_as_token_ids: true };
    const body = JSON.stringify(topK ? { ...asked, top_k: topK } : asked);
    const headers = { "content-type": "application/json", ...this.headers };
    try {
      const response = await fetch("/v1/completions", { method: "POST", headers, body, signal });
      if (!response.ok) throw new Error((await response.json()).error.message);
      for await (const { logprobs, finish_reason } of choices(response.body)) {
        for (const [i, token] of (logprobs?.tokens ?? []).entries()) {
          const others = Object.entries(logprobs.top_logprobs[i]).map(([other, logprob]) => drawn(other, logprob));
          yield { ...drawn(token, logprobs.token_logprobs[i]), others };
        }
        if (finish_reason) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      throw error instanceof TypeError ? new Error("The server does not answer.") : error;
    }
  }
}

/** A field for the key that the server asks for. */
function keyField() {
  const label = document.createElement("label"), key = document.createElement("input");
  label.textContent = "Key ";
  Object.assign(key, { id: "key", type: "password", autocomplete: "off" });
  label.append(key);
  document.querySelector(".settings").append(label);
  document.getElementById("status").textContent = "Enter the key of the server.";
  return key;
}

function drawn(token, logprob) {
  return { id: Number(token.slice(MARK.length)), probability: Math.exp(logprob) };
}

/** What the events of a stream say. */
async function* choices(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = ""; ; ) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.slice("data: ".length);
        if (data === "[DONE]") return;
        const said = JSON.parse(data);
        if (said.error) throw new Error(said.error.message);
        yield said.choices[0];
      }
    }
  } finally {
    await reader.cancel();
  }
}
