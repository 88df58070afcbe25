"""`traceparent` (W3C Trace Context): what is one, and what to go on from."""

from __future__ import annotations

import pytest

from ringfence.kernel.kafka.record import Received
from ringfence.kernel.tracing.traceparent import (
    nearest,
    new_traceparent,
    parsed,
    trace_id,
    well_formed,
    written,
)
from ringfence.messages.topics import CREDENTIAL_REQUEST

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"

NONE = [
    "",
    "garbage",
    f"00-{TRACE}-{SPAN}",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"ff-{TRACE}-{SPAN}-01",
    f"01-{TRACE}-{SPAN}-01",
    f"{GOOD}-more",
    f"{GOOD}\n",
    f" {GOOD}",
    f"00-{TRACE}-{SPAN}-0g",
    f"00-{TRACE[:-1]}٣-{SPAN}-01",
    "0" * 1_000_000,
]


def record(*headers: tuple[str, bytes | None]) -> Received:
    return Received(CREDENTIAL_REQUEST, "t.credential.request.v1", 0, 0, 0, "bot", b"", headers)


def test_it_says_trace_span_and_whether_to_keep_it() -> None:
    assert parsed(GOOD) == (TRACE, SPAN, True)
    assert parsed(f"00-{TRACE}-{SPAN}-00") == (TRACE, SPAN, False)
    assert parsed(f"00-{TRACE}-{SPAN}-03") == (TRACE, SPAN, True), "the other flags say nothing of that"
    assert written(TRACE, SPAN, sampled=True) == GOOD


@pytest.mark.parametrize("text", NONE, ids=lambda text: repr(text[:60]))
def test_what_is_none_is_as_good_as_nothing(text: str) -> None:
    assert parsed(text) is None
    assert well_formed(text) is None
    assert trace_id(text) is None
    assert record(("traceparent", text.encode())).traceparent == record().traceparent


def test_a_header_that_is_no_text_is_none() -> None:
    assert record(("traceparent", b"\xff\xfe\x00")).traceparent == record().traceparent
    assert record(("traceparent", None)).traceparent == record().traceparent
    assert record(("traceparent", GOOD.encode())).traceparent == GOOD


def test_what_comes_without_one_has_one_by_its_place() -> None:
    """Policy and audit, which read the same record, name the same trace, and so do they after a restart."""
    here = record()
    found = parsed(here.traceparent)
    assert found is not None
    assert found.sampled
    assert record().traceparent == here.traceparent
    elsewhere = [
        here._replace(topic_name="other.credential.request.v1"),
        here._replace(partition=1),
        here._replace(offset=1),
        here._replace(appended_at_ms=1),
    ]
    assert len({trace_id(one.traceparent) for one in [here, *elsewhere]}) == 5


def test_a_new_one_is_of_no_other_trace() -> None:
    one, other = new_traceparent(), new_traceparent(sampled=False)
    assert trace_id(one) != trace_id(other)
    first, second = parsed(one), parsed(other)
    assert first is not None
    assert second is not None
    assert (first.sampled, second.sampled) == (True, False)


def test_nobody_moves_a_request_into_a_trace_of_their_own() -> None:
    later, strange = f"00-{TRACE}-00000000000000ff-01", new_traceparent()
    assert nearest(later, GOOD) == later
    assert nearest(strange, GOOD) == GOOD
    assert nearest(None, GOOD) == GOOD
    assert nearest(strange, None) == strange
    assert nearest(None, None) is None
