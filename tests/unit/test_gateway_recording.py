"""What is decided in one turn of the loop is kept in one write, before anybody who waits for that is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from ringfence.gateway.contract import Attempt
from ringfence.gateway.decision.fast_path import AllowedEvents
from ringfence.gateway.events.recorder import Recorder
from ringfence.gateway.events.spool import Spool, SpoolFullError
from ringfence.messages.enrolment import InstanceRef, RunRef
from ringfence.messages.operations import ActionDecided
from ringfence.model.http_targets import Action
from tests.support import leases

GATEWAY = "spiffe://acme.example/service/gateway"
OF_A_RUN = InstanceRef(
    instance_id="7c9e6679-7425-40de-944b-e07fc1f90ae7",
    issuer="https://acme.example/runner/runner-1",
    subject="spiffe://acme.example/agent/bot",
    selector="0" * 64,
    not_after=1_900_000_000,
    run=RunRef(run_id="0f8fad5b-d9cb-469f-a165-70867728950e", task_id="7c9e6679-7425-40de-944b-e07fc1f90ae7"),
)
ID = "d9428888-122b-41e1-b85c-61cd3cbb3210"


class Watched(Spool):
    """Counts its writes."""

    def __init__(self, folder: Path, max_bytes: int = 1 << 20) -> None:
        super().__init__(folder, max_bytes=max_bytes)
        self.writes: list[tuple[bytes, ...]] = []

    def append(self, *entries: bytes) -> None:
        super().append(*entries)
        self.writes.append(entries)


def recorder_on(spool: Spool) -> Recorder:
    return Recorder(spool, cast(Any, None))


def denied(id: str) -> ActionDecided:
    return ActionDecided(action_id=id, gateway=GATEWAY, allowed=False, reasons=(), at_ms=1)


async def test_records_of_one_turn_are_written_at_once(tmp_path: Path) -> None:
    spool = Watched(tmp_path)
    recorder, told = recorder_on(spool), list[tuple[int, bool, int]]()
    for number in range(3):
        recorder.append_at_end_of_turn(
            b"a\n%d\n\n{}" % number,
            lambda kept, number=number: told.append((number, kept, len(spool.writes))),  # type: ignore[misc]
        )
    assert (spool.writes, told) == ([], [])
    await asyncio.sleep(0)
    assert spool.writes == [(b"a\n0\n\n{}", b"a\n1\n\n{}", b"a\n2\n\n{}")]
    assert told == [(0, True, 1), (1, True, 1), (2, True, 1)], "each once, and not before it was written"
    assert spool.peek()[0] == [*spool.writes[0]]
    await asyncio.sleep(0)
    assert len(told) == 3


async def test_earlier_decisions_are_recorded_first(tmp_path: Path) -> None:
    spool = Watched(tmp_path)
    recorder, told = recorder_on(spool), list[bool]()
    recorder.append_at_end_of_turn(b"a\none\n\n{}", told.append)
    recorder.record(denied("two"))
    assert told == [True]
    recorder.append_at_end_of_turn(b"a\nthree\n\n{}", told.append)
    recorder.append(b"a\nfour\n\n{}")
    await asyncio.sleep(0)
    ids = [entry.split(b"\n")[1] for entry in spool.peek()[0]]
    assert ids == [b"one", b"two", b"three", b"four"]
    assert told == [True, True]


async def test_full_spool_fails_the_whole_write(tmp_path: Path) -> None:
    spool = Watched(tmp_path, max_bytes=100)
    recorder, told = recorder_on(spool), list[bool]()
    recorder.append_at_end_of_turn(b"x" * 60, told.append)
    recorder.append_at_end_of_turn(b"y" * 60, told.append)
    await asyncio.sleep(0)
    assert told == [False, False], "one write: all of it or nothing"
    assert spool.size() == 0
    recorder.append_at_end_of_turn(b"x" * 60, told.append)
    with pytest.raises(SpoolFullError):
        recorder.append(b"y" * 60)
    assert told == [False, False, True]


async def test_a_mark_is_after_what_this_turn_decided(tmp_path: Path) -> None:
    spool = Watched(tmp_path)
    recorder, told = recorder_on(spool), list[bool]()
    recorder.append_at_end_of_turn(b"a\none\n\n{}", told.append)
    mark = recorder.end_mark()
    assert told == [True]
    assert not recorder.is_published(mark)
    spool.mark_published(spool.peek()[1])
    assert recorder.is_published(mark)


async def test_pending_records_are_written_at_close(tmp_path: Path) -> None:
    recorder, told = Recorder(Watched(tmp_path), cast(Any, Gone())), list[bool]()
    recorder.append_at_end_of_turn(b"a\none\n\n{}", told.append)
    await recorder.close()
    assert told == [True]
    assert Spool(tmp_path, max_bytes=1000).peek()[0] == [b"a\none\n\n{}"]


class Gone:
    async def send_many(self, *args: Any) -> Any:
        raise OSError("no Kafka")


@pytest.mark.parametrize(
    ("fields", "lease_fields"),
    [
        ({}, {}),
        ({"label": "pr/7"}, {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}),
        ({"label": "not a label"}, {}),
        ({"method": "M" * 40, "target": "/a%2fb%d?c=%s"}, {}),
        ({"target_id": None, "authority": "hub.example", "body": b'{"a": 1}'}, {}),
        ({}, {"instance": OF_A_RUN}),
    ],
)
def test_an_event_is_what_its_model_writes(fields: dict[str, Any], lease_fields: dict[str, Any]) -> None:
    attempt = Attempt(**{
        "authority": None, "scheme": "https", "method": "GET", "target": "/x", "target_id": "hub", **fields,
    })  # fmt: skip
    lease = leases.lease(agent_id="bot", target_id="hub", delivery="gateway", **lease_fields).claims
    action = Action("read", 'odd/100%b"é/%d')
    entry = AllowedEvents(GATEWAY, "bot", lease, action, "read", attempt).entry(ID, 17, 1_700_000_000_123)
    key, id, traceparent, value = entry.split(b"\n", 3)
    assert (key, id, traceparent.decode()) == (b"bot", ID.encode(), lease.traceparent or "")
    event = ActionDecided.model_validate_json(value)
    assert event.model_dump_json(exclude_none=True).encode() == value
    assert event.run_id == (OF_A_RUN.run.run_id if lease.instance and OF_A_RUN.run else None)
    assert (event.action_id, event.latency_us, event.at_ms) == (ID, 17, 1_700_000_000_123)
    assert (event.resource, event.lease_id, event.task_id) == (action.resource, lease.lease_id, lease.task_id)
    assert orjson.loads(value).get("label") == (
        fields.get("label") if fields.get("label") == "pr/7" else None
    )
    assert event.method == (attempt.method if attempt.method == "GET" else None)
