"""The revoker on a real broker and a real Redis, next to the issuer: every lease ends by itself, and once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.base import Topic
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import EndCause, Lease, LeaseStatus
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import Activation, LeaseStore, SignedLease, Step
from ringfence.model.leases.lifecycle import follow, origin_of, record_id
from ringfence.revoker import app
from ringfence.revoker.consistency.lease_watch import LeaseWatch
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import Asked, IssuerBench, another, opened_desks, opened_office
from tests.support.benches.revocation_flows import QUICK, accepted, ended, expired_in_time, statuses
from tests.support.world import WITHIN_S, Party, World


@pytest.fixture(scope="module")
async def issuer_bench(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    """Registry, issuer and revoker, once for all tests here."""
    async with opened_office(kafka, redis_server, "issuer", "revoker", own=QUICK) as desk:
        yield desk


# --- time -------------------------------------------------------------------------------------------------------------


async def test_a_lease_expires_by_itself_once_and_not_before_its_deadline(
    desk: IssuerBench, store: LeaseStore
) -> None:
    asked, _ = await desk.issued("read", ttl_s=5)
    await expired_in_time(desk, store, asked)


async def test_two_revokers_share_the_work_and_each_lease_ends_once(world: World) -> None:
    async with opened_desks(world) as first, world.running("issuer", "revoker", own=QUICK):
        desk = await another(first)
        async with world.running("revoker", own=QUICK):
            leases = await asyncio.gather(*(desk.issued("read", ttl_s=9) for _ in range(24)))
            for asked, _ in leases:
                assert statuses(await ended(desk, asked)) == ["active", "expired"]


async def test_a_lease_that_a_dead_revoker_cut_is_ended_by_another_for_the_same_reason(
    desk: IssuerBench, store: LeaseStore
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


async def ended_after_sweep(desk: IssuerBench, asked: Asked) -> list[Signed[Lease]]:
    """`ended`, once also what lay in the outbox is on Kafka."""
    await desk.lease(asked.lease_id, "active")
    await desk.lease(asked.lease_id, "ending")
    return await ended(desk, asked)


async def test_a_record_that_a_dead_issuer_left_in_the_outbox_is_published_as_it_was(
    desk: IssuerBench, store: LeaseStore
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
    desk: IssuerBench, store: LeaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = desk.world.runtimes["revoker"].publisher
    send, lost = publisher.send_many, list[str]()

    async def failing(topic: Topic[Any], type: str, records: Sequence[Outbound]) -> Any:
        if topic is LEASE and len(lost) < 2:
            lost.extend(record.payload.decode() for record in records)
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


async def test_record_after_an_unpublished_end_is_superseded_once_published(
    desk: IssuerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, _ = await desk.issued("read")
    look, waits = LeaseWatch._check, LeaseStore.is_waiting
    seen: list[tuple[str, str]] = []
    cleared, asked_for = asyncio.Event(), asyncio.Event()

    async def looking(watch: LeaseWatch, records: Any, follower: Any) -> Any:
        undecided = await look(watch, records, follower)
        seen.extend((one.id, one.summary.status) for one in records)
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

    monkeypatch.setattr(LeaseWatch, "_check", looking)
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


async def test_lease_published_without_a_revoker_is_ended_by_the_next_revoker(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by an issuer that wrote a lease to Redis, was held up until it had ended, and died before it was told."""
    monkeypatch.setattr(app, "BACK_MS", 0)  # far longer than this test lasts
    async with opened_desks(world) as first, world.running("issuer"):
        desk = await another(first)
        async with world.running("revoker"):
            asked, _ = await desk.issued("read")
            await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
            life = await ended(desk, asked)
        await world.send(LEASE, asked.lease_id, life[0].compact)
        async with world.running("revoker"), asyncio.timeout(WITHIN_S):
            while (last := (await desk.records(asked.lease_id))[-1]).claims.status != "released":
                await asyncio.sleep(0.05)
        assert last.compact == life[-1].compact


# --- what people see --------------------------------------------------------------------------------------------------


async def test_leases_are_listed_to_who_may_see_them(desk: IssuerBench, issuer_bench: IssuerBench) -> None:
    world = desk.world
    asked, _ = await desk.issued("read")
    second, _ = await desk.issued("read")
    other = await another(issuer_bench)
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
    assert ours <= await listed(world.operator, user="maria")
    assert ours <= await listed(world.operator, sponsor="sam")
    assert await listed(world.operator, user="sam", agent=desk.bot.name) == set()
    assert await listed(desk.sue) == set()
    await accepted(desk, desk.bot, kind="release", lease_id=second.lease_id)
    assert await listed(desk.sam, agent=desk.bot.name) == {asked.lease_id}
    assert (await world.get("revoker", "/v1/leases")).status_code == 401


async def test_one_lease_is_shown_also_past_its_end(desk: IssuerBench) -> None:
    asked, _ = await desk.issued("read")
    path = f"/v1/leases/{asked.lease_id}"
    shown = (await desk.world.get("revoker", path, desk.sam)).json()
    assert (shown["id"], shown["status"], shown["agent_id"]) == (asked.lease_id, "active", desk.bot.name)
    await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    answer = await desk.world.get("revoker", path, desk.maria, records="1")
    assert answer.json()["status"] == "released"
    assert digest(answer.json()["record"]) == (await ended(desk, asked))[-1].digest
    # What is there and not theirs is answered as what is not there is, to the letter.
    nothing = str(uuid.uuid4())
    theirs, none = [
        await desk.world.get("revoker", f"/v1/leases/{one}", desk.sue) for one in (asked.lease_id, nothing)
    ]
    assert theirs.status_code == none.status_code == 404
    assert theirs.text.replace(asked.lease_id, "ID") == none.text.replace(nothing, "ID")
    for unknown in (str(uuid.uuid4()), "nothing", "\u0661" * 36):
        assert (await desk.world.get("revoker", f"/v1/leases/{unknown}", desk.sam)).status_code == 404


async def test_the_revoker_measures_how_late_it_is(desk: IssuerBench) -> None:
    asked, _ = await desk.issued("read", ttl_s=5)
    await ended(desk, asked)
    text = (await desk.world.get("revoker", "/metrics")).text
    assert 'ringfence_leases_ended_total{status="expired"}' in text
    assert "ringfence_expiry_lag_seconds_bucket" in text
