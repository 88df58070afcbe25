"""A server of MCP by its authors' own SDK, listening for real."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import mcp.types as types
import uvicorn
from mcp.server.fastmcp import Context, FastMCP
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass
class McpServer:
    """What it was asked by: `calls` has the tools, `tokens` the credential of each request."""

    port: int = 0
    calls: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def made(self, *, json_response: bool, stateless: bool) -> FastMCP:
        server = FastMCP("repos", json_response=json_response, stateless_http=stateless)

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
async def mcp_serving(*, json_response: bool = False, stateless: bool = False) -> AsyncIterator[McpServer]:
    """The server at `/mcp`, until the end."""
    found = McpServer()
    app = found.made(json_response=json_response, stateless=stateless).streamable_http_app()
    config = uvicorn.Config(_noting(app, found), port=0, log_level="error", timeout_graceful_shutdown=1)
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
