"""What is done ahead for leases that are due soon: remembered for the very record that was looked at, and no longer."""

from __future__ import annotations

from ringfence.kernel.kafka import Outbound
from ringfence.model.lease_store import told_of
from ringfence.revoker.foresight import ForeseenEnd, Foresight
from ringfence.revoker.said import glance_of
from tests.leases import lease, step


def foreseen(deadline: int = 2_000_000_000) -> ForeseenEnd:
    end = step(lease(deadline=deadline), "expired")
    claims = end.lease.claims
    return ForeseenEnd(
        glance_of(claims), told_of(end), Outbound(claims.lease_id, end.lease.jws.encode(), claims.jti)
    )


def test_it_is_taken_once_and_by_the_very_record() -> None:
    foresight, end = Foresight(lambda: 1), foreseen()
    foresight.remember(b"one", end)
    assert foresight.take(b"other") is None
    assert foresight.take(b"one") is end
    assert foresight.take(b"one") is None


def test_what_it_rests_on_has_changed() -> None:
    version = 1
    foresight = Foresight(lambda: version)
    foresight.remember(b"one", foreseen())
    version = 2
    assert foresight.take(b"one") is None
    foresight.remember(b"two", foreseen())
    assert foresight.take(b"two") is not None
    foresight.remember(b"three", foreseen())
    version = 3
    foresight.remember(b"four", foreseen())
    assert (foresight.take(b"three"), foresight.take(b"four") is None) == (None, False)


def test_it_remembers_the_latest_only() -> None:
    foresight = Foresight(lambda: 1, most=2)
    for record in (b"one", b"two", b"three"):
        foresight.remember(record, foreseen())
    assert [foresight.take(record) is not None for record in (b"one", b"two", b"three")] == [
        False,
        True,
        True,
    ]


def test_leases_that_were_due_long_ago_are_forgotten() -> None:
    foresight = Foresight(lambda: 1)
    for record, deadline in ((b"one", 1000), (b"two", 1010)):
        foresight.remember(record, foreseen(deadline))
    foresight.forget(1010)
    assert [foresight.take(record) is not None for record in (b"one", b"two")] == [False, True]
