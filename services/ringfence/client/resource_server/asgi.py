"""ASGI middleware that guards an application: requests without a valid token do not reach it. Needs no framework.

```python
verifier = TokenVerifier("https://issuer.example", "https://shop.example", introspection_key=key)
app = TokenGuard(app, verifier, base_url="https://shop.example", needs=lambda scope: ("read", scope["path"][1:]))
```
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from enum import Enum
from typing import Any, Final
from urllib.parse import quote

from ringfence.client.agent.dpop import NONCE_HEADER, target_uri
from ringfence.client.errors import InvalidCallError
from ringfence.client.resource_server.challenges import HttpRefusal, not_mapped
from ringfence.client.resource_server.verifier import TokenVerifier, VerifiedToken
from ringfence.kernel.base.errors import RingfenceError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN: Final = "ringfence.token"  # noqa: S105 - a name
"""Where the application finds the `VerifiedToken` of a request: `scope[TOKEN]`, in Starlette `request.scope[TOKEN]`."""
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_SAFE: Final = "/:@!$&'()*+,;=~"
"""Characters that may stand in a path unescaped (RFC 3986 3.3)."""


class Needs(Enum):
    """What a request needs, if it is not a verb on a resource."""

    NO_TOKEN = "no token"  # noqa: S105
    """The request passes unchanged, whatever token it has."""
    ANY_TOKEN = "any token"  # noqa: S105
    """A token for this audience. The application checks what it allows."""


def any_token(_: Scope) -> Needs:
    """Demand a token for every request. The application checks what it allows."""
    return Needs.ANY_TOKEN


class TokenGuard:
    """Answers 401 or 403 if a request's token is missing, invalid or insufficient, and 503 if it cannot be verified. If
    `needs` has no entry for a request, answers 405 if it has one for other methods, else 403.

    A request that passes has its token in `scope["ringfence.token"]`. WebSockets are checked in the same way, before
    they open.
    """

    def __init__(
        self,
        app: App,
        verifier: TokenVerifier,
        *,
        base_url: str,
        needs: Callable[[Scope], tuple[str, str] | Needs | None] = any_token,
    ) -> None:
        """Args:
            app: the ASGI application that gets the requests that pass.
            verifier: checks the tokens.
            base_url: the URL prefix that agents use. A DPoP proof is for one URL, and a sender can write anything into
                the Host header.
            needs: returns the verb and the resource that a request needs, from its scope. None or a LookupError if it
                has no entry. It is also called with other methods of the same request, to tell which are allowed.

        Raises InvalidCallError if `base_url` is no absolute URL.
        """  # fmt: skip
        try:
            target_uri(base_url)
        except ValueError as error:
            raise InvalidCallError(f"base_url is {error}; write it as in https://shop.example") from None
        self._app = app
        self._verifier = verifier
        self._base_url = base_url.rstrip("/")
        self._needs = needs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        needed = self._entry(scope) if scope["type"] in ("http", "websocket") else Needs.NO_TOKEN
        if needed is None:
            await _refuse(not_mapped(self._allowed_methods(scope)), scope, receive, send)
            return
        if needed is Needs.NO_TOKEN:
            await self._app(scope, receive, send)
            return
        try:
            token = await self._verified(scope, needed)
        except RingfenceError as error:
            await _refuse(self._verifier.refusal(error), scope, receive, send)
            return
        await self._app({**scope, TOKEN: token}, receive, self._with_nonce(send))

    def _entry(self, scope: Scope) -> tuple[str, str] | Needs | None:
        try:
            return self._needs(scope)
        except LookupError:
            return None

    def _allowed_methods(self, scope: Scope) -> list[str]:
        """The methods that have an entry for this path; none for a WebSocket, which opens with a GET alone."""
        if scope["type"] == "websocket":
            return []
        return [method for method in _METHODS if self._entry({**scope, "method": method}) is not None]

    async def _verified(self, scope: Scope, needed: tuple[str, str] | Needs) -> VerifiedToken:
        verb, resource = (None, None) if isinstance(needed, Needs) else needed
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        url = self._base_url + _path(scope)
        # A WebSocket opens with a GET (RFC 6455, 4.1).
        method = scope.get("method", "GET")
        return await self._verifier.verify_request(method, url, headers, verb=verb, resource=resource)

    def _with_nonce(self, send: Send) -> Send:
        nonce = self._verifier.nonce()
        if nonce is None:
            return send

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (NONCE_HEADER.lower().encode(), nonce.encode())]
                message = {**message, "headers": headers}
            await send(message)

        return sending


def _path(scope: Scope) -> str:
    raw = scope.get("raw_path")
    return str(raw, "latin-1") if raw is not None else quote(scope["path"], safe=_SAFE)


async def _refuse(refusal: HttpRefusal, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        kind = "websocket.http.response"
        await receive()  # that it wants to connect
        if kind not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1008, "reason": ""})  # the server answers 403
            return
    else:
        kind = "http.response"
    headers = [(name.lower().encode(), value.encode()) for name, value in refusal.headers]
    headers.append((b"content-length", str(len(refusal.body)).encode()))
    await send({"type": f"{kind}.start", "status": refusal.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": refusal.body})
