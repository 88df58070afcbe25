"""Approvals given ahead: what they answer, and what they never do; taken back or used up they count no more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import Grant, GrantWithdraw
from ringfence.messages.credential import CredentialDecision, Revisions
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import AgentResume, AgentSetCeiling, AgentSuspend
from ringfence.messages.topics import APPROVAL_REQUEST, APPROVAL_RESPONSE, CREDENTIAL_DECISION
from tests.support.benches.policy_bench import (
    DEPLOY,
    EVERYTHING,
    READ,
    Asked,
    HeldUp,
    PolicyBench,
    codes,
)
from tests.support.world import Party, World, scope

STAGING = scope("platform", ["read", "deploy"], ["env/staging/**"])


class Grants:
    """The office, in which sam approves ahead."""

    def __init__(self, office: PolicyBench) -> None:
        self.office = office
        self.world = office.world
        self.revisions: Revisions

    async def learn(self) -> None:
        """The revisions as they are, from a request that waits."""
        asked = await self.office.ask(DEPLOY)
        self.revisions = (await self.office.question(asked, self.office.sam)).revisions

    def grant(self, by: Party | None = None, **fields: Any) -> Grant:
        given = {
            "agent_id": self.office.bot.name,
            "task_id": self.office.task,
            "scope": STAGING,
            "count": 3,
            "ttl_s": 600,
            "delivery": "agent",
            "revisions": self.revisions,
        }
        return self.world.claims(Grant, by or self.office.sam, **{**given, **fields})

    async def give(self, by: Party | None = None, **fields: Any) -> tuple[Grant, ServiceEvent]:
        """A grant that was sent, and what policy said to it."""
        claims = self.grant(by, **fields)
        compact = sign(claims, (by or self.office.sam).key)
        await self.office.send(APPROVAL_RESPONSE, compact)
        return claims, await self.said(claims)

    async def given(self, by: Party | None = None, **fields: Any) -> Grant:
        claims, event = await self.give(by, **fields)
        assert event.kind == "accepted", event.reasons
        assert event.result == message_id(claims.iss, claims.jti)
        return claims

    async def refused(self, by: Party | None = None, **fields: Any) -> str:
        _, event = await self.give(by, **fields)
        assert event.kind == "refused"
        return event.reasons[0].code

    async def withdraw(self, grant: Grant, by: Party) -> ServiceEvent:
        claims = self.world.claims(
            GrantWithdraw, by, grant_id=message_id(grant.iss, grant.jti), reason="the release is off"
        )
        await self.office.send(APPROVAL_RESPONSE, sign(claims, by.key))
        return await self.said(claims)

    async def said(self, claims: Grant | GrantWithdraw) -> ServiceEvent:
        return await self.world.event_where(
            lambda e: e.ref == claims.jti and e.actor == claims.iss and e.subject == claims.typ
        )

    async def granted(self, wanted: Any = DEPLOY, **fields: Any) -> CredentialDecision:
        """A decision that is final without anybody being asked."""
        asked = await self.office.ask(wanted, **fields)
        decision = await self.office.decision(asked)
        assert decision.outcome == "allowed", decision.reasons
        assert decision.grants
        assert decision.approvals == ()
        return decision

    async def asks(self, wanted: Any = DEPLOY, **fields: Any) -> Asked:
        """A request for which somebody is asked in spite of all grants."""
        asked = await self.office.ask(wanted, **fields)
        assert (await self.office.decision(asked)).outcome == "approval_required"
        return asked


@pytest.fixture
async def grants(world: World) -> AsyncIterator[Grants]:
    async with world.running("registry", "policy"):
        found = Grants(await PolicyBench.open(world))
        await found.learn()
        yield found


async def test_request_within_a_grant_is_allowed_until_the_grant_is_used_up(grants: Grants) -> None:
    waiting = await grants.asks()
    grant = await grants.given(count=4)
    compact = sign(grant, grants.office.sam.key)
    # Both that waited for the same, and two more.
    first = await grants.office.final(waiting)
    assert (first.outcome, first.grants, first.required) == ("allowed", (compact,), ("sponsor",))
    assert first.input is not None
    assert first.input["approvals"] == [{"user_id": "sam", "roles": ["sponsor"]}]
    used = await grants.granted(ttl_s=600)
    path = f"/v1/decisions/{used.request_id}/explanation"
    explained = (await grants.world.get("policy", path, grants.office.sam)).json()
    assert explained["grants"] == [{"grant_id": message_id(grant.iss, grant.jti), "by": "sam"}]
    await grants.granted(scope("platform", ["deploy"], ["env/staging/web", "env/staging/api"]))
    asked = await grants.asks()
    assert (await grants.office.question(asked, grants.office.sam)).request == asked.jws


async def test_a_restarted_policy_knows_grants_and_how_often_they_were_used(world: World) -> None:
    async with world.running("registry"):
        async with world.running("policy"):
            grants = Grants(await PolicyBench.open(world))
            await grants.learn()
            await grants.given(count=3)  # one goes to what waited
            await grants.granted()
            kept = await grants.given(count=5, scope=scope("platform", ["deploy"], ["env/test/*"]))
        async with world.running("policy"):
            decision = await grants.granted(scope("platform", ["deploy"], ["env/test/web"]))
            assert decision.grants == (sign(kept, grants.office.sam.key),)
            await grants.granted()
            await grants.asks()


async def test_request_beyond_a_grant_asks_for_approval(grants: Grants) -> None:
    await grants.given(count=1)  # for what waited
    await grants.given(scope=scope("platform", ["deploy"], ["env/staging/*"]))
    await grants.asks(scope("platform", ["deploy"], ["env/test/web"]))
    await grants.asks(scope("platform", ["deploy"], ["env/staging/web/1"]))
    await grants.asks(ttl_s=601)
    await grants.asks(scope("platform", ["drop"], ["env/staging/web"]))
    other = await grants.world.task(grants.office.bot, by=grants.office.maria, scope=EVERYTHING)
    await grants.asks(task_id=other)
    await grants.granted()


async def test_a_grant_reaches_only_as_far_as_its_signer_may_approve(grants: Grants) -> None:
    everything: dict[str, Any] = {"scope": EVERYTHING, "count": 10}
    await grants.given(**everything)
    await grants.asks(scope("platform", ["drop"], ["env/staging/web"]))  # wants a second person
    wipe = scope("platform", ["wipe"], ["env/production/web"])  # wants the sponsor and an operator
    asked = await grants.asks(wipe)
    await grants.office.approve(
        await grants.office.question(asked, grants.world.operator), grants.world.operator
    )
    decision = await grants.office.final(asked)
    assert (decision.outcome, len(decision.approvals), len(decision.grants or ())) == ("allowed", 1, 1)
    # Nobody counts twice: neither by two grants, nor by a grant and an approval.
    await grants.given(**everything)
    asked = await grants.asks(wipe)
    await grants.office.approve(await grants.office.question(asked, grants.office.sam), grants.office.sam)
    record = await grants.world.consume_until(
        CREDENTIAL_DECISION,
        lambda r: grants.office.opened(r).request_id == asked.id and bool(grants.office.opened(r).approvals),
    )
    assert grants.office.opened(record).outcome == "approval_required"
    # Two people, each ahead: nobody is asked any more.
    await grants.given(grants.world.operator, **everything)
    assert (await grants.office.final(asked)).outcome == "allowed"
    assert len((await grants.granted(wipe)).grants or ()) == 2


async def test_a_grant_opens_nothing_that_the_rule_denies(grants: Grants) -> None:
    await grants.given(scope=scope("platform", ["deploy", "read"], ["**"]))
    beyond = await grants.office.final(await grants.office.ask(scope("platform", ["deploy"], ["elsewhere"])))
    assert "beyond_scope" in codes(beyond)
    assert beyond.grants is None


async def test_a_grant_given_again_counts_for_nothing_more(grants: Grants) -> None:
    grant = await grants.given(count=2)  # one goes to what waited
    again = await grants.office.send(APPROVAL_RESPONSE, sign(grant, grants.office.sam.key))
    event = await grants.world.event_where(lambda e: e.kind == "replayed" and e.source == again)
    assert event.reasons[0].code == "grant_replayed"
    await grants.granted()
    await grants.asks()


async def test_change_of_agent_records_makes_a_grant_stale_for_good(grants: Grants) -> None:
    office, world = grants.office, grants.world
    await grants.given()
    await grants.granted()
    suspend = world.claims(AgentSuspend, office.sam, agent_id="deploy-bot", reason="odd")
    await world.accepted(suspend, office.sam)
    await office.records_read()
    assert "agent_suspended" in codes(await office.final(await office.ask(DEPLOY)))
    await world.accepted(
        world.claims(AgentResume, office.sam, agent_id="deploy-bot", reason="explained"), office.sam
    )
    await office.records_read()
    await grants.asks()
    await grants.learn()
    await grants.given(count=9)
    await grants.granted()
    wider = world.claims(AgentSetCeiling, office.sam, agent_id="deploy-bot", ceiling=EVERYTHING + READ)
    await world.accepted(wider, office.sam)
    await office.records_read()
    await grants.asks()


async def test_a_former_sponsors_grant_is_nothing_to_the_new_one(grants: Grants) -> None:
    office, world = grants.office, grants.world
    await grants.given()
    await world.transfer("deploy-bot", "petra")
    await office.records_read()
    asked = await grants.asks()
    assert (await office.question(asked, office.petra)).request == asked.jws


async def test_grant_is_withdrawn_at_once_by_its_people_only(grants: Grants) -> None:
    office = grants.office
    for by in (office.sam, office.maria):
        grant = await grants.given()
        await grants.granted()
        for stranger in (office.petra, grants.world.operator, office.bot):
            event = await grants.withdraw(grant, stranger)
            assert (event.kind, event.reasons[0].code) == ("refused", "not_concerned")
        await grants.granted()
        event = await grants.withdraw(grant, by)
        assert (event.kind, event.result) == ("accepted", message_id(grant.iss, grant.jti))
        await grants.asks()
    unknown = grants.grant()
    event = await grants.withdraw(unknown, office.sam)
    assert (event.kind, event.reasons[0].code) == ("refused", "grant_unknown")


async def test_new_sponsor_withdraws_a_grant_at_once(grants: Grants) -> None:
    office, world = grants.office, grants.world
    grant = await grants.given()
    reading = HeldUp(world)
    await world.transfer("deploy-bot", "petra")
    event = await grants.withdraw(grant, office.petra)
    assert (event.kind, event.result) == ("accepted", message_id(grant.iss, grant.jti))
    assert reading.asked_for


async def test_a_withdrawal_outlives_a_restart(world: World) -> None:
    async with world.running("registry"):
        async with world.running("policy"):
            grants = Grants(await PolicyBench.open(world))
            await grants.learn()
            await grants.withdraw(await grants.given(), grants.office.sam)
        async with world.running("policy"):
            await grants.asks()


async def test_request_within_a_grant_asks_no_approver(grants: Grants) -> None:
    await grants.given()
    asked = await grants.office.ask(DEPLOY)
    await grants.office.final(asked)
    later = await grants.asks(scope("platform", ["drop"], ["env/staging/web"]))
    await grants.office.question(later, grants.office.petra)

    def about(record: Received) -> bool:
        return asked.id.encode() in record.value

    assert not [r for r in await grants.world.records(APPROVAL_REQUEST) if about(r)]
    assert (await grants.granted(READ + DEPLOY)).required == ("sponsor",)
