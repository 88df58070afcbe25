"""Backend for access tokens (JWT, RFC 9068), and the issuer's token keys: sign tokens, publish the key set.

A resource server verifies a token with the issuer's public keys and by introspection. For rotation, the next and the
previous keys are published, too; one of each algorithm signs. Token keys never sign messages, and a verifier of
tokens knows these keys alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Protocol, get_args

import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ringfence.backends.target_settings import TargetSettingsError, settings_of
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.secret_refs import PlaceError, read_secret
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey, b64encode, public_key
from ringfence.messages.base import PERMISSION_TYPE
from ringfence.messages.codes import Code
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.target_settings import JwtSettings, TokenAlgorithm

TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - a media type
"""The `typ` of an access token (RFC 9068, 2.1)."""
SMALLEST_RSA_BITS: Final = 2048
"""The minimum of RFC 7518 3.3."""


class TokenKeyError(RingfenceError):
    """Raised when a token key is missing or unusable, or when this process has none: only the issuer signs tokens."""

    code = Code.TOKEN_KEY_INVALID


class _Pair(Protocol):
    """A private key with the one algorithm that it signs with."""

    alg: TokenAlgorithm
    kid: str

    def jwk(self) -> dict[str, Any]: ...

    def sign(self, data: bytes) -> bytes: ...

    def verifies(self, signature: bytes, data: bytes) -> bool: ...


class _EcPair:
    alg: TokenAlgorithm = "ES256"

    def __init__(self, key: SigningKey) -> None:
        self._key, self._public = key, public_key(key.public)
        self.kid = key.kid

    def jwk(self) -> dict[str, Any]:
        return self._key.public.model_dump(exclude_none=True)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, repeatable=False)

    def verifies(self, signature: bytes, data: bytes) -> bool:
        return self._public.verifies(signature, data)


class _RsaPair:
    alg: TokenAlgorithm = "RS256"

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self._key, self._public = key, key.public_key()
        numbers = self._public.public_numbers()
        self._jwk = {"e": _number(numbers.e), "kty": "RSA", "n": _number(numbers.n)}
        # RFC 7638: these members in this order, without blanks.
        self.kid = b64encode(hashlib.sha256(orjson.dumps(self._jwk)).digest())

    def jwk(self) -> dict[str, Any]:
        return dict(self._jwk)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, padding.PKCS1v15(), hashes.SHA256())

    def verifies(self, signature: bytes, data: bytes) -> bool:
        try:
            self._public.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
        except InvalidSignature:
            return False
        return True


class TokenKey:
    """A private key of the issuer, by which it signs access tokens (RFC 9068)."""

    def __init__(self, key: SigningKey | rsa.RSAPrivateKey) -> None:
        """Raises TokenKeyError if the key is neither ES256 nor RSA with at least 2048 bits."""
        self._pair: _Pair
        if isinstance(key, SigningKey):
            if key.alg != "ES256":
                raise TokenKeyError(
                    f"tokens are signed with ES256 or RS256, the key is for {key.alg}; make another"
                )
            self._pair = _EcPair(key)
        else:
            if key.key_size < SMALLEST_RSA_BITS:
                raise TokenKeyError(
                    f"an RSA key of {key.key_size} bits is too short; make one of {SMALLEST_RSA_BITS} or more"
                )
            self._pair = _RsaPair(key)
        self.kid, self.alg = self._pair.kid, self._pair.alg
        header = {"alg": self.alg, "kid": self.kid, "typ": TOKEN_TYPE}
        self._head = b64encode(orjson.dumps(header)).encode() + b"."

    @classmethod
    def load(cls, path: Path) -> TokenKey:
        """Load a key from a file of mode 0600: from `ringfence key new` or `ringfence init` (ES256), or an RSA key as
        PEM.

        Raises TokenKeyError, KeyFileError.
        """
        try:
            text = read_secret(f"file:{path}", "the key that signs tokens")
        except PlaceError as error:
            raise TokenKeyError(str(error)) from None
        if not text.startswith("-----BEGIN"):
            return cls(SigningKey.load(path))
        try:
            key = load_pem_private_key(text.encode(), password=None)
        except (ValueError, TypeError):  # the original could quote the key
            raise TokenKeyError(f"{path} holds no private key in PEM form without a password") from None
        if not isinstance(key, rsa.RSAPrivateKey):
            raise TokenKeyError(f"{path} holds no RSA key; an ES256 key is made with: ringfence key new")
        return cls(key)

    def jwk(self) -> dict[str, Any]:
        return {**self._pair.jwk(), "kid": self.kid, "use": "sig", "alg": self.alg}

    def sign(self, claims: dict[str, Any]) -> str:
        signing_input = self._head + b64encode(orjson.dumps(claims)).encode()
        return f"{signing_input.decode()}.{b64encode(self._pair.sign(signing_input))}"

    def verifies(self, signature: bytes, data: bytes) -> bool:
        return self._pair.verifies(signature, data)


class TokenKeys:
    """All token keys of the issuer: those that sign, and those that are only published."""

    def __init__(self, signing: Sequence[TokenKey], published: Sequence[TokenKey] = ()) -> None:
        """`signing`: one key for each algorithm.

        `published`: the next keys, so that verifiers know them before they sign, and the previous ones, until their
        last token has expired.

        Raises TokenKeyError if two keys would sign with the same algorithm, or if one key is given twice.
        """
        self._signing = {key.alg: key for key in signing}
        if len(self._signing) != len(signing):
            raise TokenKeyError("two keys for tokens are of one algorithm, and only one of them can sign")
        self._known = {key.kid: key for key in (*signing, *published)}
        if len(self._known) != len(signing) + len(published):
            raise TokenKeyError("a key for tokens is named twice; each stands in one setting, once")

    @property
    def algorithms(self) -> tuple[TokenAlgorithm, ...]:
        return tuple(alg for alg in get_args(TokenAlgorithm) if alg in self._signing)

    def signer(self, alg: TokenAlgorithm) -> TokenKey:
        """Return the key that signs with this algorithm. Raises TokenKeyError if there is none."""
        if alg not in self._signing:
            raise TokenKeyError(f"there is no key that signs tokens with {alg}")
        return self._signing[alg]

    def jwks(self) -> dict[str, Any]:
        return {"keys": [key.jwk() for key in self._known.values()]}

    def verified(self, token: str) -> dict[str, Any] | None:
        """Return the claims of a token that one of these keys signed, whatever its times; None for anything else."""
        try:
            jws = parse(token)
            claims = orjson.loads(jws.payload)
        except (InvalidMessageError, ValueError):
            return None
        header = jws.header
        key = self._known.get(header.kid)
        if key is None or (header.typ, header.alg) != (TOKEN_TYPE, key.alg):
            return None
        if not isinstance(claims, dict) or not key.verifies(jws.signature, jws.signing_input):
            return None
        return claims


def _number(value: int) -> str:
    """Encode an integer as Base64urlUInt (RFC 7518 2)."""
    return b64encode(value.to_bytes((value.bit_length() + 7) // 8))


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
