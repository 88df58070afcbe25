"""Signed messages that are plain JSON on their topic, with a detached signature in a header (RFC 7515, appendix F).

Any JSON reader can read them. A service that acts on one joins the two parts to an ordinary JWS.
"""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.kernel.crypto.keys import b64decode, b64encode

SIGNATURE = "signature"
"""The header: the compact JWS without its payload, `<header>..<signature>`."""


def detach(compact: str) -> tuple[bytes, bytes]:
    """The JSON that was signed, to the byte, and what makes a JWS of it again."""
    head, payload, signature = compact.split(".")
    return b64decode(payload), f"{head}..{signature}".encode()


def attach(value: bytes, headers: Sequence[tuple[str, bytes | None]]) -> bytes:
    """The compact JWS of JSON and its signature; nothing is verified. As it came where either is missing."""
    beside = next((header for name, header in headers if name == SIGNATURE), None)
    if beside is None or not value.startswith(b"{"):
        return value
    head, _, signature = beside.partition(b"..")
    return b".".join((head, b64encode(value).encode(), signature))
