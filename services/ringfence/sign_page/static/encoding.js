// Encodings: strict base64url (RFC 7515), SHA-256, RFC 7638 thumbprints, UUIDv5 (RFC 9562).

const ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const VALUES = new Map([...ALPHABET].map((char, value) => [char, value]));
// Ringfence's own namespace: the UUIDv5 of "urn:ringfence" in the namespace of URLs.
const NAMESPACE = "73cb06862ff6589e9e8ad14b3bb0fa9a";

/** The reason why a question, an answer or a part of them is refused; its message is for people. */
export class RefusedError extends Error {}

/** base64url without padding. */
export function encode64(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 3) {
    const [a, b, c] = [bytes[at], bytes[at + 1], bytes[at + 2]];
    text += ALPHABET[a >> 2] + ALPHABET[((a & 3) << 4) | ((b ?? 0) >> 4)];
    if (b !== undefined) text += ALPHABET[((b & 15) << 2) | ((c ?? 0) >> 6)];
    if (c !== undefined) text += ALPHABET[c & 63];
  }
  return text;
}

/** The bytes of strict base64url: no padding, no other alphabet, no bits that belong to no byte. */
export function decode64(text) {
  if (typeof text !== "string" || text.length % 4 === 1) throw new RefusedError("not base64url");
  const bytes = new Uint8Array(Math.floor((text.length * 3) / 4));
  let [value, bits, at] = [0, 0, 0];
  for (const char of text) {
    const six = VALUES.get(char);
    if (six === undefined) throw new RefusedError("not base64url");
    value = ((value << 6) | six) & 0xffffff;
    bits += 6;
    if (bits >= 8) {
      bits -= 8;
      bytes[at++] = (value >> bits) & 255;
    }
  }
  if (value & ((1 << bits) - 1)) throw new RefusedError("not canonical base64url");
  return bytes;
}

export const utf8 = (text) => new TextEncoder().encode(text);

/** Text of UTF-8. Refuses malformed bytes, and keeps a byte order mark, which no JSON may have. */
export function fromUtf8(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new RefusedError("not UTF-8");
  }
}

export async function sha256(bytes) {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
}

export const hex = (bytes) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** SHA-256 in lower-case hexadecimal: the digest of a message is that of its compact JWS. */
export const digest = async (text) => hex(await sha256(utf8(text)));

/** The RFC 7638 thumbprint of a public key, which is its `kid`. */
export async function thumbprint(jwk) {
  const members = { crv: jwk.crv, kty: jwk.kty, x: jwk.x, ...(jwk.kty === "EC" ? { y: jwk.y } : {}) };
  const names = Object.keys(members).sort();
  const canonical = "{" + names.map((name) => `${JSON.stringify(name)}:${JSON.stringify(members[name])}`).join(",") + "}";
  return encode64(await sha256(utf8(canonical)));
}

/** The id of what a signed message starts: the UUIDv5 of its issuer and its `jti`. */
export async function messageId(iss, jti) {
  const space = NAMESPACE.match(/../g).map((byte) => parseInt(byte, 16));
  const input = new Uint8Array([...space, ...utf8(`${iss} ${jti}`)]);
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-1", input)).slice(0, 16);
  bytes[6] = (bytes[6] & 0x0f) | 0x50;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  return hex(bytes).replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

/** A fresh random UUID (RFC 9562, version 4) has 122 random bits; this has 128, as base64url. */
export const freshId = () => encode64(crypto.getRandomValues(new Uint8Array(16)));
