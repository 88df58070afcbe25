"""What halts a consumer: a bad deploy of a service that may write there, and nothing that anybody else could do.

And what a halted revoker means for the others: nothing is issued or forwarded until somebody has seen to it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.dead_letters import MAX_INVALID_SIGNED
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import ActionApproval, BreakGlassReview
from ringfence.messages.base import SERVICE_ROLES, Claims, ServiceRole, typ_header
from ringfence.messages.credential import Coordinates, CredentialDecision
from ringfence.messages.lease import Lease, RevocationRequest, Selector
from ringfence.messages.operations import DeadLetter, Heartbeat
from ringfence.messages.registry import AgentRecord
from ringfence.messages.topics import AGENT, ALL, DEAD_LETTER, HEARTBEAT, REVOCATION_REQUEST
from ringfence.model.leases.revoker_halts import RETRY_AFTER_S
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.flows.test_gateway_story import until as answered
from tests.flows.test_notices import receiving
from tests.flows.test_notices import settings as webhooks
from tests.support.benches.gateway_flows import HUB, gateway, handle, hub
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.benches.signal_receivers import Endpoint, Office
from tests.support.malformed_records import malformed as of_no_shape
from tests.support.malformed_records import signed_messages
from tests.support.world import World, scope

MANY = MAX_INVALID_SIGNED + 5


async def buried(world: World, count: int) -> None:
    """Return once so many records are dead-lettered."""
    letters = await world.records(DEAD_LETTER)

    def enough() -> bool | None:
        found = [DeadLetter.model_validate_json(record.value) for record in letters]
        return len([letter for letter in found if letter.service == "issuer"]) >= count or None

    await world.until(enough, f"{count} dead letters")


async def test_a_bad_deploy_halts_its_readers_and_a_stranger_stops_nobody(world: World) -> None:
    async with opened_desks(world) as first, world.running("issuer"):
        desk = await another(first)
        policy, typ = world.key("policy"), typ_header(CredentialDecision)
        stranger = SigningKey.generate(policy.id)
        one = of_no_shape(policy, typ, world.td)
        lease = of_no_shape(world.key("issuer"), typ_header(Lease), world.td)
        many = range(MANY)
        # What a stranger can do: garbage, their own signature, one true record again and again, others from elsewhere.
        for _ in many:
            await desk.append_decision("garbage")
            await desk.append_decision(of_no_shape(stranger, typ, world.td))
            await desk.append_decision(one)
            await desk.append_decision(lease)
        await buried(world, 4 * len(many))
        await desk.issued("read")
        assert world.runtimes["issuer"].unready() == []

        for _ in many:
            await desk.append_decision(of_no_shape(policy, typ, world.td, request_id=1))
        await world.until(lambda: world.runtimes["issuer"].unready() or None, "that it is halted")
        ready = await world.get("issuer", "/readyz")
        assert ready.status_code == 503
        assert "look at its dead letters" in ready.json()["reasons"][0]


# --- one service's key halts no other ---


@pytest.fixture(scope="module")
async def installation(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[IssuerBench]:
    """Every service that consumes anything, once for all tests of this module."""
    folder = tmp_path_factory.mktemp("halting")
    with receiving() as webhook:
        async with (
            World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
            opened_desks(world) as desk,
            Endpoint().running() as receiver,
            world.running("policy", "issuer", "revoker", "audit", own=webhooks(folder, sam=webhook)),
        ):
            signals = Office(world, folder)
            signals.declare("receiver", push=f'"{receiver.url}"')
            async with signals.running():
                await signals.client("receiver").create(receiver.url)
                yield desk


SIGNED = [topic for topic in ALL if signed_messages(topic)]
_HALTS_NOBODY: set[ServiceRole] = {"gateway", "scim", "signals", "runner", "console"}
"""Not even by what is theirs to write: services only follow it, or it is a hint."""
_ENOUGH = 4
"""So many messages of each topic: commands are all refused by one and the same line."""
_PASSED_OVER: set[type[Claims]] = {ActionApproval, BreakGlassReview}
"""On `approval.response`, for gateways and for audit: policy leaves them alone, and nobody dead-letters them."""


@pytest.mark.parametrize("role", SERVICE_ROLES)
async def test_no_service_halts_who_reads_what_it_may_not_write(
    installation: IssuerBench, role: ServiceRole
) -> None:
    """25 malformed records of each message that another role, or no service, may sign, on its topic; a kill switch.

    Of a gateway's and the like also of what is theirs.
    """
    desk = await another(installation)
    world = desk.world
    asked = await desk.ask("read")
    assert (await desk.answer(asked)).credential is not None
    sent = await asyncio.gather(
        *(
            # Under the agent's key the order comes behind them, in the same partition.
            world.send(topic, key, of_no_shape(world.key(role), typ_header(model), world.td))
            for topic in SIGNED
            for key in ([desk.bot.name] if topic is REVOCATION_REQUEST else ["nobody"])
            for model in signed_messages(topic)[:_ENOUGH]
            if (role not in model.signed_by or role in _HALTS_NOBODY) and model not in _PASSED_OVER
            for _ in range(MANY)
        )
    )
    claims, _ = await desk.revoke(world.operator, selector=Selector(agent_id=desk.bot.name))
    assert (await desk.verdict(claims)).kind == "accepted"
    await desk.lease(asked.lease_id, "revoked", "expired")
    await dead_lettered(world, sent)
    assert {name: runtime.halted() for name, runtime in world.runtimes.items() if runtime.halted()} == {}
    assert (await desk.answer(await desk.ask("read"))).credential is not None


async def dead_lettered(world: World, sent: Sequence[Coordinates]) -> None:
    """Return once all of these are."""
    letters = await world.records(DEAD_LETTER)
    places = {(one.topic, one.partition, one.offset) for one in sent}
    read = 0

    def all_are() -> bool | None:
        nonlocal read
        for record in letters[read:]:
            source = DeadLetter.model_validate_json(record.value).source
            places.discard((source.topic, source.partition, source.offset))
            read += 1
        return not places or None

    try:
        await world.until(all_are, f"the dead letters of {len(sent)} records")
    except AssertionError:
        raise AssertionError(f"not dead-lettered: {sorted(places)[:3]}") from None


# --- what a halted revoker means for the others ---


async def halting(desk: IssuerBench, revokers: Sequence[Runtime]) -> Runtime:
    """Have the revoker that reads the first partition of orders halt, as a bad deploy would; which it is."""
    typ = typ_header(RevocationRequest)
    for _ in range(MANY):
        value = of_no_shape(desk.world.key("revoker"), typ, desk.world.td)
        await desk.world.send(REVOCATION_REQUEST, desk.bot.name, value, partition=0)

    def halted() -> Runtime | None:
        return next((one for one in revokers if one.halted()), None)

    found: Runtime = await desk.world.until(halted, "that a revoker halts")
    return found


@contextlib.asynccontextmanager
async def revokers(world: World, count: int) -> AsyncIterator[dict[Runtime, contextlib.AsyncExitStack]]:
    """Replicas of the revoker, each with what stops it."""
    async with contextlib.AsyncExitStack() as all_of_them:
        found = {}
        for _ in range(count):
            one = await all_of_them.enter_async_context(contextlib.AsyncExitStack())
            await one.enter_async_context(world.running("revoker"))
            found[world.runtimes["revoker"]] = one
        yield found


async def test_a_halted_revoker_beside_a_healthy_one_denies_until_it_is_started_again(world: World) -> None:
    async with (
        opened_desks(world) as first,
        world.running("issuer"),
        revokers(world, 2) as replicas,
    ):
        desk = await hub(await another(first))
        async with gateway(world) as proxy:
            lease = await handle(desk, "read")
            assert await answered(proxy, desk, lease, 200) == 200

            halted = await halting(desk, list(replicas))
            (healthy,) = (one for one in replicas if one is not halted)
            assert await answered(proxy, desk, lease, "revoker_halted") == "revoker_halted"
            told = (await proxy.as_agent(desk.bot.key, lease, "GET", f"https://{HUB}/a/x")).json()["detail"]
            assert f"{world.prefix}.revoker" in told
            assert "restart" in told
            for service in ("issuer", "gateway"):
                denials = (await world.get(service, "/readyz")).json()["denies"]
                assert ["a revoker has halted" in one for one in denials] == [True]
            asked = await desk.ask(scope=scope("hub", ("read",), ("path/a/**",)), delivery="gateway")
            await desk.decide(asked)
            refusal = await desk.refused(asked)
            assert [reason.code for reason in refusal.reasons] == ["revoker_halted"]
            assert refusal.retry_after_s == RETRY_AFTER_S

            # The halted one says so everywhere, and goes on saying it. The healthy one says that it is well.
            assert healthy.unready() == []
            assert [one for one in halted.unready() if "look at its dead letters" in one]
            finding = await world.event_where(lambda event: event.subject == "consumer halted")
            assert [reason.code for reason in finding.reasons] == ["consumer_halted"]
            for _ in range(3):
                for groups in ((), halted.halted()):
                    await heard(world, groups)
            assert await answered(proxy, desk, lease, 200, "revoker_halted") == "revoker_halted"

            # It is stopped, as one is that dies: for the grace it still counts, and then the other one does its work.
            await replicas[halted].aclose()
            assert await answered(proxy, desk, lease, 200) == 200
            async with world.running("revoker"):
                assert world.runtimes["revoker"].halted() == ()
                claims, _ = await desk.revoke(world.operator, selector=Selector(agent_id=desk.bot.name))
                assert (await desk.verdict(claims)).kind == "accepted"
                assert await answered(proxy, desk, lease, "lease_cut", "lease_ended") in (
                    "lease_cut",
                    "lease_ended",
                )
                lease = await handle(desk, "read")
                assert await answered(proxy, desk, lease, 200) == 200
            assert healthy.unready() == []


async def test_revoker_halted_on_records_makes_the_issuer_refuse(world: World) -> None:
    """Whatever a revoker leaves undone: here what a suspension would end."""
    async with opened_desks(world) as first, world.running("issuer", "revoker"):
        desk = await another(first)
        await desk.issued("read")
        for _ in range(MANY):
            value = of_no_shape(world.key("registry"), typ_header(AgentRecord), world.td)
            await world.send(AGENT, "nobody", value)
        group = f"{world.prefix}.revoker-records"
        await world.until(lambda: world.runtimes["revoker"].halted() == (group,) or None, "that it halts")
        await heard(world, (group,))
        asked = await desk.ask("read")
        await desk.decide(asked)
        assert await desk.refusal_codes(asked) == ["revoker_halted"]


class WrongClock:
    """One that is set wrong while its service runs."""

    off_ms = 0

    def now_ms(self) -> int:
        return SystemClock().now_ms() + self.off_ms


async def test_a_halted_revoker_whose_clock_is_wrong_denies_as_well(world: World) -> None:
    """Its heartbeats would look like old ones that somebody sent again."""
    clock = WrongClock()
    async with opened_desks(world) as first, world.running("issuer"), world.running("revoker", clock=clock):
        desk = await another(first)
        clock.off_ms = -180_000
        await world.until(
            lambda: world.runtimes["revoker"].clock_behind(), "that it knows that its clock is wrong"
        )
        for _ in range(MANY):
            value = of_no_shape(world.key("registry"), typ_header(AgentRecord), world.td)
            await world.send(AGENT, "nobody", value)
        await world.until(lambda: world.runtimes["revoker"].halted() or None, "that it halts")
        await heard(world, world.runtimes["revoker"].halted())
        asked = await desk.ask("read")
        await desk.decide(asked)
        assert await desk.refusal_codes(asked) == ["revoker_halted"]


async def heard(world: World, groups: tuple[str, ...]) -> None:
    """Return once a revoker's heartbeat that names these groups has come after all that stand there now, and the issuer
    has read it.
    """
    since = {place(record) for record in await world.records(HEARTBEAT)}

    def is_it(record: Received) -> bool:
        return place(record) not in since and world.opened(record, Heartbeat, "revoker").halted == groups

    await world.consume_until(HEARTBEAT, is_it)
    assert await world.runtimes["issuer"].tables_caught_up(30)


def place(record: Received) -> tuple[int, int]:
    return record.partition, record.offset
