"""What waits for people: which of their answers count, who sees it, and how it ends when nobody answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pytest

from ringfence.kernel.base.clock import MAX_SKEW_MS
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import sign, sign_payload
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.registry import AgentSuspend, AgentTransfer, TaskEnd, UserDisable
from ringfence.messages.topics import APPROVAL_RESPONSE, CREDENTIAL_DECISION, CREDENTIAL_REQUEST
from ringfence.policy.settings import PolicySettings
from tests.support.benches.policy_bench import DEPLOY, EVERYTHING, READ, Asked, PolicyBench, codes
from tests.support.world import Party, World, scope

# --- answers that do not count ---


async def test_approvals_that_do_not_count_are_refused_and_the_request_goes_on_waiting(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
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
        limited = await office.approve(question, office.sam, only_at="night")
        assert await office.refused(limited) == "approval_not_understood"
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
        office = await PolicyBench.open(world)
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
        office = await PolicyBench.open(world)
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
        office = await PolicyBench.open(world)
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


async def test_pending_request_goes_stale_when_its_agent_is_transferred(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        await world.transfer("deploy-bot", "petra")
        # sam is not the sponsor any more; petra is, and approves what was true before.
        assert await office.refused(await office.approve(question, office.sam)) == "not_approver"
        await office.approve(question, office.petra)
        decision = await office.final(asked)
        assert (decision.outcome, codes(decision)) == ("denied", {"approval_stale"})


# --- its end by time ---


async def test_request_without_approvals_expires(world: World):
    own: dict[ServiceRole, Any] = {"policy": PolicySettings(approval_timeout_s=1)}
    async with world.running("registry", "policy", own=own):
        office = await PolicyBench.open(world)
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
        office = await PolicyBench.open(world)
        asked = await office.ask(scope("platform", ["wipe"], ["env/production/web"]))
        question = await office.question(asked, office.sam)
        exp = int(time.time()) + 4
        first = await office.approve(question, office.sam, exp=exp)
        await world.consume_until(CREDENTIAL_DECISION, lambda r: office.opened(r).approvals == (first,))
        await world.until(lambda: time.time() > exp or None, "the end of the first approval")
        second = await office.approve(await office.question(asked, world.operator), world.operator)
        assert codes(await office.final(asked)) == {"approval_expired"}
        assert await office.refused(second) == "approval_expired"


# --- restarts ---


async def test_ambiguous_request_is_denied_and_asks_no_approver(world: World):
    """The last of two names counts here; whoever takes the first would see, and sign, a harmless request."""
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        claims, key = office.request(DEPLOY)
        payload = claims.model_dump_json(exclude_none=True).replace('"scope":', '"scope":[],"scope":', 1)
        jws = sign_payload(CredentialRequest, payload.encode(), office.bot.key)
        asked = Asked(claims, jws, await office.send(CREDENTIAL_REQUEST, jws), key)
        decision = await office.final(asked)
        assert (decision.outcome, codes(decision)) == ("denied", {"ambiguous"})
        await office.reply(asked, "denied")


async def test_request_too_long_for_people_is_denied_instead_of_asked(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        resources = [f"env/staging/{'x' * 400}/{number}" for number in range(60)]
        asked = await office.ask(scope("platform", ["deploy"], resources))
        decision = await office.final(asked)
        assert (decision.outcome, codes(decision)) == ("denied", {"too_large"})
        # What no person has to read may be as long.
        asked = await office.ask(scope("platform", ["read"], resources))
        assert (await office.final(asked)).outcome == "allowed"


async def test_pending_request_ends_with_its_agent_or_task(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        other = await world.agent("other-bot", sponsor=office.sam, ceiling=EVERYTHING)
        theirs = await world.task(other, by=office.maria, scope=EVERYTHING)
        claims, key = office.request(DEPLOY, by=other, task_id=theirs)
        jws = sign(claims, other.key)
        unconcerned = Asked(claims, jws, await office.send(CREDENTIAL_REQUEST, jws, key=other.name), key)
        before, asked = office.task, await office.ask(DEPLOY)
        question = await office.question(asked, office.sam)
        await world.accepted(world.claims(TaskEnd, office.maria, task_id=before, reason="done"), office.maria)
        decision = await office.final(asked)
        assert (decision.outcome, codes(decision), decision.approvals) == ("denied", {"task_ended"}, ())
        await office.reply(asked, "denied")
        late = await office.approve(question, office.sam)
        assert await office.refused(late) == "already_decided"

        office.task = await world.task(office.bot, by=office.maria, scope=EVERYTHING)
        asked = await office.ask(DEPLOY)
        await office.question(asked, office.sam)
        suspend = world.claims(AgentSuspend, office.sam, agent_id="deploy-bot", reason="odd")
        await world.accepted(suspend, office.sam)
        assert codes(await office.final(asked)) == {"agent_suspended"}
        # Nobody was left to find it out, and nobody else was disturbed.
        answer = await office.question(unconcerned, office.sam)
        await world.send(APPROVAL_RESPONSE, other.name, office.approval(answer, office.sam))
        assert (await office.final(unconcerned)).outcome == "allowed"


async def test_agent_suspended_while_policy_was_down_has_its_request_denied(world: World):
    async with world.running("registry"):
        async with world.running("policy"):
            office = await PolicyBench.open(world)
            asked = await office.ask(DEPLOY)
            await office.question(asked, office.sam)
        suspend = world.claims(AgentSuspend, office.sam, agent_id="deploy-bot", reason="odd")
        await world.accepted(suspend, office.sam)
        async with world.running("policy"):
            assert codes(await office.final(asked)) == {"agent_suspended"}
            await office.reply(asked, "denied")


async def test_a_restarted_policy_knows_what_waits(world: World):
    async with world.running("registry"):
        async with world.running("policy"):
            office = await PolicyBench.open(world)
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


async def test_an_approval_that_waited_for_a_restart_is_taken_in(world: World):
    async with world.running("registry"):
        async with world.running("policy"):
            office = await PolicyBench.open(world)
            asked = await office.ask(DEPLOY)
            question = await office.question(asked, office.sam)
        await office.approve(question, office.sam)
        async with world.running("policy"):
            assert (await office.final(asked)).outcome == "allowed"


# --- who sees it, and how much of it there may be ---


async def test_pending_approval_is_visible_to_its_people_only(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
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

        question = await office.question(asked, office.sam)
        same = ("request_id", "request", "ttl_s", "delivery", "revisions", "required", "expires_at")
        said = question.model_dump(mode="json", exclude_none=True)
        assert {name: view[name] for name in same} == {name: said[name] for name in same}
        await office.approve(question, office.sam)
        await office.final(asked)
        assert (await world.get("policy", path, office.sam)).status_code == 404
        decided = (await world.get("policy", f"/v1/decisions/{asked.id}", office.sam)).json()
        assert (decided["outcome"], decided["ttl_s"]) == ("allowed", 300)
        assert (await world.get("policy", f"/v1/decisions/{asked.id}", office.petra)).status_code == 404


async def test_agent_at_its_pending_approvals_limit_is_denied_until_an_answer(world: World):
    own: dict[ServiceRole, Any] = {"policy": PolicySettings(agent_pending_approvals=2)}
    async with world.running("registry"):
        async with world.running("policy", own=own):
            office = await PolicyBench.open(world)
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


async def test_flood_of_answers_does_not_delay_decisions(world: World, monkeypatch: pytest.MonkeyPatch):
    """Asking Kafka what was decided takes a tenth of a second: one question is the answer for all that was there."""
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        question = await office.question(await office.ask(DEPLOY), office.sam)
    answers = [office.approval(question, office.bot, request_id=str(uuid.uuid4())) for _ in range(100)]
    for answer in answers:
        await office.send(APPROVAL_RESPONSE, answer)
    sent_ms = time.time_ns() // 1_000_000
    while time.time_ns() // 1_000_000 <= sent_ms + MAX_SKEW_MS:  # clocks may be so far apart
        await asyncio.sleep(0.05)

    caught_up, asked = Follower.caught_up, 0

    async def counted(self: Follower, timeout_s: float) -> bool:
        nonlocal asked
        asked += CREDENTIAL_DECISION in self._topics.values()
        return await caught_up(self, timeout_s)

    monkeypatch.setattr(Follower, "caught_up", counted)
    async with world.running("registry", "policy"):
        for answer in answers:
            assert await office.refused(answer) == "request_unknown"
        assert 0 < asked < 10


async def test_pending_approvals_are_listed_in_pages(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        other = await world.agent("other-bot", sponsor=office.petra, ceiling=EVERYTHING)
        others_task = await world.task(other, by=office.maria, scope=EVERYTHING)
        asked = [await office.ask(DEPLOY) for _ in range(5)]
        claims, key = office.request(DEPLOY, other, task_id=others_task)
        jws = sign(claims, other.key)
        theirs = Asked(claims, jws, await office.send(CREDENTIAL_REQUEST, jws, key=other.name), key)
        for one in asked:
            await office.question(one, office.sam)
        await office.question(theirs, office.petra)

        async def page(by: Party, **query: str) -> dict[str, Any]:
            answer = await world.get("policy", "/v1/approvals", by, **query)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        whole = (await page(world.operator))["approvals"]
        assert {one["request_id"] for one in whole} == {one.id for one in (*asked, theirs)}
        seen: list[dict[str, Any]] = []
        after: dict[str, str] = {}
        for size in (2, 2, 2):
            found = await page(world.operator, limit="2", **after)
            assert found["counts"] == {"mine": 0, "others": 6}
            assert len(found["approvals"]) == size
            seen += found["approvals"]
            after = {"after": found["after"]} if found["after"] else {}
        assert after == {}
        assert sorted(one["request_id"] for one in seen) == sorted(one["request_id"] for one in whole)
        assert [one["expires_at"] for one in seen] == sorted(one["expires_at"] for one in seen)

        mine = await page(office.sam, limit="100", show="mine")
        assert {one["request_id"] for one in mine["approvals"]} == {one.id for one in asked}
        assert mine["counts"] == {"mine": 5, "others": 0}
        assert (await page(office.sam, limit="100", show="others"))["approvals"] == []
        (one,) = (await page(world.operator, limit="9", agent="other-bot"))["approvals"]
        assert one["request_id"] == theirs.id
        assert await page(office.maria, limit="9") == {
            "approvals": [],
            "after": None,
            "counts": {"mine": 0, "others": 0},
        }
        one_row = {"limit": "1"}
        wrongs = (
            {"limit": "x"}, {"limit": "1001"}, one_row | {"show": "x"}, one_row | {"after": "x"},
            one_row | {"after": "7."},
        )  # fmt: skip
        for wrong in wrongs:
            answer = await world.get("policy", "/v1/approvals", office.sam, **wrong)
            assert answer.status_code == 400

        # What the index remembers of records is forgotten with them: the agent has another sponsor now.
        transfer = world.claims(
            AgentTransfer, world.operator, agent_id="deploy-bot", sponsor="petra", without_consent=True
        )
        await world.accepted(transfer, world.operator)
        async with asyncio.timeout(30):
            while (await page(office.sam, limit="9"))["counts"] != {"mine": 0, "others": 0}:
                await asyncio.sleep(0.05)
        # And no page has what nobody can approve any more; by itself it says so.
        assert (await page(office.petra, limit="9", show="mine"))["counts"] == {"mine": 1, "others": 0}
        one = (await world.get("policy", f"/v1/approvals/{asked[0].id}", office.petra)).json()
        assert one["superseded"] is True
        kept = (await world.get("policy", f"/v1/approvals/{theirs.id}", office.petra)).json()
        assert "superseded" not in kept
