"""One request/response exchange with a target. Both bodies are streamed with backpressure.

It ends when the lease ends: then nothing more goes in either direction.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NoReturn

from ringfence.gateway.contract import Attempt, Verdict
from ringfence.gateway.dataplane.git import advertisement_filter
from ringfence.gateway.dataplane.headers import request_head, response_head, switching_head
from ringfence.gateway.dataplane.mcp_responses import (
    EVENTS,
    JSON,
    MAX_MESSAGE_BYTES,
    EventStreamFilter,
    McpResponseFilter,
    media_type,
    too_large,
)
from ringfence.gateway.dataplane.secret_redaction import Redactor, needles_of, redact
from ringfence.gateway.dataplane.stream import DisconnectedError, PeerTimeoutError, Stream
from ringfence.gateway.dataplane.websockets import accepts_websocket, asks_for_websocket, tunnel
from ringfence.gateway.hosts import Origin
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.http1.body import (
    LAST_CHUNK,
    Body,
    CloseDelimitedBody,
    SizedBody,
    chunk,
    has_risky_body,
    response_body,
)
from ringfence.kernel.http1.head import (
    LINGER_S,
    RequestHead,
    RequestRefusedError,
    ResponseHead,
    parse_response,
    take_head,
)
from ringfence.messages.codes import Code, ReceivedCode
from ringfence.model.git.advertisement import AdvertisementFilter
from ringfence.model.git.pkt_lines import GitRequestError
from ringfence.model.verdict import Allowed, Refused

_REPEATABLE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""Safe methods whose request may be sent again if a pooled connection turns out to be closed (RFC 9110, 9.2.2)."""

_MAX_INTERIM_RESPONSES: Final = 8
_BodyFilter = EventStreamFilter | AdvertisementFilter


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts in seconds."""

    head_s: float = 10.0
    """For the whole head of a request, from its first byte."""
    idle_s: float = 60.0
    """For the next request of a keep-alive connection."""
    piece_s: float = 30.0
    """For the next piece of a body from the agent, for a whole body that is read before the decision, and until the
    agent takes what is sent.
    """
    connect_s: float = 5.0
    response_s: float = 60.0
    """For the head of the target's response, once the request is sent."""
    stream_s: float = 300.0
    """For the next piece of the target's response, and of a WebSocket."""
    linger_s: float = LINGER_S
    """For the rest of a request that was answered already, all of it."""


@dataclass(slots=True)
class ForwardedRequest:
    """A request that is forwarded, and the rest of its body."""

    head: RequestHead
    attempt: Attempt
    verdict: Verdict
    body: Body
    body_read: bytes | None
    """The part of the body that was read for the decision: all of it if `body` is done, else too much to decide on."""
    server_socket: Path | None = None
    """See `ListenerContext.server_socket`."""


def is_observed(verdict: Verdict) -> bool:
    return not verdict.allowed and verdict.observed and verdict.target is not None


def never_expired() -> bool:
    return False  # an observed request uses no lease


class StaleConnectionError(RingfenceError):
    """The target closed a connection before it sent anything."""


class Exchange:
    """One request and its response."""

    __slots__ = (
        "_answering",
        "_check_view",
        "_client",
        "_head",
        "_in_chunks",
        "_injects",
        "_mcp_filter",
        "_meter",
        "_needles",
        "_no_reuse",
        "_refused",
        "_repeatable",
        "_request",
        "_timeouts",
        "_upgrade",
        "_uploading",
        "_view_expired",
        "_whole_body",
        "origin",
        "unsubscribe",
        "upstream",
    )  # fmt: skip

    def __init__(
        self,
        client: Stream,
        request: ForwardedRequest,
        injected: Mapping[str, str] | None,
        origin: Origin,
        timeouts: Timeouts,
        view_expired: Callable[[], bool],
        check_view: Callable[[], Allowed | Refused],
    ) -> None:
        self.origin = origin
        self.upstream: Stream | None = None
        """The connection that the request was sent on last."""
        self.unsubscribe: Callable[[], None] = do_nothing
        """Unsubscribes from the end of the lease."""
        self._client = client
        self._request = request
        self._timeouts = timeouts
        self._view_expired = view_expired
        self._check_view = check_view
        self._injects = injected is not None
        self._needles = needles_of(tuple(injected.values())) if injected is not None else ()
        self._uploading: asyncio.Task[None] | None = None
        self._refused: RequestRefusedError | None = None
        self._answering = False
        self._mcp_filter = McpResponseFilter(request.verdict.mcp) if request.verdict.mcp is not None else None
        self._meter = request.verdict.meter
        self._upgrade = self._mcp_filter is None and asks_for_websocket(request.head)
        self._whole_body = whole = request.body_read if request.body.done else None
        self._no_reuse = has_risky_body(request.head)
        self._repeatable = request.head.method in _REPEATABLE
        chunked = request.head.chunked
        self._in_chunks = chunked and whole is None
        length = len(whole) if whole is not None and (chunked or whole) else request.head.length
        self._head = request_head(
            request.head,
            request.attempt.target,
            origin.authority,
            injected,
            length=length,
            upgrade=self._upgrade,
            approved=request.verdict.headers,
        )

    @property
    def can_repeat(self) -> bool:
        """Whether the request may be sent again: its method is safe, so that it has no body."""
        return self._repeatable

    def on_lease_end(self) -> None:
        self._cut(cut_error(self._check_view()))

    def _check_cut(self) -> None:
        """Raise RequestRefusedError if the lease has ended, also while this process was suspended."""
        if self._refused is None and self._view_expired():
            self.on_lease_end()
        if self._refused is not None:
            raise self._refused

    def _may_send(self) -> bool:
        """The same check at the moment of sending, since this process may have been suspended meanwhile."""
        if self._refused is None and self._view_expired():
            self.on_lease_end()
        return self._refused is None

    def finish(self) -> None:
        self.unsubscribe()
        self._client.on_disconnect = None
        if self._uploading is not None:
            self._uploading.cancel()
        if self._mcp_filter is not None:
            self._mcp_filter.finish()

    def send_request(self, upstream: Stream) -> None:
        """Send the request. Raises RequestRefusedError if the lease has ended, DisconnectedError if the client left."""
        self.upstream = upstream
        self._check_cut()
        if not self._client.alive:
            raise DisconnectedError("the client left")
        self._client.on_disconnect = self.on_client_disconnect
        if self._meter is not None:
            self._meter.on_sent()
        self._send(upstream)

    async def read_response_head(self, upstream: Stream) -> ResponseHead:
        """Read the head of the response: a final one, or one that opens a WebSocket.

        Raises StaleConnectionError if the target closed the connection before it sent anything, RequestRefusedError for
        every other fault.
        """
        self._check_cut()
        for interim in range(_MAX_INTERIM_RESPONSES):
            response = await self._next_response_head(upstream, began=interim > 0)
            if response.status >= 200 or response.status == 101:
                return response
        raise RequestRefusedError(Code.TARGET_UNREADABLE, "the target sends nothing but interim responses")

    async def _next_response_head(self, upstream: Stream, *, began: bool) -> ResponseHead:
        while True:
            try:
                head = take_head(upstream.buffer)
                if head is not None:
                    return parse_response(head)
            except RequestRefusedError as error:
                raise _unreadable(error) from None
            await self._read_more(upstream, self._timeouts.response_s, began=began or bool(upstream.buffer))

    async def relay_response(self, upstream: Stream, response: ResponseHead) -> tuple[bool, bool]:
        """Send the response to the client. Returns whether the connections of client and target can be reused."""
        if response.status == 101:
            await self._open_websocket(upstream, response)
            return False, False
        body = response_body(response, self._request.head.method)
        if self._injects and not body.done and is_compressed(response):
            raise RequestRefusedError(
                Code.TARGET_COMPRESSES,
                "the target compressed its response though it was asked not to; nobody could see what it says",
            )
        until_closed = isinstance(body, CloseDelimitedBody)
        modern = self._request.head.minor == 1
        if self._meter is not None:
            self._meter.on_response_head(response.status, media_type(response.values.get(b"content-type")))
        whole, event_filter = await self._filter_mcp(upstream, response, body)
        git = self._request.attempt.git if self._request.verdict.allowed else None
        body_filter = event_filter or advertisement_filter(git, response)
        if whole is not None or body_filter is not None:  # filtering changes the length
            response = replace(response, length=None if whole is None else len(whole), chunked=whole is None)
        sized = (
            whole is not None or (isinstance(body, SizedBody) and body_filter is None) or type(body) is Body
        )
        in_chunks = not sized and not until_closed and modern
        framed = sized or in_chunks
        keep = (
            framed
            and modern
            and b"close" not in self._request.head.connection_options
            and self._request.body.done
        )
        head = redact(response_head(response, chunked=in_chunks, close=not keep), self._needles)
        self._answering = True
        if whole is not None:
            self._client.write(head + redact(whole, self._needles))
            if self._client.blocked:
                await self._drain_client()
        else:
            await self._stream_body(upstream, body, head, body_filter, in_chunks=in_chunks)
        clean = (
            not until_closed
            and response.minor == 1
            and b"close" not in response.connection_options
            and self._request.body.done
            and self._uploaded()
            and not self._no_reuse
        )
        return keep and self._uploaded(), clean

    # --- to the target ------------------------------------------------------------------------------------------------

    def _send(self, upstream: Stream) -> None:
        """Write the head and the part of the body that is here. A task uploads the rest."""
        request = self._request
        if self._whole_body is not None:
            upstream.write_at_end_of_turn(self._head + self._whole_body, self._may_send)
            return
        if request.body.done:
            upstream.write_at_end_of_turn(self._head, self._may_send)
            return
        first = (request.body_read or b"") + request.body.take(self._client.buffer)
        upstream.write(self._head + self._frame(first))
        if not request.body.done:
            self._uploading = asyncio.create_task(self._upload(upstream), name="upload")

    def _frame(self, piece: bytes) -> bytes:
        if not self._in_chunks:
            return piece
        framed = chunk(piece) if piece else b""
        return framed + LAST_CHUNK if self._request.body.done else framed

    async def _upload(self, upstream: Stream) -> None:
        body, client = self._request.body, self._client
        try:
            while not body.done:
                upstream.deadline = None  # the target is not waited for
                client.deadline = time.monotonic() + self._timeouts.piece_s
                await client.read_more()
                client.deadline = None
                self._check_cut()
                piece = self._frame(body.take(client.buffer))
                if piece:
                    upstream.write(piece)
                upstream.deadline = time.monotonic() + self._timeouts.response_s
                if upstream.blocked and not await _drain(upstream):
                    return
        except PeerTimeoutError:
            self._cut(RequestRefusedError(Code.BODY_TIMEOUT, "the body of the request does not come"))
        except RequestRefusedError as error:
            self._cut(error)
        except DisconnectedError:
            upstream.abort()

    def _uploaded(self) -> bool:
        return self._uploading is None or self._uploading.done()

    # --- to the client ------------------------------------------------------------------------------------------------

    async def _filter_mcp(
        self, upstream: Stream, response: ResponseHead, body: Body
    ) -> tuple[bytes | None, EventStreamFilter | None]:
        """At an MCP endpoint: the whole filtered response, or the filter for a stream of events."""
        if self._mcp_filter is None:
            return None, None
        self._mcp_filter.on_response_head(response)
        if body.done or response.status >= 300:
            return None, None
        media = media_type(response.values.get(b"content-type"))
        if media == EVENTS:
            return None, EventStreamFilter(self._mcp_filter)
        if media == JSON or (not media and self._mcp_filter.may_be_empty):
            data = await self._read_whole_body(upstream, body)
            if not data and self._mcp_filter.may_be_empty:
                return data, None
            whole = self._mcp_filter.message(data) if media == JSON else None
            if whole is None:
                raise RequestRefusedError(
                    Code.TARGET_UNREADABLE, "the target answers with what is not asked for"
                )
            return whole, None
        raise RequestRefusedError(
            Code.TARGET_UNREADABLE, "the target answers a message of MCP with something else"
        )

    async def _read_whole_body(self, upstream: Stream, body: Body) -> bytes:
        pieces = bytearray()
        while True:
            try:
                pieces += body.take(upstream.buffer)
            except RequestRefusedError as error:
                raise _unreadable(error) from None
            if len(pieces) > MAX_MESSAGE_BYTES:
                raise too_large()
            if body.done:
                return bytes(pieces)
            try:
                await self._read_more(upstream, self._timeouts.stream_s, began=True)
            except RequestRefusedError as error:
                if isinstance(body, CloseDelimitedBody) and error.code == Code.TARGET_GONE:
                    return bytes(pieces)
                raise

    async def _stream_body(
        self,
        upstream: Stream,
        body: Body,
        head: bytes,
        body_filter: _BodyFilter | None,
        *,
        in_chunks: bool,
    ) -> None:
        client, redactor = self._client, Redactor(self._needles)
        out = head
        while True:
            try:
                piece = body.take(upstream.buffer)
                if self._meter is not None:
                    self._meter.feed(piece, done=body.done)
                if body_filter is not None:
                    piece = body_filter.last(piece) if body.done else body_filter.feed(piece)
            except (RequestRefusedError, GitRequestError) as error:
                self._abort_response(client, _unreadable(error))
            if piece or body.done:
                piece = redactor.last(piece) if body.done else redactor.feed(piece)
            if piece:
                out += chunk(piece) if in_chunks else piece
            if body.done and in_chunks:
                out += LAST_CHUNK
            if out:
                (client.write_at_end_of_turn if body.done else client.write)(out)
                out = b""
            if client.blocked:
                await self._drain_client()
            if body.done:
                return
            try:
                await self._read_more(upstream, self._timeouts.stream_s, began=True)
            except RequestRefusedError as error:
                if isinstance(body, CloseDelimitedBody) and error.code == Code.TARGET_GONE:
                    if self._meter is not None:
                        self._meter.feed(b"", done=True)
                    client.write(redactor.last(self._last_event(body_filter)))
                    return
                self._abort_response(client, error)

    def _last_event(self, body_filter: _BodyFilter | None) -> bytes:
        """The rest of the data in the filter, at the end of the connection."""
        try:
            return body_filter.last(b"") if body_filter is not None else b""
        except (RequestRefusedError, GitRequestError) as error:
            self._abort_response(self._client, error)

    async def _drain_client(self) -> None:
        client = self._client
        if self._uploaded():
            client.deadline = time.monotonic() + self._timeouts.piece_s
        await client.drain()
        if self._uploaded():
            client.deadline = None

    def _abort_response(self, client: Stream, error: RequestRefusedError | GitRequestError) -> NoReturn:
        """Break off a response that was begun, so that the client sees that it is incomplete."""
        client.fail(DisconnectedError(error.message))
        raise DisconnectedError(error.message)

    async def _open_websocket(self, upstream: Stream, response: ResponseHead) -> None:
        """Relay a WebSocket until it or the lease ends."""
        if not self._upgrade or not accepts_websocket(self._request.head, response, plain=self._injects):
            raise RequestRefusedError(
                Code.TARGET_UNREADABLE, "the target switches to what nobody asked it for"
            )
        self._answering = True
        self._client.write(redact(switching_head(response), self._needles))
        await tunnel(
            self._client, upstream, Redactor(self._needles), self._check_cut, idle_s=self._timeouts.stream_s
        )

    # --- faults -------------------------------------------------------------------------------------------------------

    async def _read_more(self, upstream: Stream, timeout_s: float, *, began: bool) -> None:
        upstream.deadline = time.monotonic() + timeout_s if self._uploaded() else None
        try:
            await upstream.read_more()
            self._check_cut()
        except PeerTimeoutError:
            raise RequestRefusedError(Code.TARGET_TIMEOUT, "the target does not answer in time") from None
        except DisconnectedError:
            if not self._client.alive:
                raise DisconnectedError("the client left") from None
            if not began:
                raise StaleConnectionError("the target closed the connection") from None
            raise RequestRefusedError(Code.TARGET_GONE, "the target closed the connection") from None
        finally:
            upstream.deadline = None

    def on_client_disconnect(self) -> None:
        """Abort the request: no client waits for its response any more."""
        if self.upstream is not None:
            self.upstream.abort()

    def _cut(self, error: RequestRefusedError) -> None:
        """Cut the target off, and the client too if a response has begun."""
        self._refused = error
        if self.upstream is not None:
            self.upstream.fail(error)
        if self._answering:
            self._client.fail(DisconnectedError(error.message))


def cut_error(view: Allowed | Refused) -> RequestRefusedError:
    """The refusal of an exchange that was cut. `view`: whether the lease has ended for certain (`Gate.check_view`).

    Told that its lease has ended, an agent would ask for a new one, which does not help against a stale view.
    """
    if isinstance(view, Refused):
        return RequestRefusedError(
            ReceivedCode(view.reason.code), view.reason.message, status=503, headers={"Retry-After": "1"}
        )
    return RequestRefusedError(Code.LEASE_ENDED, "the lease that allowed this has ended")


def is_compressed(response: ResponseHead) -> bool:
    """Whether a response is compressed: then the secret could not be found in it."""
    return response.values.get(b"content-encoding", b"identity").lower() != b"identity"


def do_nothing() -> None:
    pass


async def _drain(upstream: Stream) -> bool:
    """Whether the target took the written data. If it did not in time, the reader of its response reports that."""
    try:
        await upstream.drain()
    except PeerTimeoutError:
        return False
    return True


def _unreadable(error: RequestRefusedError | GitRequestError) -> RequestRefusedError:
    return RequestRefusedError(
        Code.TARGET_UNREADABLE, f"the target's response is not forwarded: {error.message}"
    )
