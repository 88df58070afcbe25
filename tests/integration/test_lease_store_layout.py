"""How leases stand in Redis: small, and as they were when they are read; by the minute, until that has nearly come."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.lease import Lease
from ringfence.model.lease_store import LeaseStore, LostError, SignedLease
from ringfence.model.lease_store.connection import server_id
from ringfence.model.lease_store.keys import AHEAD_MS, THUMBPRINT, Keys, uuid_bytes
from ringfence.model.leases.lifecycle import ALL_LEASES
from tests.brokers import RedisServer
from tests.support.leases import REVOKER, VISIBLE_MS, lease, minted, minting, soon, step
from tests.support.lost_redis import declare_complete

LATER_S = 7_200
OTHER_THUMBPRINT = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"
ISSUER = "spiffe://acme.example/service/issuer"


@pytest.fixture
async def settings(redis_server: RedisServer) -> ServiceSettings:
    settings = ServiceSettings(
        redis_url=redis_server.url, redis_prefix=f"t{uuid.uuid4().hex[:8]}", redis_shards=1
    )
    await declare_complete(settings)
    return settings


@pytest.fixture
async def redis(settings: ServiceSettings) -> AsyncIterator[Any]:
    async with Redis.from_url(settings.redis_url) as client:
        yield client


@pytest.fixture
def at(store: LeaseStore) -> Keys:
    return store.keys[0]


def later() -> int:
    """A deadline in the middle of a minute that comes much later."""
    return (int(time.time()) + LATER_S) // 60 * 60 + 30


async def kept(redis: Any, at: Keys, one: SignedLease) -> bytes:
    found = await redis.hget(at.leases, uuid_bytes(one.claims.lease_id))
    assert isinstance(found, bytes)
    return found


async def read(store: LeaseStore, one: SignedLease) -> str:
    return (await store.get([one.claims.lease_id]))[one.claims.lease_id].jws.decode()


# --- records ----------------------------------------------------------------------------------------------------------


async def test_the_key_of_who_signed_and_that_of_the_agent_stand_there_once(
    store: LeaseStore, redis: Any, at: Keys
) -> None:
    leases = [lease(agent_id="bot") for _ in range(3)]
    await store.activate(leases)
    texts = [await kept(redis, at, one) for one in leases]
    alone = lease(agent_id="bot", key_thumbprint=OTHER_THUMBPRINT), lease(agent_id="bot", key_thumbprint=None)
    await store.activate(alone)
    texts += [await kept(redis, at, one) for one in alone]
    assert [len(text) - len(texts[0]) for text in texts] == [0, 0, 0, 32, 0]
    assert max(map(len, texts)) < 0.22 * len(leases[0].jws)
    assert [await read(store, one) for one in (*leases, *alone)] == [one.jws for one in (*leases, *alone)]
    assert await redis.hlen(at.signers) == 2
    assert await store.count(["agent:bot"]) == {"agent:bot": 5}


async def test_records_of_several_signers_come_back_as_they_were(store: LeaseStore) -> None:
    leases = []
    for alg in ("ES256", "EdDSA", "ES256"):
        key, claims = SigningKey.generate(ISSUER, alg), lease(iss=ISSUER).claims
        leases.append(SignedLease(claims, sign(claims, key)))
    await store.activate(leases)
    await store.step([step(one, "ending") for one in leases], visibility_ms=VISIBLE_MS)
    again = await store.activate(leases)
    assert [a.stored and a.stored.status for a in again] == ["ending"] * 3
    others = [SignedLease(lease(iss=ISSUER).claims, "") for _ in leases]
    others = [SignedLease(o.claims, sign(o.claims, SigningKey.generate(ISSUER))) for o in others]
    await store.activate(others)
    assert [await read(store, one) for one in others] == [one.jws for one in others]


async def test_more_signers_than_have_a_number_are_written_out(
    store: LeaseStore, redis: Any, at: Keys
) -> None:
    await redis.hset(at.signers, mapping={f"signer {n}": n for n in range(510)})
    one = lease()
    await store.activate([one])
    assert await read(store, one) == one.jws
    assert await redis.hlen(at.signers) == 510


async def test_through_all_its_states_a_lease_is_read_as_it_was_written(
    store: LeaseStore, redis: Any, at: Keys
) -> None:
    started = minting(agent_id="bot")
    active = minted(started)
    await store.prepare([started], token="a", mint_ms=VISIBLE_MS)
    assert await read(store, started) == started.jws
    await store.activate([active], token="a")
    assert [a.outcome for a in await store.activate([active], token="a")] == ["activated"]
    assert await read(store, active) == active.jws
    for statuses in (("ending",), ("ending", "revoked")):
        one = step(active, *statuses)
        assert [s.outcome for s in await store.step([one], visibility_ms=VISIBLE_MS)] == ["done"]
        assert await read(store, active) == one.lease.jws
    assert await redis.hlen(at.leases) == 0
    assert await redis.pttl(at.ended(uuid_bytes(active.claims.lease_id))) > 0
    assert not await redis.exists(at.index("bot"))  # and with it what records of the agent leave out


@pytest.mark.parametrize("gone", ["signers", "thumbprint"])
async def test_a_record_of_which_something_is_gone_is_none(
    store: LeaseStore, redis: Any, at: Keys, gone: str
) -> None:
    one = lease(agent_id="bot")
    await store.activate([one])
    if gone == "signers":
        await redis.delete(at.signers)
    else:
        await redis.hdel(at.index("bot"), THUMBPRINT)
    stored = (await store.look(one.claims.lease_id)).stored
    assert stored is not None
    assert (stored.status, stored.seq, stored.jws) == ("active", 1, b"")


# --- deadlines --------------------------------------------------------------------------------------------------------


async def test_distant_deadline_moves_to_the_deadlines_shortly_before_its_minute(
    store: LeaseStore, redis: Any, at: Keys
) -> None:
    deadline = later()
    leases = [lease(deadline=deadline + n) for n in range(5)]
    await store.activate(leases)
    assert await redis.zcard(at.deadlines) == 0
    (state,) = await store.claim([0], limit=2, visibility_ms=VISIBLE_MS)
    assert (state.leases, state.next_ms) == ({}, deadline // 60 * 60_000 - AHEAD_MS)
    minute = (await redis.zrange(at.minutes, 0, -1))[0]
    await redis.zadd(at.minutes, {minute: 1})  # as if it had come
    for there in (2, 4, 5, 5):
        (state,) = await store.claim([0], limit=2, visibility_ms=VISIBLE_MS)
        assert state.leases == {}
        assert await redis.zcard(at.deadlines) == there
        assert sorted(await store.find(ALL_LEASES)) == sorted(one.claims.lease_id for one in leases)
    assert state.next_ms == deadline * 1000
    assert dict(await redis.zrange(at.deadlines, 0, -1, withscores=True)) == {
        uuid_bytes(one.claims.lease_id): one.claims.deadline * 1000 for one in leases
    }


async def test_lease_ended_before_its_minute_gets_no_deadline(
    store: LeaseStore, redis: Any, at: Keys
) -> None:
    leases = [lease(deadline=later()) for _ in range(3)]
    await store.activate(leases)
    cut, ended, _ = leases
    await store.step([step(cut, "ending"), step(ended, "expired")], visibility_ms=VISIBLE_MS)
    minute = (await redis.zrange(at.minutes, 0, -1))[0]
    await redis.zadd(at.minutes, {minute: 1})
    await store.claim([0], limit=10, visibility_ms=VISIBLE_MS)
    assert await redis.zrange(at.deadlines, 0, -1) == [uuid_bytes(leases[2].claims.lease_id)]
    assert await redis.zcard(at.minutes) == 0


async def test_a_lease_that_is_restored_before_its_minute_is_due_then(
    store: LeaseStore, redis: Any, at: Keys
) -> None:
    far, near = lease(deadline=later()), lease(deadline=soon())
    assert await store.restore([far, near]) == 2
    assert await redis.zrange(at.deadlines, 0, -1) == [uuid_bytes(near.claims.lease_id)]
    assert await redis.smembers(at.due(far.claims.deadline)) == {uuid_bytes(far.claims.lease_id)}
    ended = step(far, "ending", "revoked").lease
    assert await store.restore([ended]) == 1
    assert await store.find(ALL_LEASES) == [near.claims.lease_id]
    assert await read(store, far) == ended.jws


# --- very many at once ------------------------------------------------------------------------------------------------


async def test_more_are_claimed_at_once_than_a_command_takes(store: LeaseStore) -> None:
    over = {one.claims.lease_id: one for one in (lease(deadline=int(time.time()) - 1) for _ in range(1_100))}
    await store.restore(list(over.values()))
    (first,) = await store.claim([0], limit=1_050, visibility_ms=0)
    assert len(first.leases) == 1_050
    (again,) = await store.claim([0], limit=10_000, visibility_ms=VISIBLE_MS)
    assert {id: one and one.jws.decode() for id, one in again.leases.items()} == {
        id: one.jws for id, one in over.items()
    }
    (none,) = await store.claim([0], limit=10_000, visibility_ms=VISIBLE_MS)
    assert none.leases == {}


async def test_leases_of_one_agent_that_end_together_leave_the_others(
    store: LeaseStore, redis: Any, at: Keys
) -> None:
    """Also where the agent had another sponsor meanwhile: the key that their records share goes with the last."""

    def of(sponsor: str) -> SignedLease:
        return lease(agent_id="bot", sponsor=sponsor, on_behalf_of="maria")

    sams, sues = [of("sam") for _ in range(3)], [of("sue") for _ in range(2)]
    await store.activate([*sams, *sues])
    marks = ["agent:bot", "sponsor:sam", "sponsor:sue"]

    async def end(*leases: SignedLease) -> list[int]:
        steps = [step(one, "expired") for one in leases]
        assert {one.outcome for one in await store.step(steps, visibility_ms=VISIBLE_MS)} == {"done"}
        return list((await store.count(marks)).values())

    assert await end(*sams[:2], sues[0]) == [2, 1, 1]
    assert await end(sues[1]) == [1, 1, 0]
    assert await redis.hexists(at.index("bot"), THUMBPRINT)
    assert await read(store, sams[2]) == sams[2].jws
    assert await end(sams[2]) == [0, 0, 0]
    assert await redis.exists(at.index("bot"), at.agents("sponsor:sam"), at.agents("user:maria")) == 0


# --- other layouts ----------------------------------------------------------------------------------------------------


async def test_a_redis_of_the_former_layout_is_taken_for_lost(settings: ServiceSettings, redis: Any) -> None:
    own = settings.model_copy(update={"redis_prefix": f"t{uuid.uuid4().hex[:8]}"})
    server = server_id(await redis.info())
    await redis.set(f"{own.redis_prefix}:{{0}}:epoch", f"{server}.1.0a1b2c3d")
    store = LeaseStore(own)
    with pytest.raises(LostError, match="not known to be complete"):
        await store.connect()
    await store.close()


def test_the_example_is_one_that_is_taken_apart() -> None:
    """Otherwise these tests would be about something else."""
    one = lease()
    assert one.record[0] == 3
    assert parse(one.jws).unverified_claims(Lease).iss == REVOKER
    assert one.claims.key_thumbprint is not None
