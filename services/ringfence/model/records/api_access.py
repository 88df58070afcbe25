"""Authentication and access rules of the HTTP APIs: who calls, and what they may see."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ringfence.kernel.base.clock import Clock, utc_text
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.base.replay_memory import ReplayMemory
from ringfence.kernel.base.text import visible_name
from ringfence.kernel.crypto.jws import KeyFinder, Signed, UnverifiedJws, is_by_passkey, parse, verify
from ringfence.kernel.crypto.keys import PublicKey, valid_key
from ringfence.messages.api import (
    CONSOLE_ROUTES,
    MAX_API_TOKEN_S,
    ApiToken,
    ConsoleToken,
    api_audience,
)
from ringfence.messages.base import ServiceRole, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.registry import SessionStatement, UserState
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory

MAX_REMEMBERED: Final = 200_000
"""How many API tokens of the last minute a replica remembers against replay; about 40 MB."""


_PAUSE_EVERY: Final = 20
_BROKEN_RECORD: Final = "the record of its user counts for nothing; the audit trail says why (chain_broken)"


class UnauthenticatedError(RingfenceError):
    """Raised when a call has no valid bearer token (status 401)."""

    code = Code.UNAUTHENTICATED


class ForbiddenError(RingfenceError):
    """Raised when the caller is authenticated, and may not see this (status 403)."""

    code = Code.FORBIDDEN


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated user. Operators and auditors see everything, sponsors their own agents."""

    user: UserState

    @property
    def sees_all(self) -> bool:
        return bool({"operator", "auditor"} & set(self.user.roles))

    def may_see_agent_of(self, sponsor: str) -> bool:
        """Whether the caller may see agents of this sponsor."""
        return self.sees_all or self.user.user_id == sponsor


async def sponsored_agents(directory: Directory, user_id: str) -> tuple[str, ...]:
    """The ids of the agents that a user sponsors now, sorted. Other tasks run between the verifications of records."""
    own: list[str] = []
    for agent in directory.agents_of(user_id):
        own.append(agent.state.agent_id)
        if len(own) % _PAUSE_EVERY == 0:
            await asyncio.sleep(0)
    return tuple(own)


class HttpRequest(Protocol):
    """An HTTP request, as far as authentication reads it."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The request's headers; names are compared without case."""
        ...

    @property
    def method(self) -> str:
        """The request's method."""
        ...

    @property
    def scope(self) -> MutableMapping[str, Any]:
        """The ASGI scope: its path is what routes are matched against. The URL is put together with a header."""
        ...


class Authenticator:
    """Authenticates calls of one service's HTTP API by API tokens. A token is for this service, and can be used once.

    The memory of used tokens is this replica's. Another replica, or this one after a restart, may accept a token again.
    """

    def __init__(
        self,
        directory: Directory,
        service: ServiceRole,
        clock: Clock,
        on_session: Callable[[Signed[SessionStatement]], None] = lambda statement: None,
    ) -> None:
        """`on_session` receives the statement by which a console reads for somebody, at each of its calls."""
        self._directory = directory
        self._on_session = on_session
        self._trust = directory.trust
        self._trust_domain = directory.trust.trust_domain
        self._audience = api_audience(self._trust_domain, service)
        self._clock = clock
        self._used = ReplayMemory(MAX_REMEMBERED)
        routes = (re.sub(r"\{\w+\}", "[^/]+", route) for route in CONSOLE_ROUTES.get(service, ()))
        self._console_routes = re.compile("|".join(routes) or r"(?!)")

    def authenticate(self, request: HttpRequest) -> Caller:
        """The user who signed the bearer token of an HTTP request, or for whom a console reads.

        Raises as `user` does; ForbiddenError if no console may read this.
        """
        authorization = request.headers.get("authorization")
        if not _is_by_console(authorization):
            return self.user(authorization)
        if request.method != "GET" or not self._console_routes.fullmatch(request.scope["path"]):
            raise ForbiddenError("a console may not read this; call with a user's key: ringfence --help")
        return self._reader(authorization)

    def _reader(self, authorization: str | None) -> Caller:
        """The user who signed the session statement in a console's token. Raises as `user` does."""
        now_ms = self._clock.now_ms()
        at_s = now_ms / 1000
        jws = _bearer(authorization)
        try:
            find = self._trust.finder("console", at_s=at_s)
            token = verify(jws, ConsoleToken, find, audience=self._audience, appended_at_ms=now_ms)
            session = verify(
                parse(token.claims.session),
                SessionStatement,
                lambda iss, kid: self._directory.user_key(iss, kid, at_s),
                audience=self._trust_domain,
                appended_at_ms=now_ms,
            )
        except InvalidMessageError as error:
            raise _refused(error) from None
        except ChainError:
            raise _refused(_BROKEN_RECORD) from None
        said = session.claims
        user_id = subject_of(self._trust_domain, said.iss, "user")
        if not is_by_passkey(session.compact) or user_id != said.user_id:
            raise _refused("nobody's passkey signed its session; sign in again")
        if said.console_kid != jws.header.kid:
            raise _refused("its session is of another console; sign in at this one")
        self._check_once(token.claims, sender=said.iss, now_s=at_s)
        caller = self._caller(said.iss)
        self._on_session(session)
        return caller

    def console(self, authorization: str | None) -> str:
        """The SPIFFE ID of the console that signed the bearer token, for itself and not for a person.

        Raises UnauthenticatedError, UnavailableError.
        """
        return self._verified_iss(authorization, self._trust.finder("console", at_s=self._now_s()))

    def user(self, authorization: str | None) -> Caller:
        """The user who signed the bearer token. Raises UnauthenticatedError, UnavailableError."""
        at_s = self._now_s()
        inactive = _InactiveKeyFinder(self._directory, at_s)
        iss = self._verified_iss(
            authorization, lambda iss, kid: self._directory.user_key(iss, kid, at_s), inactive
        )
        return self._caller(iss)

    def _caller(self, iss: str) -> Caller:
        entry = self._directory.user(subject_of(self._trust_domain, iss, "user") or "")
        if entry is None:
            raise UnauthenticatedError(f"{visible_name(iss[:512])} is no user")
        return Caller(entry.state)

    def target(self, authorization: str | None) -> str:
        """The id of the target whose resource server signed the bearer token.

        Raises UnauthenticatedError, UnavailableError.
        """
        at_s = self._now_s()
        iss = self._verified_iss(authorization, lambda iss, kid: self._directory.target_key(iss, kid, at_s))
        return subject_of(self._trust_domain, iss, "target") or ""

    def gateway(self, authorization: str | None) -> str:
        """The SPIFFE ID of the gateway that signed the bearer token.

        Raises UnauthenticatedError, UnavailableError.
        """
        return self._verified_iss(authorization, self._trust.finder("gateway", at_s=self._now_s()))

    def _now_s(self) -> float:
        return self._clock.now_ms() / 1000

    def _verified_iss(
        self, authorization: str | None, find_key: KeyFinder, inactive: _InactiveKeyFinder | None = None
    ) -> str:
        now_ms = self._clock.now_ms()
        jws = _bearer(authorization)
        try:
            self._require_own_audience(jws)
            claims = verify(jws, ApiToken, find_key, audience=self._audience, appended_at_ms=now_ms).claims
        except InvalidMessageError as error:
            reason = None
            if error.code == Code.KEY_UNKNOWN and inactive is not None:
                reason = _reason_for_holder(jws, self._audience, now_ms, inactive)
            raise _refused(reason or error) from None
        except ChainError:
            raise _refused(_BROKEN_RECORD) from None
        self._check_once(claims, sender=claims.iss, now_s=now_ms / 1000)
        return claims.iss

    def _require_own_audience(self, jws: UnverifiedJws) -> None:
        """Raise InvalidMessageError, which says what to sign, if an unverified token is not for this service."""
        aud = jws.unverified_claims(ApiToken).aud
        if aud != self._audience:
            raise InvalidMessageError(
                f"aud is {aud[:80]!r}, which is not this service; sign one for {self._audience!r}",
                code=Code.AUD_UNEXPECTED,
            )

    def _check_once(self, claims: ApiToken | ConsoleToken, *, sender: str, now_s: float) -> None:
        """Mark a verified token as used. Raises UnauthenticatedError if it was used before, or lives too long."""
        if claims.exp - claims.iat > MAX_API_TOKEN_S:
            raise _refused(f"it lives longer than {MAX_API_TOKEN_S} s; sign it shorter")
        id = digest(f"{claims.iss} {claims.jti}")
        if not self._used.remember(id, sender=sender, until_s=claims.exp, now_s=now_s):
            raise _refused("it was used before, and counts once; sign one for each call")


class _InactiveKeyFinder:
    """Finds a user's key that is not valid now, only to tell its holder why."""

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
                f"key {kid} of user {user_id} ended at {utc_text(record.not_after)}; use the key that follows it, or "
                "let an operator set one: ringfence user set --public-key"
            )
        else:
            self.why = f"key {kid} of user {user_id} counts only from {utc_text(record.not_before)} on"
        return valid_key((record,), kid, record.not_before)

    def no_user(self, jws: UnverifiedJws) -> str | None:
        """The message for a signer that is not a user. It repeats only what the signer said."""
        iss = jws.unverified_claims(ApiToken).iss
        if subject_of(self._directory.trust.trust_domain, iss, "user") is not None:
            return None
        return (
            f"{visible_name(iss[:512])} is no user, and users alone are answered here: call with a user's key"
        )


def _bearer(authorization: str | None) -> UnverifiedJws:
    """The bearer token of a call. Raises UnauthenticatedError."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise UnauthenticatedError(
            "send Authorization: Bearer with a JWT (typ ringfence.api+jwt) signed by your key"
        )
    try:
        return parse(token.strip())
    except InvalidMessageError as error:
        raise _refused(error) from None


def _is_by_console(authorization: str | None) -> bool:
    """Whether the bearer token says that it is a console's. Nothing is verified yet."""
    try:
        return _bearer(authorization).header.typ == typ_header(ConsoleToken)
    except UnauthenticatedError:
        return False


def _refused(why: object) -> UnauthenticatedError:
    return UnauthenticatedError(f"the bearer token is refused: {why}")


def _reason_for_holder(
    jws: UnverifiedJws, audience: str, now_ms: int, inactive: _InactiveKeyFinder
) -> str | None:
    """The reason why a key is not valid, if its holder has just signed the token. Strangers learn nothing."""
    try:
        verify(jws, ApiToken, inactive, audience=audience, appended_at_ms=now_ms)
    except InvalidMessageError:
        return inactive.no_user(jws)
    return inactive.why
