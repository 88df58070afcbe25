"""Passkeys with all services: what a touch gives, what attackers make of touches, and what stays after a rebuild."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.webauthn import MAX_AGE_S
from ringfence.messages.approval import BreakGlassReview, Grant, GrantWithdraw
from ringfence.messages.base import ServiceRole
from ringfence.messages.lease import RevocationRequest, Selector
from ringfence.messages.registry import (
    AgentResume,
    AgentSetCeiling,
    AgentSuspend,
    SessionStatement,
    TaskEnd,
    UserEndKey,
)
from ringfence.messages.topics import (
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    LEASE,
    REVOCATION_REQUEST,
)
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.policy_bench import DEPLOY, EVERYTHING, PolicyBench, claims_of
from tests.support.passkeys import ORIGINS, SESSION_ORIGIN, SoftwarePasskey, add_passkey
from tests.support.world import DeadLetteredError, Party, World, scope

SERVICES: tuple[ServiceRole, ...] = ("registry", "policy", "issuer", "revoker")


def but(who: Party, **how: Any) -> Party:
    """The same person, whose passkey is used otherwise."""
    assert isinstance(who.key, SoftwarePasskey)
    return Party(who.name, who.key.but(**how))


@pytest.fixture(scope="module")
async def office(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[PolicyBench]:
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        world.running(*SERVICES),
    ):
        yield await PolicyBench.open(world)


@pytest.fixture(scope="module")
async def sam(office: PolicyBench) -> Party:
    """The sponsor, by their passkey."""
    return await add_passkey(office.world, office.sam)


async def test_an_approval_by_a_passkey_becomes_a_credential(office: PolicyBench, sam: Party) -> None:
    asked = await office.ask(DEPLOY)
    question = await office.question(asked, sam)
    approval = await office.approve(question, sam)
    decision = await office.final(asked)
    assert (decision.outcome, decision.approvals) == ("allowed", (approval,))
    (at_ms,) = (decision.answers_at_ms or {}).values()
    assert decision.answers_at_ms == {digest(approval): at_ms}
    (record,) = [
        one for one in await office.world.records(APPROVAL_RESPONSE) if one.value == approval.encode()
    ]
    assert at_ms == record.appended_at_ms
    assert (await office.reply(asked, "allowed")).lease is not None
    # It counts once, and a key file's decision says no times.
    again = await office.send(APPROVAL_RESPONSE, approval)
    assert await office.refused(approval) == "approval_replayed", again
    by_file = await office.ask(DEPLOY)
    await office.approve(await office.question(by_file, sam), office.sam)
    assert (await office.final(by_file)).answers_at_ms is None


async def test_a_late_approval_is_refused_and_the_request_goes_on_waiting(
    office: PolicyBench, sam: Party
) -> None:
    asked = await office.ask(DEPLOY)
    question = await office.question(asked, sam)
    now_s = int(time.time())
    late = await office.approve(question, sam, iat=now_s - MAX_AGE_S - 5, exp=now_s + 3600)
    assert await office.refused(late) == "passkey_too_late"
    await office.approve(question, sam, iat=now_s - MAX_AGE_S + 100, exp=now_s + 3600)
    assert (await office.final(asked)).outcome == "allowed"


async def test_of_two_approvals_each_is_judged_by_when_it_came(office: PolicyBench, sam: Party) -> None:
    """The first is minutes old when the second person answers: it counts by when it came."""
    petra = await add_passkey(office.world, await office.world.user("pat", roles=("operator",)))
    # The sponsor, by the bundle, and an operator, by the floor.
    asked = await office.ask(scope("platform", ["wipe"], ["env/production/web"]))
    question = await office.question(asked, petra)
    now_s = int(time.time())
    first = await office.approve(question, sam, iat=now_s - MAX_AGE_S + 60, exp=now_s + 3600)

    def rests_on_the_first(record: Any) -> bool:
        found = office.opened(record)
        return found.request_id == asked.id and first in found.approvals

    await office.world.consume_until(CREDENTIAL_DECISION, rests_on_the_first)
    second = await office.approve(question, petra)
    decision = await office.final(asked)
    assert decision.outcome == "allowed", decision.reasons
    assert set(decision.answers_at_ms or {}) == {digest(first), digest(second)}
    assert (await office.reply(asked, "allowed")).lease is not None


async def test_a_grant_a_withdrawal_and_a_revocation_by_a_passkey(office: PolicyBench, sam: Party) -> None:
    world = office.world
    waits = await office.ask(DEPLOY)
    revisions = (await office.question(waits, sam)).revisions
    claims = world.claims(
        Grant, sam, agent_id=office.bot.name, task_id=office.task, scope=DEPLOY, count=2, ttl_s=600,
        delivery="agent", revisions=revisions,
    )  # fmt: skip
    grant = sign(claims, sam.key)
    await office.send(APPROVAL_RESPONSE, grant)
    decision = await office.final(waits)
    assert (decision.outcome, decision.grants) == ("allowed", (grant,)), decision.reasons
    assert set(decision.answers_at_ms or {}) == {digest(grant)}
    reply = await office.reply(waits, "allowed")
    assert reply.lease is not None
    accepted = await world.event_where(lambda e: e.ref == claims.jti and e.kind == "accepted")
    withdrawal = world.claims(GrantWithdraw, sam, grant_id=accepted.result, reason="enough")
    await office.send(APPROVAL_RESPONSE, sign(withdrawal, sam.key))
    await world.event_where(lambda e: e.ref == withdrawal.jti and e.kind == "accepted")
    lease_id = claims_of(reply.lease)["lease_id"]
    end = world.claims(RevocationRequest, sam, kind="revocation", lease_id=lease_id, reason="enough")
    await world.send(REVOCATION_REQUEST, office.bot.name, sign(end, sam.key))
    await world.event_where(lambda e: e.ref == end.jti and e.kind == "accepted")

    def revoked(record: Any) -> bool:
        found = claims_of(record.value.decode())
        return (found.get("lease_id"), found.get("status")) == (lease_id, "revoked")

    await world.consume_until(LEASE, revoked)


async def test_commands_by_a_passkey(office: PolicyBench, sam: Party) -> None:
    world = office.world
    bot = await world.agent("by-passkey", office.sam, EVERYTHING)
    about = {"agent_id": bot.name}
    await world.accepted(world.claims(AgentSuspend, sam, reason="look", **about), sam)
    await world.accepted(world.claims(AgentResume, sam, reason="looked", **about), sam)
    await world.accepted(world.claims(AgentSetCeiling, sam, ceiling=DEPLOY, **about), sam)
    task = await world.task(bot, by=sam, scope=EVERYTHING)
    await world.accepted(world.claims(TaskEnd, sam, task_id=task, reason="done"), sam)
    once = world.claims(AgentSuspend, sam, reason="again", **about)
    await world.accepted(once, sam)
    assert (await world.command(once, sam)).kind == "replayed"
    with pytest.raises(DeadLetteredError) as late:
        await world.command(
            world.claims(AgentResume, sam, reason="x", iat=int(time.time()) - MAX_AGE_S - 5, **about), sam
        )
    assert late.value.letter.code == "passkey_too_late"
    with pytest.raises(DeadLetteredError) as file_only:
        await world.command(world.user_set(sam, sam, roles=("sponsor", "operator")), sam)
    assert file_only.value.letter.code == "passkey_not_allowed"


async def test_code_on_the_session_origin_with_real_touches_gets_session_statements_only(
    office: PolicyBench, sam: Party
) -> None:
    """It has all that sam signs there, and write access to every topic: nothing is approved, commanded or ended."""
    world, there = office.world, but(sam, origin=SESSION_ORIGIN)
    asked = await office.ask(DEPLOY)
    question = await office.question(asked, sam)
    approval = office.approval(question, there)
    statement = sign(
        world.claims(SessionStatement, sam, user_id=sam.name, console_kid="k", cookie_digest="0" * 64),
        there.key,
    )
    touched = statement.rpartition(".")[2]
    grant = world.claims(
        Grant, sam, agent_id=office.bot.name, task_id=office.task, scope=DEPLOY, count=2, ttl_s=600,
        delivery="agent", revisions=question.revisions,
    )  # fmt: skip
    review = world.claims(
        BreakGlassReview,
        sam,
        request_id=asked.id,
        decision_digest="0" * 64,
        agent_id=office.bot.name,
        note="x",
    )
    end = world.claims(
        RevocationRequest, sam, kind="revocation", selector=Selector(agent_id=office.bot.name), reason="x"
    )
    for topic, compact in (
        (APPROVAL_RESPONSE, approval),
        (APPROVAL_RESPONSE, f"{approval.rpartition('.')[0]}.{touched}"),
        (APPROVAL_RESPONSE, statement),
        (APPROVAL_RESPONSE, sign(grant, there.key)),
        (REVOCATION_REQUEST, sign(end, there.key)),
    ):
        await office.letter(await office.send(topic, compact))
    await office.send(APPROVAL_RESPONSE, sign(review, there.key))
    for command in (
        world.claims(AgentSuspend, sam, agent_id=office.bot.name, reason="x"),
        world.claims(AgentSetCeiling, sam, agent_id=office.bot.name, ceiling=EVERYTHING),
        world.claims(TaskEnd, sam, task_id=office.task, reason="x"),
        world.claims(UserEndKey, sam, user_id=sam.name, kid=office.sam.key.kid, reason="x"),
    ):
        with pytest.raises(DeadLetteredError) as refused:
            await world.command(command, there)
        assert refused.value.letter.code == "signature_invalid"
    assert await office.outcomes(asked) == {"approval_required": 1}
    await office.approve(question, sam)
    assert (await office.final(asked)).outcome == "allowed"


async def test_a_plain_message_by_the_key_of_a_passkey_is_buried(office: PolicyBench, sam: Party) -> None:
    assert isinstance(sam.key, SoftwarePasskey)
    asked = await office.ask(DEPLOY)
    plain = office.approval(await office.question(asked, sam), Party(sam.name, sam.key.plain()))
    assert (await office.letter(await office.send(APPROVAL_RESPONSE, plain))).code == "alg_unexpected"
    ttl_changed = office.approval(await office.question(asked, sam), sam, ttl_s=299)
    head, _, tail = office.approval(await office.question(asked, sam), sam).split(".")
    mixed = f"{head}.{ttl_changed.split('.')[1]}.{tail}"
    assert (await office.letter(await office.send(APPROVAL_RESPONSE, mixed))).code == "signature_invalid"


async def test_after_the_end_of_an_origin_and_a_key_what_rests_on_them_is_rebuilt(
    kafka: Kafka, redis_server: RedisServer
) -> None:
    async with World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world:
        async with world.running("registry", "policy"):
            office = await PolicyBench.open(world)
            sam = await add_passkey(world, office.sam)
            await world.accepted(world.claims(AgentSuspend, sam, agent_id=office.bot.name, reason="x"), sam)
            await world.accepted(world.claims(AgentResume, sam, agent_id=office.bot.name, reason="x"), sam)
            task = await world.task(office.bot, by=sam, scope=EVERYTHING)
            ended = ORIGINS[0].model_copy(update={"not_after": int(time.time()) + 1})
            bundle = world.make_bundle(2).model_copy(update={"origins": (ended, ORIGINS[1])})
            await world.publish_trust(bundle)
            world.trust.load(sign(bundle, world.root.key, header_jwk=True), time.time())

            async def refused() -> DeadLetteredError | None:
                try:
                    await world.command(
                        world.claims(AgentResume, sam, agent_id=office.bot.name, reason="x"), sam
                    )
                except DeadLetteredError as error:
                    return error
                return None

            error = None
            while error is None:  # until the second of the end is over, and the registry has read the bundle
                error = await refused()
            assert error.letter.code == "signature_invalid"
            await world.accepted(
                world.claims(UserEndKey, office.sam, user_id="sam", kid=sam.key.kid, reason="lost"),
                office.sam,
            )
        # Everybody starts anew, and verifies all records from the first command on.
        async with world.running("registry", "policy"):
            asked = await office.ask(DEPLOY)
            await office.approve(await office.question(asked, office.sam), office.sam)
            assert (await office.final(asked)).outcome == "allowed"
            await world.accepted(world.claims(TaskEnd, office.sam, task_id=task, reason="x"), office.sam)
