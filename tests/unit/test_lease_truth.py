"""What the lease topic says, folded: the highest record of each lease, whatever comes in whatever order."""

from __future__ import annotations

import itertools
import json
import uuid
from typing import Any

import pytest

from ringfence.kernel.crypto.keys import b64encode
from ringfence.kernel.kafka.record import Received
from ringfence.model.leases.unverified_records import summarise
from ringfence.revoker.consistency.kafka_view import LeaseFold
from tests.unit.test_lease_epochs import Markers

ONE, TWO = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
OVER_BEFORE_S = 1000.0
MARKERS = Markers()


def record(
    lease_id: str = ONE,
    seq: int = 1,
    status: str = "active",
    deadline: Any = 2000,
    mark: str = "",
    epoch: Any = None,
) -> Received:
    """A record that says so; nothing here looks at signatures. `mark` tells equal ones apart."""
    claims = {"lease_id": lease_id, "seq": seq, "status": status, "deadline": deadline, "mark": mark}
    claims |= {"epoch": epoch} if epoch is not None else {}
    return received(f"e30.{b64encode(json.dumps(claims).encode())}.c2ln".encode(), lease_id)


def received(value: bytes, key: str = ONE) -> Received:
    return MARKERS.at_end(key, value)


def folded(*records: Received, **options: Any) -> LeaseFold:
    fold = LeaseFold(trust=MARKERS.trust, over_before_s=OVER_BEFORE_S, **options)
    fold.add(records)
    return fold


def highest(fold: LeaseFold) -> dict[str, int]:
    return {id: one.seq for id, one in fold.highest.items()}


def test_the_highest_counts_in_whatever_order_records_come() -> None:
    life = [record(), record(seq=2, status="ending"), record(seq=3, status="revoked"), record(TWO)]
    for order in itertools.permutations(life):
        fold = folded(*order)
        assert highest(fold) == {ONE: 3, TWO: 1}
        assert fold.highest[ONE].jws == life[2].value


def test_of_two_equal_ones_the_first_counts() -> None:
    first, second = record(mark="a"), record(mark="b")
    assert folded(first, second).highest[ONE].jws == first.value


def test_record_of_an_old_epoch_after_its_marker_is_void() -> None:
    old, new = "1.aaaaaaaa", "2.bbbbbbbb"
    begin, again = MARKERS.marker(old), MARKERS.marker(new)
    cut = record(seq=2, status="ending", epoch=old)
    late = record(seq=3, status="revoked", epoch=old)
    assert highest(folded(begin, record(), cut, late)) == {ONE: 3}
    assert highest(folded(begin, record(), cut, again, late)) == {ONE: 2}
    assert highest(folded(begin, record(), again, cut, late)) == {ONE: 1}
    assert highest(folded(begin, again, late, record())) == {ONE: 1}, "what issuers write counts always"
    end = record(seq=2, status="expired", epoch=new)
    fold = folded(begin, record(), again, cut, end, late)
    assert (fold.highest[ONE].status, fold.highest[ONE].epoch) == ("expired", new)


def test_a_void_end_of_long_ago_hides_no_lease() -> None:
    marker = MARKERS.marker("2.bbbbbbbb")
    gone = record(seq=2, status="expired", deadline=999, epoch="1.aaaaaaaa")
    fold = folded(marker, gone, record(deadline=999))
    assert highest(fold) == {ONE: 1}
    assert not fold.contested


def test_long_ended_lease_is_left_out() -> None:
    gone = record(seq=2, status="expired", deadline=999)
    assert highest(folded(gone)) == {}
    assert highest(folded(gone, record(seq=3, status="expired", deadline=999))) == {}
    assert highest(folded(record(seq=2, status="expired", deadline=1000))) == {ONE: 2}
    assert highest(folded(record(seq=2, status="ending", deadline=999))) == {ONE: 2}, "it has not ended"


def test_long_ended_lease_is_kept_if_redis_has_it_alive() -> None:
    gone = record(seq=2, status="expired", deadline=999)
    assert highest(folded(gone, needed={ONE})) == {ONE: 2}


def test_an_end_that_nobody_verified_hides_no_lease() -> None:
    forged = record(seq=2, status="expired", deadline=1)
    after = folded(record(), forged)
    assert highest(after) == {ONE: 2}, "it is verified before it counts"
    before = folded(forged, record())
    assert before.contested == {ONE}


def test_a_record_under_the_key_of_another_lease_is_passed_over() -> None:
    assert highest(folded(record(), received(record(seq=2).value, TWO))) == {ONE: 1}


def test_records_that_do_not_count_are_as_if_they_were_not_there() -> None:
    good, bad = record(), record(seq=2, mark="bad")
    fold = folded(bad, good, bad, counts=lambda lease_id, jws: jws != bad.value)
    assert highest(fold) == {ONE: 1}


@pytest.mark.parametrize(
    "value",
    [
        b"", b"x", b"..", b"e30.e30.x", b"e30.W10.x", b"\xff.\xff.\xff",
        record(seq=0).value, record(seq=101).value, record(deadline="soon").value, record("no uuid").value,
        record(epoch="1").value, record(epoch=1).value,
        record(lease_id=7).value,  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_malformed_lease_record_is_skipped(value: bytes) -> None:
    assert summarise(value) is None
    assert highest(folded(record(), received(value))) == {ONE: 1}
