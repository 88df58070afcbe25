"""Caches of parsed heads: how a repeated request is forwarded, and how the head of a repeated response is.

A request plan is found by the route and by every byte of the head, so each head is parsed once. A plan allows nothing:
its `CachedAllowance` is asked for each request.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from ringfence.gateway.contract import Attempt, CachedAllowance
from ringfence.gateway.dataplane.exchange import is_compressed
from ringfence.gateway.dataplane.headers import request_head, response_head
from ringfence.gateway.dataplane.request_reader import ListenerContext
from ringfence.gateway.dataplane.secret_redaction import needles_of
from ringfence.gateway.errors import RequestRefusedError
from ringfence.gateway.hosts import Origin
from ringfence.kernel.http1.body import Body, SizedBody, response_body
from ringfence.kernel.http1.head import RequestHead, parse_response

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
        """The length of the body."""
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
        """Cache a plan. `key`: the route (`route_key`) and the head."""
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
        """The length of the body."""
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
