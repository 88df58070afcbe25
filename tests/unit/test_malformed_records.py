"""What audit looks at on topics that it only follows: when it has to wait before it says that there is garbage."""

from __future__ import annotations

from typing import cast

import pytest

from ringfence.audit.malformed_records import MalformedRecordHandler
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.kafka.batch_handlers import concurrent
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditWitness
from ringfence.messages.operations import Heartbeat
from ringfence.messages.topics import AUDIT_CHECKPOINT, HEARTBEAT
from ringfence.model.records.directory import Directory
from tests.support.audit_fixtures import AuditFixtures
from tests.support.in_memory_registry import FixedClock


class Desk:
    """What is looked at with tables that come to know who vera is once they are asked to."""

    def __init__(self) -> None:
        self.office = AuditFixtures()
        self.records = [*self.office.staff(), self.office.user("vera", "auditor")]
        self.directory = Directory(self.office.trust, SystemClock(), grace_ms=None)
        self.buried: list[str] = []
        self.reachable = True
        self.clock = FixedClock(self.office.now_ms)
        followed = MalformedRecordHandler(self.office.trust, self.directory, self.clock, self._caught_up)
        letters = cast(DeadLetters, self)
        self._batches = {
            HEARTBEAT: concurrent(followed.heartbeat, letters),
            AUDIT_CHECKPOINT: concurrent(followed.checkpoint, letters),
        }

    async def _caught_up(self, timeout_s: float) -> bool:
        if self.reachable:
            for record in self.records:
                self.directory.on_records([record])
        return self.reachable

    async def send(self, record: Received, error: InvalidMessageError) -> None:
        self.buried.append(error.code)

    async def look(self, *records: Received) -> list[str]:
        await self._batches[records[0].topic](records)
        return self.buried

    def word(self, by: str) -> Received:
        key = self.office.key("user", by)
        word = self.office.claims(AuditWitness, key, tree="0", size=1, root="0" * 64)
        return self.office.received(AUDIT_CHECKPOINT, sign(word, key), key=f"0/{by}")


async def test_reader_waits_for_records_before_it_rejects_a_user() -> None:
    desk = Desk()
    assert await desk.look(desk.word("vera")) == []
    assert await desk.look(desk.word("sam")) == ["not_auditor"]


async def test_while_the_tables_may_be_behind_nothing_is_said() -> None:
    desk = Desk()
    desk.reachable = False
    with pytest.raises(UnavailableError):
        await desk.look(desk.word("nobody"))
    desk.reachable = True
    assert await desk.look(desk.word("nobody")) == ["key_unknown"]


async def test_while_no_trust_bundle_is_in_force_nothing_is_said() -> None:
    desk = Desk()
    key = desk.office.key("service", "gateway")
    beat = desk.office.signed(HEARTBEAT, desk.office.claims(Heartbeat, key, at_ms=1), key)
    garbage = desk.office.received(HEARTBEAT, "garbage")
    assert await desk.look(beat, garbage) == ["not_a_jws"]
    desk.clock.ms = desk.office.bundle.exp * 1000
    with pytest.raises(UnavailableError, match="expired"):
        await desk.look(beat, garbage)
    assert desk.buried == ["not_a_jws"]
