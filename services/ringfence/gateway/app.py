"""Wiring of the gateway.

The gateway's HTTP API for people: the state of a lease here.
"""

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
from ringfence.gateway.agent_api.wiring import build_agent_api
from ringfence.gateway.dataplane.listeners import Listeners
from ringfence.gateway.proxies import envoy, forward_auth
from ringfence.gateway.proxies.authz import ProxyAuth
from ringfence.gateway.settings import GatewaySettings, host_and_port
from ringfence.gateway.wiring import build_core
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.service.http import HttpServer
from ringfence.kernel.service.runtime import Runtime


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


def build(
    settings: ServiceSettings,
    own: GatewaySettings | None = None,
    clock: Clock | None = None,
    *,
    fast_path: bool = True,
) -> Runtime:
    """Build the gateway; `Runtime.run` starts it.

    `fast_path`: whether repeated requests take the fast paths of decision and data plane. Both only save time: without
    them the gateway decides, forwards and records the same.
    """
    own = own or load(GatewaySettings)
    runtime = Runtime("gateway", settings, clock)
    core = build_core(runtime, settings, own, fast_path=fast_path)
    runtime.routes += GatewayApi(
        Authenticator(core.view.directory, runtime.role, runtime.clock), core.view
    ).routes()
    if own.listen is not None or own.sockets is not None:
        agent_api = build_agent_api(runtime, core, own) if own.agent_api else None
        listening = Listeners(runtime, core, own, fast_path=fast_path, agent_api=agent_api)
        runtime.background("data plane", listening.run)
        runtime.ready_when(listening.unready)
        runtime.on_stop(listening.close)
    if own.authz is not None:
        host, port = host_and_port(own.authz)
        readers = {forward_auth.PREFIX: forward_auth.read, envoy.PREFIX: envoy.read}
        server = HttpServer(
            ProxyAuth(core.gate, readers, core.blocked.add),
            host,
            port,
            setting="RINGFENCE_GATEWAY_AUTHZ",
        )
        runtime.background("authz", server.run_until_stopped)
        runtime.ready_when(lambda: None if server.started else "the gateway does not listen for proxies yet")
    return runtime
