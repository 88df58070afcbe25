"""`traceparent` (W3C Trace Context): what is one, and what to go on from."""

from __future__ import annotations

import pytest

from ringfence.kernel.kafka.record import Received
from ringfence.kernel.tracing.api import (
    nearest,
    new_traceparent,
    trace_id,
    well_formed,
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


@pytest.mark.parametrize("flags", ["00", "01", "03", "ff"])
def test_traceparent_with_any_flags_is_well_formed(flags: str) -> None:
    text = f"00-{TRACE}-{SPAN}-{flags}"
    assert (well_formed(text), trace_id(text)) == (text, TRACE)


@pytest.mark.parametrize("text", NONE, ids=lambda text: repr(text[:60]))
def test_malformed_traceparent_is_ignored(text: str) -> None:
    assert well_formed(text) is None
    assert trace_id(text) is None
    assert record(("traceparent", text.encode())).traceparent == record().traceparent


def test_a_header_that_is_no_text_is_none() -> None:
    assert record(("traceparent", b"\xff\xfe\x00")).traceparent == record().traceparent
    assert record(("traceparent", None)).traceparent == record().traceparent
    assert record(("traceparent", GOOD.encode())).traceparent == GOOD


def test_record_without_a_traceparent_gets_one_from_its_offset() -> None:
    """Policy and audit, which read the same record, name the same trace, and so do they after a restart."""
    here = record()
    assert well_formed(here.traceparent)
    assert here.traceparent.endswith("-01")
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
    assert (well_formed(one), well_formed(other)) == (one, other)
    assert (one[-3:], other[-3:]) == ("-01", "-00")


def test_foreign_traceparent_does_not_replace_the_requests_trace() -> None:
    later, strange = f"00-{TRACE}-00000000000000ff-01", new_traceparent()
    assert nearest(later, GOOD) == later
    assert nearest(strange, GOOD) == GOOD
    assert nearest(None, GOOD) == GOOD
    assert nearest(strange, None) == strange
    assert nearest(None, None) is None
