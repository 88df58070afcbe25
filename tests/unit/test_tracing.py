"""Spans: what they say and never say, what they hang on, and that nobody waits for where they go."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import SettingsError, UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.tracing import export as tracing_export
from ringfence.kernel.tracing.api import (
    NOT_TRACING,
    Span,
    Tracing,
    Work,
    new_traceparent,
    trace_id,
)
from ringfence.kernel.tracing.application import of_application
from ringfence.kernel.tracing.export import MOST_WAITING, Exporting
from ringfence.kernel.tracing.otel import SpanTracing
from ringfence.kernel.tracing.settings import of_service, where_to
from ringfence.messages.codes import ReceivedCode
from ringfence.messages.topics import CREDENTIAL_REQUEST

TOPIC = "t.credential.request.v1"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
BASE = "http://127.0.0.1:4318"


class Kept:
    """Makes spans, and keeps them."""

    def __init__(self, *, in_application: bool = False) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = SpanTracing(self.provider.get_tracer("test"), in_application=in_application)

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def only(self) -> Any:
        (span,) = self.spans
        return span


@pytest.fixture
def kept() -> Kept:
    return Kept()


def record(traceparent: str | None = PARENT, offset: int = 7, value: bytes = b"secret") -> Received:
    headers = [("ce_id", b"id-1")] + ([("traceparent", traceparent.encode())] if traceparent else [])
    return Received(CREDENTIAL_REQUEST, TOPIC, 3, offset, 0, "bot", value, headers)


def parent_of(span: ReadableSpan) -> str:
    assert span.parent is not None
    return trace.format_span_id(span.parent.span_id)


def id_of(traceparent: str | None) -> str:
    assert traceparent is not None
    return traceparent.split("-")[2]


# --- what is received ---


def test_a_record_that_is_handled(kept: Kept) -> None:
    with kept.tracing.received([record()], "t.policy") as (handed,):
        assert trace_id(handed.traceparent) == TRACE
    span = kept.only()
    assert (span.name, span.kind) == (f"process {TOPIC}", SpanKind.CONSUMER)
    assert parent_of(span) == SPAN
    assert id_of(handed.traceparent) == trace.format_span_id(span.context.span_id)
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "messaging.system": "kafka",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": TOPIC,
        "messaging.destination.partition.id": "3",
        "messaging.kafka.offset": 7,
        "messaging.kafka.message.key": "bot",
        "messaging.message.id": "id-1",
        "messaging.message.body.size": 6,
        "messaging.consumer.group.name": "t.policy",
    }


def test_a_tombstone_says_so(kept: Kept) -> None:
    with kept.tracing.received([record(value=b"")], "g"):
        pass
    assert kept.only().attributes["messaging.kafka.message.tombstone"] is True


async def test_spans_of_concurrent_records_stay_in_their_traces(kept: Kept) -> None:
    """32 records side by side, each with steps of its own: every span is in its record's trace, under its record."""
    batch = [record(new_traceparent(), offset) for offset in range(32)]
    gate = asyncio.Event()

    async def handle(one: Received, received: Span) -> None:
        with kept.tracing.step("look", Work(received.traceparent, {"request_id": one.offset})) as span:
            await gate.wait()
            with kept.tracing.step("say", Work(span.traceparent, {"request_id": one.offset})):
                await asyncio.sleep(0)

    with kept.tracing.received(batch, "g") as received_spans:
        work = [
            asyncio.create_task(handle(one, span)) for one, span in zip(batch, received_spans, strict=True)
        ]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*work)
    by_offset: dict[object, dict[str, ReadableSpan]] = {}
    for span in kept.spans:
        assert span.attributes is not None
        offset = span.attributes.get("messaging.kafka.offset", span.attributes.get("ringfence.request.id"))
        by_offset.setdefault(offset, {})[span.name] = span
    assert len(by_offset) == 32
    for one in batch:
        spans = by_offset[one.offset]
        assert {trace.format_trace_id(s.context.trace_id) for s in spans.values()} == {
            trace_id(one.traceparent)
        }
        received, look, say = spans[f"process {TOPIC}"], spans["look"], spans["say"]
        assert received.context is not None
        assert look.context is not None
        assert parent_of(received) == id_of(one.traceparent)
        assert parent_of(look) == trace.format_span_id(received.context.span_id)
        assert parent_of(say) == trace.format_span_id(look.context.span_id)


def test_a_batch_that_fails_says_what_failed_and_no_more(kept: Kept) -> None:
    with pytest.raises(UnavailableError), kept.tracing.received([record(), record()], "g"):
        raise UnavailableError("the secret is hunter2", code=ReceivedCode("redis_away"))
    for span in kept.spans:
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "redis_away"
        assert span.attributes is not None
        assert span.attributes["error.type"] == "redis_away"
        assert not span.events, "no message of an exception, and no traceback"
        assert "hunter2" not in span.to_json()


def test_another_failure_is_told_by_its_type(kept: Kept) -> None:
    with pytest.raises(KeyError), kept.tracing.step("x", Work(PARENT, {})):
        raise KeyError("hunter2")
    assert kept.only().status.description == "KeyError"


@pytest.mark.parametrize("header", ["garbage", f"00-{TRACE}-{'0' * 16}-01", "00-" + "f" * 100_000, None])
def test_a_malformed_traceparent_starts_a_trace_of_its_own(kept: Kept, header: str | None) -> None:
    """The same in every service that reads the record."""
    with kept.tracing.received([record(header)], "g") as (handed,):
        assert trace_id(handed.traceparent) == trace_id(record(header).own_traceparent) != TRACE
    assert parent_of(kept.only()) == id_of(record(header).own_traceparent)


@pytest.mark.parametrize("flags", ["01", "03", "ff"])
def test_record_with_the_sampled_flag_is_traced(kept: Kept, flags: str) -> None:
    with kept.tracing.received([record(f"00-{TRACE}-{SPAN}-{flags}")], "g") as (handed,):
        assert handed.traceparent is not None
        assert handed.traceparent.endswith("-01"), "only this flag is passed on"
    assert parent_of(kept.only()) == SPAN


def test_unsampled_request_has_no_span(kept: Kept) -> None:
    with kept.tracing.received([record(f"00-{TRACE}-{SPAN}-00")], "g") as (handed,):
        assert handed.traceparent is not None
        assert handed.traceparent.startswith(f"00-{TRACE}-")
        assert handed.traceparent.endswith("-00"), "nor by anybody after"
        with kept.tracing.step("x", Work(handed.traceparent, {})):
            pass
    assert not kept.spans


def test_oversized_attributes_are_truncated(kept: Kept) -> None:
    long = record()._replace(key="k" * 1_000_000, raw_headers=[("ce_id", b"i" * 1_000_000)])
    with kept.tracing.received([long], "g") as (handed,):
        handed.note(agent_id="a" * 1_000_000)
        handed.refused("c" * 1_000_000)
    assert len(kept.only().to_json()) < 4000


# --- what is sent ---


async def test_a_record_that_is_sent(kept: Kept) -> None:
    acknowledged = asyncio.get_running_loop().create_future()
    span = kept.tracing.sending(TOPIC, "id-1", "bot", PARENT)
    span.end_when(acknowledged, 2)
    assert not kept.spans, "it is on its way"
    acknowledged.set_result(SimpleNamespace(partition=4, offset=40))
    await asyncio.sleep(0)
    sent = kept.only()
    assert (sent.name, sent.kind, parent_of(sent)) == (f"send {TOPIC}", SpanKind.PRODUCER, SPAN)
    assert id_of(span.traceparent) == trace.format_span_id(sent.context.span_id), "as its header says"
    assert dict(sent.attributes) == {
        "messaging.system": "kafka",
        "messaging.operation.type": "send",
        "messaging.operation.name": "send",
        "messaging.destination.name": TOPIC,
        "messaging.destination.partition.id": "4",
        "messaging.kafka.offset": 42,
        "messaging.kafka.message.key": "bot",
        "messaging.message.id": "id-1",
    }


async def test_a_record_that_kafka_did_not_take(kept: Kept) -> None:
    failed, cancelled = (asyncio.get_running_loop().create_future() for _ in range(2))
    kept.tracing.sending(TOPIC, "1", "bot", PARENT).end_when(failed)
    kept.tracing.sending(TOPIC, "2", "bot", PARENT).end_when(cancelled)
    failed.set_exception(OSError("hunter2"))
    cancelled.cancel()
    await asyncio.sleep(0)
    assert [span.status.description for span in kept.spans] == ["OSError", "CancelledError"]


@pytest.mark.parametrize("traceparent", [None, "garbage"])
def test_routine_message_between_services_has_no_span(kept: Kept, traceparent: str | None) -> None:
    span = kept.tracing.sending(TOPIC, "1", "bot", traceparent)
    assert span.traceparent is not None
    assert span.traceparent.endswith("-00"), "nor is it one for whoever reads it"
    with kept.tracing.step("x", Work(traceparent, {})):
        pass
    assert not kept.spans


# --- what is done on the way ---


def test_a_step_says_ids_outcomes_and_codes(kept: Kept) -> None:
    with kept.tracing.step("decide", Work(PARENT, {"agent_id": "bot", "lease_id": None})) as span:
        span.note(outcome="denied", count=2, cut=True)
        span.refused("beyond", "late")
    step = kept.only()
    assert (step.name, step.kind, parent_of(step)) == ("decide", SpanKind.INTERNAL, SPAN)
    assert dict(step.attributes) == {
        "ringfence.agent.id": "bot",
        "ringfence.outcome": "denied",
        "ringfence.count": 2,
        "ringfence.cut": True,
        "ringfence.reasons": ("beyond", "late"),
        "error.type": "beyond",
    }
    assert (step.status.status_code, step.status.description) == (StatusCode.ERROR, "beyond")


def test_cause_in_another_trace_is_linked(kept: Kept) -> None:
    order = new_traceparent()
    kept.tracing.step("end", Work(PARENT, {}, because_of=order)).end()
    kept.tracing.step("end", Work(PARENT, {}, because_of=f"00-{TRACE}-00000000000000ff-01")).end()
    linked, same = kept.spans
    assert [trace.format_trace_id(link.context.trace_id) for link in linked.links] == [trace_id(order)]
    assert not same.links


def test_span_includes_time_before_it_was_made(kept: Kept) -> None:
    kept.tracing.step("decide", Work(PARENT, {}, took_ns=5_000_000)).end()
    span = kept.only()
    assert span.end_time - span.start_time >= 5_000_000


def test_steps_of_many_are_each_ones_own(kept: Kept) -> None:
    parents = [new_traceparent(), new_traceparent()]
    with kept.tracing.steps("check", (Work(one, {}) for one in parents)) as spans:
        spans[1].refused("no")
    assert [trace.format_trace_id(span.context.trace_id) for span in kept.spans] == [
        trace_id(one) for one in parents
    ]
    assert [span.status.status_code for span in kept.spans] == [StatusCode.UNSET, StatusCode.ERROR]


def test_a_span_ends_once(kept: Kept) -> None:
    span = kept.tracing.step("x", Work(PARENT, {}))
    span.end()
    span.end(KeyError())
    assert kept.only().status.status_code is StatusCode.UNSET


# --- where there are none ---


async def test_without_them_everything_goes_on_from_where_it_came() -> None:
    with NOT_TRACING.received([record()], "g") as spans:
        assert list(spans) == []
    assert NOT_TRACING.sending(TOPIC, "1", "bot", PARENT).traceparent == PARENT
    assert NOT_TRACING.sending(TOPIC, "1", "bot", "garbage").traceparent is None
    with NOT_TRACING.step("x", Work(PARENT, {})) as span, NOT_TRACING.steps("y", iter([])) as spans:
        span.note(a=1)
        span.refused("no")
        assert (span.traceparent, list(spans)) == (PARENT, [])
    await NOT_TRACING.close()


def test_an_application_without_a_tracer_makes_none() -> None:
    assert of_application() is NOT_TRACING


def test_in_an_application_it_goes_on_from_its_current_span() -> None:
    kept = Kept(in_application=True)
    with kept.provider.get_tracer("app").start_as_current_span("deploy") as outer:
        asked = kept.tracing.step("request credential", Work(None, {}))
        asked.end()
        kept.tracing.sending(TOPIC, "1", "bot", asked.traceparent).end()
    kept.tracing.step("request credential", Work(None, {})).end()
    step, sent, deploy, alone = kept.spans
    assert parent_of(step) == trace.format_span_id(outer.get_span_context().span_id)
    assert parent_of(sent) == id_of(asked.traceparent)
    assert deploy.parent is None
    assert alone.parent is None


# --- whether, and where to ---


@pytest.mark.parametrize(
    ("endpoint", "environment", "url"),
    [
        ("", {}, None),
        (BASE, {}, f"{BASE}/v1/traces"),
        (f"{BASE}/", {}, f"{BASE}/v1/traces"),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": BASE}, f"{BASE}/v1/traces"),
        ("", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{BASE}/x"}, f"{BASE}/x"),
        (BASE, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://other/x"}, f"{BASE}/v1/traces"),
        (BASE, {"OTEL_SDK_DISABLED": "true"}, None),
        (BASE, {"OTEL_TRACES_EXPORTER": "none"}, None),
        (BASE, {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, f"{BASE}/v1/traces"),
    ],
)
def test_settings_say_where_to(endpoint: str, environment: dict[str, str], url: str | None) -> None:
    assert where_to(endpoint, environment) == url


def test_another_protocol_is_refused() -> None:
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"):
        where_to(BASE, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


def test_missing_exporter_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, tracing_export.__name__)
    monkeypatch.setitem(sys.modules, OTLPSpanExporter.__module__, None)
    with pytest.raises(SettingsError, match=r"pip install \'\.\[otel\]\'"):
        of_service("policy", "one", ServiceSettings(otlp_endpoint=BASE))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", BASE)
    assert of_service("policy", "one", ServiceSettings()) is NOT_TRACING, "set for everybody there, perhaps"


def test_missing_module_outside_the_extra_is_not_reported_as_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, tracing_export.__name__, None)
    with pytest.raises(ModuleNotFoundError, match=tracing_export.__name__):
        of_service("policy", "one", ServiceSettings(otlp_endpoint=BASE))


def test_by_itself_nothing_is_made() -> None:
    assert of_service("policy", "one", ServiceSettings()) is NOT_TRACING


# --- that nobody waits ---


class Stuck(SpanExporter):
    """Takes what it is given, and does not come back before it is let go."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.let_go = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.began.set()
        self.let_go.wait()
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.let_go.wait()


def counted(outcome: str) -> float:
    return metrics.SPANS.labels(outcome)._value.get()


def make(tracing: Tracing, count: int) -> None:
    for _ in range(count):
        tracing.step("x", Work(PARENT, {})).end()


async def test_spans_beyond_the_queue_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_export, "CLOSE_S", 0.1)
    stuck, dropped = Stuck(), counted("dropped")
    tracing = Exporting("policy", "one", stuck)
    make(tracing, MOST_WAITING + 100)
    assert counted("dropped") - dropped == 100
    assert stuck.began.wait(10)
    await tracing.close()  # what hangs is left behind
    assert counted("dropped") - dropped == MOST_WAITING + 100
    stuck.let_go.set()


async def test_queued_spans_are_sent_at_close() -> None:
    exporter, sent = InMemorySpanExporter(), counted("sent")
    tracing = Exporting("policy", "one", exporter)
    make(tracing, 3)
    await tracing.close()
    assert counted("sent") - sent == 3
    (resource,) = {span.resource for span in exporter.get_finished_spans()}
    said = resource.attributes
    assert (said["service.name"], said["service.instance.id"]) == ("ringfence-policy", "one")
    assert said["service.version"]


async def test_unreachable_receiver_is_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing_export._first_failure, "failing", False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        failed = counted("failed")
        tracing = Exporting.to(f"http://127.0.0.1:{taken.getsockname()[1]}/v1/traces", "policy", "one")
        for _ in range(3):
            make(tracing, 2)
            await asyncio.to_thread(tracing._provider.force_flush)
        await tracing.close()
    assert counted("failed") - failed == 6
    (said,) = [one for one in caplog.records if one.name.startswith("opentelemetry")]
    assert "export" in said.getMessage()


async def test_failure_after_a_success_is_logged_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing_export._first_failure, "failing", False)

    class Wavering(InMemorySpanExporter):
        """Fails, and says so as the real one does, every other time."""

        calls = 0

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            self.calls += 1
            if self.calls % 2:
                return super().export(spans)
            logging.getLogger(OTLPSpanExporter.__module__).error("nobody there")
            return SpanExportResult.FAILURE

    tracing = Exporting("policy", "one", Wavering())
    for _ in range(4):
        make(tracing, 1)
        await asyncio.to_thread(tracing._provider.force_flush)
    await tracing.close()
    assert [one.getMessage() for one in caplog.records].count("nobody there") == 2
