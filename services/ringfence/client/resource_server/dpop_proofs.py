"""DPoP, the resource server's side (RFC 9449): does the request come from the holder of the token's key?"""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
from typing import Any, Final, Protocol

from pydantic import ValidationError

from ringfence.client.agent.dpop import PROOF_TYPE, access_token_hash, target_uri
from ringfence.client.errors import TokenRejectedError
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.replay_memory import ReplayMemory, ReplayMemoryFullError
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.keys import PublicKey, b64decode, b64encode, public_key
from ringfence.messages.base import PublicJwk
from ringfence.messages.codes import Code

PROOF_ALGORITHMS: Final = ("ES256", "EdDSA")
PROOF_LIFE_S: Final = 60
"""The maximum age of a proof in seconds: how long its id is remembered, and the clock difference that is tolerated."""
NONCE_LIFE_S: Final = 300
MAX_PROOFS: Final = 200_000
MAX_PROOF_BYTES: Final = 8192
_MAX_JTI: Final = 256


class ProofMemory(Protocol):
    """Replay memory for the ids of proofs.

    Servers that accept the same tokens share one, or each accepts a proof once.
    """

    async def remember(self, id: str, *, key: str, until_s: int, now_s: int) -> bool:
        """Store `id` until `until_s`. Returns False if it is stored already: a replay.

        `key` is the thumbprint of the proof's key; `until_s` and `now_s` are in seconds since 1970. Raises
        UnavailableError if it cannot tell.
        """
        ...


class ProofsInMemory:
    """The replay memory of one process. When full of ids that still count, it refuses more: see `ReplayMemory`."""

    def __init__(self, limit: int = MAX_PROOFS) -> None:
        self._memory = ReplayMemory(limit)

    async def remember(self, id: str, *, key: str, until_s: int, now_s: int) -> bool:
        """Raises UnavailableError if the memory is full. For the rest see `ProofMemory`."""
        try:
            return self._memory.remember(id, sender=key, until_s=until_s, now_s=now_s)
        except ReplayMemoryFullError:
            raise UnavailableError(
                "more proofs came in a minute than can be remembered; ask again later"
            ) from None


class Nonces:
    """DPoP nonces (RFC 9449, 9): a proof with one was made recently, whatever the sender's clock says.

    Stateless: a nonce is its time with a keyed MAC. Servers that accept the same tokens share the secret.
    """

    def __init__(self, secret: bytes | None = None, *, life_s: int = NONCE_LIFE_S) -> None:
        """Args are `secret`, 32 random bytes (None makes one for this process), and `life_s`, the validity of a nonce
        in seconds.
        """
        self._secret = secret or secrets.token_bytes(32)
        self._life_s = life_s

    def fresh(self, now_s: int) -> str:
        """A nonce for this time; `now_s` is in seconds since 1970."""
        issued_at = now_s.to_bytes(8)
        return b64encode(issued_at + self._seal(issued_at))

    def counts(self, nonce: str, now_s: int) -> bool:
        """Return whether this server made the nonce in the last `life_s` seconds. `now_s`: seconds since 1970."""
        try:
            raw = b64decode(nonce)
        except ValueError:
            return False
        issued_at, seal = raw[:8], raw[8:]
        return (
            hmac.compare_digest(seal, self._seal(issued_at))
            and -LEEWAY_S <= now_s - int.from_bytes(issued_at) < self._life_s
        )

    def _seal(self, issued_at: bytes) -> bytes:
        return hmac.digest(self._secret, issued_at, "sha256")[:16]


class ProofError(TokenRejectedError):
    """A request with a bound token has no valid proof."""

    code = Code.INVALID_DPOP_PROOF


class ProofChecker:
    """Verifies DPoP proofs (RFC 9449, 4.3)."""

    def __init__(
        self, *, memory: ProofMemory | None = None, nonces: Nonces | None = None, clock: Clock | None = None
    ) -> None:
        """`nonces`: demand one in each proof; None trusts the proof's own time."""
        self._memory = memory or ProofsInMemory()
        self._nonces = nonces
        self._clock: Clock = clock or SystemClock()

    def nonce(self) -> str | None:
        """The value of the `DPoP-Nonce` header of every answer; None if no nonces are demanded."""
        return None if self._nonces is None else self._nonces.fresh(self._now_s())

    async def check(
        self, proof: str, *, method: str, url: str, access_token: str | None, thumbprint: str
    ) -> None:
        """Verify that a proof is by the key with this thumbprint, for this request and token, recent, and not a replay.

        `access_token`: None for a request without a token. Then the proof must have no `ath`.

        Raises:
            ProofError: it is not; with the code `use_dpop_nonce` where only a valid nonce is missing.
            UnavailableError: the replay memory cannot tell whether it is a replay.
        """
        claims = self._verify_signature(proof, thumbprint)
        self._check_request(claims, method, url, access_token)
        now_s = self._now_s()
        iat_s = claims.get("iat")
        if type(iat_s) is not int or not -PROOF_LIFE_S < iat_s - now_s <= LEEWAY_S:
            raise ProofError(f"the proof is not of the last {PROOF_LIFE_S} s; is the clock right?")
        # A proof needs neither; a sender who includes one means it (RFC 7519 4.1.4 and 4.1.5).
        if not (
            _time_claim(claims, "nbf", 0) <= now_s + LEEWAY_S
            and now_s < _time_claim(claims, "exp", now_s + 1)
        ):
            raise ProofError("the proof is over, or is not to count yet")
        if self._nonces is not None and not self._nonces.counts(str(claims.get("nonce", "")), now_s):
            raise ProofError("make the proof with the nonce of this answer", code=Code.USE_DPOP_NONCE)
        jti = claims.get("jti")
        if not isinstance(jti, str) or not 0 < len(jti) <= _MAX_JTI:
            raise ProofError("the proof has no jti")
        id = b64encode(hashlib.sha256(f"{thumbprint} {jti}".encode()).digest())
        if not await self._memory.remember(id, key=thumbprint, until_s=iat_s + PROOF_LIFE_S, now_s=now_s):
            raise ProofError("the proof came before; make one for each request")

    def _verify_signature(self, proof: str, thumbprint: str) -> dict[str, Any]:
        """The claims, after the signature by the header's key verified and that key is the token's."""
        if len(proof) > MAX_PROOF_BYTES:
            raise ProofError(f"a proof is no longer than {MAX_PROOF_BYTES} bytes")
        try:
            head, body, tail = proof.split(".")
            claims, signature = json_object(b64decode(body)), b64decode(tail)
            key = _proof_key(head)
        except (ValueError, TypeError, KeyError):
            raise ProofError(
                f"not a proof: a JWT with typ {PROOF_TYPE}, alg {' or '.join(PROOF_ALGORITHMS)} and a public jwk"
            ) from None
        if not key.verifies(signature, f"{head}.{body}".encode()):
            raise ProofError("the signature of the proof does not verify")
        if key.kid != thumbprint:
            raise ProofError("the proof is by another key than the token is bound to")
        return claims

    def _check_request(self, claims: dict[str, Any], method: str, url: str, access_token: str | None) -> None:
        try:
            same = _target_uri(str(claims.get("htu"))) == _target_uri(url)
        except ValueError:
            same = False
        if not same or claims.get("htm") != method.upper():
            raise ProofError("the proof is for another request: htm and htu must be its method and URL")
        if access_token is None:
            if "ath" in claims:
                raise ProofError("the proof is for a token, and this request has none: leave ath out")
        elif claims.get("ath") != access_token_hash(access_token):
            raise ProofError("the proof is for another token: ath must be its hash")

    def _now_s(self) -> int:
        return self._clock.now_ms() // 1000


def _time_claim(claims: dict[str, Any], name: str, default: int) -> float:
    """An optional time claim. Raises ProofError if it is no number."""
    value = claims.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ProofError(f"the {name} of the proof is no time")
    return value


_target_uri = functools.lru_cache(maxsize=1024)(target_uri)
"""Cached: a proof repeats the URL of the request, and agents request the same URLs again."""


@functools.lru_cache(maxsize=1024)
def _proof_key(head: str) -> PublicKey:
    """The key in a proof's header, cached by the header's text: all proofs of an agent have the same one.

    Raises ValueError, TypeError, KeyError if it is no valid proof header.
    """
    header = json_object(b64decode(head))
    if header["typ"] != PROOF_TYPE or "crit" in header or "b64" in header:
        raise ValueError("typ")
    jwk = header["jwk"]
    if "d" in jwk:
        raise ValueError("a private key")
    try:
        key = public_key(PublicJwk(**{name: jwk[name] for name in ("kty", "crv", "x", "y") if name in jwk}))
    except ValidationError:
        raise ValueError("jwk") from None
    if key.alg not in PROOF_ALGORITHMS or header["alg"] != key.alg:
        raise ValueError("alg")
    return key
