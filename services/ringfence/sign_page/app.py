"""`ringfence serve sign-page`: serves the files of the sign page, with their headers, and nothing else."""

from __future__ import annotations

import asyncio
import logging
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.service.http import HttpServer
from ringfence.kernel.service.server_tls import http_tls
from ringfence.messages.api import SIGN_PAGE_PORT
from ringfence.sign_page.build import CSP_HEADER, Page, content_type, page_config
from ringfence.sign_page.build import build as build_page
from ringfence.sign_page.settings import SignPageSettings

log = logging.getLogger(__name__)

_INDEX = "index.html"


class FileServer:
    """An ASGI application that answers GET and HEAD for the files of a page, to requests with a known `Host`."""

    def __init__(self, page: Page, hosts: frozenset[str]) -> None:
        """`hosts`: the values of `Host` that are answered, in lower case. Others may be another site's names."""
        self._hosts = hosts
        self._files = {f"/{name}": (content, content_type(name)) for name, content in page.files.items()}
        self._files["/"] = self._files[f"/{_INDEX}"]
        self._headers = [
            (CSP_HEADER, page.csp),
            ("X-Frame-Options", "DENY"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Embedder-Policy", "require-corp"),
            ("Permissions-Policy", "publickey-credentials-get=(self), publickey-credentials-create=(self)"),
            ("Strict-Transport-Security", "max-age=63072000"),
            ("Cache-Control", "no-cache"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        host = hosts[0].decode("latin-1").lower() if len(hosts) == 1 else ""
        if host not in self._hosts:
            await self._answer(send, 421, b"this is not the name of this page\n", "text/plain; charset=utf-8")
            return
        if scope["method"] not in ("GET", "HEAD"):
            await self._answer(send, 405, b"", "text/plain; charset=utf-8", [("Allow", "GET, HEAD")])
            return
        content, media = self._files.get(scope["path"], (b"", ""))
        if not media or scope["query_string"]:
            await self._answer(send, 404, b"there is no such file\n", "text/plain; charset=utf-8")
            return
        await self._answer(send, 200, content, media, with_body=scope["method"] == "GET")

    async def _answer(
        self,
        send: Send,
        status: int,
        body: bytes,
        media: str,
        more: list[tuple[str, str]] | None = None,
        *,
        with_body: bool = True,
    ) -> None:
        headers = [*self._headers, ("Content-Type", media), ("Content-Length", str(len(body))), *(more or ())]
        raw = [(name.lower().encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body if with_body else b""})


class SignPageServer:
    """The server as a process of its own or beside services: it needs no key, no Kafka and no Redis."""

    role = "sign-page"

    def __init__(self, app: ASGIApp, host: str, port: int, settings: ServiceSettings) -> None:
        self._server = HttpServer(
            app,
            host,
            port,
            setting="RINGFENCE_SIGN_PAGE_HTTP",
            connections=settings.http_connections,
            tls=http_tls(settings),
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises HttpListenError if the address is not available."""
        serving = asyncio.create_task(self._server.run_until_stopped())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        self._server.should_exit = True
        stopping.cancel()
        await serving

    def reload_keys(self) -> None:
        """It has none."""


def build(settings: ServiceSettings) -> SignPageServer:
    """Build the server from the settings. Raises SignPageError."""
    page = load(SignPageSettings)
    config = page_config(settings, page)
    host, _, port = page.http.partition(":")
    authority = urlsplit(config.origin).netloc
    log.info("serving the sign page of %s", config.origin)
    return SignPageServer(
        FileServer(build_page(config), frozenset(name.lower() for name in (authority, *page.hosts))),
        host,
        int(port or SIGN_PAGE_PORT),
        settings,
    )
