"""Widening commands that wait for a second person, at the registry: what takes effect, and the code of each refusal."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import parse, sign, verify
from ringfence.messages.approval import CeilingReport
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialDecision, CredentialRequest
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import (
    AgentRecord,
    AgentRegister,
    AgentSetCeiling,
    AgentSuspend,
    CommandSecond,
    CommandWithdraw,
    Proposal,
    SecondedCommand,
    UserDisable,
    UserEndKey,
)
from ringfence.messages.topics import (
    AGENT,
    CREDENTIAL_DECISION,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    LEASE,
    PROPOSAL,
    USER,
)
from ringfence.messages.trust import SecondPersonMode
from ringfence.registry.commands import Registry
from tests.support.world import Party, World, scope

WIDE = scope("platform", ["deploy"], ["env/production/web"])


@pytest.fixture(autouse=True)
def _settled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry looks for proposals that ended without a command."""
    monkeypatch.setattr("ringfence.registry.app._SETTLE_S", 0.1)


class Office:
    """olga, otto and oona are operators by the root, sam is a sponsor and has the agent bot, all by the root."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.olga = world.operator
        self.otto: Party
        self.oona: Party
        self.sam: Party
        self.bot: Party

    async def staff(self) -> None:
        world = self.world
        modes = (SecondPersonMode(mode="required", not_before=0),)
        bundle = world.make_bundle(2).model_copy(update={"second_person": modes})
        await world.publish_trust(bundle)
        world.trust.load(sign(bundle, world.root.key, header_jwk=True), time.time())
        registry = world.runtimes["registry"]
        await world.until(lambda: registry.trust.version == 2, "the bundle that requires a second person")
        self.otto, self.oona = [
            await world.user(name, roles=("operator",), by=world.root) for name in ("otto", "oona")
        ]
        self.sam = await world.user("sam", roles=("sponsor",), by=world.root)
        self.bot = world.party("agent", "bot")
        await world.accepted(
            world.claims(
                AgentRegister, world.root, agent_id="bot", sponsor="sam", description="x",
                keys=(self.bot.key_record(),), ceiling=(),
            ),
            world.root,
        )  # fmt: skip

    def ceiling(self, by: Party, ceiling: Any = WIDE) -> AgentSetCeiling:
        return self.world.claims(AgentSetCeiling, by, agent_id="bot", ceiling=ceiling)

    async def propose(self, claims: Any, by: Party) -> ServiceEvent:
        event = await self.world.command(claims, by)
        assert event.kind == "proposed", event.reasons
        return event

    def word(self, claims: Any, author: Party, by: Party, revision: int, **fields: Any) -> CommandSecond:
        return self.words([self.named(claims, author, revision, **fields)], by)

    def named(self, claims: Any, author: Party, revision: int = 0, **fields: Any) -> SecondedCommand:
        given = {
            "author": claims.iss, "command": claims.jti, "revision": revision,
            "proposal": digest(parse(sign(claims, author.key)).signing_input),
        }  # fmt: skip
        return SecondedCommand(**{**given, **fields})

    def words(self, named: list[SecondedCommand], by: Party) -> CommandSecond:
        return self.world.claims(CommandSecond, by, commands=tuple(named))

    async def code(self, claims: Any, by: Party) -> str:
        event = await self.world.command(claims, by)
        assert event.kind == "refused", event.kind
        return event.reasons[0].code

    async def revision(self, agent: str = "bot") -> int:
        found = [r for r in await self.world.records(AGENT) if r.key == agent]
        return self.world.opened(found[-1], AgentRecord, "registry").revision

    async def closing(self, status: str, ref: str) -> ServiceEvent:
        """What the registry says became of a proposal."""
        return await self.world.event_where(lambda e: e.kind == status and e.ref == ref)


@asynccontextmanager
async def opened(world: World, *roles: Any) -> AsyncIterator[Office]:
    async with world.running("registry", *roles):
        office = Office(world)
        await office.staff()
        yield office


async def test_command_waits_and_takes_effect_with_second_signature(world: World) -> None:
    async with opened(world) as office:
        before = await office.revision()
        command = office.ceiling(office.olga)
        event = await office.propose(command, office.olga)
        assert event.reasons[0].code == Code.SECOND_MISSING
        assert "who may: oona, otto" in event.reasons[0].message
        assert f"ringfence proposal second {event.result[:12]}" in event.reasons[0].message  # type: ignore[index]
        assert await office.revision() == before
        listed = (await world.get("registry", "/v1/proposals", office.otto)).json()["proposals"]
        assert [(one["id"], one["author"], one["subject"], one["may_second"]) for one in listed] == [
            (event.result, "olga", "agent bot", ["oona", "otto"])
        ]
        accepted = await world.accepted(office.word(command, office.olga, office.otto, before), office.otto)
        assert accepted.result == event.result
        done = await world.event_where(lambda e: e.kind == "accepted" and e.ref == command.jti)
        assert done.result == "bot"
        record = world.opened((await world.records(AGENT))[-1], AgentRecord, "registry")
        assert record.state.ceiling == WIDE
        assert record.commands[-1].second is not None
        assert (await world.get("registry", "/v1/proposals", office.otto)).json()["proposals"] == []
        gone = (await world.get("registry", "/v1/proposals", office.otto, all="1")).json()["proposals"]
        assert [(one["status"], one["by"]) for one in gone] == [("seconded", "otto")]


async def test_evidence_of_a_proposal_is_for_its_author_and_who_may_second_it(world: World) -> None:
    async with opened(world) as office:
        command = office.ceiling(office.olga)
        event = await office.propose(command, office.olga)
        path = f"/v1/proposals/{event.result}/evidence"
        for by in (office.olga, office.otto):
            found = (await world.get("registry", path, by)).json()
            assert found["commands"] == [sign(command, office.olga.key)]
            subjects = [json.loads(parse(one).payload)["sub"].rpartition("/")[2] for one in found["records"]]
            assert subjects == list(dict.fromkeys([by.name, "olga", "bot"]))
        assert (await world.get("registry", path, office.sam)).status_code == 404
        await world.accepted(world.claims(CommandWithdraw, office.olga, proposal=event.result), office.olga)
        assert (await world.get("registry", path, office.otto)).status_code == 404


async def test_report_of_a_ceiling_is_signed_and_for_those_who_may_see_the_agent(world: World) -> None:
    async with opened(world, "policy") as office:
        una = await world.user("una", roles=("sponsor",), by=world.root)
        uma = await world.user("uma", roles=(), by=world.root)
        ceiling = json.dumps([one.model_dump(mode="json") for one in WIDE])
        seen = {}
        for by in (una, uma):
            answer = await world.get(
                "policy", "/v1/agents/bot/ceiling-report", by, ceiling=ceiling, people="olga,sam"
            )
            assert answer.status_code == 404
        for by in (office.otto, office.sam):
            answer = await world.get(
                "policy", "/v1/agents/bot/ceiling-report", by, ceiling=ceiling, people="olga,sam"
            )
            report = parse(answer.json()["report"])
            claims = verify(
                report,
                CeilingReport,
                world.trust.finder("policy", at_s=time.time()),
                audience=world.trust.trust_domain,
            ).claims
            assert (claims.agent_id, claims.ceiling, claims.people) == ("bot", WIDE, ("olga", "sam"))
            seen[by.name] = (claims.used, claims.combinations)
        assert seen == {"otto": ((), ()), "sam": ((), ())}


async def test_replays_change_nothing(world: World) -> None:
    async with opened(world) as office:
        command = office.ceiling(office.olga)
        await office.propose(command, office.olga)
        assert (await world.command(command, office.olga)).kind == "replayed"
        word = office.word(command, office.olga, office.otto, await office.revision())
        await world.accepted(word, office.otto)
        assert (await world.command(word, office.otto)).kind == "replayed"
        assert (await world.command(command, office.olga)).kind == "replayed"
        await world.accepted(office.ceiling(office.sam, ()), office.sam)
        again = office.word(command, office.olga, office.oona, await office.revision())
        assert await office.code(again, office.oona) == Code.PROPOSAL_CLOSED
        assert world.opened((await world.records(AGENT))[-1], AgentRecord, "registry").state.ceiling == ()


async def test_second_of_two_seconds_is_refused(world: World) -> None:
    async with opened(world) as office:
        command, revision = office.ceiling(office.olga), await office.revision()
        await office.propose(command, office.olga)
        words = {
            by.name: (office.word(command, office.olga, by, revision), by)
            for by in (office.otto, office.oona)
        }
        sent = {name: await world.send_command(word, by) for name, (word, by) in words.items()}
        outcomes = {name: await world.outcome(words[name][0], at) for name, at in sent.items()}
        assert (outcomes["otto"].kind, outcomes["oona"].kind) == ("accepted", "refused")
        assert outcomes["oona"].reasons[0].code == Code.PROPOSAL_CLOSED
        assert await office.revision() == revision + 1


async def test_only_the_author_withdraws(world: World) -> None:
    async with opened(world) as office:
        command, revision = office.ceiling(office.olga), await office.revision()
        event = await office.propose(command, office.olga)
        for by, code in ((office.otto, Code.NOT_ENTITLED), (office.sam, Code.NOT_ENTITLED)):
            assert await office.code(world.claims(CommandWithdraw, by, proposal=event.result), by) == code
        await world.accepted(world.claims(CommandWithdraw, office.olga, proposal=event.result), office.olga)
        await office.closing("withdrawn", command.jti)
        word = office.word(command, office.olga, office.otto, revision)
        assert await office.code(word, office.otto) == Code.PROPOSAL_CLOSED
        twice = world.claims(CommandWithdraw, office.olga, proposal=event.result)
        assert await office.code(twice, office.olga) == Code.PROPOSAL_CLOSED


async def test_change_of_subject_and_end_of_authors_key_end_a_proposal(world: World) -> None:
    async with opened(world) as office:
        command, revision = office.ceiling(office.olga), await office.revision()
        await office.propose(command, office.olga)
        await world.accepted(world.claims(AgentSuspend, office.sam, agent_id="bot", reason="odd"), office.sam)
        lapsed = await office.closing("lapsed", command.jti)
        assert lapsed.reasons[0].code == Code.SUBJECT_CHANGED
        word = office.word(command, office.olga, office.otto, revision)
        assert await office.code(word, office.otto) == Code.SUBJECT_CHANGED
        command, revision = office.ceiling(office.oona), await office.revision()
        await office.propose(command, office.oona)
        end = world.claims(UserEndKey, office.oona, user_id="oona", kid=office.oona.key.kid, reason="lost")
        await world.accepted(end, office.oona)
        withdrawn = await office.closing("withdrawn", command.jti)
        assert withdrawn.reasons[0].code == Code.KEY_ENDED
        word = office.word(command, office.oona, office.otto, revision)
        assert await office.code(word, office.otto) == Code.KEY_ENDED


async def test_proposals_outlive_the_registry(world: World) -> None:
    async with opened(world) as office:
        command, revision = office.ceiling(office.olga), await office.revision()
        await office.propose(command, office.olga)
        word = office.word(command, office.olga, office.otto, revision)
    async with world.running("registry"):
        await world.accepted(word, office.otto)
        assert await office.revision() == revision + 1


async def test_forged_proposal_on_the_topic_is_ignored(world: World) -> None:
    """Somebody who may write to the topic can neither make a proposal nor delete one."""
    async with opened(world) as office:
        command, revision = office.ceiling(office.olga), await office.revision()
        event = await office.propose(command, office.olga)
        genuine = (await world.records(PROPOSAL))[-1]
        forged = parse(genuine.value).unverified_claims(PROPOSAL.models[0])
        forged = forged.model_copy(update={"status": "withdrawn", "iss": office.sam.id})
        await world.send(PROPOSAL, str(event.result), sign(forged, office.sam.key))
        await world.send(PROPOSAL, str(event.result), b"")
    async with world.running("registry"):
        await world.accepted(office.word(command, office.olga, office.otto, revision), office.otto)


async def test_event_says_that_the_root_widens_alone(world: World) -> None:
    async with opened(world) as office:
        event = await world.event_where(
            lambda e: e.kind == "widened" and str(e.result).endswith("/agent/bot")
        )
        assert event.reasons[0].code == Code.WIDENED_BY_ROOT
        assert office.bot.id == event.result


async def test_event_says_that_one_person_widens_alone_where_that_is_only_reported(world: World) -> None:
    async with world.running("registry"):
        await world.user("sam", roles=("sponsor",))
        event = await world.event_where(lambda e: e.kind == "widened" and str(e.result).endswith("/user/sam"))
        assert (event.reasons[0].code, event.actor) == (Code.WIDENED_ALONE, world.operator.id)


async def test_one_operators_key_alone_obtains_no_lease(world: World) -> None:
    """A thief with olga's key makes a user, a sponsor, an approver and an agent of their own, and asks for
    `deploy on env/production/web`: nothing takes effect, and nothing is issued.
    """
    async with opened(world, "policy", "issuer") as office:
        olga = office.olga
        sponsor, approver, mule = (
            world.party(kind, name) for kind, name in (("user", "mole"), ("user", "abe"), ("agent", "mule"))
        )
        for command in (
            world.user_set(olga, sponsor, ("sponsor",), WIDE),
            world.user_set(olga, approver, ("sponsor", "operator"), WIDE),
        ):
            await office.propose(command, olga)
            assert await office.code(office.word(command, olga, olga, 0), olga) == Code.SECOND_IS_AUTHOR
        register = world.claims(
            AgentRegister, olga, agent_id="mule", sponsor="sam", description="x", keys=(mule.key_record(),),
            ceiling=WIDE,
        )  # fmt: skip
        await office.propose(register, olga)
        assert await office.code(office.word(register, olga, olga, 0), olga) == Code.SECOND_IS_AUTHOR
        await office.propose(office.ceiling(olga), olga)
        for agent in (mule, office.bot):
            request = world.claims(
                CredentialRequest, agent, task_id="00000000-0000-5000-8000-000000000000", scope=WIDE, ttl_s=300,
                reply_key=ReplyKey().public, reason="x",
            )  # fmt: skip
            await world.send(CREDENTIAL_REQUEST, agent.name, sign(request, agent.key))
        await world.consume_until(DEAD_LETTER, lambda r: b"credential.request" in r.value)  # no agent mule
        decided = await world.consume_until(CREDENTIAL_DECISION, lambda r: r.key == "bot")
        assert world.opened(decided, CredentialDecision, "policy").outcome == "denied"
        assert await world.records(LEASE) == []
        assert {r.key for r in await world.records(USER)} == {"olga", "otto", "oona", "sam"}
        assert {r.key for r in await world.records(AGENT)} == {"bot"}


class Ahead(SystemClock):
    """A clock that is a day and two hours ahead."""

    def now_ms(self) -> int:
        return super().now_ms() + 26 * 3_600_000


async def test_proposal_lapses_after_a_day_and_is_deleted(world: World) -> None:
    async with opened(world) as office:
        command = office.ceiling(office.olga)
        event = await office.propose(command, office.olga)
    async with world.running("registry", clock=Ahead()):
        lapsed = await office.closing("lapsed", command.jti)
        assert lapsed.reasons[0].code == Code.PROPOSAL_LAPSED
        # It is deleted at the next look, an hour after its day.
        records = [record for record in await world.records(PROPOSAL) if record.key == event.result]
        last = [record for record in records if record.value][-1]
        assert world.opened(last, Proposal, "registry").status == "lapsed"
    async with world.running("registry", clock=Ahead()):
        gone = await world.consume_until(PROPOSAL, lambda r: r.key == event.result and not r.value)
        assert gone.value == b""


async def test_registry_warns_without_two_independent_operators(world: World) -> None:
    async with opened(world):
        ready = (await world.get("registry", "/readyz")).json()
        assert ready.get("warnings", []) == []
        for user in ("otto", "oona"):
            await world.accepted(
                world.claims(UserDisable, world.root, user_id=user, reason="left"), world.root
            )
        (warning,) = (await world.get("registry", "/readyz")).json()["warnings"]
        assert "independent operators with a live key: 1 of 2" in warning


async def test_second_whose_answer_was_lost_is_answered_once_and_changes_nothing_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the registry ended after the record and before the answers: the second signature is delivered again."""
    answer, failures = Registry._answer_seconded, [UnavailableError("it ended here")]

    async def answer_later(self: Registry, *given: Any) -> None:
        if failures:
            raise failures.pop()
        await answer(self, *given)

    monkeypatch.setattr(Registry, "_answer_seconded", answer_later)
    async with opened(world) as office:
        command, revision = office.ceiling(office.olga), await office.revision()
        await office.propose(command, office.olga)
        await world.accepted(office.word(command, office.olga, office.otto, revision), office.otto)
        assert failures == []
        assert await office.revision() == revision + 1
        await office.closing("accepted", command.jti)
        (one,) = (await world.get("registry", "/v1/proposals", office.otto, all="1")).json()["proposals"]
        assert one["status"] == "seconded"
