"""The revoker on a real broker and a real Redis, next to the issuer: every lease ends, once, and only by who may."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from ringfence.kernel.errors import UnavailableError
from ringfence.kernel.ids import digest
from ringfence.kernel.jws import Signed, sign
from ringfence.kernel.kafka import Outbound, Received
from ringfence.kernel.keys import b64encode
from ringfence.messages.base import Topic
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import TERMINAL, EndCause, Lease, LeaseStatus, RevocationRequest, Selector
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import (
    AgentDecommission,
    AgentRecord,
    AgentResume,
    AgentSetCeiling,
    AgentSuspend,
    AgentTransfer,
    TargetRemove,
    TaskEnd,
    UserDisable,
)
from ringfence.messages.topics import AGENT, DEAD_LETTER, LEASE, REVOCATION_REQUEST, TARGET, TASK, USER
from ringfence.messages.trust import ServiceRole
from ringfence.model.lease_store import Activation, LeaseStore, SignedLease, Step
from ringfence.model.leases import follow, origin_of, record_id
from ringfence.revoker import foresight
from ringfence.revoker.ending import Ender
from ringfence.revoker.foresight import ForeseenEnd, Foresight
from ringfence.revoker.issued import IssuedHandler
from ringfence.revoker.said import Said
from ringfence.revoker.settings import RevokerSettings
from ringfence.revoker.watching import LeaseWatch
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.flows.desk import Asked, Desk, another, opened_desks
from tests.ledger import FixedClock
from tests.world import WITHIN_S, Party, World, scope

QUICK: dict[ServiceRole, Any] = {"revoker": RevokerSettings(visibility_ms=300, outbox_age_ms=500)}


@pytest.fixture(scope="module")
async def office(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[Desk]:
    """Registry, issuer and revoker, once for all tests here."""
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.kind == "embedded") as world,
        opened_desks(world) as desk,
        world.running("issuer", "revoker", own=QUICK),
    ):
        yield desk


@pytest.fixture
async def store(office: Desk) -> AsyncIterator[LeaseStore]:
    store = LeaseStore(office.world.settings("issuer"))
    yield store
    await store.close()


async def ended(desk: Desk, asked: Asked) -> list[Signed[Lease]]:
    """All records of a lease once it is over, each once, by `seq`; checked to be one life with one end."""
    await desk.lease(asked.lease_id, *TERMINAL)
    records = {record.compact: record for record in await desk.records(asked.lease_id)}
    life = sorted(records.values(), key=lambda record: record.claims.seq)
    assert [record.claims.seq for record in life] == list(range(1, len(life) + 1))
    assert [record.claims.status in TERMINAL for record in life] == [False] * (len(life) - 1) + [True]
    assert {record.claims.model_copy(update=_CHANGING).model_dump_json() for record in life[1:]} == {
        life[0].claims.model_copy(update=_CHANGING).model_dump_json()
    }
    return life


_CHANGING = {"iss": "", "iat": 0, "jti": "", "seq": 1, "status": "active", "cause": None, "epoch": None}


def statuses(life: list[Signed[Lease]]) -> list[LeaseStatus]:
    return [record.claims.status for record in life]


async def lives(desk: Desk, store: LeaseStore, *leases: Asked) -> None:
    """Fails unless all of these are active and nothing was written about them but that they are."""
    for asked in leases:
        assert (await store.look(asked.lease_id)).active
        assert {record.claims.status for record in await desk.issued_records(asked.lease_id)} == {"active"}


async def accepted(desk: Desk, by: Party, **fields: Any) -> ServiceEvent:
    claims, _ = await desk.revoke(by, **fields)
    event = await desk.verdict(claims)
    assert event.kind == "accepted", event.reasons
    return event


async def refused(desk: Desk, by: Party, **fields: Any) -> str:
    claims, _ = await desk.revoke(by, **fields)
    event = await desk.verdict(claims)
    assert (event.kind, event.subject) == ("refused", "revocation.request")
    return event.reasons[0].code


async def redeliver(desk: Desk, topic: Topic[Any], at: Coordinates) -> None:
    """Hand a record that was handled once to the revoker again, as a broker does after a crash before the commit."""
    name = topic.name(desk.world.prefix)
    record = await desk.world.record_at(topic, at)
    for consumer in desk.world.runtimes["revoker"]._consumers:
        if name in consumer._handlers:
            await consumer._handlers[name]([record])


async def expired_in_time(desk: Desk, store: LeaseStore, asked: Asked) -> None:
    """A lease ends by its deadline alone, not before it, and Redis has what Kafka has."""
    life = await ended(desk, asked)
    assert statuses(life) == ["active", "expired"]
    end = life[-1].claims
    assert end.iss == desk.world.key("revoker").id
    assert end.cause == EndCause(kind="deadline", at_ms=end.deadline * 1000)
    record = await desk.world.consume_until(
        LEASE, lambda r: r.key == asked.lease_id and r.value.decode() == life[-1].compact
    )
    assert record.appended_at_ms >= end.deadline * 1000 - 20  # two clocks of one machine
    every = await desk.world.records(LEASE)
    assert {r.partition for r in every if r.key == asked.lease_id} == {record.partition}
    assert (await store.get([asked.lease_id]))[asked.lease_id].jws.decode() == life[-1].compact
    assert asked.lease_id not in await store.find(f"agent:{desk.bot.name}")


# --- time -------------------------------------------------------------------------------------------------------------


async def test_a_lease_expires_by_itself_once_and_not_before_its_deadline(
    desk: Desk, store: LeaseStore
) -> None:
    asked, _ = await desk.issued("read", ttl_s=8)
    await expired_in_time(desk, store, asked)


async def test_two_revokers_share_the_work_and_each_lease_ends_once(world: World) -> None:
    async with opened_desks(world) as first, world.running("issuer", "revoker", own=QUICK):
        desk = await another(first)
        async with world.running("revoker", own=QUICK):
            leases = await asyncio.gather(*(desk.issued("read", ttl_s=15) for _ in range(24)))
            for asked, _ in leases:
                assert statuses(await ended(desk, asked)) == ["active", "expired"]


async def test_a_lease_that_a_dead_revoker_cut_is_ended_by_another_for_the_same_reason(
    desk: Desk, store: LeaseStore
) -> None:
    asked, _ = await desk.issued("read")
    lease = await desk.lease(asked.lease_id, "active")
    key = desk.world.key("revoker")
    cause = EndCause(kind="release", at_ms=1, by=desk.bot.id, ref="x", reason="done")
    ending = follow(lease, "ending", by=key.id, cause=cause)
    cut = SignedLease(ending, sign(ending, key))
    await store.step([Step(cut, lease)], visibility_ms=100)  # and nothing of it on Kafka
    life = await ended_after_sweep(desk, asked)
    assert statuses(life) == ["active", "ending", "released"]
    assert life[1].compact == cut.jws
    assert life[2].claims.cause == cause


async def ended_after_sweep(desk: Desk, asked: Asked) -> list[Signed[Lease]]:
    """`ended`, once also what lay in the outbox is on Kafka."""
    await desk.lease(asked.lease_id, "active")
    await desk.lease(asked.lease_id, "ending")
    return await ended(desk, asked)


async def test_a_record_that_a_dead_issuer_left_in_the_outbox_is_published_as_it_was(
    desk: Desk, store: LeaseStore
) -> None:
    asked, _ = await desk.issued("read")
    lease = await desk.lease(asked.lease_id, "active")
    key, id = desk.world.key("issuer"), str(uuid.uuid4())
    origin = origin_of(id, Coordinates(topic="t", partition=0, offset=0, appended_at_ms=0))
    orphan = lease.model_copy(update={"lease_id": id, "jti": record_id(origin, 1)})
    signed = SignedLease(orphan, sign(orphan, key))
    assert await store.activate([signed]) == [Activation("activated")]
    record = await desk.world.consume_until(LEASE, lambda r: r.key == id)
    assert record.value.decode() == signed.jws
    assert record.headers["ce_id"] == orphan.jti

    async with asyncio.timeout(WITHIN_S):
        while any(one.lease_id == id for one in await store.unpublished(older_than_ms=0)):
            await asyncio.sleep(0.1)


async def test_an_end_that_kafka_did_not_take_is_published_later_as_it_was(
    desk: Desk, store: LeaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = desk.world.runtimes["revoker"].publisher
    send, lost = publisher.send_many, list[str]()

    async def failing(topic: Topic[Any], type: str, records: Sequence[Outbound]) -> Any:
        if topic is LEASE and len(lost) < 2:
            lost.extend(record.value.decode() for record in records)
            raise UnavailableError("the broker went away")
        return await send(topic, type, records)

    asked, _ = await desk.issued("read")
    monkeypatch.setattr(publisher, "send_many", failing)
    event = await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    life = await ended_after_sweep(desk, asked)
    assert statuses(life) == ["active", "ending", "released"]
    assert len(lost) == 2
    assert set(lost) <= {record.compact for record in life}
    assert event.result == "1"


async def test_what_comes_after_an_end_that_has_not_left_the_outbox_yet_is_gone_beyond_once_it_has(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, _ = await desk.issued("read")
    look, waits = LeaseWatch._look, LeaseStore.is_waiting
    seen: list[tuple[str, str]] = []
    cleared, asked_for = asyncio.Event(), asyncio.Event()

    async def looking(watch: LeaseWatch, records: Any, follower: Any) -> Any:
        undecided = await look(watch, records, follower)
        seen.extend((one.id, one.glance.status) for one in records)
        return undecided

    async def not_cleared_at_first(store: LeaseStore, records: Sequence[tuple[str, int]]) -> list[bool]:
        answers = await waits(store, records)
        if cleared.is_set() or asked.lease_id not in dict(records):
            return answers
        asked_for.set()
        return [True] * len(records)

    async def stands_last(status: LeaseStatus, count: int) -> None:
        async with asyncio.timeout(WITHIN_S):
            while [one.claims.status for one in await desk.records(asked.lease_id)][count:] != [status]:
                await asyncio.sleep(0.05)

    monkeypatch.setattr(LeaseWatch, "_look", looking)
    await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    async with asyncio.timeout(WITHIN_S):
        while (asked.lease_id, "released") not in seen:
            await asyncio.sleep(0.05)
    life = await desk.records(asked.lease_id)
    monkeypatch.setattr(LeaseStore, "is_waiting", not_cleared_at_first)
    # As somebody publishes it who found it in the outbox, and was held up.
    await desk.world.send(LEASE, asked.lease_id, life[0].compact)
    await asyncio.wait_for(asked_for.wait(), WITHIN_S)
    await stands_last("active", len(life))
    cleared.set()
    await stands_last("released", len(life) + 1)


# --- what was foreseen ------------------------------------------------------------------------------------------------


@pytest.fixture
def foreseen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """However few leases are due soon, revokers look at them beforehand. What was remembered, and taken, by lease."""
    monkeypatch.setattr(foresight, "MANY", 1)
    seen: list[tuple[str, str]] = []
    remember, take = Foresight.remember, Foresight.take

    take_due = Foresight.take_due

    def remembering(self: Foresight, end: ForeseenEnd) -> None:
        seen.append(("remembered", end.glance.lease_id))
        remember(self, end)

    def taking(self: Foresight, lease_id: str, record: bytes) -> ForeseenEnd | None:
        end = take(self, lease_id, record)
        if end is not None:
            seen.append(("taken", lease_id))
        return end

    def taking_due(self: Foresight, shard: int, by_ms: int, most: int) -> list[ForeseenEnd]:
        ends = take_due(self, shard, by_ms, most)
        seen.extend(("taken unclaimed", end.glance.lease_id) for end in ends)
        return ends

    monkeypatch.setattr(Foresight, "remember", remembering)
    monkeypatch.setattr(Foresight, "take", taking)
    monkeypatch.setattr(Foresight, "take_due", taking_due)
    return seen


async def remembered(foreseen: list[tuple[str, str]], asked: Asked) -> None:
    async with asyncio.timeout(WITHIN_S):
        while ("remembered", asked.lease_id) not in foreseen:
            await asyncio.sleep(0.02)


async def test_an_end_that_was_foreseen_is_as_any_other(
    desk: Desk, store: LeaseStore, foreseen: list[tuple[str, str]]
) -> None:
    asked, _ = await desk.issued("read", ttl_s=8)
    await expired_in_time(desk, store, asked)
    assert foreseen.count(("remembered", asked.lease_id)) == foreseen.count(("taken", asked.lease_id)) == 1
    await until_published(store)


async def until_published(store: LeaseStore) -> None:
    """Nothing waits in the outbox."""
    async with asyncio.timeout(WITHIN_S):
        while await store.unpublished(older_than_ms=0):
            await asyncio.sleep(0.05)


async def test_of_more_than_is_claimed_at_a_time_what_was_foreseen_ends_without_a_claim(
    world: World, foreseen: list[tuple[str, str]]
) -> None:
    own: dict[ServiceRole, Any] = {"revoker": RevokerSettings(claim_limit=1)}
    async with opened_desks(world) as first, world.running("issuer", "revoker", own=own):
        desk, store = await another(first), LeaseStore(world.settings("issuer"))
        leases = await asyncio.gather(*(desk.issued("read", ttl_s=15) for _ in range(24)))
        for asked, _ in leases:
            await expired_in_time(desk, store, asked)
        assert "taken unclaimed" in {name for name, _ in foreseen}, "24 leases are due in 16 shards"
        await until_published(store)
        await store.close()


async def test_a_lease_whose_end_was_foreseen_is_given_back(
    desk: Desk, foreseen: list[tuple[str, str]]
) -> None:
    asked, _ = await desk.issued("read", ttl_s=30)
    await remembered(foreseen, asked)
    await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    assert statuses(await ended(desk, asked)) == ["active", "ending", "released"]


async def test_a_foreseen_end_gives_way_to_another_that_came_first(desk: Desk, store: LeaseStore) -> None:
    asked, _ = await desk.issued("read")
    await store.connect()
    ender = Ender(
        desk.world.runtimes["revoker"], store, ["jwt"], lambda wishes: None, Said(), visibility_ms=1000
    )
    (before,) = (await store.get([asked.lease_id])).values()
    end = ender.foresee(before.record)
    assert end is not None
    ender.foresight.remember(end)
    await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    life = await ended(desk, asked)
    assert await ender.end_due([end]) == 0
    left = await ender.end_foreseen({asked.lease_id: before})
    assert {id: one and one.jws.decode() for id, one in left.items()} == {asked.lease_id: life[-1].compact}
    assert len(await ended(desk, asked)) == 3


async def test_what_nobody_of_authority_signed_is_not_foreseen(desk: Desk, store: LeaseStore) -> None:
    asked, _ = await desk.issued("read")
    await store.connect()
    ender = Ender(
        desk.world.runtimes["revoker"], store, ["jwt"], lambda wishes: None, Said(), visibility_ms=1000
    )
    lease = await desk.lease(asked.lease_id, "active")
    by_a_stranger = sign(lease, desk.world.party("service", "issuer").key)
    assert ender.foresee(by_a_stranger.encode()) is None
    lasting = lease.model_copy(update={"backend": "redis"})
    assert ender.foresee(sign(lasting, desk.world.key("issuer")).encode()) is None, "it is cut first"
    assert ender.foresee(sign(lease, desk.world.key("issuer")).encode()) is not None


# --- release ----------------------------------------------------------------------------------------------------------


async def test_an_agent_gives_its_credential_back(desk: Desk, store: LeaseStore) -> None:
    asked, _ = await desk.issued("read")
    claims, at = await desk.revoke(desk.bot, "release", lease_id=asked.lease_id, reason="deployed")
    event = await desk.verdict(claims)
    assert (event.kind, event.result, event.lease_id) == ("accepted", "1", asked.lease_id)
    assert event.source == at
    life = await ended(desk, asked)
    assert statuses(life) == ["active", "ending", "released"]
    cause = EndCause(
        kind="release", at_ms=at.appended_at_ms, by=desk.bot.id, ref=claims.jti, reason="deployed"
    )
    assert [record.claims.cause for record in life[1:]] == [cause, cause]
    assert not (await store.look(asked.lease_id)).active


async def test_giving_back_twice_is_fine_and_ends_nothing_twice(desk: Desk) -> None:
    asked, _ = await desk.issued("read")
    await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    again = await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    assert again.result == "0"
    assert len(await ended(desk, asked)) == 3


async def test_a_redelivered_release_ends_nothing_twice(desk: Desk) -> None:
    asked, _ = await desk.issued("read")
    claims, at = await desk.revoke(desk.bot, "release", lease_id=asked.lease_id)
    await desk.verdict(claims)
    await redeliver(desk, REVOCATION_REQUEST, at)
    assert len(await ended(desk, asked)) == 3


async def test_an_agent_ends_nothing_but_its_own(desk: Desk, office: Desk, store: LeaseStore) -> None:
    other = await another(office)
    asked, _ = await desk.issued("read")
    release = {"kind": "release", "lease_id": asked.lease_id}
    assert await refused(desk, other.bot, **release) == "not_entitled"
    own = Selector(agent_id=desk.bot.name)
    assert await refused(desk, desk.bot, kind="release", selector=own) == "not_entitled"
    assert await refused(desk, desk.bot, kind="revocation", lease_id=asked.lease_id) == "kind_unexpected"
    assert await refused(desk, desk.bot, kind="task_ended", lease_id=asked.lease_id) == "kind_unexpected"
    await lives(desk, store, asked)


async def test_a_lease_that_nobody_knows(desk: Desk) -> None:
    assert await refused(desk, desk.bot, kind="release", lease_id=str(uuid.uuid4())) == "lease_unknown"


# --- revocation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["sam", "maria", "operator"])
async def test_who_answers_for_a_lease_revokes_it(desk: Desk, who: str) -> None:
    by = desk.world.operator if who == "operator" else getattr(desk, who)
    asked, _ = await desk.issued("read")
    event = await accepted(desk, by, lease_id=asked.lease_id)
    life = await ended(desk, asked)
    assert statuses(life) == ["active", "ending", "revoked"]
    assert life[-1].claims.cause is not None
    assert (life[-1].claims.cause.by, life[-1].claims.cause.ref) == (by.id, event.ref)


async def test_nobody_else_revokes(desk: Desk, office: Desk, store: LeaseStore) -> None:
    asked, _ = await desk.issued("read")
    ada = await office.world.user("ada", roles=("auditor",))
    for stranger in (desk.sue, ada):
        assert await refused(desk, stranger, lease_id=asked.lease_id) == "not_entitled"
    assert await refused(desk, desk.sam, kind="agent_suspended", lease_id=asked.lease_id) == "kind_unexpected"
    for by, selector in (
        (desk.sam, Selector(all=True)),
        (desk.sam, Selector(target_id="staging")),
        (desk.sam, Selector(user_id="maria")),
        (desk.maria, Selector(agent_id=desk.bot.name)),
        (desk.maria, Selector(sponsor="sam")),
        (desk.sue, Selector(task_id=desk.task)),
        (desk.sue, Selector(agent_id=desk.bot.name)),
    ):
        assert await refused(desk, by, selector=selector) == "not_entitled", selector
    await lives(desk, store, asked)


async def test_a_former_sponsor_revokes_no_more(desk: Desk, store: LeaseStore) -> None:
    asked, _ = await desk.issued("read")
    transfer = desk.world.claims(AgentTransfer, desk.sam, agent_id=desk.bot.name, sponsor="sue")
    await desk.world.accepted(transfer, desk.sam)
    # An order that comes within the moment in which word of the transfer is on its way is judged as before it.
    assert await desk.world.runtimes["revoker"].tables_caught_up(30)
    assert await refused(desk, desk.sam, lease_id=asked.lease_id) == "not_entitled"
    await lives(desk, store, asked)
    await accepted(desk, desk.sue, lease_id=asked.lease_id)
    assert statuses(await ended(desk, asked))[-1] == "revoked"


@pytest.mark.parametrize("forger", ["a stranger", "a service of another role", "policy"])
async def test_an_order_that_nobody_of_authority_signed_is_dead_lettered(
    desk: Desk, store: LeaseStore, forger: str
) -> None:
    asked, _ = await desk.issued("read")
    by = {
        "a stranger": desk.world.party("user", "olga"),
        "a service of another role": Party("audit", desk.world.key("audit")),
        "policy": Party("policy", desk.world.key("policy")),
    }[forger]
    _, at = await desk.revoke(by, lease_id=asked.lease_id)
    letter = await desk.world.consume_until(
        DEAD_LETTER, lambda r: f'"offset":{at.offset},'.encode() in r.value and at.topic.encode() in r.value
    )
    assert b"key_unknown" in letter.value
    await lives(desk, store, asked)


@pytest.mark.parametrize("garbage", [b"", b"\x00\xff", b"a.b.c", b"{}"])
async def test_garbage_is_dead_lettered_and_stops_nobody(desk: Desk, garbage: bytes) -> None:
    at = await desk.world.send(REVOCATION_REQUEST, desk.bot.name, garbage)
    await desk.world.consume_until(
        DEAD_LETTER, lambda r: f'"offset":{at.offset},'.encode() in r.value and at.topic.encode() in r.value
    )
    asked, _ = await desk.issued("read")
    await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)


# --- selectors: the kill switch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["agent by its sponsor", "task by its assigner", "task by the sponsor"])
async def test_a_selector_ends_all_that_it_covers_and_nothing_else(
    desk: Desk, office: Desk, store: LeaseStore, kind: str
) -> None:
    other = await another(office)
    mine = await asyncio.gather(*(desk.issued("read") for _ in range(5)))
    theirs, _ = await other.issued("read")
    selector = Selector(agent_id=desk.bot.name) if kind.startswith("agent") else Selector(task_id=desk.task)
    event = await accepted(desk, desk.maria if "assigner" in kind else desk.sam, selector=selector)
    assert event.result == "5"
    for asked, _ in mine:
        assert statuses(await ended(desk, asked)) == ["active", "ending", "revoked"]
    await lives(desk, store, theirs)


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        (Selector(agent_id="deploy-bto"), "no agent deploy-bto"),
        (Selector(task_id=str(uuid.uuid4())), "no task"),
        (Selector(target_id="stagign"), "no target stagign"),
        (Selector(sponsor="smith"), "no user smith"),
        (Selector(user_id="smith"), "no user smith"),
    ],
)
async def test_who_mistypes_a_name_is_told_that_nobody_was_stopped(
    desk: Desk, selector: Selector, said: str
) -> None:
    claims, _ = await desk.revoke(desk.world.operator, selector=selector)
    verdict = await desk.verdict(claims)
    assert (verdict.kind, [reason.code for reason in verdict.reasons]) == ("refused", ["subject_unknown"])
    assert said in verdict.reasons[0].message


async def test_what_was_asked_for_before_a_selector_is_not_issued_after_it(desk: Desk) -> None:
    before = await desk.ask("read")
    await accepted(desk, desk.sam, selector=Selector(agent_id=desk.bot.name))
    after = await desk.ask("read")
    await desk.decide(before)
    await desk.decide(after)
    refusal = await desk.refused(before)
    assert [reason.code for reason in refusal.reasons] == ["fenced"]
    assert (await desk.answer(after)).credential is not None


async def test_a_replayed_selector_ends_nothing_more(desk: Desk, store: LeaseStore) -> None:
    old, _ = await desk.issued("read")
    claims, _ = await desk.revoke(desk.sam, selector=Selector(agent_id=desk.bot.name))
    await desk.verdict(claims)
    await ended(desk, old)
    new, _ = await desk.issued("read")
    again = await desk.world.send(REVOCATION_REQUEST, desk.bot.name, sign(claims, desk.sam.key))
    event = await desk.world.event_where(lambda e: e.kind == "replayed" and e.ref == claims.jti)
    assert event.source == again
    await lives(desk, store, new)


async def test_a_redelivered_selector_ends_what_its_first_time_left(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died after the fence: the same record at the same place is no replay."""
    leases = [(await desk.issued("read"))[0] for _ in range(3)]
    end_bearing, failures = Ender.end_bearing, list[str]()

    async def failing(self: Ender, mark: str, wish: Any, **more: Any) -> list[Lease]:
        if not failures:
            failures.append(mark)
            raise UnavailableError("Redis went away")
        return await end_bearing(self, mark, wish, **more)

    monkeypatch.setattr(Ender, "end_bearing", failing)
    event = await accepted(desk, desk.sam, selector=Selector(agent_id=desk.bot.name))
    assert failures == [f"agent:{desk.bot.name}"]
    assert event.result == "3"
    for asked in leases:
        assert statuses(await ended(desk, asked))[-1] == "revoked"


async def test_the_operator_stops_everything(kafka: Kafka, redis_server: RedisServer) -> None:
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.kind == "embedded") as world,
        opened_desks(world) as first,
        world.running("issuer", "revoker"),
    ):
        one, two = await another(first), await another(first)
        leases = [(desk, (await desk.issued("read"))[0]) for desk in (one, two, one)]
        pending = await two.ask("read")
        event = await accepted(one, world.operator, selector=Selector(all=True), reason="stop")
        assert event.result == "3"
        for desk, asked in leases:
            assert statuses(await ended(desk, asked))[-1] == "revoked"
        await two.decide(pending)
        assert [reason.code for reason in (await two.refused(pending)).reasons] == ["fenced"]


# --- records that change ----------------------------------------------------------------------------------------------


async def cause_of(desk: Desk, asked: Asked) -> EndCause:
    life = await ended(desk, asked)
    assert statuses(life) == ["active", "ending", "revoked"]
    cause = life[-1].claims.cause
    assert cause is not None
    assert cause.by == desk.world.key("revoker").id
    return cause


async def test_the_end_of_a_task_ends_its_leases(desk: Desk, office: Desk, store: LeaseStore) -> None:
    other = await another(office)
    asked, _ = await desk.issued("read")
    theirs, _ = await other.issued("read")
    end = desk.world.claims(TaskEnd, desk.maria, task_id=desk.task, reason="done")
    await desk.world.accepted(end, desk.maria)
    assert (await cause_of(desk, asked)).kind == "task_ended"
    await lives(desk, store, theirs)


@pytest.mark.parametrize("command", [AgentSuspend, AgentDecommission])
async def test_the_end_of_an_agent_ends_its_leases(
    desk: Desk, command: type[AgentSuspend | AgentDecommission]
) -> None:
    leases = [(await desk.issued("read"))[0] for _ in range(2)]
    claims = desk.world.claims(command, desk.sam, agent_id=desk.bot.name, reason="odd")
    await desk.world.accepted(claims, desk.sam)
    kind = "agent_suspended" if command is AgentSuspend else "agent_decommissioned"
    for asked in leases:
        assert (await cause_of(desk, asked)).kind == kind


@pytest.mark.parametrize("role", ["on behalf of", "sponsor"])
async def test_disabling_a_user_ends_what_is_on_their_behalf_and_what_their_agents_hold(
    office: Desk, store: LeaseStore, role: str
) -> None:
    world, name = office.world, f"u{uuid.uuid4().hex[:8]}"
    everything = scope("staging", ("read", "deploy", "wipe"), ("**",))
    user = await world.user(name, roles=("sponsor",), entitlements=everything)
    other = await another(office)
    theirs, _ = await other.issued("read")
    people = {"sam": office.sam, "maria": office.maria, "sue": office.sue}
    people["sam" if role == "sponsor" else "maria"] = user
    desk = await Desk(world, people, office.target).staff()
    asked, _ = await desk.issued("read")
    await world.accepted(
        world.claims(UserDisable, world.operator, user_id=name, reason="left"), world.operator
    )
    assert (await cause_of(desk, asked)).kind == "user_disabled"
    await lives(other, store, theirs)


@pytest.mark.parametrize("how", ["disabled", "no sponsor any more"])
async def test_an_agent_without_its_sponsor_keeps_nothing_that_was_issued_under_another(
    office: Desk, store: LeaseStore, how: str
) -> None:
    world, name = office.world, f"u{uuid.uuid4().hex[:8]}"
    user = await world.user(name, roles=("sponsor",))
    handed_over, stays = await another(office), await another(office)
    asked, _ = await handed_over.issued("read")
    theirs, _ = await stays.issued("read")
    transfer = world.claims(AgentTransfer, office.sam, agent_id=handed_over.bot.name, sponsor=name)
    await world.accepted(transfer, office.sam)
    await lives(handed_over, store, asked)
    disable = world.claims(UserDisable, world.operator, user_id=name, reason="left")
    await world.accepted(
        disable if how == "disabled" else world.user_set(world.operator, user, roles=()), world.operator
    )
    kind = "user_disabled" if how == "disabled" else "agent_orphaned"
    assert (await cause_of(handed_over, asked)).kind == kind
    await lives(stays, store, theirs)


async def test_removing_a_target_ends_the_leases_for_it(office: Desk, store: LeaseStore) -> None:
    world, name = office.world, f"t{uuid.uuid4().hex[:8]}"
    target = await world.target(name)
    user = await world.user(f"u-{name}", entitlements=scope(name, ("read",), ("**",)))
    desk = Desk(world, {"sam": office.sam, "maria": user, "sue": office.sue}, target)
    await desk.staff(ceiling=scope(name, ("read",), ("**",)), task_scope=scope(name, ("read",), ("**",)))
    other = await another(office)
    asked, theirs = (await desk.issued("read"))[0], (await other.issued("read"))[0]
    remove = world.claims(TargetRemove, world.operator, target_id=name, reason="gone")
    await world.accepted(remove, world.operator)
    assert (await cause_of(desk, asked)).kind == "target_removed"
    await lives(other, store, theirs)


async def test_a_narrower_ceiling_ends_what_no_longer_fits_and_only_that(
    desk: Desk, store: LeaseStore
) -> None:
    fits, _ = await desk.issued(scope=desk.scope("read", resource="env/staging/web"))
    beyond, _ = await desk.issued(scope=desk.scope("read", resource="env/production/web"))
    under_way = await desk.ask(scope=desk.scope("read", resource="env/production/web"))
    narrower = desk.scope("read", resource="env/staging/*")
    claims = desk.world.claims(AgentSetCeiling, desk.sam, agent_id=desk.bot.name, ceiling=narrower)
    await desk.world.accepted(claims, desk.sam)
    cause = await cause_of(desk, beyond)
    assert cause.kind == "scope_narrowed"
    assert desk.bot.name in (cause.reason or "")
    await lives(desk, store, fits)
    # What was decided on the wider ceiling and comes to Redis only now stays outside, whatever the issuer knows.
    lease = await desk.lease(fits.lease_id, "active")
    id = str(uuid.uuid4())
    late = lease.model_copy(update={"lease_id": id, "requested_at_ms": under_way.source.appended_at_ms})
    (answer,) = await store.activate([SignedLease(late, "not.published.ever")])
    assert answer == Activation("fenced", mark=f"agent:{desk.bot.name}")


async def test_narrower_entitlements_end_what_no_longer_fits(office: Desk, store: LeaseStore) -> None:
    world, name = office.world, f"u{uuid.uuid4().hex[:8]}"
    user = await world.user(name, entitlements=scope("staging", ("read",), ("**",)))
    desk = await Desk(world, {"sam": office.sam, "maria": user, "sue": office.sue}, office.target).staff()
    fits, _ = await desk.issued(scope=desk.scope("read", resource="env/staging/web"))
    beyond, _ = await desk.issued(scope=desk.scope("read", resource="env/production/web"))
    narrower = world.user_set(
        world.operator, user, entitlements=scope("staging", ("read",), ("env/staging/*",))
    )
    await world.accepted(narrower, world.operator)
    assert (await cause_of(desk, beyond)).kind == "scope_narrowed"
    await lives(desk, store, fits)


@pytest.fixture(scope="module")
async def slow_office(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[Desk]:
    """The same with a grace in which a test can do something while the issuer has not heard of a record."""
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.kind == "embedded") as world,
        opened_desks(world) as desk,
        world.running("issuer", "revoker", own=QUICK, grace_s=2 * WITHIN_S),
    ):
        yield desk


@pytest.mark.parametrize(
    ("topic", "kind"),
    [
        (AGENT, "agent_suspended"),
        (AGENT, "scope_narrowed"),
        (TASK, "task_ended"),
        (TARGET, "target_removed"),
        (USER, "user_disabled"),
        (USER, "scope_narrowed"),
    ],
)
async def test_what_is_issued_after_a_revoker_has_looked_by_who_had_not_heard_of_the_record_ends(
    slow_office: Desk, monkeypatch: pytest.MonkeyPatch, topic: Topic[Any], kind: str
) -> None:
    """Policy and issuer may both go by the record before, for as long as the grace."""
    world, name = slow_office.world, f"x{uuid.uuid4().hex[:8]}"
    all_of_it = scope(name, ("read",), ("**",))
    target = await world.target(name)
    user = await world.user(name, entitlements=all_of_it)
    people = {"sam": slow_office.sam, "maria": user, "sue": slow_office.sue}
    desk = await Desk(world, people, target).staff(ceiling=all_of_it, task_scope=all_of_it)
    before, _ = await desk.issued("read")
    monkeypatch.setitem(world.runtimes["issuer"]._tables, topic, lambda records: None)

    narrower = scope(name, ("read",), ("env/elsewhere/*",))
    change = {
        (AGENT, "agent_suspended"): world.claims(
            AgentSuspend, world.operator, agent_id=desk.bot.name, reason="odd"
        ),
        (AGENT, "scope_narrowed"): world.claims(
            AgentSetCeiling, desk.sam, agent_id=desk.bot.name, ceiling=narrower
        ),
        (TASK, "task_ended"): world.claims(TaskEnd, user, task_id=desk.task, reason="done"),
        (TARGET, "target_removed"): world.claims(TargetRemove, world.operator, target_id=name, reason="gone"),
        (USER, "user_disabled"): world.claims(UserDisable, world.operator, user_id=name, reason="left"),
        (USER, "scope_narrowed"): world.user_set(world.operator, user, entitlements=narrower),
    }[topic, kind]
    by = {desk.sam.id: desk.sam, user.id: user}.get(change.iss, world.operator)
    await world.accepted(change, by)
    assert (await cause_of(desk, before)).kind == kind  # the revoker has looked

    behind, _ = await desk.issued("read")  # neither fenced off nor there when it looked
    cause = await cause_of(desk, behind)
    assert cause.kind == kind
    assert name in (cause.reason or "") or desk.bot.name in (cause.reason or "") or kind == "task_ended"


async def test_a_lease_is_held_against_records_by_the_word_of_services_alone(
    desk: Desk, store: LeaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can write to the topic could otherwise end what they like, by saying that it allows too much."""
    asked, _ = await desk.issued("read")
    ceiling = desk.scope("read", resource="env/**")
    claims = desk.world.claims(AgentSetCeiling, desk.sam, agent_id=desk.bot.name, ceiling=ceiling)
    await desk.world.accepted(claims, desk.sam)
    revoker = desk.world.runtimes["revoker"]
    directory = revoker._tables[AGENT].__self__  # type: ignore[attr-defined]
    handler = IssuedHandler(revoker, directory, store, Said(), patience_s=WITHIN_S)
    lease = await desk.lease(asked.lease_id, "active")
    record = await desk.world.consume_until(LEASE, lambda r: r.key == asked.lease_id)
    beyond = lease.model_copy(update={"scope": desk.scope("wipe")})
    by_a_stranger = sign(beyond, desk.world.party("service", "issuer").key)
    by_the_issuer = sign(beyond, desk.world.key("issuer"))
    for value, key in ((by_a_stranger, asked.lease_id), (by_the_issuer, str(uuid.uuid4())), ("a.b.c", "d")):
        await handler([record._replace(value=value.encode(), key=key), record])
    orders = await desk.world.records(REVOCATION_REQUEST)
    assert not [r for r in orders if r.key == desk.bot.name]
    await lives(desk, store, asked)
    monkeypatch.setattr(revoker, "clock", FixedClock(revoker.clock.now_ms() + 3_600_000))
    await handler([record._replace(value=by_the_issuer.encode())])  # also by a clock that is ahead
    assert (await cause_of(desk, asked)).kind == "scope_narrowed"


async def record_of(desk: Desk, revision: int) -> Received:
    """The record of the desk's agent at a revision."""
    return await desk.world.consume_until(
        AGENT,
        lambda r: (
            r.key == desk.bot.name and desk.world.opened(r, AgentRecord, "registry").revision == revision
        ),
    )


async def test_a_record_that_comes_again_orders_the_same_again_and_ends_nothing_more(
    desk: Desk, store: LeaseStore
) -> None:
    asked, _ = await desk.issued("read")
    suspend = desk.world.claims(AgentSuspend, desk.sam, agent_id=desk.bot.name, reason="odd")
    await desk.world.accepted(suspend, desk.sam)
    cause = await cause_of(desk, asked)
    record = await record_of(desk, 2)
    await redeliver(desk, AGENT, record.coordinates)

    def orders() -> list[str]:
        found = [r for r in seen if r.key == desk.bot.name]
        return [desk.world.opened(r, RevocationRequest, "revoker").jti for r in found]

    seen = await desk.world.records(REVOCATION_REQUEST)
    async with asyncio.timeout(WITHIN_S):
        while len(orders()) == len(set(orders())):
            await asyncio.sleep(0.05)
    # One of its own for the lease as well, where the suspension was known before the lease was seen.
    assert cause.ref in orders()
    assert len(set(orders())) <= 2
    assert len(await ended(desk, asked)) == 3


async def test_a_record_that_stands_there_again_fences_off_nothing_that_was_asked_for_since(
    desk: Desk,
) -> None:
    """Somebody wrote an old one, and the registry the last one over that: in between an agent asked."""
    for resource in ("env/*/*", "env/staging/*"):
        ceiling = desk.scope("read", resource=resource)
        claims = desk.world.claims(AgentSetCeiling, desk.sam, agent_id=desk.bot.name, ceiling=ceiling)
        await desk.world.accepted(claims, desk.sam)
    records = [await record_of(desk, revision) for revision in (1, 2, 3)]
    for record in records:
        await redeliver(desk, AGENT, record.coordinates)
    asked = await desk.ask("read")
    for record in records:
        await redeliver(desk, AGENT, await desk.world.send(AGENT, desk.bot.name, record.value))
    await desk.decide(asked, revisions=desk.revisions.model_copy(update={"agent": 3}))
    content = await desk.answer(asked)
    assert content.credential is not None, desk.refusal(content)


async def test_a_suspension_counts_though_the_agent_was_resumed_before_a_revoker_heard_of_it(
    kafka: Kafka, redis_server: RedisServer
) -> None:
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.kind == "embedded") as world,
        opened_desks(world) as first,
        world.running("issuer"),
    ):
        desk = await another(first)
        asked, _ = await desk.issued("read")
        for model in (AgentSuspend, AgentResume):
            claims = world.claims(model, desk.sam, agent_id=desk.bot.name, reason="odd")
            await world.accepted(claims, desk.sam)
        async with world.running("revoker", own=QUICK):
            assert (await cause_of(desk, asked)).kind == "agent_suspended"
            later = await desk.ask("read")
            await desk.decide(later, revisions=desk.revisions.model_copy(update={"agent": 3}))
            content = await desk.answer(later)
            assert content.credential is not None, desk.refusal(content)


async def test_a_record_that_the_registry_did_not_sign_ends_nothing(desk: Desk, store: LeaseStore) -> None:
    asked, _ = await desk.issued("read")
    record = await record_of(desk, 1)
    head, body, _ = record.value.decode().split(".")
    signature = desk.world.party("service", "registry").key.sign(f"{head}.{body}".encode())
    at = await desk.world.send(AGENT, desk.bot.name, f"{head}.{body}.{b64encode(signature)}")
    await desk.world.consume_until(
        DEAD_LETTER, lambda r: f'"offset":{at.offset},'.encode() in r.value and at.topic.encode() in r.value
    )
    await lives(desk, store, asked)


# --- what people see --------------------------------------------------------------------------------------------------


async def test_leases_are_listed_to_who_may_see_them(desk: Desk, office: Desk) -> None:
    world = desk.world
    asked, _ = await desk.issued("read")
    second, _ = await desk.issued("read")
    other = await another(office)
    theirs, _ = await other.issued("read")

    async def listed(who: Party, **params: str) -> set[str]:
        answer = await world.get("revoker", "/v1/leases", who, **params)
        assert answer.status_code == 200
        assert answer.json()["more"] is False
        return {lease["id"] for lease in answer.json()["leases"]}

    ours = {asked.lease_id, second.lease_id}
    for who in (world.operator, desk.sam, desk.maria):
        assert await listed(who, agent=desk.bot.name) == ours
        assert {*ours, theirs.lease_id} <= await listed(who)
    assert await listed(desk.sam, task=desk.task, target="staging", status="active") == ours
    assert await listed(desk.sam, task=desk.task, agent=other.bot.name) == set()
    assert await listed(desk.sam, agent=desk.bot.name, status="ending") == set()
    assert await listed(desk.sue) == set()
    await accepted(desk, desk.bot, kind="release", lease_id=second.lease_id)
    assert await listed(desk.sam, agent=desk.bot.name) == {asked.lease_id}
    assert (await world.get("revoker", "/v1/leases")).status_code == 401


async def test_one_lease_is_shown_also_past_its_end(desk: Desk) -> None:
    asked, _ = await desk.issued("read")
    path = f"/v1/leases/{asked.lease_id}"
    shown = (await desk.world.get("revoker", path, desk.sam)).json()
    assert (shown["id"], shown["status"], shown["agent_id"]) == (asked.lease_id, "active", desk.bot.name)
    await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    answer = await desk.world.get("revoker", path, desk.maria, records="1")
    assert answer.json()["status"] == "released"
    assert digest(answer.json()["record"]) == (await ended(desk, asked))[-1].digest
    assert (await desk.world.get("revoker", path, desk.sue)).status_code == 403
    for unknown in (str(uuid.uuid4()), "nothing", "\u0661" * 36):
        assert (await desk.world.get("revoker", f"/v1/leases/{unknown}", desk.sam)).status_code == 404


async def test_the_revoker_measures_how_late_it_is(desk: Desk) -> None:
    asked, _ = await desk.issued("read", ttl_s=8)
    await ended(desk, asked)
    text = (await desk.world.get("revoker", "/metrics")).text
    assert 'ringfence_leases_ended_total{status="expired"}' in text
    assert "ringfence_expiry_lag_seconds_bucket" in text
