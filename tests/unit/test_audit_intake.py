"""What is handed over to be chained: as it comes back to who handed it over, and as others read it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import orjson
import pytest

from ringfence.audit.trail.chain_writer import WrittenEventCache
from ringfence.audit.trail.handover import HandoverCache, Intake, PendingEvent, parse_intake
from ringfence.audit.verification import require_trust
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.messages.base import Topic
from ringfence.messages.topics import AUDIT, AUDIT_INTAKE, SERVICE_EVENT
from ringfence.model.audit_log.chain import linkable, linked, linked_event
from ringfence.model.audit_log.merkle import leaf_hash
from tests.support.audit_fixtures import TD, AuditFixtures

HASH = bytes(range(32))


class Sent(Publisher):
    """Keeps what is published."""

    def __init__(self) -> None:
        self.messages: list[Outbound] = []

    async def partitions(self, topic: Topic[Any]) -> list[int]:
        return [0]

    async def send_to(
        self, partition: int, topic: Topic[Any], type: str, records: Iterable[Outbound]
    ) -> list[range]:
        first = len(self.messages)
        self.messages += records
        return [range(first, len(self.messages))]


def event(number: int) -> dict[str, Any]:
    words = {"source": {"topic": "x", "partition": 0, "offset": number}, "nested": {"a": {}}}
    return {"unmapped": words, "metadata": {"uid": f"uid {number}"}, "message": "ähnlich"}


def told(number: int) -> PendingEvent:
    words = event(number)
    return PendingEvent("bot", f"uid {number}", linkable(words), None if number % 2 else "trace", words)


async def handed_over(office: AuditFixtures, lately: HandoverCache, *numbers: int) -> Received:
    sent = Sent()
    intake = Intake(sent, lambda: office.key("service", "audit"), TD, SystemClock(), lately)
    await intake.hand_over(told(number) for number in numbers)
    (message,) = sent.messages
    return came_back(office, message)


def came_back(office: AuditFixtures, message: Outbound) -> Received:
    record = office.received(AUDIT_INTAKE, message.value, key=message.key)
    return record._replace(raw_headers=[("ce_id", message.id.encode())])


async def test_handover_cache_equals_the_parsed_intake() -> None:
    office, lately = AuditFixtures(), HandoverCache()
    record = await handed_over(office, lately, 1, 2, 3)
    assert lately.events(record, office.trust) == parse_intake(record, office.trust)
    assert lately.events(record, office.trust) is None, "it is kept for the once that it is chained"


async def test_another_text_under_the_same_id_is_not_taken_for_it() -> None:
    office, lately = AuditFixtures(), HandoverCache()
    record = await handed_over(office, lately, 1)
    another = record._replace(value=record.value[:-1] + (b"A" if record.value[-1:] != b"A" else b"Q"))
    assert lately.events(another, office.trust) is None


async def test_cached_intake_of_a_revoked_key_is_rejected() -> None:
    office, lately = AuditFixtures(), HandoverCache()
    record = await handed_over(office, lately, 1)
    others = tuple(one for one in office.bundle.services if "audit" not in one.roles)
    office.trust.load(office.trust_bundle(2, services=others).value, office.now_ms / 1000)
    assert lately.events(record, office.trust) is None
    with pytest.raises(InvalidMessageError, match="no valid key"):
        parse_intake(record, office.trust)


async def test_intake_without_a_valid_key_sends_nothing() -> None:
    sent = Sent()

    def key() -> SigningKey:
        raise UnavailableError("ended")

    intake = Intake(sent, key, TD, SystemClock())
    await intake.hand_over([])
    with pytest.raises(UnavailableError, match="ended"):
        await intake.hand_over([told(1)])
    assert sent.messages == []


@pytest.mark.parametrize("at_once", [True, False])
async def test_intake_signed_by_an_ended_key_is_sent_again_with_the_next_key(at_once: bool) -> None:
    """Also where the next one is here when that is asked: by a bundle that came meanwhile, it was appended too late."""
    office, sent = AuditFixtures(), Sent()
    first, following = office.key("service", "audit"), office.key("service", "issuer")
    keys = iter([first, following if at_once else None, following, following])

    def key() -> SigningKey:
        if (one := next(keys)) is None:
            raise UnavailableError("ended")
        return one

    intake = Intake(sent, key, TD, SystemClock())
    with pytest.raises(UnavailableError, match="another key" if at_once else "ended"):
        await intake.hand_over([told(1)])
    await intake.hand_over([told(1)])
    assert [parse(one.value).header.kid for one in sent.messages] == [
        office.key("service", name).kid for name in ("audit", "issuer")
    ]


def test_records_appended_after_bundle_expiry_wait_despite_a_slow_clock() -> None:
    office = AuditFixtures()
    office.now_ms = office.bundle.exp * 1000 - 2
    before, after = (office.received(AUDIT_INTAKE, b"x") for _ in range(2))
    require_trust(office.trust, [before], 0)
    for batch, now_ms in (([before, after], 0), ([before], office.bundle.exp * 1000)):
        with pytest.raises(UnavailableError, match="expired"):
            require_trust(office.trust, batch, now_ms)


async def test_record_appended_after_bundle_expiry_waits_for_the_next_bundle() -> None:
    office = AuditFixtures()
    end_s = office.now_ms // 1000 + 60
    office.trust.load(office.trust_bundle(2, exp=end_s).value, office.now_ms / 1000)
    office.now_ms = end_s * 1000
    records = office.service_event("finding", "x"), office.received(SERVICE_EVENT, b"garbage")
    for record in records:
        with pytest.raises(UnavailableError, match="trust bundle 2 expired"):
            await office.audit(record)
    assert not office.published.events
    assert not office.buried
    office.trust.load(office.trust_bundle(3, exp=end_s + 60).value, office.now_ms / 1000)
    told, refused = await office.audit(*records)
    assert told["unmapped"]["verified"]["by"] == office.key("service", "registry").id
    assert refused["status_code"] == "not_a_jws"
    assert office.buried == [("service.event", "not_a_jws")]


async def test_the_oldest_are_forgotten_and_not_the_latest() -> None:
    office = AuditFixtures()
    size = len((await handed_over(office, HandoverCache(), 10)).value)
    lately = HandoverCache(max_bytes=2 * size)
    records = [await handed_over(office, lately, number) for number in (10, 20, 30)]
    known = [lately.events(record, office.trust) is not None for record in records]
    assert known == [False, True, True]
    again = [await handed_over(office, lately, number) for number in (40, 50)]
    assert all(lately.events(record, office.trust) for record in again), "what is taken makes room"


def test_a_link_stands_at_the_end_of_the_words_wherever_those_stood() -> None:
    one = {**event(1), "unmapped": {"chain": "of somebody's", **event(1)["unmapped"]}}
    expected = {
        **event(1),
        "unmapped": {**event(1)["unmapped"], "chain": {"tree": "3", "seq": 7, "prev": HASH.hex()}},
    }
    assert json.loads(linked(linkable(one), "3", 7, HASH)) == expected


def test_a_link_is_added_to_the_byte_as_if_the_event_were_written_with_it() -> None:
    body = linkable(event(1))
    whole = orjson.loads(body)
    whole["unmapped"]["chain"] = {"tree": "3", "seq": 7, "prev": HASH.hex()}
    assert linked(body, "3", 7, HASH) == orjson.dumps(whole)


def test_an_event_with_its_link_is_what_its_bytes_say_and_the_one_without_stays() -> None:
    before = event(1)
    assert linked_event(before, "3", 7, HASH) == orjson.loads(linked(linkable(event(1)), "3", 7, HASH))
    assert before == event(1)


def trailed(office: AuditFixtures, number: int) -> tuple[Received, dict[str, Any]]:
    """An event as it stands on the trail."""
    value = linked(linkable(event(number)), "0", number, HASH)
    return office.received(AUDIT, value), linked_event(event(number), "0", number, HASH)


def test_own_event_read_back_unchanged_is_not_parsed_again() -> None:
    office, read_back = AuditFixtures(), WrittenEventCache()
    (own, words), (others, _) = trailed(office, 1), trailed(office, 2)
    read_back.put(own.value, words, HASH)
    found = read_back.parse([own, others])
    assert found[0].event is words
    assert found[0].leaf == HASH, "it was hashed when it was chained"
    assert found[1] == (orjson.loads(others.value), leaf_hash(others.value))
    assert read_back.parse([own])[0] == (words, leaf_hash(own.value)), (
        "it is kept for the once that it is read"
    )


def test_other_bytes_of_the_same_event_are_looked_at() -> None:
    office, read_back = AuditFixtures(), WrittenEventCache()
    own, words = trailed(office, 1)
    read_back.put(own.value, words, leaf_hash(own.value))
    changed = own._replace(value=own.value.replace("ähnlich".encode(), b"another"))
    ((told, leaf),) = read_back.parse([changed])
    assert (told["message"], leaf) == ("another", leaf_hash(changed.value))


def test_written_event_cache_evicts_the_oldest_and_serves_each_once() -> None:
    office = AuditFixtures()
    every = [trailed(office, number) for number in range(1, 6)]
    read_back = WrittenEventCache(max_bytes=2 * len(every[0][0].value))

    def known() -> list[bool]:
        return [found.event is words for record, words in every for found in read_back.parse([record])]

    for record, words in every:
        read_back.put(record.value, words, HASH)
        read_back.put(record.value, words, HASH)  # chained anew, where a transaction failed
    assert known() == [False, False, False, True, True]
    for record, words in every[:2]:
        read_back.put(record.value, words, HASH)
    assert known() == [True, True, False, False, False], "what is taken makes room"
