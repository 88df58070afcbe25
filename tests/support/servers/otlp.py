"""What takes spans: an OTLP receiver over HTTP on loopback, and the trees that they make.

`python -m tests.support.servers.otlp` shows each trace as it comes, where no Jaeger or Tempo is at hand.
"""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent
from opentelemetry.proto.trace.v1.trace_pb2 import Status

WITHIN_S = 60.0
QUIET_S = 3.0


@dataclass(frozen=True)
class Collected:
    """One span as it came."""

    service: str
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    start_ns: int
    end_ns: int
    failed: bool
    attributes: dict[str, Any] = field(hash=False)
    links: tuple[str, ...] = ()
    """The traces that it is linked to."""
    resource: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def place(self) -> str:
        """Whose it is, and what: the topic without prefix and version."""
        topic = self.attributes.get("messaging.destination.name")
        what = self.name if topic is None else f"{self.name.split()[0]} {short(topic)}"
        return f"{self.service.removeprefix('ringfence-')}: {what}"

    def __getitem__(self, name: str) -> Any:
        """An attribute of Ringfence's own, or None."""
        return self.attributes.get(f"ringfence.{name}")

    @property
    def code(self) -> Any:
        """Why it failed."""
        return self.attributes.get("error.type")


def short(topic: str) -> str:
    """`lease` of `stack.lease.v1`."""
    return topic.partition(".")[2].rpartition(".")[0]


class Collector:
    """Takes what is sent to it, until it is closed. `url` is the endpoint to set."""

    def __init__(self, port: int = 0) -> None:
        self.spans: list[Collected] = []
        self.bodies: list[bytes] = []
        """As they came, for whoever looks for what must not be in them."""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(self.path, body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: what came is looked at by the tests."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="otlp", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, path: str, body: bytes) -> None:
        """What one request brings."""
        assert path == "/v1/traces", path
        self.bodies.append(body)
        self.spans.extend(spans_of(ExportTraceServiceRequest.FromString(body)))

    def of(self, trace: str) -> list[Collected]:
        """The spans of one trace that came so far."""
        return [span for span in list(self.spans) if span.trace == trace]

    async def until(self, trace: str, found: Callable[[list[Collected]], Any], what: str) -> list[Collected]:
        """The spans of a trace, once `found` says that they are there. Fails the test after a minute."""
        try:
            async with asyncio.timeout(WITHIN_S):
                while not found(spans := self.of(trace)):
                    await asyncio.sleep(0.05)
                return spans
        except TimeoutError:
            came = "\n".join(sorted(span.place for span in self.of(trace)))
            raise AssertionError(
                f"did not come within {WITHIN_S:.0f} s: {what}; what came:\n{came}"
            ) from None


def spans_of(request: ExportTraceServiceRequest) -> Iterator[Collected]:
    """The spans of one message."""
    for of_resource in request.resource_spans:
        resource = {one.key: _value(one.value) for one in of_resource.resource.attributes}
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield Collected(
                    service=resource["service.name"],
                    name=span.name,
                    kind=Sent.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    failed=span.status.code == Status.STATUS_CODE_ERROR,
                    attributes={one.key: _value(one.value) for one in span.attributes},
                    links=tuple(link.trace_id.hex() for link in span.links),
                    resource=resource,
                )


def _value(value: AnyValue) -> Any:
    match value.WhichOneof("value"):
        case "array_value":
            return [_value(one) for one in value.array_value.values]
        case str(kind):
            return getattr(value, kind)
    return None


def paths(spans: Sequence[Collected]) -> set[str]:
    """Every way from a root of the tree to a span, as `policy: process credential.request > policy: decide`."""
    by_id = {span.id: span for span in spans}

    def path(span: Collected) -> str:
        above = by_id.get(span.parent)
        return f"{path(above)} > {span.place}" if above is not None else span.place

    return {path(span) for span in spans}


def drawn(spans: Sequence[Collected]) -> str:
    """A trace as text: a line for each span, with its time, under what it came of."""
    below: dict[str, list[Collected]] = {}
    ids = {span.id for span in spans}
    for span in sorted(spans, key=lambda span: span.start_ns):
        below.setdefault(span.parent if span.parent in ids else "", []).append(span)
    start_ns = min(span.start_ns for span in spans)

    def lines(parent: str, depth: int) -> Iterator[str]:
        for span in below.get(parent, ()):
            at_ms, took_ms = (span.start_ns - start_ns) / 1e6, (span.end_ns - span.start_ns) / 1e6
            code = f"  ! {span.code}" if span.failed else ""
            yield f"{at_ms:9.1f} ms {took_ms:8.1f} ms  {'  ' * depth}{span.place}{code}"
            yield from lines(span.id, depth + 1)

    return "\n".join([f"trace {spans[0].trace}", *lines("", 0)])


def main(port: int = 4318) -> None:
    """Show each trace once nothing more of it came for a while, for ever."""
    with Collector(port) as collector:
        print(f"takes spans at {collector.url}; Ctrl-C ends it", flush=True)
        shown = before = 0
        while True:
            time.sleep(QUIET_S)
            spans = list(collector.spans)
            if before == len(spans) > shown:
                for trace in dict.fromkeys(span.trace for span in spans[shown:]):
                    print(drawn(collector.of(trace)), flush=True)
                shown = len(spans)
            before = len(spans)


if __name__ == "__main__":
    main()
