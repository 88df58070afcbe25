"""Who calls an HTTP API, and what they may see."""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.kernel.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.jws import KeyFinder, open_signed, parse
from ringfence.kernel.trust import TrustStore
from ringfence.messages.api import MAX_API_TOKEN_S, ApiToken
from ringfence.messages.registry import UserState
from ringfence.model.directory import Directory
from ringfence.model.identity import subject_of


class UnauthenticatedError(RingfenceError):
    """The call bears no valid token."""

    code = "unauthenticated"


class ForbiddenError(RingfenceError):
    """The caller is known and may not see this."""

    code = "forbidden"


class NotFoundError(RingfenceError):
    """There is no such thing to see."""

    code = "not_found"


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated user and what they may see: operators and auditors all, sponsors their own agents."""

    user: UserState

    @property
    def sees_all(self) -> bool:
        return bool({"operator", "auditor"} & set(self.user.roles))

    def may_see_agent_of(self, sponsor: str) -> bool:
        """True where the caller may see an agent with this sponsor."""
        return self.sees_all or self.user.user_id == sponsor


def authenticate_user(
    authorization: str | None, directory: Directory, trust_domain: str, now_ms: int
) -> Caller:
    """The user who signed the bearer token of a call. Raises UnauthenticatedError."""
    iss = _verified_iss(
        authorization, lambda iss, kid: directory.user_key(iss, kid, now_ms / 1000), trust_domain, now_ms
    )
    entry = directory.user(subject_of(trust_domain, iss, "user") or "")
    if entry is None:
        raise UnauthenticatedError(f"{iss} is no user")
    return Caller(entry.state)


def authenticate_target(
    authorization: str | None, directory: Directory, trust_domain: str, now_ms: int
) -> str:
    """The target whose resource server signed the bearer token of a call. Raises UnauthenticatedError."""
    iss = _verified_iss(
        authorization, lambda iss, kid: directory.target_key(iss, kid, now_ms / 1000), trust_domain, now_ms
    )
    return subject_of(trust_domain, iss, "target") or ""


def authenticate_gateway(authorization: str | None, trust: TrustStore, now_ms: int) -> str:
    """The SPIFFE ID of the gateway that signed the bearer token of a call. Raises UnauthenticatedError."""
    return _verified_iss(
        authorization, trust.finder("gateway", at_s=now_ms / 1000), trust.trust_domain, now_ms
    )


def _verified_iss(authorization: str | None, find_key: KeyFinder, trust_domain: str, now_ms: int) -> str:
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise UnauthenticatedError(
            "send Authorization: Bearer with a JWT (typ ringfence.api+jwt) signed by your key"
        )
    try:
        claims = open_signed(
            parse(token.strip()), ApiToken, find_key, audience=trust_domain, appended_at_ms=now_ms
        ).claims
    except InvalidMessageError as error:
        raise UnauthenticatedError(f"the bearer token is refused: {error}") from None
    if claims.exp - claims.iat > MAX_API_TOKEN_S:
        raise UnauthenticatedError(f"the bearer token lives longer than {MAX_API_TOKEN_S} s; sign it shorter")
    return claims.iss
