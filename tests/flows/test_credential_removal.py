"""Credentials at a real target are removed: by kill switches at every moment, after crashes, and by the sweep."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from ringfence.backends import RedisBackend
from ringfence.kernel.base.ids import derived_id
from ringfence.messages.lease import Selector
from ringfence.messages.registry import (
    AgentDecommission,
    AgentSetCeiling,
    AgentSuspend,
    TargetRecord,
    TaskEnd,
    UserDisable,
)
from ringfence.messages.topics import SERVICE_EVENT
from ringfence.model.lease_store import LeaseStore
from ringfence.revoker.lease_end.credential_removal import CredentialRemover
from tests.support.benches import target_yard
from tests.support.benches.issuer_bench import Asked, IssuerBench
from tests.support.benches.target_yard import (
    Crash,
    Yard,
    at,
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
from tests.support.world import Party, scope
from tools.schemas.examples import EXAMPLES

yard, desk, open_gates = target_yard.yard, target_yard.desk, target_yard.open_gates

# --- the kill switch, at every moment ---------------------------------------------------------------------------------


SWITCHES: dict[str, Callable[[IssuerBench, Asked], Awaitable[Any]]] = {
    "its lease": lambda desk, asked: revoked(desk, lease_id=asked.lease_id),
    "its task": lambda desk, _: revoked(desk, selector=Selector(task_id=desk.task)),
    "its agent": lambda desk, _: revoked(desk, selector=Selector(agent_id=desk.bot.name)),
    "its sponsor": lambda desk, _: revoked(desk, selector=Selector(sponsor="sam")),
    "its user": lambda desk, _: revoked(
        desk, desk.world.operator, selector=Selector(user_id=desk.maria.name)
    ),
    "its target": lambda desk, _: revoked(desk, desk.world.operator, selector=Selector(target_id="cache")),
    "everything": lambda desk, _: revoked(desk, desk.world.operator, selector=Selector(all=True)),
    "agent suspended": lambda desk, _: command(desk, AgentSuspend, agent_id=desk.bot.name, reason="odd"),
    "agent decommissioned": lambda desk, _: command(
        desk, AgentDecommission, agent_id=desk.bot.name, reason="odd"
    ),
    "task ended": lambda desk, _: command(desk, TaskEnd, task_id=desk.task, reason="done"),
    "user disabled": lambda desk, _: command(
        desk, UserDisable, desk.world.operator, user_id=desk.maria.name, reason="left"
    ),
    "ceiling narrowed": lambda desk, _: command(
        desk, AgentSetCeiling, agent_id=desk.bot.name, ceiling=desk.scope("read", resource="elsewhere/**")
    ),
    "entitlements narrowed": lambda desk, _: desk.world.accepted(
        desk.world.user_set(
            desk.world.operator, desk.maria, entitlements=desk.scope("read", resource="elsewhere/**")
        ),
        desk.world.operator,
    ),
}


async def command(desk: IssuerBench, model: Any, by: Party | None = None, **fields: Any) -> None:
    by = by or desk.sam
    await desk.world.accepted(desk.world.claims(model, by, **fields), by)


@pytest.mark.parametrize("switch", SWITCHES)
async def test_credential_revoked_while_minting_is_not_delivered_and_removed(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    async with held_mint(monkeypatch, desk, asked):
        await SWITCHES[switch](desk, asked)
        life = await ended(desk, asked)
    refusal = desk.refusal(await desk.answer(asked))
    assert refusal.reasons[0].code in ("fenced", "mint_too_slow", "lease_ended")
    assert statuses(life) == ["minting", "aborted"]
    cause = life[-1].cause
    assert cause is not None
    assert cause.kind != "mint_failed"
    assert cause.ref is not None
    await gone(yard, asked)


@pytest.mark.parametrize("switch", SWITCHES)
async def test_revoked_credential_is_removed_from_its_target(
    desk: IssuerBench, yard: Yard, switch: str
) -> None:
    asked, content = await desk.issued(scope=desk.scope("read"))
    await SWITCHES[switch](desk, asked)
    life = await ended(desk, asked)
    assert statuses(life) == ["minting", "active", "ending", "revoked"]
    assert not await works(url(content))
    await gone(yard, asked)


async def test_an_order_that_was_accepted_holds_though_the_revoker_died_then(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    try_it, dropped = CredentialRemover._try, list[str]()

    async def dying(self: CredentialRemover, request: Any) -> None:
        if request.lease.lease_id != asked.lease_id or dropped:
            await try_it(self, request)
        else:  # what was in its memory is gone with it
            dropped.append(asked.lease_id)
            self._in_progress.discard(asked.lease_id)

    monkeypatch.setattr(CredentialRemover, "_try", dying)
    async with held_mint(monkeypatch, desk, asked):
        assert await revoked(desk, lease_id=asked.lease_id) == "1"
    content = await desk.answer(asked)
    assert content.credential is None
    assert dropped == [asked.lease_id]
    assert statuses(await ended(desk, asked)) == ["minting", "aborted"]
    await gone(yard, asked)


@pytest.mark.parametrize("moment", ["before it is announced", "before it is active"])
async def test_the_fence_holds_at_both_looks_of_the_issuer(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The whole order is followed between two steps of the issuer; no revoker finds the lease before it is refused."""
    step = "prepare" if moment == "before it is announced" else "activate"
    asked = await desk.ask(scope=desk.scope("read"))
    real, fenced = getattr(LeaseStore, step), list[str]()

    async def fencing(self: LeaseStore, leases: Any, **more: Any) -> Any:
        if any(one.claims.lease_id == asked.lease_id for one in leases) and not fenced:
            fenced.append(step)
            await self.fence({f"task:{desk.task}": asked.source.appended_at_ms})
        return await real(self, leases, **more)

    monkeypatch.setattr(LeaseStore, step, fencing)
    await desk.decide(asked)
    refusal = desk.refusal(await desk.answer(asked))
    assert fenced == [step]
    assert [reason.code for reason in refusal.reasons] == ["fenced"]
    await gone(yard, asked)
    if step == "activate":
        assert statuses(await ended(desk, asked)) == ["minting", "aborted"]


async def test_decision_before_a_revocation_is_fenced_and_mints_nothing(
    desk: IssuerBench, yard: Yard
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    await revoked(desk, selector=Selector(agent_id=desk.bot.name))
    await desk.decide(asked)
    refusal = await desk.refused(asked)
    assert [reason.code for reason in refusal.reasons] == ["fenced"]
    assert user_of(asked) not in await yard.targets["cache"].users()


async def test_one_selector_ends_live_sessions_at_all_targets(yard: Yard) -> None:
    """All leases on behalf of one user, at two targets, by the operator."""
    world = yard.world
    both = (*scope("cache", ("read",), ("**",)), *scope("queue", ("read",), ("**",)))
    user = await world.user(f"u-{uuid.uuid4().hex[:8]}", entitlements=both)
    people = {"sam": yard.desk.sam, "maria": user, "sue": yard.desk.sue}
    desks = [
        await IssuerBench(world, people, world.party("target", id)).staff(ceiling=both, task_scope=both)
        for id in yard.targets
    ]
    leases = [(desk, *await desk.issued(scope=desk.scope("read"))) for desk in desks for _ in range(3)]
    claims, _ = await desks[0].revoke(world.operator, selector=Selector(user_id=user.name))
    assert (await desks[0].verdict(claims)).result == "6"
    for desk, asked, content in leases:
        assert statuses(await ended(desk, asked)) == ["minting", "active", "ending", "revoked"]
        assert not await works(url(content))


# --- undoing, for ever ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shut", "hanging"])
async def test_a_dead_target_delays_no_other_its_sponsor_is_told_once_and_nothing_is_given_up(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: Any
) -> None:
    other = await at(yard, "queue")
    postpone, postponed = LeaseStore.postpone, set[str]()

    async def noting(self: LeaseStore, delays_ms: dict[str, int]) -> None:
        postponed.update(delays_ms)
        await postpone(self, delays_ms)

    monkeypatch.setattr(LeaseStore, "postpone", noting)
    stuck = [(await desk.issued(scope=desk.scope("read")))[0] for _ in range(12)]
    free = [(await other.issued(scope=other.scope("read")))[0] for _ in range(4)]
    yard.gates["cache"].turn(mode)
    assert (
        await revoked(desk, selector=Selector(agent_id=desk.bot.name)) == "12"
    )  # cut, although nobody is there
    await revoked(other, selector=Selector(agent_id=other.bot.name))
    for asked in free:
        assert statuses(await ended(other, asked))[-1] == "revoked"
        assert asked.lease_id not in postponed

    def told() -> list[Any]:
        found = [desk.world.event(record) for record in seen]
        ids = {asked.lease_id for asked in stuck}
        return [
            e for e in found if e.lease_id in ids and e.reasons and e.reasons[0].code == "revocation_overdue"
        ]

    seen = await desk.world.records(SERVICE_EVENT)
    await desk.world.until(lambda: True if len(told()) >= 12 else None, "twelve notices")
    assert {event.sponsor for event in told()} == {"sam"}
    assert {event.kind for event in told()} == {"finding"}
    listed = await desk.world.get("revoker", "/v1/leases", desk.sam, overdue="1", agent=desk.bot.name)
    assert {lease["id"] for lease in listed.json()["leases"]} == {asked.lease_id for asked in stuck}
    assert all(lease["overdue_s"] >= 0 for lease in listed.json()["leases"])
    shown = await cli(desk, tmp_path, "lease", "list", "--overdue", "--agent", desk.bot.name)
    assert shown.count("overdue for") == len(stuck)
    text = (await desk.world.get("revoker", "/metrics")).text
    (gauge,) = [line for line in text.splitlines() if line.startswith("ringfence_revocations_overdue ")]
    assert float(gauge.split()[1]) >= 12
    for asked in stuck:
        assert statuses(lease.claims for lease in await desk.records(asked.lease_id))[-1] == "ending"

    yard.gates["cache"].turn("open")
    for asked in stuck:
        assert statuses(await ended(desk, asked)) == ["minting", "active", "ending", "revoked"]
    assert not {user_of(asked) for asked in stuck} & await yard.targets["cache"].users()
    assert len(told()) == 12
    listed = await desk.world.get("revoker", "/v1/leases", desk.sam, overdue="1", agent=desk.bot.name)
    assert listed.json()["leases"] == []


async def test_postponed_removals_resume_once_the_target_answers(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    postpone, put_off = LeaseStore.postpone, set[str]()
    putting_off, callers = CredentialRemover._postpone, list[Any]()
    stuck = [(await desk.issued(scope=desk.scope("read")))[0].lease_id for _ in range(12)]

    async def by_whom(self: CredentialRemover, *args: Any) -> None:
        callers.append(self.breaker)
        await putting_off(self, *args)

    async def for_long(self: LeaseStore, delays_ms: dict[str, int]) -> None:
        """All but the first come again only when they are called back, once their target is left alone."""
        if callers[-1].open_for_ms("cache"):
            put_off.update(set(stuck[1:]) & delays_ms.keys())
        later = {id: 3_600_000 for id, ms in delays_ms.items() if ms and id in put_off}
        await postpone(self, {**delays_ms, **later})

    monkeypatch.setattr(CredentialRemover, "_postpone", by_whom)
    monkeypatch.setattr(LeaseStore, "postpone", for_long)
    yard.gates["cache"].turn("shut")
    await revoked(desk, selector=Selector(agent_id=desk.bot.name))

    async def all_are_put_off() -> bool:
        return len(put_off) == len(stuck) - 1

    await until(all_are_put_off, "all are put off")
    yard.gates["cache"].turn("open")
    for id in stuck:
        await desk.lease(id, "revoked")


async def cli(desk: IssuerBench, folder: Path, *words: str) -> str:
    """What `ringfence` prints for sam."""
    desk.sam.key.save(folder / "sam.json")
    environment = {
        **os.environ,
        "COLUMNS": "240",
        "RINGFENCE_CONFIG": os.devnull,
        "RINGFENCE_IDENTITY": str(folder / "sam.json"),
        "RINGFENCE_TRUST_DOMAIN": desk.world.td,
        "RINGFENCE_TRUST_ROOT": desk.world.fingerprint,
        "RINGFENCE_REVOKER_URL": f"http://127.0.0.1:{desk.world.ports['revoker']}",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ringfence.cli.main", *words, env=environment, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_an_undo_that_a_dead_revoker_left_is_done_by_another(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, content = await desk.issued(scope=desk.scope("read"))
    undo, lost = RedisBackend.undo, list[str]()

    async def dying(self: RedisBackend, lease_id: str, *, target_id: str) -> None:
        await undo(self, lease_id, target_id=target_id)
        if lease_id == asked.lease_id and not lost:
            lost.append(lease_id)
            raise Crash("after the undo, before it is written down")

    monkeypatch.setattr(RedisBackend, "undo", dying)
    await revoked(desk, lease_id=asked.lease_id)
    assert statuses(await ended(desk, asked)) == ["minting", "active", "ending", "revoked"]
    assert lost == [asked.lease_id]
    assert not await works(url(content))


# --- sweeping ---------------------------------------------------------------------------------------------------------


async def test_credential_without_a_lease_is_removed_from_the_target(desk: IssuerBench, yard: Yard) -> None:
    asked, content = await desk.issued(scope=desk.scope("read"))
    over, _ = await desk.issued(scope=desk.scope("read"))
    await revoked(desk, lease_id=over.lease_id)
    await ended(desk, over)
    backend = yard.targets["cache"].backend()
    lease = await desk.lease(asked.lease_id, "active")
    orphan = lease.model_copy(update={"lease_id": derived_id("orphan", uuid.uuid4().hex)})
    late = lease.model_copy(update={"lease_id": over.lease_id})
    state = cast(TargetRecord, EXAMPLES[TargetRecord]).state.model_copy(update={"target_id": "cache"})
    for one in (orphan, late):  # by an issuer that died before anything else, and by one that woke late
        await backend.mint(one, state)
    await backend.close()

    async def swept() -> bool:
        users = await yard.targets["cache"].users()
        return not {backend.user_of(orphan.lease_id), backend.user_of(late.lease_id)} & users

    await until(swept, "the orphans are gone")
    event = await desk.world.event_where(
        lambda e: e.lease_id == orphan.lease_id and e.reasons and e.reasons[0].code == "orphan_undone"
    )
    assert event.kind == "finding"
    assert await works(url(content))
    assert user_of(asked) in await yard.targets["cache"].users()
