"""Records that Kafka removes before audit reads them: audit says so on its trail, and an auditor finds each of them."""

from __future__ import annotations

from typing import Any

import orjson
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from ringfence.audit.settings import AuditSettings
from ringfence.client.reports.auditor import TrailReport, verify_trail
from ringfence.client.settings import ClientSettings
from ringfence.messages.base import Topic
from ringfence.messages.credential import Coordinates
from ringfence.messages.topics import AUDIT, AUDIT_INTAKE, DEAD_LETTER, HEARTBEAT, SERVICE_EVENT
from ringfence.model.audit_log.chain import Source
from tests.support.world import World

QUICK = AuditSettings(linger_ms=10, checkpoint_s=0.1)


async def verified(world: World) -> TrailReport:
    fields = world.settings("audit").model_dump()
    settings = ClientSettings(
        **{name: fields[name] for name in ClientSettings.model_fields if name in fields}
    )
    return await verify_trail(settings, settle_s=0)


async def remove(world: World, topic: Topic[Any], at: Coordinates) -> None:
    """All up to this record and with it, as retention would."""
    admin = AIOKafkaAdminClient(bootstrap_servers=world.bootstrap)
    await admin.start()
    try:
        place = TopicPartition(topic.name(world.prefix), at.partition)
        await admin.delete_records({place: RecordsToDelete(before_offset=at.offset + 1)})
    finally:
        await admin.close()


async def junk(world: World) -> Coordinates:
    """A record that audit tells of."""
    return await world.send(SERVICE_EVENT, "policy", "not believed by anybody")


async def told_of(world: World, at: Coordinates) -> None:
    uid = Source(at.topic, at.partition, at.offset).uid
    await world.consume_until(AUDIT, lambda record: record.headers["ce_id"] == uid)


async def test_audit_tells_of_records_that_were_gone_and_an_auditor_names_each(world: World) -> None:
    async with world.running("audit", own={"audit": QUICK}):
        await told_of(world, await junk(world))
    lost = [await junk(world) for _ in range(3)]
    kept = await junk(world)
    await remove(world, SERVICE_EVENT, lost[-1])
    async with world.running("audit", own={"audit": QUICK}):
        await told_of(world, kept)
        finding = await world.consume_until(AUDIT, lambda record: b'"records_gone"' in record.value)
        ready = (await world.get("audit", "/readyz")).json()
        metrics = (await world.get("audit", "/metrics")).text
    # One more may be gone: what audit said when it was stopped stands before them.
    name, first, last = lost[0].topic, lost[0].offset, lost[-1].offset
    said = orjson.loads(finding.value)
    assert (said["metadata"]["event_code"], said["severity"], said["is_alert"]) == ("finding", "High", True)
    assert f"to {last} of {name}, partition 0, went from Kafka before {world.prefix}.audit" in said["message"]
    assert any(f"to {last} of {name}" in warning for warning in ready["warnings"])
    assert f'ringfence_records_gone_total{{group="{world.prefix}.audit",topic="{name}"}}' in metrics

    # What comes behind is what audit said when it was stopped again: it is there, and nobody has read it yet.
    fault, *others = sorted((await verified(world)).faults, key=lambda one: one.offset or 0)
    assert {one.kind for one in (fault, *others)} == {"missing"}
    assert all(one.offset is not None and one.offset > kept.offset for one in others)
    assert fault.offset is not None
    assert fault.offset <= first
    assert fault.message == f"gone without an event: {name}/0@{fault.offset} to {last}"


async def test_heartbeats_that_were_gone_are_no_alarm(world: World) -> None:
    """Whatever audit was away for: what it looks for among them is only what should not be there."""

    async def buried(at: Coordinates) -> None:
        await world.consume_until(
            DEAD_LETTER, lambda record: orjson.loads(record.value)["source"]["offset"] == at.offset
        )

    async with world.running("audit", own={"audit": QUICK}):
        await buried(await world.send(HEARTBEAT, "x", "garbage"))
    await remove(world, HEARTBEAT, await world.send(HEARTBEAT, "x", "garbage"))
    kept = await world.send(HEARTBEAT, "x", "garbage")
    async with world.running("audit", own={"audit": QUICK}):
        await buried(kept)
        await told_of(world, await junk(world))
        ready = (await world.get("audit", "/readyz")).json()
    assert any(f"{kept.topic}, partition 0, went" in warning for warning in ready["warnings"])
    assert not [record for record in await world.records(AUDIT) if b'"records_gone"' in record.value]


async def test_intake_record_lost_before_chaining_is_audited(world: World) -> None:
    async with world.running("audit", own={"audit": QUICK}):
        at = await junk(world)
        await told_of(world, at)
    (*_, last) = await world.records(AUDIT_INTAKE)
    lost = await world.send(AUDIT_INTAKE, last.key or "", last.value)
    await remove(world, AUDIT_INTAKE, lost)
    async with world.running("audit", own={"audit": QUICK}):
        finding = await world.consume_until(AUDIT, lambda record: b'"records_gone"' in record.value)
    message = orjson.loads(finding.value)["message"]
    assert (
        f"{lost.topic}, partition {lost.partition}, went from Kafka before {world.prefix}.audit-chain"
        in message
    )


async def test_a_trail_without_its_first_events_is_no_whole_one(world: World) -> None:
    """They were not old enough to be gone by their age. What they were about is not held against audit as well."""
    async with world.running("audit", own={"audit": QUICK}):
        for _ in range(3):
            await told_of(world, await junk(world))
    first, *_ = [
        record for record in await world.records(AUDIT) if record.key == "service.event" and record.value
    ]
    await remove(world, AUDIT, first.coordinates)
    faults = (await verified(world)).faults
    assert [(one.kind, one.tree, one.seq) for one in faults if one.kind != "missing"] == [
        ("removed", str(first.partition), 1)
    ]
    gone = orjson.loads(first.value)["unmapped"]["source"]["offset"]
    assert gone not in {one.offset for one in faults}
