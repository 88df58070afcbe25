"""One connection of an agent, from its first byte to its last: one request at a time, each decided on its own."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

from ringfence.gateway.contract import Attempt, BlockedRequest, PresentedIdentity, Verdict
from ringfence.gateway.dataplane.exchange import Asked, goes_no_further
from ringfence.gateway.dataplane.fast_path.path import FastPaths
from ringfence.gateway.dataplane.forwarder import goes_on
from ringfence.gateway.dataplane.http1_body import Body, request_body
from ringfence.gateway.dataplane.http1_head import (
    MAX_HEAD_BYTES,
    RequestHead,
    cut_head,
    parse_request,
)
from ringfence.gateway.dataplane.limits import HANDSHAKE
from ringfence.gateway.dataplane.request_reader import ListenerContext, presented_by, read_request
from ringfence.gateway.dataplane.shared import DataPlaneContext
from ringfence.gateway.dataplane.stream import ExpiredError, GoneError, Stream
from ringfence.gateway.dataplane.tls_listener import TLS_FAILED
from ringfence.gateway.errors import RefusedError, head, problem
from ringfence.gateway.events.destination import destination_of_line, unparsed_line
from ringfence.gateway.hosts import canonical, split
from ringfence.kernel.base import metrics

MAX_READ_BYTES: Final = 1024 * 1024
"""So much of a body is read before the decision, where the decision needs it."""
_ASKS_WHO: Final = 407
_LINGER_S: Final = 1.0
_LINGER_BYTES: Final = 256 * 1024
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Connection:
    """What goes on in one connection."""

    def __init__(
        self, client: Stream, way: ListenerContext, desk: DataPlaneContext, fast_paths: FastPaths
    ) -> None:
        self._client = client
        self._way = way
        self._desk = desk
        self._turn = desk.limits.turn_of(way.sender)
        self._fast_path = fast_paths.of_connection(client, way, self._turn)
        self._attempt: Attempt | None = None
        """What is asked for, until that is decided."""
        self._unread = b""
        """A head that cannot be read for certain."""

    async def run(self) -> None:
        """Serve until it ends."""
        try:
            while await self._one():
                pass
            self._client.close()
        except (GoneError, ExpiredError):
            self._client.abort()
        except BaseException:
            self._client.abort()
            raise
        finally:
            self._fast_path.abandon()

    async def _one(self) -> bool:
        """Serve one request. Whether there may be another."""
        self._attempt, given = None, None
        try:
            given = await self._head()
            if given is None:
                return await self._begun()
            request = parse_request(given)
        except RefusedError as error:
            self._unread = given if given is not None else bytes(self._client.buffer[:MAX_HEAD_BYTES])
            return await self._refuse(error, None, close=True)
        if request.method == "CONNECT":
            return await self._connect(request)
        body = request_body(request)
        try:
            return await self._decided(request, body)
        except RefusedError as error:
            return await self._refuse(error, request, close=not body.done or error.status == 400)

    async def _begun(self) -> bool:
        """Go on with what was handed over on the short way. Whether there may be another."""
        going, exchange = self._fast_path.handed()
        try:
            if self._fast_path.ended:
                over = goes_no_further(self._desk.gate.view_problem())
                return await self._tell(over, going.head, close=False)
            if exchange is None:
                return await self._forward(going)
            return await self._forwarded(going, self._desk.forwarder.go_on(exchange))
        finally:
            self._turn.end()

    async def _head(self) -> bytes | None:
        """The next head; None where a request was handed over instead, see `FastPath`."""
        client, patiences, fast_path = self._client, self._desk.patiences, self._fast_path
        client.deadline = time.monotonic() + (patiences.head_s if client.buffer else patiences.idle_s)
        begun, seen = fast_path.taken if client.buffer else None, 0
        fast_path.open()
        try:
            while (given := cut_head(client.buffer, seen)) is None:
                seen = len(client.buffer)
                try:
                    await client.more()
                except ExpiredError:
                    if not client.buffer:
                        raise
                    raise RefusedError(408, "head_timeout", "the head of the request does not come") from None
                if fast_path.handed_over:
                    return None
                if begun != fast_path.taken:
                    seen = 0
                if client.buffer and begun != fast_path.taken:
                    begun = fast_path.taken
                    client.deadline = time.monotonic() + patiences.head_s
        finally:
            fast_path.close()
        client.deadline = None
        return given

    async def _decided(self, request: RequestHead, body: Body) -> bool:
        desk = self._desk
        self._turn.begin()
        try:
            presented, attempt = read_request(request, self._way, desk.knows)
            waits = _waits_for_continue(request)
            sent = Sent(self._client, partial(self._read, body, waits=waits), most=MAX_READ_BYTES)
            self._attempt = attempt
            if desk.gate.reads_body(attempt):
                attempt = dataclasses.replace(attempt, body=await sent.read())
            verdict = await desk.gate.decide(presented, attempt, self._turn.admits, sent)
            if not goes_on(verdict):
                return await self._say(self._desk.answer(verdict), request, close=not body.done)
            if waits and sent.body is None and not body.done and not self._client.buffer:
                self._client.write(_CONTINUE)
            return await self._forward(Asked(request, attempt, verdict, body, sent.body))
        finally:
            self._turn.end()

    async def _forward(self, going: Asked) -> bool:
        return await self._forwarded(going, self._desk.forwarder.forward(self._client, going))

    async def _forwarded(self, going: Asked, forwarding: Awaitable[bool]) -> bool:
        try:
            keep = await forwarding
        except RefusedError as error:
            close = not going.body.done or error.status == 400
            return await self._tell(error, going.head, close=close)
        if not keep:
            await self._leave(unparsed=not going.body.done)
        return keep

    async def _read(self, body: Body, *, waits: bool) -> bytes:
        """All of a body, or more than is looked at. Raises RefusedError: 408, or 400 where its framing is wrong."""
        client = self._client
        if waits and not body.done and not client.buffer:
            client.write(_CONTINUE)
        pieces = bytearray(body.take(client.buffer))
        client.deadline = time.monotonic() + self._desk.patiences.piece_s
        while not body.done and len(pieces) <= MAX_READ_BYTES:
            try:
                await client.more()
            except ExpiredError:
                raise RefusedError(408, "body_timeout", "the body of the request does not come") from None
            pieces += body.take(client.buffer)
        client.deadline = None
        return bytes(pieces)

    # --- CONNECT ------------------------------------------------------------------------------------------------------

    async def _connect(self, request: RequestHead) -> bool:
        desk = self._desk
        try:
            desk.limits.ask(self._way.sender, HANDSHAKE)
            authority = connect_authority(request, self._way, self._client)
            presented = presented_by(request, self._way)
            if self._way.challenge and presented == PresentedIdentity():
                raise RefusedError(
                    407,
                    "proxy_authorization_missing",
                    "write the handle as the user of the proxy URL",
                    headers={"Proxy-Authenticate": 'Basic realm="ringfence"'},
                )
            if not desk.knows(authority):
                verdict = await desk.gate.decide(
                    presented, Attempt(authority, "https", "CONNECT", request.target)
                )
                return await self._say(self._unknown(verdict), request, close=True)
            context = desk.authority.context(split(authority, "https")[0])
        except RefusedError as error:
            return await self._refuse(error, request, close=True)
        self._client.write(AGREED)
        try:
            await self._client.open_tls(context, timeout_s=desk.patiences.head_s)
        except GoneError as error:
            self._block(TLS_FAILED, error.message, request)
            raise
        self._way = dataclasses.replace(self._way, scheme="https", inside=authority, handle=presented.handle)
        self._fast_path.come_by(self._way)
        return True

    def _unknown(self, verdict: Verdict) -> tuple[int, Mapping[str, str], bytes]:
        if verdict.allowed:
            return problem(RefusedError(403, "host_unknown", "this host is no target of the gateway"))
        return self._desk.answer(verdict)

    # --- answers of the gateway's own ---------------------------------------------------------------------------------

    async def _refuse(self, error: RefusedError, request: RequestHead | None, *, close: bool) -> bool:
        """Refuse what nothing was decided on. To ask for who sends it is no refusal yet."""
        if error.status != _ASKS_WHO:
            self._block(error.code, error.message, request)
        return await self._tell(error, request, close=close)

    def _block(self, code: str, message: str, request: RequestHead | None) -> None:
        shown = PresentedIdentity(self._way.task_id, self._way.certificate)
        if request is not None:
            host = request.known.get(b"host")
            method, target = request.method, request.target
            named = host.decode("latin-1") if host is not None else None
        else:
            method, target, named = unparsed_line(self._unread)
        destination = destination_of_line(method, target, named, self._way.scheme) if target else None
        self._desk.blocked(
            BlockedRequest(
                code, message, shown, self._attempt, method or None, destination, unparsed=request is None
            )
        )

    async def _tell(self, error: RefusedError, request: RequestHead | None, *, close: bool) -> bool:
        metrics.GATEWAY_REFUSED.labels(error.code).inc()
        return await self._say(problem(error), request, close=close)

    async def _say(
        self,
        answer: tuple[int, Mapping[str, str], bytes],
        request: RequestHead | None,
        *,
        close: bool,
    ) -> bool:
        status, headers, body = answer
        unread = close
        if request is not None:
            close = close or request.minor == 0 or b"close" in request.named
        given = head(status, headers, len(body), close=close)
        if request is not None and request.method == "HEAD":
            body = b""
        self._client.write(given + body)
        if close:
            await self._leave(unparsed=unread)
        else:
            await self._answered()
        return not close

    async def _answered(self) -> None:
        """Who takes no answers gets no more of them, and who sends many requests at once is no hindrance to others."""
        client = self._client
        if not client.blocked:
            await asyncio.sleep(0)
            return
        client.deadline = time.monotonic() + self._desk.patiences.piece_s
        await client.drained()
        client.deadline = None

    async def _leave(self, *, unparsed: bool) -> None:
        """Close. What still comes is read for a moment, as the answer would be lost to who is still sending."""
        client = self._client
        if not unparsed or not client.alive:
            return
        client.end()
        left, client.deadline = _LINGER_BYTES, time.monotonic() + _LINGER_S
        try:
            while left > 0:
                left -= len(client.buffer)
                client.buffer.clear()
                await client.more()
        except (GoneError, ExpiredError):
            return


def _waits_for_continue(request: RequestHead) -> bool:
    expected = request.known.get(b"expect")
    if expected is None:
        return False
    if expected.lower() != b"100-continue":
        raise RefusedError(417, "expectation_failed", "nothing but 100-continue can be expected")
    return request.minor == 1


# CONNECT: no tunnel, but a promise of TLS, which the gateway opens, so that each request inside is decided.

AGREED = b"HTTP/1.1 200 Connection established\r\n\r\n"


def connect_authority(request: RequestHead, way: ListenerContext, client: Stream) -> str:
    """The canonical authority that a CONNECT is for. Raises RefusedError."""
    if way.inside is not None:
        raise RefusedError(400, "connect_refused", "there is no CONNECT inside another")
    if request.chunked or request.length or client.buffer:
        raise RefusedError(400, "connect_refused", "nothing may follow a CONNECT before it is answered")
    if ":" not in request.target.rpartition("]")[2]:
        raise RefusedError(400, "connect_refused", "CONNECT names a host and a port")
    authority = canonical(request.target, "https")
    host = request.known.get(b"host")
    if host is not None and canonical(host.decode("latin-1"), "https") != authority:
        raise RefusedError(400, "host_disagrees", "Host names another host than the CONNECT")
    return authority


# A request as it came in, whose body may be wanted before the decision; and which may wait for a person.


class Sent:
    """The `Patient` of the embedded data plane."""

    __slots__ = ("_client", "_most", "_read", "body")

    def __init__(self, client: Stream, read: Callable[[], Awaitable[bytes]], *, most: int) -> None:
        """`read` reads all of the body, or more than `most` bytes. Raises RefusedError, GoneError, ExpiredError."""
        self._client = client
        self._read = read
        self._most = most
        self.body: bytes | None = None
        """What was read of it before the decision: these bytes, and no others, go on first."""

    async def read(self) -> bytes | None:
        """All of the body; None where it is too long, which counts as not seen. Raises what `read` does."""
        self.body = await self._read()
        return self.body if len(self.body) <= self._most else None

    async def read_body(self) -> bytes | None:
        """See `Patient`."""
        try:
            return await self.read() if self.body is None else None
        except (RefusedError, GoneError, ExpiredError):
            return None

    def on_disconnect(self, told: Callable[[], None]) -> Callable[[], None]:
        """See `Patient`."""
        if not self._client.alive:
            told()
            return lambda: None
        self._client.on_disconnect = told

        def unsubscribe() -> None:
            self._client.on_disconnect = None

        return unsubscribe
