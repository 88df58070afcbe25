"""The issuer, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faststream import FastStream

from ringfence.backends import (
    Backend,
    BackendContext,
    BackendSettings,
    CircuitBreaker,
    TargetAccess,
    TokenKey,
    TokenKeys,
    all_backends,
)
from ringfence.issuer.decisions import DecisionChecks, DecisionHandler, IssuanceSteps
from ringfence.issuer.domain import Terms
from ringfence.issuer.http import GatewayHttp, IssuerHttp, Resealer
from ringfence.issuer.limits import GrantKeeper, LeaseLimits, LeaseLimitValues
from ringfence.issuer.minting import GatewayDelivery, Minter
from ringfence.issuer.settings import IssuerSettings
from ringfence.issuer.subscribers import router
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.settings import ServiceSettings, load, of_setting
from ringfence.kernel.crypto.service_keys import EncryptionKeys
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.service.service_description import describe, placeholder
from ringfence.messages.topics import APPROVAL_RESPONSE, HEARTBEAT
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.revoker_halts import RevokerHalts
from ringfence.model.records.alarms import report_alarms
from ringfence.model.records.api_access import Authenticator
from ringfence.model.records.directory import RUN_TABLES, Directory
from ringfence.model.requests.grants import KEEP_MS as GRANTS_KEEP_MS
from ringfence.model.requests.grants import GrantTable
from ringfence.model.verdict import Refused

TOKEN_KEY_FILE = "issuer-token.json"  # noqa: S105 - the name of a file
"""In the folder of the services' keys."""
SEAL_KEY_FILE = "issuer-seal.json"
"""Likewise: the key that the issuer keeps credentials for gateways sealed to."""
_LONGEST_SHUT_S = 5.0
"""Agents wait: a target that failed is soon tried again."""


@dataclass(frozen=True, slots=True)
class IssuerParts:
    """What the issuer works with. A process and a test bring theirs; `wire` makes one service of either."""

    runtime: Runtime
    own: IssuerSettings
    directory: Directory
    store: LeaseStore
    backends: Mapping[str, Backend]
    token_keys: TokenKeys
    seal_keys: EncryptionKeys | None


def build(
    settings: ServiceSettings, own: IssuerSettings | None = None, clock: Clock | None = None
) -> Runtime:
    """Everything that the issuer is made of, started by `Runtime.run`."""
    own = own or load(IssuerSettings)
    runtime = Runtime("issuer", settings, clock)
    token_keys = _token_keys(settings, own)
    directory = Directory(
        runtime.trust,
        runtime.clock,
        grace_ms=int(settings.grace_s * 1000),
        on_alarm=report_alarms(runtime),
    )
    store = LeaseStore(settings, runtime.clock)
    access = TargetAccess.of(load(BackendSettings))
    backends = all_backends(BackendContext(settings.trust_domain, settings.issuer_url, token_keys, access))
    seal_keys = _seal_keys(runtime, own.seal_key_file, settings.key_dir / SEAL_KEY_FILE)
    runtime.table(RUN_TABLES, directory.on_records)
    runtime.on_start(store.connect)
    runtime.on_stop(access.close)
    for backend in backends.values():
        runtime.on_stop(backend.close)
    runtime.on_stop(store.close)
    runtime.ready_when(store.unready)
    runtime.warns_when(store.warning)
    runtime.denies_when(directory.stale)
    runtime.background("redis-watch", store.watch)
    runtime.background("outbox-clearing", store.clear_outbox)
    wire(IssuerParts(runtime, own, directory, store, backends, token_keys, seal_keys))
    return runtime


def wire(parts: IssuerParts) -> None:
    """Register all that the issuer reads, does and serves at its runtime."""
    runtime, own, directory, store = parts.runtime, parts.own, parts.directory, parts.store
    backends, settings = parts.backends, parts.runtime.settings
    caller = CircuitBreaker(
        concurrency=own.mint_concurrency, deadline_s=own.mint_deadline_s, longest_shut_s=_LONGEST_SHUT_S
    )
    minter = Minter(runtime, store, backends, caller, mint_ms=int(own.mint_within_s * 1000))
    terms = Terms(
        id=runtime.key.id,
        trust_domain=settings.trust_domain,
        entitlements_max_age_s=settings.entitlements_max_age_s,
        backends=frozenset(backends),
        injected=frozenset(kind for kind, one in backends.items() if one.enforced_by == "gateway"),
    )
    limits = LeaseLimits(
        store, runtime.clock, LeaseLimitValues(own.agent_leases, own.sponsor_leases, own.wait_s)
    )
    granted = GrantTable(directory, settings.trust_domain)
    responses = runtime.history(
        [APPROVAL_RESPONSE], granted.on_records, since_ms=max(runtime.clock.now_ms() - GRANTS_KEEP_MS, 1)
    )
    grants = GrantKeeper(granted, store, responses.caught_up, own.patience_s)
    delivery = GatewayDelivery(
        runtime.trust, lambda: runtime.key, parts.seal_keys, runtime.clock, settings.trust_domain
    )
    halts = RevokerHalts(runtime.trust, grace_ms=int(settings.grace_s * 1000))
    handler = DecisionHandler(
        runtime,
        store,
        backends,
        DecisionChecks(directory, terms, own.patience_s, halts.check),
        IssuanceSteps(limits, grants, minter, delivery),
    )

    def on_heartbeats(records: Sequence[Received]) -> None:
        directory.on_records(records)
        halts.on_heartbeats(records)

    runtime.table([HEARTBEAT], on_heartbeats)
    runtime.denies_when(
        lambda: verdict.reason.message if isinstance(verdict := halts.check(), Refused) else None
    )

    async def settle() -> None:
        granted.settle()

    runtime.consume(router(decisions=handler, on_assigned=settle))
    authenticator = Authenticator(directory, runtime.role, runtime.clock)
    runtime.routes += IssuerHttp(
        issuer_url=settings.issuer_url,
        authenticator=authenticator,
        keys=parts.token_keys,
        store=store,
        runs=directory.runs,
    ).routes()
    resealer = Resealer(settings, runtime.trust, store, parts.seal_keys, runtime.clock)
    runtime.routes += GatewayHttp(resealer, authenticator).routes()


def described() -> FastStream:
    """What the service consumes and publishes, for AsyncAPI. Needs no settings, keys or broker."""
    return describe(
        "issuer",
        router(
            decisions=placeholder,
            on_assigned=placeholder,
        ),
    )


def _token_keys(settings: ServiceSettings, own: IssuerSettings) -> TokenKeys:
    """Raises SettingsError, and TokenKeyError if they do not go together."""
    with of_setting("RINGFENCE_ISSUER_TOKEN_KEY_FILE"):
        signing = [TokenKey.load(own.token_key_file or settings.key_dir / TOKEN_KEY_FILE)]
    if own.rs256_token_key_file is not None:
        with of_setting("RINGFENCE_ISSUER_RS256_TOKEN_KEY_FILE"):
            signing.append(TokenKey.load(own.rs256_token_key_file))
    with of_setting("RINGFENCE_ISSUER_PUBLISHED_TOKEN_KEY_FILES"):
        published = [TokenKey.load(file) for file in own.published_token_key_files]
    return TokenKeys(signing, published)


def _seal_keys(runtime: Runtime, named: Path | None, usual: Path) -> EncryptionKeys | None:
    """The keys to which the issuer seals gateways' credentials for itself. None if no file is named and the default
    file is missing. The issuer then refuses delivery to the gateway with that reason.
    """
    file = named or (usual if usual.exists() else None)
    if file is None:
        return None
    with of_setting("RINGFENCE_ISSUER_SEAL_KEY_FILE"):
        keys = EncryptionKeys(file)
    runtime.on_keys(keys.reload)
    runtime.warns_when(lambda: keys.missing_key(runtime.trust, "issuer", runtime.clock))
    return keys
