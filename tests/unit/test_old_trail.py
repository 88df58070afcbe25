"""A trail of the version before ADR 0063 (`contract/golden/records/trail.json`): who takes over goes on behind it."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import pytest

from ringfence.audit.trail import chain_recovery
from ringfence.audit.trail.chain_recovery import RecoveredChain, recover_chains
from ringfence.audit.trail.handover import parse_intake
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Topic
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDIT_INTAKE
from ringfence.model.audit_log.chain import event_of
from ringfence.model.audit_log.merkle import TreeHead, leaf_hash

FILE = Path(__file__).parents[1] / "contract/golden/records/trail.json"
TOPICS: tuple[Topic[Any], ...] = (AUDIT, AUDIT_INTAKE, AUDIT_CHECKPOINT)


class OldTrail:
    """The topics of the trail, as whoever takes over reads them."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = json.loads(FILE.read_text())
        self.trust = TrustStore(self.document["trust_domain"], self.document["root_kid"])
        self.trust.load(self.document["bundle"], self.document["now_s"])
        self.kept = {topic: [_record(topic, one) for one in self.document[topic.what]] for topic in TOPICS}

    def of(self, partition: int) -> list[Received]:
        return [record for record in self.kept[AUDIT] if record.partition == partition]

    def drop(self, topic: Topic[Any], which: Callable[[Received], bool]) -> None:
        self.kept[topic] = [record for record in self.kept[topic] if not which(record)]

    async def recovered(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, RecoveredChain]:
        monkeypatch.setattr(chain_recovery, "Stretches", lambda _: self)
        taken, marks = (
            {int(partition): offset for partition, offset in self.document[name].items()}
            for name in ("taken", "marks")
        )
        now_ms = self.document["now_s"] * 1000
        return await recover_chains(
            BusSettings(trust_domain=self.trust.trust_domain),
            self.trust,
            remember=1000,
            chained=taken,
            checked=marks,
            now_ms=now_ms,
        )

    # --- what `Stretches` does ---

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def partitions(self, topic: Topic[Any]) -> list[int]:
        return sorted({record.partition for record in self.kept[topic]})

    async def is_settled(self, topic: Topic[Any], partition: int) -> bool:
        return True

    async def bounds(self, topic: Topic[Any], partition: int) -> tuple[int, int]:
        offsets = [record.offset for record in self.kept[topic] if record.partition == partition]
        return 0, max(offsets, default=-1) + 1

    async def records(
        self, topic: Topic[Any], partition: int, start: int, end: int
    ) -> AsyncIterator[Received]:
        for record in self.kept[topic]:
            if record.partition == partition and start <= record.offset < end:
                yield record

    async def whole(self, topic: Topic[Any]) -> AsyncIterator[Received]:
        for record in self.kept[topic]:
            yield record


def _record(topic: Topic[Any], one: dict[str, Any]) -> Received:
    value = base64.b64decode(one["value"])
    return Received(
        topic,
        topic.name("ringfence"),
        one["partition"],
        one["offset"],
        one["appended_at_ms"],
        one["key"],
        value,
    )


@pytest.fixture
def trail() -> OldTrail:
    return OldTrail()


def vouches(trail: OldTrail, record: Received) -> bool:
    return bool(parse_intake(record, trail.trust).chained)


async def test_who_takes_over_an_old_trail_goes_on_behind_its_last_event(
    trail: OldTrail, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await trail.recovered(monkeypatch)
    assert found.keys() == {0, 1}
    for partition, one in found.items():
        records = trail.of(partition)
        leaves = [leaf_hash(record.value) for record in records]
        assert (one.tip.head, one.tip.last) == (TreeHead().grown(leaves), leaves[-1])
        events = [event_of(record.value) for record in records]
        assert one.recent_uids == [event.uid for event in events if event is not None]
        assert (one.faults, one.unauthorised) == ([], [])
        assert one.signed_size < one.tip.head.size, "or the signed head alone tells it"


async def test_without_what_it_vouched_for_an_old_trail_would_fork(
    trail: OldTrail, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above is about that, and `audit.chained` is read for as long as there may be some."""
    vouched = [record for record in trail.kept[AUDIT_INTAKE] if vouches(trail, record)]
    assert {record.partition for record in vouched} == {0}
    trail.drop(AUDIT_INTAKE, lambda record: record in vouched)
    found = await trail.recovered(monkeypatch)
    assert found[1].faults == []
    assert found[0].faults[0].startswith("no audit service handed over event")
    assert found[0].tip.head.size < len(trail.of(0))


async def test_what_a_stranger_put_behind_an_old_trail_is_passed_over(
    trail: OldTrail, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = (await trail.recovered(monkeypatch))[0].tip
    last = trail.of(0)[-1]
    forged = json.loads(last.value)
    forged["message"] = "nothing happened"
    forged["unmapped"]["chain"] = {"tree": "0", "seq": honest.head.size + 1, "prev": honest.last.hex()}
    trail.kept[AUDIT].append(last._replace(offset=last.offset + 1, value=json.dumps(forged).encode()))
    found = await trail.recovered(monkeypatch)
    assert found[0].tip == honest
    assert found[0].unauthorised == [range(last.offset + 1, last.offset + 2)]
