"""When a cut counts as complete: by signed words of live gateways, or by the grace, and by nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import pytest
from prometheus_client import REGISTRY

from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import ServiceRole, Topic
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import RevocationAck, RevocationRequest, Selector
from ringfence.messages.operations import Heartbeat
from ringfence.messages.topics import HEARTBEAT, REVOCATION_ACK
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.leases.revocations import Revocation
from ringfence.revoker.revocations.cut_confirmation import CutTracker
from tests.support.in_memory_registry import START_MS, TD, FixedClock

GRACE_MS = 5000
ROOT = SigningKey.generate(f"spiffe://{TD}/root")
ONE, TWO = (SigningKey.generate(f"spiffe://{TD}/service/gateway-{name}") for name in ("one", "two"))
POLICY = SigningKey.generate(f"spiffe://{TD}/service/policy")
_numbers = count()


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock()


@pytest.fixture
def cuts(clock: FixedClock) -> CutTracker:
    now_s = START_MS // 1000
    year_s = 365 * 86_400

    def identity(key: SigningKey, role: ServiceRole) -> ServiceIdentity:
        return ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(now_s + year_s),))

    services = (identity(ONE, "gateway"), identity(TWO, "gateway"), identity(POLICY, "policy"))
    bundle = TrustBundle(
        iss=ROOT.id, aud=TD, iat=now_s, exp=now_s + year_s, jti="b", version=1, services=services
    )
    trust = TrustStore(TD, ROOT.kid)
    trust.load(sign(bundle, ROOT, header_jwk=True), now_s)
    return CutTracker(trust, clock, grace_ms=GRACE_MS)


class Measured:
    """The cuts that were measured since the test began."""

    def __init__(self) -> None:
        self._before = self._now()

    def _now(self) -> tuple[float, float, float]:
        names = ("time_to_cut_seconds_count", "time_to_cut_seconds_sum", "cuts_unconfirmed_total")
        found = [REGISTRY.get_sample_value(f"ringfence_{name}") or 0.0 for name in names]
        return found[0], found[1], found[2]

    def __call__(self) -> tuple[int, int, int]:
        """How many, how long together in ms, and how many that a gateway did not confirm."""
        counts = [now - before for now, before in zip(self._now(), self._before, strict=True)]
        return round(counts[0]), round(counts[1] * 1000), round(counts[2])


@pytest.fixture
def measured() -> Measured:
    return Measured()


def record(topic: Topic[Any], claims: Any, key: SigningKey, at_ms: int) -> Received:
    value = sign(claims, key).encode()
    return Received(topic, topic.name("ringfence"), 0, next(_numbers), at_ms, key.id, value)


def beat(key: SigningKey, at_ms: int, said_ms: int | None = None) -> Received:
    said_ms = at_ms if said_ms is None else said_ms
    claims = Heartbeat(iss=key.id, aud=TD, iat=said_ms // 1000, jti=f"beat-{said_ms}", at_ms=said_ms)
    return record(HEARTBEAT, claims, key, at_ms)


def order() -> Revocation:
    number = next(_numbers)
    claims = RevocationRequest(
        iss=f"spiffe://{TD}/user/olga",
        aud=TD,
        iat=START_MS // 1000,
        jti=f"order-{number}",
        kind="revocation",
        selector=Selector(all=True),
        reason="a test",
    )
    at = Coordinates(topic="t", partition=0, offset=number, appended_at_ms=START_MS)
    return Revocation(Signed(claims, "a.b.c"), at)


def ack(key: SigningKey, about: Revocation, at_ms: int) -> Received:
    claims = RevocationAck(
        iss=key.id, aud=TD, iat=at_ms // 1000, jti=f"ack-{about.id}", revocation_id=about.id, cut_at_ms=at_ms
    )
    return record(REVOCATION_ACK, claims, key, at_ms)


async def test_without_gateways_a_cut_is_complete_when_redis_refuses(
    cuts: CutTracker, measured: Measured
) -> None:
    cuts.refused(order(), START_MS + 40)
    assert measured() == (1, 40, 0)


async def test_a_cut_waits_for_the_last_live_gateway(cuts: CutTracker, measured: Measured) -> None:
    one = order()
    cuts.on_heartbeats([beat(ONE, START_MS - 900), beat(TWO, START_MS - 100)])
    assert cuts.live() == {ONE.id, TWO.id}
    cuts.refused(one, START_MS + 10)
    cuts.on_acks([ack(ONE, one, START_MS + 15)])
    assert measured() == (0, 0, 0)
    cuts.on_acks([ack(TWO, one, START_MS + 70)])
    assert measured() == (1, 70, 0)
    cuts.on_acks([ack(TWO, one, START_MS + 90)])
    assert measured() == (1, 70, 0)


async def test_a_gateway_may_be_faster_than_redis(cuts: CutTracker, measured: Measured) -> None:
    one = order()
    cuts.on_heartbeats([beat(ONE, START_MS)])
    cuts.on_acks([ack(ONE, one, START_MS + 5)])
    cuts.refused(one, START_MS + 30)
    assert measured() == (1, 30, 0)


async def test_a_gateway_that_was_not_heard_within_the_grace_denies_by_itself(
    cuts: CutTracker, clock: FixedClock, measured: Measured
) -> None:
    cuts.on_heartbeats([beat(ONE, START_MS - GRACE_MS - 1)])
    cuts.refused(order(), START_MS)
    assert measured() == (1, 0, 0)


class Judging:
    """Judges cuts; what stands on Kafka is read only when it is asked for."""

    def __init__(self, cuts: CutTracker) -> None:
        self.unread: list[Received] = []
        self._cuts = cuts
        self._run = asyncio.create_task(cuts.run(self._caught_up))

    async def _caught_up(self, timeout_s: float) -> bool:
        unread, self.unread = self.unread, []
        self._cuts.on_acks(unread)
        return True

    async def stop(self) -> None:
        self._run.cancel()
        await asyncio.gather(self._run, return_exceptions=True)


@pytest.fixture
async def judging(cuts: CutTracker) -> AsyncIterator[Judging]:
    judging = Judging(cuts)
    yield judging
    await judging.stop()


async def judged(measured: Measured) -> tuple[int, int, int]:
    async with asyncio.timeout(10):
        while measured()[0] == 0:
            await asyncio.sleep(0.01)
    return measured()


def nearly_over(cuts: CutTracker, clock: FixedClock) -> None:
    """Both gateways live, and the grace of what was ordered at the start over in 20 ms."""
    cuts.on_heartbeats([beat(ONE, START_MS), beat(TWO, START_MS)])
    clock.ms = START_MS + GRACE_MS - 20
    cuts.on_heartbeats([beat(ONE, clock.ms), beat(TWO, clock.ms)])


async def test_the_grace_stands_for_the_word_of_a_gateway_that_gives_none(
    cuts: CutTracker, clock: FixedClock, measured: Measured, judging: Judging
) -> None:
    one = order()
    nearly_over(cuts, clock)
    cuts.on_acks([ack(ONE, one, START_MS + 5)])
    cuts.refused(one, START_MS)
    assert measured() == (0, 0, 0)
    assert await judged(measured) == (1, GRACE_MS, 1)


async def test_a_clock_that_was_set_back_makes_the_grace_no_longer(
    cuts: CutTracker, clock: FixedClock, measured: Measured, judging: Judging
) -> None:
    cuts.grace_ms = 50
    cuts.on_heartbeats([beat(ONE, START_MS), beat(TWO, START_MS)])
    clock.ms = START_MS - 3_600_000
    cuts.refused(order(), START_MS)
    assert await judged(measured) == (1, 50, 1)


async def test_a_word_that_is_read_late_counts_from_when_it_stood_on_kafka(
    cuts: CutTracker, clock: FixedClock, measured: Measured, judging: Judging
) -> None:
    one = order()
    nearly_over(cuts, clock)
    judging.unread = [ack(ONE, one, START_MS + 5), ack(TWO, one, START_MS + 60)]
    cuts.refused(one, START_MS + 20)
    assert measured() == (0, 0, 0)
    assert await judged(measured) == (1, 60, 0)


async def test_a_word_that_is_given_after_the_grace_confirms_nothing(
    cuts: CutTracker, clock: FixedClock, measured: Measured, judging: Judging
) -> None:
    one = order()
    nearly_over(cuts, clock)
    judging.unread = [ack(TWO, one, START_MS + GRACE_MS + 1)]
    cuts.on_acks([ack(ONE, one, START_MS + 5)])
    cuts.refused(one, START_MS)
    assert await judged(measured) == (1, GRACE_MS, 1)


async def test_an_order_that_is_followed_late_still_waits_for_who_was_live_when_it_was_given(
    cuts: CutTracker, clock: FixedClock, measured: Measured
) -> None:
    one = order()
    cuts.on_heartbeats([beat(ONE, START_MS)])
    clock.ms = START_MS + 2 * GRACE_MS
    assert cuts.live() == frozenset()
    cuts.refused(one, START_MS + 10)
    cuts.on_acks([ack(ONE, one, START_MS + 30)])
    assert measured() == (1, 30, 0)


async def test_words_that_no_gateway_signed_count_for_nothing(
    cuts: CutTracker, clock: FixedClock, measured: Measured
) -> None:
    one = order()
    cuts.on_heartbeats([beat(ONE, START_MS), beat(POLICY, START_MS)])
    assert cuts.live() == {ONE.id}
    cuts.refused(one, START_MS)
    forged = ack(SigningKey.generate(ONE.id), one, START_MS + 1)
    by_another_gateway = ack(dataclasses.replace(TWO, id=ONE.id), one, START_MS + 1)
    garbage = Received(REVOCATION_ACK, "ringfence.revocation.ack.v1", 0, 1, START_MS, None, b"\x00")
    cuts.on_acks(
        [ack(POLICY, one, START_MS + 1), forged, by_another_gateway, garbage, ack(TWO, one, START_MS + 1)]
    )
    cuts.on_acks([ack(ONE, order(), START_MS + 1)])  # about another
    assert measured() == (0, 0, 0)


async def test_a_heartbeat_that_is_sent_again_makes_no_dead_gateway_live(
    cuts: CutTracker, clock: FixedClock
) -> None:
    old = START_MS - 3 * GRACE_MS
    cuts.on_heartbeats([beat(ONE, old)])
    cuts.on_heartbeats([beat(ONE, START_MS, said_ms=old)])
    cuts.on_heartbeats([beat(TWO, START_MS, said_ms=START_MS - 3_600_000)])
    assert cuts.live() == frozenset()
