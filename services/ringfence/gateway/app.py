"""Wiring of the gateway."""

from __future__ import annotations

from ringfence.gateway.agent_api.wiring import build_agent_api
from ringfence.gateway.dataplane.listeners import Listeners
from ringfence.gateway.http import GatewayApi
from ringfence.gateway.proxies import envoy, forward_auth
from ringfence.gateway.proxies.authz import ProxyAuth
from ringfence.gateway.settings import GatewaySettings, host_and_port
from ringfence.gateway.wiring import build_core
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.service.http import HttpServer
from ringfence.kernel.service.runtime import Runtime
from ringfence.model.records.api_access import Authenticator


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
