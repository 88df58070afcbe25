"""The short way of a request: decided, sent on and answered within the calls of the loop, without a coroutine.

It takes what comes whole, is allowed by what is at hand, goes to a target of which a connection idles, and is answered
whole. Everything else is left to the coroutine of the connection from its first byte, or handed over to it where it is
under way: what is refused, waited for, streamed or went wrong is told there alone.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Final

from ringfence.gateway.dataplane.exchange import Asked, Exchange
from ringfence.gateway.dataplane.fast_path.plans import MAX_KEPT_BYTES, Plan, Plans, beginning_of, key_of
from ringfence.gateway.dataplane.http1_body import Body
from ringfence.gateway.dataplane.http1_head import END, MAX_HEAD_BYTES, RequestHead, parse_request
from ringfence.gateway.dataplane.limits import Turn
from ringfence.gateway.dataplane.request_reader import ListenerContext, read_request
from ringfence.gateway.dataplane.secret_redaction import redact
from ringfence.gateway.dataplane.shared import DataPlaneContext
from ringfence.gateway.dataplane.stream import Stream
from ringfence.gateway.errors import RefusedError
from ringfence.gateway.hosts import origin_of
from ringfence.kernel.base.errors import UnavailableError

log = logging.getLogger(__name__)

_PLAIN: Final = frozenset({b"keep-alive"})
"""What `Connection` may name."""
_NOTHING: Final[Mapping[str, str]] = {}


class FastPaths:
    """The fast paths of one data plane: its connections share what was read of requests before."""

    def __init__(self, context: DataPlaneContext, *, enabled: bool) -> None:
        """`enabled`: whether there is one; otherwise each request is left to the coroutine of its connection."""
        self._context = context
        self._plans = Plans() if enabled else None

    def of_connection(self, client: Stream, way: ListenerContext, turn: Turn) -> FastPath:
        """That of a new connection. `turn`: the connection's own, which counts its requests on both paths."""
        return FastPath(client, way, self._context, turn, self._plans)


class FastPath:
    """That of one connection."""

    __slots__ = (
        "_action_id", "_client", "_come", "_desk", "_injects", "_key", "_needles", "_plan", "_plans", "_turn",
        "_upstream", "_way", "_when_answered", "_when_ended", "_when_gone", "_when_kept", "ended", "handed_over",
        "taken",
    )  # fmt: skip

    def __init__(
        self, client: Stream, way: ListenerContext, desk: DataPlaneContext, turn: Turn, plans: Plans | None
    ) -> None:
        """See `FastPaths`. Without `plans` it takes no request."""
        self.taken = 0
        """How many requests it took."""
        self.handed_over = False
        """Whether one is under way that the coroutine has to go on with."""
        self.ended = False
        """Whether the lease of what is under way has ended."""
        self._client = client
        self._desk = desk
        self._turn = turn
        self._plans = plans
        self._plan: Plan | None = None
        """Of what is under way,"""
        self._come = b""
        """which came so,"""
        self._action_id = ""
        self._injects: Mapping[str, str] = _NOTHING
        self._needles: tuple[bytes, ...] = ()
        """What its answer is searched for,"""
        self._upstream: Stream | None = None
        """and where it was sent."""
        # Made once: they are handed out with each request.
        self._when_kept, self._when_ended = self._kept, self._lease_ended
        self._when_answered, self._when_gone = self._answer, self._hand_over
        self.come_by(way)

    def come_by(self, way: ListenerContext) -> None:
        """From here on requests come this way."""
        self._way = way
        self._key = key_of(way)

    def open(self) -> None:
        """The connection waits for a request: take it where that can be done."""
        if self._plans is not None:
            self._client.taker = self._take

    def close(self) -> None:
        """What comes is the coroutine's."""
        self._client.taker = None

    def handed(self) -> tuple[Asked, Exchange | None]:
        """What was handed over: a decided request, and its exchange where it was sent. Its turn is not over yet."""
        plan, upstream, injects = self._plan, self._upstream, self._injects
        assert plan is not None, "something was handed over"
        body = self._come[-plan.length :] if plan.length else None
        verdict = plan.cached_allowance.verdict(self._action_id, injects)
        going, exchange = Asked(plan.request, plan.attempt, verdict, Body(), body), None
        if upstream is not None:
            exchange = self._desk.forwarder.take_over(self._client, going, injects, plan.origin, upstream)
        self._forget(plan)
        self.handed_over = False
        return going, exchange

    def abandon(self) -> None:
        """The connection is over, and whatever is under way."""
        self.close()
        if self._plan is not None:
            upstream = self._upstream
            if upstream is not None:
                upstream.taker = upstream.on_disconnect = None
                upstream.abort()
            self._forget(self._plan)
        self._turn.end()

    def _forget(self, plan: Plan) -> None:
        """Nothing is under way here any more."""
        self._desk.gate.unwatch(plan.cached_allowance.lease.lease_id, self._when_ended)
        self._plan = self._upstream = None

    # --- a request ----------------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> bool:
        """See `Stream.taker`."""
        client = self._client
        if self._plan is not None:  # one at a time: what comes meanwhile stays where it is
            client.keep(data)
            return True
        if client.buffer or client.blocked or not client.alive:
            return False
        try:
            return self._took(data)
        except Exception as error:  # noqa: BLE001 - not told: what it was raised on may hold what an agent sent
            self._fail(error)
            return True

    def _took(self, data: bytes) -> bool:
        desk, turn, plans = self._desk, self._turn, self._plans
        assert plans is not None, "the fast path is enabled"
        end = data.find(END, 0, MAX_HEAD_BYTES)
        if end < 0:
            return False
        key = self._key + data[: end + len(END)]
        kept = plans.get(key)
        plan = kept if kept is not None else self._planned(data, end, key, plans)
        if plan is None or len(data) != end + len(END) + plan.length:
            return False
        try:
            turn.begin()
        except RefusedError:
            return False
        allowed = plan.cached_allowance.allowed(turn.admits, self._when_kept)
        if allowed is None and kept is not None and not kept.cached_allowance.is_valid():
            plan = self._planned(data, end, key, plans)
            allowed = (
                plan.cached_allowance.allowed(turn.admits, self._when_kept) if plan is not None else None
            )
        if allowed is None or plan is None:
            turn.put_off()
            return False
        self._plan, self._come, self.ended = plan, data, False
        self._action_id, self._injects = allowed
        desk.gate.watch(plan.cached_allowance.lease.lease_id, self._when_ended)
        self._client.deadline = None
        self.taken += 1
        return True

    def _planned(self, data: bytes, end: int, key: bytes, plans: Plans) -> Plan | None:
        """How a request goes on that was not here before, or of which something changed; None where it is not plain."""
        desk = self._desk
        shows_proof = b"DPoP:" in data
        if self._way.shows_nobody and shows_proof:
            return None  # a proof is waited for: it is read there, and not here too
        try:
            request = parse_request(data[: end + 2])
            if not _is_plain(request) or len(data) != end + len(END) + (request.length or 0):
                return None
            presented, attempt = read_request(request, self._way, desk.knows)
            seen = request.length is not None and request.length > 0 and desk.gate.reads_body(attempt)
            if seen:
                attempt = dataclasses.replace(attempt, body=data[end + len(END) :])
            standing = desk.gate.cached_allowance(presented, attempt)
            if standing is None:
                return None
            plan = Plan(request, attempt, standing, origin_of(desk.gate.upstream(standing.target)))
        except (RefusedError, UnavailableError):
            return None
        if not seen and not shows_proof and end <= MAX_KEPT_BYTES:
            plans.keep(key, plan)
        return plan

    def _kept(self, kept: bool) -> None:
        """Its event is on disk, or cannot be: send it, or leave it to the coroutine."""
        plan = self._plan
        if plan is None:
            return  # the connection is over
        try:
            if kept:
                self._send(plan)
            else:
                self._leave(plan)
        except Exception as error:  # noqa: BLE001 - as in `_take`
            self._fail(error)

    def _send(self, plan: Plan) -> None:
        desk = self._desk
        if self.ended or desk.gate.view_expired():  # this process may have stood still since it was decided
            self._lease_ended()
            return
        upstream = desk.upstreams.idling(plan.origin)
        if upstream is None:
            self._hand_over()
            return
        self._upstream = upstream
        upstream.deadline = time.monotonic() + desk.patiences.response_s
        upstream.taker, upstream.on_disconnect = self._when_answered, self._when_gone
        head, self._needles = plan.head(self._injects)
        upstream.write(head + self._come[-plan.length :] if plan.length else head)

    def _leave(self, plan: Plan) -> None:
        """Nothing of it goes on: it is decided anew by the coroutine, which says what is wrong."""
        client = self._client
        self._forget(plan)
        self.handed_over = self.ended = False
        self._turn.put_off()
        client.buffer[:0] = self._come
        client.deadline = time.monotonic() + self._desk.patiences.head_s
        client.wake()

    def _lease_ended(self) -> None:
        """Nothing goes on under its lease any more, in neither direction."""
        if self._plan is None:
            return
        self.ended = True
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.taker = upstream.on_disconnect = None
            upstream.abort()
        self._hand_over()

    # --- its answer ---------------------------------------------------------------------------------------------------

    def _answer(self, data: bytes) -> bool:
        """See `Stream.taker`: something came of the answer, or did not in time."""
        plan, upstream = self._plan, self._upstream
        if plan is None or upstream is None:
            return False
        end = data.find(END, 0, MAX_HEAD_BYTES)
        begins = beginning_of(data[: end + 2], plan.request.method) if end >= 0 else None
        if (
            begins is None
            or not begins.plain
            or len(data) != end + len(END) + begins.length
            or upstream.buffer
            or self._desk.gate.view_expired()
        ):
            self._hand_over()
            return not data
        client, desk = self._client, self._desk
        client.write_soon(redact(begins.head + data[end + len(END) :], self._needles))
        self._forget(plan)
        if begins.again and not plan.odd:
            desk.upstreams.give_back(plan.origin, upstream)
        else:
            upstream.taker = upstream.on_disconnect = None
            upstream.abort()
        self._turn.end()
        client.deadline = time.monotonic() + desk.patiences.idle_s
        if client.buffer:
            client.wake()
        return True

    def _hand_over(self) -> None:
        upstream = self._upstream
        if upstream is not None:
            upstream.taker, upstream.on_disconnect = None, None
        self.handed_over = True
        self._client.wake()

    def _fail(self, error: Exception) -> None:
        log.error("a connection failed: %s", type(error).__name__)
        self._client.abort()


def _is_plain(request: RequestHead) -> bool:
    """Whether it has nothing out of the ordinary."""
    return (
        request.minor == 1
        and not request.chunked
        and request.named <= _PLAIN
        and b"expect" not in request.known
        and request.method != "CONNECT"
    )
