"""A request that its agent withdraws ends undecided: who may withdraw, what it changes, and what it cannot."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable
from typing import Any

import pytest
from aiokafka.errors import KafkaTimeoutError

from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.errors import StaleApprovalError
from ringfence.kernel.crypto.jws import sign, sign_payload
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import Coordinates, CredentialDecision, RequestWithdraw
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.topics import (
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
    Asked,
    PolicyBench,
    claims_of,
    codes,
    ids_of,
    rewind,
)
from tests.support.benches.sdk_clients import client, first
from tests.support.world import Party, World, scope

WIPE = scope("platform", ["wipe"], ["env/production/web"])


def withdrawal(office: PolicyBench, asked: Asked | str, by: Party | None = None, **fields: Any) -> str:
    by, id = by or office.bot, asked if isinstance(asked, str) else asked.id
    return sign(office.world.claims(RequestWithdraw, by, **{"request_id": id, **fields}), by.key)


async def withdraw(office: PolicyBench, asked: Asked | str, **fields: Any) -> str:
    jws = withdrawal(office, asked, **fields)
    await office.send(CREDENTIAL_REQUEST, jws)
    return jws


async def refusal(office: PolicyBench, jws: str, at: Coordinates | None = None) -> ServiceEvent:
    """What policy said of a withdrawal that changes nothing, or of one of its copies."""
    jti = claims_of(jws)["jti"]

    def fits(event: ServiceEvent) -> bool:
        return event.ref == jti and at in (None, event.source)

    event = await office.world.event_where(fits)
    assert (event.subject, event.actor) == ("request.withdraw", claims_of(jws)["iss"])
    return event


async def refused(office: PolicyBench, jws: str, at: Coordinates | None = None) -> str:
    event = await refusal(office, jws, at)
    assert event.kind == "refused"
    return event.reasons[0].code


async def withdrawn(office: PolicyBench, asked: Asked) -> CredentialDecision:
    decision = await office.final(asked)
    assert (decision.outcome, codes(decision)) == ("denied", {"withdrawn"})
    return decision


# --- before, between and after the answers of people ---


async def test_a_withdrawn_request_is_denied_and_on_nobodys_list_any_more(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        async with Sponsor.connect(office.sam.key, client(world)) as sam:
            pending = await first(sam)
            assert [one.request_id for one in sam.pending()] == [asked.id]
            await withdraw(office, asked)
            decision = await withdrawn(office, asked)
            assert (decision.approvals, decision.required) == ((), ("sponsor",))
            assert "deploy-bot withdrew the request" in decision.reasons[0].message
            await world.until(lambda: not sam.pending(everyone=True) or None, "an empty list")
            with pytest.raises(StaleApprovalError):
                await sam.approve(pending)
        reply = await office.reply(asked, "denied")
        assert {reason["code"] for reason in claims_of(reply.decision)["reasons"]} == {"withdrawn"}
        shown = await world.get("policy", "/v1/approvals", world.operator)
        assert shown.json() == {"approvals": []}
        late = await office.approve(question, office.sam)
        assert await office.refused(late) == "already_decided"
        assert await office.outcomes(asked) == {"approval_required": 1, "denied": 1}


async def test_one_approval_of_two_does_not_keep_a_withdrawn_request(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(WIPE)
        given = await office.approve(await office.question(asked, office.sam), office.sam)
        await world.consume_until(CREDENTIAL_DECISION, lambda r: office.opened(r).approvals == (given,))
        await withdraw(office, asked)
        assert (await withdrawn(office, asked)).approvals == (given,)
        second = await office.approve(await office.question(asked, world.operator), world.operator)
        assert await office.refused(second) == "already_decided"


async def test_a_final_decision_stands(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        at_once, approved, denied = await office.ask(READ), await office.ask(DEPLOY), await office.ask(DEPLOY)
        await office.approve(await office.question(approved, office.sam), office.sam)
        await office.approve(await office.question(denied, office.sam), office.sam, verdict="denied")
        for asked, outcome in ((at_once, "allowed"), (approved, "allowed"), (denied, "denied")):
            assert (await office.final(asked)).outcome == outcome
            assert await refused(office, await withdraw(office, asked)) == "already_decided"
            assert (await office.outcomes(asked))[outcome] == 1
        assert codes(await office.final(denied)) == {"approval_denied"}


async def test_withdrawals_and_approvals_at_once_come_to_one_final_decision_each(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = [await office.ask(DEPLOY) for _ in range(12)]
        questions = [await office.question(one, office.sam) for one in asked]
        both = [
            (
                CREDENTIAL_REQUEST,
                withdrawal(office, one),
                APPROVAL_RESPONSE,
                office.approval(question, office.sam),
            )
            for one, question in zip(asked, questions, strict=True)
        ]
        sending = list[Awaitable[Coordinates]]()
        for number, (topic, given_up, other, approval) in enumerate(both):
            pair = [office.send(topic, given_up), office.send(other, approval)]
            sending += pair if number % 2 else reversed(pair)
        await asyncio.gather(*sending)
        for one in asked:
            final = await office.final(one)
            outcomes = await office.outcomes(one)
            assert outcomes == {"approval_required": 1, final.outcome: 1}
            if final.outcome == "denied":
                assert codes(final) == {"withdrawn"}


# --- who may not, and what counts for nothing ---


async def test_an_agent_withdraws_its_own_requests_and_no_others(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        other = await world.agent("other-bot", sponsor=office.sam, ceiling=EVERYTHING)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)

        # Under its own key, and under that of the agent whose request it is.
        for key in (other.name, office.bot.name):
            theirs = withdrawal(office, asked, other)
            await office.send(CREDENTIAL_REQUEST, theirs, key=key)
            assert await refused(office, theirs) == "not_requester"
        nobodys = await withdraw(office, str(uuid.uuid4()))
        assert await refused(office, nobodys) == "request_unknown"
        by_sam = withdrawal(office, asked, office.sam)
        letter = await office.letter(await office.send(CREDENTIAL_REQUEST, by_sam))
        assert letter.code == "key_unknown"
        event = await refusal(office, nobodys)
        assert (event.agent_id, event.request_id) == ("deploy-bot", claims_of(nobodys)["request_id"])

        await office.approve(question, office.sam)
        assert (await office.final(asked)).outcome == "allowed"


async def test_a_withdrawal_elsewhere_or_too_late_ends_nothing(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        astray = withdrawal(office, asked)
        at = await world.send(CREDENTIAL_REQUEST, "other-bot", astray, partition=asked.sent.partition)
        assert await refused(office, astray, at) == "key_unexpected"
        elsewhere = withdrawal(office, asked)
        await world.send(CREDENTIAL_REQUEST, office.bot.name, elsewhere, partition=1 - asked.sent.partition)
        assert await refused(office, elsewhere) == "partition_unexpected"
        old = question.iat - 100
        assert await refused(office, await withdraw(office, asked, iat=old, exp=old + 10)) == "expired"
        assert await office.outcomes(asked) == {"approval_required": 1}


async def test_a_malformed_withdrawal_is_dead_lettered(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(DEPLOY)
        await office.question(asked, office.sam)
        claims = world.claims(RequestWithdraw, office.bot, request_id=asked.id)
        without = claims.model_dump_json(exclude={"request_id"}, exclude_none=True).encode()
        head, body, _ = withdrawal(office, asked).split(".")
        tail = withdrawal(office, asked).split(".")[2]
        impostor = world.party("agent", "deploy-bot")
        for text, code in (
            (sign_payload(RequestWithdraw, without, office.bot.key), "claims_invalid"),
            (f"{head}.{body}.{tail}", "signature_invalid"),
            (withdrawal(office, asked, impostor), "key_unknown"),
        ):
            letter = await office.letter(await office.send(CREDENTIAL_REQUEST, text))
            assert letter.code == code
        assert await office.outcomes(asked) == {"approval_required": 1}


async def test_a_withdrawal_before_its_request_names_nothing_yet(world: World):
    """The producer keeps the order of what an agent sends. Whoever breaks it has withdrawn nothing."""
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        claims, key = office.request(DEPLOY)
        jws = sign(claims, office.bot.key)
        asked = Asked(claims, jws, Coordinates(topic="t", partition=0, offset=0, appended_at_ms=0), key)
        early = await withdraw(office, asked)
        assert await refused(office, early) == "request_unknown"
        await office.send(CREDENTIAL_REQUEST, jws)
        await office.approve(await office.question(asked, office.sam), office.sam)
        assert (await office.final(asked)).outcome == "allowed"


async def test_a_request_and_its_withdrawal_in_one_batch_are_taken_in_order(world: World):
    async with world.running("registry"):
        async with world.running("policy"):
            office = await PolicyBench.open(world)
        asked = [await office.ask(DEPLOY) for _ in range(3)]
        for one in asked:
            await withdraw(office, one)
        async with world.running("policy"):
            for one in asked:
                await withdrawn(office, one)
                assert await office.outcomes(one) == {"approval_required": 1, "denied": 1}


# --- repeats, restarts, limits ---


async def test_a_replayed_withdrawal_is_told_and_changes_nothing(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(DEPLOY)
        await office.question(asked, office.sam)
        jws = await withdraw(office, asked)
        await withdrawn(office, asked)
        again = await office.send(CREDENTIAL_REQUEST, jws)
        event = await refusal(office, jws, again)
        assert (event.kind, event.reasons[0].code, event.request_id) == ("replayed", "replayed", asked.id)
        other = 1 - asked.sent.partition
        elsewhere = await world.send(CREDENTIAL_REQUEST, office.bot.name, jws, partition=other)
        assert await refused(office, jws, elsewhere) == "partition_unexpected"
        second = await withdraw(office, asked)
        assert await refused(office, second) == "already_decided"
        assert await office.outcomes(asked) == {"approval_required": 1, "denied": 1}


async def test_a_restarted_policy_takes_in_what_was_withdrawn_meanwhile_and_finishes_what_comes_again(
    world: World,
):
    async with world.running("registry"):
        async with world.running("policy"):
            office = await PolicyBench.open(world)
            before, meanwhile = await office.ask(DEPLOY), await office.ask(DEPLOY)
            question = await office.question(meanwhile, office.sam)
            jws = await withdraw(office, before)
            await office.reply(before, "denied")
        await withdraw(office, meanwhile)
        async with world.running("policy"):
            await withdrawn(office, meanwhile)
            late = await office.approve(question, office.sam)
            assert await office.refused(late) == "already_decided"
        decisions, replies = await ids_of(world, CREDENTIAL_DECISION), await ids_of(world, CREDENTIAL_REPLY)

        # As if it had died before it could commit anything.
        await rewind(world, "policy", CREDENTIAL_REQUEST, APPROVAL_RESPONSE)
        async with world.running("policy"):
            last = await office.ask(READ)
            new = (await office.final(last)).jti
            assert await refused(office, await withdraw(office, last)) == "already_decided"
            assert await ids_of(world, CREDENTIAL_DECISION) == decisions + Counter([new])
            assert (await ids_of(world, CREDENTIAL_REPLY)).keys() == replies.keys()
            events = [world.event(record) for record in await world.records(SERVICE_EVENT)]
            assert not [event for event in events if event.ref == claims_of(jws)["jti"]]


async def test_a_withdrawal_whose_acknowledgement_was_lost_is_finished_and_decides_once(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(DEPLOY)
        await office.question(asked, office.sam)
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
        jws = await withdraw(office, asked)
        await withdrawn(office, asked)
        await office.reply(asked, "denied")
        assert await office.outcomes(asked) == {"approval_required": 1, "denied": 1}
        assert lost
        events = [world.event(record) for record in await world.records(SERVICE_EVENT)]
        assert not [event for event in events if event.ref == claims_of(jws)["jti"]]


async def test_a_withdrawn_request_waits_no_more_and_counts_as_asked(world: World):
    own: dict[ServiceRole, Any] = {
        "policy": PolicySettings(agent_pending_approvals=1, agent_requests_per_minute=3)
    }
    async with world.running("registry", "policy", own=own):
        office = await PolicyBench.open(world)
        # The limit is by the broker's minute: all four requests come in one.
        await world.until(
            lambda: time.time() % 60 < 45 or None, "a quarter of a minute that is left", within_s=60
        )
        for _ in range(3):
            asked = await office.ask(DEPLOY)
            assert (await office.decision(asked)).outcome == "approval_required"
            await withdraw(office, asked)
            await withdrawn(office, asked)
        assert codes(await office.final(await office.ask(READ))) == {"rate_limited"}
