"""A server of MCP by its authors' own SDK, listening for real."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import mcp.types as types
import uvicorn
from mcp.server.fastmcp import Context, FastMCP
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send


class Events(EventStore):
    """What was sent, so that streams can be resumed. None is of much use to who has no id of one."""

    def __init__(self) -> None:
        self._sent: list[tuple[str, types.JSONRPCMessage | None]] = []

    async def store_event(self, stream_id: str, message: types.JSONRPCMessage | None) -> str:
        self._sent.append((stream_id, message))
        return str(len(self._sent))

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        stream_id = self._sent[int(last_event_id) - 1][0]
        for number, (of, message) in enumerate(self._sent, 1):
            if number > int(last_event_id) and of == stream_id and message is not None:
                await send_callback(EventMessage(message, str(number)))
        return stream_id


@dataclass
class McpServer:
    """What it was asked by: `calls` has the tools, `tokens` the credential of each request."""

    port: int = 0
    calls: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def made(self, *, json_response: bool, stateless: bool, resumable: bool) -> FastMCP:
        store = Events() if resumable else None
        server = FastMCP("repos", json_response=json_response, stateless_http=stateless, event_store=store)

        @server.tool()
        def get_issue(repo: str) -> str:
            self.calls.append(f"get_issue {repo}")
            return f"an issue of {repo}"

        @server.tool()
        def push(repo: str, dry_run: bool = False) -> str:
            self.calls.append(f"push {repo} {dry_run}")
            return "pushed"

        @server.tool()
        def get_wrong(repo: str) -> str:
            raise ValueError(f"{repo} is broken")

        @server.tool()
        async def get_changed(repo: str, context: Context) -> str:
            """Tells the session over its own stream, which nobody asked for with this request."""
            await context.session.send_tool_list_changed()
            await context.report_progress(1, 2)
            return repo

        @server.tool()
        async def get_thought(repo: str, context: Context) -> str:
            """Asks the agent's model, and says what that says."""
            question = types.SamplingMessage(role="user", content=types.TextContent(type="text", text=repo))
            said = await context.session.create_message([question], max_tokens=10)
            return f"thought: {said.content.text}"

        @server.prompt()
        def review() -> str:
            return "look at it"

        @server.prompt()
        def merge() -> str:
            return "merge it"

        return server


@contextlib.asynccontextmanager
async def mcp_serving(
    *,
    json_response: bool = False,
    stateless: bool = False,
    resumable: bool = False,
    certificate: Path | None = None,
) -> AsyncIterator[McpServer]:
    """The server at `/mcp`, until the end. `certificate`: with its key, where it speaks TLS."""
    found = McpServer()
    made = found.made(json_response=json_response, stateless=stateless, resumable=resumable)
    app = made.streamable_http_app()
    config = uvicorn.Config(
        _noting(app, found), port=0, log_level="error", timeout_graceful_shutdown=1, ssl_certfile=certificate
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    found.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.should_exit = True
        await task


def _noting(app: ASGIApp, found: McpServer) -> ASGIApp:
    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found.tokens.append(Request(scope).headers.get("authorization", ""))
        await app(scope, receive, send)

    return noted
