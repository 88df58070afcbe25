"""One connection of an agent, from its first byte to its last: one request at a time, each decided on its own."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from ringfence.gateway.accepting import TLS_FAILED
from ringfence.gateway.asking import Way, asked, presented_by
from ringfence.gateway.attempts import Attempt, Blocked, Blocks, Gate, Presented, Verdict
from ringfence.gateway.authority import Authority
from ringfence.gateway.connect import AGREED, connect_authority
from ringfence.gateway.forwarding import Asked, Forwarder, Patiences, goes_on
from ringfence.gateway.framing import Body, request_body
from ringfence.gateway.hosts import split
from ringfence.gateway.limits import Limits
from ringfence.gateway.refusals import Answer, RefusedError, head, problem
from ringfence.gateway.sent import Sent
from ringfence.gateway.stream import ExpiredError, GoneError, Stream
from ringfence.gateway.wire import RequestHead, cut_head, parse_request
from ringfence.kernel import metrics
from ringfence.messages.credential import Reason

MAX_READ_BYTES: Final = 1024 * 1024
"""So much of a body is read before the decision, where the decision needs it."""
_ASKS_WHO: Final = 407
_LINGER_S: Final = 1.0
_LINGER_BYTES: Final = 256 * 1024
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Desk:
    """What every connection needs."""

    gate: Gate
    knows: Callable[[str], bool]
    answer: Answer
    authority: Authority
    forwarder: Forwarder
    limits: Limits
    patiences: Patiences
    blocked: Blocks


class Connection:
    """What goes on in one connection."""

    def __init__(self, client: Stream, way: Way, desk: Desk) -> None:
        self._client = client
        self._way = way
        self._desk = desk
        self._now = asyncio.get_running_loop().time
        self._agent: str | None = None
        """Whose request is under way, as the core told."""
        self._attempt: Attempt | None = None
        """What it asks for, until that is decided."""

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

    async def _one(self) -> bool:
        """Serve one request. Whether there may be another."""
        self._attempt = None
        try:
            given = await self._head()
            request = parse_request(given)
        except RefusedError as error:
            return await self._refuse(error, None, close=True)
        if request.method == "CONNECT":
            return await self._connect(request)
        body = request_body(request)
        try:
            return await self._decided(request, body)
        except RefusedError as error:
            return await self._refuse(error, request, close=not body.done or error.status == 400)

    async def _head(self) -> bytes:
        client, patiences = self._client, self._desk.patiences
        client.deadline = self._now() + (patiences.head_s if client.buffer else patiences.idle_s)
        begun = bool(client.buffer)
        while (given := cut_head(client.buffer)) is None:
            try:
                await client.more()
            except ExpiredError:
                if not client.buffer:
                    raise
                raise RefusedError(408, "head_timeout", "the head of the request does not come") from None
            if not begun:
                begun = True
                client.deadline = self._now() + patiences.head_s
        client.deadline = None
        return given

    async def _decided(self, request: RequestHead, body: Body) -> bool:
        desk, sender = self._desk, self._way.sender
        desk.limits.ask(sender)
        desk.limits.begin(sender)
        try:
            presented, attempt = asked(request, self._way, desk.knows)
            waits = _waits_for_continue(request)
            sent = Sent(self._client, partial(self._read, body, waits=waits), most=MAX_READ_BYTES)
            self._attempt = attempt
            if desk.gate.reads_body(attempt):
                attempt = dataclasses.replace(attempt, body=await sent.read())
            verdict = await desk.gate.decide(presented, attempt, self._admits, sent)
            if not goes_on(verdict):
                return await self._say(self._desk.answer(verdict), request, close=not body.done)
            if waits and sent.body is None and not body.done and not self._client.buffer:
                self._client.write(_CONTINUE)
            return await self._forward(Asked(request, attempt, verdict, body, sent.body))
        finally:
            desk.limits.end(sender)
            if self._agent is not None:
                desk.limits.end(self._agent)
                self._agent = None

    def _admits(self, agent_id: str) -> Reason | None:
        """See `Admits`: the limits of an agent, wherever it comes from."""
        agent, limits = f"agent:{agent_id}", self._desk.limits
        try:
            limits.ask(agent)
            limits.begin(agent)
        except RefusedError as error:
            return Reason(code=error.code, message=error.message)
        self._agent = agent
        return None

    async def _forward(self, going: Asked) -> bool:
        try:
            keep = await self._desk.forwarder.forward(self._client, going)
        except RefusedError as error:
            close = not going.body.done or error.status == 400
            return await self._tell(error, going.head, close=close)
        if not keep:
            await self._leave(unread=not going.body.done)
        return keep

    async def _read(self, body: Body, *, waits: bool) -> bytes:
        """All of a body, or more than is looked at. Raises RefusedError: 408, or 400 where its framing is wrong."""
        client = self._client
        if waits and not body.done and not client.buffer:
            client.write(_CONTINUE)
        pieces = bytearray(body.take(client.buffer))
        client.deadline = self._now() + self._desk.patiences.piece_s
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
            desk.limits.ask(self._way.sender)
            authority = connect_authority(request, self._way, self._client)
            presented = presented_by(request, self._way)
            if self._way.challenge and presented == Presented():
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
        shown = Presented(self._way.task_id, self._way.certificate)
        method = request.method if request is not None else None
        self._desk.blocked(Blocked(code, message, shown, self._attempt, method))

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
            await self._leave(unread=unread)
        return not close

    async def _leave(self, *, unread: bool) -> None:
        """Close. What still comes is read for a moment, as the answer would be lost to who is still sending."""
        client = self._client
        if not unread or not client.alive:
            return
        if client.transport.can_write_eof():
            client.transport.write_eof()
        left, client.deadline = _LINGER_BYTES, self._now() + _LINGER_S
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
