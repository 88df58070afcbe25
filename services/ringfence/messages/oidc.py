"""External OpenID Connect issuers, whose identity tokens are accepted for people or for running instances of agents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ringfence.messages.base import ISSUER_URL, Message, NonEmpty

OidcUse = Literal["users", "instances"]
"""Whom an issuer's tokens speak for: people who ask an agent for something, or instances of agents that enrol."""
OidcAlgorithm = Literal["RS256", "PS256", "ES256", "EdDSA"]
"""What tokens may be signed with. Nothing symmetric: who verifies could sign. Never `none`."""
IssuerUrl = Annotated[str, Field(pattern=ISSUER_URL)]
"""An issuer as it calls itself in `iss`, to the letter (OpenID Connect Core, 2: no query, no fragment)."""


class OidcKey(Message):
    """A public key of an issuer, as a JWK of its JWKS: RSA of at least 2048 bits, EC P-256, or Ed25519."""

    kid: NonEmpty
    kty: Literal["RSA", "EC", "OKP"]
    alg: OidcAlgorithm
    n: str | None = None
    e: str | None = None
    crv: Literal["P-256", "Ed25519"] | None = None
    x: str | None = None
    y: str | None = None


class OidcIssuer(Message):
    """An issuer whose tokens count, and the keys that they are verified with."""

    issuer: IssuerUrl
    uses: Annotated[tuple[OidcUse, ...], Field(min_length=1)]
    keys: Annotated[tuple[OidcKey, ...], Field(max_length=32)] = ()
    """Pinned: every service verifies its tokens by itself, and no other key counts."""
    user_claim: NonEmpty = "sub"
    """Of tokens for users: which claim says whose it is."""
    user_suffix: NonEmpty | None = None
    """A suffix of the claim that the id lacks, such as `@example.com`. A token without it identifies nobody."""
    user_match: Literal["id", "external_id"] = "id"
    """What the claim contains: the user's id, or their directory's id for them (the `externalId` of SCIM)."""
    emails_verified: bool | None = None
    """If the claim is `email`: whether it also counts in tokens without `email_verified`, because users of this issuer
    cannot choose an address."""
    discovery: bool = False
    """Where nothing is pinned: the registry reads the keys from the issuer (OpenID Connect Discovery), and the others
    take its word. For instances alone."""
