"""Checks requests to `git-upload-pack`: decoded once, and of the commands that send objects and refs alone."""

from __future__ import annotations

import zlib
from typing import Final

from ringfence.model.git.pkt_lines import GitRequestError, read_packets

MAX_FETCH_BYTES: Final = 4 * 1024 * 1024
"""Of a request's body, as it was sent and decoded. A clone asks for each ref in about 50 bytes."""
_PLAIN: Final = frozenset({"", "identity"})
_GZIP: Final = frozenset({"gzip", "x-gzip"})
_GZIP_BITS: Final = 16 + zlib.MAX_WBITS
_COMMANDS: Final = frozenset({b"ls-refs", b"fetch", b"object-info"})
"""Of version 2. The answer to `bundle-uri` has addresses that the gateway does not decide on."""
_COMMAND: Final = b"command="
_ELSEWHERE: Final = b"packfile-uris"


def read_fetch(body: bytes, coding: str) -> bytes:
    """Decode and check the body of a request in any protocol version. The decoded body is what may be forwarded.

    `coding`: the value of `Content-Encoding`, in lower case. Raises GitRequestError.
    """
    plain = _decoded(body, coding)
    for one in read_packets(plain):
        if not isinstance(one, bytes):
            continue
        if one.startswith(_COMMAND) and one.removeprefix(_COMMAND).rstrip(b"\n") not in _COMMANDS:
            raise GitRequestError("of version 2, the commands ls-refs, fetch and object-info are forwarded")
        if one.startswith(_ELSEWHERE):
            raise GitRequestError("packs come from the target itself: do not ask for packfile-uris")
    return plain


def _decoded(body: bytes, coding: str) -> bytes:
    if len(body) > MAX_FETCH_BYTES:
        raise GitRequestError(f"a fetch may have {MAX_FETCH_BYTES} bytes: ask for fewer refs at once")
    if coding in _PLAIN:
        return body
    if coding not in _GZIP:
        raise GitRequestError("a fetch is sent as it is or with gzip")
    reader = zlib.decompressobj(_GZIP_BITS)
    try:
        plain = reader.decompress(body, MAX_FETCH_BYTES)
    except zlib.error:
        raise GitRequestError("the body is not gzip") from None
    if not reader.eof or reader.unused_data:
        raise GitRequestError(f"the body is not one gzip member of at most {MAX_FETCH_BYTES} bytes, decoded")
    return plain
