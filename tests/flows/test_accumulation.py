"""Nothing accumulates: what an agent holds and what it used lately has a say in what it gets."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from itertools import count
from typing import Any, cast

from ringfence.kernel.base.ids import lease_id, message_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import partition_of
from ringfence.messages.lease import Lease, LeaseStatus, RevocationRequest
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import AgentSetCeiling, VerbFloor
from ringfence.messages.topics import (
    AGENT,
    CREDENTIAL_DECISION,
    CREDENTIAL_REQUEST,
    LEASE,
    REVOCATION_REQUEST,
    SERVICE_EVENT,
    USER,
)
from ringfence.registry.domain import TASK_MAX_S
from ringfence.registry.store import Memory
from tests.support.benches.policy_bench import Asked, PolicyBench, codes
from tests.support.in_memory_registry import FixedClock, InMemoryRegistry
from tests.support.world import DAY_S, Party, Scope, World, scope
from tools.schemas.examples import EXAMPLES

SIX_WEEKS_S = 42 * DAY_S
READ_CODE = scope("github", ["clone"], ["acme/shop"])
WRITE_CI = scope("github", ["write-ci"], ["acme/shop"])
BOTH = scope("github", ["clone", "write-ci"], ["acme/shop"])
REPOSITORIES = scope("github", ["clone"], ["acme/*"])
EVERYTHING = scope("github", ["clone", "write-ci", "run-ci", "push"], ["acme/*"])
VERBS = tuple(VerbFloor(verb=verb) for verb in ("clone", "write-ci", "run-ci", "push"))
"""The target asks for nobody's approval: whoever is asked, it is policy that asks."""


class Past(InMemoryRegistry):
    """What the registry of a world wrote six weeks ago: its records, with the commands of those days."""

    def __init__(self, world: World) -> None:
        self.clock = FixedClock((int(time.time()) - SIX_WEEKS_S) * 1000)
        self.root, self.registry, self.trust = world.root.key, world.key("registry"), world.trust
        self.alarms = []
        self.directory = self.reader()
        self.memory = Memory(self.directory, self.trust, 0)
        self.keys: dict[str, SigningKey] = {"root": self.root, "olga": world.operator.key}
        self.task_max_s = TASK_MAX_S
        self._jtis, self._offsets = count(), count()

    def user_set(self, by: str, user: str, roles: Any = (), **fields: Any) -> Any:
        as_of = self.clock.now_ms() // 1000
        return super().user_set(by, user, roles, entitlements=self.entitlements(as_of=as_of), **fields)


class Review(PolicyBench):
    """sam sponsors review-bot, which may read the code; maria, who may do everything, gives it tasks."""

    async def six_weeks_ago(self, world: World) -> None:
        """review-bot is registered. Nothing runs yet."""
        past, self.world = Past(world), world
        past.give(past.user_set("root", "olga", ["operator"]), past.root)
        past.give(past.user_set("olga", "sam", ["sponsor"]))
        past.give(past.register("sam", "review-bot", "sam", ceiling=REPOSITORIES))
        for topic, id in ((USER, "olga"), (USER, "sam"), (AGENT, "review-bot")):
            entry = past.directory.entry("user" if topic is USER else "agent", id)
            assert entry is not None
            await world.send(topic, id, entry.compact)
        self.sam, self.bot = (
            Party("sam", past.key("sam")),
            Party("review-bot", past.key("review-bot", "agent")),
        )

    async def reads(self, *days_ago: int) -> None:
        """What is left on `lease` of credentials for reading the code, each of which ran out after five minutes."""
        for number, days in enumerate(days_ago):
            await self.append(f"{number}", "expired", REPOSITORIES, int(time.time()) - days * DAY_S)

    async def append(self, request: str, status: LeaseStatus, wanted: Scope, at_s: int) -> None:
        """One record of a lease of review-bot's, requested then."""
        key, id = self.world.key("issuer"), lease_id(f"5b0a4d7e-6c0f-5d39-9b5e-{int(request):012d}")
        lease = cast(Lease, EXAMPLES[Lease]).model_copy(
            update={
                "iss": key.id, "aud": self.world.td, "iat": at_s, "jti": f"{id}.2", "lease_id": id, "seq": 2,
                "status": status, "agent_id": "review-bot", "act": ("review-bot",), "scope": wanted,
                "target_id": "github", "requested_at_ms": at_s * 1000, "deadline": at_s + 300,
            }
        )  # fmt: skip
        await self.world.send(LEASE, id, sign(lease, key))

    async def today(self) -> None:
        """The registry runs: maria and the target are there, and maria assigns a task that takes both."""
        self.maria = await self.world.user("maria", entitlements=EVERYTHING)
        await self.world.target("github", verbs=VERBS)
        self.task = await self.world.task(self.bot, by=self.maria, scope=EVERYTHING)

    async def widen(self, ceiling: Scope = EVERYTHING) -> None:
        claims = self.world.claims(AgentSetCeiling, self.sam, agent_id="review-bot", ceiling=ceiling)
        await self.world.accepted(claims, self.sam)

    async def lease(self, asked: Asked, *statuses: LeaseStatus) -> Lease:
        """The record of a request's lease in one of these statuses, once it is on Kafka."""
        id = lease_id(asked.id)

        def fits(record: Any) -> bool:
            return (
                record.key == id and self.world.opened(record, Lease, "issuer", "revoker").status in statuses
            )

        return self.world.opened(await self.world.consume_until(LEASE, fits), Lease, "issuer", "revoker")

    async def give_back(self, asked: Asked) -> None:
        claims = self.world.claims(
            RevocationRequest, self.bot, kind="release", lease_id=lease_id(asked.id), reason="done"
        )
        await self.send(REVOCATION_REQUEST, sign(claims, self.bot.key))
        await self.lease(asked, "released")

    async def usage(self, who: Party) -> Any:
        return await self.world.get("policy", "/v1/agents/review-bot/usage", who)


async def test_a_reviewer_gets_ci_write_six_weeks_later(world: World):
    review = Review()
    await review.six_weeks_ago(world)
    await review.reads(40, 33, 28, 20, 12, 5, 1)
    async with world.running("registry", "policy", "issuer", "revoker"):
        await review.today()

        # It reads the code, as it has done all the time: nobody is asked.
        reading = await review.ask(READ_CODE)
        decision = await review.final(reading)
        assert (decision.outcome, decision.required, decision.reasons) == ("allowed", (), ())
        assert decision.input is not None
        assert decision.input["held"] == []
        assert decision.input["history"]["used"]["github"]["clone"]["days"] == 5  # of the last 30 days
        await review.lease(reading, "active")

        # What its ceiling lacks is denied whole, whatever task and user allow.
        beyond = await review.final(await review.ask(WRITE_CI))
        assert (beyond.outcome, {r.side for r in beyond.reasons if r.side}) == (
            "denied",
            {"ceiling:review-bot"},
        )

        # Its sponsor widens the ceiling. It still reads: the two do not go together.
        await review.widen()
        together = await review.final(await review.ask(WRITE_CI))
        assert (together.outcome, codes(together)) == ("denied", {"combination"})
        assert f"give back lease {lease_id(reading.id)} first" in together.reasons[0].message
        at_once = await review.final(await review.ask(BOTH))
        assert (at_once.outcome, "combination" in codes(at_once)) == ("denied", True)

        # Without the other half it is the first write in six weeks: the sponsor is asked anew.
        await review.give_back(reading)
        writing = await review.ask(WRITE_CI)
        pending = await review.decision(writing)
        assert (pending.outcome, pending.required) == ("approval_required", ("sponsor",))
        assert "review-bot has not done write-ci at github in the last 30 days" in {
            reason.message for reason in pending.reasons if reason.code == "first_use"
        }
        await review.approve(await review.question(writing, review.sam), review.sam)
        assert (await review.decision(writing, "allowed", "denied")).outcome == "allowed"
        lease = await review.lease(writing, "active")
        assert lease.scope == WRITE_CI

        # And now it may not read.
        again = await review.final(await review.ask(READ_CODE))
        assert (again.outcome, codes(again)) == ("denied", {"combination"})

        found = (await review.usage(review.sam)).json()
        assert {(one["target"], one["verb"]) for one in found["used"]} == {
            ("github", "clone"), ("github", "write-ci"),
        }  # fmt: skip
        assert [one["lease_id"] for one in found["held"]] == [lease.lease_id]
        assert [one["verb"] for one in found["never_used"]] == ["push", "run-ci"]
        assert [p["verbs"] for p in found["narrower"]] == [["clone", "write-ci"]]
        assert (await review.usage(review.maria)).status_code == 404
        assert (await world.get("policy", "/v1/agents/review-bot/usage")).status_code == 401
        assert (await world.get("policy", "/v1/agents/nobody/usage", world.operator)).status_code == 404


async def test_permission_used_and_approved_once_needs_no_approval_after_restart(world: World):
    review = Review()
    await review.six_weeks_ago(world)
    async with world.running("registry"):
        await review.today()
        await review.widen()
        async with world.running("policy", "issuer", "revoker"):
            asked = await review.ask(WRITE_CI)
            assert (await review.decision(asked)).outcome == "approval_required"
            await review.approve(await review.question(asked, review.sam), review.sam)
            assert (await review.decision(asked, "allowed", "denied")).outcome == "allowed"
            await review.lease(asked, "active")
            second = await review.decision(await review.ask(WRITE_CI))
            assert (second.outcome, second.required) == ("allowed", ())
            await review.give_back(asked)
        async with world.running("policy"):
            third = await review.decision(await review.ask(WRITE_CI))
            assert (third.outcome, third.required) == ("allowed", ())
            assert third.input is not None
            assert third.input["history"]["used"]["github"]["write-ci"]["days"] == 1
            # The first of the three was given back; the second lives on.
            assert len(third.input["held"]) == 1


async def test_combination_held_since_the_question_denies_an_approved_request(world: World):
    """The sponsor approves what was no combination when it was asked for."""
    review = Review()
    await review.six_weeks_ago(world)
    await review.reads(1)
    async with world.running("registry", "policy"):
        await review.today()
        await review.widen()
        writing = await review.ask(WRITE_CI)
        assert (await review.decision(writing)).outcome == "approval_required"
        # What nobody has approved yet is not held.
        assert (await review.final(await review.ask(READ_CODE))).outcome == "allowed"
        await review.approve(await review.question(writing, review.sam), review.sam)
        denied = await review.final(writing)
        assert (denied.outcome, codes(denied)) == ("denied", {"combination"})


async def test_an_approval_given_before_the_widening_counts_for_nothing(world: World):
    review = Review()
    await review.six_weeks_ago(world)
    async with world.running("registry", "policy"):
        await review.today()
        reading = await review.ask(READ_CODE)  # for the first time in 30 days
        assert (await review.decision(reading)).outcome == "approval_required"
        question = await review.question(reading, review.sam)
        await review.widen()
        await review.approve(question, review.sam)
        assert codes(await review.final(reading)) == {"approval_stale"}


async def test_of_two_halves_asked_for_side_by_side_one_is_allowed(world: World):
    async with world.running("registry", "policy"):
        office = await clerk(world)
        for _ in range(5):
            office.bot = await world.agent(
                f"bot-{time.monotonic_ns()}", sponsor=office.sam, ceiling=EVERYTHING
            )
            office.task = await world.task(office.bot, by=office.maria, scope=EVERYTHING)
            wanted = [READ_CODE, WRITE_CI] * 3
            asked = await asyncio.gather(*(office.ask(one) for one in wanted))
            made = [await office.final(one) for one in asked]
            allowed = {
                d.input["request"]["scope"][0]["verbs"][0] for d in made if d.outcome == "allowed" and d.input
            }
            assert len(allowed) == 1
            assert Counter(d.outcome for d in made) == {"allowed": 3, "denied": 3}
            assert {code for d in made for code in codes(d)} == {"combination"}


async def test_of_two_halves_in_two_partitions_one_is_decided(world: World):
    """Each partition has a replica of its own, and neither knows yet what the other allows."""
    async with world.running("registry", "policy"), world.running("policy"):
        office = await clerk(world)
        own = partition_of(office.bot.name, await world.publisher.partitions(CREDENTIAL_REQUEST))
        reading, _ = office.request(READ_CODE)
        writing, _ = office.request(WRITE_CI)
        sent, _ = await asyncio.gather(
            world.send(CREDENTIAL_REQUEST, office.bot.name, sign(reading, office.bot.key), partition=1 - own),
            world.send(CREDENTIAL_REQUEST, office.bot.name, sign(writing, office.bot.key), partition=own),
        )
        assert (await office.final(message_id(writing.iss, writing.jti))).outcome == "allowed"
        assert (await office.letter(sent)).code == "partition_unexpected"


async def test_undelivered_decision_still_forms_a_combination_after_restart(world: World):
    async with world.running("registry"):
        async with world.running("policy"):
            office = await clerk(world)
            reading = await office.ask(READ_CODE)
            assert (await office.final(reading)).outcome == "allowed"  # nobody issues it: there is no lease
        async with world.running("policy"):
            denied = await office.final(await office.ask(WRITE_CI))
            assert (denied.outcome, codes(denied)) == ("denied", {"combination"})
            # The first decision stands, however often the request comes.
            await office.send(CREDENTIAL_REQUEST, reading.jws)
            assert await office.outcomes_of(reading) == {"allowed": 1}


async def test_request_the_issuer_refused_no_longer_forms_a_combination(world: World):
    async with world.running("registry", "policy"):
        office = await clerk(world)
        reading = await office.ask(READ_CODE)
        decision = await office.final(reading)
        assert decision.outcome == "allowed"
        for role in ("revoker", "issuer"):
            denied = await office.final(await office.ask(WRITE_CI))
            assert codes(denied) == {"combination"}
            await refuse(office, reading, Party(role, world.key(role)))
        assert (await office.final(await office.ask(WRITE_CI))).outcome == "allowed"


async def test_a_lease_that_nobody_may_have_signed_has_no_say(world: World):
    """Whoever can write to the topic neither ends what is held nor invents a past."""
    review = Review()
    await review.six_weeks_ago(world)
    issuer, stranger = world.key("issuer"), SigningKey.generate(world.key("issuer").id)
    world._keys["issuer"] = stranger
    await review.reads(1, 2, 3)
    world._keys["issuer"] = issuer
    async with world.running("registry", "policy"):
        await review.today()
        pending = await review.decision(await review.ask(READ_CODE))
        assert (pending.outcome, codes(pending)) == ("approval_required", {"policy", "first_use"})


async def test_the_input_tells_what_is_held_and_what_was_used(world: World):
    async with world.running("registry", "policy"):
        office = await clerk(world)
        decision = await office.final(await office.ask(READ_CODE))
        assert decision.input is not None
        assert decision.input["held"] == []
        assert decision.input["agent"]["registered_at_s"] >= time.time() - 600
        assert decision.input["history"]["never_used"] == {"github": ["clone", "push", "run-ci", "write-ci"]}
        second = await office.final(await office.ask(READ_CODE))
        assert second.input is not None
        (held,) = second.input["held"]
        assert (held["lease_id"], held["task_id"]) == (lease_id(decision.request_id), office.task)
        assert held["scope"] == decision.input["request"]["scope"]
        assert decision.ttl_s is not None
        assert held["deadline"] >= decision.source.appended_at_ms // 1000 + decision.ttl_s


class Clerk(PolicyBench):
    """Works for an agent that is new."""

    async def outcomes_of(self, asked: Asked) -> Counter[str]:
        """How often which outcome stands on the topic, once something that came later is decided."""
        await self.final(await self.ask(scope("github", ["push"], ["elsewhere/x"])))
        decisions = map(self.opened, await self.world.records(CREDENTIAL_DECISION))
        return Counter(d.outcome for d in decisions if d.request_id == asked.id)


async def clerk(world: World) -> Clerk:
    office = Clerk()
    office.world = world
    office.sam = await world.user("sam", roles=("sponsor",))
    office.maria = await world.user("maria", entitlements=EVERYTHING)
    await world.target("github", verbs=VERBS)
    office.bot = await world.agent("deploy-bot", sponsor=office.sam, ceiling=EVERYTHING)
    office.task = await world.task(office.bot, by=office.maria, scope=EVERYTHING)
    return office


async def refuse(office: PolicyBench, asked: Asked, by: Party) -> None:
    """Somebody says that the issuer refused."""
    claims = office.world.claims(
        ServiceEvent, by, kind="refused", subject="credential.decision", request_id=asked.id,
        at_ms=int(time.time() * 1000),
    )  # fmt: skip
    await office.world.send(SERVICE_EVENT, by.name, sign(claims, by.key))
