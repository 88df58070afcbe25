"""Runs on real Kafka: a runner enrols the instance of its run, which acts within one task, and ends with the run."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest

from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import TokenCredential
from ringfence.client.errors import EnrolmentRefusedError, RequestDeniedError
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.credential import Coordinates, CredentialDecision, RequestWithdraw
from ringfence.messages.enrolment import InstanceEnrolment, RunRef
from ringfence.messages.lease import Lease, RevocationRequest
from ringfence.messages.registry import BackendSettings, VerbFloor
from ringfence.messages.run import RunExit, RunOrder, RunStatus
from ringfence.messages.topics import (
    AUDIT,
    CREDENTIAL_DECISION,
    CREDENTIAL_REQUEST,
    LEASE,
    REVOCATION_REQUEST,
    RUN_ORDER,
)
from ringfence.model.identity.runners import runner_issuer, runner_selector
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.attestation_bench import AttestationBench
from tests.support.benches.gateway_flows import HUB, RULES, VERBS, gateway
from tests.support.benches.live_runs import KEYS, OTHER, READ, RUNNER, LiveRun, add_runner, agent_of
from tests.support.benches.sdk_clients import client
from tests.support.runs import LIMITS
from tests.support.world import WITHIN_S, World, scope

ASK: dict[str, Any] = {
    "target": "staging",
    "verbs": ["read"],
    "resources": ["env/a"],
    "reason": "a look",
    "timeout_s": 60,
}


@pytest.fixture(scope="module")
async def yard(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[AttestationBench]:
    """All of Ringfence, with two runners, once for all tests of this module."""
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        AttestationBench.open(world, tmp_path_factory.mktemp("yard")) as yard,
    ):
        await add_runner(world)
        async with world.running(
            "registry", "policy", "issuer", "revoker", "audit", own={"registry": yard.own}
        ):
            yield await yard.staff()


async def event_of(world: World, run: LiveRun, code: str) -> dict[str, Any]:
    """The first event with this code about a run."""
    record = await world.consume_until(
        AUDIT, lambda record: f'"{run.id}"'.encode() in record.value and f'"{code}"'.encode() in record.value
    )
    event: dict[str, Any] = json.loads(record.value)
    return event


async def revoked(world: World, lease_id: str) -> Lease:
    record = await world.consume_until(
        LEASE, lambda r: r.key == lease_id and world.opened(r, Lease, "issuer", "revoker").status == "revoked"
    )
    return world.opened(record, Lease, "revoker")


async def denied_of(world: World, request_id: str) -> CredentialDecision:
    """The denial of a request."""

    def is_it(record: Received) -> bool:
        decision = world.opened(record, CredentialDecision, "policy")
        return (decision.request_id, decision.outcome) == (request_id, "denied")

    return world.opened(await world.consume_until(CREDENTIAL_DECISION, is_it), CredentialDecision, "policy")


@pytest.mark.parametrize("end", ["ended", "lost"])
async def test_a_run_acts_within_its_task_and_ends_with_all_that_it_holds(
    yard: AttestationBench, end: RunStatus
) -> None:
    world, agent = yard.world, await agent_of(yard)
    task, other_task = await yard.task(agent), await yard.task(agent)
    run, beside = LiveRun(yard, agent, task), LiveRun(yard, agent, task)
    async with yard.connected(agent, run) as inside, yard.connected(agent, beside) as stays:
        credential = await inside.request(task=task, **ASK)
        assert isinstance(credential, TokenCredential)
        said = jwt.decode(credential.value, options={"verify_signature": False})
        assert (said["instance"]["run"], said["instance"]["iss"]) == (run.id, runner_issuer(world.td, RUNNER))
        record = await world.consume_until(LEASE, lambda r: r.key == credential.lease_id)
        lease = world.opened(record, Lease, "issuer")
        assert lease.instance is not None
        assert lease.instance.run == RunRef(run_id=run.id, task_id=task)
        enrolment = parse(inside.connection.enrolment or "").unverified_claims(InstanceEnrolment)
        assert enrolment.run == lease.instance.run
        assert enrolment.key.not_after <= run.deadline
        assert (await event_of(world, run, "run.started"))["unmapped"]["task"] == task
        assert (await event_of(world, run, "credential.issued"))["unmapped"]["instance"]["run"][
            "task_id"
        ] == task

        with pytest.raises(RequestDeniedError) as denied:
            await inside.request(task=other_task, **ASK)
        assert denied.value.code == "instance_other_task"

        kept = await stays.request(task=task, **ASK)
        more = await inside.request(task=task, **ASK)
        await run.say(end, exit=RunExit(code=0) if end == "ended" else None)
        for lease_id in (credential.lease_id, more.lease_id):
            cause = (await revoked(world, lease_id)).cause
            assert cause is not None
            assert (cause.kind, cause.by) == ("run_ended", world.key("revoker").id)
            assert run.id in (cause.reason or "")
        await yard.known("policy")
        with pytest.raises(RequestDeniedError) as denied:
            await inside.request(task=task, **ASK)
        assert denied.value.code == "run_ended"
        assert (await event_of(world, run, f"run.{end}"))["unmapped"]["agent"] == agent.name
        assert (await stays.request(task=task, **ASK)).lease_id, "another run goes on"
        await stays.release(kept, timeout_s=60)


async def test_a_run_withdraws_and_gives_back_what_is_its_own_alone(yard: AttestationBench) -> None:
    """Neither another run of the same agent and task nor the agent's own key ends what a run asked for, on Kafka."""
    world, name = yard.world, f"asks-{uuid.uuid4().hex[:8]}"
    wanted = scope(name, ("read",), ("env/**",))
    await world.target(name, verbs=(VerbFloor(verb="read", floor="sponsor"),))
    user = await world.user(f"u-{uuid.uuid4().hex[:8]}", entitlements=(*wanted, *READ))
    agent = await agent_of(yard, ceiling=(*wanted, *READ), has_key=True)
    task = await world.task(agent, by=user, scope=(*wanted, *READ))
    run, beside = LiveRun(yard, agent, task), LiveRun(yard, agent, task)

    async def said_to(claims: Any, key: SigningKey) -> str:
        topic = REVOCATION_REQUEST if isinstance(claims, RevocationRequest) else CREDENTIAL_REQUEST
        await world.send(topic, agent.name, sign(claims, key))
        event = await world.event_where(lambda event: event.ref == claims.jti and event.kind == "refused")
        return event.reasons[0].code

    async with (
        yard.connected(agent, run) as inside,
        yard.connected(agent, beside) as other,
        Agent.connect(agent.key, client(world)) as itself,
    ):
        of_run, of_other = inside.connection, other.connection
        kept = await inside.request(task=task, **ASK)
        release = {"kind": "release", "lease_id": kept.lease_id, "reason": "not mine"}
        theirs = world.claims(RevocationRequest, agent, enrolment=of_other.enrolment, **release)
        assert await said_to(theirs, of_other.key) == "not_entitled"

        ask = {**ASK, "target": name}
        for asker, others in (
            (inside, {"another run": (of_other.key, of_other.enrolment), "the agent": (agent.key, None)}),
            (itself, {"a run": (of_run.key, of_run.enrolment)}),
        ):
            pending = asyncio.get_running_loop().create_future()
            asking = asyncio.create_task(asker.request(task=task, on_pending=pending.set_result, **ask))
            request_id = (await pending).request_id
            for who, (key, enrolment) in others.items():
                claims = world.claims(RequestWithdraw, agent, request_id=request_id, enrolment=enrolment)
                assert await said_to(claims, key) == "not_requester", who
            asking.cancel()  # the SDK withdraws it, as the one that asked
            decision = await denied_of(world, request_id)
            (reason,) = decision.reasons
            assert reason.code == "withdrawn"
        await inside.release(kept, timeout_s=60)


@pytest.mark.parametrize(("claims", "code"), [(False, "run_unknown"), (True, "run_not_started")])
async def test_without_a_record_of_its_start_the_instance_of_a_run_gets_nothing(
    yard: AttestationBench, claims: bool, code: str
) -> None:
    agent = await agent_of(yard)
    task = await yard.task(agent)
    run = LiveRun(yard, agent, task)
    run.starts = False
    if claims:
        await run.say("claimed")
    async with yard.connected(agent, run) as inside:
        with pytest.raises(RequestDeniedError) as denied:
            await inside.request(task=task, **ASK)
        assert denied.value.code == code
        await run.say("started")
        credential = await inside.request(task=task, **ASK)
        assert credential.lease_id, "policy and issuer wait for what was said a moment ago"


async def test_a_runner_that_the_agent_does_not_name_enrols_nobody(yard: AttestationBench) -> None:
    agent = await agent_of(yard)
    run = LiveRun(yard, agent, await yard.task(agent), OTHER)
    with pytest.raises(EnrolmentRefusedError) as refused:
        async with yard.connected(agent, run):
            pass
    assert refused.value.code == "instance_unmatched"
    # Nor does one that the agent names, for another agent.
    victim = await agent_of(yard)
    run = LiveRun(yard, agent, await yard.task(agent))
    with pytest.raises(EnrolmentRefusedError) as refused:
        async with yard.connected(victim, run):
            pass
    assert refused.value.code == "instance_unmatched"


async def test_a_forged_record_of_a_run_changes_nothing_and_is_told(yard: AttestationBench) -> None:
    world, agent = yard.world, await agent_of(yard)
    task = await yard.task(agent)
    run = LiveRun(yard, agent, task)
    async with yard.connected(agent, run) as inside:
        credential = await inside.request(task=task, **ASK)
        other = KEYS[OTHER]
        by_other = await run.say("ended", other, iss=other.id)
        as_runner = await run.say("ended", other)
        by_registry = await run.say("ended", world.key("registry"), iss=world.key("registry").id)
        back = await run.say("claimed")
        told = {}
        for at in (by_other, as_runner, by_registry, back):
            event = await _event_at(world, at)
            told[at.offset] = event["metadata"]["event_code"]
        # The id of a local run follows from its runner: by another one it is not even a record of a run.
        assert told[as_runner.offset] == told[by_registry.offset] == "record.not_believed"
        assert told[by_other.offset] == told[back.offset] == "run.refused"
        assert (await inside.request(task=task, **ASK)).lease_id
        await inside.release(credential, timeout_s=60)
        await run.say("ended")
        await event_of(world, run, "run.ended")
        await run.say("started")
        await yard.known("policy")
        with pytest.raises(RequestDeniedError) as denied:
            await inside.request(task=task, **ASK)
        assert denied.value.code == "run_ended"


async def _event_at(world: World, at: Coordinates) -> dict[str, Any]:
    """The event of the record at these coordinates."""
    source = f'"topic":"{at.topic}","partition":{at.partition},"offset":{at.offset}}}'.encode()

    def is_of_it(record: Any) -> bool:
        return source in record.value.replace(b" ", b"") and b'"dead-letter"' not in record.value

    event: dict[str, Any] = json.loads((await world.consume_until(AUDIT, is_of_it)).value)
    return event


async def test_an_order_is_told_with_who_gave_it(yard: AttestationBench) -> None:
    world, agent = yard.world, await agent_of(yard)
    task = await yard.task(agent)
    order = world.claims(
        RunOrder, yard.maria, pool="reviews", agent_id=agent.name, task_id=task, limits=LIMITS, ttl_s=600,
        command=("review", "--token", "ghp_0123456789abcdefghijABCDEFGHIJ012345"), exp=int(time.time()) + 60,
    )  # fmt: skip
    event = await _event_at(world, await world.send(RUN_ORDER, "reviews", sign(order, yard.maria.key)))
    assert event["metadata"]["event_code"] == "run.ordered"
    assert event["actor"]["user"]["uid"] == yard.maria.id
    assert (event["unmapped"]["agent"], event["unmapped"]["pool"]) == (agent.name, "reviews")
    assert "ghp_" not in json.dumps(event)
    stranger = world.party("user", "stranger")
    at = await world.send(
        RUN_ORDER, "reviews", sign(order.model_copy(update={"iss": stranger.id}), stranger.key)
    )
    assert (await _event_at(world, at))["metadata"]["event_code"] == "record.not_believed"


async def test_a_gateway_cuts_what_a_run_uses_when_that_ends(yard: AttestationBench) -> None:
    world, wide = yard.world, scope("hub", ("read",), ("path/**",))
    backend = BackendSettings.model_validate({"kind": "jwt", "url": f"https://{HUB}"})
    await world.target("hub", backend=backend, requests=RULES, verbs=VERBS)
    pia = await world.user("pia", entitlements=wide)
    selector = runner_selector(world.td, RUNNER, "walker")
    agent = await world.agent("walker", yard.sam, wide, keys=(), attestation=(selector,))
    task = await world.task(agent, by=pia, scope=wide)
    run = LiveRun(yard, agent, task)
    async with gateway(world) as proxy, yard.connected(agent, run) as inside:
        credential = await inside.request(
            task=task, target="hub", verbs=["read"], resources=["path/a"], reason="x", delivery="gateway",
            timeout_s=WITHIN_S,
        )  # fmt: skip
        handle, key, url = credential.lease_id, inside.connection.key, f"https://{HUB}/a"
        async with asyncio.timeout(WITHIN_S):  # until the gateway has heard of the lease
            while (await proxy.as_agent(key, handle, "GET", url)).status_code != 200:
                await asyncio.sleep(0.05)
        await run.say("ended")
        # The gateway hears of the end, and of the revocation that follows from it, by different topics.
        over = ("run_ended", "lease_cut", "lease_ended")
        async with asyncio.timeout(WITHIN_S):
            while (answer := await proxy.as_agent(key, handle, "GET", url)).status_code == 200 or (
                answer.json()["code"] not in over
            ):
                await asyncio.sleep(0.05)
        assert answer.status_code == 403
        assert (await revoked(world, handle)).cause is not None
