"""Wiring of the revoker."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from faststream import FastStream

from ringfence.backends import BackendContext, BackendSettings, CircuitBreaker, TargetAccess, all_backends
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.service.service_description import describe, placeholder
from ringfence.messages.topics import HEARTBEAT, LEASE, REVOCATION_ACK, REVOCATION_REQUEST
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.stream_digests import StreamDigests
from ringfence.model.records.alarms import report_alarms
from ringfence.model.records.api_access import Authenticator
from ringfence.model.records.directory import RUN_TABLES, Directory
from ringfence.model.records.signed_messages import SessionEvents
from ringfence.revoker.consistency.lease_watch import BACK_MS, LINGER_MS, IssuedLeaseRecheck, LeaseWatch
from ringfence.revoker.consistency.rebuild import Rebuilder
from ringfence.revoker.http import LeasesApi, RunsApi
from ringfence.revoker.lease_end.credential_removal import CredentialRemover
from ringfence.revoker.lease_end.expiry import Expiry, Overdue
from ringfence.revoker.lease_end.lease_ender import LeaseEnder, OwnRecordCache
from ringfence.revoker.maintenance import HeartbeatSender, LeaseTombstoner, OrphanSweeper
from ringfence.revoker.revocations.cut_confirmation import CutTracker
from ringfence.revoker.revocations.record_changes import RecordHandler
from ringfence.revoker.revocations.revocations import FenceHandler, RevocationHandler
from ringfence.revoker.revocations.runner_silence import (
    RunEndHandler,
    RunnerSilence,
    RunRevoker,
    SilentRunEnder,
)
from ringfence.revoker.revocations.verification import RevocationVerifier
from ringfence.revoker.runner_pools import RunnerPools
from ringfence.revoker.settings import PATIENCE_S, RevokerSettings
from ringfence.revoker.subscribers import GROUP, router

_ACKS_BACK_MS = 10 * 60 * 1000
"""How far back acknowledgements of gateways are read at the start: revocations that waited for this revoker may have
them already."""


def build(
    settings: ServiceSettings, own: RevokerSettings | None = None, clock: Clock | None = None
) -> Runtime:
    """The revoker, wired and not yet started: `Runtime.run` starts it."""
    own = own or load(RevokerSettings)
    runtime = Runtime("revoker", settings, clock)
    # The revoker only ends and narrows, so a stale table is no reason to stop: no grace.
    directory = Directory(runtime.trust, runtime.clock, grace_ms=None, on_alarm=report_alarms(runtime))
    store = LeaseStore(settings, runtime.clock, record_keep_ms=own.record_keep_s * 1000)
    access = TargetAccess.of(load(BackendSettings))
    backends = all_backends(BackendContext(settings.trust_domain, settings.issuer_url, access=access))
    longest_delay_ms = int(own.undo_longest_delay_s * 1000)
    breaker = CircuitBreaker(
        concurrency=own.undo_concurrency,
        deadline_s=own.undo_deadline_s,
        longest_shut_s=own.undo_longest_delay_s,
    )
    overdue = Overdue(
        runtime, store, after_ms=int(own.overdue_after_s * 1000), forget_ms=3 * longest_delay_ms
    )
    remover = CredentialRemover(
        store, backends, breaker, overdue, runtime.clock, runtime.tracing, longest_delay_ms=longest_delay_ms
    )
    stateless = [kind for kind, backend in backends.items() if backend.stateless]
    own_records = OwnRecordCache()
    ender = LeaseEnder(
        runtime, store, stateless, remover.enqueue, own_records.add, visibility_ms=own.visibility_ms
    )
    expiry = Expiry(store, ender, own, runtime.clock)
    cuts = CutTracker(runtime.trust, runtime.clock, grace_ms=int(settings.grace_s * 1000))
    rebuilder = Rebuilder(runtime, store, directory)
    verifier = RevocationVerifier(runtime, directory, patience_s=PATIENCE_S)
    revocations = RevocationHandler(runtime, verifier, store, ender, cuts)
    records = RecordHandler(runtime, directory, verifier, store, ender, patience_s=PATIENCE_S)
    since_ms = runtime.clock.now_ms() - BACK_MS
    watch = LeaseWatch(store, runtime.trust, ender, rebuilder, runtime.clock, own_records, since_ms=since_ms)

    pools = RunnerPools(runtime.trust)
    silence = RunnerSilence(
        runtime.trust, directory.runs, own_id=runtime.key.id, grace_ms=int(settings.run_grace_s * 1000)
    )
    run_revoker = RunRevoker(runtime, ender)

    def on_heartbeats(records: Sequence[Received]) -> None:
        directory.on_records(records)
        silence.on_heartbeats(records)
        pools.on_heartbeats(records)
        cuts.on_heartbeats(records)

    runtime.table(RUN_TABLES, directory.on_records)
    runtime.table([HEARTBEAT], on_heartbeats)
    on_acks = runtime.redeliver_after_rotation(cuts.on_acks)
    acks = runtime.history([REVOCATION_ACK], on_acks, since_ms=runtime.clock.now_ms() - _ACKS_BACK_MS)
    streams = StreamDigests()

    def on_leases(records: Sequence[Received]) -> None:
        streams.on_records(records)
        watch.on_records(records)

    leases = runtime.history([LEASE], on_leases, since_ms=since_ms, linger_ms=LINGER_MS)
    runtime.history([REVOCATION_REQUEST], streams.on_records, since_ms=since_ms, linger_ms=LINGER_MS)
    runtime.background("heartbeat", HeartbeatSender(runtime, streams, leases).run)
    runtime.on_start(rebuilder.connect)
    runtime.on_stop(access.close)
    for backend in backends.values():
        runtime.on_stop(backend.close)
    runtime.on_stop(store.close)
    runtime.ready_when(store.unready)
    runtime.warns_when(store.warning)
    runtime.background("redis-watch", store.watch)
    runtime.background("rebuild", rebuilder.run)
    runtime.background("lease-watch", partial(watch.run, leases))
    runtime.background("cut-confirmation", partial(cuts.run, acks.caught_up))
    runtime.background("outbox-clearing", store.clear_outbox)
    runtime.background("credential-removal", partial(remover.run, ender.end_removed))
    runtime.background("expiry", expiry.run)
    runtime.background("expired-events", expiry.listen)
    runtime.background("expired-scan", expiry.scan)
    runtime.background("outbox", expiry.sweep)
    issued = IssuedLeaseRecheck(
        runtime, directory, store, own_records, patience_s=PATIENCE_S, is_silent=silence.is_silent
    )

    async def on_issued(batch: Sequence[Received]) -> None:
        await issued(batch)
        await watch.catch_up(batch)

    consumers = runtime.consume(
        router(
            revocations=revocations,
            fences=FenceHandler(verifier, store, cuts),
            record_change=records,
            run_end=RunEndHandler(runtime, directory, run_revoker, patience_s=PATIENCE_S),
            issued=on_issued,
            dead_letters=runtime.dead_letters,
            run_dead_letters=DeadLetters(
                runtime.publisher,
                runtime.role,
                runtime.clock,
                runtime.trust,
                runtime.trust_moved,
                halts=False,
            ),
        )
    )

    def is_leader() -> bool:
        """Periodic work is done by one revoker: the one that has the first partition of `revocation.request`."""
        return consumers[GROUP].owns(REVOCATION_REQUEST.name(settings.topic_prefix), 0)

    sweeper = OrphanSweeper(runtime, store, directory, backends, breaker, is_leader, own)
    tombstoner = LeaseTombstoner(runtime, is_leader, after_s=own.forget_after_s, every_s=own.forget_every_s)
    silent_runs = SilentRunEnder(runtime, silence, run_revoker, is_leader, patience_s=PATIENCE_S)
    runtime.background("orphan-sweep", sweeper.run)
    runtime.background("silent-runs", silent_runs.run)
    runtime.background("retention", tombstoner.run)
    authenticator = Authenticator(directory, runtime.role, runtime.clock, SessionEvents(runtime))
    runtime.routes += LeasesApi(
        store, ender, overdue, directory, verifier, runtime.clock, authenticator
    ).routes()
    runtime.routes += RunsApi(directory, pools, runtime.broker_now_ms, runtime.clock, authenticator).routes()
    return runtime


def described() -> FastStream:
    """What the service consumes and publishes, for AsyncAPI. Needs no settings, keys or broker."""
    return describe(
        "revoker",
        router(
            revocations=placeholder,
            fences=placeholder,
            record_change=placeholder,
            run_end=placeholder,
            issued=placeholder,
            dead_letters=None,
            run_dead_letters=None,
        ),
    )
