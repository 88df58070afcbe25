"""The shards of Redis, for as long as they hold what they held: everything that is sent goes through here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.kernel.base.clock import suspend_aware_ms
from ringfence.kernel.base.clock_skew import SkewCheck
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.model.lease_store.connection import Call, LostError, RedisConnection
from ringfence.model.lease_store.keys import Keys, shard_of
from ringfence.model.lease_store.scripts import GIVE_UP, REQUEST_FULL_REBUILD, Argument, Command, Script

_SLOW_MS = 1_000
"""After an answer that took longer, the epochs are looked at once more before anybody acts on it."""


@dataclass(frozen=True, slots=True)
class ShardCall:
    """A run of a script on one shard, before it is known what its epoch must be."""

    script: Script
    at: Keys
    keys: tuple[str | bytes, ...]
    args: tuple[Argument, ...] = ()
    epoch: str | None = None
    """The one in which the record was signed that it writes, where it bears one: in another it must not be written."""

    def guard(self, expected: bytes) -> Argument:
        return expected if self.epoch is None else f"{epoch_server(expected)}.{self.epoch}"


def epoch_server(epoch: bytes) -> str:
    """The server that the epoch of a shard is bound to."""
    return epoch.partition(b".")[0].decode("ascii", "replace")


def epoch_name(epoch: bytes) -> str:
    """The epoch of a shard as records bear it."""
    return epoch.partition(b".")[2].decode("ascii", "replace")


def _why_lost(strange: int, shards: int, spread: Collection[bytes | None]) -> str:
    others = sorted({int(count) for count in spread if count is not None} - {shards})
    if others:
        return (
            f"leases in Redis are spread over {others[0]} shards, and not over {shards} (RINGFENCE_REDIS_SHARDS, the "
            "same for all services): a revoker rebuilds them from Kafka"
        )
    return (
        f"{strange or shards} of {shards} shards in Redis are not known to be complete: a revoker rebuilds them from "
        "Kafka, or: ringfence rebuild"
    )


class Shards:
    """All shards, and the epochs that they must be of.

    Raises UnavailableError from every method where Redis does not answer, or refuses to work, and LostError, which is
    one of them, where it may have forgotten leases.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        """Raises SettingsError where the URL is none of Redis."""
        self.keys = [Keys(settings.redis_prefix, shard) for shard in range(settings.redis_shards)]
        self.link = RedisConnection(settings.redis_url, lambda run_id: run_id in self._run_ids)
        self._epochs: list[bytes] | None = None
        """What the epoch of each shard must be; None where that is not known, or they were found to differ."""
        self._run_ids: frozenset[str] = frozenset()
        self._lost = asyncio.Event()
        self._checking = asyncio.Lock()

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

    # --- whether Redis holds what it held ---

    async def until_lost(self) -> None:
        """Return once Redis answers and was found not to be complete."""
        await self._lost.wait()

    async def _check(self) -> list[bytes]:
        """The epochs, where each is of the server that holds its shard now. Raises LostError else."""
        async with self._checking:
            if self._epochs is None:
                size = len(self.keys)
                asked = [*(keys.epoch for keys in self.keys), *(keys.spread for keys in self.keys)]
                answers = await self.link.inspect(asked)
                found, spread = answers[:size], {count for _, count in answers[size:]}
                strange = [epoch for run_id, epoch in found if epoch is None or epoch_server(epoch) != run_id]
                if len({epoch_name(epoch or b"") for _, epoch in found}) > 1:
                    strange = strange or [epoch for _, epoch in found]
                if strange or spread != {b"%d" % size}:
                    self._lost.set()
                    raise LostError(_why_lost(len(strange), size, spread))
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

    async def _run(self, calls: Sequence[ShardCall], *, full: Any = None) -> list[Any]:
        """Run scripts; each checks the epoch of its shard first. `full`: see `RedisConnection.scripts`."""
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
            self._look_where(shards, epochs)
        return answers[: len(commands)]

    def require_servers(self, servers: Collection[str]) -> None:
        """Raises LostError where the epochs are bound to other servers than there are. They are looked at anew then."""
        if not self._run_ids <= set(servers):
            self._epochs = None
            raise LostError("Redis is not the server that it was, or has followed another one")

    def _look_where(self, shards: Iterable[Keys], epochs: Sequence[bytes]) -> None:
        """Raises LostError where a cluster has given one of these shards to another node than its epoch is bound to."""
        for keys in dict.fromkeys(shards):
            if self.link.server_of(keys.epoch) not in (None, epoch_server(epochs[keys.shard])):
                raise LostError(f"shard {keys.shard} is on another node of the cluster than it was")

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

    async def request_rebuild(self) -> None:
        """Have Redis rebuilt: Kafka says that its epoch is over. Nothing is done where it is another already."""
        await self._run([ShardCall(GIVE_UP, at, (), ()) for at in self.keys])

    async def request_full_rebuild(self) -> None:
        """Have Redis rebuilt from top to bottom: single keys are gone, and nobody knows which."""
        await self._run([ShardCall(REQUEST_FULL_REBUILD, at, (), ()) for at in self.keys])


# What the servers behind Redis say of themselves: what time it is there, and whether they evict what they hold.

HEALTH_COMMANDS = (("INFO", "memory"), ("INFO", "stats"), ("TIME",))
"""The time last: it is held against ours when the answer comes."""
NOEVICTION = "noeviction"


class ServerHealth:
    """What was heard of each: one where Redis stands alone, every node that holds keys where it is a cluster."""

    def __init__(self) -> None:
        self._skews: dict[str, SkewCheck] = {}
        self._evicting: dict[str, str] = {}
        """The policies by which some may evict."""
        self._epoch = ""
        self._evicted: dict[str, int] = {}
        """In this epoch: how many keys each had evicted when that was asked first."""

    def update(self, said: Mapping[str, tuple[int, Sequence[Any]]], *, epoch: str) -> list[str]:
        """Take in answers to `HEALTH_COMMANDS`, by the server's name, each with when it came, in ms.

        Returns those that have evicted keys in this epoch.
        """
        whose = {name: "Redis" if len(said) == 1 else f"Redis at {name}" for name in said}
        self._skews = {name: self._skews.get(name) or SkewCheck(whose[name]) for name in said}
        self._evicting = {}
        if epoch != self._epoch:
            self._epoch, self._evicted = epoch, {}
        forgetful = []
        for name, (now_ms, (memory, stats, (seconds, micros))) in said.items():
            self._skews[name].observe(int(seconds) * 1000 + int(micros) // 1000, now_ms)
            if int(memory["maxmemory"]) and memory["maxmemory_policy"] != NOEVICTION:
                self._evicting[name] = memory["maxmemory_policy"]
            evicted = int(stats["evicted_keys"])
            # Fewer than before: it was started anew, and its epoch is over anyway.
            if evicted > self._evicted.setdefault(name, evicted):
                forgetful.append(name)
        return forgetful

    def ahead_ms(self) -> int:
        """How far our clock is ahead of that from which it differs most (below 0: behind)."""
        return max((skew.ahead_ms() or 0 for skew in self._skews.values()), key=abs, default=0)

    def unready(self) -> str | None:
        """Why our clock cannot be trusted, or None."""
        return next((reason for skew in self._skews.values() if (reason := skew.unready())), None)

    def warning(self) -> str | None:
        """That leases may be evicted, or None."""
        if not self._evicting:
            return None
        which = ", ".join(f"{name} ({policy})" for name, policy in self._evicting.items())
        return f"Redis may evict leases: set maxmemory-policy to {NOEVICTION} at {which}"
