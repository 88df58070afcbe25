"""Redis lost in all the ways that it can be: each lease is there again, none has come to life, each ends once."""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from ringfence.cli.main import main
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.enrolment import InstanceRef, RunRef
from ringfence.messages.lease import TERMINAL, EndCause, Selector
from ringfence.messages.registry import AgentSetAttestation
from ringfence.messages.run import Run, RunStatus
from ringfence.messages.topics import LEASE, RUN
from ringfence.model.identity.attestation import selector_id
from ringfence.model.identity.runners import runner_selector
from ringfence.model.lease_store import (
    LeaseStore,
    LostError,
    Restoration,
    SignedLease,
    Step,
    StoredLease,
    outbox_field,
)
from ringfence.model.lease_store.keys import Keys, uuid_bytes
from ringfence.model.leases.lifecycle import ALL_LEASES, follow
from ringfence.model.records.runs import run_id_of
from ringfence.model.requests.grants import id_of
from ringfence.revoker import app as revoker_app
from ringfence.revoker.consistency.lease_watch import LeaseWatch
from ringfence.revoker.consistency.rebuild import Rebuilder
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.grant_flows import claims_of, grant, granted
from tests.support.benches.issuer_bench import another, opened_desks
from tests.support.benches.lost_redis_bench import LostRedisBench, late, publish
from tests.support.runs import LIMITS
from tests.support.world import World


@pytest.mark.parametrize("how", ["flushed", "empty", "restarted", "promoted"])
async def test_a_lost_redis_is_rebuilt_with_what_is_alive_and_what_has_ended(
    place: LostRedisBench, how: str
) -> None:
    desk = place.desk
    (kept, _), (gone, _), (soon, _) = await asyncio.gather(
        desk.issued("read"), desk.issued("read"), desk.issued("read", ttl_s=8)
    )
    await place.release(gone)
    assert await place.life(gone) == ["active", "ending", "released"]
    await place.lose(how)
    await place.active(kept)
    ended = (await place.store.get([gone.lease_id]))[gone.lease_id]
    assert (ended.status, ended.seq) == ("released", 3)
    assert not (await place.store.look(gone.lease_id)).active
    assert gone.lease_id not in await place.store.find(ALL_LEASES)
    # And life goes on: what is issued, released, and due.
    later, _ = await desk.issued("read")
    await place.release(kept)
    assert await place.life(kept) == ["active", "ending", "released"]
    assert await place.life(soon) == ["active", "expired"]
    assert (await place.store.look(later.lease_id)).active
    assert await place.life(gone) == ["active", "ending", "released"]


@pytest.mark.parametrize("how", ["flushed", "empty"])
async def test_a_redis_that_is_lost_again_while_it_is_rebuilt_is_rebuilt_anew(
    place: LostRedisBench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    desk, restore, resume = place.desk, Restoration.restore, Restoration.resume
    kept, _ = await desk.issued("read")
    gone, _ = await desk.issued("read")
    await place.release(gone)
    again = ["while leases are restored", "before it is resumed"]

    async def lose(when: str) -> None:
        if when in again:
            again.remove(when)
            await (place.redis.flushed() if how == "flushed" else place.redis.lost(0))

    async def restoring(self: Restoration, *args: Any) -> None:
        await restore(self, *args)
        await lose("while leases are restored")

    async def resuming(self: Restoration, epoch: str) -> None:
        await lose("before it is resumed")
        await resume(self, epoch)

    monkeypatch.setattr(Restoration, "restore", restoring)
    monkeypatch.setattr(Restoration, "resume", resuming)
    await place.lose(how)
    assert again == []
    await place.active(kept)
    assert statuses(await place.store.get([gone.lease_id])) == ["released"]
    await place.release(kept)
    assert await place.life(kept) == ["active", "ending", "released"]


async def test_grant_uses_are_counted_after_a_rebuild(place: LostRedisBench) -> None:
    desk = place.desk
    compact = grant(desk, count=3)
    id = id_of(claims_of(compact))
    kept, gone = await granted(desk, compact), await granted(desk, compact)
    for asked in (kept, gone):
        assert (await desk.answer(asked)).credential is not None
    await place.release(gone)
    assert await place.life(gone) == ["active", "ending", "released"]
    await place.lose("flushed")
    assert await place.uses(id) == 2  # also the one that has ended
    assert (await desk.answer(await granted(desk, compact))).credential is not None
    before, at = await place.epochs(), place.store.at(id)
    await place.store.link.pipeline([("DEL", at.grant(id)), ("DEL", at.epoch)])  # one shard of several
    await place.rebuilt(before)
    assert await place.uses(id) == 3
    refusal = await desk.refused(await granted(desk, compact))
    assert [reason.code for reason in refusal.reasons] == ["grant_used_up"]
    # Also one that Redis has, and Kafka does not have yet.
    id = str(uuid.uuid4())
    assert [one.outcome for one in await place.store.activate([await late(place, grants=(id,))])] == [
        "activated"
    ]
    before, at = await place.epochs(), place.store.at(id)
    await place.store.link.pipeline([("DEL", at.epoch)])
    await place.rebuilt(before)
    assert await place.uses(id) == 1


async def test_request_while_redis_is_lost_is_issued_once_after_recovery(
    place: LostRedisBench,
) -> None:
    desk = place.desk
    issuing = [asyncio.create_task(desk.issued("read")) for _ in range(4)]
    for how in ("flushed", "empty", "flushed"):
        issuing += [asyncio.create_task(desk.issued("read")) for _ in range(4)]
        await asyncio.sleep(0)  # they are on their way
        await place.lose(how)
    leases = [asked for asked, _ in await asyncio.gather(*issuing)]
    async with asyncio.timeout(60):
        while not all([(await place.store.look(asked.lease_id)).active for asked in leases]):
            await asyncio.sleep(0.05)
    await place.active(*leases)
    await asyncio.gather(*(place.release(asked) for asked in leases))
    for asked in leases:
        assert await place.life(asked) == ["active", "ending", "released"]


async def test_an_old_snapshot_revives_nothing_and_has_forgotten_nothing(
    place: LostRedisBench,
) -> None:
    desk = place.desk
    (kept, _), (released, _), (due, _) = await asyncio.gather(
        desk.issued("read"), desk.issued("read"), desk.issued("read", ttl_s=7)
    )
    before = await place.epochs()
    snapshot = await place.redis.saved()
    await place.release(released)
    assert await place.life(released) == ["active", "ending", "released"]
    assert await place.life(due) == ["active", "expired"]
    newer, _ = await desk.issued("read")
    await place.redis.set_back(snapshot)
    await place.rebuilt(before)
    await place.active(kept, newer)
    stored = await place.store.get([released.lease_id, due.lease_id])
    assert [stored[asked.lease_id].status for asked in (released, due)] == ["released", "expired"]
    assert sorted(await place.store.find(f"agent:{desk.bot.name}")) == sorted([kept.lease_id, newer.lease_id])
    # What the outbox of then holds of leases that have gone on since is not published any more.
    waiting = {one.lease_id for one in await place.store.unpublished(older_than_ms=0)}
    assert waiting.isdisjoint({released.lease_id, due.lease_id})
    later, _ = await desk.issued("read")
    await place.release(later)
    assert await place.life(released) == ["active", "ending", "released"]
    assert await place.life(due) == ["active", "expired"]


async def test_a_server_that_followed_one_which_lagged_and_leads_again_is_not_taken_for_what_it_was(
    place: LostRedisBench,
) -> None:
    """It has the run_id that it had, nobody's connection ended, and the epoch came back with the keys."""
    desk = place.desk
    before = await place.epochs()
    async with place.redis.failed_back():
        await place.rebuilt(before)  # the first replica begins another history, too
        kept, _ = await desk.issued("read")
        due, _ = await desk.issued("read", ttl_s=10)
        gone, _ = await desk.issued("read")
        await place.release(gone)
        assert await place.life(gone) == ["active", "ending", "released"]
        before = await place.epochs()
    await place.rebuilt(before)
    await place.active(kept)
    assert statuses(await place.store.get([gone.lease_id])) == ["released"]
    assert await place.life(due) == ["active", "expired"]


async def test_a_deadline_that_was_missed_meanwhile_ends_its_lease_at_once(place: LostRedisBench) -> None:
    asked, _ = await place.desk.issued("read", ttl_s=6)
    lease = await place.desk.lease(asked.lease_id, "active")
    place.redis._server.kill()
    while time.time() < lease.deadline:
        await asyncio.sleep(0.1)
    await place.redis.lost(0)
    assert await place.life(asked) == ["active", "expired"]


async def test_a_kill_switch_stands_after_a_rebuild(place: LostRedisBench) -> None:
    desk = place.desk
    before = await desk.ask("read")
    claims, _ = await desk.revoke(
        desk.sam, selector=Selector(agent_id=desk.bot.name), reason="something is wrong"
    )
    assert (await desk.verdict(claims)).kind == "accepted"
    await place.lose("empty")
    await desk.decide(before)
    assert (await desk.refused(before)).reasons[0].code == "fenced"
    after, _ = await desk.issued("read")
    await place.active(after)


async def test_forged_lease_records_hide_and_create_no_lease(place: LostRedisBench) -> None:
    desk, world = place.desk, place.world
    asked, _ = await desk.issued("read")
    lease = await desk.lease(asked.lease_id, "active")
    cause = EndCause(kind="deadline", at_ms=1)
    ended = follow(lease, "expired", by=world.key("revoker").id, cause=cause)
    forged = sign(ended, desk.bot.key)
    invented = lease.model_copy(update={"lease_id": str(uuid.uuid4())})
    await world.send(LEASE, asked.lease_id, forged)
    await world.send(LEASE, asked.lease_id, "not.a.record")
    await world.send(LEASE, invented.lease_id, sign(invented, desk.bot.key))
    await place.lose("empty")
    assert (await place.store.look(asked.lease_id)).active
    assert await place.store.find(ALL_LEASES) == [asked.lease_id]
    assert await place.store.get([invented.lease_id]) == {}
    await place.release(asked)
    stored = await place.store.get([asked.lease_id])
    assert (stored[asked.lease_id].status, stored[asked.lease_id].seq) == ("released", 3)


# --- records that come late -------------------------------------------------------------------------------------------


async def test_a_lease_that_is_published_after_the_rebuild_is_given_to_redis(place: LostRedisBench) -> None:
    one = await late(place)
    await publish(place, one)
    async with asyncio.timeout(60):
        while not (await place.store.look(one.claims.lease_id)).active:
            await asyncio.sleep(0.05)
    claims, _ = await place.desk.revoke(place.desk.bot, "release", lease_id=one.claims.lease_id)
    assert (await place.desk.verdict(claims)).result == "1"


async def test_a_lease_that_is_published_after_it_was_revoked_ends(place: LostRedisBench) -> None:
    desk = place.desk
    one = await late(place)
    order, _ = await desk.revoke(desk.sam, selector=Selector(agent_id=desk.bot.name), reason="enough")
    await desk.verdict(order)
    await publish(place, one)
    end = await desk.lease(one.claims.lease_id, *TERMINAL)
    assert end.cause is not None
    assert (end.status, end.cause.ref) == ("revoked", order.jti)


async def test_a_lease_that_redis_did_not_have_when_it_was_revoked_is_ended_by_the_rebuild(
    place: LostRedisBench,
) -> None:
    desk = place.desk
    one, other = await late(place), await late(place, agent_id="somebody-else")
    order, _ = await desk.revoke(desk.sam, selector=Selector(agent_id=desk.bot.name), reason="enough")
    await desk.verdict(order)
    before = await place.epochs()
    await asyncio.gather(place.redis.lost(2), publish(place, one, other))
    await place.rebuilt(before)
    assert not (await place.store.look(one.claims.lease_id)).active
    assert (await place.store.look(other.claims.lease_id)).active
    end = await desk.lease(one.claims.lease_id, *TERMINAL)
    assert end.cause is not None
    assert (end.status, end.cause.ref) == ("revoked", order.jti)
    assert len({record.compact for record in await desk.records(one.claims.lease_id)}) == 3


async def of_run(place: LostRedisBench, *statuses: RunStatus) -> tuple[dict[str, Any], Callable[..., Any]]:
    """A run of the desk's agent with these statuses: fields of a lease of its instance, and how to say more of it."""
    desk, key, nonce = place.desk, place.world.key("runner"), uuid.uuid4().hex
    run_id, deadline = run_id_of(key.id, nonce=nonce), int(time.time()) + 1800

    async def say(status: RunStatus) -> None:
        run = Run(
            iss=key.id, aud=place.world.td, iat=int(time.time()), jti=str(uuid.uuid4()), run_id=run_id, nonce=nonce,
            agent_id=desk.bot.name, task_id=desk.task, status=status, key_thumbprint=desk.bot.key.kid,
            deadline=deadline, backend="bubblewrap", limits=LIMITS, at_ms=int(time.time() * 1000),
        )  # fmt: skip
        await place.world.send(RUN, run_id, sign(run, key))

    for status in statuses:
        await say(status)
    selector = runner_selector(place.world.td, "runner", desk.bot.name)
    instance = InstanceRef(
        instance_id=str(uuid.uuid4()), issuer=selector.issuer, subject=desk.bot.id, selector=selector_id(selector),
        not_after=deadline, run=RunRef(run_id=run_id, task_id=desk.task),
    )  # fmt: skip
    await place.world.accepted(
        place.world.claims(AgentSetAttestation, desk.sam, agent_id=desk.bot.name, attestation=(selector,)),
        desk.sam,
    )
    return {"instance": instance, "key_thumbprint": desk.bot.key.kid}, say


async def test_the_leases_of_a_run_that_ended_while_redis_was_lost_end(place: LostRedisBench) -> None:
    fields, say = await of_run(place, "claimed", "started")
    one, other = await late(place, **fields), await late(place)
    await publish(place, one, other)
    async with asyncio.timeout(60):
        while not (await place.store.look(one.claims.lease_id)).active:
            await asyncio.sleep(0.05)
    before = await place.epochs()
    await asyncio.gather(place.redis.lost(2), say("ended"))
    await place.rebuilt(before)
    end = await place.desk.lease(one.claims.lease_id, *TERMINAL)
    assert end.cause is not None
    assert (end.status, end.cause.kind) == ("revoked", "run_ended")
    assert (await place.store.look(other.claims.lease_id)).active
    await place.lose("flushed")
    assert not (await place.store.look(one.claims.lease_id)).active


async def test_check_leaves_leases_that_kafka_does_not_have_yet(place: LostRedisBench) -> None:
    desk, store = place.desk, place.store
    one = await late(place)
    order, _ = await desk.revoke(desk.sam, selector=Selector(agent_id=desk.bot.name), reason="enough")
    await desk.verdict(order)
    await store.restore([one])
    await publish(place, one)
    key = place.world.key("revoker")
    cause = EndCause(kind="release", at_ms=1, by=desk.bot.id, ref="x", reason="done")
    ending = follow(one.claims, "ending", by=key.id, cause=cause)
    cut = SignedLease(ending, sign(ending, key))
    await store.step(
        [Step(cut, one.claims)], visibility_ms=60_000
    )  # by a revoker that died before it was on Kafka
    before = await place.epochs()
    restoration = Restoration(place.world.settings("revoker"))
    await restoration.declare_lost()
    await restoration.close()
    await place.rebuilt(before)
    await desk.lease(one.claims.lease_id, "ending")
    records = {record.compact for record in await desk.records(one.claims.lease_id)}
    assert records == {one.jws, cut.jws}


async def test_an_old_record_that_comes_after_a_newer_one_is_followed_by_the_newer(
    place: LostRedisBench,
) -> None:
    desk = place.desk
    asked, _ = await desk.issued("read")
    first = (await desk.issued_records(asked.lease_id))[0]
    await place.release(asked)
    assert await place.life(asked) == ["active", "ending", "released"]
    await publish(place, SignedLease(first.claims, first.compact))
    async with asyncio.timeout(60):
        while len(records := await desk.records(asked.lease_id)) < 5:
            await asyncio.sleep(0.05)
    assert [one.claims.seq for one in records] == [1, 2, 3, 1, 3]
    assert records[-1].compact == records[2].compact


async def test_a_lease_that_is_published_while_an_older_record_is_gone_beyond_is_given_to_redis_too(
    place: LostRedisBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, look, arrive = place.desk, LeaseWatch._check, LeaseWatch.on_records
    asked, _ = await desk.issued("read")
    first = (await desk.issued_records(asked.lease_id))[0]
    await place.release(asked)
    assert await place.life(asked) == ["active", "ending", "released"]
    one = await late(place)
    at_it, has_come = asyncio.Event(), asyncio.Event()

    class HeldUp:
        """The follower of a watch, which does not say that all is read before something else has come."""

        def __init__(self, follower: Follower) -> None:
            self._follower = follower

        async def caught_up(self, within_s: float) -> bool:
            at_it.set()
            await asyncio.wait_for(has_come.wait(), 60)
            return await self._follower.caught_up(within_s)

    async def looking(watch: LeaseWatch, records: Any, follower: Follower) -> Any:
        is_it = any(record.id == asked.lease_id for record in records)
        return await look(watch, records, cast(Follower, HeldUp(follower)) if is_it else follower)

    def arriving(watch: LeaseWatch, records: Sequence[Received]) -> None:
        arrive(watch, records)
        if any(record.key == one.claims.lease_id for record in records):
            has_come.set()

    monkeypatch.setattr(LeaseWatch, "on_records", arriving)
    monkeypatch.setattr(LeaseWatch, "_check", looking)
    await publish(place, SignedLease(first.claims, first.compact))
    await asyncio.wait_for(at_it.wait(), 60)
    await publish(place, one)
    async with asyncio.timeout(60):
        while not (await place.store.look(one.claims.lease_id)).active:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 5)])
async def test_leases_are_found_again_where_shards_became_more_or_fewer(
    kafka: Kafka, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    monkeypatch.setattr(revoker_app, "BACK_MS", 0)  # else what is young is found by being read again
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as first,
    ):
        desk = await another(first)
        async with world.running("issuer", "revoker", redis_shards=before):
            leases = [(await desk.issued("read"))[0] for _ in range(6)]
            gone, *kept = leases
            claims, _ = await desk.revoke(desk.bot, "release", lease_id=gone.lease_id)
            await desk.verdict(claims)
            await desk.lease(gone.lease_id, *TERMINAL)
        with_former = LeaseStore(world.settings("issuer", redis_shards=before))
        with_other = LeaseStore(world.settings("issuer", redis_shards=after))
        try:
            with pytest.raises(LostError, match="RINGFENCE_REDIS_SHARDS"):
                await with_other.look(kept[0].lease_id)
            assert (await with_former.look(kept[0].lease_id)).active  # who only asks takes nothing away
            async with world.running("issuer", "revoker", redis_shards=after):
                assert sorted(await with_other.find(ALL_LEASES)) == sorted(one.lease_id for one in kept)
                assert await with_other.count([f"agent:{desk.bot.name}"]) == {f"agent:{desk.bot.name}": 5}
                assert statuses(await with_other.get([gone.lease_id])) == ["released"]
                with pytest.raises(LostError):
                    await with_former.look(kept[0].lease_id)
                order, _ = await desk.revoke(desk.sam, selector=Selector(agent_id=desk.bot.name))
                assert (await desk.verdict(order)).result == "5"
                for one in kept:
                    await desk.lease(one.lease_id, *TERMINAL)
            async with Redis.from_url(redis_server.url) as redis:
                left = {key async for key in redis.scan_iter(f"{world.redis_prefix}{{*}}:*")}
            shards = {
                int(key.partition(b"{")[2].partition(b"}")[0]) for key in left if b"}:spread" not in key
            }
            assert shards <= set(range(after))
        finally:
            await asyncio.gather(with_former.close(), with_other.close())


# --- the command ------------------------------------------------------------------------------------------------------


class Command:
    """`ringfence rebuild`, with the settings of a service."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    async def __call__(self, *args: str, status: int = 0) -> Any:
        """The JSON that it printed."""
        self._capture.readouterr()
        ended = await asyncio.to_thread(main, ["--json", "rebuild", *args])
        told = self._capture.readouterr()
        assert ended == status, told.err or told.out
        return json.loads(told.out)

    async def differences(self) -> set[tuple[str, str]]:
        """What `--check` finds, without what it says of it."""
        found = await self("--check", status=1)
        return {(one["what"], one["about"]) for one in found["differences"]}


@pytest.fixture
def command(
    place: LostRedisBench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    settings = place.world.settings("revoker")
    for name in [name for name in os.environ if name.startswith("RINGFENCE_")]:
        monkeypatch.delenv(name)
    for name in (
        "kafka", "topic_prefix", "trust_domain", "trust_root", "embedded_broker", "redis_url", "redis_prefix",
        "redis_shards",
    ):  # fmt: skip
        monkeypatch.setenv(f"RINGFENCE_{name.upper()}", str(getattr(settings, name)))
    return Command(capsys)


async def test_the_check_finds_nothing_where_all_is_well(place: LostRedisBench, command: Command) -> None:
    desk = place.desk
    assert await command("--check") == {"differences": []}
    kept, _ = await desk.issued("read")
    gone, _ = await desk.issued("read")
    await place.release(gone)
    order, _ = await desk.revoke(desk.sam, selector=Selector(agent_id=desk.bot.name), reason="enough")
    await desk.verdict(order)
    assert statuses(await place.store.get([kept.lease_id, gone.lease_id])) == ["revoked", "released"]
    await desk.issued("read")
    await place.life(kept)
    assert await command("--check") == {"differences": []}


def statuses(stored: dict[str, StoredLease]) -> list[str]:
    return [one.status for one in stored.values()]


async def test_each_difference_is_listed_and_a_rebuild_mends_it(
    place: LostRedisBench, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, store = place.desk, place.store

    async def nothing(self: LeaseStore, leases: Sequence[SignedLease]) -> int:
        return 0

    # The revoker may not have looked yet at the last records that came, and would mend what is broken here.
    monkeypatch.setattr(LeaseStore, "restore", nothing)
    order, _ = await desk.revoke(desk.maria, selector=Selector(user_id="maria"), reason="enough")
    assert (await desk.verdict(order)).kind == "accepted"
    leases = [(await desk.issued("read"))[0].lease_id for _ in range(5)]
    missing, unindexed, dead, undue, behind = leases
    first = await desk.issued_records(behind)
    claims, _ = await desk.revoke(desk.bot, "release", lease_id=behind)
    await desk.verdict(claims)
    await desk.lease(behind, "released")
    unknown = await late(place)

    def at(id: str) -> tuple[Keys, bytes]:
        return store.at(id), uuid_bytes(id)

    async def not_due(keys: Keys, id: bytes) -> None:
        await redis.zrem(keys.deadlines, id)
        for minute in cast(list[bytes], await redis.zrange(keys.minutes, 0, -1)):
            await redis.srem(keys.due_prefix.encode() + minute, id)

    async with Redis.from_url(place.world.settings("revoker").redis_url) as redis:
        keys, id = at(missing)
        await redis.delete(keys.live(id))
        await redis.hdel(keys.leases, id)
        await not_due(keys, id)
        keys, id = at(unindexed)
        await redis.hdel(keys.index(desk.bot.name), id)
        keys, id = at(dead)
        await redis.delete(keys.live(id))
        keys, id = at(undue)
        await not_due(keys, id)
        keys, id = at(behind)
        await redis.set(keys.ended(id), f"a1 {first[0].claims.deadline}\n{first[0].compact}")
        keys, id = at(unknown.claims.lease_id)
        await store.activate([unknown])
        await store.flush_outbox()
        await redis.delete(keys.outbox, keys.outbox_times)
        await redis.delete(store.keys[1].fences)
    found = await command.differences()
    assert ("stray", f"{missing} in by:agent:{desk.bot.name} in shard {at(missing)[0].shard}") in found
    assert {one for one in found if one[0] not in ("stray", "miscounted")} == {
        ("missing", missing), ("misplaced", unindexed), ("misplaced", dead), ("misplaced", undue),
        ("behind", behind), ("misplaced", behind), ("unknown", unknown.claims.lease_id),
        ("unfenced", "user:maria in shard 1"), ("unfenced", "cut:user:maria in shard 1"),
    }  # fmt: skip
    assert await command.differences() == found, "it changes nothing"
    before = await place.epochs()
    assert (await command())["rebuilt"] is True
    await place.rebuilt(before)
    await desk.lease(unknown.claims.lease_id, "active")  # Kafka has it now
    assert await command("--check") == {"differences": []}
    assert (await store.get([behind]))[behind].status == "released"
    for lease_id in (missing, unindexed, dead, undue):
        assert (await store.look(lease_id)).active
        assert lease_id in await store.find(f"agent:{desk.bot.name}")


async def test_unauthorised_lease_is_listed_and_replaced_by_a_rebuild(
    place: LostRedisBench, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it such a lease would never end: revokers act on no record that does not hold."""
    desk, store, world = place.desk, place.store, place.world

    async def nothing(self: LeaseStore, leases: Sequence[SignedLease]) -> int:
        return 0

    monkeypatch.setattr(LeaseStore, "restore", nothing)  # see above
    here, everywhere = [(await desk.issued("read", ttl_s=60))[0] for _ in range(2)]
    stranger = world.party("service", "issuer").key
    async with Redis.from_url(world.settings("revoker").redis_url) as redis:
        for asked in (here, everywhere):
            lease = await desk.lease(asked.lease_id, "active")
            origin = lease.jti.rpartition(".")[0]
            claims = lease.model_copy(
                update={"seq": 50, "jti": f"{origin}.50", "deadline": lease.deadline + 900}
            )
            forged = SignedLease(claims, sign(claims, stranger))
            if asked is everywhere:
                await publish(place, forged)
            keys = store.at(asked.lease_id)
            await redis.hset(keys.leases, uuid_bytes(asked.lease_id), f"a50 {claims.deadline}\n{forged.jws}")
    found = {one for one in await command.differences() if one[0] not in ("misplaced", "mistimed")}
    assert found == {("ahead", here.lease_id), ("ahead", everywhere.lease_id)}
    before = await place.epochs()
    assert (await command())["rebuilt"] is True
    await place.rebuilt(before)
    monkeypatch.undo()
    for asked in (here, everywhere):
        assert (await store.get([asked.lease_id]))[asked.lease_id].seq == 1
        await place.release(asked)
        async with asyncio.timeout(60):
            while (await store.get([asked.lease_id]))[asked.lease_id].status != "released":
                await asyncio.sleep(0.05)


async def test_check_reports_a_lost_redis(
    place: LostRedisBench, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody_does(self: Rebuilder) -> bool:
        return False

    monkeypatch.setattr(Rebuilder, "rebuild", nobody_does)
    assert await command("--check") == {"differences": []}
    before = await place.epochs()
    async with Redis.from_url(place.world.settings("revoker").redis_url) as redis:
        await redis.delete(place.store.keys[0].epoch)  # one shard of several
    assert await command.differences() == {("missing", "epoch")}
    monkeypatch.undo()
    await place.rebuilt(before)


async def test_check_lists_wrong_fences_orders_and_grant_counts(
    place: LostRedisBench, command: Command
) -> None:
    desk, store = place.desk, place.store
    compact = grant(desk, count=2)
    grant_id = id_of(claims_of(compact))
    asked = await granted(desk, compact)
    assert (await desk.answer(asked)).credential is not None
    claims, _ = await desk.revoke(desk.sue, selector=Selector(sponsor="sue"), reason="enough")
    await desk.verdict(claims)
    order_id = derived_id("revocation", claims.iss, claims.jti)
    assert await command("--check") == {"differences": []}
    stray, later_ms = str(uuid.uuid4()), (time.time_ns() // 1_000_000) + 3_600_000
    async with Redis.from_url(place.world.settings("revoker").redis_url) as redis:
        await redis.delete(store.at(grant_id).grant(grant_id), store.at(order_id).selector(order_id))
        await redis.hset(store.at(stray).leases, uuid_bytes(stray), "a1 1990000000\nx.y.z")
        await redis.zadd(store.keys[1].fences, {ALL_LEASES: later_ms})
    assert await command.differences() == {
        ("uncounted", f"{asked.lease_id} on grant {grant_id}"),
        ("unseen", order_id),
        ("unknown", stray),
        ("misplaced", stray),
        ("overfenced", "all in shard 1"),
    }
    before = await place.epochs()
    assert (await command())["rebuilt"] is True
    await place.rebuilt(before)
    assert await command.differences() == {("overfenced", "all in shard 1")}, "no fence is taken away"


async def test_wrong_lease_indexes_are_listed_and_repaired_by_a_rebuild(
    place: LostRedisBench, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, store = place.desk, place.store

    async def nothing(self: LeaseStore, leases: Sequence[SignedLease]) -> int:
        return 0

    monkeypatch.setattr(LeaseStore, "restore", nothing)  # see above
    for_ever, later, taken, kept, waiting = [
        # Another minute for the last: what is taken is to be due as well.
        (await desk.issued("read", ttl_s=ttl_s))[0].lease_id
        for ttl_s in (300, 300, 300, 300, 500)
    ]
    claims, _ = await desk.revoke(desk.bot, "release", lease_id=kept)
    await desk.verdict(claims)
    await desk.lease(kept, "released")
    only_here = await late(place, sponsor="sue")
    await store.activate([only_here])  # and its author has not published it yet
    ahead = only_here.claims.lease_id
    await store.flush_outbox()
    assert await command("--check") == {"differences": []}
    lease = await desk.lease(for_ever, "active")

    async with Redis.from_url(place.world.settings("revoker").redis_url) as redis:
        await redis.persist(store.at(for_ever).live(uuid_bytes(for_ever)))
        await redis.pexpire(store.at(later).live(uuid_bytes(later)), 3_600_000)
        # Whoever claims comes to a minute by `minutes` alone.
        minute = (await desk.lease(waiting, "active")).deadline // 60
        is_waiting = await redis.zrem(store.at(waiting).minutes, str(minute))
        await redis.zadd(store.at(taken).claimed, {uuid_bytes(taken): time.time() * 1000 + 600_000})
        await redis.pexpire(store.at(kept).ended(uuid_bytes(kept)), 60_000)
        at = store.at(for_ever)
        await redis.hincrby(at.agents(f"sponsor:{lease.sponsor}"), lease.agent_id, 7)
        # Of a lease that only Redis knows all that goes with it is wrong as well.
        at_ahead = store.at(ahead)
        await redis.delete(at_ahead.live(uuid_bytes(ahead)))
        await redis.hincrby(at_ahead.agents("sponsor:sue"), only_here.claims.agent_id, 1)
        now_ms = time.time_ns() // 1_000_000
        await redis.zadd(store.keys[0].fences, {"cut:target:shop": now_ms - 60_000})
    found = await command.differences()
    assert is_waiting == 1
    in_minute = {
        one for one in (waiting, ahead)
        if store.at(one) is store.at(waiting) and (await desk.lease(one, "active")).deadline // 60 == minute
    }  # fmt: skip
    assert found == {
        ("mistimed", for_ever), ("mistimed", later), ("misplaced", taken), ("mistimed", kept),
        *(("misplaced", one) for one in in_minute),
        ("miscounted", f"{lease.agent_id} of sponsor:{lease.sponsor} in shard {at.shard}"),
        ("misplaced", ahead),
        ("miscounted", f"{lease.agent_id} of sponsor:sue in shard {at_ahead.shard}"),
        ("overfenced", "cut:target:shop in shard 0"),
    }  # fmt: skip
    before = await place.epochs()
    assert (await command())["rebuilt"] is True
    await place.rebuilt(before)
    assert await command.differences() == {("overfenced", "cut:target:shop in shard 0")}
    for lease_id in (for_ever, later, waiting, taken, ahead):
        assert (await store.look(lease_id)).active


async def test_evicted_lease_indexes_are_restored_even_if_the_record_remains(
    place: LostRedisBench,
) -> None:
    """Redis says that keys are gone, and not which: that a lease's record is there says nothing."""
    desk, store = place.desk, place.store
    asked, _ = await desk.issued("read", ttl_s=10)
    at, id = store.at(asked.lease_id), uuid_bytes(asked.lease_id)
    before = await place.epochs()
    async with Redis.from_url(place.world.settings("revoker").redis_url) as redis:
        await redis.delete(at.live(id), at.deadlines, at.minutes, at.index(desk.bot.name))
    await store.request_full_rebuild()
    await place.rebuilt(before)
    await place.active(asked)
    assert await place.life(asked) == ["active", "expired"]


@pytest.mark.parametrize("forged", ["in the outbox", "among the leases"])
async def test_of_two_records_that_are_not_on_kafka_the_one_counts_that_somebody_signed_who_may(
    place: LostRedisBench, command: Command, monkeypatch: pytest.MonkeyPatch, forged: str
) -> None:
    store = place.store

    async def nobody_sweeps(self: LeaseStore, *, older_than_ms: int, limit: int = 100) -> list[Any]:
        return []

    monkeypatch.setattr(LeaseStore, "unpublished", nobody_sweeps)
    one = await late(place)
    await store.activate([one])
    id, at = one.claims.lease_id, store.at(one.claims.lease_id)
    claims = one.claims.model_copy(update={"deadline": one.claims.deadline + 900})
    other = SignedLease(claims, sign(claims, place.world.party("service", "issuer").key))
    async with Redis.from_url(place.world.settings("revoker").redis_url) as redis:
        if forged == "in the outbox":
            await redis.hset(at.outbox, outbox_field(id, 1), other.record)
        else:
            await redis.hset(at.leases, uuid_bytes(id), f"a1 {claims.deadline}\n{other.jws}")
    assert ("stray", f"{id}:1 in outbox in shard {at.shard}") in await command.differences()
    before = await place.epochs()
    assert (await command())["rebuilt"] is True
    await place.rebuilt(before)
    monkeypatch.undo()
    assert (await place.desk.lease(id, "active")).deadline == one.claims.deadline
    async with asyncio.timeout(60):
        while (await store.look(id)).stored is None:
            await asyncio.sleep(0.05)
    assert (await store.get([id]))[id].jws.decode() == one.jws
    assert (await store.look(id)).active
