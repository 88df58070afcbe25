"""The programs as deploy/gateway configures them: what reaches the target, and what does not."""

from __future__ import annotations

import asyncio
import hashlib
import posixpath
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest

from ringfence.client.approvals.sponsor import Sponsor
from ringfence.dev.processes import LOOPBACK, free_port
from ringfence.kernel.http1.head import PROXY_FIELDS
from ringfence.model.http_targets import MAX_BODY_BYTES
from tests.gateway_external import programs
from tests.gateway_external.agent import HOST, Agent, Answer, request
from tests.gateway_external.conftest import SECRET, Running, Stage, next_action
from tests.gateway_external.programs import PROGRAMS, started
from tests.gateway_external.target import EVENTS, FIRST, FORBIDDEN, SECOND, Received
from tests.support.benches.gateway_flows import action
from tests.support.benches.sdk_clients import client
from tests.support.servers.unread_bodies import serving_unread_bodies
from tests.support.world import WITHIN_S

SPOOFED = (
    ("X-Forwarded-For", "10.0.0.1"),
    ("X-Forwarded-Host", "elsewhere.example"),
    ("X-Forwarded-Method", "GET"),
    ("X-Forwarded-Port", "1"),
    ("X-Forwarded-Prefix", "/p"),
    ("X-Forwarded-Proto", "http"),
    ("X-Forwarded-Server", "s"),
    ("X-Forwarded-Uri", "/a/x"),
    ("X-Real-Ip", "10.0.0.1"),
    ("Forwarded", "host=elsewhere.example"),
    ("X-HTTP-Method-Override", "DELETE"),
    ("X-HTTP-Method", "DELETE"),
    ("X-Method-Override", "DELETE"),
    ("X-Original-Method", "GET"),
    ("X-Original-URL", "/b/x"),
    ("X-Original-URI", "/b/x"),
    ("X-Rewrite-URL", "/b/x"),
    ("X-Api-Key", "the agent's own"),
    ("X-Ringfence-Label", "chat"),
    ("Proxy-Authorization", "Basic YTpi"),
    ("TE", "trailers"),
)
"""What an agent may send, and no target may get."""


@pytest.fixture
async def agent(stage: Stage, running: Running) -> Agent:
    """With a lease to read below `/a`, and nothing that came before."""
    agent = await stage.agent(running.port, "read")
    stage.target.received.clear()
    return agent


@pytest.fixture
async def writer(stage: Stage, running: Running) -> Agent:
    agent = await stage.agent(running.port, "write")
    stage.target.received.clear()
    return agent


def digest(received: Received, *, seen: bool) -> str:
    """What the event on `action` says of the request that was decided on, if this is the same."""
    body = hashlib.sha256(received.body).hexdigest() if seen else "-"
    text = f"{received.method}\nhttps\nhub\n{received.target}\n{body}"
    return hashlib.sha256(text.encode()).hexdigest()


async def assert_decided(stage: Stage, running: Running, received: Received) -> None:
    """What the target got is what was allowed: method, path and query, and the body where the program shows it."""
    if running.name == "envoy":  # of a query without anything in it, nobody sees the question mark
        received = replace(received, target=received.target.removesuffix("?"))
    seen = running.name == "traefik" or (running.name == "envoy" and received.body != b"")
    await action(stage.world, request_digest=digest(received, seen=seen), allowed=True)


async def test_in_scope_arrives_with_the_credential_and_nothing_of_the_agents(
    stage: Stage, running: Running, agent: Agent
) -> None:
    answer = await agent.send("GET", "/a/x?q=1&r=a%20b", SPOOFED)
    assert (answer.status, answer.body) == (200, b"ok")
    assert answer.get("Alt-Svc") == ""
    [received] = stage.target.received
    assert (received.method, received.target, received.body) == ("GET", "/a/x?q=1&r=a%20b", b"")
    [authorization] = received.all("Authorization")
    assert authorization.startswith("Bearer ey")
    assert received.all("Host") == ["hub.example"]
    left = {name for name, _ in (*SPOOFED, ("DPoP", "")) if received.all(name)}
    assert left == set()
    assert agent.handle not in str(received.headers)
    event = await action(stage.world, lease_id=agent.handle, method="GET", allowed=True)
    assert (event.verb, event.target_id, event.agent_id) == ("read", "hub", stage.desk.bot.name)
    await assert_decided(stage, running, received)


async def test_a_secret_in_a_header_of_its_own_takes_the_place_of_the_agents(stage: Stage, name: str) -> None:
    places = replace(stage.places, target_id="keyed")
    with started(name, places, stage.folder / f"{name}-keyed") as port:
        agent = await stage.agent(port, "read", target_id="keyed")
        stage.target.received.clear()
        answer = await agent.send("GET", "/a/x", [("X-Api-Key", "the agent's own")])
    assert answer.status == 200
    [received] = stage.target.received
    assert received.all("X-Api-Key") == [SECRET]
    assert received.all("Authorization") == ["none"]


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/b/x", "beyond_lease"),
        ("PUT", "/a/x", "beyond_lease"),
        ("DELETE", "/a/x", "request_unmapped"),
        ("HEAD", "/a/x", ""),
        ("OPTIONS", "/a/x", "request_unmapped"),
        ("PROPFIND", "/a/x", "request_unmapped"),
    ],
)
async def test_out_of_scope_is_told_why_and_reaches_nothing(
    stage: Stage, agent: Agent, method: str, path: str, code: str
) -> None:
    answer = await agent.send(method, path)
    assert answer.status == 403
    assert stage.target.received == []
    if code:
        assert answer.get("Content-Type") == "application/problem+json"
        problem = answer.json()
        assert (problem["code"], problem["status"]) == (code, 403)
        event = await action(stage.world, lease_id=agent.handle, allowed=False)
        assert problem["instance"] == f"urn:uuid:{event.action_id}"
        if code == "beyond_lease":
            assert problem["permission"]["resources"] == [f"path{path}"]
            assert problem["ask"].startswith("ringfence request --task ")


async def test_proxy_that_hides_headers_cannot_ask_for_approval(stage: Stage, running: Running) -> None:
    agent = await stage.agent(running.port, "read", "merge")
    stage.target.received.clear()
    answer = await agent.send("PATCH", "/a/x", [("Content-Type", "text/plain")], b"merge it")
    assert (answer.status, answer.json()["code"]) == (403, "headers_unseen")
    assert stage.target.received == []


async def test_traefik_asks_where_it_is_configured_to_show_all(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/gateway-external.md says; the rest of the configuration is the one that is tested above."""
    shipped = (programs.CONFIGURATIONS / "traefik" / "dynamic.yaml").read_text()
    added = "".join(
        f'          {name}: ""\n' for name in ("Traceparent", "Tracestate", "Baggage", "Date", "X-Request-Id")
    )
    shown = "        authRequestHeaders: [Authorization, DPoP, X-Ringfence-Label, Content-Type, Content-Encoding]\n"
    for old, new in (
        ("middlewares: [arriving, decision,", "middlewares: [arriving, whole, decision,"),
        (
            "    decision:\n",
            "    whole:\n      buffering:\n        maxRequestBodyBytes: 1048576\n\n    decision:\n",
        ),
        ('          Te: ""\n', f'          Te: ""\n{added}'),
        (shown, ""),
        (
            '          X-Ringfence-Label: ""\n',
            '          X-Ringfence-Label: ""\n          X-Ringfence-Handle: ""\n',
        ),
        ("hub?body=whole\n", "hub?body=whole&headers=whole\n"),
    ):
        assert shipped.count(old) == 1, old
        shipped = shipped.replace(old, new)
    (tmp_path / "traefik").mkdir()
    (tmp_path / "traefik" / "dynamic.yaml").write_text(shipped)
    static = (programs.CONFIGURATIONS / "traefik" / "traefik.yaml").read_text()
    (tmp_path / "traefik" / "traefik.yaml").write_text(static)
    monkeypatch.setattr(programs, "CONFIGURATIONS", tmp_path)
    with started("traefik", stage.places, stage.folder / "traefik-that-asks") as port:
        agent = await stage.agent(port, "read", "merge")
        stage.target.received.clear()

        async def send(media: str, trace: str) -> Answer:
            lines = (
                ("Content-Type", media),
                ("X-Dup", "b"),
                ("X-Dup", "a"),
                ("X-Secret", "s3cret"),
                ("traceparent", trace),
                ("Trailer", "Destination"),
                ("Transfer-Encoding", "chunked"),
                ("Connection", "close"),
            )
            body = b"8\r\nmerge it\r\n0\r\nDestination: /b\r\n\r\n"
            head = request("PATCH", "/a/x", [*agent.shown("PATCH", "/a/x"), *lines], None)
            return await agent.send_raw(head + body)

        agent.nonce = (await agent.send("GET", "/a/x")).get("DPoP-Nonce") or agent.nonce
        stage.target.received.clear()
        async with Sponsor.connect(stage.desk.sam.key, client(stage.world)) as sam:
            asking = asyncio.create_task(send("text/plain", "00-1"))
            pending = await next_action(sam)
            told = [
                (one.name, one.value) for one in pending.headers if not one.name.startswith(("x-real", "acc"))
            ]
            assert ("content-type", "text/plain") in told
            assert [name for name, _ in told if name in ("x-dup", "x-secret")] == [
                "x-dup",
                "x-dup",
                "x-secret",
            ]
            assert not {"traceparent", "trailer", "authorization", "dpop"} & {name for name, _ in told}
            asking.cancel()
            left = await action(stage.world, lease_id=agent.handle, verb="merge", allowed=False)
            assert left.reasons[0].code == "client_gone"
            other = asyncio.create_task(send("text/html", "00-1"))
            second = await next_action(sam, pending.digest)
            assert second.headers_digest != pending.headers_digest
            await sam.deny_action(second)
            assert (await other).json()["code"] == "approval_denied"
            assert stage.target.received == []
            await sam.approve_action(pending)
            again = await send("text/plain", "00-2")
            assert again.status == 200, "the very same but for what traces it"
        [received] = stage.target.received
        assert received.body == b"merge it"
        assert received.all("X-Dup") == ["b", "a"]
        for name in ("Trailer", "traceparent", "X-Ringfence-Handle"):
            assert received.all(name) == []


SMUGGLED = b"POST /private HTTP/1.1\r\nHost: hub.example\r\nContent-Length: 0\r\n\r\n"


async def test_body_that_a_target_may_execute_is_refused(stage: Stage, name: str) -> None:
    """The target is Python's `http.server`, which leaves every body unread."""
    with serving_unread_bodies(stage.target_certificate) as target:
        places = replace(stage.places, target=target.port)
        with started(name, places, stage.folder / f"{name}-unread") as port:
            agent = await stage.agent(port, "read")
            for method in ("GET", "HEAD", "OPTIONS", "DELETE"):
                for headers in ((), (("Content-Length", "0"),)):
                    assert (await agent.send(method, "/a/bodies", headers)).status == 200, method
            before = list(target.requests)
            assert len(before) == 8
            for method in ("GET", "HEAD", "OPTIONS", "TRACE", "DELETE", "PROPFIND"):
                sized = await agent.send(method, "/a/bodies", body=SMUGGLED)
                chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
                chunked = await agent.send(method, "/a/bodies", [("Transfer-Encoding", "chunked")], chunks)
                expected = 405 if (name, method) == ("nginx", "TRACE") else PROGRAMS[name].risky_body
                assert (sized.status, chunked.status) == (expected, expected), method
            assert target.requests == before


async def test_http_2_without_negotiation_is_refused(stage: Stage, running: Running, agent: Agent) -> None:
    """It has bodies that no header announces."""
    settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    async with agent.connection() as (reader, writer):
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        async with asyncio.timeout(WITHIN_S):
            came = await reader.read(4)
    assert came in (b"HTTP", b"")


async def test_request_without_credentials_is_401(stage: Stage, agent: Agent) -> None:
    answer = await agent.send_raw(request("GET", "/a/x", [], None))
    assert (answer.status, answer.json()["code"]) == (401, "no_credentials")
    assert answer.get("WWW-Authenticate").startswith("DPoP ")
    own = [("Authorization", "Bearer of-the-agent"), ("X-Api-Key", "of-the-agent")]
    assert (await agent.send_raw(request("GET", "/a/x", own, None))).status == 401
    shown = agent.shown("GET", "/a/x")
    bare = await agent.send_raw(request("GET", "/a/x", shown[:1], None))
    assert (bare.status, bare.json()["code"]) == (401, "proof_missing")
    assert stage.target.received == []


async def test_a_proof_counts_once_and_for_its_own_request(stage: Stage, agent: Agent) -> None:
    assert (await agent.send("GET", "/a/x")).status == 200
    shown = agent.shown("GET", "/a/y")
    assert (await agent.send_raw(request("GET", "/a/y", shown, None))).status == 200
    stage.target.received.clear()
    for headers, path in ((shown, "/a/y"), (agent.shown("GET", "/a/y"), "/a/x")):
        again = await agent.send_raw(request("GET", path, headers, None))
        assert (again.status, again.json()["code"]) == (401, "invalid_dpop_proof")
    assert stage.target.received == []


@pytest.mark.parametrize("host", ["elsewhere.example", "hub.example", "127.0.0.1", f"x@{HOST}", ""])
async def test_another_name_is_no_target(stage: Stage, running: Running, agent: Agent, host: str) -> None:
    answer = await agent.send("GET", "/a/x", host=host)
    assert answer.status in (running.program.other_host, 400)
    assert host != "elsewhere.example" or answer.status == running.program.other_host
    assert stage.target.received == []


async def test_without_a_decision_nothing_reaches_the_target(stage: Stage, name: str) -> None:
    places = replace(stage.places, decision=free_port())
    with started(name, places, stage.folder / f"{name}-alone") as port:
        agent = await stage.agent(port, "read")
        stage.target.received.clear()
        answer = await agent.send("GET", "/a/x")
    assert answer.status == PROGRAMS[name].undecided
    assert stage.target.received == []


# Traefik gives up by itself after 30 s, which no configuration changes.
@pytest.mark.parametrize("name", ["nginx", "haproxy", "envoy", "caddy"])
async def test_a_decision_that_never_comes_is_none(stage: Stage, name: str) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, LOOPBACK, 0)
    places = replace(stage.places, decision=server.sockets[0].getsockname()[1], patience="1s")
    with started(name, places, stage.folder / f"{name}-silent") as port:
        agent = await stage.agent(port, "read")
        stage.target.received.clear()
        answer = await agent.send("GET", "/a/x")
    server.close()
    assert answer.status in (PROGRAMS[name].undecided, 504)
    assert stage.target.received == []


# --- the request that was decided on is the one that arrives ---

ODD = (
    "/a/../b/x", "/a/%2e%2e/b/x", "/a/%2E%2e/b/x", "/a/.%2e/b/x", "/a/./x", "/a/%2e/x", "/..", "/a/..", "/a/..;/b/x",
    "//a/x", "/a//x", "/a/x/", "/", "//hub.example/a/x", "/b//../a/x",
    "/a/x;y", "/a;z/x", "/a/%3bx", "/a%2fx", "/a%2Fx", "/a/%2f..%2fb", "/a/%5cx", "/a\\x", "/a/..\\b",
    "/a/%252e%252e/b/x", "/a/%25", "/a/%zz", "/a/%", "/a/%00", "/a/%0a", "/a/%0d%0aX:y", "/a/%c0%ae%c0%ae/b", "/a/\xe9",
    "/a/%C3%A9", "/a/x%20y", "/a/%61", "/%61/x", "/A/x", "/a/x+y", "/a/'x'", "/a/x\"y", "/a/<x>", "/a/{x}", "/a/x|y",
    "/a/x?", "/a/x?q", "/a/x??q", "/a/x?q=1;r=2", "/a/x?q=%2e%2e/b", "/a/x?q=a b", "/a/x?a=1&a=2", "/a/x?%zz",
    "/a/x?q=\xe9", "/a/x?&&", "/a/x?q=%", "/a/x?q=//b", "/a/x?b=2&a=1", "/a/x#y", "/a/x?q#y", "/a/x%23y", "/a/x%3fy",
    "/authz/fwd/hub", "/.ringfence-decision", "/_decision", "*", "a/x", "",
    f"https://{HOST}/a/x", f"https://{HOST}/b/x", f"http://{HOST}/a/x", "https://elsewhere.example/a/x",
    f"https://{HOST}", f"https://{HOST}?/a/x", f"HTTPS://{HOST}/a/x", f"https://{HOST}/a/../b/x", f"https://x@{HOST}/a/x",
    "file:///a/x",
)  # fmt: skip


def proofs_for(target: str) -> list[str]:
    """The paths that a sender might hope its request is taken for."""
    path = target.removeprefix("https://").removeprefix(HOST) if "://" in target else target
    path = path.partition("?")[0].partition("#")[0] or "/"
    hopes = [path, posixpath.normpath(unquote(path)), unquote(path), "/a/x", "/b/x"]
    return [
        hope
        for hope in dict.fromkeys(hopes)
        if hope.startswith("/") and not {".", ".."} & set(unquote(hope).split("/"))
        if not re.search(r"[\x00-\x20\x7f]", hope)  # no proof is made, or taken, for that
    ]


async def attempts(
    agent: Agent, method: str, target: str, headers: Sequence[tuple[str, str]] = ()
) -> list[Answer]:
    """The same request with each proof that might be believed for it."""
    return [await agent.send(method, target, headers, proof_for=hope) for hope in proofs_for(target)]


@pytest.mark.parametrize("target", ODD)
async def test_an_odd_target_arrives_as_it_was_decided_on_or_not_at_all(
    stage: Stage, running: Running, agent: Agent, target: str
) -> None:
    answers = await attempts(agent, "GET", target)
    assert all(answer.status != 200 for answer in answers) or stage.target.received
    for received in stage.target.received:
        path = received.target.partition("?")[0]
        assert unquote(path).startswith("/a/"), "outside what the lease allows"
        await assert_decided(stage, running, received)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("name_of_header", "value"),
    [
        ("X-Forwarded-Uri", "/a/x"),
        ("X-Forwarded-Uri", ""),
        ("x-forwarded-uri", "/a/x"),
        ("X_Forwarded_Uri", "/a/x"),
        ("X-Forwarded-Method", "GET"),
        ("X-Forwarded-Host", HOST),
        ("X-Forwarded-Proto", "http"),
        ("X-Original-Url", "/a/x"),
        ("X-Envoy-Original-Path", "/a/x"),
    ],
)
async def test_forged_proxy_headers_of_an_agent_are_ignored(
    stage: Stage, agent: Agent, name_of_header: str, value: str, times: int
) -> None:
    spoofed = [(name_of_header, value)] * times
    for method, path in (("GET", "/b/x"), ("PUT", "/a/x"), ("PUT", "/b/x"), ("POST", "/a/x")):
        for answer in await attempts(agent, method, path, spoofed):
            assert answer.status in (400, 401, 403), (method, path)
    assert stage.target.received == []


@pytest.mark.parametrize(
    "header", ["Authorization", "X-Api-Key", "X-Forwarded-Uri", "X-Forwarded-Method", "DPoP", "Host"]
)
async def test_a_header_that_connection_names_changes_nothing_that_was_decided(
    stage: Stage, running: Running, agent: Agent, header: str
) -> None:
    named = [("Connection", f"close, {header}"), ("X-Api-Key", "of-the-agent"), ("X-Forwarded-Uri", "/a/x")]
    for path in ("/b/x", "/a/x"):
        await attempts(agent, "GET", path, named)
    for received in stage.target.received:
        assert received.target == "/a/x"
        assert received.all("X-Api-Key") == []
        assert [value for value in received.all("Authorization") if not value.startswith("Bearer ey")] == []
        await assert_decided(stage, running, received)


async def test_a_header_that_comes_twice_gives_the_target_nothing_of_the_agents(
    stage: Stage, agent: Agent
) -> None:
    own = ("Authorization", "Bearer of-the-agent")
    for before, after in ((own, None), (None, own)):
        shown = agent.shown("GET", "/a/x")
        headers = [*([before] if before else []), *shown, *([after] if after else [])]
        await agent.send_raw(request("GET", "/a/x", headers, None))
    await agent.send("GET", "/a/x", [("DPoP", "a.b.c"), ("Authorization", "DPoP of-the-agent")])
    await agent.send("GET", "/a/x", [("Host", "elsewhere.example")])
    for received in stage.target.received:
        assert "of-the-agent" not in str(received.headers)
        assert received.all("Host") == ["hub.example"]


@pytest.mark.parametrize(
    "header",
    ["X_Api_Key", "X-Api_Key", "AUTHORIZATION", "X_Forwarded_For", "X_HTTP_Method_Override", "Some_Header"],
)
async def test_a_header_that_is_spelled_otherwise_is_the_same_header(
    stage: Stage, running: Running, agent: Agent, header: str
) -> None:
    answer = await agent.send("GET", "/a/x", [(header, "of-the-agent")])
    assert "_" not in header or answer.status == running.program.underscored
    for received in stage.target.received:
        assert "of-the-agent" not in str(received.headers)


@pytest.mark.parametrize("header", sorted(name.decode() for name in PROXY_FIELDS))
async def test_proxy_header_of_an_agent_is_not_forwarded(stage: Stage, agent: Agent, header: str) -> None:
    assert (await agent.send("GET", "/a/x", [(header, "of-the-agent")])).status == 200
    [received] = stage.target.received
    assert "of-the-agent" not in str(received.headers)


async def test_an_upgrade_becomes_no_tunnel(stage: Stage, agent: Agent) -> None:
    asked = [
        ("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="),
    ]  # fmt: skip
    answer = await agent.send("GET", "/a/x", asked)
    assert answer.status != 101
    assert [received.all("Upgrade") for received in stage.target.received] in ([], [[]])


async def test_events_come_as_they_are_sent(stage: Stage, agent: Agent) -> None:
    stage.target.go_on.clear()
    await agent.send("GET", "/a/x")  # for the nonce
    async with agent.connection() as (reader, writer):
        writer.write(request("GET", EVENTS, agent.shown("GET", EVENTS), None))
        await reader.readuntil(FIRST)
        stage.target.go_on.set()
        await reader.readuntil(SECOND)


async def test_response_of_the_target_is_passed_on_unchanged(stage: Stage, agent: Agent) -> None:
    answer = await agent.send("GET", FORBIDDEN)
    assert (answer.status, answer.body) == (403, b"no")
    assert [received.target for received in stage.target.received] == [FORBIDDEN]


# --- more than one request in the same bytes ---


async def test_each_request_of_a_connection_is_decided_on(
    stage: Stage, running: Running, agent: Agent
) -> None:
    await agent.send("GET", "/a/x")  # for the nonce
    stage.target.received.clear()
    kept = [*agent.shown("GET", "/a/x"), ("Connection", "keep-alive")]
    forbidden = [*agent.shown("GET", "/b/x"), ("Connection", "keep-alive")]
    raw = request("GET", "/a/x", kept, None) + request("GET", "/b/x", forbidden, None)
    async with asyncio.timeout(WITHIN_S), agent.connection() as (reader, writer):
        writer.write(raw + request("GET", "/a/x", [], None))
        await reader.read()
    assert [received.target for received in stage.target.received] == ["/a/x"]
    await assert_decided(stage, running, stage.target.received[0])


LENGTHS = (
    [("Content-Length", "4"), ("Transfer-Encoding", "chunked")],
    [("Transfer-Encoding", "chunked"), ("Content-Length", "4")],
    [("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "identity")],
    [("Transfer-Encoding", "identity, chunked")],
    [("Transfer-Encoding", "xchunked")],
    [("Transfer-Encoding", "chunked "), ("Content-Length", "0")],
    [("Transfer-Encoding ", "chunked"), ("Content-Length", "4")],
    [("Content-Length", "0"), ("Content-Length", "4")],
    [("Content-Length", "+4")],
    [("X", "y\r\n Transfer-Encoding: chunked"), ("Content-Length", "4")],
    [("X", "y\nTransfer-Encoding: chunked"), ("Content-Length", "4")],
    [("X", "y\rTransfer-Encoding: chunked"), ("Content-Length", "4")],
)
"""Where a body ends by these, two readers may say differently."""


@pytest.mark.parametrize("lengths", LENGTHS, ids=[str(number) for number in range(len(LENGTHS))])
async def test_no_second_request_is_hidden_in_a_body(
    stage: Stage, running: Running, writer: Agent, lengths: list[tuple[str, str]]
) -> None:
    await writer.send("PUT", "/a/x", (), b"x")  # for the nonce
    stage.target.received.clear()
    hidden = request("GET", "/b/x", [("X-Api-Key", "x")], None)
    for body in (b"0\r\n\r\n" + hidden, b"4\r\nxxxx\r\n0\r\n\r\n" + hidden, hidden):
        head = request(
            "PUT", "/a/x", [*writer.shown("PUT", "/a/x"), *lengths, ("Connection", "keep-alive")], None
        )
        await writer.send_raw(head + body)
        await writer.send("PUT", "/a/y", (), b"x")  # what was left over would come before it
    for received in stage.target.received:
        assert (received.method, received.target[:3]) == ("PUT", "/a/")
        await assert_decided(stage, running, received)


# --- bodies ---

NOTE, OTHER = b'{"kind": "note", "text": "x"}', b'{"kind": "order"}'


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_is_part_of_the_decision_where_the_program_shows_it(
    stage: Stage, running: Running, agent: Agent, chunked: bool
) -> None:
    def sent(body: bytes) -> tuple[list[tuple[str, str]], bytes]:
        if not chunked:
            return [("Content-Type", "application/json")], body
        pieces = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
        return [("Transfer-Encoding", "chunked"), ("Content-Type", "application/json")], pieces + b"0\r\n\r\n"

    answer = await agent.send("POST", "/a/x", *sent(NOTE))
    if not running.program.shows_body:
        assert (answer.status, answer.json()["code"]) == (403, "body_unseen")
        assert stage.target.received == []
        return
    assert answer.status == 200
    [received] = stage.target.received
    assert received.body == NOTE
    await assert_decided(stage, running, received)
    answer = await agent.send("POST", "/a/x", *sent(OTHER))
    assert (answer.status, answer.json()["code"]) == (403, "beyond_lease")
    for body in (b"", b"[]", b'{"kind": "note", "kind": "order"}', b'{"kind": "note"'):
        answer = await agent.send("POST", "/a/x", *sent(body))
        assert answer.status in (403, 500)  # Traefik asks nobody about an empty body in chunks
    assert stage.target.received == [received]


@pytest.mark.parametrize("size", [0, 1, 70_000, 900_000])
async def test_a_body_arrives_whole(stage: Stage, running: Running, writer: Agent, size: int) -> None:
    body = b"x" * size
    assert (await writer.send("PUT", "/a/x", (), body)).status == 200
    [received] = stage.target.received
    assert received.body == body
    await assert_decided(stage, running, received)


async def test_a_body_that_is_too_large_to_be_shown_reaches_nothing_where_it_counts(
    stage: Stage, running: Running, agent: Agent, writer: Agent
) -> None:
    large = b'{"kind": "note", "text": "' + b"x" * MAX_BODY_BYTES + b'"}'
    refused = await agent.send("POST", "/a/x", (), large)
    assert refused.status in (
        0,
        403,
        running.program.too_large,
    )  # 0: it closed the connection before it had all
    assert stage.target.received == []
    answer = await writer.send("PUT", "/a/x", (), large)
    assert answer.status in (0, running.program.too_large)
    if running.program.too_large == 200:
        assert [received.body for received in stage.target.received] == [large]
    else:
        assert stage.target.received == []


async def test_a_body_that_is_cut_off_reaches_nothing(stage: Stage, agent: Agent) -> None:
    await agent.send("GET", "/a/x")  # for the nonce
    stage.target.received.clear()
    whole = request("POST", "/a/x", [*agent.shown("POST", "/a/x"), ("Content-Length", "4096")], None) + NOTE
    async with agent.connection() as (_, writer):
        writer.write(whole)
        await writer.drain()
        writer.transport.abort()
    assert (await agent.send("GET", "/a/x")).status == 200
    assert [received.method for received in stage.target.received] == ["GET"]
