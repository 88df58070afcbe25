"""Redis emptied in mid-run: how long until it holds all leases again, and issuing goes on."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import cast

from redis.asyncio import Redis

from bench.machine import cpu_s
from bench.stack import running
from ringfence.dev.stack import Stack
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import Lease
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import LeaseStore, SignedLease
from ringfence.model.leases.lifecycle import ALL_LEASES, origin_of, record_id
from tools.schemas.examples import EXAMPLES

SIZES = (10_000, 100_000)
_AT_A_TIME = 500


def _lease(key: SigningKey, settings: ServiceSettings, number: int) -> SignedLease:
    id = str(uuid.uuid4())
    origin = origin_of(id, Coordinates(topic="bench", partition=0, offset=number, appended_at_ms=0))
    changes = {
        "iss": key.id, "aud": settings.trust_domain, "iat": int(time.time()), "jti": record_id(origin, 1),
        "lease_id": id, "seq": 1, "status": "active", "agent_id": f"bot-{number // 100}", "cause": None,
        "deadline": int(time.time()) + 40_000,
    }  # fmt: skip
    lease = cast(Lease, EXAMPLES[Lease]).model_copy(update=changes)
    return SignedLease(lease, sign(lease, key))


async def _publish(publisher: Publisher, leases: list[SignedLease]) -> None:
    sent = [
        await publisher.send(LEASE, Lease.typ, Outbound(one.claims.lease_id, one.jws, id=one.claims.jti))
        for one in leases
    ]
    await asyncio.gather(*sent)


async def _until_complete(store: LeaseStore) -> None:
    while True:
        try:
            await store.connect()
            return
        except UnavailableError:
            await asyncio.sleep(0.25)  # a look costs some milliseconds of CPU


async def _measure(stack: Stack, pids: dict[str, int]) -> None:
    settings = stack.settings()
    key = SigningKey.load(stack.trust.service_key("issuer"))
    store = LeaseStore(settings)
    await _until_complete(store)
    count = 0
    async with Publisher(settings, key.id) as publisher, Redis.from_url(settings.redis_url) as redis:
        for size in SIZES:
            while count < size:
                leases = [_lease(key, settings, count + n) for n in range(_AT_A_TIME)]
                await store.activate(leases)
                await _publish(publisher, leases)
                store.published((one.claims.lease_id, 1) for one in leases)
                await store.flush_outbox()
                count += len(leases)
            for how in ("emptied", "nothing missing"):
                if how == "emptied":
                    await redis.flushall()
                else:
                    await redis.delete(*(at.epoch for at in store.keys))
                before, start = cpu_s(pids), time.perf_counter()
                await _until_complete(store)
                took_s = time.perf_counter() - start
                used = cpu_s(pids)["revoker"] - before["revoker"]
                found = len(await store.find(ALL_LEASES))
                print(
                    f"{found} of {count} leases, {how}: {took_s:.1f} s until all is there and known, "
                    f"{used:.1f} s of it CPU of the revoker, {used / count * 1e6:.0f} µs a lease"
                )
    await store.close()


def run(kafka: str) -> None:
    """Print the numbers on this broker."""
    import uvloop

    with running(kafka, ("registry", "revoker")) as (stack, _, pids):
        uvloop.run(_measure(stack, pids))
