"""What is refused before anything can be decided is on `action`: whose it is, and how many, however fast they come."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.gateway.contract import Attempt, BlockedRequest, PresentedIdentity
from ringfence.gateway.decision.decision_events import BlockedRequests
from ringfence.gateway.decision.targets import Targets
from ringfence.gateway.events.recorder import MAX_DESTINATIONS, RefusalCounts
from ringfence.gateway.events.spool import SpoolFullError
from ringfence.messages.codes import Code
from ringfence.messages.operations import ActionDecided, Destination
from tests.unit.test_gateway_domain import Place

GATEWAY = "spiffe://test.example/service/gateway"
RUNS = ("0f8fad5b-d9cb-469f-a165-70867728950e", "7c9e6679-7425-50de-944b-e07fc1f90ae7")


class Parts:
    """Real records; the spool is a list that can be full."""

    def __init__(self) -> None:
        self.place = Place()
        ledger = self.place.ledger
        self.events: list[ActionDecided] = []
        self.full = False
        self.counted = counted = RefusalCounts(self.record, ledger.clock, gateway=GATEWAY)
        targets = Targets(ledger.directory)
        self.blocked = BlockedRequests(counted, ledger.directory, targets, trust_domain="test.example")

    def record(self, event: ActionDecided) -> None:
        if self.full:
            raise SpoolFullError("full")
        self.events.append(event)

    def add(self, code: Code = Code.TOO_MANY_REQUESTS, **fields: Any) -> None:
        self.blocked.add(BlockedRequest(code, "what was wrong", **fields))


@pytest.fixture
def parts() -> Parts:
    return Parts()


def test_blocked_event_names_the_sender_as_far_as_verified(parts: Parts) -> None:
    task = parts.place.task
    parts.add(presented=PresentedIdentity(task_id=task), method="GET")
    parts.add(presented=PresentedIdentity(certificate="spiffe://test.example/agent/bot"), method="PUT")
    parts.add(presented=PresentedIdentity(certificate="spiffe://elsewhere.example/agent/bot"))
    parts.add(Code.HEAD_TIMEOUT, presented=PresentedIdentity(task_id="nobody's"))
    parts.add(Code.ERROR, presented=PresentedIdentity(handle=parts.place.lease.lease_id))
    assert [(one.agent_id, one.task_id, one.access, one.method) for one in parts.events] == [
        ("bot", task, "read", "GET"), ("bot", None, "write", "PUT"), (None, None, None, None),
        (None, None, None, None), (None, None, None, None),
    ], "a handle alone shows nothing"  # fmt: skip
    assert {one.gateway for one in parts.events} == {GATEWAY}
    assert not any(one.allowed for one in parts.events)
    assert parts.events[0].reasons[0].code == "too_many_requests"


def test_blocked_event_names_only_a_known_target(parts: Parts) -> None:
    for target_id in ("staging", "nowhere"):
        parts.add(attempt=Attempt(None, "https", "GET", "/", target_id=target_id))
    assert [one.target_id for one in parts.events] == ["staging", None]


def test_a_flood_is_one_event_a_second_and_none_of_it_is_missing(parts: Parts) -> None:
    for _ in range(1000):
        parts.add(method="GET")
    parts.add(method="PUT")
    assert [one.count for one in parts.events] == [1, 1], "the first of each kind is recorded at once"
    parts.blocked.flush()
    assert [one.count for one in parts.events] == [1, 1, 999]
    parts.add(method="GET")
    parts.blocked.flush()
    assert [one.count for one in parts.events] == [1, 1, 999, 1]
    parts.blocked.flush()
    parts.blocked.flush()
    parts.add(method="GET")
    assert [one.count for one in parts.events] == [1, 1, 999, 1, 1], "whoever comes later is the first again"
    assert len({one.action_id for one in parts.events}) == 5


def test_counts_of_a_run_are_flushed_at_its_end(parts: Parts) -> None:
    one, other = (PresentedIdentity(task_id=parts.place.task, run_id=run_id) for run_id in RUNS)
    for _ in range(3):
        parts.add(presented=one)
        parts.add(presented=other)
        parts.add()
    parts.events.clear()
    assert parts.counted.flush(RUNS[0])
    assert [(event.run_id, event.count) for event in parts.events] == [(RUNS[0], 2)]
    parts.blocked.flush()
    assert [(event.run_id, event.count) for event in parts.events[1:]] == [(RUNS[1], 2), (None, 2)]


def test_a_run_whose_refusals_have_no_room_is_told_from_one_that_has_none(parts: Parts) -> None:
    for _ in range(2):
        parts.add(presented=PresentedIdentity(task_id=parts.place.task, run_id=RUNS[0]))
    parts.full = True
    assert not parts.counted.flush(RUNS[0])
    assert parts.counted.flush(RUNS[1])
    parts.full = False
    assert parts.counted.flush(RUNS[0])
    assert [event.count for event in parts.events] == [1, 1]


async def test_counts_without_room_are_recorded_later(parts: Parts) -> None:
    parts.full = True
    for _ in range(3):
        parts.add()
    parts.blocked.flush()
    assert parts.events == []
    parts.full = False
    parts.add()
    await parts.blocked.close()
    assert [one.count for one in parts.events] == [4]


def test_host_and_method_of_a_stranger_are_not_quoted_in_events(parts: Parts) -> None:
    for code in (Code.HOST_INVALID, Code.MALFORMED_HTTP):
        parts.blocked.add(BlockedRequest(code, "quoted: eve.example", method="EVE \x1b[31m" + "E" * 99))
    assert "eve.example" not in "".join(one.model_dump_json() for one in parts.events).lower()
    assert {one.method for one in parts.events} == {"EVE??[31m" + "E" * 23}


def test_blocked_event_names_its_destination_without_the_query(parts: Parts) -> None:
    read = Attempt("hub.example", "https", "GET", "/a?token=s3cret")
    parts.add(attempt=read, method="GET")
    parts.add(destination=Destination(host="elsewhere.example"), method="CONNECT")
    assert [one.destination for one in parts.events] == [
        Destination(scheme="https", host="hub.example", port=443, path="/a"),
        Destination(host="elsewhere.example"),
    ]
    assert [one.access for one in parts.events] == ["read", None]


def test_many_destinations_share_a_bounded_number_of_events(parts: Parts) -> None:
    for number in range(1000):
        parts.add(method=f"M{number}", destination=Destination(host=f"host-{number}.example"))
    parts.blocked.flush()
    assert len(parts.events) == MAX_DESTINATIONS + 2, "each of the first, the first of the rest, and the rest"
    assert sum(one.count or 0 for one in parts.events) == 1000
    assert sum(one.destination is not None for one in parts.events) == MAX_DESTINATIONS
    parts.blocked.flush()
    parts.add(destination=Destination(host="later.example"))
    assert parts.events[-1].destination == Destination(host="later.example"), "a second later there is room"
