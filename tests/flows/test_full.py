"""Redis has no memory left: agents are told to come again, and leases go on ending, which makes room."""

from __future__ import annotations

from redis.asyncio import Redis

from ringfence.messages.lease import Selector
from tests.support.benches.lost_redis_bench import LostRedisBench


async def test_request_while_redis_is_full_is_refused_with_retry_after(place: LostRedisBench) -> None:
    desk = place.desk
    released, _ = await desk.issued("read")
    revoked, _ = await desk.issued("read")
    expiring, _ = await desk.issued("read", ttl_s=60)
    async with Redis.from_url(place.world.settings("issuer").redis_url) as client:
        await client.config_set("maxmemory", "1")
        asked = await desk.ask("read")
        await desk.decide(asked)
        refusal = await desk.refused(asked)
        assert [reason.code for reason in refusal.reasons] == ["overloaded"]
        assert refusal.retry_after_s == 5
        await place.release(released)
        assert await place.life(released) == ["active", "ending", "released"]
        order, _ = await desk.revoke(desk.sam, selector=Selector(agent_id=desk.bot.name), reason="enough")
        assert (await desk.verdict(order)).result == "2"
        for asked in (revoked, expiring):
            assert await place.life(asked) == ["active", "ending", "revoked"]
        await client.config_set("maxmemory", "0")
    again, _ = await desk.issued("read")
    await place.active(again)


async def test_a_lease_reaches_its_deadline_and_redis_is_rebuilt_while_it_is_full(
    place: LostRedisBench,
) -> None:
    desk = place.desk
    expiring, _ = await desk.issued("read", ttl_s=8)
    kept, _ = await desk.issued("read")
    before = await place.epochs()
    async with Redis.from_url(place.world.settings("issuer").redis_url) as client:
        await client.config_set("maxmemory", "1")
        await client.delete(*(at.epoch for at in place.store.keys))
        await place.rebuilt(before)
        assert await place.life(expiring) == ["active", "expired"]
        await place.active(kept)
        await client.config_set("maxmemory", "0")
