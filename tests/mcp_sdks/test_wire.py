"""Revision 2026-07-28 on the wire, before a server by the official SDK.

What two readers could take differently, and what belongs to another sender, does not reach it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from ringfence.messages.registry import RequestRule, VerbFloor
from tests.gateway.mcp_place import DEPLOYS, TOKEN, URL
from tests.mcp_sdks.conftest import NEEDED, STATELESS_RULES, Between, Server, between, serving
from tests.support.in_memory_registry import permission

REVISION = "2026-07-28"
HOUR_MS = 3_600_000
VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
OWN = f'"{VERSION_KEY}"'
META = {VERSION_KEY: REVISION, "io.modelcontextprotocol/clientCapabilities": {"elicitation": {"form": {}}}}


@pytest_asyncio.fixture(loop_scope="package", scope="module")
async def server(sdks: Path) -> AsyncIterator[Server]:
    async with serving(sdks) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="package")
async def place(server: Server, tmp_path: Path) -> AsyncIterator[Between]:
    server.notes.clear()
    async with between(server, tmp_path, NEEDED) as place:
        yield place


def message(method: str, id: Any = 1, meta: Any = META, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": {**params, "_meta": meta}}


def call(tool: str = "get_issue", repo: str = "a", **params: Any) -> dict[str, Any]:
    return message("tools/call", name=tool, arguments={"repo": repo}, **params)


def headers(said: dict[str, Any], **other: str | None) -> dict[str, str]:
    """The headers that the revision requires for a message."""
    found: dict[str, str | None] = {
        "Accept": "application/json, text/event-stream",
        "Content-Type": "application/json",
        "MCP-Protocol-Version": REVISION,
        "Mcp-Method": said.get("method"),
        "Mcp-Name": said.get("params", {}).get("name") or said.get("params", {}).get("uri"),
        **other,
    }
    return {name: value for name, value in found.items() if value is not None}


async def post(place: Between, said: dict[str, Any], **other: str | None) -> httpx.Response:
    async with place.place.http() as http:
        return await http.post(URL, content=json.dumps(said), headers=headers(said, **other))


def result_of(answer: httpx.Response) -> dict[str, Any]:
    """The result, or the error, of a JSON answer or of the last event of a stream."""
    text = answer.text
    if answer.headers["content-type"].startswith("text/event-stream"):
        text = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")][-1]
    said: dict[str, Any] = json.loads(text)
    return said.get("result") or said["error"]


SMUGGLED: list[tuple[dict[str, Any], dict[str, str | None], str, int]] = [
    (call(), {"Mcp-Method": "tools/list"}, "mcp_header", -32020),
    (call(), {"Mcp-Method": None}, "mcp_header", -32020),
    (call(), {"Mcp-Name": "get_changed"}, "mcp_header", -32020),
    (call(), {"Mcp-Name": None}, "mcp_header", -32020),
    (call(), {"Mcp-Name": "=?base64?cHVzaA==?="}, "mcp_header", -32020),
    (call(), {"Mcp-Param-Repo": "b"}, "mcp_header", -32020),
    (call("get_routed"), {"Mcp-Param-Repository": "b"}, "mcp_header", -32020),
    (call(), {"Mcp-Whatever": "b"}, "mcp_header", -32020),
    (call(), {"Mcp-Session-Id": "made-up"}, "mcp_header", -32020),
    (call(), {"MCP-Protocol-Version": "2025-11-25"}, "mcp_header", -32020),
    (call(), {"MCP-Protocol-Version": None}, "mcp_header", -32020),
    (call(meta={**META, VERSION_KEY: "2025-11-25"}), {}, "mcp_header", -32020),
    (call(meta={VERSION_KEY: REVISION}), {}, "mcp_meta", -32602),
    (call(meta={}), {}, "mcp_meta", -32602),
    (
        call(meta={**META, VERSION_KEY: "2027-01-01"}),
        {"MCP-Protocol-Version": "2027-01-01"},
        "mcp_version",
        -32022,
    ),
    (message("initialize", protocolVersion=REVISION), {}, "mcp_method", -32601),
    (message("ping"), {}, "mcp_method", -32601),
    (message("resources/subscribe"), {}, "mcp_method", -32601),
    (message("acme/anything"), {}, "mcp_method", -32601),
    (call(requestState="made up"), {}, "mcp_state_invalid", -32602),
    (call(inputResponses={"a": {}}), {}, "mcp_state_missing", -32602),
    (message("tasks/get", taskId="made up"), {"Mcp-Name": "made up"}, "mcp_task_unknown", -32602),
]


@pytest.mark.parametrize(("said", "other", "code", "rpc_code"), SMUGGLED)
async def test_contradictions_do_not_reach_the_server(
    place: Between, said: dict[str, Any], other: dict[str, str | None], code: str, rpc_code: int
) -> None:
    before = len(place.server.notes)
    rpc_status = {-32601: 404}.get(rpc_code, 400)
    answer = await post(place, said, **other)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["data"]["code"]) == (rpc_status, rpc_code, code)
    assert answer.json()["id"] == said["id"]
    assert place.place.codes == [code]
    assert len(place.server.notes) == before


async def test_an_unknown_revision_names_those_that_are_known(place: Between) -> None:
    said = call(meta={**META, VERSION_KEY: "2027-01-01"})
    error = (await post(place, said, **{"MCP-Protocol-Version": "2027-01-01"})).json()["error"]
    assert error["data"]["supported"] == ["2026-07-28"]
    assert error["data"]["requested"] == "2027-01-01"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (lambda text: f"[{text}]", "mcp_batch"),
        (lambda text: f"[{text},{text}]", "mcp_batch"),
        (lambda text: text.replace('"repo": "a"', '"repo": "a", "repo": "b"'), "mcp_unreadable"),
        (lambda text: text.replace('"id": 1', '"id": 1, "id": 2'), "mcp_unreadable"),
        (lambda text: text.replace(OWN, f'{OWN}: "2025-11-25", {OWN}'), "mcp_unreadable"),
        (lambda text: text.replace(VERSION_KEY, VERSION_KEY.lower()), "mcp_invalid"),
        (lambda text: text.replace('"name"', '"Name": "push", "name"'), "mcp_invalid"),
        (lambda text: text + "{}", "mcp_unreadable"),
    ],
)  # fmt: skip
async def test_ambiguous_message_is_rejected_before_the_server(place: Between, body: Any, code: str) -> None:
    said = call()
    async with place.place.http() as http:
        answer = await http.post(URL, content=body(json.dumps(said)), headers=headers(said))
    assert (answer.status_code, answer.json()["error"]["data"]["code"]) == (400, code)
    assert place.server.calls == []


async def test_headers_that_come_twice_are_refused(place: Between) -> None:
    said = call()
    for name in ("Mcp-Method", "Mcp-Name", "MCP-Protocol-Version"):
        twice = [*headers(said).items(), (name, headers(said)[name])]
        async with place.place.http() as http:
            answer = await http.post(URL, content=json.dumps(said), headers=twice)
        assert answer.json()["error"]["data"]["code"] == "mcp_header", name
    async with place.place.http() as http:
        answer = await http.post(URL, content=json.dumps(said), headers={**headers(said), "Mcp_Name": "push"})
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_http")
    assert place.server.calls == []


async def test_denied_call_names_the_missing_permission_and_how_to_ask(place: Between) -> None:
    error = (await post(place, call("push"))).json()["error"]
    data = error["data"]
    assert (error["code"], data["code"], data["side"]) == (403, "beyond_lease", "lease")
    assert data["permission"] == {"target": "staging", "verbs": ["deploy"], "resources": ["env/a"]}
    assert "--allow staging:deploy:env/a" in data["ask"]


async def test_agents_tokens_go_no_further(place: Between) -> None:
    answer = await post(place, call(), Authorization="Bearer the-agents-own")
    assert answer.status_code == 200
    assert "the-agents-own" not in json.dumps(place.server.notes)
    assert {note["token"] for note in place.server.notes if "token" in note} == {TOKEN}


async def test_cached_answers_are_private_and_end_with_the_lease(place: Between) -> None:
    for method, most_ms in (("server/discover", HOUR_MS), ("tools/list", HOUR_MS), ("resources/list", 0)):
        result = result_of(await post(place, message(method)))
        lease = place.place.table.get(place.place.events[-1].lease_id)
        left_ms = lease.deadline * 1000 - place.place.place.ledger.clock.ms
        assert (result["cacheScope"], result["ttlMs"]) == ("private", min(left_ms, most_ms))
        assert left_ms < HOUR_MS, "or the lease would not show"


# --- rounds of one request ---


@pytest_asyncio.fixture(loop_scope="package")
async def wide(server: Server, tmp_path: Path) -> AsyncIterator[Between]:
    server.notes.clear()
    async with between(server, tmp_path, DEPLOYS) as place:
        yield place


async def first_round(place: Between) -> tuple[str, dict[str, Any]]:
    """The sealed state of a call that the server asks back about, and the answers to it."""
    result = result_of(await post(place, call("get_confirmed")))
    assert result["resultType"] == "input_required"
    answers = {key: {"action": "accept", "content": {"ok": True}} for key in result["inputRequests"]}
    return result["requestState"], answers


async def test_a_round_goes_on_with_its_state(wide: Between) -> None:
    state, answers = await first_round(wide)
    assert state.startswith("rf1.")
    again = call("get_confirmed", id=2, requestState=state, inputResponses=answers)
    assert result_of(await post(wide, again))["content"][0]["text"] == "confirmed: True"
    assert wide.server.calls == ["get_confirmed a"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"arguments": {"repo": "b"}}, "mcp_state_other_call"),
        ({"name": "get_issue"}, "mcp_state_other_call"),
        ({"arguments": {"repo": "a", "more": 1}}, "mcp_state_other_call"),
    ],
)
async def test_a_state_is_of_its_call_alone(wide: Between, change: dict[str, Any], code: str) -> None:
    state, answers = await first_round(wide)
    said = call("get_confirmed", requestState=state, inputResponses=answers)
    said["params"] |= change
    error = result_of(await post(wide, said))
    assert error["data"]["code"] == code
    assert wide.server.calls == []


async def test_another_agents_round_cannot_be_replayed(wide: Between) -> None:
    state, answers = await first_round(wide)
    again = call("get_confirmed", requestState=state, inputResponses=answers)
    played = wide.place
    lease_id = played.events[-1].lease_id
    played.agent = "thief"
    assert result_of(await post(wide, again))["data"]["code"] == "mcp_state_other_agent"
    played.agent = "bot"
    other = played.place.leased(DEPLOYS)
    played.handle = other.lease_id
    assert result_of(await post(wide, again))["data"]["code"] == "mcp_state_other_lease"
    played.handle = None
    assert result_of(await post(wide, again))["content"][0]["text"] == "confirmed: True"
    assert played.events[-1].lease_id == lease_id, "the lease of the first round decides the second"
    state, answers = await first_round(wide)
    played.table.revoke(lease_id, played.place.ledger.clock.ms)
    played.table.revoke(other.lease_id, played.place.ledger.clock.ms)
    ended = call("get_confirmed", requestState=state, inputResponses=answers)
    assert result_of(await post(wide, ended))["data"]["code"] == "mcp_state_unknown"
    assert wide.server.calls == ["get_confirmed a"]


async def test_a_retry_is_decided_anew(wide: Between) -> None:
    state, answers = await first_round(wide)
    ledger, answers_denied = (
        wide.place.place.ledger,
        [one for one in STATELESS_RULES if not _is_response(one)],
    )
    record = ledger.directory.target("staging")
    assert record is not None
    backend = record.state.backend
    verbs = (VerbFloor(verb="read"), VerbFloor(verb="deploy"))
    ledger.give(
        ledger.target_set("olga", "staging", backend=backend, requests=tuple(answers_denied), verbs=verbs)
    )
    again = call("get_confirmed", requestState=state, inputResponses=answers)
    assert result_of(await post(wide, again))["data"]["code"] == "request_unmapped"
    assert wide.server.calls == []


def _is_response(rule: RequestRule) -> bool:
    return rule.mcp is not None and rule.mcp.method == "response"


# --- streams ---


async def test_a_subscription_ends_with_its_lease(place: Between) -> None:
    said = message(
        "subscriptions/listen",
        notifications={"toolsListChanged": True, "resourceSubscriptions": ["note:///a"]},
    )
    async with (
        place.place.http() as http,
        http.stream("POST", URL, json=said, headers=headers(said)) as stream,
    ):
        assert stream.status_code == 200
        lines = stream.aiter_lines()
        async for line in lines:
            if line.startswith("data: "):
                break
        assert json.loads(line.removeprefix("data: "))["method"] == "notifications/subscriptions/acknowledged"
        lease_id = place.place.events[-1].lease_id
        assert lease_id is not None
        place.place.table.revoke(lease_id, place.place.place.ledger.clock.ms)
        with pytest.raises(httpx.RemoteProtocolError):
            async with asyncio.timeout(20):
                async for _ in lines:
                    pass
    resources = [event.resource for event in place.place.events if event.allowed]
    assert resources == ["env/a"], "the event names the first resource"


async def test_a_subscription_to_what_may_not_be_read_is_refused(place: Between) -> None:
    said = message(
        "subscriptions/listen", notifications={"resourceSubscriptions": ["note:///a", "note:///b"]}
    )
    error = result_of(await post(place, said))
    assert (error["data"]["code"], error["data"]["permission"]["resources"]) == ("beyond_lease", ["env/b"])


async def test_all_parts_of_a_message_are_allowed_by_one_lease(server: Server, tmp_path: Path) -> None:
    """One credential is injected, and the stream ends with one lease."""
    halves = (
        permission("env/server", "env/a", verbs=("read",)),
        permission("env/server", "env/b", verbs=("read",)),
    )
    said = message(
        "subscriptions/listen", notifications={"resourceSubscriptions": ["note:///a", "note:///b"]}
    )
    async with between(server, tmp_path, *halves) as place:
        error = result_of(await post(place, said))
    assert (error["data"]["code"], error["data"]["permission"]["resources"]) == ("beyond_lease", ["env/b"])
