"""Registry, policy, issuer and revoker over an in-memory bus: the handlers of the services themselves, wired once more.

What is left out is what only a cluster needs: heartbeats, rebuilds, outboxes, sweeps, minting at targets, gateways.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import cast

from starlette.applications import Starlette

from ringfence.backends import Backend, BackendContext, CircuitBreaker, TokenKey, TokenKeys, built_in
from ringfence.backends.capabilities import BackendCapabilities
from ringfence.issuer.decisions import DecisionChecks, DecisionHandler, IssuanceSteps
from ringfence.issuer.domain import Terms
from ringfence.issuer.http import IssuerHttp
from ringfence.issuer.limits import GrantKeeper, LeaseLimits, LeaseLimitValues
from ringfence.issuer.minting import GatewayDelivery, Minter
from ringfence.issuer.settings import IssuerSettings
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.batch_handlers import sequential
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import CredentialDecision
from ringfence.messages.topics import (
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    CREDENTIAL_REQUEST,
    LEASE,
    REGISTRY_COMMAND,
    REVOCATION_REQUEST,
    SERVICE_EVENT,
    TRUST,
)
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.records.agent_keys import KeyUses
from ringfence.model.records.api_access import Authenticator
from ringfence.model.records.directory import RUN_TABLES, Directory
from ringfence.model.requests.grants import GrantTable, kind_of
from ringfence.policy.agents.holdings import Holdings
from ringfence.policy.agents.inventory import SharedKeyDetector
from ringfence.policy.decision_log import Approvers, InMemoryDecisionLog
from ringfence.policy.decisions.evaluator import RequestEvaluator
from ringfence.policy.decisions.responder import DecisionPublisher
from ringfence.policy.grants import GrantBook
from ringfence.policy.incoming.admission import (
    AdmissionControl,
    AdmissionLimits,
    MessageVerifier,
    PendingApprovalLimit,
    PendingLimits,
)
from ringfence.policy.incoming.approvals import ApprovalHandler
from ringfence.policy.incoming.credential_requests import (
    RequestChecks,
    RequestHandler,
    WithdrawalHandler,
    requests_then_withdrawals,
)
from ringfence.policy.incoming.grants import GrantHandler
from ringfence.policy.incoming.load_shedding import ShedRequests
from ringfence.policy.notifications.notices import Notices
from ringfence.policy.settings import PolicySettings
from ringfence.registry.commands import Registry
from ringfence.registry.store import Memory
from ringfence.rego.bundle import Bundle
from ringfence.revoker.domain import deadline_cause
from ringfence.revoker.lease_end.lease_ender import EndRequest, LeaseEnder
from ringfence.revoker.revocations.cut_confirmation import CutTracker
from ringfence.revoker.revocations.record_changes import RECORD_TOPICS, RecordHandler
from ringfence.revoker.revocations.revocations import RevocationHandler
from ringfence.revoker.revocations.verification import RevocationVerifier
from ringfence.revoker.settings import PATIENCE_S
from ringfence.testing.bus import InMemoryBus
from ringfence.testing.clock import MovableClock
from ringfence.testing.lease_store import InMemoryLeaseStore
from ringfence.testing.parts import (
    CaughtUpFollower,
    CredentialOf,
    GivenCredentials,
    InMemoryRuntime,
    InProcessEngine,
    NoRightsNeeded,
)

_ROLES: tuple[ServiceRole, ...] = ("registry", "policy", "issuer", "revoker")
_TRUST_S = 10 * 365 * 86_400
_VISIBILITY_MS = 10_000


@dataclass(frozen=True, slots=True)
class ServiceContext:
    """What all services share."""

    bus: InMemoryBus
    clock: MovableClock
    settings: ServiceSettings
    trust: TrustStore
    keys: Mapping[ServiceRole, SigningKey]

    def runtime(self, role: ServiceRole) -> InMemoryRuntime:
        """The runtime of one service."""
        return InMemoryRuntime(role, self.settings, self.clock, self.keys[role], self.trust, self.bus)


def create_context(root: SigningKey, settings: ServiceSettings, clock: MovableClock) -> ServiceContext:
    """A bus with a trust bundle on it, in which every service has a key."""
    bus = InMemoryBus(clock, settings.topic_prefix)
    td, now_s = settings.trust_domain, clock.now_ms() // 1000
    keys = {role: SigningKey.generate(f"spiffe://{td}/service/{role}") for role in _ROLES}
    bundle = TrustBundle(
        iss=root.id,
        aud=td,
        iat=now_s,
        exp=now_s + _TRUST_S,
        jti="bundle-1",
        version=1,
        services=tuple(
            ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(now_s + _TRUST_S),))
            for role, key in keys.items()
        ),
    )
    compact = sign(bundle, root, header_jwk=True)
    trust = TrustStore(td, root.kid)
    trust.load(compact, now_s)
    bus.append(TRUST, "1", compact.encode(), ())
    return ServiceContext(bus, clock, settings, trust, keys)


class Services:
    """The four services that decide, at work on one bus."""

    def __init__(self, context: ServiceContext, bundle: Bundle | None, credential_of: CredentialOf) -> None:
        """`bundle`: the Rego bundle; None is the one that comes with Ringfence. Raises BundleError."""
        self._context = context
        settings, clock = context.settings, context.clock
        # One table for all: each would hold the same, as every reader has each record at once.
        self.directory = Directory(context.trust, clock, grace_ms=None)
        context.bus.read(RUN_TABLES, self.directory.on_records)
        self.store = InMemoryLeaseStore(clock)
        token_keys = TokenKeys([TokenKey(SigningKey.generate(context.keys["issuer"].id))])
        rights = NoRightsNeeded()
        real = built_in(BackendContext(settings.trust_domain, settings.issuer_url, token_keys, rights))
        self._declared = BackendCapabilities(real)
        self._backends: dict[str, Backend] = {
            kind: one if one.stateless else cast("Backend", GivenCredentials(one, credential_of))
            for kind, one in real.items()
        }
        self.registry = self._build_registry()
        self.approvals = self._build_policy(bundle)
        self._build_issuer()
        self._ender = self._build_revoker()
        authenticator = Authenticator(self.directory, "issuer", clock)
        self.issuer_http = Starlette(
            routes=IssuerHttp(
                issuer_url=settings.issuer_url,
                authenticator=authenticator,
                keys=token_keys,
                store=self.store,
                runs=self.directory.runs,
            ).routes()
        )
        context.bus.when_idle(self._close_overdue_once)

    async def end_due_leases(self) -> None:
        """End the leases whose deadline has come."""
        now_ms = self._context.clock.now_ms()
        await self._ender.end([EndRequest(one, deadline_cause(one, now_ms)) for one in self.store.due()])

    async def _close_overdue_once(self) -> None:
        await self.approvals.close_overdue_once(lambda topic, partition: True)

    def _build_registry(self) -> Registry:
        runtime = self._context.runtime("registry")
        registry = Registry(runtime, self.directory, Memory(self.directory, runtime.trust, 0))
        handler = sequential(registry.on_command, runtime.dead_letters)
        self._context.bus.consume({REGISTRY_COMMAND: handler})
        return registry

    def _build_policy(self, bundle: Bundle | None) -> ApprovalHandler:
        context, directory, declared = self._context, self.directory, self._declared
        runtime, bus = context.runtime("policy"), context.bus
        own = PolicySettings.model_construct()
        holdings = Holdings(runtime.trust, runtime.clock)
        grant_table = GrantTable(directory, runtime.settings.trust_domain)
        grants = GrantBook(grant_table, directory)

        def on_allowed(decision: CredentialDecision, agent_id: str, at_ms: int) -> None:
            holdings.decided(decision, agent_id, at_ms)
            grants.on_allowed(decision)

        decisions = InMemoryDecisionLog(runtime.trust, on_allowed)
        bus.read([LEASE], holdings.on_leases)
        bus.read([SERVICE_EVENT], holdings.on_events)
        bus.read([CREDENTIAL_DECISION], decisions.on_records)
        bus.read([APPROVAL_RESPONSE], grant_table.on_records)
        grant_table.settle()

        async def recall() -> None:
            await decisions.settle()

        notices = Notices({}, directory, decisions, runtime.clock)
        publisher = DecisionPublisher(runtime, directory, decisions, Approvers(directory), notices)
        verifier = MessageVerifier(runtime, directory)
        feed = CaughtUpFollower(runtime.settings, [CREDENTIAL_DECISION])
        judge = RequestEvaluator(
            runtime, directory, InProcessEngine(bundle), holdings, (feed,), grants, declared
        )
        limits = AdmissionLimits(own.agent_requests_per_minute, own.sponsor_requests_per_minute, own.wait_s)
        pending = PendingLimits(own.agent_pending_approvals, own.sponsor_pending_approvals)
        admission, shed = AdmissionControl(directory, limits), ShedRequests(runtime, decisions)
        requests = RequestHandler(
            runtime,
            RequestChecks(
                verifier,
                admission,
                PendingApprovalLimit(directory, decisions, pending),
                SharedKeyDetector(runtime, KeyUses()),
                shed,
            ),
            judge,
            decisions,
            publisher,
            recall,
            approval_timeout_s=own.approval_timeout_s,
        )
        approvals = ApprovalHandler(runtime, directory, verifier, judge, decisions, publisher, recall)
        withdrawals = WithdrawalHandler(runtime, directory, verifier, admission, shed, decisions, approvals)
        granting = GrantHandler(
            runtime,
            directory,
            verifier,
            grant_table,
            lambda: judge.policy_revision,
            approvals.records.wait_until_known,
            approvals.reconsider,
        )

        async def respond(record: Received) -> Awaitable[object] | None:
            if kind_of(record) is None:
                return await approvals.handle(record)
            await granting.handle(record)
            return None

        bus.consume({
            CREDENTIAL_REQUEST: requests_then_withdrawals(
                requests.handle, withdrawals.handle, approvals.received, runtime.dead_letters
            ),
            APPROVAL_RESPONSE: sequential(respond, runtime.dead_letters),
        })  # fmt: skip
        return approvals

    def _build_issuer(self) -> None:
        context, directory, store = self._context, self.directory, self.store
        runtime, backends = context.runtime("issuer"), self._backends
        own = IssuerSettings.model_construct()
        minter = Minter(
            runtime,
            store,
            backends,
            CircuitBreaker(concurrency=1, deadline_s=1.0, longest_shut_s=1.0),
            mint_ms=0,
        )
        values = LeaseLimitValues(own.agent_leases, own.sponsor_leases, own.wait_s)
        granted = GrantTable(directory, runtime.settings.trust_domain)
        context.bus.read([APPROVAL_RESPONSE], granted.on_records)
        granted.settle()

        async def caught_up(within_s: float) -> bool:
            return True

        handler = DecisionHandler(
            runtime,
            store,
            backends,
            DecisionChecks(
                directory,
                Terms(
                    id=runtime.key.id,
                    trust_domain=runtime.settings.trust_domain,
                    entitlements_max_age_s=runtime.settings.entitlements_max_age_s,
                    backends=frozenset(backends),
                    injected=frozenset(
                        kind for kind, one in backends.items() if one.enforced_by == "gateway"
                    ),
                ),
                patience_s=0.0,
                halted=lambda: None,
            ),
            IssuanceSteps(
                LeaseLimits(store, runtime.clock, values),
                GrantKeeper(granted, store, caught_up, own.patience_s),
                minter,
                GatewayDelivery(
                    runtime.trust, lambda: runtime.key, None, runtime.clock, runtime.settings.trust_domain
                ),
            ),
        )
        context.bus.consume({CREDENTIAL_DECISION: handler})

    def _build_revoker(self) -> LeaseEnder:
        context, directory, store = self._context, self.directory, self.store
        runtime = context.runtime("revoker")
        ender = LeaseEnder(
            runtime,
            store,
            list(self._backends),
            lambda ends: None,
            lambda record, summary: None,
            visibility_ms=_VISIBILITY_MS,
        )
        verifier = RevocationVerifier(runtime, directory, patience_s=0.0)
        cuts = CutTracker(runtime.trust, runtime.clock, grace_ms=0)
        revocations = RevocationHandler(runtime, verifier, store, ender, cuts)
        records = RecordHandler(runtime, directory, verifier, store, ender, patience_s=PATIENCE_S)
        context.bus.consume({REVOCATION_REQUEST: revocations})
        context.bus.consume(dict.fromkeys(RECORD_TOPICS, sequential(records, runtime.dead_letters)))
        return ender
