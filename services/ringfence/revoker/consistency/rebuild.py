"""Rebuilds Redis from Kafka after data loss: when Redis may have forgotten leases.

Redis was emptied, restarted, restored from an old snapshot, or replaced by a replica that lagged behind. Each service
notices, and stops. One revoker then writes the records that are missing in Redis, or have a lower `seq` there. A record
that only Redis has stays if it continues Kafka's; otherwise Kafka's records replace it. Deadlines that passed meanwhile
are due at once, like any others.

Before the reading ends, the revoker writes a marker of the new epoch to every partition (ADR 0006). Records that were
written to the lost Redis and appended after the marker are void.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from functools import partial

from aiokafka.errors import KafkaError

from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Outbound
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.lease import Lease, LeaseEpoch
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import (
    FENCE_KEEP_MS,
    Knowledge,
    LeaseStore,
    LostError,
    RecordVersion,
    Restoration,
    SignedLease,
)
from ringfence.model.leases.epochs import marker_key
from ringfence.model.leases.lifecycle import comes_after, cut_before, follow, restated
from ringfence.model.leases.unverified_records import unverified_lease, verify_lease
from ringfence.model.records.directory import Directory
from ringfence.revoker.consistency.kafka_view import (
    HighestRecord,
    KafkaKnowledge,
    LeaseFold,
    RevocationIndex,
    read_leases,
    read_revocations,
    verify_records,
)

log = logging.getLogger(__name__)

_FAILED_S = 1.0
_BUSY_S = 0.2
_KEEP_EVERY_S = 3.0
_BATCH_SIZE = 500
_TRIES = 5
"""More tries than there are revokers that begin at the same moment."""
_CAUGHT_UP_WITHIN_S = 30.0
_NONE = RecordVersion()


class Rebuilder:
    """Rebuilds Redis when the lease store says that it is lost."""

    def __init__(self, runtime: Runtime, store: LeaseStore, directory: Directory) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        self._store = store
        self._directory = directory

    async def connect(self) -> None:
        """Connect to Redis, lost or not. Raises UnavailableError if it does not answer."""
        with contextlib.suppress(LostError):
            await self._store.connect()

    async def run(self) -> None:
        """Rebuild whenever Redis is lost, for ever."""
        while True:
            await self._store.until_lost()
            try:
                if not await self.rebuild():
                    await asyncio.sleep(_BUSY_S)
                await self.connect()
            except (RingfenceError, KafkaError, OSError) as error:
                log.warning("rebuilding Redis failed, again in %.0f s: %s", _FAILED_S, error)
                await asyncio.sleep(_FAILED_S)

    async def rebuild(self) -> bool:
        """Rebuild now. False if another revoker does. Raises UnavailableError, including LostError."""
        restoration = Restoration(self._settings, record_keep_ms=self._store.record_keep_ms)
        try:
            if not await restoration.begin():
                return False
            log.warning("Redis is not known to hold all leases: rebuilding it from Kafka")
            start = asyncio.get_running_loop().time()
            try:
                async with _keep_claim(restoration):
                    lease_count, restored = await self._rebuild(restoration)
            except BaseException:
                with contextlib.suppress(UnavailableError):
                    await restoration.give_up()
                raise
            took_s = asyncio.get_running_loop().time() - start
            log.warning(
                "Redis holds all %d leases again: %d were restored, in %.1f s", lease_count, restored, took_s
            )
            return True
        finally:
            await restoration.close()

    async def _rebuild(self, restoration: Restoration) -> tuple[int, int]:
        now_ms = self._runtime.clock.now_ms()
        new_fold = partial(
            LeaseFold, trust=self._runtime.trust, over_before_s=(now_ms - self._store.record_keep_ms) / 1000
        )
        if restoration.rebuild_all:
            broken = restoration.survey(await restoration.alive(), Knowledge(), now_ms).outbox_and_signers()
            if repaired := await restoration.repair(broken):
                log.warning("%d entries of outboxes and signers were wrong, and are mended", repaired)
        live_ids = await restoration.ids()
        fold = new_fold(needed=frozenset(live_ids))
        epoch = await self._read(restoration, fold)
        revocations = await self.revocations()
        unpublished = {id for id, _ in await restoration.waiting()}
        in_redis = await self._compare(restoration, dict.fromkeys([*fold.highest, *live_ids, *unpublished]))
        superseded = await self._reconcile_ahead(restoration, fold.highest, in_redis, epoch)
        await self._count_unpublished(
            restoration, [id for id, record in in_redis.items() if record.seq and id not in fold.highest]
        )
        behind = {
            id: record
            for id, record in fold.highest.items()
            if in_redis[id].seq <= record.seq or id in superseded
        }
        missing = {
            id: record
            for id, record in behind.items()
            if restoration.rebuild_all or in_redis[id].seq != record.seq or in_redis[id].epoch != record.epoch
        }
        needed = missing | self._live_and_revoked(behind, revocations)
        granted = {id: record for id, record in fold.highest.items() if record.granted}
        only_counted = granted.keys() - needed.keys() - fold.contested
        to_verify, restored = granted | needed, 0
        async for leases in verify_records(
            self._settings, self._runtime.trust, self._runtime.clock, to_verify, fold.contested, new_fold
        ):
            await restoration.count_grants(leases)
            # If Kafka's highest record does not verify, Redis may have that one as well.
            doubtful = [
                id
                for lease in leases
                if lease.claims.seq < in_redis.get(id := lease.claims.lease_id, _NONE).seq
            ]
            superseded |= await self._unverifiable(restoration, doubtful, in_redis)
            leases = [
                lease
                for lease in leases
                if (id := lease.claims.lease_id) not in only_counted
                and (id in superseded or in_redis.get(id, _NONE).seq <= lease.claims.seq)
            ]
            await restoration.restore(await self.cut_revoked(leases, revocations, epoch), superseded)
            restored += len(leases)
        if restoration.rebuild_all:
            ahead = [
                id
                for id, record in in_redis.items()
                if id not in superseded and record.seq > (fold.highest[id].seq if id in fold.highest else 0)
            ]
            await self._rewrite_unpublished(restoration, fold, ahead)
            knowledge = KafkaKnowledge(fold, fold.highest, revocations)
            survey = restoration.survey(await restoration.alive(), knowledge, now_ms)
            if repaired := await restoration.repair(survey.strays()):
                log.warning("%d entries did not follow from any lease, and are mended", repaired)
        await restoration.fence(revocations.fences(now_ms - FENCE_KEEP_MS))
        await restoration.first_seen(
            {id: revocation.at for id, revocation in revocations.by_id.items()}, now_ms
        )
        await restoration.resume(epoch)
        return len(fold.highest), restored

    async def _read(self, restoration: Restoration, fold: LeaseFold) -> str:
        """Read `lease` beyond a marker of this rebuild in each partition. Returns the epoch that the markers begin."""
        epochs: list[str] = []

        async def write_markers(follower: Follower) -> None:
            partitions = await self._runtime.publisher.partitions(LEASE)
            for _ in range(_TRIES):
                epoch = restoration.epoch(fold.epochs.highest() + 1)
                # Fails if the claim is lost: another revoker rebuilds then, and must not be disturbed.
                await restoration.keep()
                await gather_all([await self._send_marker(epoch, partition) for partition in partitions])
                if not await follower.caught_up(_CAUGHT_UP_WITHIN_S):
                    raise UnavailableError("Kafka does not give back the markers of the rebuild")
                if all(fold.epochs.of(partition) == epoch for partition in partitions):
                    epochs.append(epoch)
                    return
            raise UnavailableError("others begin to rebuild Redis at the same time")

        await read_leases(self._settings, fold, write_markers)
        return epochs[0]

    async def _send_marker(self, epoch: str, partition: int) -> Awaitable[object]:
        key, settings = self._runtime.key, self._settings
        marker = LeaseEpoch(
            iss=key.id,
            aud=settings.trust_domain,
            iat=self._runtime.clock.now_ms() // 1000,
            jti=derived_id(LeaseEpoch.typ, epoch, partition),
            epoch=epoch,
            partition=partition,
        )
        return await self._runtime.publisher.send(
            LEASE,
            marker.typ,
            Outbound(marker_key(epoch), sign(marker, key), id=marker.jti),
            partition=partition,
        )

    async def _compare(self, restoration: Restoration, lease_ids: Iterable[str]) -> dict[str, RecordVersion]:
        """The version of the record that Redis has of each lease."""
        ids = list(lease_ids)
        versions: dict[str, RecordVersion] = {}
        for start in range(0, len(ids), _BATCH_SIZE):
            versions |= await restoration.compare(ids[start : start + _BATCH_SIZE])
        return versions

    async def _reconcile_ahead(
        self,
        restoration: Restoration,
        highest: Mapping[str, HighestRecord],
        in_redis: Mapping[str, RecordVersion],
        epoch: str,
    ) -> dict[str, int]:
        """Reconcile leases of which Redis has a record that Kafka does not have.

        A record that continues Kafka's is queued for publication, signed for the new epoch. Returns the other leases,
        with the `seq` that Redis has: another process continued them meanwhile in another epoch, and Kafka has that.
        """
        superseded = {
            id: in_redis[id].seq
            for id, one in highest.items()
            if in_redis[id].epoch != one.epoch and in_redis[id].seq == one.seq
        }
        ahead = [
            id
            for id, one in in_redis.items()
            if (one.epoch is not None or id in highest)
            and one.seq > (highest[id].seq if id in highest else 0)
        ]
        for start in range(0, len(ahead), _BATCH_SIZE):
            for id, stored in (await restoration.records(ahead[start : start + _BATCH_SIZE])).items():
                lease, before = self._verify(id, stored.jws), None
                if lease is None:
                    if id in highest:  # it does not verify: Kafka's record replaces it
                        superseded[id] = in_redis[id].seq
                    continue  # the next reader reports it
                if lease.epoch is None:
                    continue
                if id in highest:
                    before = self._verify(id, highest[id].jws)
                    if before is None:
                        continue
                if not comes_after(before, lease):
                    superseded[id] = lease.seq
                    continue
                cut = cut_before(lease)
                missing = [cut] if cut is not None and (before is None or before.seq < cut.seq) else []
                key = self._runtime.key
                await restoration.queue(
                    [
                        SignedLease(one, sign(one, key))
                        for one in (restated(claims, by=key.id, epoch=epoch) for claims in [*missing, lease])
                    ]
                )
        return superseded

    async def _unverifiable(
        self, restoration: Restoration, ids: Sequence[str], in_redis: Mapping[str, RecordVersion]
    ) -> dict[str, int]:
        """The leases whose record in Redis does not verify, with its `seq`."""
        if not ids:
            return {}
        stored = await restoration.records(ids)
        return {
            id: in_redis[id].seq for id in ids if id in stored and self._verify(id, stored[id].jws) is None
        }

    async def _rewrite_unpublished(
        self, restoration: Restoration, fold: LeaseFold, ahead: Iterable[str]
    ) -> None:
        """Rewrite the keys of leases whose latest record only Redis has, and queue those records for publication.

        A record that does not verify is removed, unless Kafka knows the lease.
        """
        unknown = [id async for id in restoration.ended() if not fold.knows(id)]
        lease_ids = list(dict.fromkeys([*ahead, *unknown]))
        for start in range(0, len(lease_ids), _BATCH_SIZE):
            valid: list[SignedLease] = []
            unverifiable: list[str] = []
            for id, stored in (await restoration.records(lease_ids[start : start + _BATCH_SIZE])).items():
                lease = self._verify(id, stored.jws)
                if lease is not None:
                    valid.append(SignedLease(lease, stored.jws.decode("ascii")))
                elif not fold.knows(id):
                    unverifiable.append(id)
            if unverifiable:
                log.error(
                    "%d leases in Redis are nobody's word, and taken away: %s",
                    len(unverifiable),
                    unverifiable[:10],
                )
                await restoration.drop(unverifiable)
            ids = [lease.claims.lease_id for lease in valid]
            published = {id: fold.highest[id].seq if id in fold.highest else 0 for id in ids}
            await restoration.rewrite(valid, published)
            waiting = await restoration.queued([(lease.claims.lease_id, lease.claims.seq) for lease in valid])
            # A record that was signed again for the new epoch replaces its former version in the outbox.
            await restoration.queue(
                [
                    lease
                    for lease, jws in zip(valid, waiting, strict=True)
                    if jws is None or self._verify(lease.claims.lease_id, jws) is None
                ],
                instead=True,
            )

    async def _count_unpublished(self, restoration: Restoration, ids: Sequence[str]) -> None:
        """Count leases that only Redis has for the grants that they name: a lost shard may have held the counts."""
        for start in range(0, len(ids), _BATCH_SIZE):
            stored = await restoration.records(ids[start : start + _BATCH_SIZE])
            leases = ((self._verify(id, record.jws), record.jws) for id, record in stored.items())
            await restoration.count_grants(
                [SignedLease(lease, jws.decode("ascii")) for lease, jws in leases if lease is not None]
            )

    def _verify(self, lease_id: str, jws: bytes) -> Lease | None:
        try:
            lease = verify_lease(jws, self._runtime.trust, self._runtime.clock)
        except InvalidMessageError:
            return None
        return lease if lease.lease_id == lease_id else None

    def _live_and_revoked(
        self, highest: Mapping[str, HighestRecord], revocations: RevocationIndex
    ) -> dict[str, HighestRecord]:
        """The active leases that a selector seems to cover, by their unverified claims."""
        if not revocations.by_id:
            return {}
        live = ((id, record) for id, record in highest.items() if record.status == "active")
        return {
            id: record
            for id, record in live
            if (lease := unverified_lease(record.jws)) is not None and revocations.covering(lease)
        }

    # --- leases that were revoked while Redis did not have them ---

    async def revocations(self) -> RevocationIndex:
        """The revocations with selectors that count. Raises UnavailableError."""
        return await read_revocations(self._settings, self._directory, self._runtime.trust)

    async def cut_revoked(
        self, leases: Sequence[SignedLease], revocations: RevocationIndex, epoch: str
    ) -> list[SignedLease]:
        """Cut the active leases that were revoked, in this epoch, and publish the cuts. Returns all leases.

        When they were revoked, no revoker found them, as Redis did not have them. Leases that are being minted need no
        cut: the fence keeps them from being activated.
        """
        cut: list[SignedLease] = []
        acknowledged = []
        for lease in leases:
            revocation = revocations.covering(lease.claims) if lease.claims.status == "active" else None
            if revocation is None:
                cut.append(lease)
                continue
            key = self._runtime.key
            ending = follow(lease.claims, "ending", by=key.id, cause=revocation.cause(), epoch=epoch)
            cut.append(SignedLease(ending, sign(ending, key)))
            acknowledged.append(await self._send(cut[-1]))
        if acknowledged:
            log.warning("%d leases are cut that had been revoked and went on", len(acknowledged))
            await gather_all(acknowledged)
        return cut

    async def _send(self, lease: SignedLease) -> Awaitable[object]:
        claims = lease.claims
        return await self._runtime.publisher.send(
            LEASE,
            Lease.typ,
            Outbound(claims.lease_id, lease.jws, id=claims.jti, traceparent=claims.traceparent),
        )


@contextlib.asynccontextmanager
async def _keep_claim(restoration: Restoration) -> AsyncIterator[None]:
    """Renew the claim on the rebuild in the background. If that fails, the rebuild fails at its next step."""

    async def keep() -> None:
        while True:
            await asyncio.sleep(_KEEP_EVERY_S)
            await restoration.keep()

    keeping = asyncio.create_task(keep(), name="rebuild claim")
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
