"""A small decision core for data planes: a table of targets, with their real maps, and what is allowed."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ringfence.gateway.contract import (
    AgentApi,
    Attempt,
    DecisionCore,
    HoldableRequest,
    PresentedIdentity,
    RateCheck,
    ReportBlocked,
    Verdict,
)
from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.limits import Allowance
from ringfence.gateway.dataplane.plane import DataPlane, DataPlaneSettings
from ringfence.gateway.dataplane.tls_listener import CertificateAuthority
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.base import Permission
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease
from ringfence.messages.registry import BackendSettings, RequestRule, TargetState, VerbFloor
from ringfence.model.git.endpoints import GitEndpoint
from ringfence.model.http_targets import RequestMap
from ringfence.model.verdict import ALLOWED, Allowed, Refused, refused
from tests.support.switches import build_options

SECRET = "s3cret-of-the-target-0123456789"
TASK = str(uuid.UUID(int=7))


def rule(method: str, path: str, verb: str, resource: str, **more: Any) -> RequestRule:
    return RequestRule(method=method, path=path, verb=verb, resource=resource, **more)


RULES = (
    rule("GET", "/", "read", "root"),
    rule("GET", "/files/{path*}", "read", "files/{path*}"),
    rule("HEAD", "/files/{path*}", "read", "files/{path*}"),
    rule("PUT", "/files/{path*}", "write", "files/{path*}"),
    rule("POST", "/files/{path*}", "write", "files/{path*}"),
    rule("DELETE", "/files/{path*}", "delete", "files/{path*}"),
    rule("POST", "/runs/{env}", "dry-run", "env/{env}", body={"mode": ("dry",)}),
    rule("POST", "/runs/{env}", "run", "env/{env}"),
)


@dataclass
class Entry:
    """One target of the table."""

    url: str
    authorities: frozenset[str]
    rules: tuple[RequestRule, ...] = RULES
    verbs: frozenset[str] = frozenset({"read", "write", "dry-run"})
    injected: Mapping[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {SECRET}"})


def lease_of(target_id: str, agent_id: str = "helper", number: int = 1) -> Lease:
    id = str(uuid.UUID(int=number))
    return Lease(
        iss="spiffe://test.example/service/issuer", aud="test.example", iat=1, jti=id, lease_id=id, seq=1,
        status="active", request_id=id, decision_id=id, decision_digest="0" * 64, agent_id=agent_id, act=(agent_id,),
        sponsor="sam", on_behalf_of="sam", task_id=TASK, target_id=target_id, backend="http", delivery="gateway",
        scope=(Permission(target=target_id, verbs=("read",), resources=("files/**",)),), requested_at_ms=1,
        deadline=2**40,
    )  # fmt: skip


@dataclass
class TableAllowance:
    """What the table said of one request."""

    gate: TableGate
    presented: PresentedIdentity
    attempt: Attempt
    lease: Lease
    target: TargetState
    entry: Entry

    def is_valid(self) -> bool:
        """The secret is asked for each time."""
        entry = self.gate.targets.get(self.target.target_id)
        same = entry is not None and dataclasses.replace(entry, injected=self.entry.injected) == self.entry
        return same and self._verdict().allowed

    def allow(
        self, rate_check: RateCheck, on_recorded: Callable[[bool], None]
    ) -> tuple[str, Mapping[str, str]] | None:
        return (
            self.gate.at_hand(self.presented, self.attempt, rate_check, on_recorded)
            if self.is_valid()
            else None
        )

    def verdict(self, action_id: str, injected: Mapping[str, str]) -> Verdict:
        return dataclasses.replace(self._verdict(), action_id=action_id)

    def _verdict(self) -> Verdict:
        return self.gate._decided(self.presented, self.attempt, lambda agent_id: ALLOWED)


class TableGate:
    """Decides by the table. `records` has all of it."""

    def __init__(self, targets: Mapping[str, Entry]) -> None:
        self.targets = dict(targets)
        self.records: list[tuple[PresentedIdentity, Attempt, Verdict]] = []
        self.available = True
        self.credentials = True
        self.handles: frozenset[str] | None = None
        """Those that count, where not every sender does."""
        self.observed = frozenset[str]()
        """The targets that are only observed."""
        self.leases = {id: lease_of(id, number=at) for at, id in enumerate(self.targets, 1)}
        self.watching: dict[str, list[Callable[[], None]]] = {}
        self.keeps_records = True
        self.full = False
        """Whether what is allowed at once cannot be recorded."""
        self.stood_still = False
        """Whether its view got too old, and nobody was told yet."""
        self.at_once = 0
        """How many were allowed without waiting."""
        self._states = {id: _state(id, entry) for id, entry in self.targets.items()}
        self._maps = {id: RequestMap(entry.rules) for id, entry in self.targets.items()}

    @property
    def hosts(self) -> list[str]:
        return [one.rpartition(":")[0] or one for entry in self.targets.values() for one in entry.authorities]

    @property
    def last(self) -> tuple[PresentedIdentity, Attempt, Verdict]:
        return self.records[-1]

    def is_target_host(self, authority: str) -> bool:
        return any(authority in entry.authorities for entry in self.targets.values())

    def reads_body(self, attempt: Attempt) -> bool:
        target_id = self._target(attempt)
        return target_id is not None and self._maps[target_id].reads_body(attempt.method, attempt.target)

    def git_endpoint(self, attempt: Attempt) -> GitEndpoint | None:
        target_id = self._target(attempt)
        return (
            self._maps[target_id].git_endpoint(attempt.method, attempt.target)
            if target_id is not None
            else None
        )

    async def decide(
        self,
        presented: PresentedIdentity,
        attempt: Attempt,
        rate_check: RateCheck | None = None,
        holdable: HoldableRequest | None = None,
    ) -> Verdict:
        verdict = self._observed(self._decided(presented, attempt, rate_check), presented, attempt)
        if self.keeps_records:
            self.records.append((presented, attempt, verdict))
        return verdict

    def cached_allowance(self, presented: PresentedIdentity, attempt: Attempt) -> TableAllowance | None:
        verdict = self._decided(presented, attempt, lambda agent_id: ALLOWED)
        if not verdict.allowed or verdict.target is None or verdict.lease is None:
            return None
        entry = self.targets[verdict.target.target_id]
        return TableAllowance(self, presented, attempt, verdict.lease, verdict.target, entry)

    def at_hand(
        self,
        presented: PresentedIdentity,
        attempt: Attempt,
        rate_check: RateCheck,
        on_recorded: Callable[[bool], None],
    ) -> tuple[str, Mapping[str, str]] | None:
        verdict = self._decided(presented, attempt, lambda agent_id: ALLOWED)
        if not verdict.allowed or not self.credentials or verdict.target is None:
            return None
        if isinstance(rate_check(presented.handle or "helper"), Refused):
            return None
        if self.keeps_records and not self.full:
            self.records.append((presented, attempt, verdict))
        self.at_once += 1
        asyncio.get_running_loop().call_soon(on_recorded, not self.full)
        return verdict.action_id, self.targets[verdict.target.target_id].injected

    async def headers_to_inject(self, verdict: Verdict) -> Mapping[str, str]:
        if not self.credentials:
            raise UnavailableError("the credential is not here yet; try again")
        assert verdict.target is not None
        return self.targets[verdict.target.target_id].injected

    def upstream(self, target: TargetState) -> str:
        return self.targets[target.target_id].url

    def on_lease_end(self, lease_id: str, ended: Callable[[], None]) -> Callable[[], None]:
        watching = self.watching.setdefault(lease_id, [])
        watching.append(ended)
        return lambda: watching.remove(ended)

    def watch(self, lease_id: str, ended: Callable[[], None]) -> None:
        self.watching.setdefault(lease_id, []).append(ended)

    def unwatch(self, lease_id: str, ended: Callable[[], None]) -> None:
        watching = self.watching.get(lease_id, [])
        if ended in watching:
            watching.remove(ended)

    def check_view(self) -> Allowed | Refused:
        return refused(Code.STALE_VIEW, "it stood still") if self.stood_still else ALLOWED

    def view_expired(self) -> bool:
        return self.stood_still

    def end(self, target_id: str) -> None:
        for ended in list(self.watching.get(self.leases[target_id].lease_id, ())):
            ended()

    def _target(self, attempt: Attempt) -> str | None:
        if attempt.target_id is not None:
            return attempt.target_id if attempt.target_id in self.targets else None
        return next(
            (id for id, entry in self.targets.items() if attempt.authority in entry.authorities), None
        )

    def _observed(self, verdict: Verdict, presented: PresentedIdentity, attempt: Attempt) -> Verdict:
        target_id = self._target(attempt)
        if verdict.allowed or target_id is None:
            return verdict
        inherited = bool(presented.header_names & {"authorization", "cookie"})
        return dataclasses.replace(
            verdict, target=self._states[target_id], observed=inherited and target_id in self.observed
        )

    def _decided(
        self, presented: PresentedIdentity, attempt: Attempt, rate_check: RateCheck | None
    ) -> Verdict:
        if not self.available:
            return _denied(503, "view_stale", "nothing can be decided now")
        if self.handles is not None and presented.handle not in self.handles:
            return _denied(401, "unknown_sender", "nobody knows who sends this")
        rate = rate_check(presented.handle or "helper") if rate_check is not None else ALLOWED
        if isinstance(rate, Refused):
            return _denied(429, rate.reason.code, rate.reason.message)
        target_id = self._target(attempt)
        if target_id is None:
            return _denied(403, "target_unknown", "there is no such target")
        body = attempt.body if attempt.json else None
        map = self._maps[target_id]
        action = map.action(attempt.method, attempt.target, body)
        if attempt.git is not None:
            updates = attempt.git.commands.updates if attempt.git.commands is not None else ()
            found = map.git_actions(attempt.git.endpoint, updates) or map.git_offers(attempt.git.endpoint)
            verbs = self.targets[target_id].verbs
            action = next((one for one in found if one.verb not in verbs), found[0])
        if action is None and attempt.body is None and self.reads_body(attempt):
            return _denied(413, "body_unseen", "the body was not seen whole")
        if action is None or action.verb not in self.targets[target_id].verbs:
            return _denied(403, "out_of_scope", "no lease of the task allows this")
        return Verdict("action", True, 200, (), self.leases[target_id], self._states[target_id], action)


def data_plane(
    gate: TableGate,
    *,
    blocked: ReportBlocked = lambda _: None,
    tls: ssl.SSLContext | None = None,
    agent_api: AgentApi | None = None,
    allowance: Allowance | None = None,
    timeouts: Timeouts | None = None,
) -> DataPlane:
    """A data plane that asks this gate, and whose CA may certify the hosts of its targets."""
    settings = DataPlaneSettings(allowance or Allowance(), timeouts or Timeouts(), **build_options("gateway"))
    return DataPlane(
        DecisionCore(gate, gate.is_target_host, blocked),
        authority=CertificateAuthority("gateway", gate.hosts, SystemClock()),
        tls=tls,
        agent_api=agent_api,
        settings=settings,
    )


def _denied(status: int, code: str, message: str) -> Verdict:
    return Verdict(str(uuid.uuid4()), False, status, (Reason(code=code, message=message),))


def _state(id: str, entry: Entry) -> TargetState:
    verbs = dict.fromkeys(one.verb for one in entry.rules)
    return TargetState(
        target_id=id, description="a target", backend=BackendSettings(kind="http"),
        verbs=tuple(VerbFloor(verb=verb) for verb in verbs), requests=entry.rules, max_ttl_s=60, keys=(),
        status="active",
    )  # fmt: skip


def with_entry(gate: TableGate, target_id: str, **changes: object) -> None:
    """Change one target of the table."""
    gate.targets[target_id] = dataclasses.replace(gate.targets[target_id], **changes)  # type: ignore[arg-type]
