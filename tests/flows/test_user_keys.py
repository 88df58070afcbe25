"""Nobody lends themselves a sponsor: keys that others added, at policy and, with a policy that lies, at the issuer."""

from __future__ import annotations

import time
from typing import Any

from ringfence.kernel.crypto.jws import sign
from ringfence.messages.approval import Grant
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import UserEndKey, VerbFloor
from ringfence.messages.topics import APPROVAL_RESPONSE
from tests.support.benches.issuer_bench import IssuerBench
from tests.support.benches.policy_bench import DEPLOY, VERBS, PolicyBench
from tests.support.user_keys import give_key
from tests.support.world import Party, World, scope

BOTH = scope("platform", ["deploy", "wipe"], ["env/staging/web"])
"""Takes the sponsor and an operator."""


async def operators(world: World, *names: str) -> list[Party]:
    return [await world.user(name, roles=("operator",)) for name in names]


# --- at policy --------------------------------------------------------------------------------------------------------


async def test_an_operator_who_gives_a_sponsor_a_key_obtains_nothing_by_it(world: World) -> None:
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        olga = world.operator
        added = await give_key(world, olga, office.sam)
        listed = world.party("user", "sam")
        keys = (office.sam.key_record(), added.key_record(), listed.key_record())
        await world.accepted(world.user_set(olga, office.sam, ("sponsor",), keys=keys), olga)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        for lent in (added, listed):
            assert await office.refused(await office.approve(question, lent)) == "key_too_new"
            assert await granted(office, lent, question) == "key_too_new"
        await office.approve(question, office.sam)
        assert (await office.final(asked)).outcome == "allowed"


async def granted(office: PolicyBench, by: Party, question: Any) -> str | None:
    """Why a grant by somebody is refused, or None."""
    claims = office.world.claims(
        Grant, by, agent_id=office.bot.name, task_id=office.task, scope=DEPLOY, count=1, ttl_s=300, delivery="agent",
        revisions=question.revisions,
    )  # fmt: skip
    await office.send(APPROVAL_RESPONSE, sign(claims, by.key))
    event = await office.world.event_where(lambda e: e.ref == claims.jti and e.subject == "grant")
    return event.reasons[0].code if event.reasons else None


async def test_key_added_with_a_lent_key_counts_no_sooner(world: World) -> None:
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        lent = await give_key(world, world.operator, office.sam)
        child = await give_key(world, lent, office.sam)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        assert await office.refused(await office.approve(question, child)) == "key_too_new"


async def test_a_second_operator_lets_it_count_and_neither_approves_beside_it(world: World) -> None:
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        olga = world.operator
        otto, oscar = await operators(world, "otto", "oscar")
        lent = await give_key(world, olga, office.sam, otto)
        asked = await office.ask(BOTH)
        question = await office.question(asked, office.sam)
        assert set(question.required) == {"sponsor", "operator"}
        await office.approve(question, lent)
        for voucher in (olga, otto):
            assert await office.refused(await office.approve(question, voucher)) == "key_beside_voucher"
        await office.approve(question, oscar)
        assert (await office.final(asked)).outcome == "allowed"
        # The other way round: an operator approved, and then comes with the sponsor's key.
        again = await office.ask(BOTH)
        question = await office.question(again, office.sam)
        await office.approve(question, olga)
        assert await office.refused(await office.approve(question, lent)) == "key_beside_voucher"
        await office.approve(question, office.sam)
        assert (await office.final(again)).outcome == "allowed"


async def test_voucher_that_the_request_is_for_blocks_approval_by_the_lent_key(world: World) -> None:
    """otto gave petra a key, and petra is the second person for what is done on behalf of otto."""
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        (otto,) = await operators(world, "otto")
        lent = await give_key(world, otto, office.petra, world.operator)
        everything = scope("platform", ["drop"], ["env/**"])
        await world.accepted(
            world.user_set(world.operator, otto, ("operator",), everything, keys=(otto.key_record(),)),
            world.operator,
        )
        office.task = await world.task(office.bot, by=otto, scope=everything)
        asked = await office.ask(scope("platform", ["drop"], ["env/staging/web"]))
        question = await office.question(asked, office.petra)
        assert await office.refused(await office.approve(question, lent)) == "key_beside_voucher"
        await office.approve(question, office.petra)
        assert (await office.final(asked)).outcome == "allowed"


async def test_keys_that_a_compromised_key_vouched_for_count_no_more(world: World) -> None:
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        otto, oscar = await operators(world, "otto", "oscar")
        lent = await give_key(world, otto, office.sam, oscar)
        end = world.claims(
            UserEndKey, world.operator, user_id="otto", kid=otto.key.kid, reason="stolen", compromised=True,
            since_ms=int(time.time() * 1000) - 86_400_000,
        )  # fmt: skip
        await world.accepted(end, world.operator)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        assert await office.refused(await office.approve(question, lent)) == "key_voucher_compromised"


async def test_floors_that_demand_a_kind_of_key(world: World) -> None:
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        attested = VerbFloor(verb="deploy", floor="sponsor", key="attested")
        await world.target("platform", verbs=[attested if one.verb == "deploy" else one for one in VERBS])
        await office.records_read()
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        assert await office.refused(await office.approve(question, office.sam)) == "key_not_attested"
        assert await granted(office, office.sam, question) == "key_not_attested"
        by_file = VerbFloor(verb="deploy", floor="sponsor", key="file")
        await world.target("platform", verbs=[by_file if one.verb == "deploy" else one for one in VERBS])
        await office.records_read()
        again = await office.ask(DEPLOY)
        await office.approve(await office.question(again, office.sam), office.sam)
        assert (await office.final(again)).outcome == "allowed"


async def test_the_user_is_told_of_a_key_that_was_added(world: World) -> None:
    async with world.running("registry"):
        sam = await world.user("sam", roles=("sponsor",))
        lent = await give_key(world, world.operator, sam)

        def told(event: ServiceEvent) -> bool:
            return event.kind == "finding" and event.ref == lent.key.kid

        event = await world.event_where(told)
        assert (event.subject, event.result, event.actor) == ("key", sam.id, world.operator.id)
        assert [reason.code for reason in event.reasons] == ["key_added"]
        assert "for sam" in event.reasons[0].message


# --- at the issuer, which believes no policy --------------------------------------------------------------------------


async def test_the_issuer_takes_no_approval_by_a_key_that_waits(desk: IssuerBench) -> None:
    lent = await give_key(desk.world, desk.world.operator, desk.sam)
    asked = await desk.ask("deploy")
    await desk.decide(asked, approvals=(desk.approval(asked, lent),), required=("sponsor",))
    assert await desk.refusal_codes(asked) == ["key_too_new"]
    own = await desk.ask("deploy")
    await desk.decide(own, approvals=(desk.approval(own, desk.sam),), required=("sponsor",))
    assert (await desk.answer(own)).credential is not None


async def test_the_issuer_takes_no_approval_beside_who_vouched_for_its_key(desk: IssuerBench) -> None:
    otto = await desk.world.user(f"otto-{desk.bot.name}", roles=("operator",))
    lent = await give_key(desk.world, desk.world.operator, desk.sam, otto)
    asked = await desk.ask("wipe")
    approvals = (desk.approval(asked, lent), desk.approval(asked, otto))
    await desk.decide(asked, approvals=approvals, required=("sponsor",))
    assert await desk.refusal_codes(asked) == ["key_beside_voucher"]
    event = await desk.event("finding", asked)
    assert [reason.code for reason in event.reasons] == ["key_beside_voucher"]
