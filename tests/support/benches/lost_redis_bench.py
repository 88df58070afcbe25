"""A desk whose Redis is lost, in all the ways that it can be."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jws import Signed, parse, sign, verify
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import TERMINAL, Lease, LeaseStatus
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import LeaseStore, SignedLease
from ringfence.model.leases.epochs import Epochs
from ringfence.model.leases.lifecycle import ALL_LEASES, origin_of, record_id, selector_keys, statement
from tests.chaos.valkey import ChaosValkey
from tests.support.benches.issuer_bench import Asked, IssuerBench


class LostRedisBench:
    """A desk, and the Redis that it loses."""

    def __init__(self, desk: IssuerBench, redis: ChaosValkey) -> None:
        self.desk = desk
        self.world = desk.world
        self.redis = redis
        self.store = LeaseStore(desk.world.settings("issuer"))

    async def close(self) -> None:
        await self.store.close()

    async def epochs(self) -> set[bytes | None]:
        """What says that Redis is complete; anew after each rebuild, None where it is not."""
        return {epoch for _, epoch in await self.store.link.inspect([at.epoch for at in self.store.keys])}

    async def rebuilt(self, before: set[bytes | None]) -> None:
        """Return once Redis has been rebuilt, and issuer and revoker know."""
        runtimes = [self.world.runtimes[role] for role in ("issuer", "revoker")]
        async with asyncio.timeout(60):
            while not await self._is_rebuilt(before) or any(runtime.unready() for runtime in runtimes):
                await asyncio.sleep(0.05)

    async def _is_rebuilt(self, before: set[bytes | None]) -> bool:
        try:
            if not (before | {None}).isdisjoint(await self.epochs()):
                return False
            await self.store.connect()
        except UnavailableError:
            return False
        return True

    async def lose(self, how: str) -> None:
        """Lose Redis, and return once it has been rebuilt."""
        before = await self.epochs()
        await _lost(self.redis, how)
        await self.rebuilt(before)

    async def life(self, asked: Asked) -> list[LeaseStatus]:
        """The whole life of a lease that has ended, checked to say one thing for each `seq`, and to have one end."""
        await self.desk.lease(asked.lease_id, *TERMINAL)
        records = {statement(one.claims): one for one, void in await self.judged(asked.lease_id) if not void}
        life = sorted((one.claims for one in records.values()), key=lambda lease: lease.seq)
        assert [lease.seq for lease in life] == list(range(1, len(life) + 1))
        assert [lease.status in TERMINAL for lease in life] == [False] * (len(life) - 1) + [True]
        return [lease.status for lease in life]

    async def judged(self, id: str) -> list[tuple[Signed[Lease], bool]]:
        """The records of a lease as they stand on the topic, and whether each is void."""
        epochs, found = Epochs(self.world.trust), []
        for record in await self.world.records(LEASE):
            if epochs.took(record) or record.key != id:
                continue
            find = self.world.trust.finder("issuer", "revoker", at_s=record.appended_at_ms / 1000)
            one = verify(parse(record.value), Lease, find, audience=self.world.td)
            found.append((one, epochs.is_void(record, one.claims.epoch)))
        return found

    async def release(self, asked: Asked) -> None:
        claims, _ = await self.desk.revoke(self.desk.bot, "release", lease_id=asked.lease_id)
        await self.desk.verdict(claims)

    async def uses(self, grant_id: str) -> int:
        """How many leases name a grant, as Redis has it."""
        (count,) = await self.store.link.pipeline([("SCARD", self.store.at(grant_id).grant(grant_id))])
        return int(count)

    async def active(self, *leases: Asked) -> None:
        """All of these are live in Redis, with everything that belongs to it."""
        for asked in leases:
            looked = await self.store.look(asked.lease_id)
            assert looked.active
            lease = await self.desk.lease(asked.lease_id, "active")
            for mark in (*selector_keys(lease), ALL_LEASES):
                assert asked.lease_id in await self.store.find(mark)


async def _lost(redis: ChaosValkey, how: str) -> None:
    match how:
        case "flushed":
            await redis.flushed()
        case "empty":
            await redis.lost(0)
        case "restarted":
            await redis.killed(0)
        case "promoted":
            await redis.promoted(0)


async def late(place: LostRedisBench, status: LeaseStatus = "active", **fields: Any) -> SignedLease:
    """A record that its author wrote to a Redis that has been lost since, and publishes only now."""
    asked, _ = await place.desk.issued("read")
    lease = await place.desk.lease(asked.lease_id, "active")
    id = str(uuid.uuid4())
    origin = origin_of(id, Coordinates(topic="t", partition=0, offset=0, appended_at_ms=0))
    other = lease.model_copy(update={"lease_id": id, "jti": record_id(origin, 1), "status": status, **fields})
    return SignedLease(other, sign(other, place.world.key("issuer")))


async def publish(place: LostRedisBench, *records: SignedLease) -> None:
    async with Publisher(place.world.settings("issuer"), place.world.key("issuer").id) as publisher:
        for one in records:
            ack = await publisher.send(
                LEASE, Lease.typ, Outbound(one.claims.lease_id, one.jws, id=one.claims.jti)
            )
            await ack
