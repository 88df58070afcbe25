"""Ways to have something issued that nobody approved, tried at policy and, with a policy that lies, at the issuer."""

from __future__ import annotations

import time
import uuid
from typing import Any

import pytest

from ringfence.client.approvals.sponsor import Sponsor
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import sign
from ringfence.messages.approval import ApprovalRequest
from ringfence.messages.topics import APPROVAL_REQUEST, APPROVAL_RESPONSE, CREDENTIAL_DECISION
from ringfence.model.requests.approvals import APPROVAL_SLACK_MS
from tests.support.audit_stories import (
    allowed,
    answer_refused,
    approved,
    asked_for,
    expect_trail,
    refused_by_issuer,
    request_leaves,
    waits,
)
from tests.support.benches.issuer_bench import IssuerBench
from tests.support.benches.policy_bench import DEPLOY, EVERYTHING, PolicyBench, codes
from tests.support.benches.sdk_clients import client
from tests.support.world import DAY_S, Party, World, scope

OTHER_REQUEST = allowed() + refused_by_issuer("approval_other_request")
REPEATED = "3002 Logon: Failure/Denied message.replayed [replayed] by issuer for bot"
PAST = refused_by_issuer("approval_expired", finding=False)
STALE = allowed() + refused_by_issuer("approval_stale", finding=False)
BOT = "deploy-bot"
HELD_BACK = (
    f"3002 Logon: Failure/Denied message.replayed [replayed] by nobody known, signed by sam for {BOT}\n"
    + approved("sam", BOT)
    + answer_refused("approval_replayed", BOT)
    + answer_refused("already_decided", BOT)
)
TWICE = f"""
    {approved("rita", BOT)}
    ~{approved("rita", BOT)}
    ~3003 Decide: Pending/Observed approval.required [policy, floor] by policy for {BOT}
    {answer_refused("approved_already", BOT)}
"""
OTHER_NAME = (
    asked_for(BOT)
    + waits("policy, floor", BOT)
    + f"~3003 Ask for Approval: Requested/Observed approval.requested [policy, floor] by policy for {BOT}"
)
ISSUED = """
    ~3003 Assign Privileges: Success/Allowed credential.issued by issuer for bot
    ~3003 Deliver: Success/Observed reply.sent by nobody known for bot
"""
LACKING = allowed() + refused_by_issuer("approval_lacking")
WIPE = scope("platform", ["wipe"], ["env/production/web"])
"""Wants the sponsor, by the bundle, and an operator, by the floor."""


# --- at the issuer, which believes no policy ---


async def test_an_approval_of_another_request_opens_nothing(desk: IssuerBench) -> None:
    """sam approved the one; policy says that it was the other: the same again, and a wider one."""
    shown = await desk.ask("deploy")
    approval = desk.approval(shown, desk.sam)
    wider = await desk.ask(scope=desk.scope("deploy", resource="env/**"))
    for asked in (await desk.ask("deploy"), wider):
        async with expect_trail(desk.world, OTHER_REQUEST, bot=desk.bot.name):
            await desk.decide(asked, approvals=(approval,), required=("sponsor",))
            assert await desk.refusal_codes(asked) == ["approval_other_request"]
    # Nor where the signature itself names the one and has the digest of the other.
    for fields in (
        {"request": shown.compact, "request_digest": digest(wider.compact)},
        {"request": wider.compact, "request_digest": digest(shown.compact)},
    ):
        asked = await desk.ask("deploy")
        async with expect_trail(desk.world, OTHER_REQUEST, bot=desk.bot.name):
            approval = desk.approval(asked, desk.sam, **fields)
            await desk.decide(asked, approvals=(approval,), required=("sponsor",))
            assert await desk.refusal_codes(asked) == ["approval_other_request"]


async def test_an_approval_opens_its_own_request_once(desk: IssuerBench) -> None:
    asked = await desk.ask("deploy")
    approval = desk.approval(asked, desk.sam)
    await desk.decide(asked, approvals=(approval,), required=("sponsor",))
    assert (await desk.answer(asked)).credential is not None
    async with expect_trail(desk.world, allowed() + REPEATED, bot=desk.bot.name):
        await desk.decide(asked, approvals=(approval,), required=("sponsor",))
        await desk.event("replayed", asked)
    assert len([one for one in await desk.records(asked.lease_id) if one.claims.status == "active"]) == 1


async def test_an_approval_past_its_end_opens_nothing(desk: IssuerBench) -> None:
    now = int(time.time())
    for past_s, opens in ((APPROVAL_SLACK_MS // 1000 + 5, False), (5, True)):
        asked = await desk.ask("deploy")
        approval = desk.approval(asked, desk.sam, iat=now - 600, exp=now - past_s)
        await desk.decide(asked, approvals=(approval,), required=("sponsor",))
        if opens:  # policy took it in while it stood, and said so a little later
            assert (await desk.answer(asked)).credential is not None
        else:
            assert await desk.refusal_codes(asked) == ["approval_expired"]
            await request_leaves(desk.world, asked_for() + allowed() + PAST, asked.id, bot=desk.bot.name)


@pytest.mark.parametrize("verb", ["deploy", "wipe"])
async def test_allowed_by_a_policy_that_asked_nobody(desk: IssuerBench, verb: str) -> None:
    for fields in ({}, {"required": ()}, {"required": ("sponsor",)}):
        asked = await desk.ask(verb)
        async with expect_trail(desk.world, LACKING, bot=desk.bot.name):
            await desk.decide(asked, **fields)
            assert await desk.refusal_codes(asked) == ["approval_lacking"]


async def test_a_sponsor_that_changed_between_approval_and_issue(desk: IssuerBench) -> None:
    asked = await desk.ask("deploy")
    approval = desk.approval(asked, desk.sam)
    await desk.world.transfer(desk.bot.name, "sue")
    assert await desk.world.runtimes["issuer"].tables_caught_up(30)
    async with expect_trail(desk.world, STALE, bot=desk.bot.name):
        await desk.decide(asked, approvals=(approval,), required=("sponsor",))
        assert await desk.refusal_codes(asked) == ["approval_stale"]
    # Nor does it help to say that the approval was given on what there is now: sam is not the sponsor any more.
    again = await desk.ask("deploy")
    now = desk.revisions.model_copy(update={"agent": 2})
    await desk.decide(
        again,
        approvals=(desk.approval(again, desk.sam, revisions=now),),
        required=("sponsor",),
        revisions=now,
    )
    assert await desk.refusal_codes(again) == ["approval_lacking"]


async def test_two_keys_of_one_person_are_one_person(desk: IssuerBench) -> None:
    second = await second_key(desk.world, "rita", roles=("sponsor", "operator"))
    asked = await desk.ask("deploy")
    approvals = tuple(desk.approval(asked, party) for party in second)
    async with expect_trail(desk.world, LACKING, bot=desk.bot.name):
        await desk.decide(asked, approvals=approvals, required=("second_person", "operator"))
        assert await desk.refusal_codes(asked) == ["approval_lacking"]
    alone = await desk.ask("deploy")
    given = (desk.approval(alone, desk.sam), desk.approval(alone, second[1]))
    await desk.decide(alone, approvals=given, required=("sponsor", "operator"))
    assert (await desk.answer(alone)).credential is not None  # each key counts by itself


async def second_key(world: World, name: str, roles: Any) -> tuple[Party, Party]:
    """A user with two keys that both count."""
    one, two = world.party("user", name), world.party("user", name)
    keys = tuple(party.key.record(int(time.time()) + DAY_S) for party in (one, two))
    await world.accepted(world.user_set(world.operator, one, roles, keys=keys), world.operator)
    return one, two


@pytest.mark.parametrize("role", ["on behalf of", "sponsor"])
async def test_an_operator_whose_own_it_is_anyway_is_nobody_else(desk: IssuerBench, role: str) -> None:
    """Policy says that it is approved as the floor wants; the floor wants somebody else than those two."""
    world, name = desk.world, f"o{uuid.uuid4().hex[:8]}"
    everything = scope("staging", ("read", "deploy", "wipe"), ("**",))
    own = await world.user(name, roles=("sponsor", "operator"), entitlements=everything)
    people = {"sam": desk.sam, "maria": desk.maria, "sue": desk.sue}
    people["sam" if role == "sponsor" else "maria"] = own
    theirs = await IssuerBench(world, people, desk.target).staff()
    for by, opens in ((own, False), (world.operator, True)):
        asked = await theirs.ask("wipe")
        await theirs.decide(asked, approvals=(theirs.approval(asked, by),), required=("operator",))
        if opens:
            assert (await theirs.answer(asked)).credential is not None
        else:
            assert await theirs.refusal_codes(asked) == ["approval_lacking"]
            await request_leaves(world, asked_for() + LACKING, asked.id, bot=theirs.bot.name)


async def test_sponsor_of_the_agent_acting_for_them_gives_the_sponsor_approval(
    desk: IssuerBench,
) -> None:
    everything = scope("staging", ("read", "deploy", "wipe"), ("**",))
    own = await desk.world.user(
        f"s{uuid.uuid4().hex[:8]}", roles=("sponsor", "operator"), entitlements=everything
    )
    people = {"sam": own, "maria": own, "sue": desk.sue}
    theirs = await IssuerBench(desk.world, people, desk.target).staff()
    asked = await theirs.ask("deploy")
    await theirs.decide(asked, approvals=(theirs.approval(asked, own),), required=("sponsor",))
    assert (await theirs.answer(asked)).credential is not None
    await request_leaves(desk.world, asked_for() + allowed() + ISSUED, asked.id, bot=theirs.bot.name)


# --- at policy ---


async def test_an_operator_is_not_asked_for_what_is_their_own(world: World) -> None:
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        for whose in (office.maria, office.sam):  # whom it is for, and the agent's sponsor
            made = world.user_set(world.operator, whose, ("sponsor", "operator"), EVERYTHING)
            await world.accepted(made, world.operator)
        await office.records_read()
        asked = await office.ask(WIPE)
        assert (await office.decision(asked)).required == ("sponsor", "operator")
        question = await office.question(asked, world.operator)
        async with expect_trail(world, approved("maria", BOT) + answer_refused("not_approver", BOT)):
            refusal = await office.refused(await office.approve(question, office.maria))
            assert refusal == "not_approver"
        await office.approve(question, office.sam)  # counts, as the sponsor's
        await office.approve(question, world.operator)
        assert (await office.final(asked)).outcome == "allowed"
        questions = [(r.key, office.asked(r)) for r in await world.records(APPROVAL_REQUEST)]
        asked_of = {key for key, one in questions if one.request_id == asked.id}
        assert asked_of == {"sam", world.operator.name}


async def test_two_keys_of_one_person_answer_once(world: World) -> None:
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        one, two = await second_key(world, "rita", roles=("sponsor", "operator"))
        await world.transfer("deploy-bot", "rita")
        await office.records_read()
        asked = await office.ask(WIPE)  # rita could be the sponsor, and the operator
        question = await office.question(asked, one)
        async with expect_trail(world, TWICE):
            await office.approve(question, one)
            assert await office.refused(await office.approve(question, two)) == "approved_already"
        assert "allowed" not in await office.outcomes(asked)
        await office.approve(question, world.operator)
        assert (await office.final(asked)).outcome == "allowed"


async def test_an_approval_that_was_given_before_a_denial_and_comes_after_it(world: World) -> None:
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(WIPE)
        question = await office.question(asked, office.sam)
        kept = office.approval(question, office.sam)  # signed, and held back by somebody
        first = await office.approve(question, office.sam)
        await office.approve(question, world.operator, verdict="denied")
        assert codes(await office.final(asked)) == {"approval_denied"}
        async with expect_trail(world, HELD_BACK):
            for replayed in (first, kept):
                await office.send(APPROVAL_RESPONSE, replayed)
            assert await office.refused(kept) == "already_decided"
            assert await office.refused(first) == "approval_replayed"
        # Asked anew it is another request, for which neither counts.
        anew = await office.question(await office.ask(WIPE), office.sam)
        old = office.approval(
            anew, office.sam, request=question.request, request_digest=question_digest(question)
        )
        await office.send(APPROVAL_RESPONSE, old)
        assert await office.refused(old) == "approval_other_request"
        assert (await office.outcomes(asked))["allowed"] == 0


def question_digest(question: ApprovalRequest) -> str:
    return digest(question.request)


# --- at the person ---


async def test_request_shown_under_another_id_is_rejected(world: World) -> None:
    """A policy that lies asks with the harmless request, under the id of the harmful one."""
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        harmful = await office.question(await office.ask(WIPE), office.sam)
        harmless = await office.question(await office.ask(DEPLOY), office.sam)
        forged = harmless.model_copy(update={"request_id": harmful.request_id})
        async with Sponsor.connect(office.sam.key, client(world)) as sam:
            await world.send(APPROVAL_REQUEST, "sam", sign(forged, world.key("policy")))
            marker = await office.question(await office.ask(DEPLOY), office.sam)
            async for pending in sam.watch():
                if pending.request_id == marker.request_id:
                    break
            assert harmful.request_id in sam.unshowable
            shown = {one.request_id: one for one in sam.pending()}
            # What is signed is the digest of what is shown, whatever was asked beside it.
            await sam.approve(shown[harmless.request_id])
        decision = await office.final(harmless.request_id)
        assert decision.outcome == "allowed"
        await request_leaves(world, OTHER_NAME, harmful.request_id)
        decisions = [office.opened(r) for r in await world.records(CREDENTIAL_DECISION)]
        assert not [one for one in decisions if one.request_id == harmful.request_id and one.approvals]
