"""Access token verification for resource servers: JWT (RFC 9068), DPoP binding (RFC 9449), introspection (RFC 7662).

The token issuer, seen by a resource server: discovery document, published keys (JWKS), introspection (RFC 7662).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import jwt
from pydantic import TypeAdapter, ValidationError

from ringfence.client.arguments import Lifetime
from ringfence.client.errors import TokenRejectedError
from ringfence.client.resource_server.challenges import (
    Headers,
    HttpRefusal,
    PresentedToken,
    read_presented_token,
    refusal,
)
from ringfence.client.resource_server.dpop_proofs import (
    Nonces,
    ProofChecker,
    ProofError,
    ProofMemory,
)
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.kernel.base.http_client import web_client
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import PERMISSION_TYPE, Permission, Scope
from ringfence.messages.codes import Code
from ringfence.model.identity.api_tokens import api_token
from ringfence.model.scope.globs import ScopeError, parse_name
from ringfence.model.scope.scope import missing

ALGORITHMS: Final = ("ES256", "RS256")
"""Signature algorithms of tokens. Each key is used with its own algorithm only."""
KEYS_LIFE_S: Final = 300
"""Seconds after which the issuer's keys are fetched again."""
KEYS_RETRY_S: Final = 10
"""Seconds between fetches that an unknown `kid` may cause."""


class TokenIssuer:
    """One issuer, contacted on demand. Its keys are cached for `KEYS_LIFE_S`."""

    def __init__(self, url: str, http: httpx.AsyncClient, clock: Clock) -> None:
        self.url = url.rstrip("/")
        self._http = http
        self._clock = clock
        self._discovery: dict[str, Any] = {}
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at_ms: int | None = None
        self._lock = asyncio.Lock()

    async def key(self, kid: str) -> jwt.PyJWK | None:
        """The key with this `kid`; None if the issuer does not publish it. Raises UnavailableError."""
        async with self._lock:
            age_s = self._age_s()
            if age_s is None or age_s > KEYS_LIFE_S or (kid not in self._keys and age_s > KEYS_RETRY_S):
                await self._fetch_keys()
        return self._keys.get(kid)

    async def is_active(self, token: str, key: SigningKey) -> bool:
        """Whether introspection (RFC 7662) says the token is active; `key` is the target's. Raises UnavailableError."""
        own = api_token(key, "issuer", now_ms=self._clock.now_ms())
        url = str(self._discovery.get("introspection_endpoint"))
        try:
            response = await self._http.post(
                url, data={"token": token}, headers={"Authorization": f"Bearer {own}"}
            )
            answer = response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise _no_answer(url, error) from None
        if response.status_code != httpx.codes.OK or not isinstance(answer, dict):
            message = answer.get("message") if isinstance(answer, dict) else ""
            raise UnavailableError(f"introspection at {url} answered {response.status_code}: {message}")
        return answer.get("active") is True

    def _age_s(self) -> float | None:
        return None if self._fetched_at_ms is None else (self._clock.now_ms() - self._fetched_at_ms) / 1000

    async def _fetch_keys(self) -> None:
        discovery = await self._get_json(f"{self.url}/.well-known/openid-configuration")
        if discovery.get("issuer") != self.url:
            raise UnavailableError(
                f"the discovery document at {self.url} is of issuer {discovery.get('issuer')!r}; "
                "set the issuer's URL as its tokens have it (RINGFENCE_ISSUER_URL)"
            )
        published = await self._get_json(str(discovery.get("jwks_uri")))
        keys = [_parse_jwk(fields) for fields in published.get("keys", [])]
        self._keys = {key.key_id: key for key in keys if key is not None and key.key_id}
        self._discovery, self._fetched_at_ms = discovery, self._clock.now_ms()

    async def _get_json(self, url: str) -> dict[str, Any]:
        try:
            response = await self._http.get(url)
            response.raise_for_status()
            answer = response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise _no_answer(url, error) from None
        if not isinstance(answer, dict):
            raise UnavailableError(f"{url} answered no JSON object; is this the issuer?")
        return answer


def _parse_jwk(fields: Any) -> jwt.PyJWK | None:
    """A published key for tokens, with its one algorithm; None for a key of another kind."""
    if not isinstance(fields, dict) or fields.get("alg") not in ALGORITHMS:
        return None
    try:
        return jwt.PyJWK(fields, algorithm=fields["alg"])
    except jwt.PyJWTError:
        return None


def _no_answer(url: str, error: Exception) -> RingfenceError:
    return UnavailableError(f"{url} does not answer ({type(error).__name__}); is the issuer up?")


TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - a media type
"""The `typ` of an access token (RFC 9068, 2.1)."""

_PERMISSIONS: Final = TypeAdapter(tuple[Permission, ...])


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """An access token of Ringfence whose signature, issuer, audience, type and time hold."""

    agent: str
    """The agent that acts: its SPIFFE ID (`sub`)."""
    task: str
    sponsor: str
    """The user accountable for the agent."""
    on_behalf_of: str
    """The user for whom the agent acts."""
    lease_id: str
    """`jti`: the id of the lease, for `ringfence audit trace`."""
    permissions: Scope
    expires_at: int
    """Seconds since 1970, UTC."""
    key_thumbprint: str | None
    """`cnf.jkt` (RFC 9449, 6.1): the agent's key that the token is bound to; None for a bearer token."""
    claims: dict[str, Any] = field(repr=False)
    act: tuple[str, ...] = ()
    """The agents that act, by their SPIFFE IDs: `agent` first, then those that handed the task on (RFC 8693, 4.1)."""

    def allows(self, verb: str, resource: str) -> bool:
        """Return whether the token allows `verb` on one fully named resource; False for an illegal resource name."""
        try:
            parse_name(resource)
            wanted = [
                Permission(target=p.target, verbs=(verb,), resources=(resource,)) for p in self.permissions
            ]
        except (ScopeError, ValidationError):
            return False
        return any(not missing((one,), self.permissions) for one in wanted)

    def require(self, verb: str, resource: str) -> None:
        """Demand that the token allows `verb` on one fully named `resource`.

        Raises TokenRejectedError (code `insufficient_scope`) if it does not.
        """
        if not self.allows(verb, resource):
            raise TokenRejectedError(
                f"the token of {self.agent} (lease {self.lease_id}) does not allow {verb} on {resource}",
                code=Code.INSUFFICIENT_SCOPE,
            )


class TokenVerifier(Lifetime):
    """Verifies tokens of one issuer for one audience by the issuer's published keys, and by introspection where a key
    is given.

    Without introspection a token is valid until its `exp`. With it, a token is refused as soon as its lease is cut.
    A DPoP-bound token is valid only with a proof by its key, so only in `verify_request`.
    """

    def __init__(
        self,
        issuer_url: str,
        audience: str,
        introspection_key: SigningKey | None = None,
        *,
        require_proof: bool = False,
        nonces: Nonces | None = None,
        proof_memory: ProofMemory | None = None,
        http: httpx.AsyncClient | None = None,
        clock: Clock | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        """Args:
            issuer_url: the `iss` of tokens; its OIDC discovery document names everything else.
            audience: who this resource server is (`aud`), by default its target's SPIFFE ID.
            introspection_key: the key that the target was registered with; each token is then also asked about.
            require_proof: take no tokens but those that are bound to a key.
            nonces: demand one of them in each proof.
            proof_memory: where it is remembered which proofs came; in this process where None.
            http: a client to use; one of its own where None.
            clock: the time; None takes the clock of this machine.
            timeout_s: how long the issuer may take for an answer, in seconds.
        """  # fmt: skip
        self._audience = audience
        self._introspection_key = introspection_key
        self.require_proof = require_proof
        self._clock: Clock = clock or SystemClock()
        self._own_http = http is None
        self._http = http or web_client(timeout_s=timeout_s)
        self._issuer = TokenIssuer(issuer_url, self._http, self._clock)
        self._proofs = ProofChecker(memory=proof_memory, nonces=nonces, clock=self._clock)

    async def close(self) -> None:
        """Close the HTTP client if it is its own. `async with` does it."""
        if self._own_http:
            await self._http.aclose()

    async def verify_request(
        self,
        method: str,
        url: str,
        headers: Headers,
        *,
        verb: str | None = None,
        resource: str | None = None,
    ) -> VerifiedToken:
        """Verify all that a resource server must check for one request.

        Checks the token's signature, issuer, audience and times, and the DPoP proof if the token is bound to a key.
        Asks introspection if a key for it was given. Checks that the token allows `verb` on `resource`, if they are
        given.

        Args:
            method, url: of the request. The URL as the agent wrote it, before any proxy rewrote it.
            headers: all headers; as pairs, where a name can occur twice.

        Raises:
            TokenRejectedError: the request must be refused. `code` is `token_missing`, `invalid_request`,
                `invalid_token`, `inactive`, `invalid_dpop_proof`, `use_dpop_nonce` or `insufficient_scope`; `refusal`
                makes the HTTP answer.
            UnavailableError: the issuer does not answer: nothing can be accepted now.
        """
        token_header = read_presented_token(headers)
        try:
            verified = await self._verified(token_header.token)
            await self._check_binding(verified, token_header, method, url)
            await self._check_active(verified, token_header.token)
            if verb is not None or resource is not None:
                verified.require(verb or "", resource or "")
        except TokenRejectedError as error:
            error.scheme = token_header.scheme
            raise
        return verified

    async def verify(self, token: str) -> VerifiedToken:
        """Verify a bearer token.

        Raises:
            TokenRejectedError: the token must not be accepted; `code` is `invalid_token`, or `inactive` where
                introspection said so.
            UnavailableError: the issuer does not answer: nothing can be accepted now.
        """
        verified = await self._verified(token)
        self._check_bearer(verified)
        await self._check_active(verified, token)
        return verified

    async def verify_header(self, authorization: str | None) -> VerifiedToken:
        """Verify the value of an `Authorization` header: `authorization` is `Bearer TOKEN` (RFC 6750).

        Raises as `verify`.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _rejected("send Authorization: Bearer with a token of Ringfence")
        return await self.verify(token.strip())

    def refusal(self, error: RingfenceError) -> HttpRefusal:
        """The HTTP answer to a request for which `verify_request` raised `error`."""
        return refusal(error, require_proof=self.require_proof, nonce=self.nonce())

    def nonce(self) -> str | None:
        """The value of the `DPoP-Nonce` header of every answer; None if no nonces are demanded."""
        return self._proofs.nonce()

    async def _verified(self, token: str) -> VerifiedToken:
        return self._read(await self._verified_claims(token))

    def _check_bearer(self, verified: VerifiedToken) -> None:
        if verified.key_thumbprint is not None:
            raise _rejected("the token is bound to the agent's key: send Authorization: DPoP, and a proof")
        if self.require_proof:
            raise _rejected(
                "only tokens that are bound to the agent's key are taken here (the target's dpop)"
            )

    async def _check_binding(
        self, verified: VerifiedToken, token_header: PresentedToken, method: str, url: str
    ) -> None:
        if token_header.scheme == "Bearer":
            self._check_bearer(verified)
            return
        if verified.key_thumbprint is None:
            raise _rejected("the token is bound to no key: send Authorization: Bearer")
        if len(token_header.proofs) != 1:
            raise ProofError(f"send one DPoP header with a proof; {len(token_header.proofs)} came")
        await self._proofs.check(
            token_header.proofs[0], method=method, url=url,
            access_token=token_header.token, thumbprint=verified.key_thumbprint,
        )  # fmt: skip

    async def _check_active(self, verified: VerifiedToken, token: str) -> None:
        key = self._introspection_key
        if key is not None and not await self._issuer.is_active(token, key):
            raise TokenRejectedError(
                f"lease {verified.lease_id} has ended (introspection says inactive); ask for a new credential",
                code=Code.INACTIVE,
            )

    async def _verified_claims(self, token: str) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)  # to find the key; what it says is checked below
        except jwt.InvalidTokenError:
            raise _rejected("not a JWT") from None
        if header.get("typ") != TOKEN_TYPE or header.get("alg") not in ALGORITHMS:
            raise _rejected(
                f"not an access token: typ must be {TOKEN_TYPE} and alg {' or '.join(ALGORITHMS)}"
            )
        kid = str(header.get("kid"))
        key = await self._issuer.key(kid)
        if key is None:
            raise _rejected(f"{self._issuer.url} publishes no key {kid[:43]!r}")
        try:
            # Times are judged below: PyJWT would read the machine's clock.
            claims: dict[str, Any] = jwt.decode(
                token, key, algorithms=[key.algorithm_name], audience=self._audience, issuer=self._issuer.url,
                options={
                    "require": ["iss", "aud", "sub", "jti", "exp", "iat"],
                    "verify_exp": False, "verify_iat": False, "verify_nbf": False,
                },
            )  # fmt: skip
        except jwt.InvalidAudienceError:
            raise _rejected(f"the token is for another audience than {self._audience}") from None
        except jwt.InvalidIssuerError:
            raise _rejected(f"the token is of another issuer than {self._issuer.url}") from None
        except jwt.InvalidTokenError as error:
            raise _rejected(f"the token does not verify ({type(error).__name__})") from None
        self._check_times(claims)
        return claims

    def _check_times(self, claims: dict[str, Any]) -> None:
        now_s = self._clock.now_ms() / 1000
        times = [claims["exp"], claims["iat"], claims.get("nbf", 0)]
        if not all(isinstance(time, int) for time in times):
            raise _rejected("exp, iat and nbf must be whole seconds")
        if claims["exp"] <= now_s:
            raise _rejected(f"the token expired {now_s - claims['exp']:.0f} s ago")
        if max(claims["iat"], claims.get("nbf", 0)) > now_s + LEEWAY_S:
            raise _rejected("the token is not valid yet; is the clock right?")

    def _read(self, claims: dict[str, Any]) -> VerifiedToken:
        details = claims.get("authorization_details")
        try:
            permissions = _PERMISSIONS.validate_python(
                tuple(
                    {
                        **{k: v for k, v in detail.items() if k != "type"},
                        "verbs": tuple(detail["verbs"]),
                        "resources": tuple(detail["resources"]),
                    }
                    for detail in details or ()
                    if detail["type"] == PERMISSION_TYPE
                )
            )
            return VerifiedToken(
                agent=_text(claims, "sub"),
                task=_text(claims, "task"),
                sponsor=_text(claims, "sponsor"),
                on_behalf_of=_text(claims, "on_behalf_of"),
                lease_id=_text(claims, "jti"),
                permissions=permissions,
                expires_at=claims["exp"],
                key_thumbprint=_bound_to(claims["cnf"]) if "cnf" in claims else None,
                claims=claims,
                act=_actors(claims),
            )
        except (ValidationError, KeyError, TypeError, AttributeError):
            raise _rejected(
                "the token lacks what a token of Ringfence says, or says it in another form"
            ) from None


def _bound_to(cnf: Any) -> str | None:
    """The thumbprint of the key that a proof must be by. None where `cnf` (RFC 7800) only has a `kid`.

    Raises KeyError or TypeError if it demands another kind of confirmation.
    """
    if "jkt" not in cnf and cnf.keys() == {"kid"}:
        _text(cnf, "kid")
        return None
    return _text(cnf, "jkt")


def _actors(claims: dict[str, Any]) -> tuple[str, ...]:
    """The nested actors, outermost first. Raises KeyError, TypeError, AttributeError if they are no such thing."""
    found: list[str] = []
    actor: Any = claims.get("act")
    while actor is not None:
        found.append(_text(actor, "sub"))
        actor = actor.get("act")
    return tuple(found)


def _text(claims: dict[str, Any], name: str) -> str:
    value = claims[name]
    if not isinstance(value, str) or not value:
        raise TypeError(name)
    return value


def _rejected(message: str) -> TokenRejectedError:
    return TokenRejectedError(message, code=Code.INVALID_TOKEN)
