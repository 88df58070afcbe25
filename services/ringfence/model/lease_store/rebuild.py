"""Rebuild of Redis after data loss, by one revoker at a time. Meanwhile every other use of Redis fails."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ringfence.kernel.base.settings import ServiceSettings
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import TERMINAL
from ringfence.model.lease_store.codec import unpack
from ringfence.model.lease_store.connection import Call, RedisConnection
from ringfence.model.lease_store.keys import (
    DAY_MS,
    ENDED,
    FENCE_KEEP_MS,
    ID_BYTES,
    REBUILD_ALL,
    RECORD_KEEP_MS,
    SELECTOR_KEEP_MS,
    Keys,
    is_kept,
    is_outbox_field,
    lease_of_field,
    outbox_field,
    shard_of,
    shard_of_key,
    uuid_bytes,
    uuid_text,
)
from ringfence.model.lease_store.script_args import (
    NO_LIMIT,
    parse_position,
    position_text,
    restore_args,
    use_grant_args,
    uses_of,
)
from ringfence.model.lease_store.scripts import (
    COMPARE,
    GET,
    GIVE_UP,
    QUEUE,
    RECOUNT,
    REPAIR,
    RESTORE,
    RESUME,
    Argument,
    Command,
    Script,
    all_ids,
    always,
    fencing,
    keys_of_lease,
)
from ringfence.model.lease_store.shards import epoch_name, epoch_server
from ringfence.model.lease_store.survey import Knowledge, LiveLease, Stray, Survey
from ringfence.model.lease_store.types import SignedLease, StoredLease

log = logging.getLogger(__name__)

CLAIM_MS = 15_000
"""How long a rebuild's claim lasts unless it is renewed; then another rebuild may begin."""
_BATCH_SIZE = 500


@dataclass(frozen=True, slots=True)
class RecordVersion:
    """Which record of a lease Redis has: `seq` 0 for none. Within an epoch, a lease has one record of each `seq`."""

    seq: int = 0
    epoch: str | None = None

    @classmethod
    def parse(cls, text: bytes) -> RecordVersion:
        seq, _, epoch = text.decode("ascii").partition(" ")
        return cls(int(seq), epoch or None)


@dataclass(frozen=True, slots=True)
class LeaseKeys:
    """The state of one lease in all keys of Redis."""

    stored: StoredLease | None
    live_until_ms: int | None
    """When its live key expires, -1 for never; None if there is none."""
    deadline_ms: int | None
    """Its deadline in the sorted set or a minute's set; None if it is in neither."""
    claimed: bool
    kept_until_ms: int | None
    """When the record of an ended lease expires, -1 for never; None if it has no such record."""
    selector_keys: frozenset[str]


class Restoration:
    """One rebuild of Redis; also reads Redis as it is, for a comparison with Kafka.

    Every method raises LostError if Redis was lost again meanwhile, or another revoker has taken the rebuild over.
    """

    def __init__(self, settings: ServiceSettings, *, record_keep_ms: int = RECORD_KEEP_MS) -> None:
        """Raises SettingsError if the URL is not one of Redis."""
        self._prefix = settings.redis_prefix
        self._keys = [Keys(self._prefix, shard) for shard in range(settings.redis_shards)]
        self._record_keep_ms = record_keep_ms
        self._run_ids: list[str] = []
        """The server of each shard."""
        self._link = RedisConnection(settings, lambda run_id: run_id in self._run_ids)
        self._nonce = secrets.token_hex(8)
        self.epochs: set[str] = set()
        """The epochs of the shards; set by `look`."""
        self._claim = ""
        """The value of this rebuild's claim: the server of the first shard, a dot, a nonce."""
        self.complete = False
        """Whether each shard has an epoch that is bound to its present server; set by `look`."""
        self._spread: set[int] = set()
        """The numbers of shards at the last rebuild, as the shards say; set by `look`."""
        self.rebuild_all = False
        """Whether all leases are to be written again, also those that Redis has; set by `begin`."""

    async def close(self) -> None:
        await self._link.close()

    # --- the rebuild ---

    async def look(self) -> None:
        """Read which servers there are, and their epochs. Comes first, unless `begin` is called."""
        size = len(self._keys)
        guard_keys = [*(at.epoch for at in self._keys), *(at.spread for at in self._keys)]
        answers = await self._link.inspect(guard_keys)
        epochs, spread = answers[:size], [count for _, count in answers[size:]]
        self._run_ids = [run_id for run_id, _ in epochs]
        self._claim = f"{self._run_ids[0]}.{self._nonce}"
        self._spread = {int(count) for count in spread if count is not None}
        self.complete = set(spread) == {b"%d" % size} and all(
            epoch is not None and epoch_server(epoch) == run_id for run_id, epoch in epochs
        )
        self.rebuild_all = any(epoch == REBUILD_ALL for _, epoch in epochs)
        self.epochs = {epoch_name(epoch) for _, epoch in epochs if epoch and epoch != REBUILD_ALL}

    async def begin(self, *, anyway: bool = False) -> bool:
        """Stop all other use of Redis. False if another rebuild is running, or Redis is complete: then nothing is done.

        `anyway`: also if Redis is complete.
        """
        await self.look()
        first, *others = self._keys
        await self._void_claim(first)
        lock = always("SET", first.rebuilding, self._claim, "NX", "PX", CLAIM_MS)
        if not (await self._link.pipeline([lock]))[0]:
            return False
        await self.look()  # the holder of the claim before may have finished
        if self.complete and not anyway:
            await self._link.scripts([self._call(GIVE_UP, first, (), ())])
            return False
        await self._link.pipeline(
            [
                ("DEL", first.epoch),
                *(always("SET", at.rebuilding, self._claim, "PX", CLAIM_MS) for at in others),
                *(("DEL", at.epoch) for at in others),
            ]
        )
        if self._spread - {len(self._keys)}:
            await self._empty()
        return True

    async def _empty(self) -> None:
        """Delete what shards hold if their number has changed: leases are in the wrong shards then.

        Shards that no longer exist are stopped first, in case some service still uses them.
        """
        former = max(self._spread)
        log.warning(
            "Redis was rebuilt for %d shards, and is emptied for %d (RINGFENCE_REDIS_SHARDS)",
            former,
            len(self._keys),
        )
        await self._link.pipeline([("DEL", Keys(self._prefix, shard).epoch) for shard in range(former)])
        deletions: list[Command] = []
        async for key in self._link.keys(f"{self._prefix}{{*}}:*"):
            deletions += [] if is_kept(key) else [("UNLINK", key)]
            if len(deletions) == _BATCH_SIZE:
                await self._link.pipeline(deletions)
                await self.keep()
                deletions = []
        await self._link.pipeline(deletions)

    async def _void_claim(self, first: Keys) -> None:
        """Delete a stale claim: one made on another server, of which this one has a copy, or one without an expiry."""
        claim, left_ms = await self._link.pipeline([("GET", first.rebuilding), ("PTTL", first.rebuilding)])
        if claim is not None and (left_ms == -1 or epoch_server(claim) != self._run_ids[0]):
            await self._link.scripts([Call(GIVE_UP, (first.rebuilding,), (claim,))])

    async def keep(self) -> None:
        """Renew the claim."""
        await self.compare([])

    def epoch(self, number: int) -> str:
        """The name of the epoch with this number that this rebuild would begin: no other rebuild uses the same."""
        return f"{number}.{self._nonce[:8]}"

    async def compare(self, lease_ids: Sequence[str]) -> dict[str, RecordVersion]:
        """Which record Redis has of each lease."""
        asked: dict[Keys, list[str]] = {at: [] for at in self._keys}
        for lease_id in lease_ids:
            asked[self._at(lease_id)].append(lease_id)
        calls = [self._call(COMPARE, at, (), (CLAIM_MS, *map(uuid_bytes, ids))) for at, ids in asked.items()]
        answers = await self._link.scripts(calls)
        return {
            id: RecordVersion.parse(text)
            for ids, had in zip(asked.values(), answers, strict=True)
            for id, text in zip(ids, had, strict=True)
        }

    async def restore(
        self, leases: Sequence[SignedLease], over: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """Write these verified records where Redis has none or a lower `seq`; with `rebuild_all`, also the same `seq`.

        `over`: leases whose record in Redis, up to this `seq`, does not count. Its copies in the outbox are removed
        too.
        """
        await self._link.scripts([self._restore(one, over.get(one.claims.lease_id, 0)) for one in leases])

    async def count_grants(self, leases: Sequence[SignedLease]) -> None:
        """Count these verified leases for the grants that they name."""
        calls = []
        for grant_id, lease_id in (use for one in leases for use in uses_of(one.claims)):
            at = self._at(grant_id)
            calls.append(self._call(RECOUNT, at, *use_grant_args(at, grant_id, lease_id, NO_LIMIT)))
        if calls:
            await self._link.scripts(calls)

    def _restore(self, lease: SignedLease, over_seq: int) -> Call:
        at = self._at(lease.claims.lease_id)
        over_seq = max(over_seq, lease.claims.seq if self.rebuild_all else 0)
        return self._call(RESTORE, at, *restore_args(at, lease, self._record_keep_ms, over_seq=over_seq))

    async def queue(self, leases: Sequence[SignedLease], *, instead: bool = False) -> None:
        """Put records that only Redis has into the outbox, unless they are there.

        `instead`: replace what is in the outbox under the same lease and `seq`.
        """
        if instead:
            fields = [
                (self._at(id), outbox_field(id, one.claims.seq))
                for one in leases
                for id in (one.claims.lease_id,)
            ]
            await self._repair([("HDEL", at.outbox, field) for at, field in fields])
        await self._link.scripts(
            [
                self._call(
                    QUEUE,
                    at := self._at(one.claims.lease_id),
                    (at.outbox, at.outbox_times),
                    (outbox_field(one.claims.lease_id, one.claims.seq), one.record),
                )
                for one in leases
            ]
        )

    async def fence(self, fences: Mapping[str, int]) -> None:
        """Restore fences (`issued_before` in ms, by selector key); higher ones stay."""
        await self._link.pipeline(
            [one for at in self._keys for one in fencing(at.fences, fences, FENCE_KEEP_MS)]
        )

    async def first_seen(self, positions: Mapping[str, Coordinates], now_ms: int) -> None:
        """Restore where selectors (derived ids) were seen first, with the expiry that this would have had."""
        commands = []
        for id, at in positions.items():
            left_ms = at.appended_at_ms + SELECTOR_KEEP_MS - now_ms
            keep_ms = min(max(left_ms, DAY_MS), SELECTOR_KEEP_MS)
            commands.append(always("SET", self._at(id).selector(id), position_text(at), "PX", keep_ms))
        await self._link.pipeline(commands)

    async def resume(self, epoch: str) -> None:
        """Redis is complete: all services may use it again, in this epoch."""
        await self._link.scripts(
            [
                self._call(
                    RESUME, at, (at.epoch, at.spread, at.begun), (f"{run_id}.{epoch}", len(self._keys))
                )
                for at, run_id in zip(self._keys, self._run_ids, strict=True)
            ]
        )

    async def give_up(self) -> None:
        """This rebuild failed: give up the claim."""
        await self._link.scripts([self._call(GIVE_UP, at, (), ()) for at in self._keys])

    async def declare_lost(self) -> None:
        """Stop all use of Redis until a revoker has rebuilt it completely."""
        await self.look()
        await self._link.pipeline([always("SET", at.epoch, REBUILD_ALL) for at in self._keys])

    async def is_under_way(self) -> bool:
        """Whether a rebuild is running now."""
        return bool((await self._link.pipeline([("EXISTS", self._keys[0].rebuilding)]))[0])

    # --- reading Redis as it is ---

    async def ids(self) -> list[str]:
        """All leases that have not ended by Redis's keys, including those that no revoker would claim.

        An id in the wrong shard is no lease.
        """
        commands = [one for at in self._keys for one in (all_ids(at), ("HKEYS", at.leases))]
        answers = iter(await self._link.pipeline(commands))
        return list(
            dict.fromkeys(
                id
                for at in self._keys
                for ids in (next(answers), next(answers))
                for id in (uuid_text(one) for one in ids if len(one) == ID_BYTES)
                if self._at(id) is at
            )
        )

    async def records(self, lease_ids: Sequence[str]) -> dict[str, StoredLease]:
        """The records of these leases; those without one are omitted. During a rebuild only."""
        calls = [self._call(GET, self._at(id), (), (uuid_bytes(id),)) for id in lease_ids]
        answers = await self._link.scripts(calls)
        return {
            id: StoredLease.parse(record) for id, (record,) in zip(lease_ids, answers, strict=True) if record
        }

    async def held(self, selector_keys: Mapping[str, Sequence[str]]) -> dict[str, LeaseKeys]:
        """The state of leases in Redis. `selector_keys`: by lease, the keys it should be found by, its agent's
        first."""
        commands: list[Command] = []
        for lease_id, some in selector_keys.items():
            at, id = self._at(lease_id), uuid_bytes(lease_id)
            commands += [
                keys_of_lease(at, id),
                *(_found_by(at, id, selector_key, some[0]) for selector_key in some),
            ]
        answers = iter(await self._link.pipeline(commands))
        return {lease_id: _lease_keys(answers, some) for lease_id, some in selector_keys.items()}

    async def waiting(self) -> set[tuple[str, int]]:
        """The records (lease id, `seq`) in the outbox."""
        answers = await self._link.pipeline([("HKEYS", at.outbox) for at in self._keys])
        return {lease_of_field(field) for fields in answers for field in fields if is_outbox_field(field)}

    async def queued(self, records: Sequence[tuple[str, int]]) -> list[bytes | None]:
        """The JWS of each record (lease id, `seq`) in the outbox, or None."""
        commands: list[Command] = [
            ("HGET", self._at(id).outbox, outbox_field(id, seq)) for id, seq in records
        ]
        return [unpack(one) if one is not None else None for one in await self._link.pipeline(commands)]

    def survey(self, alive: Mapping[str, LiveLease], knowledge: Knowledge, now_ms: int) -> Survey:
        """An integrity check of every key against the records that Redis has."""
        return Survey(self._link, self._prefix, self._keys, alive, knowledge, now_ms)

    async def alive(self) -> dict[str, LiveLease]:
        """Return the fields of each live lease that the integrity check needs."""
        ids, alive = await self.ids(), dict[str, LiveLease]()
        for start in range(0, len(ids), _BATCH_SIZE):
            for id, one in (await self.held(dict.fromkeys(ids[start : start + _BATCH_SIZE], ()))).items():
                if one.stored is not None and one.stored.status not in TERMINAL:
                    alive[id] = LiveLease.of(one.stored)
        return alive

    async def ended(self) -> AsyncIterator[str]:
        """The ids of all ended leases of which Redis still has records."""
        async for key in self._link.keys(f"{self._prefix}{{*}}:{ENDED}*"):
            id = key.partition(f"}}:{ENDED}".encode())[2]
            if len(id) == ID_BYTES:
                yield uuid_text(id)

    async def repair(self, strays: AsyncIterator[Stray]) -> int:
        """Repair stray entries. During a rebuild only. Returns how many there were."""
        count, commands = 0, list[Command]()
        async for one in strays:
            count += 1
            commands += one.repair
            if len(commands) >= _BATCH_SIZE:
                await self._repair(commands)
                commands = []
        await self._repair(commands)
        return count

    async def _repair(self, commands: Sequence[Command]) -> None:
        """Run repairing commands. Raises LostError if the claim is lost: others may have written since."""
        calls, others = list[Call](), list[Command]()
        for command in commands:
            name, named, *args = command
            key = named if isinstance(named, bytes) else str(named).encode()
            shard = shard_of_key(self._prefix, key)
            if shard is not None and shard < len(self._keys):
                calls.append(self._call(REPAIR, self._keys[shard], (key,), (name, *args)))
            else:  # of a shard that does not exist: nobody uses it
                others.append(command)
        await self.keep()
        await self._link.scripts(calls)
        await self._link.pipeline(others)

    async def drop(self, lease_ids: Sequence[str]) -> None:
        """Delete records that are of no lease. During a rebuild only: their other keys are repaired afterwards."""
        commands: list[Command] = []
        for lease_id in lease_ids:
            at, id = self._at(lease_id), uuid_bytes(lease_id)
            commands += [("HDEL", at.leases, id), ("UNLINK", at.ended(id))]
        await self._repair(commands)

    async def rewrite(self, leases: Sequence[SignedLease], published: Mapping[str, int]) -> None:
        """Write all keys again that follow from these records, which only Redis has. During a rebuild only.

        `published`: the `seq` that Kafka has of each lease, 0 for none.
        """
        calls = []
        for one in leases:
            at, id = self._at(one.claims.lease_id), one.claims.lease_id
            written = restore_args(
                at, one, self._record_keep_ms, over_seq=one.claims.seq, published=published[id]
            )
            calls.append(self._call(RESTORE, at, *written))
        await self._link.scripts(calls)

    async def fences(self) -> list[dict[str, int]]:
        """The fences of each shard: `issued_before` in ms, by selector key."""
        answers = await self._link.pipeline([("ZRANGE", at.fences, 0, -1, "WITHSCORES") for at in self._keys])
        return [{selector_key.decode(): int(before) for selector_key, before in found} for found in answers]

    async def counted(self, uses: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each use of a grant (grant id, lease id) is counted."""
        commands: list[Command] = [
            ("SISMEMBER", self._at(grant_id).grant(grant_id), uuid_bytes(lease_id))
            for grant_id, lease_id in uses
        ]
        return [bool(answer) for answer in await self._link.pipeline(commands)]

    async def first_seen_positions(self, ids: Sequence[str]) -> dict[str, Coordinates]:
        """Return the positions at which selectors (derived ids) were first seen; unknown ones are omitted."""
        answers = await self._link.pipeline([("GET", self._at(id).selector(id)) for id in ids])
        return {id: parse_position(text) for id, text in zip(ids, answers, strict=True) if text is not None}

    def _at(self, id: str) -> Keys:
        return self._keys[shard_of(id, len(self._keys))]

    def _call(
        self, script: Script, at: Keys, keys: tuple[str | bytes, ...], args: tuple[Argument, ...]
    ) -> Call:
        return Call(script, (*keys, at.rebuilding), (*args, self._claim))


def _lease_keys(answers: Iterator[Any], selector_keys: Sequence[str]) -> LeaseKeys:
    record, live_until_ms, deadline_ms, claimed, kept_until_ms = next(answers)
    return LeaseKeys(
        StoredLease.parse(record) if record else None,
        live_until_ms if live_until_ms != -2 else None,
        deadline_ms or None,
        claimed is not None,
        kept_until_ms if kept_until_ms != -2 else None,
        _found_keys(selector_keys, [bool(next(answers)) for _ in selector_keys]),
    )


def _found_by(at: Keys, id: bytes, selector_key: str, agent: str) -> Command:
    """A command that tells whether a lease is found by a selector key, provided that its agent's finds it."""
    agent_id = agent.partition(":")[2]
    if selector_key.startswith(("agent:", "task:", "target:")):
        return ("HEXISTS", at.index(agent_id), id)
    return ("HEXISTS", at.agents(selector_key), agent_id)


def _found_keys(selector_keys: Sequence[str], found: Sequence[bool]) -> frozenset[str]:
    """The selector keys that a lease is found by: none if it does not stand among the leases of its agent."""
    return frozenset(key for key, is_found in zip(selector_keys, found, strict=True) if is_found and found[0])
