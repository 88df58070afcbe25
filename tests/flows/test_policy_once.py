"""Each request is decided once, and only once: replays, crashes, lost acknowledgements, replicas that come and go."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

from aiokafka.errors import KafkaTimeoutError

from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import sign
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.topics import (
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    SERVICE_EVENT,
)
from ringfence.policy.settings import PolicySettings
from tests.support.benches.policy_bench import (
    DEPLOY,
    EVERYTHING,
    READ,
    PolicyBench,
    claims_of,
    ids_of,
    rewind,
)
from tests.support.world import World, scope


async def test_a_replay_elsewhere_changes_nothing_and_is_told(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(READ)
        await office.final(asked)
        replayed = await office.send(CREDENTIAL_REQUEST, asked.jws)
        event = await world.event_where(lambda e: e.kind == "replayed" and e.request_id == asked.id)
        assert event.source is not None
        assert (event.source.partition, event.source.offset) == (replayed.partition, replayed.offset)
        assert (event.agent_id, event.actor) == ("deploy-bot", office.bot.id)
        # Also the one that a restarted policy finds out about from its own decisions alone.
    async with world.running("registry", "policy"):
        replayed = await office.send(CREDENTIAL_REQUEST, asked.jws)
        await world.event_where(lambda e: e.kind == "replayed" and e.source == replayed)
        assert await office.outcomes(asked) == {"allowed": 1}


async def test_redelivery_after_a_crash_completes_without_a_second_decision(world: World):
    async with world.running("registry"):
        async with world.running("policy"):
            office = await PolicyBench.open(world)
            allowed, waiting = await office.ask(READ), await office.ask(DEPLOY)
            denied = await office.ask(scope("platform", ["read"], ["elsewhere"]))
            approved = await office.ask(DEPLOY)
            approval = await office.approve(await office.question(approved, office.sam), office.sam)
            for request in (allowed, denied, approved):
                await office.final(request)
            await office.reply(waiting, "approval_required")
            await office.reply(denied, "denied")
        before = await ids_of(world, CREDENTIAL_DECISION)
        replies, questions = await ids_of(world, CREDENTIAL_REPLY), await ids_of(world, APPROVAL_REQUEST)

        # As if it had died before it could commit anything.
        await rewind(world, "policy", CREDENTIAL_REQUEST, APPROVAL_RESPONSE)
        async with world.running("policy"):
            last = await office.ask(scope("platform", ["read"], ["elsewhere"]))
            await office.reply(last, "denied")
            stranger = await office.approve(await office.question(waiting, office.sam), office.petra)
            assert (
                await office.refused(stranger) == "not_approver"
            )  # the approval before it was handled again too
            new = (await office.final(last)).jti
            assert await ids_of(world, CREDENTIAL_DECISION) == before + Counter([new])
            # The same replies and questions once more, and nothing else but what answers the last request.
            again = await ids_of(world, CREDENTIAL_REPLY)
            assert len(again.keys() - replies.keys()) == 1
            assert {id for id in replies if again[id] > replies[id]}
            assert (await ids_of(world, APPROVAL_REQUEST)).keys() == questions.keys()
            events = [world.event(record) for record in await world.records(SERVICE_EVENT)]
            assert not [
                e for e in events if e.kind in ("replayed", "refused") and e.ref == claims_of(approval)["jti"]
            ]
            assert not [e for e in events if e.kind == "replayed"]


async def test_a_decision_whose_acknowledgement_was_lost_is_not_made_again(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        await office.final(await office.ask(READ))
        publisher = world.runtimes["policy"].publisher
        send, lost = publisher.send, 0

        async def send_and_forget(topic: Any, *args: Any, **fields: Any) -> Any:
            nonlocal lost
            acknowledged = await send(topic, *args, **fields)
            if topic is CREDENTIAL_DECISION and lost < 2:
                lost += 1
                await acknowledged
                raise KafkaTimeoutError("the broker has it, and nobody here knows")
            return acknowledged

        publisher.send = send_and_forget  # type: ignore[method-assign]
        asked = await office.ask(READ)
        assert await office.outcomes(asked) == {"allowed": 1}
        assert lost


async def test_replicas_come_and_go_and_each_request_is_answered_once(world: World):
    own: dict[ServiceRole, Any] = {"policy": PolicySettings(approval_timeout_s=5)}
    async with world.running("registry"):
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            await first.enter_async_context(world.running("policy", own=own))
            office = await PolicyBench.open(world)
            bots = [await world.agent(f"bot-{n}", sponsor=office.sam, ceiling=EVERYTHING) for n in range(6)]
            tasks = [await world.task(bot, by=office.maria, scope=EVERYTHING) for bot in bots]
            sent: list[CredentialRequest] = []

            async def send_more() -> None:
                for bot, task in zip(bots, tasks, strict=True):
                    for wanted in (READ, DEPLOY, scope("platform", ["read"], ["elsewhere"])):
                        claims, _ = office.request(wanted, by=bot, task_id=task)
                        sent.append(claims)
                        await office.send(CREDENTIAL_REQUEST, sign(claims, bot.key), key=bot.name)

            await send_more()
            async with asyncio.TaskGroup() as group:
                group.create_task(second.enter_async_context(world.running("policy", own=own)))
                group.create_task(send_more())
            await send_more()
            await first.aclose()
            await send_more()
            for claims in sent:
                await office.final(message_id(claims.iss, claims.jti))
        finals: dict[str, set[str]] = {}
        for decision in map(office.opened, await world.records(CREDENTIAL_DECISION)):
            if decision.outcome != "approval_required":
                finals.setdefault(decision.request_id, set()).add(f"{decision.outcome} {decision.jti}")
        assert {id: len(found) for id, found in finals.items()} == dict.fromkeys(finals, 1)
        assert len(finals) == len(sent)
