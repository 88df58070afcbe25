"""HTTP API of audit: how people answered requests of agents before, so that an approver sees what is unusual about one.

An answer is an `approval.given`, an `approval.denied` or a `grant.given` that audit verified. Equal ones are counted.
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

MAX_AGENTS: Final = 100
MAX_EXCEPT: Final = 1000
_MAX_ANSWERS: Final = 500
"""Of an agent, the latest ones."""
_MAX_MS: Final = 2**53


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
