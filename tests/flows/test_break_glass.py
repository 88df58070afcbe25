"""Break glass: two operators allow once what the bundle denies, and nothing beyond that.

sam sponsors deploy-bot, maria has its task; olga and otto are operators, uma audits. The bundle denies everything.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.audit.settings import AuditSettings
from ringfence.cli.main import main
from ringfence.client.agent.agent import Agent
from ringfence.client.agent.replies import PendingRequest
from ringfence.client.approvals.grants import review_break_glass, uses_of_break_glass
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.errors import RefusedError
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base import metrics
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import CredentialDecision
from ringfence.messages.lease import Lease
from ringfence.messages.registry import AgentSuspend, TaskEnd, UserDisable, VerbFloor
from ringfence.messages.topics import APPROVAL_RESPONSE, AUDIT, CREDENTIAL_DECISION, LEASE
from ringfence.model.requests.approvals import BREAK_GLASS_TTL_S
from ringfence.policy.settings import PolicySettings
from tests.policy.bundles import write
from tests.support.benches.issuer_bench import IssuerBench
from tests.support.benches.policy_bench import DEPLOY, EVERYTHING, READ, Asked, PolicyBench, codes
from tests.support.ocsf import check_ocsf
from tests.support.user_keys import give_key
from tests.support.world import DAY_S, Party, World, scope

FROZEN = """
decision := {
	"allow": false,
	"deny": [{"code": "frozen", "message": "everything is frozen until 7 January"}],
	"approvals": [],
	"max_ttl_s": 3600,
} if not input.request.reason == "thawed"

decision := {"allow": true, "deny": [], "approvals": [], "max_ttl_s": 3600} if input.request.reason == "thawed"
"""
TWO = ("break_glass", "break_glass")
QUICK = AuditSettings(linger_ms=10)


def own(folder: Path, rules: str = FROZEN, **fields: Any) -> dict[ServiceRole, Any]:
    return {"policy": PolicySettings(bundle=write(folder, rules), **fields), "audit": QUICK}


class Emergency(PolicyBench):
    """See the module."""

    otto: Party
    uma: Party

    @classmethod
    async def open(cls, world: World) -> Emergency:
        found = cls()
        found.__dict__.update((await PolicyBench.open(world)).__dict__)
        found.otto = await world.user("otto", roles=("operator",))
        found.uma = await world.user("uma", roles=("auditor",))
        return found

    @property
    def olga(self) -> Party:
        return self.world.operator

    async def shatter(self, wanted: Any = READ, **fields: Any) -> Asked:
        """Ask by break glass."""
        return await self.ask(wanted, **{"break_glass": True, **fields})

    async def yes(self, asked: Asked, *people: Party) -> list[str]:
        """Their approvals of what olga was asked."""
        question = await self.question(asked, self.olga)
        return [await self.approve(question, by) for by in people]

    async def with_approvals(self, asked: Asked, count: int) -> CredentialDecision:
        """The decision that so many approvals came to."""

        def fits(record: Received) -> bool:
            found = self.opened(record)
            return found.request_id == asked.id and len(found.approvals) == count

        return self.opened(await self.world.consume_until(CREDENTIAL_DECISION, fits))

    async def lease(self, asked: Asked) -> Lease:
        def fits(record: Received) -> bool:
            return self.world.opened(record, Lease, "issuer").request_id == asked.id

        return self.world.opened(await self.world.consume_until(LEASE, fits), Lease, "issuer")

    async def event(self, code: str, request_id: str, count: int = 1) -> dict[str, Any]:
        """The audit event of a kind about a request, the nth of them."""
        found: dict[str, Any] = {}

        def fits(record: Received) -> bool:
            event = json.loads(record.value)
            if event["metadata"]["event_code"] == code and event["unmapped"].get("request") == request_id:
                found[event["metadata"]["uid"]] = event
            return len(found) >= count

        await self.world.consume_until(AUDIT, fits)
        event: dict[str, Any] = list(found.values())[count - 1]
        check_ocsf(event)
        return event


def client(world: World) -> ClientSettings:
    return ClientSettings(
        kafka=world.bootstrap,
        topic_prefix=world.prefix,
        trust_domain=world.td,
        trust_root=world.fingerprint,
        embedded_broker=True,
        policy_url=f"http://127.0.0.1:{world.ports['policy']}",
        audit_url=f"http://127.0.0.1:{world.ports['audit']}",
    )


# --- the straight way ---


async def test_two_operators_allow_once_what_the_bundle_denies(world: World, tmp_path: Path):
    services: tuple[ServiceRole, ...] = ("registry", "policy", "issuer", "audit")
    async with world.running(*services, own=own(tmp_path)):
        office = await Emergency.open(world)
        assert codes(await office.final(await office.ask(READ))) == {"frozen"}

        asked = await office.shatter(ttl_s=3600, reason="the site is down")
        pending = await office.decision(asked)
        assert (pending.outcome, pending.required, pending.ttl_s) == (
            "approval_required", TWO, BREAK_GLASS_TTL_S,
        )  # fmt: skip
        assert [reason.code for reason in pending.reasons] == ["break_glass", "frozen", "ttl_shortened"]
        loud = await office.event("break_glass.asked", asked.id)
        assert (loud["severity"], loud["is_alert"]) == ("Medium", True)
        # Both are asked, and told what it is.
        for operator in (office.olga, office.otto):
            assert (await office.question(asked, operator)).required == TWO

        (first,) = await office.yes(asked, office.olga)
        waiting = await office.with_approvals(asked, 1)
        assert (waiting.outcome, waiting.required) == ("approval_required", TWO)
        (second,) = await office.yes(asked, office.otto)
        decision = await office.final(asked)
        assert (decision.outcome, decision.ttl_s) == ("allowed", BREAK_GLASS_TTL_S)
        assert set(decision.approvals) == {first, second}
        assert "frozen" in codes(decision)

        lease = await office.lease(asked)
        assert lease.break_glass is True
        assert lease.deadline <= time.time() + BREAK_GLASS_TTL_S
        used = await office.event("break_glass.used", asked.id)
        assert (used["class_uid"], used["activity_name"], used["status"]) == (2004, "Create", "New")
        assert (used["severity"], used["is_alert"]) == ("High", True)
        assert set(used["unmapped"]["approvers"]) == {"olga", "otto"}
        assert "frozen" in used["message"]
        assert "the site is down" in used["message"]
        issued = await office.event("credential.issued", asked.id)
        assert (issued["severity"], issued["is_alert"]) == ("High", True)

        # Once: the next one takes two operators again, and so does a renewal.
        again = await office.shatter()
        assert (await office.decision(again)).outcome == "approval_required"
        late = await office.yes(asked, office.olga)
        assert await office.refused(late[0]) == "already_decided"


async def test_a_key_that_an_operator_lent_an_auditor_reviews_nothing(world: World, tmp_path: Path):
    """olga broke glass, and comes again as uma."""
    async with world.running("registry", "policy", "audit", own=own(tmp_path)):
        office = await Emergency.open(world)
        oscar = await world.user("oscar", roles=("operator",))
        waiting = await give_key(world, office.olga, office.uma)
        beside = await give_key(world, office.olga, office.uma, oscar)
        asked = await office.shatter()
        await office.yes(asked, office.olga, office.otto)
        await office.event("break_glass.used", asked.id)
        settings = client(world)
        for by, why in ((waiting, "counts for approvals only from"), (beside, "rests on the word of olga")):
            with pytest.raises(RefusedError, match=why):
                await review_break_glass(asked.id, "it was right", by.key, settings)
        use = await review_break_glass(asked.id, "it was right", office.uma.key, settings)
        assert use["review"]["by"] == "uma"
        refused = await office.event("break_glass.review_refused", asked.id)
        assert refused["unmapped"]["verified"]["vouched_by"] == ["olga"]


async def test_break_glass_use_is_reviewed_by_an_uninvolved_person(world: World, tmp_path: Path):
    async with world.running("registry", "policy", "audit", own=own(tmp_path)):
        office = await Emergency.open(world)
        both = await world.user("petra-2", roles=("sponsor", "auditor"))
        office.bot = await world.agent("other-bot", sponsor=both, ceiling=EVERYTHING)
        office.task = await world.task(office.bot, by=office.maria, scope=EVERYTHING)
        asked = await office.shatter()
        await office.yes(asked, office.olga, office.otto)
        await office.event("break_glass.used", asked.id)
        settings = client(world)

        async def review(by: Party, note: str = "it was right") -> Any:
            return await review_break_glass(asked.id, note, by.key, settings)

        for by, why in ((office.olga, "approved"), (both, "answers for the agent")):
            with pytest.raises(RefusedError, match=why):
                await review(by)
        (unreviewed,) = await uses_of_break_glass(office.uma.key, settings, unreviewed=True)
        assert unreviewed["request_id"] == asked.id
        assert sorted(unreviewed["approvers"]) == ["olga", "otto"]
        assert [denial["code"] for denial in unreviewed["denials"]] == ["frozen"]
        assert [one["by"] for one in unreviewed["refused_reviews"]] == ["olga", "petra-2"]

        assert metrics.BREAK_GLASS_UNREVIEWED._value.get() == 1
        use = await review(office.uma, "the site was down, and the runbook was followed")
        assert use["review"]["by"] == "uma"
        assert await uses_of_break_glass(office.uma.key, settings, unreviewed=True) == []
        assert metrics.BREAK_GLASS_UNREVIEWED._value.get() == 0
        reviewed = await office.event("break_glass.reviewed", asked.id)
        assert (reviewed["activity_name"], reviewed["status"]) == ("Close", "Resolved")
        refused = await office.event("break_glass.review_refused", asked.id)
        assert (refused["severity"], refused["is_alert"]) == ("Medium", True)
        # Who has no part in any of it sees nothing.
        assert await uses_of_break_glass(office.petra.key, settings) == []


async def test_the_commands(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    services: tuple[ServiceRole, ...] = ("registry", "policy", "issuer", "audit")
    async with world.running(*services, own=own(tmp_path / "bundle")):
        office = await Emergency.open(world)
        settings = client(world)
        seen: list[PendingRequest] = []
        async with (
            Agent.connect(office.bot.key, settings) as agent,
            Sponsor.connect(office.olga.key, settings) as olga,
            Sponsor.connect(office.otto.key, settings) as otto,
        ):

            async def approve(pending: PendingRequest) -> None:
                seen.append(pending)
                for operator in (olga, otto):
                    async for shown in operator.watch():
                        assert shown.break_glass
                        await operator.approve(shown)
                        break

            credential = await agent.request(
                task=office.task, target="platform", verbs=["read"], resources=["env/staging/web"],
                reason="the site is down", break_glass=True, on_pending=approve, timeout_s=60,
            )  # fmt: skip
        assert "two operators" in str(seen[0])
        await office.event("break_glass.used", credential.request_id)

        monkeypatch.setenv("RINGFENCE_TRUST_DOMAIN", world.td)
        monkeypatch.setenv("RINGFENCE_TRUST_ROOT", world.fingerprint)
        monkeypatch.setenv("RINGFENCE_KAFKA", world.bootstrap)
        monkeypatch.setenv("RINGFENCE_TOPIC_PREFIX", world.prefix)
        monkeypatch.setenv("RINGFENCE_EMBEDDED_BROKER", "true")
        monkeypatch.setenv("RINGFENCE_AUDIT_URL", settings.audit_url)
        office.uma.key.save(tmp_path / "uma.json")
        me = ["--identity", str(tmp_path / "uma.json")]

        async def command(*words: str) -> tuple[int, str]:
            status = await asyncio.to_thread(main, [*words, *me])
            return status, capsys.readouterr().out

        status, text = await command("break-glass", "list", "--unreviewed")
        assert status == 0
        assert credential.request_id in text
        assert "everything is frozen" in text
        status, text = await command("break-glass", "review", credential.request_id[:8], "--note", "fine")
        assert (status, "reviewed" in text) == (0, True)
        status, text = await command("break-glass", "list", "--unreviewed", "--json")
        assert (status, json.loads(text)) == (0, [])
        status, text = await command("break-glass", "list")
        assert "uma: fine" in text


# --- attacks on policy ---


async def test_approvals_that_break_no_glass(world: World, tmp_path: Path):
    async with world.running("registry", "policy", own=own(tmp_path)):
        office = await Emergency.open(world)
        # sam and maria become operators: for their own agent, their own task, they still cannot.
        for person in (office.sam, office.maria):
            claims = world.user_set(
                office.olga, person, roles=("sponsor", "operator"), entitlements=EVERYTHING
            )
            await world.accepted(claims, office.olga)
        asked = await office.shatter()
        question = await office.question(asked, office.olga)
        for by in (office.sam, office.maria, office.petra, office.uma):
            assert await office.refused(await office.approve(question, by)) == "not_approver"
        assert await office.refused(await office.approve(question, office.bot)) == "not_a_person"

        # One operator twice: by the same key, and by another key of the same person.
        (first,) = await office.yes(asked, office.olga)
        (again,) = await office.yes(asked, office.olga)
        assert await office.refused(again) == "approved_already"
        second_key = SigningKey.generate(office.otto.id)
        keys = (office.otto.key_record(), second_key.record(int(time.time()) + DAY_S))
        await world.accepted(
            world.user_set(office.olga, office.otto, roles=("operator",), keys=keys), office.olga
        )
        other = await office.shatter()
        await office.yes(other, office.otto)
        by_second = (await office.yes(other, Party("otto", second_key)))[0]
        assert await office.refused(by_second) == "approved_already"

        # The pair of one request is not the pair of another.
        await office.yes(asked, office.otto)
        decision = await office.final(asked)
        assert decision.outcome == "allowed"
        third = await office.shatter()
        await office.decision(third)
        for approval in decision.approvals:
            await office.send(APPROVAL_RESPONSE, approval)
            assert await office.refused(approval) == "approval_replayed"
        moved = await office.approve(question, office.olga, request_id=third.id)
        assert await office.refused(moved) == "approval_other_request"
        assert await office.outcomes(third) == {"approval_required": 1}
        assert first in decision.approvals


async def test_two_operators_cannot_override_the_hard_limits(world: World, tmp_path: Path):
    async with world.running("registry", "policy", own=own(tmp_path)):
        office = await Emergency.open(world)
        beyond = await office.final(await office.shatter(scope("platform", ["read"], ["elsewhere"])))
        assert "beyond_scope" in codes(beyond)
        # What the bundle does not deny needs no glass broken: it must not be a way around what a rule asks for.
        assert codes(await office.final(await office.shatter(reason="thawed"))) == {"break_glass_not_needed"}

        # The target's floor stands: the sponsor as well as two operators.
        deploy = await office.shatter(DEPLOY)
        assert (await office.decision(deploy)).required == ("sponsor", *TWO)
        await office.yes(deploy, office.olga, office.otto)
        assert (await office.with_approvals(deploy, 2)).outcome == "approval_required"
        question = await office.question(deploy, office.sam)
        await office.approve(question, office.sam)
        assert (await office.final(deploy)).outcome == "allowed"
        # An operator's floor takes an operator of its own: nobody counts twice.
        wipe = await office.shatter(scope("platform", ["wipe"], ["env/staging/web"]))
        await office.yes(wipe, office.olga, office.otto)
        assert (await office.with_approvals(wipe, 2)).outcome == "approval_required"
        oscar = await world.user("oscar", roles=("operator",))
        await office.yes(wipe, oscar)
        assert (await office.final(wipe)).outcome == "allowed"

        no = await office.shatter()
        question = await office.question(no, office.olga)
        await office.approve(question, office.otto, verdict="denied", comment="wait for the morning")
        assert codes(await office.final(no)) == {"approval_denied"}

        # What changed while they thought about it.
        task_of, end = office.task, world.claims(TaskEnd, office.maria, task_id=office.task, reason="done")
        waiting = await office.shatter()
        await office.yes(waiting, office.olga)
        await world.accepted(end, office.maria)
        await office.yes(waiting, office.otto)
        assert codes(await office.final(waiting)) & {"approval_stale", "task_ended"}
        assert "task_ended" in codes(await office.final(await office.shatter()))
        office.task = await world.task(office.bot, by=office.maria, scope=EVERYTHING)
        assert office.task != task_of
        await world.accepted(
            world.claims(AgentSuspend, office.sam, agent_id="deploy-bot", reason="odd"), office.sam
        )
        await office.records_read()
        assert "agent_suspended" in codes(await office.final(await office.shatter()))


async def test_an_operator_who_was_disabled_meanwhile_does_not_count(world: World, tmp_path: Path):
    async with world.running("registry", "policy", own=own(tmp_path)):
        office = await Emergency.open(world)
        asked = await office.shatter()
        await office.yes(asked, office.otto)
        await office.with_approvals(asked, 1)
        await world.accepted(
            world.claims(UserDisable, office.olga, user_id="otto", reason="left"), office.olga
        )
        await office.yes(asked, office.olga)
        assert (await office.with_approvals(asked, 2)).outcome == "approval_required"
        assert (await office.with_approvals(asked, 2)).outcome == "approval_required"


async def test_a_bundle_without_an_answer_is_outweighed_like_any_denial(world: World, tmp_path: Path):
    rules = 'decision := {"allow": true, "deny": [], "approvals": "nobody", "max_ttl_s": 60}\n'
    async with world.running("registry", "policy", own=own(tmp_path, rules)):
        office = await Emergency.open(world)
        assert codes(await office.final(await office.ask(READ))) == {"policy_invalid"}
        asked = await office.shatter()
        assert codes(await office.decision(asked)) == {"break_glass", "policy_invalid"}
        await office.yes(asked, office.olga, office.otto)
        assert (await office.final(asked)).outcome == "allowed"
        floor = await office.shatter(DEPLOY)
        assert (await office.decision(floor)).required == ("sponsor", *TWO)


async def test_break_glass_request_without_approvals_expires(world: World, tmp_path: Path):
    async with world.running("registry", "policy", own=own(tmp_path, approval_timeout_s=1)):
        office = await Emergency.open(world)
        asked = await office.shatter()
        question = await office.question(asked, office.olga)
        decision = await office.final(asked)
        assert (decision.outcome, codes(decision)) == ("denied", {"approval_expired"})
        assert await office.refused(await office.approve(question, office.olga)) == "already_decided"


# --- attacks on the issuer, by a policy that lies ---


@pytest.fixture
async def desk(world: World) -> AsyncIterator[IssuerBench]:
    """olga, otto and oscar are operators; sam, who sponsors the agent, and maria, for whom it acts, are as well."""
    async with world.running("registry", "issuer"):
        everything = scope("staging", ("read", "deploy"), ("**",))
        people = {
            "sam": await world.user("sam", roles=("sponsor", "operator")),
            "sue": await world.user("otto", roles=("operator",)),
            "maria": await world.user("maria", roles=("operator",), entitlements=everything),
        }
        verbs = (VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor"), VerbFloor(verb="wipe"))
        target = await world.target("staging", verbs=verbs)
        yield await IssuerBench(world, people, target).staff(ceiling=everything, task_scope=everything)


async def test_the_issuer_counts_two_operators_by_itself(desk: IssuerBench):
    olga, otto = desk.world.operator, desk.sue
    asked = await desk.ask("read", break_glass=True)
    await desk.decide(asked, approvals=(desk.approval(asked, olga), desk.approval(asked, otto)))
    content = await desk.answer(asked)
    assert content.credential is not None
    assert (await desk.lease(asked.lease_id, "active")).break_glass is True


@pytest.mark.parametrize(
    "who",
    ["nobody", "one", "one twice", "the sponsor", "the user", "a pair of another request", "three keys"],
)
async def test_a_lying_policy_breaks_no_glass(desk: IssuerBench, who: str):
    olga, otto = desk.world.operator, desk.sue
    asked = await desk.ask("read", break_glass=True)
    other = await desk.ask("read", break_glass=True)

    def by(*people: Party, what: Any = asked) -> tuple[str, ...]:
        return tuple(desk.approval(what, person) for person in people)

    approvals = {
        "nobody": (),
        "one": by(olga),
        "one twice": by(olga, olga),
        "the sponsor": by(olga, desk.sam),
        "the user": by(olga, desk.maria),
        "a pair of another request": by(olga, otto, what=other),
        "three keys": by(olga, desk.sam, desk.maria),
    }[who]
    # `required` is the liar's word, and says nothing of it.
    await desk.decide(asked, approvals=approvals, required=())
    refusal = await desk.refused(asked)
    expected = "approval_other_request" if who.startswith("a pair") else "approval_lacking"
    assert refusal.reasons[0].code == expected
    assert await desk.is_finding(asked)


async def test_a_lying_policy_gives_no_long_life_no_floor_and_no_reach(desk: IssuerBench):
    olga, otto = desk.world.operator, desk.sue

    async def refused(*verbs: str, resource: str = "env/staging/web", ttl_s: int = 600) -> str:
        wanted = desk.scope(*verbs, resource=resource)
        asked = await desk.ask(break_glass=True, ttl_s=ttl_s, scope=wanted)
        await desk.decide(asked, approvals=(desk.approval(asked, olga), desk.approval(asked, otto)))
        return (await desk.refused(asked)).reasons[0].code

    assert await refused("read", ttl_s=BREAK_GLASS_TTL_S + 1) == "ttl_too_long"
    assert await refused("deploy") == "approval_lacking"
    assert await refused("wipe") == "beyond_scope"


# --- reviews that nobody is believed to have written ---


async def test_reviews_stop_nobody(world: World, tmp_path: Path):
    from ringfence.messages.approval import BreakGlassReview

    async with world.running("registry", "policy", "audit", own=own(tmp_path)):
        office = await Emergency.open(world)

        def review(**fields: Any) -> BreakGlassReview:
            given = {
                "request_id": str(uuid.uuid4()),
                "decision_digest": "0" * 64,
                "agent_id": office.bot.name,
                "note": "never happened",
            }
            return world.claims(BreakGlassReview, office.uma, **{**given, **fields})

        unknown = review()
        await office.send(APPROVAL_RESPONSE, sign(unknown, office.uma.key))
        told = await office.event("break_glass.review_refused", unknown.request_id)
        assert told["status_code"] == "break_glass_unknown"
        forged = sign(review(), world.party("user", "uma").key)
        sent = await office.send(APPROVAL_RESPONSE, forged)
        await world.consume_until(
            AUDIT,
            lambda r: (
                json.loads(r.value)["unmapped"]["source"]["offset"] == sent.offset
                and json.loads(r.value)["metadata"]["event_code"] == "record.not_believed"
            ),
        )
        # Policy goes on with what stands behind them.
        asked = await office.shatter()
        await office.yes(asked, office.olga, office.otto)
        assert (await office.final(asked)).outcome == "allowed"
