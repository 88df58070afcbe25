"""Who may have which leases ended, and what becomes of orders: releases, revocations, the kill switch."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jws import sign
from ringfence.messages.lease import EndCause, Lease, Selector
from ringfence.messages.topics import DEAD_LETTER, REVOCATION_REQUEST
from ringfence.model.lease_store import LeaseStore, StoredLease
from ringfence.revoker.lease_end import expiry
from ringfence.revoker.lease_end.expiry import Expiry
from ringfence.revoker.lease_end.lease_ender import CONCURRENT_BATCHES, LeaseEnder
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import IssuerBench, another, opened_office
from tests.support.benches.revocation_flows import (
    QUICK,
    accepted,
    ended,
    expired_in_time,
    lives,
    redeliver,
    refused,
    statuses,
)
from tests.support.world import WITHIN_S, Party


@pytest.fixture(scope="module")
async def issuer_bench(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    """Registry, issuer and revoker, once for all tests here."""
    async with opened_office(kafka, redis_server, "issuer", "revoker", own=QUICK) as desk:
        yield desk


# --- release ----------------------------------------------------------------------------------------------------------


async def test_an_agent_gives_its_credential_back(desk: IssuerBench, store: LeaseStore) -> None:
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


async def test_giving_back_twice_is_fine_and_ends_nothing_twice(desk: IssuerBench) -> None:
    asked, _ = await desk.issued("read")
    await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    again = await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    assert again.result == "0"
    assert len(await ended(desk, asked)) == 3


async def test_a_redelivered_release_ends_nothing_twice(desk: IssuerBench) -> None:
    asked, _ = await desk.issued("read")
    claims, at = await desk.revoke(desk.bot, "release", lease_id=asked.lease_id)
    await desk.verdict(claims)
    await redeliver(desk, REVOCATION_REQUEST, at)
    assert len(await ended(desk, asked)) == 3


async def test_a_lease_that_nobody_knows(desk: IssuerBench) -> None:
    assert await refused(desk, desk.bot, kind="release", lease_id=str(uuid.uuid4())) == "lease_unknown"


# --- revocation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["sam", "maria", "operator"])
async def test_sponsor_user_and_operator_revoke_a_lease(desk: IssuerBench, who: str) -> None:
    by = desk.world.operator if who == "operator" else getattr(desk, who)
    asked, _ = await desk.issued("read")
    event = await accepted(desk, by, lease_id=asked.lease_id)
    life = await ended(desk, asked)
    assert statuses(life) == ["active", "ending", "revoked"]
    assert life[-1].claims.cause is not None
    assert (life[-1].claims.cause.by, life[-1].claims.cause.ref) == (by.id, event.ref)


async def test_a_former_sponsor_revokes_no_more(desk: IssuerBench, store: LeaseStore) -> None:
    asked, _ = await desk.issued("read")
    await desk.world.transfer(desk.bot.name, "sue")
    # An order that comes within the moment in which word of the transfer is on its way is judged as before it.
    assert await desk.world.runtimes["revoker"].tables_caught_up(30)
    assert await refused(desk, desk.sam, lease_id=asked.lease_id) == "not_entitled"
    await lives(desk, store, asked)
    await accepted(desk, desk.sue, lease_id=asked.lease_id)
    assert statuses(await ended(desk, asked))[-1] == "revoked"


@pytest.mark.parametrize("forger", ["a stranger", "a service of another role", "policy"])
async def test_an_order_that_nobody_of_authority_signed_is_dead_lettered(
    desk: IssuerBench, store: LeaseStore, forger: str
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
async def test_garbage_is_dead_lettered_and_stops_nobody(desk: IssuerBench, garbage: bytes) -> None:
    at = await desk.world.send(REVOCATION_REQUEST, desk.bot.name, garbage)
    await desk.world.consume_until(
        DEAD_LETTER, lambda r: f'"offset":{at.offset},'.encode() in r.value and at.topic.encode() in r.value
    )
    asked, _ = await desk.issued("read")
    await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)


# --- selectors: the kill switch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["agent by its sponsor", "task by its assigner", "task by the sponsor"])
async def test_a_selector_ends_all_that_it_covers_and_nothing_else(
    desk: IssuerBench, issuer_bench: IssuerBench, store: LeaseStore, kind: str
) -> None:
    other = await another(issuer_bench)
    mine = await asyncio.gather(*(desk.issued("read") for _ in range(5)))
    theirs, _ = await other.issued("read")
    selector = Selector(agent_id=desk.bot.name) if kind.startswith("agent") else Selector(task_id=desk.task)
    event = await accepted(desk, desk.maria if "assigner" in kind else desk.sam, selector=selector)
    assert event.result == "5"
    for asked, _ in mine:
        assert statuses(await ended(desk, asked)) == ["active", "ending", "revoked"]
    await lives(desk, store, theirs)


async def test_a_kill_switch_does_not_wait_behind_leases_that_are_due_together(
    desk: IssuerBench, issuer_bench: IssuerBench, store: LeaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expiry has all its batches in progress, and more leases are due. The selector fences and ends all the same."""
    taken, released, end_claimed = set[str](), asyncio.Event(), Expiry._end_claimed

    async def end_later(self: Expiry, due: Mapping[str, StoredLease | None]) -> None:
        taken.update(due)
        await released.wait()
        await end_claimed(self, due)

    monkeypatch.setattr(Expiry, "_end_claimed", end_later)
    monkeypatch.setattr(expiry, "BATCH_SIZE", 1)
    stopped = await another(issuer_bench)
    live, _ = await stopped.issued("read")
    due = [one for one, _ in await asyncio.gather(*(desk.issued("read", ttl_s=6) for _ in range(6)))]
    async with asyncio.timeout(WITHIN_S):
        while len(taken) < CONCURRENT_BATCHES:
            await asyncio.sleep(0.02)
    await accepted(stopped, stopped.sam, selector=Selector(agent_id=stopped.bot.name))
    assert statuses(await ended(stopped, live)) == ["active", "ending", "revoked"]
    stored = await store.get([one.lease_id for one in due])
    assert {one.status for one in stored.values()} == {"active"}, "expiry has ended none of them yet"
    released.set()
    for one in due:
        await expired_in_time(desk, store, one)


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
async def test_order_for_an_unknown_name_is_refused_as_subject_unknown(
    desk: IssuerBench, selector: Selector, said: str
) -> None:
    claims, _ = await desk.revoke(desk.world.operator, selector=selector)
    verdict = await desk.verdict(claims)
    assert (verdict.kind, [reason.code for reason in verdict.reasons]) == ("refused", ["subject_unknown"])
    assert said in verdict.reasons[0].message


async def test_request_made_before_a_revocation_order_is_not_issued(desk: IssuerBench) -> None:
    before = await desk.ask("read")
    await accepted(desk, desk.sam, selector=Selector(agent_id=desk.bot.name))
    after = await desk.ask("read")
    await desk.decide(before)
    await desk.decide(after)
    refusal = await desk.refused(before)
    assert [reason.code for reason in refusal.reasons] == ["fenced"]
    assert (await desk.answer(after)).credential is not None


async def test_a_replayed_selector_ends_nothing_more(desk: IssuerBench, store: LeaseStore) -> None:
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
    desk: IssuerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died after the fence: the same record at the same place is no replay."""
    leases = [(await desk.issued("read"))[0] for _ in range(3)]
    end_matching, failures = LeaseEnder.end_matching, list[str]()

    async def failing(self: LeaseEnder, selector_key: str, request_for: Any, **more: Any) -> list[Lease]:
        if not failures:
            failures.append(selector_key)
            raise UnavailableError("Redis went away")
        return await end_matching(self, selector_key, request_for, **more)

    monkeypatch.setattr(LeaseEnder, "end_matching", failing)
    event = await accepted(desk, desk.sam, selector=Selector(agent_id=desk.bot.name))
    assert failures == [f"agent:{desk.bot.name}"]
    assert event.result == "3"
    for asked in leases:
        assert statuses(await ended(desk, asked))[-1] == "revoked"


async def test_the_operator_stops_everything(kafka: Kafka, redis_server: RedisServer) -> None:
    async with opened_office(kafka, redis_server, "issuer", "revoker") as first:
        world = first.world
        one, two = await another(first), await another(first)
        leases = [(desk, (await desk.issued("read"))[0]) for desk in (one, two, one)]
        pending = await two.ask("read")
        event = await accepted(one, world.operator, selector=Selector(all=True), reason="stop")
        assert event.result == "3"
        for desk, asked in leases:
            assert statuses(await ended(desk, asked))[-1] == "revoked"
        await two.decide(pending)
        assert [reason.code for reason in (await two.refused(pending)).reasons] == ["fenced"]
