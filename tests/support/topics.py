"""The topics that a test made, deleted at its end."""

from __future__ import annotations

from aiokafka.admin import AIOKafkaAdminClient

from ringfence.messages.topics import ALL


async def delete_topics(bootstrap: str, prefix: str) -> None:
    """Delete all of Ringfence's topics with a prefix: a broker that keeps those of all tests takes longer for each."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.delete_topics([topic.name(prefix) for topic in ALL])
    finally:
        await admin.close()
