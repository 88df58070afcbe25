"""Wiring of the gateway and its HTTP API for agents, and its HTTP API for people: reports the state of a lease."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.gateway.agent_api.api import AgentRequestsApi, AwaitedReplies, CallerProofs, PostedMessages
from ringfence.gateway.agent_api.publications import PostedMessageVerifier, PublicationJournal, Publications
from ringfence.gateway.agent_api.replies import SealedReplies, WaitingRequests
from ringfence.gateway.dataplane.limits import Allowance, SenderLimits
from ringfence.gateway.dataplane.listeners import Listeners
from ringfence.gateway.decision.sender import AgentKeys
from ringfence.gateway.proxies import READERS, ProxyAuth
from ringfence.gateway.settings import GatewaySettings, host_and_port
from ringfence.gateway.state.view import View
from ringfence.gateway.wiring import Core, build_core, spool_folder
from ringfence.kernel.base import metrics
from ringfence.kernel.base.api_errors import NotFoundError
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.service.http import HttpServer
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import UUID
from ringfence.messages.registry import TargetState
from ringfence.model.records.api_access import Authenticator
from ringfence.model.records.key_reuse import ReuseReporter
from ringfence.model.verdict import Refused

POSTS: Final = Allowance(per_second_each=20.0, burst_each=100)
"""Posts of one agent. Twice the rate that policy decides by default: policy refuses first, and says why."""
WAITING_PER_AGENT: Final = 32
_CONNECTIONS_SHARE: Final = 2
"""One of this many connections of an address or socket may wait for a reply, so that others behind it find one."""
_JOURNAL: Final = "publications.jsonl"
"""In the folder of the spool, which one process uses at a time."""
_WAITING_SHARE: Final = 4
"""One of this many connections may wait for a reply."""


def build_agent_api(runtime: Runtime, core: Core, own: GatewaySettings) -> AgentRequestsApi:
    """Build the API. The history of `credential.reply` feeds it."""
    clock, directory, settings = runtime.clock, core.view.directory, runtime.settings
    replies = SealedReplies()
    core.reply_readers.append(replies.on_records)
    verifier = PostedMessageVerifier(
        directory,
        audience=settings.trust_domain,
        now_ms=runtime.broker_now_ms,
        catch_up=lambda: runtime.tables_caught_up(settings.grace_s),
        report_reuse=ReuseReporter(runtime, directory),
    )
    journal = PublicationJournal(
        spool_folder(runtime, settings, own) / _JOURNAL, now_s=lambda: clock.now_ms() // 1000
    )
    publications = Publications(runtime.publisher, is_answered=replies.has, journal=journal)
    runtime.on_stop(publications.close)
    waiting = WaitingRequests(
        per_agent=WAITING_PER_AGENT,
        per_sender=Allowance().connections_each // _CONNECTIONS_SHARE,
        in_total=max(1, own.connections // _WAITING_SHARE),
    )
    return AgentRequestsApi(
        directory,
        core.view.table,
        runtime.trust,
        PostedMessages(verifier, SenderLimits(POSTS, time.monotonic), publications),
        AwaitedReplies(replies, waiting),
        CallerProofs(AgentKeys(directory), core.proofs),
        clock,
    )


_LEASE_PATH = "/v1/leases/{lease_id}"
_TARGET_PATH = "/v1/targets/{target_id}"
_LOOK_AGAIN_MS: Final = 1000
_MOST_NAMED: Final = 3

TargetProblem = Callable[[TargetState], str | None]


@dataclass(slots=True, eq=False)
class GatewayApi:
    """The handlers of the gateway's HTTP API for people."""

    authenticator: Authenticator
    view: View
    problem: TargetProblem
    """Returns why requests to a target cannot be sent from here; None if they can."""
    clock: Clock
    _warned: tuple[int, str | None] = field(init=False, default_factory=lambda: (0, None))

    def routes(self) -> Sequence[BaseRoute]:
        return [Route(_LEASE_PATH, self.lease), Route(_TARGET_PATH, self.target)]

    async def target(self, request: Request) -> Response:
        """Report whether requests to a target can be sent from here, and if not, why. For operators and auditors."""
        caller, target_id = self.authenticator.authenticate(request), request.path_params["target_id"]
        entry = self.view.directory.target(target_id) if caller.sees_all else None
        if entry is None:
            raise NotFoundError(f"this gateway knows no target {target_id[:64]} that you may see")
        metrics.HTTP_REQUESTS.labels(_TARGET_PATH, "200").inc()
        return JSONResponse(
            {"target_id": target_id, "revision": entry.revision, "problem": self.problem(entry.state)}
        )

    def unserved(self) -> str | None:
        """Return a warning that names targets with delivery to gateways that this gateway cannot serve. Looked up at
        most every `_LOOK_AGAIN_MS`.
        """
        now_ms = self.clock.now_ms()
        if now_ms - self._warned[0] >= _LOOK_AGAIN_MS:
            self._warned = now_ms, self._unserved()
        return self._warned[1]

    def _unserved(self) -> str | None:
        problems: list[str] = []
        for entry in self.view.directory.entries("target"):
            state = entry.state
            if isinstance(state, TargetState) and (state.status, state.delivery) == ("active", "gateway"):
                problems += [problem] if (problem := self.problem(state)) else []
        more = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        return "; ".join(problems[:_MOST_NAMED]) + more or None

    async def lease(self, request: Request) -> Response:
        """Report whether a lease can be used here now, and if not, why. For callers who may see its agent."""
        caller = self.authenticator.authenticate(request)
        lease_id = request.path_params["lease_id"]
        lease = self.view.table.get(lease_id) if UUID.fullmatch(lease_id) else None
        agent = self.view.directory.agent(lease.agent_id) if lease is not None else None
        if lease is None or agent is None or not caller.may_see_agent_of(agent.state.sponsor):
            raise NotFoundError(f"this gateway knows no lease {lease_id[:64]} that you may see")
        stale, live = self.view.stale(), self.view.table.check_live(lease)
        reason = stale or (live.reason.message if isinstance(live, Refused) else None)
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
    authenticator = Authenticator(core.view.directory, runtime.role, runtime.clock)
    api = GatewayApi(authenticator, core.view, core.gate.problem, runtime.clock)
    runtime.routes += api.routes()
    if own.listen is not None or own.sockets is not None:
        runtime.warns_when(api.unserved)
        agent_api = build_agent_api(runtime, core, own) if own.agent_api else None
        listening = Listeners(runtime, core, own, fast_path=fast_path, agent_api=agent_api)
        runtime.background("data plane", listening.run)
        runtime.ready_when(listening.unready)
        runtime.on_stop(listening.close)
    if own.authz is not None:
        host, port = host_and_port(own.authz)
        server = HttpServer(
            ProxyAuth(core.gate, READERS, core.blocked.add),
            host,
            port,
            setting="RINGFENCE_GATEWAY_AUTHZ",
        )
        runtime.background("authz", server.run_until_stopped)
        runtime.ready_when(lambda: None if server.started else "the gateway does not listen for proxies yet")
    return runtime
