"""What a data plane knows of a request that came before: how it is sent on, and the answers that targets begin with.

A plan is found by the way and by every byte of the head, so whatever is read from a head is read once. Nothing is
allowed by having one: its `CachedAllowance` is asked each time.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from ringfence.gateway.contract import Attempt, CachedAllowance
from ringfence.gateway.dataplane.exchange import BODYLESS_METHODS, is_compressed
from ringfence.gateway.dataplane.headers import request_head, response_head
from ringfence.gateway.dataplane.http1_body import Body, SizedBody, response_body
from ringfence.gateway.dataplane.http1_head import RequestHead, parse_response
from ringfence.gateway.dataplane.request_reader import ListenerContext
from ringfence.gateway.dataplane.secret_redaction import needles_of
from ringfence.gateway.errors import RefusedError
from ringfence.gateway.hosts import Origin

MAX_PLANS: Final = 4096
MAX_CACHED_BYTES: Final = 2048
"""Longer heads are seldom the same again, and would fill the memory."""


class RequestPlan:
    """How one request is sent on."""

    __slots__ = (
        "_head",
        "_injects",
        "_needles",
        "attempt",
        "cached_allowance",
        "length",
        "no_reuse",
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
        """Of its body."""
        self.no_reuse = request.method in BODYLESS_METHODS and self.length > 0
        """Whether its connection to the target is not used again."""
        self._needles: tuple[bytes, ...] = ()
        self._injects: Mapping[str, str] | None = None
        self._head = b""

    def head(self, injected: Mapping[str, str]) -> tuple[bytes, tuple[bytes, ...]]:
        """The head that goes to the target, with what is injected now, and what is searched for in its answer."""
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
    """The latest ones of a data plane."""

    __slots__ = ("_limit", "_plans")

    def __init__(self, *, limit: int = MAX_PLANS) -> None:
        self._plans: OrderedDict[bytes, RequestPlan] = OrderedDict()
        self._limit = limit

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, key: bytes) -> RequestPlan | None:
        """What was kept under this key."""
        return self._plans.get(key)

    def put(self, key: bytes, plan: RequestPlan) -> None:
        """Keep it, in place of what was there. `key`: the way (`route_key`) and the head."""
        self._plans[key] = plan
        if len(self._plans) > self._limit:
            self._plans.popitem(last=False)


def route_key(listener: ListenerContext) -> bytes:
    """Everything about how a request came that what is read from it depends on: no other way has the same."""
    names = sorted(listener.own_authorities) if listener.own_authorities is not None else None
    shown = (
        listener.scheme,
        names,
        listener.task_id,
        listener.certificate,
        listener.address,
        listener.connect_authority,
        listener.handle,
    )
    return repr(shown).encode() + b"\n"


class ResponsePlan:
    """The head of an answer that can be sent on as soon as all of it is there."""

    __slots__ = ("head", "length", "plain", "reusable")

    def __init__(self, head: bytes, length: int, *, plain: bool, reusable: bool) -> None:
        self.head = head
        """As it goes to the agent."""
        self.length = length
        """Of the body."""
        self.plain = plain
        """Whether there is nothing in it, or it is not compressed."""
        self.reusable = reusable
        """Whether the target's connection can be used again."""


def response_plan(head: bytes, method: str) -> ResponsePlan | None:
    """That of the answer to a request of this method; None where somebody has to look at it."""
    return (
        _cached_response_plan(head, method)
        if len(head) <= MAX_CACHED_BYTES
        else _make_response_plan(head, method)
    )


def _make_response_plan(head: bytes, method: str) -> ResponsePlan | None:
    try:
        response = parse_response(head)
    except RefusedError:
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
"""A target begins with the same within a second, where what it answers is as long."""
