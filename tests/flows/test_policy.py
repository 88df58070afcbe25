"""Policy on a real broker, with a real registry: requests in, signed decisions and sealed replies out."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.kafka.producer import to_json
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.tracing.api import trace_id
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import AgentSuspend, BackendSettings
from ringfence.messages.topics import (
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    CREDENTIAL_REQUEST,
    SERVICE_EVENT,
)
from ringfence.policy.settings import PolicySettings
from tests.support.benches.policy_bench import (
    DEPLOY,
    EVERYTHING,
    READ,
    VERBS,
    Asked,
    HeldUp,
    PolicyBench,
    claims_of,
    codes,
)
from tests.support.world import WITHIN_S, Party, World, scope


class Loose(CredentialRequest):
    """What somebody could sign who keeps to no schema."""

    ttl_s: Any


# --- the straight way ---


async def test_reading_staging_needs_nobody(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(READ, ttl_s=300)
        decision = await office.final(asked)
        assert (decision.outcome, decision.ttl_s, decision.required, decision.reasons) == (
            "allowed",
            300,
            (),
            (),
        )
        assert decision.request == asked.jws
        assert (decision.source.partition, decision.source.offset) == (
            asked.sent.partition,
            asked.sent.offset,
        )
        assert decision.input is not None
        assert decision.input_digest == digest(to_json(decision.input))
        assert decision.revisions is not None
        assert (decision.revisions.agent, decision.revisions.task) == (1, 1)
        assert "keys" not in decision.input["agent"]


async def test_deploying_to_staging_takes_the_sponsor(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(DEPLOY)
        pending = await office.decision(asked)
        assert (pending.outcome, pending.required) == ("approval_required", ("sponsor",))
        await office.reply(asked, "approval_required")
        question = await office.question(asked, office.sam)
        assert question.request == asked.jws
        assert question.revisions == pending.revisions
        approval = await office.approve(question, office.sam)
        decision = await office.final(asked)
        assert (decision.outcome, decision.approvals, decision.required) == (
            "allowed",
            (approval,),
            ("sponsor",),
        )
        assert decision.ttl_s == question.ttl_s
        assert decision.input is not None
        assert decision.input["approvals"] == [{"user_id": "sam", "roles": ["sponsor"]}]
        assert await office.outcomes(asked) == {"approval_required": 1, "allowed": 1}


async def test_one_request_is_one_trace(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        claims, _ = office.request(DEPLOY)
        parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        acknowledged = await world.publisher.send(
            CREDENTIAL_REQUEST,
            "t",
            Outbound(office.bot.name, sign(claims, office.bot.key), id="x", traceparent=parent),
        )
        await acknowledged
        id = message_id(claims.iss, claims.jti)

        def about(record: Received) -> bool:
            return office.opened(record).request_id == id

        record = await world.consume_until(CREDENTIAL_DECISION, about)
        asked = await world.consume_until(APPROVAL_REQUEST, lambda r: office.asked(r).request_id == id)
        await office.approve(office.asked(asked), office.sam)
        last = await world.consume_until(
            CREDENTIAL_DECISION, lambda r: about(r) and office.opened(r).outcome == "allowed"
        )
        for seen in (record, asked, last):
            assert trace_id(seen.traceparent) == trace_id(parent)


async def test_policy_asks_approvers_beyond_the_sponsor(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        drop = await office.ask(scope("platform", ["drop"], ["env/staging/web"]))
        wipe = await office.ask(scope("platform", ["wipe"], ["env/production/web"]))
        assert (await office.decision(drop)).required == ("second_person",)
        assert (await office.decision(wipe)).required == ("sponsor", "operator")
        await office.approve(await office.question(drop, office.petra), office.petra)
        assert (await office.final(drop)).outcome == "allowed"
        # Each class takes a person of its own, and what was given already is carried along.
        first = await office.approve(await office.question(wipe, office.sam), office.sam)
        second = await office.approve(await office.question(wipe, world.operator), world.operator)
        decision = await office.final(wipe)
        assert (decision.outcome, set(decision.approvals)) == ("allowed", {first, second})


# --- refused: beyond the rule ---


async def test_one_permission_too_wide_is_denied_whole_naming_permission_and_side(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        nina = await world.user("nina", entitlements=READ)
        office.task = await world.task(office.bot, by=nina, scope=EVERYTHING)
        asked = await office.ask(READ + DEPLOY)
        decision = await office.final(asked)
        assert decision.outcome == "denied"
        assert decision.ttl_s is None
        lacks = [(r.side, r.permission) for r in decision.reasons if r.code == "beyond_scope"]
        assert lacks == [("entitlements:nina", DEPLOY[0])]
        content = await office.reply(asked, "denied")
        assert claims_of(content.decision)["jti"] == decision.jti


async def test_lives_of_nothing_and_of_for_ever(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        for ttl_s in (0, -1, 10**9, "300", 1.5, True):
            claims, _ = office.request(READ)
            forged = Loose(**{**claims.model_dump(), "ttl_s": ttl_s})
            sent = await office.send(CREDENTIAL_REQUEST, sign(forged, office.bot.key))
            assert (await office.letter(sent)).code == "claims_invalid"
        decision = await office.final(await office.ask(READ, ttl_s=86_400))
        assert (decision.outcome, codes(decision)) == ("denied", {"ttl_too_long"})


async def test_a_scope_too_long_to_be_told_is_denied_not_stumbled_over(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        many = scope("platform", ["deploy"], [f"other/{'x' * 400}/{number}" for number in range(64)])
        decision = await office.final(await office.ask(many))
        assert "beyond_scope" in codes(decision)


# --- to whom it goes ---


async def test_gateway_only_target_is_denied_to_the_agent_with_the_option_to_use(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        static = BackendSettings.model_validate({"kind": "http", "url": "https://api.example"})
        await world.target("platform", verbs=VERBS, backend=static)
        to_itself = await office.final(await office.ask(delivery="agent"))
        assert (to_itself.outcome, codes(to_itself)) == ("denied", {"delivery_gateway_only"})
        assert "--delivery gateway" in to_itself.reasons[0].message
        # No two operators are asked for what cannot be: nothing could be handed out.
        by_force = await office.final(await office.ask(break_glass=True, delivery="agent"))
        assert (by_force.outcome, codes(by_force)) == ("denied", {"delivery_gateway_only"})
        to_gateway = await office.final(await office.ask(delivery="gateway"))
        assert (to_gateway.outcome, to_gateway.delivery) == ("allowed", "gateway")

        # Nobody can recall a token of a target that has no key to ask introspection with.
        await world.target("platform", verbs=VERBS, keys=())
        long = await office.final(await office.ask(ttl_s=301))
        assert (long.outcome, codes(long)) == ("denied", {"not_recallable"})
        assert (await office.final(await office.ask(ttl_s=300))).outcome == "allowed"
        assert (await office.final(await office.ask(ttl_s=301, delivery="gateway"))).outcome == "allowed"
        assert long.input is not None
        assert (long.input["target"]["revocability"], long.input["target"]["enforced_by"]) == (
            "ttl",
            "target",
        )
        await world.target("platform", verbs=VERBS)
        assert (await office.final(await office.ask(ttl_s=301))).outcome == "allowed"


# --- the bundle ---


async def test_a_bundle_that_allows_everything_widens_nothing(world: World, tmp_path: Path):
    (tmp_path / "d.rego").write_text(
        "package ringfence.issuance\n\n"
        'decision := {"allow": true, "deny": [], "approvals": [], "max_ttl_s": 86400}\n'
    )
    async with world.running("registry", "policy", own={"policy": PolicySettings(bundle=tmp_path)}):
        office = await PolicyBench.open(world)
        beyond = await office.final(await office.ask(scope("platform", ["read"], ["elsewhere"])))
        assert "beyond_scope" in codes(beyond)
        floor = await office.decision(await office.ask(DEPLOY))
        assert (floor.outcome, floor.required) == ("approval_required", ("sponsor",))
        long = await office.final(await office.ask(READ, ttl_s=86_400))
        assert long.ttl_s == 3600  # the target's


# --- too late, too often, too early ---


async def test_a_request_that_came_too_late_is_answered(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        now = int(time.time())
        asked = await office.ask(READ, iat=now - 60, exp=now - 1)
        assert codes(await office.final(asked)) == {"expired"}
        await office.reply(asked, "denied")
        # So late that it may have been decided and forgotten: no second answer then.
        claims, _ = office.request(READ, iat=now - 7200, exp=now - 3600)
        sent = await office.send(CREDENTIAL_REQUEST, sign(claims, office.bot.key))
        assert (await office.letter(sent)).code == "expired"


async def test_agent_over_its_request_rate_is_denied_with_retry_after(world: World):
    own: dict[ServiceRole, Any] = {"policy": PolicySettings(agent_requests_per_minute=2)}
    async with world.running("registry", "policy", own=own):
        office = await PolicyBench.open(world)
        other = await world.agent("other-bot", sponsor=office.sam, ceiling=EVERYTHING)
        task = await world.task(other, by=office.maria, scope=EVERYTHING)
        while True:  # a minute may end between two of them
            asked = await office.ask(READ)
            decision = await office.final(asked)
            if decision.outcome == "denied":
                break
        assert codes(decision) == {"rate_limited"}
        assert decision.retry_after_s is not None
        assert 0 < decision.retry_after_s <= 60
        assert (
            claims_of((await office.reply(asked, "denied")).decision)["retry_after_s"]
            == decision.retry_after_s
        )
        claims, _ = office.request(READ, other, task_id=task)
        await office.send(CREDENTIAL_REQUEST, sign(claims, other.key), key=other.name)
        assert (await office.final(message_id(claims.iss, claims.jti))).outcome == "allowed"


async def test_why_something_was_denied_is_told_when_policy_keeps_the_text_no_longer(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ringfence.policy.decision_log.MOST_DENIALS", 1)
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = [await office.ask(scope("platform", ["read"], ["elsewhere"])) for _ in range(2)]
        await office.final(asked[0])
        await office.reply(asked[1], "denied")  # the text of the other one has gone by then
        answers = [await world.get("policy", f"/v1/decisions/{one.id}", office.sam) for one in asked]
        told = [answer.json() for answer in answers]
    assert "beyond_scope" in {reason["code"] for reason in told[0]["reasons"]}
    for name in ("outcome", "reasons", "required"):
        assert told[0].get(name) == told[1].get(name)


async def test_repeated_requests_over_the_rate_are_dropped_and_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ringfence.policy.incoming.admission.TOLD_NO", 2)
    monkeypatch.setattr("ringfence.policy.incoming.load_shedding._TELL_EVERY_S", 0.2)
    own: dict[ServiceRole, Any] = {"policy": PolicySettings(agent_requests_per_minute=2)}
    async with world.running("registry", "policy", own=own):
        office = await PolicyBench.open(world)
        before, asked = 0, list[Asked]()
        while len({one.sent.appended_at_ms // 60_000 for one in asked}) != 1:  # no minute ends between them
            before, asked = before + len(asked), [await office.ask(READ) for _ in range(60)]
        told = await world.consume_until(
            SERVICE_EVENT,
            lambda record: _counts(_finding(record)) and _finding(record).source == asked[-1].sent,
        )
        assert (_finding(told).kind, _finding(told).agent_id) == ("finding", None)
        findings = [one for record in await world.records(SERVICE_EVENT) if _counts(one := _finding(record))]
        counted = sum(int(one.reasons[0].message.split()[0]) for one in findings)
        decided = [office.opened(record) for record in await world.records(CREDENTIAL_DECISION)]
    assert all(f"{office.bot.name} (" in one.reasons[0].message for one in findings)
    assert Counter(one.request_id for one in decided).most_common(1)[0][1] == 1
    assert len(decided) + counted == before + len(asked)
    outcomes = Counter(one.outcome for one in decided if one.request_id in {each.id for each in asked})
    assert outcomes["allowed"] == 2
    assert 2 <= outcomes["denied"] <= 33  # a batch is begun together


def _finding(record: Received) -> ServiceEvent:
    return parse(record.value).unverified_claims(ServiceEvent)


def _counts(event: ServiceEvent) -> bool:
    return any(reason.code == "requests_shed" for reason in event.reasons)


async def test_request_waits_until_policy_has_read_its_records(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        reading = HeldUp(world)
        office.bot = await world.agent("new-bot", sponsor=office.sam, ceiling=READ)
        office.task = await world.task(office.bot, by=office.maria, scope=READ)
        assert (await office.final(await office.ask(READ))).outcome == "allowed"  # the key was not known yet
        assert reading.asked_for
        reading = HeldUp(world)
        office.task = await world.task(office.bot, by=office.maria, scope=READ)
        assert (await office.final(await office.ask(READ))).outcome == "allowed"  # the task was not known yet
        assert reading.asked_for


async def test_a_view_that_nobody_confirms_denies(world: World):
    async with world.running("policy", grace_s=1.5):
        async with world.running("registry"):
            office = await PolicyBench.open(world)
            assert (await office.final(await office.ask(READ))).outcome == "allowed"
        async with asyncio.timeout(WITHIN_S):
            while (decision := await office.final(await office.ask(READ))).outcome == "allowed":
                pass  # the registry is gone, and its last word not yet too old
        assert codes(decision) == {"stale_view"}
        ready = await world.get("policy", "/readyz")
        assert ready.status_code == 200, "it answers, and says that it denies"
        (why,) = ready.json()["denies"]
        assert "was last confirmed by the registry" in why


# --- whatever else stands on the topics ---


@pytest.mark.parametrize("topic", [CREDENTIAL_REQUEST, APPROVAL_RESPONSE], ids=lambda topic: topic.what)
async def test_garbage_is_dead_lettered_and_the_service_goes_on(world: World, topic: Any):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        claims, _ = office.request(READ)
        wrong_type = sign(world.claims(AgentSuspend, office.bot, agent_id="x", reason="y"), office.bot.key)
        stranger = world.party("agent", "deploy-bot")
        garbage: dict[str | bytes, str] = {
            "": "not_a_jws",
            b"\xff\xfe\x00": "not_a_jws",
            '{"scope": []}': "not_a_jws",
            "a.b.c": "not_a_jws",
            wrong_type: "typ_unexpected",
            "x" * 200_000: "too_large",
        }
        if topic is CREDENTIAL_REQUEST:
            flat = claims.reply_key.model_copy(update={"x": "A" * 43})  # of low order
            garbage |= {
                sign(claims, stranger.key): "key_unknown",
                sign(claims.model_copy(update={"aud": "elsewhere"}), office.bot.key): "aud_unexpected",
                sign(claims.model_copy(update={"iss": office.maria.id}), office.maria.key): "key_unknown",
                sign(claims.model_copy(update={"reply_key": flat}), office.bot.key): "reply_key_invalid",
                sign(claims.model_copy(update={"scope": ()}), office.bot.key): "claims_invalid",
            }
        for value, code in garbage.items():
            sent = await office.send(topic, value)
            assert (await office.letter(sent)).code == code
        if topic is CREDENTIAL_REQUEST:
            sent = await office.send(topic, sign(claims, office.bot.key), key="other-bot")
            assert (await office.letter(sent)).code == "key_unexpected"
        assert (await office.final(await office.ask(READ))).outcome == "allowed"


async def test_a_decision_that_policy_did_not_sign_is_not_believed(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        claims, key = office.request(READ)
        jws = sign(claims, office.bot.key)
        forged = world.claims(
            CredentialDecision,
            Party("registry", world.key("registry")),
            request_id=message_id(claims.iss, claims.jti),
            request=jws,
            source=Coordinates(topic="t", partition=0, offset=10**6, appended_at_ms=1),
            outcome="denied",
            delivery="agent",
        )
        await office.send(CREDENTIAL_DECISION, sign(forged, world.key("registry")))
        await office.send(CREDENTIAL_DECISION, b"\x00garbage")
        asked = Asked(claims, jws, await office.send(CREDENTIAL_REQUEST, jws), key)
        assert (await office.final(asked)).outcome == "allowed"
