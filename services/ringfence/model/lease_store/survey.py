"""Integrity check of Redis: every key that follows from lease records, compared with the records that Redis has.

Whether those are the right records, only Kafka can say (`revoker.consistency.compare`). The check is one pass over all
keys, in batches. It keeps one entry in memory for each lease that has not ended.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.lease import Lease
from ringfence.messages.topics import REVOCATION_REQUEST
from ringfence.model.lease_store.codec import unpack, unverified_names
from ringfence.model.lease_store.connection import RedisConnection
from ringfence.model.lease_store.keys import (
    AGENTS,
    AHEAD_MS,
    BY_AGENT,
    DAY_MS,
    DUE,
    ENDED,
    GRANT,
    GRANT_KEEP_MS,
    ID_BYTES,
    LIVE,
    REBUILDING,
    SELECTOR,
    SELECTOR_KEEP_MS,
    SPREAD,
    THUMBPRINT,
    Keys,
    is_outbox_field,
    lease_of_field,
    shard_of,
    shard_of_key,
    uuid_bytes,
    uuid_text,
)
from ringfence.model.lease_store.script_args import parse_position
from ringfence.model.lease_store.scripts import Command, count_and_leases, records_of
from ringfence.model.lease_store.types import StoredLease
from ringfence.model.leases.lifecycle import statement

_BATCH_SIZE = 500
SLACK_MS = 60_000
"""How far Redis's clock may be from ours. It is also longer than records wait in the outbox for a sweeper."""
CLAIMED_AT_MOST_MS = 3_600_000
"""The longest claim of a lease by a revoker or an issuer that settings allow."""

_REVOCATIONS_STAY_MS = (REVOCATION_REQUEST.retention_s or 0) * 1000
"""How long Kafka keeps a revocation at least."""

What = Literal["stray", "miscounted", "mistimed", "stuck", "unknown"]
"""`stray`: it follows from no record. `miscounted`: leases of an agent are counted wrongly. `mistimed`: a key expires
at another time than it should, or never. `stuck`: a record waits to be published, and no sweeper comes to it.
`unknown`: it is of an ended lease that Kafka does not know.
"""


@dataclass(frozen=True, slots=True)
class Stray:
    """An entry that follows from no record, and the commands that repair it while nobody else uses Redis."""

    about: str
    what: What
    wanted: str
    found: str
    repair: tuple[Command, ...] = ()
    """Each on one key, its first argument."""


@dataclass(frozen=True, slots=True)
class LiveLease:
    """The fields of a lease that has not ended from which its keys follow."""

    status: str
    deadline_ms: int
    agent_id: str | None
    wide: tuple[str, ...]
    """The selector keys of its sponsor and its user."""

    @classmethod
    def of(cls, stored: StoredLease) -> LiveLease:
        """Return the fields from the lease's unverified record.

        They are compared with other keys, and nobody acts on them.
        """
        names = [unverified_names(stored.record, kind) for kind in ("agent", "sponsor", "user")]
        if None in names and (lease := _unverified(stored.record)) is not None:
            names = [(lease.agent_id,), (lease.sponsor,), (lease.on_behalf_of,)]
        agent, sponsor, user = (some[0] if some else None for some in names)
        wide = _wide(sponsor or "", user or "")
        return cls(stored.status, stored.deadline_ms, sys.intern(agent) if agent else None, wide)


@lru_cache(maxsize=4096)
def _wide(sponsor: str, user: str) -> tuple[str, ...]:
    """Cached, so that leases share the tuple."""
    return f"sponsor:{sponsor}", f"user:{user}"


class Knowledge:
    """Facts that Kafka knows and Redis's records do not contain.

    This default knows nothing, and finds nothing wrong.
    """

    def knows(self, lease_id: str) -> bool:
        """Whether Kafka has such a lease, ended or not."""
        return True

    def has_revocation(self, id: str) -> bool:
        """Whether `revocation.request` has such a revocation, followed or not."""
        return True

    def names_grant(self, lease_id: str, grant_id: str) -> bool | None:
        """Whether a lease names a grant; None if that is not known."""
        return None


class Survey:
    """One check of all keys of all shards."""

    def __init__(
        self,
        link: RedisConnection,
        prefix: str,
        keys: Sequence[Keys],
        alive: Mapping[str, LiveLease],
        knowledge: Knowledge,
        now_ms: int,
    ) -> None:
        """`alive`: the leases in Redis that have not ended, by their records there."""
        self._link = link
        self._prefix = prefix
        self._keys = keys
        self._alive = alive
        self._knowledge = knowledge
        self._now_ms = now_ms

    async def outbox_and_signers(self) -> AsyncIterator[Stray]:
        """Stray entries in what is needed to read and publish records. A rebuild repairs them first."""
        for at in self._keys:
            async for one in self._outbox(at):
                yield one
            async for one in self._signers(at):
                yield one

    async def strays(self) -> AsyncIterator[Stray]:
        async for one in self.outbox_and_signers():
            yield one
        for at in self._keys:
            async for one in self._shard(at):
                yield one
        some: list[bytes] = []
        async for key in self._link.keys(f"{self._prefix}{{*}}:*"):
            some.append(key)
            if len(some) == _BATCH_SIZE:
                async for one in self._examine(some):
                    yield one
                some = []
        async for one in self._examine(some):
            yield one

    # --- keys of which each shard has one ---

    async def _shard(self, at: Keys) -> AsyncIterator[Stray]:
        leases, deadlines, claimed, minutes, claim_ms = await self._link.pipeline(
            [
                ("HKEYS", at.leases),
                ("ZRANGE", at.deadlines, 0, -1),
                ("ZRANGE", at.claimed, 0, -1, "WITHSCORES"),
                ("ZRANGE", at.minutes, 0, -1, "WITHSCORES"),
                ("PTTL", at.rebuilding),
            ]
        )
        for id in leases:
            if not self._is_of_shard(id, at):
                yield _stray(at, at.leases, id, ("HDEL", at.leases, id))
        for id in deadlines:
            if not self._is_alive(id, at):
                yield _stray(at, at.deadlines, id, ("ZREM", at.deadlines, id))
        latest_ms = self._now_ms + CLAIMED_AT_MOST_MS + SLACK_MS
        for id, until_ms in claimed:
            if not self._is_alive(id, at):
                yield _stray(at, at.claimed, id, ("ZREM", at.claimed, id))
            elif until_ms > latest_ms:
                expected = f"at most {latest_ms}"
                subject = _entry_name(at, at.claimed, id)
                repair: Command = ("ZADD", at.claimed, "XX", self._now_ms, id)
                yield Stray(subject, "mistimed", expected, f"{until_ms:.0f}", (repair,))
        for minute, open_ms in minutes:
            wanted_ms = int(minute) * 60_000 - AHEAD_MS if minute.isdigit() else None
            if wanted_ms is None:
                yield _stray(at, at.minutes, minute, ("ZREM", at.minutes, minute))
            elif open_ms != wanted_ms:
                repair = ("ZADD", at.minutes, wanted_ms, minute)
                subject = _entry_name(at, at.minutes, minute)
                yield Stray(subject, "mistimed", str(wanted_ms), f"{open_ms:.0f}", (repair,))
        if claim_ms == -1:
            yield Stray(
                _entry_name(at, at.rebuilding), "mistimed", "an end", "none"
            )  # the next rebuild deletes it

    async def _outbox(self, at: Keys) -> AsyncIterator[Stray]:
        fields, times = await self._link.pipeline(
            [("HKEYS", at.outbox), ("ZRANGE", at.outbox_times, 0, -1, "WITHSCORES")]
        )
        by_field, waiting = dict(times), set(fields)
        for field in by_field.keys() - waiting:
            yield _stray(at, at.outbox_times, field, ("ZREM", at.outbox_times, field))
        for start in range(0, len(fields), _BATCH_SIZE):
            some = fields[start : start + _BATCH_SIZE]
            (records,) = await self._link.pipeline([("HMGET", at.outbox, *some)])
            contradicting = await self._contradicting(at, dict(zip(some, records, strict=True)))
            for field, record in zip(some, records, strict=True):
                if record is not None and not self._is_of(field, record, at):
                    gone = (("HDEL", at.outbox, field), ("ZREM", at.outbox_times, field))
                    yield _stray(at, at.outbox, field, *gone)
                    continue
                if field in contradicting:
                    yield _stray(at, at.outbox, field)  # only the signatures tell which of the two counts
                since_ms = by_field.get(field)
                if since_ms is None or abs(since_ms - self._now_ms) > SLACK_MS:
                    subject = _entry_name(at, at.outbox, field)
                    found = "" if since_ms is None else f"{since_ms:.0f}"
                    repair = ("ZADD", at.outbox_times, self._now_ms, field)
                    yield Stray(subject, "stuck", f"about {self._now_ms}", found, (repair,))

    def _is_of(self, field: bytes, record: bytes, at: Keys) -> bool:
        """Whether a record is under its own lease and `seq`, in the shard of its lease."""
        if not is_outbox_field(field) or not self._is_of_shard(field[:ID_BYTES], at):
            return False
        lease = _unverified(record)
        return lease is not None and (lease.lease_id, lease.seq) == lease_of_field(field)

    async def _contradicting(self, at: Keys, waiting: Mapping[bytes, bytes | None]) -> set[bytes]:
        """Which of these records contradict Redis's record of the same lease and `seq`."""
        fields = [field for field in waiting if is_outbox_field(field)]
        if not fields:
            return set()
        (stored,) = await self._link.pipeline([records_of(at, [field[:ID_BYTES] for field in fields])])
        contradicting = set()
        for field, kept in zip(fields, stored, strict=True):
            now, record = StoredLease.parse(kept) if kept else None, waiting[field]
            if now is None or record is None or now.record == record or now.seq != lease_of_field(field)[1]:
                continue
            # A record that a rebuild signed again says the same in another epoch.
            one, other = _unverified(record), _unverified(now.record)
            if one is None or other is None or statement(one) != statement(other):
                contradicting.add(field)
        return contradicting

    async def _signers(self, at: Keys) -> AsyncIterator[Stray]:
        """Signers are stored by number and by name. The entry by number decides."""
        (flat,) = await self._link.pipeline([("HGETALL", at.signers)])
        signers = dict(flat)
        for field, value in signers.items():
            if len(field) == 1:
                if value not in signers:
                    subject = _entry_name(at, at.signers, field)
                    repair = ("HSET", at.signers, value, field)
                    yield Stray(subject, "stray", "the number by the name", "", (repair,))
            elif signers.get(value) != field:
                yield _stray(at, at.signers, field, ("HDEL", at.signers, field))

    # --- keys of which there are many ---

    async def _examine(self, keys: Sequence[bytes]) -> AsyncIterator[Stray]:
        by_kind: dict[str, list[tuple[Keys, bytes, bytes]]] = {}
        for key in keys:
            shard, name = shard_of_key(self._prefix, key), key.partition(b"}:")[2]
            if shard is None:
                continue
            if shard >= len(self._keys):
                if name not in (SPREAD.encode(), REBUILDING.encode()):
                    subject = f"{_readable(name)} in shard {shard}"
                    yield Stray(subject, "stray", "", "of a shard that there is not", (("UNLINK", key),))
                continue
            at = self._keys[shard]
            for kind in (LIVE, ENDED, BY_AGENT, AGENTS, DUE, SELECTOR, GRANT):
                if name.startswith(kind.encode()):
                    by_kind.setdefault(kind, []).append((at, key, name[len(kind) :]))
        for kind, looked in (
            (LIVE, self._live), (ENDED, self._ended), (BY_AGENT, self._by_agent), (AGENTS, self._agents),
            (DUE, self._due), (SELECTOR, self._selectors), (GRANT, self._grants),
        ):  # fmt: skip
            if kind in by_kind:
                async for one in looked(by_kind[kind]):
                    yield one

    async def _live(self, entries: Sequence[tuple[Keys, bytes, bytes]]) -> AsyncIterator[Stray]:
        for at, key, id in entries:
            if not self._is_alive(id, at):
                yield _stray(at, key, b"", ("UNLINK", key))

    async def _ended(self, entries: Sequence[tuple[Keys, bytes, bytes]]) -> AsyncIterator[Stray]:
        untils = await self._link.pipeline([("PTTL", key) for _, key, _ in entries])
        for (at, key, id), left_ms in zip(entries, untils, strict=True):
            if not self._is_of_shard(id, at) or uuid_text(id) in self._alive:
                yield _stray(at, key, b"", ("UNLINK", key))
                continue
            if left_ms == -1:
                # If Redis still needs the record, the rebuild has restored it with its expiry before.
                yield Stray(uuid_text(id), "mistimed", "an end", "none", (("PEXPIRE", key, DAY_MS),))
            if left_ms != -2 and not self._knowledge.knows(uuid_text(id)):
                yield Stray(uuid_text(id), "unknown", "", "ended")

    async def _by_agent(self, entries: Sequence[tuple[Keys, bytes, bytes]]) -> AsyncIterator[Stray]:
        answers = await self._link.pipeline([("HKEYS", key) for _, key, _ in entries])
        for (at, key, agent), ids in zip(entries, answers, strict=True):
            stray_ids = [
                id
                for id in ids
                if id != THUMBPRINT.encode()
                and not (self._is_alive(id, at) and self._alive[uuid_text(id)].agent_id == _readable(agent))
            ]
            is_empty = not set(ids) - set(stray_ids) - {THUMBPRINT.encode()}
            for id in stray_ids or ([THUMBPRINT.encode()] if ids and is_empty else []):
                yield _stray(at, key, id, ("UNLINK", key) if is_empty else ("HDEL", key, id))

    async def _agents(self, entries: Sequence[tuple[Keys, bytes, bytes]]) -> AsyncIterator[Stray]:
        answers = await self._link.pipeline([("HKEYS", key) for _, key, _ in entries])
        asked = [
            (at, key, selector_key, agent)
            for (at, key, selector_key), agents in zip(entries, answers, strict=True)
            for agent in agents
        ]
        for start in range(0, len(asked), _BATCH_SIZE):
            some = asked[start : start + _BATCH_SIZE]
            # Count and leases are read at one moment: leases come and go.
            now = await self._link.pipeline([count_and_leases(at, key, agent) for at, key, _, agent in some])
            for (at, key, selector_key, agent), (count, ids) in zip(some, now, strict=True):
                expected = await self._count_matching(at, ids, _readable(selector_key))
                if count is not None and count != b"%d" % expected:
                    repair = ("HSET", key, agent, expected) if expected else ("HDEL", key, agent)
                    subject = f"{_readable(agent)} of {_readable(selector_key)} in shard {at.shard}"
                    yield Stray(subject, "miscounted", str(expected), _readable(count), (repair,))

    async def _count_matching(self, at: Keys, ids: Sequence[bytes], selector_key: str) -> int:
        """Count an agent's leases with this selector key. Redis is asked for leases newer than this check."""
        here = [id for id in ids if self._is_of_shard(id, at)]
        known_leases = [one for id in here if (one := self._alive.get(uuid_text(id))) is not None]
        newer_ids = [id for id in here if uuid_text(id) not in self._alive]
        for start in range(0, len(newer_ids), _BATCH_SIZE):
            (records,) = await self._link.pipeline([records_of(at, newer_ids[start : start + _BATCH_SIZE])])
            known_leases += [LiveLease.of(StoredLease.parse(one)) for one in records if one]
        return sum(selector_key in one.wide for one in known_leases)

    async def _due(self, entries: Sequence[tuple[Keys, bytes, bytes]]) -> AsyncIterator[Stray]:
        answers = await self._link.pipeline([("SMEMBERS", key) for _, key, _ in entries])
        for (at, key, minute), ids in zip(entries, answers, strict=True):
            for id in ids:
                lease = self._alive.get(uuid_text(id)) if self._is_of_shard(id, at) else None
                if lease is None or b"%d" % (lease.deadline_ms // 60_000) != minute:
                    yield _stray(at, key, id, ("SREM", key, id))

    async def _selectors(self, entries: Sequence[tuple[Keys, bytes, bytes]]) -> AsyncIterator[Stray]:
        answers = iter(
            await self._link.pipeline([one for _, key, _ in entries for one in (("PTTL", key), ("GET", key))])
        )
        for at, key, id in entries:
            left_ms, place = next(answers), next(answers)
            if place is None:
                continue
            if not self._belongs(_readable(id), at) or not (
                self._is_seen(id, place) or self._is_outlived(place, left_ms)
            ):
                yield _stray(at, key, b"", ("UNLINK", key))
            elif left_ms == -1 or left_ms > SELECTOR_KEEP_MS + SLACK_MS:
                yield self._mistimed(at, key, left_ms, SELECTOR_KEEP_MS)

    async def _grants(self, entries: Sequence[tuple[Keys, bytes, bytes]]) -> AsyncIterator[Stray]:
        answers = iter(
            await self._link.pipeline(
                [one for _, key, _ in entries for one in (("PTTL", key), ("SMEMBERS", key))]
            )
        )
        for at, key, grant_id in entries:
            left_ms, ids = next(answers), next(answers)
            if not self._belongs(_readable(grant_id), at):
                yield _stray(at, key, b"", ("UNLINK", key))
                continue
            for id in ids:
                # A use that was counted and not issued stays counted. So a lease that Kafka does not know may be right.
                named = len(id) == ID_BYTES and self._knowledge.names_grant(
                    uuid_text(id), _readable(grant_id)
                )
                if named is False:
                    yield _stray(at, key, id, ("SREM", key, id))
            if ids and (left_ms == -1 or left_ms > GRANT_KEEP_MS + SLACK_MS):
                yield self._mistimed(at, key, left_ms, GRANT_KEEP_MS)

    def _mistimed(self, at: Keys, key: bytes, left_ms: int, keep_ms: int) -> Stray:
        expiry = "none" if left_ms == -1 else f"in {left_ms} ms"
        return Stray(
            _entry_name(at, key), "mistimed", f"within {keep_ms} ms", expiry, (("PEXPIRE", key, keep_ms),)
        )

    # --- where entries belong ---

    def _is_seen(self, id: bytes, place: bytes) -> bool:
        """Whether Kafka has the revocation that was seen first at this position; True for other selectors."""
        return b".revocation.request." not in place.partition(b" ")[0] or self._knowledge.has_revocation(
            _readable(id)
        )

    def _is_outlived(self, place: bytes, left_ms: int) -> bool:
        """Whether Kafka may have deleted the revocation by its age: Redis remembers it a little longer."""
        try:
            age_ms = self._now_ms - parse_position(place).appended_at_ms
        except ValueError:
            return False
        at_most_ms = max(SELECTOR_KEEP_MS - age_ms, 0) + DAY_MS
        return _REVOCATIONS_STAY_MS - SLACK_MS < age_ms < 2 * SELECTOR_KEEP_MS and 0 <= left_ms <= at_most_ms

    def _is_of_shard(self, id: bytes, at: Keys) -> bool:
        return len(id) == ID_BYTES and shard_of(uuid_text(id), len(self._keys)) == at.shard

    def _is_alive(self, id: bytes, at: Keys) -> bool:
        return self._is_of_shard(id, at) and uuid_text(id) in self._alive

    def _belongs(self, id: str, at: Keys) -> bool:
        try:
            return uuid_text(uuid_bytes(id)) == id and shard_of(id, len(self._keys)) == at.shard
        except ValueError:
            return False


def _unverified(record: bytes) -> Lease | None:
    """The unverified claims of a packed record: they are compared, and nobody acts on them."""
    try:
        return parse(unpack(record)).unverified_claims(Lease)
    except InvalidMessageError:
        return None


def _stray(at: Keys, key: str | bytes, member: bytes | str, *repair: Command) -> Stray:
    return Stray(_entry_name(at, key, member), "stray", "", "it is there", repair)


def _entry_name(at: Keys, key: str | bytes, member: bytes | str = b"") -> str:
    """A key and a member for people to read: without the prefix, and with raw ids as text."""
    name = (key if isinstance(key, bytes) else key.encode()).partition(b"}:")[2]
    kind, colon, rest = name.partition(b":")
    if colon and len(rest) == ID_BYTES and kind + colon in (LIVE.encode(), ENDED.encode()):
        name = kind + colon + uuid_text(rest).encode()
    raw = member if isinstance(member, bytes) else member.encode()
    if is_outbox_field(raw):
        lease_id, seq = lease_of_field(raw)
        inner = f"{lease_id}:{seq}"
    else:
        inner = uuid_text(raw) if len(raw) == ID_BYTES else _readable(raw)
    return f"{inner + ' in ' if inner else ''}{_readable(name)} in shard {at.shard}"


def _readable(value: bytes) -> str:
    return value.decode("ascii", "backslashreplace")
