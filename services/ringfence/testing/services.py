"""Registry, policy, issuer, revoker and gateway over an in-memory bus. All but registry and revoker are wired as in a
process.

What is left out is what only a cluster needs: heartbeats, rebuilds, outboxes, sweeps, minting at targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from starlette.applications import Starlette

from ringfence.backends import Backend, BackendContext, TokenKey, TokenKeys, built_in
from ringfence.backends.capabilities import BackendCapabilities
from ringfence.backends.http import StaticSecrets
from ringfence.gateway.settings import GatewaySettings
from ringfence.gateway.wiring import CoreParts
from ringfence.issuer import app as issuer
from ringfence.issuer.app import IssuerParts
from ringfence.issuer.settings import IssuerSettings
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jwe import EncryptionKey
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.batch_handlers import sequential
from ringfence.messages.base import ServiceRole
from ringfence.messages.topics import (
    REGISTRY_COMMAND,
    REVOCATION_REQUEST,
    TRUST,
)
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.records.directory import RUN_TABLES, Directory
from ringfence.policy import app as policy
from ringfence.policy.agents.ceilings import CeilingCombinations
from ringfence.policy.app import PolicyParts
from ringfence.policy.incoming.approvals import ApprovalHandler
from ringfence.policy.settings import PolicySettings
from ringfence.registry.commands import Registry
from ringfence.registry.store import Memory
from ringfence.rego.bundle import Bundle, MissingRuleError
from ringfence.rego.engine import ACTION, CEILING
from ringfence.revoker.domain import deadline_cause
from ringfence.revoker.lease_end.lease_ender import EndRequest, LeaseEnder
from ringfence.revoker.revocations.cut_confirmation import CutTracker
from ringfence.revoker.revocations.record_changes import RECORD_TOPICS, RecordHandler
from ringfence.revoker.revocations.revocations import RevocationHandler
from ringfence.revoker.revocations.verification import RevocationVerifier
from ringfence.revoker.settings import PATIENCE_S
from ringfence.testing.bus import InMemoryBus, SettlingPublisher
from ringfence.testing.clock import MovableClock
from ringfence.testing.gateway import InMemoryGateway, InMemoryRecorder, InMemoryView
from ringfence.testing.lease_store import InMemoryLeaseStore
from ringfence.testing.parts import (
    CredentialOf,
    GivenCredentials,
    GivenSecrets,
    InMemoryEncryptionKeys,
    InMemoryRuntime,
    InProcessEngine,
    NoRightsNeeded,
)

_ROLES: tuple[ServiceRole, ...] = ("registry", "policy", "issuer", "revoker", "gateway")
_SEALED_TO: tuple[ServiceRole, ...] = ("issuer", "gateway")
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
    seals: Mapping[ServiceRole, EncryptionKey]
    """The keys that credentials for the gateway are sealed to."""

    def runtime(self, role: ServiceRole) -> InMemoryRuntime:
        return InMemoryRuntime(role, self.settings, self.clock, self.keys[role], self.trust, self.bus)


def create_context(root: SigningKey, settings: ServiceSettings, clock: MovableClock) -> ServiceContext:
    """A bus with a trust bundle on it, in which every service has a key."""
    bus = InMemoryBus(clock, settings.topic_prefix)
    td, now_s = settings.trust_domain, clock.now_ms() // 1000
    keys = {role: SigningKey.generate(f"spiffe://{td}/service/{role}") for role in _ROLES}
    seals = {role: EncryptionKey.generate(keys[role].id) for role in _SEALED_TO}
    bundle = TrustBundle(
        iss=root.id,
        aud=td,
        iat=now_s,
        exp=now_s + _TRUST_S,
        jti="bundle-1",
        version=1,
        services=tuple(
            ServiceIdentity(
                id=key.id,
                roles=(role,),
                keys=(key.record(now_s + _TRUST_S),),
                encryption_keys=(seals[role].record(now_s + _TRUST_S),) if role in seals else (),
            )
            for role, key in keys.items()
        ),
    )
    compact = sign(bundle, root, header_jwk=True)
    trust = TrustStore(td, root.kid)
    trust.load(compact, now_s)
    bus.append(TRUST, "1", compact.encode(), ())
    return ServiceContext(bus, clock, settings, trust, keys, seals)


def _engine(bundle: Bundle | None, entry_point: str) -> InProcessEngine:
    """An engine beside that of requests. A bundle that decides on credentials alone leaves it the one that comes with
    Ringfence.
    """
    try:
        return InProcessEngine(bundle, entry_point=entry_point)
    except MissingRuleError:
        return InProcessEngine(entry_point=entry_point)


class Services:
    """The services that decide, at work on one bus."""

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
        self.issuer_http = self._build_issuer(token_keys)
        self._ender = self._build_revoker()
        self.gateway = self._build_gateway(bundle, credential_of)
        context.bus.when_idle(self._close_overdue_once)

    async def end_due_leases(self) -> None:
        """End the leases whose deadline has come, and what the gateway does under them."""
        now_ms = self._context.clock.now_ms()
        await self._ender.end([EndRequest(one, deadline_cause(one, now_ms)) for one in self.store.due()])
        self.gateway.on_clock_moved()

    async def _close_overdue_once(self) -> None:
        await self.approvals.close_overdue_once(lambda topic, partition: True)

    def _build_registry(self) -> Registry:
        runtime = self._context.runtime("registry")
        registry = Registry(runtime, self.directory, Memory(self.directory, runtime.trust, 0))
        handler = sequential(registry.on_command, runtime.dead_letters)
        self._context.bus.consume({REGISTRY_COMMAND: handler})
        return registry

    def _build_policy(self, bundle: Bundle | None) -> ApprovalHandler:
        runtime = self._context.runtime("policy")
        own = PolicySettings.model_construct()
        ceilings = CeilingCombinations(runtime, self.directory, _engine(bundle, CEILING))
        approvals, _ = policy.wire(
            PolicyParts(runtime, own, self.directory, InProcessEngine(bundle), self._declared, ceilings)
        )
        return approvals

    def _build_issuer(self, token_keys: TokenKeys) -> Starlette:
        runtime = self._context.runtime("issuer")
        own = IssuerSettings.model_construct()
        seal_keys = InMemoryEncryptionKeys(self._context.seals["issuer"])
        issuer.wire(
            IssuerParts(runtime, own, self.directory, self.store, self._backends, token_keys, seal_keys)
        )
        return Starlette(routes=runtime.routes)

    def _build_gateway(self, bundle: Bundle | None, credential_of: CredentialOf) -> InMemoryGateway:
        context, runtime = self._context, self._context.runtime("gateway")
        recorder = InMemoryRecorder(runtime.publisher)
        # A question to a person is asked outside of the pump.
        runtime.publisher = SettlingPublisher(context.bus, context.settings, runtime.key.id, context.clock)
        return InMemoryGateway(
            CoreParts(
                runtime,
                GatewaySettings.model_construct(),
                InMemoryView(runtime),
                _engine(bundle, ACTION),
                self._declared,
                context.seals["gateway"],
                StaticSecrets(GivenSecrets(credential_of)),
                recorder,
            )
        )

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
