// Safe display of untrusted text, by the rules of ringfence/kernel/base/text.py: what is invisible, or moves other
// text, is replaced by its code point. A test compares the two for every code point.

const HIDDEN_CATEGORY = /^[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\p{Me}]$/u;
const HIDDEN = new Set([0x34f, 0x115f, 0x1160, 0x17b4, 0x17b5, 0x180b, 0x180c, 0x180d, 0x180f, 0x2800, 0x3164, 0xffa0]);

function isHidden(char) {
  const code = char.codePointAt(0);
  return (
    HIDDEN.has(code) ||
    (code >= 0xfe00 && code < 0xfe10) ||
    (code >= 0xe0100 && code < 0xe01f0) ||
    HIDDEN_CATEGORY.test(char)
  );
}

const mark = (char) => `‹U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`;

/** Untrusted prose on one line. */
export const visible = (text) => [...text].map((char) => (isHidden(char) ? mark(char) : char)).join("");

/** As `visible`, but line breaks stay. */
export const visibleLines = (text) => text.split("\n").map(visible).join("\n");

/** A name that is compared by code points: every character beyond ASCII is shown with its code point. */
export const visibleName = (text) =>
  [...text]
    .map((char) => (char >= " " && char <= "~" ? char : (isHidden(char) ? "" : char) + mark(char)))
    .join("");

/** As `visibleName`, in quotes where the text could pass for words beside it: agents choose resources. */
export const visibleResource = (text) =>
  /[ ,"]/.test(text) ? `"${visibleName(text).replaceAll('"', '\\"')}"` : visibleName(text);

const UNITS = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];

/** A duration in seconds, in words: `1 hour 30 minutes`. */
export function duration(seconds) {
  const parts = [];
  let rest = seconds;
  for (const [unit, size] of UNITS) {
    const count = Math.floor(rest / size);
    rest -= count * size;
    if (count) parts.push(`${count} ${unit}${count === 1 ? "" : "s"}`);
  }
  return parts.join(" ") || "0 seconds";
}

/** A moment in seconds since 1970, in the reader's time zone and in UTC. */
export function moment(seconds) {
  const at = new Date(seconds * 1000);
  if (Number.isNaN(at.getTime())) return `${seconds} seconds since 1970`;
  const local = at.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  return `${local} (${at.toISOString().replace(/\.\d+Z$/, "Z")})`;
}
