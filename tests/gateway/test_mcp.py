"""MCP through the gateway, with the official SDK at both ends: what a task may call, and nothing else."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import mcp.types as types
import pytest
import pytest_asyncio
from mcp.shared.exceptions import McpError

from tests.gateway.certificates import Certificates
from tests.gateway.mcp_place import DEPLOYS, READS, RULES, TOKEN, URL, mcp_placed, rule
from tests.gateway.mcp_server import McpServer, mcp_serving
from tests.gateway.target import Target

HEADERS = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}


@pytest_asyncio.fixture(loop_scope="package", params=["events", "json", "stateless"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[McpServer]:
    how = {"json_response": request.param != "events", "stateless": request.param == "stateless"}
    async with mcp_serving(**how) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="package")
async def streaming() -> AsyncIterator[McpServer]:
    async with mcp_serving() as server:
        yield server


def message(method: str, id: int | None = 1, **params: Any) -> dict[str, Any]:
    said = {"jsonrpc": "2.0", "method": method, "params": params}
    return said if id is None else {**said, "id": id}


INITIALIZE = message(
    "initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo={"name": "raw", "version": "1"}
)


async def opened(http: httpx.AsyncClient, version: str = "2025-06-18") -> dict[str, str]:
    """The headers of a session that was initialized by hand."""
    opening = {**INITIALIZE, "params": {**INITIALIZE["params"], "protocolVersion": version}}
    answer = await http.post(URL, json=opening, headers=HEADERS)
    assert answer.status_code == 200
    headers = {**HEADERS, "Mcp-Session-Id": answer.headers["mcp-session-id"]}
    told = message("notifications/initialized", None)
    assert (await http.post(URL, json=told, headers=headers)).status_code == 202
    return headers


async def test_a_task_calls_what_its_lease_allows_and_sees_no_more(server: McpServer, tmp_path: Path) -> None:
    async with mcp_placed(server.port, tmp_path, READS) as place, place.session() as session:
        listed = await session.list_tools()
        assert {tool.name for tool in listed.tools} == {
            "get_issue",
            "get_wrong",
            "get_changed",
            "get_thought",
        }
        assert {prompt.name for prompt in (await session.list_prompts()).prompts} == {"review"}
        result = await session.call_tool("get_issue", {"repo": "a"})
        assert (result.isError, result.content[0].text) == (False, "an issue of a")  # type: ignore[union-attr]
    assert server.calls == ["get_issue a"]
    assert set(server.tokens) == {TOKEN}
    called = [event for event in place.events if event.resource == "env/a"]
    assert [(event.verb, event.allowed) for event in called] == [("read", True)]


@pytest.mark.parametrize(
    ("tool", "arguments", "code", "lacking"),
    [
        ("push", {"repo": "a"}, "beyond_lease", ("deploy", "env/a")),
        ("get_issue", {"repo": "b"}, "beyond_lease", ("read", "env/b")),
        ("get_issue", {"repo": "../a"}, "request_unmapped", None),
        ("delete_repo", {"repo": "a"}, "request_unmapped", None),
    ],
)
async def test_denied_tool_call_is_an_error_with_the_problem_detail(
    server: McpServer,
    tmp_path: Path,
    tool: str,
    arguments: dict[str, Any],
    code: str,
    lacking: tuple[str, str] | None,
) -> None:
    async with mcp_placed(server.port, tmp_path, READS) as place, place.session() as session:
        with pytest.raises(McpError) as refused:
            await session.call_tool(tool, arguments)
        error = refused.value.error
        assert error.data is not None
        assert (error.code, error.data["code"], error.data["status"]) == (403, code, 403)
        assert error.message == f"{code}: {error.data['detail']}"
        if lacking is not None:
            verb, resource = lacking
            wanted = {"target": "staging", "verbs": [verb], "resources": [resource]}
            assert error.data["permission"] == wanted
            assert f"staging:{verb}:{resource}" in error.data["ask"]
        assert error.data["instance"] == f"urn:uuid:{place.events[-1].action_id}"
        result = await session.call_tool("get_issue", {"repo": "a"})
        assert not result.isError, "the session goes on"
    assert server.calls == ["get_issue a"]
    assert place.codes == [code]


async def test_through_a_connect_it_is_the_same(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    async with (
        mcp_serving(certificate=certificates.server_file("localhost")) as server,
        mcp_placed(server.port, tmp_path, READS, tls=certificates.trusting()) as place,
    ):
        assert place.plane is not None
        port = await place.plane.listen("127.0.0.1", 0, names=["gateway"])
        trusting = ssl.create_default_context(cadata=place.plane.authority.certificate_pem)
        http = httpx.AsyncClient(proxy=f"http://127.0.0.1:{port}", verify=trusting, timeout=20)
        async with place.session(http, f"https://localhost:{server.port}/mcp") as session:
            assert "push" not in {tool.name for tool in (await session.list_tools()).tools}
            result = await session.call_tool("get_issue", {"repo": "a"})
            assert (result.isError, result.content[0].text) == (False, "an issue of a")  # type: ignore[union-attr]
            with pytest.raises(McpError) as refused:
                await session.call_tool("push", {"repo": "a"})
            assert refused.value.error.data is not None
            assert refused.value.error.data["code"] == "beyond_lease"
    assert server.calls == ["get_issue a"]
    assert set(server.tokens) == {TOKEN}
    assert place.codes == ["beyond_lease"]


async def test_in_observe_mode_what_would_be_blocked_goes_on_with_the_agents_own(
    server: McpServer, tmp_path: Path
) -> None:
    inherited = "Bearer of-all-of-them"
    async with mcp_placed(server.port, tmp_path, READS, observe=("staging",)) as place:
        http = place.http()
        http.headers["Authorization"] = inherited
        async with place.session(http) as session:
            result = await session.call_tool("get_issue", {"repo": "a"})
            assert not result.isError
            result = await session.call_tool("push", {"repo": "a"})
            assert not result.isError, "nobody noticed"
    assert server.calls == ["get_issue a", "push a False"]
    (observed,) = [event for event in place.events if event.observed]
    assert (observed.allowed, observed.verb, observed.resource) == (False, "deploy", "env/a")
    assert (observed.access, observed.reasons[0].code) == ("write", "beyond_lease")
    assert server.tokens.count(inherited) == 1, "that one alone: all else went by the lease"
    assert {event.access for event in place.events if event.resource == "env/a" and event.allowed} == {"read"}


async def test_a_wider_lease_sees_and_calls_more(server: McpServer, tmp_path: Path) -> None:
    async with mcp_placed(server.port, tmp_path, DEPLOYS) as place, place.session() as session:
        assert "push" in {tool.name for tool in (await session.list_tools()).tools}
        await session.call_tool("push", {"repo": "a", "dry_run": True})
    assert server.calls == ["push a True"]


async def test_a_tools_own_error_and_one_of_the_protocol_are_told_as_they_are(
    server: McpServer, tmp_path: Path
) -> None:
    async with mcp_placed(server.port, tmp_path, READS) as place, place.session() as session:
        result = await session.call_tool("get_wrong", {"repo": "a"})
        assert result.isError
        assert "a is broken" in result.content[0].text  # type: ignore[union-attr]
        with pytest.raises(McpError) as unknown:
            await session.get_prompt("unknown")
        assert unknown.value.error.code != 403
        while len(place.answers) < len(place.events) - place.open_streams:
            await asyncio.sleep(0.01)  # what is known at the end of a stream comes after what it brought
        kinds = [(one.answer, one.http_status) for one in place.answers[-2:]]
        assert kinds == [("tool_error", 200), ("rpc_error", 200)]
        assert place.answers[-1].rpc_code == unknown.value.error.code
        assert [one.action_id for one in place.answers[-2:]] == [one.action_id for one in place.events[-2:]]
        assert {one.answer for one in place.answers} >= {"result", "accepted"}


async def test_a_server_asks_back_where_the_answer_is_allowed(streaming: McpServer, tmp_path: Path) -> None:
    async def sampled(context: Any, asked: types.CreateMessageRequestParams) -> types.CreateMessageResult:
        text = types.TextContent(type="text", text="yes")
        return types.CreateMessageResult(role="assistant", content=text, model="m")

    async with (
        mcp_placed(streaming.port, tmp_path, DEPLOYS) as place,
        place.session(sampling_callback=sampled) as session,
    ):
        result = await session.call_tool("get_thought", {"repo": "a"})
        assert result.content[0].text == "thought: yes"  # type: ignore[union-attr]
    async with mcp_placed(streaming.port, tmp_path, READS) as place, place.http() as http:
        answer = {"jsonrpc": "2.0", "id": 1, "result": {}}
        denied = await http.post(URL, json=answer, headers=await opened(http))
        assert (denied.status_code, denied.json()["id"]) == (403, None)
        assert denied.json()["error"]["data"]["permission"]["verbs"] == ["deploy"]


async def test_a_list_that_comes_in_a_stream_of_the_servers_is_cut_down(tmp_path: Path) -> None:
    tools = b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"get_issue"},{"name":"push"}]}}'
    event = b"id: 1\ndata: " + tools + b"\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(event)
    async with (
        Target(respond=lambda _: head + event).serving() as target,
        mcp_placed(target.port, tmp_path, READS) as place,
        place.http() as http,
    ):
        answer = await http.get(URL, headers={"Accept": "text/event-stream"})
        assert (
            answer.text
            == 'id: 1\ndata: {"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"get_issue"}]}}\n\n'
        )


async def test_a_stream_that_is_resumed_tells_no_more_than_it_would_have(tmp_path: Path) -> None:
    """The server primes each stream with an id (2025-11-25), from which all of it can be asked for again."""
    async with (
        mcp_serving(resumable=True) as server,
        mcp_placed(server.port, tmp_path, READS) as place,
        place.http() as http,
    ):
        headers = {**await opened(http, "2025-11-25"), "MCP-Protocol-Version": "2025-11-25"}
        first = await http.post(URL, json=message("tools/list"), headers=headers)
        assert first.status_code == 200
        ids = [line.removeprefix("id: ") for line in first.text.splitlines() if line.startswith("id: ")]
        assert len(ids) == 2
        async with http.stream("GET", URL, headers={**headers, "Last-Event-ID": ids[0]}) as resumed:
            assert resumed.status_code == 200
            line = await anext(line async for line in resumed.aiter_lines() if line.startswith("data: "))
        listed = json.loads(line.removeprefix("data: "))["result"]["tools"]
        assert {tool["name"] for tool in listed} == {"get_issue", "get_wrong", "get_changed", "get_thought"}


@pytest.mark.parametrize(
    ("media", "body", "code"),
    [
        (b"text/html", b"<p>", "target_unreadable"),
        (b"application/json", b"[]", "target_unreadable"),
        (b"application/json", b'{"id":1,"id":1}', "target_unreadable"),
    ],
)
async def test_an_answer_that_nobody_can_be_sure_of_is_not_forwarded(
    tmp_path: Path, media: bytes, body: bytes, code: str
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (media, len(body))
    async with (
        Target(respond=lambda _: head + body).serving() as target,
        mcp_placed(target.port, tmp_path, READS) as place,
        place.http() as http,
    ):
        answer = await http.post(URL, json=INITIALIZE, headers=HEADERS)
        assert (answer.status_code, answer.json()["code"]) == (502, code)
        assert [one.answer for one in place.answers] == ["none"]


async def test_a_session_that_is_anothers_is_not_given_out_again(tmp_path: Path) -> None:
    body = b'{"jsonrpc":"2.0","id":1,"result":{}}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nMcp-Session-Id: same\r\nContent-Length: %d\r\n\r\n"
    answer = head % len(body) + body
    async with (
        Target(respond=lambda _: answer).serving() as target,
        mcp_placed(target.port, tmp_path, READS) as place,
        place.http() as http,
    ):
        assert (await http.post(URL, json=INITIALIZE, headers=HEADERS)).status_code == 200
        place.handle = place.place.leased(READS).lease_id
        taken = await http.post(URL, json=INITIALIZE, headers=HEADERS)
        assert (taken.status_code, taken.json()["code"]) == (502, "mcp_session_taken")
        first = place.events[0].lease_id
        assert first is not None
        place.table.revoke(first, place.place.ledger.clock.ms)
        again = await http.post(URL, json=INITIALIZE, headers=HEADERS)
        assert again.status_code == 200, "what is over holds nothing"


async def test_a_server_that_is_in_trouble_is_told_apart(tmp_path: Path) -> None:
    unwell = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
    async with (
        Target(respond=lambda _: unwell).serving() as target,
        mcp_placed(target.port, tmp_path, READS) as place,
        place.http() as http,
    ):
        assert (await http.post(URL, json=INITIALIZE, headers=HEADERS)).status_code == 500
        assert [(one.answer, one.http_status) for one in place.answers] == [("transport_error", 500)]


async def test_the_streams_of_a_session_end_with_its_lease(streaming: McpServer, tmp_path: Path) -> None:
    changed = asyncio.Event()

    async def heard(said: Any) -> None:
        if isinstance(said, types.ServerNotification) and isinstance(
            said.root, types.ToolListChangedNotification
        ):
            changed.set()

    async with mcp_placed(streaming.port, tmp_path, READS) as place:
        async with place.session(message_handler=heard) as session:
            while not any(event.method == "GET" for event in place.events):
                await asyncio.sleep(0.01)
            while not changed.is_set():  # the server drops what it says before the stream is open
                await session.call_tool("get_changed", {"repo": "a"})
        async with place.http() as http:
            headers = await opened(http)
            async with http.stream("GET", URL, headers={**headers, "Accept": "text/event-stream"}) as stream:
                assert stream.status_code == 200
                lease_id = place.events[-1].lease_id
                assert lease_id is not None
                place.table.revoke(lease_id, place.place.ledger.clock.ms)
                with pytest.raises(httpx.RemoteProtocolError):
                    await stream.aread()
            answer = await http.post(URL, json=message("tools/list"), headers=headers)
            assert answer.status_code == 404, "so a client knows that it has to initialize again"
            assert answer.json()["code"] == "mcp_session_unknown"


async def test_a_session_is_its_leases_and_nobody_elses(streaming: McpServer, tmp_path: Path) -> None:
    async with mcp_placed(streaming.port, tmp_path, READS) as place, place.http() as http:
        headers = await opened(http)
        call = message("tools/call", name="get_issue", arguments={"repo": "a"})
        other = place.place.leased(DEPLOYS)
        push = message("tools/call", name="push", arguments={"repo": "a"})
        said = (await http.post(URL, json=push, headers=headers)).json()
        assert said["error"]["data"]["code"] == "beyond_lease", (
            "another lease of the task does not count in it"
        )
        assert place.events[-1].lease_id == place.events[0].lease_id, (
            "the record says by which one it did not go"
        )
        place.handle = other.lease_id
        said = (await http.post(URL, json=call, headers=headers)).json()
        assert said["error"]["data"]["code"] == "mcp_session_other_lease"
        place.agent, place.handle = "thief", None
        said = (await http.post(URL, json=call, headers=headers)).json()
        assert said["error"]["data"]["code"] == "mcp_session_other_agent"
        for method in ("GET", "DELETE"):
            assert (await http.request(method, URL, headers=headers)).status_code == 403
        place.agent = "bot"
        made_up = {**headers, "Mcp-Session-Id": "made-up"}
        assert (await http.post(URL, json=call, headers=made_up)).status_code == 404
        resumed = {"Accept": "text/event-stream", "Last-Event-ID": "1"}
        answer = await http.get(URL, headers=resumed)
        assert (answer.status_code, answer.json()["code"]) == (403, "mcp_resume_unbound")
        assert (await http.post(URL, json=call, headers=headers)).status_code == 200
        assert (await http.delete(URL, headers=headers)).status_code == 200
    assert streaming.calls == ["get_issue a"]


EMPTY = {
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "of no length": b"Content-Length: 0\r\n\r\n",
    "of no JSON": b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("framing", EMPTY)
@pytest.mark.parametrize("status", [b"200 OK", b"202 Accepted"])
async def test_empty_answer_to_a_message_without_an_id_is_forwarded(
    tmp_path: Path, status: bytes, framing: str
) -> None:
    """Servers by the TypeScript SDK end a session so, in chunks."""
    async with (
        Target(lambda _: b"HTTP/1.1 " + status + b"\r\n" + EMPTY[framing]).serving() as target,
        mcp_placed(target.port, tmp_path, READS) as place,
        place.http() as http,
    ):
        ended = await http.delete(URL, headers=HEADERS)
        told = await http.post(URL, json=message("notifications/initialized", None), headers=HEADERS)
        for answer in (ended, told):
            assert (answer.status_code, answer.content) == (int(status[:3]), b"")
    assert [one.answer for one in place.answers] == ["accepted", "accepted"]


@pytest.mark.parametrize("framing", ["chunked", "of no JSON"])
async def test_empty_answer_to_a_request_is_not_forwarded(tmp_path: Path, framing: str) -> None:
    async with (
        Target(lambda _: b"HTTP/1.1 200 OK\r\n" + EMPTY[framing]).serving() as target,
        mcp_placed(target.port, tmp_path, READS) as place,
        place.http() as http,
    ):
        answer = await http.post(URL, content=CALL, headers=HEADERS)
        assert (answer.status_code, answer.json()["code"]) == (502, "target_unreadable")


@pytest.mark.parametrize("media", [b"", b"Content-Type: text/plain\r\n"])
async def test_answer_with_text_to_the_end_of_a_session_is_not_forwarded(
    tmp_path: Path, media: bytes
) -> None:
    text = b"HTTP/1.1 200 OK\r\n" + media + b"Content-Length: 2\r\n\r\nok"
    async with (
        Target(lambda _: text).serving() as target,
        mcp_placed(target.port, tmp_path, READS) as place,
        place.http() as http,
    ):
        answer = await http.delete(URL, headers=HEADERS)
        assert (answer.status_code, answer.json()["code"]) == (502, "target_unreadable")


CALL = json.dumps(message("tools/call", name="get_issue", arguments={"repo": "a"})).encode()


@pytest.mark.parametrize(
    ("body", "headers", "code"),
    [
        (b"[" + CALL + b"]", {}, "mcp_batch"),
        (CALL + b"x", {}, "mcp_unreadable"),
        (CALL.replace(b'"repo": "a"', b'"repo": "a", "repo": "b"'), {}, "mcp_unreadable"),
        (gzip.compress(CALL), {"Content-Encoding": "gzip"}, "mcp_compressed"),
        (CALL, {"Content-Encoding": "br"}, "mcp_compressed"),
        (gzip.compress(CALL), {}, "mcp_unreadable"),
        (CALL, {"Content-Type": "text/plain"}, "mcp_media_type"),
        (CALL, {"Content-Type": "application/json; charset=utf-7"}, "mcp_media_type"),
        (CALL.decode().encode("utf-16"), {}, "mcp_unreadable"),
        (CALL, {"Mcp-Method": "tools/list"}, "mcp_header"),
        (CALL, {"Mcp-Name": "push"}, "mcp_header"),
        (CALL, {"Mcp-Param-Repo": "b"}, "mcp_header"),
    ],
)
async def test_ambiguous_mcp_message_is_rejected_before_the_server(
    streaming: McpServer, tmp_path: Path, body: bytes, headers: dict[str, str], code: str
) -> None:
    async with mcp_placed(streaming.port, tmp_path, READS) as place, place.http() as http:
        own = await opened(http)
        before = len(streaming.tokens)
        answer = await http.post(URL, content=body, headers={**own, **headers})
        said = answer.json()
        assert said["jsonrpc"] == "2.0"
        assert said["error"]["data"]["code"] == code
        assert (answer.status_code, said["error"]["code"]) == (400 if said["id"] is None else 200, 400)
        assert len(streaming.tokens) == before
    assert streaming.calls == []
    assert place.codes == [code]


async def test_a_task_of_a_server_is_its_leases_and_nobody_elses(tmp_path: Path) -> None:
    """The server's answer creates a task (2025-11-25), which the lease of the call asks about, and no other."""
    made = b'{"jsonrpc":"2.0","id":1,"result":{"task":{"taskId":"t1","status":"working"},"tasks":[{"taskId":"t2"}]}}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(made)
    rules = (*RULES, rule("tasks/get", "read", "env/server"), rule("tasks/list", "read", "env/server"))
    stated = {**HEADERS, "MCP-Protocol-Version": "2025-11-25"}
    async with (
        Target(respond=lambda _: head + made).serving() as target,
        mcp_placed(target.port, tmp_path, READS, rules=rules) as place,
        place.http() as http,
    ):

        async def code(said: dict[str, Any]) -> str | None:
            answer = (await http.post(URL, json=said, headers=stated)).json()
            return str(answer["error"]["data"]["code"]) if "error" in answer else None

        call = message("tools/call", name="get_issue", arguments={"repo": "a"}, task={"ttl": 60_000})
        asks = message("tasks/get", taskId="t1")
        assert await code(asks) == "mcp_task_unknown"
        assert await code(call) is None
        assert await code(asks) is None
        assert await code(message("tasks/get", taskId="t2")) == "mcp_task_unknown"
        listed = await http.post(URL, json=message("tasks/list"), headers=stated)
        assert listed.json()["result"]["tasks"] == [], "t2 is nobody's here"
        first = place.events[1].lease_id
        place.agent = "thief"
        assert await code(asks) == "mcp_task_other_agent"
        place.agent, place.handle = "bot", place.place.leased(READS).lease_id
        assert await code(asks) == "mcp_task_other_lease"
        place.handle = None
        assert first is not None
        place.table.revoke(first, place.place.ledger.clock.ms)
        assert await code(asks) == "mcp_task_unknown"


async def test_message_of_another_mcp_revision_is_rejected_before_the_server(
    streaming: McpServer, tmp_path: Path
) -> None:
    async with mcp_placed(streaming.port, tmp_path, READS) as place, place.http() as http:
        before = len(streaming.tokens)
        for version, said, code in (
            ("2024-11-05", message("tools/list"), "mcp_version"),
            ("2025-06-18", message("tasks/list"), "mcp_method"),
            ("2025-11-25", message("server/discover"), "mcp_method"),
            (
                "2025-06-18",
                INITIALIZE | {"params": {**INITIALIZE["params"], "protocolVersion": "x"}},
                "mcp_header",
            ),
        ):
            answer = await http.post(URL, json=said, headers={**HEADERS, "MCP-Protocol-Version": version})
            assert (answer.status_code, answer.json()["error"]["code"]) == (200, 400)
            assert answer.json()["error"]["data"]["code"] == code
        assert len(streaming.tokens) == before
