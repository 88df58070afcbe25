"""Body framing of HTTP/1.1, read strictly. The rules (RFC 9112):

- 6.3: a request has the body that `Transfer-Encoding` or `Content-Length` announces, and none without them.
- 6.3: a response to HEAD, and one with 204 or 304, has no body. Without announcement a response ends with its
  connection.
- 7.1: a chunk is a size of 1 to 8 hexadecimal digits, CRLF, that many bytes, CRLF. Nothing else is accepted: no white
  space, no other line end.
- 7.1.1: chunk extensions are refused, although a recipient may ignore them. Two readers could disagree on their end.
- 7.1.2: trailers may have 8 KiB. They must be valid field lines, and are dropped.

A violation raises RequestRefusedError (400). Bodies are forwarded with new chunks, never with the received framing.
"""

from __future__ import annotations

import re
from typing import Final

from ringfence.kernel.http1.head import RequestHead, RequestRefusedError, ResponseHead, check_trailers
from ringfence.messages.codes import Code

MAX_TRAILER_BYTES: Final = 8 * 1024
LAST_CHUNK: Final = b"0\r\n\r\n"

CONTENTLESS_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "DELETE"})
"""The methods in which a body has no meaning (RFC 9110, 9.3)."""
CONTENT_METHODS: Final = frozenset({"POST", "PUT", "PATCH"})
"""The methods whose body every server reads."""

_SIZE: Final = re.compile(rb"[0-9A-Fa-f]{1,8}")
_CHUNK_HEADER: Final = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")
_SIZE_LINE_BYTES: Final = 10


class Body:
    """The rest of the body of one message. This one is empty."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = True

    def take(self, buffer: bytearray) -> bytes:
        """Take the content that has arrived out of the buffer, and nothing that follows the body.

        Raises RequestRefusedError if the framing is wrong.
        """
        return b""


class SizedBody(Body):
    """A body of `Content-Length` bytes."""

    __slots__ = ("_remaining",)

    def __init__(self, length: int) -> None:
        self.done = length == 0
        self._remaining = length

    def take(self, buffer: bytearray) -> bytes:
        piece = bytes(buffer[: self._remaining])
        del buffer[: len(piece)]
        self._remaining -= len(piece)
        self.done = self._remaining == 0
        return piece


class ChunkedBody(Body):
    """A chunked body: a state machine whose `_step` reads a size, data, the end of data, or trailers."""

    __slots__ = ("_remaining", "_step")

    def __init__(self) -> None:
        self.done = False
        self._remaining = 0
        self._step = self._read_size

    def take(self, buffer: bytearray) -> bytes:
        pieces: list[bytes] = []
        if self._step == self._read_size:
            _take_complete_chunks(buffer, pieces)
        while not self.done and self._step(buffer, pieces):
            pass
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_size(self, buffer: bytearray, pieces: list[bytes]) -> bool:
        end = buffer.find(b"\r\n", 0, _SIZE_LINE_BYTES)
        line = bytes(buffer[:end] if end >= 0 else buffer[:_SIZE_LINE_BYTES].removesuffix(b"\r"))
        if _SIZE.fullmatch(line) is None and (line or end >= 0 or len(buffer) >= 2):
            raise _malformed("a chunk without a size, or with an extension")
        if end < 0:
            if len(buffer) >= _SIZE_LINE_BYTES:
                raise _malformed("a chunk size that does not end")
            return False
        del buffer[: end + 2]
        self._remaining = int(line, 16)
        self._step = self._read_data if self._remaining else self._read_trailers
        return True

    def _read_data(self, buffer: bytearray, pieces: list[bytes]) -> bool:
        piece = bytes(buffer[: self._remaining])
        if not piece:
            return False
        del buffer[: len(piece)]
        pieces.append(piece)
        self._remaining -= len(piece)
        if self._remaining == 0:
            self._step = self._read_data_end
        return True

    def _read_data_end(self, buffer: bytearray, pieces: list[bytes]) -> bool:
        if buffer[:2] != b"\r\n"[: len(buffer)]:
            raise _malformed("a chunk that is longer than its size")
        if len(buffer) < 2:
            return False
        del buffer[:2]
        self._step = self._read_size
        return True

    def _read_trailers(self, buffer: bytearray, pieces: list[bytes]) -> bool:
        if buffer[:2] == b"\r\n":
            del buffer[:2]
            self.done = True
            return True
        end = buffer.find(b"\r\n\r\n", 0, MAX_TRAILER_BYTES)
        if end < 0:
            if len(buffer) >= MAX_TRAILER_BYTES:
                raise _malformed("trailers without an end")
            return False
        check_trailers(bytes(buffer[: end + 2]))
        del buffer[: end + 4]
        self.done = True
        return True


def _take_complete_chunks(buffer: bytearray, pieces: list[bytes]) -> None:
    """Take the complete chunks at the start of the buffer at once, so that many small ones are cheap.

    The first chunk that is incomplete, last, or not plain stays, with all behind it, for the state machine.
    """
    header = _CHUNK_HEADER.match(buffer)
    if header is None:
        return
    data, at = bytes(buffer), 0
    while header is not None:
        begins = header.end()
        ends = begins + int(header[1], 16)
        if ends == begins or data[ends : ends + 2] != b"\r\n":
            break
        pieces.append(data[begins:ends])
        at = ends + 2
        header = _CHUNK_HEADER.match(data, at)
    del buffer[:at]


class CloseDelimitedBody(Body):
    """A response body that ends with its connection."""

    __slots__ = ()

    def __init__(self) -> None:
        self.done = False

    def take(self, buffer: bytearray) -> bytes:
        piece = bytes(buffer)
        buffer.clear()
        return piece


def has_risky_body(head: RequestHead) -> bool:
    """Whether a request has a body that some servers do not read: they execute its bytes as the next request.

    Every method but POST, PUT and PATCH is risky. Any `Transfer-Encoding` announces a body, `Content-Length: 0` does
    not.
    """
    return (head.chunked or bool(head.length)) and head.method not in CONTENT_METHODS


def request_body(head: RequestHead) -> Body:
    if head.chunked:
        return ChunkedBody()
    return SizedBody(head.length) if head.length else Body()


def response_body(head: ResponseHead, method: str) -> Body:
    """The body of the response to a request of that method (RFC 9112, 6.3)."""
    if method == "HEAD" or head.status in (204, 304):
        return Body()
    if head.chunked:
        return ChunkedBody()
    return CloseDelimitedBody() if head.length is None else SizedBody(head.length)


def chunk(piece: bytes) -> bytes:
    """One chunk of a message that is forwarded. `piece` must not be empty: that would be the last chunk."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def _malformed(problem: str) -> RequestRefusedError:
    return RequestRefusedError(Code.MALFORMED_HTTP, f"the body cannot be understood for certain: {problem}")
