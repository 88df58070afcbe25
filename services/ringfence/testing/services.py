"""Registry, policy, issuer, revoker and gateway over an in-memory bus. All but registry and revoker are wired as in a
process.

What is left out is what only a cluster needs: heartbeats, rebuilds, outboxes, sweeps, minting at targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from starlette.applications import Starlette

from ringfence.backends import Backend, BackendContext, TokenKey, TokenKeys, built_in
from ringfence.backends.capabilities import BackendCapabilities
from ringfence.backends.http import StaticSecrets
from ringfence.gateway.settings import GatewaySettings
from ringfence.gateway.wiring import CoreParts
from ringfence.issuer import app as issuer
from ringfence.issuer.app import IssuerParts
from ringfence.issuer.settings import IssuerSettings
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jwe import EncryptionKey
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.batch_handlers import sequential
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.topics import (
    REGISTRY_COMMAND,
    REVOCATION_REQUEST,
    TRUST,
)
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.lease_store import (
    MIN_LEFT_MS,
    Activation,
    Budget,
    LeaseLookup,
    LeaseStore,
    Preparation,
    SignedLease,
    Spent,
    Step,
    StepResult,
    StoredLease,
)
from ringfence.model.leases.lifecycle import ALL_LEASES, cut_key, matches, selector_keys
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
                InMemoryBudgets(),
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


_EPOCH = "1.00000000"
"""A dictionary never loses anything, so that there is one epoch."""


class InMemoryBudgets:
    """What tasks have used of their limits of models, for one gateway (`Budgets`)."""

    def __init__(self) -> None:
        self.used: Counter[tuple[str, str]] = Counter()
        """By task and `tokens` or `requests`, with what is reserved."""

    async def reserve(self, budget: Budget, tokens: int) -> Literal["reserved", "lost"] | Spent:
        for task_id, limits in budget.limits:
            for what, wanted, limit in (("tokens", tokens, limits.tokens), ("requests", 1, limits.requests)):
                used = self.used[task_id, what]
                if limit is not None and used + wanted > limit:
                    return Spent(task_id, "tokens" if what == "tokens" else "requests", used, limit)
        await self.settle(budget, tokens=tokens, requests=1)
        return "reserved"

    async def settle(self, budget: Budget, *, tokens: int, requests: int) -> None:
        for task_id, _ in budget.limits:
            self.used[task_id, "tokens"] += tokens
            self.used[task_id, "requests"] += requests


class InMemoryLeaseStore(LeaseStore):
    """What issuer and revoker do with leases that leave nothing at their targets, as all leases here."""

    def __init__(self, clock: Clock) -> None:
        # Not that of the base class: it prepares a connection to Redis.
        self._clock = clock
        self._leases: dict[str, SignedLease] = {}
        self._fences: dict[str, int] = {}
        self._selectors: dict[str, Coordinates] = {}
        self._uses: dict[str, set[str]] = {}

    @property
    def epoch(self) -> str:
        return _EPOCH

    async def confirm(self, epoch: str) -> None:
        """Nothing was rebuilt."""

    # --- issuing ---

    async def prepare(self, leases: Sequence[SignedLease], *, token: str, mint_ms: int) -> list[Preparation]:
        raise NotImplementedError("no credential in memory leaves anything at a target")

    async def activate(self, leases: Sequence[SignedLease], *, token: str | None = None) -> list[Activation]:
        return [self._activate_one(one) for one in leases]

    def _activate_one(self, lease: SignedLease) -> Activation:
        claims = lease.claims
        if claims.lease_id in self._leases:
            return Activation("known", self._stored(claims.lease_id))
        for key in (*selector_keys(claims), ALL_LEASES):
            if self._fences.get(key, -1) >= claims.requested_at_ms:
                return Activation("fenced", selector_key=key)
        if claims.deadline * 1000 - self._clock.now_ms() < MIN_LEFT_MS:
            return Activation("late")
        self._leases[claims.lease_id] = lease
        return Activation("activated")

    async def use_grant(self, grant_id: str, lease_id: str, *, limit: int) -> bool:
        used = self._uses.setdefault(grant_id, set())
        if lease_id not in used and len(used) >= limit:
            return False
        used.add(lease_id)
        return True

    # --- ending ---

    async def step(self, steps: Sequence[Step], *, visibility_ms: int) -> list[StepResult]:
        return [self._step_one(one) for one in steps]

    def _step_one(self, step: Step) -> StepResult:
        id = step.after.lease_id
        known = self._leases.get(id)
        if known is None:
            return StepResult("unknown")
        now, after = known.claims, step.after
        if (now.status, now.seq, now.epoch) != (after.status, after.seq, after.epoch):
            return StepResult("moved", self._stored(id))
        self._leases[id] = step.lease
        return StepResult("done")

    async def postpone(self, delays_ms: Mapping[str, int]) -> None:
        """Nobody claims leases here."""

    def published(self, records: Iterable[tuple[str, int]]) -> None:
        """There is no outbox."""

    # --- fences and selectors ---

    async def fence(self, fences: Mapping[str, int], *, cut: bool = False) -> int:
        cuts = {cut_key(key): before_ms for key, before_ms in fences.items()} if cut else {}
        for key, before_ms in {**fences, **cuts}.items():
            self._fences[key] = max(self._fences.get(key, -1), before_ms)
        return self._clock.now_ms()

    async def first_seen(
        self, positions: Mapping[str, Coordinates], *, keep_ms: int
    ) -> dict[str, Coordinates]:
        return {id: self._selectors.setdefault(id, position) for id, position in positions.items()}

    # --- asking ---

    async def look(self, lease_id: str, selector_keys: Iterable[str] = ()) -> LeaseLookup:
        known, now_ms = self._leases.get(lease_id), self._clock.now_ms()
        live = known is not None and known.claims.status == "active" and now_ms < known.claims.deadline * 1000
        cut_ms = max((self._fences.get(cut_key(key), -1) for key in selector_keys), default=-1)
        return LeaseLookup(now_ms, self._stored(lease_id), live, cut_ms)

    async def get(self, lease_ids: Sequence[str]) -> dict[str, StoredLease]:
        return {id: stored for id in lease_ids if (stored := self._stored(id)) is not None}

    async def find(
        self, selector_key: str, *, agent_id: str | None = None, holders: Collection[str] | None = ()
    ) -> list[str]:
        return [one.lease_id for one in self.latest() if one.status not in TERMINAL]

    async def count(self, selector_keys: Sequence[str]) -> dict[str, int]:
        live = [one for one in self.latest() if one.status not in TERMINAL]
        return {key: sum(matches(one, key) for one in live) for key in selector_keys}

    def latest(self) -> list[Lease]:
        return [one.claims for one in self._leases.values()]

    def due(self) -> list[Lease]:
        """Leases whose deadline has come and that have not ended."""
        now_ms = self._clock.now_ms()
        return [one for one in self.latest() if one.status not in TERMINAL and one.deadline * 1000 <= now_ms]

    def _stored(self, lease_id: str) -> StoredLease | None:
        one = self._leases.get(lease_id)
        if one is None:
            return None
        claims = one.claims
        return StoredLease(claims.status, claims.seq, claims.deadline * 1000, one.record, claims.epoch)
