"""Live leases in Valkey: what each weighs, and how late it ends, however many there are.

Most leases are written straight into Valkey, with everything that activation writes and with far deadlines. Among them
come real, signed ones that are due within the next seconds; the revoker ends them as it ends any. Beside each of those
lies an untouched key with the same deadline: when Valkey tells that it has expired is what expired-key events alone
would have given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from redis.asyncio import Redis as AsyncRedis

from bench.filling import PER_AGENT, PER_TASK, SPONSORS, TARGETS, USERS, Valkey, signed_leases
from bench.machine import percentile
from bench.stack import running
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.lease import Lease
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import SignedLease
from ringfence.model.lease_store.keys import uuid_bytes

SIZES = (10_000, 100_000, 1_000_000)
DUE, DUE_OVER_S = 1_000, 20
"""So many leases are due, in so many seconds."""
FIRST_AFTER_S = 8
WAIT_S = 30
"""How long after the last deadline an event is waited for."""
_SHADOW = b"shadow:"
_SAMPLES = 1_000
"""Of so many entries of a key the weight is looked at."""


class Ends:
    """When leases ended: on Kafka, and as Valkey told of keys that nobody touched."""

    def __init__(self, settings: ServiceSettings, leases: Sequence[Lease]) -> None:
        self._deadlines_ms = {lease.lease_id: lease.deadline * 1000 for lease in leases}
        self._by_key = {_SHADOW + uuid_bytes(lease.lease_id): lease.deadline * 1000 for lease in leases}
        self._settings = settings
        self.on_kafka: dict[str, float] = {}
        self.told: list[float] = []

    def _on_records(self, records: Sequence[Received]) -> None:
        for record in records:
            deadline_ms = self._deadlines_ms.get(record.key or "")
            if deadline_ms is not None and record.key is not None:
                self.on_kafka.setdefault(record.key, record.appended_at_ms - deadline_ms)

    async def _listen(self) -> None:
        async with (
            AsyncRedis.from_url(self._settings.redis_url) as redis,
            redis.pubsub(ignore_subscribe_messages=True) as pubsub,
        ):
            await pubsub.subscribe("__keyevent@0__:expired")
            async for message in pubsub.listen():
                deadline_ms = self._by_key.get(message["data"])
                if deadline_ms is not None:
                    self.told.append(time.time() * 1000 - deadline_ms)

    async def watch(self, until_s: float) -> None:
        """Until all have ended and Valkey has told of all, or it is `until_s`."""
        listening = asyncio.create_task(self._listen())
        async with Follower(self._settings, [LEASE], self._on_records, since_ms=None):
            while time.time() < until_s:
                if min(len(self.on_kafka), len(self.told)) == len(self._deadlines_ms):
                    break
                await asyncio.sleep(0.1)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


def _due(key: SigningKey, trust_domain: str, first_s: int) -> list[SignedLease]:
    return signed_leases(
        key,
        trust_domain,
        DUE,
        lambda number: first_s + number * DUE_OVER_S // DUE,
        lambda number: f"due-{number % 40}",
    )


def _shadows(leases: Iterable[SignedLease]) -> Iterator[tuple[Any, ...]]:
    """An untouched key beside each."""
    for one in leases:
        yield "SET", _SHADOW + uuid_bytes(one.claims.lease_id), "", "PXAT", one.claims.deadline * 1000


def _describe(name: str, lags_ms: list[float]) -> str:
    if not lags_ms:
        return f"  {name:34} none of {DUE}"
    return (
        f"  {name:34} {len(lags_ms)} of {DUE}: p50 {percentile(lags_ms, 0.5):.0f} ms, "
        f"p99 {percentile(lags_ms, 0.99):.0f} ms, max {max(lags_ms):.0f} ms"
    )


def _weigh(valkey: Valkey, before: int, id: str, jws: str) -> None:
    at, each = valkey.at(id), (valkey.used() - before) / valkey.count
    leases = valkey.redis.hlen(at.leases)

    def weight(*keys: bytes | str) -> float:
        return sum(int(cast(Any, valkey.redis.memory_usage(key, samples=_SAMPLES))) for key in keys) / leases

    parts = {
        "live key": weight(at.live(uuid_bytes(id))) * leases,
        "deadline": weight(at.minutes, *(at.due(minute * 60) for minute in valkey.minutes(at))),
        "agent": weight(*valkey.found(at.index("*"))),
        "sponsor and user": weight(*valkey.found(at.agents("*"))),
        "record": weight(at.leases, at.signers),
    }
    parts["tables of all keys"] = each - sum(parts.values())
    print(
        f"  {each:.0f} B a lease: " + ", ".join(f"{name} {part:.0f}" for name, part in parts.items()) + "; "
        f"its signed record has {len(cast(bytes, valkey.redis.hget(at.leases, cast(str, uuid_bytes(id)))))} B there, "
        f"{len(jws)} B as a JWS"
    )


def run(kafka: str) -> None:
    """Print the numbers for each size on this broker."""
    import uvloop

    with running(kafka, ("registry", "revoker")) as (stack, _, _):
        settings = stack.settings()
        key = SigningKey.load(stack.trust.service_key("issuer"))
        valkey = Valkey(settings)
        before = valkey.used()
        jws = _due(key, settings.trust_domain, 0)[0].jws
        print(
            f"one agent for {PER_AGENT} leases, one task for {PER_TASK}, {SPONSORS} sponsors, {USERS} users, "
            f"{TARGETS} targets; {DUE} leases are due in {DUE_OVER_S} s"
        )
        for size in SIZES:
            id = valkey.fill(size, jws)
            valkey.settle()
            print(f"{size} live leases")
            _weigh(valkey, before, id, jws)
            filled = valkey.used()
            first_s = int(time.time()) + FIRST_AFTER_S
            due = _due(key, settings.trust_domain, first_s)
            ends = Ends(settings, [one.claims for one in due])
            valkey.put(due)
            valkey.send(_shadows(due))
            uvloop.run(ends.watch(first_s + DUE_OVER_S + WAIT_S))
            print(_describe("deadline to Kafka", list(ends.on_kafka.values())))
            print(_describe("expired-key events alone", ends.told))
            before += valkey.used() - filled  # what has ended is kept for a day, and is not weighed
