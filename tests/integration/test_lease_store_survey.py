"""Every kind of key of the lease store, damaged in every way: a survey names what is wrong, and a rebuild mends it."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.asyncio import Redis

from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import Coordinates
from ringfence.model.lease_store import (
    SELECTOR_KEEP_MS,
    Knowledge,
    LeaseStore,
    LostError,
    Restoration,
    SignedLease,
)
from ringfence.model.lease_store.keys import THUMBPRINT, Keys, outbox_field, uuid_bytes
from ringfence.model.leases.lifecycle import ALL_LEASES
from tests.brokers import RedisServer
from tests.support.leases import VISIBLE_MS, lease, minting, signed, step
from tests.support.lost_redis import declare_complete

SHARDS = 2
HOUR_MS = 3_600_000


@dataclass
class Known(Knowledge):
    """What Kafka would know of what is there."""

    leases: set[str] = field(default_factory=set)
    orders: set[str] = field(default_factory=set)
    grants: dict[str, set[str]] = field(default_factory=dict)

    def knows(self, lease_id: str) -> bool:
        return lease_id in self.leases

    def has_revocation(self, id: str) -> bool:
        return id in self.orders

    def names_grant(self, lease_id: str, grant_id: str) -> bool | None:
        return grant_id in self.grants[lease_id] if lease_id in self.grants else None


class Stock:
    """A Redis in which there is something under every kind of key that the lease store writes."""

    def __init__(self, store: LeaseStore, settings: ServiceSettings, redis: Any) -> None:
        self.store, self.settings, self.redis = store, settings, redis
        self.known = Known()
        self.grant_id = str(uuid.uuid4())
        self.order_id = str(uuid.uuid4())

    async def fill(self) -> None:
        """Leases of each status, some due soon and some later, two of one agent, with what belongs to them."""
        store = self.store
        later_s = (int(time.time()) + 7_200) // 60 * 60 + 30
        self.active = lease(deadline=later_s)
        shard = store.shard_of(self.active.claims.lease_id)
        while (
            store.shard_of((beside := lease(agent_id=self.active.claims.agent_id)).claims.lease_id) != shard
        ):
            pass
        claims = self.active.claims
        self.beside = signed(
            beside.claims.model_copy(
                update={"sponsor": claims.sponsor, "on_behalf_of": claims.on_behalf_of, "deadline": later_s}
            )
        )
        self.due = lease(deadline=int(time.time()) + 59)
        self.minting, self.ended, self.ending = minting(), lease(), lease()
        every = (self.active, self.beside, self.due, self.ended, self.ending)
        await store.activate(every)
        await store.prepare([self.minting], token="t", mint_ms=VISIBLE_MS)
        store.published([(one.claims.lease_id, 1) for one in (*every, self.minting)])
        cut = step(self.ending, "ending")
        await store.step([cut, step(self.ended, "expired")], visibility_ms=VISIBLE_MS)
        store.published([(self.ended.claims.lease_id, 2)])
        await store.flush_outbox()  # the cut stays: it waits to be published
        self.ending = cut.lease
        await store.use_grant(self.grant_id, self.active.claims.lease_id, limit=3)
        at = Coordinates(
            topic="ringfence.revocation.request.v1", partition=0, offset=1, appended_at_ms=1_700_000_000_000
        )
        await store.first_seen({self.order_id: at}, keep_ms=SELECTOR_KEEP_MS)
        await store.fence({"agent:x": 1_700_000_000_000})
        self.known.leases |= {one.claims.lease_id for one in (*every, self.minting)}
        self.known.orders.add(self.order_id)
        self.known.grants[self.active.claims.lease_id] = {self.grant_id}
        self.known.grants[self.beside.claims.lease_id] = set()

    def at(self, one: SignedLease) -> Keys:
        return self.store.at(one.claims.lease_id)

    def other(self, one: SignedLease) -> Keys:
        """The shard that is not that of a lease."""
        return self.store.keys[1 - self.store.shard_of(one.claims.lease_id)]

    async def found(self) -> dict[str, str]:
        """What a survey finds: about what, and what of it."""
        restoration = Restoration(self.settings)
        try:
            await restoration.look()
            survey = restoration.survey(await restoration.alive(), self.known, time.time_ns() // 1_000_000)
            return {one.about: one.what async for one in survey.strays()}
        finally:
            await restoration.close()

    async def repair(self) -> int:
        """Put it right, as a rebuild does."""
        restoration = Restoration(self.settings)
        try:
            assert await restoration.begin(anyway=True)
            survey = restoration.survey(await restoration.alive(), self.known, time.time_ns() // 1_000_000)
            count = await restoration.repair(survey.strays())
            await restoration.resume(restoration.epoch(1))
            return count
        finally:
            await restoration.close()


@pytest.fixture
async def stock(redis_server: RedisServer) -> AsyncIterator[Stock]:
    settings = ServiceSettings(
        redis_url=redis_server.url, redis_prefix=f"t{uuid.uuid4().hex[:8]}", redis_shards=SHARDS
    )
    await declare_complete(settings)
    store = LeaseStore(settings)
    await store.connect()
    async with Redis.from_url(settings.redis_url) as redis:
        stock = Stock(store, settings, redis)
        await stock.fill()
        yield stock
        await store.close()


Damage = Callable[[Stock], Awaitable[tuple[str, str]]]


def stranger(stock: Stock, shard: int) -> tuple[str, bytes]:
    """A lease of a shard that is nowhere."""
    while stock.store.shard_of(id := str(uuid.uuid4())) != shard:
        pass
    return id, uuid_bytes(id)


async def a_live_key_of_a_foreign_lease(stock: Stock) -> tuple[str, str]:
    id, raw = stranger(stock, 1)
    await stock.redis.set(stock.store.keys[1].live(raw), "")
    return f"live:{id} in shard 1", "stray"


async def a_live_key_in_the_wrong_shard(stock: Stock) -> tuple[str, str]:
    id, other = stock.active.claims.lease_id, stock.other(stock.active)
    await stock.redis.set(other.live(uuid_bytes(id)), "", px=HOUR_MS)
    return f"live:{id} in shard {other.shard}", "stray"


async def a_record_in_the_wrong_shard(stock: Stock) -> tuple[str, str]:
    id, other = stock.active.claims.lease_id, stock.other(stock.active)
    await stock.redis.hset(other.leases, uuid_bytes(id), f"a1 {stock.active.claims.deadline}\nx")
    return f"{id} in leases in shard {other.shard}", "stray"


async def an_end_in_the_wrong_shard(stock: Stock) -> tuple[str, str]:
    id, other = stock.ended.claims.lease_id, stock.other(stock.ended)
    await stock.redis.set(other.ended(uuid_bytes(id)), "r2 1\nx", px=HOUR_MS)
    return f"ended:{id} in shard {other.shard}", "stray"


async def an_end_of_what_lives(stock: Stock) -> tuple[str, str]:
    id, at = stock.active.claims.lease_id, stock.at(stock.active)
    await stock.redis.set(at.ended(uuid_bytes(id)), "r2 1\nx", px=HOUR_MS)
    return f"ended:{id} in shard {at.shard}", "stray"


async def an_end_that_is_kept_for_ever(stock: Stock) -> tuple[str, str]:
    id = stock.ended.claims.lease_id
    await stock.redis.persist(stock.at(stock.ended).ended(uuid_bytes(id)))
    return id, "mistimed"


async def a_deadline_of_a_foreign_lease(stock: Stock) -> tuple[str, str]:
    id, raw = stranger(stock, 0)
    await stock.redis.zadd(stock.store.keys[0].deadlines, {raw: 1})
    return f"{id} in deadlines in shard 0", "stray"


async def a_deadline_in_the_wrong_shard(stock: Stock) -> tuple[str, str]:
    id, other = stock.active.claims.lease_id, stock.other(stock.active)
    await stock.redis.zadd(other.deadlines, {uuid_bytes(id): 1})
    return f"{id} in deadlines in shard {other.shard}", "stray"


async def a_claim_on_what_has_ended(stock: Stock) -> tuple[str, str]:
    id, at = stock.ended.claims.lease_id, stock.at(stock.ended)
    await stock.redis.zadd(at.claimed, {uuid_bytes(id): 1})
    return f"{id} in claimed in shard {at.shard}", "stray"


async def a_claim_for_a_year(stock: Stock) -> tuple[str, str]:
    id, at = stock.ending.claims.lease_id, stock.at(stock.ending)
    await stock.redis.zadd(at.claimed, {uuid_bytes(id): time.time() * 1000 + 8760 * HOUR_MS})
    return f"{id} in claimed in shard {at.shard}", "mistimed"


async def a_lease_in_a_minute_that_is_not_its_own(stock: Stock) -> tuple[str, str]:
    claims, at = stock.active.claims, stock.at(stock.active)
    minute = claims.deadline // 60 + 5
    await stock.redis.sadd(at.due(minute * 60), uuid_bytes(claims.lease_id))
    return f"{claims.lease_id} in due:{minute} in shard {at.shard}", "stray"


async def a_minute_that_comes_later(stock: Stock) -> tuple[str, str]:
    at, minute = stock.at(stock.active), stock.active.claims.deadline // 60
    await stock.redis.zadd(at.minutes, {str(minute): time.time() * 1000 + 8760 * HOUR_MS})
    return f"{minute} in minutes in shard {at.shard}", "mistimed"


async def a_minute_that_is_none(stock: Stock) -> tuple[str, str]:
    await stock.redis.zadd(stock.store.keys[0].minutes, {"soon": 1})
    return "soon in minutes in shard 0", "stray"


async def an_ended_lease_among_those_of_its_agent(stock: Stock) -> tuple[str, str]:
    claims, at = stock.ended.claims, stock.at(stock.ended)
    await stock.redis.hset(at.index(claims.agent_id), uuid_bytes(claims.lease_id), "")
    return f"{claims.lease_id} in by:agent:{claims.agent_id} in shard {at.shard}", "stray"


async def a_lease_among_those_of_another_agent(stock: Stock) -> tuple[str, str]:
    claims, at = stock.due.claims, stock.at(stock.due)
    await stock.redis.hset(at.index("another"), uuid_bytes(claims.lease_id), "")
    return f"{claims.lease_id} in by:agent:another in shard {at.shard}", "stray"


async def a_key_of_an_agent_without_leases(stock: Stock) -> tuple[str, str]:
    await stock.redis.hset(stock.store.keys[0].index("nobody"), THUMBPRINT, b"\0" * 32)
    return "key in by:agent:nobody in shard 0", "stray"


async def too_many_counted_for_a_sponsor(stock: Stock) -> tuple[str, str]:
    claims, at = stock.active.claims, stock.at(stock.active)
    await stock.redis.hincrby(at.agents(f"sponsor:{claims.sponsor}"), claims.agent_id, 1)
    return f"{claims.agent_id} of sponsor:{claims.sponsor} in shard {at.shard}", "miscounted"


async def too_few_counted_for_a_user(stock: Stock) -> tuple[str, str]:
    """The next end would take the agent out, and the other lease would be found by its user no more."""
    claims, at = stock.active.claims, stock.at(stock.active)
    await stock.redis.hincrby(at.agents(f"user:{claims.on_behalf_of}"), claims.agent_id, -1)
    return f"{claims.agent_id} of user:{claims.on_behalf_of} in shard {at.shard}", "miscounted"


async def an_agent_counted_for_a_sponsor_that_it_never_had(stock: Stock) -> tuple[str, str]:
    claims, at = stock.active.claims, stock.at(stock.active)
    await stock.redis.hset(at.agents("sponsor:sue"), claims.agent_id, 2)
    return f"{claims.agent_id} of sponsor:sue in shard {at.shard}", "miscounted"


async def a_count_that_is_no_number(stock: Stock) -> tuple[str, str]:
    claims, at = stock.active.claims, stock.at(stock.active)
    await stock.redis.hset(at.agents(f"sponsor:{claims.sponsor}"), claims.agent_id, "many")
    return f"{claims.agent_id} of sponsor:{claims.sponsor} in shard {at.shard}", "miscounted"


async def a_record_that_no_sweeper_comes_to(stock: Stock) -> tuple[str, str]:
    id, at = stock.ending.claims.lease_id, stock.at(stock.ending)
    await stock.redis.zrem(at.outbox_times, outbox_field(id, 2))
    return f"{id}:2 in outbox in shard {at.shard}", "stuck"


async def a_record_that_waits_for_a_year(stock: Stock) -> tuple[str, str]:
    id, at = stock.ending.claims.lease_id, stock.at(stock.ending)
    await stock.redis.zadd(at.outbox_times, {outbox_field(id, 2): time.time() * 1000 + 8760 * HOUR_MS})
    return f"{id}:2 in outbox in shard {at.shard}", "stuck"


async def a_record_that_waited_for_an_hour(stock: Stock) -> tuple[str, str]:
    id, at = stock.ending.claims.lease_id, stock.at(stock.ending)
    await stock.redis.zadd(at.outbox_times, {outbox_field(id, 2): time.time() * 1000 - HOUR_MS})
    return f"{id}:2 in outbox in shard {at.shard}", "stuck"


async def a_time_of_a_record_that_is_gone(stock: Stock) -> tuple[str, str]:
    id, at = stock.ending.claims.lease_id, stock.at(stock.ending)
    await stock.redis.zadd(at.outbox_times, {outbox_field(id, 1): 1})
    return f"{id}:1 in outbox-times in shard {at.shard}", "stray"


async def another_record_under_the_name_of_one(stock: Stock) -> tuple[str, str]:
    id, at = stock.ending.claims.lease_id, stock.at(stock.ending)
    await stock.redis.hset(at.outbox, outbox_field(id, 2), stock.active.record)
    return f"{id}:2 in outbox in shard {at.shard}", "stray"


async def a_record_that_says_something_else_than_the_lease(stock: Stock) -> tuple[str, str]:
    claims, at = stock.ending.claims, stock.at(stock.ending)
    forged = signed(claims.model_copy(update={"deadline": claims.deadline + 900}))
    await stock.redis.hset(at.outbox, outbox_field(claims.lease_id, 2), forged.record)
    return f"{claims.lease_id}:2 in outbox in shard {at.shard}", "stray"


async def a_record_that_waits_in_the_wrong_shard(stock: Stock) -> tuple[str, str]:
    id, other = stock.ending.claims.lease_id, stock.other(stock.ending)
    await stock.redis.hset(other.outbox, outbox_field(id, 2), stock.ending.record)
    await stock.redis.zadd(other.outbox_times, {outbox_field(id, 2): time.time() * 1000})
    return f"{id}:2 in outbox in shard {other.shard}", "stray"


async def what_is_no_record_at_all(stock: Stock) -> tuple[str, str]:
    await stock.redis.hset(stock.store.keys[0].outbox, "x", "y")
    await stock.redis.zadd(stock.store.keys[0].outbox_times, {"x": time.time() * 1000})
    return "x in outbox in shard 0", "stray"


async def a_signer_that_has_no_number(stock: Stock) -> tuple[str, str]:
    await stock.redis.hset(stock.store.keys[0].signers, "k" * 40, b"\x63")
    return f"{'k' * 40} in signers in shard 0", "stray"


async def a_number_whose_signer_is_not_found_by_name(stock: Stock) -> tuple[str, str]:
    await stock.redis.hset(stock.store.keys[0].signers, b"\x63", "k" * 40)
    return "c in signers in shard 0", "stray"


async def a_sighting_of_what_nobody_ordered(stock: Stock) -> tuple[str, str]:
    """The order of this id, once it is given, would be taken for one that was given before."""
    id, _ = stranger(stock, 1)
    await stock.redis.set(
        stock.store.keys[1].selector(id), "ringfence.revocation.request.v1 0 1 1", px=HOUR_MS
    )
    return f"selector:{id} in shard 1", "stray"


async def a_sighting_in_the_wrong_shard(stock: Stock) -> tuple[str, str]:
    other = stock.store.keys[1 - stock.store.shard_of(stock.order_id)]
    place = await stock.redis.get(stock.store.at(stock.order_id).selector(stock.order_id))
    await stock.redis.set(other.selector(stock.order_id), place, px=HOUR_MS)
    return f"selector:{stock.order_id} in shard {other.shard}", "stray"


async def a_sighting_that_is_remembered_for_ever(stock: Stock) -> tuple[str, str]:
    at = stock.store.at(stock.order_id)
    await stock.redis.persist(at.selector(stock.order_id))
    return f"selector:{stock.order_id} in shard {at.shard}", "mistimed"


async def a_use_by_a_lease_that_names_no_grant(stock: Stock) -> tuple[str, str]:
    id, at = stock.beside.claims.lease_id, stock.store.at(stock.grant_id)
    await stock.redis.sadd(at.grant(stock.grant_id), uuid_bytes(id))
    return f"{id} in grant:{stock.grant_id} in shard {at.shard}", "stray"


async def a_grant_in_the_wrong_shard(stock: Stock) -> tuple[str, str]:
    other = stock.store.keys[1 - stock.store.shard_of(stock.grant_id)]
    await stock.redis.sadd(other.grant(stock.grant_id), uuid_bytes(stock.active.claims.lease_id))
    return f"grant:{stock.grant_id} in shard {other.shard}", "stray"


async def a_grant_that_is_remembered_for_ever(stock: Stock) -> tuple[str, str]:
    at = stock.store.at(stock.grant_id)
    await stock.redis.persist(at.grant(stock.grant_id))
    return f"grant:{stock.grant_id} in shard {at.shard}", "mistimed"


async def a_rebuild_that_never_gives_up(stock: Stock) -> tuple[str, str]:
    await stock.redis.set(stock.store.keys[0].rebuilding, "somebody")
    return "rebuilding in shard 0", "mistimed"


async def a_key_of_a_shard_that_there_is_not(stock: Stock) -> tuple[str, str]:
    await stock.redis.sadd(Keys(stock.settings.redis_prefix, 7).deadlines, "x")
    return "deadlines in shard 7", "stray"


DAMAGES: list[Damage] = [
    a_live_key_of_a_foreign_lease, a_live_key_in_the_wrong_shard, a_record_in_the_wrong_shard,
    an_end_in_the_wrong_shard, an_end_of_what_lives, an_end_that_is_kept_for_ever, a_deadline_of_a_foreign_lease,
    a_deadline_in_the_wrong_shard, a_claim_on_what_has_ended, a_claim_for_a_year,
    a_lease_in_a_minute_that_is_not_its_own, a_minute_that_comes_later, a_minute_that_is_none,
    an_ended_lease_among_those_of_its_agent, a_lease_among_those_of_another_agent,
    a_key_of_an_agent_without_leases, too_many_counted_for_a_sponsor, too_few_counted_for_a_user,
    an_agent_counted_for_a_sponsor_that_it_never_had, a_count_that_is_no_number, a_record_that_no_sweeper_comes_to,
    a_record_that_waits_for_a_year, a_record_that_waited_for_an_hour, a_time_of_a_record_that_is_gone,
    another_record_under_the_name_of_one, a_record_that_says_something_else_than_the_lease,
    a_record_that_waits_in_the_wrong_shard, what_is_no_record_at_all, a_signer_that_has_no_number,
    a_number_whose_signer_is_not_found_by_name, a_sighting_of_what_nobody_ordered, a_sighting_in_the_wrong_shard,
    a_sighting_that_is_remembered_for_ever, a_use_by_a_lease_that_names_no_grant, a_grant_in_the_wrong_shard,
    a_grant_that_is_remembered_for_ever, a_rebuild_that_never_gives_up, a_key_of_a_shard_that_there_is_not,
]  # fmt: skip
LEFT = (a_record_that_says_something_else_than_the_lease,)
"""Whose word counts is for a rebuild, which verifies both."""
NOT_SURVEYED = {"begun", "epoch", "spread", "fences"}
"""Kafka alone says what must stand there, and the check asks it: see the tests of the command."""


async def test_survey_of_undamaged_keys_finds_no_fault(stock: Stock) -> None:
    assert await stock.found() == {}
    assert await stock.repair() == 0


@pytest.mark.parametrize(("days", "left_days", "is_stray"), [(30.5, 0.5, False), (35, 0.9, False), (29, 2, True),
                                                             (30.5, 20, True), (400, 0.5, True)])  # fmt: skip
async def test_a_sighting_outlives_its_order_on_kafka_by_a_while(
    stock: Stock, days: float, left_days: float, is_stray: bool
) -> None:
    stock.known.orders.clear()
    at, day_ms = stock.store.at(stock.order_id), 24 * HOUR_MS
    seen_ms = time.time_ns() // 1_000_000 - int(days * day_ms)
    place = f"ringfence.revocation.request.v1 0 1 {seen_ms}"
    await stock.redis.set(at.selector(stock.order_id), place, px=int(left_days * day_ms))
    about = f"selector:{stock.order_id} in shard {at.shard}"
    assert await stock.found() == ({about: "stray"} if is_stray else {})


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda one: one.__name__)
async def test_a_damage_is_named_and_mended(stock: Stock, damage: Damage) -> None:
    about, what = await damage(stock)
    assert await stock.found() == {about: what}
    await stock.repair()
    assert await stock.found() == ({about: what} if damage in LEFT else {})
    # And what was right is as it was.
    store, claims = stock.store, stock.active.claims
    with contextlib.suppress(LostError):
        await store.connect()
    await store.connect()
    live = [stock.active, stock.beside, stock.due]
    assert all([(await store.look(one.claims.lease_id)).active for one in live])
    for mark in (f"agent:{claims.agent_id}", f"sponsor:{claims.sponsor}", f"user:{claims.on_behalf_of}"):
        assert set(await store.find(mark)) == {claims.lease_id, stock.beside.claims.lease_id}
    assert await store.count([f"sponsor:{claims.sponsor}"]) == {f"sponsor:{claims.sponsor}": 2}
    assert len(await store.find(ALL_LEASES)) == 5
    stored = await store.get([one.claims.lease_id for one in (*live, stock.minting, stock.ending)])
    assert [one.jws.decode() for one in stored.values()] == [
        one.jws for one in (*live, stock.minting, stock.ending)
    ]


async def test_stale_survey_repairs_nothing_after_another_rebuild(
    stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it found wrong is put right by then, and counted on from there."""
    await too_many_counted_for_a_sponsor(stock)
    restoration = Restoration(stock.settings)
    try:
        assert await restoration.begin(anyway=True)
        survey = restoration.survey(await restoration.alive(), stock.known, time.time_ns() // 1_000_000)
        keep = restoration.keep

        async def kept_for_the_last_time() -> None:
            await keep()
            for at in stock.store.keys:
                await stock.redis.set(at.rebuilding, "another", px=HOUR_MS)

        monkeypatch.setattr(restoration, "keep", kept_for_the_last_time)
        before = await stock.found()
        with pytest.raises(LostError):
            await restoration.repair(survey.strays())
        assert await stock.found() == before
    finally:
        await restoration.close()


async def test_every_kind_of_key_is_there_and_damaged_by_some_test(stock: Stock) -> None:
    def kinds(keys: set[bytes]) -> set[str]:
        names = (key.partition(b"}:")[2].decode("ascii", "replace") for key in keys)
        return {name.partition(":")[0] for name in names}

    async def snapshot() -> dict[bytes, Any]:
        pattern = f"{stock.settings.redis_prefix}{{*}}:*"
        return {
            key: (await stock.redis.dump(key), await stock.redis.pexpiretime(key))
            async for key in stock.redis.scan_iter(pattern)
        }

    written = kinds(set(await snapshot()))
    touched: set[str] = set()
    for damage in DAMAGES:
        before = await snapshot()
        await damage(stock)
        after = await snapshot()
        touched |= kinds({key for key in before.keys() | after.keys() if before.get(key) != after.get(key)})
    assert written - touched == NOT_SURVEYED
    names = {name for name, value in vars(stock.store.keys[0]).items() if isinstance(value, str | bytes)}
    assert len(written | {"rebuilding"}) == len(names - {"_base"}) + 2, (
        "grants and sightings have no prefix there"
    )


async def test_a_number_that_was_taken_away_is_not_given_to_another_signer(stock: Stock) -> None:
    """Records would change hands."""
    at = stock.at(stock.active)
    for number in range(1, 4):
        await stock.redis.hset(at.signers, mapping={f"{number}" * 40: bytes([number + 1])})
        await stock.redis.hset(at.signers, mapping={bytes([number + 1]): f"{number}" * 40})
    await stock.redis.hdel(at.signers, bytes([2]), "1" * 40)
    before = await stock.redis.hgetall(at.signers)
    while True:
        other = lease()
        if stock.at(other) is at:
            break
    key = SigningKey.generate("spiffe://acme.example/service/issuer")
    other = SignedLease(other.claims, sign(other.claims, key))
    await stock.store.activate([other])
    after = await stock.redis.hgetall(at.signers)
    assert len(after) == len(before) + 2
    assert {field: value for field, value in after.items() if field in before} == before
