"""What a revoker knows of its own records without taking them apart is what anybody finds who does."""

from __future__ import annotations

from ringfence.model.leases.unverified_records import summarise, summary_of
from ringfence.revoker.lease_end.lease_ender import OwnRecordCache
from tests.support.leases import lease, signed, step


def test_of_its_own_records_it_knows_what_a_look_would_tell() -> None:
    cache = OwnRecordCache()
    for claims in (
        lease().claims,
        lease(grants=("00000000-0000-0000-0000-000000000001",)).claims,
        step(lease(), "expired").lease.claims.model_copy(update={"epoch": "3.5f0e8f4e"}),
    ):
        record = signed(claims).jws.encode()
        assert cache.summarise(record) == summary_of(claims)
        cache.add(record, summary_of(claims))
        assert cache.has(record)
        assert cache.summarise(record) == summarise(record) == summary_of(claims)


def test_of_all_others_it_knows_what_they_say() -> None:
    cache, own, other = OwnRecordCache(), lease(), step(lease(), "ending").lease
    cache.add(own.jws.encode(), summary_of(own.claims))
    assert not cache.has(other.jws.encode())
    assert cache.summarise(other.jws.encode()) == summary_of(other.claims)
    assert cache.summarise(b"garbage") is None


def test_own_record_cache_keeps_the_latest_only() -> None:
    cache, records = OwnRecordCache(max_records=2), [lease() for _ in range(3)]
    for one in records:
        cache.add(one.jws.encode(), summary_of(one.claims))
    assert [cache.has(one.jws.encode()) for one in records] == [False, True, True]
    assert cache.summarise(records[0].jws.encode()) == summary_of(records[0].claims)
