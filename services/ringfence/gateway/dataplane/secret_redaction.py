"""Redacts the injected secret if a target echoes it: each byte becomes an asterisk, so that no length changes.

The search covers the secret as it stands in the header, without its scheme, as a Basic password, and the words of a
secret with spaces. Each is searched for in base64 (all three alignments), hexadecimal, percent-encoding, and with the
escapes of JSON and HTML, as the usual libraries write them. It does not find a secret that a target compresses,
encrypts or splits in another way.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import html
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final
from urllib.parse import quote

MIN_NEEDLE_BYTES: Final = 6
"""Shorter secrets are not searched for: they would be found everywhere."""
MAX_UNHELD_BYTES: Final = 4

_WORD: Final = re.compile(r"\S+")
_HTML_ESCAPES: Final[tuple[dict[str, str], ...]] = (
    {},
    {'"': "&quot;", "'": "&#39;"},
    {'"': "&#34;", "'": "&#39;", "+": "&#43;"},
    {'"': "&quot;", "'": "&#x27;"},
    {'"': "&quot;", "'": "&#x27;", "/": "&#x2F;"},
    {'"': "&quot;", "'": "&#39;", "/": "&#x2F;", "=": "&#x3D;", "`": "&#x60;"},
)
"""The escapes of characters besides `&`, `<` and `>`: by PHP, Go, Python, and template engines of JavaScript."""
MAX_PARTS: Final = 32
"""The most parts of a secret with spaces that are searched for, besides the whole."""
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31} +(?=\S)")
_SCHEMES: Final = frozenset({
    "apikey", "api-key", "basic", "bearer", "digest", "dpop", "hoba", "key", "mutual", "negotiate", "ntlm", "oauth",
    "privatetoken", "token", "vapid",
})  # fmt: skip
"""First words of a header that are not part of a secret (IANA, and custom ones of APIs). Any other may be one."""


@functools.lru_cache(maxsize=256)
def needles_of(values: tuple[str, ...]) -> tuple[bytes, ...]:
    """The byte strings to search for, the longest first, given the values of the injected headers."""
    needles: set[bytes] = set()
    for value in values:
        for secret in _secrets(value):
            needles.update(_encodings(secret))
    return tuple(
        sorted((needle for needle in needles if len(needle) >= MIN_NEEDLE_BYTES), key=len, reverse=True)
    )


def redact(data: bytes, needles: Iterable[bytes]) -> bytes:
    """The data with the secret redacted."""
    return _merge_redacted(
        data, [data.replace(needle, b"*" * len(needle)) for needle in needles if needle in data]
    )


class Redactor:
    """Redacts a stream. A possible beginning of the secret is held back until more has arrived.

    A beginning of up to `MAX_UNHELD_BYTES` bytes is not held back, because an event or a frame that happens to end
    with a letter of the secret must go on at once. If the secret follows, the agent sees these bytes of it.
    """

    __slots__ = ("_held", "_matchers", "_needles", "_redacted", "_sent")

    def __init__(self, needles: tuple[bytes, ...]) -> None:
        self._needles = needles
        self._matchers = [PrefixMatcher(needle) for needle in needles]
        self._held = b""
        """The end of the data so far, if it may be the beginning of the secret."""
        self._redacted = b""
        """`_held`, redacted. Bytes that one needle hides may be the beginning of another."""
        self._sent = 0
        """The number of bytes of `_redacted` that were returned already."""

    def feed(self, piece: bytes) -> bytes:
        """The data that may be sent now."""
        sent, (data, redacted) = self._sent, self._redacted_with(piece)
        keep = max((matcher.follow(piece) for matcher in self._matchers), default=0)
        start = len(data) - keep
        end = len(data) if keep <= MAX_UNHELD_BYTES else max(sent, start)
        self._held, self._redacted, self._sent = data[start:], redacted[start:], end - start
        return redacted[sent:end]

    def last(self, piece: bytes) -> bytes:
        """The rest of the data at the end of the stream."""
        sent, (_, redacted) = self._sent, self._redacted_with(piece)
        self._held, self._redacted, self._sent = b"", b"", 0
        return redacted[sent:] if sent else redacted

    def _redacted_with(self, piece: bytes) -> tuple[bytes, bytes]:
        """The held data and this piece, raw and redacted."""
        if not self._held:
            return piece, redact(piece, self._needles)
        data = self._held + piece
        return data, _merge_redacted(data, [self._redacted + piece, redact(data, self._needles)])


class PrefixMatcher:
    """Matches the end of a stream with the beginning of a needle (Knuth, Morris, Pratt).

    Each byte is compared at most twice, and only the last `len(needle)` bytes of a piece are read. So a target gains
    nothing if it sends what looks like the secret again and again, byte by byte.
    """

    __slots__ = ("_length", "_needle")

    def __init__(self, needle: bytes) -> None:
        self._needle = needle
        self._length = 0

    def follow(self, piece: bytes) -> int:
        """The length of the match at the end of the stream, after this piece."""
        needle, length, at, end = self._needle, self._length, 0, len(piece)
        if end >= len(needle):
            length, at = 0, end - len(needle) + 1
        elif length and length + end < len(needle) and needle.startswith(piece, length):
            length, at = length + end, end
        while at < end:
            if not length:
                at = piece.find(needle[0], at) + 1
                if not at:
                    break
                length = 1
            elif needle[length] == piece[at]:
                length, at = length + 1, at + 1
                if length == len(needle):
                    length = 0
            else:
                length = _failure_table(needle)[length] if length > 1 else 0
        self._length = length
        return length


@functools.lru_cache(maxsize=1024)
def _failure_table(needle: bytes) -> list[int]:
    """By each length of a prefix of the needle: the length of the longest shorter prefix that it ends with."""
    table = [0, 0]
    for at in range(1, len(needle)):
        length = table[at]
        while length and needle[length] != needle[at]:
            length = table[length]
        table.append(length + 1 if needle[length] == needle[at] else 0)
    return table


def _merge_redacted(data: bytes, redacted: Sequence[bytes]) -> bytes:
    """The data with an asterisk wherever one of its redacted forms has one: matches may overlap."""
    if len(redacted) < 2:
        return redacted[0] if redacted else data
    plain, hidden = int.from_bytes(data), 0
    for form in redacted:
        hidden |= plain ^ int.from_bytes(form)
    return (plain ^ hidden).to_bytes(len(data))


def _secrets(value: str) -> set[str]:
    scheme = _SCHEME.match(value)
    bare = value[scheme.end() :] if scheme else value
    scheme_name = scheme[0].strip().lower() if scheme else ""
    whole = {bare} if scheme_name in _SCHEMES else {value, bare}
    if scheme_name == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            pair = base64.b64decode(bare, validate=True).decode("utf-8")
            whole = {bare, pair, pair.partition(":")[2]}
    # Each needle costs a search in all data, so a secret of very many words is not split completely.
    return whole | set(sorted({part for one in whole for part in _parts(one)}, key=len)[-MAX_PARTS:])


def _parts(secret: str) -> Iterator[str]:
    """For each word, the shortest parts that begin or end with it and are long enough to be searched for.

    Together they hide every word of a part that is shown, if that part is long enough.
    """
    words = [(word.start(), word.end()) for word in _WORD.finditer(secret)]
    if len(words) < 2:
        return
    for number in range(len(words)):
        onward = (secret[words[number][0] : end] for _, end in words[number:])
        back = (secret[start : words[number][1]] for start, _ in reversed(words[: number + 1]))
        for parts in (onward, back):
            yield from itertools.islice((one for one in parts if len(one.encode()) >= MIN_NEEDLE_BYTES), 1)


def _encodings(secret: str) -> set[bytes]:
    raw = secret.encode("utf-8")
    encodings = {raw, raw.hex().encode(), raw.hex().upper().encode()}
    encodings.update(
        one.encode() for one in (*_percent_encoded(secret), *_in_json(secret), *_in_html(secret))
    )
    for before in range(3):
        # Only the characters that depend on the secret alone, not on its neighbours in the encoded text.
        shown = base64.b64encode(b"\x00" * before + raw).rstrip(b"=")
        first = (0, 2, 3)[before]
        last = len(shown) if (before + len(raw)) % 3 == 0 else len(shown) - 1
        encodings.add(shown[first:last])
        encodings.add(shown[first:last].translate(bytes.maketrans(b"+/", b"-_")))
    return encodings


def _percent_encoded(secret: str) -> Iterator[str]:
    """By the characters that stay as they are: none, `/`, encodeURIComponent, encodeURI. The space of a
    form is a plus.
    """
    for safe in ("", "/", "!~*'()", ";,/?:@&=+$!~*'()#"):
        for spaced in (quote(secret, safe=safe), quote(secret, safe=safe + " ").replace(" ", "+")):
            yield spaced
            yield re.sub(r"%[0-9A-F]{2}", lambda match: match[0].lower(), spaced)


def _in_json(secret: str) -> Iterator[str]:
    """With minimal escapes, with escaped slashes (PHP), and with escapes for HTML (Go, .NET)."""
    plain = json.dumps(secret)[1:-1]
    yield plain
    yield plain.replace("/", "\\/")
    for special in ("<>&", "<>&+'`", "<>&+'`/="):
        for digits in ("04x", "04X"):
            escaped = {ord(char): f"\\u{ord(char):{digits}}" for char in special}
            yield plain.translate(escaped)
            yield secret.replace("\\", "\\\\").translate({**escaped, 0x22: f"\\u{0x22:{digits}}"})


def _in_html(secret: str) -> Iterator[str]:
    named = html.escape(secret, quote=False)
    for escapes in _HTML_ESCAPES:
        yield "".join(escapes.get(char, char) for char in named)
