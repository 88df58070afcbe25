"""Wiring of the decision core, which all data planes of one gateway share."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ringfence.backends import BackendContext, BackendSettings, TargetAccess, all_backends
from ringfence.backends.capabilities import BackendCapabilities
from ringfence.backends.http import StaticSecrets
from ringfence.client.resource_server.dpop_proofs import Nonces, ProofChecker
from ringfence.gateway.decision.approval_questions import OpenQuestions
from ringfence.gateway.decision.approvals import Approvals
from ringfence.gateway.decision.context import notice
from ringfence.gateway.decision.decision_events import BlockedRequests
from ringfence.gateway.decision.evaluator import Evaluator
from ringfence.gateway.decision.gate import DecisionGate, DecisionLog, DecisionSettings, DecisionSteps
from ringfence.gateway.decision.injection import Injector, SealedCredentials
from ringfence.gateway.decision.model_budget import Budgets, ModelMeters
from ringfence.gateway.decision.relays import Relays
from ringfence.gateway.decision.sender import SenderAuthenticator, SharedKeys
from ringfence.gateway.decision.targets import Targets
from ringfence.gateway.events.recorder import Recorder, RefusalCounts
from ringfence.gateway.events.spool import Spool
from ringfence.gateway.events.task_history import RunEvents
from ringfence.gateway.settings import GatewaySettings
from ringfence.gateway.state.leases import LEASES_SINCE_MS
from ringfence.gateway.state.view import View
from ringfence.kernel.base import metrics
from ringfence.kernel.base.http_client import service_tls
from ringfence.kernel.base.settings import ServiceSettings, load, of_setting
from ringfence.kernel.crypto.jwe import Opener
from ringfence.kernel.crypto.service_keys import EncryptionKeys
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Reader
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.operations import EventSubject
from ringfence.messages.topics import APPROVAL_RESPONSE, CREDENTIAL_REPLY
from ringfence.model.lease_store import LeaseStoreBudgets
from ringfence.model.records.agent_keys import KeyUses
from ringfence.rego.bundle import load_bundle
from ringfence.rego.bundle_watch import BundleWatch
from ringfence.rego.engine import ACTION, PolicyEngine
from ringfence.rego.settings import OpaSettings, engine_of

log = logging.getLogger(__name__)

SEAL = "-seal.json"


@dataclass(frozen=True, slots=True)
class CoreParts:
    """What the decision core works with. A process and a test bring theirs; `wire_core` makes one core of either."""

    runtime: Runtime
    own: GatewaySettings
    view: View
    engine: PolicyEngine
    declared: BackendCapabilities
    seal: Opener | None
    """Opens the credentials that are sealed to this gateway. Without it, only static secrets are injected."""
    secrets: StaticSecrets
    recorder: Recorder
    budgets: Budgets


@dataclass(frozen=True, slots=True)
class Core:
    """The decision core, and what data planes need besides the gate."""

    gate: DecisionGate
    view: View
    targets: Targets
    relays: Relays
    approvals: Approvals
    blocked: BlockedRequests
    run_events: RunEvents
    proofs: ProofChecker
    """Of all senders: a proof counts once at this gateway."""
    reply_readers: list[Reader]
    """Readers of `credential.reply`, from the start of the life of any reply on. Add to them before `runtime` runs."""


def build_core(
    runtime: Runtime, settings: ServiceSettings, own: GatewaySettings, *, fast_path: bool = True
) -> Core:
    """Build the core. `runtime` feeds and runs it.

    `fast_path`: see `DecisionSettings`. Raises AccessError, BundleError, KeyFileError, SettingsError, SpoolError.
    """
    view = View(runtime)
    with of_setting("RINGFENCE_GATEWAY_BUNDLE"):
        bundle = load_bundle(own.bundle)
    engine = engine_of(load(OpaSettings), bundle, timeout_ms=own.evaluation_timeout_ms, entry_point=ACTION)
    declared = BackendCapabilities(all_backends(BackendContext(settings.trust_domain, settings.issuer_url)))
    seal, secrets = _seal_keys(runtime, settings, own), StaticSecrets(TargetAccess.of(load(BackendSettings)))
    recorder = _recorder(runtime, settings, own)

    async def bundle_refused(mark: str, message: str) -> None:
        reason = Reason(code=Code.BUNDLE_REFUSED, message=message[:2000])
        await runtime.event(
            "finding", EventSubject.POLICY_BUNDLE, about=("bundle_refused", mark), reasons=(reason,)
        )

    if own.observe:
        _announce_observe_mode(runtime, own)
    runtime.background("policy bundle", BundleWatch(own.bundle, engine, bundle_refused).run)
    budgets = LeaseStoreBudgets(settings)
    runtime.on_stop(budgets.close)
    parts = CoreParts(runtime, own, view, engine, declared, seal, secrets, recorder, budgets)
    return wire_core(parts, fast_path=fast_path)


def wire_core(parts: CoreParts, *, fast_path: bool = True) -> Core:
    """Make the core, and register all that it reads and does at its runtime. `fast_path`: see `DecisionSettings`."""
    runtime, own, view, recorder = parts.runtime, parts.own, parts.view, parts.recorder
    clock, settings = runtime.clock, runtime.settings
    targets = Targets(view.directory)
    proofs = ProofChecker(nonces=Nonces(), clock=clock)
    shared_keys = SharedKeys(runtime, KeyUses())
    runtime.background("shared keys", shared_keys.report)
    authenticator = SenderAuthenticator(
        settings.trust_domain, view.directory, view.table, proofs, clock, shared_keys.used
    )
    sealed = SealedCredentials(
        view.table, runtime.trust, clock,
        key=lambda: runtime.key, seal=parts.seal, issuer_url=own.issuer or settings.issuer_url,
        tls=service_tls(settings),
    )  # fmt: skip
    injector = Injector(view.table, sealed, parts.secrets)
    counted = RefusalCounts(recorder.record, clock, gateway=runtime.key.id)
    blocked = BlockedRequests(counted, view.directory, targets, trust_domain=settings.trust_domain)
    approvals = Approvals(
        runtime, view.directory, view.table,
        OpenQuestions(per_agent=own.agent_pending_approvals, in_total=own.pending_approvals),
        wait_s=own.approval_wait_s, life_s=own.approval_life_s,
    )  # fmt: skip
    meters = ModelMeters(parts.budgets)
    evaluator = Evaluator(parts.engine, parts.declared)
    gate = DecisionGate(
        view,
        DecisionSteps(authenticator, targets, evaluator, approvals, injector, meters),
        DecisionLog(runtime.key.id, recorder, counted),
        DecisionSettings(settings.entitlements_max_age_s, observe=own.observe, fast_path=fast_path),
        clock=clock,
        key=lambda: runtime.key,
    )

    relays = Relays(
        view, authenticator, gate.events, clock, entitlements_max_age_s=settings.entitlements_max_age_s
    )

    reply_readers: list[Reader] = [sealed.on_records]

    def on_replies(records: Sequence[Received]) -> None:
        for reader in reply_readers:
            reader(records)

    runtime.history([CREDENTIAL_REPLY], on_replies, since_ms=max(clock.now_ms() - LEASES_SINCE_MS, 1))
    # Questions belong to this process, so answers from before its start are not for it.
    runtime.history([APPROVAL_RESPONSE], approvals.on_records, since_ms=max(clock.now_ms(), 1))
    runtime.background("blocked requests", blocked.run)
    runtime.on_start(parts.engine.start)
    runtime.on_stop(meters.close)
    runtime.on_stop(parts.secrets.close)
    runtime.on_stop(sealed.close)
    runtime.on_stop(parts.engine.close)
    runtime.on_stop(recorder.close)
    runtime.on_stop(blocked.close)
    run_events = RunEvents(recorder, counted)
    return Core(gate, view, targets, relays, approvals, blocked, run_events, proofs, reply_readers)


def _announce_observe_mode(runtime: Runtime, own: GatewaySettings) -> None:
    """Announce observe mode at each start, before any request is forwarded: it must not go unnoticed."""
    warning = notice(own.observe)
    metrics.OBSERVED_TARGETS.set(len(own.observe))

    async def announce() -> None:
        log.warning("%s", warning)
        reason = Reason(code=Code.OBSERVE_MODE, message=warning)
        await runtime.event("finding", EventSubject.OBSERVE_MODE, about=(uuid.uuid4(),), reasons=(reason,))

    runtime.warns_when(lambda: warning)
    runtime.on_start(announce)


def spool_folder(runtime: Runtime, settings: ServiceSettings, own: GatewaySettings) -> Path:
    """The folder of this gateway's spool, which no other process uses once it is open."""
    return own.spool or settings.key_dir.parent / "spool" / _name(runtime)


def _recorder(runtime: Runtime, settings: ServiceSettings, own: GatewaySettings) -> Recorder:
    folder = spool_folder(runtime, settings, own)
    recorder = Recorder(Spool(folder, max_bytes=own.spool_max_bytes), runtime.publisher, runtime.tracing)
    runtime.background("actions", recorder.publish)
    runtime.background("spool", recorder.sync)
    return recorder


def _seal_keys(runtime: Runtime, settings: ServiceSettings, own: GatewaySettings) -> EncryptionKeys | None:
    """The keys that credentials are sealed to. Without them, only static secrets are injected."""
    path = own.seal_key_file or settings.key_dir / f"{_name(runtime)}{SEAL}"
    if own.seal_key_file is None and not path.exists():
        return None
    with of_setting("RINGFENCE_GATEWAY_SEAL_KEY_FILE"):
        keys = EncryptionKeys(path)
    runtime.on_keys(keys.reload)
    runtime.warns_when(lambda: keys.missing_key(runtime.trust, "gateway", runtime.clock))
    return keys


def _name(runtime: Runtime) -> str:
    """The name of this gateway, as in the names of its files (`ringfence init`)."""
    return runtime.key.id.rpartition("/")[2]
