"""The gateway's HTTP API for people: the state of a lease here."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.gateway.state.view import View
from ringfence.kernel.base import metrics
from ringfence.kernel.base.api_errors import NotFoundError
from ringfence.messages.base import UUID
from ringfence.model.records.api_access import Authenticator

_LEASE_PATH = "/v1/leases/{lease_id}"


class GatewayApi:
    """The handlers of the gateway's HTTP API for people."""

    def __init__(self, authenticator: Authenticator, view: View) -> None:
        self._authenticator = authenticator
        self._view = view

    def routes(self) -> Sequence[BaseRoute]:
        return [Route(_LEASE_PATH, self.lease)]

    async def lease(self, request: Request) -> Response:
        """Report whether a lease can be used here now, and if not, why. For callers who may see its agent."""
        caller = self._authenticator.authenticate(request)
        lease_id = request.path_params["lease_id"]
        lease = self._view.table.get(lease_id) if UUID.fullmatch(lease_id) else None
        agent = self._view.directory.agent(lease.agent_id) if lease is not None else None
        if lease is None or agent is None or not caller.may_see_agent_of(agent.state.sponsor):
            raise NotFoundError(f"this gateway knows no lease {lease_id[:64]} that you may see")
        stale, problem = self._view.stale(), self._view.table.problem(lease)
        reason = stale or (problem.message if problem is not None else None)
        if reason is None and lease.delivery != "gateway":
            reason = "its credential was delivered to the agent itself"
        metrics.HTTP_REQUESTS.labels(_LEASE_PATH, "200").inc()
        return JSONResponse(
            {"lease_id": lease_id, "status": lease.status, "usable": reason is None, "reason": reason}
        )
