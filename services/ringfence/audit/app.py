"""Wiring of the audit service, and its handler for records that fail verification on topics that no service consumes.

The handler dead-letters them; such topics yield no events themselves. A message that an audit service signed for
`audit.checkpoint` is never dead-lettered. Each dead letter makes an event, each event extends the hash chain, and
each longer chain gets a checkpoint: two versions that could not read each other's checkpoints would go on for ever.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from faststream import FastStream

from ringfence.audit.api import ApprovalHistoryApi, AuditApi, ProofApi, ReportApi
from ringfence.audit.detections.detector import Detector
from ringfence.audit.index.store import SqliteIndex
from ringfence.audit.records import AuditHandlers
from ringfence.audit.settings import AuditSettings
from ringfence.audit.subscribers import router
from ringfence.audit.trail.chain_writer import ChainWriter, WrittenEventCache
from ringfence.audit.trail.handover import HandoverCache, Intake
from ringfence.audit.trail.proofs import ProofStore
from ringfence.audit.trail.unauthorised_records import UnauthorisedRecords
from ringfence.audit.verification import RecordVerifier, require_trust
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.settings import ServiceSettings, load, of_setting
from ringfence.kernel.crypto.jws import UnverifiedJws, parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.service.service_description import describe, placeholder
from ringfence.messages.audit import AuditCheckpoint, AuditWitness
from ringfence.messages.base import Claims, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.operations import Heartbeat
from ringfence.messages.signals import SignalStream
from ringfence.messages.topics import ALL, AUDIT, AUDIT_CHECKPOINT, RUN, TRUST
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.alarms import report_alarms
from ringfence.model.records.api_access import Authenticator
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import RUN_TABLES, Directory
from ringfence.model.records.signed_messages import SessionEvents

_CAUGHT_UP_S = 2.0
_ELSEWHERE = frozenset(
    typ_header(model)
    for topic in ALL
    for model in topic.models
    if topic is not AUDIT_CHECKPOINT and issubclass(model, Claims)
)
"""The typs of messages that belong on other topics. Here they are invalid, whoever signed them."""


class MalformedRecordHandler:
    """Verifies heartbeats, checkpoints, witness statements and signal streams. Those that fail are dead-lettered.

    One consumer group reads each record once, whichever replica does it. Valid records have no effect here.
    """

    def __init__(
        self,
        trust: TrustStore,
        directory: Directory,
        clock: Clock,
        caught_up: Callable[[float], Awaitable[bool]],
    ) -> None:
        """`caught_up`: `Runtime.tables_caught_up` for the tables in `directory`."""
        self._trust = trust
        self._directory = directory
        self._clock = clock
        self._caught_up = caught_up

    async def heartbeat(self, record: Received) -> None:
        """Verify a record of `heartbeat`. Raises InvalidMessageError if it fails, UnavailableError without trust."""
        self._require_trust(record)
        find = self._trust.finder(*Heartbeat.signed_by, at_s=record.appended_at_ms / 1000)
        verify(parse(record.value), Heartbeat, find, audience=self._trust.trust_domain)

    async def signal_stream(self, record: Received) -> None:
        """Likewise for `signal.stream`."""
        self._require_trust(record)
        find = self._trust.finder(*SignalStream.signed_by, at_s=record.appended_at_ms / 1000)
        claims = verify(parse(record.value), SignalStream, find, audience=self._trust.trust_domain).claims
        _check_place(record, claims.receiver)

    async def checkpoint(self, record: Received) -> None:
        """Likewise for `audit.checkpoint`."""
        self._require_trust(record)
        jws, at_s = parse(record.value), record.appended_at_ms / 1000
        if jws.header.typ == typ_header(AuditWitness):
            await self._witness(record, jws)
        elif jws.header.typ in _ELSEWHERE or not self._trust.signed_by_service(
            jws, at_s, AuditCheckpoint.signed_by
        ):
            find = self._trust.finder(*AuditCheckpoint.signed_by, at_s=at_s)
            verify(jws, AuditCheckpoint, find, audience=self._trust.trust_domain)

    async def _witness(self, record: Received, jws: UnverifiedJws) -> None:
        try:
            self._verify_witness(record, jws)
        except (InvalidMessageError, ChainError):
            if not await self._caught_up(_CAUGHT_UP_S):
                raise UnavailableError("the local tables may be behind a witness's word") from None
            try:
                self._verify_witness(record, jws)
            except ChainError as error:
                raise InvalidMessageError(str(error), code=error.code) from None

    def _verify_witness(self, record: Received, jws: UnverifiedJws) -> None:
        at_ms, chains = record.appended_at_ms, self._directory.chains
        claims = verify(
            jws, AuditWitness, lambda iss, kid: chains.user_key(iss, kid, at_ms), audience=self._trust.trust_domain
        ).claims  # fmt: skip
        auditor = subject_of(self._trust.trust_domain, claims.iss, "user") or ""
        if "auditor" not in chains.roles_at(auditor, at_ms):
            raise InvalidMessageError("whoever signed it is no auditor", code=Code.NOT_AUDITOR)
        _check_place(record, f"{claims.tree}/{auditor}")

    def _require_trust(self, record: Received) -> None:
        require_trust(self._trust, [record], self._clock.now_ms())


def _check_place(record: Received, key: str) -> None:
    """Require the record's own key. Compaction keeps the last record of a key, so a wrong key would erase another's."""
    if record.key != key:
        raise InvalidMessageError("it stands under another key than its own", code=Code.WRONG_KEY)


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
        """All of one topic, as they come."""
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
            heartbeat=followed.heartbeat,
            checkpoint=followed.checkpoint,
            signal_stream=followed.signal_stream,
            intake=chain.on_batch,
            on_intake_assigned=chain.on_assigned,
            # By itself, as above: it halts at nothing.
            dead_letters=DeadLetters(
                runtime.publisher, runtime.role, runtime.clock, trust_moved=runtime.trust_moved
            ),
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
            heartbeat=placeholder,
            checkpoint=placeholder,
            signal_stream=placeholder,
            intake=placeholder,
            on_intake_assigned=placeholder,
            dead_letters=None,
            linger_ms=0,
        ),
    )
