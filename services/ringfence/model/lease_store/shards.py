"""The shards of Redis, and the check that they have not lost leases. Every command and script goes through here.

A shard's epoch key names the server that it was last rebuilt on. If the key is missing or names another server than the
present one, the shard may have lost leases. Scripts check it first, and other commands are followed by a check.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.kernel.base.clock import SkewCheck, suspend_aware_ms
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.model.lease_store.connection import Call, LostError, RedisConnection
from ringfence.model.lease_store.keys import Keys, shard_of
from ringfence.model.lease_store.scripts import GIVE_UP, REQUEST_FULL_REBUILD, Argument, Command, Script

_SLOW_MS = 1_000
"""After an answer that took longer, the epochs are checked once more before anybody acts on it."""


@dataclass(frozen=True, slots=True)
class ShardCall:
    """A run of a script on one shard. Its epoch is added when it is sent."""

    script: Script
    at: Keys
    keys: tuple[str | bytes, ...]
    args: tuple[Argument, ...] = ()
    epoch: str | None = None
    """The epoch of the record that it writes, if any: the script fails if the shard is in another one."""

    def guard(self, expected: bytes) -> Argument:
        return expected if self.epoch is None else f"{epoch_server(expected)}.{self.epoch}"


def epoch_server(epoch: bytes) -> str:
    """The server in the value of an epoch key."""
    return epoch.partition(b".")[0].decode("ascii", "replace")


def epoch_name(epoch: bytes) -> str:
    """The epoch in the value of an epoch key, as records have it."""
    return epoch.partition(b".")[2].decode("ascii", "replace")


def _why_lost(strange: int, shards: int, spread: Collection[bytes | None]) -> str:
    counts = sorted({int(count) for count in spread if count is not None} - {shards})
    if counts:
        return (
            f"leases in Redis are spread over {counts[0]} shards, and not over {shards} (RINGFENCE_REDIS_SHARDS, the "
            "same for all services): a revoker rebuilds them from Kafka"
        )
    return (
        f"{strange or shards} of {shards} shards in Redis are not known to be complete: a revoker rebuilds them from "
        "Kafka, or: ringfence rebuild"
    )


class Shards:
    """All shards, and the epochs that they must have.

    Every method raises UnavailableError if Redis does not answer or refuses to work. It raises LostError, a subclass,
    if Redis may have forgotten leases.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        """Raises SettingsError if the URL is not one of Redis."""
        self.keys = [Keys(settings.redis_prefix, shard) for shard in range(settings.redis_shards)]
        self.link = RedisConnection(settings, lambda run_id: run_id in self._run_ids)
        self._epochs: list[bytes] | None = None
        """The value that each shard's epoch key must have; None if it is unknown, or was found to differ."""
        self._run_ids: frozenset[str] = frozenset()
        self._lost = asyncio.Event()
        self._checking = asyncio.Lock()

    # --- shards ---

    @property
    def shards(self) -> range:
        return range(len(self.keys))

    def shard_of(self, id: str) -> int:
        """The shard of a lease, or of any other derived id."""
        return shard_of(id, len(self.keys))

    def at(self, id: str) -> Keys:
        """The keys of the shard of a lease, or of any other derived id."""
        return self.keys[self.shard_of(id)]

    def _by_shard(self, lease_ids: Sequence[str]) -> dict[Keys, list[int]]:
        """By shard, the positions of its leases in the sequence."""
        by_shard: dict[Keys, list[int]] = {}
        for number, id in enumerate(lease_ids):
            by_shard.setdefault(self.at(id), []).append(number)
        return by_shard

    # --- detecting data loss ---

    async def until_lost(self) -> None:
        """Return once Redis answers and is found to have lost leases."""
        await self._lost.wait()

    async def _check(self) -> list[bytes]:
        """The values of the epoch keys, each bound to the present server of its shard. Raises LostError otherwise."""
        async with self._checking:
            if self._epochs is None:
                size = len(self.keys)
                guard_keys = [*(keys.epoch for keys in self.keys), *(keys.spread for keys in self.keys)]
                answers = await self.link.inspect(guard_keys)
                epochs, spread = answers[:size], {count for _, count in answers[size:]}
                strange = [
                    epoch for run_id, epoch in epochs if epoch is None or epoch_server(epoch) != run_id
                ]
                if len({epoch_name(epoch or b"") for _, epoch in epochs}) > 1:
                    strange = strange or [epoch for _, epoch in epochs]
                if strange or spread != {b"%d" % size}:
                    self._lost.set()
                    raise LostError(_why_lost(len(strange), size, spread))
                self._lost.clear()
                self._run_ids = frozenset(run_id for run_id, _ in epochs)
                self._epochs = [epoch for _, epoch in epochs if epoch is not None]
            return self._epochs

    @contextlib.asynccontextmanager
    async def _expecting(self) -> AsyncIterator[list[bytes]]:
        """The values that the epoch keys must have. If a call finds others, they are read again before the next
        call."""
        epochs = self._epochs or await self._check()
        try:
            yield epochs
        except LostError:
            if self._epochs is epochs:
                self._epochs = None
            raise

    async def _run(self, calls: Sequence[ShardCall], *, full: Any = None) -> list[Any]:
        """Run scripts. Each checks the epoch of its shard first. `full`: see `RedisConnection.scripts`."""
        async with self._expecting() as epochs:
            start_ms = suspend_aware_ms()
            answers = await self.link.scripts(
                [
                    Call(one.script, (*one.keys, one.at.epoch), (*one.args, one.guard(epochs[one.at.shard])))
                    for one in calls
                ],
                full=full,
            )
            self._look_where([one.at for one in calls], epochs)
        if suspend_aware_ms() - start_ms > _SLOW_MS:
            # This process or Redis was suspended: the writes may have been lost meanwhile.
            await self._guarded([], [one.at for one in calls])
        return answers

    async def _guarded(self, commands: Sequence[Command], at: Iterable[Keys]) -> list[Any]:
        """Send commands to these shards, and check their epochs after: only then the answers count.

        For commands that only read, or are harmless on a Redis that has lost everything.
        """
        shards = list(dict.fromkeys(at))
        async with self._expecting() as epochs:
            answers = await self.link.pipeline([*commands, *(("GET", keys.epoch) for keys in shards)])
            if answers[len(commands) :] != [epochs[keys.shard] for keys in shards]:
                raise LostError("Redis was emptied, or is being rebuilt")
            self._look_where(shards, epochs)
        return answers[: len(commands)]

    def require_servers(self, servers: Collection[str]) -> None:
        """Raises LostError unless all servers that the epochs are bound to are among these; then they are read
        again."""
        if not self._run_ids <= set(servers):
            self._epochs = None
            raise LostError("Redis is not the server that it was, or has followed another one")

    def _look_where(self, shards: Iterable[Keys], epochs: Sequence[bytes]) -> None:
        """Raises LostError if a cluster has moved one of these shards to another node than its epoch is bound to."""
        for keys in dict.fromkeys(shards):
            if self.link.server_of(keys.epoch) not in (None, epoch_server(epochs[keys.shard])):
                raise LostError(f"shard {keys.shard} is on another node of the cluster than it was")

    @property
    def epoch(self) -> str:
        """The epoch that a revoker's record must have to be written now. Raises LostError while it is unknown."""
        if self._epochs is None:
            raise LostError("Redis is not known to hold what it held")
        return epoch_name(self._epochs[0])

    async def confirm(self, epoch: str) -> None:
        """Return if Redis is still in this epoch: then records that Kafka has acknowledged before are not void.

        A rebuild deletes the epoch key before it writes its markers. Raises LostError if one began.
        """
        await self._guarded([], self.keys)
        if self.epoch != epoch:
            raise LostError("Redis was rebuilt meanwhile")

    async def request_rebuild(self) -> None:
        """Have Redis rebuilt, as Kafka has a newer epoch. Raises LostError if Redis is in another epoch already."""
        await self._run([ShardCall(GIVE_UP, at, (), ()) for at in self.keys])

    async def request_full_rebuild(self) -> None:
        """Have Redis rebuilt completely: some keys are lost, and nobody knows which."""
        await self._run([ShardCall(REQUEST_FULL_REBUILD, at, (), ()) for at in self.keys])


# Health of the servers behind Redis: their clocks, and whether they evict keys.

HEALTH_COMMANDS = (("INFO", "memory"), ("INFO", "stats"), ("TIME",))
"""TIME comes last: it is compared with our clock when the answer arrives."""
NOEVICTION = "noeviction"


class ServerHealth:
    """Clock skew and eviction of each server: one for a standalone Redis, every primary node of a cluster."""

    def __init__(self) -> None:
        self._skews: dict[str, SkewCheck] = {}
        self._evicting: dict[str, str] = {}
        """By server: the eviction policy, if it may evict."""
        self._epoch = ""
        self._evicted: dict[str, int] = {}
        """By server: how many keys it had evicted at the first check in this epoch."""

    def update(self, answers: Mapping[str, tuple[int, Sequence[Any]]], *, epoch: str) -> list[str]:
        """Process answers to `HEALTH_COMMANDS`, by server name, each with its time of arrival in ms.

        Returns the servers that have evicted keys in this epoch.
        """
        whose = {name: "Redis" if len(answers) == 1 else f"Redis at {name}" for name in answers}
        self._skews = {name: self._skews.get(name) or SkewCheck(whose[name]) for name in answers}
        self._evicting = {}
        if epoch != self._epoch:
            self._epoch, self._evicted = epoch, {}
        forgetful = []
        for name, (now_ms, (memory, stats, (seconds, micros))) in answers.items():
            self._skews[name].observe(int(seconds) * 1000 + int(micros) // 1000, now_ms)
            if int(memory["maxmemory"]) and memory["maxmemory_policy"] != NOEVICTION:
                self._evicting[name] = memory["maxmemory_policy"]
            evicted = int(stats["evicted_keys"])
            # If there are fewer than before, the server was restarted, and its epoch is over anyway.
            if evicted > self._evicted.setdefault(name, evicted):
                forgetful.append(name)
        return forgetful

    def ahead_ms(self) -> int:
        """How far our clock is ahead of the server's from which it differs most; negative if behind."""
        return max((skew.ahead_ms() or 0 for skew in self._skews.values()), key=abs, default=0)

    def unready(self) -> str | None:
        """Why our clock cannot be trusted, or None."""
        return next((reason for skew in self._skews.values() if (reason := skew.unready())), None)

    def warning(self) -> str | None:
        """A warning that leases may be evicted, or None."""
        if not self._evicting:
            return None
        which = ", ".join(f"{name} ({policy})" for name, policy in self._evicting.items())
        return f"Redis may evict leases: set maxmemory-policy to {NOEVICTION} at {which}"
