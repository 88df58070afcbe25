"""Revocations that a gateway reads before the records that they rest on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka.errors import KafkaConnectionError

from ringfence.gateway.state.leases import LeaseTable
from ringfence.gateway.state.view import RevocationApplier
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.lease import Lease, RevocationAck, RevocationRequest, Selector
from ringfence.messages.topics import REVOCATION_REQUEST
from ringfence.model.verdict import ALLOWED
from tests.support import leases
from tests.support.in_memory_registry import START_MS, TD, FixedClock, InMemoryRegistry
from tests.support.verdicts import code_of


@dataclass
class _Runtime:
    """The parts of a service's runtime that the applier uses. The test says when tables have been read."""

    trust: TrustStore
    clock: FixedClock
    key: SigningKey = field(default_factory=lambda: SigningKey.generate(f"spiffe://{TD}/service/gateway"))
    answers: asyncio.Queue[bool | Exception] = field(default_factory=asyncio.Queue)
    acks: list[RevocationAck] = field(default_factory=list)
    settings: Any = field(default_factory=lambda: SimpleNamespace(trust_domain=TD))

    @property
    def publisher(self) -> _Runtime:
        return self

    async def publish_signed(
        self, topic: Any, key: str, claims: RevocationAck, *more: Any, **options: Any
    ) -> None:
        self.acks.append(claims)

    async def tables_caught_up(self, timeout_s: float) -> bool:
        answer = await self.answers.get()
        self.answers.task_done()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Gateway:
    """A gateway's lease table and the applier that feeds it."""

    def __init__(self) -> None:
        self.registry = InMemoryRegistry()
        self.registry.organisation()
        self.runtime = _Runtime(self.registry.trust, self.registry.clock)
        self.directory = self.registry.reader()
        """It has no records yet."""
        self.table = LeaseTable(self.registry.clock)
        self.applier = RevocationApplier(cast(Runtime, self.runtime), self.directory, self.table)

    def reads_records(self) -> None:
        self.directory = self.registry.directory
        self.applier._directory = self.directory

    def reads(self, record: Received) -> None:
        self.applier.on_records([record])

    def revocation(self, by: str = "olga", **fields: Any) -> Received:
        claims = self.registry.claims(RevocationRequest, by, kind="revocation", reason="a test", **fields)
        value = sign(claims, self.registry.key(by))
        return self.registry.received(REVOCATION_REQUEST, claims.iss, value)

    def lease(self) -> Lease:
        now_s = self.registry.clock.ms // 1000
        return leases.lease(delivery="gateway", deadline=now_s + 600, requested_at_ms=START_MS).claims

    def forwards(self, lease: Lease) -> bool:
        return self.applier.backlog() is None and self.table.check_live(lease) == ALLOWED

    async def verified(self) -> None:
        """Wait for everything that the applier does in the background, its acknowledgements too."""
        async with asyncio.timeout(20):
            while self.applier._tasks:
                await asyncio.gather(*self.applier._tasks)


@pytest.fixture
async def gateway() -> Gateway:
    return Gateway()


async def test_earlier_revocations_are_verified_before_any_decision(
    gateway: Gateway,
) -> None:
    """The process before this one may have acknowledged the revocation: nothing more goes on under that lease."""
    gateway.reads_records()
    lease = gateway.lease()
    gateway.reads(gateway.revocation(lease_id=lease.lease_id))
    gateway.table.apply(lease)
    gateway.applier.start_acknowledging()
    assert gateway.table.check_live(lease) == ALLOWED, "the table alone does not know of it yet"
    assert not gateway.forwards(lease)
    assert "before the start" in (gateway.applier.backlog() or "")
    gateway.runtime.answers.put_nowait(True)
    await gateway.verified()
    assert gateway.applier.backlog() is None
    assert code_of(gateway.table.check_live(lease)) == "lease_cut"
    assert gateway.runtime.acks == [], "the process before this one saw to that"


@pytest.mark.parametrize("answer", [False, KafkaConnectionError("gone"), OSError("gone")], ids=repr)
async def test_a_revocation_outlives_answers_that_kafka_did_not_give(
    gateway: Gateway, answer: bool | Exception
) -> None:
    gateway.reads_records()
    lease = gateway.lease()
    gateway.applier.start_acknowledging()
    gateway.reads(gateway.revocation(lease_id=lease.lease_id))
    gateway.runtime.answers.put_nowait(answer)
    await gateway.runtime.answers.join()
    gateway.table.apply(lease)
    gateway.runtime.answers.put_nowait(True)
    await gateway.verified()
    assert not gateway.forwards(lease)
    assert len(gateway.runtime.acks) == 1


async def test_a_selector_waits_for_its_signers_record(gateway: Gateway) -> None:
    lease = gateway.lease()
    gateway.table.apply(lease)
    gateway.reads(gateway.revocation(selector=Selector(all=True)))
    assert gateway.applier.backlog() is not None
    gateway.reads_records()
    gateway.runtime.answers.put_nowait(True)
    await gateway.verified()
    assert not gateway.forwards(lease)
    assert gateway.applier.backlog() is None


async def test_an_invalid_revocation_delays_a_start_no_longer_than_one_answer(gateway: Gateway) -> None:
    gateway.reads_records()
    lease = gateway.lease()
    gateway.table.apply(lease)
    gateway.reads(gateway.revocation(by="uma", lease_id=lease.lease_id))
    assert not gateway.forwards(lease)
    gateway.applier.start_acknowledging()
    gateway.runtime.answers.put_nowait(True)
    await gateway.verified()
    assert gateway.forwards(lease)


async def test_an_invalid_revocation_after_the_start_delays_nothing(gateway: Gateway) -> None:
    """Any agent may write to the topic: what it writes must not stop others."""
    gateway.reads_records()
    lease = gateway.lease()
    gateway.table.apply(lease)
    gateway.applier.start_acknowledging()
    gateway.reads(gateway.revocation(by="uma", lease_id=lease.lease_id))
    assert gateway.forwards(lease)
