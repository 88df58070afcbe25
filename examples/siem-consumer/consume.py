"""A SIEM's consumer: writes audit events to a file, one line of JSON each, and checks that none is missing or changed.

    python examples/siem-consumer/consume.py FILE            # until Ctrl-C
    python examples/siem-consumer/consume.py FILE --once     # up to the present end of the topic
    python examples/siem-consumer/consume.py FILE --check    # what is in the file, without Kafka

aiokafka is all it takes. Exit 1 where the chain of events is broken.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition


class Chains:
    """The links between events. In each chain `seq` goes up by one, and `prev` is the hash of the event before."""

    def __init__(self) -> None:
        self.last: dict[int, tuple[int, str]] = {}
        """By chain: `seq` and hash of the last event."""
        self.events = 0
        self.faults = 0

    def take(self, event: bytes) -> bool:
        """Check one event. Returns whether it is new: after a crash the last ones come again."""
        link: dict[str, Any] = json.loads(event)["unmapped"]["chain"]
        tree, seq = link["tree"], link["seq"]
        # The leaf hash of RFC 9162, 2.1, over the bytes as they are on the topic.
        digest = hashlib.sha256(b"\0" + event).hexdigest()
        # The first event that is seen has nothing to be compared with: those before it may have expired.
        before, hash_before = self.last.get(tree, (seq - 1, link["prev"]))
        if seq <= before:
            return False
        if seq != before + 1:
            self.fault(f"chain {tree}: {seq - before - 1} events are missing after {before}")
        elif link["prev"] != hash_before:
            self.fault(f"chain {tree}: event {before} is not the one that event {seq} follows")
        self.last[tree] = (seq, digest)
        self.events += 1
        return True

    def fault(self, text: str) -> None:
        self.faults += 1
        print(text, file=sys.stderr)


async def consume(file: Path, chains: Chains, *, once: bool) -> None:
    """Append each new event to the file, unchanged to the byte. Offsets are committed after that: at least once."""
    prefix = os.environ.get("RINGFENCE_TOPIC_PREFIX", "ringfence")
    consumer = AIOKafkaConsumer(
        f"{prefix}.audit.v1",
        bootstrap_servers=os.environ.get("RINGFENCE_KAFKA", "localhost:9092"),
        group_id=f"{prefix}.siem.example",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",  # audit writes in transactions
    )
    async with consumer:
        await consumer.getmany(timeout_ms=0)
        with file.open("ab") as out:
            while not (once and await at_end(consumer)):
                batch = await consumer.getmany(timeout_ms=500)
                for partition, records in batch.items():
                    for record in records:
                        keep(record.value, partition, record.offset, chains, out)
                if batch:
                    out.flush()
                    os.fsync(out.fileno())
                    await consumer.commit()


def keep(value: bytes, partition: TopicPartition, offset: int, chains: Chains, out: Any) -> None:
    try:
        new = chains.take(value)
    except (ValueError, KeyError, TypeError, RecursionError):
        chains.fault(f"partition {partition.partition}, offset {offset}: not an audit event")
        return
    if new:
        out.write(value + b"\n")


async def at_end(consumer: AIOKafkaConsumer) -> bool:
    partitions = consumer.assignment()
    ends = await consumer.end_offsets(partitions)
    return bool(partitions) and all([await consumer.position(one) >= ends[one] for one in partitions])


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    chains = Chains()
    if options.file.exists():
        for line in options.file.read_bytes().splitlines():
            chains.take(line)  # goes on behind what it has
    if not options.check:
        this = asyncio.current_task()
        assert this is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, this.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await consume(options.file, chains, once=options.once)
    print(f"{chains.events} events in {len(chains.last)} chains, {chains.faults} faults")
    return 1 if chains.faults else 0


sys.exit(asyncio.run(main()))
