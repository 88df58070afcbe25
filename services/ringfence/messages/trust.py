"""The trust bundle, signed by the offline root: which keys speak for which service.

External OpenID Connect issuers, whose identity tokens are accepted for people or for running instances of agents.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ringfence.messages.base import (
    ISSUER_URL,
    Claims,
    ExpiringClaims,
    Jws,
    KeyRecord,
    Message,
    NonEmpty,
    PasskeyUse,
    PublicJwk,
    Seconds,
    ServiceRole,
    SpiffeId,
)

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


class ServiceIdentity(Message):
    """One service or gateway: what it may speak as, and with which keys."""

    id: SpiffeId
    roles: tuple[ServiceRole, ...]
    keys: tuple[KeyRecord, ...]
    """Ended keys stay here: what they signed while they were valid still counts."""
    encryption_keys: tuple[KeyRecord, ...] = ()
    """The keys to which credentials are sealed: of gateways, which inject them, and of the issuer, which keeps them for
    gateways that join later. X25519 or P-256 (ECDH-ES), and none of `keys`."""


class Origin(Message):
    """A web origin (RFC 6454, as browsers write it) where people use passkeys: it counts for what was appended in
    `[not_before, not_after)`.

    One with a field that its reader does not know counts for nothing.
    """

    origin: Annotated[
        str,
        Field(
            pattern=r"^(https://[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?|http://localhost)(:[1-9][0-9]{0,4})?$"
        ),
    ]
    """`https://HOST`, or `http://localhost:PORT` in development, with the port unless it is the usual one."""
    use: PasskeyUse
    not_before: Seconds
    not_after: Seconds | None = None
    """None: until the root says otherwise."""


SecondPerson = Literal["required", "reported"]
"""`required`: a widening command takes effect once a second person signed it. `reported`: at once, and it is reported.
"""


class SecondPersonMode(Message):
    """Whether widening commands need a second person, from `not_before` on, by their append time.

    One with a field that its reader does not know is read as `required`.
    """

    mode: SecondPerson
    not_before: Seconds


class RootHandover(Claims):
    """A handover: a root names the next one. Embedded in trust bundles; its JWS header carries the root's key (`jwk`).

    A process that pins the signing root then accepts bundles only by the next one.
    """

    typ: ClassVar[str] = "trust.handover"

    next_root: PublicJwk


class TrustBundle(ExpiringClaims):
    """All service identities, in one version. A lower version than one already seen is refused.

    The JWS header carries the root's public key (`jwk`); its thumbprint must be the pinned `RINGFENCE_TRUST_ROOT`, or
    that of a root to which the handovers lead from there.
    """

    typ: ClassVar[str] = "trust.bundle"

    version: int
    services: tuple[ServiceIdentity, ...]
    oidc_issuers: tuple[OidcIssuer, ...] = ()
    """Whose identity tokens count, of people and of instances of agents."""
    former_roots: tuple[KeyRecord, ...] = ()
    """Former roots: the commands that they signed in their time still count."""
    handovers: tuple[Jws, ...] = ()
    """`RootHandover` of each root to the next, oldest first."""
    rp_id: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")] | None = None
    """The relying party id (WebAuthn Level 3, 4) for which new passkeys are made: the host of each origin, or a domain
    above all of them. None if nobody uses passkeys."""
    origins: tuple[Origin, ...] = ()
    """The origins where people use passkeys. Ended ones stay here: what was signed there in their time still counts."""
    second_person: tuple[SecondPersonMode, ...] = ()
    """All modes so far: the last one that has begun applies. Before the first: `reported`."""
