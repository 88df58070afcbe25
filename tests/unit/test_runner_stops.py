"""Stops of runs: who may end which run, whenever the records of whoever signed them come."""

from __future__ import annotations

import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import UserDisable
from ringfence.messages.run import RunStop
from ringfence.messages.topics import RUN_ORDER
from ringfence.runner.active_runs import StopTable
from tests.support.in_memory_registry import TD
from tests.support.run_place import Place

RUN = "9d1c2b3a-4f5e-5a6b-8c7d-2b3a4f5e5a6b"


class _Stops:
    """A table of stops beside uma's task for bot, whose sponsor is sam."""

    def __init__(self) -> None:
        self.place = Place()
        self.ledger = self.place.ledger
        self.table = StopTable(self.ledger.directory)
        self.told: list[str] = []
        self.table.on_stop(self.told.append)

    def stop(self, who: str, *, by: SigningKey | None = None, key: str = RUN, reason: str = "enough") -> None:
        claims = self.ledger.claims(RunStop, who, run_id=RUN, reason=reason)
        signer = by or self.ledger.keys[who]
        self.table.on_records([self.ledger.received(RUN_ORDER, key, sign(claims, signer))])

    def reason(self, ordered_by: str | None = None) -> str | None:
        return self.table.reason(RUN, agent_id="bot", task_id=self.place.task, ordered_by=ordered_by)


@pytest.fixture
def stops() -> _Stops:
    return _Stops()


@pytest.mark.parametrize("who", ["uma", "sam"])
def test_the_assigner_and_the_sponsor_stop_a_run(stops: _Stops, who: str) -> None:
    stops.stop(who)
    assert stops.reason() == f"stopped by {who}: enough"
    assert stops.told == [RUN]


def test_user_that_ordered_the_run_stops_it(stops: _Stops) -> None:
    stops.stop("olga")
    assert stops.reason() is None
    assert stops.reason(f"spiffe://{TD}/user/olga") == "stopped by olga: enough"


def test_a_stranger_stops_nothing_and_does_not_stand_in_the_way(stops: _Stops) -> None:
    stops.stop("sam", by=SigningKey.generate(f"spiffe://{TD}/user/sam"), reason="forged")
    stops.stop("olga", reason="no business")
    assert stops.reason() is None
    stops.stop("uma")
    assert stops.reason() == "stopped by uma: enough"


def test_a_stop_under_another_key_is_none(stops: _Stops) -> None:
    stops.stop("sam", key="reviews")
    assert stops.reason() is None


def test_a_stop_of_another_run_leaves_this_one(stops: _Stops) -> None:
    stops.stop("sam")
    other = stops.table.reason("other", agent_id="bot", task_id=stops.place.task, ordered_by=None)
    assert other is None


def test_disabled_user_can_no_longer_stop_a_run(stops: _Stops) -> None:
    stops.stop("uma")
    stops.ledger.give(stops.ledger.claims(UserDisable, "olga", user_id="uma", reason="left"))
    assert stops.reason() is None


def test_a_signer_whose_record_comes_later_counts_then(stops: _Stops) -> None:
    id = stops.ledger.key("newcomer").id
    stops.stop("newcomer", by=stops.ledger.key("newcomer"))
    assert stops.reason(id) is None
    assert stops.told == []
    stops.ledger.give(stops.ledger.user_set("olga", "newcomer"))
    stops.table.retry()
    assert stops.told == [RUN]
    assert stops.reason(id) == "stopped by newcomer: enough"


def test_orders_and_garbage_are_passed_over(stops: _Stops) -> None:
    for value in (b"", b"{", b"a.b.c", b"\xff"):
        stops.table.on_records([stops.ledger.received(RUN_ORDER, RUN, value)])
    assert stops.reason() is None
