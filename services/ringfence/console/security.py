"""Security of the console: guards requests and responses (hosts, origins, headers), keeps sessions, and seals values.

The cookie is a random secret, the session statement that the person signed at sign-in, and a MAC by the console's
key, which it makes once the registry accepted the statement. So nothing else is taken for a session, replicas with
the same key share sessions, and a restart ends none. The statement names the secret's digest and the console's key.
Sealed values take the place of a table of what is under way: nobody else reads, changes or invents them, and every
replica with the same key opens what another one sealed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ringfence.console.assets import content_security_policy
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import is_by_passkey, parse
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode
from ringfence.messages.base import typ_header
from ringfence.messages.registry import SessionStatement
from ringfence.model.identity.spiffe_ids import spiffe_id

COOKIE: Final = "__Host-ringfence"
"""Only the console's own origin sets it, over TLS or on localhost (RFC 6265bis, 4.1.3.2)."""
_SECRET_CHARS: Final = 43
_MAX_COOKIE: Final = 4000
"""Browsers keep no cookie of more than 4096 bytes, with its name and attributes."""
_SESSION_INFO: Final = b"ringfence.console.session.v1"
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


@dataclass(slots=True, eq=False)
class Sessions:
    """Begins, reads and ends sessions. Whether a statement counts, the services say at each call."""

    key: Callable[[], SigningKey]
    clock: Clock
    trust_domain: str
    life_s: int
    _ended: BoundedDict[str, None] = field(init=False, default_factory=lambda: BoundedDict(_MOST_ENDED))

    def begin(self, user_id: str) -> tuple[str, SessionStatement]:
        """A fresh secret for the cookie, and the statement that the person has to sign for it."""
        secret, now_s = secrets.token_urlsafe(32), self._now_s()
        return secret, SessionStatement(
            iss=spiffe_id(self.trust_domain, "user", user_id),
            aud=self.trust_domain,
            iat=now_s,
            exp=now_s + self.life_s,
            jti=str(uuid.uuid4()),
            user_id=user_id,
            console_kid=self.key().kid,
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
            or said.console_kid != self.key().kid
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
        key = self.key().derived_key(_SESSION_INFO)
        return b64encode(hmac.digest(key, f"{secret}.{statement}".encode(), "sha256"))

    def _now_s(self) -> int:
        return self.clock.now_ms() // 1000


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


Purpose = Literal["question", "notice", "offer"]
MAX_SEALED_CHARS: Final = 16 * 1024
_NONCE_BYTES: Final = 12
_MAX_BYTES: Final = 64 * 1024
_VALUE_INFO: Final = b"ringfence.console.sealed.v1"


class SealedValues:
    """AES-256-GCM by a key that is derived from the console's own. A value of one purpose is none of another."""

    def __init__(self, key: Callable[[], SigningKey]) -> None:
        """`key`: the console's present key. What another key sealed is not opened."""
        self._key = key

    def seal(self, purpose: Purpose, value: dict[str, Any]) -> str:
        """A JSON object as base64url."""
        nonce = os.urandom(_NONCE_BYTES)
        text = zlib.compress(orjson.dumps(value), 9)
        return b64encode(nonce + self._cipher().encrypt(nonce, text, purpose.encode()))

    def open(self, purpose: Purpose, text: str) -> dict[str, Any] | None:
        """What was sealed for this purpose by this key; None for anything else."""
        try:
            raw = b64decode(text) if len(text) <= MAX_SEALED_CHARS else b""
            plain = self._cipher().decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], purpose.encode())
            value = orjson.loads(zlib.decompressobj().decompress(plain, _MAX_BYTES))
        except (ValueError, InvalidTag, zlib.error):
            return None
        return value if isinstance(value, dict) else None

    def _cipher(self) -> AESGCM:
        return AESGCM(self._key().derived_key(_VALUE_INFO))


QUESTION_PATH: Final = "/questions/"
_PROBES: Final = frozenset({"/healthz", "/readyz"})
"""They say nothing of anybody, and load balancers ask by an address."""
_METRICS: Final = "/metrics"
"""For who asks the process itself, as `10.0.0.7:8712`. A proxy that passes `Host` on leads nobody there."""
_CACHED: Final = "/static/"


class Guard:
    """ASGI middleware: refuses other names of the host and writes from other origins, and sets the headers."""

    def __init__(
        self, app: ASGIApp, origin: str, hosts: tuple[str, ...], sign_origin: Callable[[], str | None]
    ) -> None:
        """Args:
            origin: the console's own.
            hosts: further values of `Host` that are answered. Others may be names of another site (DNS rebinding).
            sign_origin: where people sign now, or None.
        """  # fmt: skip
        self._app = app
        self._origin = origin
        self._hosts = frozenset(name.lower() for name in (urlsplit(origin).netloc, *hosts))
        self._sign_origin = sign_origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)
        question = scope["path"].startswith(QUESTION_PATH)
        cached = scope["path"].startswith(_CACHED)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = content_security_policy(self._sign_origin())
                headers["X-Frame-Options"] = "DENY"
                headers["X-Content-Type-Options"] = "nosniff"
                # Not no-referrer: a form's Origin would be null.
                headers["Referrer-Policy"] = "same-origin"
                headers["Cross-Origin-Opener-Policy"] = "same-origin"
                headers["Cross-Origin-Resource-Policy"] = "cross-origin" if question else "same-origin"
                headers["Cross-Origin-Embedder-Policy"] = "require-corp"
                headers["Permissions-Policy"] = (
                    "publickey-credentials-get=(self), publickey-credentials-create=(), camera=(), geolocation=(), "
                    "microphone=(), payment=(), usb=()"
                )
                headers["Strict-Transport-Security"] = "max-age=63072000"
                if "cache-control" not in headers:
                    # While versions run beside each other, one has no file of the other: nobody remembers that.
                    kept = cached and message["status"] == 200
                    headers["Cache-Control"] = "public, max-age=31536000, immutable" if kept else "no-store"
            await send(message)

        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        if scope["path"] in _PROBES:
            return None
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        known = len(hosts) == 1 and hosts[0].lower() in self._hosts
        if scope["path"] == _METRICS:
            if not known and len(hosts) == 1 and _names_a_process(hosts[0]):
                return None
            return PlainTextResponse("metrics are for who asks the process by its address\n", 404)
        if not known:
            return PlainTextResponse("this is not the name of this console\n", 421)
        if scope["method"] in ("GET", "HEAD"):
            return None
        # Questions look for themselves whether the sign page asks: it sends no cookie.
        if scope["path"].startswith(QUESTION_PATH):
            return None
        if headers.getlist("origin") != [self._origin]:
            return PlainTextResponse("another site asked for this; nothing was done\n", 403)
        return None


def _names_a_process(host: str) -> bool:
    """Return whether a `Host` is an IP address or has no dots: no site of an attacker is (DNS rebinding)."""
    name = host.rpartition(":")[0] or host
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return "." not in name
    return True
