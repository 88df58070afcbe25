"""Keys are told of before they end, once, by a registry on a real broker."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from ringfence.kernel.crypto.jws import parse
from ringfence.messages.base import ServiceRole
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import AgentRotateKey
from ringfence.messages.topics import SERVICE_EVENT
from ringfence.registry.settings import RegistrySettings
from tests.support.world import DAY_S, Party, World

OFTEN: dict[ServiceRole, Any] = {"registry": RegistrySettings(key_check_s=0.05)}


async def told(world: World) -> list[ServiceEvent]:
    """All that was said of the ends of keys up to now."""
    events = [world.event(record) for record in await world.records(SERVICE_EVENT)]
    return list(filter(is_of_an_end, events))


def is_of_an_end(event: ServiceEvent) -> bool:
    return event.subject == "key" and event.reasons[0].code == "key_ending"


async def told_of(world: World, who: Party) -> ServiceEvent:
    return await world.event_where(lambda e: is_of_an_end(e) and e.ref == who.key.kid)


async def looked(world: World, sam: Party) -> set[str]:
    """Return once all keys have been looked at: those of two agents, one after the other, were found. Their keys."""
    found = set()
    for name in (f"x{uuid.uuid4().hex[:8]}" for _ in range(2)):
        agent = world.party("agent", name)
        await world.agent(name, sam, keys=(agent.key_record(1),))
        await told_of(world, agent)
        found.add(agent.key.kid)
    return found


async def test_a_key_that_ends_is_told_of_once_and_the_sponsor_is_named(world: World) -> None:
    async with world.running("registry", own=OFTEN):
        sam = await world.user("sam", roles=("sponsor",))
        bot, other = world.party("agent", "bot"), world.party("agent", "other")
        for agent, days in ((bot, 2), (other, 400)):
            await world.agent(agent.name, sam, keys=(agent.key_record(days),))
        event = await told_of(world, bot)
        assert (event.agent_id, event.sponsor, event.result) == ("bot", "sam", bot.id)
        assert event.reasons[0].code == "key_ending"
        assert "rotate-key bot" in event.reasons[0].message
        uma = world.party("user", "uma")
        await world.accepted(world.user_set(world.operator, uma, keys=(uma.key_record(10),)), world.operator)
        assert (await told_of(world, uma)).result == uma.id
    async with world.running("registry", own=OFTEN):
        later = await looked(world, sam)
    found = [(event.ref, event.at_ms) for event in await told(world)]
    assert len(found) == len(set(found))
    assert {kid for kid, _ in found} == {bot.key.kid, uma.key.kid, *later}


async def test_a_key_that_was_replaced_is_not_told_of(world: World) -> None:
    async with world.running("registry"):  # it looks once, before there is anything
        sam = await world.user("sam", roles=("sponsor",))
        old, new = world.party("agent", "bot"), world.party("agent", "bot")
        await world.agent("bot", sam, keys=(old.key_record(2),))
        rotation = world.claims(
            AgentRotateKey, sam, agent_id="bot", key=new.key_record(), overlap_s=7 * DAY_S
        )
        await world.accepted(rotation, sam)
    async with world.running("registry", own=OFTEN):
        later = await looked(world, sam)
    assert {event.ref for event in await told(world)} == later


async def test_repeated_key_warning_has_the_same_text(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that does not know what was told long ago says it once more, word for word."""
    async with world.running("registry", own=OFTEN):
        sam = await world.user("sam", roles=("sponsor",))
        bot = world.party("agent", "bot")
        await world.agent("bot", sam, keys=(bot.key_record(2),))
        await told_of(world, bot)
    monkeypatch.setattr(
        "ringfence.registry.key_expiry_warnings.KeyWarnings.remember", lambda self, event: None
    )
    async with world.running("registry", own=OFTEN):
        await looked(world, sam)
    texts = [
        record.value
        for record in await world.records(SERVICE_EVENT)
        if parse(record.value).unverified_claims(ServiceEvent).ref == bot.key.kid
    ]
    assert len(texts) == 2
    assert len(set(texts)) == 1
