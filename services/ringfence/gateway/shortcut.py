"""The short way of a request: decided, sent on and answered within the calls of the loop, without a coroutine.

It takes what comes whole, is allowed by what is at hand, goes to a target of which a connection idles, and is answered
whole. Everything else is left to the coroutine of the connection from its first byte, or handed over to it where it is
under way: what is refused, waited for, streamed or went wrong is told there alone.
"""

from __future__ import annotations

import dataclasses
import logging
import time

from ringfence.gateway.asking import Way, asked
from ringfence.gateway.desk import Desk
from ringfence.gateway.forwarding import Asked, Exchange
from ringfence.gateway.framing import Body
from ringfence.gateway.limits import Turn
from ringfence.gateway.refusals import RefusedError
from ringfence.gateway.stream import Stream
from ringfence.gateway.wire import END, MAX_HEAD_BYTES, RequestHead, parse_request

log = logging.getLogger(__name__)


class Shortcut:
    """That of one connection."""

    __slots__ = ("_asked", "_client", "_desk", "_exchange", "_seen", "_turn", "handed_over", "taken", "way")

    def __init__(self, client: Stream, way: Way, desk: Desk, turn: Turn) -> None:
        """`turn`: the connection's own, which counts its requests whichever way they go."""
        self.way = way
        self.taken = 0
        """How many requests it took."""
        self.handed_over = False
        """Whether one is under way that the coroutine has to go on with."""
        self._client = client
        self._desk = desk
        self._turn = turn
        self._asked: Asked | None = None
        """What is under way."""
        self._seen = 0
        """So much of what came was searched for the end of a head, in vain."""
        self._exchange: Exchange | None = None
        """The same, once it was sent."""

    def open(self) -> None:
        """The connection waits for a request: take it where that can be done."""
        self._client.taker = self._take
        self._seen = 0

    def close(self) -> None:
        """What comes is the coroutine's."""
        self._client.taker = None

    def handed(self) -> tuple[Asked, Exchange | None]:
        """What was handed over: a decided request, and its exchange where it was sent. Its turn is not over yet."""
        asked, exchange = self._asked, self._exchange
        assert asked is not None, "something was handed over"
        self._asked, self._exchange, self.handed_over = None, None, False
        return asked, exchange

    def abandon(self) -> None:
        """The connection is over, and whatever is under way."""
        self.close()
        exchange, self._exchange, self._asked = self._exchange, None, None
        if exchange is not None:
            exchange.drop()
            exchange.finish()
        self._turn.end()

    # --- a request ----------------------------------------------------------------------------------------------------

    def _take(self) -> bool:
        """See `Stream.taker`."""
        if self._asked is not None:
            return True  # one at a time: what comes meanwhile stays where it is
        try:
            return self._took()
        except Exception as error:  # noqa: BLE001 - not told: what it was raised on may hold what an agent sent
            log.error("a connection failed: %s", type(error).__name__)
            self._client.abort()
            return True

    def _took(self) -> bool:
        client, desk = self._client, self._desk
        end = client.buffer.find(END, max(0, self._seen - len(END) + 1), MAX_HEAD_BYTES)
        if end < 0:
            self._seen = len(client.buffer)
            return False
        if self.way.shows_nobody and b"DPoP:" in client.buffer:
            return False  # a proof is waited for: it is read there, and not here too
        request = _plain_request(client, end)
        if request is None:
            return False
        read = bytes(client.buffer[-request.length :]) if request.length else None
        try:
            presented, attempt = asked(request, self.way, desk.knows)
            if read is not None and desk.gate.reads_body(attempt):
                attempt = dataclasses.replace(attempt, body=read)
            self._turn.begin()
        except RefusedError:
            return False
        allowed = desk.gate.allowed_at_once(presented, attempt, self._turn.admits)
        if allowed is None:
            self._turn.put_off()
            return False
        verdict, injected = allowed
        client.buffer.clear()
        self._seen = 0
        client.deadline = None
        self.taken += 1
        self._asked = Asked(request, attempt, verdict, Body(), read)
        self._exchange = exchange = desk.forwarder.begin(client, self._asked, injected)
        if exchange is None or exchange.upstream is None:
            self._hand_over()
            return True
        exchange.upstream.deadline = time.monotonic() + desk.patiences.response_s
        exchange.upstream.taker = self._answer
        exchange.upstream.on_gone = self._hand_over
        return True

    # --- its answer ---------------------------------------------------------------------------------------------------

    def _answer(self) -> bool:
        """See `Stream.taker`: something came of the answer, or did not in time."""
        exchange = self._exchange
        clean = exchange.answer_at_once() if exchange is not None else None
        if exchange is None or clean is None:
            self._hand_over()
            return False
        self._asked = self._exchange = None
        self._desk.forwarder.end(exchange, clean=clean)
        self._turn.end()
        self._client.deadline = time.monotonic() + self._desk.patiences.idle_s
        if self._client.buffer:
            self._client.wake()
        return True

    def _hand_over(self) -> None:
        upstream = self._exchange.upstream if self._exchange is not None else None
        if upstream is not None:
            upstream.taker, upstream.on_gone = None, None
        self.handed_over = True
        self._client.wake()


def _plain_request(client: Stream, end: int) -> RequestHead | None:
    """A request that is all there, with nothing behind it, and has nothing out of the ordinary. It stays there.

    `end`: where its head ends.
    """
    came = client.buffer
    if client.blocked or not client.alive:
        return None
    try:
        request = parse_request(bytes(came[: end + 2]))
    except RefusedError:
        return None
    plain = (
        request.minor == 1
        and not request.chunked
        and len(came) == end + len(END) + (request.length or 0)
        and request.named <= _PLAIN
        and b"expect" not in request.known
        and request.method != "CONNECT"
    )
    return request if plain else None


_PLAIN = frozenset({b"keep-alive"})
"""What `Connection` may name."""
