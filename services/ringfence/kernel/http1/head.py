"""Strict parser for the head of an HTTP/1.1 message, and the answer to a message that is refused (RFC 9457).

RFC 9112 lets a recipient be lenient in places. Each of these places is a way to smuggle a request past a decision, as
the target may read it differently. So a head that two readers could understand differently is refused (400). Nothing
is repaired, and field lines are kept as they were received. The rules:

- Request line (RFC 9112, 3): `METHOD SP TARGET SP HTTP/1.0` or `HTTP/1.1`, with single spaces. The method is a token
  of up to 32 characters, the target up to 8192 visible ASCII characters.
- Status line (RFC 9112, 4): `HTTP/1.0` or `HTTP/1.1`, a status from 100 to 599, an optional reason phrase.
- Line ends (RFC 9112, 2.2): CRLF only. A bare CR, a bare LF or a NUL anywhere in the head is refused.
- Field lines (RFC 9112, 5; RFC 9110, 5.5): a name is a token of up to 256 characters, directly followed by the colon.
  Values have HTAB, SP, visible ASCII and bytes above 0x7F. Line folding (RFC 9112, 5.2) is refused.
- Size (RFC 6585, 5): a head may have 32 KiB and 100 fields; more is refused with 431.
- Singletons (RFC 9110, 5.3): a field that has a meaning here comes at most once (`_SINGLETON_FIELDS`).
- `Host` (RFC 9112, 3.2): a request has one. Only CONNECT in HTTP/1.0 may lack it, as Python sent it before 3.12.
- `Content-Length` (RFC 9110, 8.6): one decimal number without sign or leading zeros, at most 2^50.
- `Transfer-Encoding` (RFC 9112, 6.1 and 6.3): exactly `chunked`, not together with `Content-Length`, not in HTTP/1.0.
- `Connection` (RFC 9110, 7.6.1): a request must not name `Content-Type` or `Content-Encoding` there, which say how
  its body is read. A message may name at most 101 options.
- Underscores: some targets read `_` in a name as `-`. A name that would then be a field with a meaning is refused.
- Override fields: a request must not have a field by which a target acts on another method or path
  (`OVERRIDE_FIELDS`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import orjson

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import AnyCode, Code, status_of

LINGER_S: Final = 5.0
LINGER_BYTES: Final = 2 * 1024 * 1024
"""Limits of a lingering close (RFC 9112, 9.6): a server that answers before it has read all of a request ends its
direction, and discards what still arrives. If it closed at once, a reset could take the answer from the client.
"""

_PROBLEM: Final = "application/problem+json"


class RequestRefusedError(RingfenceError):
    """A request or its response is not forwarded. `status` is the HTTP status for the client (RFC 9110, 15)."""

    def __init__(
        self,
        code: AnyCode,
        message: str,
        *,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`status`: where it is another one than that of the code, which is 403 where the code has none."""
        super().__init__(message, code=code)
        self.status = status or status_of(code, HTTPStatus.FORBIDDEN)
        self.headers = headers or {}
        self.agent_id: str | None = None
        """The agent that the refusal is attributed to, if the request itself proved who sent it."""


def problem_answer(error: RequestRefusedError) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of the answer: problem details (RFC 9457)."""
    return (
        error.status,
        {"Content-Type": _PROBLEM, **error.headers},
        _problem_details(error.status, error.code, error.message),
    )


def answer_head(status: int, headers: Mapping[str, str], length: int, *, close: bool) -> bytes:
    """The head of an answer by the gateway itself."""
    lines = [f"HTTP/1.1 {status} {_phrase(status)}", f"Content-Length: {length}", "Cache-Control: no-store"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if close:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _problem_details(status: int, code: str, message: str) -> bytes:
    return orjson.dumps(
        {
            "type": "about:blank",
            "title": _phrase(status),
            "status": status,
            "code": code,
            "detail": message,
        }
    )


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Refused"


MAX_HEAD_BYTES: Final = 32 * 1024
MAX_FIELDS: Final = 100
MAX_LENGTH: Final = 1 << 50
_MAX_CACHED_BYTES: Final = 2048
END_OF_HEAD: Final = b"\r\n\r\n"

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_REQUEST_LINE: Final = re.compile(rb"(" + _TOKEN + rb"{1,32}) ([!-~]{1,8192}) HTTP/1\.([01])\r\n")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])( [\t -~\x80-\xff]*)?\r\n")
_FIELD: Final = _TOKEN + rb"{1,256}:[\t -~\x80-\xff]*\r\n"
_FIELDS: Final = re.compile(rb"(?:" + _FIELD + rb")*")
_LENGTH: Final = re.compile(rb"0|[1-9][0-9]{0,15}")
_BARE_CR_LF_OR_NUL: Final = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\x00")

_SINGLETON_FIELDS: Final = frozenset({
    b"host", b"content-length", b"transfer-encoding", b"authorization", b"proxy-authorization", b"dpop", b"expect",
    b"upgrade", b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-accept", b"content-encoding",
    b"x-ringfence-label", b"x-ringfence-handle", b"content-type", b"mcp-session-id", b"last-event-id",
})  # fmt: skip
_BODY_FIELDS: Final = frozenset({b"content-type", b"content-encoding"})
_NO_OPTIONS: Final = frozenset[bytes]()
_KEPT_FIELDS: Final = _SINGLETON_FIELDS | {b"connection"}

OVERRIDE_FIELDS: Final = frozenset({
    b"x-http-method-override", b"x-http-method", b"x-method-override", b"x-original-url", b"x-rewrite-url",
    b"x-original-uri", b"x-original-method",
})  # fmt: skip
"""By these a target may act on another method or path than the request line, which the decision is about."""

PROXY_FIELDS: Final = frozenset({
    b"forwarded", b"x-real-ip", b"client-ip", b"x-client-ip", b"true-client-ip", b"x-cluster-client-ip",
    b"cf-connecting-ip", b"fastly-client-ip", b"x-originating-ip", b"x-remote-ip", b"x-remote-addr", b"client-cert",
    b"client-cert-chain", b"x-client-cert", b"x-ssl-client-cert", b"remote-user", b"x-remote-user", b"x-webauth-user",
    b"x-authenticated-user",
})  # fmt: skip
"""Fields by which a proxy tells a target about the client (RFC 7239, RFC 9440, and older customs), besides
`X-Forwarded-*`.
"""


@dataclass(slots=True, eq=False)
class FieldSection:
    """The parsed field lines of a message. Immutable by convention: equal sections share one object."""

    lines: Sequence[tuple[bytes, bytes]]
    """In order: the name in lower case, and the whole line as it was received, without its CRLF."""
    values: Mapping[bytes, bytes]
    """The values of fields that have a meaning here, by name. Those of several `Connection` fields are joined."""
    length: int | None
    """The value of `Content-Length`."""
    chunked: bool
    connection_options: frozenset[bytes]
    """The options of `Connection`, in lower case."""


@dataclass(slots=True)
class Head:
    """The head of any message, with the attributes of its field section."""

    minor: int
    """The minor version: HTTP/1.`minor`."""
    section: FieldSection
    fields: Sequence[tuple[bytes, bytes]]
    values: Mapping[bytes, bytes]
    length: int | None
    chunked: bool
    connection_options: frozenset[bytes]


@dataclass(slots=True)
class RequestHead(Head):
    """A request line and its fields."""

    method: str
    target: str


@dataclass(slots=True)
class ResponseHead(Head):
    """A status line and its fields."""

    status: int
    line: bytes


def take_head(buffer: bytearray, searched: int = 0) -> bytes | None:
    """Take a head out of the buffer, without its empty line. None if more has to arrive.

    `searched`: the length of the buffer that was searched before, so that a head which arrives byte by byte costs no
    more than others. Raises RequestRefusedError for a head that is too long, or that cannot become valid.
    """
    if not buffer:
        return None
    end = buffer.find(END_OF_HEAD, max(0, searched - len(END_OF_HEAD) + 1), MAX_HEAD_BYTES)
    if end < 0:
        if len(buffer) >= MAX_HEAD_BYTES:
            raise RequestRefusedError(
                Code.HEAD_TOO_LARGE, f"the head of a message may have {MAX_HEAD_BYTES} bytes"
            )
        if _BARE_CR_LF_OR_NUL.search(buffer, max(0, searched - 1)):
            raise _malformed("a bare CR or LF, or a NUL, in its head")
        return None
    head = bytes(buffer[: end + 2])
    del buffer[: end + 4]
    return head


def parse_request(head: bytes) -> RequestHead:
    """Parse the head of a request, as `take_head` returns it. Raises RequestRefusedError."""
    line = _REQUEST_LINE.match(head)
    if line is None:
        raise _malformed("its first line is not METHOD TARGET HTTP/1.1")
    lines, minor = head[line.end() :], line[3][0] - 48
    cacheable = len(lines) <= _MAX_CACHED_BYTES and b"DPoP:" not in lines  # each proof is new
    section = _cached_request_fields(lines) if cacheable else _request_fields(lines)
    if minor == 0 and section.chunked:
        raise _chunked_in_http_1_0()
    if b"host" not in section.values and not (minor == 0 and line[1] == b"CONNECT"):
        raise _malformed("Host is missing")
    return RequestHead(
        minor, section, section.lines, section.values, section.length, section.chunked, section.connection_options,
        line[1].decode("ascii"), line[2].decode("ascii"),
    )  # fmt: skip


def parse_response(head: bytes) -> ResponseHead:
    """Parse the head of a response. Raises RequestRefusedError."""
    line = _STATUS_LINE.match(head)
    if line is None:
        raise _malformed("its first line is not HTTP/1.1 STATUS")
    lines, minor = head[line.end() :], line[1][0] - 48
    section = _cached_response_fields(lines) if len(lines) <= _MAX_CACHED_BYTES else _parse_fields(lines)
    if minor == 0 and section.chunked:
        raise _chunked_in_http_1_0()
    return ResponseHead(
        minor, section, section.lines, section.values, section.length, section.chunked, section.connection_options,
        int(line[2]), head[9 : line.end() - 2],
    )  # fmt: skip


def check_trailers(lines: bytes) -> None:
    """Check the trailers of a chunked body. Raises RequestRefusedError."""
    if _FIELDS.fullmatch(lines) is None:
        raise _malformed("its trailers are no field lines")


def _request_fields(section: bytes) -> FieldSection:
    """Parse and check the fields of a request. Raises RequestRefusedError."""
    parsed = _parse_fields(section)
    if not parsed.connection_options.isdisjoint(_BODY_FIELDS):
        raise _malformed("Connection names what says how its body is to be read")
    if not OVERRIDE_FIELDS.isdisjoint(dict(parsed.lines)):
        name = next(name for name, _ in parsed.lines if name in OVERRIDE_FIELDS)
        raise RequestRefusedError(
            Code.OVERRIDE_REFUSED,
            f"{name.decode()} would make the target do another thing than what is decided on; leave it out",
        )
    return parsed


_cached_request_fields = functools.lru_cache(maxsize=1024)(_request_fields)
"""Cached, since a program sends nearly the same fields with each of its requests."""


def _parse_fields(section: bytes) -> FieldSection:
    if _FIELDS.fullmatch(section) is None:
        raise _malformed(_syntax_error(section))
    lines = section.split(b"\r\n")
    lines.pop()
    if len(lines) > MAX_FIELDS:
        raise RequestRefusedError(Code.TOO_MANY_FIELDS, f"a message may have {MAX_FIELDS} header fields")
    fields: list[tuple[bytes, bytes]] = []
    values: dict[bytes, bytes] = {}
    for line in lines:
        raw_name, _, value = line.partition(b":")
        name, has_meaning = _field_name(raw_name)
        fields.append((name, line))
        if has_meaning:
            if name not in values:
                values[name] = value.strip(b" \t")
            elif name in _SINGLETON_FIELDS:
                raise _malformed(f"{name.decode()} comes twice")
            else:
                values[name] += b"," + value
    return FieldSection(fields, values, *_framing(values))


@functools.lru_cache(maxsize=1024)
def _field_name(raw_name: bytes) -> tuple[bytes, bool]:
    """A name in lower case, and whether its value is kept. Raises RequestRefusedError."""
    name = raw_name.lower()
    if b"_" in name and _is_read_as_another(name):
        raise _malformed(f"{name.decode()} is read as another name by some; write it with hyphens")
    return name, name in _KEPT_FIELDS


_cached_response_fields = functools.lru_cache(maxsize=256)(_parse_fields)
"""Cached, since a target sends the same fields within a second if the length is the same."""


def _framing(values: dict[bytes, bytes]) -> tuple[int | None, bool, frozenset[bytes]]:
    coding, length_text = values.get(b"transfer-encoding"), values.get(b"content-length")
    if coding is not None:
        if coding != b"chunked":
            raise _malformed("a Transfer-Encoding other than 'chunked'")
        if length_text is not None:
            raise _malformed("both Transfer-Encoding and Content-Length")
    length = None
    if length_text is not None:
        length = _length(length_text)
    connection = values.get(b"connection")
    if connection is not None and connection.count(b",") > MAX_FIELDS:
        raise _malformed("Connection names more than there can be")
    return length, coding is not None, _connection_options(connection) if connection else _NO_OPTIONS


@functools.lru_cache(maxsize=256)
def _connection_options(connection: bytes) -> frozenset[bytes]:
    return frozenset(option.strip(b" \t") for option in connection.lower().split(b","))


def _length(text: bytes) -> int:
    if _LENGTH.fullmatch(text) is None or int(text) > MAX_LENGTH:
        raise _malformed("a Content-Length that is no number")
    return int(text)


def _is_read_as_another(name: bytes) -> bool:
    """Whether a target that reads `_` as `-` would take the name for a field that has a meaning, here or there."""
    dashed = name.replace(b"_", b"-")
    return (
        dashed in _KEPT_FIELDS
        or dashed in OVERRIDE_FIELDS
        or dashed in PROXY_FIELDS
        or dashed == b"accept-encoding"
        or dashed.startswith((b"x-forwarded-", b"proxy-", b"mcp-"))
    )


def _syntax_error(section: bytes) -> str:
    """The error in invalid field lines."""
    if b"\x00" in section:
        return "a NUL in its head"
    for line in section.split(b"\r\n")[:-1]:
        if line[:1] in (b" ", b"\t"):
            return "a header field that goes on in another line"
        if b"\r" in line or b"\n" in line:
            return "a bare CR or LF in its head"
        name = line.partition(b":")[0]
        if name[-1:] in (b" ", b"\t"):
            return "white space before a colon"
    return "a header field that is none"


def _chunked_in_http_1_0() -> RequestRefusedError:
    return _malformed("a Transfer-Encoding in HTTP/1.0")


def _malformed(problem: str) -> RequestRefusedError:
    return RequestRefusedError(
        Code.MALFORMED_HTTP, f"the message cannot be understood for certain: {problem}"
    )
