"""HTTP API of audit: traces, events, actions, break glass and coverage, filtered by caller.

Operators and auditors see everything; a sponsor sees events of their agents; a user sees what was done on their behalf.
For events that a caller may not see, the API answers as if they did not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ringfence.audit.events.break_glass import collect_uses
from ringfence.audit.index.action_counts import action_groups, blocked_over_time, unknown_destinations
from ringfence.audit.index.coverage import count_actions, count_leases, load_basis, went_through
from ringfence.audit.index.filters import filter_of, limit_of, number_of
from ringfence.audit.index.store import TRACE_KINDS, ActionPage, EventIndex, Viewer
from ringfence.audit.index.trace import trace_tree
from ringfence.kernel.base import metrics
from ringfence.kernel.base.api_errors import NotFoundError, WrongQueryError
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.leases.lifecycle import SHORT_LIVED_S
from ringfence.model.records.api_access import Authenticator, sponsored_agents
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory

_MAX_EVENTS = 1000
_MAX_REQUESTS = 500
_MAX_ACTIONS = 1000
"""Counting so many takes about 30 ms, in which the event loop serves nobody else."""
_MAX_COVERED = 500
"""Each lease is loaded with the events that it rests on."""
_MAX_MS = 2**53
_MOST_VIEWERS = 1000


class AuditApi:
    """`GET /v1/trace/{id}`, `GET /v1/events`, `GET /v1/actions`, `GET /v1/break-glass`, `GET /v1/coverage/{what}`."""

    def __init__(
        self,
        index: EventIndex,
        directory: Directory,
        clock: Clock,
        authenticator: Authenticator,
        complete: Callable[[], bool],
    ) -> None:
        """`complete`: whether the index holds all events from before the start of this process."""
        self._index = index
        self._viewers: BoundedDict[str, tuple[tuple[int, int | None], Viewer]] = BoundedDict(_MOST_VIEWERS)
        """By user: of which version of the records, and their agents. To find these may mean to verify records."""
        self._complete = complete
        self._directory = directory
        self._clock = clock
        self._authenticator = authenticator

    def routes(self) -> list[Route]:
        return [
            Route("/v1/trace/{id}", self._trace, methods=["GET"]),
            Route("/v1/events", self._events, methods=["GET"]),
            Route("/v1/actions", self._actions, methods=["GET"]),
            Route("/v1/break-glass", self._break_glass, methods=["GET"]),
            Route("/v1/coverage/leases", self._lease_coverage, methods=["GET"]),
            Route("/v1/coverage/actions", self._action_coverage, methods=["GET"]),
        ]

    async def _trace(self, request: Request) -> Response:
        viewer = await self.viewer(request)
        id = request.path_params["id"]
        kind = request.query_params.get("kind")
        if kind is not None and kind not in TRACE_KINDS:
            raise WrongQueryError(f"kind is one of {', '.join(TRACE_KINDS)}")
        trace = self._index.trace(id, kind, viewer, limit_of(request, 50, _MAX_REQUESTS))
        if trace is None:
            raise NotFoundError(
                f"no lease, request, task, agent, user or run {id[:80]} that you may see was audited"
            )
        metrics.HTTP_REQUESTS.labels("/v1/trace", "200").inc()
        return JSONResponse({
            "id": trace.id,
            "kind": trace.kind,
            "truncated": trace.truncated,
            "roots": trace_tree(trace.events),
        })  # fmt: skip

    async def _events(self, request: Request) -> Response:
        viewer, query = await self.viewer(request), request.query_params
        limit, event_filter = limit_of(request, 100, _MAX_EVENTS), filter_of(request)
        before = query.get("before")
        if before is None:
            page = self._index.page(viewer, query.get("after"), limit, event_filter)
        elif "after" in query:
            raise WrongQueryError("after and before exclude each other: later events or older ones")
        else:
            page = self._index.older(viewer, before, limit, event_filter)
        metrics.HTTP_REQUESTS.labels("/v1/events", "200").inc()
        return JSONResponse({
            "events": page.events,
            "after": page.after,
            "before": page.before,
            "looked_at_ms": page.looked_at_ms,
        })  # fmt: skip

    async def _actions(self, request: Request) -> Response:
        viewer, span_ms = await self._complete_span(request)
        query = request.query_params
        page = self._index.actions(
            viewer,
            span_ms,
            query.get("after"),
            limit_of(request, _MAX_ACTIONS, _MAX_ACTIONS),
            agent=query.get("agent"),
            target=query.get("target"),
        )
        over_time = {}
        if "step_ms" in query:
            step_ms = max(number_of(request, "step_ms", 1, _MAX_MS), 1)
            over_time = {"over_time": blocked_over_time(page.events, span_ms[0], step_ms)}
        metrics.HTTP_REQUESTS.labels("/v1/actions", "200").inc()
        return JSONResponse({
            "groups": action_groups(page.events),
            "unknown_destinations": unknown_destinations(page.events),
            **over_time,
            **_report_cursor(span_ms, page),
        })  # fmt: skip

    async def _lease_coverage(self, request: Request) -> Response:
        viewer, span_ms = await self._complete_span(request)
        after, limit = request.query_params.get("after"), limit_of(request, _MAX_COVERED, _MAX_COVERED)
        page = self._index.issued(viewer, span_ms, after, limit)
        basis = load_basis(self._index, {event["unmapped"].get("lease") or "" for event in page.events})
        counts = count_leases(
            page.events,
            basis,
            self._is_user,
            now_s=self._clock.now_ms() / 1000,
            short_s=number_of(request, "short_s", SHORT_LIVED_S, 86_400),
        )
        metrics.HTTP_REQUESTS.labels("/v1/coverage/leases", "200").inc()
        return JSONResponse({**counts, "agents": self._agents(page.events), **_report_cursor(span_ms, page)})

    async def _action_coverage(self, request: Request) -> Response:
        viewer, span_ms = await self._complete_span(request)
        after, limit = request.query_params.get("after"), limit_of(request, _MAX_COVERED, _MAX_COVERED)
        page = self._index.actions(viewer, span_ms, after, limit)
        actions = went_through(page.events)
        basis = load_basis(self._index, {event["unmapped"].get("lease") or "" for event in actions})
        counts = count_actions(actions, basis, self._is_user)
        metrics.HTTP_REQUESTS.labels("/v1/coverage/actions", "200").inc()
        return JSONResponse({**counts, "agents": self._agents(actions), **_report_cursor(span_ms, page)})

    async def _complete_span(self, request: Request) -> tuple[Viewer | None, tuple[int, int]]:
        """Viewer and time span of a report. Raises UnavailableError while the index is incomplete."""
        viewer = await self.viewer(request)
        if not self._complete():
            raise UnavailableError(
                "audit is reading what was audited; what it counted now would be too little"
            )
        since_ms = number_of(request, "since_ms", 0, _MAX_MS)
        return viewer, (since_ms, number_of(request, "until_ms", self._clock.now_ms(), _MAX_MS))

    def _agents(self, events: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
        """The agents in events, and whether a verified record of each exists; "" stands for no agent."""
        names = {str(event["unmapped"].get("agent") or "") for event in events}
        return {name: bool(name) and self._is_known("agent", name) for name in names}

    def _is_user(self, user_id: str) -> bool:
        return self._is_known("user", user_id)

    def _is_known(self, kind: SubjectKind, id: str) -> bool:
        try:
            return self._directory.entry(kind, id) is not None
        except ChainError:
            return False

    async def _break_glass(self, request: Request) -> Response:
        uses = collect_uses(self._index.findings(await self.viewer(request)))
        if request.query_params.get("unreviewed"):
            uses = [use for use in uses if use["review"] is None]
        metrics.HTTP_REQUESTS.labels("/v1/break-glass", "200").inc()
        return JSONResponse({"uses": uses})

    async def viewer(self, request: Request) -> Viewer | None:
        """Authenticate the caller; None for one who sees everything. Raises as `Authenticator.authenticate` does."""
        caller = self._authenticator.authenticate(request)
        if caller.sees_all:
            return None
        me, version = caller.user.user_id, self._directory.versions
        known = self._viewers.get(me)
        if known is None or known[0] != version:
            own = await sponsored_agents(self._directory, me)
            self._viewers[me] = known = (version, Viewer(me, own))
        return known[1]


def _report_cursor(span_ms: tuple[int, int], page: ActionPage) -> dict[str, Any]:
    """The part of a report that says how far it counted, and its next cursor."""
    return {"until_ms": span_ms[1], "looked_at_ms": page.looked_at_ms, "after": page.cursor}
