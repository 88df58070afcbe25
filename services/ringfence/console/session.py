"""Sessions: what a browser shows at each request, and nothing that this process has to remember.

The cookie is a random secret, the session statement that the person signed at sign-in, and a MAC by the console's key,
which it makes once the registry accepted the statement. So nothing else is taken for a session, replicas with the same
key share sessions, and a restart ends none. The statement names the secret's digest and the console's key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ringfence.kernel.base.bounded_dict import BoundedDict
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import is_by_passkey, parse
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.messages.base import typ_header
from ringfence.messages.registry import SessionStatement
from ringfence.model.identity.spiffe_ids import spiffe_id

COOKIE: Final = "__Host-ringfence"
"""Only the console's own origin sets it, over TLS or on localhost (RFC 6265bis, 4.1.3.2)."""
_SECRET_CHARS: Final = 43
_MAX_COOKIE: Final = 4000
"""Browsers keep no cookie of more than 4096 bytes, with its name and attributes."""
_INFO: Final = b"ringfence.console.session.v1"
_MOST_ENDED: Final = 100_000


@dataclass(frozen=True, slots=True)
class Session:
    """One person's session in one browser."""

    user_id: str
    statement: str
    """The session statement, as the person's passkey signed it."""
    ends_at: int
    """Seconds since 1970."""
    cookie_digest: str


class Sessions:
    """Begins, reads and ends sessions. Whether a statement counts, the services say at each call."""

    def __init__(
        self,
        key: Callable[[], SigningKey],
        clock: Clock,
        trust_domain: str,
        life_s: int,
    ) -> None:
        self._key = key
        self._clock = clock
        self._trust_domain = trust_domain
        self._life_s = life_s
        self._ended: BoundedDict[str, None] = BoundedDict(_MOST_ENDED)

    def begin(self, user_id: str) -> tuple[str, SessionStatement]:
        """A fresh secret for the cookie, and the statement that the person has to sign for it."""
        secret, now_s = secrets.token_urlsafe(32), self._now_s()
        return secret, SessionStatement(
            iss=spiffe_id(self._trust_domain, "user", user_id),
            aud=self._trust_domain,
            iat=now_s,
            exp=now_s + self._life_s,
            jti=str(uuid.uuid4()),
            user_id=user_id,
            console_kid=self._key().kid,
            cookie_digest=_digest(secret),
        )

    def proposed(self, secret: str, statement: str) -> Session | None:
        """The session that begins if the registry accepts this statement; None if it is not for this secret."""
        if len(secret) != _SECRET_CHARS:
            return None
        try:
            jws = parse(statement)
            said = jws.unverified_claims(SessionStatement)
            if not is_by_passkey(statement) or jws.header.typ != typ_header(SessionStatement):
                return None
        except InvalidMessageError:
            return None
        digest = _digest(secret)
        if (
            not hmac.compare_digest(digest, said.cookie_digest)
            or said.console_kid != self._key().kid
            or not said.iat - 60 <= self._now_s() < said.exp
            or digest in self._ended
        ):
            return None
        return Session(said.user_id, statement, said.exp, digest)

    def cookie(self, secret: str, session: Session) -> str | None:
        """The cookie of a session whose statement the registry accepted; None if it is too long for browsers."""
        value = f"{secret}{self._mac(secret, session.statement)}.{session.statement}"
        return value if len(value) <= _MAX_COOKIE else None

    def of(self, cookie: str | None) -> Session | None:
        """The session of a cookie; None if there is none, or it is over, or no console with this key made it.

        Its passkey or its user may have ended since: the services say, each time.
        """
        head, _, statement = (cookie or "").partition(".")
        secret, mac = head[:_SECRET_CHARS], head[_SECRET_CHARS:]
        if not hmac.compare_digest(mac.encode(), self._mac(secret, statement).encode()):
            return None
        return self.proposed(secret, statement)

    def end(self, session: Session) -> None:
        """End a session here. Elsewhere the browser's forgotten cookie ends it."""
        self._ended[session.cookie_digest] = None

    def is_over(self, cookie_digest: str) -> bool:
        """Whether the session of a cookie with this digest was ended here."""
        return cookie_digest in self._ended

    def _mac(self, secret: str, statement: str) -> str:
        key = self._key().derived_key(_INFO)
        return b64encode(hmac.digest(key, f"{secret}.{statement}".encode(), "sha256"))

    def _now_s(self) -> int:
        return self._clock.now_ms() // 1000


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
