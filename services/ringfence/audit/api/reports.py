"""HTTP API of audit for reports over many events: the access report of a target, and exports.

HTTP API of audit: how people answered requests of agents before, so that an approver sees what is unusual about one.

An answer is an `approval.given`, an `approval.denied` or a `grant.given` that audit verified. Equal ones are counted.

HTTP API of audit for verifiers: signed checkpoints, inclusion and consistency proofs (RFC 9162, section 2.1).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from ringfence.audit.index.filters import number_of
from ringfence.audit.index.store import EventIndex, Viewer
from ringfence.kernel.base import metrics
from ringfence.kernel.base.api_errors import WrongQueryError
from ringfence.kernel.base.errors import UnavailableError
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from ringfence.audit.trail.proofs import Inclusion, NoProofError, ProofStore
from ringfence.kernel.base.api_errors import NotFoundError, WrongQueryError
from collections.abc import Awaitable, Callable
from ringfence.audit.index.access_report import HELD_BEFORE_MS, access_report, issued_leases
from ringfence.audit.index.filters import filter_of, limit_of, number_of
from ringfence.kernel.base.clock import Clock
from ringfence.messages.permission import Permission
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.scope import validate_scope


MAX_AGENTS: Final = 100
MAX_EXCEPT: Final = 1000
_MAX_ANSWERS: Final = 500
"""Of an agent, the latest ones."""
_MAX_MS = 2**53


class ApprovalHistoryApi:
    """`GET /v1/approval-history?agent=ID&agent=ID…&since_ms=N&except=REQUEST…`."""

    def __init__(
        self,
        index: EventIndex,
        viewer_of: Callable[[Request], Awaitable[Viewer | None]],
        complete: Callable[[], bool],
    ) -> None:
        """`viewer_of`: authenticates, as `AuditApi.viewer`. `complete`: whether the index holds all earlier events."""
        self._index = index
        self._viewer_of = viewer_of
        self._complete = complete

    def routes(self) -> list[Route]:
        return [Route("/v1/approval-history", self._history, methods=["GET"])]

    async def _history(self, request: Request) -> Response:
        """Serve the answers that the caller may see: `{agents: {ID: [{outcome, privileges, ttl_s, delivery, count}]}}`.

        Query: `agent`, at most 100 of them; `since_ms`; `except`, ids of requests whose answers are left out.
        """
        viewer, query = await self._viewer_of(request), request.query_params
        agents, left_out = dict.fromkeys(query.getlist("agent")), frozenset(query.getlist("except"))
        if not 0 < len(agents) <= MAX_AGENTS:
            raise WrongQueryError(
                f"agent is the id of an agent, at least once and at most {MAX_AGENTS} times"
            )
        if len(left_out) > MAX_EXCEPT:
            raise WrongQueryError(f"except is the id of a request, at most {MAX_EXCEPT} times")
        if not self._complete():
            raise UnavailableError("audit is reading what was audited; what it told now would be too little")
        since_ms = number_of(request, "since_ms", 0, _MAX_MS)
        found = {}
        for agent in agents:
            found[agent] = _counted(self._index.answers(agent, viewer, since_ms, _MAX_ANSWERS), left_out)
            await asyncio.sleep(0)  # let other tasks run
        metrics.HTTP_REQUESTS.labels("/v1/approval-history", "200").inc()
        return JSONResponse({"agents": found})


def _counted(events: Iterable[Mapping[str, Any]], left_out: frozenset[str]) -> list[dict[str, Any]]:
    """Equal answers by their number, the latest first."""
    counts: Counter[tuple[str, tuple[str, ...], int, str]] = Counter()
    for event in events:
        fields = event["unmapped"]
        if fields.get("request") in left_out or not (fields.get("verified") or {}).get("by"):
            continue
        counts[
            "denied" if event["metadata"]["event_code"] == "approval.denied" else "approved",
            tuple(event.get("privileges", ())),
            int(fields.get("ttl_s") or 0),
            str(fields.get("delivery") or "agent"),
        ] += 1
    return [
        {"outcome": outcome, "privileges": privileges, "ttl_s": ttl_s, "delivery": delivery, "count": count}
        for (outcome, privileges, ttl_s, delivery), count in counts.items()
    ]


class ProofApi:
    """`GET /v1/checkpoints`, `GET /v1/checkpoints/{tree}/consistency?from=N`, `GET /v1/events/{uid}/proof`."""

    def __init__(
        self, index: EventIndex, proofs: ProofStore, viewer_of: Callable[[Request], Awaitable[Viewer | None]]
    ) -> None:
        """`viewer_of`: authenticates the caller, as `AuditApi.viewer` does."""
        self._index = index
        self._proofs = proofs
        self._viewer_of = viewer_of

    def routes(self) -> list[Route]:
        return [
            Route("/v1/checkpoints", self._checkpoints, methods=["GET"]),
            Route("/v1/checkpoints/{tree}/consistency", self._consistency, methods=["GET"]),
            Route("/v1/events/{uid}/proof", self._inclusion, methods=["GET"]),
        ]

    async def _inclusion(self, request: Request) -> Response:
        uid = request.path_params["uid"]
        events = self._index.events(uid, await self._viewer_of(request))
        if not events:
            raise NotFoundError(f"no event {uid[:80]} that you may see was audited")
        event, inclusion = self._proven(events)
        metrics.HTTP_REQUESTS.labels("/v1/events/proof", "200").inc()
        return JSONResponse({
            "event": event.decode(),
            "leaf_index": inclusion.index,
            "leaf_hash": inclusion.leaf.hex(),
            "proof": [step.hex() for step in inclusion.proof],
            "checkpoint": inclusion.head.jws,
        })  # fmt: skip

    def _proven(self, events: Sequence[bytes]) -> tuple[bytes, Inclusion]:
        """The event that is in the hash chain, of those with one uid; the others are forged. Raises NoProofError."""
        for event in events[:-1]:
            with contextlib.suppress(NoProofError):
                return event, self._proofs.inclusion(event)
        return events[-1], self._proofs.inclusion(events[-1])

    async def _checkpoints(self, request: Request) -> Response:
        await self._viewer_of(request)
        metrics.HTTP_REQUESTS.labels("/v1/checkpoints", "200").inc()
        return JSONResponse({"checkpoints": [head.jws for head in self._proofs.heads()]})

    async def _consistency(self, request: Request) -> Response:
        await self._viewer_of(request)
        old = request.query_params.get("from", "")
        if not old.isdecimal():
            raise WrongQueryError("from is a number of events: the size of the tree that you know")
        proof, head = self._proofs.consistency(request.path_params["tree"], int(old[:17]))
        metrics.HTTP_REQUESTS.labels("/v1/checkpoints/consistency", "200").inc()
        return JSONResponse({"proof": [step.hex() for step in proof], "checkpoint": head.jws})


_MAX_SCANNED = 500
"""Each lease among them is looked up together with its end."""
_MAX_EXPORTED = 1000
_ANY_VERB = "any"


class ReportApi:
    """`GET /v1/who` and `GET /v1/export`. Each answers with a page, after a bounded number of events was scanned."""

    def __init__(
        self,
        index: EventIndex,
        clock: Clock,
        viewer_of: Callable[[Request], Awaitable[Viewer | None]],
        complete: Callable[[], bool],
    ) -> None:
        """`viewer_of`: authenticates, as `AuditApi.viewer`. `complete`: whether the index holds all earlier events."""
        self._index = index
        self._clock = clock
        self._viewer_of = viewer_of
        self._complete = complete

    def routes(self) -> list[Route]:
        return [
            Route("/v1/who", self._who, methods=["GET"]),
            Route("/v1/export", self._export, methods=["GET"]),
        ]

    async def _who(self, request: Request) -> Response:
        viewer, (since_ms, until_ms) = await self._viewer_and_span(request)
        permission, query = _permission_of(request), request.query_params
        span_ms = (max(since_ms - HELD_BEFORE_MS, 0), until_ms)
        limit = limit_of(request, _MAX_SCANNED, _MAX_SCANNED)
        page = self._index.at_target(permission.target, viewer, span_ms, query.get("after"), limit)
        lease_events = self._index.basis_events(issued_leases(page.events), (), ())
        metrics.HTTP_REQUESTS.labels("/v1/who", "200").inc()
        return JSONResponse(
            {
                "lines": access_report(page.events, lease_events, permission, since_ms),
                "until_ms": until_ms,
                "looked_at_ms": page.looked_at_ms,
                "after": page.cursor,
            }
        )

    async def _export(self, request: Request) -> Response:
        viewer, span_ms = await self._viewer_and_span(request)
        page = self._index.export(
            viewer,
            span_ms,
            request.query_params.get("after"),
            limit_of(request, _MAX_EXPORTED, _MAX_EXPORTED),
            filter_of(request),
        )
        metrics.HTTP_REQUESTS.labels("/v1/export", "200").inc()
        return JSONResponse(
            {
                # As text: a reader would not give a JSON object back to the byte.
                "events": [event.decode() for event in page.events],
                "until_ms": span_ms[1],
                "looked_at_ms": page.looked_at_ms,
                "after": page.cursor,
            }
        )

    async def _viewer_and_span(self, request: Request) -> tuple[Viewer | None, tuple[int, int]]:
        """Viewer and time span of a report. Raises UnavailableError while the index is incomplete."""
        viewer = await self._viewer_of(request)
        if not self._complete():
            raise UnavailableError(
                "audit is reading what was audited; what it told now would be too little. Ask again when it is ready"
            )
        since_ms = number_of(request, "since_ms", 0, _MAX_MS)
        return viewer, (since_ms, number_of(request, "until_ms", self._clock.now_ms(), _MAX_MS))


def _permission_of(request: Request) -> Permission:
    """The permission that a query is about; no verbs stand for all. Raises WrongQueryError."""
    query = request.query_params
    target, verb = query.get("target"), query.get("verb")
    if not target:
        raise WrongQueryError("target is the id of the target that is asked about")
    resource = query.get("resource") or "**"
    permission = Permission.model_construct(target=target, verbs=(verb or _ANY_VERB,), resources=(resource,))
    try:
        validate_scope((permission,))
    except ScopeError as error:
        raise WrongQueryError(str(error)) from None
    return permission if verb else permission.model_copy(update={"verbs": ()})
