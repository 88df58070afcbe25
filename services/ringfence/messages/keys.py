"""Public keys in messages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ringfence.messages.base import Message, NonEmpty, Seconds, Uuid


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
    use: Literal["webauthn"] | None = None
    """Set for a passkey. It signs WebAuthn assertions (ES256) and nothing else; every other key never signs one."""
    credential_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,1364}$")] | None = None
    """Of a passkey: how its authenticator knows it (base64url; 1,023 bytes at most)."""
    rp_id: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")] | None = None
    """Of a passkey: the domain that it was made for."""
    aaguid: Uuid | None = None
    """Of a passkey: the model of its authenticator. Without `attested`, only that authenticator's word."""
    backup_eligible: bool | None = None
    """Of a passkey: whether it may be synchronised to other devices. Without `attested`, only the authenticator's word.
    It never changes."""
    attested: Literal[True] | None = None
    """Of a passkey: set where who signed it in had verified its attestation against the given roots."""
