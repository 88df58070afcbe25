"""The injected secret, should a target echo it: replaced by as many asterisks, so that no length changes.

Searched for are the secret as it stands in the header, without its scheme, as a Basic password, and each of these in
base64 (in all three alignments), in hexadecimal, percent-encoded, and escaped as in JSON and HTML, in the ways in which
the usual libraries do that. A target that compresses, encrypts or takes the secret apart hides it from this.
"""

from __future__ import annotations

import base64
import binascii
import functools
import html
import json
import re
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import quote

SHORTEST: Final = 6
"""What is shorter is not searched for: it would be found everywhere."""
LOOSE: Final = 4

_HTML: Final[tuple[dict[str, str], ...]] = (
    {},
    {'"': "&quot;", "'": "&#39;"},
    {'"': "&#34;", "'": "&#39;", "+": "&#43;"},
    {'"': "&quot;", "'": "&#x27;"},
    {'"': "&quot;", "'": "&#x27;", "/": "&#x2F;"},
    {'"': "&quot;", "'": "&#39;", "/": "&#x2F;", "=": "&#x3D;", "`": "&#x60;"},
)
"""What is written for characters besides `&`, `<` and `>`: by PHP, Go, Python, and what templates of JavaScript do."""
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31} +(?=\S)")


@functools.lru_cache(maxsize=256)
def needles_of(values: tuple[str, ...]) -> tuple[bytes, ...]:
    """What to search for, the longest first, given the values of the injected headers."""
    found: set[bytes] = set()
    for value in values:
        for secret in _secrets(value):
            found.update(_spellings(secret))
    return tuple(sorted((one for one in found if len(one) >= SHORTEST), key=len, reverse=True))


def redact(data: bytes, needles: Iterable[bytes]) -> bytes:
    """All of it, without the secret."""
    for needle in needles:
        if needle in data:
            data = data.replace(needle, b"*" * len(needle))
    return data


class Redactor:
    """The same for what comes in pieces. What may be the beginning of the secret is held back until more has come.

    The first `LOOSE` bytes of a beginning are not: an event or a frame that happens to end with a letter of the secret
    has to go on at once. Where the secret does follow, it is these bytes of it that the agent sees.
    """

    __slots__ = ("_kept", "_needles", "_sent")

    def __init__(self, needles: tuple[bytes, ...]) -> None:
        self._needles = needles
        self._kept = b""
        """The end of what came, where it may be the beginning of the secret."""
        self._sent = 0
        """So much of that went on."""

    def feed(self, piece: bytes) -> bytes:
        """What may go on now."""
        data, sent = redact(self._kept + piece if self._kept else piece, self._needles), self._sent
        keep = max((_begun(data, needle) for needle in self._needles), default=0)
        start = len(data) - keep
        end = len(data) if keep <= LOOSE else max(sent, start)
        self._kept, self._sent = data[start:], end - start
        return data[sent:end]

    def last(self, piece: bytes) -> bytes:
        """What may go on at the end: nothing is held back any more."""
        data, sent = redact(self._kept + piece if self._kept else piece, self._needles), self._sent
        self._kept, self._sent = b"", 0
        return data[sent:] if sent else data


def _secrets(value: str) -> set[str]:
    scheme = _SCHEME.match(value)
    bare = value[scheme.end() :] if scheme else value
    found = {bare}
    if scheme and scheme[0].strip().lower() == "basic":
        try:
            pair = base64.b64decode(bare, validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            return found
        found |= {pair, pair.partition(":")[2]}
    return found


def _spellings(secret: str) -> set[bytes]:
    raw = secret.encode("utf-8")
    found = {raw, raw.hex().encode(), raw.hex().upper().encode()}
    found.update(one.encode() for one in (*_percent_encoded(secret), *_in_json(secret), *_in_html(secret)))
    for before in range(3):
        # Only the characters that depend on nothing but the secret, wherever it stands in what was encoded.
        shown = base64.b64encode(b"\x00" * before + raw).rstrip(b"=")
        first = (0, 2, 3)[before]
        last = len(shown) if (before + len(raw)) % 3 == 0 else len(shown) - 1
        found.add(shown[first:last])
        found.add(shown[first:last].translate(bytes.maketrans(b"+/", b"-_")))
    return found


def _percent_encoded(secret: str) -> Iterator[str]:
    """By what is left as it is: nothing, paths, encodeURIComponent, encodeURI; a form's space is a plus."""
    for safe in ("", "/", "!~*'()", ";,/?:@&=+$!~*'()#"):
        for spaced in (quote(secret, safe=safe), quote(secret, safe=safe + " ").replace(" ", "+")):
            yield spaced
            yield re.sub(r"%[0-9A-F]{2}", lambda one: one[0].lower(), spaced)


def _in_json(secret: str) -> Iterator[str]:
    """Escaped no more than needed, with slashes (PHP), and what HTML might take for its own (Go, .NET)."""
    plain = json.dumps(secret)[1:-1]
    yield plain
    yield plain.replace("/", "\\/")
    for special in ("<>&", "<>&+'`", "<>&+'`/="):
        for digits in ("04x", "04X"):
            escaped = {ord(one): f"\\u{ord(one):{digits}}" for one in special}
            yield plain.translate(escaped)
            yield secret.replace("\\", "\\\\").translate({**escaped, 0x22: f"\\u{0x22:{digits}}"})


def _in_html(secret: str) -> Iterator[str]:
    named = html.escape(secret, quote=False)
    for own in _HTML:
        yield "".join(own.get(one, one) for one in named)


def _begun(data: bytes, needle: bytes) -> int:
    """How many bytes at the end may be the beginning of the needle."""
    tail = data[max(0, len(data) - len(needle) + 1) :]
    at = tail.find(needle[:1])
    while at >= 0:
        if needle.startswith(tail[at:]):
            return len(tail) - at
        at = tail.find(needle[:1], at + 1)
    return 0
