"""The issuer's last word on approvals given ahead, with a policy that signs whatever the test likes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import Grant, GrantWithdraw
from ringfence.messages.registry import AgentResume, AgentSetCeiling, AgentSuspend
from ringfence.messages.topics import APPROVAL_RESPONSE, CREDENTIAL_DECISION, LEASE
from ringfence.model.requests.grants import id_of
from tests.support.benches.grant_flows import claims_of, grant, granted
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.world import Party, World


async def test_a_grant_opens_what_needs_the_sponsor_and_the_lease_names_it(desk: IssuerBench) -> None:
    compact = grant(desk)
    asked = await granted(desk, compact)
    assert (await desk.answer(asked)).credential is not None
    lease = await desk.lease(asked.lease_id, "active")
    assert lease.grants == (id_of(claims_of(compact)),)
    # What was issued on it and ends goes on counting: a grant is for so many credentials.
    assert (await desk.answer(await granted(desk, compact))).credential is not None
    assert await desk.refusal_codes(await granted(desk, compact)) == ["grant_used_up"]


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("approval_invalid", "the agent's own"),
        ("approval_invalid", "a stranger's"),
        ("approval_lacking", "a user's who may not"),
        ("approval_lacking", "below the floor"),
        ("approval_lacking", "of one person for two"),
        ("grant_other_task", "for another task"),
        ("grant_other_task", "for another agent"),
        ("grant_other_scope", "for another scope"),
        ("grant_other_scope", "for several targets"),
        ("grant_other_terms", "for a shorter life"),
        ("grant_other_terms", "for another delivery"),
        ("grant_too_long", "for days"),
        ("grant_stale", "on other revisions"),
    ],
)
async def test_a_grant_that_does_not_count(desk: IssuerBench, code: str, wrong: str) -> None:
    other = await another(desk) if "another" in wrong else desk
    everything = desk.scope("read", "deploy", "wipe", resource="**")
    fields: dict[str, Any] = {}
    verb = "deploy"
    match wrong:
        case "the agent's own":
            compact = grant(desk, desk.bot)
        case "a stranger's":
            compact = grant(desk, desk.world.party("user", "sam"))
        case "a user's who may not":
            compact = grant(desk, desk.maria)
        case "below the floor":  # an operator's, which a bundle that allows everything did not ask for
            compact, verb, fields = grant(desk, scope=everything), "wipe", {"required": ()}
        case "of one person for two":
            compact, fields = grant(desk), {"required": ("sponsor", "second_person")}
        case "for another task":
            compact = grant(desk, task_id=other.task)
        case "for another agent":
            compact = grant(desk, agent_id=other.bot.name)
        case "for another scope":
            compact = grant(desk, scope=desk.scope("deploy", resource="env/test/*"))
        case "for several targets":
            elsewhere = everything[0].model_copy(update={"target": "elsewhere"})
            compact = grant(desk, scope=(*everything, elsewhere))
        case "for a shorter life":
            compact = grant(desk, ttl_s=60)
        case "for another delivery":
            compact = grant(desk, delivery="gateway")
        case "for days":
            compact = grant(desk, exp=int(time.time()) + 86_400)
        case _:
            compact = grant(desk, revisions=desk.revisions.model_copy(update={"agent": 7}))
    asked = await granted(desk, compact, verb=verb, **fields)
    assert await desk.refusal_codes(asked) == [code]
    assert await desk.is_finding(asked)


async def test_grant_and_approval_of_one_person_count_once(desk: IssuerBench) -> None:
    asked = await desk.ask("deploy")
    approval = desk.approval(asked, desk.sam)
    await desk.decide(
        asked, approvals=(approval,), grants=(grant(desk),), required=("sponsor", "second_person")
    )
    assert await desk.refusal_codes(asked) == ["approval_lacking"]
    asked = await desk.ask("deploy")
    approval = desk.approval(asked, desk.sue)
    await desk.decide(
        asked, approvals=(approval,), grants=(grant(desk),), required=("sponsor", "second_person")
    )
    assert (await desk.answer(asked)).credential is not None


async def test_a_grant_that_is_not_understood_opens_nothing_and_is_no_finding(desk: IssuerBench) -> None:
    """A policy of another version may know the field that limits it."""
    asked = await granted(desk, grant(desk, only_at="night"))
    assert await desk.refusal_codes(asked) == ["grant_not_understood"]
    assert not await desk.is_finding(asked)


async def test_a_grant_after_a_suspension_a_change_and_a_transfer_counts_for_nothing(
    desk: IssuerBench,
) -> None:
    world, name = desk.world, desk.bot.name
    compact = grant(desk)
    assert (await desk.answer(await granted(desk, compact))).credential is not None
    await world.accepted(world.claims(AgentSuspend, desk.sam, agent_id=name, reason="odd"), desk.sam)
    await arrived(desk)
    assert "agent_suspended" in await desk.refusal_codes(await granted(desk, compact))
    await world.accepted(world.claims(AgentResume, desk.sam, agent_id=name, reason="explained"), desk.sam)
    await arrived(desk)
    assert await desk.refusal_codes(await granted(desk, compact)) == ["grant_stale"]
    resumed = grant(desk, revisions=desk.revisions.model_copy(update={"agent": 3}))
    narrower = desk.scope("read", "deploy", resource="env/**")
    await world.accepted(world.claims(AgentSetCeiling, desk.sam, agent_id=name, ceiling=narrower), desk.sam)
    await arrived(desk)
    assert await desk.refusal_codes(await granted(desk, resumed)) == ["grant_stale"]
    changed = grant(desk, revisions=desk.revisions.model_copy(update={"agent": 4}))
    await world.transfer(name, "sue")
    await arrived(desk)
    assert await desk.refusal_codes(await granted(desk, changed)) == ["grant_stale"]


async def test_withdrawn_grant_issues_nothing_even_if_policy_allows(desk: IssuerBench) -> None:
    compact = grant(desk, count=9)
    claims = claims_of(compact)
    assert (await desk.answer(await granted(desk, compact))).credential is not None
    await withdraw(desk, claims, desk.sue)  # it is not hers to take back
    assert (await desk.answer(await granted(desk, compact))).credential is not None
    before = await granted(desk, compact)
    assert (await desk.answer(before)).credential is not None
    await withdraw(desk, claims, desk.maria)
    assert await desk.refusal_codes(await granted(desk, compact)) == ["grant_withdrawn"]


async def test_a_withdrawal_outlives_a_restart_of_the_issuer(world: World) -> None:
    async with opened_desks(world) as first:
        desk = await another(first)
        compact = grant(desk, count=9)
        async with world.running("issuer"):
            assert (await desk.answer(await granted(desk, compact))).credential is not None
        await withdraw(desk, claims_of(compact), desk.sam)
        async with world.running("issuer"):
            assert await desk.refusal_codes(await granted(desk, compact)) == ["grant_withdrawn"]


async def withdraw(desk: IssuerBench, claims: Grant, by: Party) -> None:
    back = desk.world.claims(GrantWithdraw, by, grant_id=id_of(claims), reason="off")
    await desk.world.send(APPROVAL_RESPONSE, desk.bot.name, sign(back, by.key))


async def arrived(desk: IssuerBench) -> None:
    """Until the issuer knows all that the registry has said."""
    assert await desk.world.runtimes["issuer"].tables_caught_up(30)


async def test_of_two_issuers_at_once_none_takes_one_too_many(world: World) -> None:
    async with opened_desks(world) as first:
        desk = await another(first)
        compact = grant(desk, count=5)
        asked = [await granted(desk, compact) for _ in range(12)]
        await world.consume_until(CREDENTIAL_DECISION, lambda r: asked[-1].compact.encode() in _payload(r))
        records = [r for r in await world.records(CREDENTIAL_DECISION) if r.key == desk.bot.name]
        assert len(records) == len(asked)
        async with world.running("issuer"):
            one = world.runtimes["issuer"]
            async with world.running("issuer"):
                two = world.runtimes["issuer"]
                # As where a process that stood still goes on beside the one that took its partitions over.
                await asyncio.gather(*(handled(by, world, [r]) for r in records for by in (one, two)))
                answers = [await desk.answer(one) for one in asked]
        assert sum(answer.credential is not None for answer in answers) == 5
        assert len({record.key for record in await world.records(LEASE)}) == 5
        codes = Counter(r.code for a in answers if a.refusal for r in desk.refusal(a).reasons)
        assert codes == {"grant_used_up": 7}


def _payload(record: Received) -> bytes:
    return parse(record.value).payload


async def handled(by: Runtime, world: World, records: Sequence[Received]) -> None:
    (handler,) = (consumer._handlers[CREDENTIAL_DECISION.name(world.prefix)] for consumer in by.consumers)
    await handler(records)
