"use strict";
/* A language model in plain JavaScript: its numbers out of the page, its tokenizer, and one step of each architecture.

   A step reads one token. `step(id, position)` gives the state that the head turns into logits, and keeps what later
   positions look back at. Vectors are Float32Array, of a head after the other: H heads, G key-value heads, K wide. */

// ---------------------------------------------------------------- numbers

/** A matrix (rows, columns) of codes, each times the scale of its group of neighbouring columns. */
class Matrix {
  constructor(rows, columns, codes, scales, group = columns) {
    Object.assign(this, { rows, columns, codes, scales, group, groups: scales.length / rows, factors: null });
  }

  /** Matrix times vector. Four rows at a time, so that an element of x is read once for all four. */
  times(x) {
    const { rows, columns, codes, scales, group, groups } = this, y = new Float32Array(rows), last = rows - 1;
    if (this.factors) x = x.map((value, i) => value * this.factors[i]);
    for (let r = 0; r < rows; r += 4) {
      const r1 = Math.min(r + 1, last), r2 = Math.min(r + 2, last), r3 = Math.min(r + 3, last);
      const i0 = r * columns, i1 = r1 * columns, i2 = r2 * columns, i3 = r3 * columns;
      let y0 = 0, y1 = 0, y2 = 0, y3 = 0;
      for (let g = 0, from = 0; g < groups; g++, from += group) {
        const to = Math.min(from + group, columns);
        let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (let c = from; c < to; c++) {
          const value = x[c];
          s0 += codes[i0 + c] * value;
          s1 += codes[i1 + c] * value;
          s2 += codes[i2 + c] * value;
          s3 += codes[i3 + c] * value;
        }
        y0 += s0 * scales[r * groups + g];
        y1 += s1 * scales[r1 * groups + g];
        y2 += s2 * scales[r2 * groups + g];
        y3 += s3 * scales[r3 * groups + g];
      }
      y[r] = y0; y[r1] = y1; y[r2] = y2; y[r3] = y3;
    }
    return y;
  }

  /** A row as numbers. */
  row(r) {
    const { columns, codes, scales, group, groups, factors } = this, y = new Float32Array(columns);
    for (let c = 0; c < columns; c++) {
      y[c] = codes[r * columns + c] * scales[r * groups + Math.floor(c / group)] * (factors ? factors[c] : 1);
    }
    return y;
  }

  /** Give every row (axis 1) or every column (axis 0) the length 1, which rounding took from it. */
  normalize(axis) {
    const squares = new Float64Array(axis === 1 ? this.rows : this.columns);
    for (let r = 0; r < this.rows; r++) {
      this.row(r).forEach((value, c) => (squares[axis === 1 ? r : c] += value * value));
    }
    const inverse = squares.map((square) => 1 / Math.max(Math.sqrt(square), 1e-12));
    if (axis === 0) this.factors = inverse;
    else this.scales = this.scales.map((scale, i) => scale * inverse[Math.floor(i / this.groups)]);
  }
}

/** Vectors of one width, one for each position. */
class Rows {
  constructor(capacity, width) {
    this.width = width;
    this.data = new Float32Array(capacity * width);
  }

  set(position, vector) {
    this.data.set(vector, position * this.width);
  }
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const silu = (x) => x * sigmoid(x);
const sum = (x, y) => x.map((value, i) => value + y[i]);
const product = (x, y) => x.map((value, i) => value * y[i]);
const dot = (x, y) => x.reduce((total, value, i) => total + value * y[i], 0);

/** Consecutive parts of a vector. */
function split(x, ...widths) {
  let from = 0;
  return widths.map((width) => x.subarray(from, (from += width)));
}

function rmsNorm(x, gain, eps = 1e-5) {
  const factor = 1 / Math.sqrt(dot(x, x) / x.length + eps);
  return x.map((value, i) => value * factor * gain[i]);
}

function layerNorm(x, gain, bias = null, eps = 1e-5) {
  const mean = x.reduce((total, value) => total + value, 0) / x.length;
  const variance = x.reduce((total, value) => total + (value - mean) ** 2, 0) / x.length;
  const factor = 1 / Math.sqrt(variance + eps);
  return x.map((value, i) => (value - mean) * factor * gain[i] + (bias ? bias[i] : 0));
}

/** The vector of every head, `width` wide, made to length 1. */
function unit(x, width = x.length) {
  const y = new Float32Array(x.length);
  for (let from = 0; from < x.length; from += width) {
    const part = x.subarray(from, from + width), length = Math.max(Math.sqrt(dot(part, part)), 1e-12);
    part.forEach((value, i) => (y[from + i] = value / length));
  }
  return y;
}

/** Cosines and sines of a position, rounded to 32 bits where Python does. */
function rotary(position, width, theta = 10000) {
  const cos = new Float32Array(width / 2), sin = new Float32Array(width / 2);
  for (let i = 0; i < width / 2; i++) {
    const angle = Math.fround(position * Math.fround(theta ** Math.fround((-2 * i) / width)));
    cos[i] = Math.cos(angle);
    sin[i] = Math.sin(angle);
  }
  return { cos, sin };
}

/** Turn the pairs (i, i + K/2) of every head. */
function rotate(x, { cos, sin }) {
  const y = new Float32Array(x.length), half = cos.length;
  for (let from = 0; from < x.length; from += 2 * half) {
    for (let i = 0; i < half; i++) {
      const a = x[from + i], b = x[from + half + i];
      y[from + i] = a * cos[i] - b * sin[i];
      y[from + half + i] = b * cos[i] + a * sin[i];
    }
  }
  return y;
}

/** Softmax attention of q (H, K) to positions `from` … `to` - 1 of keys (G, K) and values (G, any width). */
function attend(q, keys, values, to, heads, kvHeads, scale, from = 0) {
  const K = q.length / heads, V = values.width / kvHeads, y = new Float32Array(heads * V), weights = new Float64Array(to);
  for (let h = 0; h < heads; h++) {
    const g = Math.floor((h * kvHeads) / heads);
    let largest = -Infinity, total = 0;
    for (let p = from; p < to; p++) {
      let score = 0;
      for (let i = 0, at = p * keys.width + g * K; i < K; i++) score += q[h * K + i] * keys.data[at + i];
      weights[p] = score * scale;
      largest = Math.max(largest, weights[p]);
    }
    for (let p = from; p < to; p++) total += weights[p] = Math.exp(weights[p] - largest);
    for (let i = 0; i < V; i++) {
      let value = 0;
      for (let p = from; p < to; p++) value += weights[p] * values.data[p * values.width + g * V + i];
      y[h * V + i] = value / total;
    }
  }
  return y;
}

// ---------------------------------------------------------------- architectures

/** What all have: `config`, `matrix(name)` and `vector(name)` of the weights, and a block of names for each layer. */
class Architecture {
  constructor(config, weights) {
    this.config = config;
    this.weights = weights;
    this.embedding = weights.matrix("embedding");
    this.layers = Array.from({ length: config.n_layers }, (_, layer) => this.layer(`blocks.${layer}.`, layer));
    this.reset();
  }

  /** Room for keys and values of every position. */
  cache(keyWidth, valueWidth = keyWidth) {
    const { seq_len } = this.config;
    return { keys: new Rows(seq_len, keyWidth), values: new Rows(seq_len, valueWidth) };
  }

  /** Forget what was read; keys and values need no forgetting, for a position is written before it is read. */
  reset() {}

  /** How many of `n` positions read can be kept; keys and values let all be. */
  keeps(n) {
    return n;
  }
}

class Llama extends Architecture {
  layer(at) {
    const { matrix, vector } = this.weights, { dim, n_heads, n_kv_heads } = this.config;
    return {
      attentionNorm: vector(at + "attention_norm.weight"), qkv: matrix(at + "attention.qkv"),
      out: matrix(at + "attention.out"), mlpNorm: vector(at + "mlp_norm.weight"),
      gateUp: matrix(at + "mlp.gate_up"), down: matrix(at + "mlp.down"),
      ...this.cache((dim / n_heads) * n_kv_heads),
    };
  }

  step(id, position) {
    const { dim, n_heads, n_kv_heads, ffn_dim, rope_theta } = this.config, K = dim / n_heads;
    const turn = rotary(position, K, rope_theta);
    let x = this.embedding.row(id);
    for (const layer of this.layers) {
      const qkv = layer.qkv.times(rmsNorm(x, layer.attentionNorm));
      const [q, k, v] = split(qkv, dim, n_kv_heads * K, n_kv_heads * K);
      layer.keys.set(position, rotate(k, turn));
      layer.values.set(position, v);
      const y = attend(rotate(q, turn), layer.keys, layer.values, position + 1, n_heads, n_kv_heads, K ** -0.5);
      x = sum(x, layer.out.times(y));
      const [gate, up] = split(layer.gateUp.times(rmsNorm(x, layer.mlpNorm)), ffn_dim, ffn_dim);
      x = sum(x, layer.down.times(product(gate.map(silu), up)));
    }
    return rmsNorm(x, this.weights.vector("norm.weight"));
  }

  head(x) {
    return (this.config.tie_embeddings ? this.embedding : this.weights.matrix("head")).times(x);
  }
}

class Nyx extends Architecture {
  layer(at) {
    const { matrix, vector } = this.weights, { head_dim, qk_norm } = this.config;
    return {
      norm: vector(at + "norm.weight"), inProj: matrix(at + "in_proj"), attnOut: matrix(at + "attn_out"),
      ffnOut: matrix(at + "ffn_out"), qGain: qk_norm && vector(at + "q_norm_weight"),
      kGain: qk_norm && vector(at + "k_norm_weight"), ...this.cache(head_dim),
    };
  }

  /** Rotation with the decay of xPos: queries shrink with their position as keys grow with theirs. */
  turns(position) {
    const { head_dim: K, xpos_scale_base, seq_len } = this.config, { cos, sin } = rotary(position, K);
    const decay = cos.map((_, i) => {
      const zeta = Math.fround((2 * i + 0.4 * K) / (1.4 * K));
      return zeta ** Math.fround((position - Math.floor(seq_len / 2)) / xpos_scale_base);
    });
    const over = decay.map((value) => 1 / value);
    return [{ cos: product(cos, decay), sin: product(sin, decay) }, { cos: product(cos, over), sin: product(sin, over) }];
  }

  step(id, position) {
    const { n_heads, head_dim: K, ffn_dim, qk_norm, qk_norm_scale, variant } = this.config;
    const scale = qk_norm && variant === "sound" ? qk_norm_scale : K ** -0.5;
    const [turnQ, turnK] = this.turns(position);
    let x = this.embedding.row(id);
    for (const layer of this.layers) {
      const inner = layer.inProj.times(layerNorm(x, layer.norm));
      let [q, k, v, value, gate] = split(inner, n_heads * K, K, K, ffn_dim, ffn_dim);
      if (qk_norm) [q, k] = [unit(q, K).map((y, i) => y * layer.qGain[i % K]), product(unit(k), layer.kGain)];
      layer.keys.set(position, rotate(k, turnK));
      layer.values.set(position, v);
      const y = attend(rotate(q, turnQ), layer.keys, layer.values, position + 1, n_heads, 1, scale);
      x = sum(x, sum(layer.attnOut.times(y), layer.ffnOut.times(product(gate.map(silu), value))));
    }
    return layerNorm(x, this.weights.vector("norm.weight"));
  }

  head(x) {
    return this.embedding.times(x);
  }
}

const ARCHITECTURES = { llama: Llama, nyx: Nyx };

// ---------------------------------------------------------------- tokenizers

const utf8 = new TextEncoder();

/** Text to ids and back: `bytes(id)` are those that an id stands for, none for special tokens. */
class Tokenizer {
  constructor({ kind, pattern, tokens, characters, starts, ends }) {
    Object.assign(this, { kind, starts, ends: new Set(ends) });
    if (kind === "bpe") {
      this.tokens = tokens; // a character of U+0000 to U+00FF for each byte
      this.ranks = new Map(tokens.map((token, id) => [token, id]));
      this.ranks.delete("");
      this.pattern = new RegExp(pattern, "gu");
    } else if (kind === "char") {
      this.characters = Array.from(characters);
      this.ids = new Map(this.characters.map((character, i) => [character, 256 + i]));
    }
  }

  encode(text) {
    if (this.kind === "ids") return text.split(/\s+/).filter(Boolean).map(Number);
    text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(utf8.encode(text)); // halves of characters: U+FFFD
    if (this.kind === "byte") return Array.from(utf8.encode(text));
    if (this.kind === "char") {
      return Array.from(text).flatMap((character) => this.ids.get(character) ?? Array.from(utf8.encode(character)));
    }
    return Array.from(text.matchAll(this.pattern)).flatMap(([piece]) => this.merge(piece));
  }

  /** Ids of a piece: as a whole if it is a token, else the pair of neighbours that was learned first becomes one. */
  merge(piece) {
    const bytes = Array.from(utf8.encode(piece), (byte) => String.fromCharCode(byte)), whole = bytes.join("");
    if (this.ranks.has(whole)) return [this.ranks.get(whole)];
    while (bytes.length > 1) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < bytes.length; i++) {
        const rank = this.ranks.get(bytes[i] + bytes[i + 1]) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      bytes.splice(at, 2, bytes[at] + bytes[at + 1]);
    }
    return bytes.map((token) => this.ranks.get(token));
  }

  bytes(id) {
    if (this.kind === "ids") return utf8.encode(`${id} `);
    if (this.kind === "bpe") return Uint8Array.from(this.tokens[id] ?? "", (character) => character.charCodeAt(0));
    if (id < 256) return Uint8Array.of(id);
    return utf8.encode(this.characters?.[id - 256] ?? "");
  }
}

// ---------------------------------------------------------------- a model out of a page

/** Bytes of base64 of what zlib compressed. */
async function unpacked(base64) {
  const piece = 2 ** 20, stream = new DecompressionStream("deflate"), writer = stream.writable.getWriter();
  const feed = async () => {
    for (let i = 0; i < base64.length; i += piece) {
      const text = atob(base64.slice(i, i + piece)), bytes = new Uint8Array(text.length);
      for (let j = 0; j < text.length; j++) bytes[j] = text.charCodeAt(j);
      await writer.write(bytes);
    }
    await writer.close();
  };
  const [buffer] = await Promise.all([new Response(stream.readable).arrayBuffer(), feed()]);
  return buffer;
}

/** A 16-bit float of IEEE 754. */
function half(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return exponent ? sign * (1 + fraction / 1024) * 2 ** (exponent - 15) : sign * fraction * 2 ** -24;
}

/** Numbers of the page, by how they are stored. */
const NUMBERS = {
  i8: (buffer) => new Int8Array(buffer),
  u4: (buffer) => new Uint8Array(buffer),
  f16: (buffer) => Float32Array.from(new Uint16Array(buffer), half),
  bf16: (buffer) => new Float32Array(Uint32Array.from(new Uint16Array(buffer), (bits) => bits << 16).buffer),
};

/** Codes (rows, columns) of pairs of nibbles, the low one first. */
function nibbles(pairs, rows, columns) {
  const codes = new Int8Array(rows * columns), width = Math.ceil(columns / 2);
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      codes[r * columns + c] = ((pairs[r * width + (c >> 1)] >> (4 * (c & 1))) & 15) - 8;
    }
  }
  return codes;
}

/** The matrices and vectors of a model, by name. */
class Weights {
  constructor(tensors, buffer, from) {
    this.matrices = new Map();
    this.vectors = new Map();
    for (const { name, type, shape, size, scales, group, unit_axis } of tensors) {
      const numbers = NUMBERS[type](buffer.slice(from, (from += size)));
      const scale = scales ? NUMBERS.f16(buffer.slice(from, (from += scales))) : null;
      const [rows, columns] = shape;
      if (shape.length !== 2) this.vectors.set(name, numbers);
      else {
        const codes = type === "u4" ? nibbles(numbers, rows, columns) : numbers;
        const matrix = new Matrix(rows, columns, codes, scale ?? new Float32Array(rows).fill(1), group ?? columns);
        if (unit_axis !== null) matrix.normalize(unit_axis);
        this.matrices.set(name.replace(/\.weight$/, ""), matrix);
      }
    }
    this.matrix = (name) => this.matrices.get(name);
    this.vector = (name) => this.vectors.get(name);
  }
}

/** Where the model's view of `length` tokens begins: of a full context the older half is dropped. */
function windowStart(length, context) {
  const older = Math.max(1, Math.floor(context / 2));
  return length <= context ? 0 : Math.ceil((length - context) / older) * older;
}

/** Let the browser draw and hear the user. */
function pause() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => (port1.close(), resolve());
    port2.postMessage(null);
  });
}

/** A model that has read some tokens. */
class Model {
  constructor({ architecture, config, tokenizer, tensors }, buffer, from) {
    this.config = config;
    this.tokenizer = new Tokenizer(tokenizer);
    this.network = new ARCHITECTURES[architecture](config, new Weights(tensors, buffer, from));
    this.read = []; // tokens that the network has read, from the start of its view
  }

  /** A model out of base64: four bytes of a length, so many of JSON, and the numbers that it lists. */
  static async open(base64) {
    const buffer = await unpacked(base64), length = new DataView(buffer).getUint32(0, true);
    const described = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    return new Model(described, buffer, 4 + length);
  }

  /** Logits of what follows `ids`; what it has read of them already is not read again. Null where it was stopped. */
  async logits(ids, signal) {
    const view = ids.slice(windowStart(ids.length, this.config.seq_len));
    let same = 0;
    while (same < view.length - 1 && view[same] === this.read[same]) same++;
    const kept = same < this.read.length ? this.network.keeps(same) : same;
    if (kept === 0) this.network.reset();
    this.read.length = kept;
    let state = null;
    for (const id of view.slice(kept)) {
      await pause();
      if (signal?.aborted) return null;
      state = this.network.step(id, this.read.length);
      this.read.push(id);
    }
    return this.network.head(state);
  }

  /** The tokens that follow `ids`, one by one, each with its probability and the likeliest others, before temperature
      and top-k: {id, probability, others: [{id, probability}]}. Ends with a token that ends a text, or at a stop. */
  async *write(ids, { temperature, topK, signal }) {
    for (ids = [...ids]; ; ) {
      const logits = await this.logits(ids, signal);
      if (logits === null) return;
      const probabilities = softmax(logits), order = likeliest(logits, Math.max(topK || 0, 9));
      const id = temperature > 0 ? drawn(logits, temperature, topK ? order.slice(0, topK) : null) : order[0];
      const others = order.slice(0, 9).map((other) => ({ id: other, probability: probabilities[other] }));
      yield { id, probability: probabilities[id], others };
      if (this.tokenizer.ends.has(id)) return;
      ids.push(id);
    }
  }
}

function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b)), weights = Float64Array.from(logits, (y) => Math.exp(y - largest));
  const total = weights.reduce((a, b) => a + b);
  return weights.map((weight) => weight / total);
}

/** The `n` ids of the largest logits, the largest first; of equal ones the smaller id. */
function likeliest(logits, n) {
  const found = [];
  logits.forEach((logit, id) => {
    if (found.length === n && logit <= logits[found[n - 1]]) return;
    let at = found.length;
    while (at > 0 && logits[found[at - 1]] < logit) at--;
    found.splice(at, 0, id);
    found.length = Math.min(found.length, n);
  });
  return found;
}

/** An id drawn at a temperature, of all or of `among`. */
function drawn(logits, temperature, among) {
  const ids = among ?? Array.from(logits.keys()), weights = softmax(Float64Array.from(ids, (id) => logits[id] / temperature));
  let left = Math.random();
  return ids[weights.findIndex((weight) => (left -= weight) < 0)] ?? ids[0];
}
