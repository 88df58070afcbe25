"""The audit service, put together."""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.audit.asking_http import AskingApi
from ringfence.audit.believing import Believer
from ringfence.audit.chaining import GROUP, STRAYS_GROUP, ChainWriter
from ringfence.audit.detector import Detector
from ringfence.audit.followed import Followed
from ringfence.audit.handlers import AuditHandlers
from ringfence.audit.http import AuditApi
from ringfence.audit.intake import Intake, Lately
from ringfence.audit.proofs import ProofStore
from ringfence.audit.proofs_http import ProofApi
from ringfence.audit.read_back import ReadBack
from ringfence.audit.settings import AuditSettings
from ringfence.audit.store import SqliteIndex
from ringfence.audit.strays import Strays
from ringfence.kernel.bus import DeadLetters
from ringfence.kernel.clock import Clock
from ringfence.kernel.kafka import Received
from ringfence.kernel.process import run
from ringfence.kernel.runtime import Runtime
from ringfence.kernel.settings import ServiceSettings, load, of_setting
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDIT_INTAKE, TRUST
from ringfence.model.access import Authenticator
from ringfence.model.alarms import report_alarms
from ringfence.model.directory import TABLES, Directory

_AT_ONCE = 32
"""Events of the trail that are parsed and then taken in: more of them do not stay in the caches of a core, and parsing
alone takes twice as long."""

_PATIENTLY = 10
"""So many times as long do heartbeats and the like gather: nothing is made of those that hold."""


def build(settings: ServiceSettings, own: AuditSettings | None = None, clock: Clock | None = None) -> Runtime:
    """Everything that audit is made of, started by `Runtime.run`."""
    own = own or load(AuditSettings)
    runtime = Runtime("audit", settings, clock)
    # Audit denies nothing, so a table that is behind is no reason to stop: what it cannot verify it says so.
    directory = Directory(runtime.trust, runtime.clock, grace_ms=None, on_alarm=report_alarms(runtime))
    believer = Believer(runtime.trust, directory, own)
    with of_setting("RINGFENCE_STATE_DIR"):
        index = SqliteIndex(settings.state_dir / own.index_file if settings.state_dir is not None else None)
        proofs = ProofStore(
            runtime.trust, settings.state_dir / own.tree_file if settings.state_dir is not None else None
        )
    lately, read_back, strays = Lately(), ReadBack(), Strays()
    intake = Intake(runtime.publisher, runtime.believed_key, settings.trust_domain, runtime.clock, lately)
    handlers = AuditHandlers(
        intake,
        believer,
        runtime.clock,
        runtime.trust,
        index.use_of_break_glass,
        # By itself, as it halts at nothing: audit goes on telling whatever the others halt at.
        bury=DeadLetters(runtime.publisher, runtime.role, runtime.clock).bury,
        settle_ms=own.settle_ms,
    )
    directory.on_change(handlers.on_change)
    runtime.history([TRUST], handlers.bundles.on_records, since_ms=0, linger_ms=own.linger_ms)
    runtime.table(TABLES, directory.on_records)

    detector = Detector(own, index, intake, runtime.clock, settings.trust_domain) if own.detect else None

    def on_trail(records: Sequence[Received]) -> None:
        """All of one topic, as they come."""
        if records[0].topic is AUDIT_CHECKPOINT:
            proofs.add_checkpoints(records)
            return
        strays.read(records)
        for start in range(0, len(records), _AT_ONCE):
            some = records[start : start + _AT_ONCE]
            trailed = read_back.of(some)
            events = [one.event for one in trailed]
            index.add(some, events)
            proofs.add_events(some, trailed)
            if detector is not None:
                detector.on_records(some, events)

    # Nobody waits for an event, so records gather first: a fetch and a commit cost as much for one as for hundreds.
    indexed = runtime.history([AUDIT, AUDIT_CHECKPOINT], on_trail, since_ms=0, linger_ms=own.linger_ms)
    if detector is not None:
        each_s = max(0.1, own.linger_ms / 1000)
        runtime.background("detections", lambda: detector.tell_always(indexed.complete, each_s))
    runtime.consume(
        "audit", handlers.batches(), max_records=1000, linger_ms=own.linger_ms, from_the_first=True
    )
    _look_at_what_is_followed(runtime, own, directory)
    _chain(runtime, own, ChainWriter(runtime, own.checkpoint_s, lately, read_back, strays))
    authenticator = Authenticator(directory, runtime.role, runtime.clock)
    api = AuditApi(index, directory, runtime.clock, authenticator, indexed.complete.is_set)
    runtime.routes += [*api.routes(), *ProofApi(index, proofs, api.viewer).routes()]
    runtime.routes += AskingApi(index, runtime.clock, api.viewer, indexed.complete.is_set).routes()

    async def close() -> None:
        index.close()
        proofs.close()

    runtime.on_stop(close)
    return runtime


def _look_at_what_is_followed(runtime: Runtime, own: AuditSettings, directory: Directory) -> None:
    # By itself, as above: it halts at nothing.
    letters = DeadLetters(runtime.publisher, runtime.role, runtime.clock, trust_moved=runtime.trust_moved)
    followed = Followed(runtime.trust, directory, runtime.clock, letters, runtime.tables_caught_up)
    runtime.consume(
        STRAYS_GROUP,
        followed.batches(),
        max_records=100,
        linger_ms=_PATIENTLY * own.linger_ms,
        # Strangers may leave transactions open anywhere.
        uncommitted=True,
        # Heartbeats go after an hour, and nothing that is true is lost with them here.
        tell_gone=False,
    )


def _chain(runtime: Runtime, own: AuditSettings, chain: ChainWriter) -> None:
    runtime.consume(
        GROUP,
        {AUDIT_INTAKE: chain.on_batch},
        max_records=1000,
        linger_ms=own.linger_ms,
        on_assigned=chain.on_assigned,
        alone=True,
        from_the_first=True,
    )
    runtime.background("checkpoints", chain.sign_now_and_then)
    runtime.background("strays", chain.bury_strays)
    runtime.on_stop(chain.close)


def main() -> int:
    """The process `ringfence serve audit`."""
    settings = load(ServiceSettings)
    return run([build(settings)], settings)
