"""For resource servers: is this bearer token good, whose is it, and what does it allow?"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import jwt
from pydantic import TypeAdapter, ValidationError

from ringfence.client.errors import TokenRejectedError
from ringfence.client.lifetime import Lifetime
from ringfence.kernel.clock import Clock, SystemClock
from ringfence.kernel.errors import RingfenceError, UnavailableError
from ringfence.kernel.jws import LEEWAY_S, sign
from ringfence.kernel.keys import SigningKey
from ringfence.messages.api import MAX_API_TOKEN_S, ApiToken
from ringfence.messages.permission import PERMISSION_TYPE, Permission, Scope
from ringfence.model.scope import ScopeError, missing, parse_name

TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - a media type
"""The `typ` of an access token (RFC 9068, 2.1)."""
ALGORITHM: Final = "ES256"
KEYS_LIFE_S: Final = 300
"""How old the issuer's keys may be before they are fetched again."""
KEYS_RETRY_S: Final = 10
"""How often an unknown `kid` may make them be fetched again."""

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
    """`jti`: with it the credential's story is found (`ringfence audit trace`)."""
    permissions: Scope
    expires_at: int
    """Seconds since 1970, UTC."""
    key_thumbprint: str | None
    """`cnf.jkt` (RFC 9449, 6.1): the agent's key that the token is bound to."""
    claims: dict[str, Any] = field(repr=False)

    def allows(self, verb: str, resource: str) -> bool:
        """Whether the token allows this verb on this one resource, named in full. What is no legal name is not."""
        try:
            parse_name(resource)
            wanted = [
                Permission(target=p.target, verbs=(verb,), resources=(resource,)) for p in self.permissions
            ]
        except (ScopeError, ValidationError):
            return False
        return any(not missing((one,), self.permissions) for one in wanted)

    def require(self, verb: str, resource: str) -> None:
        """Raises TokenRejectedError (code `insufficient_scope`) where the token does not allow it."""
        if not self.allows(verb, resource):
            raise TokenRejectedError(
                f"the token of {self.agent} (lease {self.lease_id}) does not allow {verb} on {resource}",
                code="insufficient_scope",
            )


class TokenVerifier(Lifetime):
    """Verifies tokens of one issuer for one audience: by its published keys, and by introspection where a key is given.

    Without introspection a token is good until its `exp`; with it, from the cut on it is refused.
    """

    def __init__(
        self,
        issuer_url: str,
        audience: str,
        introspection_key: SigningKey | None = None,
        *,
        http: httpx.AsyncClient | None = None,
        clock: Clock | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        """Args:
            issuer_url: the `iss` of tokens; its OIDC discovery document names everything else.
            audience: who this resource server is (`aud`), by default its target's SPIFFE ID.
            introspection_key: the key that the target was registered with; each token is then also asked about.
            http: a client to use; one of its own where None.
        """  # fmt: skip
        self._issuer = issuer_url.rstrip("/")
        self._audience = audience
        self._introspection_key = introspection_key
        self._clock: Clock = clock or SystemClock()
        self._own_http = http is None
        self._http = http or httpx.AsyncClient(timeout=timeout_s)
        self._discovery: dict[str, Any] = {}
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at_ms: int | None = None
        self._lock = asyncio.Lock()

    async def close(self) -> None:
        """Close the HTTP client if it is its own. `async with` does it."""
        if self._own_http:
            await self._http.aclose()

    async def verify(self, token: str) -> VerifiedToken:
        """Verify a token.

        Raises:
            TokenRejectedError: the token must not be accepted; `code` is `invalid_token`, or `inactive` where
                introspection said so.
            UnavailableError: the issuer does not answer: nothing can be accepted now.
        """
        claims = await self._verified_claims(token)
        verified = self._read(claims)
        if self._introspection_key is not None and not await self._is_active(token, self._introspection_key):
            raise TokenRejectedError(
                f"lease {verified.lease_id} has ended (introspection says inactive); ask for a new credential",
                code="inactive",
            )
        return verified

    async def verify_header(self, authorization: str | None) -> VerifiedToken:
        """Verify what stands in an `Authorization` header (`Bearer ...`, RFC 6750). Raises as `verify`."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _rejected("send Authorization: Bearer with a token of Ringfence")
        return await self.verify(token.strip())

    async def _verified_claims(self, token: str) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)  # to find the key; what it says is checked below
        except jwt.InvalidTokenError:
            raise _rejected("not a JWT") from None
        if header.get("typ") != TOKEN_TYPE or header.get("alg") != ALGORITHM:
            raise _rejected(f"not an access token: typ must be {TOKEN_TYPE} and alg {ALGORITHM}")
        key = await self._key(str(header.get("kid")))
        try:
            # Times are judged below: PyJWT would read the machine's clock.
            claims: dict[str, Any] = jwt.decode(
                token, key, algorithms=[ALGORITHM], audience=self._audience, issuer=self._issuer,
                options={
                    "require": ["iss", "aud", "sub", "jti", "exp", "iat"],
                    "verify_exp": False, "verify_iat": False, "verify_nbf": False,
                },
            )  # fmt: skip
        except jwt.InvalidAudienceError:
            raise _rejected(f"the token is for another audience than {self._audience}") from None
        except jwt.InvalidIssuerError:
            raise _rejected(f"the token is of another issuer than {self._issuer}") from None
        except jwt.InvalidTokenError as error:
            raise _rejected(f"the token does not verify ({type(error).__name__})") from None
        now_s = self._clock.now_ms() / 1000
        times = [claims["exp"], claims["iat"], claims.get("nbf", 0)]
        if not all(isinstance(time, int) for time in times):
            raise _rejected("exp, iat and nbf must be whole seconds")
        if claims["exp"] <= now_s:
            raise _rejected(f"the token expired {now_s - claims['exp']:.0f} s ago")
        if max(claims["iat"], claims.get("nbf", 0)) > now_s + LEEWAY_S:
            raise _rejected("the token is not valid yet; is the clock right?")
        return claims

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
                key_thumbprint=(claims.get("cnf") or {}).get("jkt"),
                claims=claims,
            )
        except (ValidationError, KeyError, TypeError, AttributeError):
            raise _rejected(
                "the token lacks what a token of Ringfence says, or says it in another form"
            ) from None

    # --- the issuer ---

    async def _key(self, kid: str) -> jwt.PyJWK:
        async with self._lock:
            age_s = self._age_s()
            if age_s is None or age_s > KEYS_LIFE_S or (kid not in self._keys and age_s > KEYS_RETRY_S):
                await self._fetch_keys()
        if kid not in self._keys:
            raise _rejected(f"{self._issuer} publishes no key {kid[:43]!r}")
        return self._keys[kid]

    def _age_s(self) -> float | None:
        return None if self._fetched_at_ms is None else (self._clock.now_ms() - self._fetched_at_ms) / 1000

    async def _fetch_keys(self) -> None:
        discovery = await self._get_json(f"{self._issuer}/.well-known/openid-configuration")
        if discovery.get("issuer") != self._issuer:
            raise UnavailableError(
                f"the discovery document at {self._issuer} is of issuer {discovery.get('issuer')!r}; "
                "set the issuer's URL as its tokens have it (RINGFENCE_ISSUER_URL)"
            )
        keys = await self._get_json(str(discovery.get("jwks_uri")))
        found = {}
        for fields in keys.get("keys", []):
            try:
                key = jwt.PyJWK(fields, algorithm=ALGORITHM)
            except jwt.PyJWTError:
                continue  # a key of another kind is none of ours
            if key.key_id:
                found[key.key_id] = key
        self._discovery, self._keys, self._fetched_at_ms = discovery, found, self._clock.now_ms()

    async def _is_active(self, token: str, key: SigningKey) -> bool:
        now_s = self._clock.now_ms() // 1000
        # The audience of API tokens is the trust domain, which the key's own id names.
        trust_domain = key.id.removeprefix("spiffe://").partition("/")[0]
        own = sign(
            ApiToken(
                iss=key.id, aud=trust_domain, iat=now_s, exp=now_s + MAX_API_TOKEN_S, jti=str(uuid.uuid4())
            ),
            key,
        )
        url = str(self._discovery.get("introspection_endpoint"))
        try:
            response = await self._http.post(
                url, data={"token": token}, headers={"Authorization": f"Bearer {own}"}
            )
            answer = response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise _no_answer(url, error) from None
        if response.status_code != httpx.codes.OK or not isinstance(answer, dict):
            said = answer.get("message") if isinstance(answer, dict) else ""
            raise UnavailableError(f"introspection at {url} answered {response.status_code}: {said}")
        return answer.get("active") is True

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


def _text(claims: dict[str, Any], name: str) -> str:
    value = claims[name]
    if not isinstance(value, str) or not value:
        raise TypeError(name)
    return value


def _rejected(message: str) -> TokenRejectedError:
    return TokenRejectedError(message, code="invalid_token")


def _no_answer(url: str, error: Exception) -> RingfenceError:
    return UnavailableError(f"{url} does not answer ({type(error).__name__}); is the issuer up?")
