"""What a sponsor is shown, and what their answer is over. The registry runs; who asks for approvals is played."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from ringfence.client.approvals.history_comparison import PendingApproval
from ringfence.client.approvals.sponsor import APPROVAL_LIFE_S, Sponsor
from ringfence.client.errors import NotYoursError, StaleApprovalError
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import parse, sign, sign_payload, verify
from ringfence.kernel.crypto.keys import SigningKey, public_key
from ringfence.kernel.kafka.record import detach
from ringfence.messages.approval import Approval, ApprovalRequest
from ringfence.messages.credential import CredentialDecision, CredentialRequest, Outcome, Reason, Revisions
from ringfence.messages.registry import AgentSetCeiling
from ringfence.messages.topics import APPROVAL_REQUEST, APPROVAL_RESPONSE, CREDENTIAL_DECISION
from tests.support.benches.sdk_clients import READ, WRITE, client, first, nowhere
from tests.support.world import WITHIN_S, Party, World

POLICY_REVISION = "f" * 64


@dataclass
class Organisation:
    """sam sponsors bot, which has a task for maria; petra is a sponsor too, olga the operator."""

    world: World
    sam: Party
    petra: Party
    maria: Party
    bot: Party
    task: str

    def request(self, by: Party | None = None, **fields: Any) -> CredentialRequest:
        return self.world.claims(
            CredentialRequest,
            by or self.bot,
            **{
                "task_id": self.task, "scope": WRITE, "ttl_s": 300, "reason": "release 41",
                "reply_key": ReplyKey().public, **fields,
            },
        )  # fmt: skip

    async def ask(self, claims: CredentialRequest, compact: str | None = None, **fields: Any) -> str:
        """Ask sam to approve, as policy would; `fields` change what policy would say. The request's id."""
        id = message_id(claims.iss, claims.jti)
        given = {
            "request_id": id,
            "request": compact or sign(claims, self.bot.key),
            "source": nowhere(),
            "approver": "sam",
            "required": ("sponsor",),
            "ttl_s": claims.ttl_s,
            "delivery": "agent",
            "revisions": self.revisions(),
            "expires_at": int(time.time()) + 900,
        }
        await self.world.send(APPROVAL_REQUEST, "sam", self.question(**{**given, **fields}))
        return id

    def question(self, by: SigningKey | None = None, **fields: Any) -> str:
        """A question, signed by policy, or in its name by somebody else."""
        policy, now_s = self.world.key("policy"), int(time.time())
        head = {"iss": policy.id, "aud": self.world.td, "iat": now_s, "jti": str(uuid.uuid4())}
        return sign(ApprovalRequest(**{**head, **fields}), by or policy)

    def revisions(self, **fields: Any) -> Revisions:
        return Revisions(
            **{"agent": 1, "user": 1, "task": 1, "target": 1, "policy": POLICY_REVISION, **fields}
        )

    @asynccontextmanager
    async def sponsor(self, who: Party | None = None) -> AsyncIterator[Sponsor]:
        async with Sponsor.connect((who or self.sam).key, client(self.world)) as connected:
            yield connected


@pytest.fixture
async def org(world: World) -> AsyncIterator[Organisation]:
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",), READ + WRITE)
        petra = await world.user("petra", ("sponsor",))
        maria = await world.user("maria", (), READ + WRITE)
        await world.target("staging")
        bot = await world.agent("bot", sam, READ + WRITE)
        task = await world.task(bot, maria, READ + WRITE)
        yield Organisation(world, sam, petra, maria, bot, task)


async def shown(sponsor: Sponsor, request_id: str, *, everyone: bool = False) -> PendingApproval:
    """Await that the request is shown."""
    async with asyncio.timeout(WITHIN_S):
        async for pending in sponsor.watch(everyone=everyone):
            if pending.request_id == request_id:
                return pending
    raise AssertionError("the watch ended")


async def test_pending_request_shows_what_agent_and_records_say(org: Organisation) -> None:
    claims = org.request(reason="release 41")
    compact = sign(claims, org.bot.key)
    async with org.sponsor() as sam:
        id = await org.ask(claims, compact)
        pending = await first(sam)
    assert (pending.request_id, pending.digest, pending.request) == (id, digest(compact), compact)
    assert (pending.agent, pending.agent_description, pending.sponsor) == ("bot", "made by a test", "sam")
    assert (pending.purpose, pending.on_behalf_of, pending.task_id) == ("made by a test", "maria", org.task)
    assert (pending.target, pending.scope, pending.reason) == ("staging", WRITE, "release 41")
    assert (pending.ttl_s, pending.requested_ttl_s, pending.mine) == (300, 300, ("sponsor",))


async def test_an_approval_is_over_exactly_what_was_shown_and_ends_with_the_question(
    org: Organisation,
) -> None:
    expires_at = int(time.time()) + 120
    async with org.sponsor() as sam:
        await org.ask(org.request(), expires_at=expires_at, ttl_s=200)
        pending = await first(sam)
        approval_id = await sam.approve(pending, comment="fine")
        assert sam.pending() == []
    record = await org.world.consume_until(APPROVAL_RESPONSE, lambda r: True)
    approval = verify(
        parse(record.value), Approval, lambda iss, kid: public_key(org.sam.key.public),
        audience=org.world.td, appended_at_ms=record.appended_at_ms,
    ).claims  # fmt: skip
    assert record.key == "bot"
    assert message_id(approval.iss, approval.jti) == approval_id
    assert (approval.verdict, approval.comment) == ("approved", "fine")
    assert (approval.request, approval.request_digest) == (pending.request, digest(pending.request))
    assert (approval.ttl_s, approval.delivery, approval.revisions) == (200, "agent", org.revisions())
    assert approval.exp == expires_at


async def test_one_approval_of_several_stands_as_long_as_the_question_and_a_single_one_for_minutes(
    org: Organisation,
) -> None:
    ends_at = int(time.time()) + 3000
    async with org.sponsor() as sam:
        single = await org.ask(org.request(), expires_at=ends_at)
        several = await org.ask(org.request(), expires_at=ends_at, required=("sponsor", "operator"))
        for id in (single, several):
            await sam.approve(await shown(sam, id))

    async def approval(id: str) -> Approval:
        record = await org.world.consume_until(
            APPROVAL_RESPONSE, lambda r: parse(r.value).unverified_claims(Approval).request_id == id
        )
        return parse(record.value).unverified_claims(Approval)

    one, other = await approval(single), await approval(several)
    assert (one.exp - one.iat, other.exp) == (APPROVAL_LIFE_S, ends_at)


async def test_a_denial_is_signed_too(org: Organisation) -> None:
    async with org.sponsor() as sam:
        await org.ask(org.request())
        await sam.deny(await first(sam), comment="not on a Friday")
    record = await org.world.consume_until(APPROVAL_RESPONSE, lambda r: True)
    assert parse(record.value).unverified_claims(Approval).verdict == "denied"


FORGED: dict[str, dict[str, Any]] = {
    "signed by a stranger": {"signer": "stranger"},
    "signed by the sponsor": {"signer": "sam"},
    "of an agent that is not there": {"by": "ghost"},
    "of a task that is not there": {"task_id": str(uuid.uuid4())},
    "under another id": {"asked": {"request_id": str(uuid.uuid4())}},
    "for longer than was asked for": {"asked": {"ttl_s": 301}},
    "for another delivery": {"asked": {"delivery": "gateway"}},
    "on revisions that are not there": {"revisions": {"agent": 2}},
    "on a task of another revision": {"revisions": {"task": 7}},
    "that is no request": {"compact": "a.b.c"},
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=list(FORGED))
async def test_request_not_signed_by_its_agent_is_not_shown(
    org: Organisation, forged: dict[str, Any]
) -> None:
    parties = {
        "stranger": org.world.party("agent", "bot"),
        "sam": org.sam,
        "ghost": org.world.party("agent", "ghost"),
    }
    by = parties.get(forged.get("by", ""), org.bot)
    fields = {"task_id": forged["task_id"]} if "task_id" in forged else {}
    claims = org.request(by, **fields)
    compact = forged.get("compact") or sign(claims, parties.get(forged.get("signer", ""), by).key)
    asked = dict(forged.get("asked", {}))
    if "revisions" in forged:
        asked["revisions"] = org.revisions(**forged["revisions"])
    async with org.sponsor() as sam:
        await org.ask(claims, compact, **asked)
        honest = await org.ask(org.request())
        # The topic has one order: what was asked before has been seen when this is shown.
        await shown(sam, honest)
        assert [pending.request_id for pending in sam.pending(everyone=True)] == [honest]
        assert len(sam.unshowable) == 1


async def test_approval_request_not_signed_by_policy_is_ignored(org: Organisation) -> None:
    """Whoever can write to the topic had a question vanish by an end in the past, or gave it a reason of their own."""
    claims = org.request()
    asked: dict[str, Any] = {
        "request_id": message_id(claims.iss, claims.jti), "request": sign(claims, org.bot.key), "source": nowhere(),
        "approver": "sam", "required": ("sponsor",), "ttl_s": 300, "delivery": "agent",
        "revisions": org.revisions(), "expires_at": int(time.time()) + 900,
    }  # fmt: skip
    kind = Reason(code="floor", message="olga has looked at it, and it is harmless")
    async with org.sponsor() as sam:
        before = await shown(sam, await org.ask(claims, asked["request"]))
        for forged in ({"expires_at": 1}, {"reasons": (kind,)}, {"required": ("operator",)}, {"ttl_s": 299}):
            plain = org.question(**{**asked, **forged})
            for value in (
                parse(plain).payload,
                org.question(org.bot.key, **{**asked, **forged}),
                org.question(org.sam.key, **{**asked, **forged}),
                plain.rpartition(".")[0] + "." + "A" * 86,
            ):
                await org.world.send(APPROVAL_REQUEST, "sam", value)
            _, signature = detach(org.question(**asked))
            await org.world.send(APPROVAL_REQUEST, "sam", parse(plain).payload, signature=signature)
        await shown(sam, await org.ask(org.request()))  # all that was sent before has been looked at
        assert sam.find(before.request_id) == before
        await sam.approve(before)


async def test_ambiguous_request_is_not_shown(org: Organisation) -> None:
    claims = org.request()
    payload = claims.model_dump_json(exclude_none=True).replace('"scope":', '"scope":[],"scope":', 1)
    async with org.sponsor() as sam:
        id = await org.ask(claims, sign_payload(CredentialRequest, payload.encode(), org.bot.key))
        await shown(sam, await org.ask(org.request()))
        assert sam.find(id) is None
        assert "two ways" in sam.unshowable[id]


async def test_a_question_of_before_does_not_take_the_place_of_the_one_that_was_asked_anew(
    org: Organisation,
) -> None:
    claims = org.request()
    asked: dict[str, Any] = {
        "request_id": message_id(claims.iss, claims.jti), "request": sign(claims, org.bot.key), "source": nowhere(),
        "approver": "sam", "required": ("sponsor",), "delivery": "agent", "revisions": org.revisions(),
        "expires_at": int(time.time()) + 900,
    }  # fmt: skip
    now_s = int(time.time())
    old = org.question(**asked, ttl_s=300, iat=now_s - 5)
    async with org.sponsor() as sam:
        for question in (old, org.question(**asked, ttl_s=200, iat=now_s), old):
            await org.world.send(APPROVAL_REQUEST, "sam", question)
        await shown(sam, await org.ask(org.request()))
        pending = sam.find(str(asked["request_id"]))
        assert pending is not None
        assert pending.ttl_s == 200


async def test_garbage_among_the_questions_stops_nothing(org: Organisation) -> None:
    async with org.sponsor() as sam:
        for garbage in ("", "{", "[]", '{"request_id": 1}', "\x00"):
            await org.world.send(APPROVAL_REQUEST, "sam", garbage)
            await org.world.send(APPROVAL_RESPONSE, "bot", garbage)
            await org.world.send(CREDENTIAL_DECISION, "bot", garbage)
        await shown(sam, await org.ask(org.request()))


async def test_only_a_decision_that_policy_signed_settles_a_question(org: Organisation) -> None:
    claims = org.request()
    compact = sign(claims, org.bot.key)
    world = org.world

    async def decide(by: SigningKey, outcome: Outcome) -> None:
        decision = CredentialDecision(
            iss=by.id,
            aud=world.td,
            iat=int(time.time()),
            jti=str(uuid.uuid4()),
            request=compact,
            request_id=message_id(claims.iss, claims.jti),
            source=nowhere(),
            outcome=outcome,
            delivery="agent",
        )
        await world.send(CREDENTIAL_DECISION, "bot", sign(decision, by))

    async with org.sponsor() as sam:
        id = await org.ask(claims, compact)
        pending = await shown(sam, id)
        await decide(world.key("issuer"), "denied")
        await decide(org.bot.key, "denied")
        await decide(world.key("policy"), "approval_required")
        another = await org.ask(org.request())
        await shown(sam, another)
        assert {p.request_id for p in sam.pending()} == {id, another}
        await decide(world.key("policy"), "denied")
        async with asyncio.timeout(WITHIN_S):
            while id in {p.request_id for p in sam.pending()}:
                await asyncio.sleep(0.02)
        with pytest.raises(StaleApprovalError, match="no longer open"):
            await sam.approve(pending)
    async with org.sponsor() as sam:
        assert [p.request_id for p in sam.pending()] == [another]


async def test_answered_request_is_not_shown_after_a_restart(org: Organisation) -> None:
    async with org.sponsor() as sam:
        first_id, second_id = await org.ask(org.request()), await org.ask(org.request())
        await shown(sam, second_id)
        await sam.approve(next(p for p in sam.pending() if p.request_id == first_id))
    async with org.sponsor() as sam:
        assert [p.request_id for p in sam.pending()] == [second_id]


async def test_answer_of_another_approver_does_not_hide_the_question(org: Organisation) -> None:
    async with org.sponsor() as sam, org.sponsor(org.petra) as petra:
        id = await org.ask(org.request(), required=("sponsor", "second_person"))
        await shown(sam, id)
        await petra.approve(await shown(petra, id))
    async with org.sponsor() as sam:
        assert [p.request_id for p in sam.pending()] == [id]


async def test_a_question_is_shown_to_those_who_can_answer_it(org: Organisation) -> None:
    id = await org.ask(org.request(), required=("second_person", "operator"))
    for who, mine in (
        (org.sam, ()),  # was asked: sees it, and may pass it on
        (org.petra, ("second_person",)),
        (org.world.operator, ("operator",)),
    ):
        async with org.sponsor(who) as sponsor:
            assert [(p.request_id, p.mine) for p in sponsor.pending()] == [(id, mine)]
    async with org.sponsor(org.maria) as maria:
        assert maria.pending() == []
        assert [(p.request_id, p.mine) for p in maria.pending(everyone=True)] == [(id, ())]


async def test_each_of_several_people_who_were_asked_sees_the_question(org: Organisation) -> None:
    claims = org.request()
    ids = {
        await org.ask(claims, approver=approver, required=("operator",))
        for approver in ("sam", "maria", "petra")
    }
    assert len(ids) == 1, "one request"
    for who in (org.sam, org.maria, org.petra):
        async with org.sponsor(who) as sponsor:
            assert {p.request_id for p in sponsor.pending()} == ids


async def test_request_for_other_approvers_is_not_signed(org: Organisation) -> None:
    id = await org.ask(org.request(), required=("operator",))
    for who in (org.sam, org.petra, org.maria):
        async with org.sponsor(who) as sponsor:
            pending = await shown(sponsor, id, everyone=True)
            for answer in (sponsor.approve, sponsor.deny):
                with pytest.raises(
                    NotYoursError, match=rf"needs an operator \(.*\), and {who.name} can give nothing"
                ):
                    await answer(pending)
    assert list(await org.world.records(APPROVAL_RESPONSE)) == []


async def test_a_change_after_the_look_makes_the_answer_stale(org: Organisation) -> None:
    async with org.sponsor() as sam:
        pending = await shown(sam, await org.ask(org.request()))
        directory = await sam.connection.directory()
        command = org.world.claims(AgentSetCeiling, org.sam, agent_id="bot", ceiling=READ)
        await org.world.accepted(command, org.sam)
        async with asyncio.timeout(WITHIN_S):
            while (entry := directory.agent("bot")) is None or entry.revision == 1:
                await asyncio.sleep(0.02)
        with pytest.raises(StaleApprovalError, match="changed since"):
            await sam.approve(pending)
        assert list(await org.world.records(APPROVAL_RESPONSE)) == []


async def test_a_question_past_its_time_is_not_shown(org: Organisation) -> None:
    async with org.sponsor() as sam:
        expired = await org.ask(org.request(), expires_at=int(time.time()) - 1)
        honest = await org.ask(org.request())
        await shown(sam, honest)
        assert [p.request_id for p in sam.pending(everyone=True)] == [honest]
        assert expired != honest


async def test_a_watch_shows_each_once_and_the_open_ones_first(org: Organisation) -> None:
    before = await org.ask(org.request())
    async with org.sponsor() as sam:
        seen: list[str] = []

        async def watch() -> None:
            async for pending in sam.watch():
                seen.append(pending.request_id)  # noqa: PERF401 - what came so far is looked at while it goes on

        watching = asyncio.create_task(watch())
        claims = org.request()
        after = await org.ask(claims)
        await shown(sam, after)
        await org.ask(claims)  # at least once
        last = await org.ask(org.request())
        await shown(sam, last)
        async with asyncio.timeout(WITHIN_S):
            while last not in seen:
                await asyncio.sleep(0.02)
        watching.cancel()
    assert seen == [before, after, last]


async def test_a_request_is_found_by_how_its_id_begins(org: Organisation) -> None:
    async with org.sponsor() as sam:
        id = await org.ask(org.request())
        await shown(sam, id)
        found = sam.find(id[:8])
        assert found is not None
        assert found.request_id == id
        assert sam.find("zz") is None
        assert sam.find("") is None  # as a script hands over whose variable was never set
        assert sam.find_action("") is None


# --- against fatigue ---


async def approvals(org: Organisation) -> dict[str, str]:
    """The digests that were signed so far, by request; who could be believed is tested elsewhere."""
    records = await org.world.records(APPROVAL_RESPONSE)
    found = [parse(record.value).unverified_claims(Approval) for record in records]
    return {one.request_id: one.request_digest for one in found}


async def test_similar_requests_are_approved_as_a_group_with_each_digest_signed(org: Organisation) -> None:
    async with org.sponsor() as sam:
        same = [await org.ask(org.request(reason=f"build {n}")) for n in range(3)]
        other = await org.ask(org.request(scope=READ))
        await shown(sam, other)
        groups = {group.first.request_id: group for group in sam.groups()}
        assert set(groups) == {same[0], other}
        group = groups[same[0]]
        assert [one.request_id for one in group.requests] == same
        assert group.reasons == ("build 0", "build 1", "build 2")
        late = await org.ask(
            org.request(reason="build 3")
        )  # came after the look: it is not answered with them
        await shown(sam, late)
        ids = await sam.approve_all(group)
        assert len(set(ids)) == 3
        await org.world.consume_until(APPROVAL_RESPONSE, lambda r: same[2].encode() in parse(r.value).payload)
        digests = {one.request_id: one.digest for one in group.requests}
        assert await approvals(org) == digests
        assert len(set(digests.values())) == 3
        assert {one.request_id for one in sam.pending()} == {other, late}


async def test_changed_request_leaves_its_whole_group_unanswered(org: Organisation) -> None:
    async with org.sponsor() as sam, org.sponsor() as sam_elsewhere:
        same = [await org.ask(org.request()) for _ in range(2)]
        await shown(sam, same[1])
        (group,) = sam.groups()
        await sam_elsewhere.deny(await shown(sam_elsewhere, same[1]))
        async with asyncio.timeout(WITHIN_S):
            while len(sam.pending()) > 1:
                await asyncio.sleep(0.01)
        with pytest.raises(StaleApprovalError, match=same[1]):
            await sam.approve_all(group)
        assert set(await approvals(org)) == {same[1]}


async def test_a_request_is_compared_with_what_people_answered_before(org: Organisation) -> None:
    async with org.sponsor() as sam:
        first_id = await org.ask(org.request(scope=WRITE, ttl_s=300))
        pending = await shown(sam, first_id)
        usual = await sam.usual()
        assert [one.code for one in usual.compared(pending).differences] == ["first"]
        await sam.approve(pending)
        # What somebody signed who approves nothing, or forged, is no custom; nor is an agent's own.
        for forger in (org.maria, org.world.party("user", "sam"), org.bot):
            wide = org.request(scope=READ + WRITE, ttl_s=3000)
            compact = sign(wide, org.bot.key)
            claims = org.world.claims(
                Approval, forger, verdict="approved", request=compact, request_digest=digest(compact),
                request_id=message_id(wide.iss, wide.jti), ttl_s=3000, delivery="agent", revisions=org.revisions(),
            )  # fmt: skip
            await org.world.send(APPROVAL_RESPONSE, "bot", sign(claims, forger.key))
        again = await shown(sam, await org.ask(org.request(scope=WRITE)))
        wider = await shown(sam, await org.ask(org.request(scope=READ, ttl_s=900)))
        async with asyncio.timeout(WITHIN_S):
            while usual.compared(again).differences:
                await asyncio.sleep(0.01)
        assert usual.compared(again).approved == 1
        assert [one.code for one in usual.compared(wider).differences] == ["verbs", "ttl"]
    async with org.sponsor() as sam:  # and it is known after a restart
        again = await shown(sam, again.request_id)
        assert (await sam.usual()).compared(again).differences == ()
