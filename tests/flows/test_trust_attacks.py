"""One service is taken over, and its key signs what only another may say; records and bundles that nobody authorised.

What each of them can do all the same is in docs/threat-model.md.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, get_args

import pytest

from ringfence.kernel.base.errors import SignatureError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import Approval
from ringfence.messages.base import ServiceRole, Topic
from ringfence.messages.lease import EndCause, Lease, RevocationRequest, Selector
from ringfence.messages.operations import DeadLetter
from ringfence.messages.registry import (
    AgentRecord,
    Entitlements,
    UserDisable,
    UserRecord,
    UserState,
)
from ringfence.messages.topics import (
    AGENT,
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    LEASE,
    REGISTRY_COMMAND,
    REVOCATION_REQUEST,
    SERVICE_EVENT,
    TRUST,
    USER,
)
from ringfence.model.leases.lifecycle import follow
from ringfence.registry.settings import RegistrySettings
from tests.support.audit_stories import (
    asked_for,
    buried,
    expect_trail,
    forged,
    refused_by_policy,
    request_leaves,
)
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.benches.policy_bench import DEPLOY, EVERYTHING, READ, PolicyBench, codes
from tests.support.world import WITHIN_S, Party, World

ROLES: tuple[ServiceRole, ...] = get_args(ServiceRole)


FORGED_RECORD = (
    forged()
    + """
    ~3002 Finding: Failure finding [key_unknown] by registry for deploy-bot
    ~3002 Finding: Failure finding [key_unknown] by policy for deploy-bot
    ~3002 Repeat: Success message.repeated by nobody known, signed by registry for deploy-bot
"""
)
_UNCOMMANDED = forged("chain_broken") + "~3002 Finding: Failure finding [chain_broken] by policy for narrow\n"
MADE_UP = {
    "a wider ceiling": _UNCOMMANDED,
    "another sponsor": _UNCOMMANDED,
    "other keys": _UNCOMMANDED + "~3002 Finding: Failure finding [chain_broken] by registry for narrow",
}
"""The registry looks at it itself where it has keys, which are nobody else's."""
SELF_WIDENED = """
    3004 Update: Requested user.set by olga
    3004 Update: Failure command.refused [self_widening] by registry
"""
PUT_BACK = "3004 Repeat: Success trust.repeated by root"
WRITTEN_OVER = {
    "garbage": forged("not_a_jws"),
    "a tombstone": forged("tombstone"),
    "an older bundle": "3004 Refuse Record: Failure trust.version_fell [version_fell] by root\n",
    "another root's": forged("signature_invalid"),
}


def but(*roles: ServiceRole) -> list[ServiceRole]:
    return [role for role in ROLES if role not in roles]


async def letter_at(world: World, sent: Any) -> DeadLetter:
    """The dead letter about a record."""

    def fits(record: Received) -> bool:
        source = DeadLetter.model_validate_json(record.value).source
        return (source.topic, source.partition, source.offset) == (sent.topic, sent.partition, sent.offset)

    return DeadLetter.model_validate_json((await world.consume_until(DEAD_LETTER, fits)).value)


def last_of(records: Sequence[Received], key: str) -> Received:
    return [record for record in records if record.key == key][-1]


# --- a service that is taken over speaks for no other ---


async def said_by_each(desk: IssuerBench) -> tuple[str, list[tuple[Topic[Any], str]]]:
    """What services that are taken over sign of what they have no say in: where to, and the message.

    Returns the lease that those records are about, and these.
    """
    world = desk.world
    asked = await desk.ask("read")
    await desk.answer(asked)
    lease = await desk.lease(asked.lease_id, "active")
    everything = Selector(agent_id=desk.bot.name)
    said: list[tuple[Topic[Any], str]] = []
    for role in ROLES:
        key, by = world.key(role), Party(role, world.key(role))
        common = {"iss": key.id}
        if role != "policy":
            decision = desk.decision(asked).model_copy(update=common)
            said.append((CREDENTIAL_DECISION, sign(decision, key)))
        if role != "revoker":
            order = world.claims(
                RevocationRequest, by, kind="revocation", reason="an attack", selector=everything
            )
            said.append((REVOCATION_REQUEST, sign(order, key)))
        if role not in ("issuer", "revoker"):
            cause = EndCause(kind="revocation", at_ms=lease.requested_at_ms)
            said.append((LEASE, sign(follow(lease, "ending", by=key.id, cause=cause), key)))
        # Nobody of them is a person, or an agent.
        approval = parse(desk.approval(asked, desk.sam)).unverified_claims(Approval)
        said.append((APPROVAL_RESPONSE, sign(approval.model_copy(update=common), key)))
        said.append((APPROVAL_RESPONSE, sign(approval, key)))
        command = world.claims(UserDisable, by, user_id="sam", reason="an attack")
        said.append((REGISTRY_COMMAND, sign(command, key)))
        said.append((REGISTRY_COMMAND, sign(command.model_copy(update={"iss": world.operator.id}), key)))
        request = asked.claims.model_copy(update={"jti": uuid.uuid4().hex})
        said.append((CREDENTIAL_REQUEST, sign(request, key)))
    return lease.lease_id, said


def is_released(world: World, record: Received) -> bool:
    """Whether a record of a lease holds, and says that its agent released it."""
    try:
        return world.opened(record, Lease, "issuer", "revoker").status == "released"
    except SignatureError:
        return False


async def test_no_service_speaks_for_another(world: World):
    """Nor for a person, nor for an agent: whatever the key of one signs beyond its own part is dead-lettered."""
    async with opened_desks(world) as first, world.running("policy", "issuer", "revoker", "audit"):
        desk = await another(first)
        lease_id, said = await said_by_each(desk)
        assert len(said) == 2 * (len(ROLES) - 1) + (len(ROLES) - 2) + 5 * len(ROLES)
        async with expect_trail(world, f"~{forged()}~{buried()}" * len(said)):
            places = [
                await world.send(topic, lease_id if topic is LEASE else desk.bot.name, jws)
                for topic, jws in said
            ]
            for place in places:
                letter = await letter_at(world, place)
                assert letter.code in ("key_unknown", "signature_invalid"), letter
        await desk.issued("read")
        claims, _ = await desk.revoke(desk.bot, "release", lease_id=lease_id)
        await desk.verdict(claims)
        await world.consume_until(LEASE, lambda r: r.key == lease_id and is_released(world, r))
        ok = await world.command(
            world.claims(UserDisable, world.operator, user_id="sue", reason="x"), world.operator
        )
        assert ok.kind == "accepted", "and it is no reason to stop"


@pytest.mark.parametrize("role", but("registry"))
async def test_no_other_service_writes_records(world: World, role: ServiceRole):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        await office.final(await office.ask(READ))
        mine = last_of(await world.records(AGENT), office.bot.name)
        record = world.opened(mine, AgentRecord, "registry")
        forged = record.model_copy(update={"iss": world.key(role).id, "revision": record.revision + 1})
        async with expect_trail(world, FORGED_RECORD):
            place = await world.send(AGENT, office.bot.name, sign(forged, world.key(role)))
            event = await world.event_where(
                lambda e: e.kind == "finding" and e.source == place and e.iss == world.key("policy").id
            )
        assert event.reasons[0].code == "key_unknown"
        assert (await office.final(await office.ask(READ))).outcome == "allowed"


# --- the registry itself ---


@pytest.mark.parametrize("what", ["a wider ceiling", "another sponsor", "other keys"])
async def test_a_record_of_the_registry_without_a_users_command_counts_for_nothing(world: World, what: str):
    """It can take an agent out of use that way. It cannot give it anything."""
    own: dict[ServiceRole, Any] = {
        "registry": RegistrySettings(key_check_s=0.05)
    }  # it looks at new keys then
    async with world.running("registry", "policy", own=own):
        office = await PolicyBench.open(world)
        narrow = await world.agent("narrow", sponsor=office.sam, ceiling=READ)
        task = await world.task(narrow, by=office.maria, scope=EVERYTHING)

        async def ask(key: SigningKey) -> str:
            """What comes of asking for more than the ceiling: the outcome, or the code of the dead letter."""
            claims, _ = office.request(DEPLOY, Party("narrow", key), task_id=task)
            sent = await world.send(CREDENTIAL_REQUEST, "narrow", sign(claims, key))
            decisions, letters = await world.records(CREDENTIAL_DECISION), await world.records(DEAD_LETTER)

            def find() -> str | None:
                for letter in (DeadLetter.model_validate_json(r.value) for r in letters):
                    if letter.source == sent:
                        return letter.code
                opened = (office.opened(r) for r in decisions)
                id = message_id(claims.iss, claims.jti)
                return next((d.outcome for d in opened if d.request_id == id), None)

            return str(await world.until(find, "what comes of the request"))

        assert await ask(narrow.key) == "denied"
        record = world.opened(last_of(await world.records(AGENT), "narrow"), AgentRecord, "registry")
        thief = SigningKey.generate(narrow.id)
        changes: dict[str, dict[str, Any]] = {
            "a wider ceiling": {"ceiling": EVERYTHING},
            "another sponsor": {"sponsor": "petra"},
            "other keys": {"keys": (thief.record(int(time.time()) + 3600),)},
        }
        state = record.state.model_copy(update=changes[what])
        made_up = record.model_copy(update={"revision": record.revision + 1, "state": state})
        async with expect_trail(world, MADE_UP[what]):
            await world.send(AGENT, "narrow", sign(made_up, world.key("registry")))
        policy = world.key("policy").id
        key = thief if what == "other keys" else narrow.key
        told: list[str] = []
        while not told:  # until policy has read the record
            assert await ask(key) not in ("allowed", "approval_required")
            events = [world.event(r) for r in await world.records(SERVICE_EVENT)]
            reasons = [e.reasons[0] for e in events if (e.kind, e.iss) == ("finding", policy)]
            told = [reason.message for reason in reasons if reason.code == "chain_broken"]
        assert "agent/narrow" in told[0]
        assert await ask(key) not in ("allowed", "approval_required")


async def test_an_operator_whom_the_registry_makes_up_is_nobody(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        olga = world.opened(last_of(await world.records(USER), world.operator.name), UserRecord, "registry")
        eve = world.party("user", "eve")
        state = olga.state.model_copy(update={"user_id": "eve", "keys": (eve.key_record(),)})
        assert isinstance(state, UserState)
        made_up = olga.model_copy(update={"sub": eve.id, "state": state, "jti": "made-up", "revision": 1})
        await world.send(USER, "eve", sign(made_up, world.key("registry")))
        assert await world.runtimes["registry"].tables_caught_up(WITHIN_S)
        async with expect_trail(world, forged("chain_broken") + buried("chain_broken")):
            claims = world.claims(UserDisable, eve, user_id="sam", reason="x")
            letter = await letter_at(world, await world.send_command(claims, eve))
            assert letter.code == "chain_broken"
        assert (await world.get("policy", "/v1/approvals", eve)).status_code == 401
        assert (await office.final(await office.ask(READ))).outcome == "allowed"


# --- an operator ---


@pytest.mark.parametrize("what", ["entitlements", "a role", "younger entitlements"])
async def test_an_operator_raises_nothing_of_their_own(world: World, what: str):
    async with world.running("registry"):
        olga = world.operator
        now = int(time.time())
        younger = Entitlements(scope=(), source="test", as_of=now + 5)
        asked = {
            "entitlements": world.user_set(olga, olga, ("operator",), EVERYTHING),
            "a role": world.user_set(olga, olga, ("operator", "sponsor")),
            "younger entitlements": world.user_set(olga, olga, ("operator",)).model_copy(
                update={"entitlements": younger}
            ),
        }[what]
        # What made the operator one is told before.
        await world.consume_until(USER, lambda record: record.key == olga.name)
        await world.event_where(lambda event: event.kind == "accepted")
        async with expect_trail(world, SELF_WIDENED):
            event = await world.command(asked, olga)
        assert (event.kind, event.reasons[0].code) == ("refused", "self_widening")
        record = world.opened(last_of(await world.records(USER), olga.name), UserRecord, "registry")
        assert isinstance(record.state, UserState)
        assert record.state.roles == ("operator",)
        assert record.state.entitlements.scope == ()


# --- the trust bundle ---


async def test_an_expired_bundle_denies_and_says_why_until_the_next_one(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        assert (await office.final(await office.ask(READ))).outcome == "allowed"
        ending = world.make_bundle(2).model_copy(update={"exp": int(time.time()) + 2})
        await world.publish_trust(ending)
        await world.until(lambda: time.time() > ending.exp or None, "its end")
        asked = await office.ask(READ)
        denied = await office.final(asked)
        assert codes(denied) == {"stale_view"}
        assert "trust bundle 2 expired" in denied.reasons[0].message
        (why, *_) = (await world.get("policy", "/readyz")).json()["denies"]
        assert "--renew" in why
        await world.publish_trust(world.make_bundle(3))
        # Audit waited, and then believed what policy said meanwhile.
        told = asked_for("deploy-bot") + refused_by_policy("stale_view", "deploy-bot")
        await request_leaves(world, told, asked.id)
        while (await office.final(await office.ask(READ))).outcome != "allowed":
            pass  # until the registry has confirmed the tables again: nothing was restarted


@pytest.mark.parametrize("over", ["garbage", "a tombstone", "an older bundle", "another root's"])
async def test_a_bundle_that_was_written_over_is_put_back(world: World, over: str):
    """Compaction keeps the last record under a key. Whoever starts after it must not find the bundle of before."""
    async with world.running("registry"):
        bundle = world.make_bundle(2)
        await world.publish_trust(bundle)
        await world.until(lambda: world.runtimes["registry"].trust.version == 2 or None, "the bundle")
        mine = (await world.records(TRUST))[-1].value
        thief = SigningKey.generate(world.root.id)
        values: dict[str, str | bytes] = {
            "garbage": b"garbage",
            "a tombstone": b"",
            "an older bundle": sign(world.bundle, world.root.key, header_jwk=True),
            "another root's": sign(bundle, thief, header_jwk=True),
        }
        async with expect_trail(world, WRITTEN_OVER[over] + PUT_BACK):
            sent = await world.send(TRUST, "2", values[over])
            await world.consume_until(TRUST, lambda r: r.offset > sent.offset and r.value == mine)
        assert world.runtimes["registry"].trust.version == 2
