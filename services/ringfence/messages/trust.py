"""The trust bundle: which keys speak for which service. Signed by the offline root."""

from __future__ import annotations

from typing import ClassVar, Literal

from ringfence.messages.base import ExpiringClaims, Message, SpiffeId
from ringfence.messages.keys import KeyRecord
from ringfence.messages.oidc import OidcIssuer

ServiceRole = Literal[
    "registry", "policy", "issuer", "revoker", "gateway", "audit", "scim", "runner", "console"
]


class ServiceIdentity(Message):
    """One service or gateway: what it may speak as, and with which keys."""

    id: SpiffeId
    roles: tuple[ServiceRole, ...]
    keys: tuple[KeyRecord, ...]
    encryption_keys: tuple[KeyRecord, ...] = ()
    """What credentials are sealed to: of gateways, which inject them, and of the issuer, which keeps them for gateways
    that come later. X25519 or P-256 (ECDH-ES), and none of `keys`."""


class TrustBundle(ExpiringClaims):
    """All service identities, in one version. A lower version than one already seen is refused.

    The JWS header carries the root's public key (`jwk`); its thumbprint must be the pinned `RINGFENCE_TRUST_ROOT`.
    """

    typ: ClassVar[str] = "trust.bundle"

    version: int
    services: tuple[ServiceIdentity, ...]
    oidc_issuers: tuple[OidcIssuer, ...] = ()
    """Whose identity tokens count, of people and of instances of agents."""
