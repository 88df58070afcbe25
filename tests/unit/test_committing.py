"""What is done is committed together, a few times a second; never before it is done, nor what is another's by now."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, KafkaError

from ringfence.kernel.kafka.consumer import COMMIT_MS, OffsetCommitter
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import LEASE

TOPIC = "ringfence.lease.v1"
ONE, TWO = TopicPartition(TOPIC, 1), TopicPartition(TOPIC, 2)


@dataclass
class Member:
    """Remembers what it was told to commit."""

    held: set[TopicPartition] = field(default_factory=lambda: {ONE, TWO})
    committed: list[dict[TopicPartition, int]] = field(default_factory=list)
    refuses: list[Exception] = field(default_factory=list)

    def assignment(self) -> set[TopicPartition]:
        return self.held

    async def commit(self, ends: dict[TopicPartition, int]) -> None:
        if self.refuses:
            raise self.refuses.pop()
        self.committed.append(ends)


def records(at: TopicPartition, *offsets: int) -> list[Received]:
    return [Received(LEASE, TOPIC, at.partition, offset, 0, "key", b"") for offset in offsets]


def of(member: Member) -> OffsetCommitter:
    consumer: Any = member
    return OffsetCommitter(consumer)


def standing(commits: OffsetCommitter) -> tuple[bool, bool]:
    return commits.waiting, commits.due


async def test_batches_are_committed_together_behind_their_last_records() -> None:
    member = Member()
    commits = of(member)
    assert standing(commits) == (False, False)
    commits.done(records(ONE, 3, 4))
    commits.done([*records(TWO, 9), *records(ONE, 6, 5)])
    assert standing(commits) == (True, False), "it was done this moment"
    await asyncio.sleep(COMMIT_MS / 1000)
    assert standing(commits) == (True, True)
    await commits.flush()
    assert member.committed == [{ONE: 7, TWO: 10}]
    assert standing(commits) == (False, False)
    await commits.flush()
    assert len(member.committed) == 1, "nothing new, nothing committed"


async def test_offsets_of_a_revoked_partition_are_not_committed() -> None:
    member = Member(held={TWO})
    commits = of(member)
    commits.done([*records(ONE, 3), *records(TWO, 4)])
    await commits.flush()
    commits.done(records(ONE, 4))
    await commits.flush()
    assert member.committed == [{TWO: 5}]


@pytest.mark.parametrize("error", [CommitFailedError(), KafkaError()])
async def test_refused_commit_is_not_repeated_with_the_next(error: Exception) -> None:
    member = Member(refuses=[error])
    commits = of(member)
    commits.done(records(ONE, 3))
    await commits.flush()
    commits.done(records(TWO, 4))
    await commits.flush()
    assert member.committed == [{TWO: 5}]
