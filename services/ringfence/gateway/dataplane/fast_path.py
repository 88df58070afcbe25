"""The data plane's fast path: repeated requests are served in callbacks of the event loop, without a coroutine.

It is the entry point of this folder, and its only module that others import. It serves a request that arrives whole, is
allowed by a cached decision, goes to a target with an idle connection, and gets its response whole. Everything else is
left to the coroutine of the connection (the slow path) from its first byte, or handed over to it in progress. Refusals,
waits, streams and errors exist only there. `FastPaths(enabled=False)` leaves everything to the slow path.

Caches of parsed heads: how a repeated request is forwarded, and how the head of a repeated response is.

A request plan is found by the route and by every byte of the head, so each head is parsed once. A plan allows nothing:
its `CachedAllowance` is asked for each request.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from ringfence.gateway.contract import Attempt, CachedAllowance
from ringfence.gateway.dataplane.exchange import Exchange, ForwardedRequest, is_compressed
from ringfence.gateway.dataplane.headers import request_head, response_head
from ringfence.gateway.dataplane.limits import RequestSlot
from ringfence.gateway.dataplane.request_reader import ListenerContext, read_api_target, read_request
from ringfence.gateway.dataplane.secret_redaction import needles_of, redact
from ringfence.gateway.dataplane.shared import DataPlaneContext
from ringfence.gateway.dataplane.stream import Stream
from ringfence.gateway.hosts import Origin, origin_of
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.http1.body import Body, SizedBody, has_risky_body, response_body
from ringfence.kernel.http1.head import (
    END_OF_HEAD,
    MAX_HEAD_BYTES,
    RequestHead,
    RequestRefusedError,
    parse_request,
    parse_response,
)

MAX_PLANS: Final = 4096
MAX_CACHED_BYTES: Final = 2048
"""Longer heads are not cached: they are seldom repeated, and would fill the memory."""


class RequestPlan:
    """The plan by which one request is forwarded."""

    __slots__ = (
        "_head",
        "_injects",
        "_needles",
        "attempt",
        "cached_allowance",
        "length",
        "origin",
        "request",
    )

    def __init__(
        self, request: RequestHead, attempt: Attempt, cached: CachedAllowance, origin: Origin
    ) -> None:
        self.request = request
        self.attempt = attempt
        self.cached_allowance = cached
        self.origin = origin
        self.length = request.length or 0
        self._needles: tuple[bytes, ...] = ()
        self._injects: Mapping[str, str] | None = None
        self._head = b""

    def head(self, injected: Mapping[str, str]) -> tuple[bytes, tuple[bytes, ...]]:
        """The head for the target with the injected headers, and what to redact in the response."""
        if injected is not self._injects:
            if self._injects is None or injected != self._injects:
                self._needles = needles_of(tuple(injected.values()))
                self._head = request_head(
                    self.request,
                    self.attempt.target,
                    self.origin.authority,
                    injected,
                    length=self.request.length,
                    upgrade=False,
                )
            self._injects = injected
        return self._head, self._needles


class PlanCache:
    """The latest plans of a data plane."""

    __slots__ = ("_limit", "_plans")

    def __init__(self, *, limit: int = MAX_PLANS) -> None:
        self._plans: OrderedDict[bytes, RequestPlan] = OrderedDict()
        self._limit = limit

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, key: bytes) -> RequestPlan | None:
        return self._plans.get(key)

    def put(self, key: bytes, plan: RequestPlan) -> None:
        self._plans[key] = plan
        if len(self._plans) > self._limit:
            self._plans.popitem(last=False)


def route_key(listener: ListenerContext) -> bytes:
    """Everything about a connection that the parsing of its requests depends on, as an unambiguous key."""
    names = sorted(listener.own_authorities) if listener.own_authorities is not None else None
    shown = (
        listener.scheme,
        names,
        listener.task_id,
        listener.run_id,
        listener.certificate,
        listener.address,
        listener.connect_authority,
        listener.handle,
    )
    return repr(shown).encode() + b"\n"


class ResponsePlan:
    """The plan by which a response head is forwarded, if the whole response has arrived."""

    __slots__ = ("head", "length", "plain", "reusable")

    def __init__(self, head: bytes, length: int, *, plain: bool, reusable: bool) -> None:
        self.head = head
        """The head for the agent."""
        self.length = length
        self.plain = plain
        """Whether the body is empty or uncompressed."""
        self.reusable = reusable
        """Whether the upstream connection can be reused."""


def response_plan(head: bytes, method: str) -> ResponsePlan | None:
    """The plan for a response to a request of this method; None if it needs the slow path."""
    return (
        _cached_response_plan(head, method)
        if len(head) <= MAX_CACHED_BYTES
        else _make_response_plan(head, method)
    )


def _make_response_plan(head: bytes, method: str) -> ResponsePlan | None:
    try:
        response = parse_response(head)
    except RequestRefusedError:
        return None
    body = response_body(response, method)
    sized = isinstance(body, SizedBody)
    if response.status < 200 or not (sized or type(body) is Body):
        return None
    length = (response.length or 0) if sized else 0
    return ResponsePlan(
        response_head(response, chunked=False, close=False),
        length,
        plain=length == 0 or not is_compressed(response),
        reusable=response.minor == 1 and b"close" not in response.connection_options,
    )


_cached_response_plan = functools.lru_cache(maxsize=512)(_make_response_plan)
"""Cached, since a target sends the same head within a second if the length is the same."""


log = logging.getLogger(__name__)

_PLAIN_OPTIONS: Final = frozenset({b"keep-alive"})
"""Options of `Connection` that are served here."""
_NO_HEADERS: Final[Mapping[str, str]] = {}


class FastPaths:
    """The fast paths of one data plane. Its connections share the cache of request plans."""

    def __init__(self, context: DataPlaneContext, *, enabled: bool) -> None:
        """`enabled`: whether there is a fast path; otherwise every request takes the slow path."""
        self._context = context
        self._plans = PlanCache() if enabled else None

    def of_connection(self, client: Stream, listener: ListenerContext, slot: RequestSlot) -> FastPath:
        """The fast path of a new connection. `slot`: the connection's own, which counts its requests on both paths."""
        return FastPath(client, listener, self._context, slot, self._plans)


class FastPath:
    """The fast path of one connection."""

    __slots__ = (
        "_action_id",
        "_client",
        "_disconnect_callback",
        "_injects",
        "_key",
        "_lease_end_callback",
        "_listener",
        "_needles",
        "_plan",
        "_plans",
        "_received",
        "_recorded_callback",
        "_response_callback",
        "_shared",
        "_slot",
        "_upstream",
        "count",
        "lease_ended",
        "needs_slow_path",
    )  # fmt: skip

    def __init__(
        self,
        client: Stream,
        listener: ListenerContext,
        shared: DataPlaneContext,
        slot: RequestSlot,
        plans: PlanCache | None,
    ) -> None:
        """Without `plans` the fast path takes no request."""
        self.count = 0
        """The number of requests that it took."""
        self.needs_slow_path = False
        """Whether the coroutine must continue with the request in progress."""
        self.lease_ended = False
        """Whether the lease of the request in progress has ended."""
        self._client = client
        self._shared = shared
        self._slot = slot
        self._plans = plans
        self._plan: RequestPlan | None = None
        """The plan of the request in progress."""
        self._received = b""
        """The request in progress, as it was received."""
        self._action_id = ""
        self._injects: Mapping[str, str] = _NO_HEADERS
        self._needles: tuple[bytes, ...] = ()
        """The byte strings that are redacted in the response."""
        self._upstream: Stream | None = None
        """The connection that it was sent on."""
        # Bound methods are created once, as each request uses them.
        self._recorded_callback, self._lease_end_callback = self._on_recorded, self._on_lease_end
        self._response_callback, self._disconnect_callback = self._on_response, self._hand_over
        self.set_route(listener)

    def set_route(self, listener: ListenerContext) -> None:
        """Note how requests arrive from now on: CONNECT changes that."""
        self._listener = listener
        self._key = route_key(listener)

    def open(self) -> None:
        """Take the next request of the connection, if it can be served here."""
        if self._plans is not None:
            self._client.data_handler = self._on_data

    def close(self) -> None:
        """Leave received data to the coroutine."""
        self._client.data_handler = None

    def handed_over(self) -> tuple[ForwardedRequest, Exchange | None]:
        """The decided request that is handed over, and its exchange if it was sent. Its slot is still in use."""
        plan, upstream, injects = self._plan, self._upstream, self._injects
        assert plan is not None, "something was handed over"
        body = self._received[-plan.length :] if plan.length else None
        verdict = plan.cached_allowance.verdict(self._action_id, injects)
        request, exchange = ForwardedRequest(plan.request, plan.attempt, verdict, Body(), body), None
        if upstream is not None:
            exchange = self._shared.forwarder.take_over(self._client, request, injects, plan.origin, upstream)
        self._forget(plan)
        self.needs_slow_path = False
        return request, exchange

    def abandon(self) -> None:
        """Drop the request in progress: the connection is over."""
        self.close()
        if self._plan is not None:
            upstream = self._upstream
            if upstream is not None:
                upstream.data_handler = upstream.on_disconnect = None
                upstream.abort()
            self._forget(self._plan)
        self._slot.end()

    def _forget(self, plan: RequestPlan) -> None:
        """No request is in progress any more."""
        self._shared.gate.unwatch(plan.cached_allowance.lease.lease_id, self._lease_end_callback)
        self._plan = self._upstream = None

    # --- a request ----------------------------------------------------------------------------------------------------

    def _on_data(self, data: bytes) -> bool:
        """The `Stream.data_handler` of the client."""
        client = self._client
        if self._plan is not None:  # one request at a time: the next one waits in the buffer
            client.buffer_data(data)
            return True
        if client.buffer or client.blocked or not client.alive:
            return False
        try:
            return self._try(data)
        except Exception as error:  # noqa: BLE001 - its text is not logged: it may contain data of an agent
            self._fail(error)
            return True

    def _try(self, data: bytes) -> bool:
        shared, slot, plans = self._shared, self._slot, self._plans
        assert plans is not None, "the fast path is enabled"
        end = data.find(END_OF_HEAD, 0, MAX_HEAD_BYTES)
        if end < 0:
            return False
        key = self._key + data[: end + len(END_OF_HEAD)]
        cached_plan = plans.get(key)
        plan = cached_plan if cached_plan is not None else self._make_plan(data, end, key, plans)
        if plan is None or len(data) != end + len(END_OF_HEAD) + plan.length:
            return False
        try:
            slot.begin()
        except RequestRefusedError:
            return False
        allowed = plan.cached_allowance.allow(slot.check_agent, self._recorded_callback)
        if allowed is None and cached_plan is not None and not cached_plan.cached_allowance.is_valid():
            plan = self._make_plan(data, end, key, plans)
            allowed = (
                plan.cached_allowance.allow(slot.check_agent, self._recorded_callback)
                if plan is not None
                else None
            )
        if allowed is None or plan is None:
            slot.defer()
            return False
        self._plan, self._received, self.lease_ended = plan, data, False
        self._action_id, self._injects = allowed
        shared.gate.watch(plan.cached_allowance.lease.lease_id, self._lease_end_callback)
        self._client.deadline = None
        self.count += 1
        return True

    def _make_plan(self, data: bytes, end: int, key: bytes, plans: PlanCache) -> RequestPlan | None:
        """The plan for a new or changed request; None if it needs the slow path."""
        shared = self._shared
        shows_proof = b"DPoP:" in data
        if self._listener.is_unauthenticated and shows_proof:
            return None  # verifying a proof needs an await
        try:
            request = parse_request(data[: end + 2])
            if not _is_plain(request) or len(data) != end + len(END_OF_HEAD) + (request.length or 0):
                return None
            if shared.agent_api is not None and read_api_target(
                request, self._listener, shared.is_target_host
            ):
                return None
            presented, attempt = read_request(request, self._listener, shared.is_target_host)
            reads_body = request.length is not None and request.length > 0 and shared.gate.reads_body(attempt)
            if reads_body:
                attempt = dataclasses.replace(attempt, body=data[end + len(END_OF_HEAD) :])
            cached = shared.gate.cached_allowance(presented, attempt)
            if cached is None:
                return None
            plan = RequestPlan(request, attempt, cached, origin_of(shared.gate.upstream(cached.target)))
        except (RequestRefusedError, UnavailableError):
            return None
        if not reads_body and not shows_proof and end <= MAX_CACHED_BYTES:
            plans.put(key, plan)
        return plan

    def _on_recorded(self, written: bool) -> None:
        """Send the request if its event was written, otherwise decide it anew on the slow path."""
        plan = self._plan
        if plan is None:
            return  # the connection is over
        try:
            if written:
                self._send(plan)
            else:
                self._retry_on_slow_path(plan)
        except Exception as error:  # noqa: BLE001 - as in `_on_data`
            self._fail(error)

    def _send(self, plan: RequestPlan) -> None:
        shared = self._shared
        # This process may have been suspended since the decision.
        if self.lease_ended or shared.gate.view_expired():
            self._on_lease_end()
            return
        upstream = shared.upstreams.acquire_idle(plan.origin)
        if upstream is None:
            self._hand_over()
            return
        self._upstream = upstream
        upstream.deadline = time.monotonic() + shared.timeouts.response_s
        upstream.data_handler, upstream.on_disconnect = self._response_callback, self._disconnect_callback
        head, self._needles = plan.head(self._injects)
        upstream.write(head + self._received[-plan.length :] if plan.length else head)

    def _retry_on_slow_path(self, plan: RequestPlan) -> None:
        """Let the coroutine decide the request anew, and report the error. Nothing of it was sent."""
        client = self._client
        self._forget(plan)
        self.needs_slow_path = self.lease_ended = False
        self._slot.defer()
        client.buffer[:0] = self._received
        client.deadline = time.monotonic() + self._shared.timeouts.head_s
        client.wake()

    def _on_lease_end(self) -> None:
        """Stop the request in both directions."""
        if self._plan is None:
            return
        self.lease_ended = True
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.data_handler = upstream.on_disconnect = None
            upstream.abort()
        self._hand_over()

    # --- its answer ---------------------------------------------------------------------------------------------------

    def _on_response(self, data: bytes) -> bool:
        """The `Stream.data_handler` of the upstream: data of the response arrived, or its deadline has passed."""
        plan, upstream = self._plan, self._upstream
        if plan is None or upstream is None:
            return False
        end = data.find(END_OF_HEAD, 0, MAX_HEAD_BYTES)
        response = response_plan(data[: end + 2], plan.request.method) if end >= 0 else None
        if (
            response is None
            or not response.plain
            or len(data) != end + len(END_OF_HEAD) + response.length
            or upstream.buffer
            or self._shared.gate.view_expired()
        ):
            self._hand_over()
            return not data
        client, shared = self._client, self._shared
        client.write_at_end_of_turn(redact(response.head + data[end + len(END_OF_HEAD) :], self._needles))
        self._forget(plan)
        if response.reusable:
            shared.upstreams.release(plan.origin, upstream)
        else:
            upstream.data_handler = upstream.on_disconnect = None
            upstream.abort()
        self._slot.end()
        client.deadline = time.monotonic() + shared.timeouts.idle_s
        if client.buffer:
            client.wake()
        return True

    def _hand_over(self) -> None:
        upstream = self._upstream
        if upstream is not None:
            upstream.data_handler, upstream.on_disconnect = None, None
        self.needs_slow_path = True
        self._client.wake()

    def _fail(self, error: Exception) -> None:
        log.error("a connection failed: %s", type(error).__name__)
        self._client.abort()


def _is_plain(request: RequestHead) -> bool:
    """Whether the request needs nothing that only the slow path does."""
    return (
        request.minor == 1
        and not request.chunked
        and request.connection_options <= _PLAIN_OPTIONS
        and b"expect" not in request.values
        and not has_risky_body(request)
        and request.method != "CONNECT"
    )
