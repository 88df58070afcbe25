"""An agent with the official SDK of MCP, a server by the same, and all of Ringfence between them."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import McpError

from ringfence.client.agent.httpx_auth import DpopAuth
from ringfence.dev.processes import free_port
from ringfence.messages.operations import ActionAnswered, ActionDecided
from ringfence.messages.registry import BackendSettings, McpRule, RequestRule, VerbFloor
from ringfence.messages.topics import ACTION
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.flows.test_gateway_attacks import ASSIGNED, ISSUED, blocked, did
from tests.gateway.mcp_server import McpServer, mcp_serving
from tests.support.audit_stories import is_told
from tests.support.benches.gateway_flows import gateway
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.world import WITHIN_S, World, scope


def rule(method: str, verb: str, resource: str, name: str | None = None) -> RequestRule:
    mcp = McpRule(method=method, name=name)
    return RequestRule(method="MCP", path="/mcp", mcp=mcp, verb=verb, resource=resource)


RULES = (
    RequestRule(method="GET", path="/mcp", verb="connect", resource="server"),
    RequestRule(method="DELETE", path="/mcp", verb="connect", resource="server"),
    *(rule(method, "connect", "server") for method in ("initialize", "notifications/*", "tools/list")),
    rule("tools/call", "read", "repo/{arguments.repo}", "get_{what}"),
    rule("tools/call", "push", "repo/{arguments.repo}", "push"),
)
WIDE = scope("repos", ("connect", "read", "push"), ("server", "repo/**"))


@dataclass
class Office:
    """A gateway that listens, and a server of MCP behind it."""

    desk: IssuerBench
    server: McpServer
    port: int
    sockets: Path
    user: str


@pytest.fixture
async def office(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Office]:
    port, sockets = free_port(), tmp_path_factory.mktemp("gw") / "tasks"
    own = {"listen": str(port), "sockets": sockets}
    async with (
        mcp_serving() as server,
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as first,
        world.running("issuer", "revoker"),
        gateway(world, **own),
    ):
        desk = await another(first)
        backend = BackendSettings.model_validate({"kind": "jwt", "url": f"http://127.0.0.1:{server.port}"})
        verbs = tuple(VerbFloor(verb=verb) for verb in ("connect", "read", "push"))
        await world.target("repos", backend=backend, requests=RULES, verbs=verbs)
        user = await world.user(f"u-{uuid.uuid4().hex[:8]}", entitlements=WIDE)
        desk.bot = await world.agent(f"b-{uuid.uuid4().hex[:8]}", sponsor=desk.sam, ceiling=WIDE)
        desk.task = await world.task(desk.bot, by=user, scope=WIDE)
        yield Office(desk, server, port, sockets, user.name)


async def leased(desk: IssuerBench) -> str:
    """The handle of a lease that reads one repository. The gateway knows the target and the task."""
    narrow = scope("repos", ("connect", "read"), ("server", "repo/a"))
    asked = await desk.ask(scope=narrow, delivery="gateway")
    await desk.decide(asked)
    content = await desk.answer(asked)
    assert content.lease is not None, desk.refusal(content)
    assert await desk.world.runtimes["gateway"].tables_caught_up(WITHIN_S)
    return asked.lease_id


async def until_known(http: httpx.AsyncClient, url: str) -> None:
    """The lease is on its way to the gateway when the agent has its handle: at most a moment. On a machine that is held
    up a gateway may know too little for a moment, and says so.
    """
    asks = {"jsonrpc": "2.0", "id": 0, "method": "tools/list"}
    accepts = {"Accept": "application/json, text/event-stream"}
    async with asyncio.timeout(WITHIN_S):
        while (answer := await http.post(url, json=asks, headers=accepts)).status_code in (401, 503) or (
            "no_lease" in answer.text
        ):
            await asyncio.sleep(0.02)


async def worked(server: McpServer, http: httpx.AsyncClient, url: str) -> None:
    """What a task does that may read one repository."""
    await until_known(http, url)
    async with (
        streamable_http_client(url, http_client=http) as (read, write, _),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        listed = {tool.name for tool in (await session.list_tools()).tools}
        assert listed == {"get_issue", "get_wrong", "get_changed", "get_thought"}
        assert not (await session.call_tool("get_issue", {"repo": "a"})).isError
        with pytest.raises(McpError) as refused:
            await session.call_tool("push", {"repo": "a"})
        assert refused.value.error.data is not None
        assert refused.value.error.data["code"] == "beyond_lease"
    assert server.calls == ["get_issue a"]


async def test_a_task_uses_its_tools_through_its_socket(office: Office) -> None:
    desk = office.desk
    lease_id = await leased(desk)
    socket = office.sockets / f"{desk.task}.sock"
    async with asyncio.timeout(WITHIN_S):
        while not socket.exists():
            await asyncio.sleep(0.02)
    transport = httpx.AsyncHTTPTransport(uds=str(socket))
    async with httpx.AsyncClient(transport=transport, timeout=WITHIN_S) as http:
        await worked(office.server, http, "http://gateway/repos/mcp")
    assert all(token.startswith("Bearer ey") for token in office.server.tokens)

    read = await desk.world.consume_until(ACTION, lambda record: b'"verb":"read"' in record.value)
    await desk.world.consume_until(ACTION, lambda record: b'"verb":"push"' in record.value)
    said = await until_said(desk.world, ActionDecided.model_validate_json(read.value).action_id)
    decided = [ActionDecided.model_validate_json(one) for one in said if b'"allowed"' in one]
    pushed = [one for one in decided if one.verb == "push"]
    assert [(one.allowed, one.resource, one.reasons[0].code) for one in pushed] == [
        (False, "repo/a", "beyond_lease")
    ]
    called = {one.action_id for one in decided if one.resource == "repo/a" and one.allowed}
    answered = [ActionAnswered.model_validate_json(one) for one in said if b'"allowed"' not in one]
    (result,) = [one for one in answered if one.action_id in called]
    assert (result.answer, result.http_status, result.lease_id) == ("result", 200, lease_id)


async def test_with_a_handle_and_until_its_lease_is_revoked(office: Office) -> None:
    desk = office.desk
    lease_id = await leased(desk)
    url = f"http://127.0.0.1:{office.port}/repos/mcp"
    auth = DpopAuth(lease_id, desk.bot.key)
    async with httpx.AsyncClient(auth=auth, trust_env=False, timeout=WITHIN_S) as http:
        await worked(office.server, http, url)
        opening = {
            "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
                "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"},
            },
        }  # fmt: skip
        accepts = {"Accept": "application/json, text/event-stream"}
        answer = await http.post(url, json=opening, headers=accepts)
        headers = {**accepts, "Mcp-Session-Id": answer.headers["mcp-session-id"]}
        async with http.stream("GET", url, headers=headers) as stream:
            assert stream.status_code == 200
            await desk.revoke(desk.bot, "release", lease_id=lease_id)
            with pytest.raises(httpx.RemoteProtocolError):
                await stream.aread()


async def test_an_agent_that_tries_to_call_more_than_its_task_has_leaves_this_story(office: Office) -> None:
    """Talked into it by an issue that it read, say: a tool that is not its own, then ways around the answer."""
    desk = office.desk
    lease_id = await leased(desk)
    socket = office.sockets / f"{desk.task}.sock"
    about = f"/v1/leases/{lease_id}"
    async with asyncio.timeout(WITHIN_S):
        while not socket.exists() or not (
            (known := await desk.world.get("gateway", about, desk.world.operator)).status_code == 200
            and known.json()["usable"]
        ):
            await asyncio.sleep(0.02)
    transport, url = httpx.AsyncHTTPTransport(uds=str(socket)), "http://gateway/repos/mcp"
    async with httpx.AsyncClient(transport=transport, timeout=WITHIN_S) as http:
        accepts = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
        asks = json.dumps(call("get_issue", "a"))

        async def code(text: str, **headers: str) -> str:
            answer = await http.post(url, content=text, headers={**accepts, **own, **headers})
            said = answer.json()
            return str(said["error"]["data"]["code"] if "jsonrpc" in said else said["code"])

        opening = {**call("", ""), "method": "initialize", "params": OPENING}
        answer = await http.post(url, json=opening, headers=accepts)
        own = {"Mcp-Session-Id": answer.headers["mcp-session-id"]}
        tried = {
            "another tool": await code(json.dumps(call("push", "a"))),
            "another repository": await code(json.dumps(call("get_issue", "b"))),
            "a tool that nobody knows": await code(json.dumps(call("format_disk", "a"))),
            "several at once": await code(f"[{asks}]"),
            "two repositories": await code(asks.replace('"repo": "a"', '"repo": "a", "repo": "b"')),
            "another name beside it": await code(asks, **{"Mcp-Name": "push"}),
            "a session that is nobody's": await code(asks, **{"Mcp-Session-Id": "made-up"}),
        }
    assert tried == {
        "another tool": "beyond_lease",
        "another repository": "beyond_lease",
        "a tool that nobody knows": "request_unmapped",
        "several at once": "mcp_batch",
        "two repositories": "mcp_unreadable",
        "another name beside it": "mcp_header",
        "a session that is nobody's": "mcp_session_unknown",
    }
    assert office.server.calls == []
    story = ASSIGNED + ISSUED + did("Create") + "~6003 Call: Success action.answered by bot\n"
    for why in ("beyond_lease lease", "beyond_lease lease", *list(tried.values())[2:]):
        story += "~" + blocked("Create", why)
    await is_told(desk.world, story, {"task": str(desk.task)}, bot=desk.bot.name, maria=office.user)


def call(tool: str, repo: str) -> dict[str, Any]:
    """A message that calls a tool."""
    return {
        "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": {"repo": repo}},
    }  # fmt: skip


OPENING = {
    "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"},
}  # fmt: skip


async def until_said(world: World, action_id: str) -> list[Any]:
    """All that is on `action` once it says what came of this one."""
    await world.consume_until(
        ACTION, lambda record: b'"answer"' in record.value and action_id.encode() in record.value
    )
    return [record.value for record in await world.records(ACTION)]
