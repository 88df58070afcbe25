"""HTTP API of audit for verifiers: signed checkpoints, inclusion and consistency proofs (RFC 9162, section 2.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ringfence.audit.index.store import EventIndex, Viewer
from ringfence.audit.trail.proofs import Inclusion, NoProofError, ProofStore
from ringfence.kernel.base import metrics
from ringfence.kernel.base.api_errors import NotFoundError, WrongQueryError


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
