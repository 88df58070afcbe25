"""The HTTP API of audit: answers queries and reports over events, serves approval history, and proofs for verifiers.

Operators and auditors see everything; a sponsor sees events of their agents; a user sees what was done on their
behalf. For events that a caller may not see, the API answers as if they did not exist. Approval history shows an
approver what is unusual about a request: it has the `approval.given`, `approval.denied` and `grant.given` events that
audit verified, with equal ones summed. Proofs are signed checkpoints, inclusion and consistency proofs (RFC 9162,
section 2.1).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ringfence.audit.events.break_glass import collect_uses
from ringfence.audit.index.coverage import (
    HELD_BEFORE_MS,
    access_report,
    count_actions,
    count_leases,
    issued_leases,
    load_basis,
    went_through,
)
from ringfence.audit.index.filters import (
    action_groups,
    blocked_over_time,
    filter_of,
    limit_of,
    number_of,
    unknown_destinations,
    usage_groups,
)
from ringfence.audit.index.store import TRACE_KINDS, ActionPage, SqliteIndex, Viewer
from ringfence.audit.index.trace import trace_tree
from ringfence.audit.trail.proofs import Inclusion, NoProofError, ProofStore
from ringfence.kernel.base import metrics
from ringfence.kernel.base.api_errors import NotFoundError, WrongQueryError
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.messages.base import Permission
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.leases.lifecycle import SHORT_LIVED_S
from ringfence.model.records.api_access import Authenticator, sponsored_agents
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.scope import validate_scope

_MAX_EVENTS = 1000
_MAX_REQUESTS = 500
_MAX_ACTIONS = 1000
"""Counting so many takes about 30 ms, in which the event loop serves nobody else."""
_MAX_COVERED = 500
"""Each lease is loaded with the events that it rests on."""
_MAX_MS = 2**53
_MOST_VIEWERS = 1000


@dataclass(slots=True, eq=False)
class AuditApi:
    """`GET /v1/trace/{id}`, `GET /v1/events`, `GET /v1/actions`, `GET /v1/model-usage`, `GET /v1/break-glass`,
    `GET /v1/coverage/{what}`.
    """

    index: SqliteIndex
    directory: Directory
    clock: Clock
    authenticator: Authenticator
    complete: Callable[[], bool]
    """Whether the index holds all events from before the start of this process."""
    _viewers: BoundedDict[str, tuple[tuple[int, int | None], Viewer]] = field(
        init=False, default_factory=lambda: BoundedDict(_MOST_VIEWERS)
    )
    """By user: of which version of the records, and their agents. To find these may mean to verify records."""

    def routes(self) -> list[Route]:
        return [
            Route("/v1/trace/{id}", self._trace, methods=["GET"]),
            Route("/v1/events", self._events, methods=["GET"]),
            Route("/v1/actions", self._actions, methods=["GET"]),
            Route("/v1/model-usage", self._model_usage, methods=["GET"]),
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
        trace = self.index.trace(id, kind, viewer, limit_of(request, 50, _MAX_REQUESTS))
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
            page = self.index.page(viewer, query.get("after"), limit, event_filter)
        elif "after" in query:
            raise WrongQueryError("after and before exclude each other: later events or older ones")
        else:
            page = self.index.older(viewer, before, limit, event_filter)
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
        page = self.index.actions(
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

    async def _model_usage(self, request: Request) -> Response:
        viewer, span_ms = await self._complete_span(request)
        query = request.query_params
        limit = limit_of(request, _MAX_ACTIONS, _MAX_ACTIONS)
        page = self.index.model_answers(
            viewer, span_ms, query.get("after"), limit, agent=query.get("agent"), task=query.get("task")
        )
        metrics.HTTP_REQUESTS.labels("/v1/model-usage", "200").inc()
        return JSONResponse({"groups": usage_groups(page.events), **_report_cursor(span_ms, page)})

    async def _lease_coverage(self, request: Request) -> Response:
        viewer, span_ms = await self._complete_span(request)
        after, limit = request.query_params.get("after"), limit_of(request, _MAX_COVERED, _MAX_COVERED)
        page = self.index.issued(viewer, span_ms, after, limit)
        basis = load_basis(self.index, {event["unmapped"].get("lease") or "" for event in page.events})
        counts = count_leases(
            page.events,
            basis,
            self._is_user,
            now_s=self.clock.now_ms() / 1000,
            short_s=number_of(request, "short_s", SHORT_LIVED_S, 86_400),
        )
        metrics.HTTP_REQUESTS.labels("/v1/coverage/leases", "200").inc()
        return JSONResponse({**counts, "agents": self._agents(page.events), **_report_cursor(span_ms, page)})

    async def _action_coverage(self, request: Request) -> Response:
        viewer, span_ms = await self._complete_span(request)
        after, limit = request.query_params.get("after"), limit_of(request, _MAX_COVERED, _MAX_COVERED)
        page = self.index.actions(viewer, span_ms, after, limit)
        actions = went_through(page.events)
        basis = load_basis(self.index, {event["unmapped"].get("lease") or "" for event in actions})
        counts = count_actions(actions, basis, self._is_user)
        metrics.HTTP_REQUESTS.labels("/v1/coverage/actions", "200").inc()
        return JSONResponse({**counts, "agents": self._agents(actions), **_report_cursor(span_ms, page)})

    async def _complete_span(self, request: Request) -> tuple[Viewer | None, tuple[int, int]]:
        """Viewer and time span of a report. Raises UnavailableError while the index is incomplete."""
        viewer = await self.viewer(request)
        if not self.complete():
            raise UnavailableError(
                "audit is reading what was audited; what it counted now would be too little"
            )
        since_ms = number_of(request, "since_ms", 0, _MAX_MS)
        return viewer, (since_ms, number_of(request, "until_ms", self.clock.now_ms(), _MAX_MS))

    def _agents(self, events: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
        """The agents in events, and whether a verified record of each exists; "" stands for no agent."""
        names = {str(event["unmapped"].get("agent") or "") for event in events}
        return {name: bool(name) and self._is_known("agent", name) for name in names}

    def _is_user(self, user_id: str) -> bool:
        return self._is_known("user", user_id)

    def _is_known(self, kind: SubjectKind, id: str) -> bool:
        try:
            return self.directory.entry(kind, id) is not None
        except ChainError:
            return False

    async def _break_glass(self, request: Request) -> Response:
        uses = collect_uses(self.index.findings(await self.viewer(request)))
        if request.query_params.get("unreviewed"):
            uses = [use for use in uses if use["review"] is None]
        metrics.HTTP_REQUESTS.labels("/v1/break-glass", "200").inc()
        return JSONResponse({"uses": uses})

    async def viewer(self, request: Request) -> Viewer | None:
        """Authenticate the caller; None for one who sees everything. Raises as `Authenticator.authenticate` does."""
        caller = self.authenticator.authenticate(request)
        if caller.sees_all:
            return None
        me, version = caller.user.user_id, self.directory.versions
        known = self._viewers.get(me)
        if known is None or known[0] != version:
            own = await sponsored_agents(self.directory, me)
            self._viewers[me] = known = (version, Viewer(me, own))
        return known[1]


def _report_cursor(span_ms: tuple[int, int], page: ActionPage) -> dict[str, Any]:
    """The part of a report that says how far it counted, and its next cursor."""
    return {"until_ms": span_ms[1], "looked_at_ms": page.looked_at_ms, "after": page.cursor}


MAX_AGENTS: Final = 100
MAX_EXCEPT: Final = 1000
_MAX_ANSWERS: Final = 500
"""Of an agent, the latest ones."""


@dataclass(slots=True, eq=False)
class ApprovalHistoryApi:
    """`GET /v1/approval-history?agent=ID&agent=ID…&since_ms=N&except=REQUEST…`.

    `viewer_of`: authenticates, as `AuditApi.viewer`. `complete`: whether the index holds all earlier events.
    """

    index: SqliteIndex
    viewer_of: Callable[[Request], Awaitable[Viewer | None]]
    complete: Callable[[], bool]

    def routes(self) -> list[Route]:
        return [Route("/v1/approval-history", self._history, methods=["GET"])]

    async def _history(self, request: Request) -> Response:
        """Serve the answers that the caller may see: `{agents: {ID: [{outcome, privileges, ttl_s, delivery, count}]}}`.

        Query: `agent`, at most 100 of them; `since_ms`; `except`, ids of requests whose answers are left out.
        """
        viewer, query = await self.viewer_of(request), request.query_params
        agents, left_out = dict.fromkeys(query.getlist("agent")), frozenset(query.getlist("except"))
        if not 0 < len(agents) <= MAX_AGENTS:
            raise WrongQueryError(
                f"agent is the id of an agent, at least once and at most {MAX_AGENTS} times"
            )
        if len(left_out) > MAX_EXCEPT:
            raise WrongQueryError(f"except is the id of a request, at most {MAX_EXCEPT} times")
        if not self.complete():
            raise UnavailableError("audit is reading what was audited; what it told now would be too little")
        since_ms = number_of(request, "since_ms", 0, _MAX_MS)
        found = {}
        for agent in agents:
            found[agent] = _counted(self.index.answers(agent, viewer, since_ms, _MAX_ANSWERS), left_out)
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


@dataclass(slots=True, eq=False)
class ProofApi:
    """`GET /v1/checkpoints`, `GET /v1/checkpoints/{tree}/consistency?from=N`, `GET /v1/events/{uid}/proof`."""

    index: SqliteIndex
    proofs: ProofStore
    viewer_of: Callable[[Request], Awaitable[Viewer | None]]
    """Authenticates the caller, as `AuditApi.viewer` does."""

    def routes(self) -> list[Route]:
        return [
            Route("/v1/checkpoints", self._checkpoints, methods=["GET"]),
            Route("/v1/checkpoints/{tree}/consistency", self._consistency, methods=["GET"]),
            Route("/v1/events/{uid}/proof", self._inclusion, methods=["GET"]),
        ]

    async def _inclusion(self, request: Request) -> Response:
        uid = request.path_params["uid"]
        events = self.index.events(uid, await self.viewer_of(request))
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
                return event, self.proofs.inclusion(event)
        return events[-1], self.proofs.inclusion(events[-1])

    async def _checkpoints(self, request: Request) -> Response:
        await self.viewer_of(request)
        metrics.HTTP_REQUESTS.labels("/v1/checkpoints", "200").inc()
        return JSONResponse({"checkpoints": [head.jws for head in self.proofs.heads()]})

    async def _consistency(self, request: Request) -> Response:
        await self.viewer_of(request)
        old = request.query_params.get("from", "")
        if not old.isdecimal():
            raise WrongQueryError("from is a number of events: the size of the tree that you know")
        proof, head = self.proofs.consistency(request.path_params["tree"], int(old[:17]))
        metrics.HTTP_REQUESTS.labels("/v1/checkpoints/consistency", "200").inc()
        return JSONResponse({"proof": [step.hex() for step in proof], "checkpoint": head.jws})


_MAX_SCANNED = 500
"""Each lease among them is looked up together with its end."""
_MAX_EXPORTED = 1000
_ANY_VERB = "any"


@dataclass(slots=True, eq=False)
class ReportApi:
    """`GET /v1/who` and `GET /v1/export`. Each answers with a page, after a bounded number of events was scanned.

    `viewer_of`: authenticates, as `AuditApi.viewer`. `complete`: whether the index holds all earlier events.
    """

    index: SqliteIndex
    clock: Clock
    viewer_of: Callable[[Request], Awaitable[Viewer | None]]
    complete: Callable[[], bool]

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
        page = self.index.at_target(permission.target, viewer, span_ms, query.get("after"), limit)
        lease_events = self.index.basis_events(issued_leases(page.events), (), ())
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
        page = self.index.export(
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
        viewer = await self.viewer_of(request)
        if not self.complete():
            raise UnavailableError(
                "audit is reading what was audited; what it told now would be too little. Ask again when it is ready"
            )
        since_ms = number_of(request, "since_ms", 0, _MAX_MS)
        return viewer, (since_ms, number_of(request, "until_ms", self.clock.now_ms(), _MAX_MS))


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
