"""Public keys as they stand in messages."""

from __future__ import annotations

from typing import Literal

from ringfence.messages.base import Message, NonEmpty, Seconds


class PublicJwk(Message):
    """A public key as a JWK (RFC 7517): EC P-256 (ES256, ECDH-ES), Ed25519 (EdDSA) or X25519 (ECDH-ES)."""

    kty: Literal["EC", "OKP"]
    crv: Literal["P-256", "Ed25519", "X25519"]
    x: NonEmpty
    y: str | None = None


class KeyRecord(Message):
    """A public key with its validity: it counts for what was appended in `[not_before, not_after)`."""

    kid: NonEmpty
    """Its RFC 7638 thumbprint (SHA-256, base64url)."""
    jwk: PublicJwk
    not_before: Seconds = 0
    not_after: Seconds
