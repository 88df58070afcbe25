// A strict JSON parser (RFC 8259) for what others wrote: accepts only what all readers understand alike (RFC 7493).
//
// `JSON.parse` takes the last of two members with one name, where another reader may take the first. A person could
// then be shown one value and sign another.

import { RefusedError } from "./encoding.js";

const MAX_DEPTH = 64;
const NUMBER = /-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/y;
const SPACE = /[ \t\n\r]*/y;
const STRING = /"(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/y;
const WORDS = new Map([["true", true], ["false", false], ["null", null]]);

class Parser {
  constructor(text) {
    this.text = text;
    this.at = 0;
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    if (found === null) return null;
    this.at = pattern.lastIndex;
    return found[0];
  }

  fail() {
    throw new RefusedError(`not JSON, at character ${this.at}`);
  }

  take(char) {
    this.match(SPACE);
    if (this.text[this.at] !== char) return false;
    this.at += 1;
    return true;
  }

  string() {
    this.match(SPACE);
    const found = this.match(STRING) ?? this.fail();
    const text = JSON.parse(found);
    if (!text.isWellFormed()) throw new RefusedError("half a surrogate pair in a text");
    return text;
  }

  value(depth) {
    if (depth > MAX_DEPTH) throw new RefusedError("JSON is nested too deeply");
    if (this.take("{")) return this.object(depth);
    if (this.take("[")) return this.list(depth);
    if (this.text[this.at] === '"') return this.string();
    for (const [word, value] of WORDS) {
      if (this.text.startsWith(word, this.at)) {
        this.at += word.length;
        return value;
      }
    }
    const number = Number(this.match(NUMBER) ?? this.fail());
    if (!Number.isFinite(number) || (Number.isInteger(number) && !Number.isSafeInteger(number))) {
      throw new RefusedError("a number that not all readers understand alike");
    }
    return number;
  }

  object(depth) {
    const members = Object.create(null);
    if (this.take("}")) return members;
    do {
      const name = this.string();
      if (name in members) throw new RefusedError(`the member ${JSON.stringify(name.slice(0, 40))} comes twice`);
      if (!this.take(":")) this.fail();
      members[name] = this.value(depth + 1);
    } while (this.take(","));
    return this.take("}") ? members : this.fail();
  }

  list(depth) {
    const values = [];
    if (this.take("]")) return values;
    do values.push(this.value(depth + 1));
    while (this.take(","));
    return this.take("]") ? values : this.fail();
  }
}

/** The members of a JSON object, without a prototype. Throws RefusedError for everything else. */
export function parseObject(text) {
  const parser = new Parser(text);
  const value = parser.value(0);
  parser.match(SPACE);
  if (parser.at !== text.length) parser.fail();
  if (!isObject(value)) throw new RefusedError("no JSON object");
  return value;
}

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
