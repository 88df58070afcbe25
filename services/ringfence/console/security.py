"""What holds for every request and every response: names of the host, origins of writes, headers."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ringfence.console.assets import content_security_policy

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
