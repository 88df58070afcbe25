"""Writes `trail.json`: an audit trail of the version before ADR 0063, with events that its writer chained directly.

Run once, by that code; README.md says how. The code of today chains no event so.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient

from ringfence.audit.chaining import GROUP, STRAYS_GROUP, ChainWriter
from ringfence.audit.settings import AuditSettings
from ringfence.dev.kafka import EmbeddedKafka
from ringfence.kernel.jws import parse, sign
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.base import Topic
from ringfence.messages.registry import AgentSuspend
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDIT_INTAKE, SERVICE_EVENT
from ringfence.model.audit_chain import Source
from tests.world import Party, World, scope

DEPLOY = scope("staging", ("deploy",), ("env/staging/*",))
AGENTS = ("deploy-bot", "test-bot", "doc-bot")


async def told(world: World, sam: Party, agent: str) -> None:
    """An agent is registered and suspended, and both are on the trail."""
    await world.agent(agent, sam, DEPLOY)
    await world.accepted(world.claims(AgentSuspend, sam, agent_id=agent, reason="odd"), sam)
    for record in await world.records(SERVICE_EVENT):
        uid = Source(record.topic_name, record.partition, record.offset).uid
        await world.consume_until(AUDIT, lambda event, uid=uid: event.headers["ce_id"] == uid)  # type: ignore[misc]


async def write_trail(world: World) -> None:
    signing = AuditSettings(linger_ms=10, checkpoint_s=0.1)
    async with world.running("registry", "audit", own={"audit": signing}):
        sam = await world.user("sam", ("sponsor",), DEPLOY)
        await world.target("staging")
        await told(world, sam, AGENTS[0])
        await world.consume_until(
            AUDIT_CHECKPOINT, lambda record: parse(record.value).unverified_claims(AuditCheckpoint).size >= 3
        )
    # From here on it signs no checkpoint, and is killed: what it chained directly is told by `audit.chained` alone.
    ChainWriter.close = ChainWriter._let_go  # type: ignore[method-assign]
    async with world.running(
        "registry", "audit", own={"audit": AuditSettings(linger_ms=10, checkpoint_s=3600)}
    ):
        for agent in AGENTS[1:]:
            await told(world, sam, agent)


async def offsets(world: World, group: str, topic: Topic[Any]) -> dict[str, int]:
    admin = AIOKafkaAdminClient(bootstrap_servers=world.bootstrap)
    await admin.start()
    try:
        found = await admin.list_consumer_group_offsets(f"{world.prefix}.{group}")
    finally:
        await admin.close()
    name = topic.name(world.prefix)
    return {
        str(at.partition): one.offset for at, one in found.items() if at.topic == name and one.offset >= 0
    }


async def records(world: World, topic: Topic[Any]) -> list[dict[str, Any]]:
    return [
        {
            "partition": record.partition,
            "offset": record.offset,
            "appended_at_ms": record.appended_at_ms,
            "key": record.key,
            "value": base64.b64encode(record.value).decode(),
        }
        for record in await world.records(topic)
    ]


async def main(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kafka = EmbeddedKafka(Path(folder) / "kafka", 0, log_path=Path(folder) / "kafka.log")
        await asyncio.to_thread(kafka.start)
        try:
            async with World.open(kafka.bootstrap) as world:
                await write_trail(world)
                document = {
                    "trust_domain": world.td,
                    "root_kid": world.fingerprint,
                    "bundle": sign(world.bundle, world.root.key, header_jwk=True),
                    "now_s": int(time.time()),
                    "taken": await offsets(world, GROUP, AUDIT_INTAKE),
                    "marks": await offsets(world, STRAYS_GROUP, AUDIT),
                    **{
                        topic.what: await records(world, topic)
                        for topic in (AUDIT, AUDIT_INTAKE, AUDIT_CHECKPOINT)
                    },
                }
        finally:
            kafka.stop()
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
