"""What a revoker knows of its own records without taking them apart is what anybody finds who does."""

from __future__ import annotations

from ringfence.revoker.lease_records import summarise
from ringfence.revoker.mass_expiry.own_record_cache import OwnRecordCache, glance_of
from tests.support.leases import lease, signed, step


def test_of_its_own_records_it_knows_what_a_look_would_tell() -> None:
    said = OwnRecordCache()
    for claims in (
        lease().claims,
        lease(grants=("00000000-0000-0000-0000-000000000001",)).claims,
        step(lease(), "expired").lease.claims.model_copy(update={"epoch": "3.5f0e8f4e"}),
    ):
        record = signed(claims).jws.encode()
        assert said.peek(record) == glance_of(claims)
        said.add(record, glance_of(claims))
        assert said.has(record)
        assert said.peek(record) == summarise(record) == glance_of(claims)


def test_of_all_others_it_knows_what_they_say() -> None:
    said, own, other = OwnRecordCache(), lease(), step(lease(), "ending").lease
    said.add(own.jws.encode(), glance_of(own.claims))
    assert not said.has(other.jws.encode())
    assert said.peek(other.jws.encode()) == glance_of(other.claims)
    assert said.peek(b"garbage") is None


def test_it_remembers_the_latest_only() -> None:
    said, records = OwnRecordCache(most=2), [lease() for _ in range(3)]
    for one in records:
        said.add(one.jws.encode(), glance_of(one.claims))
    assert [said.has(one.jws.encode()) for one in records] == [False, True, True]
    assert said.peek(records[0].jws.encode()) == glance_of(records[0].claims)
