"""Deterministic ids: UUIDv5 (RFC 9562) derived from what they identify, so that a retry produces the same id."""

from __future__ import annotations

import hashlib
import uuid

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:ringfence")
_NAMESPACE = NAMESPACE.bytes
_VARIANT = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))
"""Maps a hexadecimal digit to the digit with the variant bits set (RFC 9562, 4.1)."""


def derived_id(*parts: str | int) -> str:
    """The UUIDv5 of the parts, joined by single spaces. Only the last part may contain a space."""
    return _uuid5(_NAMESPACE, " ".join(map(str, parts)))


def message_id(iss: str, jti: str) -> str:
    """The id of what a signed message starts (a request, a task): the UUIDv5 of its issuer and its `jti`."""
    return derived_id(iss, jti)


def lease_id(request_id: str) -> str:
    """The lease id of a request: a request has at most one lease."""
    return _uuid5(bytes.fromhex(request_id.replace("-", "")), "lease")


def digest(data: str | bytes) -> str:
    """SHA-256 in lower-case hexadecimal. The digest of a message is that of its compact JWS."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def _uuid5(namespace: bytes, name: str) -> str:
    """`str(uuid.uuid5(...))` in a fifth of the time: every message needs several derived ids."""
    text = hashlib.sha1(namespace + name.encode(), usedforsecurity=False).hexdigest()
    return f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{_VARIANT[text[16]]}{text[17:20]}-{text[20:32]}"
