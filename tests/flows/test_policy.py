"""Policy on a real broker, with a real registry: requests and approvals in, signed decisions and sealed replies out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaTimeoutError

from ringfence.kernel.ids import digest, message_id
from ringfence.kernel.jws import parse, sign
from ringfence.kernel.kafka import Received, to_json
from ringfence.kernel.seal import ReplyKey, unverified_kid
from ringfence.kernel.topics_admin import partitions_of
from ringfence.kernel.trace import trace_id
from ringfence.messages.approval import Approval, ApprovalRequest
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest, ReplyContent
from ringfence.messages.operations import DeadLetter
from ringfence.messages.registry import (
    AgentSuspend,
    AgentTransfer,
    BackendSettings,
    UserDisable,
    VerbFloor,
)
from ringfence.messages.topics import (
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    SERVICE_EVENT,
)
from ringfence.messages.trust import ServiceRole
from ringfence.policy.settings import PolicySettings
from tests.world import WITHIN_S, Party, Scope, World, scope

READ = scope("platform", ["read"], ["env/staging/web"])
DEPLOY = scope("platform", ["deploy"], ["env/staging/web"])
EVERYTHING = scope("platform", ["read", "deploy", "drop", "wipe"], ["env/**"])
VERBS = (
    VerbFloor(verb="read"),
    VerbFloor(verb="deploy", floor="sponsor"),
    VerbFloor(verb="drop", floor="second_person"),
    VerbFloor(verb="wipe", floor="operator"),
)


class Loose(CredentialRequest):
    """What somebody could sign who keeps to no schema."""

    ttl_s: Any


@dataclass(frozen=True)
class Asked:
    """A request that was sent, and what only its sender knows."""

    claims: CredentialRequest
    jws: str
    sent: Coordinates
    key: ReplyKey

    @property
    def id(self) -> str:
        return message_id(self.claims.iss, self.claims.jti)


class Office:
    """sam sponsors the agent deploy-bot; maria, who may read all and deploy to staging, gives it tasks."""

    world: World
    sam: Party
    petra: Party
    maria: Party
    bot: Party
    task: str

    @classmethod
    async def open(cls, world: World) -> Office:
        """With the registry running."""
        office = cls()
        office.world = world
        office.sam = await world.user("sam", roles=("sponsor",))
        office.petra = await world.user("petra", roles=("sponsor",))
        office.maria = await world.user("maria", entitlements=EVERYTHING)
        await world.target("platform", verbs=VERBS)
        office.bot = await world.agent("deploy-bot", sponsor=office.sam, ceiling=EVERYTHING)
        office.task = await world.task(office.bot, by=office.maria, scope=EVERYTHING)
        return office

    # --- what agents and people do ---

    def request(
        self, wanted: Scope = READ, by: Party | None = None, **fields: Any
    ) -> tuple[CredentialRequest, ReplyKey]:
        key = ReplyKey()
        given = {
            "task_id": self.task,
            "scope": wanted,
            "ttl_s": 300,
            "reason": "a test",
            "reply_key": key.public,
        }
        return self.world.claims(CredentialRequest, by or self.bot, **{**given, **fields}), key

    async def ask(self, wanted: Scope = READ, by: Party | None = None, **fields: Any) -> Asked:
        claims, key = self.request(wanted, by, **fields)
        jws = sign(claims, (by or self.bot).key)
        return Asked(claims, jws, await self.send(CREDENTIAL_REQUEST, jws), key)

    async def send(self, topic: Any, value: str | bytes, key: str | None = None) -> Coordinates:
        return await self.world.send(topic, key or self.bot.name, value)

    def approval(self, asked: ApprovalRequest, by: Party, **fields: Any) -> str:
        given = {
            "verdict": "approved",
            "request": asked.request,
            "request_id": asked.request_id,
            "request_digest": digest(asked.request),
            "ttl_s": asked.ttl_s,
            "delivery": asked.delivery,
            "revisions": asked.revisions,
        }
        return sign(self.world.claims(Approval, by, **{**given, **fields}), by.key)

    async def approve(self, asked: ApprovalRequest, by: Party, **fields: Any) -> str:
        jws = self.approval(asked, by, **fields)
        await self.send(APPROVAL_RESPONSE, jws)
        return jws

    # --- what comes of it ---

    async def decision(self, request: Asked | str, *outcomes: str) -> CredentialDecision:
        """The first decision on a request, of the outcomes if they are given."""
        id = request if isinstance(request, str) else request.id

        def fits(record: Received) -> bool:
            found = self.opened(record)
            return found.request_id == id and (not outcomes or found.outcome in outcomes)

        return self.opened(await self.world.consume_until(CREDENTIAL_DECISION, fits))

    async def final(self, request: Asked | str) -> CredentialDecision:
        return await self.decision(request, "allowed", "denied")

    def opened(self, record: Received) -> CredentialDecision:
        return self.world.opened(record, CredentialDecision, "policy")

    async def outcomes(self, request: Asked) -> Counter[str]:
        """How often which outcome stands on the topic by now."""
        # A request that came after it is decided after it: then nothing more of it is under way.
        await self.final(await self.ask(READ))
        decisions = map(self.opened, await self.world.records(CREDENTIAL_DECISION))
        return Counter(d.outcome for d in decisions if d.request_id == request.id)

    async def records_read(self) -> None:
        """Return when policy has read all records that there are: it does that before it denies something."""
        decision = await self.final(await self.ask(scope("platform", ["read"], ["elsewhere"])))
        assert "beyond_scope" in codes(decision)

    async def question(self, request: Asked, to: Party) -> ApprovalRequest:
        """What a person was asked."""

        def fits(record: Received) -> bool:
            return record.key == to.name and _json(record)["request_id"] == request.id

        record = await self.world.consume_until(APPROVAL_REQUEST, fits)
        return ApprovalRequest.model_validate_json(record.value)

    async def reply(self, request: Asked, outcome: str) -> ReplyContent:
        """The sealed reply that tells the agent of a decision with this outcome."""

        def content(record: Received) -> ReplyContent | None:
            if unverified_kid(record.value) != request.id:
                return None
            return ReplyContent.model_validate_json(request.key.open(record.value))

        def fits(record: Received) -> bool:
            found = content(record)
            return found is not None and _claims(found.decision)["outcome"] == outcome

        found = content(await self.world.consume_until(CREDENTIAL_REPLY, fits))
        assert found is not None
        return found

    async def letter(self, sent: Coordinates) -> DeadLetter:
        """The dead letter about a record."""

        def fits(record: Received) -> bool:
            source = DeadLetter.model_validate_json(record.value).source
            return (source.topic, source.partition, source.offset) == (
                sent.topic,
                sent.partition,
                sent.offset,
            )

        return DeadLetter.model_validate_json((await self.world.consume_until(DEAD_LETTER, fits)).value)

    async def refused(self, jws: str) -> str:
        """Why an approval was refused: the code of the event about it."""
        jti = _claims(jws)["jti"]
        event = await self.world.event_where(lambda e: e.kind == "refused" and e.ref == jti)
        assert event.subject == "approval"
        assert event.actor == _claims(jws)["iss"]
        return event.reasons[0].code


def _claims(jws: str) -> dict[str, Any]:
    return dict(orjson.loads(parse(jws).payload))


def _json(record: Received) -> dict[str, Any]:
    return dict(orjson.loads(record.value))


def codes(decision: CredentialDecision) -> set[str]:
    return {reason.code for reason in decision.reasons}


# --- the straight way ---


async def test_reading_staging_needs_nobody(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
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
        office = await Office.open(world)
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
        office = await Office.open(world)
        claims, _ = office.request(DEPLOY)
        parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        acknowledged = await world.publisher.send(
            CREDENTIAL_REQUEST,
            office.bot.name,
            sign(claims, office.bot.key),
            id="x",
            type="t",
            traceparent=parent,
        )
        await acknowledged
        id = message_id(claims.iss, claims.jti)
        about = lambda r: office.opened(r).request_id == id  # noqa: E731
        record = await world.consume_until(CREDENTIAL_DECISION, about)
        asked = await world.consume_until(APPROVAL_REQUEST, lambda r: _json(r)["request_id"] == id)
        await office.approve(ApprovalRequest.model_validate_json(asked.value), office.sam)
        last = await world.consume_until(
            CREDENTIAL_DECISION, lambda r: about(r) and office.opened(r).outcome == "allowed"
        )
        for seen in (record, asked, last):
            assert trace_id(seen.traceparent) == trace_id(parent)


async def test_whom_policy_asks_beyond_the_sponsor(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
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
        office = await Office.open(world)
        nina = await world.user("nina", entitlements=READ)
        office.task = await world.task(office.bot, by=nina, scope=EVERYTHING)
        asked = await office.ask(READ + DEPLOY)
        decision = await office.final(asked)
        assert decision.outcome == "denied"
        assert decision.ttl_s is None
        lacks = [(r.side, r.permission) for r in decision.reasons if r.code == "beyond_scope"]
        assert lacks == [("entitlements:nina", DEPLOY[0])]
        content = await office.reply(asked, "denied")
        assert _claims(content.decision)["jti"] == decision.jti


async def test_requests_after_suspension_of_another_agents_task_and_of_a_disabled_user(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        other = await world.agent("other-bot", sponsor=office.petra, ceiling=EVERYTHING)
        claims, _ = office.request(READ, by=other)
        await office.send(CREDENTIAL_REQUEST, sign(claims, other.key), key="other-bot")
        decision = await office.final(message_id(claims.iss, claims.jti))
        assert "task_other_agent" in codes(decision)

        suspend = world.claims(AgentSuspend, office.sam, agent_id="deploy-bot", reason="odd")
        await world.accepted(suspend, office.sam)
        await office.records_read()
        assert "agent_suspended" in codes(await office.final(await office.ask(READ)))

        disable = world.claims(UserDisable, world.operator, user_id="maria", reason="left")
        await world.accepted(disable, world.operator)
        found = codes(await office.final(await office.ask(READ)))
        assert {"agent_suspended", "user_disabled"} <= found  # all reasons, not the first


async def test_lives_of_nothing_and_of_for_ever(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        for ttl_s in (0, -1, 10**9, "300", 1.5, True):
            claims, _ = office.request(READ)
            forged = Loose(**{**claims.model_dump(), "ttl_s": ttl_s})
            sent = await office.send(CREDENTIAL_REQUEST, sign(forged, office.bot.key))
            assert (await office.letter(sent)).code == "claims_invalid"
        decision = await office.final(await office.ask(READ, ttl_s=86_400))
        assert (decision.outcome, codes(decision)) == ("denied", {"ttl_too_long"})


async def test_a_life_is_shortened_to_what_target_and_task_leave(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        await world.target("brief", max_ttl_s=60)
        wanted = scope("brief", ["read"], ["env/staging/web"])
        lena = await world.user("lena", entitlements=wanted)
        bot = office.bot = await world.agent("brief-bot", sponsor=office.sam, ceiling=wanted)
        office.task = await world.task(bot, by=lena, scope=wanted)
        decision = await office.final(await office.ask(wanted))
        assert (decision.outcome, decision.ttl_s, codes(decision)) == ("allowed", 60, {"ttl_shortened"})
        office.task = await world.task(bot, by=lena, scope=wanted, life_s=30)
        decision = await office.final(await office.ask(wanted))
        assert decision.outcome == "allowed"
        assert decision.ttl_s is not None
        assert decision.ttl_s <= 30


async def test_a_request_that_came_too_late_is_answered(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        now = int(time.time())
        asked = await office.ask(READ, iat=now - 60, exp=now - 1)
        assert codes(await office.final(asked)) == {"expired"}
        await office.reply(asked, "denied")
        # So late that it may have been decided and forgotten: no second answer then.
        claims, _ = office.request(READ, iat=now - 7200, exp=now - 3600)
        sent = await office.send(CREDENTIAL_REQUEST, sign(claims, office.bot.key))
        assert (await office.letter(sent)).code == "expired"


async def test_nobody_is_refused_for_what_policy_has_not_read_yet(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        reading = HeldUp(world)
        office.bot = await world.agent("new-bot", sponsor=office.sam, ceiling=READ)
        office.task = await world.task(office.bot, by=office.maria, scope=READ)
        assert (await office.final(await office.ask(READ))).outcome == "allowed"  # the key was not known yet
        assert reading.asked_for
        reading = HeldUp(world)
        office.task = await world.task(office.bot, by=office.maria, scope=READ)
        assert (await office.final(await office.ask(READ))).outcome == "allowed"  # the task was not known yet
        assert reading.asked_for


class HeldUp:
    """Policy's reading of the records stands still until policy itself asks to be caught up."""

    def __init__(self, world: World) -> None:
        runtime = world.runtimes["policy"]
        follower = runtime._table_follower
        assert follower is not None
        consumer = follower._consumer
        assert consumer is not None
        consumer.pause(*consumer.assignment())
        self.asked_for = False
        catch_up = runtime.tables_caught_up

        async def resume_and_catch_up(timeout_s: float) -> bool:
            self.asked_for = True
            consumer.resume(*consumer.assignment())
            return await catch_up(timeout_s)

        runtime.tables_caught_up = resume_and_catch_up  # type: ignore[method-assign]


# --- refused: approvals that do not count ---


async def test_approvals_that_do_not_count_are_refused_and_the_request_goes_on_waiting(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        other = await office.question(await office.ask(DEPLOY), office.sam)

        # By somebody else, by the agent itself, by a user who was disabled.
        assert await office.refused(await office.approve(question, office.petra)) == "not_approver"
        assert await office.refused(await office.approve(question, office.bot)) == "not_a_person"
        disable = world.claims(UserDisable, world.operator, user_id="petra", reason="left")
        await world.accepted(disable, world.operator)
        assert await office.refused(await office.approve(question, office.petra)) == "not_approver"

        # For another digest, another request under this id, other terms, other revisions than were shown.
        wrong = await office.approve(question, office.sam, request_digest=digest("something else"))
        assert await office.refused(wrong) == "approval_other_request"
        swapped = await office.approve(other, office.sam, request_id=question.request_id)
        assert await office.refused(swapped) == "approval_other_request"
        assert (
            await office.refused(await office.approve(question, office.sam, ttl_s=3600))
            == "approval_other_terms"
        )
        invented = question.revisions.model_copy(update={"task": 7})
        assert (
            await office.refused(await office.approve(question, office.sam, revisions=invented))
            == "approval_stale"
        )

        no = await office.approve(other, office.sam, request_id=question.request_id, verdict="denied")
        assert await office.refused(no) == "approval_other_request"
        astray = office.approval(question, office.sam)
        await office.send(APPROVAL_RESPONSE, astray, key="other-bot")
        assert await office.refused(astray) == "key_unexpected"
        elsewhere, own = office.approval(question, office.sam), question.source.partition
        await world.send(APPROVAL_RESPONSE, office.bot.name, elsewhere, partition=1 - own)
        assert await office.refused(elsewhere) == "partition_unexpected"

        # Too old, and of a request that nobody knows.
        past = int(time.time()) - 10
        assert (
            await office.refused(await office.approve(question, office.sam, iat=past - 60, exp=past))
            == "expired"
        )
        nowhere = await office.approve(question, office.sam, request_id=str(uuid.uuid4()))
        assert await office.refused(nowhere) == "request_unknown"

        assert await office.outcomes(asked) == {"approval_required": 1}
        await office.approve(question, office.sam)
        assert (await office.final(asked)).outcome == "allowed"


async def test_a_forged_signature_approves_nothing_and_is_dead_lettered(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        impostor = world.party("user", "sam")
        sent = await office.send(APPROVAL_RESPONSE, office.approval(question, impostor))
        assert (await office.letter(sent)).code == "key_unknown"
        head, body, _ = office.approval(question, office.sam).split(".")
        tail = office.approval(question, office.sam).split(".")[2]
        sent = await office.send(APPROVAL_RESPONSE, f"{head}.{body}.{tail}")
        assert (await office.letter(sent)).code == "signature_invalid"
        assert await office.outcomes(asked) == {"approval_required": 1}


async def test_an_approval_counts_once(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        asked = await office.ask(scope("platform", ["wipe"], ["env/production/web"]))
        question = await office.question(asked, office.sam)
        approval = await office.approve(question, office.sam)
        await office.send(APPROVAL_RESPONSE, approval)  # the same, replayed
        assert await office.refused(approval) == "approval_replayed"
        again = await office.approve(question, office.sam)  # the same person once more
        assert await office.refused(again) == "approved_already"
        assert await office.outcomes(asked) == {"approval_required": 2}
        await office.approve(await office.question(asked, world.operator), world.operator)
        assert (await office.final(asked)).outcome == "allowed"
        late = await office.approve(question, office.sam)
        assert await office.refused(late) == "already_decided"


async def test_a_person_says_no(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        nobodys = await office.approve(question, office.petra, verdict="denied")
        assert await office.refused(nobodys) == "not_approver"
        no = await office.approve(question, office.sam, verdict="denied", comment="not on a Friday")
        decision = await office.final(asked)
        assert (decision.outcome, codes(decision), decision.approvals) == (
            "denied",
            {"approval_denied"},
            (no,),
        )
        assert "not on a Friday" in decision.reasons[0].message
        await office.reply(asked, "denied")
        yes = await office.approve(question, office.sam)
        assert await office.refused(yes) == "already_decided"


async def test_what_changed_while_it_waited_is_asked_anew(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        transfer = world.claims(AgentTransfer, office.sam, agent_id="deploy-bot", sponsor="petra")
        await world.accepted(transfer, office.sam)
        # sam is not the sponsor any more; petra is, and approves what was true before.
        assert await office.refused(await office.approve(question, office.sam)) == "not_approver"
        await office.approve(question, office.petra)
        decision = await office.final(asked)
        assert (decision.outcome, codes(decision)) == ("denied", {"approval_stale"})


# --- once, and only once ---


async def test_a_replay_elsewhere_changes_nothing_and_is_told(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
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


async def test_a_restarted_policy_knows_what_waits(world: World):
    async with world.running("registry"):
        async with world.running("policy"):
            office = await Office.open(world)
            asked = await office.ask(scope("platform", ["wipe"], ["env/production/web"]))
            question = await office.question(asked, office.sam)
            given = await office.approve(question, office.sam)
            await world.consume_until(CREDENTIAL_DECISION, lambda r: office.opened(r).approvals == (given,))
        async with world.running("policy"):
            shown = (await world.get("policy", "/v1/approvals", world.operator)).json()["approvals"]
            assert [view["request_id"] for view in shown] == [asked.id]
            await office.approve(question, world.operator)
            decision = await office.final(asked)
            assert (decision.outcome, len(decision.approvals)) == ("allowed", 2)
            assert await office.outcomes(asked) == {"approval_required": 2, "allowed": 1}


async def test_who_asks_too_often_is_refused_and_told_when_to_ask_again(world: World):
    own: dict[ServiceRole, Any] = {"policy": PolicySettings(agent_requests_per_minute=2)}
    async with world.running("registry", "policy", own=own):
        office = await Office.open(world)
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
            _claims((await office.reply(asked, "denied")).decision)["retry_after_s"] == decision.retry_after_s
        )
        claims, _ = office.request(READ, other, task_id=task)
        await office.send(CREDENTIAL_REQUEST, sign(claims, other.key), key=other.name)
        assert (await office.final(message_id(claims.iss, claims.jti))).outcome == "allowed"


async def test_who_has_too_much_wait_for_people_is_refused_until_something_is_answered(world: World):
    own: dict[ServiceRole, Any] = {"policy": PolicySettings(agent_pending_approvals=2)}
    async with world.running("registry"):
        async with world.running("policy", own=own):
            office = await Office.open(world)
            asked = [await office.ask(DEPLOY) for _ in range(4)]
            outcomes = [(await office.decision(one)).outcome for one in asked]
            assert outcomes == ["approval_required"] * 2 + ["denied"] * 2
            denied = await office.final(asked[2])
            assert (codes(denied), denied.retry_after_s) == ({"approvals_pending_limit"}, 60)
            await office.reply(asked[2], "denied")
            assert (await office.final(await office.ask(READ))).outcome == "allowed"  # needs nobody
        async with world.running("policy", own=own):
            assert codes(await office.final(await office.ask(DEPLOY))) == {"approvals_pending_limit"}
            await office.approve(await office.question(asked[0], office.sam), office.sam)
            await office.final(asked[0])
            assert (await office.decision(await office.ask(DEPLOY))).outcome == "approval_required"


async def test_an_approval_that_waited_for_a_restart_is_taken_in(world: World):
    async with world.running("registry"):
        async with world.running("policy"):
            office = await Office.open(world)
            asked = await office.ask(DEPLOY)
            question = await office.question(asked, office.sam)
        await office.approve(question, office.sam)
        async with world.running("policy"):
            assert (await office.final(asked)).outcome == "allowed"


async def test_what_comes_again_after_a_crash_is_finished_and_not_decided_again(world: World):
    async with world.running("registry"):
        async with world.running("policy"):
            office = await Office.open(world)
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
                e for e in events if e.kind in ("replayed", "refused") and e.ref == _claims(approval)["jti"]
            ]
            assert not [e for e in events if e.kind == "replayed"]


async def test_a_decision_whose_acknowledgement_was_lost_is_not_made_again(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
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


async def ids_of(world: World, topic: Any) -> Counter[str]:
    """The event ids on a topic, and how often each stands there."""
    return Counter(record.headers["ce_id"] for record in await world.records(topic))


async def rewind(world: World, group: str, *topics: Any) -> None:
    """Make the group of a stopped service begin again at the first record."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=world.bootstrap, group_id=f"{world.prefix}.{group}", enable_auto_commit=False
    )
    await consumer.start()
    try:
        count = partitions_of(CREDENTIAL_REQUEST, world.settings("policy"))
        places = [TopicPartition(topic.name(world.prefix), p) for topic in topics for p in range(count)]
        consumer.assign(places)
        await consumer.commit(dict.fromkeys(places, 0))
    finally:
        await consumer.stop()


async def test_replicas_come_and_go_and_each_request_is_answered_once(world: World):
    own: dict[ServiceRole, Any] = {"policy": PolicySettings(approval_timeout_s=5)}
    async with world.running("registry"):
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            await first.enter_async_context(world.running("policy", own=own))
            office = await Office.open(world)
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


async def test_what_nobody_approves_ends_by_time(world: World):
    own: dict[ServiceRole, Any] = {"policy": PolicySettings(approval_timeout_s=1)}
    async with world.running("registry", "policy", own=own):
        office = await Office.open(world)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        assert question.expires_at <= asked.sent.appended_at_ms // 1000 + 1
        decision = await office.final(asked)
        assert (decision.outcome, codes(decision)) == ("denied", {"approval_expired"})
        await office.reply(asked, "denied")
        late = await office.approve(question, office.sam)
        assert await office.refused(late) == "already_decided"
        assert await office.outcomes(asked) == {"approval_required": 1, "denied": 1}


async def test_an_approval_that_waits_for_others_ends_by_time_too(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        asked = await office.ask(scope("platform", ["wipe"], ["env/production/web"]))
        question = await office.question(asked, office.sam)
        exp = int(time.time()) + 4
        first = await office.approve(question, office.sam, exp=exp)
        await world.consume_until(CREDENTIAL_DECISION, lambda r: office.opened(r).approvals == (first,))
        await world.until(lambda: time.time() > exp or None, "the end of the first approval")
        second = await office.approve(await office.question(asked, world.operator), world.operator)
        assert codes(await office.final(asked)) == {"approval_expired"}
        assert await office.refused(second) == "approval_expired"


async def test_a_view_that_nobody_confirms_denies(world: World):
    async with world.running("policy", grace_s=1.5):
        async with world.running("registry"):
            office = await Office.open(world)
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
        office = await Office.open(world)
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
        office = await Office.open(world)
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


async def test_a_scope_too_long_to_be_told_is_denied_not_stumbled_over(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        many = scope("platform", ["deploy"], [f"other/{'x' * 400}/{number}" for number in range(64)])
        decision = await office.final(await office.ask(many))
        assert "beyond_scope" in codes(decision)


# --- the bundle ---


async def test_a_bundle_that_answers_nonsense_denies(world: World, tmp_path: Path):
    (tmp_path / "d.rego").write_text(
        "package ringfence.issuance\n\n"
        'decision := {"allow": true, "deny": [], "approvals": "sponsor", "max_ttl_s": 60}\n'
    )
    async with world.running("registry", "policy", own={"policy": PolicySettings(bundle=tmp_path)}):
        office = await Office.open(world)
        decision = await office.final(await office.ask(READ))
        assert (decision.outcome, codes(decision)) == ("denied", {"policy_invalid"})


async def test_a_bundle_that_allows_everything_widens_nothing(world: World, tmp_path: Path):
    (tmp_path / "d.rego").write_text(
        "package ringfence.issuance\n\n"
        'decision := {"allow": true, "deny": [], "approvals": [], "max_ttl_s": 86400}\n'
    )
    async with world.running("registry", "policy", own={"policy": PolicySettings(bundle=tmp_path)}):
        office = await Office.open(world)
        beyond = await office.final(await office.ask(scope("platform", ["read"], ["elsewhere"])))
        assert "beyond_scope" in codes(beyond)
        floor = await office.decision(await office.ask(DEPLOY))
        assert (floor.outcome, floor.required) == ("approval_required", ("sponsor",))
        long = await office.final(await office.ask(READ, ttl_s=86_400))
        assert long.ttl_s == 3600  # the target's


# --- HTTP ---


async def test_who_sees_what_waits(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        asked = await office.ask(DEPLOY)
        await office.question(asked, office.sam)
        path = f"/v1/approvals/{asked.id}"
        shown = await world.get("policy", path, office.sam)
        assert shown.status_code == 200
        view = shown.json()
        assert (view["request"], view["you_can_give"], view["agent_id"]) == (
            asked.jws,
            ["sponsor"],
            "deploy-bot",
        )
        seen = (await world.get("policy", path, world.operator)).json()
        assert seen["you_can_give"] == []
        for stranger in (office.petra, office.maria):
            assert (await world.get("policy", path, stranger)).status_code == 404
            assert (await world.get("policy", "/v1/approvals", stranger)).json() == {"approvals": []}
        assert (await world.get("policy", path)).status_code == 401
        assert (await world.get("policy", "/v1/approvals/nothing", office.sam)).status_code == 404

        await office.approve(
            ApprovalRequest.model_validate_json(to_json({**view, "approver": "sam"})), office.sam
        )
        await office.final(asked)
        assert (await world.get("policy", path, office.sam)).status_code == 404
        decided = (await world.get("policy", f"/v1/decisions/{asked.id}", office.sam)).json()
        assert (decided["outcome"], decided["ttl_s"]) == ("allowed", 300)
        assert (await world.get("policy", f"/v1/decisions/{asked.id}", office.petra)).status_code == 404


# --- to whom it goes ---


async def test_what_is_only_for_the_gateway_is_denied_to_the_agent_and_says_what_to_do(world: World):
    async with world.running("registry", "policy"):
        office = await Office.open(world)
        static = BackendSettings.model_validate({"kind": "http", "url": "https://api.example"})
        await world.target("platform", verbs=VERBS, backend=static)
        to_itself = await office.final(await office.ask())
        assert (to_itself.outcome, codes(to_itself)) == ("denied", {"delivery_gateway_only"})
        assert "--delivery gateway" in to_itself.reasons[0].message
        # No two operators are asked for what cannot be: nothing could be handed out.
        by_force = await office.final(await office.ask(break_glass=True))
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
