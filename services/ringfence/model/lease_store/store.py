"""The lease store: one method for each operation on leases in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.messages.credential import Coordinates
from ringfence.model.lease_store.codec import unpack
from ringfence.model.lease_store.connection import WHO, LostError, server_id
from ringfence.model.lease_store.keys import (
    CLOSING_TOKEN,
    FENCE_KEEP_MS,
    ID_BYTES,
    RECORD_KEEP_MS,
    Keys,
    lease_of_field,
    outbox_field,
    uuid_bytes,
    uuid_text,
)
from ringfence.model.lease_store.script_args import (
    BATCH_SIZE,
    DONE,
    FULL,
    NO_LIMIT,
    activation_of,
    in_batches,
    issue_args,
    parse_position,
    position_text,
    preparation_of,
    restore_args,
    step_args,
    step_result,
    stored_of,
    text_of,
    use_grant_args,
    uses_of,
)
from ringfence.model.lease_store.scripts import (
    ACTIVATE,
    CLAIM,
    CLAIM_EXPIRED,
    CLOSE,
    GET,
    LOOK,
    POSTPONE,
    PREPARE,
    RECOUNT,
    RESTORE,
    SCAN_EXPIRED,
    SCRIPTS,
    SEQS,
    STALE,
    TRANSITION,
    USE_GRANT,
    Argument,
    Command,
    all_ids,
    always,
    count_of_agent,
    fencing,
)
from ringfence.model.lease_store.shards import HEALTH_COMMANDS, ServerHealth, ShardCall, Shards
from ringfence.model.lease_store.types import (
    Activation,
    ClaimedLeases,
    ExpiredScan,
    LeaseLookup,
    OutboxRecord,
    Preparation,
    SignedLease,
    Step,
    StepResult,
    StoredLease,
)
from ringfence.model.leases.lifecycle import ALL_LEASES, cut_key, selector_keys

log = logging.getLogger(__name__)

_GATHER_S = 0.3
"""How long acknowledgements gather before their records are cleared, by two commands a shard. It is shorter than
any sweeper's age limit."""
_WATCH_EVERY_S = 1.0
_LOST_LOOK_S = 0.1


class LeaseStore(Shards):
    """The leases in Redis.

    Every method raises UnavailableError if Redis does not answer or refuses to work. It raises LostError, a subclass,
    if Redis may have forgotten leases: it was emptied, restarted, restored from an old snapshot, or replaced by another
    server. That ends when a revoker has rebuilt it from Kafka.
    """

    def __init__(
        self, settings: ServiceSettings, clock: Clock | None = None, *, record_keep_ms: int = RECORD_KEEP_MS
    ) -> None:
        """`record_keep_ms`: how long records of ended leases stay. Raises SettingsError if the URL is not one of
        Redis."""
        super().__init__(settings)
        self.record_keep_ms = record_keep_ms
        self._down: str | None = "Redis was not asked yet"
        self._clock = clock or SystemClock()
        self._servers = ServerHealth()
        self._acknowledged: list[tuple[str, int]] = []
        self._to_clear = asyncio.Event()

    # --- life ---

    async def connect(self) -> None:
        """Check that Redis has not lost leases, and load the scripts."""
        try:
            async with self._expecting():
                await self.link.load(SCRIPTS)
            await self._guarded([], self.keys)
        except UnavailableError as error:
            self._down = str(error)
            raise
        self._down = None

    async def close(self) -> None:
        """Clear published records from the outbox, and disconnect."""
        with contextlib.suppress(UnavailableError):
            await self.flush_outbox()
        await self.link.close()

    def unready(self) -> str | None:
        """Why leases cannot be read or written now, or this clock cannot be trusted; or None. `watch` finds it out."""
        return self._down or self._servers.unready()

    def warning(self) -> str | None:
        """A warning about Redis's configuration, or None. `watch` finds it out."""
        return self._servers.warning()

    async def watch(self) -> None:
        """Check once a second that Redis answers and has not lost leases, for ever; more often while it is lost."""
        while True:
            try:
                await self.link.confirm_primary()
                await self._guarded([], self.keys)
                self._down = None
                await self._ask_servers()
            except UnavailableError as error:
                self._down = str(error)
            await asyncio.sleep(_LOST_LOOK_S if self._lost.is_set() else _WATCH_EVERY_S)

    async def _ask_servers(self) -> None:
        """Check clocks, eviction and identity of the servers. If one has evicted keys, Redis is rebuilt.

        Raises LostError if a server is another one than before, even though no connection was lost.
        """
        epoch, answers_of, servers = self.epoch, {}, set()
        async for name, (who, *answers) in self.link.ask_each((WHO, *HEALTH_COMMANDS)):
            answers_of[name] = (self._clock.now_ms(), answers)
            servers.add(server_id(who))
        self.require_servers(servers)
        evicted = self._servers.update(answers_of, epoch=epoch)
        metrics.CLOCK_AHEAD.labels("redis").set(self._servers.ahead_ms() / 1000)
        if evicted:
            log.error("Redis evicted keys at %s, and is rebuilt: it must never do that", ", ".join(evicted))
            await self.request_full_rebuild()

    # --- issuing ---

    async def prepare(self, leases: Sequence[SignedLease], *, token: str, mint_ms: int) -> list[Preparation]:
        """Announce leases whose credentials will leave something at their targets, by their `minting` records.

        A revoker that finds one still minting after `mint_ms` aborts it. `token` names this attempt, without blanks,
        and is needed to activate the lease. Preparing a lease again, after a crash, takes it over. Nobody takes it over
        from a revoker (`CLOSING_TOKEN`).
        """
        calls = [self._prepare(one, token, mint_ms) for one in leases]
        return [preparation_of(*answer) for answer in await self._run(calls, full=FULL)]

    def _prepare(self, lease: SignedLease, token: str, mint_ms: int) -> ShardCall:
        claims, at, id = lease.claims, self.at(lease.claims.lease_id), uuid_bytes(lease.claims.lease_id)
        return ShardCall(
            CLOSE if token == CLOSING_TOKEN else PREPARE,
            at,
            (at.claimed, at.outbox, at.outbox_times, at.fences, *at.indexes(claims)),
            (*issue_args(id, lease), token, mint_ms, claims.agent_id, *selector_keys(claims), ALL_LEASES),
        )

    async def activate(self, leases: Sequence[SignedLease], *, token: str | None = None) -> list[Activation]:
        """Make leases live: one script each, all in one round trip. Their records go to the outbox.

        `token`: the one of `prepare`, for leases that were prepared with it. Their records follow the `minting` ones.
        """
        calls = [self._activate(one, token) for one in leases]
        return [activation_of(*answer) for answer in await self._run(calls, full=FULL)]

    def _activate(self, lease: SignedLease, token: str | None) -> ShardCall:
        claims, at, id = lease.claims, self.at(lease.claims.lease_id), uuid_bytes(lease.claims.lease_id)
        return ShardCall(
            ACTIVATE,
            at,
            (
                at.live(id),
                at.claimed,
                at.outbox,
                at.outbox_times,
                at.fences,
                *at.indexes(claims),
            ),
            (
                *issue_args(id, lease),
                token or "",
                claims.seq - 1,
                claims.agent_id,
                *selector_keys(claims),
                ALL_LEASES,
            ),
            claims.epoch,
        )

    async def use_grant(self, grant_id: str, lease_id: str, *, limit: int) -> bool:
        """Count a lease for a grant before it is activated. False if `limit` other leases are counted.

        Counting is idempotent. A lease stays counted, whatever becomes of it.
        """
        return bool((await self._run([self._use_grant(grant_id, lease_id, limit)]))[0])

    def _use_grant(self, grant_id: str, lease_id: str, limit: int) -> ShardCall:
        at = self.at(grant_id)
        return ShardCall(USE_GRANT, at, *use_grant_args(at, grant_id, lease_id, limit))

    # --- ending ---

    async def step(self, steps: Sequence[Step], *, visibility_ms: int) -> list[StepResult]:
        """Write the next records of leases, each only if it follows the record in Redis, and has `epoch` or none.

        From `ending` on the credential is refused, and the lease counts as claimed for `visibility_ms`: if it has not
        ended by then, it is claimed again. A terminal record removes the lease from all indexes.
        """
        together: dict[tuple[Keys, str | None], list[int]] = {}
        for number, step in enumerate(steps):
            claims = step.lease.claims
            together.setdefault((self.at(claims.lease_id), claims.epoch), []).append(number)
        parts = [
            (at, epoch, part)
            for (at, epoch), numbers in together.items()
            for part in in_batches(numbers, [steps[n].lease.claims.lease_id for n in numbers])
        ]
        answers = await self._run(
            [
                self._step(at, epoch, [steps[n] for n in numbers], visibility_ms)
                for at, epoch, numbers in parts
            ]
        )
        results: dict[int, StepResult] = {}
        for (*_, numbers), some in zip(parts, answers, strict=True):
            for number, answer in zip(numbers, some, strict=True):
                results[number] = DONE if answer == [b"done"] else step_result(*answer)
        return [results[number] for number in range(len(steps))]

    def _step(self, at: Keys, epoch: str | None, steps: Sequence[Step], visibility_ms: int) -> ShardCall:
        args: list[Argument] = [
            at.live_prefix,
            at.index_prefix,
            at.agents_prefix,
            visibility_ms,
            self.record_keep_ms,
        ]
        for step in steps:
            args += step_args(step)
        return ShardCall(TRANSITION, at, (at.claimed, at.outbox, at.outbox_times), tuple(args), epoch)

    async def claim(self, shards: Iterable[int], *, limit: int, visibility_ms: int) -> list[ClaimedLeases]:
        """Claim due leases in these shards, at most `limit` each: nobody else gets them for `visibility_ms`.

        A lease is due if its deadline has come, or if it was claimed and did not end in time.
        """
        shard_keys = [self.keys[shard] for shard in shards]
        calls = [
            ShardCall(CLAIM, at, (at.deadlines, at.claimed, at.minutes), (limit, visibility_ms))
            for at in shard_keys
        ]
        return [
            ClaimedLeases(at.shard, now_ms, next_ms, _claimed([flat]))
            for at, (now_ms, next_ms, flat) in zip(shard_keys, await self._run(calls), strict=True)
        ]

    async def postpone(self, delays_ms: Mapping[str, int]) -> None:
        """Extend claims, each by its delay from now. Leases that are not claimed any more are left unchanged."""
        by_shard: dict[Keys, list[Argument]] = {}
        for id, delay_ms in delays_ms.items():
            by_shard.setdefault(self.at(id), []).extend((uuid_bytes(id), delay_ms))
        await self._run(
            [ShardCall(POSTPONE, at, (at.claimed,), tuple(args)) for at, args in by_shard.items()]
        )

    async def claim_expired(
        self, lease_ids: Iterable[str], *, visibility_ms: int
    ) -> dict[str, StoredLease | None]:
        """Claim those of these leases whose TTL has ended them, by id.

        Redis has no live key of such a lease, the deadline in its record is over by Redis's clock, and no revoker has
        claimed it. Other leases are left out and stay as they are, as anybody may publish that a key has expired.
        """
        by_shard: dict[Keys, list[Argument]] = {}
        for id in lease_ids:
            by_shard.setdefault(self.at(id), []).append(uuid_bytes(id))
        calls = [
            ShardCall(CLAIM_EXPIRED, at, (at.claimed,), (visibility_ms, *ids[start : start + BATCH_SIZE]))
            for at, ids in by_shard.items()
            for start in range(0, len(ids), BATCH_SIZE)
        ]
        return _claimed(await self._run(calls))

    async def scan_expired(self, cursors: Mapping[int, int], *, visibility_ms: int) -> ExpiredScan:
        """Look at some dozens of leases in each of these shards, and claim those as `claim_expired` does.

        `cursors`: by shard, 0 at its beginning, then what the last call answered.
        """
        calls = [
            ShardCall(SCAN_EXPIRED, self.keys[shard], (self.keys[shard].claimed,),
                      (visibility_ms, cursor, BATCH_SIZE))
            for shard, cursor in cursors.items()
        ]  # fmt: skip
        answers = await self._run(calls)
        after = {shard: int(cursor) for shard, (cursor, *_) in zip(cursors, answers, strict=True)}
        return ExpiredScan(
            cursors={shard: cursor for shard, cursor in after.items() if cursor},
            seen=sum(seen for _, seen, _ in answers),
            leases=_claimed(flat for *_, flat in answers),
        )

    async def expirations(self) -> AsyncGenerator[list[str], None]:
        """The leases whose live keys expired, as far as Redis notifies: each list has those since the last one.

        Redis notifies only with `notify-keyspace-events Ex`, seconds late on big keyspaces, and does not repeat what
        expired while nobody listened.
        """
        prefixes = {at.live_prefix for at in self.keys}
        async with contextlib.aclosing(self.link.expired_keys()) as expired:
            async for keys in expired:
                lease_ids = [uuid_text(key[-ID_BYTES:]) for key in keys if key[:-ID_BYTES] in prefixes]
                if lease_ids:
                    yield lease_ids

    # --- the outbox ---

    def published(self, records: Iterable[tuple[str, int]]) -> None:
        """Note that Kafka has these records (lease id, seq): `clear_outbox` removes them, many at a time.

        If this process dies before, a sweeper of the outbox publishes them once more, unchanged.
        """
        self._acknowledged.extend(records)
        if self._acknowledged:
            self._to_clear.set()

    async def clear_outbox(self) -> None:
        """Remove published records from the outbox, for ever. A background job of every process that calls
        `published`."""
        while True:
            await self._to_clear.wait()
            await asyncio.sleep(_GATHER_S)
            try:
                await self.flush_outbox()
            except LostError:
                pass
            except UnavailableError as error:
                log.warning("the outbox is cleared later: %s", error)
                await asyncio.sleep(1)

    async def flush_outbox(self) -> None:
        """Remove published records from the outbox now."""
        self._to_clear.clear()
        records, self._acknowledged = self._acknowledged, []
        fields: dict[Keys, list[bytes]] = {}
        for lease_id, seq in records:
            fields.setdefault(self.at(lease_id), []).append(outbox_field(lease_id, seq))
        commands: list[Command] = []
        for at, some in fields.items():
            commands += [("HDEL", at.outbox, *some), ("ZREM", at.outbox_times, *some)]
        try:
            await self._guarded(commands, [])
        except LostError:
            raise  # the rebuild removes what Kafka has
        except UnavailableError:
            self._acknowledged += records
            self._to_clear.set()
            raise

    async def unpublished(self, *, older_than_ms: int, limit: int = 100) -> list[OutboxRecord]:
        """Records older than `older_than_ms` in the outbox, at most `limit` of each shard. Their age starts anew."""
        calls = [
            ShardCall(STALE, at, (at.outbox, at.outbox_times), (older_than_ms, limit)) for at in self.keys
        ]
        return [
            OutboxRecord(*lease_of_field(field), unpack(record))
            for flat in await self._run(calls)
            for field, record in zip(flat[::2], flat[1::2], strict=True)
        ]

    # --- records that Kafka has and Redis lacks ---

    async def seqs(self, lease_ids: Sequence[str]) -> dict[str, int]:
        """The `seq` of each lease's record, 0 if there is none."""
        by_shard = self._by_shard(lease_ids)
        answers = await self._run(
            [
                ShardCall(SEQS, at, (), tuple(uuid_bytes(lease_ids[n]) for n in numbers))
                for at, numbers in by_shard.items()
            ]
        )
        found = zip(by_shard.values(), answers, strict=True)
        return {lease_ids[n]: seq for numbers, seqs in found for n, seq in zip(numbers, seqs, strict=True)}

    async def restore(self, leases: Sequence[SignedLease]) -> int:
        """Write verified records that Kafka has, where Redis has none or a lower one. Returns how many were written.

        Raises LostError if one has another epoch than `epoch`.
        """
        calls = [
            ShardCall(
                RESTORE,
                self.at(one.claims.lease_id),
                *restore_args(self.at(one.claims.lease_id), one, self.record_keep_ms),
                one.claims.epoch,
            )
            for one in leases
        ]
        count_of_agent = [
            ShardCall(RECOUNT, at, *use_grant_args(at, *use, NO_LIMIT))
            for one in leases
            for use in uses_of(one.claims)
            for at in (self.at(use[0]),)
        ]
        return sum((await self._run([*calls, *count_of_agent]))[: len(calls)])

    async def is_waiting(self, records: Sequence[tuple[str, int]]) -> list[bool]:
        """Whether each record (lease id, `seq`) is in the outbox."""
        at = [self.at(id) for id, _ in records]
        commands = [
            ("HEXISTS", keys.outbox, outbox_field(*record)) for keys, record in zip(at, records, strict=True)
        ]
        return [bool(answer) for answer in await self._guarded(commands, at)]

    # --- fences and selectors ---

    async def fence(self, fences: Mapping[str, int], *, cut: bool = False) -> int:
        """Fence off requests: once this returns, no lease is activated that a fence covers.

        A fence covers leases that match its selector key and were requested by its time.

        Args:
            fences: by selector key, the time in ms up to which requests are covered.
            cut: existing leases are covered too: `look` says so before a revoker has found them.

        Returns:
            Since when all shards have the fences, in ms by Redis's clock.
        """  # fmt: skip
        cuts = {cut_key(key): before_ms for key, before_ms in fences.items()} if cut else {}
        commands = [one for at in self.keys for one in fencing(at.fences, {**fences, **cuts}, FENCE_KEEP_MS)]
        return max(await self._guarded(commands, self.keys), default=0)

    async def first_seen(
        self, positions: Mapping[str, Coordinates], *, keep_ms: int
    ) -> dict[str, Coordinates]:
        """Record where selectors (derived ids) were first seen: at these positions, unless they were seen before.

        Returns the first positions.
        """
        commands: list[Command] = []
        for id, position in positions.items():
            key = self.at(id).selector(id)
            commands += [always("SET", key, position_text(position), "NX", "PX", keep_ms), ("GET", key)]
        answers = await self._guarded(commands, map(self.at, positions))
        return {id: parse_position(text) for id, text in zip(positions, answers[1::2], strict=True)}

    # --- look-up ---

    async def look(self, lease_id: str, selector_keys: Iterable[str] = ()) -> LeaseLookup:
        """Look up a lease and Redis's time in one round trip; also up to when cuts cover leases with these selector
        keys.
        """
        at, id = self.at(lease_id), uuid_bytes(lease_id)
        call = ShardCall(LOOK, at, (at.live(id), at.fences), (id, *map(cut_key, selector_keys)))
        ((now_ms, record, live, before_ms),) = await self._run([call])
        return LeaseLookup(now_ms, stored_of(record), bool(live), before_ms)

    async def get(self, lease_ids: Sequence[str]) -> dict[str, StoredLease]:
        """The latest records of leases; unknown ids are omitted."""
        by_shard = self._by_shard(lease_ids)
        parts = [
            (at, numbers[start : start + BATCH_SIZE])
            for at, numbers in by_shard.items()
            for start in range(0, len(numbers), BATCH_SIZE)
        ]
        answers = await self._run(
            [
                ShardCall(GET, at, (), tuple(uuid_bytes(lease_ids[n]) for n in numbers))
                for at, numbers in parts
            ]
        )
        records = {
            n: record
            for (_, numbers), some in zip(parts, answers, strict=True)
            for n, record in zip(numbers, some, strict=True)
        }
        return {id: StoredLease.parse(record) for n, id in enumerate(lease_ids) if (record := records[n])}

    async def find(
        self, selector_key: str, *, agent_id: str | None = None, holders: Collection[str] | None = ()
    ) -> list[str]:
        """The ids of all leases, in any shard, that match a selector key and have not ended; maybe some others as well.

        Which of them match, their records say (`StoredLease.may_match`).

        Args:
            agent_id: the only agent whose leases can match, if that is known. For a task it should be given: otherwise
                all leases are found, as for a target.
            holders: the agents that hold delegated parts, whose leases may match too. None: nobody knows which, and all
                leases are found.
        """  # fmt: skip
        agents = await self._agents(selector_key, agent_id) if holders is not None else None
        if agents is not None and holders:
            agents = [list(dict.fromkeys([*some, *holders])) for some in agents]
        commands: list[Command] = []
        for n, at in enumerate(self.keys):
            if agents is None:
                commands.append(all_ids(at))
            else:
                commands += [("HKEYS", at.index(one)) for one in agents[n]]
        answers = await self._guarded(commands, self.keys)
        return list(dict.fromkeys(uuid_text(id) for ids in answers for id in ids if len(id) == ID_BYTES))

    async def _agents(self, selector_key: str, agent_id: str | None) -> list[list[str]] | None:
        """By shard, the agents whose leases match a selector key there. None if no index tells them from others."""
        kind, _, id = selector_key.partition(":")
        if kind == "agent":
            agent_id = id
        if agent_id is not None:
            return [[agent_id]] * len(self.keys)
        if kind in ("task", "target", ALL_LEASES):
            return None
        answers = await self._guarded([("HKEYS", at.agents(selector_key)) for at in self.keys], self.keys)
        return [list(map(text_of, agents)) for agents in answers]

    async def count(self, selector_keys: Sequence[str]) -> dict[str, int]:
        """How many leases of each agent or sponsor, given by selector key, have not ended."""
        commands: list[Command] = []
        for selector_key in selector_keys:
            kind, _, id = selector_key.partition(":")
            commands += [
                count_of_agent(at, id) if kind == "agent" else ("HVALS", at.agents(selector_key))
                for at in self.keys
            ]
        answers = await self._guarded(commands, self.keys)
        counts = [found if isinstance(found, int) else sum(map(int, found)) for found in answers]
        size = len(self.keys)
        return {
            selector_key: sum(counts[i * size : (i + 1) * size])
            for i, selector_key in enumerate(selector_keys)
        }


def _claimed(parts: Iterable[Sequence[bytes]]) -> dict[str, StoredLease | None]:
    """The leases in answers of scripts that claim: each has ids and records by turns."""
    return {
        uuid_text(id): stored_of(record)
        for flat in parts
        for id, record in zip(flat[::2], flat[1::2], strict=True)
    }
