"""Backend for access tokens: a JWT (RFC 9068) that a resource server verifies with the issuer's public keys and by
introspection.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

from ringfence.backends.target_settings import TargetSettingsError, settings_of
from ringfence.backends.token_keys import TokenKeyError, TokenKeys
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.permission import PERMISSION_TYPE
from ringfence.messages.registry import TargetState
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.target_settings import JwtSettings

log = logging.getLogger(__name__)


class JwtBackend:
    """Mints tokens whose `jti` is the lease id. After a revocation, introspection reports them as inactive."""

    kind: ClassVar[str] = "jwt"
    enforced_by: ClassVar[Literal["target", "gateway"]] = "target"
    own_expiry: ClassVar[Literal["all", "logins", "none"]] = "all"
    stateless: ClassVar[bool] = True

    def __init__(self, trust_domain: str, issuer_url: str, keys: TokenKeys | None) -> None:
        self._trust_domain = trust_domain
        self._issuer = issuer_url.rstrip("/")
        self._keys = keys

    def revocability(self, target: TargetState) -> Literal["instant", "session", "ttl"]:
        """Return `instant` if the target has a key for introspection, else `ttl`: the target would not learn of a
        revocation.
        """
        return "instant" if target.keys else "ttl"

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """Return a token with the lease's permissions.

        Raises TokenKeyError if this process has no key for it, and TargetSettingsError.
        """
        if self._keys is None:
            raise TokenKeyError("this process has no key for tokens: only the issuer makes them")
        settings = settings_of(target, JwtSettings)
        return Credential(
            kind=self.kind,
            value=self._keys.signer(settings.alg).sign(self.claims(lease, target)),
            token_type="DPoP" if settings.dpop == "required" else "Bearer",
            expires_at=lease.deadline,
        )

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """Return the reason if no token can be signed, else None.

        A token can express every scope, but the target's record may ask for an algorithm without a key.
        """
        try:
            settings = settings_of(target, JwtSettings)
            if self._keys is not None:
                self._keys.signer(settings.alg)
        except (TargetSettingsError, TokenKeyError) as error:
            log.error("no tokens for target %s: %s", lease.target_id, error)
            return f"Ringfence is not set up to make tokens for target {lease.target_id}; ask an operator"
        if settings.dpop == "required" and (lease.key_thumbprint is None or lease.delivery != "agent"):
            return (
                f"tokens for target {lease.target_id} are bound to the agent's own key: only it can use one"
            )
        return None

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Do nothing: a token leaves nothing behind, and introspection refuses it from the revocation on."""

    async def existing(self, target_id: str) -> frozenset[str]:
        """Return an empty set: nothing is ever made at a target."""
        return frozenset()

    standing = existing

    async def close(self) -> None:
        """Do nothing: there is no connection."""

    def claims(self, lease: Lease, target: TargetState) -> dict[str, Any]:
        """Return the claims of RFC 9068, with the actors of RFC 8693 4.1, the permissions of RFC 9396 and the key of
        RFC 9449 6.1.
        """
        claims: dict[str, Any] = {
            "iss": self._issuer,
            "sub": self._id("agent", lease.agent_id),
            "aud": target.backend.audience or self._id("target", lease.target_id),
            "iat": lease.iat,
            "nbf": lease.iat,
            "exp": lease.deadline,
            "jti": lease.lease_id,
            "client_id": lease.agent_id,
            "act": self._actors(lease.act),
            "sponsor": self._id("user", lease.sponsor),
            "on_behalf_of": self._id("user", lease.on_behalf_of),
            "task": lease.task_id,
            "authorization_details": [
                {
                    "type": PERMISSION_TYPE,
                    "target": permission.target,
                    "verbs": permission.verbs,
                    "resources": permission.resources,
                }
                for permission in lease.scope
            ],
        }
        if lease.instance is not None:
            of = lease.instance
            claims["instance"] = {"id": of.instance_id, "iss": of.issuer, "sub": of.subject}
            if of.run is not None:
                claims["instance"]["run"] = of.run.run_id
        if lease.delegators:
            claims["delegation"] = [
                {
                    "agent": self._id("agent", one.agent_id),
                    "task": one.task_id,
                    "sponsor": self._id("user", one.sponsor),
                }
                for one in lease.delegators
            ]
        if lease.key_thumbprint is not None and lease.delivery == "agent":  # no gateway has the agent's key
            # `cnf.jkt` only where a proof is demanded: with it, RFC 9449 7.2 refuses the token as a bearer token.
            member = "jkt" if settings_of(target, JwtSettings).dpop == "required" else "kid"
            claims["cnf"] = {member: lease.key_thumbprint}
        return claims

    def _actors(self, act: tuple[str, ...]) -> dict[str, Any]:
        """Return the acting agents, nested: the agent that holds the credential is outermost."""
        nested: dict[str, Any] = {}
        for agent_id in reversed(act):
            nested = {"sub": self._id("agent", agent_id), **({"act": nested} if nested else {})}
        return nested

    def _id(self, kind: Literal["agent", "target", "user"], id: str) -> str:
        return spiffe_id(self._trust_domain, kind, id)
