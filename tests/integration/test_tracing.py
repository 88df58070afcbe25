"""One request is one trace: what an OTLP receiver gets from the real services, as trees; and what it never gets."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from aiokafka import AIOKafkaProducer
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from ringfence.cli.commands.dev import client_settings
from ringfence.client import connection as client_connection
from ringfence.client.errors import RequestDeniedError
from ringfence.dev.stack import Stack, StackOptions
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.kafka.connection import connection
from ringfence.kernel.kafka.record import Outbound
from ringfence.kernel.tracing.otel import SpanTracing
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.registry import BackendSettings, RequestRule, VerbFloor
from ringfence.messages.topics import AUDIT, CREDENTIAL_DECISION, CREDENTIAL_REQUEST, DEAD_LETTER, LEASE
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.gateway.raw import connected_unix
from tests.integration.stack.test_attacks import audited, decided, make_request
from tests.integration.stack.test_main_line import approved_write, verifier
from tests.support import secret_canary
from tests.support.servers.otlp import Collected, Collector, paths
from tests.support.stack import WITHIN_S, RunningStack

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
_AT_ONCE = 32

ASKED = "agent: request credential > agent: send credential.request > policy: process credential.request"
QUESTION = f"{ASKED} > policy: send approval.request"
ANSWERED = f"{QUESTION} > agent: send approval.response > policy: process approval.response"
ISSUED = (
    f"{ANSWERED} > policy: decide > policy: send credential.decision > issuer: process credential.decision"
)
GIVEN_BACK = (
    "agent: request credential > agent: send revocation.request > revoker: process revocation.request"
)
"""What every program that has a tracer hangs under its own span; here that of the agent, and of sam, is called so."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced_stack(kafka: Kafka, redis_server: RedisServer, collector: Collector) -> Iterator[Stack]:
    """All services as processes, with an endpoint for their spans."""
    with tempfile.TemporaryDirectory(prefix="ringfence-traced-") as folder:
        options = StackOptions(
            Path(folder) / "s",
            kafka=kafka.bootstrap,
            embedded_broker=kafka.embedded,
            redis_url=redis_server.url,
            topic_prefix="traced",
            redis_prefix="traced",
            environment={"RINGFENCE_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"},
        )
        with Stack(options) as running:
            yield running


@pytest.fixture
async def traced(traced_stack: Stack) -> RunningStack:
    """An organisation whose services make spans, and whose agents and people do not."""
    return await RunningStack(traced_stack, client_settings(traced_stack.environment())).make()


@dataclass
class Application:
    """What an agent, or a person, uses Ringfence from, with a tracer of its own."""

    tracer: trace.Tracer


@pytest.fixture
def application(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Application:
    provider = TracerProvider(resource=Resource({"service.name": "agent"}), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{collector.url}/v1/traces")
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    monkeypatch.setattr(client_connection, "of_application", lambda: SpanTracing(tracer, in_application=True))
    return Application(tracer)


def trees(spans: list[Collected], *, audit: bool = False) -> set[str]:
    """The ways to the spans, without those of audit, which come after each record."""
    return {path for path in paths(spans) if audit or "audit:" not in path}


def only(spans: list[Collected], place: str) -> Collected:
    (span,) = [span for span in spans if span.place == place]
    return span


async def test_from_request_to_release(
    traced: RunningStack, application: Application, collector: Collector
) -> None:
    """The agent's own span, policy twice with a person's yes between, the issuer, and the end: one tree, one trace."""
    async with traced.as_agent() as agent, verifier(traced) as server, traced.seen(LEASE, AUDIT) as seen:
        credential = await approved_write(traced, agent)
        await server.verify(credential.value)
        await agent.release(credential)
        await traced.end_of(agent, seen, credential.lease_id)
    assert credential.trace_id is not None
    expected = {
        "agent: request credential",
        "agent: request credential > agent: send credential.request",
        ASKED,
        f"{ASKED} > policy: judge",
        f"{ASKED} > policy: decide",
        f"{ASKED} > policy: decide > policy: send credential.decision",
        f"{ASKED} > policy: decide > policy: send credential.decision > issuer: process credential.decision",
        f"{ASKED} > policy: send credential.reply",
        QUESTION,
        f"{QUESTION} > agent: send approval.response",
        ANSWERED,
        f"{ANSWERED} > policy: judge",
        f"{ANSWERED} > policy: decide",
        f"{ANSWERED} > policy: decide > policy: send credential.decision",
        f"{ANSWERED} > policy: finding credential.request",
        f"{ANSWERED} > policy: finding credential.request > policy: send service.event",
        ISSUED,
        f"{ISSUED} > issuer: check",
        f"{ISSUED} > issuer: activate",
        f"{ISSUED} > issuer: mint",
        f"{ISSUED} > issuer: send lease",
        f"{ISSUED} > issuer: send lease > revoker: process lease",
        f"{ISSUED} > issuer: send credential.reply",
        "agent: request credential > agent: send revocation.request",
        GIVEN_BACK,
        f"{GIVEN_BACK} > revoker: end lease",
        f"{GIVEN_BACK} > revoker: end lease > revoker: send lease",
        f"{GIVEN_BACK} > revoker: end lease > revoker: send lease > revoker: process lease",
        f"{GIVEN_BACK} > revoker: accepted revocation.request",
        f"{GIVEN_BACK} > revoker: accepted revocation.request > revoker: send service.event",
        "agent: request credential > agent: send revocation.request > gateway: send revocation.ack",
    }
    spans = await collector.until(credential.trace_id, lambda s: trees(s) >= expected, "the tree")
    assert trees(spans) == expected
    # Olga alone made the agent's user, sponsor and approver: that is a finding.
    assert [span.place for span in spans if span.failed] == ["policy: finding credential.request"]
    kinds = {"send": "PRODUCER", "process": "CONSUMER"}
    for span in spans:
        assert span.kind == kinds.get(span.name.split()[0], "INTERNAL"), span.name
        assert span.start_ns <= span.end_ns
    minted = only(spans, "issuer: mint")
    assert (minted["agent.id"], minted["task.id"]) == (traced.agent, traced.task)
    assert (minted["request.id"], minted["lease.id"]) == (credential.request_id, credential.lease_id)
    assert (minted["target.id"], minted["backend"]) == (traced.target, "jwt")
    ended = only(spans, "revoker: end lease")
    assert (ended["status"], ended["cause"], ended["lease.id"]) == (
        "released",
        "release",
        credential.lease_id,
    )
    outcomes = {span["outcome"] for span in spans if span.place == "policy: decide"}
    assert outcomes == {"approval_required", "allowed"}
    resource = minted.resource
    assert (resource["service.name"], resource["service.instance.id"]) == ("ringfence-issuer", "issuer")
    assert resource["service.version"]


async def test_audit_follows_every_record_of_it(traced: RunningStack, collector: Collector) -> None:
    """From each record that was sent hangs audit's taking it in, and from that the event that it was chained as."""
    async with traced.as_agent() as agent, traced.seen(LEASE, AUDIT) as seen:
        credential = await traced.read(agent)
        await agent.release(credential)
        await traced.end_of(agent, seen, credential.lease_id)
    assert credential.trace_id is not None
    sent = [
        "policy: send credential.decision",
        "issuer: send lease",
        "issuer: send credential.reply",
        "revoker: send lease",
        "revoker: send service.event",
    ]

    def told(spans: list[Collected]) -> bool:
        ways = trees(spans, audit=True)
        return all(
            any(way.endswith(f"{one} > audit: process {one.split()[-1]} > audit: send audit") for way in ways)
            for one in sent
        )

    await collector.until(credential.trace_id, told, "audit's part")


async def test_a_refusal_says_why(
    traced: RunningStack, application: Application, collector: Collector
) -> None:
    """What policy denies failed there and at the agent, by its code; the issuer has nothing to do with it."""
    async with traced.as_agent() as agent:
        with application.tracer.start_as_current_span("deploy") as outer, pytest.raises(RequestDeniedError):
            await agent.request(
                task=traced.task, target=traced.target, verbs=["write"], resources=["env/production/web"],
                reason="to go beyond", timeout_s=WITHIN_S,
            )  # fmt: skip
    asked = f"agent: deploy > {ASKED}"
    expected = {
        "agent: deploy",
        "agent: deploy > agent: request credential",
        "agent: deploy > agent: request credential > agent: send credential.request",
        asked,
        f"{asked} > policy: judge",
        f"{asked} > policy: decide",
        f"{asked} > policy: decide > policy: send credential.decision",
        f"{asked} > policy: decide > policy: send credential.decision > issuer: process credential.decision",
        f"{asked} > policy: send credential.reply",
    }
    its = trace.format_trace_id(outer.get_span_context().trace_id)
    spans = await collector.until(its, lambda s: trees(s) >= expected, "the tree")
    assert trees(spans) == expected
    decision = only(spans, "policy: decide")
    assert decision.failed
    assert (decision["outcome"], decision["agent.id"]) == ("denied", traced.agent)
    assert decision.code == decision["reasons"][0] == "beyond_scope"
    assert only(spans, "policy: judge").failed
    assert only(spans, "agent: request credential").code == "beyond_scope"
    assert not only(spans, "policy: process credential.request").failed, "it did what it is there for"


async def test_many_at_once_are_a_trace_each(traced: RunningStack, collector: Collector) -> None:
    async with traced.as_agent() as agent:
        credentials = await asyncio.gather(*(traced.read(agent) for _ in range(_AT_ONCE)))
    assert len({one.trace_id for one in credentials}) == _AT_ONCE

    def whole(spans: list[Collected]) -> bool:
        return {"policy: decide", "issuer: mint", "issuer: send credential.reply"} <= {s.place for s in spans}

    for one in credentials:
        assert one.trace_id is not None
        spans = await collector.until(one.trace_id, whole, "a whole trace")
        assert {span["request.id"] for span in spans} - {None} == {one.request_id}
        assert {span["lease.id"] for span in spans} - {None} == {one.lease_id}
        only(spans, "issuer: mint")


async def test_an_end_hours_later_is_in_the_trace_of_the_request(
    traced: RunningStack, collector: Collector
) -> None:
    """One lease ends by its deadline, which nobody orders; another by an order that has a trace of its own: linked."""
    async with traced.as_agent() as agent, traced.seen(LEASE, AUDIT) as seen:
        short, long = await traced.read(agent, ttl_s=3), await traced.read(agent)
        await traced.end_of(agent, seen, short.lease_id)
        async with traced.administrator("sam") as sam:
            await sam.revoke(reason="enough", agent_id=traced.agent)
        await traced.end_of(agent, seen, long.lease_id)
    for credential, status in ((short, "expired"), (long, "revoked")):
        assert credential.trace_id is not None
        spans = await collector.until(
            credential.trace_id, lambda s: "revoker: end lease" in {x.place for x in s}, "the end"
        )
        ended = only(spans, "revoker: end lease")
        assert ended["status"] == status
        assert ended.parent == only(spans, "issuer: process credential.decision").id
        if credential is long:
            (order,) = ended.links
            told = collector.of(order)
            assert order != credential.trace_id
            assert "revoker: process revocation.request" in {span.place for span in told}
        else:
            assert not ended.links


async def test_no_span_tells_a_secret(traced: RunningStack, collector: Collector) -> None:
    async with traced.as_agent() as agent, traced.seen(LEASE) as seen:
        credential = await approved_write(traced, agent)
        await agent.release(credential)
        await traced.end_of(agent, seen, credential.lease_id)
        agent_key = agent.connection.key
    assert credential.trace_id is not None
    await collector.until(
        credential.trace_id, lambda s: "revoker: end lease" in {x.place for x in s}, "the end"
    )
    texts = [body.decode("latin-1") for body in list(collector.bodies)]
    secrets = [credential.value, credential.value.rpartition(".")[2], "to deploy", agent_key.public.x]
    assert not secret_canary.in_texts(texts, secrets)
    assert not [text for text in texts if re.search(r"eyJ[\w-]{16}", text)], "no JWS, no JWE, of anybody"
    assert secret_canary.in_texts(texts, [credential.lease_id]), "else nothing would be found"


# --- what an agent, or a stranger, can do by it ---


async def send_raw(
    realm: RunningStack, value: str | bytes, *traceparents: bytes
) -> tuple[str, int, int, int]:
    """A record with exactly these headers: topic, partition, offset, and when it was appended."""
    producer = AIOKafkaProducer(**connection(realm.settings))
    await producer.start()
    try:
        at = await producer.send_and_wait(
            CREDENTIAL_REQUEST.name(realm.settings.topic_prefix),
            value.encode() if isinstance(value, str) else value,
            key=realm.agent.encode(),
            headers=[("traceparent", one) for one in traceparents],
        )
    finally:
        await producer.stop()
    return at.topic, at.partition, at.offset, at.timestamp


def request_of(realm: RunningStack) -> tuple[CredentialRequest, str, str]:
    claims = make_request(realm)
    compact = sign(claims, realm.key("agent", realm.agent))
    return claims, compact, message_id(claims.iss, claims.jti)


def about(collector: Collector, request_id: str) -> list[Collected]:
    return [span for span in list(collector.spans) if span["request.id"] == request_id]


@pytest.mark.parametrize(
    "headers",
    [
        [b"garbage"],
        [b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01"],
        [b"\xff\xfe\x00"],
        [b"00-" + b"f" * 500_000],
        [b""],
        [],
    ],
    ids=["garbage", "zeros", "no text", "huge", "empty", "none"],
)
async def test_a_malformed_traceparent_does_no_harm(
    traced: RunningStack, collector: Collector, headers: list[bytes]
) -> None:
    """The request is decided and issued like any other, in one trace, which is a new one and audit's as well."""
    _, compact, request_id = request_of(traced)
    async with traced.as_agent() as agent, traced.seen(CREDENTIAL_DECISION, AUDIT, LEASE) as seen:
        await send_raw(traced, compact, *headers)
        await decided(traced, agent, seen, request_id, "allowed")
        issued = await audited(
            seen,
            lambda e: (
                (e["unmapped"].get("request"), e["metadata"]["event_code"])
                == (request_id, "credential.issued")
            ),
            "the issue",
        )

    its = issued["unmapped"]["trace_id"]
    places = {
        "policy: process credential.request", "policy: decide", "issuer: mint", "audit: process credential.request"
    }  # fmt: skip
    spans = await collector.until(
        its, lambda spans: places <= {span.place for span in spans}, "both services' spans"
    )
    assert {span.trace for span in about(collector, request_id)} == {its}
    began = only(spans, "policy: process credential.request").parent
    assert began not in {span.id for span in spans}, "nobody sent it: it follows from the record's place"
    assert len([span for span in spans if span.place == "policy: decide"]) == 1


async def test_unsampled_request_is_audited_but_not_traced(
    traced: RunningStack, collector: Collector
) -> None:
    _, compact, request_id = request_of(traced)
    async with traced.as_agent() as agent, traced.seen(CREDENTIAL_DECISION, AUDIT) as seen:
        await send_raw(traced, compact, f"00-{TRACE}-{SPAN}-00".encode())
        await decided(traced, agent, seen, request_id, "allowed")
        event = await audited(
            seen,
            lambda e: e["unmapped"].get("request") == request_id and "trace_id" in e["unmapped"],
            "the request",
        )
        assert event["unmapped"]["trace_id"] == TRACE
        after = await traced.read(agent)  # what comes after it has come: so would it have
    assert after.trace_id is not None
    await collector.until(after.trace_id, lambda s: "issuer: mint" in {x.place for x in s}, "the next")
    assert not about(collector, request_id)
    assert not collector.of(TRACE)


async def test_a_foreign_trace_shows_whose_request_it_was(traced: RunningStack, collector: Collector) -> None:
    """Trace ids are no secret, and whoever sends a request may name any: what is said of it is what was verified."""
    async with traced.as_agent() as agent, traced.seen(CREDENTIAL_DECISION) as seen:
        victim = await traced.read(agent)
        _, compact, request_id = request_of(traced)
        await send_raw(traced, compact, f"00-{victim.trace_id}-{SPAN}-01".encode())
        await decided(traced, agent, seen, request_id, "allowed")
    assert victim.trace_id is not None

    def both(spans: list[Collected]) -> bool:
        return {span["request.id"] for span in spans if span.name == "mint"} == {
            victim.request_id,
            request_id,
        }

    spans = await collector.until(victim.trace_id, both, "both requests")
    by_id = {span.id: span for span in spans}
    for span in spans:
        above = by_id.get(span.parent)
        if above is not None and span["request.id"] and above["request.id"]:
            assert span["request.id"] == above["request.id"], "none hangs on what is the other's"


async def test_malformed_request_is_dead_lettered_under_a_span_without_its_value(
    traced: RunningStack, collector: Collector
) -> None:
    mark = os.urandom(16).hex()
    async with traced.as_agent(), traced.seen(DEAD_LETTER) as seen, traced.publisher() as stranger:
        sent = await stranger.send(
            CREDENTIAL_REQUEST,
            "x",
            Outbound(traced.agent, "hunter2", id="x", traceparent=f"00-{mark}-{SPAN}-01"),
        )
        at = await sent
        await seen.until(
            lambda: [r for r in seen.of(DEAD_LETTER) if f'"offset":{at.offset}'.encode() in r.value],
            "the dead letter",
        )
    spans = await collector.until(
        mark, lambda s: "policy: process credential.request" in {x.place for x in s}, "policy's part"
    )
    buried_there = only(spans, "policy: process credential.request")
    assert buried_there.failed
    assert buried_there.code
    assert "policy: send dead-letter" in {
        span.place for span in await collector.until(mark, lambda s: len(s) > 1, "x")
    }
    assert not secret_canary.in_texts([str(span) for span in spans], ["hunter2"])


# --- the gateway ---


@asynccontextmanager
async def shop() -> AsyncIterator[int]:
    """A target that says yes to everything. Yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def behind_the_gateway(realm: RunningStack, port: int) -> None:
    """The realm's target is at this port, and read is what GET does there."""
    backend = BackendSettings.model_validate({"kind": "jwt", "url": f"http://127.0.0.1:{port}"})
    async with realm.as_operator() as olga:
        await olga.set_target(
            realm.target, description="a shop", backend=backend, keys=[],
            verbs=[VerbFloor(verb="read"), VerbFloor(verb="write", floor="sponsor")],
            requests=[RequestRule(method="GET", path="/{path*}", verb="read", resource="{path*}")],
        )  # fmt: skip


async def test_gateway_action_is_a_span_in_the_trace_of_its_request(
    traced: RunningStack, collector: Collector
) -> None:
    """An action that a lease lets pass is a span in the trace of the request that the lease came from."""
    folder = traced.stack.sockets
    async with shop() as port, traced.as_agent() as agent:
        await behind_the_gateway(traced, port)
        lease = await agent.request(
            task=traced.task, target=traced.target, verbs=["read"], resources=["env/staging/web"],
            reason="to look", delivery="gateway", timeout_s=WITHIN_S,
        )  # fmt: skip

        async def status(path: str) -> int:
            async with connected_unix(str(folder / f"{traced.task}.sock")) as raw:
                head = f"GET /{traced.target}/{path} HTTP/1.1\r\nHost: gateway\r\n\r\n"
                return (await raw.ask(head.encode())).status

        async with asyncio.timeout(WITHIN_S):
            while not (folder / f"{traced.task}.sock").exists() or await status("env/staging/web") != 200:
                await asyncio.sleep(0.05)
    assert lease.trace_id is not None

    def acted(spans: list[Collected]) -> bool:
        return any(
            way.endswith("gateway: decide action > gateway: send action > audit: process action")
            for way in trees(spans, audit=True)
        )

    spans = await collector.until(lease.trace_id, acted, "the action")
    action = next(span for span in spans if span.name == "decide action" and span["allowed"])
    assert (action["lease.id"], action["agent.id"], action["verb"]) == (lease.lease_id, traced.agent, "read")
    assert action.parent == only(spans, "issuer: process credential.decision").id
    assert not [span for span in spans if "staging" in str(span.attributes)], "nothing of what it was done to"


# --- that it matters to nobody whether spans arrive ---


@asynccontextmanager
async def sending_to(stack: Stack, url: str, *roles: ServiceRole) -> AsyncIterator[None]:
    """Services that send their spans elsewhere meanwhile, for ten minutes each time if it hangs."""
    before = dict(stack.options.environment)
    stack.options.environment |= {"RINGFENCE_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_TIMEOUT": "600"}
    try:
        await restarted(stack, *roles)
        yield
    finally:
        stack.options.environment.clear()
        stack.options.environment |= before
        await restarted(stack, *roles)


async def restarted(stack: Stack, *roles: ServiceRole) -> None:
    """Ended as any service is, within a minute, and started again."""
    for role in roles:
        child = stack.child(role)
        os.kill(child.pid, signal.SIGTERM) if child.alive else None
        assert await asyncio.to_thread(child.wait, 60) == 0, child.log_tail(20)
        stack.start_service(role)
    await asyncio.to_thread(stack.wait_ready, roles)


async def spans_counted(stack: Stack, role: ServiceRole, outcome: str) -> float:
    async with httpx.AsyncClient(trust_env=False, timeout=WITHIN_S) as http:
        said = (await http.get(f"{stack.url(role)}/metrics")).text
    found = [
        one for one in said.splitlines() if one.startswith(f'ringfence_spans_total{{outcome="{outcome}"')
    ]
    return float(found[0].split()[1]) if found else 0.0


async def test_hanging_span_receiver_delays_no_request(traced: RunningStack, traced_stack: Stack) -> None:
    """Credentials are issued, and the services end as ever: what they could not send is not waited for."""
    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        hanging.listen(64)  # whoever connects is never answered
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        async with sending_to(traced_stack, url, "policy", "issuer"), traced.as_agent() as agent:
            for _ in range(3):
                assert await traced.read(agent)
            hanging.settimeout(WITHIN_S)
            taken, _ = await asyncio.to_thread(hanging.accept)
            taken.close()


async def test_unreachable_span_receiver_is_counted(traced: RunningStack, traced_stack: Stack) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with sending_to(traced_stack, url, "policy"), traced.as_agent() as agent:
            traced_stack.options.environment["OTEL_EXPORTER_OTLP_TIMEOUT"] = "1"
            await restarted(traced_stack, "policy")
            assert await traced.read(agent)
            async with asyncio.timeout(WITHIN_S):
                while not await spans_counted(traced_stack, "policy", "failed"):
                    await asyncio.sleep(0.1)
            assert await traced.read(agent)
