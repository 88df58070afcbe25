"""Who calls an HTTP API, and what they may see."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from ringfence.kernel.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.jws import KeyFinder, open_signed, parse
from ringfence.kernel.keys import PublicKey, valid_key
from ringfence.kernel.text import visible_name
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
    uncounted = _Uncounted(directory, now_ms / 1000)
    iss = _verified_iss(
        authorization,
        lambda iss, kid: directory.user_key(iss, kid, now_ms / 1000),
        trust_domain,
        now_ms,
        uncounted,
    )
    entry = directory.user(subject_of(trust_domain, iss, "user") or "")
    if entry is None:
        raise UnauthenticatedError(f"{visible_name(iss[:512])} is no user")
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


class _Uncounted:
    """Finds a user's key that does not count now, only for whoever signs by it to be told why."""

    def __init__(self, directory: Directory, at_s: float) -> None:
        self._directory = directory
        self._at_s = at_s
        self.why = ""

    def __call__(self, iss: str, kid: str) -> PublicKey | None:
        user_id = subject_of(self._directory.trust.trust_domain, iss, "user") or ""
        entry = self._directory.user(user_id)
        record = next((key for key in entry.state.keys if key.kid == kid), None) if entry else None
        if entry is None or record is None or entry.state.delegation is not None:
            return None
        if entry.state.status != "active":
            self.why = (
                f"user {user_id} is {entry.state.status}; an operator can set them again: ringfence user set"
            )
        elif self._at_s >= record.not_after:
            self.why = (
                f"key {kid} of user {user_id} ended at {_utc(record.not_after)}; use the key that follows it, or let "
                "an operator set one: ringfence user set --public-key"
            )
        else:
            self.why = f"key {kid} of user {user_id} counts only from {_utc(record.not_before)} on"
        return valid_key((record,), kid, record.not_before)

    def no_user(self, token: str) -> str | None:
        """What is said to who signs as somebody else than a user: no more than they said themselves."""
        iss = parse(token.strip()).unverified_claims(ApiToken).iss
        if subject_of(self._directory.trust.trust_domain, iss, "user") is not None:
            return None
        return (
            f"{visible_name(iss[:512])} is no user, and users alone are answered here: call with a user's key"
        )


def _utc(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")


def _verified_iss(
    authorization: str | None,
    find_key: KeyFinder,
    trust_domain: str,
    now_ms: int,
    uncounted: _Uncounted | None = None,
) -> str:
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
        why = (
            _told_to_its_holder(token, trust_domain, now_ms, uncounted)
            if error.code == "key_unknown"
            else None
        )
        raise UnauthenticatedError(f"the bearer token is refused: {why or error}") from None
    if claims.exp - claims.iat > MAX_API_TOKEN_S:
        raise UnauthenticatedError(f"the bearer token lives longer than {MAX_API_TOKEN_S} s; sign it shorter")
    return claims.iss


def _told_to_its_holder(
    token: str, trust_domain: str, now_ms: int, uncounted: _Uncounted | None
) -> str | None:
    """Why a key does not count, where the token is one that its holder signed just now. Strangers learn nothing."""
    if uncounted is None:
        return None
    try:
        open_signed(parse(token.strip()), ApiToken, uncounted, audience=trust_domain, appended_at_ms=now_ms)
    except InvalidMessageError:
        return uncounted.no_user(token)
    return uncounted.why
