"""SCRAM-SHA-256 (RFC 5802, RFC 7677), the part of it that a server keeps."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

ITERATIONS = 4096
"""What RFC 7677 asks for at least. Passwords here are random: more would only cost time."""


def verifier(password: str, *, salt: bytes | None = None) -> str:
    """What a server needs to check a password and cannot log in with, as PostgreSQL writes it.

    `password` is ASCII, which SASLprep leaves as it is. `salt` is random where not given.
    """
    salt = secrets.token_bytes(16) if salt is None else salt
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, ITERATIONS)
    stored_key = hashlib.sha256(_hmac(salted, b"Client Key")).digest()
    server_key = _hmac(salted, b"Server Key")
    return f"SCRAM-SHA-256${ITERATIONS}:{_text(salt)}${_text(stored_key)}:{_text(server_key)}"


def _hmac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")
