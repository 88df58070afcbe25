"""Attacks on decisions: records and rules rolled back, changes between every two steps, the bypass at every layer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence.kernel.base.ids import digest, lease_id
from ringfence.kernel.crypto.jws import sign
from ringfence.messages.approval import Approval
from ringfence.messages.credential import CredentialDecision, Reason
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import (
    AgentSetCeiling,
    AgentSuspend,
    TargetRemove,
    TaskAssign,
    TaskEnd,
    TaskTerms,
    UserDisable,
    VerbFloor,
)
from ringfence.messages.topics import AGENT, CREDENTIAL_DECISION, CREDENTIAL_REQUEST, LEASE, SERVICE_EVENT
from ringfence.policy.settings import PolicySettings
from ringfence.rego.embedded import EmbeddedEngine
from tests.policy.bundles import ALLOWS, write
from tests.support.audit_stories import (
    allowed,
    answer_refused,
    approved,
    asked_for,
    expect_trail,
    refused_by_issuer,
    refused_by_policy,
    request_leaves,
    rests_on_one_person,
    waits,
)
from tests.support.benches.policy_bench import DEPLOY, EVERYTHING, READ, Asked, PolicyBench, codes
from tests.support.world import WITHIN_S, Party, World, scope

BOT = "deploy-bot"
ROLLED_BACK = """
    3004 Refuse Record: Failure record.revision_fell [revision_fell] by nobody known, signed by registry for deploy-bot
    ~3002 Finding: Failure finding [revision_fell] by registry for deploy-bot
    ~3002 Finding: Failure finding [revision_fell] by policy for deploy-bot
    ~3002 Repeat: Success message.repeated by nobody known, signed by registry for deploy-bot
"""
"""The registry puts its own record back, for whoever reads the topic after compaction."""
BEYOND_CEILING = asked_for(BOT) + refused_by_policy("beyond_scope ceiling:deploy-bot", BOT)
OTHER_RULES = (
    asked_for(BOT)
    + waits("policy, ttl_shortened", BOT)
    + approved("sam", BOT)
    + refused_by_policy("approval_stale", BOT)
)
BEYOND_USER = asked_for(BOT) + refused_by_policy("beyond_scope entitlements:maria", BOT)
LYING_POLICY = refused_by_issuer("beyond_scope entitlements:maria", BOT)
USED = "2004 Create: New/Allowed break_glass.used by deploy-bot"
LENT_BY_NOBODY = """
    3004 Create: Requested task.assign by maria for deploy-bot
    3004 Create: Failure command.refused [on_behalf_of_unsigned] by registry for deploy-bot
"""
WIDENED_HERSELF = """
    3004 Update: Requested user.set by maria
    3004 Update: Failure command.refused [not_operator] by registry
"""
WHY = {
    "suspend": "agent_suspended", "ceiling": "beyond_scope ceiling:bot", "sponsor": "agent_orphaned",
    "task": "task_ended", "entitlements": "beyond_scope entitlements:maria", "user": "user_disabled",
    "floor": "approval_lacking", "target": "target_removed",
}  # fmt: skip
"""What an issuer says to what was allowed before a change."""
STRICT = """
decision := {"allow": true, "deny": [], "approvals": ["sponsor"], "max_ttl_s": 60}
"""


# --- rolled back ---


async def test_a_record_that_is_rolled_back_gives_nothing_back(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        wide = await world.consume_until(AGENT, lambda r: r.key == "deploy-bot")
        narrow = world.claims(AgentSetCeiling, office.sam, agent_id="deploy-bot", ceiling=READ)
        await world.accepted(narrow, office.sam)
        async with expect_trail(world, ROLLED_BACK):
            await world.send(AGENT, "deploy-bot", wide.value)
            finding = await world.event_where(
                lambda e: e.kind == "finding" and e.iss == world.key("policy").id
            )
            assert "revision" in finding.reasons[0].message
        asked = await office.ask(DEPLOY)
        decision = await office.final(asked)
        await request_leaves(world, BEYOND_CEILING, asked.id)
        assert (decision.outcome, codes(decision)) == ("denied", {"beyond_scope"})
        assert {reason.side for reason in decision.reasons} == {"ceiling:deploy-bot"}


async def test_a_bundle_that_is_rolled_back_takes_no_approval_that_another_asked_for(
    world: World, tmp_path: Path
):
    """What was approved was shown with one set of rules. It is not carried over to another, in either direction."""
    write(tmp_path, STRICT)
    async with world.running("registry", "policy", own={"policy": PolicySettings(bundle=tmp_path)}):
        office = await PolicyBench.open(world)
        asked = await office.ask(READ)
        question = await office.question(asked, office.sam)
        write(tmp_path, ALLOWS)
        while (await office.decision(await office.ask(READ))).outcome != "allowed":
            await asyncio.sleep(0.1)  # until the older rules are in force again; policy counts requests
        await office.approve(question, office.sam)
        decision = await office.final(asked)
        assert (decision.outcome, codes(decision)) == ("denied", {"approval_stale"})
        await request_leaves(world, OTHER_RULES, asked.id)


# --- a change between every two steps ---


@dataclass
class Case:
    """One agent with everything of its own, so that a change is about nobody else."""

    office: PolicyBench
    target: str

    async def ask(self, verb: str) -> Asked:
        wanted = scope(self.target, [verb], ["env/staging/web"])
        claims, key = self.office.request(wanted)
        jws = sign(claims, self.office.bot.key)
        return Asked(claims, jws, await self.office.send(CREDENTIAL_REQUEST, jws), key)

    async def came_to_nothing(self, asked: Asked) -> tuple[str, set[str]]:
        """Who refused it, and why. Fails where a lease was written."""
        office, world = self.office, self.office.world

        def denied() -> tuple[str, tuple[Reason, ...]] | None:
            for record in decisions:
                decision = office.opened(record)
                if decision.request_id == asked.id and decision.outcome == "denied":
                    return "policy", decision.reasons
            for record in events:
                event = world._event_or_none(record)
                if (
                    isinstance(event, ServiceEvent)
                    and event.request_id == asked.id
                    and event.kind == "refused"
                ):
                    return event.iss.rpartition("/")[2], event.reasons
            return None

        decisions, events = await world.records(CREDENTIAL_DECISION), await world.records(SERVICE_EVENT)
        by, reasons = await world.until(denied, f"the end of request {asked.id}")
        leases = [record for record in await world.records(LEASE) if record.key == lease_id(asked.id)]
        assert leases == []
        return by, {reason.code for reason in reasons}

    async def told(self, asked: Asked, story: str) -> None:
        """Fails unless this is all that is told of the request."""
        office = self.office
        mine = {
            name: f"{name}-{self.target.removeprefix('target-')}" for name in ("bot", "sam", "petra", "maria")
        }
        await request_leaves(office.world, story, asked.id, **mine, target=self.target)


VERBS = (VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor"))


async def case(world: World, name: str) -> Case:
    office = PolicyBench()
    office.world = world
    target = f"target-{name}"
    everything = scope(target, ["read", "deploy"], ["env/**"])
    office.sam = await world.user(f"sam-{name}", roles=("sponsor",))
    office.petra = await world.user(f"petra-{name}", roles=("sponsor",))
    office.maria = await world.user(f"maria-{name}", entitlements=everything)
    await world.target(target, verbs=VERBS)
    office.bot = await world.agent(f"bot-{name}", sponsor=office.sam, ceiling=everything)
    office.task = await world.task(office.bot, by=office.maria, scope=everything)
    return Case(office, target)


async def _suspend(one: Case) -> None:
    sam = one.office.sam
    await one.office.world.accepted(
        one.office.world.claims(AgentSuspend, sam, agent_id=one.office.bot.name, reason="odd"), sam
    )


async def _narrow_ceiling(one: Case) -> None:
    sam, nothing = one.office.sam, scope(one.target, ["read"], ["elsewhere"])
    claims = one.office.world.claims(AgentSetCeiling, sam, agent_id=one.office.bot.name, ceiling=nothing)
    await one.office.world.accepted(claims, sam)


async def _transfer(one: Case) -> None:
    await one.office.world.transfer(one.office.bot.name, one.office.petra.name)
    disable = one.office.world.claims(
        UserDisable, one.office.world.operator, user_id=one.office.petra.name, reason="x"
    )
    await one.office.world.accepted(disable, one.office.world.operator)


async def _end_task(one: Case) -> None:
    maria = one.office.maria
    await one.office.world.accepted(
        one.office.world.claims(TaskEnd, maria, task_id=one.office.task, reason="done"), maria
    )


async def _take_entitlements(one: Case) -> None:
    world = one.office.world
    await world.accepted(world.user_set(world.operator, one.office.maria, entitlements=()), world.operator)


async def _disable_user(one: Case) -> None:
    world = one.office.world
    claims = world.claims(UserDisable, world.operator, user_id=one.office.maria.name, reason="left")
    await world.accepted(claims, world.operator)


async def _raise_floor(one: Case) -> None:
    verbs = (VerbFloor(verb="read", floor="operator"), VerbFloor(verb="deploy", floor="operator"))
    await one.office.world.target(one.target, verbs=verbs)


async def _remove_target(one: Case) -> None:
    world = one.office.world
    claims = world.claims(TargetRemove, world.operator, target_id=one.target, reason="moved")
    await world.accepted(claims, world.operator)


CHANGES: dict[str, Callable[[Case], Awaitable[None]]] = {
    "suspend": _suspend,
    "ceiling": _narrow_ceiling,
    "sponsor": _transfer,
    "task": _end_task,
    "entitlements": _take_entitlements,
    "user": _disable_user,
    "floor": _raise_floor,
    "target": _remove_target,
}


async def test_a_change_while_the_rules_are_evaluated(world: World, monkeypatch: pytest.MonkeyPatch):
    held: dict[str, asyncio.Event] = {}
    let_go: dict[str, asyncio.Event] = {}
    evaluate = EmbeddedEngine.evaluate

    async def evaluate_slowly(self: EmbeddedEngine, input_json: bytes) -> Any:
        answer = await evaluate(self, input_json)  # of the records as they were
        for name, event in held.items():
            if f'"bot-{name}"'.encode() in input_json and not event.is_set():
                event.set()
                await let_go[name].wait()
        return answer

    monkeypatch.setattr(EmbeddedEngine, "evaluate", evaluate_slowly)
    async with world.running("registry", "policy", "issuer"):
        for name, change in CHANGES.items():
            one = await case(world, name)
            held[name], let_go[name] = asyncio.Event(), asyncio.Event()
            asked = await one.ask("read")
            async with asyncio.timeout(WITHIN_S):
                await held[name].wait()
            await change(one)
            # An issuer that has not heard of it yet may issue; then the revoker ends it. Here it has.
            assert await world.runtimes["issuer"].tables_caught_up(WITHIN_S)
            let_go[name].set()
            by, why = await one.came_to_nothing(asked)
            assert why, (name, by)
            await one.told(asked, asked_for() + allowed() + refused_by_issuer(WHY[name], finding=False))


async def test_a_change_while_an_approval_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch):
    """The answer comes before policy itself has seen that nothing can come of it."""
    monkeypatch.setattr("ringfence.policy.incoming.approvals._CLOSE_EVERY_S", 3600)
    async with world.running("registry", "policy", "issuer"):
        for name, change in CHANGES.items():
            one = await case(world, name)
            asked = await one.ask("deploy")
            question = await one.office.question(asked, one.office.sam)
            await change(one)
            await one.office.approve(question, one.office.sam)
            if name == "sponsor":  # who is not the sponsor any more denies and allows nothing
                await one.office.approve(question, one.office.petra)
            by, why = await one.came_to_nothing(asked)
            assert by == "policy", name
            assert why, name
            no = (
                answer_refused("not_approver") * 2
                if name == "sponsor"
                else refused_by_policy("approval_stale")
            )
            await one.told(asked, asked_for() + waits("floor") + approved("sam") + no)


async def test_a_change_between_the_decision_and_the_issue(world: World):
    waiting: dict[str, tuple[Case, tuple[Asked, Asked]]] = {}
    async with world.running("registry"):
        async with world.running("policy"):
            for name in CHANGES:
                one = await case(world, name)
                asked = (await one.ask("read"), await one.ask("deploy"))
                question = await one.office.question(asked[1], one.office.sam)
                await one.office.approve(question, one.office.sam)
                for request in asked:
                    assert (await one.office.final(request)).outcome == "allowed"
                waiting[name] = (one, asked)
            unchanged = await case(world, "none")
            good = await unchanged.ask("read")
            assert (await unchanged.office.final(good)).outcome == "allowed"
        for name, (one, _) in waiting.items():
            await CHANGES[name](one)
        async with world.running("issuer"):
            for name, (one, asked) in waiting.items():
                for request in asked:
                    by, why = await one.came_to_nothing(request)
                    assert (by, bool(why)) == ("issuer", True), name
                    floor = request is asked[1]
                    approval = waits("floor") + approved("sam") if floor else ""
                    let = allowed() + (rests_on_one_person() if floor else "")
                    reason = "approval_stale" if name == "floor" and request is asked[1] else WHY[name]
                    await one.told(
                        request, asked_for() + approval + let + refused_by_issuer(reason, finding=False)
                    )
            # It was not for want of anything else.
            await world.consume_until(LEASE, lambda r: r.key == lease_id(good.id))


# --- the bypass ---


async def test_a_reader_changes_nothing_in_production_by_any_way(world: World, tmp_path: Path):
    """maria may read. Her agent may do everything, its task says everything, and the rules allow everything."""
    own: dict[Any, Any] = {"policy": PolicySettings(bundle=write(tmp_path, ALLOWS))}
    async with world.running("registry", "policy", "issuer", own=own):
        office = PolicyBench()
        office.world = world
        office.sam = await world.user("sam", roles=("sponsor",), entitlements=EVERYTHING)
        office.maria = await world.user("maria", entitlements=scope("platform", ["read"], ["**"]))
        admin = scope("platform", ["read", "deploy", "drop", "wipe"], ["**"])
        verbs = tuple(VerbFloor(verb=verb) for verb in ("read", "deploy", "drop", "wipe"))
        server = await world.target("platform", verbs=verbs)
        office.bot = await world.agent("deploy-bot", sponsor=office.sam, ceiling=admin)
        office.task = await world.task(office.bot, by=office.maria, scope=admin)
        otto = await world.user("otto", roles=("operator",))
        production = scope("platform", ["deploy"], ["env/production/web"])
        side = {"entitlements:maria"}

        # Policy, whatever its rules say; also by break glass, which asks nobody then.
        for flag in (None, True):
            async with expect_trail(world, BEYOND_USER):
                decision = await office.final(await office.ask(production, break_glass=flag))
            assert (decision.outcome, codes(decision)) == ("denied", {"beyond_scope"})
            assert {reason.side for reason in decision.reasons} == side
        # Hidden among what is allowed, by a glob, or by another spelling.
        for sneaky in (
            READ + production,
            scope("platform", ["deploy"], ["**"]),
            scope("platform", ["read", "deploy"], ["env/staging/web"]),
        ):
            assert (await office.final(await office.ask(sneaky))).outcome == "denied"

        # The issuer, though policy itself lies and everybody has signed.
        async def lie(**more: Any) -> None:
            asked = await office.ask(production, ttl_s=60, **more)
            honest = await office.final(asked)
            policy = Party("policy", world.key("policy"))
            assert honest.revisions is not None
            approvals = []
            for by in (office.sam, world.operator, otto):
                given = {
                    "verdict": "approved",
                    "request": asked.jws,
                    "request_id": asked.id,
                    "ttl_s": 60,
                    "delivery": "agent",
                    "revisions": honest.revisions,
                }
                approvals.append(_approval(world, by, asked, given))
            fields = honest.model_dump(exclude={"iss", "aud", "iat", "jti", "reasons", "outcome", "ttl_s"})
            forged = world.claims(CredentialDecision, policy, **{
                **fields, "source": honest.source, "revisions": honest.revisions, "outcome": "allowed", "ttl_s": 60,
                "approvals": tuple(approvals),
            })  # fmt: skip
            one = Case(office, "platform")
            said = USED if more else allowed(BOT)
            async with expect_trail(world, said + LYING_POLICY):
                await world.send(CREDENTIAL_DECISION, office.bot.name, sign(forged, policy.key))
                event = await world.event_where(
                    lambda e: (
                        e.kind == "finding" and e.request_id == asked.id and e.iss == world.key("issuer").id
                    )
                )
            assert {reason.side for reason in event.reasons} == side
            assert [r for r in await world.records(LEASE) if r.key == lease_id(asked.id)] == []
            assert (await one.came_to_nothing(asked))[0] == "policy"

        await lie()
        await lie(break_glass=True)

        # Another enforcement point that asks the same rules.
        body = {
            "subject": {"type": "agent", "id": "deploy-bot"}, "action": {"name": "deploy"},
            "resource": {"type": "platform", "id": "env/production/web"}, "context": {"task_id": office.task},
        }  # fmt: skip
        async with httpx.AsyncClient(timeout=WITHIN_S, trust_env=False) as http:
            url = f"http://127.0.0.1:{world.ports['policy']}/access/v1/evaluation"
            answer = (await http.post(url, json=body, headers=world.bearer(server, "policy"))).json()
        assert answer["decision"] is False

        # The registry: nobody lends her their entitlements without signing for it, and she gives herself none.
        async with expect_trail(world, LENT_BY_NOBODY):
            terms_by = await world.command(_assign(world, office, admin, on_behalf_of="sam"), office.maria)
            assert terms_by.kind == "refused"
        async with expect_trail(world, WIDENED_HERSELF):
            widen = world.user_set(office.maria, office.maria, entitlements=admin)
            assert (await world.command(widen, office.maria)).kind == "refused"
        # What she may do her agent may do.
        assert (await office.final(await office.ask(scope("platform", ["read"], ["x"])))).outcome == "allowed"


def _approval(world: World, by: Party, asked: Asked, given: dict[str, Any]) -> str:
    return sign(world.claims(Approval, by, **given, request_digest=digest(asked.jws)), by.key)


def _assign(world: World, office: PolicyBench, wanted: Any, **fields: Any) -> Any:
    terms = TaskTerms(
        agent_id=office.bot.name, purpose="more", scope=wanted, not_after=int(time.time()) + 600
    )
    return world.claims(TaskAssign, office.maria, terms=terms, **fields)
