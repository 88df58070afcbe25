"""One keep-alive connection of an agent: its requests are served one at a time, and each is decided on its own."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from http import HTTPStatus
from typing import Final

from ringfence.gateway.contract import (
    ApiRequest,
    Attempt,
    BlockedRequest,
    GitRequest,
    PresentedIdentity,
    Verdict,
)
from ringfence.gateway.dataplane.exchange import ForwardedRequest, cut_error
from ringfence.gateway.dataplane.fast_path import FastPaths
from ringfence.gateway.dataplane.forwarder import is_forwarded
from ringfence.gateway.dataplane.git import check_git_head, content_coding, git_head
from ringfence.gateway.dataplane.headers import forwarded_headers
from ringfence.gateway.dataplane.limits import HANDSHAKE_COST
from ringfence.gateway.dataplane.request_reader import (
    ApiTarget,
    ListenerContext,
    check_body,
    presented_by,
    read_api_target,
    read_request,
    traceparent_in,
)
from ringfence.gateway.dataplane.run_relays import RunRelays
from ringfence.gateway.dataplane.shared import DataPlaneContext
from ringfence.gateway.dataplane.stream import DisconnectedError, PeerTimeoutError, Stream
from ringfence.gateway.events.spool import destination_of_line, unparsed_line
from ringfence.gateway.hosts import AGENT_API, canonical, split_host_and_port
from ringfence.kernel.base import metrics
from ringfence.kernel.http1.body import Body, request_body
from ringfence.kernel.http1.head import (
    LINGER_BYTES,
    MAX_HEAD_BYTES,
    RequestHead,
    RequestRefusedError,
    answer_head,
    parse_request,
    problem_answer,
    take_head,
)
from ringfence.messages.codes import AnyCode, Code
from ringfence.model.git.endpoints import GitEndpoint
from ringfence.model.git.fetch import MAX_FETCH_BYTES, read_fetch
from ringfence.model.git.pkt_lines import GitRequestError
from ringfence.model.git.push import CommandReader

MAX_READ_BYTES: Final = 1024 * 1024
"""The most bytes of a body that are read before the decision."""
_PROXY_AUTHENTICATION_REQUIRED: Final = 407
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class AgentConnection:
    """Serves one connection. CONNECT turns it into TLS, which the gateway terminates."""

    def __init__(
        self, client: Stream, listener: ListenerContext, shared: DataPlaneContext, fast_paths: FastPaths
    ) -> None:
        self._client = client
        self._listener = listener
        self._shared = shared
        self._slot = shared.limits.slot(listener.sender)
        self._fast_path = fast_paths.of_connection(client, listener, self._slot)
        self._attempt: Attempt | None = None
        """The request in progress, until it is decided."""
        self._unparsed_head = b""
        """The head of the request in progress, if it could not be parsed."""

    async def run(self) -> None:
        """Serve requests until the connection ends, and return once it is gone: until then it counts."""
        try:
            while await self._serve_one():
                pass
            await self._client.finish(timeout_s=self._shared.timeouts.piece_s)
        except (DisconnectedError, PeerTimeoutError):
            self._client.abort()
        except BaseException:
            self._client.abort()
            raise
        finally:
            self._fast_path.abandon()

    async def _serve_one(self) -> bool:
        """Serve one request. Returns whether another may follow."""
        self._attempt, head_bytes = None, None
        try:
            head_bytes = await self._read_head()
            if head_bytes is None:
                return await self._continue_handed_over()
            request = parse_request(head_bytes)
        except RequestRefusedError as error:
            self._unparsed_head = (
                head_bytes if head_bytes is not None else bytes(self._client.buffer[:MAX_HEAD_BYTES])
            )
            return await self._refuse(error, None, close=True)
        if request.method == "CONNECT":
            return await self._connect(request)
        body = request_body(request)
        try:
            if (called := self._api_target(request)) is not None:
                return await self._answer_api_request(called, request, body)
            return await self._decide_and_forward(request, body)
        except RequestRefusedError as error:
            return await self._refuse(error, request, close=not body.done or error.status == 400, body=body)

    async def _continue_handed_over(self) -> bool:
        """Continue with the request that the fast path handed over. Returns whether another may follow."""
        forwarded, exchange = self._fast_path.handed_over()
        try:
            if self._fast_path.lease_ended:
                over = cut_error(self._shared.gate.check_view())
                return await self._send_refusal(over, forwarded.head, close=False, body=forwarded.body)
            if exchange is None:
                return await self._forward(forwarded)
            return await self._finish_forwarding(forwarded, self._shared.forwarder.resume(exchange))
        finally:
            self._slot.end()

    async def _read_head(self) -> bytes | None:
        """Read the next head. None if the fast path handed a request over instead, see `FastPath`."""
        client, timeouts, fast_path = self._client, self._shared.timeouts, self._fast_path
        client.deadline = time.monotonic() + (timeouts.head_s if client.buffer else timeouts.idle_s)
        begun, searched = fast_path.count if client.buffer else None, 0
        fast_path.open()
        try:
            while (head_bytes := take_head(client.buffer, searched)) is None:
                searched = len(client.buffer)
                try:
                    await client.read_more()
                except PeerTimeoutError:
                    if not client.buffer:
                        raise
                    raise RequestRefusedError(
                        Code.HEAD_TIMEOUT, "the head of the request does not come"
                    ) from None
                if fast_path.needs_slow_path:
                    return None
                if begun != fast_path.count:
                    searched = 0
                if client.buffer and begun != fast_path.count:
                    begun = fast_path.count
                    client.deadline = time.monotonic() + timeouts.head_s
        finally:
            fast_path.close()
        client.deadline = None
        return head_bytes

    async def _decide_and_forward(self, request: RequestHead, body: Body) -> bool:
        shared = self._shared
        self._slot.begin()
        try:
            presented, attempt = read_request(request, self._listener, shared.is_target_host)
            expects_continue = _expects_continue(request)
            sent = ReceivedRequest(
                self._client,
                partial(self._read_body, body, expects_continue=expects_continue),
                max_bytes=MAX_READ_BYTES,
            )
            self._attempt = attempt
            if (endpoint := shared.gate.git_endpoint(attempt)) is not None:
                return await self._decide_and_forward_git(request, body, presented, endpoint, sent)
            reads_body = shared.gate.reads_body(attempt)
            check_body(request, read_by_map=reads_body)
            if reads_body:
                attempt = dataclasses.replace(attempt, body=await sent.read())
            verdict = await shared.gate.decide(presented, attempt, self._slot.check_agent, sent)
            if not is_forwarded(verdict):
                return await self._send_answer(
                    self._shared.answer(verdict), request, close=not body.done, body=body
                )
            if expects_continue and sent.body is None and not body.done and not self._client.buffer:
                self._client.write(_CONTINUE)
            return await self._forward(
                ForwardedRequest(
                    request,
                    attempt,
                    verdict,
                    body,
                    verdict.body or sent.body,
                    self._listener.server_socket,
                )
            )
        finally:
            self._slot.end()

    async def _decide_and_forward_git(
        self,
        request: RequestHead,
        body: Body,
        presented: PresentedIdentity,
        endpoint: GitEndpoint,
        sent: ReceivedRequest,
    ) -> bool:
        """Decide and forward a request to a Git server. Head and body are written anew from their parsed form."""
        assert self._attempt is not None, "it was read"
        check_body(request, read_by_map=False)
        try:
            check_git_head(request, endpoint)
            git, rebuilt = await self._read_git_body(request, body, endpoint, sent)
        except GitRequestError as error:
            raise RequestRefusedError(error.code, error.message) from None
        added = len(rebuilt) - len(sent.body) if rebuilt is not None and sent.body is not None else 0
        head = git_head(request, endpoint, added)
        attempt = self._attempt = dataclasses.replace(
            self._attempt,
            git=git,
            body=rebuilt if git.commands is None else None,
            headers=partial(forwarded_headers, head, upgrade=False),
        )
        verdict = await self._shared.gate.decide(presented, attempt, self._slot.check_agent, sent)
        if not is_forwarded(verdict):
            answer = self._shared.answer(verdict)
            if git.commands is not None and answer[0] == HTTPStatus.OK:
                await self._discard(body)
            return await self._send_answer(answer, request, close=not body.done, body=body)
        if not verdict.allowed:  # observed: it is forwarded as it came
            head, rebuilt = request, sent.body
        return await self._forward(ForwardedRequest(head, attempt, verdict, body, rebuilt))

    async def _read_git_body(
        self, request: RequestHead, body: Body, endpoint: GitEndpoint, sent: ReceivedRequest
    ) -> tuple[GitRequest, bytes | None]:
        """Read as much of the body as decides. Returns what it asks for, and the bytes to forward instead.

        Raises GitRequestError, and what `_read_body` raises.
        """
        if endpoint.advertises:
            return GitRequest(endpoint), None
        waits = _expects_continue(request)
        if endpoint.service == "git-upload-pack":
            sent.body = await self._read_body(body, expects_continue=waits, limit=MAX_FETCH_BYTES)
            return GitRequest(endpoint), read_fetch(sent.body, content_coding(request))
        reader = CommandReader()
        sent.body = await self._read_body(body, expects_continue=waits, enough=reader.enough)
        commands = reader.command_list(sent.body, ended=body.done)
        return GitRequest(endpoint, commands), commands.encoded() + sent.body[reader.end :]

    async def _discard(self, body: Body) -> None:
        """Read the rest of a refused pack. Git shows the answer only once it has sent everything."""
        client = self._client
        while not body.done:
            client.deadline = time.monotonic() + self._shared.timeouts.piece_s
            await client.read_more()
            body.take(client.buffer)
        client.deadline = None

    def _api_target(self, request: RequestHead) -> ApiTarget | None:
        if self._shared.agent_api is None:
            return None
        return read_api_target(request, self._listener, self._shared.is_target_host)

    async def _answer_api_request(self, called: ApiTarget, request: RequestHead, body: Body) -> bool:
        api, slot = self._shared.agent_api, self._slot
        assert api is not None
        slot.begin()
        try:
            expects_continue = _expects_continue(request)
            content_type = request.values.get(b"content-type")
            received = ReceivedRequest(
                self._client,
                partial(self._read_body, body, expects_continue=expects_continue),
                max_bytes=MAX_READ_BYTES,
            )
            answer = await api.answer(
                ApiRequest(
                    self._listener.sender,
                    presented_by(request, self._listener, htu=called.htu),
                    request.method,
                    called.path,
                    called.query,
                    called.base,
                    content_type.decode("latin-1") if content_type is not None else None,
                    request.length,
                    traceparent_in(request.section),
                    slot.check_agent,
                    lambda limit: self._read_body(body, expects_continue=expects_continue, limit=limit),
                    slot.end,
                    received.on_disconnect,
                )
            )
            return await self._send_answer(answer, request, close=not body.done, body=body)
        finally:
            slot.end()

    async def _forward(self, forwarded: ForwardedRequest) -> bool:
        return await self._finish_forwarding(
            forwarded, self._shared.forwarder.forward(self._client, forwarded)
        )

    async def _finish_forwarding(self, forwarded: ForwardedRequest, forwarding: Awaitable[bool]) -> bool:
        try:
            keep = await forwarding
        except RequestRefusedError as error:
            close = not forwarded.body.done or error.status == 400
            return await self._send_refusal(error, forwarded.head, close=close, body=forwarded.body)
        if not keep:
            await self._linger(forwarded.body)
        return keep

    async def _read_body(
        self,
        body: Body,
        *,
        expects_continue: bool,
        limit: int = MAX_READ_BYTES,
        enough: Callable[[bytearray], bool] | None = None,
    ) -> bytes:
        """Read the body, up to a little more than the limit, or until `enough` of it is here.

        Raises RequestRefusedError: 408 on a timeout, 400 if its framing is wrong.
        """
        client = self._client
        if expects_continue and not body.done and not client.buffer:
            client.write(_CONTINUE)
        pieces = bytearray(body.take(client.buffer))
        client.deadline = time.monotonic() + self._shared.timeouts.piece_s
        while not ((enough is not None and enough(pieces)) or body.done or len(pieces) > limit):
            try:
                await client.read_more()
            except PeerTimeoutError:
                raise RequestRefusedError(
                    Code.BODY_TIMEOUT, "the body of the request does not come"
                ) from None
            pieces += body.take(client.buffer)
        client.deadline = None
        return bytes(pieces)

    # --- CONNECT ------------------------------------------------------------------------------------------------------

    async def _connect(self, request: RequestHead) -> bool:
        shared = self._shared
        try:
            shared.limits.charge(self._listener.sender, HANDSHAKE_COST)
            authority = connect_authority(request, self._listener, self._client)
            presented = presented_by(request, self._listener)
            is_api = shared.agent_api is not None and authority == AGENT_API
            if self._listener.challenge and presented == PresentedIdentity() and not is_api:
                raise RequestRefusedError(
                    Code.PROXY_AUTHORIZATION_MISSING,
                    "write the handle as the user of the proxy URL",
                    headers={"Proxy-Authenticate": 'Basic realm="ringfence"'},
                )
            if not is_api and not shared.is_target_host(authority):
                if (relays := self._relays_to(authority)) is not None:
                    return await self._relay(relays, presented, authority, request)
                verdict = await shared.gate.decide(
                    presented, Attempt(authority, "https", "CONNECT", request.target)
                )
                return await self._send_answer(self._unknown_host_answer(verdict), request, close=True)
            context = shared.authority.context(split_host_and_port(authority, "https")[0])
        except RequestRefusedError as error:
            return await self._refuse(error, request, close=True)
        self._client.write(CONNECT_ESTABLISHED)
        try:
            await self._client.open_tls(context, timeout_s=shared.timeouts.head_s)
        except DisconnectedError as error:
            self._report_blocked(Code.TLS_FAILED, error.message, request)
            raise
        self._listener = dataclasses.replace(
            self._listener, scheme="https", connect_authority=authority, handle=presented.handle
        )
        self._fast_path.set_route(self._listener)
        return True

    def _relays_to(self, authority: str) -> RunRelays | None:
        """The opener of relays, if this is a run's socket and the address may be that of a target without HTTP."""
        relays = self._shared.relays
        if relays is None or self._listener.run_id is None:
            return None
        return relays if relays.may_be_at(authority) else None

    async def _relay(
        self, relays: RunRelays, presented: PresentedIdentity, authority: str, request: RequestHead
    ) -> bool:
        """Relay bytes to a target until one side or its permit ends. Nothing else follows on this connection."""
        with relays.place(self._listener.sender):
            try:
                verdict, permit = await relays.decide(presented, authority, self._slot.check_agent)
            finally:
                self._slot.end()  # a relay takes no place of the agent's requests
            if permit is None:
                return await self._send_answer(self._shared.answer(verdict), request, close=True)
            try:
                await relays.run(self._client, permit, authority, CONNECT_ESTABLISHED)
            except RequestRefusedError as error:
                return await self._send_refusal(error, request, close=True)
        return False

    def _unknown_host_answer(self, verdict: Verdict) -> tuple[int, Mapping[str, str], bytes]:
        if verdict.allowed:
            return problem_answer(
                RequestRefusedError(Code.HOST_UNKNOWN, "this host is no target of the gateway", status=403)
            )
        return self._shared.answer(verdict)

    # --- answers of the gateway's own ---------------------------------------------------------------------------------

    async def _refuse(
        self,
        error: RequestRefusedError,
        request: RequestHead | None,
        *,
        close: bool,
        body: Body | None = None,
    ) -> bool:
        """Refuse a request before its decision. A challenge (407) is not reported as blocked."""
        if error.status != _PROXY_AUTHENTICATION_REQUIRED:
            self._report_blocked(error.code, error.message, request, error.agent_id)
        return await self._send_refusal(error, request, close=close, body=body)

    def _report_blocked(
        self, code: AnyCode, message: str, request: RequestHead | None, agent_id: str | None = None
    ) -> None:
        shown = PresentedIdentity(
            self._listener.task_id, self._listener.certificate, run_id=self._listener.run_id
        )
        if request is not None:
            host = request.values.get(b"host")
            method, target = request.method, request.target
            named = host.decode("latin-1") if host is not None else None
        else:
            method, target, named = unparsed_line(self._unparsed_head)
        destination = destination_of_line(method, target, named, self._listener.scheme) if target else None
        self._shared.report_blocked(
            BlockedRequest(
                code,
                message,
                shown,
                self._attempt,
                method or None,
                destination,
                agent_id,
                unparsed=request is None,
            )
        )

    async def _send_refusal(
        self,
        error: RequestRefusedError,
        request: RequestHead | None,
        *,
        close: bool,
        body: Body | None = None,
    ) -> bool:
        metrics.GATEWAY_REFUSED.labels(error.code).inc()
        return await self._send_answer(problem_answer(error), request, close=close, body=body)

    async def _send_answer(
        self,
        answer: tuple[int, Mapping[str, str], bytes],
        request: RequestHead | None,
        *,
        close: bool,
        body: Body | None = None,
    ) -> bool:
        """Send an answer. Returns whether another request may follow. `body`: that of the request, if it has an end."""
        status, headers, content = answer
        if request is not None:
            close = close or request.minor == 0 or b"close" in request.connection_options
        head_bytes = answer_head(status, headers, len(content), close=close)
        if request is not None and request.method == "HEAD":
            content = b""
        self._client.write(head_bytes + content)
        if close:
            await self._linger(body)
        else:
            await self._drain()
        return not close

    async def _drain(self) -> None:
        """Wait until the client takes the answer (backpressure), and let other connections run."""
        client = self._client
        if not client.blocked:
            await asyncio.sleep(0)
            return
        client.deadline = time.monotonic() + self._shared.timeouts.piece_s
        await client.drain()
        client.deadline = None

    async def _linger(self, body: Body | None) -> None:
        """Discard the rest of a request that was answered, see `LINGER_BYTES`: otherwise a client that is still sending
        would lose the answer.

        `body`: that of the request, after which nothing is awaited; None if its end is unknown.
        """
        client = self._client
        if not client.alive or (body is not None and body.done and not client.buffer):
            return
        client.end()
        remaining, client.deadline = LINGER_BYTES, time.monotonic() + self._shared.timeouts.linger_s
        try:
            while remaining > 0:
                arrived = len(client.buffer)
                if body is not None:
                    try:
                        body.take(client.buffer)
                    except RequestRefusedError:
                        body = None  # its framing is wrong: nobody knows its end
                    else:
                        if body.done and not client.buffer:
                            return
                if body is None or body.done:
                    client.buffer.clear()
                remaining -= arrived - len(client.buffer)
                await client.read_more()
        except (DisconnectedError, PeerTimeoutError):
            return


def _expects_continue(request: RequestHead) -> bool:
    expected = request.values.get(b"expect")
    if expected is None:
        return False
    if expected.lower() != b"100-continue":
        raise RequestRefusedError(Code.EXPECTATION_FAILED, "nothing but 100-continue can be expected")
    return request.minor == 1


# --- CONNECT: the gateway terminates the TLS inside, so that each request in it is decided ---

CONNECT_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


def connect_authority(request: RequestHead, listener: ListenerContext, client: Stream) -> str:
    """The canonical authority of a CONNECT (RFC 9110, 9.3.6). Raises RequestRefusedError."""
    if listener.connect_authority is not None:
        raise RequestRefusedError(Code.CONNECT_REFUSED, "there is no CONNECT inside another")
    if request.chunked or request.length or client.buffer:
        raise RequestRefusedError(Code.CONNECT_REFUSED, "nothing may follow a CONNECT before it is answered")
    if ":" not in request.target.rpartition("]")[2]:
        raise RequestRefusedError(Code.CONNECT_REFUSED, "CONNECT names a host and a port")
    authority = canonical(request.target, "https")
    host = request.values.get(b"host")
    if host is not None and canonical(host.decode("latin-1"), "https") != authority:
        raise RequestRefusedError(Code.HOST_DISAGREES, "Host names another host than the CONNECT")
    return authority


# --- a received request: its body may be read before the decision, and it may be held for an approval ---


class ReceivedRequest:
    """A received request whose body can be read before the decision, and which can be held for an approval."""

    __slots__ = ("_client", "_max_bytes", "_read_body", "body")

    def __init__(self, client: Stream, read: Callable[[], Awaitable[bytes]], *, max_bytes: int) -> None:
        """`read` returns all of the body, or more than `max_bytes` of it.

        It raises RequestRefusedError, DisconnectedError and PeerTimeoutError.
        """
        self._client = client
        self._read_body = read
        self._max_bytes = max_bytes
        self.body: bytes | None = None
        """The bytes that were read before the decision. They are forwarded first."""

    async def read(self) -> bytes | None:
        """The whole body; None if it is too long, which counts as not read. Raises what the callback raises."""
        self.body = await self._read_body()
        return self.body if len(self.body) <= self._max_bytes else None

    async def read_body(self) -> bytes | None:
        try:
            return await self.read() if self.body is None else None
        except (RequestRefusedError, DisconnectedError, PeerTimeoutError):
            return None

    def on_disconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        if not self._client.alive:
            callback()
            return lambda: None
        self._client.on_disconnect = callback

        def unsubscribe() -> None:
            self._client.on_disconnect = None

        return unsubscribe
