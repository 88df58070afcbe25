"""Which events an audit service handed over, and how far back that is looked for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from ringfence.audit.handed_over import HandedOver, Mark, mark_of
from ringfence.kernel.jws import sign_payload
from ringfence.kernel.kafka import Received
from ringfence.kernel.keys import SigningKey
from ringfence.messages.audit import AuditIntake
from ringfence.messages.base import Topic
from ringfence.messages.topics import AUDIT_INTAKE
from tests.audit_office import TD, Office

EACH = 10
"""So many events are in a message."""


def event(number: int) -> dict[str, Any]:
    return {"metadata": {"uid": f"event-{number}"}, "unmapped": {"event_code": "made"}}


def marks(*numbers: int) -> frozenset[Mark]:
    return frozenset(mark_of(event(number)) for number in numbers)


class Intake:
    """One partition of `audit.intake` that counts what is read of it."""

    def __init__(self, office: Office) -> None:
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
    return Intake(Office())


def handed_over(intake: Intake, taken: int, enough: int) -> HandedOver:
    return HandedOver(intake, intake._office.trust, {0: taken}, enough=enough)  # type: ignore[arg-type]


async def test_what_was_chained_last_is_found_and_the_rest_is_not_read(intake: Intake) -> None:
    intake.messages(1000)
    wanted = marks(9999, 9990, 9985)
    assert await handed_over(intake, 1000, 100).among(0, wanted) == wanted
    assert intake.read == 50


async def test_what_nobody_handed_over_makes_nobody_read_all(intake: Intake) -> None:
    intake.messages(1000)
    asked = marks(9999) | {b"made up"}
    assert await handed_over(intake, 1000, 500).among(0, asked) == marks(9999)
    assert intake.read == 50 + 200, "the first stretch has one less than enough that are not asked for"


async def test_what_somebody_repeats_of_long_ago_makes_nobody_read_all(intake: Intake) -> None:
    intake.messages(1000)
    asked = marks(9999, 8000, 4000, 10) | {b"made up"}
    assert await handed_over(intake, 1000, 500).among(0, asked) == marks(9999, 8000)
    assert intake.read == 50 + 200


async def test_what_was_handed_over_twice_lies_between(intake: Intake) -> None:
    intake.messages(300)
    for _ in range(240):
        intake.add([event(number) for number in range(EACH)])
    wanted = marks(2999)
    assert await handed_over(intake, 540, 2600).among(0, wanted) == wanted


async def test_what_strangers_sign_is_neither_found_nor_counted(intake: Intake) -> None:
    intake.messages(10)
    stranger = intake._office.key("agent", "bot")
    for number in range(300):
        intake.add([event(10_000 + number)], by=stranger)
    wanted = marks(99, 10_100)
    assert await handed_over(intake, 310, 5).among(0, wanted) == marks(99)


async def test_what_comes_after_what_was_read_counts_too(intake: Intake) -> None:
    intake.messages(40)
    wanted = marks(399)
    assert await handed_over(intake, 10, 20).among(0, wanted) == wanted
