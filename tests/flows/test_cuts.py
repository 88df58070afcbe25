"""Cuts, pushed to something that stands for a gateway: a process that signs heartbeats and its word."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ringfence.dev.processes import Child, free_port, spawn
from ringfence.gateway.state.view import RevocationApplier
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.ids import lease_id
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.lease import Lease, RevocationAck, Selector
from ringfence.messages.operations import Heartbeat
from ringfence.messages.registry import AgentSetCeiling
from ringfence.messages.topics import HEARTBEAT, LEASE, REVOCATION_ACK
from ringfence.model.lease_store import LeaseStore
from ringfence.revoker.lease_end.lease_ender import LeaseEnder
from ringfence.revoker.settings import RevokerSettings
from tests.support import cut_listener
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.cut_listener import CutListener
from tests.support.http_client import plain_client
from tests.support.world import WITHIN_S, World


@asynccontextmanager
async def listening(
    world: World, *, acknowledges: bool = True, clock: Clock | None = None, **settings: float
) -> AsyncIterator[CutListener]:
    """A listener in this process, once it is alive to the revoker."""
    stop = asyncio.Event()
    runtime: Runtime
    own = world.settings("gateway").model_copy(update=settings)
    runtime, listener = cut_listener.build(own, clock, acknowledges=acknowledges)
    running = asyncio.create_task(runtime.run(stop))
    try:
        await heard(world)
        yield listener
    finally:
        stop.set()
        await running


async def heard(world: World) -> None:
    await world.consume_until(HEARTBEAT, lambda r: world.opened(r, Heartbeat, "gateway"))


async def metric(world: World, name: str) -> float:
    text = (await world.get("revoker", "/metrics")).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


async def grown(world: World, name: str, before: float) -> None:
    async with asyncio.timeout(60):
        while await metric(world, name) <= before:
            await asyncio.sleep(0.05)


@pytest.fixture
async def desk(world: World) -> AsyncIterator[IssuerBench]:
    async with opened_desks(world) as first, world.running("issuer", "revoker"):
        yield await another(first)


@pytest.mark.parametrize("what", ["a lease", "all of an agent"])
async def test_a_gateway_refuses_says_so_and_the_cut_is_measured(desk: IssuerBench, what: str) -> None:
    world = desk.world
    async with listening(world) as gateway:
        asked, _ = await desk.issued("read")
        await world.until(lambda: gateway.forwards(asked.lease_id) or None, "the lease at the gateway")
        before = await metric(world, "ringfence_time_to_cut_seconds_count")
        by = (
            {"lease_id": asked.lease_id}
            if what == "a lease"
            else {"selector": Selector(agent_id=desk.bot.name)}
        )
        claims, _ = await desk.revoke(desk.sam, **by)
        assert (await desk.verdict(claims)).kind == "accepted"
        ack = await world.consume_until(REVOCATION_ACK, lambda r: world.opened(r, RevocationAck, "gateway"))
        assert world.opened(ack, RevocationAck, "gateway").iss == world.key("gateway").id
        assert not gateway.forwards(asked.lease_id)
        await grown(world, "ringfence_time_to_cut_seconds_count", before)


async def test_a_gateway_whose_view_no_revoker_confirms_forwards_nothing(world: World) -> None:
    async with opened_desks(world) as first, listening(world) as gateway:
        async with world.running("issuer", "revoker"):
            desk = await another(first)
            asked, _ = await desk.issued("read")
            await world.until(lambda: gateway.forwards(asked.lease_id) or None, "the lease at the gateway")
        await world.until(lambda: not gateway.forwards(asked.lease_id) or None, "the end of the grace")
        async with world.running("revoker"):
            await world.until(lambda: gateway.forwards(asked.lease_id) or None, "another confirmation")


async def test_a_gateway_that_has_not_verified_every_earlier_revocation_forwards_nothing(
    desk: IssuerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka does not tell it whether it has read all leases: one may be among them that is revoked."""
    world = desk.world
    answered = asyncio.Event()

    async def caught_up(self: RevocationApplier) -> bool:
        await answered.wait()
        return True

    monkeypatch.setattr(RevocationApplier, "_caught_up", caught_up)
    await desk.revoke(desk.sam, lease_id=lease_id(str(uuid.uuid4())))
    async with listening(world) as gateway:
        asked, _ = await desk.issued("read")
        await world.until(lambda: gateway.knows(asked.lease_id) or None, "the lease at the gateway")
        await world.until(lambda: "not verified" in (gateway.stale() or "") or None, "the reason")
        assert not gateway.forwards(asked.lease_id)
        answered.set()
        await world.until(lambda: gateway.forwards(asked.lease_id) or None, "the end of the backlog")


@dataclass
class _Behind:
    """A clock that is so much behind all others."""

    by_ms: int

    def now_ms(self) -> int:
        return SystemClock().now_ms() - self.by_ms


async def test_a_gateway_whose_clock_is_behind_forwards_nothing_until_it_is_right(desk: IssuerBench) -> None:
    """By it deadlines are not there yet, and what it knows is younger than it is."""
    world, clock = desk.world, _Behind(8000)
    async with listening(world, clock=clock) as gateway:
        asked, _ = await desk.issued("read")
        await world.until(lambda: gateway.knows(asked.lease_id) or None, "the lease at the gateway")
        await world.until(lambda: "behind" in (gateway.stale() or "") or None, "its word on its clock")
        assert not gateway.forwards(asked.lease_id)
        clock.by_ms = 0
        await world.until(lambda: gateway.forwards(asked.lease_id) or None, "a clock that is right")


async def test_by_a_clock_that_is_ahead_a_lease_goes_no_further_and_is_not_said_to_have_ended(
    desk: IssuerBench,
) -> None:
    world, clock = desk.world, _Behind(0)
    async with listening(world, clock=clock, grace_s=3600.0) as gateway:
        asked, _ = await desk.issued("read")
        await world.until(lambda: gateway.forwards(asked.lease_id) or None, "the lease at the gateway")
        assert gateway.doubt() is None
        clock.by_ms = -1800_000
        assert not gateway.forwards(asked.lease_id)
        assert gateway.problem(asked.lease_id) == "stale_view"
        assert "ahead" in (gateway.doubt() or "")
        clock.by_ms = 0
        assert gateway.doubt() is None
        assert gateway.forwards(asked.lease_id)


async def test_a_gateway_does_not_follow_who_may_not_revoke(desk: IssuerBench) -> None:
    world = desk.world
    async with listening(world) as gateway:
        asked, _ = await desk.issued("read")
        await world.until(lambda: gateway.forwards(asked.lease_id) or None, "the lease at the gateway")
        claims, _ = await desk.revoke(desk.sue, selector=Selector(agent_id=desk.bot.name))
        assert (await desk.verdict(claims)).kind == "refused"
        claims, _ = await desk.revoke(desk.sam, selector=Selector(task_id=desk.task))
        await desk.verdict(claims)
        await world.consume_until(REVOCATION_ACK, lambda r: world.opened(r, RevocationAck, "gateway"))
        assert len(await world.records(REVOCATION_ACK)) == 1


async def test_a_gateway_that_never_says_so_is_told_of_and_the_grace_stands_for_its_word(
    desk: IssuerBench, store: LeaseStore
) -> None:
    world = desk.world
    async with listening(world, acknowledges=False):
        asked, _ = await desk.issued("read")
        cuts = await metric(world, "ringfence_time_to_cut_seconds_count")
        unconfirmed = await metric(world, "ringfence_cuts_unconfirmed_total")
        claims, _ = await desk.revoke(desk.sam, lease_id=asked.lease_id)
        assert (await desk.verdict(claims)).kind == "accepted"
        assert not (await store.look(asked.lease_id)).active  # Redis waits for no gateway
        await grown(world, "ringfence_cuts_unconfirmed_total", unconfirmed)
        await grown(world, "ringfence_time_to_cut_seconds_count", cuts)


@pytest.fixture
async def store(desk: IssuerBench) -> AsyncIterator[LeaseStore]:
    store = LeaseStore(desk.world.settings("issuer"))
    yield store
    await store.close()


async def test_the_listener_as_a_process(desk: IssuerBench, tmp_path: Path) -> None:
    """As others start it: by its settings and its key."""
    world = desk.world
    settings = world.settings("gateway")
    environment = {
        **os.environ,
        "RINGFENCE_CONFIG": os.devnull,
        "RINGFENCE_HTTP": f"127.0.0.1:{free_port()}",
        **{
            f"RINGFENCE_{name.upper()}": str(getattr(settings, name))
            for name in ("kafka", "topic_prefix", "trust_domain", "trust_root", "embedded_broker", "key_dir")
        },
    }
    child: Child = spawn(
        "cut listener",
        [sys.executable, "-m", "tests.support.cut_listener"],
        env=environment,
        log_path=tmp_path / "log",
    )
    try:
        await heard(world)
        asked, _ = await desk.issued("read")
        claims, _ = await desk.revoke(desk.sam, selector=Selector(agent_id=desk.bot.name))
        assert (await desk.verdict(claims)).kind == "accepted"
        await world.consume_until(REVOCATION_ACK, lambda r: world.opened(r, RevocationAck, "gateway"))
        ended = await desk.lease(asked.lease_id, "revoked")
        assert ended.cause is not None
        assert ended.cause.ref == claims.jti
    finally:
        child.stop()


# --- Redis ------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def shared(company: IssuerBench) -> IssuerBench:
    """In a world without gateways."""
    return await another(company)


@pytest.mark.parametrize("selected", ["agent", "task", "sponsor", "target", "user", "all"])
async def test_introspection_refuses_what_a_selector_covers_before_any_lease_is_found(
    shared: IssuerBench, monkeypatch: pytest.MonkeyPatch, selected: str
) -> None:
    desk, world = shared, shared.world
    asked, content = await desk.issued("read")
    assert content.credential is not None
    assert await introspected(desk, content.credential.value)
    selector = {
        "agent": Selector(agent_id=desk.bot.name),
        "task": Selector(task_id=desk.task),
        "sponsor": Selector(sponsor="sam"),
        "target": Selector(target_id="staging"),
        "user": Selector(user_id="maria"),
        "all": Selector(all=True),
    }[selected]
    found = asyncio.Event()
    end_matching = LeaseEnder.end_matching

    async def finding_nothing_yet(
        self: LeaseEnder, selector_key: str, request_for: Any, **more: Any
    ) -> list[Lease]:
        await found.wait()
        return await end_matching(self, selector_key, request_for, **more)

    monkeypatch.setattr(LeaseEnder, "end_matching", finding_nothing_yet)
    cuts = await metric(world, "ringfence_time_to_cut_seconds_count")
    claims, _ = await desk.revoke(world.operator, selector=selector)
    await grown(world, "ringfence_time_to_cut_seconds_count", cuts)
    assert not await introspected(desk, content.credential.value)
    assert {record.claims.status for record in await desk.issued_records(asked.lease_id)} == {"active"}
    later, renewed = await desk.issued("read")  # asked for after it
    assert renewed.credential is not None
    assert await introspected(desk, renewed.credential.value)
    found.set()
    assert (await desk.verdict(claims)).kind == "accepted"
    await desk.lease(asked.lease_id, "revoked")
    assert await introspected(desk, renewed.credential.value)
    assert later.lease_id != asked.lease_id


async def test_a_selector_cuts_while_another_one_is_still_ending_leases(
    shared: IssuerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, world = shared, shared.world
    other = await another(one)
    (asked, first), (asked_too, second) = await one.issued("read"), await other.issued("read")
    assert first.credential is not None
    assert second.credential is not None
    ending, go_on = asyncio.Event(), asyncio.Event()
    end_matching = LeaseEnder.end_matching

    async def slowly(self: LeaseEnder, selector_key: str, request_for: Any, **more: Any) -> list[Lease]:
        ending.set()
        await go_on.wait()
        return await end_matching(self, selector_key, request_for, **more)

    monkeypatch.setattr(LeaseEnder, "end_matching", slowly)
    await one.revoke(world.operator, selector=Selector(agent_id=one.bot.name))
    await ending.wait()
    await one.revoke(world.operator, selector=Selector(agent_id=other.bot.name))
    async with asyncio.timeout(60):
        while await introspected(other, second.credential.value):
            await asyncio.sleep(0.05)
    assert {record.claims.status for record in await other.issued_records(asked_too.lease_id)} == {"active"}
    go_on.set()
    await one.lease(asked.lease_id, "revoked")
    await other.lease(asked_too.lease_id, "revoked")


async def introspected(desk: IssuerBench, token: str) -> bool:
    """Whether the target is told that a token is good."""
    url = f"http://127.0.0.1:{desk.world.ports['issuer']}"
    async with plain_client(base_url=url, timeout=WITHIN_S) as http:
        answer = await http.post(
            "/oauth2/introspect", data={"token": token}, headers=desk.world.bearer(desk.target, "issuer")
        )
    assert answer.status_code == 200
    return bool(answer.json()["active"])


async def test_a_narrowed_ceiling_cuts_nothing_that_still_fits(shared: IssuerBench) -> None:
    """Its fence is for what is being issued alone."""
    desk = shared
    _, fits = await desk.issued("read")
    beyond, _ = await desk.issued(scope=desk.scope("read", resource="env/production/web"))
    narrower = desk.scope("read", resource="env/staging/*")
    claims = desk.world.claims(AgentSetCeiling, desk.sam, agent_id=desk.bot.name, ceiling=narrower)
    await desk.world.accepted(claims, desk.sam)
    await desk.lease(beyond.lease_id, "revoked")
    assert fits.credential is not None
    assert await introspected(desk, fits.credential.value)


# --- leases are deleted from their topic long after their end ---------------------------------------------------------


async def test_a_lease_is_deleted_from_its_topic_long_after_its_end_and_no_other(world: World) -> None:
    own = RevokerSettings(forget_after_s=1, forget_every_s=0.3)
    async with opened_desks(world) as first, world.running("issuer", "revoker", own={"revoker": own}):
        desk = await another(first)
        over, _ = await desk.issued("read")
        lives, _ = await desk.issued("read")
        claims, _ = await desk.revoke(desk.bot, "release", lease_id=over.lease_id)
        await desk.verdict(claims)
        end = await world.consume_until(
            LEASE, lambda r: r.key == over.lease_id and world.opened(r, Lease, "revoker").status == "released"
        )
        deleted = await world.consume_until(LEASE, lambda r: r.key == over.lease_id and not r.value)
        assert deleted.appended_at_ms >= end.appended_at_ms + 1000
        assert deleted.offset > end.offset
        assert deleted.partition == end.partition
        assert [r.value for r in await world.records(LEASE) if r.key == lives.lease_id and not r.value] == []
