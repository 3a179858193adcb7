"use strict";
/* Text to ids and back, and how much of them a model sees. */

const utf8 = new TextEncoder();

/** Text to ids and back: `bytes(id)` are those that an id stands for, none for special tokens. `starts` are what a text
    begins with, `ends` end it; `template` has the special tokens of conversations, where the model learned those. */
class Tokenizer {
  constructor({ kind, pattern, tokens, characters, starts, ends, template }) {
    Object.assign(this, { kind, starts, ends: new Set(ends), template });
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

  /** Ids of what a user says, which the answer follows. Names of special tokens in it stay text. */
  said(text) {
    const { user, end, assistant } = this.template;
    return [user, ...this.encode(text), end, assistant];
  }

  bytes(id) {
    if (this.kind === "ids") return utf8.encode(`${id} `);
    if (this.kind === "bpe") return Uint8Array.from(this.tokens[id] ?? "", (character) => character.charCodeAt(0));
    if (id < 256) return Uint8Array.of(id);
    return utf8.encode(this.characters?.[id - 256] ?? "");
  }
}

/** Where the model's view of `length` tokens begins: of a full context the older half is dropped. */
function windowStart(length, context) {
  const older = Math.max(1, Math.floor(context / 2));
  return length <= context ? 0 : Math.ceil((length - context) / older) * older;
}
