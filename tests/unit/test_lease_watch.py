"""What the watch over `lease` need not look at: ends of this very process, where nothing else came of the lease."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any, cast

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.lease import EndCause
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import LostError, SignedLease
from ringfence.model.leases.epochs import Epochs
from ringfence.model.leases.lifecycle import follow
from ringfence.model.leases.unverified_records import summary_of
from ringfence.revoker.consistency.lease_watch import LeaseWatch
from ringfence.revoker.lease_end.lease_ender import OwnRecordCache
from tests.support.leases import REVOKER, lease, signed

EPOCH, BEFORE = "2.aaaaaaaa", "1.aaaaaaaa"
_offsets = count()


class Store:
    """All that is asked of the lease store when records come."""

    known: str | None = EPOCH

    @property
    def epoch(self) -> str:
        if self.known is None:
            raise LostError("nobody knows")
        return self.known


def ended(before: SignedLease, epoch: str = EPOCH) -> SignedLease:
    cause = EndCause(kind="deadline", at_ms=1)
    return signed(follow(before.claims, "expired", by=REVOKER, cause=cause, epoch=epoch))


def came(*records: SignedLease) -> list[Received]:
    return [
        Received(LEASE, "t.lease.v1", 0, next(_offsets), 1, one.claims.lease_id, one.jws.encode())
        for one in records
    ]


class Watch:
    """A watch that only takes records in, and what this process has said."""

    def __init__(self) -> None:
        self.own_records, self.store, clock = OwnRecordCache(), Store(), SystemClock()
        trust = TrustStore("acme.example", "nobody")
        others: Any = SimpleNamespace()
        self._watch = LeaseWatch(
            cast(Any, self.store), trust, others, others, clock, self.own_records, since_ms=0
        )

    def say(self, one: SignedLease) -> SignedLease:
        self.own_records.add(one.jws.encode(), summary_of(one.claims))
        return one

    def to_look_at(self, *records: SignedLease) -> list[str]:
        """What is looked at of these."""
        so_far = len(self._watch._unchecked)
        self._watch.on_records(came(*records))
        return [f"{one.summary.status}" for one in self._watch._unchecked[so_far:]]

    def begins(self, epoch: str) -> None:
        """An epoch begins on Kafka."""
        epochs: Epochs = self._watch._epochs
        epochs.begin(came(lease())[0], epoch)


def test_an_end_of_this_process_is_not_looked_at() -> None:
    watch = Watch()
    assert watch.to_look_at(watch.say(ended(lease())), watch.say(ended(lease()))) == []


def test_an_end_is_looked_at_that_another_wrote_or_that_is_of_another_epoch() -> None:
    watch = Watch()
    assert watch.to_look_at(ended(lease())) == ["expired"]
    assert watch.to_look_at(watch.say(ended(lease(), BEFORE))) == ["expired"]
    watch.store.known = None
    assert watch.to_look_at(watch.say(ended(lease()))) == ["expired"]


def test_an_end_that_is_void_where_it_stands_is_looked_at() -> None:
    watch = Watch()
    watch.begins("3.aaaaaaaa")
    assert watch.to_look_at(watch.say(ended(lease()))) == ["expired"]


def test_an_end_is_looked_at_with_what_came_of_the_lease_before_and_is_not_decided() -> None:
    watch, one = Watch(), lease()
    assert watch.to_look_at(one) == ["active"]
    assert watch.to_look_at(watch.say(ended(one))) == ["expired"], "else Redis seems ahead of Kafka"


def test_record_after_an_end_is_checked() -> None:
    watch, one = Watch(), lease()
    assert watch.to_look_at(watch.say(ended(one)), one) == ["active"]
