// Where a question comes from, and where the answer goes: the link, a program on this machine, or the console.
//
// A question server is a one-time URL of the command line on the loopback interface, or of a console. GET gives the question,
// POST takes the answer. The page sends nothing anywhere else: its policy (CSP, connect-src) would not let it.

import { RefusedError, decode64, encode64, fromUtf8, utf8 } from "./encoding.js";
import { parseObject } from "./strict_json.js";

const MAX_CHARS = 4 * 1024 * 1024;
const MAX_DEPTH = 8;
const LOOPBACK = /^http:\/\/127\.0\.0\.1:[0-9]{1,5}$/;

/** Whether answers may go to this URL: loopback, or one of `origins`. Returns it; throws RefusedError. */
export function checkReturn(url, origins) {
  let parsed;
  try {
    parsed = new URL(url);
  } catch {
    throw new RefusedError("the answer is to go to what is no URL");
  }
  if (parsed.username || parsed.password || !(LOOPBACK.test(parsed.origin) || origins.includes(parsed.origin))) {
    throw new RefusedError("the answer is to go to neither this machine nor a console of this installation");
  }
  return parsed.href;
}

/** The question in the page's link, as `{text, source}`: its text, and the question server; undefined where there is none. */
export async function questionOf(fragment, config) {
  const [kind, value] = fragment.replace(/^#/, "").split(/=(.*)/s);
  if (kind === "from") {
    const source = checkReturn(decodeURIComponent(value ?? ""), config.sessionOrigins);
    return { text: await fetched(source), source };
  }
  if (kind === "p") return { text: wrapped(await unpacked(value ?? "")) };
  return undefined;
}

async function fetched(url) {
  let response;
  try {
    response = await fetch(url, { cache: "no-store", credentials: "omit", redirect: "error", referrerPolicy: "no-referrer" });
  } catch {
    throw new RefusedError(
      "the program that asked does not answer: it has ended, or this browser may not connect to this machine",
    );
  }
  if (!response.ok) throw new RefusedError("the program that asked has ended, or asks something else by now");
  const text = await response.text();
  if (text.length > MAX_CHARS) throw new RefusedError("the question is too large");
  return text;
}

// base64url of raw DEFLATE (RFC 1951): questions are long, and links should be short.
async function unpacked(value) {
  try {
    const stream = new Blob([decode64(value)]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    const reader = stream.getReader();
    const parts = [];
    let size = 0;
    for (let next = await reader.read(); !next.done; next = await reader.read()) {
      size += next.value.length;
      if (size > MAX_CHARS) throw new RefusedError("the question is too large");
      parts.push(next.value);
    }
    return fromUtf8(new Uint8Array(await new Blob(parts).arrayBuffer()));
  } catch (error) {
    if (error instanceof RefusedError) throw error;
    throw new RefusedError("the link is damaged: copy all of it");
  }
}

/** The text in which what stands between U+0001 and U+0002, at any depth, is base64url again. JSON has neither. */
export function wrapped(text) {
  const levels = [[]];
  for (const part of text.split(/([\u0001\u0002])/)) {
    if (part === "\u0001") {
      if (levels.length > MAX_DEPTH) throw new RefusedError("the link is damaged: copy all of it");
      levels.push([]);
    } else if (part === "\u0002") {
      if (levels.length === 1) throw new RefusedError("the link is damaged: copy all of it");
      const inner = levels.pop().join("");
      levels.at(-1).push(encode64(utf8(inner)));
    } else levels.at(-1).push(part);
  }
  const whole = levels[0].join("");
  if (levels.length !== 1) throw new RefusedError("the link is damaged: copy all of it");
  if (whole.length > MAX_CHARS) throw new RefusedError("the question is too large");
  return whole;
}

/**
 * Send an answer to a question server. Throws RefusedError where it was not taken.
 * Returns where the person goes on: an address of the console that asked; undefined where there is none.
 */
export async function send(url, answer) {
  let response;
  try {
    response = await fetch(url, {
      method: "POST",
      body: JSON.stringify(answer),
      headers: { "Content-Type": "text/plain" },
      credentials: "omit",
      redirect: "error",
      referrerPolicy: "no-referrer",
    });
  } catch {
    throw new RefusedError("the program that asked does not answer any more");
  }
  let said = {};
  try {
    said = parseObject(await response.text());
  } catch {
    // An answer without words is judged by its status.
  }
  if (!response.ok) throw new RefusedError(said.message ?? "the program that asked did not take the answer");
  return typeof said.next === "string" && URL.parse(said.next)?.origin === new URL(url).origin ? said.next : undefined;
}
