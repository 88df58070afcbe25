"""Credentials that leave something at a real target, from the decision to the last trace: nothing stays behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ringfence.backends import RedisBackend
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import b64decode
from ringfence.kernel.kafka.record import Received
from ringfence.messages.lease import Lease
from ringfence.messages.topics import CREDENTIAL_DECISION, LEASE, SERVICE_EVENT
from ringfence.model.lease_store import LeaseStore
from ringfence.revoker.lease_end.lease_ender import LeaseEnder
from tests.support.benches import target_yard
from tests.support.benches.issuer_bench import Asked, IssuerBench
from tests.support.benches.target_yard import (
    Crash,
    Yard,
    at,
    caller_of,
    ended,
    gone,
    held_mint,
    revoked,
    statuses,
    until,
    url,
    user_of,
)
from tests.support.servers.redis_target import works

yard, desk, open_gates = target_yard.yard, target_yard.desk, target_yard.open_gates

# --- the life of one --------------------------------------------------------------------------------------------------


async def test_lease_is_announced_minted_and_active_before_delivery(desk: IssuerBench, yard: Yard) -> None:
    asked, content = await desk.issued(scope=desk.scope("read", "write", resource="jobs/**"))
    await desk.lease(asked.lease_id, "active")
    records = await desk.records(asked.lease_id)
    assert statuses(record.claims for record in records) == ["minting", "active"]
    assert [record.claims.seq for record in records] == [1, 2]
    assert content.lease == records[1].compact
    announced, active = (record.claims for record in records)
    same = {"seq": 1, "status": "minting", "jti": announced.jti, "epoch": None}
    assert active.model_copy(update=same) == announced
    assert active.epoch is not None, "a revoker that aborts it writes the same seq"
    assert active.backend == "redis"
    assert await works(url(content), "SET", "jobs/1", "x")
    assert not await works(url(content), "SET", "other", "x")
    assert user_of(asked) in await yard.targets["cache"].users()
    password = url(content).split(":")[2].partition("@")[0].encode()
    for topic in (LEASE, CREDENTIAL_DECISION, SERVICE_EVENT):
        assert not any(password in record.value for record in await desk.world.records(topic))


async def test_released_it_is_cut_taken_back_and_only_then_over(desk: IssuerBench, yard: Yard) -> None:
    asked, content = await desk.issued(scope=desk.scope("read"))
    claims, _ = await desk.revoke(desk.bot, "release", lease_id=asked.lease_id)
    event = await desk.verdict(claims)
    assert (event.kind, event.result) == ("accepted", "1")
    life = await ended(desk, asked)
    assert statuses(life) == ["minting", "active", "ending", "released"]
    assert user_of(asked) not in await yard.targets["cache"].users()
    assert not await works(url(content))


async def test_expired_credential_is_removed_from_its_target(desk: IssuerBench, yard: Yard) -> None:
    asked, content = await desk.issued(scope=desk.scope("read"), ttl_s=7)
    assert await works(url(content))
    life = await ended(desk, asked)
    assert statuses(life) == ["minting", "active", "ending", "expired"]
    assert user_of(asked) not in await yard.targets["cache"].users()


async def test_a_scope_that_the_target_cannot_say_is_refused_and_nothing_is_made(
    desk: IssuerBench, yard: Yard
) -> None:
    asked = await desk.ask(scope=desk.scope("read", resource="jobs/*"))
    await desk.decide(asked)
    refusal = await desk.refused(asked)
    assert [reason.code for reason in refusal.reasons] == ["backend_cannot"]
    assert refusal.retry_after_s is None
    assert user_of(asked) not in await yard.targets["cache"].users()


# --- crashes on the way -----------------------------------------------------------------------------------------------

STEPS = ("prepare", "minting record", "mint", "activate", "active record", "reply")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_after_a_crash_at_any_step_the_agent_is_served_and_nothing_is_left(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    crashes = list[str]()

    def crashing(real: Callable[..., Awaitable[Any]], concerns: Callable[..., bool]) -> Any:
        async def call(*args: Any, **more: Any) -> Any:
            if crashes or not concerns(*args, **more):
                return await real(*args, **more)
            crashes.append(step)
            if when == "after":
                await real(*args, **more)
            raise Crash(step)

        return call

    asked = await desk.ask(scope=desk.scope("read"))
    publisher = desk.world.runtimes["issuer"].publisher
    match step:
        case "prepare" | "activate":
            mine = lambda self, leases, **_: any(one.claims.lease_id == asked.lease_id for one in leases)  # noqa: E731
            monkeypatch.setattr(LeaseStore, step, crashing(getattr(LeaseStore, step), mine))
        case "mint":
            monkeypatch.setattr(
                RedisBackend,
                "mint",
                crashing(RedisBackend.mint, lambda self, lease, target: lease.lease_id == asked.lease_id),
            )
        case "reply":
            is_reply = lambda partition, topic, what, records: (  # noqa: E731
                topic.what == "credential.reply" and any(one.key == desk.bot.name for one in records)
            )
            monkeypatch.setattr(publisher, "send_to", crashing(publisher.send_to, is_reply))
        case "active record":
            is_active = lambda partition, topic, what, records: any(  # noqa: E731
                one.key == asked.lease_id and one.id.endswith(".2") for one in records
            )
            monkeypatch.setattr(publisher, "send_to", crashing(publisher.send_to, is_active))
        case _:
            is_it = lambda topic, what, one, **_: one.key == asked.lease_id and one.id.endswith(".1")  # noqa: E731
            monkeypatch.setattr(publisher, "send", crashing(publisher.send, is_it))
    await desk.decide(asked)
    content = await desk.answer(asked)
    assert crashes == [step]
    assert content.credential is not None, desk.refusal(content)
    assert await works(url(content), "GET", "env/staging/web")
    await desk.lease(asked.lease_id, "active")
    records = {record.compact: record.claims for record in await desk.records(asked.lease_id)}
    assert sorted(lease.seq for lease in records.values()) == [1, 2]
    await revoked(desk, lease_id=asked.lease_id)
    assert statuses(await ended(desk, asked)) == ["minting", "active", "ending", "revoked"]
    assert user_of(asked) not in await yard.targets["cache"].users()


async def test_a_decision_that_comes_again_keeps_the_first_credential_good(
    desk: IssuerBench, yard: Yard
) -> None:
    asked, first = await desk.issued(scope=desk.scope("read"))
    await again(desk, asked)
    second = await desk.answer(asked, after=1)
    assert url(second) != url(first)
    assert await works(url(first))
    assert await works(url(second))
    assert len({record.compact for record in await desk.records(asked.lease_id)}) == 2
    await revoked(desk, lease_id=asked.lease_id)
    await ended(desk, asked)
    await again(desk, asked)
    refusal = desk.refusal(await desk.answer(asked, after=2))
    assert [reason.code for reason in refusal.reasons] == ["lease_ended"]
    assert user_of(asked) not in await yard.targets["cache"].users()


async def again(desk: IssuerBench, asked: Asked) -> None:
    """Hand the decision to the issuer once more, as a broker does after a crash before the commit."""

    def decided(request_id: str) -> list[Any]:
        return [r for r in seen if r.key == desk.bot.name and request_id in claims_of(r)]

    seen = await desk.world.records(CREDENTIAL_DECISION)
    await desk.world.until(lambda: decided(asked.id) or None, "the decision")
    await _handler(desk)(decided(asked.id))


def claims_of(record: Any) -> str:
    return b64decode(record.value.decode().split(".")[1]).decode()


@pytest.mark.parametrize("second", ["the same record", "a replay"])
async def test_a_decision_that_comes_twice_at_once_is_one_lease(
    desk: IssuerBench, yard: Yard, second: str
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    value = sign(desk.decision(asked), desk.world.key("policy")).encode()
    name, now_ms = CREDENTIAL_DECISION.name(desk.world.prefix), int(time.time() * 1000)
    first = Received(CREDENTIAL_DECISION, name, 0, 1_000_000, now_ms, desk.bot.name, value)
    other = first if second == "the same record" else first._replace(offset=1_000_001)
    handler = _handler(desk)
    async with asyncio.timeout(60):
        while True:  # as the consumer does
            try:
                await handler([first, other])
                break
            except UnavailableError:
                await asyncio.sleep(0.05)
    content = await desk.answer(asked)
    assert await works(url(content))
    await desk.lease(asked.lease_id, "active")
    assert len({record.compact for record in await desk.records(asked.lease_id)}) == 2
    if second == "a replay":
        assert (await desk.event("replayed", asked)).source is not None
    await revoked(desk, lease_id=asked.lease_id)
    await ended(desk, asked)
    await gone(yard, asked)


async def test_a_credential_made_again_while_its_lease_ends_is_taken_back(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, _ = await desk.issued(scope=desk.scope("read"))
    mint = RedisBackend.mint

    async def slow(self: RedisBackend, lease: Lease, target: Any) -> Any:
        if lease.lease_id == asked.lease_id:  # the end comes while the decision is handled once more
            await revoked(desk, lease_id=asked.lease_id)
            await ended(desk, asked)
        return await mint(self, lease, target)

    monkeypatch.setattr(RedisBackend, "mint", slow)
    monkeypatch.setattr(caller_of(desk), "_deadline_s", 60.0)
    await again(desk, asked)
    refusal = desk.refusal(await desk.answer(asked, after=1))
    assert [reason.code for reason in refusal.reasons] == ["lease_ended"]
    await gone(yard, asked)


# --- targets that are away, or slow -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shut", "hanging"])
async def test_unavailable_target_refuses_with_retry_after_and_aborts_the_lease(
    desk: IssuerBench, yard: Yard, mode: Any
) -> None:
    yard.gates["cache"].turn(mode)
    asked = await desk.ask(scope=desk.scope("read"))
    await desk.decide(asked)
    refusal = desk.refusal(await desk.answer(asked))
    assert refusal.reasons[0].code in ("target_unavailable", "target_shut")
    assert refusal.retry_after_s is not None
    yard.gates["cache"].turn("open")
    life = await ended(desk, asked)
    assert statuses(life) == ["minting", "aborted"]
    assert life[-1].cause is not None
    assert life[-1].cause.kind == "mint_failed"
    assert user_of(asked) not in await yard.targets["cache"].users()


async def test_a_target_that_is_away_delays_no_other_and_no_token(desk: IssuerBench, yard: Yard) -> None:
    other = await at(yard, "queue")
    yard.gates["cache"].turn("hanging")
    stuck = [await desk.ask(scope=desk.scope("read")) for _ in range(3)]
    for asked in stuck:
        await desk.decide(asked)
    await other.issued(scope=other.scope("read"))
    for asked in stuck:
        assert (await desk.answer(asked)).refusal is not None


def _handler(desk: IssuerBench) -> Any:
    """The issuer's handler of decisions: the consumer's own way in."""
    name = CREDENTIAL_DECISION.name(desk.world.prefix)
    (handler,) = [
        consumer._handlers[name]
        for consumer in desk.world.runtimes["issuer"].consumers
        if name in consumer._handlers
    ]
    return handler


async def test_a_mint_that_takes_too_long_is_aborted_and_what_it_made_is_taken_back(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    async with held_mint(monkeypatch, desk, asked):
        life = await ended(desk, asked)  # a revoker has aborted it: and now the issuer wakes
    assert statuses(life) == ["minting", "aborted"]
    refusal = desk.refusal(await desk.answer(asked))
    assert [reason.code for reason in refusal.reasons] == ["mint_too_slow"]
    assert user_of(asked) not in await yard.targets["cache"].users()  # by the issuer itself, not by a sweep
    assert statuses(await ended(desk, asked)) == ["minting", "aborted"]


async def test_a_mint_that_is_finished_just_in_time_is_left_alone(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    close, met = LeaseEnder._lock_out_issuer, list[str]()
    async with held_mint(monkeypatch, desk, asked) as release:

        async def meeting(self: LeaseEnder, ids: Any, leases: Any, causes: Any) -> list[str]:
            if (
                asked.lease_id in ids and not met
            ):  # a revoker has read that it is minting: and now it is active
                met.append(causes[asked.lease_id].kind)
                release.set()
                await desk.lease(asked.lease_id, "active")
            return await close(self, ids, leases, causes)

        monkeypatch.setattr(LeaseEnder, "_lock_out_issuer", meeting)
        content = await desk.answer(asked)
    assert met == ["mint_failed"]
    assert await works(url(content))
    await revoked(desk, lease_id=asked.lease_id)
    assert statuses(await ended(desk, asked)) == ["minting", "active", "ending", "revoked"]


async def test_lease_aborted_by_a_revoker_is_not_minted_by_an_issuer(desk: IssuerBench, yard: Yard) -> None:
    """Else a credential could be made between its undo and its end, and be given away dead."""
    yard.gates["cache"].turn("shut")
    asked = await desk.ask(scope=desk.scope("read"))
    await desk.decide(asked)
    assert (await desk.answer(asked)).refusal is not None
    count = 0

    async def shut_out() -> bool:
        nonlocal count
        count += 1
        await again(desk, asked)
        refusal = desk.refusal(await desk.answer(asked, after=count))
        return refusal.reasons[0].code == "lease_ended"

    await until(shut_out, "the revoker has it")
    assert statuses(lease.claims for lease in await desk.records(asked.lease_id))[-1] == "minting"
    yard.gates["cache"].turn("open")
    assert statuses(await ended(desk, asked)) == ["minting", "aborted"]


async def test_an_issuer_that_wakes_between_undo_and_end_gives_nothing_away(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    undo, undone = RedisBackend.undo, list[str]()
    async with held_mint(monkeypatch, desk, asked) as release:

        async def waking(self: RedisBackend, lease_id: str, *, target_id: str) -> None:
            await undo(self, lease_id, target_id=target_id)
            if lease_id == asked.lease_id and not undone:
                undone.append(lease_id)
                release.set()
                await desk.answer(asked)  # within the deadline of an undo, or it is done once more

        monkeypatch.setattr(RedisBackend, "undo", waking)
        await revoked(desk, lease_id=asked.lease_id)
        life = await ended(desk, asked)
    assert undone == [asked.lease_id]
    assert statuses(life) == ["minting", "aborted"]
    content = await desk.answer(asked)
    assert content.credential is None
    await gone(yard, asked)
