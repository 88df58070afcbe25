"""Prints audit events of credentials as lines of JSON, each at least once. aiokafka is all it takes.

RINGFENCE_KAFKA=localhost:9092 python docs/examples/consume_aiokafka.py
"""

import asyncio
import contextlib
import json
import os
import signal
import sys

from aiokafka import AIOKafkaConsumer, TopicPartition


async def main() -> None:
    prefix = os.environ.get("RINGFENCE_TOPIC_PREFIX", "ringfence")
    consumer = AIOKafkaConsumer(
        f"{prefix}.audit.v1",
        bootstrap_servers=os.environ.get("RINGFENCE_KAFKA", "localhost:9092"),
        group_id=f"{prefix}.siem.aiokafka",
        enable_auto_commit=False,  # an offset is committed after its event is handled
        auto_offset_reset="earliest",
        isolation_level="read_committed",  # audit writes in transactions
    )
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        async with consumer:  # at the end it leaves the group, so that others take over at once
            async for record in consumer:
                handle(record.value)
                at = TopicPartition(record.topic, record.partition)
                await consumer.commit({at: record.offset + 1})


def handle(value: bytes) -> None:
    try:
        event = json.loads(value)
        code = event["metadata"]["event_code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        print("not an audit event; passed over", file=sys.stderr)
        return
    if code.startswith("credential."):
        print(
            json.dumps({"event": code, "lease": event["unmapped"].get("lease"), "message": event["message"]}),
            flush=True,
        )


asyncio.run(main())
