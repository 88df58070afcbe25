"""Access tokens: a JWT (RFC 9068) that a resource server verifies by the issuer's published keys and introspection."""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

import orjson

from ringfence.kernel.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.jws import parse
from ringfence.kernel.keys import PublicKey, SigningKey, b64encode, public_key
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.permission import PERMISSION_TYPE
from ringfence.messages.registry import TargetState
from ringfence.model.identity import spiffe_id

TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - a media type
"""The `typ` of an access token (RFC 9068, 2.1)."""


class TokenKeyError(RingfenceError):
    """The key for tokens cannot be used: tokens are signed with ES256, and only the issuer can sign them."""

    code = "token_key_invalid"


class TokenKey:
    """The key that signs tokens. It is none of the keys that sign messages: whoever verifies tokens knows it alone."""

    def __init__(self, key: SigningKey) -> None:
        """Raises TokenKeyError where it is not an ES256 key."""
        if key.alg != "ES256":
            raise TokenKeyError(f"tokens are signed with ES256, the key is for {key.alg}; make another")
        self._key = key
        self._public: PublicKey = public_key(key.public)
        header = {"alg": key.alg, "kid": key.kid, "typ": TOKEN_TYPE}
        self._head = b64encode(orjson.dumps(header)).encode() + b"."

    def jwks(self) -> dict[str, Any]:
        """The public half as a JWK set (RFC 7517)."""
        jwk = self._key.public.model_dump(exclude_none=True)
        return {"keys": [{**jwk, "kid": self._key.kid, "use": "sig", "alg": self._key.alg}]}

    def sign(self, claims: dict[str, Any]) -> str:
        """A token with these claims."""
        signing_input = self._head + b64encode(orjson.dumps(claims)).encode()
        return f"{signing_input.decode()}.{b64encode(self._key.sign(signing_input, repeatable=False))}"

    def verified(self, token: str) -> dict[str, Any] | None:
        """The claims of a token that this key signed, whatever its time; None for anything else."""
        try:
            jws = parse(token)
            claims = orjson.loads(jws.payload)
        except (InvalidMessageError, ValueError):
            return None
        header = jws.header
        if (header.typ, header.kid, header.alg) != (TOKEN_TYPE, self._key.kid, self._key.alg):
            return None
        if not isinstance(claims, dict) or not self._public.verifies(jws.signature, jws.signing_input):
            return None
        return claims


class JwtBackend:
    """Tokens of which `jti` is the lease: refused from the cut on by whoever asks introspection."""

    kind: ClassVar[str] = "jwt"
    revocability: ClassVar[Literal["instant", "session", "ttl"]] = "instant"
    own_expiry: ClassVar[Literal["all", "logins", "none"]] = "all"
    stateless: ClassVar[bool] = True

    def __init__(self, trust_domain: str, issuer_url: str, key: TokenKey | None) -> None:
        self._trust_domain = trust_domain
        self._issuer = issuer_url.rstrip("/")
        self._key = key

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """A token that says what the lease says. Raises TokenKeyError where this process has no key for it."""
        if self._key is None:
            raise TokenKeyError("this process has no key for tokens: only the issuer makes them")
        return Credential(
            kind=self.kind,
            value=self._key.sign(self.claims(lease, target)),
            token_type="Bearer",  # noqa: S106 - RFC 6750
            expires_at=lease.deadline,
        )

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """Nothing: a token can say every scope."""
        return None

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Nothing: a token leaves nothing behind, and introspection refused it from the cut on."""

    async def standing(self, target_id: str) -> frozenset[str]:
        """Nothing ever stands at a target."""
        return frozenset()

    async def close(self) -> None:
        """There is nothing to close."""

    def claims(self, lease: Lease, target: TargetState) -> dict[str, Any]:
        """RFC 9068, with the actors of RFC 8693, 4.1, the permissions of RFC 9396 and the key of RFC 9449, 6.1."""
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
        if lease.key_thumbprint is not None:
            claims["cnf"] = {"jkt": lease.key_thumbprint}
        return claims

    def _actors(self, act: tuple[str, ...]) -> dict[str, Any]:
        """The acting agents, nested: the one that holds the credential outermost."""
        nested: dict[str, Any] = {}
        for agent_id in reversed(act):
            nested = {"sub": self._id("agent", agent_id), **({"act": nested} if nested else {})}
        return nested

    def _id(self, kind: Literal["agent", "target", "user"], id: str) -> str:
        return spiffe_id(self._trust_domain, kind, id)
