"""Which records of the trail its writer did not write: while it writes by their places, when it takes over by the way
back from the tip.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.audit.trail.chain_recovery import _find_unauthorised, _PartitionEnd, _TrailEntry
from ringfence.audit.trail.unauthorised_records import UnauthorisedOffsets, UnauthorisedRecords
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import AUDIT
from ringfence.model.audit_log.chain import Tip, event_of, linkable, linked
from ringfence.model.audit_log.merkle import leaf_hash


def records(*offsets: int, partition: int = 0) -> list[Received]:
    return [Received(AUDIT, "audit", partition, offset, 0, "k", b"x") for offset in offsets]


def waiting(strays: UnauthorisedRecords) -> set[tuple[int, int]]:
    """All of them, partition and offset, dead-lettered as they come."""
    found = set()
    while (some := strays.next(500)) is not None:
        found |= {(some.partition, offset) for places in some.ranges for offset in places}
        strays.dead_lettered(some)
    assert not strays.waiting.is_set()
    return found


def taken_over(end: int = 10, *found: int) -> UnauthorisedRecords:
    strays = UnauthorisedRecords()
    strays.start_writing({0: end, 1: end}, {0: [range(one, one + 1) for one in found], 1: ()})
    return strays


def test_standby_finds_no_stray() -> None:
    strays = UnauthorisedRecords()
    strays.read(records(0, 1))
    strays.add_written(0, range(2, 3))
    assert not strays.waiting.is_set()
    assert strays.next(9) is None
    assert strays.checked_offsets() == {}


def test_record_that_the_writer_did_not_write_is_a_stray() -> None:
    strays = taken_over()
    strays.add_written(0, range(10, 13))
    strays.add_written(0, range(14, 16))
    strays.read(records(10, 11, 12, 14))
    assert not strays.waiting.is_set()
    strays.read(records(15, 16, 18))
    assert strays.waiting.is_set()
    assert strays.checked_offsets() == {0: 16, 1: 10}
    assert waiting(strays) == {(0, 16), (0, 18)}
    assert strays.checked_offsets() == {0: 19, 1: 10}


def test_record_read_before_its_acknowledgement_is_no_stray() -> None:
    strays = taken_over()
    strays.read(records(10, 11, 12, 13))
    strays.add_written(0, range(11, 13))
    assert waiting(strays) == {(0, 10), (0, 13)}


def test_late_acknowledgement_clears_a_found_stray() -> None:
    strays = taken_over()
    strays.read(records(10, 11, 12, 13, 14))
    found = strays.next(4)
    assert found is not None
    strays.add_written(0, range(11, 13))
    assert strays.still_unauthorised(found) == UnauthorisedOffsets(0, [range(10, 11), range(13, 14)])
    strays.add_written(0, range(10, 11))
    strays.add_written(0, range(13, 14))
    assert strays.still_unauthorised(found) is None
    strays.stop_writing()
    assert strays.still_unauthorised(found) is None


def test_record_read_during_takeover_is_a_stray() -> None:
    strays = UnauthorisedRecords()
    strays.read(records(8, 9, 10, 11))
    strays.start_writing({0: 10}, {0: [range(3, 5), range(7, 8)]})
    assert waiting(strays) == {(0, 3), (0, 4), (0, 7), (0, 10), (0, 11)}


def test_record_before_the_checked_offset_is_skipped() -> None:
    strays = taken_over(10, 5)
    strays.read(records(2, 5, 9))
    assert waiting(strays) == {(0, 5)}


def test_repeated_record_is_judged_once() -> None:
    strays = taken_over()
    strays.add_written(0, range(10, 12))
    strays.read(records(10, 11, 12))
    strays.read(records(11, 12, 13))
    assert waiting(strays) == {(0, 12), (0, 13)}


def test_stopped_writer_reports_no_stray() -> None:
    strays = taken_over(10, 1)
    strays.stop_writing()
    assert waiting(strays) == set()


def test_partitions_take_turns_and_no_span_is_longer_than_asked_for() -> None:
    strays = taken_over()
    strays.read(records(*range(10, 1000)))
    strays.read(records(10, partition=1))
    first, second = strays.next(100), strays.next(100)
    assert first == UnauthorisedOffsets(0, [range(10, 110)])
    assert second == UnauthorisedOffsets(1, [range(10, 11)])
    strays.dead_lettered(first)
    assert strays.next(100) == UnauthorisedOffsets(0, [range(110, 210)])


@given(st.lists(st.sampled_from(["own", "stray", "marker", "read"]), max_size=60), st.integers(1, 9))
def test_strays_are_exactly_the_records_not_written_by_the_writer(steps: list[str], most: int) -> None:
    strays, expected, unread = taken_over(0), set(), []
    for offset, step in enumerate(steps):
        if step == "own":
            strays.add_written(0, range(offset, offset + 1))
        if step == "stray":
            expected.add((0, offset))
        if step in ("own", "stray"):
            unread.append(offset)
        if step == "read" and unread:
            strays.read(records(*unread))
            unread = []
            if (some := strays.next(most)) is not None:
                assert strays.checked_offsets()[0] == some.start
                found = {(0, one) for places in some.ranges for one in places}
                assert found <= expected
                expected -= found
                strays.dead_lettered(some)
    if unread:
        strays.read(records(*unread))
    assert waiting(strays) == expected


# --- who takes over ---


def event(number: int) -> bytes:
    words = {"source": {"topic": "x", "partition": 0, "offset": number}}
    return linkable({"metadata": {"uid": str(number)}, "unmapped": words})


def chain(count: int) -> list[bytes]:
    tip, values = Tip(), []
    for number in range(count):
        values.append(linked(event(number), "0", number + 1, tip.last))
        tip = tip.followed_by(values[-1])
    return values


def tip_of(values: Sequence[bytes]) -> Tip:
    return Tip().grown(*map(leaf_hash, values))


def strays_of(values: Sequence[bytes], tip: Tip, mark: int | None, *, start: int = 0) -> list[int]:
    stretch = _PartitionEnd(Tip(), start, start + len(values))
    for offset, value in enumerate(values, start):
        told, hashed = event_of(value), leaf_hash(value)
        link = told.link if told is not None else None
        if told is None or link is None:
            stretch.add_unlinked(offset, is_event=told is not None)
            continue
        stretch.entries.append(_TrailEntry(range(offset, offset + 1), True, link, hashed))
        stretch.predecessors[hashed] = told.uid, bytes.fromhex(link.prev)
    return [offset for places in _find_unauthorised(stretch, "0", tip, mark) for offset in places]


TRUE = chain(6)
FORGED = linked(event(9), "0", 7, leaf_hash(TRUE[5]))
TAKEN = linked(event(9), "0", 3, leaf_hash(TRUE[1]))
UNLINKED = event(9)


def test_a_chain_alone_has_no_strays() -> None:
    assert strays_of(TRUE, tip_of(TRUE), 0) == []
    assert strays_of(TRUE, tip_of(TRUE), None) == []
    assert strays_of([], Tip(), 0) == []


@pytest.mark.parametrize(
    "stray", [b"x", b"", b"{}", FORGED, TAKEN, UNLINKED, TRUE[0], linked(event(1), "1", 1, bytes(32))]
)
def test_record_off_the_chain_is_a_stray(stray: bytes) -> None:
    assert strays_of([*TRUE[:3], stray, *TRUE[3:], stray], tip_of(TRUE), 0) == [3, 7]
    assert strays_of([*TRUE[:3], stray, *TRUE[3:], stray], tip_of(TRUE), 5) == [7]
    assert strays_of([*TRUE, stray], tip_of(TRUE), None) == [6]


def test_a_flood_of_what_has_no_link_takes_no_memory_at_a_take_over() -> None:
    stretch = _PartitionEnd(Tip(), 0, 100_000)
    for offset in range(100_000):
        stretch.add_unlinked(offset, is_event=False)
    assert len(stretch.entries) == 1
    assert _find_unauthorised(stretch, "0", Tip(), 40_000) == [range(40_000, 100_000)]


def test_without_a_mark_only_what_stands_behind_the_tip_is_judged() -> None:
    assert strays_of([b"x", *TRUE, b"y"], tip_of(TRUE), None) == [7]
    assert strays_of([b"x", b"y"], Tip(), None) == [0, 1]
    assert strays_of([b"x", *TRUE[:2]], tip_of(TRUE), None) == []


def test_events_that_are_signed_and_whose_successors_are_lost_are_no_strays() -> None:
    """The last ones are gone, and the chain never goes back behind what is signed."""
    assert strays_of(TRUE[:3], tip_of(TRUE), 0) == []
    more = linked(event(7), "0", 7, tip_of(TRUE).last)
    assert strays_of([*TRUE[:3], more], tip_of([*TRUE, more]), 0) == []
    assert strays_of([*TRUE[:3], b"x", more, FORGED], tip_of([*TRUE, more]), 0) == [3, 5]
    # Behind what is led to, nothing of an earlier place can be true.
    assert strays_of([*TRUE[:3], more, TAKEN, TRUE[1]], tip_of([*TRUE, more]), 0) == [4, 5]


def test_a_chain_whose_first_events_are_gone_has_no_strays() -> None:
    assert strays_of(TRUE[3:], tip_of(TRUE), 30, start=30) == []
    assert strays_of([*TRUE[3:], UNLINKED], tip_of(TRUE), 30, start=30) == [33]


@pytest.mark.parametrize(
    "stray",
    [
        FORGED,
        linked(event(9), "0", 4, leaf_hash(TRUE[2])),
        linked(event(1), "1", 1, bytes(32)),
        UNLINKED,
        b"x",
    ],
    ids=["a later number", "the number of the first", "another tree", "no link", "no event"],
)
def test_of_records_before_the_first_event_that_is_left_only_earlier_events_of_the_chain_are_none(
    stray: bytes,
) -> None:
    assert strays_of([TRUE[0], stray, *TRUE[3:]], tip_of(TRUE), 0) == [1]


def test_an_event_with_a_link_before_the_first_of_the_chain_is_one() -> None:
    assert strays_of([FORGED, *TRUE], tip_of(TRUE), 0) == [0]


def test_events_from_before_there_were_chains_are_no_strays() -> None:
    assert strays_of([UNLINKED, *TRUE, UNLINKED], tip_of(TRUE), 0) == [7]
    assert strays_of([UNLINKED, b"x"], Tip(), None) == [1]
