"use strict";
/* A language model in plain JavaScript: its numbers out of the page, and one step of each architecture.

   A step reads one token. `step(id, position)` gives the state that the head turns into logits, and keeps what later
   positions look back at. Vectors are Float32Array, of a head after the other: H heads, G key-value heads, K wide. */

// ---------------------------------------------------------------- numbers

/** A matrix (rows, columns) of codes, each times the scale of its group of neighbouring columns.

    A word holds the codes of four rows in one column, the first row's in its lowest byte, as code + 128. `times` shifts
    words without masking: w >>> 8 has the three upper bytes, so a row's sum is that of its shift less 256 times the
    next one's. This takes a third less time than codes one by one. */
class Matrix {
  constructor(rows, columns, codes, scales, group = columns) {
    const padded = 4 * Math.ceil(rows / 4), groups = scales.length / rows, bytes = new Uint8Array(padded * columns + 4);
    for (let r = 0, from = 0; r < rows; r++, from += columns) {
      for (let c = 0, at = 4 * (r >> 2) * columns + (r & 3); c < columns; c++, at += 4) bytes[at] = codes[from + c] + 128;
    }
    Object.assign(this, { rows, columns, words: new Uint32Array(bytes.buffer), group, groups, factors: null });
    this.scales = new Float32Array(padded * groups);
    this.scales.set(scales);
    this.values = new Float64Array(columns); // a vector that it is multiplied with
    this.offsets = new Float64Array(groups);
  }

  /** Matrix times vector. Two columns at a time. */
  times(x) {
    const { rows, columns, words, scales, group, groups, factors, values, offsets } = this;
    const y = new Float32Array(scales.length / groups);
    for (let g = 0, c = 0; g < groups; g++) {
      offsets[g] = 0;
      for (const to = Math.min(c + group, columns); c < to; c++) {
        values[c] = factors ? x[c] * factors[c] : x[c];
        offsets[g] += 128 * values[c];
      }
    }
    for (let r = 0; r < rows; r += 4) {
      const start = (r >> 2) * columns;
      let y0 = 0, y1 = 0, y2 = 0, y3 = 0;
      for (let g = 0, from = 0, i = r * groups; g < groups; g++, from += group, i++) {
        const to = Math.min(from + group, columns), offset = offsets[g];
        let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (let c = from; c < to; c += 2) {
          const w = words[start + c], x0 = values[c], v = words[start + c + 1], x1 = c + 1 < to ? values[c + 1] : 0;
          s0 += w * x0 + v * x1;
          s1 += (w >>> 8) * x0 + (v >>> 8) * x1;
          s2 += (w >>> 16) * x0 + (v >>> 16) * x1;
          s3 += (w >>> 24) * x0 + (v >>> 24) * x1;
        }
        y0 += (s0 - 256 * s1 - offset) * scales[i];
        y1 += (s1 - 256 * s2 - offset) * scales[i + groups];
        y2 += (s2 - 256 * s3 - offset) * scales[i + 2 * groups];
        y3 += (s3 - offset) * scales[i + 3 * groups];
      }
      y[r] = y0; y[r + 1] = y1; y[r + 2] = y2; y[r + 3] = y3;
    }
    return y.subarray(0, rows);
  }

  /** A row as numbers. */
  row(r) {
    const { columns, words, scales, group, groups, factors } = this, y = new Float32Array(columns);
    for (let c = 0, at = (r >> 2) * columns, shift = 8 * (r & 3); c < columns; c++) {
      const code = ((words[at + c] >>> shift) & 255) - 128;
      y[c] = code * scales[r * groups + Math.floor(c / group)] * (factors ? factors[c] : 1);
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

/** A matrix of numbers. */
class FloatMatrix {
  constructor(rows, columns, numbers) {
    Object.assign(this, { rows, columns, numbers });
  }

  times(x) {
    return dots(x, this.numbers, 0, this.columns, this.rows, new Float32Array(this.rows));
  }

  row(r) {
    return this.numbers.slice(r * this.columns, (r + 1) * this.columns);
  }
}

/** The sum of a matrix's rows, each times its share. */
function mixture(matrix, shares) {
  return shares.reduce((y, share, r) => sum(y, matrix.row(r).map((value) => value * share)), new Float32Array(matrix.columns));
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

const ONCE = [1];
const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const silu = (x) => x * sigmoid(x);
const gelu = (x) => (x / 2) * (1 + erf(x / Math.SQRT2));
const softXor = (x, y) => x.map((value, i) => (value + y[i]) / 2 - value * y[i]);

// Loops where most elements pass: array methods, which call a function for each, take ten times as long.

function sum(x, y) {
  const z = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) z[i] = x[i] + y[i];
  return z;
}

/** y += x */
function add(y, x) {
  for (let i = 0; i < y.length; i++) y[i] += x[i];
  return y;
}

function product(x, y) {
  const z = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) z[i] = x[i] * y[i];
  return z;
}

/** silu(gate) * x */
function gated(gate, x) {
  const z = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) z[i] = silu(gate[i]) * x[i];
  return z;
}

function dot(x, y) {
  let total = 0;
  for (let i = 0; i < x.length; i++) total += x[i] * y[i];
  return total;
}

/** Dot products of x with `count` vectors of `data`, `stride` apart from `from` on; to y. Four at a time. */
function dots(x, data, from, stride, count, y) {
  const row = (r) => Math.min(r, count - 1), at = (r) => from + row(r) * stride;
  for (let r = 0; r < count; r += 4) {
    const i0 = at(r), i1 = at(r + 1), i2 = at(r + 2), i3 = at(r + 3);
    let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (let c = 0; c < x.length; c++) {
      const value = x[c];
      s0 += data[i0 + c] * value;
      s1 += data[i1 + c] * value;
      s2 += data[i2 + c] * value;
      s3 += data[i3 + c] * value;
    }
    y[r] = s0; y[row(r + 1)] = s1; y[row(r + 2)] = s2; y[row(r + 3)] = s3;
  }
  return y;
}

/** The error function, 1.5e-7 off at most: Abramowitz and Stegun 7.1.26. */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

/** The activation of Tape: odd, of slope 1 at 0, with limits of 0.2014. */
function saturate(x) {
  const decay = Math.exp(-Math.abs(x)), log = Math.log(1 + (2 * (1 - decay)) / (1 + decay));
  const half = log / Math.sqrt(1 + 24 * log * log) / 2;
  return Math.sign(x) * Math.log((1 + half) / (1 - half));
}

let curve = null; // `saturate` of 0 to 16, where it has its limit, in steps of 2^-12: 4e-8 off at most between them

/** `saturate` of every element, in its place. */
function saturated(x) {
  const steps = (curve ??= Float32Array.from({ length: 2 ** 16 + 2 }, (_, i) => saturate(i / 4096)));
  for (let i = 0; i < x.length; i++) {
    const at = Math.min(Math.abs(x[i]) * 4096, 2 ** 16), j = Math.floor(at);
    const y = steps[j] + (at - j) * (steps[j + 1] - steps[j]);
    x[i] = x[i] < 0 ? -y : y;
  }
  return x;
}

/** Consecutive parts of a vector. */
function split(x, ...widths) {
  let from = 0;
  return widths.map((width) => x.subarray(from, (from += width)));
}

function rmsNorm(x, gain, eps = 1e-5) {
  const factor = 1 / Math.sqrt(dot(x, x) / x.length + eps), y = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) y[i] = x[i] * factor * gain[i];
  return y;
}

function layerNorm(x, gain, bias = null, eps = 1e-5) {
  const n = x.length, y = new Float32Array(n);
  let mean = 0, variance = 0;
  for (let i = 0; i < n; i++) mean += x[i] / n;
  for (let i = 0; i < n; i++) variance += (x[i] - mean) ** 2 / n;
  const factor = 1 / Math.sqrt(variance + eps);
  for (let i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * gain[i] + (bias ? bias[i] : 0);
  return y;
}

/** The vector of every head, `width` wide, made to length 1. */
function unit(x, width = x.length) {
  const y = new Float32Array(x.length);
  for (let from = 0; from < x.length; from += width) {
    const part = x.subarray(from, from + width), length = Math.max(Math.sqrt(dot(part, part)), 1e-12);
    for (let i = 0; i < width; i++) y[from + i] = part[i] / length;
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

/** Add the sinusoid of a position, and turn pairs of neighbours by its angles. */
function placed(x, { cos, sin }) {
  return x.map((_, i) => {
    const j = i >> 1, even = x[2 * j] + sin[j], odd = x[2 * j + 1] + cos[j];
    return i % 2 ? odd * cos[j] + even * sin[j] : even * cos[j] - odd * sin[j];
  });
}

/** Softmax attention of q (H, K) to rows `from` … `to` - 1 of keys (G, K) and values (G, any width). Row p counts as
    counts[p % counts.length] rows do. */
function attend(q, keys, values, to, heads, kvHeads, scale, from = 0, counts = ONCE) {
  const K = q.length / heads, V = values.width / kvHeads, n = to - from, y = new Float32Array(heads * V);
  const weights = new Float64Array(n), read = new Float64Array(V), { width, data } = values;
  for (let h = 0; h < heads; h++) {
    const g = Math.floor((h * kvHeads) / heads);
    dots(q.subarray(h * K, (h + 1) * K), keys.data, from * keys.width + g * K, keys.width, n, weights);
    let largest = -Infinity, total = 0;
    for (let p = 0; p < n; p++) largest = Math.max(largest, weights[p]);
    for (let p = 0; p < n; p++) {
      weights[p] = Math.exp((weights[p] - largest) * scale) * counts[(from + p) % counts.length];
      total += weights[p];
    }
    read.fill(0);
    const at = (p) => (from + Math.min(p, n - 1)) * width + g * V, weight = (p) => (p < n ? weights[p] : 0);
    for (let p = 0; p < n; p += 4) {
      const i0 = at(p), i1 = at(p + 1), i2 = at(p + 2), i3 = at(p + 3);
      const w0 = weights[p], w1 = weight(p + 1), w2 = weight(p + 2), w3 = weight(p + 3);
      for (let i = 0; i < V; i++) read[i] += w0 * data[i0 + i] + w1 * data[i1 + i] + w2 * data[i2 + i] + w3 * data[i3 + i];
    }
    for (let i = 0; i < V; i++) y[h * V + i] = read[i] / total;
  }
  return y;
}

// ---------------------------------------------------------------- architectures

const ARCHITECTURES = {}; // of which a page has its own alone

/** What all have: `config`, `matrix(name)` and `vector(name)` of the weights, and a block of names for each layer. */
class Architecture {
  constructor(config, weights) {
    this.config = config;
    this.weights = weights;
    this.embedding = weights.matrix("embedding");
    this.layers = Array.from({ length: this.depth() }, (_, layer) => this.layer(`blocks.${layer}.`, layer));
    this.reset();
  }

  /** How many layers there are. */
  depth() {
    return this.config.n_layers;
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

ARCHITECTURES.llama = class extends Architecture {
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
      x = sum(x, layer.down.times(gated(gate, up)));
    }
    return rmsNorm(x, this.weights.vector("norm.weight"));
  }

  head(x) {
    return (this.config.tie_embeddings ? this.embedding : this.weights.matrix("head")).times(x);
  }
};

ARCHITECTURES.nyx = class extends Architecture {
  layer(at) {
    const { matrix, vector } = this.weights, { head_dim, qk_norm } = this.config;
    return {
      norm: vector(at + "norm.weight"), inProj: matrix(at + "in_proj"), attnOut: matrix(at + "attn_out"),
      ffnOut: matrix(at + "ffn_out"), qGain: qk_norm && vector(at + "q_norm_weight"),
      kGain: qk_norm && vector(at + "k_norm_weight"), ...this.cache(head_dim),
    };
  }

  /** Rotation with the decay of xPos, if there is one: queries shrink with their position as keys grow with theirs. */
  turns(position) {
    const { head_dim: K, xpos, xpos_scale_base, seq_len } = this.config, { cos, sin } = rotary(position, K);
    if (!xpos) return [{ cos, sin }, { cos, sin }];
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
      x = sum(x, sum(layer.attnOut.times(y), layer.ffnOut.times(gated(gate, value))));
    }
    return layerNorm(x, this.weights.vector("norm.weight"));
  }

  head(x) {
    return this.embedding.times(x);
  }
};

ARCHITECTURES.ngpt = class extends Architecture {
  layer(at, layer) {
    const { matrix } = this.weights, { n_heads, head_dim, dim } = this.config;
    return {
      qkv: matrix(at + "attention.qkv"), out: matrix(at + "attention.out"),
      hiddenGate: matrix(at + "mlp.hidden_gate"), down: matrix(at + "mlp.down"),
      sQk: this.scale(at + "attention.s_qk", layer), sHidden: this.scale(at + "mlp.s_hidden", layer),
      sGate: this.scale(at + "mlp.s_gate", layer).map((value) => value * dim ** 0.5),
      alphaAttn: this.scale(at + "alpha_attn", layer), alphaMlp: this.scale(at + "alpha_mlp", layer),
      ...this.cache(n_heads * head_dim),
    };
  }

  /** A vector as it is used: stored as other numbers, so that it learns more slowly. */
  scale(name, layer = 0) {
    const [init, scale] = ["init", "scale"].map((what) => {
      const value = this.config[`${name.split(".").at(-1)}_${what}`];
      return Array.isArray(value) ? value[layer] : value;
    });
    return this.weights.vector(name + ".weight").map((value) => value * (init / scale));
  }

  step(id, position) {
    const { n_heads, head_dim: K, ffn_dim, qk_norm, value_residual } = this.config, inner = n_heads * K;
    const turn = rotary(position, K), towards = (x, y, alpha) => {
      const aim = unit(y);
      for (let i = 0; i < aim.length; i++) aim[i] = x[i] + alpha[i] * (aim[i] - x[i]);
      return unit(aim);
    };
    let x = this.embedding.row(id), firstV = null;
    for (const layer of this.layers) {
      let [q, k, v] = split(layer.qkv.times(x), inner, inner, inner);
      firstV ??= v;
      if (value_residual) v = v.map((value, i) => (value + firstV[i]) / 2);
      if (qk_norm) [q, k] = [unit(q, K), unit(k, K)];
      layer.keys.set(position, rotate(k, turn));
      layer.values.set(position, v);
      const asked = product(rotate(q, turn), layer.sQk);
      const y = attend(asked, layer.keys, layer.values, position + 1, n_heads, n_heads, K ** 0.5);
      x = towards(x, layer.out.times(y), layer.alphaAttn);
      const [hidden, gate] = split(layer.hiddenGate.times(x), ffn_dim, ffn_dim);
      x = towards(x, layer.down.times(gated(product(gate, layer.sGate), product(hidden, layer.sHidden))), layer.alphaMlp);
    }
    return x;
  }

  head(x) {
    const matrix = this.config.tie_embeddings ? this.embedding : this.weights.matrix("head.proj");
    return product(matrix.times(x), this.scale("head.s_logit"));
  }
};

ARCHITECTURES.n4 = class extends Architecture {
  layer(at) {
    const { dim, n_heads, n_kv_heads } = this.config, width = (dim / n_heads) * n_kv_heads;
    return {
      attentionNorm: this.squash(at + "attention_norm"), qkvg: this.projection(at + "attention.qkvg"),
      out: this.projection(at + "attention.out"), attentionOutNorm: this.squash(at + "attention_out_norm"),
      mlpNorm: this.squash(at + "mlp_norm"), up: this.projection(at + "mlp.up"), down: this.projection(at + "mlp.down"),
      mlpOutNorm: this.squash(at + "mlp_out_norm"), sums: new Float64Array(width), ...this.cache(width),
    };
  }

  projection(name) {
    if (!this.config.bias) return (x) => this.weights.matrix(name).times(x);
    return (x) => add(this.weights.matrix(name + ".linear").times(x), this.weights.vector(name + ".bias"));
  }

  /** tanh in the place of a norm. */
  squash(name) {
    const gain = this.weights.vector(name + ".weight"), bias = this.weights.vector(name + ".bias");
    const slope = this.weights.vector(name + ".alpha")?.[0] ?? 1;
    return (x) => {
      const y = new Float32Array(x.length);
      for (let i = 0; i < x.length; i++) y[i] = gain[i] * Math.tanh(slope * x[i]) + (bias ? bias[i] : 0);
      return y;
    };
  }

  reset() {
    for (const layer of this.layers) layer.sums.fill(0);
  }

  keeps() {
    return 0; // sums go on from the last position alone
  }

  step(id, position) {
    const { dim, n_heads, n_kv_heads, ffn_dim, head_scale } = this.config, K = dim / n_heads, G = n_kv_heads;
    const count = position + 1, first = Math.max(0, count - (this.config.window ?? count));
    let x = this.embedding.row(id);
    for (const layer of this.layers) {
      const [q, k, v, gate] = split(layer.qkvg(layer.attentionNorm(x)), dim, G * K, G * K, G);
      k.forEach((value, i) => (layer.sums[i] += count * Math.tanh(gate[Math.floor(i / K)]) * value));
      layer.keys.set(position, layer.sums.map((value) => value / count ** 2));
      layer.values.set(position, v);
      const y = attend(q, layer.keys, layer.values, count, n_heads, G, (head_scale ? K : dim) ** -0.5, first);
      x = sum(x, layer.attentionOutNorm(layer.out(y)));
      const [open, inner, value] = split(layer.up(layer.mlpNorm(x)), ffn_dim, ffn_dim, ffn_dim);
      for (let i = 0; i < ffn_dim; i++) value[i] *= gelu(inner[i]) * sigmoid(open[i]);
      x = sum(x, layer.mlpOutNorm(layer.down(value)));
    }
    return x;
  }

  head(x) {
    return this.projection("head")(x);
  }
};

ARCHITECTURES.neon = class extends Architecture {
  layer(at, layer) {
    const { matrix, vector } = this.weights, { n_kv_heads } = this.config, { maps, K } = this.widths();
    const start = 0.8 - 0.6 * Math.exp(-0.3 * (layer + (this.config.paper_lambda ? 0 : 1)));
    return {
      attentionNorm: vector(at + "attention_norm.weight"), qkv: matrix(at + "attention.qkv"),
      out: matrix(at + "attention.out"), headNorm: vector(at + "attention.norm.weight"),
      lambda: this.lambda(at + "attention.lambda_.", start), bankNorm: vector(at + "bank_norm.weight"),
      bank: this.bank(at + "bank."), mlpNorm: vector(at + "mlp_norm.weight"), gateUp: matrix(at + "mlp.gate_up"),
      down: matrix(at + "mlp.down"), mlpLambda: this.lambda(at + "mlp.lambda_.", start),
      mlpOutNorm: [vector(at + "mlp.norm.weight"), vector(at + "mlp.norm.bias")], start,
      ...this.cache(n_kv_heads * maps * K),
    };
  }

  /** Softmax maps of a head, and the width of a map's queries and keys. */
  widths() {
    const { dim, n_heads, diff_attention } = this.config;
    return { maps: diff_attention === "off" ? 1 : 2, K: dim / n_heads / (diff_attention === "constrained" ? 2 : 1) };
  }

  /** The weight of what is subtracted. */
  lambda(at, start) {
    const [q1, k1, q2, k2] = ["q1", "k1", "q2", "k2"].map((name) => this.weights.vector(at + name));
    return q1 && Math.exp(dot(q1, k1)) - Math.exp(dot(q2, k2)) + start;
  }

  /** The sub-layer between attention and feed-forward, where there is one. */
  bank(at) {
    const { matrix, vector } = this.weights, config = this.config;
    const each = (n, name) => Array.from({ length: n }, (_, j) => matrix(name + j));
    if (config.decoder === "linear-control") {
      const layers = each(2, at).filter(Boolean);
      return (h) => layers.reduce((y, layer) => layer.times(y), h);
    }
    if (config.decoder === "memory") {
      const sizes = [config.n_global_memories, config.n_layer_memories], all = [matrix("memories"), matrix(at + "slots")];
      const shares = softmax(vector(at + "mix") ?? [0]);
      return (h) => {
        const scores = split(matrix(at + "query").times(h), ...sizes);
        const read = all.map((slots, i) => slots && mixture(slots, softmax(scores[i])));
        return sum(h, read.filter(Boolean).map((y, i) => y.map((value) => value * shares[i])).reduce(sum));
      };
    }
    if (config.decoder !== "function") return null;
    const sizes = [config.n_global_functions, config.n_layer_functions];
    const all = [each(sizes[0], "functions."), each(sizes[1], at + "functions.")];
    return (h) => {
      const scores = split(matrix(at + "scorer").times(h), ...sizes);
      return all.reduce((y, functions, i) => (functions.length ? sum(y, functions[likeliest(scores[i], 1)[0]].times(h)) : y), h);
    };
  }

  step(id, position) {
    const { n_heads: H, n_kv_heads: G, ffn_dim: F, norm_eps, rope_theta } = this.config, { maps, K } = this.widths();
    const turn = rotary(position, K, rope_theta), wide = maps * K;
    let x = this.embedding.row(id);
    for (const layer of this.layers) {
      const [q, k, v] = split(layer.qkv.times(rmsNorm(x, layer.attentionNorm, norm_eps)), H * wide, G * wide, G * wide);
      layer.keys.set(position, rotate(k, turn));
      layer.values.set(position, v);
      const y = this.attention(layer, rotate(q, turn), position, maps, K);
      x = sum(x, layer.out.times(y));
      if (layer.bank) x = sum(x, layer.bank(rmsNorm(x, layer.bankNorm, norm_eps)));
      const parts = layer.gateUp.times(rmsNorm(x, layer.mlpNorm, norm_eps));
      const stream = (i) => gated(...split(parts.subarray(i * F), F, F));
      if (layer.mlpLambda === undefined) x = sum(x, layer.down.times(stream(0)));
      else {
        const second = stream(2), hidden = stream(0).map((value, i) => value - layer.mlpLambda * second[i]);
        x = sum(x, layerNorm(layer.down.times(hidden), ...layer.mlpOutNorm).map((value) => value * (1 - layer.start)));
      }
    }
    return rmsNorm(x, this.weights.vector("norm.weight"), norm_eps);
  }

  /** The difference of two softmax maps, normalised head by head. */
  attention(layer, q, position, maps, K) {
    const { n_heads: H, n_kv_heads: G } = this.config, wide = maps * K, y = new Float32Array(H * wide);
    if (maps === 1) return attend(q, layer.keys, layer.values, position + 1, H, G, K ** -0.5);
    const apart = new Float32Array(2 * H * wide); // a query with zeros for the keys of the other map
    for (let h = 0; h < H; h++) {
      apart.set(q.subarray(h * wide, h * wide + K), 2 * h * wide);
      apart.set(q.subarray(h * wide + K, (h + 1) * wide), (2 * h + 1) * wide + K);
    }
    const read = attend(apart, layer.keys, layer.values, position + 1, 2 * H, G, K ** -0.5);
    for (let h = 0; h < H; h++) {
      const [first, second] = split(read.subarray(2 * h * wide), wide, wide);
      const normed = rmsNorm(first.map((value, i) => value - layer.lambda * second[i]), layer.headNorm);
      y.set(normed.map((value) => value * (1 - layer.start)), h * wide);
    }
    return y;
  }

  head(x) {
    return (this.config.tie_embeddings ? this.embedding : this.weights.matrix("head")).times(x);
  }
};

ARCHITECTURES.tape = class extends Architecture {
  depth() {
    const { coda_layers, n_critics, n_layers, variant } = this.config;
    return coda_layers + (variant === "tape" ? n_critics : 1) * n_layers;
  }

  layer(at, number) {
    const { vector, matrix } = this.weights, { dim, seq_len, variant, coda_layers, n_layers, prophet } = this.config;
    const isCritic = number >= coda_layers, isFirst = isCritic && (number - coda_layers) % n_layers === 0;
    const counts = number === 0 || variant !== "tape" ? ONCE : isFirst && prophet ? [1, 1, 1] : [2, 1];
    const room = () => new Rows(seq_len * counts.length, 2 * dim);
    const norm = (name, gain = vector(name + ".weight"), bias = vector(name + ".bias")) => (x) => layerNorm(x, gain, bias);
    const stream = (side) => {
      const out = this.affine(side + "out"), up = this.affine(side + "up"), down = matrix(side + "down");
      const attentionNorm = norm(side + "attention_norm"), mlpNorm = norm(side + "mlp_norm");
      return (x, attended) => {
        const y = attentionNorm(sum(x, out(attended)));
        return mlpNorm(sum(y, down.times(saturated(up(y)))));
      };
    };
    return {
      q: this.affine(at + "q"), kv: this.affine(at + "kv"), left: stream(at + "left."), right: stream(at + "right."),
      keys: room(), values: room(), counts, isCritic, isFirst,
    };
  }

  affine(name) {
    const matrix = this.weights.matrix(name + ".linear"), bias = this.weights.vector(name + ".bias");
    return (x) => add(matrix.times(x), bias);
  }

  reset() {
    this.states = { first: new Float32Array(2 * this.config.dim), second: new Float32Array(2 * this.config.dim) };
  }

  keeps() {
    return 0; // the prophet's states go on from the last position alone
  }

  /** Two recurrent layers over the embeddings. */
  prophecy(x) {
    for (const name of ["first", "second"]) {
      const at = "prophet." + name, inputs = add(this.affine(at + ".input")(x), this.weights.vector(at + ".bias"));
      const cells = saturated(saturated(add(inputs, this.weights.matrix(at).times(this.states[name]))));
      x = this.states[name] = softXor(...split(cells, cells.length / 2, cells.length / 2));
    }
    return this.affine("prophet.out")(x);
  }

  /** A level reads, side by side, its tokens, its hidden state and, first in a critic, what is prophesied, in the place
      of which others read their tokens twice. */
  level(layer, position, tokens, h, previous) {
    const { dim, n_heads } = this.config, { keys, values, counts } = layer, x = h ?? tokens, n = counts.length;
    [previous, tokens, x].slice(-n).forEach((segment, i) => {
      const [k, v] = split(layer.kv(segment), 2 * dim, 2 * dim);
      keys.set(position * n + i, k);
      values.set(position * n + i, v);
    });
    const heads = 2 * n_heads, scale = (dim / n_heads) ** -0.5;
    const y = attend(layer.q(x), keys, values, (position + 1) * n, heads, heads, scale, 0, counts);
    const left = layer.left(x, y.subarray(0, dim)), right = layer.right(x, y.subarray(dim));
    if (!layer.isCritic) return softXor(left.map(sigmoid), right.map(sigmoid));
    return right.map((value, i) => value + (left[i] - value) * sigmoid(left[i] - value));
  }

  step(id, position) {
    const { dim, coda_layers, moderator } = this.config, turn = rotary(position, dim);
    const x = this.embedding.row(id), voices = [];
    const prophecy = this.layers.some((layer) => layer.counts.length > 2) ? this.prophecy(x) : null;
    let tokens = placed(x, turn), h = null, coda = null;
    this.layers.forEach((layer, number) => {
      if (number === coda_layers) coda = h;
      if (layer.isFirst && number > coda_layers) moderator ? tokens = placed(h, turn) : voices.push(h);
      h = this.level(layer, position, tokens, layer.isFirst ? coda : h, prophecy);
    });
    return moderator ? h : voices.reduce((x, y) => sum(x, y), h).map((all) => all / (voices.length + 1));
  }

  /** Log-probabilities by the distance to the centre of every token. */
  head(x) {
    const matrix = this.weights.matrix("head"), { dim, tails, student_df } = this.config;
    const y = matrix.times(x), own = dot(x, x);
    const df = tails === "learned" ? Math.exp(this.weights.vector("head.log_df")[0]) : student_df;
    this.centres ??= y.map((_, id) => dot(matrix.row(id), matrix.row(id)));
    for (let id = 0; id < y.length; id++) {
      const distance = Math.max(own - 2 * y[id] + this.centres[id], 1e-12);
      y[id] = tails === "normal" ? -distance / 2 : Math.log1p(distance / df) * (-(df + dim) / 2);
    }
    return logSoftmax(y);
  }
};

// ---------------------------------------------------------------- a model out of a page

/** Bytes of text with 7 bits a character. Behind a DEL stands one that markup cannot hold, with a bit turned. */
function unpacked(text) {
  const bytes = new Uint8Array(Math.ceil((text.length * 7) / 8));
  let n = 0, bits = 0, count = 0; // the last `count` bits are not in a byte yet
  for (let i = 0; i < text.length; i++) {
    let code = text.charCodeAt(i);
    if (code === 127) code = text.charCodeAt(++i) ^ 64;
    bits = ((bits & 127) << 7) | code;
    count += 7;
    if (count >= 8) bytes[n++] = bits >> (count -= 8);
  }
  return bytes.subarray(0, n);
}

/** What zlib compressed. */
function inflated(bytes) {
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
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
  i64: (buffer) => new BigInt64Array(buffer), // a counter of training
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
        const matrix = scale ? new Matrix(rows, columns, codes, scale, group ?? columns) : new FloatMatrix(rows, columns, numbers);
        if (unit_axis !== null) matrix.normalize(unit_axis);
        this.matrices.set(name.replace(/\.weight$/, ""), matrix);
      }
    }
    this.matrix = (name) => this.matrices.get(name);
    this.vector = (name) => this.vectors.get(name);
  }
}

const channel = new MessageChannel(), paused = []; // what goes on behind a pause
channel.port1.onmessage = () => paused.shift()();

/** Let the browser draw and hear the user. */
function pause() {
  channel.port2.postMessage(null);
  return new Promise((resolve) => paused.push(resolve));
}

/** A model that has read some tokens. */
class Model {
  constructor({ architecture, config, tokenizer, tensors }, buffer, from) {
    this.config = config;
    this.tokenizer = new Tokenizer(tokenizer);
    this.network = new ARCHITECTURES[architecture](config, new Weights(tensors, buffer, from));
    this.read = []; // tokens that the network has read, from the start of its view
  }

  /** A model out of a page: four bytes of a length, so many of JSON, and the numbers that it lists. */
  static async open(text) {
    const buffer = await inflated(unpacked(text)), length = new DataView(buffer).getUint32(0, true);
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

/** Log-probabilities, in the place of logits. */
function logSoftmax(y) {
  let largest = -Infinity, total = 0;
  for (let i = 0; i < y.length; i++) largest = Math.max(largest, y[i]);
  for (let i = 0; i < y.length; i++) total += Math.exp(y[i] - largest);
  for (let i = 0; i < y.length; i++) y[i] -= largest + Math.log(total);
  return y;
}

function softmax(logits) {
  const weights = new Float64Array(logits.length);
  let largest = -Infinity, total = 0;
  for (let i = 0; i < weights.length; i++) largest = Math.max(largest, logits[i]);
  for (let i = 0; i < weights.length; i++) total += weights[i] = Math.exp(logits[i] - largest);
  for (let i = 0; i < weights.length; i++) weights[i] /= total;
  return weights;
}

/** The `n` ids of the largest logits, the largest first; of equal ones the smaller id. */
function likeliest(logits, n) {
  const found = [];
  for (let id = 0; id < logits.length; id++) {
    if (found.length === n && logits[id] <= logits[found[n - 1]]) continue;
    let at = found.length;
    while (at > 0 && logits[found[at - 1]] < logits[id]) at--;
    found.splice(at, 0, id);
    found.length = Math.min(found.length, n);
  }
  return found;
}

/** An id drawn at a temperature, of all or of `among`. */
function drawn(logits, temperature, among) {
  const ids = among ?? Array.from(logits.keys()), weights = softmax(Float64Array.from(ids, (id) => logits[id] / temperature));
  let left = Math.random();
  return ids[weights.findIndex((weight) => (left -= weight) < 0)] ?? ids[0];
}
