"""Pkt-lines, the framing of Git's protocols (gitprotocol-common), read strictly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code

MAX_LINE_BYTES: Final = 65520
"""Of one pkt-line, its length included."""
_LENGTH_BYTES: Final = 4
_LENGTH: Final = re.compile(rb"[0-9a-f]{4}")


class GitRequestError(RingfenceError):
    """Raised when a message of Git's protocol is not understood for certain. The message says what is wrong."""

    code = Code.GIT_REQUEST_INVALID


class Special(Enum):
    """Packets without data. `0002` and the empty `0004` have no meaning in requests over HTTP."""

    FLUSH = b"0000"
    DELIM = b"0001"


Packet = bytes | Special


def packet(data: bytes) -> bytes:
    """Encode one data packet."""
    return b"%04x%b" % (len(data) + _LENGTH_BYTES, data)


def read_packet(data: bytes | bytearray, at: int) -> tuple[Packet, int] | None:
    """Return the packet at an offset and the offset behind it, or None if it is incomplete.

    Raises GitRequestError for a length that is no packet's.
    """
    length = bytes(data[at : at + _LENGTH_BYTES])
    if len(length) < _LENGTH_BYTES:
        if not re.fullmatch(rb"[0-9a-f]*", length):
            raise GitRequestError("a pkt-line begins with four hexadecimal digits in lower case")
        return None
    if not _LENGTH.fullmatch(length):
        raise GitRequestError("a pkt-line begins with four hexadecimal digits in lower case")
    size = int(length, 16)
    if size <= _LENGTH_BYTES:
        if length not in (Special.FLUSH.value, Special.DELIM.value):
            raise GitRequestError(f"a pkt-line of length {length.decode()} has no meaning here")
        return Special(length), at + _LENGTH_BYTES
    if size > MAX_LINE_BYTES:
        raise GitRequestError(f"a pkt-line may have {MAX_LINE_BYTES} bytes")
    end = at + size
    return (bytes(data[at + _LENGTH_BYTES : end]), end) if len(data) >= end else None


def read_packets(data: bytes) -> Iterator[Packet]:
    """Yield all packets. Raises GitRequestError also if the last is cut off."""
    at = 0
    while at < len(data):
        found = read_packet(data, at)
        if found is None:
            raise GitRequestError("the last pkt-line is cut off")
        one, at = found
        yield one
