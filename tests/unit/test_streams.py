"""Whether what a reader has read is all that there is, by what revokers sign of it."""

from __future__ import annotations

from itertools import count

import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.kafka.record import Received
from ringfence.messages.operations import Heartbeat, StreamDigest
from ringfence.messages.topics import HEARTBEAT, LEASE
from ringfence.model.leases.stream_digests import REMEMBERED, StreamCheck, StreamDigests
from tests.support.in_memory_registry import FixedClock
from tests.support.polling import until
from tests.unit.test_lease_epochs import TD, Markers

NAME = "t.lease.v1"
P0, P1 = (NAME, 0), (NAME, 1)
GRACE_MS = 5000
MARKERS = Markers()
NOW_MS = MARKERS.now_s * 1000


def records(*values: bytes, start: int = 0, partition: int = 0) -> list[Received]:
    return [
        Received(LEASE, NAME, partition, offset, 0, "k", value)
        for offset, value in zip(count(start), values, strict=False)
    ]


class Reader:
    """A reader from the beginning of two partitions, and the revoker that it hears."""

    def __init__(self, since: int = 0, grace_ms: int = GRACE_MS) -> None:
        self.clock = FixedClock(NOW_MS)
        self.streams = StreamDigests()
        self.check = StreamCheck(self.streams, MARKERS.trust, self.clock, grace_ms=grace_ms)
        self.check.begin({P0: since, P1: 0})
        self.signed = StreamDigests()

    def both(self, *some: Received) -> None:
        self.streams.on_records(some)
        self.signed.on_records(some)

    def beat(self, ends: dict[tuple[str, int], int], by: str = "revoker", at_ms: int | None = None) -> None:
        self.hear(self.signed.digests(ends), by, at_ms)

    def hear(self, streams: tuple[StreamDigest, ...], by: str = "revoker", at_ms: int | None = None) -> None:
        key, now_ms = MARKERS.keys[by], self.clock.now_ms()
        at_ms = now_ms if at_ms is None else at_ms
        claims = Heartbeat(iss=key.id, aud=TD, iat=at_ms // 1000, jti="b", at_ms=at_ms, streams=streams)
        value = sign(claims, key).encode()
        self.check.on_heartbeats([Received(HEARTBEAT, "t.heartbeat.v1", 0, 0, now_ms, by, value)])


def test_reader_is_fresh_until_the_grace_passes() -> None:
    reader = Reader()
    assert reader.check.stale(), "nobody has confirmed anything"
    reader.beat({P0: 0, P1: 0})
    reader.both(*records(b"a", b"b"), *records(b"c", partition=1))
    reader.beat({P0: 2, P1: 1})
    reader.check.compare({P0: 2, P1: 1})
    assert reader.check.stale() is None
    reader.clock.ms += GRACE_MS
    assert reader.check.stale() is None
    reader.clock.ms += 1
    assert reader.check.stale()
    reader.beat({P0: 2, P1: 1})
    reader.check.compare({P0: 2, P1: 1})
    assert reader.check.stale() is None, "nothing came, and that is confirmed as well"


def test_a_clock_that_is_set_back_makes_no_view_younger() -> None:
    reader = Reader(grace_ms=200)
    reader.beat({P0: 0, P1: 0})
    reader.check.compare({P0: 0, P1: 0})
    assert reader.check.stale() is None
    reader.clock.ms -= 3_600_000
    until(lambda: reader.check.stale() is not None)


def test_reader_behind_the_heartbeat_is_stale_until_it_catches_up() -> None:
    reader = Reader()
    reader.beat({P0: 0, P1: 0})
    late = records(b"a")
    reader.signed.on_records(late)
    reader.beat({P0: 1, P1: 0})
    reader.clock.ms += GRACE_MS + 1
    reader.beat({P0: 1, P1: 0})
    reader.check.compare({P0: 0, P1: 0})
    assert NAME + "/0" in (reader.check.stale() or "")
    reader.streams.on_records(late)
    reader.check.compare({P0: 1, P1: 0})
    assert reader.check.stale() is None


@pytest.mark.parametrize("seen", [(b"a", b"x"), (b"a",)], ids=["another record", "one is missing"])
def test_one_difference_counts_for_good(seen: tuple[bytes, ...]) -> None:
    reader = Reader()
    reader.beat({P0: 0, P1: 0})
    reader.streams.on_records(records(*seen))
    reader.signed.on_records(records(b"a", b"b"))
    reader.beat({P0: 2, P1: 0})
    reader.check.compare({P0: 2, P1: 0})
    reader.beat({P0: 2, P1: 0})
    reader.check.compare({P0: 2, P1: 0})
    assert "read everything anew" in (reader.check.stale() or "")


def test_records_before_the_start_are_not_compared() -> None:
    reader = Reader(since=2)
    reader.beat({P0: 0, P1: 0})
    reader.signed.on_records(records(b"a", b"b", b"c"))
    reader.streams.on_records(records(b"c", start=2))
    reader.beat({P0: 3, P1: 0})
    reader.check.compare({P0: 3, P1: 0})
    assert reader.check.stale() is None


def test_the_word_of_others_and_old_words_confirm_nothing() -> None:
    reader = Reader()
    reader.beat({P0: 0, P1: 0}, by="issuer")
    reader.check.compare({P0: 0, P1: 0})
    assert reader.check.stale()
    reader.beat({P0: 0, P1: 0}, at_ms=NOW_MS - 61_000)
    reader.check.compare({P0: 0, P1: 0})
    assert reader.check.stale()
    reader.beat({P0: 0, P1: 0}, at_ms=NOW_MS - GRACE_MS - 1)
    reader.check.compare({P0: 0, P1: 0})
    assert reader.check.stale(), "it is as old as it says"


def test_a_record_is_in_one_digest_and_not_in_the_next() -> None:
    streams = StreamDigests()
    assert [one.digest for one in streams.digests({P0: 0})] == [f"{0:064x}"]
    streams.on_records(records(b"a", b"b"))
    first, second = streams.digests({P0: 1})[0], streams.digests({P0: 2})[0]
    assert [(one.start, one.end) for one in (first, second)] == [(0, 1), (1, 2)]
    assert len({first.digest, second.digest, f"{0:064x}"}) == 3
    assert streams.digests({P0: 2})[0].digest == f"{0:064x}"


def test_more_than_can_be_remembered_is_not_said() -> None:
    streams = StreamDigests()
    streams.digests({P0: 0})
    streams.on_records(records(*[b"a"] * (REMEMBERED + 1)))
    (said,) = streams.digests({P0: REMEMBERED + 1})
    assert said.start == said.end == REMEMBERED + 1
