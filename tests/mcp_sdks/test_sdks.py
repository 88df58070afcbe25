"""Each official SDK as client and as server, in every revision that both speak: the task uses what it may."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from ringfence.messages.registry import RequestRule
from tests.gateway.mcp_place import DEPLOYS
from tests.mcp_sdks.conftest import STATELESS_RULES, Between, Server, agent, between, serving, serving_1

CLIENTS = {
    "Python 1": ("client_1.py", "", "2025-11-25"),
    "Python 2": ("client.py", "auto", "2026-07-28"),
    "Python 2, handshake": ("client.py", "legacy", "2025-11-25"),
    "TypeScript": ("client.mjs", "auto", "2026-07-28"),
    "TypeScript, handshake": ("client.mjs", "legacy", "2025-11-25"),
}
"""By name: the program, how it negotiates, and what it speaks with a server of 2.x."""
TOOLS = {"get_issue", "get_wrong", "get_changed"}
"""Tools of both servers that the lease may use."""


@contextlib.asynccontextmanager
async def server_of(name: str, sdks: Path) -> AsyncIterator[Server]:
    if name == "1":
        async with serving_1() as server:
            yield server
    elif name == "1, stateless":
        async with serving_1(stateless=True, json_response=True) as server:
            yield server
    else:
        async with serving(sdks, *(["json"] if name == "2, json" else [])) as server:
            yield server


def named(place: Between) -> list[str]:
    return [event.resource or "" for event in place.place.events if event.allowed]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("server_name", ["1", "1, stateless", "2", "2, json"])
async def test_a_task_uses_what_it_may(sdks: Path, tmp_path: Path, client: str, server_name: str) -> None:
    program, mode, revision = CLIENTS[client]
    async with server_of(server_name, sdks) as server, between(server, tmp_path) as place:
        said = await agent(
            sdks, program, place.url, mode,
            ["version"], ["tools"], ["prompts"], ["call", "get_issue", {"repo": "a"}],
            ["call", "get_issue", {"repo": "b"}], ["call", "push", {"repo": "a"}], ["prompt", "review"],
            ["prompt", "merge"], ["call", "get_wrong", {"repo": "a"}],
        )  # fmt: skip
        version, tools, prompts, called, other, pushed, prompt, no_prompt, wrong = said
        assert version["result"] == (revision if server_name.startswith("2") else "2025-11-25")
        assert set(tools["result"]) >= TOOLS
        assert "push" not in tools["result"]
        assert prompts["result"] == ["review"]
        assert called["result"] == [False, "an issue of a"]
        for refused, permission in ((other, ("read", "env/b")), (pushed, ("deploy", "env/a"))):
            assert (refused["code"], refused["data"]["code"], refused["data"]["side"]) == (
                403,
                "beyond_lease",
                "lease",
            )
            wanted = refused["data"]["permission"]
            assert (wanted["verbs"], wanted["resources"]) == ([permission[0]], [permission[1]])
            assert f"staging:{permission[0]}:{permission[1]}" in refused["data"]["ask"]
        assert prompt["result"] == "look at it"
        assert (no_prompt["code"], no_prompt["data"]["code"]) == (403, "request_unmapped")
        assert wrong["result"][0] is True
        assert "env/a" in named(place)
    assert server.calls == ["get_issue a"]


@pytest.mark.parametrize("client", ["Python 2", "TypeScript"])
async def test_a_stateless_server_shows_only_what_is_behind_it(
    sdks: Path, tmp_path: Path, client: str
) -> None:
    program, mode, _ = CLIENTS[client]
    async with serving(sdks) as server, between(server, tmp_path) as place:
        said = await agent(
            sdks, program, place.url, mode,
            ["capabilities"], ["resources"], ["read", "note:///a"], ["read", "note:///b"],
            ["complete", "review", "prompt"], ["complete", "merge", "prompt"], ["call", "get_routed", {"repo": "a"}],
            ["tools"], ["call", "get_routed", {"repo": "a"}], ["call", "get_confirmed", {"repo": "a"}],
        )  # fmt: skip
        capabilities, resources, read, unread, completed, uncompleted, _, _, routed, unconfirmed = said
        assert {"tools", "prompts", "resources", "completions"} <= set(capabilities["result"])
        assert resources["result"] == ["note:///a"]
        assert read["result"] == "note a"
        assert (unread["code"], unread["data"]["code"]) == (403, "beyond_lease")
        assert completed["result"] == ["a1", "a2"]
        assert uncompleted["data"]["code"] == "request_unmapped"
        assert routed["result"] == [False, "routed to a"]
        assert unconfirmed["data"]["code"] == "beyond_lease", (
            "to answer the server is a permission of its own"
        )
        assert unconfirmed["data"]["permission"]["verbs"] == ["deploy"]
    async with serving(sdks) as server, between(server, tmp_path, rules=_without_resources()) as place:
        (capabilities,) = await agent(sdks, program, place.url, mode, ["capabilities"])
        assert "resources" not in capabilities["result"]
        assert "tools" in capabilities["result"]


def _without_resources() -> list[RequestRule]:
    return [one for one in STATELESS_RULES if one.mcp is None or not one.mcp.method.startswith("resources/")]


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_server_asks_the_client_where_the_answer_is_allowed(
    sdks: Path, tmp_path: Path, client: str
) -> None:
    program, mode, _ = CLIENTS[client]
    async with serving(sdks) as server, between(server, tmp_path, DEPLOYS) as place:
        (confirmed,) = await agent(sdks, program, place.url, mode, ["call", "get_confirmed", {"repo": "a"}])
        assert confirmed["result"] == [False, "confirmed: True"]
    assert server.calls == ["get_confirmed a"]


async def test_client_ends_its_session_at_a_server_by_the_typescript_sdk(sdks: Path, tmp_path: Path) -> None:
    async with (
        serving(sdks, program="http_server.mjs") as server,
        between(server, tmp_path) as place,
        httpx.AsyncClient() as http,
    ):
        headers = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-11-25"}
        params = {
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "clientInfo": {"name": "tests", "version": "1"},
        }
        opening = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
        opened = await http.post(place.url, json=opening, headers=headers)
        headers["Mcp-Session-Id"] = opened.headers["mcp-session-id"]
        told = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert (await http.post(place.url, json=told, headers=headers)).status_code == 202
        ended = await http.delete(place.url, headers=headers)
        assert (ended.status_code, ended.content) == (200, b"")
        assert [one.answer for one in place.place.answers] == ["result", "accepted", "accepted"]


async def test_a_subscriber_hears_of_what_it_may_read(sdks: Path, tmp_path: Path) -> None:
    async with serving(sdks) as server, between(server, tmp_path) as place:
        heard, refused = await agent(
            sdks,
            "client.py",
            place.url,
            "auto",
            ["listen", "note:///a"],
            ["listen", "note:///a", "note:///b"],
        )
        assert heard["result"] == ["ToolsListChanged", "note:///a"]
        assert (refused["data"]["code"], refused["data"]["permission"]["resources"]) == (
            "beyond_lease",
            ["env/b"],
        )
