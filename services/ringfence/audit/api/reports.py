"""HTTP API of audit for reports over many events: the access report of a target, and exports."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ringfence.audit.index.access_report import HELD_BEFORE_MS, access_report, issued_leases
from ringfence.audit.index.filters import filter_of, limit_of, number_of
from ringfence.audit.index.store import EventIndex, Viewer
from ringfence.kernel.base import metrics
from ringfence.kernel.base.api_errors import WrongQueryError
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.permission import Permission
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.scope import validate_scope

_MAX_SCANNED = 500
"""Each lease among them is looked up together with its end."""
_MAX_EXPORTED = 1000
_MAX_MS = 2**53
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
