"""While nobody would believe audit, what it has to tell waits: a dead letter of that would be what it tells next."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from ringfence.audit.trail.handover import Intake, PendingEvent
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Topic
from ringfence.messages.credential import Coordinates
from ringfence.messages.operations import DeadLetter, ServiceEvent
from ringfence.messages.topics import (
    AUDIT_CHECKPOINT,
    AUDIT_INTAKE,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    HEARTBEAT,
    SERVICE_EVENT,
)
from ringfence.messages.trust import TrustBundle
from ringfence.model.audit_log.chain import Source
from tests.flows.test_audit_chain import (
    QUICK,
    chained,
    letter_in,
    signed_up_to_the_end,
    told_as_buried,
    told_of,
    verified,
)
from tests.support.world import DAY_S, WITHIN_S, Party, World


def tries(world: World, group: str) -> float:
    """How often a batch of a group of audit's failed."""
    return metrics.BATCH_RETRIES.labels(f"{world.prefix}.{group}")._value.get()


async def letters_about(world: World, *topics: Topic[Any]) -> list[DeadLetter]:
    names = {topic.name(world.prefix) for topic in topics}
    return [one for one in map(letter_in, await world.records(DEAD_LETTER)) if one.source.topic in names]


async def waits(world: World, group: str = "audit") -> None:
    """Once audit has tried to go on, and could not; or, as it must not, went on and found itself unbelieved."""
    before, found = tries(world, group), await world.records(DEAD_LETTER)
    name = AUDIT_INTAKE.name(world.prefix)
    await world.until(
        lambda: (
            tries(world, group) > before or any(letter_in(one).source.topic == name for one in found) or None
        ),
        "audit waits",
    )


async def told(world: World, at: Coordinates) -> dict[str, Any]:
    """The event about a record, in the trail."""
    record = await chained(world, Source(at.topic, at.partition, at.offset).uid)
    return dict(json.loads(record.value))


async def denies(world: World) -> list[str]:
    return list((await world.get("audit", "/readyz")).json()["denies"])


async def test_records_during_an_expired_bundle_wait_for_the_next_bundle(world: World) -> None:
    async with world.running("audit", own={"audit": QUICK}):
        before = await told(world, await world.send(CREDENTIAL_REQUEST, "x", b"garbage"))
        assert before["status_code"] == "not_a_jws"
        ending = world.make_bundle(2).model_copy(update={"exp": int(time.time()) + 2})
        await world.publish_trust(ending)
        await world.until(lambda: time.time() > ending.exp or None, "its end")
        said = world.claims(
            ServiceEvent,
            Party("registry", world.key("registry")),
            kind="finding",
            subject="x",
            at_ms=int(time.time() * 1000),
        )
        sent = [
            await world.send(CREDENTIAL_REQUEST, "x", b"garbage"),
            await world.send(SERVICE_EVENT, "registry", sign(said, world.key("registry"))),
            await world.send(HEARTBEAT, "x", b"garbage"),
            await world.send(SERVICE_EVENT, "x", b"garbage"),
        ]
        await waits(world)
        (why,) = await denies(world)
        assert "trust bundle 2 expired" in why
        await world.publish_trust(world.make_bundle(3))
        assert (await told(world, sent[0]))["status_code"] == "not_a_jws"
        assert (await told(world, sent[1]))["unmapped"]["verified"]["by"] == world.key("registry").id
        await told_as_buried(world, *sent[2:])
        assert await denies(world) == []
        assert await letters_about(world, AUDIT_INTAKE, AUDIT_CHECKPOINT) == []
        assert len(await letters_about(world, HEARTBEAT, SERVICE_EVENT)) == 2
        await signed_up_to_the_end(world)
        assert (await verified(world)).faults == []


async def test_entries_handed_over_before_bundle_expiry_are_chained_after_it(world: World) -> None:
    """It was on its way meanwhile, and appended after the end."""
    async with world.running("audit", own={"audit": QUICK}):
        ending = world.make_bundle(2).model_copy(update={"exp": int(time.time()) + 2})
        await world.publish_trust(ending)
        await world.until(lambda: time.time() > ending.exp or None, "its end")
        source = await hand_over_by(world, world.key("audit"))
        await waits(world, "audit-chain")
        await world.publish_trust(world.make_bundle(3))
        await chained(world, source.uid)
        assert await letters_about(world, AUDIT_INTAKE) == []


async def test_audit_waits_for_a_bundle_with_its_key_after_its_key_ended(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.running("audit", own={"audit": QUICK}):
        await told(world, await world.send(CREDENTIAL_REQUEST, "x", b"garbage"))
        other, ended_s = SigningKey.generate(world.key("audit").id), int(time.time()) + 1
        await world.publish_trust(with_keys(world.make_bundle(2), other, ended_s))
        async with asyncio.timeout(WITHIN_S):  # the bundle is in force at audit, and the key has ended
            while not await denies(world):
                await asyncio.sleep(0.1)
        sent = await world.send(CREDENTIAL_REQUEST, "x", b"garbage")
        await waits(world)
        (why,) = await denies(world)
        assert "--rotate-service audit" in why
        # Another replica, with the key that counts, hands over: that is chained, and signed by nobody yet.
        await chained(world, (await hand_over_by(world, other)).uid)
        await checkpoint_was_due(world, caplog)
        await world.publish_trust(with_keys(world.make_bundle(3), other, ended_s + DAY_S))
        assert (await told(world, sent))["status_code"] == "not_a_jws"
        assert await denies(world) == []
        await signed_up_to_the_end(world)
        assert await letters_about(world, AUDIT_INTAKE, AUDIT_CHECKPOINT) == []


def with_keys(bundle: TrustBundle, other: SigningKey, not_after: int) -> TrustBundle:
    """A bundle in which audit's key ends then, and that has another one for it besides."""
    services = list(bundle.services)
    (at,) = (at for at, one in enumerate(services) if "audit" in one.roles)
    (own,) = services[at].keys
    keys = own.model_copy(update={"not_after": not_after}), other.record(own.not_after)
    services[at] = services[at].model_copy(update={"keys": keys})
    return bundle.model_copy(update={"services": tuple(services)})


async def hand_over_by(world: World, key: SigningKey) -> Source:
    intake = Intake(world.publisher, lambda: key, world.td, SystemClock())
    source = Source("x", 0, 1)
    await intake.hand_over([PendingEvent("x", source.uid, told_of(source), None)])
    return source


async def checkpoint_was_due(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Once audit did not sign; or, as it must not, signed and found itself unbelieved."""
    name, found = AUDIT_CHECKPOINT.name(world.prefix), await world.records(DEAD_LETTER)
    await world.until(
        lambda: (
            "no checkpoint this time" in caplog.text
            or any(letter_in(one).source.topic == name for one in found)
            or None
        ),
        "a checkpoint that is not signed",
    )
