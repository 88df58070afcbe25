"""Which events an audit service handed over, and how far back that is looked for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from ringfence.audit.trail.handover import ContentDigest, HandoverLookup, content_digest
from ringfence.kernel.crypto.jws import sign_payload
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditIntake
from ringfence.messages.base import Topic
from ringfence.messages.topics import AUDIT_INTAKE
from ringfence.model.audit_log.merkle import Hash
from tests.support.audit_fixtures import TD, AuditFixtures

EACH = 10
"""So many events are in a message."""


def event(number: int) -> dict[str, Any]:
    return {"metadata": {"uid": f"event-{number}"}, "unmapped": {"event_code": "made"}}


def hash_of(number: int) -> Hash:
    """What stands for the hash of an event in its chain."""
    return number.to_bytes(32)


def asked(*numbers: int) -> dict[Hash, ContentDigest]:
    return {hash_of(number): content_digest(event(number)) for number in numbers}


def hashes(*numbers: int) -> frozenset[Hash]:
    return frozenset(map(hash_of, numbers))


MADE_UP = {b"made up": b"made up"}


class Intake:
    """One partition of `audit.intake` that counts what is read of it."""

    def __init__(self, office: AuditFixtures) -> None:
        self._office = office
        self._records: list[Received] = []
        self.read = 0

    def add(self, events: Sequence[dict[str, Any]], by: SigningKey | None = None) -> None:
        key = by or self._office.key("service", "audit")
        entries = [{"key": "bot", "event": one} for one in events]
        claims = {"iss": key.id, "aud": TD, "iat": 1, "jti": "j", "entries": entries}
        compact = sign_payload(AuditIntake, json.dumps(claims).encode(), key)
        self._records.append(self._office.received(AUDIT_INTAKE, compact))

    def messages(self, count: int) -> None:
        for _ in range(count):
            first = len(self._records) * EACH
            self.add([event(first + number) for number in range(EACH)])

    async def bounds(self, topic: Topic[Any], partition: int) -> tuple[int, int]:
        return 0, len(self._records)

    async def records(
        self, topic: Topic[Any], partition: int, start: int, end: int
    ) -> AsyncIterator[Received]:
        for record in self._records[start:end]:
            self.read += 1
            yield record


@pytest.fixture
def intake() -> Intake:
    return Intake(AuditFixtures())


def handed_over(intake: Intake, taken: int, enough: int) -> HandoverLookup:
    return HandoverLookup(intake, intake._office.trust, {0: taken}, max_others=enough)  # type: ignore[arg-type]


async def test_recently_chained_events_are_found_without_reading_all(intake: Intake) -> None:
    intake.messages(1000)
    wanted = 9999, 9990, 9985
    assert await handed_over(intake, 1000, 100).find(0, asked(*wanted)) == hashes(*wanted)
    assert intake.read == 50


async def test_event_never_handed_over_does_not_cause_reading_all(intake: Intake) -> None:
    intake.messages(1000)
    assert await handed_over(intake, 1000, 500).find(0, asked(9999) | MADE_UP) == hashes(9999)
    assert intake.read == 50 + 200, "the first stretch has one less than enough that are not asked for"


async def test_repeated_old_events_do_not_cause_reading_all(intake: Intake) -> None:
    intake.messages(1000)
    wanted = asked(9999, 8000, 4000, 10) | MADE_UP
    assert await handed_over(intake, 1000, 500).find(0, wanted) == hashes(9999, 8000)
    assert intake.read == 50 + 200


async def test_event_handed_over_twice_is_found_between(intake: Intake) -> None:
    intake.messages(300)
    for _ in range(240):
        intake.add([event(number) for number in range(EACH)])
    assert await handed_over(intake, 540, 2600).find(0, asked(2999)) == hashes(2999)


async def test_intake_of_other_signers_is_neither_found_nor_counted(intake: Intake) -> None:
    intake.messages(10)
    stranger = intake._office.key("agent", "bot")
    for number in range(300):
        intake.add([event(10_000 + number)], by=stranger)
    assert await handed_over(intake, 310, 5).find(0, asked(99, 10_100)) == hashes(99)


async def test_intake_after_the_read_end_is_found(intake: Intake) -> None:
    intake.messages(40)
    assert await handed_over(intake, 10, 20).find(0, asked(399)) == hashes(399)


async def test_unchained_intake_is_not_read_without_a_need(intake: Intake) -> None:
    """Others hand over while nobody chains. What was chained last stands before that."""
    intake.messages(1100)
    assert await handed_over(intake, 100, 100).find(0, asked(999)) == hashes(999)
    assert intake.read == 50 + 50


async def test_behind_a_committed_offset_that_was_set_back_everything_is_read(intake: Intake) -> None:
    intake.messages(1020)
    assert await handed_over(intake, 10, 100).find(0, asked(10_050) | MADE_UP) == hashes(10_050)
    assert intake.read == 1020


async def test_an_event_that_stands_twice_was_handed_over_twice(intake: Intake) -> None:
    intake.messages(1)
    twice = {hash_of(5): content_digest(event(5)), b"elsewhere": content_digest(event(5))}
    assert await handed_over(intake, 1, 100).find(0, twice) == frozenset(twice)
