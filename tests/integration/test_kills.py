"""SIGKILL in mid-flow: every request ends once, nothing is issued twice, every lease ends once."""

from __future__ import annotations

import asyncio
import collections
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.errors import RequestDeniedError
from ringfence.dev.stack import Stack, StackOptions
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import CredentialDecision
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.topics import CREDENTIAL_DECISION, LEASE
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.stack import WITHIN_S, first_pending, realm_in

pytestmark = pytest.mark.apache

REQUESTS = 60
TTL_S = 40


@pytest.fixture
def own_stack(kafka: Kafka, redis_server: RedisServer) -> Iterator[Stack]:
    """A stack of this test's own: its services are killed."""
    with tempfile.TemporaryDirectory(prefix="ringfence-kills-") as folder:
        mark = f"kills{random.randrange(10**6)}"
        options = StackOptions(
            Path(folder) / "state", kafka=kafka.bootstrap, embedded_broker=kafka.embedded,
            redis_url=redis_server.url, topic_prefix=mark, redis_prefix=mark,
        )  # fmt: skip
        with Stack(options) as running:
            yield running


async def kill_and_restart(stack: Stack, role: ServiceRole) -> None:
    await asyncio.to_thread(stack.child(role).kill)
    stack.start_service(role)
    await asyncio.to_thread(stack.wait_ready, [role])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("role", ["policy", "issuer", "revoker"])
async def test_a_killed_service_loses_nothing_and_repeats_nothing(
    own_stack: Stack, role: ServiceRole
) -> None:
    async with (
        realm_in(own_stack) as realm,
        realm.as_agent() as agent,
        realm.seen(LEASE, CREDENTIAL_DECISION) as seen,
    ):

        async def one(number: int) -> IssuedCredential:
            await asyncio.sleep(number * 0.05)
            credential: IssuedCredential = await realm.read(agent, ttl_s=TTL_S, timeout_s=120)
            if number % 3 == 0:
                await agent.release(credential)
            return credential

        asked = [asyncio.create_task(one(number)) for number in range(REQUESTS)]
        await seen.until(lambda: len(seen.of(LEASE)) >= 5, "the first leases")
        for _ in range(2):
            await kill_and_restart(own_stack, role)
        credentials = await asyncio.gather(*asked)
        ids = {credential.lease_id for credential in credentials}
        assert len(ids) == REQUESTS

        def records() -> list[Lease]:
            found = [realm.verified(agent, r, Lease, "issuer", "revoker") for r in seen.of(LEASE)]
            return [lease for lease in found if lease]

        def ended() -> set[str]:
            return {lease.lease_id for lease in records() if lease.status in TERMINAL}

        await seen.until(lambda: ended() >= ids, "the ends of all leases")

    by_lease: dict[str, list[Lease]] = collections.defaultdict(list)
    for lease in records():
        by_lease[lease.lease_id].append(lease)
    assert set(by_lease) == ids, "nothing was issued that nobody got"
    for history in by_lease.values():
        assert len({lease.jti for lease in history if lease.status == "active"}) == 1, "issued once"
        assert len({lease.jti for lease in history if lease.status in TERMINAL}) == 1, (
            "one distinct terminal record"
        )
        assert len({lease.request_id for lease in history}) == 1
    decisions = [realm.verified(agent, r, CredentialDecision, "policy") for r in seen.of(CREDENTIAL_DECISION)]
    final: dict[str, set[str]] = collections.defaultdict(set)
    for decision in decisions:
        if decision and decision.outcome != "approval_required":
            final[decision.request_id].add(decision.outcome)
    assert all(outcomes == {"allowed"} for outcomes in final.values()), "one final decision a request"


@pytest.mark.timeout(300)
async def test_a_pending_approval_survives_the_death_of_policy(own_stack: Stack) -> None:
    async with realm_in(own_stack) as realm, realm.as_agent() as agent, realm.sponsor() as sam:
        asked = asyncio.create_task(
            agent.request(
                task=realm.task, target=realm.target, verbs=["write"], resources=["env/staging/web"], reason="wait",
                timeout_s=120,
            )
        )  # fmt: skip
        pending = await first_pending(sam)
        await kill_and_restart(own_stack, "policy")
        await sam.approve(pending)
        try:
            credential = await asyncio.wait_for(asked, WITHIN_S * 3)
        except RequestDeniedError as denied:
            raise AssertionError(f"denied after the restart: {denied}") from None
        assert credential.lease_id
