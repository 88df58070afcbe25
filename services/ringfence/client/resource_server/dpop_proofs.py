"""The resource server's side of RFC 9449 (DPoP): does this request come from who has the key of its token?"""

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
from ringfence.messages.keys import PublicJwk

PROOF_ALGORITHMS: Final = ("ES256", "EdDSA")
PROOF_LIFE_S: Final = 60
"""How old a proof may be. So long its id is remembered, and the time by which clocks may differ."""
NONCE_LIFE_S: Final = 300
MAX_PROOFS: Final = 200_000
MAX_PROOF_BYTES: Final = 8192
_MAX_JTI: Final = 256


class ProofMemory(Protocol):
    """Where the ids of proofs are remembered. Servers that share tokens share one, or a proof counts once at each."""

    async def remember(self, id: str, *, key: str, until_s: int, now_s: int) -> bool:
        """Keep `id` until then; False where it is there already. Raises UnavailableError where nobody can tell.

        `key`: the thumbprint of whose proof it is.
        """
        ...


class ProofsInMemory:
    """The ids of one process. Full of those that still count, it takes no more: see `ReplayMemory`."""

    def __init__(self, limit: int = MAX_PROOFS) -> None:
        self._memory = ReplayMemory(limit)

    async def remember(self, id: str, *, key: str, until_s: int, now_s: int) -> bool:
        """See `ProofMemory`."""
        try:
            return self._memory.remember(id, sender=key, until_s=until_s, now_s=now_s)
        except ReplayMemoryFullError:
            raise UnavailableError(
                "more proofs came in a minute than can be remembered; ask again later"
            ) from None


class Nonces:
    """Values that this server alone makes: a proof that has one was made lately, whatever the sender's clock says.

    Nothing is kept: a nonce is its time, sealed with a secret. Servers that share tokens share the secret.
    """

    def __init__(self, secret: bytes | None = None, *, life_s: int = NONCE_LIFE_S) -> None:
        """`secret`: 32 random bytes; some of this process's own where None."""
        self._secret = secret or secrets.token_bytes(32)
        self._life_s = life_s

    def fresh(self, now_s: int) -> str:
        """The nonce of this moment."""
        made = now_s.to_bytes(8)
        return b64encode(made + self._seal(made))

    def counts(self, nonce: str, now_s: int) -> bool:
        """Whether it was made here, and lately."""
        try:
            raw = b64decode(nonce)
        except ValueError:
            return False
        made, seal = raw[:8], raw[8:]
        return (
            hmac.compare_digest(seal, self._seal(made))
            and -LEEWAY_S <= now_s - int.from_bytes(made) < self._life_s
        )

    def _seal(self, made: bytes) -> bytes:
        return hmac.digest(self._secret, made, "sha256")[:16]


class ProofError(TokenRejectedError):
    """A request with a bound token whose proof is missing or does not hold."""

    code = "invalid_dpop_proof"


class ProofChecker:
    """Checks the proof of one request after the other (RFC 9449, 4.3)."""

    def __init__(
        self, *, memory: ProofMemory | None = None, nonces: Nonces | None = None, clock: Clock | None = None
    ) -> None:
        """`nonces`: demanded in each proof; where None, a proof's own time is believed."""
        self._memory = memory or ProofsInMemory()
        self._nonces = nonces
        self._clock: Clock = clock or SystemClock()

    def nonce(self) -> str | None:
        """What the next proof should have: the `DPoP-Nonce` of every answer. None where none is demanded."""
        return None if self._nonces is None else self._nonces.fresh(self._now_s())

    async def check(self, proof: str, *, method: str, url: str, access_token: str, thumbprint: str) -> None:
        """Whether the proof is by the key with this thumbprint, for this request and token, of now, and new.

        Raises:
            ProofError: it is not; code `use_dpop_nonce` where it lacks but a nonce that counts.
            UnavailableError: whether it came before, nobody can tell.
        """
        claims = self._signed_by(proof, thumbprint)
        self._about(claims, method, url, access_token)
        now_s = self._now_s()
        made_s = claims.get("iat")
        if type(made_s) is not int or not -PROOF_LIFE_S < made_s - now_s <= LEEWAY_S:
            raise ProofError(f"the proof is not of the last {PROOF_LIFE_S} s; is the clock right?")
        # A proof needs neither; whoever gives one means it (RFC 7519, 4.1.4 and 4.1.5).
        if not (_moment(claims, "nbf", 0) <= now_s + LEEWAY_S and now_s < _moment(claims, "exp", now_s + 1)):
            raise ProofError("the proof is over, or is not to count yet")
        if self._nonces is not None and not self._nonces.counts(str(claims.get("nonce", "")), now_s):
            raise ProofError("make the proof with the nonce of this answer", code="use_dpop_nonce")
        jti = claims.get("jti")
        if not isinstance(jti, str) or not 0 < len(jti) <= _MAX_JTI:
            raise ProofError("the proof has no jti")
        id = b64encode(hashlib.sha256(f"{thumbprint} {jti}".encode()).digest())
        if not await self._memory.remember(id, key=thumbprint, until_s=made_s + PROOF_LIFE_S, now_s=now_s):
            raise ProofError("the proof came before; make one for each request")

    def _signed_by(self, proof: str, thumbprint: str) -> dict[str, Any]:
        """Its claims, once its signature by the key in its own header holds, and that is the token's."""
        if len(proof) > MAX_PROOF_BYTES:
            raise ProofError(f"a proof is no longer than {MAX_PROOF_BYTES} bytes")
        try:
            head, body, tail = proof.split(".")
            claims, signature = json_object(b64decode(body)), b64decode(tail)
            key = _key_in(head)
        except (ValueError, TypeError, KeyError):
            raise ProofError(
                f"not a proof: a JWT with typ {PROOF_TYPE}, alg {' or '.join(PROOF_ALGORITHMS)} and a public jwk"
            ) from None
        if not key.verifies(signature, f"{head}.{body}".encode()):
            raise ProofError("the signature of the proof does not verify")
        if key.kid != thumbprint:
            raise ProofError("the proof is by another key than the token is bound to")
        return claims

    def _about(self, claims: dict[str, Any], method: str, url: str, access_token: str) -> None:
        try:
            same = _target_uri(str(claims.get("htu"))) == _target_uri(url)
        except ValueError:
            same = False
        if not same or claims.get("htm") != method.upper():
            raise ProofError("the proof is for another request: htm and htu must be its method and URL")
        if claims.get("ath") != access_token_hash(access_token):
            raise ProofError("the proof is for another token: ath must be its hash")

    def _now_s(self) -> int:
        return self._clock.now_ms() // 1000


def _moment(claims: dict[str, Any], name: str, otherwise: int) -> float:
    """A time that a proof may have. Raises ProofError where it is none."""
    value = claims.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ProofError(f"the {name} of the proof is no time")
    return value


_target_uri = functools.lru_cache(maxsize=1024)(target_uri)
"""A proof names the URL as the request does, and agents ask for the same again."""


@functools.lru_cache(maxsize=1024)
def _key_in(head: str) -> PublicKey:
    """The key in a proof's header, as it was sent: an agent's proofs all have the same one.

    Raises ValueError, TypeError, KeyError where the header is none of a proof.
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
