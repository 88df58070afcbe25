"""Wiring of the audit service."""

from __future__ import annotations

from collections.abc import Sequence

from faststream import FastStream

from ringfence.audit.api import ApprovalHistoryApi, AuditApi, ProofApi, ReportApi
from ringfence.audit.detections.detector import Detector
from ringfence.audit.index.store import SqliteIndex
from ringfence.audit.malformed_records import MalformedRecordHandler
from ringfence.audit.records import AuditHandlers
from ringfence.audit.settings import AuditSettings
from ringfence.audit.subscribers import VerificationHandlers, router
from ringfence.audit.trail.chain_writer import ChainWriter, WrittenEventCache
from ringfence.audit.trail.handover import HandoverCache, Intake
from ringfence.audit.trail.proofs import ProofStore
from ringfence.audit.trail.unauthorised_records import UnauthorisedRecords
from ringfence.audit.verification import RecordVerifier
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.settings import ServiceSettings, load, of_setting
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.service.service_description import describe, placeholder
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, RUN, TRUST
from ringfence.model.records.alarms import report_alarms
from ringfence.model.records.api_access import Authenticator
from ringfence.model.records.directory import RUN_TABLES, Directory
from ringfence.model.records.signed_messages import SessionEvents

_AT_ONCE = 32
"""Events of the trail that are parsed and then taken in: more of them do not stay in the caches of a core, and parsing
alone takes twice as long."""


def build(settings: ServiceSettings, own: AuditSettings | None = None, clock: Clock | None = None) -> Runtime:
    """Build the audit service; `Runtime.run` starts it."""
    own = own or load(AuditSettings)
    runtime = Runtime("audit", settings, clock)
    # Audit denies nothing, so a table that is behind is no reason to stop: what it cannot verify it says so.
    directory = Directory(runtime.trust, runtime.clock, grace_ms=None, on_alarm=report_alarms(runtime))
    verifier = RecordVerifier(runtime.trust, directory, own)
    with of_setting("RINGFENCE_STATE_DIR"):
        index = SqliteIndex(settings.state_dir / own.index_file if settings.state_dir is not None else None)
        proofs = ProofStore(
            runtime.trust, settings.state_dir / own.tree_file if settings.state_dir is not None else None
        )
    lately, read_back, unauthorised = HandoverCache(), WrittenEventCache(), UnauthorisedRecords()
    intake = Intake(runtime.publisher, runtime.believed_key, settings.trust_domain, runtime.clock, lately)
    handlers = AuditHandlers(
        intake,
        verifier,
        runtime.clock,
        runtime.trust,
        index.use_of_break_glass,
        # By itself, as it halts at nothing: audit goes on telling whatever the others halt at.
        send_dead_letter=DeadLetters(runtime.publisher, runtime.role, runtime.clock).send,
        settle_ms=own.settle_ms,
    )
    directory.on_change(handlers.on_change)
    runtime.history([TRUST], handlers.bundles.on_records, since_ms=0, linger_ms=own.linger_ms)

    def on_runs(records: Sequence[Received]) -> None:
        directory.on_records(records)
        handlers.retry_pending()

    runtime.table(RUN_TABLES, directory.on_records)
    runtime.table([RUN], on_runs)

    detector = Detector(own, index, intake, runtime.clock, settings.trust_domain) if own.detect else None

    def on_trail(records: Sequence[Received]) -> None:
        if records[0].topic is AUDIT_CHECKPOINT:
            proofs.add_checkpoints(records)
            return
        unauthorised.read(records)
        for start in range(0, len(records), _AT_ONCE):
            some = records[start : start + _AT_ONCE]
            trailed = read_back.parse(some)
            events = [one.event for one in trailed]
            index.add(some, events)
            proofs.add_events(some, trailed)
            if detector is not None:
                detector.on_records(some, events)

    # Nobody waits for an event, so records gather first: a fetch and a commit cost as much for one as for hundreds.
    indexed = runtime.history([AUDIT, AUDIT_CHECKPOINT], on_trail, since_ms=0, linger_ms=own.linger_ms)
    if detector is not None:
        each_s = max(0.1, own.linger_ms / 1000)
        runtime.background("detections", lambda: detector.publish_always(indexed.complete, each_s))
    followed = MalformedRecordHandler(runtime.trust, directory, runtime.clock, runtime.tables_caught_up)
    chain = ChainWriter(runtime, own.checkpoint_s, lately, read_back, unauthorised)
    runtime.consume(
        router(
            audited=handlers.handle_batch,
            verified=VerificationHandlers(
                followed.heartbeat,
                followed.checkpoint,
                followed.signal_stream,
                # By itself, as above: it halts at nothing.
                DeadLetters(runtime.publisher, runtime.role, runtime.clock, trust_moved=runtime.trust_moved),
            ),
            intake=chain.on_batch,
            on_intake_assigned=chain.on_assigned,
            linger_ms=own.linger_ms,
        )
    )
    runtime.background("checkpoints", chain.publish_checkpoints)
    runtime.background("strays", chain.dead_letter_unauthorised)

    async def close() -> None:
        index.close()
        proofs.close()

    runtime.on_stop(close)
    runtime.on_stop(chain.close)
    authenticator = Authenticator(directory, runtime.role, runtime.clock, SessionEvents(runtime))
    api = AuditApi(index, directory, runtime.clock, authenticator, indexed.complete.is_set)
    runtime.routes += [*api.routes(), *ProofApi(index, proofs, api.viewer).routes()]
    runtime.routes += ReportApi(index, runtime.clock, api.viewer, indexed.complete.is_set).routes()
    runtime.routes += ApprovalHistoryApi(index, api.viewer, indexed.complete.is_set).routes()
    return runtime


def described() -> FastStream:
    """The topics that the service consumes and publishes, for AsyncAPI. Needs no settings, keys or broker."""
    return describe(
        "audit",
        router(
            audited=placeholder,
            verified=VerificationHandlers(placeholder, placeholder, placeholder, dead_letters=None),
            intake=placeholder,
            on_intake_assigned=placeholder,
            linger_ms=0,
        ),
    )
