"""The lease store itself: one method for each thing that happens to leases."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.kernel.clock import Clock, SystemClock, suspend_aware_ms
from ringfence.kernel.errors import UnavailableError
from ringfence.kernel.settings import ServiceSettings
from ringfence.kernel.skew import SkewCheck
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.model.lease_store.keys import (
    CLOSING_TOKEN,
    FENCE_KEEP_MS,
    GRANT_KEEP_MS,
    ID_BYTES,
    MIN_LEFT_MS,
    RECORD_KEEP_MS,
    Keys,
    lease_of_field,
    outbox_field,
    packed,
    shard_of,
    unpacked,
)
from ringfence.model.lease_store.link import Call, Link, LostError
from ringfence.model.lease_store.packing import condensed, expanded
from ringfence.model.lease_store.scripts import (
    ACTIVATE,
    CLAIM,
    CLOSE,
    COUNT_DUE,
    DUE_AFTER,
    GIVE_UP,
    LOOK,
    POSTPONE,
    PREPARE,
    RECOUNT,
    RESTORE,
    SCRIPTS,
    SEQS,
    STALE,
    TRANSITION,
    USE_GRANT,
    Argument,
    Command,
    Script,
    always,
    fencing,
)
from ringfence.model.lease_store.values import (
    Activation,
    Claimed,
    Looked,
    Outgoing,
    Place,
    Preparation,
    SignedLease,
    Step,
    Stepped,
    StoredLease,
)
from ringfence.model.leases import ALL_MARK, cut_mark, marks_of, wide_marks_of

log = logging.getLogger(__name__)

_GATHER_S = 0.05
"""How long acknowledgements gather before they are cleared: less than a sweeper takes for old."""
_SLOW_MS = 1_000
"""After an answer that took longer, the epochs are looked at once more before anybody acts on it."""
_WATCH_EVERY_S = 1.0
_NO_LEASE = "00000000-0000-0000-0000-000000000000"
"""Looked at for Redis's time alone."""
_LOST_LOOK_S = 0.1
"""How often it is looked whether a lost Redis has been rebuilt."""
MINTING_MS = 10_000
"""How long a lease that is restored while it was being minted is left to its issuer."""
_SCRIPT_AT_A_TIME = 64
"""So many leases go through one run of a script: less than a millisecond, in which Redis serves nobody else."""
NO_LIMIT = 2**31
"""So many leases may name a grant where they do already: they are counted again."""


class LeaseStore:
    """Raises UnavailableError from every method where Redis does not answer, or refuses to work.

    Raises LostError, which is one of them, where Redis may have forgotten leases: it was emptied, restarted, restored
    from old or replaced by another server. That is over when a revoker has rebuilt it from Kafka.
    """

    def __init__(
        self, settings: ServiceSettings, clock: Clock | None = None, *, record_keep_ms: int = RECORD_KEEP_MS
    ) -> None:
        """Raises SettingsError where the URL is none of Redis."""
        self.keys = [Keys(settings.redis_prefix, shard) for shard in range(settings.redis_shards)]
        self.record_keep_ms = record_keep_ms
        self.link = Link(settings.redis_url, lambda run_id: run_id in self._run_ids)
        self._epochs: list[bytes] | None = None
        """What the epoch of each shard must be; None where that is not known, or they were found to differ."""
        self._run_ids: frozenset[str] = frozenset()
        self._lost = asyncio.Event()
        self._checking = asyncio.Lock()
        self._down: str | None = "Redis was not asked yet"
        self._clock = clock or SystemClock()
        self._skew = SkewCheck("Redis")
        self._acknowledged: list[tuple[str, int]] = []
        self._to_clear = asyncio.Event()

    # --- life ---

    async def connect(self) -> None:
        """Find out whether Redis holds what it held, and load the scripts."""
        try:
            async with self._expecting():
                await self.link.load(SCRIPTS)
            await self._guarded([], self.keys)
        except UnavailableError as error:
            self._down = str(error)
            raise
        self._down = None

    async def close(self) -> None:
        """Clear the outbox of what was published, and disconnect."""
        with contextlib.suppress(UnavailableError):
            await self.flush_outbox()
        await self.link.close()

    async def until_lost(self) -> None:
        """Return once Redis answers and was found not to be complete."""
        await self._lost.wait()

    def unready(self) -> str | None:
        """Why leases cannot be read or written now, or this clock cannot be trusted, or None; known from `watch`."""
        return self._down or self._skew.unready()

    async def watch(self) -> None:
        """Ask Redis each second whether it is there and holds what it held, for ever; more often while it is lost."""
        while True:
            try:
                await self._guarded([], self.keys)
                self._down = None
                self._skew.heard((await self.look(_NO_LEASE)).now_ms, self._clock.now_ms())
            except UnavailableError as error:
                self._down = str(error)
            await asyncio.sleep(_LOST_LOOK_S if self._lost.is_set() else _WATCH_EVERY_S)

    # --- whether Redis holds what it held ---

    async def _check(self) -> list[bytes]:
        """The epochs, where each is of the server that holds its shard now. Raises LostError else."""
        async with self._checking:
            if self._epochs is None:
                found = await self.link.inspect([keys.epoch for keys in self.keys])
                strange = [epoch for run_id, epoch in found if epoch is None or epoch_run_id(epoch) != run_id]
                if len({epoch_name(epoch or b"") for _, epoch in found}) > 1:
                    strange = strange or [epoch for _, epoch in found]
                if strange:
                    self._lost.set()
                    raise LostError(
                        f"{len(strange)} of {len(found)} shards in Redis are not known to be complete: a revoker "
                        "rebuilds them from Kafka, or: ringfence rebuild"
                    )
                self._lost.clear()
                self._run_ids = frozenset(run_id for run_id, _ in found)
                self._epochs = [epoch for _, epoch in found if epoch is not None]
            return self._epochs

    @contextlib.asynccontextmanager
    async def _expecting(self) -> AsyncIterator[list[bytes]]:
        """What the epochs must be. Where they prove to be others, they are looked at anew before the next call."""
        epochs = self._epochs or await self._check()
        try:
            yield epochs
        except LostError:
            if self._epochs is epochs:
                self._epochs = None
            raise

    async def _run(self, calls: Sequence[_Call], *, full: Any = None) -> list[Any]:
        """Run scripts; each looks at the epoch of its shard before anything else. `full`: see `Link.scripts`."""
        async with self._expecting() as epochs:
            start_ms = suspend_aware_ms()
            answers = await self.link.scripts(
                [
                    Call(one.script, (*one.keys, one.at.epoch), (*one.args, one.guard(epochs[one.at.shard])))
                    for one in calls
                ],
                full=full,
            )
        if suspend_aware_ms() - start_ms > _SLOW_MS:
            # This process stood still, or Redis did: what was done there may have been lost meanwhile.
            await self._guarded([], [one.at for one in calls])
        return answers

    async def _guarded(self, commands: Sequence[Command], at: Iterable[Keys]) -> list[Any]:
        """Send commands to these shards, whose epochs are looked at after: what they answered counts only then.

        For what only reads, and for what is harmless on a Redis that has forgotten everything.
        """
        shards = list(dict.fromkeys(at))
        async with self._expecting() as epochs:
            answers = await self.link.pipeline([*commands, *(("GET", keys.epoch) for keys in shards)])
            if answers[len(commands) :] != [epochs[keys.shard] for keys in shards]:
                raise LostError("Redis was emptied, or is being rebuilt")
        return answers[: len(commands)]

    @property
    def epoch(self) -> str:
        """What records of revokers must bear that are written to Redis now. Raises LostError where nobody knows."""
        if self._epochs is None:
            raise LostError("Redis is not known to hold what it held")
        return epoch_name(self._epochs[0])

    async def confirm(self, epoch: str) -> None:
        """Return where Redis has been of this epoch until now: what was acknowledged by Kafka before counts.

        A rebuild takes the epoch away before it writes its markers. Raises LostError where one began.
        """
        await self._guarded([], self.keys)
        if self.epoch != epoch:
            raise LostError("Redis was rebuilt meanwhile")

    async def disown(self) -> None:
        """Have Redis rebuilt: Kafka says that its epoch is over. Nothing is done where it is another already."""
        await self._run([_Call(GIVE_UP, at, (), ()) for at in self.keys])

    # --- places ---

    @property
    def shards(self) -> range:
        return range(len(self.keys))

    def shard_of(self, id: str) -> int:
        """The shard of a lease, or of any derived id: those are evenly spread."""
        return shard_of(id, len(self.keys))

    def at(self, id: str) -> Keys:
        """The keys of the shard of a lease, or of any derived id."""
        return self.keys[self.shard_of(id)]

    def _by_shard(self, lease_ids: Sequence[str]) -> dict[Keys, list[int]]:
        """Which of these leases are in which shard, by their places in the sequence."""
        by_shard: dict[Keys, list[int]] = {}
        for number, id in enumerate(lease_ids):
            by_shard.setdefault(self.at(id), []).append(number)
        return by_shard

    # --- issuing ---

    async def prepare(self, leases: Sequence[SignedLease], *, token: str, mint_ms: int) -> list[Preparation]:
        """Announce, by their `minting` records, leases whose credentials will leave something at their targets.

        A revoker that finds one still minting after `mint_ms` aborts it. Only who has the `token`, a name of this
        attempt without blanks, can activate it: whoever prepares a lease after a crash takes it over, but from revokers
        (`CLOSING_TOKEN`) nobody does.
        """
        calls = [self._prepare(one, token, mint_ms) for one in leases]
        return [_preparation(*answer) for answer in await self._run(calls, full=_FULL)]

    def _prepare(self, lease: SignedLease, token: str, mint_ms: int) -> _Call:
        claims, at, id = lease.claims, self.at(lease.claims.lease_id), packed(lease.claims.lease_id)
        return _Call(
            CLOSE if token == CLOSING_TOKEN else PREPARE,
            at,
            (at.record(id), at.claimed, at.outbox, at.outbox_times, at.fences, *at.indexes(claims)),
            (*_issue(id, lease), token, mint_ms, claims.agent_id, *marks_of(claims), ALL_MARK),
        )

    async def activate(self, leases: Sequence[SignedLease], *, token: str | None = None) -> list[Activation]:
        """Make leases live, each by one script, all in one round trip. Their records go to the outbox.

        With the `token` of `prepare`: leases that were prepared with it, by the records after their `minting` ones.
        """
        calls = [self._activate(one, token) for one in leases]
        return [_activation(*answer) for answer in await self._run(calls, full=_FULL)]

    def _activate(self, lease: SignedLease, token: str | None) -> _Call:
        claims, at, id = lease.claims, self.at(lease.claims.lease_id), packed(lease.claims.lease_id)
        return _Call(
            ACTIVATE,
            at,
            (
                at.record(id),
                at.live(id),
                at.deadlines,
                at.claimed,
                at.outbox,
                at.outbox_times,
                at.fences,
                *at.indexes(claims),
            ),
            (
                *_issue(id, lease),
                token or "",
                claims.seq - 1,
                claims.agent_id,
                *marks_of(claims),
                ALL_MARK,
            ),
            claims.epoch,
        )

    async def use_grant(self, grant_id: str, lease_id: str, *, most: int) -> bool:
        """Count a lease among those that name a grant, before it is activated; False where there are `most` others.

        A lease counts once, however often it is counted, and for good, whatever becomes of it.
        """
        return bool((await self._run([self._use_grant(grant_id, lease_id, most)]))[0])

    def _use_grant(self, grant_id: str, lease_id: str, most: int) -> _Call:
        at = self.at(grant_id)
        return _Call(USE_GRANT, at, *using(at, grant_id, lease_id, most))

    # --- ending ---

    async def step(self, steps: Sequence[Step], *, visibility_ms: int) -> list[Stepped]:
        """Write the next records of leases, each only if it follows the one that is there, and bears `epoch` or none.

        From `ending` on the credential is refused, and the lease counts as claimed for `visibility_ms`: if it has not
        ended then, it is claimed again. A terminal record takes the lease from all indexes.
        """
        together: dict[tuple[Keys, str | None], list[int]] = {}
        for number, step in enumerate(steps):
            claims = step.lease.claims
            together.setdefault((self.at(claims.lease_id), claims.epoch), []).append(number)
        parts = [
            (at, epoch, part)
            for (at, epoch), numbers in together.items()
            for part in _in_parts(numbers, [steps[n].after.lease_id for n in numbers])
        ]
        answers = await self._run(
            [
                self._step(at, epoch, [steps[n] for n in numbers], visibility_ms)
                for at, epoch, numbers in parts
            ]
        )
        stepped: dict[int, Stepped] = {}
        for (*_, numbers), some in zip(parts, answers, strict=True):
            for number, answer in zip(numbers, some, strict=True):
                stepped[number] = _DONE if answer == [b"done"] else _stepped(*answer)
        return [stepped[number] for number in range(len(steps))]

    def _step(self, at: Keys, epoch: str | None, steps: Sequence[Step], visibility_ms: int) -> _Call:
        args: list[Argument] = [
            at.record_prefix,
            at.live_prefix,
            at.index_prefix,
            at.agents_prefix,
            visibility_ms,
            self.record_keep_ms,
        ]
        for step in steps:
            claims = step.lease.claims
            args += (
                packed(claims.lease_id),
                f"{step.after.status} {step.after.seq} {step.after.epoch or ''}",
                head_of(claims),
                condensed(step.lease.jws),
                outbox_field(claims.lease_id, claims.seq),
            )
            if claims.status in TERMINAL:
                args += (claims.deadline * 1000, claims.agent_id, *wide_marks_of(claims))
            else:
                args.append("")
        keys = (at.deadlines, at.claimed, at.outbox, at.outbox_times)
        return _Call(TRANSITION, at, keys, tuple(args), epoch)

    async def claim(self, shards: Iterable[int], *, limit: int, visibility_ms: int) -> list[Claimed]:
        """Take what is due in these shards, `limit` each, for `visibility_ms`: nobody else gets it until then.

        Due are leases whose deadline has come, and those that were claimed and not ended in time.
        """
        wanted = [self.keys[shard] for shard in shards]
        calls = [
            _Call(CLAIM, at, (at.deadlines, at.claimed), (limit, visibility_ms, at.record_prefix))
            for at in wanted
        ]
        found = []
        for at, (now_ms, next_ms, flat) in zip(wanted, await self._run(calls), strict=True):
            pairs = zip(flat[::2], flat[1::2], strict=True)
            leases = {unpacked(id): _stored(record) for id, record in pairs}
            found.append(Claimed(at.shard, now_ms, next_ms, leases))
        return found

    async def count_due(self, *, within_ms: int) -> list[int]:
        """How many leases of each shard have their deadlines within so long."""
        calls = [_Call(COUNT_DUE, at, (at.deadlines,), (within_ms,)) for at in self.keys]
        return await self._run(calls)

    async def due_after(
        self, shard: int, place: Place, *, within_ms: int, limit: int
    ) -> tuple[Place, list[bytes]]:
        """The records, as Redis holds them, of leases of a shard that are due within so long, by their deadlines.

        Nothing is taken. Begins after `place`, and returns the place of the last one, to go on from. Some may be passed
        over.
        """
        at = self.keys[shard]
        call = _Call(
            DUE_AFTER, at, (at.deadlines,),
            (place.deadline_ms, place.passed, within_ms, limit, at.record_prefix),
        )  # fmt: skip
        ((deadline_ms, passed, records),) = await self._run([call])
        return Place(deadline_ms, passed), [StoredLease.unpack(found).record for found in records if found]

    async def postpone(self, delays_ms: Mapping[str, int]) -> None:
        """Leave claimed leases alone for so long, each from now on; what is not claimed any more stays as it is."""
        by_shard: dict[Keys, list[Argument]] = {}
        for id, delay_ms in delays_ms.items():
            by_shard.setdefault(self.at(id), []).extend((packed(id), delay_ms))
        await self._run([_Call(POSTPONE, at, (at.claimed,), tuple(args)) for at, args in by_shard.items()])

    async def expirations(self) -> AsyncGenerator[int, None]:
        """The shard of each lease whose live key has just expired, as far as Redis tells: a hint, never the record.

        Nothing comes where Redis is not told to (`notify-keyspace-events Ex`), or while the connection is gone.
        """
        shard_by_prefix = {at.live_prefix: at.shard for at in self.keys}
        async with contextlib.aclosing(self.link.expired_keys()) as expired:
            async for key in expired:
                shard = shard_by_prefix.get(key[:-ID_BYTES])
                if shard is not None:
                    yield shard

    # --- the outbox ---

    def published(self, records: Iterable[tuple[str, int]]) -> None:
        """Kafka has these (lease id, seq): `clear_outbox` takes them out, many at a time.

        What is lost on the way is published once more, as it was, by whoever sweeps the outbox.
        """
        self._acknowledged.extend(records)
        if self._acknowledged:
            self._to_clear.set()

    async def clear_outbox(self) -> None:
        """Take out what was published, for ever. A background job of whoever calls `published`."""
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
        """Take out now what was published."""
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
            raise  # who rebuilds takes out what Kafka has
        except UnavailableError:
            self._acknowledged += records
            self._to_clear.set()
            raise

    async def unpublished(self, *, older_than_ms: int, limit: int = 100) -> list[Outgoing]:
        """Records that have been in the outbox for so long, `limit` of each shard. They count as new from now on."""
        calls = [_Call(STALE, at, (at.outbox, at.outbox_times), (older_than_ms, limit)) for at in self.keys]
        return [
            Outgoing(*lease_of_field(field), expanded(record))
            for flat in await self._run(calls)
            for field, record in zip(flat[::2], flat[1::2], strict=True)
        ]

    # --- what Kafka has and Redis has not ---

    async def seqs(self, lease_ids: Sequence[str]) -> dict[str, int]:
        """The `seq` of the record of each lease, 0 where there is none."""
        by_shard = self._by_shard(lease_ids)
        answers = await self._run(
            [
                _Call(SEQS, at, (), (at.record_prefix, *(packed(lease_ids[n]) for n in numbers)))
                for at, numbers in by_shard.items()
            ]
        )
        found = zip(by_shard.values(), answers, strict=True)
        return {lease_ids[n]: seq for numbers, seqs in found for n, seq in zip(numbers, seqs, strict=True)}

    async def restore(self, leases: Sequence[SignedLease]) -> int:
        """Write these records, verified ones that Kafka has, where Redis has none or a lower one. Returns how many.

        Raises LostError where one bears another epoch than `epoch`.
        """
        calls = [
            _Call(
                RESTORE,
                self.at(one.claims.lease_id),
                *restoring(self.at(one.claims.lease_id), one, self.record_keep_ms),
                one.claims.epoch,
            )
            for one in leases
        ]
        counted = [
            _Call(RECOUNT, at, *using(at, *use, NO_LIMIT))
            for one in leases
            for use in uses_of(one.claims)
            for at in (self.at(use[0]),)
        ]
        return sum((await self._run([*calls, *counted]))[: len(calls)])

    async def is_waiting(self, records: Sequence[tuple[str, int]]) -> list[bool]:
        """Of each record (lease id, `seq`): whether it is in the outbox."""
        at = [self.at(id) for id, _ in records]
        commands = [
            ("HEXISTS", keys.outbox, outbox_field(*record)) for keys, record in zip(at, records, strict=True)
        ]
        return [bool(answer) for answer in await self._guarded(commands, at)]

    # --- fences and selectors ---

    async def fence(self, marks: Mapping[str, int], *, cut: bool = False) -> int:
        """From the return of this on, nothing is activated that bears one of the marks and was requested by its time.

        With `cut`, nothing that there is counts as active either: `look` says so before a revoker has found it. Returns
        since when all shards have it, by Redis's clock, in ms.

        Args:
            marks: with the times, in ms, up to which requests are covered.
        """  # fmt: skip
        fences = dict(marks)
        if cut:
            fences |= {cut_mark(mark): before_ms for mark, before_ms in marks.items()}
        commands = [one for at in self.keys for one in fencing(at.fences, fences, FENCE_KEEP_MS)]
        return max(await self._guarded(commands, self.keys), default=0)

    async def first_seen(self, places: Mapping[str, Coordinates], *, keep_ms: int) -> dict[str, Coordinates]:
        """Where selectors (derived ids) were seen first: at these places, unless they were seen before."""
        commands: list[Command] = []
        for id, place in places.items():
            key = self.at(id).selector(id)
            commands += [always("SET", key, place_text(place), "NX", "PX", keep_ms), ("GET", key)]
        answers = await self._guarded(commands, map(self.at, places))
        return {id: place_of_text(text) for id, text in zip(places, answers[1::2], strict=True)}

    # --- asking ---

    async def look(self, lease_id: str, marks: Iterable[str] = ()) -> Looked:
        """One lease and Redis's time, in one round trip; and up to when selectors have cut what bears these marks."""
        at, id = self.at(lease_id), packed(lease_id)
        call = _Call(LOOK, at, (at.record(id), at.live(id), at.fences), tuple(map(cut_mark, marks)))
        ((now_ms, record, live, before_ms),) = await self._run([call])
        return Looked(now_ms, _stored(record), bool(live), before_ms)

    async def get(self, lease_ids: Sequence[str]) -> dict[str, StoredLease]:
        """The latest records of leases; ids that are not known are left out."""
        by_shard = self._by_shard(lease_ids)
        commands: list[Command] = [
            ("MGET", *(at.record(packed(lease_ids[n])) for n in numbers)) for at, numbers in by_shard.items()
        ]
        answers = await self._guarded(commands, by_shard)
        records = {
            n: record
            for numbers, some in zip(by_shard.values(), answers, strict=True)
            for n, record in zip(numbers, some, strict=True)
        }
        return {id: StoredLease.unpack(record) for n, id in enumerate(lease_ids) if (record := records[n])}

    async def find(self, mark: str, *, agent_id: str | None = None) -> list[str]:
        """The ids of all leases that bear a mark and have not ended, whatever their shard, and maybe those of others.

        Which do, their records say (`StoredLease.may_bear`). `agent_id`: the only agent whose leases can bear the mark,
        where that is known. Of a task it should be: otherwise those that are found are all that there are.
        """
        agents = await self._agents(mark, agent_id)
        commands: list[Command] = []
        for n, at in enumerate(self.keys):
            if agents is None:
                commands += [("ZRANGE", at.deadlines, 0, -1), ("ZRANGE", at.claimed, 0, -1)]
            else:
                commands += [("SMEMBERS", at.index(one)) for one in agents[n]]
        answers = await self._guarded(commands, self.keys)
        return list(dict.fromkeys(unpacked(id) for ids in answers for id in ids))

    async def _agents(self, mark: str, agent_id: str | None) -> list[list[str]] | None:
        """Of each shard: the agents that have leases with a mark there. None where that would be all."""
        kind, _, id = mark.partition(":")
        if kind == "agent":
            agent_id = id
        if agent_id is not None:
            return [[agent_id]] * len(self.keys)
        if kind in ("task", ALL_MARK):
            return None
        answers = await self._guarded([("HKEYS", at.agents(mark)) for at in self.keys], self.keys)
        return [list(map(_text, agents)) for agents in answers]

    async def count(self, marks: Sequence[str]) -> dict[str, int]:
        """How many leases of each of these agents and sponsors have not ended."""
        commands: list[Command] = []
        for mark in marks:
            kind, _, id = mark.partition(":")
            commands += [
                ("SCARD", at.index(id)) if kind == "agent" else ("HVALS", at.agents(mark)) for at in self.keys
            ]
        answers = await self._guarded(commands, self.keys)
        counts = [found if isinstance(found, int) else sum(map(int, found)) for found in answers]
        size = len(self.keys)
        return {mark: sum(counts[i * size : (i + 1) * size]) for i, mark in enumerate(marks)}


@dataclass(frozen=True, slots=True)
class _Call:
    """A run of a script on one shard, before it is known what its epoch must be."""

    script: Script
    at: Keys
    keys: tuple[str | bytes, ...]
    args: tuple[Argument, ...] = ()
    epoch: str | None = None
    """The one in which the record was signed that it writes, where it bears one: in another it must not be written."""

    def guard(self, expected: bytes) -> Argument:
        return expected if self.epoch is None else f"{epoch_run_id(expected)}.{self.epoch}"


def epoch_run_id(epoch: bytes) -> str:
    """The server that the epoch of a shard is bound to."""
    return epoch.partition(b".")[0].decode("ascii", "replace")


def epoch_name(epoch: bytes) -> str:
    """The epoch of a shard as records bear it."""
    return epoch.partition(b".")[2].decode("ascii", "replace")


def place_text(at: Coordinates) -> str:
    """Where on Kafka something stands, as Redis holds it."""
    return f"{at.topic} {at.partition} {at.offset} {at.appended_at_ms}"


def place_of_text(text: bytes) -> Coordinates:
    """What `place_text` wrote."""
    topic, partition, offset, appended_at_ms = _text(text).split(" ")
    return Coordinates(
        topic=topic, partition=int(partition), offset=int(offset), appended_at_ms=int(appended_at_ms)
    )


def restoring(
    at: Keys, lease: SignedLease, record_keep_ms: int, *, over_seq: int = 0
) -> tuple[tuple[str | bytes, ...], tuple[Argument, ...]]:
    """The keys and arguments of RESTORE, of a lease of this shard. Also where Redis has `over_seq`, or a lower one."""
    claims, id = lease.claims, packed(lease.claims.lease_id)
    # Nobody has the token of a lease that was being minted: its issuer takes it over, or a revoker aborts it.
    head = head_of(claims) + (" -" if claims.status == "minting" else "")
    return (
        (
            at.record(id),
            at.live(id),
            at.deadlines,
            at.claimed,
            at.outbox,
            at.outbox_times,
            *at.indexes(claims),
        ),
        (
            id,
            max(claims.seq, over_seq),
            claims.status,
            claims.deadline * 1000,
            head,
            condensed(lease.jws),
            record_keep_ms if claims.status in TERMINAL else "",
            MINTING_MS if claims.status == "minting" else 0,
            max(claims.seq, over_seq + 1),
            claims.agent_id,
        ),
    )


def uses_of(claims: Lease) -> list[tuple[str, str]]:
    """(id of the grant, id of the lease) for each grant that a lease names."""
    return [(grant_id, claims.lease_id) for grant_id in claims.grants or ()]


def using(
    at: Keys, grant_id: str, lease_id: str, most: int
) -> tuple[tuple[str | bytes, ...], tuple[Argument, ...]]:
    """The keys and arguments of USE_GRANT, of a grant of this shard."""
    return (at.grant(grant_id),), (packed(lease_id), most, GRANT_KEEP_MS)


def head_of(claims: Lease) -> str:
    """What scripts read of a record: it stands before the signed one."""
    return f"{claims.status} {claims.seq} {claims.deadline * 1000}" + (
        f" {claims.epoch}" if claims.epoch else ""
    )


def _issue(id: bytes, lease: SignedLease) -> tuple[Argument, ...]:
    """What the scripts that issue a lease are told of it."""
    claims = lease.claims
    return (
        id,
        claims.deadline * 1000,
        claims.requested_at_ms,
        head_of(claims),
        condensed(lease.jws),
        outbox_field(claims.lease_id, claims.seq),
        MIN_LEFT_MS,
    )


def _in_parts(numbers: Sequence[int], lease_ids: Sequence[str]) -> list[list[int]]:
    """Numbers of steps in parts for one run of a script each. Steps of one lease that come together stay together."""
    parts: list[list[int]] = []
    last = None
    for number, lease_id in zip(numbers, lease_ids, strict=True):
        if not parts or (len(parts[-1]) >= _SCRIPT_AT_A_TIME and lease_id != last):
            parts.append([])
        parts[-1].append(number)
        last = lease_id
    return parts


_DONE = Stepped("done")
_FULL = (b"full",)


def _stepped(outcome: bytes, *rest: bytes) -> Stepped:
    return Stepped(_text(outcome), _stored(*rest))  # type: ignore[arg-type]


def _text(value: bytes) -> str:
    return value.decode("ascii")


def _stored(record: bytes | None = None) -> StoredLease | None:
    return StoredLease.unpack(record) if record else None


def _preparation(outcome: bytes, *rest: bytes) -> Preparation:
    if outcome == b"fenced":
        return Preparation("fenced", mark=_text(rest[0]))
    return Preparation(_text(outcome), stored=_stored(*rest))  # type: ignore[arg-type]


def _activation(outcome: bytes, *rest: bytes) -> Activation:
    if outcome == b"fenced":
        return Activation("fenced", mark=_text(rest[0]))
    return Activation(_text(outcome), stored=_stored(*rest))  # type: ignore[arg-type]
