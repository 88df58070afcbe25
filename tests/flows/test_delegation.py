"""Parts of tasks that agents hand on: what is issued under them, and that all of it ends with what it is a part of.

The test plays policy, and a policy that lies; registry, issuer and revoker are the real ones.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.crypto.jws import parse, sign, verify
from ringfence.messages.credential import DelegatorRevisions, ReplyContent
from ringfence.messages.lease import TERMINAL, Delegator, Lease, RevocationRequest, Selector
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import (
    AgentDecommission,
    AgentRotateKey,
    AgentSetCeiling,
    AgentSuspend,
    TaskDelegate,
    TaskEnd,
    TaskRecord,
    TaskTerms,
    UserDisable,
)
from ringfence.messages.topics import REVOCATION_REQUEST, TASK
from ringfence.model.lease_store import RECORD_KEEP_MS
from ringfence.revoker.consistency.compare import checking
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.audit_stories import (
    allowed,
    asked_for,
    buried,
    expect_trail,
    forged,
    refused_by_issuer,
    request_leaves,
)
from tests.support.benches.issuer_bench import Asked, IssuerBench, another, opened_office
from tests.support.benches.lost_redis_bench import LostRedisBench
from tests.support.http_client import plain_client
from tests.support.stack import WITHIN_S
from tests.support.world import DeadLetteredError, Party, Scope


@pytest.fixture(scope="module")
async def issuer_bench(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    """Registry, issuer and revoker, once for all tests here."""
    async with opened_office(kafka, redis_server, "issuer", "revoker") as desk:
        yield desk


async def command(desk: IssuerBench, by: Party, to: Party, scope: Scope, **fields: Any) -> ServiceEvent:
    """What the registry says where an agent hands on a part of the desk's task."""
    task = next(r for r in await desk.world.records(TASK) if r.key == desk.task)
    find = desk.world.trust.finder("registry", at_s=task.appended_at_ms / 1000)
    parent = verify(parse(task.value), TaskRecord, find, audience=desk.world.td).claims.state
    terms = TaskTerms(
        agent_id=to.name,
        purpose="a part of it",
        scope=scope,
        not_after=fields.pop("not_after", parent.not_after),
    )
    claims = desk.world.claims(TaskDelegate, by, **{"parent": desk.task, "terms": terms, **fields})
    return await desk.world.command(claims, by)


async def handed(
    desk: IssuerBench,
    scope: Scope | None = None,
    *,
    ceiling: Scope | None = None,
    sponsor: Party | None = None,
) -> IssuerBench:
    """A desk whose agent, of another sponsor, was handed a part of this desk's task."""
    everything = desk.scope("read", "deploy", "wipe", resource="**")
    name = f"sub-{uuid.uuid4().hex[:8]}"
    child = await desk.world.agent(name, sponsor=sponsor or desk.sue, ceiling=ceiling or everything)
    event = await command(desk, desk.bot, child, scope or everything)
    assert event.kind == "accepted", event.reasons
    assert event.result is not None
    below = IssuerBench(desk.world, {"sam": desk.sam, "maria": desk.maria, "sue": desk.sue}, desk.target)
    below.bot, below.task = child, event.result
    below.revisions = desk.revisions.model_copy(
        update={"delegators": (DelegatorRevisions(agent=1, task=1), *(desk.revisions.delegators or ()))}
    )
    return below


async def issued(desk: IssuerBench, *verbs: str) -> Asked:
    return (await desk.issued(*verbs or ("read",)))[0]


async def ended(desk: IssuerBench, asked: Asked, kind: str) -> Lease:
    """The last record of a lease, once it is over, and that for this cause."""
    lease = await desk.lease(asked.lease_id, *TERMINAL)
    assert lease.cause is not None
    assert lease.cause.kind == kind
    return lease


async def still_lives(desk: IssuerBench, *leases: Asked) -> None:
    for asked in leases:
        assert {one.claims.status for one in await desk.records(asked.lease_id)} == {"active"}


async def is_active(desk: IssuerBench, content: ReplyContent) -> bool:
    """What the issuer's introspection says of a token."""
    assert content.credential is not None
    async with plain_client(base_url=f"http://127.0.0.1:{desk.world.ports['issuer']}") as http:
        answer = await http.post(
            "/oauth2/introspect",
            data={"token": content.credential.value},
            headers=desk.world.bearer(desk.target, "issuer"),
        )
    return bool(answer.json()["active"])


# --- what is issued ---------------------------------------------------------------------------------------------------


async def test_a_credential_of_a_part_names_everybody_up_to_the_human(desk: IssuerBench):
    middle = await handed(desk)
    below = await handed(middle, sponsor=desk.sam)
    asked, content = await below.issued("read")
    lease = await below.lease(asked.lease_id, "active")
    names = (below.bot.name, middle.bot.name, desk.bot.name)
    assert lease.act == names
    assert lease.delegators == (
        Delegator(
            agent_id=middle.bot.name, task_id=middle.task, sponsor="sue", key_thumbprint=middle.bot.key.kid
        ),
        Delegator(agent_id=desk.bot.name, task_id=desk.task, sponsor="sam", key_thumbprint=desk.bot.key.kid),
    )
    assert (lease.agent_id, lease.task_id, lease.sponsor) == (below.bot.name, below.task, "sam")
    assert lease.on_behalf_of == "maria"
    assert content.credential is not None
    claims = jwt.decode(content.credential.value, options={"verify_signature": False})
    ids = [f"spiffe://{desk.world.td}/agent/{name}" for name in names]
    assert claims["sub"] == ids[0]
    assert claims["act"] == {"sub": ids[0], "act": {"sub": ids[1], "act": {"sub": ids[2]}}}
    assert [step["task"] for step in claims["delegation"]] == [middle.task, desk.task]
    assert await is_active(below, content)


async def test_a_part_that_nobody_handed_on_names_no_delegation(desk: IssuerBench):
    _, content = await desk.issued("read")
    assert content.credential is not None
    claims = jwt.decode(content.credential.value, options={"verify_signature": False})
    assert "delegation" not in claims
    assert claims["act"] == {"sub": desk.bot.id}


BELOW_A_SUSPENDED = (
    asked_for("below") + allowed("below") + refused_by_issuer("agent_suspended", "below", finding=False)
)
"""No finding: policy may have decided before."""


@pytest.mark.parametrize("small", ["above", "below"])
async def test_no_policy_gets_past_either_ceiling(desk: IssuerBench, small: str):
    """Policy allows it all the same: the issuer asks every ceiling of the chain."""
    above = await another(desk, ceiling=desk.scope("read", resource="env/a")) if small == "above" else desk
    below = await handed(above, ceiling=desk.scope("read", resource="env/a") if small == "below" else None)
    asked = await below.ask("read")
    await below.decide(asked)
    refusal = await below.refused(asked)
    name = above.bot.name if small == "above" else below.bot.name
    assert [(reason.code, reason.side) for reason in refusal.reasons] == [("beyond_scope", f"ceiling:{name}")]
    assert await below.is_finding(asked)
    story = (
        asked_for("below") + allowed("below") + refused_by_issuer(f"beyond_scope ceiling:{small}", "below")
    )
    await request_leaves(desk.world, story, asked.id, above=above.bot.name, below=below.bot.name)


async def test_no_policy_leaves_out_the_chain(desk: IssuerBench):
    """It says that it saw no delegators, or other ones: what it says of revisions is no ground for anything."""
    below = await handed(desk)
    await desk.world.accepted(
        desk.world.claims(AgentSuspend, desk.sam, agent_id=desk.bot.name, reason="x"), desk.sam
    )
    for revisions in (below.revisions.model_copy(update={"delegators": None}), below.revisions):
        asked = await below.ask("read")
        await below.decide(asked, revisions=revisions)
        assert "agent_suspended" in await below.refusal_codes(asked)
        await request_leaves(desk.world, BELOW_A_SUSPENDED, asked.id, below=below.bot.name)


HANDED_ON_AGAIN = """
    3002 Logon: Failure/Denied message.replayed [replayed] by nobody known, signed by bot for below
    3002 Logon: Failure/Denied message.replayed [replayed] by registry for below
"""
SUSPENDED_HANDS_ON = """
    3004 Create: Requested task.delegate by bot for child
    3004 Create: Failure command.refused [agent_suspended] by registry for child
"""


# --- what the registry refuses, and audit is told ---------------------------------------------------------------------


async def test_delegation_beyond_its_parent_is_refused_with_the_reason(desk: IssuerBench):
    child = await desk.world.agent(f"sub-{uuid.uuid4().hex[:8]}", desk.sue, desk.scope("read"))
    other = (await another(desk)).bot
    narrow = desk.scope("read")
    taken = (
        (desk.bot, child, "unknown_parent"), (desk.bot, child, "beyond_parent"), (desk.bot, child, "later_than_parent"),
        (desk.bot, desk.bot, "delegation_loop"), (other, child, "not_task_agent"), (desk.sam, child, "not_task_agent"),
    )  # fmt: skip
    story = "".join(
        f"3004 Create: Requested task.delegate by {by.name}{f' for {to.name}' if by is not to else ''}\n"
        f"3004 Create: Failure command.refused [{code}] by registry for {to.name}\n"
        for by, to, code in taken
    )
    async with expect_trail(desk.world, story):
        refusals = [
            await command(desk, desk.bot, child, desk.scope("read", resource="**"), parent=str(uuid.uuid4())),
            await command(desk, desk.bot, child, (*narrow, *_elsewhere(narrow))),
            await command(desk, desk.bot, child, narrow, not_after=2_000_000_000),
            await command(desk, desk.bot, desk.bot, narrow),
            await command(desk, other, child, narrow),
            await command(desk, desk.sam, child, narrow),
        ]
    assert [(event.kind, event.reasons[0].code) for event in refusals] == [
        ("refused", "unknown_parent"),
        ("refused", "beyond_parent"),
        ("refused", "later_than_parent"),
        ("refused", "delegation_loop"),
        ("refused", "not_task_agent"),
        ("refused", "not_task_agent"),
    ]
    assert {event.agent_id for event in refusals} == {child.name, desk.bot.name}


def _elsewhere(scope: Scope) -> Scope:
    return (scope[0].model_copy(update={"target": "production"}),)


async def test_a_key_that_is_nobodys_hands_nothing_on(desk: IssuerBench):
    child = await desk.world.agent(f"sub-{uuid.uuid4().hex[:8]}", desk.sue, desk.scope("read"))
    stranger = Party(desk.bot.name, desk.world.party("agent", desk.bot.name).key)
    async with expect_trail(desk.world, forged() + buried()):
        with pytest.raises(DeadLetteredError, match="no valid key"):
            await command(desk, stranger, child, desk.scope("read"))


async def test_suspended_agent_cannot_delegate(desk: IssuerBench):
    child = await desk.world.agent(f"sub-{uuid.uuid4().hex[:8]}", desk.sue, desk.scope("read"))
    suspend = desk.world.claims(AgentSuspend, desk.sam, agent_id=desk.bot.name, reason="x")
    await desk.world.accepted(suspend, desk.sam)
    await desk.world.event_where(  # what follows from it is told
        lambda e: (e.kind, e.subject, e.agent_id) == ("accepted", "revocation.request", desk.bot.name)
    )
    async with expect_trail(desk.world, SUSPENDED_HANDS_ON, bot=desk.bot.name, child=child.name):
        event = await command(desk, desk.bot, child, desk.scope("read"))
    assert event.reasons[0].code == "agent_suspended"


async def test_the_same_command_a_second_time_is_a_replay(desk: IssuerBench):
    below = await handed(desk)
    terms = TaskTerms(
        agent_id=below.bot.name, purpose="x", scope=desk.scope("read"), not_after=int(_now_s()) + 60
    )
    claims = desk.world.claims(TaskDelegate, desk.bot, parent=desk.task, terms=terms)
    first = await desk.world.command(claims, desk.bot)
    async with expect_trail(desk.world, HANDED_ON_AGAIN, bot=desk.bot.name, below=below.bot.name):
        again = await desk.world.command(claims, desk.bot)
    assert (first.kind, again.kind) == ("accepted", "replayed")
    assert len([r for r in await desk.world.records(TASK) if r.key == first.result]) == 1


def _now_s() -> float:
    return SystemClock().now_ms() / 1000


# --- what ends it -----------------------------------------------------------------------------------------------------


async def test_the_end_of_a_task_ends_all_that_came_of_it(desk: IssuerBench):
    middle = await handed(desk)
    below, beside = await handed(middle), await handed(desk)
    other = await another(desk)
    leases = [await issued(one) for one in (desk, middle, below, beside)]
    elsewhere = await issued(other)
    _, content = await below.issued("read")
    await desk.world.accepted(
        desk.world.claims(TaskEnd, desk.maria, task_id=desk.task, reason="done"), desk.maria
    )
    for one, asked in zip((desk, middle, below, beside), leases, strict=True):
        lease = await ended(one, asked, "task_ended")
        assert lease.cause is not None
        assert desk.task in (lease.cause.reason or "")
    assert not await is_active(below, content)
    await still_lives(other, elsewhere)
    # One order reached all of them, however often it was said; beside it are those for leases that were seen only then.
    records = [r for r in await desk.world.records(REVOCATION_REQUEST) if r.key == desk.bot.name]
    orders = [desk.world.opened(r, RevocationRequest, "revoker") for r in records]
    assert len({order.jti for order in orders if order.selector is not None}) == 1
    asked = await below.ask("read")
    await below.decide(asked)
    refusal = await below.refused(asked)
    assert [reason.code for reason in refusal.reasons] == ["task_ended"]
    assert desk.task in refusal.reasons[0].message


async def test_the_end_of_a_part_leaves_the_task_as_it_is(desk: IssuerBench):
    """By the agent that handed it on."""
    middle = await handed(desk)
    below = await handed(middle)
    mine, theirs = await issued(desk), await issued(below)
    end = desk.world.claims(TaskEnd, desk.bot, task_id=middle.task, reason="not needed")
    await desk.world.accepted(end, desk.bot)
    await ended(below, theirs, "task_ended")
    await still_lives(desk, mine)


@pytest.mark.parametrize("what", ["suspended", "decommissioned", "narrowed", "orphaned"])
async def test_change_to_a_delegating_agent_ends_leases_below(desk: IssuerBench, what: str):
    sponsor = await desk.world.user(f"boss-{uuid.uuid4().hex[:8]}", ("sponsor",))
    boss = await another(desk)
    boss.sam = sponsor
    await boss.staff()
    below = await handed(boss)
    asked = await issued(below)
    w, name = desk.world, boss.bot.name
    match what:
        case "suspended":
            await w.accepted(w.claims(AgentSuspend, sponsor, agent_id=name, reason="x"), sponsor)
        case "decommissioned":
            await w.accepted(w.claims(AgentDecommission, sponsor, agent_id=name, reason="x"), sponsor)
        case "narrowed":
            narrow = desk.scope("read", resource="env/other")
            await w.accepted(w.claims(AgentSetCeiling, sponsor, agent_id=name, ceiling=narrow), sponsor)
        case _:
            await w.accepted(w.claims(UserDisable, w.operator, user_id=sponsor.name, reason="x"), w.operator)
    kinds = {
        "suspended": "agent_suspended",
        "decommissioned": "agent_decommissioned",
        "narrowed": "scope_narrowed",
        "orphaned": "user_disabled",
    }
    await ended(below, asked, kinds[what])


async def test_compromised_key_ends_only_what_was_delegated_with_it(desk: IssuerBench):
    """A thief hands a part to an agent of their own: what that one holds ends with the key, and what is below it."""
    boss = await another(desk)
    stolen = boss.bot
    part = await handed(boss)
    below = await handed(part)
    theirs = [await issued(part), await issued(below)]
    boss.bot = await rotated(boss, overlap_s=3600)
    boss.revisions = boss.revisions.model_copy(update={"agent": 2})
    other = await handed(boss)
    other.revisions = other.revisions.model_copy(
        update={"agent": 1, "delegators": (DelegatorRevisions(agent=2, task=1),)}
    )
    mine = await issued(other)
    await rotated(boss, replaces=(stolen.key.kid,), compromised=True)
    for held in theirs:
        await ended(boss, held, "key_compromised")
    await still_lives(boss, mine)


async def rotated(desk: IssuerBench, **fields: Any) -> Party:
    """The desk's agent with another key."""
    new = desk.world.party("agent", desk.bot.name)
    claims = desk.world.claims(
        AgentRotateKey, desk.sam, agent_id=desk.bot.name, key=new.key_record(), **fields
    )
    await desk.world.accepted(claims, desk.sam)
    for role in ("issuer", "revoker"):
        assert await desk.world.runtimes[role].tables_caught_up(WITHIN_S)
    return new


@pytest.mark.parametrize("how", ["agent", "task", "sponsor", "user"])
async def test_the_kill_switch_on_what_is_above_reaches_what_is_below(desk: IssuerBench, how: str):
    middle = await handed(desk)
    below = await handed(middle)
    asked = await issued(below)
    selector = {
        "agent": Selector(agent_id=desk.bot.name),
        "task": Selector(task_id=desk.task),
        "sponsor": Selector(sponsor="sam"),
        "user": Selector(user_id="maria"),
    }[how]
    claims, _ = await desk.revoke(desk.world.operator, selector=selector)
    assert (await desk.verdict(claims)).kind == "accepted"
    await ended(below, asked, "revocation")


async def test_sponsor_of_a_delegating_agent_revokes_a_lease_below(desk: IssuerBench):
    """sam sponsors who handed it on; sue's agent holds it. Who sponsors neither may not."""
    below = await handed(desk)
    asked = await issued(below)
    stranger = await desk.world.user(f"boss-{uuid.uuid4().hex[:8]}", ("sponsor",))
    claims, _ = await below.revoke(stranger, lease_id=asked.lease_id)
    assert (await below.verdict(claims)).kind == "refused"
    claims, _ = await below.revoke(desk.sam, lease_id=asked.lease_id)
    assert (await below.verdict(claims)).kind == "accepted"
    await ended(below, asked, "revocation")


async def test_sponsor_of_a_delegating_agent_sees_leases_below(desk: IssuerBench):
    """sam sponsors who handed it on, sue's agent holds it, and it is on maria's behalf."""
    asked = await issued(await handed(desk))
    stranger = await desk.world.user(f"boss-{uuid.uuid4().hex[:8]}", ("sponsor",))
    for who, sees in ((desk.sam, True), (desk.sue, True), (desk.maria, True), (stranger, False)):
        listed = (await desk.world.get("revoker", "/v1/leases", who)).json()["leases"]
        assert (asked.lease_id in {lease["id"] for lease in listed}) is sees, who.name


async def test_pending_request_below_a_fenced_task_is_not_issued(desk: IssuerBench):
    """Asked for before, decided after: the fence on the task above stands in its way, though no record has changed."""
    below = await handed(desk)
    asked = await below.ask("read")
    claims, _ = await desk.revoke(desk.maria, selector=Selector(task_id=desk.task))
    assert (await desk.verdict(claims)).kind == "accepted"
    await below.decide(asked)
    assert await below.refusal_codes(asked) == ["fenced"]
    # What is asked for from now on is another matter: the task goes on.
    await issued(below)


async def test_pending_request_below_an_ended_task_is_not_issued(desk: IssuerBench):
    below = await handed(desk)
    asked = [await below.ask("read") for _ in range(3)]
    end = desk.world.claims(TaskEnd, desk.maria, task_id=desk.task, reason="done")
    await desk.world.send_command(end, desk.maria)
    for one in asked:  # while it ends
        await below.decide(one)
    for one in asked:
        content = await below.answer(one)
        if content.refusal is None:
            await ended(below, one, "task_ended")
        else:
            codes = {reason.code for reason in below.refusal(content).reasons}
            assert codes <= {"task_ended", "fenced"}
            assert await below.records(one.lease_id) == []


async def test_unreadable_records_make_the_revoker_check_all_leases(
    desk: IssuerBench, monkeypatch: pytest.MonkeyPatch
):
    """Which agents hold parts, the revoker then does not know: it looks at all leases."""
    below = await handed(desk)
    asked = await issued(below)

    async def never(within_s: float) -> bool:
        return False

    monkeypatch.setattr(desk.world.runtimes["revoker"], "tables_caught_up", never)
    monkeypatch.setattr(
        "ringfence.revoker.revocations.verification.Delegations.holders", lambda self, mark: frozenset()
    )
    claims, _ = await desk.revoke(desk.world.operator, selector=Selector(agent_id=desk.bot.name))
    assert (await desk.verdict(claims)).kind == "accepted"
    await ended(below, asked, "revocation")


async def test_redis_holds_what_kafka_says_of_leases_of_parts(desk: IssuerBench):
    below = await handed(desk)
    asked = await issued(below)
    async with checking(
        desk.world.settings("revoker"), SystemClock(), record_keep_ms=RECORD_KEEP_MS
    ) as checker:
        found = [one for one in await checker.differences() if one.about == asked.lease_id]
    assert found == []


async def test_an_order_on_the_task_above_holds_for_what_is_rebuilt(place: LostRedisBench):
    desk = place.desk
    below = await handed(desk)
    asked, kept = await issued(below), await issued(await another(desk))
    before = await place.epochs()
    await place.redis.flushed()
    order = desk.world.claims(
        RevocationRequest, desk.maria, kind="revocation", selector=Selector(task_id=desk.task), reason="stop"
    )
    await desk.world.send(REVOCATION_REQUEST, desk.bot.name, sign(order, desk.maria.key))
    await place.rebuilt(before)
    await ended(below, asked, "revocation")
    await still_lives(desk, kept)
