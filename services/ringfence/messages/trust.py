"""The trust bundle, signed by the offline root: which keys speak for which service."""

from __future__ import annotations

from typing import ClassVar

from ringfence.messages.base import Claims, ExpiringClaims, Jws, Message, ServiceRole, SpiffeId
from ringfence.messages.keys import KeyRecord, PublicJwk
from ringfence.messages.oidc import OidcIssuer


class ServiceIdentity(Message):
    """One service or gateway: what it may speak as, and with which keys."""

    id: SpiffeId
    roles: tuple[ServiceRole, ...]
    keys: tuple[KeyRecord, ...]
    """Those that have ended stay here: what they signed in their time is still believed."""
    encryption_keys: tuple[KeyRecord, ...] = ()
    """What credentials are sealed to: of gateways, which inject them, and of the issuer, which keeps them for gateways
    that come later. X25519 or P-256 (ECDH-ES), and none of `keys`."""


class RootHandover(Claims):
    """A root's word on which root follows it. Embedded in trust bundles; its JWS header carries the root's key (`jwk`).

    Who is pinned to the root that signed this believes bundles by the one that follows, and none by the first any more.
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
    """The roots before: the commands that they signed in their time are still believed."""
    handovers: tuple[Jws, ...] = ()
    """`RootHandover` of each root to the next, oldest first."""
