"""The OPA engine: asks a real OPA server, which has the same bundle, over a pool of HTTP connections.

The bundle is made by `ringfence policy build`.

The pool POSTs over kept connections, one request at a time on each. Why not httpx: with 32 requests under way it took
2 ms of CPU for each, against 0.1 here.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httptools
import orjson

from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.codes import Code
from ringfence.rego.bundle import Bundle
from ringfence.rego.embedded import TIMEOUT_MS
from ringfence.rego.engine import (
    ISSUANCE,
    Answer,
    PolicyFailedError,
    PolicyTimeoutError,
    PolicyUnavailableError,
    result_of,
)

MAX_ANSWER_BYTES = 2**20


class HttpPool:
    """Connections to the server of a URL. Redirects are not followed, proxies not used, certificates checked."""

    def __init__(self, url: str, connections: int) -> None:
        """At most so many connections are open; who comes when all are in use waits."""
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._netloc = parts.netloc.rpartition("@")[2]
        self._free = asyncio.Semaphore(connections)
        self._idle: list[_Connection] = []

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a POST of JSON. Raises UnavailableError if there is none.

        If cancelled (or timed out), it closes the connection, so that the server knows that nobody waits.
        """
        head = (
            f"POST {self._prefix}{path} HTTP/1.1\r\nHost: {self._netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        async with self._free:
            while self._idle:
                kept = self._idle.pop()
                try:
                    return await self._ask(kept, head.encode() + body)
                except _StaleError:
                    continue  # the server had closed it meanwhile, as servers do: nothing was answered
            return await self._ask(await self._connect(), head.encode() + body)

    async def _ask(self, connection: _Connection, request: bytes) -> tuple[int, bytes]:
        with connection:
            answer = await connection.ask(request)
        if connection.reusable:
            self._idle.append(connection)
        return answer

    async def _connect(self) -> _Connection:
        try:
            _, protocol = await asyncio.get_running_loop().create_connection(
                _Connection, self._host, self._port, ssl=self._tls
            )
        except OSError as error:
            raise UnavailableError(f"no connection ({type(error).__name__})") from None
        return protocol

    def close(self) -> None:
        """Close what is not in use."""
        while self._idle:
            self._idle.pop().close()


class _StaleError(UnavailableError):
    """A kept connection turned out to be closed before anything came."""

    code = Code.CONNECTION_STALE


class _Connection(asyncio.Protocol):
    """One connection. As a context manager it closes itself where an answer was not read to its end."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._body = bytearray()
        self._used = False
        self._begun = False
        self.reusable = False

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Raises UnavailableError if the server closes before its answer is whole, or answers in no HTTP."""
        if self._transport is None or self._transport.is_closing():
            raise _StaleError("the connection was closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._body.clear()
        self._begun = self.reusable = False
        self._transport.write(request)
        answer = await self._answer
        self._used = True
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.reusable:
            self.close()

    # --- the socket ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # nobody asked
            return
        self._begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail(UnavailableError("the answer is not HTTP"))

    def connection_lost(self, error: Exception | None) -> None:
        stale = self._used and not self._begun
        self._fail((_StaleError if stale else UnavailableError)("the connection was closed"))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self.close()

    # --- the parser ---

    def on_body(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > MAX_ANSWER_BYTES:
            self._fail(UnavailableError(f"the answer has more than {MAX_ANSWER_BYTES} bytes"))

    def on_message_complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self.reusable = bool(self._parser.should_keep_alive())
            self._answer.set_result((self._parser.get_status_code(), bytes(self._body)))


CONNECTIONS = 32


class OpaEngine:
    """A `PolicyEngine` that asks OPA. What it does not answer in time, by the very bundle that is known here, denies.

    OPA names the revision of the bundle that an answer comes from beside the answer (`provenance`).
    """

    def __init__(
        self,
        url: str,
        bundle: Bundle,
        *,
        timeout_ms: int = TIMEOUT_MS,
        connections: int = CONNECTIONS,
        entry_point: str = ISSUANCE,
    ) -> None:
        """Args:
            url: of the OPA server, like `http://127.0.0.1:8181`.
            bundle: what OPA is expected to evaluate.
            timeout_ms: what one answer may take, all in all.
            connections: so many requests are under way at once; others wait, and their time runs.
        """  # fmt: skip
        self._url = url.rstrip("/")
        self._bundle = bundle
        self._timeout_s = timeout_ms / 1000
        self._path = f"/v1/{entry_point.replace('.', '/')}?provenance=true"
        self._http = HttpPool(self._url, connections)

    @property
    def revision(self) -> str:
        return self._bundle.revision

    async def start(self) -> None:
        await self.use(self._bundle)

    async def use(self, bundle: Bundle) -> None:
        # Nothing is evaluated here, not even its tests: `ringfence policy build` ran them, and the engine that it runs
        # in is no part of a service that has chosen OPA (ADR 0086).
        self._bundle = bundle

    async def evaluate(self, input_json: bytes) -> Answer:
        expected = self._bundle.revision
        try:
            async with asyncio.timeout(self._timeout_s):
                status, body = await self._http.post(self._path, b'{"input":' + input_json + b"}")
        except TimeoutError:
            raise PolicyTimeoutError(
                f"OPA at {self._url} did not answer within {self._timeout_s * 1000:.0f} ms"
            ) from None
        except UnavailableError as error:
            raise PolicyUnavailableError(f"OPA at {self._url} cannot be asked: {error}") from None
        document = _document(status, body, self._url)
        revision = _revision(document)
        if revision != expected:
            raise PolicyUnavailableError(
                f"OPA at {self._url} answers by the bundle {revision or 'of no revision'}, and the one in force here "
                f"is {expected}: give it what `ringfence policy build` makes"
            )
        return Answer(result_of(document.get("result")), revision)

    async def close(self) -> None:
        self._http.close()


def _document(status: int, body: bytes, url: str) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except ValueError:
        document = None
    if status != 200:
        # 500 is how OPA tells that the evaluation failed; anything else is about the way there.
        said = document.get("message") if isinstance(document, dict) else None
        kind = PolicyFailedError if status == 500 and said else PolicyUnavailableError
        raise kind(f"OPA at {url} answered {status}: {str(said)[:300]}")
    if not isinstance(document, dict):
        raise PolicyFailedError(f"OPA at {url} did not answer with a JSON object")
    return document


def _revision(document: dict[str, Any]) -> str | None:
    """The revision of the one bundle that OPA has; None if it has none, several, or does not say."""
    provenance = document.get("provenance")
    bundles = provenance.get("bundles") if isinstance(provenance, dict) else None
    if not isinstance(bundles, dict) or len(bundles) != 1:
        return None
    (bundle,) = bundles.values()
    revision = bundle.get("revision") if isinstance(bundle, dict) else None
    return revision if isinstance(revision, str) and revision else None
