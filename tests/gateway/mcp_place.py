"""The real decision core and data plane before a server of MCP; who sends a request is what its socket says."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import httpx
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from ringfence.backends.http import StaticSecrets
from ringfence.gateway.contract import Attempt, DecisionCore, PresentedIdentity
from ringfence.gateway.dataplane.plane import DataPlane, DataPlaneSettings
from ringfence.gateway.dataplane.tls_listener import CertificateAuthority
from ringfence.gateway.decision.gate import DecisionGate, DecisionLog, DecisionSettings, DecisionSteps
from ringfence.gateway.decision.model_budget import Budgets, ModelMeters
from ringfence.gateway.decision.targets import Targets
from ringfence.gateway.domain import Sender
from ringfence.kernel.base.clock import SystemClock
from ringfence.messages.base import Permission
from ringfence.messages.operations import ActionAnswered, ActionDecided
from ringfence.messages.registry import BackendSettings, McpRule, ModelLimits, RequestRule, VerbFloor
from ringfence.model.verdict import ALLOWED, Allowed
from ringfence.testing.services import InMemoryBudgets
from tests.gateway.recorder import PlayedRecorder
from tests.support.in_memory_registry import permission
from tests.support.switches import build_options
from tests.unit.test_gateway_domain import GATEWAY_KEY, WIDE, Place

URL = "http://gateway/staging/mcp"
TOKEN = "Bearer t0ken-of-the-lease"
READS = permission("env/server", "env/a", verbs=("read",))
DEPLOYS = permission("env/server", "env/a", verbs=("read", "deploy"))


def rule(method: str, verb: str, resource: str, name: str | None = None) -> RequestRule:
    mcp = McpRule(method=method, name=name)
    return RequestRule(method="MCP", path="/mcp", mcp=mcp, verb=verb, resource=resource)


RULES = (
    RequestRule(method="GET", path="/mcp", verb="read", resource="env/server"),
    RequestRule(method="DELETE", path="/mcp", verb="read", resource="env/server"),
    *(
        rule(one, "read", "env/server")
        for one in ("initialize", "notifications/*", "tools/list", "prompts/list")
    ),
    rule("tools/call", "read", "env/{arguments.repo}", "get_{what}"),
    rule("tools/call", "deploy", "env/{arguments.repo}", "push"),
    rule("response", "deploy", "env/server"),
    rule("prompts/get", "read", "env/server", "review"),
    rule("prompts/get", "read", "env/server", "unknown"),
)


@dataclass
class McpPlace(PlayedRecorder):
    """Agent `bot` with the leases of `leases`; `socket` is its task's."""

    place: Place
    socket: Path = Path()
    events: list[ActionDecided] = field(default_factory=list)
    answers: list[ActionAnswered] = field(default_factory=list)
    agent: str = "bot"
    handle: str | None = None
    plane: DataPlane | None = None
    secrets: StaticSecrets | None = None
    """Where the target's secret is; if None, a token is injected."""
    budgets: Budgets = field(default_factory=InMemoryBudgets)

    # --- what of the core asks others ---

    @property
    def table(self) -> Any:
        return self.place.table

    @property
    def directory(self) -> Any:
        return self.place.ledger.directory

    def view_expired(self) -> bool:
        return False

    def stale(self) -> str | None:
        return None

    def check_freshness(self) -> Allowed:
        return ALLOWED

    check_view = check_freshness

    def nonce(self) -> str:
        return "fresh"

    async def authenticate(self, presented: PresentedIdentity, attempt: Attempt) -> Sender:
        return Sender(self.agent, self.place.task if self.agent == "bot" else None, self.handle)

    async def answer(self, *args: Any, **kwargs: Any) -> Allowed:
        return ALLOWED

    async def headers(self, lease: Any, target: Any) -> dict[str, str]:
        return {"Authorization": TOKEN} if self.secrets is None else await self.secrets.headers(target)

    def record(self, event: ActionDecided | ActionAnswered) -> None:
        if isinstance(event, ActionDecided):
            self.events.append(event)
        else:
            self.answers.append(event)

    # --- what an agent does ---

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(self.socket)), timeout=20)

    @contextlib.asynccontextmanager
    async def session(
        self, http: httpx.AsyncClient | None = None, url: str = URL, **how: Any
    ) -> AsyncIterator[ClientSession]:
        """A session of the official client, initialized; through the task's socket where no other way is given."""
        async with (
            http or self.http() as http,
            streamable_http_client(url, http_client=http) as (read, write, _),
            ClientSession(read, write, **how) as session,
        ):
            await session.initialize()
            yield session

    @property
    def open_streams(self) -> int:
        """How many requests have no end of their own: what the server says unasked."""
        return sum(event.method == "GET" for event in self.events)

    @property
    def codes(self) -> list[str]:
        """Why what was denied was denied."""
        return [event.reasons[0].code for event in self.events if not event.allowed]


@contextlib.asynccontextmanager
async def mcp_placed(
    port: int,
    folder: Path,
    *leases: Any,
    tls: ssl.SSLContext | None = None,
    observe: Collection[str] = (),
    rules: Sequence[RequestRule] = RULES,
    verbs: Sequence[VerbFloor] = (VerbFloor(verb="read"), VerbFloor(verb="deploy")),
    settings: Mapping[str, str] = MappingProxyType({"kind": "jwt"}),
    secrets: StaticSecrets | None = None,
    wide: Permission = WIDE,
    limits: ModelLimits | None = None,
    budgets: Budgets | None = None,
) -> AsyncIterator[McpPlace]:
    """The gateway before what listens at `port`, with a lease of each of these permissions and no other.

    `tls`: what the target is verified by, where it speaks TLS, as `localhost`; `observe`: targets only observed;
    `rules`, `verbs`, `settings`: of the target; `secrets`: where its secret is, for kind `http`;
    `wide`: what the task may do; `limits`: of what it uses of models;
    `budgets`: what that is counted by.
    """
    place = Place(wide, limits)
    place.table.revoke(place.lease.lease_id, 1)
    url = f"https://localhost:{port}" if tls is not None else f"http://127.0.0.1:{port}"
    backend = BackendSettings.model_validate({**settings, "url": url})
    ledger = place.ledger
    found = McpPlace(place, secrets=secrets, budgets=budgets or InMemoryBudgets())
    targets = Targets(ledger.directory)
    ledger.give(
        ledger.target_set("olga", "staging", backend=backend, requests=tuple(rules), verbs=tuple(verbs))
    )
    for one in leases:
        place.leased(one, backend=backend.kind)
    played = cast(Any, found)
    gate = DecisionGate(
        played,
        DecisionSteps(played, targets, played, played, played, ModelMeters(found.budgets)),
        DecisionLog("spiffe://acme.example/service/gateway", played, played),
        DecisionSettings(10**9, observe, **build_options("gateway")),
        clock=ledger.clock,
        key=lambda: GATEWAY_KEY,
    )
    found.plane = plane = DataPlane(
        DecisionCore(gate, targets.is_target_host),
        authority=CertificateAuthority("gateway", targets.hosts(), SystemClock()),
        tls=tls,
        settings=DataPlaneSettings(**build_options("gateway")),
    )
    await plane.start()
    found.socket = folder / "task.sock"
    await plane.listen_for_task(found.socket, place.task)
    try:
        yield found
    finally:
        await plane.close()
